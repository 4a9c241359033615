"""What trainers say, and what follows from it: weights that serve, starts that may begin, probes that rest. Pure.

A client's words are heard (`heed`), acted upon, and echoed in the barrier only once all that they ask for is so
(`answer`). Its acknowledgements are taken in one by one, each once: their number is remembered over takeovers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from slurm_rollout.core.model import Ack, ClientState, ClientWords, Event, Observation, Process, RunState
from slurm_rollout.core.phases import ALIVE, Phase, PoolPhase
from slurm_rollout.core.plan import FleetPlan, PoolPlan
from slurm_rollout.core.pools import pool_view

TRAINING = "training"
SYNCING = "syncing"
PHASES = ("generating", TRAINING, SYNCING)
"""What a client may announce."""

UNCONFIRMED_S = 10.0
"""So much longer than a probe's time-out an agent's word is waited for that it asks its engines nothing."""

AWAITS_BARRIER = f"waits until a client announces {SYNCING!r}, or waits for the pool below min_ready"


def heed(plan: FleetPlan, run: RunState, obs: Observation, events: list[Event]) -> RunState:
    """Take in what clients said since they were last heard; what they said for a time only ends by itself."""
    known = {c.id: c for c in run.clients}
    for words in obs.clients:
        client = known.get(words.id, ClientState(id=words.id))
        if words.seq > client.seq:
            client = _hear(client, words, obs.now, events)
        for ack in words.acks:
            if ack.n > client.acks:
                run = _take_ack(plan, run, client, ack, events)
                client = replace(client, acks=ack.n)
        known[words.id] = client
    clients = tuple(_expire(known[name], obs.now, events) for name in sorted(known))
    run = run if clients == run.clients else replace(run, clients=clients)
    return _pause(plan, run, obs.now, events)


def _hear(client: ClientState, words: ClientWords, now: float, events: list[Event]) -> ClientState:
    data = {"client": client.id}
    if words.phase != client.phase:
        events.append(Event(type="phase", message=f"{client.id}: {words.phase}", data=data))
    if bool(words.hold_s) is not bool(client.hold_s):
        said = f"asked for, for {words.hold_s:g} s at most" if words.hold_s else "released"
        events.append(Event(type="hold", message=f"{client.id}: {said}", data=data))
    return replace(
        client,
        seq=words.seq,
        heard_at=now,
        phase=words.phase,
        phase_since=client.phase_since if words.phase == client.phase else None,
        hold_s=words.hold_s,
        waiting_s=words.waiting_s,
        hold=client.hold and words.hold_s > 0,
    )


def _expire(client: ClientState, now: float, events: list[Event]) -> ClientState:
    if client.hold_s and now >= client.heard_at + client.hold_s:
        message = f"{client.id}: not renewed for {client.hold_s:g} s: groups may start again"
        events.append(Event(type="hold_expired", message=message, data={"client": client.id}))
        client = replace(client, hold_s=0.0, hold=False)
    if client.waiting_s and now >= client.heard_at + client.waiting_s:
        client = replace(client, waiting_s=0.0)
    return client


def _take_ack(plan: FleetPlan, run: RunState, client: ClientState, ack: Ack, events: list[Event]) -> RunState:
    """Believe an acknowledgement of those incarnations that it names and that still live, of nothing else."""
    targets, taken, late, void = dict(run.targets), set[str](), [], set[str]()
    for pool in plan.pools:
        ids = {planned.id for planned in pool.groups}
        named = {g: n for g, n in ack.groups if g in ids}
        if not named:
            continue
        target = targets.get(pool.name)
        refused = "is frozen: nobody pushes weights into it" if not pool.is_trained else ""
        if target is not None and ack.version < target and not ack.rollback:
            refused = f"has version {target}: going back needs rollback=True"
        if refused:
            message = f"{client.id}: version {ack.version} is refused: pool {pool.name} {refused}"
            events.append(Event(type="ack_refused", message=message, data={"client": client.id, "n": ack.n}))
            continue
        targets[pool.name] = ack.version
        if target is not None and ack.version < target:
            # Newer numbers will stand for other weights; and one that has this may have got half of a newer one.
            void |= ids
        for g in run.groups:
            if g.id not in named:
                continue
            if g.incarnation == named[g.id] and g.phase in ALIVE:
                taken.add(g.id)
            else:
                late.append(f"{g.id} (incarnation {named[g.id]} is gone)")
    if taken or late:
        what = ", ".join(sorted(taken)) or "no group"
        message = f"{client.id}: version {ack.version} in {what}" + (f"; not in {', '.join(late)}" if late else "")
        events.append(Event(type="weights", message=message, data={"client": client.id, "version": ack.version}))
    versions = dict.fromkeys(void) | dict.fromkeys(taken, ack.version)
    groups = tuple(replace(g, weights_version=versions[g.id]) if g.id in versions else g for g in run.groups)
    return replace(run, targets=targets, groups=groups)


# ------------------------------------------------------------------------------------------------- what they ask for


def _pause(plan: FleetPlan, run: RunState, now: float, events: list[Event]) -> RunState:
    """Note which pools' engines are asked nothing now, because a client said that they sleep or take weights."""
    paused = []
    for pool in plan.pools:
        policy = pool.probe
        who = [
            c
            for c in run.clients
            if c.phase in policy.pause_in and (c.phase_since is None or now < c.phase_since + policy.pause_max_s)
        ]
        if who:
            paused.append(pool.name)
        if bool(who) is not (pool.name in run.paused):
            over = any(c.phase in policy.pause_in for c in run.clients) and not who
            message = f"pool {pool.name}: " + (
                f"{who[0].id} announced {who[0].phase}: probes rest"
                if who
                else f"paused for {policy.pause_max_s:g} s: probes go on, whatever the engines do"
                if over
                else "probes go on"
            )
            events.append(Event(type="probes", reason="paused" if who else "on", message=message))
    if tuple(paused) == run.paused:
        return run
    begun = {name: run.pauses.get(name, 0) + 1 for name in paused if name not in run.paused}
    return replace(run, paused=tuple(paused), pauses={**run.pauses, **begun})


def keeps_from_starting(plan: FleetPlan, run: RunState, pool: PoolPlan, now: float) -> str:
    """Return why no group of the pool may start now; empty where nothing speaks against it.

    `at_barrier`: the engines' GPUs are the trainer's, unless a client says that they are not. A client that sits in
    `wait_ready` does nothing else, whatever it announced before.
    """
    if pool.heeds_holds:
        for client in run.clients:
            if client.hold_s:
                return f"held by {client.id}"
    if pool.restart.when != "at_barrier" or not any(c.phase for c in run.clients):
        return ""
    phases = {c.phase for c in run.clients if not c.waiting_s}
    waits = any(c.waiting_s for c in run.clients)
    short = waits and pool_view(pool, run, now, plan.degraded_timeout_s).phase is PoolPhase.WAITING
    permitted = TRAINING not in phases and (SYNCING in phases or short)
    return "" if permitted else AWAITS_BARRIER


def next_change_at(plan: FleetPlan, run: RunState) -> Iterator[float]:
    """Yield the moments at which time alone changes what clients' words mean."""
    for client in run.clients:
        if client.hold_s:
            yield client.heard_at + client.hold_s
        if client.waiting_s:
            yield client.heard_at + client.waiting_s
        for pool in plan.pools:
            if pool.name in run.paused and client.phase in pool.probe.pause_in:
                if client.phase_since is not None:
                    yield client.phase_since + pool.probe.pause_max_s
                if client.echo < client.seq:
                    yield client.heard_at + pool.probe.liveness_timeout_s + UNCONFIRMED_S


# ----------------------------------------------------------------------------------------------------------- answers


def answer(plan: FleetPlan, run: RunState, obs: Observation, events: list[Event]) -> RunState:
    """Grant holds and echo words, each as soon as it is so; `run` is what was decided of the groups."""
    clients = tuple(_answer(plan, run, obs, c, events) for c in run.clients)
    return run if clients == run.clients else replace(run, clients=clients)


def _answer(plan: FleetPlan, run: RunState, obs: Observation, client: ClientState, events: list[Event]) -> ClientState:
    starting = [plan.pool(plan.group(g.id).pool) for g in run.groups if g.phase is Phase.STARTING]
    hold = client.hold or (client.hold_s > 0 and not any(p.heeds_holds for p in starting))
    if hold is not client.hold:
        events.append(Event(type="hold", message=f"{client.id}: granted", data={"client": client.id}))
        client = replace(client, hold=hold)
    if client.echo == client.seq or hold is not (client.hold_s > 0):
        return client
    # An engine that still loads takes memory that the trainer is about to use.
    if client.phase == TRAINING and any(p.restart.when == "at_barrier" for p in starting):
        return client
    if loud := tuple(_loud(plan, run, obs, client)):
        limit_s = max(p.probe.liveness_timeout_s for p in plan.pools) + UNCONFIRMED_S
        if obs.now < client.heard_at + limit_s:
            return client
        message = f"{client.id}: it is not certain that nothing is asked of {', '.join(loud)}"
        events.append(Event(type="probes", reason="unconfirmed", message=message))
    return replace(client, echo=client.seq, phase_since=obs.now if client.phase_since is None else client.phase_since)


def _loud(plan: FleetPlan, run: RunState, obs: Observation, client: ClientState) -> Iterator[str]:
    """Yield the groups of which it was not seen yet that their engines are asked nothing any more."""
    for pool in plan.pools:
        if pool.name not in run.paused or client.phase not in pool.probe.pause_in:
            continue
        for planned in pool.groups:
            g, seen = run.group(planned.id), obs.group(planned.id)
            if g.phase not in ALIVE:
                continue
            if seen is None or seen.incarnation != g.incarnation:
                yield g.id
                continue
            # An agent on a slow file system may still mean the pause before this one.
            pause = run.pauses[pool.name]
            agents = [s.pause for s in seen.steps if s.exit is None and s.process is Process.RUNNING]
            if not seen.probes_paused or not all(said in (None, pause) for said in agents):
                yield g.id
