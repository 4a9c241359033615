"""What the trainer is told: phases of pools, the epoch, and which URLs are in the barrier file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from slurm_rollout.core.barrier_rules import barrier_document, iso, publish
from slurm_rollout.core.model import Cancel, Launch, RunState, Stop
from slurm_rollout.core.phases import ALIVE, Phase, PoolPhase, Reason
from slurm_rollout.core.plan import FleetPlan, PoolPlan, RestartPolicy
from slurm_rollout.core.pools import PoolView, pool_view, pool_views
from slurm_rollout.testing.world import World, make_plan

P = Phase
PP = PoolPhase
STARTED_AT = 1000.0


def state(plan: FleetPlan, *phases: Phase, once_ready: bool = False, **changes: Any) -> RunState:
    """Return a state in which the groups are in these phases."""
    run = World(plan).state
    groups = tuple(
        replace(g, phase=p, incarnation=1, reason=Reason.NONE) for g, p in zip(run.groups, phases, strict=True)
    )
    names = tuple(p.name for p in plan.pools) if once_ready else ()
    return replace(run, groups=groups, pools_once_ready=names, **changes)


def view(run: RunState, pool: PoolPlan, *, waited_s: float = 0.0) -> PoolView:
    return pool_view(pool, run, STARTED_AT + waited_s, 1800.0)


def two_pools() -> FleetPlan:
    plan, other = make_plan(2, 1), make_plan(2, 1, pool="reward")
    return replace(plan, pools=(*plan.pools, *other.pools))


def document(w: World) -> dict[str, Any]:
    return barrier_document(w.plan, w.state, now=w.now, seq=len(w.decisions))


# --------------------------------------------------------------------------------------------------------------- pools


@pytest.mark.parametrize(
    ("phases", "min_ready", "waited_s", "expected"),
    [
        ((P.READY, P.READY, P.READY), 1, 0, (PP.READY, "")),
        ((P.READY, P.READY, P.STARTING), 1, 0, (PP.WAITING, "")),
        ((P.READY, P.READY, P.STARTING), 1, 1799, (PP.WAITING, "")),
        ((P.READY, P.READY, P.STARTING), 1, 1800, (PP.READY, "degraded")),
        ((P.READY, P.STARTING, P.STARTING), 2, 9999, (PP.WAITING, "")),
        ((P.READY, P.READY, P.FAILED), 1, 0, (PP.READY, "degraded")),
        ((P.READY, P.READY, P.FAILED), 3, 0, (PP.FAILED, "budget_spent")),
        ((P.READY, P.STARTING, P.FAILED), 1, 0, (PP.WAITING, "")),
        ((P.PENDING, P.PENDING, P.PENDING), 1, 0, (PP.WAITING, "")),
    ],
)
def test_a_pool_waits_for_all_its_groups_the_first_time_but_not_for_ever_and_not_for_failed_ones(
    phases: tuple[Phase, ...], min_ready: int, waited_s: float, expected: tuple[PoolPhase, str]
) -> None:
    plan = make_plan(3, 1, min_ready=min_ready)
    seen = view(state(plan, *phases), plan.pools[0], waited_s=waited_s)
    assert (seen.phase, seen.reason) == expected


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ((P.READY, P.READY, P.READY), (PP.READY, "")),
        ((P.READY, P.READY, P.STOPPING), (PP.READY, "degraded")),
        ((P.READY, P.UNREADY, P.STARTING), (PP.WAITING, "")),
        ((P.READY, P.READY, P.FAILED), (PP.READY, "degraded")),
        ((P.READY, P.FAILED, P.FAILED), (PP.FAILED, "budget_spent")),
        ((P.STOPPED, P.STOPPED, P.READY), (PP.WAITING, "")),
    ],
)
def test_a_pool_that_was_ready_once_needs_min_ready_groups(
    phases: tuple[Phase, ...], expected: tuple[PoolPhase, str]
) -> None:
    plan = make_plan(3, 1, min_ready=2)
    seen = view(state(plan, *phases, once_ready=True), plan.pools[0])
    assert (seen.phase, seen.reason) == expected
    assert (seen.desired, seen.min_ready) == (3, 2)
    assert seen.ready == phases.count(P.READY)


def test_an_unready_group_does_not_count_as_ready() -> None:
    plan = make_plan(1, 1)
    assert view(state(plan, P.UNREADY, once_ready=True), plan.pools[0]).phase is PP.WAITING


@pytest.mark.parametrize("ending", [Reason.OPERATOR, Reason.JOB_ENDING, Reason.RUN_ENDING])
def test_a_run_that_ends_has_stopped_pools_and_says_why(ending: Reason) -> None:
    plan = make_plan(2, 1)
    seen = view(state(plan, P.READY, P.DRAINING, once_ready=True, ending=ending), plan.pools[0])
    assert (seen.phase, seen.reason) == (PP.STOPPED, ending.value)


def test_a_pool_below_min_ready_for_ever_makes_the_barrier_failed_and_a_run_that_ends_after_it_stays_failed() -> None:
    w = World(make_plan(2, restart=RestartPolicy(max_restarts=0, max_start_failures=0), min_ready=2))
    w.make_ready()
    w.kill("actor/1", 0)
    w.heal(lambda: w.group(1).phase is P.FAILED)
    assert w.state.phase is PP.FAILED
    assert document(w)["phase"] == "failed"
    assert document(w)["reason"] == "budget_spent"
    assert document(w)["message"].startswith("actor/1: failed no restarts are allowed; last: exit code 1")
    w.stop_signal = True
    w.run_until(lambda: w.phases() == {P.STOPPED})
    assert (document(w)["phase"], document(w)["reason"]) == ("failed", "budget_spent")


def test_a_resumed_group_makes_a_failed_pool_wait_again() -> None:
    w = World(make_plan(1, restart=RestartPolicy(max_restarts=0)))
    w.make_ready()
    w.kill("actor/0", 0)
    w.heal(lambda: w.state.phase is PP.FAILED)
    w.ask("resume", "actor/0")
    w.tick()
    assert w.state.phase.value == "waiting"


@pytest.mark.parametrize(
    ("first", "second", "whole"),
    [
        (PP.READY, PP.READY, PP.READY),
        (PP.READY, PP.WAITING, PP.WAITING),
        (PP.WAITING, PP.FAILED, PP.FAILED),
        (PP.FAILED, PP.READY, PP.FAILED),
    ],
)
def test_the_phase_of_the_whole_is_that_of_the_worst_pool(
    first: PoolPhase, second: PoolPhase, whole: PoolPhase
) -> None:
    phases = {PP.READY: P.READY, PP.WAITING: P.STARTING, PP.FAILED: P.FAILED}
    plan = two_pools()
    run = state(plan, phases[first], phases[first], phases[second], phases[second], once_ready=True)
    assert tuple(v.phase for v in pool_views(plan, run, STARTED_AT)) == (first, second)
    assert publish(plan, run, STARTED_AT).phase is whole


def test_a_pool_is_once_ready_from_its_first_readiness_on() -> None:
    plan = make_plan(2, 1, min_ready=1)
    run = publish(plan, state(plan, P.READY, P.STARTING), STARTED_AT)
    assert run.pools_once_ready == ()
    run = publish(plan, replace(run, groups=tuple(replace(g, phase=P.READY) for g in run.groups)), STARTED_AT)
    assert run.pools_once_ready == ("actor",)
    down = replace(run, groups=(replace(run.groups[0], phase=P.STOPPING), run.groups[1]))
    again = publish(plan, down, STARTED_AT)
    assert again.phase is PP.READY
    assert again.pools_once_ready == ("actor",)


# --------------------------------------------------------------------------------------------------------------- epoch


def test_the_epoch_grows_by_one_whenever_the_set_that_serves_changes_and_only_then() -> None:
    w = World(make_plan(2))
    w.make_ready()
    w.kill("actor/0", 0)
    w.tick()
    w.heal(lambda: w.phases() == {P.READY})
    before = RunState(run_id="", job="", restart_count=0, term=1)
    for decision in w.decisions:
        after = decision.state
        assert after.epoch == before.epoch + (after.serving != before.serving)
        told = [e.data["epoch"] for e in decision.events if e.type == "epoch"]
        assert told == ([after.epoch] if after.epoch != before.epoch else [])
        before = after
    assert before.serving == (("actor/0", 2), ("actor/1", 1))


def test_the_epoch_grows_when_a_group_comes_back_with_a_new_incarnation_within_one_look() -> None:
    plan = make_plan(1, 1)
    run = publish(plan, state(plan, P.READY), STARTED_AT)
    new = replace(run, groups=(replace(run.groups[0], incarnation=2),))
    assert publish(plan, new, STARTED_AT).epoch == run.epoch + 1
    assert publish(plan, run, STARTED_AT).epoch == run.epoch


def test_the_epoch_event_says_who_serves() -> None:
    w = World(make_plan(2))
    w.make_ready()
    assert w.events("epoch")[-1].message == "epoch 1: actor/0 (incarnation 1), actor/1 (incarnation 1)"
    w.stop_signal = True
    w.tick()
    assert w.events("epoch")[-1].message == "epoch 2: nothing"


# ---------------------------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize("phase", Phase)
def test_urls_are_published_only_of_an_incarnation_that_is_proved_alive(phase: Phase) -> None:
    plan = make_plan(1, named_ports=("session",))
    w = World(plan)
    w.state = publish(plan, state(plan, phase), STARTED_AT)
    entry = document(w)["groups"][0]
    assert entry["serving"] is (phase is P.READY)
    assert bool(entry["urls"]) is (phase is P.READY)
    assert bool(entry["endpoints"]["session"]) is (phase is P.READY)
    assert w.state.serving == ((("actor/0", 1),) if phase is P.READY else ())
    assert phase in ALIVE or not entry["urls"]


def test_the_urls_of_a_failed_group_leave_the_barrier_in_the_decision_that_stops_it() -> None:
    w = World(make_plan(2))
    w.make_ready()
    w.kill("actor/0", 1)
    w.tick()
    w.ask("restart", "actor/1")
    w.tick()
    for decision in w.decisions:
        stopped = {a.group for a in decision.actions if isinstance(a, Stop | Cancel | Launch)}
        assert not stopped & {g for g, _ in decision.state.serving}
    assert [a.group for a in w.actions(Stop)] == ["actor/0", "actor/1"]


def test_the_document_has_every_field_of_the_contract() -> None:
    w = World(make_plan(2, named_ports=("session",), min_ready=2))
    w.make_ready()
    w.probe("actor/1", 0, refusals=2, last_error="HTTP 503")
    w.say("trainer", phase="generating")
    w.tick()
    said = barrier_document(w.plan, w.state, now=w.now, seq=4711)
    groups = said.pop("groups")
    assert said == {
        "schema": 1,
        "run": "run",
        "job": "1",
        "restart_count": 0,
        "term": 1,
        "seq": 4711,
        "heartbeat_s": 5.0,
        "epoch": 2,
        "phase": "waiting",
        "reason": "",
        "message": "actor/1: unready rank 0: HTTP 503",
        "may_start": "",
        "clients": {"trainer": {"phase": "generating", "seq": 1, "hold": False, "acks": 0}},
        "pools": [
            {
                "name": "actor",
                "phase": "waiting",
                "ready": 1,
                "desired": 2,
                "min_ready": 2,
                "weights_version": None,
                "probes": "on",
                "pauses": 0,
                "restarts": "at_once",
                "may_start": "",
            }
        ],
    }
    assert groups == [
        {
            "id": "actor/0",
            "phase": "ready",
            "serving": True,
            "incarnation": 1,
            "changed": 1,
            "weights": "none",
            "weights_version": None,
            "urls": ["http://n0:18000", "http://n1:18000"],
            "endpoints": {"session": ["http://n0:18002", "http://n1:18002"]},
            "master": "n0:18001",
            "world_size": 2,
            "since": iso(w.group(0).since_wall),
            "reason": "",
        },
        {
            "id": "actor/1",
            "phase": "unready",
            "serving": False,
            "incarnation": 1,
            "changed": 2,
            "weights": "none",
            "weights_version": None,
            "urls": [],
            "endpoints": {"session": []},
            "master": "n2:18001",
            "world_size": 2,
            "since": iso(w.group(1).since_wall),
            "reason": "answers_error",
        },
    ]


def test_only_entrypoints_have_urls() -> None:
    w = World(make_plan(1, entrypoints="leader"))
    w.make_ready()
    assert document(w)["groups"][0]["urls"] == ["http://n0:18000"]


def test_a_degraded_run_says_so() -> None:
    w = World(make_plan(2))
    w.make_ready()
    w.kill("actor/0", 0)
    w.tick()
    said = document(w)
    assert (said["phase"], said["reason"]) == ("ready", "degraded")
    assert said["message"].startswith("actor/0: ")


def test_the_message_is_bounded() -> None:
    w = World(make_plan(40, 1))
    w.tick()
    w.state = replace(w.state, groups=tuple(replace(g, message="x" * 100) for g in w.state.groups))
    assert len(document(w)["message"]) == 500


def test_times_are_iso_8601_in_utc_and_empty_when_there_is_none() -> None:
    assert iso(1_790_000_000.25) == "2026-09-21T14:13:20.250+00:00"
    assert iso(0.0) == ""
