"""What happens to one group: from its state and what was observed of it to its next state. Pure.

`advance` runs the handler of the group's phase until the phase stays the same, so that a missed tick costs nothing.
Nothing here acts on a fact that was not observed: a handler that misses one asks for it (`Out.want_…`) and waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from slurm_rollout.core import restart
from slurm_rollout.core.failure_classes import RULES, FailureClass
from slurm_rollout.core.failures import find_failure, launch_began_at
from slurm_rollout.core.model import (
    Action,
    Cancel,
    Event,
    Failure,
    Go,
    GroupObservation,
    GroupState,
    Job,
    Launch,
    LostStep,
    Marks,
    NodeWord,
    Observation,
    Process,
    Snapshot,
    StepObservation,
    StepState,
    Stop,
)
from slurm_rollout.core.names import step_name
from slurm_rollout.core.phases import Phase, Reason, check_transition
from slurm_rollout.core.plan import FleetPlan, GroupPlan, PoolPlan
from slurm_rollout.core.pools import may_come

REPEAT_S = 5.0
"""A stop or a cancel that shows no effect is sent again after this long."""

_NO_STEPS: dict[str, Any] = {
    "steps": (),
    "snapshot_sent_at": None,
    "stop_sent_at": None,
    "cancel_sent_at": None,
    "sweep_sent_at": None,
}

_HANGS = frozenset({Reason.NOT_ANSWERING, Reason.ANSWERS_ERROR, Reason.START_TIMEOUT})
"""Failures of engines whose processes still run: what these are doing is the only evidence of what went wrong."""

_OF_THE_NODE = frozenset({Reason.LAUNCH_FAILED, Reason.PORT_BUSY, Reason.LEFTOVER_PROCESS, Reason.GPU_MEMORY})
"""Failures that may come of the node, not of the engine; only they can have it excluded."""

ASK_NODES_S = 10.0
"""Pause between two questions to Slurm about nodes while a step does not end."""

WORDLESS = frozenset({Reason.LAUNCH_FAILED, Reason.STEP_ENDED})
"""Failures without a word of the agent: perhaps its node is lost."""

SNAPSHOT_MARGIN_S = 0.5
"""So much longer than the agents take at most for a snapshot their word is waited for."""

ASKING = "every step of the run ended: asking Slurm whether the job is ending"

BLIND_ECHO_S = 60.0
"""A launch that is refused so soon after Slurm last failed to answer is not charged."""

SRUN_SILENT_S = 2.0
"""What srun prints is worth a message once no agent has spoken for so long."""

IN_THE_QUEUE = "its turn has not come: slurm.max_launching other sruns wait for their steps"

SWEEP_AFTER_S = 1.0
"""A port that still accepts connections this long after everything ended is worth a step that looks why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Everything that a decision about one group may look at."""

    plan: FleetPlan
    pool: PoolPlan
    group: GroupPlan
    obs: Observation
    seen: GroupObservation  # of the current incarnation; empty when nothing was observed of it
    ask_agents: bool = False  # most groups time out at once: only what the agents see too counts
    silent: frozenset[str] = frozenset()  # and what is on these nodes: all others answer
    others_live: bool = True  # another group has living steps, so the job is not ending
    kept: str = ""  # why a trainer's client keeps its pool's groups from starting
    lost: frozenset[str] = frozenset()  # nodes whose steps are not waited for
    excluded: frozenset[str] = frozenset()  # nodes on which nothing is started
    too_late: str = ""  # why a start could not be ready before the job ends


@dataclass(slots=True)
class Out:
    """What the handlers collect."""

    actions: list[Action] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    want_ports: bool = False
    want_listing: bool = False
    want_job: bool = False
    want_nodes: bool = False
    lost_steps: list[LostStep] = field(default_factory=list)  # left behind on lost nodes
    failed_on: list[str] = field(default_factory=list)  # nodes that a launch or check failed on
    broken: list[str] = field(default_factory=list)  # nodes whose GPUs broke under an engine
    fine_on: list[str] = field(default_factory=list)  # nodes on which a group became ready
    wake_at: float | None = None

    def wake(self, at: float) -> None:
        self.wake_at = at if self.wake_at is None else min(at, self.wake_at)


def advance(ctx: Context, g: GroupState, out: Out) -> GroupState:
    """Return the group's next state; what is to be done about it is added to `out`."""
    for _ in Phase:
        after = _HANDLERS[g.phase](ctx, g, out)
        if after.phase is g.phase:
            return after
        # What was observed belongs to the phase that just ended, but for facts that no phase changes.
        if after.incarnation != g.incarnation:
            return after
        g = after
    return g


def to(ctx: Context, g: GroupState, phase: Phase, reason: Reason, message: str = "", **changes: Any) -> GroupState:
    """Return `g` in another phase."""
    check_transition(g.id, g.phase, phase)
    return replace(
        g,
        phase=phase,
        since=ctx.obs.now,
        since_wall=ctx.obs.wall,
        reason=reason,
        message=message,
        **changes,
    )


def event(g: GroupState, type_: str, message: str = "", **data: Any) -> Event:
    """Return an event about `g`; `rank`, `node` and `reason` are taken out of `data`."""
    return Event(
        type=type_,
        group=g.id,
        incarnation=g.incarnation,
        reason=str(data.pop("reason", g.reason)),
        message=message,
        rank=data.pop("rank", None),
        node=data.pop("node", ""),
        data={k: v for k, v in data.items() if v is not None},
    )


def fail(ctx: Context, g: GroupState, failure: Failure, out: Out, *, charged: bool) -> GroupState:
    """Note a failure, and stop what lives. The charge itself is made at the next launch (`_launch`)."""
    policy, now = ctx.pool.restart, ctx.obs.now
    runtime = restart.recent(g.runtime_failures, policy, now)
    start = restart.recent(g.start_failures, policy, now)
    spent = charged and (
        len(start) >= policy.max_start_failures if failure.startup else len(runtime) >= policy.max_restarts
    )
    disk = restart.recent(g.disk_failures, policy, now)
    full = failure.kind is FailureClass.DISK_FULL
    # What Slurm refused a moment ago it will refuse now: only engines' failures are followed by a start at once.
    paced = failure.reason is Reason.LAUNCH_FAILED or (failure.kind is not None and RULES[failure.kind].paced)
    first = 2 if paced else 1
    counted = len(runtime) + len(start) if charged else len(disk) if full else 0
    delay = restart.backoff_s(policy, counted + first) if charged or paced else 0.0
    out.events.append(
        event(
            g,
            "failure",
            failure.message,
            reason=failure.reason,
            rank=failure.rank,
            node=failure.node,
            **{"class": None if failure.kind is None else failure.kind.value},
            restarted_peers=list(failure.restarted_peers),
            detect_s=_detect_s(ctx, failure),
        )
    )
    if charged and failure.node and failure.kind in (FailureClass.STARTUP, FailureClass.NODE):
        if failure.kind is FailureClass.NODE and failure.reason in (Reason.ENGINE_EXITED, Reason.GPU_MEMORY):
            out.broken.append(failure.node)
        elif failure.reason in _OF_THE_NODE:
            out.failed_on.append(failure.node)
    g = replace(
        g,
        failure=failure,
        charge=failure if charged else None,
        goes_to=Phase.FAILED if spent else Phase.FENCING,
        not_before=now + delay,
        runtime_failures=runtime,
        start_failures=start,
        disk_failures=(*disk, now) if full else disk,
        marks=Marks(seen_at=now),
        slow=False,
    )
    if g.phase is Phase.FENCING:  # nothing lives: no stop is needed
        return _settle(ctx, g, out)
    if failure.reason in _HANGS and ctx.pool.stop.snapshot_s > 0:
        out.actions.append(Snapshot(group=g.id, incarnation=g.incarnation, nodes=ctx.group.nodes))
        g = replace(g, snapshot_sent_at=now)
    return to(ctx, g, Phase.STOPPING, failure.reason, failure.message)


def _detect_s(ctx: Context, failure: Failure) -> float | None:
    """Return how long probes failed until it was seen; None for what ends by itself, and is seen when it ends."""
    failing = [e.first_failure_at for e in ctx.seen.endpoints if e.failures and e.first_failure_at is not None]
    probed = failure.reason in (Reason.NOT_ANSWERING, Reason.ANSWERS_ERROR)
    return round(ctx.obs.now - min(failing), 3) if probed and failing else None


def stop(ctx: Context, g: GroupState, reason: Reason, message: str, *, drain: bool) -> GroupState:
    """Return `g` on its way down because somebody wants it: to STOPPED (`drain`) or to its next incarnation."""
    if drain:
        if g.phase is Phase.FENCING and not any(s.sweep for s in g.steps):
            return to(ctx, g, Phase.STOPPED, reason, message)
        if not may_come(g):  # why the fleet may have failed stays said
            return to(ctx, g, Phase.STOPPED, g.reason, g.message, charge=None)
        if g.phase in (Phase.PENDING, Phase.BACKOFF):
            return to(ctx, g, Phase.STOPPED, reason, message, charge=None)
        return to(ctx, g, Phase.DRAINING, reason, message, charge=None, marks=Marks(seen_at=ctx.obs.now))
    return to(
        ctx,
        g,
        Phase.STOPPING,
        reason,
        message,
        goes_to=Phase.FENCING,
        charge=None,
        not_before=ctx.obs.now,
        marks=Marks(seen_at=ctx.obs.now),
    )


def ended(ctx: Context, g: GroupState, step: StepObservation) -> bool | None:
    """Tell whether a step has ended; None when that was not observed.

    srun's exit is a hint, not proof (measured, 22.05.8: a cut node, a hung slurmctld and a killed srun each leave
    the server alive). Proof is the agent's exit record, or srun gone and a later valid listing without the step, of a
    node that is up: Slurm forgets the steps of one that it gives up, and what runs there lives on (22.05.8).
    """
    if step.exit is not None:
        return True
    if step.process is Process.RUNNING:
        return False
    listing = ctx.obs.listing
    if step.exited_at is None or listing is None or listing.asked_at <= step.exited_at:
        return None
    if step_name(ctx.plan, g.id, g.incarnation, step.node, sweep=step.sweep) in listing.names:
        return False
    if step.pid in listing.pids:
        return False
    node = ctx.obs.node(step.node)
    known = node.asked_at is not None and node.asked_at > step.exited_at and not node.silent_s
    return True if known and node.word in (NodeWord.UP, NodeWord.DRAINING) else None


def has_living_steps(seen: GroupObservation) -> bool:
    """Tell whether anything of the group runs, as far as its own processes on the batch host tell."""
    return any(s.exit is None and s.process is Process.RUNNING and s.spoke for s in seen.steps)


# ------------------------------------------------------------------------------------------------------------- handlers


def _pending(ctx: Context, g: GroupState, out: Out) -> GroupState:
    if g.reason is Reason.NO_NODE:
        return g  # `moves` finds it one
    return to(ctx, g, Phase.FENCING, Reason.FIRST_START)


def _fencing(ctx: Context, g: GroupState, out: Out) -> GroupState:
    """Ports first, by connecting; what still accepts is swept by a step on its node, which also names the holder."""
    now = ctx.obs.now
    sweeps = [s for s in ctx.seen.steps if s.sweep]
    if away := ctx.excluded.intersection(ctx.group.nodes):
        if living := _not_ended(ctx, g, sweeps, out):
            return _end_steps(ctx, g, out, living)
        if not _all_seen(ctx, g):
            return g
        left = _left_behind(ctx, g, out, [s for s in sweeps if ended(ctx, g, s) is not True])
        if g.charge is not None and g.charge.node in ctx.lost:
            left.append(g.charge.node)
        if left:
            g = _blame_nodes(ctx, g, left)
        # Before the next launch it moves away from there.
        return replace(g, message=f"leaves {', '.join(sorted(away))}", **_NO_STEPS)
    out.want_ports = True
    deadline = g.since + ctx.pool.fence.timeout_s
    sweeping = _not_ended(ctx, g, sweeps, out)
    busy = ctx.seen.ports_open
    if busy is None or not _all_seen(ctx, g):
        return g
    if not busy and not sweeping:
        return _fenced(ctx, g, out)
    waiting_for = next((f"{s.node}: {s.waiting_for}" for s in sweeps if s.waiting_for), "")
    message = waiting_for or f"{', '.join(busy)} still accepts connections" if busy else g.message
    if now >= deadline:
        if sweeping:
            out.wake(now + REPEAT_S)
            return _end_steps(ctx, g, out, sweeping)
        failure = Failure(
            reason=Reason.PORT_BUSY,
            message=f"not free after {ctx.pool.fence.timeout_s:g} s: {message}",
            node=next((n for n in ctx.group.nodes if any(b in busy for b in _ports_on(ctx, n))), ""),
            incarnation=g.incarnation,
            at=now,
            wall=ctx.obs.wall,
            startup=True,
            kind=FailureClass.STARTUP,
        )
        return fail(ctx, _charge(g), failure, out, charged=True)
    out.wake(deadline)
    if message != g.message:
        out.events.append(event(g, "fence_waits", message, reason=Reason.PORT_BUSY))
    g = replace(g, message=message)
    due = g.since + SWEEP_AFTER_S if g.sweep_sent_at is None else g.sweep_sent_at + REPEAT_S
    if sweeping or not busy:
        return g
    if now < due:
        out.wake(due)
        return g
    nodes = tuple(n for n in ctx.group.nodes if any(b in busy for b in _ports_on(ctx, n)))
    out.actions.append(Launch(group=g.id, incarnation=g.incarnation, nodes=nodes, sweep=True))
    return replace(g, steps=tuple(StepState(node=n, sweep=True) for n in nodes), sweep_sent_at=now)


def _fenced(ctx: Context, g: GroupState, out: Out) -> GroupState:
    now = ctx.obs.now
    if g.marks.fenced_at is None:
        g = replace(g, marks=replace(g.marks, fenced_at=now))
        if g.incarnation:
            since = g.marks.stopped_at if g.marks.stopped_at is not None else g.since
            out.events.append(event(g, "fenced", "ports closed, nothing of it lives", fence_s=round(now - since, 3)))
    if now < g.not_before:
        delay = g.not_before - now
        out.events.append(event(g, "waiting", f"next start in {delay:.0f} s", delay_s=round(delay, 1)))
        return to(ctx, g, Phase.BACKOFF, g.reason, f"next start in {delay:.0f} s", **_NO_STEPS)
    if ctx.too_late:
        out.events.append(event(g, "waiting", ctx.too_late, reason=Reason.TIME_LEFT))
        return to(ctx, g, Phase.BACKOFF, Reason.TIME_LEFT, ctx.too_late, **_NO_STEPS)
    if ctx.kept:
        out.events.append(event(g, "waiting", ctx.kept))
        return to(ctx, g, Phase.BACKOFF, g.reason, ctx.kept, **_NO_STEPS)
    if not _job_goes_on(ctx, g, out):
        return replace(g, message=ASKING)
    return _launch(ctx, g, out)


def _job_goes_on(ctx: Context, g: GroupState, out: Out) -> bool:
    """When everything is down, ask whether the job itself is ending before a restart is tried, or charged."""
    seen_at, asked = g.marks.seen_at, ctx.obs.job_asked_at
    if seen_at is None or ctx.others_live or (ctx.obs.job is Job.RUNNING and asked is not None and asked >= seen_at):
        return True
    out.want_job = True
    return False


def _charge(g: GroupState) -> GroupState:
    """Book the failure that this launch follows. Not earlier: a job that is ending charges nobody."""
    if g.charge is None:
        return g
    if g.charge.startup:
        return replace(g, charge=None, start_failures=(*g.start_failures, g.charge.at))
    return replace(g, charge=None, runtime_failures=(*g.runtime_failures, g.charge.at))


def _launch(ctx: Context, g: GroupState, out: Out) -> GroupState:
    nodes = ctx.group.nodes
    g = to(
        ctx,
        _charge(g),
        Phase.STARTING,
        g.reason,
        "",
        incarnation=g.incarnation + 1,
        restarts=g.restarts + (1 if g.incarnation and g.reason is not Reason.FIRST_START else 0),
        **_NO_STEPS | {"steps": tuple(StepState(node=n) for n in nodes)},
        go_sent_at=None,
        goes_to=Phase.FENCING,
        slow=False,
        weights_version=None,
        marks=replace(g.marks, launched_at=ctx.obs.now, go_at=None, ready_at=None),
    )
    out.events.append(event(g, "launching", f"on {', '.join(nodes)}", nodes=list(nodes)))
    out.actions.append(Launch(group=g.id, incarnation=g.incarnation, nodes=nodes))
    out.wake(ctx.obs.now + ctx.plan.slurm.launch_timeout_s)
    return g


def _backoff(ctx: Context, g: GroupState, out: Out) -> GroupState:
    if g.charge is not None and g.charge.node in ctx.lost:
        g = _blame_nodes(ctx, g, [g.charge.node])
    if ctx.obs.now < g.not_before:
        out.wake(g.not_before)
        return g
    if g.reason is Reason.TIME_LEFT:
        if ctx.too_late:
            return g
        reason = g.failure.reason if g.failure is not None else Reason.FIRST_START
        return to(ctx, g, Phase.FENCING, reason)
    if ctx.kept:
        return replace(g, message=ctx.kept)
    return to(ctx, g, Phase.FENCING, g.reason)


def _starting(ctx: Context, g: GroupState, out: Out) -> GroupState:
    found = find_failure(ctx.plan, ctx.group, g, ctx.seen, ctx.obs, ask_agents=False)
    if found is not None:
        return fail(ctx, g, found.failure, out, charged=found.charged)
    steps, now = ctx.seen.steps, ctx.obs.now
    if g.go_sent_at is None:
        waiting_for = next((f"{s.node}: {s.waiting_for}" for s in steps if s.waiting_for and not s.fenced), "")
        words = next((f"{s.node}: srun says: {s.stderr}" for s in steps if s.stderr and not s.spoke), "")
        if not words and any(s.process is Process.QUEUED for s in steps):
            words = IN_THE_QUEUE
        if words and now < g.since + SRUN_SILENT_S:
            out.wake(g.since + SRUN_SILENT_S)
            words = ""
        if (waiting_for or words) != g.message:
            if waiting_for or words:
                out.events.append(event(g, "fence_waits" if waiting_for else "waiting", waiting_for or words))
            waiting_for = waiting_for or words
            g = replace(g, message=waiting_for)
        if len(steps) < len(ctx.group.nodes) or not all(s.fenced for s in steps):
            began_at = launch_began_at(g, ctx.seen)
            if began_at is not None:
                limit = began_at + ctx.plan.slurm.launch_timeout_s
                out.wake(limit if now < limit else limit + ctx.pool.fence.timeout_s)
            return g
        launched = g.marks.launched_at if g.marks.launched_at is not None else now
        out.events.append(event(g, "go", "every node is fenced", launch_s=round(now - launched, 3)))
        out.actions.append(Go(group=g.id, incarnation=g.incarnation, nodes=ctx.group.nodes))
        out.wake(now + 1.0)
        return replace(g, go_sent_at=now, message="", marks=replace(g.marks, go_at=now))
    deaf = tuple(s.node for s in steps if s.started is None)
    if deaf and now >= g.go_sent_at + 1.0:
        # A coordinator that died between its journal and the signal leaves agents waiting: go is said until heard.
        out.actions.append(Go(group=g.id, incarnation=g.incarnation, nodes=deaf))
        g = replace(g, go_sent_at=now)
    if deaf:
        out.wake((g.go_sent_at or now) + 1.0)
    proved = {e.rank for e in ctx.seen.endpoints if e.proved}
    if not deaf and proved.issuperset(m.rank for m in ctx.group.entrypoints):
        return _ready(ctx, g, out)
    out.wake((g.marks.go_at or now) + ctx.pool.probe.startup_timeout_s)
    return g


def _ready(ctx: Context, g: GroupState, out: Out) -> GroupState:
    now, marks = ctx.obs.now, replace(g.marks, ready_at=ctx.obs.now)

    def took(start: float | None, end: float | None) -> float | None:
        return None if start is None or end is None else round(end - start, 3)

    # An engine is asked from the moment it listens.
    asked_at = [e.asked_at for e in ctx.seen.endpoints if e.asked_at is not None]
    out.events.append(
        event(
            g,
            "ready",
            "every entrypoint answered a real request",
            start_s=took(marks.go_at, now),
            verify_s=took(max(asked_at, default=None), now),
            recovery_s=took(marks.seen_at, now),
            stop_s=took(marks.seen_at, marks.stopped_at),
            fence_s=took(marks.stopped_at, marks.fenced_at),
            launch_s=took(marks.launched_at, marks.go_at),
        )
    )
    out.fine_on += ctx.group.nodes
    start_s = took(marks.launched_at, now)
    return to(ctx, g, Phase.READY, Reason.NONE, marks=marks, start_s=g.start_s if start_s is None else start_s)


def _serving(ctx: Context, g: GroupState, out: Out) -> GroupState:
    """READY and UNREADY: a failure ends it, an answer that says "no" only takes its URLs out of the barrier."""
    found = find_failure(ctx.plan, ctx.group, g, ctx.seen, ctx.obs, ask_agents=ctx.ask_agents, silent=ctx.silent)
    if found is not None:
        return fail(ctx, g, found.failure, out, charged=found.charged)
    slow = any(e.slow for e in ctx.seen.endpoints)
    if slow and not g.slow:
        out.events.append(event(g, "slow", "answers late, but its progress counter moves: left alone"))
    if slow is not g.slow:
        g = replace(g, slow=slow)
    refusing = [e for e in ctx.seen.endpoints if e.refusals >= ctx.pool.probe.readiness_failure_threshold]
    if g.phase is Phase.READY and refusing:
        worst = refusing[0]
        out.events.append(event(g, "unready", worst.last_error, rank=worst.rank, reason=Reason.ANSWERS_ERROR))
        return to(ctx, g, Phase.UNREADY, Reason.ANSWERS_ERROR, f"rank {worst.rank}: {worst.last_error}")
    answering = {e.rank for e in ctx.seen.endpoints if e.answers and not e.refusals and not e.failures}
    if g.phase is Phase.UNREADY and answering.issuperset(m.rank for m in ctx.group.entrypoints):
        out.events.append(event(g, "ready", "answers again", reason=""))
        return to(ctx, g, Phase.READY, Reason.NONE)
    return g


def _stopping(ctx: Context, g: GroupState, out: Out) -> GroupState:
    living = _not_ended(ctx, g, ctx.seen.steps, out)
    if g.phase is Phase.STOPPING and g.goes_to is Phase.FENCING:
        _job_goes_on(ctx, g, out)  # asked while the steps end, so that nobody waits for the answer
    if _awaits_snapshot(ctx, g, living, out):
        return g
    if living or not _all_seen(ctx, g):
        return _end_steps(ctx, g, out, living)
    left = _left_behind(ctx, g, out, [s for s in ctx.seen.steps if ended(ctx, g, s) is not True])
    if left and g.phase is Phase.STOPPING:
        g = _blame_nodes(ctx, g, left)
    if g.goes_to is Phase.FAILED and g.phase is Phase.STOPPING:
        if not _job_goes_on(ctx, g, out):
            return replace(g, message=ASKING)
        if g.charge is not None and g.charge.node in ctx.lost:
            g = _blame_nodes(ctx, g, [g.charge.node])
        elif g.charge is not None and g.charge.reason in WORDLESS and not _asked_of(ctx, g.charge):
            return replace(g, message=f"it would be given up: asking Slurm how {g.charge.node} is")
    now = ctx.obs.now
    since = g.marks.seen_at if g.marks.seen_at is not None else g.since
    g = replace(_excuse(ctx, g), marks=replace(g.marks, stopped_at=now, fenced_at=None), **_NO_STEPS)
    if g.incarnation:
        message = f"every step ended, but for {', '.join(left)}: lost" if left else "every step ended"
        out.events.append(event(g, "stopped", message, stop_s=round(now - since, 3)))
    if g.phase is Phase.DRAINING:
        out.events.append(event(g, "drained", g.message))
        return to(ctx, g, Phase.STOPPED, g.reason, g.message)
    return _settle(ctx, g, out)


def _awaits_snapshot(ctx: Context, g: GroupState, living: list[StepObservation], out: Out) -> bool:
    """Tell whether agents may still be looking at a hung group. Only then: a step that ended is a crash by now."""
    sent_at = g.snapshot_sent_at
    if sent_at is None or g.stop_sent_at is not None or g.phase is not Phase.STOPPING:
        return False
    deadline = sent_at + ctx.pool.stop.snapshot_s + SNAPSHOT_MARGIN_S
    silent = [s.node for s in living if not s.snapshot]
    if (
        silent
        and ctx.obs.now < deadline
        and all(s.process is Process.RUNNING for s in living)
        and _all_live(ctx, living)
    ):
        out.wake(deadline)
        return True
    message = f"none from {', '.join(silent)}" if silent else "what its processes were doing is written down"
    out.events.append(event(g, "snapshot", message, snapshot_s=round(ctx.obs.now - sent_at, 3)))
    return False


def _all_live(ctx: Context, living: list[StepObservation]) -> bool:
    return {s.node for s in living}.issuperset(ctx.group.nodes)


def _excuse(ctx: Context, g: GroupState) -> GroupState:
    """Take back the charge for a launch that a blind Slurm refused, or one that had been blind just before.

    A slurmctld that was started again refuses steps for some seconds, until its nodes have registered: "Memory required
    by task is not available" (measured, 22.05.8).
    """
    failed_at = ctx.obs.listing_failed_at
    if g.charge is None or g.charge.reason is not Reason.LAUNCH_FAILED or failed_at is None:
        return g
    if failed_at < g.charge.at - BLIND_ECHO_S:
        return g
    # It must not be tried as fast as it fails, though.
    return replace(g, charge=None, goes_to=Phase.FENCING, not_before=g.charge.at + ctx.pool.restart.backoff_initial_s)


def _settle(ctx: Context, g: GroupState, out: Out) -> GroupState:
    """Nothing of it lives: on to the next fence, or to FAILED when the budget is spent."""
    if g.goes_to is not Phase.FAILED:
        if g.phase is Phase.FENCING:
            # A fence that failed: the backoff comes first, then the next look at the ports.
            return _wait(ctx, g, out)
        return to(ctx, g, Phase.FENCING, g.reason, g.message)
    what = "start-up failures" if g.failure and g.failure.startup else "restarts"
    policy = ctx.pool.restart
    limit = policy.max_start_failures if g.failure and g.failure.startup else policy.max_restarts
    spent = f"{limit} {what} within {policy.window_s:g} s are spent" if limit else f"no {what} are allowed"
    message = f"{spent}; last: {g.failure.message if g.failure else ''}"
    out.events.append(event(g, "failed", message, reason=Reason.BUDGET_SPENT))
    return to(ctx, g, Phase.FAILED, Reason.BUDGET_SPENT, message, charge=None, **_NO_STEPS)


def _wait(ctx: Context, g: GroupState, out: Out) -> GroupState:
    delay = max(0.0, g.not_before - ctx.obs.now)
    out.events.append(event(g, "waiting", f"next look in {delay:.0f} s", delay_s=round(delay, 1)))
    return to(ctx, g, Phase.BACKOFF, Reason.PORT_BUSY, g.message, **_NO_STEPS)


def _rest(ctx: Context, g: GroupState, out: Out) -> GroupState:
    return g


_HANDLERS: dict[Phase, Callable[[Context, GroupState, Out], GroupState]] = {
    Phase.PENDING: _pending,
    Phase.FENCING: _fencing,
    Phase.BACKOFF: _backoff,
    Phase.STARTING: _starting,
    Phase.READY: _serving,
    Phase.UNREADY: _serving,
    Phase.STOPPING: _stopping,
    Phase.DRAINING: _stopping,
    Phase.STOPPED: _rest,
    Phase.FAILED: _rest,
}


# -------------------------------------------------------------------------------------------------------------- ending


def _all_seen(ctx: Context, g: GroupState) -> bool:
    """Tell whether every step of the state was observed: one that was not may live."""
    return {(s.node, s.sweep) for s in ctx.seen.steps}.issuperset((s.node, s.sweep) for s in g.steps)


def _not_ended(ctx: Context, g: GroupState, steps: Any, out: Out) -> list[StepObservation]:
    """Return the steps that live or may live; for those that may, ask for a listing."""
    living = []
    for step in steps:
        if ended(ctx, g, step) is True or step.node in ctx.lost:
            continue
        living.append(step)
        if step.process not in (Process.RUNNING, Process.QUEUED):
            out.want_listing = True
            asked_at = ctx.obs.node(step.node).asked_at
            fresh = asked_at is not None and step.exited_at is not None and asked_at > step.exited_at
            out.want_nodes |= asked_at is None or not fresh or ctx.obs.now - asked_at >= ASK_NODES_S
    return living


def _left_behind(ctx: Context, g: GroupState, out: Out, living: list[StepObservation]) -> list[str]:
    """Hand over the steps that nobody can end; return their nodes."""
    out.lost_steps += (
        LostStep(
            group=g.id,
            incarnation=g.incarnation,
            node=step.node,
            name=step_name(ctx.plan, g.id, g.incarnation, step.node, sweep=step.sweep),
            pid=step.pid,
        )
        for step in living
    )
    return [step.node for step in living]


def _asked_of(ctx: Context, failure: Failure) -> bool:
    """Tell whether Slurm was asked about the node since; of one without a name nobody can be asked."""
    asked_at = ctx.obs.node(failure.node).asked_at
    return not failure.node or (asked_at is not None and asked_at >= failure.at)


def _blame_nodes(ctx: Context, g: GroupState, nodes: list[str]) -> GroupState:
    """The engine did not fail, its node did: no budget counts that."""
    message = f"{', '.join(dict.fromkeys(nodes))} is lost"
    failure = g.failure
    # Launches failed there before it was known why: since it last answered, or since the group last was well.
    answered_at = [at for n in nodes if (at := ctx.obs.node(n).answered_at) is not None]
    last = max(answered_at or g.runtime_failures, default=0.0)
    if failure is not None and failure.incarnation == g.incarnation:
        failure = replace(
            failure, reason=Reason.NODE_LOST, kind=FailureClass.NODE, message=f"{message}; seen: {failure.message}"
        )
    else:  # it was stopped because somebody wanted that; what failed before is another matter
        failure = Failure(
            reason=Reason.NODE_LOST,
            message=message,
            incarnation=g.incarnation,
            at=ctx.obs.now,
            wall=ctx.obs.wall,
            node=nodes[0],
            kind=FailureClass.NODE,
        )
    return replace(
        g,
        failure=failure,
        charge=None,
        goes_to=Phase.FENCING,
        reason=Reason.NODE_LOST,
        message=message,
        not_before=0.0,
        start_failures=tuple(at for at in g.start_failures if at <= last),
        node_failures=g.node_failures + 1,
    )


def _end_steps(ctx: Context, g: GroupState, out: Out, living: list[StepObservation]) -> GroupState:
    """First the agents (SIGUSR1 through srun: about 30 ms, also while slurmctld hangs), then one scancel."""
    now, nodes = ctx.obs.now, tuple(s.node for s in living)
    if not nodes:
        return g
    if g.stop_sent_at is None:
        out.actions.append(Stop(group=g.id, incarnation=g.incarnation, nodes=nodes))
        g = replace(g, stop_sent_at=now)
    stop_sent_at = g.stop_sent_at if g.stop_sent_at is not None else now
    due = stop_sent_at + ctx.pool.stop.grace_s + ctx.pool.stop.cancel_after_s
    if g.cancel_sent_at is not None:
        due = g.cancel_sent_at + REPEAT_S
    if now >= due:
        out.actions.append(Cancel(group=g.id, incarnation=g.incarnation, nodes=nodes))
        g = replace(g, cancel_sent_at=now, message=f"{g.reason}: still ending on {', '.join(nodes)}")
        due = now + REPEAT_S
    out.wake(due)
    return g


def _ports_on(ctx: Context, node: str) -> list[str]:
    address = ctx.group.addresses[node]
    return [f"{address}:{p}" for m in ctx.group.on(node) for p in m.fenced_ports]
