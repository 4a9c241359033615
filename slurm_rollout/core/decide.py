"""`decide`: the whole run, from its state and one observation to the next state and what to do about it. Pure.

Deterministic, total, and idempotent: with nothing new in the observation, deciding again asks for nothing new.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from slurm_rollout.core import barrier_rules, clients, moves, nodes, restart
from slurm_rollout.core.group import WORDLESS, Context, Out, advance, ended, has_living_steps, stop, to
from slurm_rollout.core.model import (
    Action,
    Decision,
    Event,
    Exclusion,
    GroupObservation,
    GroupState,
    Job,
    Marks,
    NodeState,
    Observation,
    Process,
    Request,
    RunState,
    StepState,
    Wants,
)
from slurm_rollout.core.phases import ALIVE, Phase, Reason
from slurm_rollout.core.plan import FleetPlan


def decide(plan: FleetPlan, run: RunState, obs: Observation) -> Decision:
    """Return what `run` becomes in view of `obs`, and the actions, events and questions that follow.

    `plan` is the one that the run began with, whatever moved since.
    """
    first_plan, plan = plan, moves.placed(plan, run)
    events: list[Event] = []
    run = _heed(plan, run, obs, events)
    run = clients.heed(plan, run, obs, events)
    run = _note_blindness(run, obs, events)
    contexts = _contexts(plan, run, obs)
    doubted = _doubted(run, contexts)
    run, wants = nodes.heed(plan, run, obs, _suspects(run, contexts, obs), doubted, events)
    if run.suspect_self_since is not None:
        since = run.suspect_self_since
        silent = frozenset(n for n in doubted if nodes.silent_alone(plan, run, obs, n, since))
        contexts = {name: replace(c, silent=silent) for name, c in contexts.items()}
    if run.nodes:
        lost, excluded = nodes.lost(run), moves.excluded(run)
        contexts = {name: replace(c, lost=lost, excluded=excluded) for name, c in contexts.items()}

    actions: list[Action] = [] if wants.cancel is None else [wants.cancel]
    ports, want_listing, want_job, want_nodes = [], wants.listing, False, wants.nodes
    lost_steps, failed_on, broken, fine_on = list(run.lost_steps), [], [], []
    wake_at = wants.wake_at
    groups = []
    for before in run.groups:
        ctx, out = contexts[before.id], Out()
        steps = _with_pids(before.steps, ctx.seen)
        g = before if steps is before.steps else replace(before, steps=steps)
        if run.ending:
            g = _end_group(ctx, run, g)
        g = advance(ctx, g, out)
        groups.append(g)
        actions += out.actions
        events += out.events
        want_listing |= out.want_listing
        want_job |= out.want_job
        want_nodes |= out.want_nodes
        lost_steps += out.lost_steps
        failed_on += out.failed_on
        broken += out.broken
        fine_on += out.fine_on
        if out.want_ports and g.phase is Phase.FENCING:
            ports.append(g.id)
        if out.wake_at is not None:
            wake_at = out.wake_at if wake_at is None else min(wake_at, out.wake_at)

    after = replace(run, groups=tuple(groups), lost_steps=tuple(lost_steps))
    after = _suspect_self(after, contexts, obs, events)
    after = nodes.count_failures(plan, after, obs, failed_on, fine_on, events)
    after = nodes.exclude_broken(plan, after, obs, broken, events)
    settled = moves.settle(first_plan, after, obs, events)
    if settled is not after:  # who moved, or waits no longer, goes on at once
        after, wake_at = settled, obs.now
    after = clients.answer(plan, after, obs, events)
    for at in clients.next_change_at(plan, after):
        if at > obs.now:
            wake_at = at if wake_at is None else min(wake_at, at)
    after = barrier_rules.publish(plan, after, obs.now)
    if after.epoch != run.epoch:
        serving = ", ".join(f"{g} (incarnation {n})" for g, n in after.serving) or "nothing"
        events.append(Event(type="epoch", message=f"epoch {after.epoch}: {serving}", data={"epoch": after.epoch}))
    return Decision(
        state=after,
        actions=tuple(actions),
        events=tuple(events),
        wants=Wants(
            ports=tuple(ports), listing=want_listing, job=want_job, nodes=want_nodes, reach=tuple(sorted(wants.reach))
        ),
        wake_at=wake_at,
    )


def is_over(run: RunState) -> bool:
    """Tell whether the run is drained: it was to end, and every step was seen ended."""
    return bool(run.ending) and all(g.phase is Phase.STOPPED for g in run.groups)


# --------------------------------------------------------------------------------------------------- signals, requests


def _heed(plan: FleetPlan, run: RunState, obs: Observation, events: list[Event]) -> RunState:
    """Take in what people and Slurm want of the run as a whole, then the requests about groups."""
    ending, message = Reason.NONE, ""
    time_is_up = obs.job_ends_at is not None and obs.now >= obs.job_ends_at
    if obs.stop_signal and (obs.end_is_near or time_is_up):
        ending, message = Reason.JOB_ENDING, "the job's time is up" if time_is_up else "warned of the job's end"
    elif obs.stop_signal:
        ending, message = Reason.RUN_ENDING, "told to end"
    elif obs.job is Job.ENDING:
        ending, message = Reason.JOB_ENDING, "Slurm is ending the job"
    for request in obs.requests:
        if request.verb == "stop":
            events.append(_answer(request, "request", "the run is ending"))
            ending, message = ending or Reason.OPERATOR, f"stop, asked by {request.who or 'somebody'}"
        else:
            run = _heed_request(plan, run, obs, request, events)
    if ending and not run.ending:
        events.append(Event(type="ending", reason=ending, message=message))
        run = replace(run, ending=ending, ending_at=obs.now)
    return run


def _answer(request: Request, type_: str, message: str) -> Event:
    return Event(type=type_, message=message, data={"id": request.id, "verb": request.verb, "who": request.who})


def _heed_request(plan: FleetPlan, run: RunState, obs: Observation, request: Request, events: list[Event]) -> RunState:
    known = {g.id for g in run.groups}
    unknown = [g for g in request.groups if g not in known]
    if request.verb not in ("restart", "drain", "resume"):
        events.append(_answer(request, "request_refused", f"unknown verb {request.verb!r}"))
        return run
    if request.groups and all(name in plan.nodes for name in request.groups):
        return _heed_node_request(plan, run, obs, request, events)
    if unknown or not request.groups:
        said = f"no group and no node {', '.join(unknown)}" if unknown else "no group named"
        events.append(_answer(request, "request_refused", f"{said}; groups: {', '.join(sorted(known))}"))
        return run
    if run.ending:
        events.append(_answer(request, "request_refused", "the run is ending"))
        return run
    contexts = _contexts(plan, run, obs)
    groups = []
    for g in run.groups:
        if g.id in request.groups:
            if g.phase is Phase.DRAINING and request.verb != "drain":
                events.append(_answer(request, "request_refused", f"{g.id}: is draining: ask again when it is stopped"))
            else:
                g, said = _obey(contexts[g.id], g, request)
                events.append(_answer(request, "request", f"{g.id}: {said}"))
        groups.append(g)
    return replace(run, groups=tuple(groups))


def _heed_node_request(
    plan: FleetPlan, run: RunState, obs: Observation, request: Request, events: list[Event]
) -> RunState:
    """`drain NODE`: nothing is started there any more, and what runs there moves. `resume NODE`: it is used again."""
    by = f"{request.verb}, asked by {request.who or 'somebody'}"
    if request.verb == "restart" or run.ending:
        why = "the run is ending" if run.ending else "a node cannot be restarted: name a group, or drain the node"
        events.append(_answer(request, "request_refused", why))
        return run
    for name in request.groups:
        node = run.node(name)
        if request.verb == "resume":
            left = [s.name for s in run.lost_steps if s.node == name]
            said = f"is used again (it was {node.excluded})" if node.excluded else "is in use already: nothing to do"
            if node.excluded is Exclusion.GONE:
                said = "is not in the job any more, and cannot be used again in this one: nothing to do"
            elif left:
                run = nodes.remember(run, replace(node, drained=""))
                said = f"is used again once {', '.join(left)} has ended there, which is tried as soon as it answers"
            elif node.excluded:
                run = nodes.remember(run, NodeState(name=name, draining=node.draining))
        elif node.excluded in moves.GIVEN_UP and not node.back:
            run = nodes.remember(run, replace(node, drained=by))
            said = f"is excluded already ({node.message}), and is not used again by itself"
        elif node.excluded and not node.back:
            run = nodes.remember(run, replace(node, drained=by))
            said = f"is excluded already: {node.message}"
        else:
            run = nodes.remember(run, nodes.exclude(obs, replace(node, drained=by), Exclusion.DRAINED, by, events))
            run, moved = _vacate(plan, run, obs, name, by)
            said = f"is not used any more; {', '.join(moved) or 'no group'} moves away from it"
        events.append(_answer(request, "request", f"{name}: {said}"))
    return run


def _vacate(plan: FleetPlan, run: RunState, obs: Observation, node: str, by: str) -> tuple[RunState, list[str]]:
    contexts, groups, moved = _contexts(plan, run, obs), [], []
    for g in run.groups:
        if node in plan.group(g.id).nodes and g.phase in (Phase.READY, Phase.UNREADY, Phase.STARTING):
            g = stop(contexts[g.id], g, Reason.OPERATOR, by, drain=False)
            moved.append(g.id)
        groups.append(g)
    return replace(run, groups=tuple(groups)), moved


def _obey(ctx: Context, g: GroupState, request: Request) -> tuple[GroupState, str]:
    """Return the group after one operator's request, and the answer to it."""
    by = f"{request.verb}, asked by {request.who or 'somebody'}"
    if request.verb == "drain":
        if g.phase in (Phase.DRAINING, Phase.STOPPED):
            return g, f"is {g.phase} already"
        if g.phase is Phase.STOPPING:
            return to(ctx, g, Phase.DRAINING, Reason.OPERATOR, by, charge=None), "drains"
        return stop(ctx, g, Reason.OPERATOR, by, drain=True), "drains"
    if g.phase in (Phase.FAILED, Phase.STOPPED):
        fresh = replace(g, runtime_failures=(), start_failures=(), disk_failures=())
        g = replace(fresh, charge=None, not_before=ctx.obs.now, marks=Marks())
        return to(ctx, g, Phase.FENCING, Reason.OPERATOR, by), "starts again, with a fresh budget"
    if g.phase is Phase.BACKOFF:
        if ctx.too_late:
            return g, f"does not start: {ctx.too_late}"
        return replace(g, not_before=ctx.obs.now), "starts without waiting"
    if request.verb == "restart" and g.phase in (Phase.READY, Phase.UNREADY, Phase.STARTING):
        if ctx.too_late:
            return g, f"is left as it is: {ctx.too_late}"
        return stop(ctx, g, Reason.OPERATOR, by, drain=False), "restarts"
    return g, f"is {g.phase} already: nothing to do"


def _end_group(ctx: Context, run: RunState, g: GroupState) -> GroupState:
    if g.phase in (Phase.STOPPED, Phase.DRAINING):
        return g
    if g.phase is Phase.STOPPING:
        return to(ctx, g, Phase.DRAINING, run.ending, "the run is ending", charge=None)
    return stop(ctx, g, run.ending, "the run is ending", drain=True)


# ---------------------------------------------------------------------------------------------------------- whole fleet


def _contexts(plan: FleetPlan, run: RunState, obs: Observation) -> dict[str, Context]:
    """Return each group's context. Facts of another incarnation than the group's own are left out; so are sweeps of
    before it moved, whose sruns may linger."""
    observed = {g.id: g for g in obs.groups}
    seen = {}
    for g in run.groups:
        found = observed.get(g.id)
        if found is None or found.incarnation != g.incarnation:
            found = GroupObservation(id=g.id, incarnation=g.incarnation)
        elif g.places:
            nodes_now = plan.group(g.id).nodes
            found = replace(found, steps=tuple(s for s in found.steps if s.node in nodes_now))
        seen[g.id] = found
    living = {g.id for g in run.groups if has_living_steps(seen[g.id])}
    suspect = _most_time_out(plan, run, seen)
    kept = {p.name: clients.keeps_from_starting(plan, run, p, obs.now) for p in plan.pools}
    late = {p.name: restart.too_late(p, run, now=obs.now, job_ends_at=obs.job_ends_at) for p in plan.pools}
    return {
        group.id: Context(
            plan=plan,
            pool=pool,
            group=group,
            obs=obs,
            seen=seen[group.id],
            others_live=bool(living - {group.id}),
            ask_agents=suspect,
            kept=kept[pool.name],
            too_late=late[pool.name],
        )
        for pool in plan.pools
        for group in pool.groups
    }


def _suspects(run: RunState, contexts: Mapping[str, Context], obs: Observation) -> dict[str, nodes.Trouble]:
    """Return the nodes with a step that does not end although it was told to, or of which one just ended wordless."""
    found: dict[str, nodes.Trouble] = {}
    for g in run.groups:
        ctx = contexts[g.id]
        sent_at = g.stop_sent_at
        if sent_at is not None and obs.now >= sent_at + ctx.pool.stop.grace_s + ctx.pool.stop.cancel_after_s:
            for step in ctx.seen.steps:
                if ended(ctx, g, step) is not True:
                    since = sent_at if step.exited_at is None else min(sent_at, step.exited_at)
                    if (known := found.get(step.node)) is not None and known.step_lives:
                        since = min(since, known.since)
                    found[step.node] = nodes.Trouble(since=since, step_lives=True)
        charge = g.charge
        waits = g.phase in (Phase.FENCING, Phase.BACKOFF) or (g.phase is Phase.STOPPING and g.goes_to is Phase.FAILED)
        if waits and charge is not None and charge.reason in WORDLESS:
            found.setdefault(charge.node, nodes.Trouble(since=charge.at, step_lives=False))
    found.pop("", None)
    return found


def _doubted(run: RunState, contexts: Mapping[str, Context]) -> frozenset[str]:
    """Return the nodes whose engines would be given up if the coordinator did not suspect itself."""
    if run.suspect_self_since is None:
        return frozenset()
    return frozenset(
        contexts[g.id].group.members[e.rank].node
        for g in run.groups
        if g.phase in ALIVE
        for e in contexts[g.id].seen.endpoints
        if e.failures >= contexts[g.id].pool.probe.liveness_failure_threshold
    )


def _most_time_out(plan: FleetPlan, run: RunState, seen: dict[str, GroupObservation]) -> bool:
    """Tell whether more than half of the groups whose steps all run time out: then we are the suspect, not they.

    A step that ended convicts its own group and nobody else: others may time out because we are cut off from them.
    A group that is asked nothing, or was not asked since, says nothing of that.

    While it holds anybody back, a suspicion lasts until nobody times out: the restart of a group that its own agent
    gave up must not convict the others.
    """
    alive = [seen[g.id] for g in run.groups if g.phase in ALIVE]
    whole = [g for g in alive if all(s.exit is None and s.process is Process.RUNNING for s in g.steps)]
    late = [g for g in whole if any(e.failures and not e.refusals for e in g.endpoints)]
    heard = [
        g
        for g in whole
        if g not in late
        and plan.pool_of(g.id).name not in run.paused
        and any(e.answers or e.refusals for e in g.endpoints)
    ]
    # Groups that share a node are one witness: they are cut off together.
    places_late, places_heard = ({plan.group(g.id).nodes for g in groups} for groups in (late, heard))
    return bool(late) and (len(places_late) > len(places_heard) or run.suspect_self_since is not None)


def _suspect_self(run: RunState, contexts: dict[str, Context], obs: Observation, events: list[Event]) -> RunState:
    """Note whether a suspicion holds anybody back: `run` is what was decided, so who is past the threshold is alive."""
    over = [
        e.failures - contexts[g.id].pool.probe.liveness_failure_threshold
        for g in run.groups
        if g.phase in ALIVE
        for e in contexts[g.id].seen.endpoints
    ]
    if not any(o >= 0 for o in over):
        if run.suspect_self_since is not None and run.suspect_self_told:
            events.append(Event(type="sighted", reason="probes", message="probes are believed again"))
        return run if run.suspect_self_since is None else replace(run, suspect_self_since=None, suspect_self_told=False)
    if run.suspect_self_since is None:
        run = replace(run, suspect_self_since=obs.now, suspect_self_told=False)
    # The agents look as often as we do, but not at the same moment: they get one more period to agree.
    if not run.suspect_self_told and any(o > 0 for o in over):
        message = "most groups time out at once: only what their own agents see too counts as a failure"
        events.append(Event(type="blind", reason="probes", message=message))
        run = replace(run, suspect_self_told=True)
    return run


def _note_blindness(run: RunState, obs: Observation, events: list[Event]) -> RunState:
    answered = obs.listing.asked_at if obs.listing is not None else None
    failed = obs.listing_failed_at
    blind = failed is not None and (answered is None or failed > answered)
    if blind and run.blind_since is None:
        message = "Slurm does not answer: running engines are left alone, what needs it waits"
        events.append(Event(type="blind", reason="slurm", message=message))
        return replace(run, blind_since=obs.now if obs.unanswered_asked_at is None else obs.unanswered_asked_at)
    if not blind and run.blind_since is not None:
        events.append(Event(type="sighted", reason="slurm", message="Slurm answers again"))
        return replace(run, blind_since=None)
    return run


def _with_pids(steps: tuple[StepState, ...], seen: GroupObservation) -> tuple[StepState, ...]:
    """Remember which process holds each step, for the next coordinator."""
    if all(s.pid is not None for s in steps):
        return steps
    found = {(s.node, s.sweep): s for s in seen.steps if s.pid is not None}
    return tuple(
        replace(s, pid=found[s.node, s.sweep].pid, pid_started=found[s.node, s.sweep].pid_started)
        if s.pid is None and (s.node, s.sweep) in found
        else s
        for s in steps
    )
