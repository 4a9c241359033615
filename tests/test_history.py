"""What becomes of an incarnation, read back from events: from lists written by hand, and from the real decisions."""

from __future__ import annotations

from typing import Any

import pytest

from slurm_rollout.core import codec
from slurm_rollout.core.history import UNSEEN, End, Incarnation, Note, incarnations, step
from slurm_rollout.core.phases import Phase
from slurm_rollout.core.plan import RestartPolicy
from slurm_rollout.testing.world import World, make_plan

G = "actor/0"
Event = dict[str, Any]


def own(at: float, type_: str, incarnation: int = 1, **fields: Any) -> Event:
    """An event of the group, as the store writes it: what says nothing is left out."""
    event = {"n": 1, "at": at, "term": 1, "type": type_, "group": G, "incarnation": incarnation, **fields}
    return {k: v for k, v in event.items() if v not in ("", None, {}, 0) or k == "rank"}


def of_run(at: float, type_: str, message: str = "", term: int = 1, **fields: Any) -> Event:
    return {"n": 1, "at": at, "term": term, "type": type_, "message": message, **fields}


def started(at: float, n: int, **ready: Any) -> list[Event]:
    """A start that takes 4 s, of which 1 s until go and 0.5 s for the proof."""
    return [
        own(at, "launching", n, message="on n1, n2", data={"nodes": ["n1", "n2"]}),
        own(at + 1, "go", n, data={"launch_s": 1.0}),
        own(at + 4, "ready", n, data={"start_s": 3.0, "verify_s": 0.5, **ready}),
    ]


def failure(at: float, n: int, reason: str = "engine_exited", **fields: Any) -> Event:
    told = {"message": "rank 1 was ended by signal 9 (Killed)", "rank": 1, "node": "n2"} | fields
    return own(at, "failure", n, reason=reason, **told)


def stopped(
    at: float, n: int, stop_s: float = 0.1, reason: str = "engine_exited", *, fence: bool = True
) -> list[Event]:
    ends = [own(at, "stopped", n, reason=reason, message="every step ended", data={"stop_s": stop_s})]
    return [*ends, own(at + 0.2, "fenced", n, reason=reason, data={"fence_s": 0.2})] if fence else ends


def asked(at: float, verb: str, message: str, who: str = "ann@login1", term: int = 1) -> Event:
    return of_run(at, "request", message, term, data={"id": "1", "verb": verb, "who": who})


UP = of_run(0, "up", "term 1 on n0")


def end(i: Incarnation) -> End:
    assert i.end is not None
    return i.end


# ------------------------------------------------------------------------------------------------------ literal events


def test_a_crash_and_its_recovery() -> None:
    events = [
        UP,
        *started(10, 1),
        failure(20, 1, data={"restarted_peers": [0]}),
        of_run(20, "epoch", "epoch 2: nothing", data={"epoch": 2}),
        *stopped(20.1, 1),
        *started(20.3, 2, recovery_s=4.31),
    ]
    first, second = incarnations(events, G)
    assert first == Incarnation(
        incarnation=1,
        term=1,
        nodes=("n1", "n2"),
        launched_at=10,
        go_at=11,
        ready_at=14,
        launch_s=1.0,
        start_s=3.0,
        verify_s=0.5,
        end=End(
            at=20,
            reason="engine_exited",
            message="rank 1 was ended by signal 9 (Killed)",
            rank=1,
            node="n2",
            restarted_peers=(0,),
            stopped_at=20.1,
            stop_s=0.1,
            fence_s=0.2,
            recovered_as=2,
            launch_s=1.0,
            start_s=3.0,
            verify_s=0.5,
            recovery_s=4.31,  # as the coordinator's own clock has it, not 24.3 - 20
        ),
    )
    assert (second.incarnation, second.end, second.ready_at) == (2, None, 24.3)


def test_a_hang_with_a_snapshot() -> None:
    hang = failure(20, 1, "not_answering", rank=0, node="n1", data={"detect_s": 120.5})
    events = [
        *started(10, 1),
        hang,
        own(22, "snapshot", 1, reason="not_answering", message="none from n2", data={"snapshot_s": 2.0}),
        *stopped(22.1, 1, 2.1),
    ]
    [only] = incarnations(events, G)
    found = end(only)
    assert (found.reason, found.rank, found.node) == ("not_answering", 0, "n1")
    assert (found.detect_s, found.snapshot_s, found.stop_s, found.fence_s) == (120.5, 2.0, 2.1, 0.2)
    assert (found.recovered_as, found.recovery_s, found.start_s) == (None, None, None)


def test_start_failures_with_backoff_are_all_over_when_the_group_is_ready_again() -> None:
    failed: Event = {"message": "n2: port 18000 is held by pid 7", "reason": "port_busy", "node": "n2", "rank": None}
    events = [
        *started(10, 1),
        failure(20, 1),
        *stopped(20.1, 1),
        *started(20.3, 2)[:1],
        failure(22, 2, **failed),
        *stopped(22.1, 2),
        own(22.3, "waiting", 2, message="next start in 5 s", data={"delay_s": 5.0}),
        *started(27.3, 3)[:2],
        failure(29, 3, **failed),
        *stopped(29.1, 3),
        own(29.3, "waiting", 3, message="next start in 10 s", data={"delay_s": 10.0}),
        *started(35.3, 4, recovery_s=10.3),  # somebody resumed it earlier
    ]
    found = incarnations(events, G)
    assert [i.ready_at is not None for i in found] == [True, False, False, True]
    ends = [end(i) for i in found[:3]]
    assert [e.reason for e in ends] == ["engine_exited", "port_busy", "port_busy"]
    assert [e.rank for e in ends] == [1, None, None]
    assert [e.backoff_s for e in ends] == [None, 5.0, 6.0]
    assert [e.recovered_as for e in ends] == [4, 4, 4]
    assert [e.recovery_s for e in ends] == pytest.approx([19.3, 17.3, 10.3])


def test_an_operators_restart_says_who_asked() -> None:
    events = [
        *started(10, 1),
        asked(51, "restart", "actor/0: restarts"),
        asked(51, "restart", "actor/1: restarts", "bob@login2"),
        *stopped(51.3, 1, 0.3, "operator"),
        *started(51.5, 2),
        of_run(60, "ending", "told to end", reason="run_ending"),
        *stopped(60.1, 2, 0.1, "run_ending", fence=False),
    ]
    first, second = incarnations(events, G)
    found = end(first)
    assert (end(second).message, end(second).by) == ("told to end", "")
    assert (found.at, found.reason, found.kind, found.by) == (51.0, "operator", "operator", "ann@login1")
    assert found.message == "restart, asked by ann@login1"
    assert found.recovered_as == 2
    assert found.recovery_s == pytest.approx(4.5)
    assert [n.message for n in first.notes] == ["restart, asked by ann@login1: restarts"]
    assert second.notes == ()


def test_a_request_that_changes_nothing_is_not_why_it_ended() -> None:
    events = [
        *started(10, 1),
        asked(19, "resume", "actor/0: is ready already: nothing to do"),
        of_run(20, "ending", "told to end", reason="run_ending"),
        *stopped(20.1, 1, 0.1, "run_ending", fence=False),
    ]
    [only] = incarnations(events, G)
    assert (end(only).reason, end(only).message, end(only).by) == ("run_ending", "told to end", "")


def test_drained_by_a_request_and_resumed_with_hours_between() -> None:
    events = [
        *started(10, 1),
        asked(20, "drain", "actor/0: drains"),
        *stopped(20.1, 1, 0.1, "operator", fence=False),
        own(20.1, "drained", 1, reason="operator", message="drain, asked by ann@login1"),
        asked(7220, "resume", "actor/0: starts again, with a fresh budget"),
        own(7220.1, "fenced", 1, data={"fence_s": 0.1}),
        *started(7220.1, 2),
    ]
    first, _ = incarnations(events, G)
    found = end(first)
    assert (found.by, found.message, found.fence_s) == ("ann@login1", "drain, asked by ann@login1", 0.1)
    assert found.backoff_s is None
    assert found.recovery_s == pytest.approx(7204.1)
    assert [n.type for n in first.notes] == ["request", "request"]


def test_the_end_of_the_run_that_somebody_asked_for() -> None:
    events = [
        *started(10, 1),
        asked(20, "stop", "the run is ending"),
        of_run(20, "ending", "stop, asked by ann@login1", reason="operator"),
        *stopped(20.1, 1, 0.1, "operator", fence=False),
        own(20.1, "drained", 1, reason="operator", message="the run is ending"),
        of_run(20.2, "ended", "drained"),
    ]
    [only] = incarnations(events, G)
    assert (end(only).by, end(only).message) == ("ann@login1", "stop, asked by ann@login1")
    assert only.notes == (Note(at=20.2, type="ended", message="drained"),)


@pytest.mark.parametrize("repeated", [False, True], ids=["a takeover", "the last events written again"])
def test_a_takeover_in_the_middle_of_a_recovery(repeated: bool) -> None:
    events = [UP, *started(10, 1), failure(20, 1)]
    events.append(of_run(21, "takeover", "term 2 on n0, adopted 1 steps", 2))
    if repeated:
        events.append(failure(21, 1, "step_ended", message="its srun is gone", rank=0, node="n1"))
    events += [*stopped(21.1, 1, 1.1), *started(21.3, 2)]
    if repeated:
        events += [{**e, "at": e["at"] + 0.5} for e in started(21.3, 2)[1:]]
    first, second = incarnations(events, G)
    found = end(first)
    assert (found.at, found.reason, found.rank, found.stop_s) == (20, "engine_exited", 1, 1.1)
    assert [(n.at, n.type) for n in first.notes] == [(21, "takeover")]
    assert (found.recovered_as, second.ready_at, second.notes) == (2, 25.3, ())


def test_failed_for_good_and_a_fence_that_did_not_succeed() -> None:
    busy: Event = {"message": "not free after 120 s: n1:18000 still accepts connections", "rank": None, "node": ""}
    events = [
        *started(10, 1),
        failure(20, 1),
        *stopped(20.1, 1, fence=False),
        own(21.2, "fence_waits", 1, reason="port_busy", message="n1:18000 still accepts connections"),
        failure(140, 1, "port_busy", **busy),
        own(140, "waiting", 1, message="next look in 5 s", data={"delay_s": 5.0}),
        failure(265, 1, "port_busy", **busy),
        own(265, "failed", 1, reason="budget_spent", message="5 start-up failures within 3600 s are spent"),
    ]
    [only] = incarnations(events, G)
    assert (end(only).reason, end(only).at, end(only).recovered_as) == ("engine_exited", 20, None)
    assert [n.type for n in only.notes] == ["fence_waits", "fence_failed", "fence_failed", "failed"]


def test_what_happens_before_the_first_start_is_incarnation_0() -> None:
    events = [
        UP,
        own(1, "fence_waits", 0, reason="port_busy", message="n1:18000 still accepts connections"),
        *started(30, 1),
    ]
    zero, one = incarnations(events, G)
    assert (zero.incarnation, zero.launched_at, zero.end, len(zero.notes)) == (0, None, None, 1)
    assert one.ready_at == 34


def test_still_running_with_what_it_said_meanwhile() -> None:
    events = [
        *started(10, 1),
        own(20, "slow", 1, message="answers late, but its progress counter moves: left alone"),
        own(30, "unready", 1, reason="answers_error", message="HTTP 503", rank=0),
        own(31, "ready", 1, message="answers again"),
    ]
    [only] = incarnations(events, G)
    assert (only.end, only.ready_at) == (None, 14)
    assert [n.type for n in only.notes] == ["slow", "unready", "ready"]


def test_a_run_that_was_started_again_did_not_see_the_end() -> None:
    events = [
        UP,
        *started(10, 1),
        of_run(1000, "up", "term 2 on n0", 2),
        own(1000.1, "fenced", 1, data={"fence_s": 0.1}),
        *started(1000.2, 2),
    ]
    first, second = incarnations(events, G)
    assert (end(first).reason, end(first).at, end(first).stop_s) == (UNSEEN, 1000, None)
    assert (end(first).recovered_as, second.end) == (2, None)
    assert [n.type for n in first.notes] == ["up"]


def test_a_run_that_was_started_again_and_adopted_what_ran() -> None:
    events = [UP, *started(10, 1), of_run(1000, "up", "term 2 on n0, adopted 2 steps", 2), failure(2000, 1)]
    [only] = incarnations([*events, *stopped(2000.1, 1)], G)
    assert (end(only).reason, end(only).at) == ("engine_exited", 2000)


def test_other_groups_and_an_empty_run_tell_nothing() -> None:
    assert incarnations([], G) == ()
    assert incarnations([UP, {**own(1, "launching"), "group": "actor/1"}], G) == ()


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"group": G},
        {"group": G, "type": 7, "incarnation": "x", "at": None, "data": []},
        {"group": G, "type": "stopped", "incarnation": 1, "data": {"stop_s": "soon"}},
        {"group": G, "type": "failure", "incarnation": 1, "rank": "one", "data": {"restarted_peers": 3}},
        {"type": "request", "data": None, "message": None},
        {"type": "up", "at": "then"},
    ],
)
def test_events_that_make_no_sense_are_no_reason_to_stop(broken: Event) -> None:
    found = {i.incarnation: i for i in incarnations([*started(10, 1), broken, *started(20, 2)], G)}
    assert found[1].ready_at == 14
    assert found[2].ready_at == 24


# ------------------------------------------------------------------------------------------------------ real decisions


def told(w: World) -> tuple[Incarnation, ...]:
    """What the decisions of a world say, written as the store does. The time is the number of the decision."""
    events = [
        {"at": float(at), "term": w.state.term, **codec.encode(e)} for at, d in enumerate(w.decisions) for e in d.events
    ]
    return incarnations(events, G)


def ready(**policies: Any) -> World:
    w = World(make_plan(1, 2, **policies))
    w.make_ready()
    return w


def test_decisions_about_a_crash_a_hang_and_a_restart_are_understood() -> None:
    w = ready()
    w.kill(G, 1)
    w.heal(lambda: w.group().incarnation == 2 and w.group().phase is Phase.READY)
    w.probe(G, 0, failures=4, first_failure_at=w.now - 60, last_error="no answer")
    w.change(G, "n0", failing={0: 4})  # a fleet of one group asks the agents
    w.heal(lambda: w.group().incarnation == 3 and w.group().phase is Phase.READY)
    w.ask("restart", G)
    w.heal(lambda: w.group().incarnation == 4 and w.group().phase is Phase.READY)
    w.stop_signal = True
    w.heal(lambda: w.group().phase is Phase.STOPPED)
    found = told(w)
    assert [(i.incarnation, i.nodes, end(i).reason) for i in found] == [
        (1, ("n0", "n1"), "engine_exited"),
        (2, ("n0", "n1"), "not_answering"),
        (3, ("n0", "n1"), "operator"),
        (4, ("n0", "n1"), "run_ending"),
    ]
    crash, hang, restart, last = (end(i) for i in found)
    assert (crash.rank, crash.node, crash.detect_s, crash.snapshot_s) == (1, "n1", None, None)
    assert hang.detect_s is not None
    assert hang.detect_s >= 60
    assert hang.snapshot_s is not None
    assert hang.stop_s is not None
    assert hang.snapshot_s <= hang.stop_s
    assert hang.backoff_s is not None
    assert (restart.by, restart.message) == ("me", "restart, asked by me")
    assert last.message == "told to end"
    assert [e.recovered_as for e in (crash, hang, restart, last)] == [2, 3, 4, None]
    assert all(None not in (e.stop_s, e.fence_s, e.launch_s, e.start_s, e.recovery_s) for e in (crash, hang, restart))


def test_decisions_about_a_drain_a_resume_and_a_spent_budget_are_understood() -> None:
    w = ready(restart=RestartPolicy(max_restarts=0))
    w.ask("drain", G)
    w.heal(lambda: w.group().phase is Phase.STOPPED)
    w.ask("resume", G)
    w.heal(lambda: w.group().phase is Phase.READY)
    w.kill(G, 0)
    w.heal(lambda: w.group().phase is Phase.FAILED)
    first, second = told(w)
    assert (end(first).by, end(first).message) == ("me", "drain, asked by me")
    assert [n.type for n in second.notes] == ["failed"]
    assert end(second).recovered_as is None


def test_a_fence_that_fails_is_not_taken_for_the_end_of_what_ended_before() -> None:
    w = ready()
    w.kill(G, 0)
    w.ports_open[G] = ("n0:18000",)
    w.heal(lambda: bool(w.events("failure")[1:]))
    [only] = told(w)
    assert end(only).reason == "engine_exited"
    assert only.notes[-1].type == "fence_failed"


# -------------------------------------------------------------------------------------------------------- exit records

STARTED = {"report": "started", "ranks": [2, 3], "pids": [10, 11]}


def test_the_exit_record_of_a_step() -> None:
    exit_ = {"report": "exit", "cause": "engine_exited", "message": "rank 2 …", "rank": 2, "signal": 9, "oom": True}
    found = step("n1", [{"report": "hello"}, STARTED, {**exit_, "last_lines": ["a", "b"]}], "srun: error: n1: task 0")
    assert (found.node, found.ranks, found.cause, found.rank) == ("n1", (2, 3), "engine_exited", 2)
    assert (found.code, found.signal, found.oom, found.last_lines) == (None, 9, True, ("a", "b"))
    assert found.srun == ""


def test_without_an_exit_record_the_last_words_of_srun_count() -> None:
    stderr = (
        "srun: job 7\nsrun: error: n1: task 0: Killed\n\nsrun: error: Node failure on n1\n"
        "srun: error: cluster configuration lacks support for cpu binding\n"
    )
    found = step("n1", [STARTED], stderr)
    assert (found.cause, found.srun) == ("", "n1: task 0: Killed; Node failure on n1")


@pytest.mark.parametrize("report", [{}, {"report": "exit"}, {"report": "exit", "cause": 7, "rank": "x", "oom": "no"}])
def test_a_record_that_makes_no_sense_is_none(report: dict[str, Any]) -> None:
    assert step("n1", [report]).cause == ""
