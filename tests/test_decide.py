"""The whole run: requests, its end, a Slurm that does not answer, a coordinator that died."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from slurm_rollout.core.decide import decide, is_over
from slurm_rollout.core.group import SRUN_SILENT_S
from slurm_rollout.core.model import Cancel, Event, ExitRecord, Go, Job, Launch, Process, Request, Stop
from slurm_rollout.core.phases import Phase, Reason
from slurm_rollout.core.plan import FencePolicy, ProbePolicy, ProbeRequest, RestartPolicy
from slurm_rollout.testing.world import World, make_plan

P = Phase
NEVER_AGAIN = RestartPolicy(max_restarts=0, max_start_failures=0)


def ready(groups: int = 1, **policies: Any) -> World:
    w = World(make_plan(groups, **policies))
    w.make_ready()
    return w


def kill_all(w: World) -> None:
    for group in w.plan.groups:
        for member in group.members:
            w.kill(group.id, member.rank)


def answers(w: World) -> list[tuple[str, str]]:
    return [(e.type, e.message) for e in w.events() if e.type.startswith("request")]


def ask(w: World, verb: str, *groups: str) -> tuple[str, str]:
    w.ask(verb, *groups)
    w.tick()
    return answers(w)[-1]


# ------------------------------------------------------------------------------------------------------------ requests


def test_the_operator_restarts_a_group_and_only_that_one() -> None:
    w = ready(2)
    assert ask(w, "restart", "actor/0") == ("request", "actor/0: restarts")
    assert w.group(0).phase is P.STOPPING
    assert w.group(0).message == "restart, asked by me"
    assert w.group(1).phase is P.READY
    w.heal(lambda: w.phases() == {P.READY})
    assert [g.incarnation for g in w.state.groups] == [2, 1]


def test_an_answer_carries_the_request_s_id_and_who_asked() -> None:
    w = ready()
    w.requests.append(Request(id="77", verb="drain", groups=("actor/0",), who="ann"))
    w.tick()
    event = w.events("request")[0]
    assert event.data == {"id": "77", "verb": "drain", "who": "ann"}


def test_a_request_for_two_groups_is_answered_for_each() -> None:
    w = ready(3)
    w.ask("restart", "actor/2", "actor/0")
    w.tick()
    assert answers(w) == [("request", "actor/0: restarts"), ("request", "actor/2: restarts")]
    assert [g.phase for g in w.state.groups] == [P.STOPPING, P.READY, P.STOPPING]


def test_a_starting_group_can_be_restarted() -> None:
    w = World(make_plan(1))
    w.run_until(lambda: w.phases() == {P.STARTING})
    assert ask(w, "restart", "actor/0") == ("request", "actor/0: restarts")
    w.heal(lambda: w.phases() == {P.READY})
    assert w.group().incarnation == 2


@pytest.mark.parametrize(
    ("verb", "groups", "said"),
    [
        ("restart", ("actor/7", "actor/0"), "no group and no node actor/7; groups: actor/0, actor/1"),
        ("drain", (), "no group named; groups: actor/0, actor/1"),
        ("explode", ("actor/0",), "unknown verb 'explode'"),
        ("", (), "unknown verb ''"),
    ],
)
def test_a_request_that_cannot_be_obeyed_is_refused_with_the_reason_and_changes_nothing(
    verb: str, groups: tuple[str, ...], said: str
) -> None:
    w = ready(2)
    before = w.state
    assert ask(w, verb, *groups) == ("request_refused", said)
    assert w.state == before


def test_a_request_is_refused_while_the_run_is_ending() -> None:
    w = ready(2)
    w.stop_signal = True
    w.deaf.add("n0")
    w.tick()
    assert ask(w, "restart", "actor/0") == ("request_refused", "the run is ending")


def test_a_drained_group_rests_until_it_is_resumed() -> None:
    w = ready(2)
    assert ask(w, "drain", "actor/0") == ("request", "actor/0: drains")
    assert w.group().phase is P.DRAINING
    assert ask(w, "resume", "actor/0") == ("request_refused", "actor/0: is draining: ask again when it is stopped")
    w.run_until(lambda: w.group().phase is P.STOPPED)
    assert not w.living("actor/0")
    assert ask(w, "drain", "actor/0") == ("request", "actor/0: is stopped already")
    for _ in range(20):
        w.tick(100.0)
    assert w.group().phase is P.STOPPED
    assert ask(w, "resume", "actor/0") == ("request", "actor/0: starts again, with a fresh budget")
    w.heal(lambda: w.phases() == {P.READY})
    assert w.group().incarnation == 2
    assert len(w.events("drained")) == 1


def test_a_drain_while_a_failed_incarnation_is_being_stopped_does_not_start_it_again() -> None:
    w = ready(2)
    w.deaf.add("n1")
    w.kill("actor/0", 0)
    w.tick()
    assert ask(w, "drain", "actor/0") == ("request", "actor/0: drains")
    w.run_until(lambda: w.group().phase is P.STOPPED, after_s=0.3)
    assert w.group().charge is None
    assert len(w.actions(Launch)) == 2


def test_a_failed_group_starts_again_when_asked_with_a_fresh_budget() -> None:
    w = ready(2, restart=RestartPolicy(max_restarts=1, max_start_failures=1))
    for _ in range(2):
        w.kill("actor/0", 0)
        w.tick()
        w.heal(lambda: w.group().phase in (P.READY, P.FAILED))
    assert w.group().phase is P.FAILED
    assert ask(w, "resume", "actor/0") == ("request", "actor/0: starts again, with a fresh budget")
    w.heal(lambda: w.phases() == {P.READY})
    assert w.group().runtime_failures == ()
    w.kill("actor/0", 0)
    w.tick()
    w.heal(lambda: w.phases() == {P.READY})
    assert len(w.group().runtime_failures) == 1


def test_a_request_ends_a_backoff() -> None:
    w = ready(2, restart=RestartPolicy(backoff_initial_s=100.0))
    w.kill("actor/0", 0)
    w.tick()
    w.heal(lambda: w.group().phase is P.READY)
    w.kill("actor/0", 0)
    w.tick()
    w.heal(lambda: w.group().phase is P.BACKOFF)
    began = w.now
    assert ask(w, "restart", "actor/0") == ("request", "actor/0: starts without waiting")
    w.heal(lambda: w.group().phase is P.READY)
    assert w.now < began + 1.0
    assert len(w.group().runtime_failures) == 2, "the failures were real and stay in the budget"


@pytest.mark.parametrize("verb", ["restart", "resume"])
def test_a_request_for_what_happens_anyway_says_so_and_changes_nothing(verb: str) -> None:
    w = ready(2)
    w.kill("actor/0", 0)
    w.deaf.add("n1")
    w.tick()
    before = w.state
    assert ask(w, verb, "actor/0") == ("request", "actor/0: is stopping already: nothing to do")
    assert w.state == before


def test_a_resume_of_a_ready_group_changes_nothing() -> None:
    w = ready()
    before = w.state
    assert ask(w, "resume", "actor/0") == ("request", "actor/0: is ready already: nothing to do")
    assert w.state == before


# ---------------------------------------------------------------------------------------------------------- the end


def test_the_operator_s_stop_drains_the_run() -> None:
    w = ready(2)
    assert ask(w, "stop") == ("request", "the run is ending")
    assert w.state.ending is Reason.OPERATOR
    assert w.events("ending")[0].message == "stop, asked by me"
    w.run_until(lambda: is_over(w.state))


def bring_to(phase: Phase) -> World:
    w = World(make_plan(1, restart=RestartPolicy(max_restarts=1), fence=FencePolicy(timeout_s=20.0)))
    if phase in (P.PENDING, P.FENCING):
        if phase is P.FENCING:
            w.ports_open["actor/0"] = ("n0:18000",)
            w.tick()
            w.tick(1.5)
        return w
    if phase is P.STARTING:
        w.run_until(lambda: w.group().phase is phase)
        return w
    w.make_ready()
    if phase is P.UNREADY:
        w.probe("actor/0", 0, refusals=2)
        w.tick()
    if phase is P.STOPPING:
        w.kill("actor/0", 0)
        w.deaf.add("n1")
        w.tick()
    if phase is P.BACKOFF:
        w.kill("actor/0", 0)
        w.heal(lambda: w.group().phase is P.STARTING)
        w.kill("actor/0", 0)
        w.tick()
        w.heal(lambda: w.group().phase is P.BACKOFF)
    if phase is P.FAILED:
        for _ in range(2):
            w.kill("actor/0", 0)
            w.tick()
            w.heal(lambda: w.group().phase in (P.READY, P.FAILED))
    if phase in (P.DRAINING, P.STOPPED):
        w.deaf |= {"n1"} if phase is P.DRAINING else set()
        w.ask("drain", "actor/0")
        w.run_until(lambda: w.group().phase is phase)
    return w


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("ending", ["signal", "job", "request"])
def test_the_run_drains_from_every_phase(phase: Phase, ending: str) -> None:
    w = bring_to(phase)
    assert w.group().phase is phase
    launches = len(w.actions(Launch))
    if ending == "signal":
        w.stop_signal = True
    elif ending == "job":
        w.ask_job(Job.ENDING)
    else:
        w.ask("stop")
    w.tick()
    assert w.state.ending
    assert w.group().phase in (P.DRAINING, P.STOPPED)
    w.run_until(lambda: is_over(w.state), after_s=0.5)
    assert not w.living("actor/0")
    assert len(w.actions(Launch)) == launches
    assert len(w.events("ending")) == 1


def test_a_run_is_not_over_while_a_step_may_live() -> None:
    w = ready()
    w.deaf |= {"n0", "n1"}
    w.undying |= {"n1"}
    w.stop_signal = True
    for _ in range(100):
        w.tick(1.0)
        assert not is_over(w.state)
    assert w.decisions[-1].wants.listing
    assert [a.nodes for a in w.actions(Cancel)][:2] == [("n0", "n1"), ("n1",)]
    assert len(w.actions(Cancel)) >= 15
    w.undying.clear()
    w.run_until(lambda: is_over(w.state), after_s=1.0)


def test_a_run_is_over_when_the_last_group_is_stopped() -> None:
    w = ready(2)
    w.deaf.add("n3")
    w.stop_signal = True
    w.run_until(lambda: w.group(0).phase is P.STOPPED)
    assert not is_over(w.state)
    w.heal(lambda: is_over(w.state))


def test_a_run_that_was_not_told_to_end_is_never_over() -> None:
    w = ready()
    w.ask("drain", "actor/0")
    w.run_until(lambda: w.group().phase is P.STOPPED)
    assert not is_over(w.state)


def test_the_drain_waits_for_proof_while_slurm_does_not_answer() -> None:
    w = ready()
    w.blind = True
    w.vanish("actor/0", "n0")
    w.stop_signal = True
    for _ in range(20):
        w.tick(5.0)
    assert w.group().phase is P.DRAINING
    w.blind = False
    w.run_until(lambda: is_over(w.state))


# ------------------------------------------------------------------------------------ everything ends: is it the job?


def test_when_everything_ends_at_once_the_job_is_asked_before_anything_is_launched() -> None:
    w = ready(2)
    kill_all(w)
    w.job, w.job_asked_at = Job.RUNNING, w.now - 1.0
    w.blind = True
    for _ in range(50):
        w.tick(1.0)
    assert w.phases() == {P.FENCING}
    assert w.decisions[-1].wants.job
    assert [g.message for g in w.state.groups] == [
        "every step of the run ended: asking Slurm whether the job is ending"
    ] * 2
    assert len(w.actions(Launch)) == 2
    assert all(not g.runtime_failures for g in w.state.groups)
    w.blind = False
    w.heal(lambda: w.phases() == {P.READY})
    assert all(len(g.runtime_failures) == 1 for g in w.state.groups)


def test_when_everything_ends_because_the_job_is_ending_the_run_drains_and_nobody_is_charged() -> None:
    w = ready(2)
    kill_all(w)
    w.tick()
    w.ask_job(Job.ENDING)
    w.tick()
    assert w.state.ending is Reason.JOB_ENDING
    assert is_over(w.state)
    assert len(w.actions(Launch)) == 2
    assert all(not g.runtime_failures and not g.start_failures for g in w.state.groups)


def test_a_group_without_budget_has_not_failed_when_it_is_the_job_that_ends() -> None:
    w = ready(2, restart=NEVER_AGAIN)
    w.blind = True
    kill_all(w)
    for _ in range(3):
        w.tick()
    assert P.FAILED not in w.phases()
    assert w.decisions[-1].wants.job
    assert w.state.phase.value == "waiting"
    w.ask_job(Job.ENDING)
    w.tick()
    assert is_over(w.state)
    assert w.state.phase.value == "stopped"
    assert not w.events("failed")


def test_a_group_without_budget_has_failed_once_slurm_says_that_the_job_goes_on() -> None:
    w = ready(2, restart=NEVER_AGAIN)
    kill_all(w)
    w.heal(lambda: w.phases() == {P.FAILED})
    assert len(w.events("stopped")) == 2
    assert len(w.events("failed")) == 2


def test_the_job_is_not_asked_while_another_group_lives() -> None:
    w = ready(2)
    for member in w.plan.groups[0].members:
        w.kill("actor/0", member.rank)
    w.heal(lambda: w.group().incarnation == 2)
    assert not any(d.wants.job for d in w.decisions)


def test_a_first_start_asks_nobody_about_the_job() -> None:
    w = ready(2)
    assert not any(d.wants.job for d in w.decisions)


# ------------------------------------------------------------------------------------------------------------ blindness


def test_a_slurm_that_does_not_answer_leaves_running_engines_alone() -> None:
    w = ready(2)
    w.blind = True
    w.listing_failed_at, w.unanswered_asked_at = w.now, w.now - 90.0
    before = w.state
    for _ in range(50):
        w.tick(60.0)
        assert w.decisions[-1].actions == ()
        assert w.state.blind_since == w.unanswered_asked_at, "when it was asked, not when patience was over"
    assert replace(w.state, blind_since=None) == before
    assert [e.reason for e in w.events("blind")] == ["slurm"]
    w.list_steps()
    w.tick()
    assert w.state.blind_since is None
    assert [e.reason for e in w.events("sighted")] == ["slurm"]


def test_an_engine_whose_agent_said_its_last_word_is_restarted_also_while_slurm_does_not_answer() -> None:
    w = ready(2)
    w.blind = True
    w.kill("actor/0", 0)
    w.tick()
    w.heal(lambda: w.group().phase is P.READY)
    assert w.group().incarnation == 2


# ------------------------------------------------------------------------------------------- a coordinator that dies


def test_a_new_coordinator_adopts_what_runs_and_starts_nothing_twice() -> None:
    w = ready(2)
    before = w.state
    w.restart()
    for _ in range(10):
        w.tick(10.0)
    assert replace(w.state, term=1) == before
    assert len(w.actions(Launch)) == 2


def test_an_engine_that_ended_while_no_coordinator_lived_is_restarted() -> None:
    w = ready(2)
    w.kill("actor/0", 1)
    w.restart()
    w.tick()
    failure = w.group().failure
    assert failure is not None
    assert (failure.reason, failure.rank) == (Reason.ENGINE_EXITED, 1)
    w.heal(lambda: w.phases() == {P.READY})


def test_a_step_that_vanished_while_no_coordinator_lived_is_not_believed_gone_without_a_listing() -> None:
    w = ready(2)
    w.list_steps()
    w.vanish("actor/0", "n0", lives=True)
    w.restart()
    w.tick()
    assert w.group().phase is P.STOPPING
    w.heal(lambda: w.group().phase is P.STARTING)
    assert w.living("actor/0") == {2}


def test_a_start_that_was_journalled_and_never_made_is_made_again_and_not_charged() -> None:
    w = World(make_plan(1, restart=NEVER_AGAIN))
    w.tick()
    w.tick(act=False)
    assert w.group().phase is P.STARTING
    assert not w.steps
    w.restart()
    w.tick()
    failure = w.group().failure
    assert failure is not None
    assert failure.reason is Reason.TAKEOVER
    w.heal(lambda: w.phases() == {P.READY})
    assert w.group().incarnation == 2
    assert w.group().start_failures == ()


def test_a_start_of_which_one_step_was_made_is_stopped_as_a_whole() -> None:
    w = World(make_plan(1))
    w.run_until(lambda: w.group().phase is P.STARTING)
    del w.steps["actor/0", 1, "n1", False]
    w.restart()
    w.tick()
    assert {node for a in w.actions(Stop) for node in a.nodes} == {"n0", "n1"}
    w.heal(lambda: w.phases() == {P.READY})
    assert w.living("actor/0") == {2}


def test_a_go_that_was_journalled_and_never_sent_is_said_again() -> None:
    w = World(make_plan(1))
    w.run_until(lambda: w.phases() == {P.STARTING})
    w.fence("actor/0")
    w.tick(act=False)
    assert w.group().go_sent_at is not None
    w.restart()
    w.tick(1.1)
    assert w.decisions[-1].actions == (Go(group="actor/0", incarnation=1, nodes=("n0", "n1")),)
    w.heal(lambda: w.phases() == {P.READY})
    assert w.group().incarnation == 1


def test_a_stop_that_was_journalled_and_never_sent_ends_in_a_cancel() -> None:
    w = ready()
    w.kill("actor/0", 0)
    w.tick(act=False)
    w.restart()
    w.heal(lambda: w.group().incarnation == 2 and w.phases() == {P.READY})
    assert [a.nodes for a in w.actions(Cancel)] == [("n1",)]


def test_a_sweep_that_was_journalled_and_never_launched_is_launched_again() -> None:
    w = World(make_plan(1))
    w.ports_open["actor/0"] = ("n0:18000",)
    w.tick()
    w.tick(1.1, act=False)
    w.restart()
    for _ in range(7):
        w.tick(1.0)
    assert sum(a.sweep for a in w.actions(Launch)) == 2
    w.ports_open["actor/0"] = ()
    w.heal(lambda: w.phases() == {P.READY})


# ----------------------------------------------------------------------------------------------- what kind of function


def everything_ended_and_slurm_is_blind() -> World:
    w = ready(2)
    w.blind = True
    kill_all(w)
    w.tick()
    return w


def one_is_deaf() -> World:
    w = ready(2)
    w.deaf.add("n1")
    w.kill("actor/0", 0)
    w.tick(3.0)
    return w


def most_time_out() -> World:
    w = ready(3)
    for i in range(2):
        w.probe(f"actor/{i}", 0, failures=9)
    w.change("actor/0", "n0", failing={0: 9})
    return w


WORLDS: dict[str, Callable[[], World]] = {phase.value: partial(bring_to, phase) for phase in Phase} | {
    "blind": everything_ended_and_slurm_is_blind,
    "deaf": one_is_deaf,
    "suspect": most_time_out,
}


@pytest.mark.parametrize("make", WORLDS.values(), ids=WORLDS)
def test_deciding_again_with_nothing_new_asks_for_nothing_new(make: Callable[[], World]) -> None:
    w = make()
    w.now += 100.0
    obs = w.observe()
    first = decide(w.plan, w.state, obs)
    again = decide(w.plan, first.state, obs)
    assert again.state == first.state
    assert again.actions == ()
    assert again.events == ()


@pytest.mark.parametrize("make", WORLDS.values(), ids=WORLDS)
def test_the_same_input_gives_the_same_decision(make: Callable[[], World]) -> None:
    w = make()
    obs = w.observe()
    assert decide(w.plan, w.state, obs) == decide(w.plan, w.state, obs)


def test_what_is_seen_of_an_older_incarnation_or_of_no_group_of_the_run_is_not_a_fact() -> None:
    w = ready(2)
    w.kill("actor/0", 0)
    w.tick()
    w.heal(lambda: w.phases() == {P.READY})
    obs = w.observe()
    old = replace(
        obs.groups[0],
        incarnation=1,
        steps=tuple(
            replace(s, exit=ExitRecord(cause="engine_exited", message="old"), process=Process.EXITED)
            for s in obs.groups[0].steps
        ),
    )
    decision = decide(w.plan, w.state, replace(obs, groups=(old, replace(old, id="actor/9"), obs.groups[1])))
    assert decision.state == w.state
    assert decision.actions == ()


def test_an_observation_of_nothing_changes_nothing() -> None:
    w = ready(2)
    obs = replace(w.observe(), groups=())
    decision = decide(w.plan, w.state, obs)
    assert decision.state == w.state
    assert decision.actions == ()
    assert decision.events == ()


def test_the_next_wake_up_is_never_in_the_past() -> None:
    """A past one would make the coordinator spin."""
    w = World(make_plan(1, probe=ProbePolicy(request=ProbeRequest(), startup_timeout_s=30.0)))
    w.run_until(lambda: w.phases() == {P.STARTING})
    w.change("actor/0", "n0", spoke=True, fenced=True)
    w.change("actor/0", "n1", spoke=True, waiting_for="gpu memory")
    for _ in range(260):
        decision = w.tick(1.0)
        assert decision.wake_at is None or decision.wake_at > w.now


def test_a_failed_launch_is_woken_up_for_at_its_time_out() -> None:
    w = World(make_plan(1))
    w.run_until(lambda: w.phases() == {P.STARTING})
    assert w.tick().wake_at == w.group().since + w.plan.slurm.launch_timeout_s
    w.change("actor/0", "n0", spoke=True)
    w.change("actor/0", "n1", spoke=True)
    decision = w.tick(w.plan.slurm.launch_timeout_s)
    assert decision.wake_at == w.group().since + w.plan.slurm.launch_timeout_s + w.plan.pools[0].fence.timeout_s


def test_the_moment_of_the_cancel_and_of_each_next_one_is_woken_up_for() -> None:
    w = ready()
    w.deaf.add("n1")
    w.undying.add("n1")
    w.kill("actor/0", 0)
    first = w.tick()
    assert first.wake_at == w.now + w.plan.pools[0].stop.cancel_after_s
    told = w.now
    cancelled: list[float] = []
    while len(cancelled) < 2:  # what is seen of the node meanwhile wakes earlier
        due = w.decisions[-1].wake_at
        assert due is not None
        if any(isinstance(a, Cancel) for a in w.tick(due - w.now).actions):
            cancelled.append(w.now - told)
    assert cancelled == pytest.approx([1.0, 6.0])


def test_every_event_about_a_group_names_it_and_its_incarnation() -> None:
    w = ready(1)
    w.kill("actor/0", 0)
    w.tick()
    w.heal(lambda: w.group().incarnation == 2)
    about: list[Event] = [e for e in w.events() if e.type in ("launching", "go", "ready", "failure", "stopped")]
    assert [(e.group, e.incarnation, e.type) for e in about] == [
        ("actor/0", 1, "launching"),
        ("actor/0", 1, "go"),
        ("actor/0", 1, "ready"),
        ("actor/0", 1, "failure"),
        ("actor/0", 1, "stopped"),
        ("actor/0", 2, "launching"),
    ]


def test_what_srun_says_is_shown_while_no_agent_speaks() -> None:
    """It says why a step is not created, and may say so for hours (measured, 22.05.8)."""
    w = World(make_plan(1))
    w.tick()
    w.run_until(lambda: w.group().phase is Phase.STARTING)
    w.change("actor/0", "n1", stderr="step creation temporarily disabled")
    decision = w.tick()
    assert decision.wake_at is not None
    assert not w.group().message  # most of what it says at the start is of no use
    w.tick(SRUN_SILENT_S)
    assert w.group().message == "n1: srun says: step creation temporarily disabled"
    assert [e.message for e in w.events("waiting")] == [w.group().message]
    w.tick(w.plan.slurm.launch_timeout_s)
    failure = w.group().failure
    assert failure is not None
    assert (
        failure.message == "no word from the agent on n0, n1 for 120 s; srun says: step creation temporarily disabled"
    )


def test_words_that_srun_said_before_its_agent_spoke_are_no_news() -> None:
    w = World(make_plan(1))
    w.run_until(lambda: w.group().phase is Phase.STARTING)
    w.change("actor/0", "n0", stderr="job 1 queued", spoke=True)
    w.tick(SRUN_SILENT_S + 1.0)
    assert not w.group().message
