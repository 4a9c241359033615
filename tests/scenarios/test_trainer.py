"""The trainer's side: weights that are pushed before a group serves, engines that sleep, starts that have to wait."""

from __future__ import annotations

import os
import signal
import time

import pytest

from slurm_rollout import proc
from slurm_rollout.testing.fleet import Fleet, wait_for
from tests.scenarios.lab import Lab, undisturbed

pytestmark = pytest.mark.thorough("fake")

TRAINED = 'weights = "trained"'
COLOCATED = """\
restart.when = "at_barrier"
probe.startup.period_s = 0.2
"""
PERIOD_S = 0.5  # of the stub's liveness probes (`stub_spec`)


def wait_alive(fleet: Fleet, incarnation: int) -> None:
    """Wait until this incarnation of the first group has URLs, whether it serves or not."""

    def is_alive() -> bool:
        entry = fleet.group("actor/0")
        return bool(entry["urls"]) and entry["incarnation"] == incarnation

    fleet.wait(f"actor/0 alive as {incarnation}", is_alive)


def test_a_restarted_group_serves_only_after_its_weights_were_acknowledged(lab: Lab) -> None:
    fleet = lab.up(groups=2, pool=TRAINED)
    fleet.wait_phase("needs_weights")
    assert lab.trainer("barrier.wait_ready(timeout=20)") == "WeightsNeeded"
    push = "[barrier.stale({0}), ask('/update_weights', {{'version': {0}}})][0]"
    lab.trainer(f"barrier.ack_weights(1, {push.format(1)}).epoch")
    fleet.wait_serving("actor/0", 1)
    fleet.wait_serving("actor/1", 1)

    fleet.kill("actor/0", 1)
    wait_alive(fleet, 2)
    entry = fleet.group("actor/0")
    assert (entry["serving"], entry["weights"], entry["weights_version"]) == (False, "stale", None)
    assert lab.trainer("[g.id for g in barrier.stale().groups]") == ["actor/0"]
    assert lab.trainer("barrier.is_current('actor/0', 2)") is False
    lab.trainer("barrier.ack_weights(1, barrier.stale()).epoch")
    fleet.wait_serving("actor/0", 2)
    assert undisturbed(fleet, "actor/1")


def test_an_acknowledgement_of_a_group_that_restarted_meanwhile_is_not_believed(lab: Lab) -> None:
    fleet = lab.up(groups=2, pool=TRAINED)
    fleet.wait_phase("needs_weights")
    pid = fleet.engine("actor/0", 0)
    lab.trainer("open(barrier.path + '.old', 'wb').write(__import__('pickle').dumps(barrier.stale()))")
    os.kill(pid, signal.SIGKILL)
    wait_alive(fleet, 2)
    lab.trainer("barrier.ack_weights(1, __import__('pickle').load(open(barrier.path + '.old', 'rb'))).epoch")
    fleet.wait_serving("actor/1", 1)
    assert fleet.group("actor/0")["serving"] is False
    assert fleet.wait_event("weights")["message"].endswith("not in actor/0 (incarnation 1 is gone)")


def test_sleeping_engines_are_asked_nothing_and_a_dead_one_waits_for_the_trainer(lab: Lab) -> None:
    fleet = lab.up(groups=2, pool=COLOCATED)
    lab.wait_ready()
    lab.trainer("barrier.announce('training').epoch")
    lab.trainer("ask('/sleep', {})")
    time.sleep(8 * PERIOD_S)  # in which each would be asked again and again, and be restarted for it
    assert lab.trainer("asleep_requests()") == [0, 0, 0, 0]
    assert not fleet.events("failure")

    old = fleet.engine("actor/0", 1)
    fleet.kill("actor/0", 0)
    fleet.wait_event("failure", "actor/0")
    fleet.wait("its end", lambda: fleet.group("actor/0")["phase"] == "backoff")
    assert proc.read(old) is None, "its GPUs are the trainer's now"
    assert "announces 'syncing'" in fleet.barrier()["pools"][0]["may_start"]
    time.sleep(2 * PERIOD_S)
    assert fleet.group("actor/0")["incarnation"] == 1

    lab.trainer("ask('/wake_up', {})")
    lab.trainer("barrier.announce('syncing').epoch")
    fleet.wait_serving("actor/0", 2)
    lab.trainer("barrier.announce('generating').epoch")
    fleet.wait("probes", lambda: fleet.barrier()["pools"][0]["probes"] == "on")
    time.sleep(4 * PERIOD_S)
    assert undisturbed(fleet, "actor/1")
    assert len(fleet.events("failure")) == 1


def test_a_trainer_that_waits_permits_the_start_that_it_waits_for(lab: Lab) -> None:
    fleet = lab.up(groups=2, pool=COLOCATED + "min_ready = 2")
    lab.wait_ready()
    lab.trainer("barrier.announce('generating').epoch")
    fleet.kill("actor/0", 0)
    fleet.wait("its end", lambda: fleet.group("actor/0")["phase"] == "backoff")
    assert lab.trainer("barrier.wait_ready(timeout=40).phase") == "ready"
    assert fleet.group("actor/0")["incarnation"] == 2


def test_nothing_starts_under_a_hold_and_one_whose_client_is_gone_expires(lab: Lab) -> None:
    fleet = lab.up(groups=2, pool=TRAINED)
    fleet.wait_phase("needs_weights")
    lab.trainer("barrier.hold(lease_s=600) and 1")
    fleet.kill("actor/0", 0)
    fleet.wait("its end", lambda: fleet.group("actor/0")["phase"] == "backoff")
    os.kill(fleet.coordinator(), signal.SIGKILL)
    fleet.wait_event("takeover")
    time.sleep(1.0)
    assert (fleet.group("actor/0")["phase"], fleet.barrier()["may_start"]) == ("backoff", "held by trainer")
    lab.trainer("barrier.release().epoch")
    fleet.wait("actor/0 alive again", lambda: fleet.group("actor/0")["urls"])

    lab.trainer("barrier.hold(lease_s=4) and 1")  # and the trainer is gone
    fleet.kill("actor/0", 0)
    fleet.wait_event("hold_expired")
    wait_alive(fleet, 3)
    expired = fleet.events("hold_expired")[0]["at"]
    assert wait_for("its start", lambda: fleet.events("launching", "actor/0", 3))[0]["at"] >= expired


def test_a_hold_waits_for_the_start_in_progress(lab: Lab) -> None:
    fleet = lab.up(groups=2, pool=TRAINED, load_s=3.0)
    fleet.wait_phase("needs_weights")
    fleet.kill("actor/0", 0)
    fleet.wait_event("launching", "actor/0", 2)
    lab.trainer("barrier.hold(lease_s=600) and 1")
    assert fleet.events("ready", "actor/0", 2) or fleet.group("actor/0")["phase"] == "ready"
