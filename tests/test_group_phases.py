"""One group on its way: the table of phases, starts, stops, fences, and what a failure costs."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from slurm_rollout.core import group as group_module
from slurm_rollout.core import moves as moves_module
from slurm_rollout.core.model import Cancel, ExitRecord, Go, GroupState, Job, Launch, Process, Stop
from slurm_rollout.core.names import mark, step_name
from slurm_rollout.core.phases import (
    ALIVE,
    MAY_HAVE_STEPS,
    TRANSITIONS,
    IllegalTransition,
    Phase,
    Reason,
    check_transition,
    diagram,
)
from slurm_rollout.core.plan import FencePolicy, ProbePolicy, ProbeRequest, RestartPolicy, StopPolicy
from slurm_rollout.core.restart import backoff_s, recent
from slurm_rollout.testing.world import World, make_plan

P = Phase
G = "actor/0"
NEVER_AGAIN = RestartPolicy(max_restarts=0, max_start_failures=0)


def new(groups: int = 1, nodes: int = 2, **policies: Any) -> World:
    return World(make_plan(groups, nodes, **policies))


def starting(**policies: Any) -> World:
    w = new(**policies)
    w.run_until(lambda: w.group().phase is P.STARTING)
    return w


def ready(groups: int = 1, **policies: Any) -> World:
    w = new(groups, **policies)
    w.make_ready()
    return w


def phase(w: World) -> Phase:
    return w.group().phase


def reach(w: World, wanted: Phase) -> None:
    w.run_until(lambda: phase(w) is wanted)


# ------------------------------------------------------------------------------------------------------------ the table


def to_backoff(w: World) -> None:
    """Two failures in a row: the first restart comes at once, the second waits."""
    for _ in range(2):
        w.heal(lambda: phase(w) is P.READY)
        w.kill(G, 0)
        w.tick()
    w.heal(lambda: phase(w) is P.BACKOFF)


def to_unready(w: World) -> None:
    w.probe(G, 0, refusals=2, last_error="HTTP 503")
    w.tick()
    assert phase(w) is P.UNREADY


def to_failed(w: World) -> None:
    w.kill(G, 0)
    w.heal(lambda: phase(w) is P.FAILED)


def to_sweep(w: World) -> None:
    """A port stays open after everything ended: a sweep looks why."""
    w.ports_open[G] = ("n0:18000",)
    w.run_until(lambda: any(s.sweep for s in w.group().steps), after_s=0.2)


def drain(w: World) -> None:
    w.ask("drain", G)
    w.tick()


def pending_fencing(w: World) -> None:
    w.tick()


def pending_stopped(w: World) -> None:
    w.stop_signal = True
    w.tick()


def fencing_backoff(w: World) -> None:
    to_backoff(w)


def fencing_starting(w: World) -> None:
    w.heal(lambda: phase(w) is P.STARTING)


def fencing_failed(w: World) -> None:
    w.ports_open[G] = ("n0:18000",)
    w.heal(lambda: phase(w) is P.FAILED)


def fencing_stopped(w: World) -> None:
    w.ports_open[G] = None
    w.tick()
    assert phase(w) is P.FENCING
    drain(w)


def fencing_draining(w: World) -> None:
    to_sweep(w)
    drain(w)


def backoff_fencing(w: World) -> None:
    to_backoff(w)
    w.heal(lambda: phase(w) is not P.BACKOFF)


def backoff_stopped(w: World) -> None:
    to_backoff(w)
    drain(w)


def starting_ready(w: World) -> None:
    w.make_ready()


def starting_stopping(w: World) -> None:
    w.run_until(lambda: phase(w) is P.STARTING)
    w.vanish(G, "n1")
    w.tick()


def starting_draining(w: World) -> None:
    w.run_until(lambda: phase(w) is P.STARTING)
    drain(w)


def ready_unready(w: World) -> None:
    w.make_ready()
    to_unready(w)


def ready_stopping(w: World) -> None:
    w.make_ready()
    w.kill(G, 0)
    w.tick()


def ready_draining(w: World) -> None:
    w.make_ready()
    drain(w)


def unready_ready(w: World) -> None:
    ready_unready(w)
    w.probe(G, 0, refusals=0, answers=True)
    w.tick()


def unready_stopping(w: World) -> None:
    ready_unready(w)
    w.kill(G, 0)
    w.tick()


def unready_draining(w: World) -> None:
    ready_unready(w)
    drain(w)


def stopping_fencing(w: World) -> None:
    ready_stopping(w)
    w.heal(lambda: phase(w) is P.FENCING)


def stopping_failed(w: World) -> None:
    w.make_ready()
    to_failed(w)


def stopping_draining(w: World) -> None:
    w.deaf.add("n1")
    w.run_until(lambda: phase(w) is P.STARTING)
    w.vanish(G, "n0")
    w.tick()
    assert phase(w) is P.STOPPING
    drain(w)


def draining_stopped(w: World) -> None:
    w.make_ready()
    drain(w)
    reach(w, P.STOPPED)


def drain_node(w: World) -> None:
    w.ask("drain", "n1")
    w.tick()


def fencing_pending(w: World) -> None:
    """No node is left for it."""
    w.make_ready()
    drain_node(w)
    reach(w, P.PENDING)


def backoff_pending(w: World) -> None:
    w.make_ready()
    w.kill(G, 0)
    w.heal(lambda: w.group().incarnation == 2 and phase(w) is P.READY)
    w.kill(G, 0)
    reach(w, P.BACKOFF)
    drain_node(w)


def stopped_fencing(w: World) -> None:
    draining_stopped(w)
    w.ask("resume", G)
    w.tick()


def failed_fencing(w: World) -> None:
    stopping_failed(w)
    w.ask("restart", G)
    w.tick()


def failed_stopped(w: World) -> None:
    stopping_failed(w)
    drain(w)


SCENARIOS: dict[tuple[Phase, Phase], Callable[[World], None]] = {
    (P.PENDING, P.FENCING): pending_fencing,
    (P.PENDING, P.STOPPED): pending_stopped,
    (P.FENCING, P.BACKOFF): fencing_backoff,
    (P.FENCING, P.PENDING): fencing_pending,
    (P.BACKOFF, P.PENDING): backoff_pending,
    (P.FENCING, P.STARTING): fencing_starting,
    (P.FENCING, P.FAILED): fencing_failed,
    (P.FENCING, P.STOPPED): fencing_stopped,
    (P.FENCING, P.DRAINING): fencing_draining,
    (P.BACKOFF, P.FENCING): backoff_fencing,
    (P.BACKOFF, P.STOPPED): backoff_stopped,
    (P.STARTING, P.READY): starting_ready,
    (P.STARTING, P.STOPPING): starting_stopping,
    (P.STARTING, P.DRAINING): starting_draining,
    (P.READY, P.UNREADY): ready_unready,
    (P.READY, P.STOPPING): ready_stopping,
    (P.READY, P.DRAINING): ready_draining,
    (P.UNREADY, P.READY): unready_ready,
    (P.UNREADY, P.STOPPING): unready_stopping,
    (P.UNREADY, P.DRAINING): unready_draining,
    (P.STOPPING, P.FENCING): stopping_fencing,
    (P.STOPPING, P.FAILED): stopping_failed,
    (P.STOPPING, P.DRAINING): stopping_draining,
    (P.DRAINING, P.STOPPED): draining_stopped,
    (P.STOPPED, P.FENCING): stopped_fencing,
    (P.FAILED, P.FENCING): failed_fencing,
    (P.FAILED, P.STOPPED): failed_stopped,
}
ENDS_THERE = {P.FAILED: NEVER_AGAIN}
ROWS = [(a, b) for a in Phase for b in Phase if b in TRANSITIONS[a]]


@contextmanager
def transitions_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[Phase, Phase]]]:
    seen: set[tuple[Phase, Phase]] = set()

    def recording(group: str, before: Phase, after: Phase) -> None:
        check_transition(group, before, after)
        seen.add((before, after))

    with monkeypatch.context() as patch:
        for module in (group_module, moves_module):
            patch.setattr(module, "check_transition", recording)
        yield seen


def test_every_row_of_the_table_has_a_scenario_and_no_scenario_is_without_a_row() -> None:
    assert set(SCENARIOS) == set(ROWS)


@pytest.mark.parametrize(("before", "after"), ROWS, ids=lambda p: p.value)
def test_the_decisions_make_every_transition_of_the_table(
    before: Phase, after: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = new(restart=NEVER_AGAIN if P.FAILED in (before, after) else RestartPolicy())
    with transitions_seen(monkeypatch) as seen:
        SCENARIOS[before, after](w)
    assert (before, after) in seen


@pytest.mark.parametrize(
    ("before", "after"), [(a, b) for a in Phase for b in Phase if b not in TRANSITIONS[a]], ids=lambda p: p.value
)
def test_a_transition_that_is_not_in_the_table_raises(before: Phase, after: Phase) -> None:
    with pytest.raises(IllegalTransition, match=f"actor/0: {before} -> {after}"):
        check_transition(G, before, after)


def test_every_phase_has_a_row_and_only_operators_bring_a_group_back_from_stopped_and_failed() -> None:
    assert set(TRANSITIONS) == set(Phase)
    for resting in (P.STOPPED, P.FAILED):
        w = new(restart=NEVER_AGAIN)
        SCENARIOS[(P.DRAINING, P.STOPPED) if resting is P.STOPPED else (P.STOPPING, P.FAILED)](w)
        for _ in range(20):
            w.tick(600.0)
        assert phase(w) is resting


def test_the_diagram_is_made_of_exactly_the_rows_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = diagram().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> pending"]
    assert lines[2:] == [f"    {a} --> {b}" for a, b in ROWS]
    assert len(lines[2:]) == sum(len(after) for after in TRANSITIONS.values())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_module_prints_the_diagram(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("slurm_rollout.core.phases", run_name="__main__")
    assert capsys.readouterr().out.strip() == diagram()


def test_a_proved_phase_may_have_steps_and_a_resting_one_may_not() -> None:
    assert ALIVE < MAY_HAVE_STEPS
    assert not MAY_HAVE_STEPS & {P.PENDING, P.BACKOFF, P.STOPPED, P.FAILED}


# -------------------------------------------------------------------------------------------------------------- a start


def test_a_first_start_looks_at_the_ports_then_launches_then_says_go_then_waits_for_the_proof() -> None:
    w = new()
    w.ports_open[G] = None
    w.tick()
    assert phase(w) is P.FENCING
    assert w.decisions[-1].wants.ports == (G,)
    w.ports_open[G] = ()
    w.tick()
    assert list(w.decisions[-1].actions) == [Launch(group=G, incarnation=1, nodes=("n0", "n1"))]
    w.fence(G)
    w.tick()
    assert list(w.decisions[-1].actions) == [Go(group=G, incarnation=1, nodes=("n0", "n1"))]
    w.tick()
    assert phase(w) is P.STARTING
    w.prove(G)
    w.tick()
    assert phase(w) is P.READY
    assert [e.type for e in w.events() if e.group] == ["launching", "go", "ready"]


def test_nothing_is_launched_before_the_ports_were_looked_at() -> None:
    w = new()
    w.ports_open[G] = None
    for _ in range(50):
        w.tick(10.0)
    assert not w.actions(Launch)
    assert phase(w) is P.FENCING


def test_go_waits_for_the_last_agent_s_fence() -> None:
    w = starting()
    w.change(G, "n0", spoke=True, fenced=True)
    w.change(G, "n1", spoke=True, waiting_for="gpu memory of pid 7")
    for _ in range(20):
        w.tick(1.0)
    assert not w.actions(Go)
    assert w.group().message == "n1: gpu memory of pid 7"
    assert [e.message for e in w.events("fence_waits")] == ["n1: gpu memory of pid 7"]
    w.change(G, "n1", fenced=True)
    w.tick()
    assert len(w.actions(Go)) == 1
    assert w.group().message == ""


def test_go_waits_for_a_step_that_is_not_observed() -> None:
    w = starting()
    w.fence(G)
    del w.steps[G, 1, "n1", False]
    w.tick()
    assert not w.actions(Go)


def test_go_is_repeated_each_second_to_those_who_did_not_hear_it() -> None:
    w = starting()
    w.deaf.add("n1")
    w.fence(G)
    w.tick()
    for _ in range(29):
        w.tick(0.1)
    assert [a.nodes for a in w.actions(Go)] == [("n0", "n1"), ("n1",), ("n1",)]
    assert len(w.events("go")) == 1
    w.deaf.clear()
    w.tick(1.0)
    w.prove(G)
    w.tick()
    assert phase(w) is P.READY
    w.tick(10.0)
    assert len(w.actions(Go)) == 4


def test_a_group_is_not_ready_before_every_engine_was_started() -> None:
    w = starting()
    w.deaf.add("n1")
    w.fence(G)
    w.tick()
    w.prove(G)
    w.tick()
    assert phase(w) is P.STARTING


def test_a_group_is_not_ready_before_every_entrypoint_answered_a_real_request() -> None:
    w = starting()
    w.fence(G)
    w.tick()
    w.probe(G, 0, proved=True)
    w.probe(G, 1, proved=False)
    w.tick()
    assert phase(w) is P.STARTING
    w.probe(G, 1, proved=True)
    w.tick()
    assert phase(w) is P.READY


def test_only_entrypoints_are_asked_for_a_proof() -> None:
    w = starting(entrypoints="leader")
    w.fence(G)
    w.tick()
    w.probe(G, 0, proved=True)
    w.tick()
    assert phase(w) is P.READY


def test_a_proof_of_an_older_incarnation_proves_nothing() -> None:
    w = ready()
    w.kill(G, 0)
    w.heal(lambda: phase(w) is P.STARTING)
    w.fence(G)
    w.tick()
    w.tick()
    assert w.group().incarnation == 2
    assert [e.proved for k, e in w.endpoints.items() if k[1] == 1] == [True, True]
    assert phase(w) is P.STARTING


# ----------------------------------------------------------------------------------------------- a start that fails

STEP_FACTS = {
    "engine_exited": Reason.ENGINE_EXITED,
    "port_busy": Reason.PORT_BUSY,
    "leftover_process": Reason.LEFTOVER_PROCESS,
    "gpu_memory": Reason.GPU_MEMORY,
    "other_incarnation": Reason.OTHER_INCARNATION,
    "self_fenced": Reason.SELF_FENCED,
    "exec_failed": Reason.LAUNCH_FAILED,
    "bad_config": Reason.LAUNCH_FAILED,
    "stopped": Reason.STEP_ENDED,
    "a cause of a newer agent": Reason.STEP_ENDED,
}


@pytest.mark.parametrize(("cause", "reason"), STEP_FACTS.items())
def test_a_start_fails_with_the_agent_s_last_word(cause: str, reason: Reason) -> None:
    w = starting()
    record = ExitRecord(cause=cause, message="said so", rank=1)
    w.change(G, "n1", exit=record, process=Process.EXITED, exited_at=w.now)
    w.tick()
    failure = w.group().failure
    assert failure is not None
    assert (failure.reason, failure.message, failure.rank, failure.node) == (reason, "said so", 1, "n1")
    assert failure.startup
    assert failure.restarted_peers == (0,)


def test_engines_that_die_because_a_peers_node_fenced_itself_are_not_blamed() -> None:
    w = ready()
    w.kill(G, 0, code=9)
    record = ExitRecord(cause="self_fenced", message="no heartbeat")
    w.change(G, "n1", exit=record, process=Process.EXITED, exited_at=w.now)
    w.tick()
    failure = w.group().failure
    assert failure is not None
    assert (failure.reason, failure.message, failure.rank, failure.node) == (
        Reason.SELF_FENCED,
        "no heartbeat",
        None,
        "n1",
    )


def test_the_engine_that_died_by_itself_is_blamed_and_not_the_peer_whose_agent_was_only_told_to_stop() -> None:
    w = ready()
    stopped = ExitRecord(cause="stopped", message="as asked")
    w.change(G, "n0", exit=stopped, process=Process.EXITED, exited_at=w.now)
    w.kill(G, 1, code=9)
    w.tick()
    failure = w.group().failure
    assert failure is not None
    assert (failure.reason, failure.rank, failure.message) == (Reason.ENGINE_EXITED, 1, "exit code 9")


def test_a_last_word_is_believed_before_a_silent_end() -> None:
    w = ready()
    w.vanish(G, "n0")
    w.kill(G, 1)
    w.tick()
    failure = w.group().failure
    assert failure is not None
    assert failure.reason is Reason.ENGINE_EXITED


def test_a_failed_start_stops_every_step_that_it_started() -> None:
    w = starting()
    w.change(G, "n0", exit=ExitRecord(cause="port_busy", message="held by pid 3"), process=Process.EXITED)
    w.tick()
    assert w.decisions[-1].actions == (Stop(group=G, incarnation=1, nodes=("n1",)),)
    w.run_until(lambda: not w.living(G))


def test_an_agent_that_never_speaks_fails_the_start_at_the_launch_time_out_and_not_earlier() -> None:
    w = starting()
    w.change(G, "n0", spoke=True)
    w.tick(w.plan.slurm.launch_timeout_s - 0.1)
    assert phase(w) is P.STARTING
    w.tick(0.2)
    failure = w.group().failure
    assert failure is not None
    assert failure.reason is Reason.LAUNCH_FAILED
    assert failure.message == "no word from the agent on n1 for 120 s"
    assert {a.nodes for a in w.actions(Stop)} == {("n0", "n1")}


def test_the_launch_time_out_begins_when_the_last_srun_was_started_and_not_before() -> None:
    w = starting()
    w.change(G, "n0", spoke=True, fenced=True)
    w.change(G, "n1", process=Process.QUEUED, pid=None)
    decision = w.tick(10 * w.plan.slurm.launch_timeout_s)
    assert phase(w) is P.STARTING
    assert w.group().message == "its turn has not come: slurm.max_launching other sruns wait for their steps"
    assert [e.message for e in decision.events] == [w.group().message]
    assert not decision.wants.listing
    assert decision.wake_at is None
    w.change(G, "n1", process=Process.RUNNING, pid=9, launched_at=w.now)
    began = w.now
    assert w.tick().wake_at == began + w.plan.slurm.launch_timeout_s
    assert w.group().message == ""
    w.tick(w.plan.slurm.launch_timeout_s - 0.1)
    assert phase(w) is P.STARTING
    w.tick(0.2)
    failure = w.group().failure
    assert failure is not None
    assert failure.message == "no word from the agent on n1 for 120 s"


def test_a_step_whose_turn_has_not_come_is_neither_ended_nor_asked_about() -> None:
    w = starting()
    w.change(G, "n0", exit=ExitRecord(cause="port_busy", message="held by pid 3"), process=Process.EXITED)
    w.change(G, "n1", process=Process.QUEUED, pid=None)
    w.blind = True
    decision = w.tick()
    assert decision.actions == (Stop(group=G, incarnation=1, nodes=("n1",)),)
    assert not decision.wants.listing
    assert phase(w) is P.STOPPING
    w.tick()  # told to stop, it has ended before it began
    assert phase(w) is P.FENCING


def test_an_agent_that_speaks_and_never_fences_fails_the_start_after_the_fence_time_out_more() -> None:
    w = starting(fence=FencePolicy(timeout_s=50.0))
    w.change(G, "n0", spoke=True, fenced=True)
    w.change(G, "n1", spoke=True, waiting_for="pid 3 of incarnation 0")
    w.tick(119.0)
    w.tick(50.0)
    assert phase(w) is P.STARTING
    w.tick(1.0)
    failure = w.group().failure
    assert failure is not None
    assert failure.reason is Reason.LAUNCH_FAILED
    assert failure.message == "not fenced after 170 s: n1: pid 3 of incarnation 0"


def test_a_start_that_is_not_ready_in_time_fails_and_says_who_is_missing_and_how() -> None:
    w = starting(probe=ProbePolicy(request=ProbeRequest(), startup_timeout_s=600.0))
    w.fence(G)
    w.tick()
    w.change(G, "n1", listening=())
    w.probe(G, 0, last_error="HTTP 503: loading")
    w.tick(599.0)
    assert phase(w) is P.STARTING
    w.tick(1.0)
    failure = w.group().failure
    assert failure is not None
    assert failure.reason is Reason.START_TIMEOUT
    assert failure.message == ("not ready after 600 s: rank 0: HTTP 503: loading; rank 1 does not listen on port 18000")


def test_the_time_of_a_start_counts_from_the_first_go_also_when_go_is_repeated() -> None:
    w = starting(probe=ProbePolicy(request=ProbeRequest(), startup_timeout_s=10.0))
    w.deaf.add("n1")
    w.fence(G)
    w.tick()
    for _ in range(9):
        w.tick(1.0)
    assert phase(w) is P.STARTING
    w.tick(1.1)
    assert w.group().reason is Reason.START_TIMEOUT


def test_a_launch_that_slurm_refuses_is_charged_as_a_start_failure_and_its_words_are_kept() -> None:
    w = starting()
    w.vanish(G, "n0", stderr="srun: error: Requested node configuration is not available")
    w.tick()
    g = w.group()
    assert g.failure is not None
    assert g.failure.reason is Reason.LAUNCH_FAILED
    assert g.failure.message == (
        "no step was launched, srun ended with 1: srun: error: Requested node configuration is not available"
    )
    assert g.charge == g.failure
    w.heal(lambda: w.group().incarnation == 2)
    assert len(w.group().start_failures) == 1
    assert not w.group().runtime_failures


def refused(w: World, words: str = "srun: error: Unable to contact slurm controller (connect failure)") -> None:
    for node in ("n0", "n1"):
        w.vanish(G, node, stderr=words, spoke=False)


def test_launches_that_fail_while_slurm_does_not_answer_are_not_charged_and_paced() -> None:
    w = starting(restart=RestartPolicy(max_start_failures=0, backoff_initial_s=7.0))
    for incarnation in range(1, 6):
        refused(w)
        failed_at = w.now
        w.blind = True
        for _ in range(3):
            w.tick(1.0)
        assert phase(w) is P.STOPPING
        w.blind = False
        w.heal(lambda n=incarnation: w.group().incarnation == n + 1)  # type: ignore[misc]
        assert w.now >= failed_at + 7.0
    assert w.group().start_failures == ()
    w.heal(lambda: phase(w) is P.READY)


def test_a_slurm_that_was_blind_a_moment_before_the_launch_excuses_its_failure() -> None:
    w = starting(restart=NEVER_AGAIN)
    w.listing_failed_at = w.now - 59.0
    refused(w, "srun: error: Memory required by task is not available")
    w.heal(lambda: w.group().incarnation == 2)
    assert w.group().start_failures == ()


def test_a_slurm_that_was_blind_long_before_the_launch_excuses_nothing() -> None:
    w = starting(restart=NEVER_AGAIN)
    w.listing_failed_at = w.now - 61.0
    refused(w, "srun: error: Memory required by task is not available")
    w.heal(lambda: phase(w) is P.FAILED)


def test_a_blind_slurm_excuses_no_engine() -> None:
    w = starting(restart=NEVER_AGAIN)
    w.listing_failed_at = w.now
    w.kill(G, 0)
    w.heal(lambda: phase(w) is P.FAILED)


def test_what_slurm_refused_is_not_tried_again_at_once() -> None:
    w = starting()
    refused(w, "srun: error: Requested node configuration is not available")
    failed_at = w.now
    w.heal(lambda: w.group().incarnation == 2)
    assert w.now >= failed_at + 5.0


def test_an_srun_that_ends_after_its_agent_spoke_is_an_ended_step_and_no_failed_launch() -> None:
    w = starting()
    w.change(G, "n0", spoke=True)
    w.vanish(G, "n0", stderr="srun: error: Node failure on n0")
    w.tick()
    failure = w.group().failure
    assert failure is not None
    assert failure.reason is Reason.STEP_ENDED
    assert failure.message == "srun ended with 1: srun: error: Node failure on n0"


def test_an_srun_that_ends_with_0_is_a_failure_all_the_same() -> None:
    w = ready()
    w.vanish(G, "n1", exit_code=0)
    w.tick()
    failure = w.group().failure
    assert failure is not None
    assert (failure.reason, failure.rank, failure.node) == (Reason.STEP_ENDED, 1, "n1")
    assert phase(w) is P.STOPPING


# --------------------------------------------------------------------------------------------------------------- a stop


def test_one_failed_member_stops_every_other_member_of_the_group() -> None:
    w = ready(nodes=4)
    w.kill(G, 2)
    w.tick()
    assert w.actions(Stop) == [Stop(group=G, incarnation=1, nodes=("n0", "n1", "n3"))]
    failure = w.group().failure
    assert failure is not None
    assert failure.restarted_peers == (0, 1, 3)


def test_nothing_is_launched_while_a_step_of_the_old_incarnation_lives() -> None:
    w = ready()
    w.deaf.add("n1")
    w.undying.add("n1")
    w.kill(G, 0)
    for _ in range(100):
        w.tick(3.0)
    assert w.living(G) == {1}
    assert len(w.actions(Launch)) == 1
    assert phase(w) is P.STOPPING


def test_a_silent_end_is_not_believed_without_a_listing_that_was_asked_after_it() -> None:
    w = ready()
    w.list_steps()
    w.now += 1.0
    w.kill(G, 0)
    w.vanish(G, "n1")
    w.blind = True
    for _ in range(20):
        w.tick(1.0)
    assert phase(w) is P.STOPPING
    assert w.decisions[-1].wants.listing
    w.blind = False
    w.tick()
    w.tick()
    assert phase(w) is P.FENCING


def test_a_listing_that_was_asked_before_the_end_and_came_after_it_is_not_believed() -> None:
    w = ready()
    before_launch = replace(w.snapshot(), names=frozenset(), pids=frozenset())
    w.now += 1.0
    w.blind = True
    w.vanish(G, "n0", lives=True)
    w.listing = before_launch
    w.tick()
    assert phase(w) is P.STOPPING
    w.listing = replace(before_launch, asked_at=w.steps[G, 1, "n0", False].exited_at or 0.0)
    w.tick()
    assert phase(w) is P.STOPPING


@pytest.mark.parametrize("known_by", ["name", "pid"])
def test_a_step_that_slurm_still_lists_lives_by_its_name_or_by_its_srun(known_by: str) -> None:
    w = ready(nodes=1)
    w.vanish(G, "n0", lives=True)
    w.undying.add("n0")
    w.now += 1.0
    listed = w.snapshot()
    w.blind = True
    w.listing = replace(listed, pids=frozenset()) if known_by == "name" else replace(listed, names=frozenset())
    for _ in range(20):
        w.tick(1.0)
    assert phase(w) is P.STOPPING
    assert w.actions(Cancel)


def test_an_agent_s_last_word_is_proof_also_while_its_srun_lingers_and_slurm_is_silent() -> None:
    w = ready(nodes=1)
    w.blind = True
    w.ask_job(Job.RUNNING)
    w.change(G, "n0", exit=ExitRecord(cause="engine_exited", message="exit code 1", rank=0))
    w.tick()
    assert phase(w) is P.FENCING
    assert not w.actions(Stop)


def test_what_does_not_hear_the_stop_is_cancelled_after_grace_and_a_second_and_then_each_five_seconds() -> None:
    w = ready(stop=StopPolicy(grace_s=2.0, cancel_after_s=1.0))
    w.deaf |= {"n1"}
    w.undying |= {"n1"}
    w.kill(G, 0)
    w.tick()
    began = w.now
    cancelled = []
    for _ in range(200):
        w.tick(0.1)
        if w.decisions[-1].actions:
            cancelled.append(round(w.now - began))
            assert w.decisions[-1].actions == (Cancel(group=G, incarnation=1, nodes=("n1",)),)
    assert cancelled == [3, 8, 13, 18]
    assert len(w.actions(Stop)) == 1
    assert w.group().message == "engine_exited: still ending on n1"


def test_nothing_is_cancelled_where_the_agents_did_as_they_were_told() -> None:
    w = ready()
    w.kill(G, 0)
    w.heal(lambda: w.group().incarnation == 2)
    assert w.actions(Stop)
    assert not w.actions(Cancel)


def test_steps_that_are_not_observed_keep_a_group_from_being_taken_for_stopped() -> None:
    w = ready()
    w.kill(G, 0)
    del w.steps[G, 1, "n1", False]
    for _ in range(10):
        w.tick(1.0)
    assert phase(w) is P.STOPPING


# --------------------------------------------------------------------------------------------------------- fence, sweep


def fencing_with_open_port(**policies: Any) -> World:
    w = new(fence=FencePolicy(timeout_s=20.0), **policies)
    w.ports_open[G] = ("n1:18000",)
    w.tick()
    assert phase(w) is P.FENCING
    return w


def test_nothing_is_launched_while_a_port_accepts_connections() -> None:
    w = fencing_with_open_port(restart=RestartPolicy(max_start_failures=1000))
    for _ in range(300):
        w.tick(1.0)
        w.settle()
    assert all(a.sweep for a in w.actions(Launch))
    w.ports_open[G] = ()
    w.heal(lambda: phase(w) is P.READY)


def test_a_port_that_stays_open_for_a_second_is_swept_on_its_node_only() -> None:
    w = fencing_with_open_port()
    w.tick(0.9)
    assert not w.actions(Launch)
    w.tick(0.2)
    assert w.actions(Launch) == [Launch(group=G, incarnation=0, nodes=("n1",), sweep=True)]
    w.tick(0.1)
    assert len(w.actions(Launch)) == 1


def test_a_sweep_is_repeated_five_seconds_later_while_the_port_is_open() -> None:
    w = fencing_with_open_port()
    w.tick(1.1)
    w.vanish(G, "n1", sweep=True)
    w.tick()
    w.tick(4.8)
    assert len(w.actions(Launch)) == 1
    w.tick(0.3)
    assert len(w.actions(Launch)) == 2


def test_the_start_waits_for_its_own_sweep_to_end() -> None:
    w = fencing_with_open_port()
    w.tick(1.1)
    w.ports_open[G] = ()
    w.tick()
    w.tick()
    assert phase(w) is P.FENCING
    w.settle()
    w.tick()
    assert phase(w) is P.STARTING


def test_the_start_waits_for_a_sweep_that_is_not_observed() -> None:
    w = fencing_with_open_port()
    w.tick(1.1)
    w.ports_open[G] = ()
    swept = w.steps.pop((G, 0, "n1", True))
    w.tick()
    assert phase(w) is P.FENCING
    w.steps[G, 0, "n1", True] = swept
    w.settle()
    w.tick()
    assert phase(w) is P.STARTING


def test_a_sweep_whose_srun_vanished_needs_a_listing_before_the_start() -> None:
    w = fencing_with_open_port()
    w.tick(1.1)
    w.vanish(G, "n1", sweep=True)
    w.ports_open[G] = ()
    w.blind = True
    w.tick()
    assert phase(w) is P.FENCING
    assert w.decisions[-1].wants.listing
    w.blind = False
    w.tick()
    w.tick()
    assert phase(w) is P.STARTING


def test_the_sweep_names_who_holds_the_port_and_so_does_the_failure() -> None:
    w = fencing_with_open_port()
    w.tick(1.1)
    w.change(G, "n1", sweep=True, spoke=True, waiting_for="port 18000 is held by pid 3 (jupyter) of user eve")
    w.tick()
    assert w.group().message == "n1: port 18000 is held by pid 3 (jupyter) of user eve"
    assert w.events("fence_waits")[-1].message == w.group().message
    w.heal(lambda: bool(w.events("failure")))
    failure = w.events("failure")[0]
    assert failure.reason == Reason.PORT_BUSY
    assert failure.message.startswith("not free after 20 s: n1: port 18000 is held by pid 3")


def test_a_fence_that_fails_is_a_start_failure_with_backoff_and_then_the_group_has_failed() -> None:
    w = fencing_with_open_port(restart=RestartPolicy(max_start_failures=3, max_restarts=0, backoff_initial_s=5.0))
    w.heal(lambda: phase(w) is P.FAILED, ticks=400)
    assert len(w.events("failure")) == 4
    assert [round(float(str(e.data["delay_s"]))) for e in w.events("waiting")] == [0, 5, 10]
    assert w.group().reason is Reason.BUDGET_SPENT
    assert w.group().message.startswith("3 start-up failures within 3600 s are spent; last: not free after 20 s: ")
    assert not [a for a in w.actions(Launch) if not a.sweep]


def test_a_sweep_that_does_not_end_is_stopped_at_the_fence_s_deadline_before_the_fence_has_failed() -> None:
    w = fencing_with_open_port()
    w.tick(1.1)
    w.deaf.add("n1")
    while not w.actions(Stop):
        w.tick(1.0)
    assert w.now == pytest.approx(1000 + 20, abs=1.5)
    assert phase(w) is P.FENCING
    w.undying.add("n1")
    for _ in range(10):
        w.tick(1.0)
    assert phase(w) is P.FENCING
    assert w.actions(Cancel)
    w.undying.clear()
    w.deaf.clear()
    w.heal(lambda: bool(w.events("failure")))
    assert not w.living(G)


def test_a_failure_that_a_failed_fence_follows_is_charged_too() -> None:
    w = ready(fence=FencePolicy(timeout_s=20.0))
    w.kill(G, 0)
    w.ports_open[G] = ("n0:18000",)
    w.heal(lambda: len(w.events("failure")) == 2)
    assert len(w.group().runtime_failures) == 1
    charge = w.group().charge
    assert charge is not None
    assert charge.startup


def test_ports_are_looked_at_again_after_a_backoff() -> None:
    w = ready()
    to_backoff(w)
    w.ports_open[G] = None
    w.tick(5.1)
    assert phase(w) is P.FENCING
    assert w.decisions[-1].wants.ports == (G,)
    assert not w.decisions[-1].actions


# ------------------------------------------------------------------------------------------------------ backoff, budget


def test_the_first_restart_comes_at_once_then_the_backoff_doubles_up_to_its_end() -> None:
    policy = RestartPolicy(backoff_initial_s=5.0, backoff_max_s=300.0)
    assert [backoff_s(policy, n) for n in range(11)] == [0, 0, 5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert backoff_s(policy, 10**6) == 300.0


def test_a_failure_leaves_the_budget_s_window_when_it_is_old() -> None:
    policy = RestartPolicy(window_s=100.0)
    assert recent((0.0, 50.0, 99.0), policy, 100.0) == (50.0, 99.0)


def restarts_until(w: World, stop: Callable[[], bool], *, pause_s: float = 0.0) -> list[float]:
    """Kill the group each time that it is ready; return how long each recovery took."""
    took: list[float] = []
    for _ in range(20):
        w.heal(lambda: phase(w) is P.READY or stop())
        if stop():
            return took
        w.tick(pause_s)
        w.kill(G, 0)
        began = w.now
        w.tick()
        w.heal(lambda: phase(w) in (P.READY, P.FAILED))
        took.append(w.now - began)
    return took


def test_restarts_wait_longer_and_longer_and_then_the_budget_is_spent() -> None:
    w = ready()
    took = restarts_until(w, lambda: phase(w) is P.FAILED)
    assert [5 * round(t / 5) for t in took] == [0, 5, 10, 20, 40, 0]
    g = w.group()
    assert (g.incarnation, g.restarts, g.reason) == (6, 5, Reason.BUDGET_SPENT)
    assert g.message == "5 restarts within 3600 s are spent; last: exit code 1"
    assert not w.living(G)
    assert len(w.events("failed")) == 1
    launches = len(w.actions(Launch))
    for _ in range(50):
        w.tick(1000.0)
    assert len(w.actions(Launch)) == launches


def test_failures_that_are_further_apart_than_the_window_allows_cost_nothing() -> None:
    w = ready(restart=RestartPolicy(max_restarts=2, window_s=100.0))
    took = restarts_until(w, lambda: len(w.events("failure")) == 12, pause_s=51.0)
    assert len(took) == 12
    assert phase(w) is P.READY
    assert len(w.group().runtime_failures) <= 2


def test_start_failures_have_a_budget_of_their_own() -> None:
    w = ready(restart=RestartPolicy(max_restarts=1, max_start_failures=2))
    w.kill(G, 0)
    for _ in range(2):
        w.heal(lambda: phase(w) is P.STARTING)
        w.kill(G, 0)
        w.tick()
    w.heal(lambda: phase(w) is P.READY)
    assert len(w.group().runtime_failures) == 1
    assert len(w.group().start_failures) == 2
    w.kill(G, 0)
    w.heal(lambda: phase(w) is P.FAILED)
    assert w.group().message.startswith("1 restarts within")


def test_a_failure_is_charged_at_the_next_launch_and_not_earlier() -> None:
    w = ready()
    w.ports_open[G] = None
    w.kill(G, 0)
    for _ in range(5):
        w.tick()
    assert phase(w) is P.FENCING
    assert w.group().runtime_failures == ()
    w.ports_open[G] = ()
    w.heal(lambda: phase(w) is P.STARTING)
    assert len(w.group().runtime_failures) == 1
    assert w.group().charge is None


def test_a_restart_that_the_operator_wants_is_charged_to_nobody() -> None:
    w = ready(restart=NEVER_AGAIN)
    for n in range(2, 6):
        w.ask("restart", G)
        w.tick()
        w.heal(lambda: phase(w) is P.READY)
        assert w.group().incarnation == n
    assert w.group().runtime_failures == ()


# -------------------------------------------------------------------------------------------------------- what is told


def numbers(w: World, type_: str) -> dict[str, object]:
    return dict(w.events(type_)[-1].data)


def test_the_events_of_a_recovery_say_how_long_each_stage_took() -> None:
    w = ready()
    w.deaf.add("n1")
    w.kill(G, 0)
    w.tick()  # seen
    w.tick(2.0)  # cancelled
    w.tick(0.5)  # gone; listed
    w.ports_open[G] = None
    w.tick(0.25)
    w.deaf.clear()
    w.tick(1.0)
    w.ports_open[G] = ()
    w.tick(3.0)  # fenced, launched
    w.fence(G)
    w.tick(4.0)  # go
    w.tick()
    w.prove(G)
    w.probe(G, 0, asked_at=w.now + 12.0)
    w.probe(G, 1, asked_at=w.now + 17.5)
    w.tick(20.0)
    assert numbers(w, "launching")["nodes"] == ["n0", "n1"]
    assert numbers(w, "stopped")["stop_s"] == pytest.approx(2.75)
    assert numbers(w, "fenced")["fence_s"] == pytest.approx(4.0)
    assert numbers(w, "go")["launch_s"] == pytest.approx(4.0)
    told = numbers(w, "ready")
    assert told["recovery_s"] == pytest.approx(2.75 + 4.0 + 4.0 + 20.01)
    assert told["start_s"] == pytest.approx(20.01)
    assert told["verify_s"] == pytest.approx(2.5)
    assert "detect_s" not in numbers(w, "failure")  # what ends is seen when it ends


def test_the_failure_of_a_hung_group_tells_how_long_probes_failed() -> None:
    w = ready(groups=2)
    w.probe(G, 0, failures=4, first_failure_at=w.now - 50.0)
    w.probe(G, 1, failures=3, first_failure_at=w.now - 60.0)
    w.tick(2.0)
    assert numbers(w, "failure")["detect_s"] == pytest.approx(62.0)


def test_a_probe_that_failed_is_not_how_a_crash_was_detected() -> None:
    w = ready()
    w.probe(G, 1, failures=1, first_failure_at=w.now - 30.0)
    w.kill(G, 0)
    w.tick()
    assert "detect_s" not in numbers(w, "failure")


def test_a_start_of_which_no_probe_is_known_tells_no_time_of_its_proof() -> None:
    assert "verify_s" not in numbers(ready(), "ready")


def test_a_drain_tells_its_own_time_and_not_that_of_an_old_failure() -> None:
    w = ready()
    w.kill(G, 0)
    w.heal(lambda: w.group().incarnation == 2 and phase(w) is P.READY)
    w.tick(5000.0)
    drain(w)
    reach(w, P.STOPPED)
    assert float(str(numbers(w, "stopped")["stop_s"])) < 1.0


def test_a_start_that_the_operator_asked_for_tells_no_recovery_of_an_old_failure() -> None:
    w = ready(restart=NEVER_AGAIN)
    to_failed(w)
    w.tick(5000.0)
    w.ask("restart", G)
    w.tick()
    w.heal(lambda: phase(w) is P.READY)
    assert float(str(numbers(w, "ready").get("recovery_s", 0.0))) < 1.0
    assert float(str(numbers(w, "fenced")["fence_s"])) < 1.0


def test_the_pid_of_each_step_is_remembered_for_the_next_coordinator() -> None:
    w = starting()
    assert [s.pid for s in w.group().steps] == [None, None]
    w.tick()
    assert [(s.node, s.pid, s.pid_started) for s in w.group().steps] == [("n0", 101, 101), ("n1", 102, 102)]


def test_every_step_of_a_run_has_a_name_and_a_mark_of_its_own() -> None:
    plan = make_plan(12, 2)
    steps = [
        (g.id, incarnation, node, sweep)
        for g in plan.groups
        for incarnation in (1, 2, 11, 12)
        for node in g.nodes
        for sweep in (False, True)
    ]
    names = {step_name(plan, g, n, node, sweep=sweep) for g, n, node, sweep in steps}
    assert len(names) == len(steps)
    assert all(" " not in name and "/" not in name for name in names)
    assert len({mark("r", g, n, node) for g, n, node, _ in steps}) == len(steps) // 2


def test_a_new_group_state_has_no_step_and_no_incarnation() -> None:
    g = GroupState(id=G)
    assert (g.phase, g.incarnation, g.steps) == (P.PENDING, 0, ())
