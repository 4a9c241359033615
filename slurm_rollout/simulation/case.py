"""What a run depends on, what it brings, and the case that a seed stands for."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from slurm_rollout.core.plan import (
    Counter,
    FencePolicy,
    FleetPlan,
    PoolPlan,
    ProbePolicy,
    ProbeRequest,
    RestartPolicy,
    StopPolicy,
)
from slurm_rollout.simulation import faults as fault_kinds
from slurm_rollout.simulation.faults import Fault
from slurm_rollout.simulation.trainer import Habits
from slurm_rollout.simulation.trainer_faults import TRAINER_KINDS
from slurm_rollout.testing.world import make_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything that a run depends on."""

    seed: int
    plan: FleetPlan
    faults: tuple[Fault, ...]
    peace_at: float  # when the faults end
    load_s: tuple[float, float] = (20.0, 60.0)
    job_ends: bool = False  # at the end the job is killed, instead of told to end
    clients: tuple[Habits, ...] = ()
    stops: bool = False  # when the faults end the clock stops; a fleet that failed before stays down


@dataclass(slots=True)
class Outcome:
    """What one run brought."""

    case: Case
    broken: str = ""  # which invariant, and how
    number: int = -1
    trace: list[str] = field(default_factory=list)
    hours: float = 0.0
    ticks: int = 0
    faults: int = 0
    terms: int = 0
    recoveries: list[tuple[str, float, str]] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    ready_s: dict[str, float] = field(default_factory=dict)  # group -> seconds
    spent: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # group -> most restarts, start failures in a window
    failed_at: float | None = None  # the fleet failed for the first time


START = 1000.0


def make_case(seed: int, *, hours: float = 1.0, per_hour: float | None = None, plan: FleetPlan | None = None) -> Case:
    """Return the case that a seed stands for: the plan, the faults, how it ends."""
    rng = random.Random(seed)
    plan_is_free = plan is None
    plan = plan or with_nodes(some_plan(rng), random.Random(f"nodes of {seed}"))
    kinds = fault_kinds.every_kind()
    if rng.random() < 0.5:  # a few kinds at a time meet each other more often
        kinds = {k: kinds[k] for k in rng.sample(sorted(kinds), 8)}
    rate = per_hour if per_hour is not None else 10 ** rng.uniform(0.5, 1.8)
    longest = max(p.probe.startup_timeout_s for p in plan.pools)
    begins_at = START + rng.choice((0.0, 30.0, 120.0))
    schedule = fault_kinds.schedule(rng, begins_at, hours, rate, kinds)
    load_s = (2.0, 10.0) if longest < 200 else (20.0, 60.0)
    case = Case(
        seed=seed,
        plan=plan,
        faults=tuple(schedule),
        peace_at=begins_at + hours * 3600.0,
        load_s=load_s,
        job_ends=rng.random() < 0.3,
    )
    # Drawn apart: a seed means the same fleet and the same faults as before there were trainers.
    rng = random.Random(f"trainers of {seed}")
    return with_trainers(case, rng) if plan_is_free and rng.random() < 0.6 else case


def with_nodes(plan: FleetPlan, rng: random.Random) -> FleetPlan:
    """Return the plan with spares, groups that share nodes where they have one member, and what makes a node lost."""
    if all(len(g.members) == 1 for g in plan.groups) and rng.random() < 0.5:
        plan = sharing(plan)
    plan = with_spares(plan, rng.choice((0, 0, 1, 1, 2)))
    plan = replace(plan, lost_after_s=rng.choice((20.0, 30.0, 60.0)), max_node_failures=rng.choice((1, 2, 2, 3)))
    plan = replace(plan, slurm=replace(plan.slurm, max_launching=rng.choice((1, 2, 4, 32, 32))))
    self_fence_s = rng.choice((0.0, 0.0, 0.0, 60.0, 120.0))
    pools = (replace(p, fence=replace(p.fence, self_fence_s=self_fence_s)) for p in plan.pools)
    return replace(plan, pools=tuple(pools))


def with_spares(plan: FleetPlan, count: int) -> FleetPlan:
    """Return the plan with so many spares more, like its last node."""
    names = tuple(f"spare{len(plan.spares) + n}" for n in range(count))
    like = plan.hosts[plan.nodes[-1]]
    return replace(
        plan,
        nodes=plan.nodes + names,
        spares=plan.spares + names,
        hosts={**plan.hosts, **{n: replace(like, address=n, ip=n) for n in names}},
    )


def sharing(plan: FleetPlan) -> FleetPlan:
    """Return the plan of groups of one member with two of them on each node, with half of its GPUs each."""
    groups = []
    for index, group in enumerate(plan.groups):
        node, half = f"n{index // 2}", index % 2
        (member,) = group.members
        ports = {name: port + 16 * half for name, port in member.ports.items()}
        url = f"http://{node}:{ports['http']}"
        first = 4 * ((index // 2 + half) % 2)  # who has which ports does not go by who has which GPUs
        member = replace(member, node=node, gpus=tuple(range(first, first + 4)), ports=ports, url=url)
        on = {"addresses": {node: node}, "cpus_per_step": {node: 1}, "gpus_per_step": {node: 8}}
        groups.append(replace(group, members=(member,), shares_nodes=True, **on))  # type: ignore[arg-type]
    nodes = tuple(dict.fromkeys(g.leader.node for g in groups))
    (pool,) = plan.pools
    return replace(
        plan,
        pools=(replace(pool, groups=tuple(groups)),),
        nodes=nodes,
        hosts={n: replace(plan.hosts[n], cpus=2, gpus=8) for n in nodes},
    )


def with_trainers(case: Case, rng: random.Random) -> Case:
    """Return the case with a trainer and what goes wrong with it: on nodes of its own, or on the engines' GPUs."""
    colocated = rng.random() < 0.5
    lease_s = rng.choice((0.0, 60.0, 120.0, 300.0))
    trainer = Habits(announces=colocated or rng.random() < 0.7, hasty=rng.random() < 0.3, lease_s=lease_s)
    clients = (trainer, Habits(name="generator", trains=False, syncs_each=4)) if rng.random() < 0.3 else (trainer,)
    probe = replace(
        case.plan.pools[0].probe,
        pause_in=("training", "syncing") if colocated else rng.choice(((), ("syncing",), ("syncing",))),
        pause_max_s=rng.choice((200.0, 900.0, 3600.0)),
    )
    pool = replace(
        case.plan.pools[0],
        weights="trained",
        probe=probe,
        restart=replace(case.plan.pools[0].restart, when="at_barrier" if colocated else "at_once"),
    )
    frozen = rng.randrange(len(pool.groups)) if rng.random() < 0.3 else 0
    hours = (case.peace_at - START) / 3600.0
    schedule = fault_kinds.schedule(
        rng,
        START + 60.0,
        hours,
        10 ** rng.uniform(0.3, 1.6),
        {k: kind.weight for k, kind in TRAINER_KINDS.items()},
        TRAINER_KINDS,
    )
    return replace(
        case,
        plan=with_frozen(case.plan, pool, frozen),
        faults=tuple(sorted((*case.faults, *schedule), key=lambda f: f.at)),
        clients=clients,
    )


def with_frozen(plan: FleetPlan, pool: PoolPlan, count: int) -> FleetPlan:
    """Return the plan with the last groups of `pool` in a pool of their own, which no trainer pushes into."""
    if not count:
        return replace(plan, pools=(pool,))
    trained, rest = pool.groups[:-count], pool.groups[-count:]
    reward = replace(
        plan.pools[0],
        name="reward",
        groups=tuple(replace(g, id=f"reward/{n}", pool="reward") for n, g in enumerate(rest)),
        min_ready=min(pool.min_ready, len(rest)),
    )
    return replace(plan, pools=(replace(pool, groups=trained, min_ready=min(pool.min_ready, len(trained))), reward))


def some_plan(rng: random.Random) -> FleetPlan:
    """Return a fleet of one to eight groups of one to four members, with all sorts of policies."""
    counted = rng.random() < 0.7
    budget = rng.choice((0, 1, 3, 5, 5, 20))
    groups = rng.choice((1, 2, 2, 3, 4, 8))
    return make_plan(
        groups,
        rng.choice((1, 2, 2, 4)),
        min_ready=rng.randint(1, groups),
        entrypoints=rng.choice(("all", "leader")),
        probe=ProbePolicy(
            request=ProbeRequest(),
            counter=Counter(name="tokens") if counted else None,
            startup_timeout_s=rng.choice((120.0, 600.0, 2700.0)),
            liveness_period_s=rng.choice((5.0, 15.0)),
            liveness_timeout_s=rng.choice((10.0, 30.0)),
            liveness_failure_threshold=rng.choice((2, 3, 4)),
        ),
        restart=RestartPolicy(
            max_restarts=budget,
            max_start_failures=max(1, budget),
            window_s=rng.choice((600.0, 3600.0)),
            backoff_max_s=rng.choice((30.0, 300.0)),
        ),
        stop=StopPolicy(grace_s=rng.choice((0.0, 0.0, 5.0)), snapshot_s=rng.choice((0.0, 3.0))),
        fence=FencePolicy(timeout_s=rng.choice((30.0, 120.0))),
    )
