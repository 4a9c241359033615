"""Ports that somebody else holds, and what a group leaves behind."""

from __future__ import annotations

import os
import signal

from slurm_rollout import proc
from slurm_rollout.testing.fleet import wait_for
from tests.scenarios.lab import ANSWER, Lab


def test_a_port_that_a_stranger_holds_is_waited_for_named_and_never_taken_by_force(lab: Lab) -> None:
    stranger, pid = lab.occupy(1)
    fleet = lab.up(groups=1, pool="restart.max_start_failures = 0\nfence.timeout_s = 6")
    waits = wait_for("the holder's name", lambda: [e for e in fleet.events("fence_waits") if str(pid) in e["message"]])
    assert waits[0]["group"] == "actor/0"
    failure = fleet.wait_event("failure", "actor/0", timeout_s=40)
    assert failure["reason"] == "port_busy"
    assert str(pid) in failure["message"]
    fleet.wait_event("failed", "actor/0")
    fleet.wait_phase("failed")
    assert stranger.poll() is None
    assert not fleet.events("launching")


def test_a_port_that_a_stranger_gives_back_in_time_lets_the_group_start(lab: Lab) -> None:
    stranger, _ = lab.occupy(0)
    fleet = lab.up(groups=1)
    fleet.wait_event("fence_waits", "actor/0")
    stranger.kill()
    fleet.wait_serving("actor/0", 1)


def test_a_stranger_that_answers_200_in_place_of_our_engine_is_not_our_engine(lab: Lab) -> None:
    lab.fleet.fault("actor/0/0", never_listens=True)
    fleet = lab.up(groups=1, pool="restart.max_start_failures = 0")
    fleet.wait_event("go", "actor/0")
    stranger, pid = lab.occupy(0, ANSWER)
    assert lab.accepts(0, lab.port(0))
    failure = fleet.wait_event("failure", "actor/0")
    assert failure["reason"] == "stranger_answers"
    assert str(pid) in failure["message"]
    fleet.wait_phase("failed")
    assert not fleet.events("ready")
    assert stranger.poll() is None


def test_an_orphan_that_holds_a_port_without_a_mark_is_ended_before_the_next_start(lab: Lab) -> None:
    """It left its session and emptied its environment, and its agent, the only parent that knew it, is killed."""
    lab.fleet.fault("actor/0/1", orphan=True, incarnations=[1])
    fleet = lab.up(groups=1, load_s=2.0)
    lab.wait_ready()
    orphan = lab.orphan(1)
    assert proc.environ(orphan) == {}
    adopted = proc.read(orphan)
    assert adopted is not None
    assert adopted.parent in fleet.agents("actor/0")
    os.kill(adopted.parent, signal.SIGKILL)
    fleet.wait_serving("actor/0", 2, timeout_s=90)
    left = proc.read(orphan)
    assert left is None or left.state == "Z"
    assert lab.accepts(1, lab.port(1))


def test_a_child_that_left_its_engines_session_is_ended_with_it(lab: Lab) -> None:
    lab.fleet.fault("actor/0/1", daemon_child=True, incarnations=[1])
    fleet = lab.up(groups=1)
    lab.wait_ready()
    engine = fleet.engine("actor/0", 1)
    [child] = [p for p in fleet.processes(ROLLOUT_GROUP="actor/0", ROLLOUT_RANK="1") if p != engine]
    fleet.kill("actor/0", 0)
    fleet.wait_serving("actor/0", 2)
    assert proc.read(child) is None
