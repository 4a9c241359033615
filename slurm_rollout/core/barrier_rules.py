"""What the trainer may see: pool phases, the epoch, and the barrier document. Pure."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from slurm_rollout.core.clients import keeps_from_starting
from slurm_rollout.core.model import GroupState, RunState
from slurm_rollout.core.phases import PoolPhase, Reason
from slurm_rollout.core.plan import FleetPlan
from slurm_rollout.core.pools import is_alive, pool_views, reason_of, serves, weights

SCHEMA = 1

_WORST_FIRST = (
    PoolPhase.FAILED,
    PoolPhase.STOPPED,
    PoolPhase.WAITING,
    PoolPhase.NEEDS_WEIGHTS,
    PoolPhase.READY,
)


def publish(plan: FleetPlan, run: RunState, now: float) -> RunState:
    """Return `run` with pools' first readiness, the epoch and the phase of the whole brought up to date."""
    views = pool_views(plan, run, now)
    came = (PoolPhase.READY, PoolPhase.NEEDS_WEIGHTS)
    once = tuple(v.name for v in views if v.phase in came and v.name not in run.pools_once_ready)
    alive = tuple((g.id, g.incarnation) for g in run.groups if is_alive(g))
    serving = tuple((g.id, g.incarnation) for g in run.groups if serves(plan.pool_of(g.id), run, g))
    epoch = run.epoch + ((alive, serving) != (run.alive, run.serving))
    moved = {group for group, _ in set(alive) ^ set(run.alive)}
    groups = tuple(replace(g, changed=epoch) if g.id in moved else g for g in run.groups) if moved else run.groups
    phase = min((v.phase for v in views), key=_WORST_FIRST.index)
    if run.phase is PoolPhase.FAILED and run.ending:
        phase = PoolPhase.FAILED  # what the trainer was told about a dead fleet stays said
    return replace(
        run,
        groups=groups,
        pools_once_ready=run.pools_once_ready + once,
        alive=alive,
        serving=serving,
        epoch=epoch,
        phase=phase,
    )


def barrier_document(
    plan: FleetPlan,
    run: RunState,
    *,
    now: float,
    seq: int,
) -> dict[str, object]:
    """Return the content of `barrier.json`."""
    views = pool_views(plan, run, now)
    troubled = [g for g in run.groups if not serves(plan.pool_of(g.id), run, g)]
    kept = {p.name: keeps_from_starting(plan, run, p, now) for p in plan.pools}
    reason = reason_of(views, run.phase)
    if run.phase is PoolPhase.FAILED and not any(v.phase is PoolPhase.FAILED for v in views):
        # The pools only say by now that the run is over; a group that could not come any more keeps its reason.
        spent = any(g.reason is Reason.BUDGET_SPENT for g in run.groups)
        reason = (Reason.BUDGET_SPENT if spent else Reason.NO_NODE).value
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
        "message": "; ".join(_trouble(g) for g in troubled)[:500],
        "may_start": next((why for why in kept.values() if why), ""),
        "clients": {c.id: {"phase": c.phase, "seq": c.echo, "hold": c.hold, "acks": c.acks} for c in run.clients},
        "pools": [
            {
                "name": v.name,
                "phase": v.phase.value,
                "ready": v.ready,
                "desired": v.desired,
                "min_ready": v.min_ready,
                "weights_version": run.targets.get(v.name),
                "probes": "paused" if v.name in run.paused else "on",
                "pauses": run.pauses.get(v.name, 0),
                "restarts": plan.pool(v.name).restart.when,
                "may_start": kept[v.name],
            }
            for v in views
        ],
        "groups": [_group_entry(plan, run, g) for g in run.groups],
    }


def _trouble(g: GroupState) -> str:
    said = "ready, but stale: its weights are not the pool's" if is_alive(g) else f"{g.phase} {g.message or g.reason}"
    return f"{g.id}: {said}".strip()


def _group_entry(plan: FleetPlan, run: RunState, g: GroupState) -> dict[str, object]:
    group, pool = plan.group(g.id), plan.pool_of(g.id)
    proved = is_alive(g)
    return {
        "id": g.id,
        "phase": g.phase.value,
        "serving": serves(pool, run, g),
        "incarnation": g.incarnation,
        "changed": g.changed,
        "weights": weights(pool, run, g),
        "weights_version": g.weights_version,
        "urls": [m.url for m in group.entrypoints] if proved else [],
        "endpoints": {
            name: [f"http://{group.addresses[m.node]}:{m.ports[name]}" for m in group.entrypoints] if proved else []
            for name in pool.named_ports
        },
        "master": f"{group.master_address}:{group.master_port}",
        "world_size": group.world_size,
        "since": iso(g.since_wall),
        "reason": g.reason.value if g.reason is not Reason.NONE else "",
    }


def iso(wall: float) -> str:
    """Return a Unix time as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(wall, tz=UTC).isoformat(timespec="milliseconds") if wall else ""
