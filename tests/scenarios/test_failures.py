"""Failures by their class: what pays for each, and what people are told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slurm_rollout.testing.fleet import Fleet, wait_for
from tests.scenarios.lab import Lab, budget, undisturbed

PENNILESS = "restart.max_restarts = 0\nrestart.max_start_failures = 0"
"""Whatever is charged makes the group fail for good."""


def failure_of(fleet: Fleet, group: str, kind: str) -> dict[str, Any]:
    """Wait until status.json tells of a failure of this class; return it."""

    def told() -> dict[str, Any]:
        status = json.loads(fleet.run.status.read_text())
        found = next(g for g in status["groups"] if g["id"] == group)["failure"] or {}
        return found if found.get("class") == kind else {}

    found = wait_for(f"status.json to tell of {kind}", told)
    assert isinstance(found, dict)
    return found


def spent(fleet: Fleet, group: str) -> dict[str, int]:
    left = budget(fleet, group)
    return {key: left[key]["of"] - left[key]["left"] for key in ("restarts", "start_failures")}


def test_a_full_disk_is_charged_to_nobody_and_tried_again_ever_later(lab: Lab) -> None:
    fleet = lab.up(groups=2, pool=f"{PENNILESS}\nrestart.backoff_initial_s = 1.0")
    lab.wait_ready()
    path, where = lab.full_for_engines(1)
    fleet.fault("actor/0/1", write=path)
    waits = []
    for incarnation in (1, 2):
        failure = fleet.wait_event("failure", "actor/0", incarnation)
        assert failure["data"]["class"] == "disk_full"
        assert failure["message"].startswith("rank 1 exited with code 1; ")
        assert where in failure["message"]
        waits.append(fleet.wait_event("launching", "actor/0", incarnation + 1)["at"] - failure["at"])
    assert waits[0] >= 0.9  # each time is rounded, and read a moment after the decision's
    assert waits[1] >= 1.9
    assert failure_of(fleet, "actor/0", "disk_full")["node"] == failure["node"]
    assert "CLASS" in (status := lab.cli("status", check=False))
    assert "disk_full a file system is full: make room" in status
    lab.room_again(1)
    fleet.fault("actor/0/1", write=None)
    fleet.wait("actor/0 to serve", lambda: fleet.group("actor/0").get("serving"), timeout_s=40)
    assert spent(fleet, "actor/0") == {"restarts": 0, "start_failures": 0}
    assert undisturbed(fleet, "actor/1")
    described = lab.cli("describe", "actor/0", "--incarnation", "1")
    assert "disk_full: A file system is full or a quota is spent" in described
    assert "    | stub actor/0/1 incarnation 1: OSError: [Errno 28] No space left on device" in described


def test_a_signal_is_an_engine_crash_and_costs_one_restart(lab: Lab) -> None:
    fleet = lab.up()
    lab.wait_ready()
    fleet.kill("actor/0", 1)
    fleet.wait_serving("actor/0", 2)
    assert fleet.wait_event("failure", "actor/0")["data"]["class"] == "engine_crash"
    assert failure_of(fleet, "actor/0", "engine_crash")["message"] == "rank 1 was ended by signal 9 (Killed)"
    assert spent(fleet, "actor/0") == {"restarts": 1, "start_failures": 0}
    assert "engine_crash: An engine's process ended" in lab.cli("describe", "actor/0", "--incarnation", "1")


def test_an_engine_that_ends_before_it_is_ready_costs_one_start_failure(lab: Lab) -> None:
    lab.fleet.fault("actor/0/1", crash_at_start=True, incarnations=[1])
    fleet = lab.up()
    fleet.wait_serving("actor/0", 2)
    assert fleet.wait_event("failure", "actor/0")["data"]["class"] == "startup"
    failure_of(fleet, "actor/0", "startup")
    assert spent(fleet, "actor/0") == {"restarts": 0, "start_failures": 1}


def test_a_restart_that_a_person_asks_for_is_of_the_operators_class(lab: Lab) -> None:
    fleet = lab.up(pool=PENNILESS)
    lab.wait_ready()
    lab.cli("restart", "actor/0")
    fleet.wait_serving("actor/0", 2)
    assert not fleet.events("failure")
    assert "operator: Somebody asked for it" in lab.cli("describe", "actor/0", "--incarnation", "1")


def test_a_step_that_slurm_refuses_costs_a_start_failure_and_waits_first(lab: Lab) -> None:
    if lab.kind == "local":
        pytest.skip("without Slurm nobody refuses a step")
    words = lab.refuse_steps()
    more = '[slurm]\nsrun_args = ["--constraint=no-such-feature"]\n' if lab.kind == "slurm" else ""
    fleet = lab.up(pool="restart.max_start_failures = 1\nrestart.backoff_initial_s = 1.0", more=more)
    failure = fleet.wait_event("failure", "actor/0", 1)
    assert failure["reason"] == "launch_failed"
    assert failure["data"]["class"] == "slurm_refused"
    assert words in failure["message"]
    again = fleet.wait_event("launching", "actor/0", 2)
    assert again["at"] - failure["at"] >= 0.9
    assert fleet.wait_event("failed", "actor/0")["reason"] == "budget_spent"
    assert [e["data"]["class"] for e in fleet.events("failure", "actor/0")] == ["slurm_refused"] * 2
