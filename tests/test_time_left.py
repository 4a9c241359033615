"""The job's end, as the decision code sees it: no start that cannot be ready in time, and a trainer that is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slurm_rollout.core import barrier_rules
from slurm_rollout.core.model import Job, Launch
from slurm_rollout.core.phases import Phase, PoolPhase, Reason
from slurm_rollout.core.plan import RestartPolicy
from slurm_rollout.core.pools import pool_views
from slurm_rollout.core.restart import too_late
from slurm_rollout.core.view import status_document
from slurm_rollout.testing.world import World, make_plan

P = Phase
MARGIN_S = 30.0


def ready(groups: int = 2, *, start_s: float | None = 20.0, min_ready: int = 1) -> World:
    """Return a fleet that is ready, whose starts took so long."""
    w = World(make_plan(groups, 1, restart=RestartPolicy(end_margin_s=MARGIN_S), min_ready=min_ready))
    w.make_ready()
    w.state = replace(w.state, groups=tuple(replace(g, start_s=start_s) for g in w.state.groups))
    return w


def ends_in(w: World, left_s: float) -> None:
    w.job_ends_at = w.now + left_s


def lose(w: World, index: int = 0) -> None:
    """A group fails, and gets as far as it can."""
    w.kill(f"actor/{index}", 0)
    w.heal(lambda: w.group(index).phase in (P.BACKOFF, P.STARTING))


def document(w: World) -> dict[str, object]:
    return barrier_rules.barrier_document(w.plan, w.state, now=w.now, seq=1)


# --------------------------------------------------------------------------------------------------------- the rule


def test_what_a_start_took_is_measured_from_its_launch_until_it_was_ready_and_kept() -> None:
    w = World(make_plan(1, 1))
    w.run_until(lambda: w.group().phase is P.STARTING)
    launched_at = w.group().marks.launched_at
    assert launched_at is not None
    w.now += 40.0
    w.make_ready()
    start_s = w.group().start_s
    assert start_s == pytest.approx(w.now - launched_at, abs=0.002)
    assert start_s is not None
    assert start_s > 40
    w.restart()
    assert w.group().start_s == start_s
    w.kill("actor/0", 0)
    w.heal(lambda: w.group().phase is P.STARTING)
    assert w.group().start_s == start_s, "until the next one is ready"
    w.make_ready()
    again_s = w.group().start_s
    assert again_s is not None
    assert again_s < start_s


@pytest.mark.parametrize(("left_s", "late"), [(0.0, True), (49.9, True), (50.0, False), (3600.0, False)])
def test_a_start_needs_what_the_shortest_took_and_the_margin(left_s: float, late: bool) -> None:
    w = ready()
    w.state = replace(w.state, groups=(replace(w.group(0), start_s=90.0), w.group(1)))
    said = too_late(w.plan.pools[0], w.state, now=w.now, job_ends_at=w.now + left_s)
    assert bool(said) is late
    if late:
        assert said == f"the job had {left_s:.0f} s left; a start took 20 s at least, and is to serve for 30 s"


@pytest.mark.parametrize(("start_s", "ends_at"), [(None, 0.0), (20.0, None)], ids=["not measured", "no end known"])
def test_without_both_figures_it_is_tried(start_s: float | None, ends_at: float | None) -> None:
    w = ready(start_s=start_s)
    w.job_ends_at = ends_at
    lose(w)
    assert w.group().phase is P.STARTING


def test_a_group_that_fails_too_late_is_stopped_and_waits_and_says_so_once() -> None:
    w = ready()
    ends_in(w, 40)
    lose(w)
    launches, g = len(w.actions(Launch)), w.group()
    assert (g.phase, g.reason, g.charge is None) == (P.BACKOFF, Reason.TIME_LEFT, False)
    assert g.runtime_failures == (), "charged at the next launch only"
    assert "a start took 20 s at least, and is to serve for 30 s" in g.message
    for _ in range(100):
        w.tick(1.0)
    assert w.group() == g
    assert len(w.actions(Launch)) == launches
    (waiting,) = w.events("waiting")
    assert (waiting.group, waiting.reason, waiting.message) == ("actor/0", "time_left", g.message)
    assert w.group(1).phase is P.READY


def test_a_backoff_that_ends_too_late_becomes_a_wait_for_time() -> None:
    w = ready()
    lose(w)
    w.make_ready()
    lose(w)  # the second failure in the window waits
    assert (w.group().phase, w.group().reason) == (P.BACKOFF, Reason.ENGINE_EXITED)
    ends_in(w, 10)
    w.run_until(lambda: w.group().reason is Reason.TIME_LEFT, after_s=1.0)
    assert w.group().phase is P.BACKOFF


def test_it_starts_by_itself_when_the_limit_is_raised() -> None:
    w = ready()
    ends_in(w, 40)
    lose(w)
    assert w.group().phase is P.BACKOFF
    ends_in(w, 3600)
    w.make_ready()
    launching = w.events("launching")[-1]
    assert (launching.group, launching.incarnation, launching.reason) == ("actor/0", 2, "engine_exited")
    assert len(w.group().runtime_failures) == 1


def test_nobody_can_ask_for_a_restart_that_would_be_too_late() -> None:
    w = ready()
    ends_in(w, 40)
    w.ask("restart", "actor/0")
    w.tick()
    assert w.group().phase is P.READY
    assert w.events("request")[-1].message.startswith("actor/0: is left as it is: the job had 40 s left")
    lose(w)
    w.ask("resume", "actor/0")
    w.tick()
    assert w.group().phase is P.BACKOFF
    assert w.events("request")[-1].message.startswith("actor/0: does not start: the job had")


# -------------------------------------------------------------------------------------------------- what is told of it


def test_a_pool_that_goes_on_with_fewer_says_why() -> None:
    w = ready()
    ends_in(w, 40)
    lose(w)
    assert w.state.phase is PoolPhase.READY
    assert document(w)["reason"] == "time_left"
    assert "actor/0: backoff the job had 40 s left" in str(document(w)["message"])


@pytest.mark.parametrize("lost", [1, 2])
def test_a_pool_that_is_below_min_ready_for_want_of_time_is_stopped_and_comes_back_with_time(lost: int) -> None:
    w = ready(min_ready=2)
    ends_in(w, 40)
    for index in range(lost):
        lose(w, index)
    assert w.state.phase is PoolPhase.STOPPED
    assert document(w)["phase"] == "stopped"
    assert document(w)["reason"] == "time_left"
    assert not w.state.ending
    ends_in(w, 3600)
    w.make_ready()
    assert document(w)["phase"] == "ready"
    assert document(w)["reason"] == ""


def test_what_failed_counts_with_what_waits_but_what_was_drained_may_be_asked_back() -> None:
    w = ready(groups=3, min_ready=2)
    w.state = replace(w.state, groups=(replace(w.group(0), phase=P.FAILED), *w.state.groups[1:]))
    ends_in(w, 40)
    lose(w, 1)
    assert w.state.phase is PoolPhase.STOPPED
    w.state = replace(w.state, groups=(replace(w.group(0), phase=P.STOPPED), *w.state.groups[1:]))
    w.tick()
    assert w.state.phase is PoolPhase.WAITING


def test_a_first_start_does_not_wait_for_a_group_that_has_no_time() -> None:
    """As in a requeued job, which knows from its first life what a start takes."""
    w = World(make_plan(2, 1, restart=RestartPolicy(end_margin_s=MARGIN_S)))
    w.run_until(lambda: w.group(0).phase is P.STARTING)
    w.kill("actor/0", 0)
    w.heal(lambda: w.group(1).phase is P.READY and w.group(0).phase is not P.STOPPING)
    w.state = replace(w.state, groups=tuple(replace(g, start_s=20.0) for g in w.state.groups))
    w.state = replace(w.state, groups=(replace(w.group(0), phase=P.BACKOFF, not_before=0.0), w.group(1)))
    ends_in(w, 40)
    w.run_until(lambda: w.group(0).reason is Reason.TIME_LEFT)
    assert w.state.phase is PoolPhase.READY
    assert document(w)["reason"] == "time_left"


def test_status_shows_why_and_that_nothing_comes_next() -> None:
    w = ready(min_ready=2)
    ends_in(w, 40)
    lose(w)
    said = status_document(
        w.plan,
        w.state,
        pools=pool_views(w.plan, w.state, w.now),
        now=w.now,
        wall=0.0,
        host="n0",
        seq=1,
        time_left_s=40.0,
    )
    assert (said["phase"], said["reason"]) == ("stopped", "time_left")
    assert said["message"] == "actor/0 backoff (time_left)"
    groups = said["groups"]
    assert isinstance(groups, list)
    assert groups[0]["next"] == {"action": "", "at": None}


# ---------------------------------------------------------------------------------------------------------- the signal


@pytest.mark.parametrize(
    ("near", "left_s", "reason", "message"),
    [
        (False, None, Reason.RUN_ENDING, "told to end"),
        (False, 100.0, Reason.RUN_ENDING, "told to end"),
        (True, None, Reason.JOB_ENDING, "warned of the job's end"),
        (True, 100.0, Reason.JOB_ENDING, "warned of the job's end"),
        (False, 0.0, Reason.JOB_ENDING, "the job's time is up"),
    ],
)
def test_a_run_that_is_told_to_end_says_whether_that_is_the_jobs_end(
    near: bool, left_s: float | None, reason: Reason, message: str
) -> None:
    w = ready()
    if left_s is not None:
        ends_in(w, left_s)
    w.stop_signal, w.end_is_near = True, near
    w.tick()
    (ending,) = w.events("ending")
    assert (w.state.ending, ending.reason, ending.message) == (reason, reason.value, message)
    assert document(w)["phase"] == "stopped"
    assert document(w)["reason"] == reason.value


def test_a_group_that_waits_for_time_is_stopped_when_the_run_ends() -> None:
    w = ready()
    ends_in(w, 40)
    lose(w)
    w.ask_job(Job.ENDING)
    w.run_until(lambda: w.phases() == {P.STOPPED})
    assert document(w)["reason"] == "job_ending"
