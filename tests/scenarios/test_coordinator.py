"""A coordinator that dies, stops, or cannot write."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from slurm_rollout import proc
from slurm_rollout.testing.fleet import wait_for
from tests.scenarios.lab import PHASES, Lab, assert_recovered, heartbeats, undisturbed


@pytest.mark.thorough("fake")
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


WALL_CLOCK = """\
import time
real = time.time
def shifted():
    try:
        with open({path!r}) as f:
            return real() + float(f.read() or 0)
    except OSError:
        return real()
time.time = shifted
"""


@pytest.mark.thorough("fake")
def test_a_wall_clock_that_jumps_by_hours_changes_nothing(lab: Lab) -> None:
    """As the coordinator sees it: nobody may set the clock of a machine that others test on."""
    jump = lab.fleet.folder / "jump"
    (lab.fleet.folder / "sitecustomize.py").write_text(WALL_CLOCK.format(path=str(jump)))
    lab.prefix = [*lab.prefix, "env", f"PYTHONPATH={lab.fleet.folder}"]
    fleet = lab.start(groups=2)
    fleet.wait_phase("ready")
    survivor = fleet.engine("actor/1", 0)

    def set_clock(hours: int) -> None:
        jump.write_text(str(3600 * hours))
        jump.chmod(0o644)
        heartbeats(fleet, 2)
        at = json.loads(fleet.run.status.read_text())["at"]
        assert abs(at - time.time() - 3600 * hours) < 60, "the coordinator's clock was set"

    set_clock(5)
    fleet.kill("actor/0", 1)
    assert_recovered(fleet, "actor/0", 2, "engine_exited", 1)
    set_clock(-3)
    fleet.kill("actor/0", 0, signal.SIGSTOP)
    assert_recovered(fleet, "actor/0", 3, "not_answering")
    os.kill(fleet.coordinator(), signal.SIGKILL)
    fleet.wait_event("takeover")
    set_clock(9)
    heartbeats(fleet, 8)
    assert len(fleet.events("failure")) == 2
    assert fleet.engine("actor/1", 0) == survivor
    status = json.loads(fleet.run.status.read_text())
    assert all(0 <= status["at"] - g["since"] < 600 for g in status["groups"]), "how long ago is still true"


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
