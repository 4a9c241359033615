"""Nodes that are not as they should be: lost, back, draining, failing. Pure.

Connections that time out lead; Slurm's verdict follows, up to SlurmdTimeout later. A node is only given up while a step
on it does not end: whoever can end its engines needs no verdict about the node. And never because of what many nodes
have in common: when several fall silent at once, we are the suspect, and only Slurm's word about each of them counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from slurm_rollout.core import moves
from slurm_rollout.core.group import ASK_NODES_S
from slurm_rollout.core.model import (
    CancelLost,
    Event,
    Exclusion,
    LostStep,
    NodeState,
    NodeWord,
    Observation,
    RunState,
)
from slurm_rollout.core.phases import ALIVE, Phase
from slurm_rollout.core.plan import FleetPlan

ASK_RARELY_S = 60.0
"""Pause between two questions to Slurm about nodes while a group waits for one."""

REPEAT_S = 5.0
"""A lost step that is listed while its node answers is cancelled again after this long."""

_GIVEN_UP = (NodeWord.DOWN, NodeWord.GONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What makes a node a suspect."""

    since: float
    step_lives: bool  # a step there does not end; else one failed to start, or ended without a word


@dataclass(slots=True)
class Wants:
    """What is to be found out about nodes, and done about steps that were left on lost ones."""

    nodes: bool = False
    reach: frozenset[str] = frozenset()
    listing: bool = False
    cancel: CancelLost | None = None
    wake_at: float | None = None


def heed(
    plan: FleetPlan,
    run: RunState,
    obs: Observation,
    suspects: Mapping[str, Trouble],
    doubted: Collection[str],
    events: list[Event],
) -> tuple[RunState, Wants]:
    """Take in what was seen of nodes.

    Args:
        suspects: nodes with a step that does not end, or that did not start.
        doubted: nodes whose engines time out while the coordinator suspects itself: `silent_alone` tells which it is.
    """
    wants = Wants()
    draining = {n.name for n in obs.nodes if n.word is NodeWord.DRAINING}
    concerned = draining.union(suspects, (n.name for n in run.nodes))
    for name in (n for n in plan.nodes if n in concerned):
        after = _drained(obs, run.node(name), events)
        if name in suspects and not _is_given_up(after):
            why = _verdict(plan, run, obs, name, suspects[name])
            after = after if why is None else exclude(obs, after, *why, events)
        if after.excluded is Exclusion.LOST and obs.node(name).word is NodeWord.GONE:
            after = replace(after, excluded=Exclusion.GONE, message=f"Slurm took it out of the job: {after.message}")
        run = remember(run, after)
    run = _watch_lost(run, obs, wants, events)
    _find_out(plan, run, obs, {*suspects, *doubted}, wants)
    return run, wants


def silent_alone(plan: FleetPlan, run: RunState, obs: Observation, name: str, since: float) -> bool:
    """Tell whether a node is silent since then, while every other one answers, and Slurm: the fault is not ours."""
    seen = obs.node(name)
    slurm_answered = run.blind_since is None and seen.asked_at is not None and seen.asked_at >= since
    return slurm_answered and seen.silent_s >= plan.lost_after_s and _others_answer(plan, run, obs, name)


def _others_answer(plan: FleetPlan, run: RunState, obs: Observation, name: str) -> bool:
    others = [obs.node(n) for n in plan.nodes if n != name and not run.node(n).excluded]
    answering = [n for n in others if n.answered_at is not None and obs.now - n.answered_at < plan.lost_after_s]
    return bool(answering) and not any(n.silent_s for n in others)


def _is_given_up(node: NodeState) -> bool:
    return node.excluded in moves.GIVEN_UP and not node.back


def remember(run: RunState, node: NodeState) -> RunState:
    """Return `run` with this said of the node; nothing is kept of one that is as it should be."""
    if node == run.node(node.name):
        return run
    others = tuple(n for n in run.nodes if n.name != node.name)
    return replace(run, nodes=others if node == NodeState(name=node.name) else (*others, node))


def exclude(obs: Observation, node: NodeState, why: Exclusion, message: str, events: list[Event]) -> NodeState:
    """Return the node as one on which nothing is started any more."""
    events.append(Event(type="node_excluded", node=node.name, reason=why, message=message))
    return replace(node, excluded=why, message=message, since=obs.now, since_wall=obs.wall, back=False, failures=0)


def lost(run: RunState) -> frozenset[str]:
    """Return the nodes whose steps cannot be ended, and are not waited for."""
    return frozenset(n.name for n in run.nodes if _is_given_up(n))


def count_failures(
    plan: FleetPlan, run: RunState, obs: Observation, failed: Iterable[str], fine: Iterable[str], events: list[Event]
) -> RunState:
    """Count launches and checks that failed on a node, and exclude one on which that is no chance any more.

    Only where a group is alive elsewhere, and where whoever leaves it has a place to go: what fails everywhere is no
    fault of a node, and burns no spare.
    """
    for name in dict.fromkeys(fine):
        if run.node(name).failures:
            run = remember(run, replace(run.node(name), failures=0))
    for name in (n for n in dict.fromkeys(failed) if not obs.node(n).silent_s):  # that is another verdict
        node = replace(run.node(name), failures=run.node(name).failures + 1)
        here = [g for g in plan.groups if name in g.nodes]
        others_live = any(g.phase in ALIVE and name not in plan.group(g.id).nodes for g in run.groups)
        room = all(moves.has_room(plan, run, obs, g, {name} | moves.excluded(run)) for g in here)
        if node.failures >= plan.max_node_failures and not node.excluded and others_live and room:
            message = f"{node.failures} launches or checks in a row failed on it"
            node = exclude(obs, node, Exclusion.FAILING, message, events)
        run = remember(run, node)
    return run


def exclude_broken(
    plan: FleetPlan, run: RunState, obs: Observation, broken: Iterable[str], events: list[Event]
) -> RunState:
    """Exclude nodes whose GPUs broke, and charge that to nobody, where their groups have another place to go."""
    for name in dict.fromkeys(broken):
        here = {g.id: g for g in plan.groups if name in g.nodes}
        if run.node(name).excluded or not all(
            moves.has_room(plan, run, obs, g, {name} | moves.excluded(run)) for g in here.values()
        ):
            continue
        why = next((g.failure.message for g in run.groups if g.failure and g.failure.node == name), "")
        run = remember(run, exclude(obs, run.node(name), Exclusion.FAILING, why, events))
        groups = tuple(
            replace(g, charge=None, goes_to=Phase.FENCING, not_before=0.0, node_failures=g.node_failures + 1)
            if g.charge is not None and g.charge.node == name
            else g
            for g in run.groups
        )
        run = replace(run, groups=groups)
    return run


def _drained(obs: Observation, node: NodeState, events: list[Event]) -> NodeState:
    seen = obs.node(node.name)
    if seen.word is NodeWord.DRAINING:
        reason = seen.reason or "no reason given"
        if reason != node.draining:
            message = f"Slurm drains it: {reason}. What runs there goes on; it is the last choice for a move"
            events.append(Event(type="node_draining", node=node.name, reason="draining", message=message))
        return replace(node, draining=reason)
    return replace(node, draining="") if seen.word is NodeWord.UP and node.draining else node


def _verdict(
    plan: FleetPlan, run: RunState, obs: Observation, name: str, trouble: Trouble
) -> tuple[Exclusion, str] | None:
    """Say whether a suspect is to be given up, and why."""
    seen, since = obs.node(name), trouble.since
    asked = seen.asked_at is not None and seen.asked_at >= since
    if asked and seen.word in _GIVEN_UP:
        gone = seen.word is NodeWord.GONE
        said = "is not in the job any more" if gone else f"is down ({seen.reason or 'no reason given'})"
        return (Exclusion.GONE if gone else Exclusion.LOST), f"Slurm says that it {said}"
    if run.blind_since is not None:
        return None  # a controller that is silent, too: the fault is more likely ours
    if seen.silent_s >= plan.lost_after_s:
        what = "its step does not end" if trouble.step_lives else "no step starts there"
        silent = f"no answer from it for {seen.silent_s:.0f} s, and {what}"
        if asked and seen.word is NodeWord.SILENT:
            return Exclusion.LOST, f"{silent}; Slurm does not hear it either"
        return (Exclusion.LOST, silent) if _others_answer(plan, run, obs, name) else None
    if not trouble.step_lives:
        return None
    here = [g for g in plan.groups if name in g.nodes]
    limit_s = max((plan.pool(g.pool).fence.timeout_s for g in here), default=0.0)
    listed = obs.listing is not None and obs.listing.asked_at > since
    answers = seen.answered_at is not None and seen.answered_at >= since and not seen.silent_s
    if obs.now - since < limit_s or not listed or not answers:
        return None
    if not all(moves.has_room(plan, run, obs, g, {name} | moves.excluded(run)) for g in here):
        return None
    return Exclusion.STUCK, f"a step on it does not end, {limit_s:g} s after it was cancelled"


def _watch_lost(run: RunState, obs: Observation, wants: Wants, events: list[Event]) -> RunState:
    """Cancel what still lives on nodes that answer again, and say which of them are empty."""
    answering = {n.name for n in run.nodes if n.excluded and _answers(obs, n)}
    kept, again = [], []
    for step in run.lost_steps:
        if step.node in answering:
            if _is_proved_gone(step, obs):
                continue
            pause_s = ASK_RARELY_S if run.node(step.node).excluded is Exclusion.STUCK else REPEAT_S
            if step.cancel_sent_at is None or obs.now - step.cancel_sent_at >= pause_s:
                step = replace(step, cancel_sent_at=obs.now)
                again.append(step)
            elif obs.listing is None or obs.listing.asked_at <= step.cancel_sent_at:
                wants.listing = True
        elif step.cancel_sent_at is not None:
            step = replace(step, cancel_sent_at=None)
        kept.append(step)
    if again:
        wants.cancel = CancelLost(steps=tuple(again))
    run = replace(run, lost_steps=tuple(kept)) if tuple(kept) != run.lost_steps else run
    left_on = {s.node for s in run.lost_steps}
    for node in run.nodes:
        if _is_given_up(node) and node.excluded is not Exclusion.GONE:
            up = obs.node(node.name).word in (NodeWord.UP, NodeWord.DRAINING)
            if node.name in answering and node.name not in left_on and up:
                if node.drained:
                    message = f"it answers again, and no step of before is left on it; {node.drained}"
                    events.append(Event(type="node_back", node=node.name, reason=Exclusion.DRAINED, message=message))
                    run = remember(run, replace(node, excluded=Exclusion.DRAINED, message=node.drained))
                    continue
                message = "it answers again, and no step of before is left on it: used again where no other is free"
                events.append(Event(type="node_back", node=node.name, reason=node.excluded, message=message))
                run = remember(run, replace(node, back=True))
        elif node.back and obs.node(node.name).silent_s:
            run = remember(run, replace(node, back=False))
    return run


def _is_proved_gone(step: LostStep, obs: Observation) -> bool:
    """Tell whether Slurm, asked after the step was cancelled on a node that answers, does not list it."""
    listing = obs.listing
    if step.cancel_sent_at is None or listing is None or listing.asked_at <= step.cancel_sent_at:
        return False
    return step.name not in listing.names


def _answers(obs: Observation, node: NodeState) -> bool:
    seen = obs.node(node.name)
    return seen.answered_at is not None and seen.answered_at > node.since and not seen.silent_s


def _find_out(plan: FleetPlan, run: RunState, obs: Observation, suspects: Collection[str], wants: Wants) -> None:
    """Ask for what the next verdict needs; a fleet that is well asks for nothing."""
    trying = {n for n in suspects if not _is_given_up(run.node(n))}
    pending = [n for n in run.nodes if n.excluded in (Exclusion.LOST, Exclusion.STUCK)]
    homeless = any(moves.waits_for_a_node(g) for g in run.groups)
    if not (trying or pending or homeless):
        return
    wants.reach = frozenset(plan.nodes) if trying else frozenset(n.name for n in pending)
    wants.wake_at = obs.now + (1.0 if trying else REPEAT_S)
    returning = any(not n.back and _answers(obs, n) for n in pending)
    asked_at = max((n.asked_at for n in obs.nodes if n.asked_at is not None), default=None)
    pause_s = ASK_NODES_S if trying or returning else ASK_RARELY_S
    if (trying or returning or homeless) and (asked_at is None or obs.now - asked_at >= pause_s):
        wants.nodes = True
