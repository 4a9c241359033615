"""What people ask for: restart, drain, resume, stop."""

from __future__ import annotations

from slurm_rollout import proc
from slurm_rollout.testing.fleet import wait_for
from tests.scenarios.lab import Lab, budget, undisturbed


def test_restart_replaces_one_group_and_charges_nobody(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    old, before = fleet.engine("actor/0", 0), budget(fleet, "actor/0")
    assert "actor/0: restarts" in lab.cli("restart", "actor/0")
    fleet.wait_serving("actor/0", 2)
    assert proc.read(old) is None
    assert budget(fleet, "actor/0") == before
    assert not fleet.events("failure")
    assert undisturbed(fleet, "actor/1")


def test_a_drained_group_stays_down_until_it_is_resumed(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    assert "actor/0: drains" in lab.cli("drain", "actor/0")
    fleet.wait_event("drained", "actor/0")
    fleet.wait("actor/0 to be stopped", lambda: fleet.group("actor/0").get("phase") == "stopped")
    assert not fleet.processes(ROLLOUT_GROUP="actor/0")
    assert not lab.accepts(0, lab.port(0))
    assert not fleet.group("actor/0")["urls"]
    assert fleet.barrier()["reason"] == "degraded"
    assert "actor/0: starts again" in lab.cli("resume", "actor/0")
    fleet.wait_serving("actor/0", 2)
    assert not fleet.events("failure")
    assert undisturbed(fleet, "actor/1")


def test_a_failed_group_is_given_a_fresh_budget_by_resume(lab: Lab) -> None:
    lab.fleet.fault("actor/0/1", crash_at_start=True, incarnations=[1])
    fleet = lab.up(groups=2, pool="restart.max_start_failures = 0")
    fleet.wait_event("failed", "actor/0")
    fleet.wait("actor/0 to be failed", lambda: fleet.group("actor/0").get("phase") == "failed")
    lab.cli("resume", "actor/0")
    fleet.wait_serving("actor/0", 2)
    left = budget(fleet, "actor/0")["start_failures"]
    assert left["left"] == left["of"]


def test_stop_ends_every_group_and_then_the_run(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    lab.cli("stop")
    lab.wait_ended()
    assert fleet.barrier()["phase"] == "stopped"
    wait_for("no process of the run", lambda: not fleet.processes(), timeout_s=5)
    assert not fleet.events("failure")
