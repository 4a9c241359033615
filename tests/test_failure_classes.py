"""Which class a failure has, and what its class costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from slurm_rollout.core import codec
from slurm_rollout.core.failure_classes import RULES, Budget, FailureClass, classify
from slurm_rollout.core.model import ExitRecord, GroupState, Process
from slurm_rollout.core.phases import Phase, Reason
from slurm_rollout.core.plan import RestartPolicy
from slurm_rollout.testing.world import World
from tests.test_group_phases import G, phase, ready, starting

C = FailureClass
REFUSED = {"startup": True, "launched": False}
NO_SUCH_CONFIGURATION = "Unable to create step for job 5: Requested node configuration is not available"
LAUNCH = "Task launch for StepId=5.1 failed on node n3: Communication connection failure"


@pytest.mark.parametrize(
    ("reason", "evidence", "kind"),
    [
        (Reason.ENGINE_EXITED, {}, C.ENGINE_CRASH),
        (Reason.ENGINE_EXITED, {"startup": True}, C.STARTUP),
        (Reason.STEP_ENDED, {"words": "n1: task 0: Killed"}, C.ENGINE_CRASH),
        (Reason.STRANGER_ANSWERS, {}, C.ENGINE_CRASH),
        (Reason.NOT_ANSWERING, {}, C.HANG),
        (Reason.ANSWERS_ERROR, {}, C.HANG),
        (Reason.START_TIMEOUT, {"startup": True}, C.STARTUP),
        (Reason.PORT_BUSY, {"startup": True}, C.STARTUP),
        (Reason.GPU_MEMORY, {"startup": True}, C.STARTUP),
        (Reason.LAUNCH_FAILED, {"startup": True, "words": "not found on PATH"}, C.STARTUP),
        (Reason.LAUNCH_FAILED, REFUSED, C.SLURM_REFUSED),
        (Reason.LAUNCH_FAILED, {**REFUSED, "words": "Memory required by task is not available"}, C.SLURM_REFUSED),
        (Reason.LAUNCH_FAILED, {**REFUSED, "words": NO_SUCH_CONFIGURATION}, C.SLURM_REFUSED),
        (Reason.LAUNCH_FAILED, {**REFUSED, "words": NO_SUCH_CONFIGURATION, "accepted": True}, C.NODE),
        (Reason.LAUNCH_FAILED, {**REFUSED, "words": LAUNCH}, C.NODE),
        (
            Reason.LAUNCH_FAILED,
            {**REFUSED, "words": "Required node not available (down, drained or reserved)"},
            C.NODE,
        ),
        (Reason.STEP_ENDED, {"words": "Node failure on n3"}, C.NODE),
        (Reason.ENGINE_EXITED, {"hardware": "Xid 79"}, C.NODE),
        (Reason.ENGINE_EXITED, {"hardware": "Xid 79", "disk": "/tmp is full"}, C.DISK_FULL),
        (Reason.ENGINE_EXITED, {"startup": True, "disk": "/tmp is full"}, C.DISK_FULL),
        (Reason.LAUNCH_FAILED, {"startup": True, "words": "log: No space left on device"}, C.DISK_FULL),
        (Reason.LAUNCH_FAILED, {"startup": True, "words": "[Errno 122] x"}, C.DISK_FULL),
        (Reason.LAUNCH_FAILED, {**REFUSED, "words": "slurmstepd: error: Disk quota exceeded"}, C.DISK_FULL),
        (Reason.OPERATOR, {"disk": "/tmp is full"}, C.OPERATOR),
        (Reason.JOB_ENDING, {}, C.JOB_ENDING),
        (Reason.RUN_ENDING, {}, C.JOB_ENDING),
    ],
)
def test_the_class_is_what_the_evidence_says(reason: Reason, evidence: dict[str, Any], kind: FailureClass) -> None:
    assert classify(reason, **{"startup": False, **evidence}) is kind


def test_every_class_has_a_rule_and_one_line_of_words() -> None:
    assert set(RULES) == set(FailureClass)
    assert {kind: rule.budget for kind, rule in RULES.items()} == {
        C.ENGINE_CRASH: Budget.RESTARTS,
        C.HANG: Budget.RESTARTS,
        C.STARTUP: Budget.START_FAILURES,
        C.SLURM_REFUSED: Budget.START_FAILURES,
        C.NODE: Budget.NODES,
        C.DISK_FULL: Budget.NONE,
        C.OPERATOR: Budget.NONE,
        C.JOB_ENDING: Budget.NONE,
    }
    for rule in RULES.values():
        assert "\n" not in rule.sentence
        assert len(rule.short) <= 60


def kind_of(w: World) -> FailureClass | None:
    failure = w.group().failure
    assert failure is not None
    return failure.kind


def dies_of_a_full_disk(w: World) -> None:
    record = ExitRecord(
        cause="engine_exited", message="rank 1 exited with code 1", rank=1, disk="/scratch on n1 is full"
    )
    w.change(G, "n1", exit=record, process=Process.EXITED, exited_at=w.now)
    w.tick()


def test_a_full_disk_is_charged_to_nobody_and_tried_again_ever_later() -> None:
    policy = RestartPolicy(max_restarts=0, max_start_failures=0, backoff_initial_s=7.0, backoff_max_s=40.0)
    w = ready(restart=policy)
    waits = []
    for n in range(2, 7):
        dies_of_a_full_disk(w)
        failed_at = w.now
        assert kind_of(w) is C.DISK_FULL
        assert "/scratch on n1 is full" in w.group().message
        w.heal(lambda n=n: w.group().incarnation == n)  # type: ignore[misc]
        waits.append((w.group().marks.launched_at or 0.0) - failed_at)
    for waited, least in zip(waits, (7.0, 14.0, 28.0, 40.0, 40.0), strict=True):
        assert least <= waited < least + 5.0
    assert w.group().runtime_failures == w.group().start_failures == ()
    assert w.events("failure")[-1].data["class"] == "disk_full"


def test_an_engine_s_own_failure_after_a_full_disk_has_the_usual_price_and_comes_back_at_once() -> None:
    w = ready(restart=RestartPolicy(max_restarts=1, backoff_initial_s=7.0))
    dies_of_a_full_disk(w)
    w.heal(lambda: phase(w) is Phase.READY)
    w.kill(G, 0)
    w.tick()
    assert kind_of(w) is C.ENGINE_CRASH
    assert w.group().not_before == w.now
    w.heal(lambda: phase(w) is Phase.READY)
    assert len(w.group().runtime_failures) == 1


def test_a_resumed_group_has_a_fresh_backoff() -> None:
    w = ready()
    dies_of_a_full_disk(w)
    w.heal(lambda: phase(w) is Phase.READY)
    w.ask("drain", G)
    w.heal(lambda: phase(w) is Phase.STOPPED)
    w.ask("resume", G)
    w.tick()
    assert w.group().disk_failures == ()


def test_the_lost_node_is_blamed_and_not_the_peer_that_died_of_it() -> None:
    w = ready()
    w.kill(G, 0)
    w.vanish(G, "n1", stderr="Node failure on n1")
    w.change(G, "n1", spoke=True)
    w.tick()
    failure = w.group().failure
    assert failure is not None
    assert (failure.kind, failure.node) == (C.NODE, "n1")


@pytest.mark.parametrize(("spoke", "kind"), [(False, C.SLURM_REFUSED), (True, C.NODE)])
def test_a_configuration_that_another_node_of_the_group_has_is_not_what_one_lacks(
    spoke: bool, kind: FailureClass
) -> None:
    w = starting()
    w.change(G, "n0", spoke=spoke)
    w.vanish(G, "n1", stderr=NO_SUCH_CONFIGURATION, spoke=False)
    w.tick()
    assert kind_of(w) is kind


def test_a_configuration_that_the_group_once_had_can_be_had() -> None:
    w = ready()
    w.kill(G, 0)
    w.heal(lambda: w.group().incarnation == 2 and phase(w) is Phase.STARTING)
    w.vanish(G, "n1", stderr=NO_SUCH_CONFIGURATION, spoke=False)
    w.tick()
    assert kind_of(w) is C.NODE


def test_a_step_that_waits_for_slurm_is_no_failure() -> None:
    w = starting()
    for node in ("n0", "n1"):
        w.change(G, node, stderr="Job 5 step creation temporarily disabled, retrying (Requested nodes are busy)")
    w.tick(w.plan.slurm.launch_timeout_s - 1.0)
    assert phase(w) is Phase.STARTING
    assert w.group().failure is None
    w.tick(2.0)
    assert kind_of(w) is C.SLURM_REFUSED


def test_a_state_of_an_older_version_is_read() -> None:
    w = ready()
    w.kill(G, 0)
    w.tick()
    data = codec.encode(w.group())
    assert codec.decode(GroupState, data) == w.group()
    del data["failure"]["kind"], data["charge"]["kind"], data["disk_failures"]
    old = codec.decode(GroupState, data)
    assert old.failure is not None
    assert w.group().failure is not None
    assert old.failure == replace(w.group().failure, kind=None)  # type: ignore[type-var]
