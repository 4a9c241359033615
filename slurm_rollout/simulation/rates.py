"""What a person wants to know of a spec: how often it will recover, what that costs, what another choice would change.

Faults come by their mean times, independently of one another (exponentially distributed). Every fleet is a seed.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from slurm_rollout.core.plan import FleetPlan, PoolPlan
from slurm_rollout.simulation.case import with_spares
from slurm_rollout.simulation.faults import Fault
from slurm_rollout.simulation.run import START, Case, Outcome, run
from slurm_rollout.simulation.trainer import ONLY_KEEPS_CURRENT

SLURM_AWAY_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Mean hours between failures; 0: never."""

    crash_h: float  # of one member
    hang_h: float  # of one member
    node_h: float  # of one node, which then does not come back
    slurm_h: float  # of the controller, which is away for `SLURM_AWAY_S`
    coordinator_h: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolForecast:
    """One pool over all fleets. Times in seconds, but for `lost_group_h`."""

    name: str
    groups: int
    availability: float  # ready group-hours / group-hours since the start
    availability_error: float  # standard error of the mean over the fleets; 0.0 with one fleet
    lost_group_h: float  # a fleet
    recoveries: float  # a fleet
    recovery_median_s: float | None
    recovery_longest_s: float | None
    restarts_spent: int  # the most that a group had in a window
    restarts_limit: int
    start_failures_spent: int
    start_failures_limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What was seen of a number of fleets, each for the same hours."""

    fleets: int
    hours: float
    seed: int
    failed: int  # fleets that failed before their time was over
    failures: dict[str, float]  # reason -> how many a fleet
    pools: tuple[PoolForecast, ...]


class Flawed(Exception):
    """The simulation broke an invariant: the program is wrong, not the spec. The text says how, and the seed."""


def forecast(
    plan: FleetPlan,
    rates: Rates,
    *,
    hours: float,
    load_s: float,
    fleets: int,
    seed: int,
    play: Callable[[Iterable[Case]], Iterable[Outcome]] = lambda cases: map(run, cases),
    spare_nodes: int = 0,
) -> Forecast:
    """Return what to expect of a plan.

    Args:
        hours: from the start of the run, for each fleet.
        load_s: from go until an engine answers; each start differs by up to a tenth.
        spare_nodes: spares that the plan has not.

    Raises:
        Flawed: a bug.
    """
    plan = with_spares(plan, spare_nodes)
    cases = [
        Case(
            seed=seed + n,
            plan=plan,
            faults=draw(plan, rates, hours, random.Random(f"{seed + n}")),
            peace_at=START + hours * 3600.0,
            load_s=(0.9 * load_s, 1.1 * load_s),
            # The trainer's own times are no part of it: it pushes at once, and lets groups start when they can.
            clients=(ONLY_KEEPS_CURRENT,) if any(p.is_trained for p in plan.pools) else (),
            stops=True,
        )
        for n in range(fleets)
    ]
    outcomes = list(play(cases))
    for outcome in outcomes:
        if outcome.broken:
            raise Flawed(f"seed {outcome.case.seed}: {outcome.broken}")
    reasons = sorted({r for o in outcomes for r in o.failures})
    return Forecast(
        fleets=fleets,
        hours=hours,
        seed=seed,
        failed=sum(o.failed_at is not None for o in outcomes),
        failures={r: sum(o.failures.get(r, 0) for o in outcomes) / fleets for r in reasons},
        pools=tuple(_pool(p, outcomes, hours) for p in plan.pools),
    )


def draw(plan: FleetPlan, rates: Rates, hours: float, rng: random.Random) -> tuple[Fault, ...]:
    """Draw the faults of one fleet, oldest first."""
    places = [
        ((index + 0.5) / len(plan.groups), (member.rank + 0.5) / len(group.members))
        for index, group in enumerate(plan.groups)
        for member in group.members
    ]
    nodes = [
        ((index + 0.5) / len(plan.groups), (place + 0.5) / len(group.nodes))
        for index, group in enumerate(plan.groups)
        for place in range(len(group.nodes))
    ]
    found: list[Fault] = []

    def add(kind: str, mean_h: float, victims: Sequence[tuple[float, float]], for_s: float = 0.0) -> None:
        at = START
        while mean_h > 0.0:
            at += rng.expovariate(len(victims) / (mean_h * 3600.0))
            if at >= START + hours * 3600.0:
                return
            where, which = rng.choice(victims)
            found.append(Fault(at, kind, where, which, for_s))

    add("engine_dies", rates.crash_h, places)
    add("engine_hangs", rates.hang_h, places)
    add("node_is_lost", rates.node_h, nodes, 1.0)
    add("slurm_is_away", rates.slurm_h, [(0.0, 0.0)], SLURM_AWAY_S)
    add("coordinator_is_killed", rates.coordinator_h, [(0.0, 0.0)])
    return tuple(sorted(found, key=lambda f: f.at))


def with_threshold(plan: FleetPlan, change: int) -> FleetPlan | None:
    """Return the plan with another liveness threshold in every pool; None where one would be below 2."""
    pools = []
    for pool in plan.pools:
        threshold = pool.probe.liveness_failure_threshold + change
        if threshold < 2:
            return None
        pools.append(replace(pool, probe=replace(pool.probe, liveness_failure_threshold=threshold)))
    return replace(plan, pools=tuple(pools))


def _pool(pool: PoolPlan, outcomes: Sequence[Outcome], hours: float) -> PoolForecast:
    ids = [g.id for g in pool.groups]
    shares = [sum(o.ready_s[i] for i in ids) / (len(ids) * hours * 3600.0) for o in outcomes]
    took = [s for o in outcomes for name, s, _ in o.recoveries if name == pool.name]
    spent = [o.spent.get(i, (0, 0)) for o in outcomes for i in ids]
    availability = statistics.fmean(shares)
    return PoolForecast(
        name=pool.name,
        groups=len(ids),
        availability=availability,
        availability_error=statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0,
        lost_group_h=(1.0 - availability) * len(ids) * hours,
        recoveries=len(took) / len(outcomes),
        recovery_median_s=statistics.median(took) if took else None,
        recovery_longest_s=max(took, default=None),
        restarts_spent=max(a for a, _ in spent),
        restarts_limit=pool.restart.max_restarts,
        start_failures_spent=max(b for _, b in spent),
        start_failures_limit=pool.restart.max_start_failures,
    )
