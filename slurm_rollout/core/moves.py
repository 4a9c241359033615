"""Groups that leave a node: where they are now, and where they can go. Pure.

The plan says where every group was placed at first, and does not change. A group that moved carries its own places; all
that is decided and done looks at `placed`, the plan as it stands now.

Only what was on a node that is not used any more gets another node and, where another group has them there, other
ports. A group of which a step was left on a lost node gets a new master port too, or that old rank could join the new
rendezvous; so do the ports that it had there, should it ever come back to that node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from slurm_rollout.core.model import (
    Event,
    Exclusion,
    GroupState,
    NodeWord,
    Observation,
    Place,
    RunState,
)
from slurm_rollout.core.phases import Phase, Reason, check_transition
from slurm_rollout.core.plan import FleetPlan, GroupPlan, Member
from slurm_rollout.core.ports import HIGHEST, HTTP, MASTER

GIVEN_UP = frozenset({Exclusion.LOST, Exclusion.GONE, Exclusion.STUCK})
"""Why the steps on a node are not waited for."""

_HOMELESS = frozenset({Phase.PENDING, Phase.FENCING, Phase.BACKOFF})
"""Phases in which nothing of a group lives, so that it can move."""


def placed(plan: FleetPlan, run: RunState) -> FleetPlan:
    """Return the plan with every group where it is now."""
    moved = {g.id: g.places for g in run.groups if g.places}
    if not moved:
        return plan
    pools = tuple(
        replace(p, groups=tuple(_at(plan, g, moved[g.id]) if g.id in moved else g for g in p.groups))
        if any(g.id in moved for g in p.groups)
        else p
        for p in plan.pools
    )
    return replace(plan, pools=pools)


def _at(plan: FleetPlan, group: GroupPlan, places: Sequence[Place]) -> GroupPlan:
    was = {place.node: member.node for place, member in zip(places, group.members, strict=True)}
    hosts = {node: plan.hosts[node] for node in was}
    members = tuple(
        replace(m, node=p.node, ports=p.ports, url=f"http://{hosts[p.node].address}:{p.ports[HTTP]}")
        for m, p in zip(group.members, places, strict=True)
    )
    return replace(
        group,
        members=members,
        addresses={node: host.address for node, host in hosts.items()},
        cpus_per_step={node: min(group.cpus_per_step[old], hosts[node].cpus) for node, old in was.items()},
        gpus_per_step={node: group.gpus_per_step[old] for node, old in was.items()},
    )


def excluded(run: RunState) -> frozenset[str]:
    """Return the nodes on which nothing is started."""
    return frozenset(n.name for n in run.nodes if n.excluded)


def settle(plan: FleetPlan, run: RunState, obs: Observation, events: list[Event]) -> RunState:
    """Move the groups that stand on excluded nodes, with nothing of them alive, one after the other.

    One for which there is no node waits in PENDING, and moves as soon as there is one.
    """
    if run.ending or not (
        any(n.excluded for n in run.nodes) or any(g.places or waits_for_a_node(g) for g in run.groups)
    ):
        return run
    for g in run.groups:
        if g.phase not in _HOMELESS or g.steps:
            continue
        now = _without_waiting(placed(plan, run), run, g.id)
        away = (excluded(run) | _taken(now, run, g.id)).intersection(now.group(g.id).nodes)
        if not away:
            run = _with(run, _awake(g, obs))
            continue
        found = _relocate(now, run, obs, g, away)
        if found is not None:
            run = _move(run, obs, g, found, away, events)
        else:
            waits = _wait(g, obs, away, run, events)
            run = _with(run, replace(waits, hopeless=not _may_ever(now, run, obs, now.group(g.id), away)))
    return run


def _may_ever(plan: FleetPlan, run: RunState, obs: Observation, group: GroupPlan, away: Collection[str]) -> bool:
    """Tell whether nodes enough are in the job for it, however they are now, and whoever waits for them too."""
    gone = {n.name for n in run.nodes if n.excluded is Exclusion.GONE}
    gone |= {n.name for n in obs.nodes if n.word is NodeWord.GONE}
    busy = {m.node for g in plan.groups if g.id != group.id and not _may_share(g, group) for m in g.members}
    usable = [n for n in plan.nodes if n not in gone and n not in busy and (n not in group.nodes or n in away)]
    leaves = [n for n in group.nodes if n in away]
    return len(usable) >= len(leaves) and all(any(_fits(plan, group, old, new) for new in usable) for old in leaves)


def waits_for_a_node(g: GroupState) -> bool:
    """Tell whether nothing of the group can run, and its places are anybody's."""
    return g.phase is Phase.PENDING and g.reason is Reason.NO_NODE


def _without_waiting(plan: FleetPlan, run: RunState, but: str) -> FleetPlan:
    """Return the plan without the groups that wait for a node, but for one: they hold nothing that another could use.

    Else two groups of two nodes, with one lost of each, would keep the other two from one another for ever.
    """
    waiting = {g.id for g in run.groups if waits_for_a_node(g) and g.id != but}
    if not waiting:
        return plan
    pools = tuple(replace(p, groups=tuple(g for g in p.groups if g.id not in waiting)) for p in plan.pools)
    return replace(plan, pools=pools)


def _taken(plan: FleetPlan, run: RunState, group_id: str) -> frozenset[str]:
    """Return the group's nodes on which somebody else is by now: who waited may have lost them."""
    group = plan.group(group_id)
    rest = {g.id for g in run.groups if g.phase in (Phase.STOPPED, Phase.FAILED)}
    others = [g for g in plan.groups if g.id != group_id and g.id not in rest]
    alone = {m.node for g in others if not _may_share(g, group) for m in g.members}
    return frozenset(n for n in group.nodes if n in alone or not _has_gpus(others, group, n, n))


def _may_share(one: GroupPlan, other: GroupPlan) -> bool:
    return one.shares_nodes and other.shares_nodes


def _awake(g: GroupState, obs: Observation) -> GroupState:
    return _to(g, obs, Phase.FENCING, Reason.NODE_LOST, "its nodes are back") if waits_for_a_node(g) else g


def _wait(g: GroupState, obs: Observation, away: frozenset[str], run: RunState, events: list[Event]) -> GroupState:
    known = {n.name: n.excluded for n in run.nodes}
    why = "; ".join(f"{name} is {known.get(name) or 'used by another group'}" for name in sorted(away))
    message = f"{why}, and no other node is free. It starts when one is: back, or by `resume NODE`"
    if g.phase is Phase.PENDING and g.message == message:
        return g
    events.append(Event(type="waiting", group=g.id, incarnation=g.incarnation, reason=Reason.NO_NODE, message=message))
    if g.phase is Phase.PENDING:
        return replace(g, reason=Reason.NO_NODE, message=message)
    return _to(g, obs, Phase.PENDING, Reason.NO_NODE, message)


def _move(
    run: RunState,
    obs: Observation,
    g: GroupState,
    found: tuple[tuple[Place, ...], tuple[str, ...]],
    away: frozenset[str],
    events: list[Event],
) -> RunState:
    places, retired = found
    new = {p.node for p in places}
    used_again = new & away
    kinds = {n.excluded for n in run.nodes if n.name in away}
    run = replace(
        run,
        # A lost node that is back and empty is taken where there is no better one.
        nodes=tuple(n for n in run.nodes if not (n.name in new and n.excluded)),
    )
    if used_again == away:
        message = f"{', '.join(sorted(used_again))} is back, and used again"
    else:
        taken = ", ".join(p for p in dict.fromkeys(p.node for p in places))
        message = f"from {', '.join(sorted(away - used_again))}; now on {taken}"
    reason = Reason.NODE_LOST if kinds & {Exclusion.LOST, Exclusion.GONE} else Reason.NODE_EXCLUDED
    events.append(
        Event(
            type="moved",
            group=g.id,
            incarnation=g.incarnation,
            reason=reason,
            message=message,
            data={"nodes": list(dict.fromkeys(p.node for p in places))},
        )
    )
    g = replace(g, places=places, retired=retired, hopeless=False)
    if g.phase is Phase.FENCING:
        g = replace(g, since=obs.now, since_wall=obs.wall, message=message)  # what was seen of ports is of the old ones
    elif g.phase is Phase.PENDING:
        g = _to(g, obs, Phase.FENCING, reason, message)
    return _with(run, g)


def _to(g: GroupState, obs: Observation, phase: Phase, reason: Reason, message: str) -> GroupState:
    check_transition(g.id, g.phase, phase)
    return replace(g, phase=phase, since=obs.now, since_wall=obs.wall, reason=reason, message=message)


def _with(run: RunState, g: GroupState) -> RunState:
    if g == run.group(g.id):
        return run
    return replace(run, groups=tuple(g if old.id == g.id else old for old in run.groups))


# --------------------------------------------------------------------------------------------------------------- places


def free_nodes(plan: FleetPlan, run: RunState, obs: Observation) -> tuple[str, ...]:
    """Return the fleet's nodes that may take a group, the best first: whole ones, those that Slurm drains, and those
    that were lost and are back with nothing of before alive on them."""

    words, known = {n.name: n.word for n in obs.nodes}, {n.name: n for n in run.nodes}

    def rank(name: str) -> int | None:
        if words.get(name) in (NodeWord.DOWN, NodeWord.GONE, NodeWord.SILENT):
            return None
        node = known.get(name)
        if node is None:
            return 0
        if node.excluded:
            return 2 if node.back else None
        return 1 if node.draining else 0

    ranked = [(rank(name), name) for name in plan.nodes]
    return tuple(name for want in range(3) for place, name in ranked if place == want)


def has_room(plan: FleetPlan, run: RunState, obs: Observation, group: GroupPlan, away: Collection[str]) -> bool:
    """Tell whether the group could leave these nodes. `plan` is the one as it stands."""
    return _hosts_for(plan, run, obs, group, away) is not None


def _hosts_for(
    plan: FleetPlan, run: RunState, obs: Observation, group: GroupPlan, away: Collection[str]
) -> Mapping[str, str] | None:
    """Return old node -> new one for those of its nodes that it leaves; None when there are not enough."""
    kept = [n for n in group.nodes if n not in away]
    apart = [g for g in plan.groups if g.id != group.id and not _may_share(g, group)]
    busy = {m.node for g in apart for m in g.members}
    free = [n for n in free_nodes(plan, run, obs) if n not in kept and n not in busy]
    candidates = [n for n in free if n not in away or run.node(n).back]
    found: dict[str, str] = {}
    for old in group.nodes:
        if old not in away:
            continue
        fitting = (new for new in candidates if new not in found.values() and _fits(plan, group, old, new))
        new = next(fitting, None)
        if new is None:
            return None
        found[old] = new
    return found


def _fits(plan: FleetPlan, group: GroupPlan, old: str, new: str) -> bool:
    """Tell whether what the group has on one node has room on another one, which nobody has alone."""
    if max((g for m in group.on(old) for g in m.gpus), default=-1) >= plan.hosts[new].gpus:
        return False
    return _has_gpus([g for g in plan.groups if g.id != group.id], group, old, new)


def _has_gpus(others: Iterable[GroupPlan], group: GroupPlan, old: str, new: str) -> bool:
    """Tell whether nobody uses the GPUs on the new node that the group has on the old one."""
    gpus = {g for m in group.on(old) for g in m.gpus}
    return all(gpus.isdisjoint(m.gpus) for g in others for m in g.members if m.node == new)


def _relocate(
    plan: FleetPlan, run: RunState, obs: Observation, g: GroupState, away: Collection[str]
) -> tuple[tuple[Place, ...], tuple[str, ...]] | None:
    """Return the group's new places, by rank, and all its retired ports; None when there is no room for it."""
    group = plan.group(g.id)
    hosts = _hosts_for(plan, run, obs, group, away)
    if hosts is None:
        return None
    # Also where no step is left something may live that outlived its step: nothing was fenced there since.
    left = {s.node for s in run.lost_steps if s.group == g.id} | {old for old, new in hosts.items() if new != old}
    old = [f"{group.addresses[m.node]}:{p}" for m in group.members if m.node in left for p in m.fenced_ports]
    if left:
        old.append(f"{group.master_address}:{group.master_port}")
    retired = tuple(dict.fromkeys((*g.retired, *old)))
    stays = {
        m.rank
        for m in group.members
        if hosts.get(m.node, m.node) == m.node
        and not any(f"{group.addresses[m.node]}:{port}" in retired for name, port in m.ports.items() if name != MASTER)
    }
    taken = {(address, int(port)) for address, _, port in (r.rpartition(":") for r in retired)}
    for other in plan.groups:
        for m in other.members:
            if other.id != g.id or m.rank in stays:
                taken |= {(other.addresses[m.node], port) for port in m.ports.values()}
    places: list[Place] = []
    for member in group.members:
        node = hosts.get(member.node, member.node)
        ports = dict(member.ports)
        if member.rank not in stays:
            block = _block(plan, group, member, node, taken)
            if block is None:
                return None
            ports = block
            taken |= {(plan.hosts[node].address, port) for port in ports.values()}
        places.append(Place(node=node, ports=ports))
    leader = places[0]
    if f"{plan.hosts[leader.node].address}:{leader.ports[MASTER]}" in retired:  # the leader's URL stays as it was
        block = _block(plan, group, group.leader, leader.node, taken)
        if block is None:
            return None
        places[0] = replace(leader, ports={**leader.ports, MASTER: block[MASTER]})
    return tuple(places), retired


def _block(
    plan: FleetPlan, group: GroupPlan, member: Member, node: str, taken: Collection[tuple[str, int]]
) -> dict[str, int] | None:
    """Return ports for the member on a node: the numbers that it has where they are free there, else the next free."""
    address, blocks = plan.hosts[node].address, plan.pool(group.pool).ports
    names = sorted(member.ports, key=lambda name: (name != HTTP, name != MASTER, member.ports[name]))
    first = member.ports[HTTP]
    for start in (first, *range(blocks.base, HIGHEST - blocks.stride, blocks.stride)):
        if not any((address, port) in taken for port in range(start, start + blocks.stride)):
            return {name: start + i for i, name in enumerate(names)}
    return None
