"""Which groups live and which may serve, and how a pool stands by that. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from slurm_rollout.core.model import GroupState, RunState
from slurm_rollout.core.phases import Phase, PoolPhase, Reason
from slurm_rollout.core.plan import FleetPlan, PoolPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """How a pool stands, as the trainer sees it."""

    name: str
    phase: PoolPhase
    ready: int  # groups that serve
    desired: int
    min_ready: int
    reason: str = ""


def is_alive(g: GroupState) -> bool:
    """Tell whether this group's incarnation was proved alive, and has URLs: the trainer may push weights into it."""
    return g.phase is Phase.READY


def weights(pool: PoolPlan, run: RunState, g: GroupState) -> str:
    """Return `none` in a frozen pool; else `current` for the pool's target version, `stale` for any other or none."""
    if not pool.is_trained:
        return "none"
    return "current" if g.weights_version is not None and g.weights_version == run.targets.get(pool.name) else "stale"


def serves(pool: PoolPlan, run: RunState, g: GroupState) -> bool:
    """Tell whether this group's incarnation may be used by the trainer."""
    return is_alive(g) and weights(pool, run, g) != "stale"


def may_come(g: GroupState) -> bool:
    """Tell whether a group can still come back by itself, or because a node does."""
    return g.phase is not Phase.FAILED and not (g.phase is Phase.PENDING and g.hopeless)


def waits_for_time(g: GroupState) -> bool:
    """Tell whether this group is down for good, unless the job's time limit is raised."""
    return g.phase is Phase.BACKOFF and g.reason is Reason.TIME_LEFT


def pool_view(pool: PoolPlan, run: RunState, now: float, degraded_timeout_s: float) -> PoolView:
    """Return what a pool looks like to the trainer."""
    groups = [run.group(g.id) for g in pool.groups]
    alive = sum(is_alive(g) for g in groups)
    ready = sum(serves(pool, run, g) for g in groups)
    desired = len(groups)
    possible = sum(may_come(g) for g in groups)
    late = sum(waits_for_time(g) for g in groups)
    reason = ""
    # For the first time it waits for every group that can still come.
    first = pool.name not in run.pools_once_ready and now - run.started_at < degraded_timeout_s
    enough = max(possible - late, pool.min_ready) if first else pool.min_ready
    if possible < pool.min_ready:
        spent = any(g.phase is Phase.FAILED for g in groups)
        phase, reason = PoolPhase.FAILED, Reason.BUDGET_SPENT.value if spent else Reason.NO_NODE.value
    elif run.ending:
        phase, reason = PoolPhase.STOPPED, run.ending.value
    elif possible - late < pool.min_ready:
        phase, reason = PoolPhase.STOPPED, Reason.TIME_LEFT.value
    elif alive < enough:
        phase = PoolPhase.WAITING
    elif ready < pool.min_ready:
        phase, reason = PoolPhase.NEEDS_WEIGHTS, "stale"
    else:
        degraded = Reason.TIME_LEFT.value if late else "degraded"
        phase, reason = PoolPhase.READY, degraded if ready < desired else ""
    return PoolView(name=pool.name, phase=phase, ready=ready, desired=desired, min_ready=pool.min_ready, reason=reason)


def reason_of(views: tuple[PoolView, ...], phase: PoolPhase) -> str:
    """Return the reason of the whole, whose phase this is: that of the pools that are in it."""
    reasons = [v.reason for v in views if v.phase is phase and v.reason]
    # What will not pass by itself is worth more than the first one.
    return Reason.TIME_LEFT.value if Reason.TIME_LEFT in reasons else next(iter(reasons), "")


def pool_views(plan: FleetPlan, run: RunState, now: float) -> tuple[PoolView, ...]:
    """Return every pool's view."""
    return tuple(pool_view(p, run, now, plan.degraded_timeout_s) for p in plan.pools)
