"""Members that die: one, two, a whole group, all at once, again and again."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from slurm_rollout import proc
from slurm_rollout.barrier import Barrier, FleetFailed
from slurm_rollout.testing.fleet import wait_for
from tests.scenarios.lab import Lab, assert_recovered, budget, undisturbed


@pytest.mark.parametrize("rank", [0, 1], ids=["leader", "follower"])
def test_a_killed_member_brings_its_whole_group_back_and_no_other(lab: Lab, rank: int) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    master = fleet.group("actor/0")["master"]
    urls = fleet.group("actor/0")["urls"]
    epoch = fleet.barrier()["epoch"]
    fleet.kill("actor/0", rank)
    assert_recovered(fleet, "actor/0", 2, "engine_exited", rank)
    assert fleet.wait_event("failure", "actor/0")["data"]["restarted_peers"] == [1 - rank]
    assert not fleet.events("fence_waits"), "what was stopped left nothing behind"
    assert fleet.group("actor/0")["master"] == master
    assert fleet.group("actor/0")["urls"] == urls
    assert fleet.barrier()["epoch"] == epoch + 2
    assert undisturbed(fleet, "actor/1")
    assert fleet.group("actor/1")["incarnation"] == 1


def test_two_members_of_a_group_that_die_at_once_are_one_failure(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    victims, coordinator = [fleet.engine("actor/0", rank) for rank in (0, 1)], fleet.coordinator()
    os.kill(coordinator, signal.SIGSTOP)  # else the second may have been ended before it can be killed
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    os.kill(coordinator, signal.SIGCONT)
    assert_recovered(fleet, "actor/0", 2, "engine_exited")
    assert len(fleet.events("failure", "actor/0")) == 1
    assert budget(fleet, "actor/0")["restarts"]["left"] == budget(fleet, "actor/0")["restarts"]["of"] - 1
    assert undisturbed(fleet, "actor/1")


def test_two_groups_that_die_at_once_recover_in_parallel(lab: Lab) -> None:
    lab.fleet.fault("*", load_s=3.0, incarnations=[2])
    fleet = lab.up(groups=2)
    lab.wait_ready()
    for pid in [fleet.engine(group, 1) for group in ("actor/0", "actor/1")]:
        os.kill(pid, signal.SIGKILL)
    for group in ("actor/0", "actor/1"):
        assert_recovered(fleet, group, 2, "engine_exited", 1)
    launched = [fleet.wait_event("launching", g, 2)["at"] for g in ("actor/0", "actor/1")]
    ready = [fleet.wait_event("ready", g, 2)["at"] for g in ("actor/0", "actor/1")]
    assert max(launched) < min(ready)


def test_all_members_that_die_while_the_job_ends_cause_no_restart_and_no_charge(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    coordinator = fleet.coordinator()
    engines = [fleet.engine(group, rank) for group in ("actor/0", "actor/1") for rank in (0, 1)]
    before = budget(fleet, "actor/0")
    # The coordinator sees both at the same moment: nothing that it could observe says which came first.
    os.kill(coordinator, signal.SIGSTOP)
    for pid in engines:
        os.kill(pid, signal.SIGKILL)
    lab.end_job()
    wait_for("the engines' end", lambda: not any(proc.lives(pid, _started(pid)) for pid in engines))
    if lab.kind == "local":  # `up` passes TERM on; elsewhere Slurm tells both
        wait_for("the coordinator's TERM", lambda: _has_term_pending(coordinator))
    with suppress(ProcessLookupError):  # Slurm itself sends CONT before its TERM: it may be through by now
        os.kill(coordinator, signal.SIGCONT)
    lab.wait_ended()
    assert not [e for e in fleet.events("launching") if e["incarnation"] > 1]
    assert budget(fleet, "actor/0") == before
    assert fleet.barrier()["phase"] == "stopped"


def _started(pid: int) -> int:
    found = proc.read(pid)
    return found.started if found is not None else 0


def _has_term_pending(pid: int) -> bool:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["ShdPnd"], 16) & 1 << (signal.SIGTERM - 1))


def test_a_start_that_crashes_until_the_budget_is_spent_fails_its_group_and_disturbs_no_other(lab: Lab) -> None:
    lab.fleet.fault("actor/0/1", crash_at_start=True)
    fleet = lab.up(groups=2, pool="restart.max_start_failures = 2\nrestart.backoff_initial_s = 0.1")
    failed = fleet.wait_event("failed", "actor/0")
    assert failed["reason"] == "budget_spent"
    assert len(fleet.events("failure", "actor/0")) == 3
    fleet.wait_serving("actor/1", 1)
    # An event is written just before the barrier that goes with it.
    fleet.wait("actor/0 to be failed", lambda: fleet.group("actor/0").get("phase") == "failed")
    fleet.wait_phase("ready")
    assert fleet.barrier()["reason"] == "degraded"
    assert undisturbed(fleet, "actor/1")


def test_a_pool_that_cannot_be_ready_any_more_is_failed_and_a_waiting_trainer_is_told(lab: Lab) -> None:
    lab.fleet.fault("actor/0/1", crash_at_start=True)
    fleet = lab.up(groups=2, pool="min_ready = 2\nrestart.max_start_failures = 0")
    fleet.wait("a barrier file", fleet.barrier)
    with pytest.raises(FleetFailed, match="actor"):
        Barrier(str(fleet.run.barrier)).wait_ready(timeout=20)
    assert fleet.barrier()["phase"] == "failed"


def test_a_pool_below_its_quorum_waits_and_is_ready_again_when_the_group_is_back(lab: Lab) -> None:
    fleet = lab.up(groups=2, pool="min_ready = 2")
    lab.wait_ready()
    epoch = fleet.barrier()["epoch"]
    fleet.fault("actor/1/0", generation="503", incarnations=[2])
    fleet.kill("actor/1", 0)
    fleet.wait_phase("waiting")
    assert fleet.barrier()["epoch"] > epoch
    assert not fleet.group("actor/1")["urls"]
    fleet.fault("actor/1/0", generation="ok")
    assert Barrier(str(fleet.run.barrier)).wait_ready(after_epoch=epoch, timeout=20).epoch == epoch + 2
    assert fleet.barrier()["phase"] == "ready"
    assert undisturbed(fleet, "actor/0")
