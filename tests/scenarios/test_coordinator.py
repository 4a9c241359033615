"""A coordinator that dies, stops, or cannot write."""

from __future__ import annotations

import os
import signal
import time

import pytest

from slurm_rollout import proc
from slurm_rollout.testing.fleet import wait_for
from tests.scenarios.lab import PHASES, Lab, assert_recovered, heartbeats, undisturbed


@pytest.mark.parametrize("phase", PHASES)
def test_a_coordinator_killed_at_any_moment_is_replaced_and_nothing_is_started_twice(lab: Lab, phase: str) -> None:
    fleet = lab.up(groups=1, load_s=1.0)
    PHASES[phase](fleet)
    before = fleet.barrier()
    os.kill(fleet.coordinator(), signal.SIGKILL)
    fleet.wait_event("takeover")
    fleet.wait("the new term's first word", lambda: fleet.barrier().get("term") == 2)
    fleet.wait_phase("ready")
    after = fleet.barrier()
    assert after["term"] == 2
    assert after["epoch"] >= before["epoch"]
    assert after["seq"] > before["seq"]
    incarnation = fleet.group("actor/0")["incarnation"]
    for rank in (0, 1):
        alive = fleet.processes(ROLLOUT_GROUP="actor/0", ROLLOUT_RANK=str(rank))
        assert len(alive) == 1, "one engine a member"
        assert proc.environ(alive[0])["ROLLOUT_INCARNATION"] == str(incarnation)
    if phase in ("ready", "loading"):
        assert incarnation == 1, "what ran was adopted"
    launched = [e["incarnation"] for e in fleet.events("launching", "actor/0")]
    assert launched == sorted(set(launched)), "every incarnation was launched once"


def test_a_failure_that_happens_while_no_coordinator_lives_is_not_forgotten(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    coordinator = fleet.coordinator()
    victim = fleet.engine("actor/0", 1)
    os.kill(coordinator, signal.SIGKILL)
    os.kill(victim, signal.SIGKILL)
    fleet.wait_event("takeover")
    assert_recovered(fleet, "actor/0", 2, "engine_exited", 1)
    assert undisturbed(fleet, "actor/1")


def test_a_coordinator_that_was_stopped_for_a_while_blames_no_engine(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    coordinator = fleet.coordinator()
    os.kill(coordinator, signal.SIGSTOP)
    stopped_at, seq = time.monotonic(), fleet.barrier()["seq"]
    # Longer than any hang takes to be found.
    wait_for("five seconds without a heartbeat", lambda: time.monotonic() - stopped_at > 5.0)
    assert fleet.barrier()["seq"] <= seq + 1
    os.kill(coordinator, signal.SIGCONT)
    heartbeats(fleet, 10)
    assert not fleet.events("failure")


@pytest.mark.parametrize("fault", ["disk full", "read-only"])
def test_while_the_run_directory_cannot_be_written_nothing_is_started_and_all_goes_on_after_it(
    lab: Lab, fault: str
) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    break_ = lab.disk_full if fault == "disk full" else lab.read_only
    coordinator, survivor = fleet.coordinator(), fleet.engine("actor/1", 0)
    break_(True)
    fleet.kill("actor/0", 1)
    began, seq = time.monotonic(), fleet.barrier()["seq"]
    wait_for("longer than a recovery takes", lambda: time.monotonic() - began > 4.0)
    assert fleet.barrier()["seq"] <= seq + 1
    assert not fleet.processes(ROLLOUT_INCARNATION="2"), "nothing is started that cannot be written down"
    assert fleet.engine("actor/1", 0) == survivor
    break_(False)
    fleet.wait_serving("actor/0", 2)
    assert fleet.coordinator() == coordinator
    assert len(fleet.events("failure")) == 1
    assert len(fleet.events("launching", "actor/0")) == 2
    heartbeats(fleet, 2)
    assert undisturbed(fleet, "actor/1")
