"""TERM, as the job's end sends it, whatever the run is doing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm_rollout.testing.fleet import LocalFleet, stub_spec, wait_for
from tests.scenarios.lab import PHASES, Lab, budget, undisturbed


def backoff(lab: Lab) -> None:
    lab.fleet.fault("actor/0/1", crash_at_start=True)
    lab.up(groups=1, pool="restart.backoff_initial_s = 60").wait_event("waiting", "actor/0")


def port_busy(lab: Lab) -> None:
    lab.occupy(0)
    lab.up(groups=1).wait_event("fence_waits", "actor/0")


def drained(lab: Lab) -> None:
    fleet = lab.up(groups=1)
    lab.wait_ready()
    lab.cli("drain", "actor/0")
    fleet.wait_event("drained", "actor/0")


def failed(lab: Lab) -> None:
    lab.fleet.fault("actor/0/1", crash_at_start=True)
    # Two groups: without a chance to be ready again the run would end by itself.
    lab.up(groups=2, pool="restart.max_start_failures = 0").wait_event("failed", "actor/0")


def hanging(lab: Lab) -> None:
    fleet = lab.up(groups=1)
    lab.wait_ready()
    fleet.fault("*", generation="dead")


STATES: dict[str, Callable[[Lab], object]] = {
    "backoff": backoff,
    "port busy": port_busy,
    "drained": drained,
    "failed": failed,
    "hanging": hanging,
}
for _phase in ("launching", "loading", "ready", "failure seen", "loading again"):
    STATES[_phase] = lambda lab, _phase=_phase: PHASES[_phase](lab.up(groups=1, load_s=1.0))  # type: ignore[misc]


@pytest.mark.parametrize("state", STATES)
def test_term_in_any_phase_drains_and_leaves_no_process(lab: Lab, state: str) -> None:
    STATES[state](lab)
    fleet = lab.fleet
    assert lab.terminate() == 0
    assert fleet.barrier()["phase"] == "stopped"
    assert {g["phase"] for g in fleet.barrier()["groups"]} == {"stopped"}
    assert all(not g["urls"] for g in fleet.barrier()["groups"])
    wait_for("no process of the run", lambda: not fleet.processes(), timeout_s=5)
    assert [e["type"] for e in fleet.events()][-1] == "ended"


def test_a_group_that_fails_too_late_is_left_down_and_the_trainer_is_told(lab: Lab) -> None:
    fleet = lab.up(groups=2, minutes=30, pool="restart.end_margin_s = 3600")
    lab.wait_ready()
    fleet.kill("actor/0", 1)
    waiting = fleet.wait_event("waiting", "actor/0")
    assert waiting["reason"] == "time_left"
    assert "left; a start took" in waiting["message"]
    fleet.wait("the barrier's word", lambda: fleet.barrier()["reason"] == "time_left")
    assert fleet.barrier()["phase"] == "ready"
    assert lab.trainer("len(barrier.wait_ready(timeout=20).groups)") == 2, "it goes on with the other one"
    assert "is left as it is: the job had" in lab.cli("restart", "actor/1")
    assert undisturbed(fleet, "actor/1")
    fleet.kill("actor/1", 0)
    fleet.wait_phase("stopped")
    assert fleet.barrier()["reason"] == "time_left"
    assert lab.trainer("barrier.wait_ready(timeout=20)") == "FleetFailed"
    assert lab.terminate() == 0
    assert not [e for e in fleet.events("launching") if e["incarnation"] > 1]
    assert budget(fleet, "actor/0")["restarts"] == budget(fleet, "actor/1")["restarts"]
    assert budget(fleet, "actor/0")["restarts"]["left"] == budget(fleet, "actor/0")["restarts"]["of"]


@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.2, 0.3, 0.4])
def test_term_before_the_coordinator_can_take_a_signal_drains_all_the_same(
    tmp_path: Path, base: int, delay_s: float
) -> None:
    """Local only: in a batch job nobody can aim that well."""
    with LocalFleet(tmp_path).start(stub_spec(base=base)) as fleet:
        wait_for("up's first line", lambda: "run directory" in fleet.output())
        began = time.monotonic()
        wait_for("a moment of the start", lambda: time.monotonic() - began >= delay_s, period_s=0.002)
        assert fleet.terminate(timeout_s=15) == 0
        assert not fleet.processes()
