"""What everybody may know of a run: the content of `status.json`. Pure.

The file is world-readable, because on a root-squashed file system an admin sees nothing else. So no URL, argument,
environment or log line is in it; times are Unix seconds. And the one-line form of an event, for its owner.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from slurm_rollout.core.failure_classes import RULES
from slurm_rollout.core.model import Failure, GroupState, RunState
from slurm_rollout.core.phases import Phase
from slurm_rollout.core.plan import FleetPlan, PoolPlan
from slurm_rollout.core.pools import PoolView, reason_of, serves, waits_for_time, weights
from slurm_rollout.core.restart import recent

SCHEMA = 1

MESSAGE_CHARS = 200
"""Longer messages are cut."""

_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)


def status_document(
    plan: FleetPlan,
    state: RunState,
    *,
    pools: tuple[PoolView, ...],
    now: float,
    wall: float,
    host: str,
    seq: int,
    time_left_s: float | None,
) -> dict[str, object]:
    """Return the content of `status.json`, JSON-ready.

    `now` and `wall` are the same moment, in seconds of the batch host's monotonic clock and in Unix time: how long ago
    something was stays true when that host's clock was set. `seq` grows with every write. `time_left_s`: of the job;
    None when it is not known or has no end.
    """

    used = {m.node for g in plan.groups for m in g.members} | {n.name for n in state.nodes if n.excluded}

    def unix(at: float | None) -> float | None:
        return None if at is None else round(wall - (now - at), 3)

    return {
        "schema": SCHEMA,
        "run": plan.name,
        "job": state.job,
        "restart_count": state.restart_count,
        "term": state.term,
        "epoch": state.epoch,
        "host": host,
        "at": round(wall, 3),
        "seq": seq,
        "heartbeat_s": plan.heartbeat_s,
        "time_left_s": time_left_s,
        "phase": state.phase.value,
        "reason": reason_of(pools, state.phase),
        "message": _message(plan, state),
        "ending": state.ending.value,
        "ending_since": unix(state.ending_at) if state.ending else None,
        "ended": bool(state.ending) and all(g.phase is Phase.STOPPED for g in state.groups),
        "blind_since": unix(state.blind_since),
        "suspect_self_since": unix(state.suspect_self_since),
        "pools": [
            {
                "name": p.name,
                "phase": p.phase.value,
                "ready": p.ready,
                "desired": p.desired,
                "min_ready": p.min_ready,
                "reason": p.reason,
                "weights_version": state.targets.get(p.name),
                "probes": "paused" if p.name in state.paused else "on",
            }
            for p in pools
        ],
        "clients": [
            {
                "id": c.id,
                "phase": c.phase,
                "hold": "granted" if c.hold else "asked" if c.hold_s else "",
                "waits": c.waiting_s > 0,
                "heard": unix(c.heard_at),
            }
            for c in state.clients
        ],
        "groups": [_group(plan, state, g, now=now, wall=wall) for g in state.groups],
        "nodes": list(plan.nodes),
        "spares": [n for n in plan.nodes if n not in used],
        "excluded": [
            {
                "name": n.name,
                "reason": n.excluded.value,
                "message": _public(n.message),
                "since": unix(n.since),
                "back": n.back,
                "lost_steps": sum(s.node == n.name for s in state.lost_steps),
            }
            for n in state.nodes
            if n.excluded
        ],
        "draining": {n.name: _public(n.draining) for n in state.nodes if n.draining},
        "trainer_nodes": list(plan.trainer_nodes),
    }


def event_line(event: Mapping[str, Any]) -> str:
    """Return an event of `events.<term>.jsonl` in one line, without its time: group.incarnation, type, reason,
    rank@node, message, times taken."""
    group = event.get("group") or ""
    who = f"{group}.{event.get('incarnation', 0)}" if group else "-"
    words = [
        f"{who:<12}",
        f"{event.get('type') or '?':<10}",
        event.get("reason") or "",
        "@".join(str(part) for part in (event.get("rank"), event.get("node") or None) if part is not None),
        " ".join(str(event.get("message") or "").split()),
    ]
    data = event.get("data")
    if isinstance(data, Mapping):
        peers = data.get("restarted_peers")
        if isinstance(peers, list | tuple) and peers:
            words.append(f"(restarts rank {','.join(map(str, peers))} too)")
        words += [f"{key.removesuffix('_s')} {value} s" for key, value in data.items() if key.endswith("_s")]
    return " ".join(str(word) for word in words if word).rstrip()


def _group(plan: FleetPlan, state: RunState, g: GroupState, *, now: float, wall: float) -> dict[str, object]:
    planned = plan.group(g.id)
    pool = plan.pool(planned.pool)
    action, at = _next(pool, g, ending=bool(state.ending), now=now)
    return {
        "id": g.id,
        "pool": planned.pool,
        "phase": g.phase.value,
        "since": round(wall - (now - g.since), 3),
        "reason": g.reason.value,
        "message": _public(g.message),
        "incarnation": g.incarnation,
        "restarts": g.restarts,
        "node_failures": g.node_failures,
        "budget": {
            "window_s": pool.restart.window_s,
            "restarts": _left(g.runtime_failures, pool, pool.restart.max_restarts, now),
            "start_failures": _left(g.start_failures, pool, pool.restart.max_start_failures, now),
        },
        "next": {"action": action, "at": None if at is None else round(wall + (at - now), 3)},
        "failure": None if g.failure is None else _failure(g.failure, now=now, wall=wall),
        "nodes": list(planned.nodes),
        "slow": g.slow,
        "weights": weights(pool, state, g),
        "weights_version": g.weights_version,
    }


def _left(failures: tuple[float, ...], pool: PoolPlan, limit: int, now: float) -> dict[str, int]:
    return {"left": max(0, limit - len(recent(failures, pool.restart, now))), "of": limit}


def _failure(failure: Failure, *, now: float, wall: float) -> dict[str, object]:
    return {
        "incarnation": failure.incarnation,
        "reason": failure.reason.value,
        "class": None if failure.kind is None else failure.kind.value,
        "means": None if failure.kind is None else RULES[failure.kind].short,
        "message": _public(failure.message),
        "rank": failure.rank,
        "node": failure.node,
        "at": round(wall - (now - failure.at), 3),
    }


def _next(pool: PoolPlan, g: GroupState, *, ending: bool, now: float) -> tuple[str, float | None]:
    """Return what time or an agent's report will bring next, and when, where a time is set."""
    if g.phase in (Phase.STOPPING, Phase.DRAINING):
        if g.stop_sent_at is None or g.cancel_sent_at is not None:
            return "cancel", None
        return "cancel", g.stop_sent_at + pool.stop.grace_s + pool.stop.cancel_after_s
    if ending or waits_for_time(g):
        return "", None
    if g.phase in (Phase.PENDING, Phase.FENCING, Phase.BACKOFF):
        return "launch", g.not_before if g.not_before > now else None
    if g.phase is Phase.STARTING:
        if g.marks.go_at is None:
            return "go", None
        return "give_up", g.marks.go_at + pool.probe.startup_timeout_s
    return "", None


def _message(plan: FleetPlan, state: RunState) -> str:
    """Say in one line what keeps the run from being whole."""
    at_fault = [g for g in state.groups if not serves(plan.pool(plan.group(g.id).pool), state, g)]
    if state.ending or not at_fault:
        return ""
    named = [
        f"{g.id} stale" if g.phase is Phase.READY else f"{g.id} {g.phase}" + (f" ({g.reason})" if g.reason else "")
        for g in at_fault[:3]
    ]
    more = f" and {len(at_fault) - 3} more" if len(at_fault) > 3 else ""
    return ", ".join(named) + more


def _public(text: str) -> str:
    """Return one line without URLs, short enough to be read in a table."""
    line = _URL.sub("(url)", " ".join(text.split()))
    return line if len(line) <= MESSAGE_CHARS else line[: MESSAGE_CHARS - 1] + "…"
