"""Which member runs where, on which GPUs and ports. Pure: the same request and allocation give the same plan.

The layout is made on node indices first, so that it also tells how many nodes a request needs; names, CPUs and
addresses come from the allocation afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slurm_rollout.core.hostlist import fold
from slurm_rollout.core.plan import FleetPlan, GroupPlan, Host, Member, PoolPlan, PortBlocks
from slurm_rollout.core.ports import HTTP, MASTER, OutgoingPorts, PortDemand, assign, ephemeral_warnings
from slurm_rollout.core.request import Allocation, FleetRequest, MemberPlace, PoolRequest
from slurm_rollout.errors import SpecError

# --------------------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one group of a pool takes: `gpus` on each of `nodes` nodes, which are its own unless `shares`."""

    nodes: int
    gpus: int
    shares: bool


def shape(pool: PoolRequest, gpus_per_node: int) -> Shape:
    """Return the shape of the pool's groups on nodes with so many GPUs.

    Raises:
        SpecError: its GPUs cannot be laid out on such nodes.
    """
    per_node = f"{gpus_per_node} GPUs per node"
    if pool.gpus and not gpus_per_node:
        raise SpecError(
            f"pool {pool.name} needs {pool.gpus} GPUs for each group, and no GPUs are known in the allocation: ask "
            "Slurm for them (--gpus-per-node=8; --gres=gpu:8 too, but not in a heterogeneous job), or set "
            "nodes.gpus_per_node in the spec"
        )
    if pool.nodes is not None:
        total = pool.nodes * gpus_per_node if pool.gpus is None else pool.gpus
        if total % pool.nodes or total > pool.nodes * gpus_per_node:
            raise SpecError(
                f"pool {pool.name}: gpus = {total} cannot be spread evenly over nodes = {pool.nodes} with {per_node}: "
                f"say a multiple of {pool.nodes}, at most {pool.nodes * gpus_per_node}, or leave gpus out for all"
            )
        found = Shape(nodes=pool.nodes, gpus=total // pool.nodes, shares=False)
    else:
        gpus = pool.gpus or 0  # the spec was checked: one of the two is given
        if gpus > gpus_per_node and gpus % gpus_per_node:
            raise SpecError(
                f"pool {pool.name}: gpus = {gpus} is more than one node has and no multiple of it ({per_node}): a "
                f"group that spans nodes takes whole ones. Say {gpus // gpus_per_node * gpus_per_node} or "
                f"{(gpus // gpus_per_node + 1) * gpus_per_node}, or name the nodes too (nodes = …)"
            )
        shares = gpus < gpus_per_node
        nodes = 1 if shares else gpus // gpus_per_node
        found = Shape(nodes=nodes, gpus=min(gpus, gpus_per_node), shares=shares)
    if found.gpus % pool.members_per_node:
        raise SpecError(
            f"pool {pool.name}: members_per_node = {pool.members_per_node} cannot share evenly the {found.gpus} GPUs "
            "that a group has on a node"
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A group's part of one node."""

    node: int  # index into the nodes that groups may use
    gpus: tuple[int, ...]


def layout(pools: Sequence[PoolRequest], gpus_per_node: int) -> tuple[tuple[tuple[Seat, ...], ...], ...]:
    """Return the seats of every group of every pool, on as many nodes as that takes.

    Groups take nodes in the order of the file. A group smaller than a node goes to the first node that smaller groups
    share and that has room; its GPUs are its own.

    Raises:
        SpecError: a pool's GPUs cannot be laid out on such nodes.
    """
    nodes_used = 0
    gpus_used: dict[int, int] = {}  # on the nodes that groups share
    pools_seats = []
    for pool in pools:
        need = shape(pool, gpus_per_node)
        groups_seats = []
        for _ in range(pool.groups):
            if need.shares:
                node = next((n for n, taken in gpus_used.items() if taken + need.gpus <= gpus_per_node), nodes_used)
                first = gpus_used.get(node, 0)
                gpus_used[node] = first + need.gpus
                nodes, gpus = range(node, node + 1), range(first, first + need.gpus)
            else:
                nodes, gpus = range(nodes_used, nodes_used + need.nodes), range(need.gpus)
            nodes_used = max(nodes_used, nodes.stop)
            groups_seats.append(tuple(Seat(node=n, gpus=tuple(gpus)) for n in nodes))
        pools_seats.append(tuple(groups_seats))
    return tuple(pools_seats)


def nodes_needed(pools: Sequence[PoolRequest], gpus_per_node: int) -> int:
    """Return how many nodes the groups take, spares not counted.

    Raises:
        SpecError: a pool's GPUs cannot be laid out on such nodes.
    """
    return max(s.node for pool in layout(pools, gpus_per_node) for group in pool for s in group) + 1


# ---------------------------------------------------------------------------------------------------------------- nodes


def fleet_nodes(request: FleetRequest, allocation: Allocation) -> tuple[str, ...]:
    """Return the fleet's nodes, spares included.

    Raises:
        SpecError: the allocation has not what `[nodes]` asks for.
    """
    have = f"the allocation has {len(allocation.nodes)}: {fold(allocation.nodes)}"
    if request.include:
        if missing := [n for n in request.include if n not in allocation.nodes]:
            raise SpecError(f"nodes.include: {fold(missing)} is not in the allocation; {have}")
        chosen = tuple(dict.fromkeys(request.include))
    elif request.count is not None:
        if request.count > len(allocation.nodes):
            raise SpecError(f"nodes.count = {request.count}: {have}")
        chosen = allocation.nodes[-request.count :]
    elif request.het_group is not None:
        components = len(allocation.het_jobs)
        if request.het_group >= components:
            have = f"its components are 0 to {components - 1}" if components else "the job is not a heterogeneous one"
            raise SpecError(f"nodes.het_group = {request.het_group}: {have}")
        chosen = tuple(n for n in allocation.nodes if allocation.het_groups[n] == request.het_group)
    else:
        chosen = allocation.nodes
    if len({allocation.het_groups.get(n) for n in chosen}) > 1:
        # srun starts a step in one component only, and each component has a job id of its own.
        raise SpecError(
            "[nodes] takes nodes of several components of this heterogeneous job, and a fleet lives in one: say which, "
            f"nodes.het_group = 0 to {len(allocation.het_jobs) - 1}"
        )
    if request.spares >= len(chosen):
        raise SpecError(f"nodes.spares = {request.spares} leaves no node for a group; the fleet has {len(chosen)}")
    return chosen


def _check_enough(request: FleetRequest, seats: Sequence[Sequence[Sequence[Seat]]], nodes: Sequence[str]) -> None:
    needed = max(s.node for pool in seats for group in pool for s in group) + 1
    if needed <= len(nodes):
        return
    parts = []
    for pool, groups in zip(request.pools, seats, strict=True):
        taken = len({s.node for g in groups for s in g})
        if len(groups) * len(groups[0]) == taken:
            what = f"{len(groups)} groups × {len(groups[0])} nodes = {taken} nodes"
        else:
            what = f"{len(groups)} groups × {len(groups[0][0].gpus)} GPUs on {taken} shared nodes"
        parts.append(f"pool {pool.name} needs {what}")
    whole = f", together {needed} nodes" if len(parts) > 1 else ""
    spares = f", and {request.spares} spare" if request.spares else ""
    raise SpecError(f"{'; '.join(parts)}{whole}; the fleet has {len(nodes)} ({fold(nodes)}{spares})")


# ----------------------------------------------------------------------------------------------------------------- plan


def place(
    request: FleetRequest, allocation: Allocation, *, backend: str, port_range: OutgoingPorts
) -> tuple[FleetPlan, tuple[str, ...]]:
    """Return the plan and the warnings about it. `port_range`: the kernel's outgoing ports.

    Raises:
        SpecError: the allocation cannot hold the fleet, or the ports do not fit.
    """
    # Virtual nodes were made for this request: what it says about real ones does not apply.
    fleet = allocation.nodes if backend == "local" else fleet_nodes(request, allocation)
    usable = fleet[: len(fleet) - request.spares]
    trainer = tuple(n for n in allocation.nodes if n not in set(fleet))
    gpus_per_node = request.gpus_per_node
    if gpus_per_node is None:
        gpus_per_node = min(allocation.gpus[n] for n in fleet)
    seats = layout(request.pools, gpus_per_node)
    _check_enough(request, seats, usable)
    drafts = [
        _draft(pool, index, group_seats, usable, allocation, shares_nodes=shape(pool, gpus_per_node).shares)
        for pool, pool_seats in zip(request.pools, seats, strict=True)
        for index, group_seats in enumerate(pool_seats)
    ]
    demands = [demand for draft in drafts for demand in draft.demands]
    ports = assign(demands)
    remaining = iter(ports)
    groups_on = Counter(node for draft in drafts for node in draft.gpus)
    groups = [
        GroupPlan(
            id=draft.id,
            pool=draft.pool.name,
            members=_members(draft, [next(remaining) for _ in draft.places], allocation),
            addresses={node: allocation.addresses[node] for node in draft.gpus},
            cpus_per_step={
                node: allocation.cpus[node]
                if groups_on[node] == 1
                else max(1, allocation.cpus[node] * gpus // gpus_per_node)
                for node, gpus in draft.gpus.items()
            },
            gpus_per_step={node: gpus_per_node if gpus else 0 for node, gpus in draft.gpus.items()},
            # A trainer on the same nodes (or, in a rehearsal, another virtual node) may hold memory of the same GPU.
            unshared_gpus=bool(trainer) and any(draft.gpus.values()),
            shares_nodes=draft.shares_nodes,
        )
        for draft in drafts
    ]
    plan = FleetPlan(
        name=request.name,
        backend=backend,
        pools=tuple(_pool_plan(p, tuple(g for g in groups if g.pool == p.name)) for p in request.pools),
        nodes=fleet,
        hosts={
            node: Host(
                address=allocation.addresses[node],
                ip=allocation.ips.get(node, allocation.addresses[node]),
                cpus=allocation.cpus[node],
                gpus=allocation.gpus[node] if request.gpus_per_node is None else request.gpus_per_node,
            )
            for node in fleet
        },
        spares=fleet[len(usable) :],
        trainer_nodes=trainer or allocation.nodes,
        het_group=allocation.het_groups.get(fleet[0]),
        het_job=allocation.het_jobs[allocation.het_groups[fleet[0]]] if allocation.het_jobs else "",
        slurm=request.slurm,
        lost_after_s=request.lost_after_s,
        max_node_failures=request.max_node_failures,
        heartbeat_s=request.heartbeat_s,
        audit_s=request.audit_s,
        degraded_timeout_s=request.degraded_timeout_s,
        log_max_bytes=request.log_max_bytes,
        log_keep_incarnations=request.log_keep_incarnations,
        private=request.private,
        on_event=request.on_event,
        trainer=request.trainer,
    )
    warnings = (*ephemeral_warnings(demands, ports, port_range), *_warnings(request, plan, allocation))
    return plan, warnings


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A group whose members have their place, but no ports yet."""

    id: str
    pool: PoolRequest
    gpus: Mapping[str, int]  # node -> how many of its GPUs are the group's
    places: tuple[tuple[str, int, tuple[int, ...]], ...]  # node, local rank, GPUs; by rank
    demands: tuple[PortDemand, ...]
    shares_nodes: bool


def _draft(
    pool: PoolRequest,
    index: int,
    seats: tuple[Seat, ...],
    nodes: Sequence[str],
    allocation: Allocation,
    *,
    shares_nodes: bool,
) -> _Draft:
    group = f"{pool.name}/{index}"
    places = []
    for seat in seats:
        share = len(seat.gpus) // pool.members_per_node
        for local_rank in range(pool.members_per_node):
            gpus = seat.gpus[local_rank * share : (local_rank + 1) * share]
            places.append((nodes[seat.node], local_rank, gpus))
    demands = tuple(
        PortDemand(
            pool=pool.name,
            member=f"{group} rank {rank} on {node}",
            address=allocation.addresses[node],
            base=pool.port_base,
            stride=pool.port_stride,
            names=(HTTP, MASTER, *pool.engine.port_names),
        )
        for rank, (node, _, _) in enumerate(places)
    )
    gpus_on = {nodes[seat.node]: len(seat.gpus) for seat in seats}
    return _Draft(id=group, pool=pool, gpus=gpus_on, places=tuple(places), demands=demands, shares_nodes=shares_nodes)


def _members(draft: _Draft, ports: Sequence[Mapping[str, int]], allocation: Allocation) -> tuple[Member, ...]:
    engine = draft.pool.engine
    members = []
    for rank, (node, local_rank, gpus) in enumerate(draft.places):
        place = MemberPlace(rank=rank, size=len(draft.places), local_rank=local_rank, gpus=gpus)
        members.append(
            Member(
                rank=rank,
                node=node,
                local_rank=local_rank,
                gpus=gpus,
                ports=ports[rank],
                entrypoint=engine.is_entrypoint(rank),
                url=f"http://{allocation.addresses[node]}:{ports[rank][HTTP]}",
                argv=engine.argv(place),
                variables=engine.variables(place),
            )
        )
    return tuple(members)


def _pool_plan(pool: PoolRequest, groups: tuple[GroupPlan, ...]) -> PoolPlan:
    return PoolPlan(
        name=pool.name,
        groups=groups,
        min_ready=pool.min_ready,
        weights=pool.weights,
        engine=pool.engine.kind,
        named_ports=pool.engine.port_names,
        ports=PortBlocks(base=pool.port_base, stride=pool.port_stride),
        env=pool.env,
        probe=pool.probe,
        restart=pool.restart,
        stop=pool.stop,
        fence=pool.fence,
    )


def _warnings(request: FleetRequest, plan: FleetPlan, allocation: Allocation) -> list[str]:
    found = []
    busy = {node for group in plan.groups for node in group.nodes}
    if idle := [n for n in plan.nodes if n not in busy and n not in plan.spares]:
        found.append(
            f"{fold(idle)}: in the fleet, but in no group and no spare. Name fewer nodes in [nodes] "
            f"(nodes.count = {len(plan.nodes) - len(idle)} is enough), and the trainer gets the rest"
        )
    for pool in request.pools:
        nodes = dict.fromkeys(n for g in plan.pool(pool.name).groups for n in g.nodes)
        unknown = [n for n in nodes if n not in allocation.ips]
        if pool.engine.uses_node_ip and unknown:
            found.append(
                f"pool {pool.name} uses {{node_ip}}, and no address of {fold(unknown)} was found here that other nodes "
                "could use: its name stands there instead"
            )
        if pool.probe.counter is None:
            found.append(
                f"pool {pool.name} has no probe.liveness.counter: an engine that works, but answers later than "
                f"{pool.probe.liveness_timeout_s:g} s {pool.probe.liveness_failure_threshold} times in a row, is "
                "restarted. Name a number on its metrics page that grows with its work: "
                'probe.liveness.counter = { path = "/metrics", name = "…" }'
            )
    return found
