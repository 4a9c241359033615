"""Members that live and do not serve: stopped, half dead, wrong answers."""

from __future__ import annotations

import json
import os
import signal

import pytest

from slurm_rollout import proc
from tests.scenarios.lab import Lab, assert_recovered, heartbeats, undisturbed


@pytest.mark.parametrize("rank", [0, 1], ids=["leader", "follower"])
def test_a_stopped_process_is_a_hang_and_is_ended_and_replaced(lab: Lab, rank: int) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    hung = fleet.engine("actor/0", rank)
    os.kill(hung, signal.SIGSTOP)
    assert_recovered(fleet, "actor/0", 2, "not_answering")
    assert proc.read(hung) is None
    assert undisturbed(fleet, "actor/1")


def test_what_a_hung_group_was_doing_is_written_down_and_its_stopped_member_named(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    fleet.kill("actor/0", 1, signal.SIGSTOP)
    fleet.wait_serving("actor/0", 2)
    assert fleet.wait_event("snapshot", "actor/0", 1)["at"] <= fleet.wait_event("stopped", "actor/0", 1)["at"]
    described = json.loads(lab.cli("describe", "actor/0", "--json"))
    first = next(i for i in described["incarnations"] if i["incarnation"] == 1)
    assert first["first_stuck"]["rank"] == 1
    assert "state T" in first["first_stuck"]["why"]
    assert "first stuck: rank 1" in lab.cli("describe", "actor/0")


def test_a_single_group_that_hangs_is_believed_when_its_own_agents_see_it_too(lab: Lab) -> None:
    fleet = lab.up(groups=1)
    lab.wait_ready()
    fleet.kill("actor/0", 0, signal.SIGSTOP)
    assert_recovered(fleet, "actor/0", 2, "not_answering")


def test_generation_dead_behind_a_good_health_page_is_found(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    fleet.fault("actor/0/1", generation="dead", incarnations=[1])
    assert_recovered(fleet, "actor/0", 2, "not_answering")
    assert undisturbed(fleet, "actor/1")


@pytest.mark.parametrize("kind", ["garbage", "503", pytest.param("empty", marks=pytest.mark.thorough)])
def test_an_engine_with_wrong_answers_leaves_the_barrier_and_is_then_replaced(lab: Lab, kind: str) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    fleet.fault("actor/0/0", generation=kind, incarnations=[1])
    fleet.wait_event("unready", "actor/0")
    assert_recovered(fleet, "actor/0", 2, "answers_error", 0)
    assert undisturbed(fleet, "actor/1")


def test_an_engine_that_listens_before_it_can_serve_is_not_offered_until_it_can(lab: Lab) -> None:
    lab.fleet.fault("actor/0/1", generation="503")
    fleet = lab.up(groups=2)
    fleet.wait_serving("actor/1", 1)
    fleet.wait("its port to accept", lambda: lab.accepts(1, lab.port(1)))
    heartbeats(fleet, 4)
    assert not fleet.events("ready", "actor/0")
    assert not fleet.group("actor/0")["urls"]
    fleet.fault("actor/0/1", generation="ok")
    fleet.wait_serving("actor/0", 1)
    assert not fleet.events("failure")


def test_a_member_that_ignores_term_is_killed_after_its_grace(lab: Lab) -> None:
    lab.fleet.fault("actor/0/1", ignore_term=True)
    fleet = lab.up(groups=2, pool="stop.grace_s = 1.0")
    lab.wait_ready()
    stubborn = fleet.engine("actor/0", 1)
    lab.cli("restart", "actor/0")
    fleet.wait_serving("actor/0", 2)
    assert proc.read(stubborn) is None
    assert fleet.wait_event("stopped", "actor/0", 1)["data"]["stop_s"] >= 1.0
    assert undisturbed(fleet, "actor/1")
