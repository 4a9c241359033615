"""What follows from trainers' words: which groups serve, which starts wait, which probes rest, what is echoed when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from slurm_rollout.core.barrier_rules import barrier_document
from slurm_rollout.core.clients import AWAITS_BARRIER, UNCONFIRMED_S
from slurm_rollout.core.model import ClientState, Snapshot, Stop
from slurm_rollout.core.phases import Phase, PoolPhase
from slurm_rollout.core.plan import ProbePolicy, ProbeRequest, RestartPolicy
from slurm_rollout.testing.world import World, make_plan

PAUSES = ProbePolicy(request=ProbeRequest(), pause_in=("training", "syncing"))
AT_BARRIER = RestartPolicy(when="at_barrier")


def trained(groups: int = 2, *, min_ready: int = 1) -> World:
    w = World(make_plan(groups, weights="trained", min_ready=min_ready))
    w.make_ready()
    return w


def colocated(groups: int = 2, *, min_ready: int = 1) -> World:
    plan = make_plan(groups, weights="trained", min_ready=min_ready, probe=PAUSES, restart=AT_BARRIER)
    w = World(plan)
    w.make_ready()
    w.ack(1, *(g.id for g in plan.groups))
    w.tick()
    return w


def serving(w: World) -> tuple[str, ...]:
    return tuple(g for g, _ in w.state.serving)


def document(w: World) -> dict[str, Any]:
    return barrier_document(w.plan, w.state, now=w.now, seq=1)


def entry(w: World, group: str) -> dict[str, Any]:
    return next(g for g in document(w)["groups"] if g["id"] == group)


def client(w: World, name: str = "trainer") -> ClientState:
    return next(c for c in w.state.clients if c.id == name)


def work(w: World, done: Callable[[], bool]) -> None:
    """Let agents and engines work, without the time passing in which words end (as `World.heal` lets it)."""
    for _ in range(50):
        if done():
            return
        w.tick()
        w.settle()
    raise AssertionError(f"not reached: {[(g.id, g.phase.value, g.message) for g in w.state.groups]}")


def restart(w: World, group: str) -> None:
    """Kill rank 0 and see the group ready again."""
    w.kill(group, 0)
    w.tick()
    work(w, lambda: w.state.group(group).phase is Phase.READY)


# ------------------------------------------------------------------------------------------------------------- weights


def test_a_trained_pool_waits_for_weights_and_shows_urls_to_push_into() -> None:
    w = trained()
    assert w.state.phase is PoolPhase.NEEDS_WEIGHTS
    assert entry(w, "actor/0") | {"since": ""} == entry(w, "actor/0") | {
        "since": "",
        "serving": False,
        "weights": "stale",
        "weights_version": None,
        "urls": ["http://n0:18000", "http://n1:18000"],
    }
    assert w.state.alive == (("actor/0", 1), ("actor/1", 1))
    assert serving(w) == ()


def test_what_was_acknowledged_serves() -> None:
    w = trained()
    epoch = w.state.epoch
    w.ack(7, "actor/0", "actor/1")
    w.tick()
    assert serving(w) == ("actor/0", "actor/1")
    assert (w.state.phase, w.state.targets, w.state.epoch) == (PoolPhase.READY, {"actor": 7}, epoch + 1)
    assert entry(w, "actor/1")["weights_version"] == 7


def test_a_restarted_group_is_stale_until_it_is_pushed_to() -> None:
    w = trained()
    w.ack(7, "actor/0", "actor/1")
    w.tick()
    restart(w, "actor/0")
    assert serving(w) == ("actor/1",)
    assert (w.state.phase, entry(w, "actor/0")["weights"]) == (PoolPhase.READY, "stale")
    w.ack(7, "actor/0")
    w.tick()
    assert serving(w) == ("actor/0", "actor/1")


def test_a_group_that_was_absent_during_a_push_is_stale() -> None:
    w = trained(3)
    w.ack(7, "actor/0", "actor/1", "actor/2")
    w.tick()
    w.probe("actor/2", 0, refusals=2, last_error="HTTP 503")
    w.tick()
    assert w.state.group("actor/2").phase is Phase.UNREADY
    w.ack(8, "actor/0", "actor/1")
    w.tick()
    w.probe("actor/2", 0, refusals=0)
    w.tick()
    assert w.state.group("actor/2").phase is Phase.READY
    assert serving(w) == ("actor/0", "actor/1")
    assert entry(w, "actor/2")["weights_version"] == 7


def test_an_acknowledgement_of_a_dead_incarnation_is_worth_nothing() -> None:
    w = trained()
    w.ack(7, "actor/0", "actor/1")  # written before it dies, read after it is back
    words = w.clients.pop("trainer")
    restart(w, "actor/0")
    w.clients["trainer"] = words
    w.tick()
    assert serving(w) == ("actor/1",)
    assert "not in actor/0 (incarnation 1 is gone)" in w.events("weights")[0].message


def test_an_incarnation_that_does_not_live_is_not_acknowledged() -> None:
    w = trained()
    w.kill("actor/0", 0)
    w.tick()
    w.ack(7, "actor/0", "actor/1")
    w.tick()
    assert w.state.group("actor/0").weights_version is None


@pytest.mark.parametrize(("rollback", "version", "serves"), [(False, 7, 2), (True, 5, 1)])
def test_versions_go_back_only_when_the_trainer_says_so(*, rollback: bool, version: int, serves: int) -> None:
    w = trained()
    w.ack(7, "actor/0", "actor/1")
    w.tick()
    w.ack(5, "actor/0", rollback=rollback)
    w.tick()
    assert w.state.targets == {"actor": version}
    assert len(serving(w)) == serves
    assert bool(w.events("ack_refused")) is not rollback


def test_what_was_newer_before_a_rollback_is_not_taken_for_what_gets_its_number_later() -> None:
    w = trained(3)
    w.ack(7, "actor/0", "actor/1", "actor/2")
    w.tick()
    w.probe("actor/2", 0, refusals=2, last_error="HTTP 503")  # it is away for all that follows
    w.tick()
    w.ack(5, "actor/0", "actor/1", rollback=True)
    w.ack(6, "actor/0", "actor/1")
    w.ack(7, "actor/0", "actor/1")
    w.tick()
    w.probe("actor/2", 0, refusals=0)
    w.tick()
    assert w.state.group("actor/2").phase is Phase.READY
    assert (w.state.targets, serving(w)) == ({"actor": 7}, ("actor/0", "actor/1"))


def test_a_frozen_pool_refuses_acknowledgements() -> None:
    w = World(make_plan(2))
    w.make_ready()
    w.ack(7, "actor/0")
    w.tick()
    assert "is frozen" in w.events("ack_refused")[0].message
    assert (w.state.targets, len(serving(w))) == ({}, 2)


def test_each_acknowledgement_is_taken_in_once_also_by_the_next_coordinator() -> None:
    w = trained()
    w.ack(7, "actor/0", "actor/1")
    w.ack(8, "actor/0", "actor/1")
    w.tick()
    w.restart()
    for _ in range(3):
        w.tick()
    assert [e.data["version"] for e in w.events("weights")] == [7, 8]
    assert client(w).acks == 2


def test_weights_are_needed_again_when_all_are_dead_and_back() -> None:
    w = trained()
    w.ack(7, "actor/0", "actor/1")
    w.tick()
    w.kill("actor/0", 0)
    w.kill("actor/1", 0)
    w.tick()
    assert document(w)["phase"] == "waiting"
    w.make_ready()
    assert document(w)["phase"] == "needs_weights"


def test_the_epoch_tells_also_of_groups_that_came_back_stale() -> None:
    w = trained()
    w.ack(7, "actor/0", "actor/1")
    w.tick()
    before = w.state.epoch
    w.kill("actor/0", 0)
    w.tick()
    assert (w.state.epoch, entry(w, "actor/0")["changed"]) == (before + 1, before + 1)
    w.make_ready()
    assert (w.state.epoch, entry(w, "actor/0")["changed"]) == (before + 2, before + 2)
    w.ack(7, "actor/0")
    w.tick()
    assert (w.state.epoch, entry(w, "actor/0")["changed"]) == (before + 3, before + 2)  # it neither came nor went
    assert entry(w, "actor/1")["changed"] < before


# --------------------------------------------------------------------------------------------------------------- holds


def test_a_hold_is_granted_when_nothing_starts_and_keeps_groups_from_starting() -> None:
    w = trained()
    w.say(hold_s=60.0)
    w.tick()
    assert (client(w).hold, client(w).echo) == (True, 1)
    w.kill("actor/0", 0)
    w.run_until(lambda: w.group().phase is Phase.BACKOFF)
    for _ in range(5):
        w.tick(1.0)
    assert (w.group().phase, w.group().message) == (Phase.BACKOFF, "held by trainer")
    assert document(w)["may_start"] == "held by trainer"
    w.say(hold_s=0.0)
    w.make_ready()
    assert w.group().incarnation == 2


def test_a_hold_waits_for_a_start_and_lets_no_other_begin() -> None:
    w = trained()
    w.kill("actor/0", 0)
    w.run_until(lambda: w.group().phase is Phase.STARTING)
    w.say(hold_s=60.0)
    w.kill("actor/1", 0)
    for _ in range(5):
        w.tick()
    assert (client(w).hold, client(w).echo) == (False, 0)
    assert w.group(1).phase is Phase.BACKOFF
    work(w, lambda: w.group().phase is Phase.READY)
    work(w, lambda: client(w).hold)
    work(w, lambda: w.group(1).phase is not Phase.FENCING)
    assert (client(w).hold, client(w).echo, w.group(1).phase) == (True, 1, Phase.BACKOFF)


def test_a_hold_whose_client_is_gone_expires() -> None:
    w = trained()
    w.say(hold_s=60.0)
    w.tick()
    w.kill("actor/0", 0)
    w.run_until(lambda: w.group().phase is Phase.BACKOFF)
    decision = w.tick()
    assert decision.wake_at is not None
    w.now = decision.wake_at
    w.tick()
    assert [e.message for e in w.events("hold_expired")] == ["trainer: not renewed for 60 s: groups may start again"]
    assert not client(w).hold
    w.make_ready()


def test_a_renewed_hold_does_not_expire() -> None:
    w = trained()
    for _ in range(4):
        w.say(hold_s=60.0)
        w.tick(50.0)
    assert client(w).hold
    assert not w.events("hold_expired")


def test_a_hold_does_not_keep_a_failure_from_being_stopped() -> None:
    w = trained()
    w.say(hold_s=60.0)
    w.tick()
    w.kill("actor/0", 0)
    w.tick()
    assert [a.group for a in w.actions(Stop)] == ["actor/0"]
    assert serving(w) == ()
    assert w.state.alive == (("actor/1", 1),)


def test_a_frozen_pool_starts_whoever_holds() -> None:
    w = World(make_plan(2))
    w.make_ready()
    w.say(hold_s=60.0)
    w.tick()
    restart(w, "actor/0")
    assert client(w).hold


def test_a_hold_outlives_its_coordinator() -> None:
    w = trained()
    w.say(hold_s=60.0)
    w.tick()
    w.restart()
    w.kill("actor/0", 0)
    w.run_until(lambda: w.group().phase is Phase.BACKOFF)
    assert client(w).hold


# ---------------------------------------------------------------------------------------------------------- at_barrier


def test_an_at_barrier_group_is_stopped_at_once_and_starts_when_the_trainer_syncs() -> None:
    w = colocated()
    w.say(phase="training")
    w.tick()
    w.kill("actor/0", 0)
    w.run_until(lambda: w.group().phase is Phase.BACKOFF)
    assert "actor/0" in [a.group for a in w.actions(Stop)]
    for _ in range(5):
        w.tick(60.0)
    assert (w.group().phase, w.group().message) == (Phase.BACKOFF, AWAITS_BARRIER)
    assert entry(w, "actor/0")["urls"] == []
    w.say(phase="generating")
    w.tick()
    assert w.group().phase is Phase.BACKOFF
    w.say(phase="syncing")
    w.make_ready()
    assert w.group().incarnation == 2


def test_the_first_start_needs_no_permission() -> None:
    w = World(make_plan(1, restart=AT_BARRIER))
    w.make_ready()
    assert w.group().incarnation == 1


def test_a_group_that_fails_before_any_client_spoke_starts_at_once() -> None:
    w = colocated()
    restart(w, "actor/0")


def test_a_trainer_that_waits_below_min_ready_permits_a_start() -> None:
    w = colocated(min_ready=2)
    w.say(phase="generating")
    w.tick()
    w.kill("actor/0", 0)
    w.run_until(lambda: w.group().phase is Phase.BACKOFF)
    w.say(waiting_s=60.0)
    work(w, lambda: w.group().phase is Phase.READY)


def test_waiting_permits_nothing_while_enough_groups_live() -> None:
    w = colocated(min_ready=1)
    w.say(phase="generating", waiting_s=30.0)
    w.tick()
    w.kill("actor/0", 0)
    w.run_until(lambda: w.group().phase is Phase.BACKOFF)
    w.tick()
    assert w.group().phase is Phase.BACKOFF


def test_waiting_permits_nothing_while_another_client_holds_or_trains() -> None:
    for other in ({"hold_s": 600.0}, {"phase": "training"}):
        w = colocated(min_ready=2)
        w.say("generator", phase="generating")
        w.say("trainer", **other)
        w.tick()
        w.kill("actor/0", 0)
        w.run_until(lambda: w.group().phase is Phase.BACKOFF)  # noqa: B023  # run at once
        w.say("generator", waiting_s=30.0)
        for _ in range(3):
            w.tick()
        assert w.group().phase is Phase.BACKOFF, other


def test_the_word_of_one_that_waits_ends_by_itself() -> None:
    w = colocated(min_ready=2)
    w.say(phase="generating", waiting_s=30.0)
    w.tick()
    w.tick(31.0)
    w.kill("actor/0", 0)
    w.run_until(lambda: w.group().phase is Phase.BACKOFF)
    w.tick()
    assert w.group().phase is Phase.BACKOFF


def test_several_clients_do_not_overwrite_one_another() -> None:
    w = colocated()
    w.say("generator", phase="syncing")
    w.say("trainer", phase="training")
    w.tick()
    w.kill("actor/0", 0)
    w.run_until(lambda: w.group().phase is Phase.BACKOFF)
    w.tick()
    assert w.group().phase is Phase.BACKOFF  # the GPUs are the trainer's, whatever the generator does
    w.say("trainer", phase="generating")
    w.make_ready()
    assert {c: words["phase"] for c, words in document(w)["clients"].items()} == {
        "generator": "syncing",
        "trainer": "generating",
    }


def test_training_is_echoed_only_when_no_engine_loads_on_the_trainers_gpus() -> None:
    w = colocated()
    w.say(phase="syncing")
    w.kill("actor/0", 0)
    w.run_until(lambda: w.group().phase is Phase.STARTING)
    w.settle()
    w.tick()
    said = client(w).seq
    w.say(phase="training")
    w.tick()
    assert client(w).echo == said
    w.heal(lambda: client(w).echo == client(w).seq)
    assert w.group().phase is Phase.READY


# -------------------------------------------------------------------------------------------------------------- probes


def test_an_announcement_is_echoed_when_nothing_is_asked_any_more() -> None:
    w = colocated()
    w.probing = {"actor/1"}
    w.say(phase="training")
    w.tick()
    w.settle()
    w.tick()
    assert (w.state.paused, client(w).echo) == (("actor",), 0)
    w.probing.clear()
    w.tick()
    assert client(w).echo == 1


def test_an_announcement_is_not_echoed_before_the_agents_ask_nothing() -> None:
    w = colocated()
    w.say(phase="training")
    w.tick()
    w.settle()
    w.change("actor/0", "n1", pause=0)
    w.tick()
    assert client(w).echo == 0
    w.change("actor/0", "n1", pause=1)
    w.tick()
    assert client(w).echo == 1


def test_an_agent_that_means_the_pause_before_is_not_believed() -> None:
    """Its file system is slow: it goes on asking when it sees that pause end, and this one begins."""
    w = colocated()
    w.say(phase="training")
    w.tick()
    w.settle()
    w.say(phase="generating")
    w.tick()
    w.say(phase="training")
    w.tick()
    w.tick()
    assert client(w).echo == 2
    w.settle()
    w.tick()
    assert client(w).echo == 3


def test_a_step_without_entrypoints_has_nobody_to_ask() -> None:
    w = colocated()
    w.say(phase="training")
    w.tick()
    w.settle()
    w.change("actor/0", "n1", pause=None)
    w.tick()
    assert client(w).echo == 1


def test_a_phase_that_pauses_nothing_is_echoed_at_once() -> None:
    w = colocated()
    w.say(phase="generating")
    w.tick()
    assert client(w).echo == 1


def test_an_agent_that_does_not_say_that_it_asks_nothing_is_not_waited_for_for_ever() -> None:
    w = colocated()
    w.say(phase="training")
    decision = w.tick()
    limit_s = PAUSES.liveness_timeout_s + UNCONFIRMED_S
    assert decision.wake_at == pytest.approx(w.now + limit_s)
    w.tick(limit_s - 0.1)
    assert client(w).echo == 0
    w.tick(0.2)
    assert client(w).echo == 1
    assert "actor/0, actor/1" in next(e for e in w.events("probes") if e.reason == "unconfirmed").message


def test_a_pause_has_an_end_however_often_it_is_announced() -> None:
    w = colocated()
    for _ in range(2):
        w.say(phase="training")
        w.tick()
        w.settle()
        w.tick(1.0)
    assert (w.state.paused, client(w).echo) == (("actor",), 2)
    w.tick(PAUSES.pause_max_s)
    assert not w.state.paused
    assert [e.reason for e in w.events("probes")] == ["paused", "on"]
    assert "paused for 3600 s" in w.events("probes")[-1].message


def test_a_sleeping_engine_that_dies_is_seen_all_the_same() -> None:
    w = colocated()
    w.say(phase="training")
    w.tick()
    w.kill("actor/0", 0)
    w.tick()
    assert [a.group for a in w.actions(Stop)] == ["actor/0"]
    assert not w.actions(Snapshot)


def test_a_new_up_forgets_words_and_keeps_versions() -> None:
    """As `store.load_state` does it: see its own tests."""
    w = colocated()
    w.say(phase="training", hold_s=60.0)
    w.tick()
    kept = ClientState(id="trainer", seq=client(w).seq, echo=client(w).echo, acks=client(w).acks)
    w.state = replace(w.state, clients=(kept,), paused=())
    restart(w, "actor/0")
    assert w.state.targets == {"actor": 1}
