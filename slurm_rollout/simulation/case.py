"""What a run depends on, what it brings, and the case that a seed stands for."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from slurm_rollout.core.plan import (
    Counter,
    FencePolicy,
    FleetPlan,
    ProbePolicy,
    ProbeRequest,
    RestartPolicy,
    StopPolicy,
)
from slurm_rollout.simulation import faults as fault_kinds
from slurm_rollout.simulation.faults import Fault
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
    plan = plan or some_plan(rng)
    kinds = fault_kinds.every_kind()
    if rng.random() < 0.5:  # a few kinds at a time meet each other more often
        kinds = {k: kinds[k] for k in rng.sample(sorted(kinds), 8)}
    rate = per_hour if per_hour is not None else 10 ** rng.uniform(0.5, 1.8)
    longest = max(p.probe.startup_timeout_s for p in plan.pools)
    begins_at = START + rng.choice((0.0, 30.0, 120.0))
    schedule = fault_kinds.schedule(rng, begins_at, hours, rate, kinds)
    load_s = (2.0, 10.0) if longest < 200 else (20.0, 60.0)
    return Case(
        seed=seed,
        plan=plan,
        faults=tuple(schedule),
        peace_at=begins_at + hours * 3600.0,
        load_s=load_s,
        job_ends=rng.random() < 0.3,
    )


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
