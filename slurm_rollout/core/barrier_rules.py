"""What the trainer may see: pool phases, the epoch, and the barrier document. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

from slurm_rollout.core.model import GroupState, RunState
from slurm_rollout.core.phases import Phase, PoolPhase, Reason
from slurm_rollout.core.plan import FleetPlan, PoolPlan
from slurm_rollout.core.view import PoolView

SCHEMA = 1

_WORST_FIRST = (
    PoolPhase.FAILED,
    PoolPhase.STOPPED,
    PoolPhase.WAITING,
    PoolPhase.NEEDS_WEIGHTS,
    PoolPhase.READY,
)


def serves(g: GroupState) -> bool:
    """Tell whether this group's incarnation may be used by the trainer."""
    return g.phase is Phase.READY


def pool_view(pool: PoolPlan, run: RunState, now: float, degraded_timeout_s: float) -> PoolView:
    """Return what a pool looks like to the trainer."""
    groups = [run.group(g.id) for g in pool.groups]
    ready = sum(serves(g) for g in groups)
    desired = len(groups)
    possible = sum(g.phase is not Phase.FAILED for g in groups)
    reason = ""
    if possible < pool.min_ready:
        phase, reason = PoolPhase.FAILED, "budget_spent"
    elif run.ending:
        phase, reason = PoolPhase.STOPPED, run.ending.value
    elif pool.name in run.pools_once_ready:
        phase = PoolPhase.READY if ready >= pool.min_ready else PoolPhase.WAITING
    else:
        # For the first time it waits for every group that can still come.
        waited = now - run.started_at >= degraded_timeout_s
        enough = pool.min_ready if waited else max(possible, pool.min_ready)
        phase = PoolPhase.READY if ready >= enough else PoolPhase.WAITING
    if phase is PoolPhase.READY and ready < desired:
        reason = "degraded"
    return PoolView(name=pool.name, phase=phase, ready=ready, desired=desired, min_ready=pool.min_ready, reason=reason)


def pool_views(plan: FleetPlan, run: RunState, now: float) -> tuple[PoolView, ...]:
    """Return every pool's view."""
    return tuple(pool_view(p, run, now, plan.degraded_timeout_s) for p in plan.pools)


def publish(plan: FleetPlan, run: RunState, now: float) -> RunState:
    """Return `run` with pools' first readiness, the epoch and the phase of the whole brought up to date."""
    views = pool_views(plan, run, now)
    once = tuple(v.name for v in views if v.phase is PoolPhase.READY and v.name not in run.pools_once_ready)
    serving = tuple((g.id, g.incarnation) for g in run.groups if serves(g))
    phase = min((v.phase for v in views), key=_WORST_FIRST.index)
    if run.phase is PoolPhase.FAILED and run.ending:
        phase = PoolPhase.FAILED  # what the trainer was told about a dead fleet stays said
    return replace(
        run,
        pools_once_ready=run.pools_once_ready + once,
        serving=serving,
        epoch=run.epoch + (serving != run.serving),
        phase=phase,
    )


def barrier_document(
    plan: FleetPlan,
    run: RunState,
    *,
    now: float,
    seq: int,
    clients: Mapping[str, object],
) -> dict[str, object]:
    """Return the content of `barrier.json`."""
    views = pool_views(plan, run, now)
    troubled = [g for g in run.groups if not serves(g)]
    degraded = run.phase is PoolPhase.READY and any(v.reason == "degraded" for v in views)
    reason = "degraded" if degraded else next((v.reason for v in views if v.phase is run.phase and v.reason), "")
    if run.phase is PoolPhase.FAILED:
        reason = "budget_spent"  # also when the pools only say by now that the run is over
    return {
        "schema": SCHEMA,
        "run": plan.name,
        "job": run.job,
        "restart_count": run.restart_count,
        "term": run.term,
        "seq": seq,
        "heartbeat_s": plan.heartbeat_s,
        "epoch": run.epoch,
        "phase": run.phase.value,
        "reason": reason,
        "message": "; ".join(f"{g.id}: {g.phase} {g.message or g.reason}".strip() for g in troubled)[:500],
        "clients": clients,
        "pools": [
            {
                "name": v.name,
                "phase": v.phase.value,
                "ready": v.ready,
                "desired": v.desired,
                "min_ready": v.min_ready,
            }
            for v in views
        ],
        "groups": [_group_entry(plan, run, g) for g in run.groups],
    }


def _group_entry(plan: FleetPlan, run: RunState, g: GroupState) -> dict[str, object]:
    group = plan.group(g.id)
    names = plan.pool(group.pool).named_ports
    proved = serves(g)
    return {
        "id": g.id,
        "phase": g.phase.value,
        "serving": proved,
        "incarnation": g.incarnation,
        "weights": g.weights,
        "weights_version": g.weights_version,
        "urls": [m.url for m in group.entrypoints] if proved else [],
        "endpoints": {
            name: [f"http://{group.addresses[m.node]}:{m.ports[name]}" for m in group.entrypoints] if proved else []
            for name in names
        },
        "master": f"{group.master_address}:{group.master_port}",
        "since": iso(g.since_wall),
        "reason": g.reason.value if g.reason is not Reason.NONE else "",
    }


def iso(wall: float) -> str:
    """Return a Unix time as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(wall, tz=UTC).isoformat(timespec="milliseconds") if wall else ""
