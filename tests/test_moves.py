"""Nodes that are lost, drained or of no use: which verdict is given when, and where their groups go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from slurm_rollout.core.barrier_rules import barrier_document
from slurm_rollout.core.decide import decide
from slurm_rollout.core.model import CancelLost, Exclusion, ExitRecord, Launch, NodeWord, Process
from slurm_rollout.core.names import step_name
from slurm_rollout.core.phases import Phase, PoolPhase, Reason
from slurm_rollout.core.plan import GroupPlan, RestartPolicy
from slurm_rollout.testing.world import World, make_plan

P = Phase


def new(groups: int = 2, nodes: int = 2, spares: int = 1, **policies: Any) -> World:
    w = World(make_plan(groups, nodes, spares=spares, **policies))
    w.make_ready()
    return w


def lose(w: World, group: str, node: str) -> None:
    """Cut a node off: its group's probes time out, and so does everything that is tried there."""
    w.cut.add(node)
    w.orphans.add((group, w.state.group(group).incarnation, node, False))
    for rank in range(2):
        w.probe(group, rank, failures=9, last_error="no answer within 30 s")
    w.tick()
    assert w.state.group(group).phase is P.STOPPING


def reason(w: World) -> object:
    """Return the reason that the trainer reads."""
    return barrier_document(w.plan, w.state, now=w.now, seq=1)["reason"]


def go_on(w: World, seconds: float, step_s: float = 0.5) -> None:
    """Let time pass while everything that is well works."""
    for _ in range(int(seconds / step_s)):
        w.tick(step_s)
        w.settle()


def group(w: World, name: str) -> GroupPlan:
    return w.placed.group(name)


def urls(w: World, name: str) -> list[str]:
    return [m.url for m in group(w, name).members]


def test_a_group_whose_node_is_lost_moves_to_the_spare_and_only_that_member_has_a_new_address() -> None:
    w = new()
    lose(w, "actor/0", "n1")
    go_on(w, w.plan.lost_after_s + 10)
    assert w.state.node("n1").excluded is Exclusion.LOST
    assert w.state.group("actor/0").phase is P.READY
    assert group(w, "actor/0").nodes == ("n0", "n4")
    assert urls(w, "actor/0") == ["http://n0:18000", "http://n4:18000"]
    assert group(w, "actor/0").master_address == "n0"
    assert group(w, "actor/0").master_port != w.plan.group("actor/0").master_port
    assert "n0:18001" in w.state.group("actor/0").retired
    assert [e.reason for e in w.events("moved")] == ["node_lost"]
    assert w.state.group("actor/1").incarnation == 1


def test_a_lost_leader_takes_the_master_address_with_it() -> None:
    w = new()
    lose(w, "actor/0", "n0")
    go_on(w, w.plan.lost_after_s + 10)
    assert group(w, "actor/0").nodes == ("n4", "n1")
    assert group(w, "actor/0").master_address == "n4"
    assert urls(w, "actor/0")[1] == "http://n1:18000"


def test_no_budget_counts_a_lost_node_and_none_is_too_small_for_it() -> None:
    w = new(restart=RestartPolicy(max_restarts=0, max_start_failures=0))
    lose(w, "actor/0", "n1")
    go_on(w, w.plan.lost_after_s + 10)
    g = w.state.group("actor/0")
    assert (g.phase, g.runtime_failures, g.start_failures, g.node_failures) == (P.READY, (), (), 1)
    assert g.failure is not None
    assert g.failure.reason is Reason.NODE_LOST


def test_before_the_time_is_over_a_silent_node_is_waited_for() -> None:
    w = new()
    lose(w, "actor/0", "n1")
    go_on(w, w.plan.lost_after_s - 5)
    assert w.state.group("actor/0").phase is P.STOPPING
    assert not w.state.nodes
    w.cut.clear()
    go_on(w, 10)
    assert w.state.group("actor/0").phase is P.READY
    assert group(w, "actor/0").nodes == ("n0", "n1")


def test_slurms_verdict_needs_no_time() -> None:
    w = new()
    w.words["n1"] = NodeWord.DOWN
    lose(w, "actor/0", "n1")
    go_on(w, 5)
    assert group(w, "actor/0").nodes == ("n0", "n4")
    assert "Slurm says that it is down (a reason)" in w.state.node("n1").message


def test_an_old_word_of_slurm_is_none() -> None:
    """Before the failure the node may have been down for a moment: what was said then is no verdict on now."""
    w = new()
    w.words["n1"] = NodeWord.DOWN
    w.ask_of_nodes()
    w.words.clear()
    lose(w, "actor/0", "n1")
    w.blind = True
    go_on(w, 5)
    assert not w.state.nodes


def test_two_nodes_that_fall_silent_at_once_are_not_given_up_before_slurm_says_so() -> None:
    w = new(spares=2)
    lose(w, "actor/0", "n1")
    w.cut.add("n5")
    go_on(w, 2 * w.plan.lost_after_s)
    assert not w.state.nodes
    assert w.state.group("actor/0").phase is P.STOPPING
    w.words["n1"] = NodeWord.SILENT
    go_on(w, 15)
    assert w.state.node("n1").excluded is Exclusion.LOST
    assert "Slurm does not hear it either" in w.state.node("n1").message
    assert group(w, "actor/0").nodes == ("n0", "n4")


def test_no_node_is_given_up_while_slurm_is_silent_too() -> None:
    w = new()
    w.blind = True
    lose(w, "actor/0", "n1")
    go_on(w, 3 * w.plan.lost_after_s)
    assert not w.state.nodes
    assert w.state.group("actor/0").phase is P.STOPPING
    assert not [a for a in w.actions(Launch) if a.incarnation > 1]


def cut_off(w: World, *nodes: str) -> None:
    """The only group times out, as it does where its leader's node is cut off; and so do these nodes."""
    w.cut.update(nodes)
    w.orphans.update(("actor/0", 1, node, False) for node in nodes)
    for rank in range(2):
        w.probe("actor/0", rank, failures=9, last_error="no answer within 30 s")


def keep_timing_out(w: World, seconds: float) -> None:
    for _ in range(int(seconds)):
        w.tick(1.0)


def test_the_only_group_is_given_up_where_its_node_alone_is_silent_and_moves() -> None:
    """It is most of the groups, so we are the suspect; and the agent on the node that is cut off cannot agree."""
    w = new(1)
    cut_off(w, "n0")
    keep_timing_out(w, w.plan.lost_after_s - 5)
    assert w.state.suspect_self_since is not None
    assert w.state.group("actor/0").phase is P.READY
    keep_timing_out(w, 10)
    g = w.state.group("actor/0")
    assert g.failure is not None
    assert (g.phase, g.failure.node) == (P.STOPPING, "n0")
    go_on(w, w.plan.lost_after_s + 10)
    assert w.state.node("n0").excluded is Exclusion.LOST
    assert (w.state.group("actor/0").phase, group(w, "actor/0").nodes) == (P.READY, ("n2", "n1"))
    assert (w.state.group("actor/0").runtime_failures, w.state.group("actor/0").start_failures) == ((), ())


@pytest.mark.parametrize(
    "whose_fault", ["another node is silent, too", "none answers", "Slurm is silent, too", "it answers"]
)
def test_else_the_only_group_is_left_alone(whose_fault: str) -> None:
    w = new(1)
    cut_off(w, *{"another node is silent, too": ("n0", "n2"), "none answers": w.plan.nodes}.get(whose_fault, ("n0",)))
    w.blind = whose_fault == "Slurm is silent, too"
    if whose_fault == "it answers":
        w.cut.clear()
    keep_timing_out(w, 5 * w.plan.lost_after_s)
    assert w.state.group("actor/0").phase is P.READY
    assert not w.state.nodes


def test_nodes_of_which_none_answers_say_that_we_are_cut_off() -> None:
    w = new(1, spares=1)
    w.cut |= set(w.plan.nodes)
    w.orphans.add(("actor/0", 1, "n1", False))
    w.kill("actor/0", 0)
    go_on(w, 3 * w.plan.lost_after_s)
    assert not w.state.nodes


def test_a_step_that_was_left_on_a_lost_node_is_cancelled_when_that_is_back_and_kept_until_it_is_gone() -> None:
    w = new()
    name = step_name(w.plan, "actor/0", 1, "n1")
    lose(w, "actor/0", "n1")
    go_on(w, w.plan.lost_after_s + 10)
    assert [(s.name, s.node) for s in w.state.lost_steps] == [(name, "n1")]
    assert not w.actions(CancelLost)
    w.undying.add("n1")
    w.cut.clear()
    go_on(w, 20)
    assert len(w.actions(CancelLost)) > 1
    assert w.state.lost_steps
    assert not w.state.node("n1").back
    w.undying.clear()
    go_on(w, 20)
    assert not w.state.lost_steps
    assert w.state.node("n1").back
    assert [e.node for e in w.events("node_back")] == ["n1"]
    assert w.living("actor/0") == {2}


def test_without_a_spare_the_group_waits_and_starts_by_itself_when_the_node_is_back() -> None:
    w = new(spares=0)
    lose(w, "actor/0", "n1")
    go_on(w, w.plan.lost_after_s + 10)
    g = w.state.group("actor/0")
    assert (g.phase, g.reason) == (P.PENDING, Reason.NO_NODE)
    assert "n1 is lost, and no other node is free" in g.message
    assert w.state.phase is PoolPhase.READY
    w.cut.clear()
    go_on(w, 30)
    assert w.state.group("actor/0").phase is P.READY
    assert group(w, "actor/0").nodes == ("n0", "n1")
    assert not w.state.nodes


def test_a_pool_whose_node_slurm_took_away_is_failed_and_says_why() -> None:
    w = new(spares=0, min_ready=2)
    w.words["n1"] = NodeWord.GONE
    lose(w, "actor/0", "n1")
    go_on(w, 5)
    assert w.state.group("actor/0").phase is P.PENDING
    assert (w.state.phase, reason(w)) == (PoolPhase.FAILED, "no_node")
    w.stop_signal = True
    w.run_until(lambda: all(g.phase is P.STOPPED for g in w.state.groups))
    assert (w.state.phase, reason(w)) == (PoolPhase.FAILED, "no_node"), "what was said stays said"


def test_a_second_lost_node_finds_no_spare_and_the_operator_brings_the_first_back() -> None:
    w = new()
    lose(w, "actor/0", "n1")
    go_on(w, w.plan.lost_after_s + 10)
    lose(w, "actor/1", "n3")
    go_on(w, w.plan.lost_after_s + 10)
    assert w.state.group("actor/1").phase is P.PENDING
    w.cut.discard("n1")
    w.ask("resume", "n1")
    go_on(w, 10)
    assert w.state.group("actor/1").phase is P.READY
    assert group(w, "actor/1").nodes == ("n2", "n1")
    assert [e.message for e in w.events("request")] == [
        "n1: is used again once run.actor-0.1.1 has ended there, which is tried as soon as it answers"
    ]
    assert w.living("actor/0") == {2}


def test_a_drained_node_that_is_lost_and_comes_back_stays_drained() -> None:
    w = new(spares=0)
    lose(w, "actor/0", "n1")
    go_on(w, w.plan.lost_after_s + 10)
    w.ask("drain", "n1")
    w.cut.clear()
    go_on(w, 30)
    assert w.state.node("n1").excluded is Exclusion.DRAINED
    assert w.state.group("actor/0").phase is P.PENDING
    w.ask("resume", "n1")
    go_on(w, 5)
    assert w.state.group("actor/0").phase is P.READY


def test_what_failed_before_is_no_failure_of_the_node() -> None:
    w = new()
    w.kill("actor/0", 1)
    w.tick()
    w.heal(lambda: w.state.group("actor/0").phase is P.READY)
    w.ask("restart", "actor/0")
    w.cut.add("n1")
    w.orphans.add(("actor/0", 2, "n1", False))
    go_on(w, w.plan.lost_after_s + 10)
    g = w.state.group("actor/0")
    assert g.phase is P.READY
    assert len(g.runtime_failures) == 1
    assert g.failure is not None
    assert (g.failure.reason, g.failure.incarnation) == (Reason.NODE_LOST, 2)


def refuse_launches(w: World, name: str, node: str, seconds: float) -> None:
    """No step starts on a node: each srun ends after some seconds."""
    for _ in range(int(seconds)):
        w.tick(1.0)
        w.settle()
        g = w.state.group(name)
        seen = w.steps.get((name, g.incarnation, node, False))
        if g.phase is P.STARTING and seen is not None and seen.process is Process.RUNNING:
            w.vanish(name, node, stderr="Task launch failed: Communication connection failure")


def test_where_no_step_starts_and_nothing_answers_nobody_is_charged_and_the_ports_stay_taken() -> None:
    """Whether what was launched there lives cannot be known; nor whether a process outlived its step."""
    w = new(restart=RestartPolicy(max_restarts=1, max_start_failures=5))
    w.kill("actor/0", 1)
    w.heal(lambda: w.state.group("actor/0").phase is P.STARTING)
    w.cut.add("n1")
    refuse_launches(w, "actor/0", "n1", 2 * w.plan.lost_after_s + 20)
    g = w.state.group("actor/0")
    assert group(w, "actor/0").nodes == ("n0", "n4")
    assert group(w, "actor/0").master_port != w.plan.group("actor/0").master_port
    assert (g.phase, len(g.runtime_failures), g.start_failures) == (P.READY, 1, ())


def test_no_group_is_given_up_for_a_node_that_slurm_gave_up() -> None:
    w = new(restart=RestartPolicy(max_restarts=0, max_start_failures=0))
    w.words["n1"] = NodeWord.DOWN
    w.vanish("actor/0", "n1", stderr="Node failure on n1")
    go_on(w, 10)
    g = w.state.group("actor/0")
    assert (g.phase, g.runtime_failures, g.node_failures) == (P.READY, (), 1)
    assert group(w, "actor/0").nodes == ("n0", "n4")


def test_a_step_that_ends_without_a_word_on_a_node_that_is_well_counts() -> None:
    w = new(restart=RestartPolicy(max_restarts=0, max_start_failures=0))
    w.vanish("actor/0", "n1")
    go_on(w, 10)
    assert w.state.group("actor/0").phase is P.FAILED
    assert not w.state.nodes


def test_a_drained_node_is_the_last_choice_and_a_warning() -> None:
    w = new(spares=2)
    w.words["n4"] = NodeWord.DRAINING
    w.ask_of_nodes()
    w.tick()
    assert [(e.node, e.reason) for e in w.events("node_draining")] == [("n4", "draining")]
    w.tick()
    assert len(w.events("node_draining")) == 1
    lose(w, "actor/0", "n1")
    go_on(w, w.plan.lost_after_s + 10)
    assert group(w, "actor/0").nodes == ("n0", "n5")
    lose(w, "actor/1", "n3")
    go_on(w, w.plan.lost_after_s + 10)
    assert group(w, "actor/1").nodes == ("n2", "n4")


def fail_to_fence(w: World, name: str, node: str, cause: str = "gpu_memory") -> None:
    """The group's next launch fails at the check of one node."""
    w.heal(lambda: w.state.group(name).phase is P.STARTING)
    w.tick()
    record = ExitRecord(cause=cause, message="GPU 3 still has 70,000 MB in use")
    w.change(name, node, spoke=True, exit=record, process=Process.EXITED, exited_at=w.now, exit_code=80)
    w.tick()


def test_a_node_whose_checks_fail_again_and_again_is_excluded_and_its_group_moves() -> None:
    w = new()
    w.kill("actor/0", 1)
    w.tick()
    for _ in range(w.plan.max_node_failures):
        fail_to_fence(w, "actor/0", "n1")
    assert w.state.node("n1").excluded is Exclusion.FAILING
    w.heal(lambda: w.state.group("actor/0").phase is P.READY)
    assert group(w, "actor/0").nodes == ("n0", "n4")
    assert group(w, "actor/0").master_port != w.plan.group("actor/0").master_port, "nothing was fenced there since"


def break_gpu(w: World, name: str, node: str) -> None:
    record = ExitRecord(
        cause="engine_exited", message="signal 6", rank=1, signal=6, hardware="Xid 79: GPU has fallen off the bus"
    )
    w.change(name, node, exit=record, process=Process.EXITED, exited_at=w.now, exit_code=80)
    w.tick()


def test_a_gpu_that_breaks_has_its_node_excluded_at_once_and_is_charged_to_nobody() -> None:
    w = new(restart=RestartPolicy(max_restarts=0))
    break_gpu(w, "actor/0", "n1")
    assert w.state.node("n1").excluded is Exclusion.FAILING
    assert "fallen off the bus" in w.state.node("n1").message
    w.heal(lambda: w.state.group("actor/0").phase is P.READY)
    assert group(w, "actor/0").nodes == ("n0", "n4")
    assert w.state.group("actor/0").runtime_failures == ()
    assert w.state.group("actor/0").node_failures == 1


def test_a_gpu_that_the_fence_finds_lost_has_its_node_excluded_at_once() -> None:
    w = new(restart=RestartPolicy(max_start_failures=0))
    w.kill("actor/0", 1)
    w.heal(lambda: w.state.group("actor/0").phase is P.STARTING)
    record = ExitRecord(cause="gpu_memory", message="GPU 3: GPU is lost", hardware="nvidia-smi says: GPU is lost")
    w.change("actor/0", "n1", spoke=True, exit=record, process=Process.EXITED, exited_at=w.now, exit_code=83)
    w.tick()
    assert w.state.node("n1").excluded is Exclusion.FAILING
    w.heal(lambda: w.state.group("actor/0").phase is P.READY)
    assert w.state.group("actor/0").start_failures == ()


def test_a_gpu_that_breaks_where_there_is_no_other_node_is_tried_again_within_the_budget() -> None:
    w = new(spares=0, restart=RestartPolicy(max_restarts=1))
    for incarnation in (2, 3):
        break_gpu(w, "actor/0", "n1")
        if incarnation == 2:
            w.heal(lambda: w.state.group("actor/0").phase is P.READY)
    w.heal(lambda: w.state.group("actor/0").phase is P.FAILED)
    assert not w.state.node("n1").excluded


@pytest.mark.parametrize(
    ("words", "excluded"),
    [
        ("Unable to create step for job 1: Step limit reached for this job", False),
        ("Unable to create step for job 1: Memory required by task is not available", False),
        ("Task launch failed on node n1: Communication connection failure", True),
    ],
)
def test_only_words_about_the_node_count_against_it(words: str, excluded: bool) -> None:
    w = new()
    w.kill("actor/0", 1)
    w.tick()
    for _ in range(w.plan.max_node_failures):
        w.heal(lambda: w.state.group("actor/0").phase is P.STARTING)
        w.tick()
        w.vanish("actor/0", "n1", stderr=words, spoke=False)
        w.tick()
    assert bool(w.state.node("n1").excluded) is excluded


def test_a_full_disk_burns_no_spare() -> None:
    w = new()
    w.kill("actor/0", 1)
    w.tick()
    for _ in range(2 * w.plan.max_node_failures):
        w.heal(lambda: w.state.group("actor/0").phase is P.STARTING)
        w.tick()
        record = ExitRecord(cause="exec_failed", message="No space left on device", disk="/tmp on n1 is full")
        w.change("actor/0", "n1", spoke=True, exit=record, process=Process.EXITED, exited_at=w.now, exit_code=85)
        w.tick()
    assert not w.state.nodes
    assert w.state.group("actor/0").start_failures == ()


def test_what_fails_with_no_group_alive_elsewhere_burns_no_spare() -> None:
    w = new(1)
    w.kill("actor/0", 1)
    w.tick()
    for _ in range(w.plan.max_node_failures):
        fail_to_fence(w, "actor/0", "n1")
    assert not w.state.node("n1").excluded


def test_a_node_is_not_excluded_where_its_group_would_have_no_other() -> None:
    w = new(spares=0)
    w.kill("actor/0", 1)
    w.tick()
    for _ in range(w.plan.max_node_failures):
        fail_to_fence(w, "actor/0", "n1")
    assert not w.state.node("n1").excluded
    assert w.state.node("n1").failures == w.plan.max_node_failures
    w.heal(lambda: w.state.group("actor/0").phase is P.READY)
    assert not w.state.nodes, "it was fine after all"


def test_a_step_that_never_ends_on_a_node_that_answers_is_left_there_if_there_is_another_node() -> None:
    w = new()
    w.deaf.add("n1")
    w.undying.add("n1")
    w.orphans.add(("actor/0", 1, "n1", False))
    w.kill("actor/0", 0)
    go_on(w, w.plan.pool("actor").fence.timeout_s + 20)
    assert w.state.node("n1").excluded is Exclusion.STUCK
    assert group(w, "actor/0").nodes == ("n0", "n4")
    assert w.state.group("actor/0").phase is P.READY


def test_without_another_node_a_step_that_never_ends_is_waited_for() -> None:
    w = new(spares=0)
    w.deaf.add("n1")
    w.undying.add("n1")
    w.orphans.add(("actor/0", 1, "n1", False))
    w.kill("actor/0", 0)
    go_on(w, w.plan.pool("actor").fence.timeout_s + 20)
    assert not w.state.nodes
    assert w.state.group("actor/0").phase is P.STOPPING


def test_an_operator_drains_a_node_and_takes_it_back() -> None:
    w = new()
    w.ask("drain", "n1")
    w.heal(lambda: w.state.group("actor/0").phase is P.READY and w.state.group("actor/0").incarnation == 2)
    assert group(w, "actor/0").nodes == ("n0", "n4")
    assert w.state.group("actor/0").runtime_failures == ()
    w.ask("resume", "n1")
    w.tick()
    assert not w.state.nodes
    said = [e.message for e in w.events("request")]
    assert said == ["n1: is not used any more; actor/0 moves away from it", "n1: is used again (it was drained)"]


def test_a_sweep_on_a_node_that_is_well_is_ended_before_its_group_moves() -> None:
    w = new()
    w.kill("actor/0", 1)
    w.ports_open["actor/0"] = ("n1:18000",)
    w.heal(lambda: any(s.sweep for s in w.state.group("actor/0").steps))
    w.tick()
    w.deaf.add("n1")
    w.ask("drain", "n0")
    w.tick()
    w.tick()
    assert not w.state.lost_steps
    assert w.state.group("actor/0").phase is P.FENCING
    w.deaf.clear()
    w.ports_open.clear()
    w.heal(lambda: w.state.group("actor/0").phase is P.READY)
    assert group(w, "actor/0").nodes == ("n4", "n1")


def test_an_operator_can_drain_a_node_on_which_a_group_waits_for_its_time() -> None:
    w = new(spares=0)
    for _ in range(2):
        w.heal(lambda: w.state.group("actor/0").phase is P.READY)
        w.kill("actor/0", 0)
        w.tick()
    w.heal(lambda: w.state.group("actor/0").phase is P.BACKOFF)
    w.ask("drain", "n1")
    w.tick()
    assert w.state.group("actor/0").phase is P.PENDING
    w.ask("resume", "n1")
    w.heal(lambda: w.state.group("actor/0").phase is P.READY)


def test_the_next_coordinator_knows_where_groups_are_now() -> None:
    w = new()
    lose(w, "actor/0", "n1")
    go_on(w, w.plan.lost_after_s + 10)
    w.restart()
    w.tick()
    assert group(w, "actor/0").nodes == ("n0", "n4")
    assert w.state.node("n1").excluded is Exclusion.LOST
    w.kill("actor/0", 0)
    w.heal(lambda: w.state.group("actor/0").phase is P.READY)
    assert w.actions(Launch)[-1].nodes == ("n0", "n4")


def test_a_fleet_that_is_well_asks_nothing_of_nodes() -> None:
    w = new()
    w.kill("actor/0", 0)
    w.heal(lambda: w.state.group("actor/0").phase is P.READY)
    go_on(w, 30)
    assert not any(d.wants.nodes or d.wants.reach for d in w.decisions)


def test_groups_that_share_a_lost_node_go_where_their_gpus_are_free() -> None:
    w = World(shared())
    w.make_ready()
    w.words["n0"] = NodeWord.DOWN
    for name in ("actor/0", "actor/1"):
        lose_one(w, name)
    go_on(w, 10)
    assert [group(w, f"actor/{i}").nodes for i in range(3)] == [("n2",), ("n1",), ("n1",)]
    assert urls(w, "actor/0") != urls(w, "actor/1")
    assert w.phases() == {P.READY}


def test_a_sweep_of_before_a_move_is_no_step_of_the_group_any_more() -> None:
    """Its srun runs on for a while, and ends at last: neither may hold up the fence elsewhere."""
    w = new()
    w.kill("actor/0", 1)
    w.ports_open["actor/0"] = ("n1:18000",)
    w.run_until(lambda: any(s.sweep for s in w.state.group("actor/0").steps), after_s=0.2)
    w.cut.add("n1")
    w.words["n1"] = NodeWord.DOWN
    w.ask("drain", "n1")
    w.run_until(lambda: bool(w.events("moved")), after_s=0.2)
    assert w.state.group("actor/0").phase is P.FENCING
    sweep = w.steps["actor/0", 1, "n1", True]
    w.ports_open.clear()
    w.list_steps()
    for process in (Process.RUNNING, Process.EXITED):
        obs = w.observe()
        lingers = replace(sweep, process=process, exit=None, exited_at=w.now - 1)
        groups = tuple(replace(g, steps=(*g.steps, lingers)) if g.id == "actor/0" else g for g in obs.groups)
        after = decide(w.plan, w.state, replace(obs, groups=groups)).state
        assert after.group("actor/0").phase is not P.FENCING


def test_a_spare_that_was_down_when_slurm_was_last_asked_is_asked_about_again() -> None:
    w = new(1)
    w.words |= {"n1": NodeWord.GONE, "n2": NodeWord.DOWN}
    w.cut.add("n1")
    w.orphans.add(("actor/0", 1, "n1", False))
    w.kill("actor/0", 0)
    go_on(w, 10)
    assert w.state.group("actor/0").phase is P.PENDING
    assert w.state.phase is PoolPhase.WAITING, "n2 may come up again"
    del w.words["n2"]
    go_on(w, 70)
    assert w.state.group("actor/0").phase is P.READY
    assert group(w, "actor/0").nodes == ("n0", "n2")


def two_that_wait() -> World:
    """Two groups of two nodes, one lost of each, and no spare: one of them can run on what is left."""
    w = new(spares=0)
    for name, node in (("actor/0", "n1"), ("actor/1", "n3")):
        w.words[node] = NodeWord.DOWN
        w.cut.add(node)
        w.orphans.add((name, 1, node, False))
        w.kill(name, 0)
    go_on(w, 20)
    return w


def test_groups_that_wait_do_not_keep_their_other_nodes_from_one_another() -> None:
    w = two_that_wait()
    assert [g.phase for g in w.state.groups] == [P.PENDING, P.READY]
    assert group(w, "actor/1").nodes == ("n2", "n0")
    assert "n0 is used by another group; n1 is lost" in w.state.group("actor/0").message
    w.words.clear()
    w.cut.clear()
    go_on(w, 60)
    assert w.phases() == {P.READY}
    assert set(group(w, "actor/0").nodes) == {"n1", "n3"}
    assert group(w, "actor/1").nodes == ("n2", "n0")


def test_a_group_that_was_stopped_while_it_waited_takes_nobodys_node_when_it_is_resumed() -> None:
    w = two_that_wait()
    w.ask("drain", "actor/0")
    go_on(w, 1)
    assert w.state.group("actor/0").phase is P.STOPPED
    w.kill("actor/1", 0)
    go_on(w, 10)
    assert w.state.group("actor/1").phase is P.READY, "who is stopped is in nobody's way"
    w.ask("resume", "n1", "n3")
    w.cut.clear()
    w.words.clear()
    w.ask("resume", "actor/0")
    go_on(w, 60)
    assert w.phases() == {P.READY}
    assert not set(group(w, "actor/0").nodes) & set(group(w, "actor/1").nodes)


def test_groups_that_share_a_node_are_one_witness() -> None:
    """Two of three groups time out, on one node of two: that is the node, not the coordinator's own network."""
    w = World(shared())
    w.make_ready()
    for name in ("actor/0", "actor/1"):
        w.probe(name, 0, failures=9, last_error="no answer", answers=False)
    w.tick()
    assert w.state.suspect_self_since is None
    assert [w.state.group(f"actor/{i}").phase for i in range(3)] == [P.STOPPING, P.STOPPING, P.READY]


def lose_one(w: World, name: str) -> None:
    w.cut.add("n0")
    w.orphans.add((name, w.state.group(name).incarnation, "n0", False))
    w.probe(name, 0, failures=9, last_error="no answer")
    w.tick()


def shared() -> Any:
    """Three groups of half a node: two on n0, one on n1; n2 is spare."""
    plan = make_plan(3, 1)
    halves = [("n0", (0, 1), 18000), ("n0", (2, 3), 18016), ("n1", (0, 1), 18000)]
    groups = tuple(
        replace(
            g,
            members=(
                replace(
                    g.members[0],
                    node=node,
                    gpus=gpus,
                    url=f"http://{node}:{port}",
                    ports={"http": port, "master": port + 1},
                ),
            ),
            addresses={node: node},
            cpus_per_step={node: 1},
            gpus_per_step={node: 4},
            shares_nodes=True,
        )
        for g, (node, gpus, port) in zip(plan.groups, halves, strict=True)
    )
    hosts = {n: replace(h, gpus=4) for n, h in plan.hosts.items()}
    return replace(plan, pools=(replace(plan.pools[0], groups=groups),), spares=("n2",), hosts=hosts)


def test_gpus_that_are_taken_are_no_room() -> None:
    plan = shared()
    taken = replace(plan.group("actor/2").members[0], gpus=(0, 1))
    assert taken.gpus == (0, 1)
    w = World(replace(plan, nodes=("n0", "n1"), spares=(), hosts={n: plan.hosts[n] for n in ("n0", "n1")}))
    w.make_ready()
    w.words["n0"] = NodeWord.DOWN
    for name in ("actor/0", "actor/1"):
        lose_one(w, name)
    go_on(w, 10)
    # n1 has the GPUs 2 and 3 free: room for the second group's share, none for the first one's.
    assert w.state.group("actor/0").phase is P.PENDING
    assert group(w, "actor/1").nodes == ("n1",)
    assert urls(w, "actor/1") == ["http://n1:18016"]


@pytest.mark.parametrize("verb", ["restart", "explode"])
def test_other_wishes_about_nodes_are_refused(verb: str) -> None:
    w = new()
    w.ask(verb, "n1")
    w.tick()
    assert w.events("request_refused")
    assert not w.state.nodes
