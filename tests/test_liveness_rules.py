"""When an engine that was ready is restarted, and above all when it is left alone."""

from __future__ import annotations

from typing import Any

import pytest

from slurm_rollout.core.health import ProbeResult, fold
from slurm_rollout.core.model import Endpoint, Launch, Snapshot, Stop
from slurm_rollout.core.phases import ALIVE, Phase, Reason
from slurm_rollout.core.plan import StopPolicy
from slurm_rollout.testing.world import World, make_plan

P = Phase
THRESHOLD = 4  # of liveness failures, by default
REFUSALS = 2  # answers that say "no" until unready, by default


def ready(groups: int = 3, **policies: Any) -> World:
    w = World(make_plan(groups, **policies))
    w.make_ready()
    return w


def name(index: int) -> str:
    return f"actor/{index}"


def time_out(w: World, *groups: int, failures: int = THRESHOLD, rank: int = 0) -> None:
    for index in groups:
        w.probe(name(index), rank, failures=failures, last_error="no answer within 30 s")


def agents_agree(w: World, *groups: int, failures: int = THRESHOLD, rank: int = 0) -> None:
    for index in groups:
        node = w.plan.groups[index].members[rank].node
        w.change(name(index), node, failing={rank: failures})


def restarting(w: World) -> list[int]:
    return [i for i, g in enumerate(w.state.groups) if g.phase not in ALIVE]


# ------------------------------------------------------------------------------------------------- it does not answer


def test_a_hung_engine_is_restarted_when_the_threshold_is_reached_and_not_before() -> None:
    w = ready()
    time_out(w, 0, failures=THRESHOLD - 1)
    w.tick()
    assert restarting(w) == []
    time_out(w, 0)
    w.tick()
    assert restarting(w) == [0]
    failure = w.group().failure
    assert failure is not None
    assert (failure.reason, failure.rank, failure.node) == (Reason.NOT_ANSWERING, 0, "n0")
    assert failure.message == "4 liveness probes failed in a row: no answer within 30 s"
    assert not failure.startup
    assert failure.restarted_peers == (1,)
    assert w.actions(Snapshot) == [Snapshot(group=name(0), incarnation=1, nodes=("n0", "n1"))]
    assert w.actions(Stop) == []
    w.tick()
    assert w.actions(Stop) == [Stop(group=name(0), incarnation=1, nodes=("n0", "n1"))]


def hung(stop: StopPolicy | None = None) -> World:
    """A group that was just found to hang; its agents have not answered yet."""
    w = World(make_plan(groups=2, stop=stop))
    w.make_ready()
    time_out(w, 0)
    w.tick(act=False)
    return w


def test_a_hung_group_is_stopped_when_its_last_agent_has_looked_at_it() -> None:
    w = hung()
    w.change(name(0), "n0", snapshot=True)
    w.tick()
    assert w.actions(Stop) == []
    w.change(name(0), "n1", snapshot=True)
    w.tick(1.0)
    assert w.actions(Stop) == [Stop(group=name(0), incarnation=1, nodes=("n0", "n1"))]
    [told] = w.events("snapshot")
    assert told.message == "what its processes were doing is written down"
    assert told.data == {"snapshot_s": 1.01}


def test_an_agent_that_does_not_look_delays_the_stop_by_no_more_than_its_time() -> None:
    w = hung()
    w.change(name(0), "n0", snapshot=True)
    decision = w.tick(3.4)
    assert w.actions(Stop) == []
    assert decision.wake_at is not None
    w.tick(decision.wake_at - w.now)
    assert w.actions(Stop) == [Stop(group=name(0), incarnation=1, nodes=("n0", "n1"))]
    assert w.events("snapshot")[0].message == "none from n1"


def test_a_member_that_crashes_meanwhile_ends_the_wait() -> None:
    w = hung()
    w.kill(name(0), 1)
    w.tick()
    assert w.actions(Stop) == [Stop(group=name(0), incarnation=1, nodes=("n0",))]


def test_a_run_that_ends_meanwhile_ends_the_wait() -> None:
    w = hung()
    w.stop_signal = True
    w.tick()
    assert Stop(group=name(0), incarnation=1, nodes=("n0", "n1")) in w.actions(Stop)


def test_a_coordinator_that_dies_meanwhile_leaves_a_wait_that_ends() -> None:
    w = hung()
    w.restart()
    w.tick()
    assert w.actions(Stop) == []
    w.tick(3.5)
    assert w.actions(Stop) == [Stop(group=name(0), incarnation=1, nodes=("n0", "n1"))]


def test_a_crash_waits_for_no_snapshot() -> None:
    w = ready()
    w.kill(name(0), 1)
    w.tick()
    assert w.actions(Snapshot) == []
    assert w.actions(Stop) == [Stop(group=name(0), incarnation=1, nodes=("n0",))]


def test_without_time_for_snapshots_there_is_none() -> None:
    w = hung(StopPolicy(snapshot_s=0))
    assert w.actions(Snapshot) == []
    assert w.actions(Stop) == [Stop(group=name(0), incarnation=1, nodes=("n0", "n1"))]


def test_an_engine_that_answers_errors_for_long_is_restarted_for_that() -> None:
    w = ready()
    w.probe(name(0), 1, failures=THRESHOLD, refusals=THRESHOLD, last_error="HTTP 500")
    w.tick()
    failure = w.group().failure
    assert failure is not None
    assert (failure.reason, failure.rank) == (Reason.ANSWERS_ERROR, 1)


def test_a_member_whose_probes_fail_too_is_named_and_does_not_count_as_a_healthy_peer() -> None:
    w = ready(nodes_per_group=3)
    time_out(w, 0, rank=1)
    time_out(w, 0, rank=2, failures=1)
    w.tick()
    failure = w.group().failure
    assert failure is not None
    assert failure.message == "4 liveness probes failed in a row: no answer within 30 s (rank 2 failing too)"
    assert failure.restarted_peers == (0,)


def test_a_slow_engine_whose_counter_moves_is_an_event_and_never_a_restart() -> None:
    w = ready()
    for _ in range(50):
        w.probe(name(0), 0, slow=True, failures=0, last_error="no answer within 30 s")
        w.tick(30.0)
    assert w.phases() == {P.READY}
    assert len(w.events("slow")) == 1
    assert w.group().slow
    w.probe(name(0), 0, slow=False)
    w.tick()
    assert not w.group().slow


def test_a_probe_that_times_out_alone_never_makes_a_group_unready() -> None:
    w = ready()
    time_out(w, 0, failures=THRESHOLD - 1)
    for _ in range(20):
        w.tick(30.0)
    assert w.phases() == {P.READY}
    assert w.state.serving == ((name(0), 1), (name(1), 1), (name(2), 1))


def test_a_starting_engine_is_not_judged_by_liveness() -> None:
    w = World(make_plan(1))
    w.run_until(lambda: w.group().phase is P.STARTING)
    w.fence(name(0))
    w.tick()
    w.probe(name(0), 0, failures=100, refusals=100, last_error="connection refused")
    w.tick()
    assert w.group().phase is P.STARTING


# ------------------------------------------------------------------------------------------------------------- unready


def test_an_engine_that_says_no_leaves_the_barrier_and_comes_back_without_a_restart() -> None:
    w = ready()
    epoch = w.state.epoch
    w.probe(name(0), 1, refusals=REFUSALS - 1, failures=1, last_error="HTTP 503")
    w.tick()
    assert w.phases() == {P.READY}
    w.probe(name(0), 1, refusals=REFUSALS, failures=2)
    w.tick()
    assert w.group().phase is P.UNREADY
    assert w.group().message == "rank 1: HTTP 503"
    assert w.state.serving == ((name(1), 1), (name(2), 1))
    assert w.state.epoch == epoch + 1
    w.probe(name(0), 1, refusals=0, failures=1)
    w.tick()
    assert w.group().phase is P.UNREADY
    w.probe(name(0), 1, failures=0)
    w.tick()
    assert w.group().phase is P.READY
    assert w.state.epoch == epoch + 2
    assert not w.actions(Stop)
    assert [e.rank for e in w.events("unready")] == [1]


def test_an_unready_engine_that_goes_on_refusing_is_restarted() -> None:
    w = ready()
    w.probe(name(0), 0, refusals=REFUSALS, failures=REFUSALS)
    w.tick()
    w.probe(name(0), 0, refusals=THRESHOLD, failures=THRESHOLD)
    w.tick()
    assert w.group().phase is P.STOPPING


def test_a_new_coordinator_takes_nobody_from_unready_to_ready_before_every_entrypoint_answered_it() -> None:
    w = ready(1)
    w.probe(name(0), 0, refusals=REFUSALS, last_error="HTTP 503")
    w.tick()
    w.restart()
    w.tick()
    assert w.group().phase is P.UNREADY, "not one probe was made yet"
    w.probe(name(0), 0)
    w.probe(name(0), 1)
    w.tick()
    assert w.group().phase is P.UNREADY, "the first probes are under way"
    w.probe(name(0), 0, answers=True)
    w.tick()
    assert w.group().phase is P.UNREADY, "rank 1 did not answer yet"
    w.probe(name(0), 1, answers=True)
    w.tick()
    assert w.group().phase is P.READY


def test_an_endpoint_answers_when_its_newest_probe_succeeded_and_a_probe_that_says_nothing_changes_nothing() -> None:
    def probed(endpoint: Endpoint, *, ok: bool, lagged: bool = False) -> Endpoint:
        return fold(endpoint, ProbeResult(kind="liveness", ok=ok, lagged=lagged, started_at=0.0, ended_at=1.0))

    fresh = Endpoint(rank=0)
    assert not fresh.answers
    assert not probed(fresh, ok=False, lagged=True).answers
    answering = probed(fresh, ok=True)
    assert answering.answers
    assert probed(answering, ok=False, lagged=True).answers
    assert not probed(answering, ok=False).answers


# ------------------------------------------------------------------------------------------- not what it should be


def test_a_stranger_on_an_entrypoint_s_port_is_a_failure_whatever_it_answers() -> None:
    w = ready()
    w.change(name(0), "n1", stranger="port 18000 is held by pid 3 (nginx), not by our engine")
    w.tick()
    failure = w.group().failure
    assert failure is not None
    assert (failure.reason, failure.node) == (Reason.STRANGER_ANSWERS, "n1")
    assert "nginx" in failure.message


def test_an_engine_that_serves_another_model_is_a_failure_in_a_start_and_later() -> None:
    for phase in (P.STARTING, P.READY):
        w = World(make_plan(1))
        w.heal(lambda w=w, phase=phase: w.group().phase is phase)  # type: ignore[misc]
        w.probe(name(0), 1, mismatch="serves 'llama', planned is 'qwen'")
        w.tick()
        failure = w.group().failure
        assert failure is not None
        assert (failure.reason, failure.rank, failure.node) == (Reason.MISMATCH, 1, "n1")
        assert failure.startup is (phase is P.STARTING)


def test_an_agent_that_started_other_ranks_than_planned_is_a_failure() -> None:
    w = World(make_plan(1))
    w.heal(lambda: w.group().go_sent_at is not None)
    w.change(name(0), "n1", started=(0,))
    w.tick()
    assert w.group().failure is not None
    assert w.group().reason is Reason.MISMATCH


def test_one_group_s_failure_does_not_touch_the_others() -> None:
    w = ready()
    before = w.state.groups[1:]
    w.kill(name(0), 0)
    w.heal(lambda: w.group().incarnation == 2 and w.phases() == {P.READY})
    assert w.state.groups[1:] == before
    assert {a.group for a in w.actions(Stop)} == {name(0)}
    assert [a.group for a in w.actions(Launch) if a.incarnation > 1] == [name(0)]


def test_groups_recover_in_parallel() -> None:
    w = ready()
    w.kill(name(0), 0)
    w.kill(name(1), 1)
    w.tick()
    assert restarting(w) == [0, 1]
    w.heal(lambda: {w.group(0).phase, w.group(1).phase} == {P.STARTING})
    assert w.group(0).since == w.group(1).since


# ------------------------------------------------------------------------------------------ is it they, or is it us?


@pytest.mark.parametrize(("groups", "late"), [(3, 2), (4, 3), (5, 3), (2, 2)])
def test_when_more_than_half_of_the_groups_time_out_only_what_their_agents_see_too_counts(
    groups: int, late: int
) -> None:
    w = ready(groups)
    time_out(w, *range(late), failures=100)
    for _ in range(20):
        w.tick(60.0)
    assert restarting(w) == []
    assert w.state.suspect_self_since is not None
    assert [e.reason for e in w.events("blind")] == ["probes"]
    agents_agree(w, 0, failures=THRESHOLD - 1)
    w.tick()
    assert restarting(w) == []
    agents_agree(w, 0)
    w.tick()
    assert restarting(w) == [0]


def test_half_of_the_groups_is_not_more_than_half() -> None:
    w = ready(4)
    time_out(w, 0, 1)
    w.tick()
    assert restarting(w) == [0, 1]
    assert not w.events("blind")


def test_a_fleet_of_one_group_always_asks_the_agent() -> None:
    w = ready(1)
    time_out(w, 0)
    w.tick()
    assert restarting(w) == []
    agents_agree(w, 0)
    w.tick()
    assert restarting(w) == [0]


def test_the_agent_must_agree_on_the_same_member() -> None:
    w = ready(1)
    time_out(w, 0, rank=0)
    agents_agree(w, 0, rank=1)
    w.tick()
    assert restarting(w) == []


def test_while_we_are_the_suspect_the_restart_of_one_group_convicts_no_other() -> None:
    w = ready(3)
    time_out(w, 0, 1)
    agents_agree(w, 0)
    w.tick()
    assert restarting(w) == [0]
    for _ in range(10):
        w.tick(1.0)
    assert 1 not in restarting(w), "now one of two that are alive times out, and its own agent sees nothing wrong"
    time_out(w, 1, failures=THRESHOLD + 1)
    for _ in range(10):
        w.tick(30.0)
    assert 1 not in restarting(w)
    assert w.state.suspect_self_since is not None
    agents_agree(w, 1)
    w.tick()
    assert 1 in restarting(w)


def test_probes_are_believed_again_when_they_come_through_again() -> None:
    w = ready(3)
    time_out(w, 0, 1, failures=THRESHOLD + 1)
    w.tick()
    time_out(w, 0, 1, failures=0)
    w.tick()
    assert w.state.suspect_self_since is None
    assert [e.reason for e in w.events("sighted")] == ["probes"]
    time_out(w, 0)
    w.tick()
    assert restarting(w) == [0]


def test_nobody_is_told_that_we_are_blind_before_the_agents_had_one_more_period_to_agree() -> None:
    w = ready(1)
    time_out(w, 0, failures=THRESHOLD)
    w.tick()
    assert not w.events("blind")
    agents_agree(w, 0)
    w.tick()
    assert restarting(w) == [0]
    assert not w.events("blind")


def test_nobody_is_told_that_we_are_blind_where_the_agents_agree() -> None:
    w = ready(1)
    time_out(w, 0, failures=THRESHOLD + 1)
    agents_agree(w, 0)
    w.tick()
    w.tick()
    assert restarting(w) == [0]
    assert not w.events("blind")
    assert not w.events("sighted")


def test_refused_connections_do_not_make_the_coordinator_the_suspect() -> None:
    w = ready(3)
    for index in range(3):
        w.probe(name(index), 0, failures=THRESHOLD, refusals=THRESHOLD, last_error="Connection refused")
    w.tick()
    assert restarting(w) == [0, 1, 2]
    assert not w.events("blind")


def test_a_step_that_ended_convicts_its_own_group_only() -> None:
    w = ready(3)
    time_out(w, 0, 1)
    w.kill(name(2), 0)
    w.tick()
    assert restarting(w) == [2]
    assert w.state.suspect_self_since is not None
    agents_agree(w, 1)
    w.tick()
    assert restarting(w) == [1, 2]


def test_a_group_whose_step_ended_is_not_among_those_that_are_counted() -> None:
    w = ready(5)
    time_out(w, 0, 1)  # two of five, but two of the four whose steps run is half, not more
    w.kill(name(2), 0)
    w.tick()
    assert restarting(w) == [0, 1, 2]


def test_a_group_that_said_no_before_it_fell_silent_is_late_like_the_others() -> None:
    w = ready(2)
    said_no = Endpoint(rank=0, failures=1, refusals=2, last_error="HTTP 503")
    late = ProbeResult(kind="liveness", ok=False, started_at=0, ended_at=30, answered=False, error="no answer in time")
    now = fold(said_no, late)
    assert (now.failures, now.refusals) == (2, 0)
    w.probe(name(0), 0, failures=now.failures, refusals=now.refusals, last_error=now.last_error)
    time_out(w, 1)
    w.tick()
    assert restarting(w) == []


def test_an_ended_step_is_a_failure_also_while_we_are_the_suspect() -> None:
    w = ready(1)
    time_out(w, 0)
    w.tick()
    w.kill(name(0), 1)
    w.tick()
    assert restarting(w) == [0]
