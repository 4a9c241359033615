"""Has this incarnation failed, and which member is to blame? Pure.

Any end that we did not ask for is a failure, whatever its code: engines lie (vLLM ends with 0 when its engine died,
SGLang's leader kills itself with 9: run, 0.32 and 0.5.23) and srun's code does too (0 on node failure before 23.02).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from slurm_rollout.core import srun_words
from slurm_rollout.core.failure_classes import RULES, Budget, FailureClass, classify, names_lost_node
from slurm_rollout.core.model import (
    Endpoint,
    ExitRecord,
    Failure,
    GroupObservation,
    GroupState,
    Observation,
    Process,
    StepObservation,
)
from slurm_rollout.core.phases import ALIVE, Phase, Reason
from slurm_rollout.core.plan import FleetPlan, GroupPlan, PoolPlan

_CAUSES = {
    "engine_exited": Reason.ENGINE_EXITED,
    "port_busy": Reason.PORT_BUSY,
    "leftover_process": Reason.LEFTOVER_PROCESS,
    "gpu_memory": Reason.GPU_MEMORY,
    "other_incarnation": Reason.OTHER_INCARNATION,
    "self_fenced": Reason.SELF_FENCED,
    "exec_failed": Reason.LAUNCH_FAILED,
    "bad_config": Reason.LAUNCH_FAILED,
    "stopped": Reason.STEP_ENDED,
}

# Engines die when their peers on a node that fenced itself are gone; an agent that was told to stop says nothing.
_TELLING = {"self_fenced": 0, "stopped": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    failure: Failure
    charged: bool  # against a budget; not where its class has none, or we, or a Slurm that is blind, are the cause


def find_failure(
    plan: FleetPlan,
    group: GroupPlan,
    g: GroupState,
    seen: GroupObservation,
    obs: Observation,
    *,
    ask_agents: bool,
    silent: Collection[str] = (),
) -> Found | None:
    """Return the failure of the current incarnation, the most telling one first; None when there is none.

    `ask_agents`: an engine that times out for us only is no failure, unless its node is one of the `silent` ones.
    """
    pool = plan.pool(group.pool)

    def found(
        reason: Reason,
        message: str,
        *,
        rank: int | None = None,
        node: str = "",
        charged: bool = True,
        step: StepObservation | None = None,
    ) -> Found:
        failed_nodes = {s.node for s in seen.steps if s.exit is not None or s.process is not Process.RUNNING}
        silent = {e.rank for e in seen.endpoints if e.failures}
        peers = tuple(m.rank for m in group.members if m.rank not in {rank, *silent} and m.node not in failed_nodes)
        if rank is None:  # nobody knows who was well
            peers = ()
        kind = _class(g, seen, reason, step)
        return Found(
            failure=Failure(
                reason=reason,
                message=message,
                incarnation=g.incarnation,
                at=obs.now,
                wall=obs.wall,
                rank=rank,
                node=node,
                startup=g.phase is Phase.STARTING,
                kind=kind,
                restarted_peers=peers,
            ),
            charged=charged and RULES[kind].budget is not Budget.NONE,
        )

    # A lost node comes before its peers, which died of it; engines that died by themselves before those whose agent was
    # only told to stop.
    for step in sorted(seen.steps, key=_tells_less):
        if step.exit is not None:
            reason = _CAUSES.get(step.exit.cause, Reason.STEP_ENDED)
            # Silence is no fault of the engine's; it lasts long, so that this cannot spin.
            charged = reason is not Reason.SELF_FENCED
            message = _with_evidence(step.exit)
            return found(reason, message, rank=step.exit.rank, node=step.node, charged=charged, step=step)
        if step.process is not Process.RUNNING and step.exited_at is not None:
            reason, message, charged = _silent_end(g, step)
            rank = group.on(step.node)[0].rank
            return found(reason, message, rank=rank, node=step.node, charged=charged, step=step)

    for step in seen.steps:
        if step.stranger:
            return found(Reason.STRANGER_ANSWERS, step.stranger, node=step.node)
        planned = tuple(m.rank for m in group.on(step.node))
        if step.started is not None and tuple(sorted(step.started)) != planned:
            return found(Reason.MISMATCH, f"started ranks {step.started}, planned {planned}", node=step.node)
    for endpoint in seen.endpoints:
        if endpoint.mismatch:
            member = group.members[endpoint.rank]
            return found(Reason.MISMATCH, endpoint.mismatch, rank=endpoint.rank, node=member.node)

    if g.phase is Phase.STARTING:
        late = _late(plan, group, g, seen, obs)
        return None if late is None else found(late[0], late[1], step=late[2])
    if g.phase in ALIVE:
        for endpoint in seen.endpoints:
            if endpoint.failures < pool.probe.liveness_failure_threshold:
                continue
            member = group.members[endpoint.rank]
            if ask_agents and member.node not in silent and not _agent_agrees(group, pool, seen, endpoint):
                continue
            reason = Reason.ANSWERS_ERROR if endpoint.refusals else Reason.NOT_ANSWERING
            message = f"{endpoint.failures} liveness probes failed in a row: {endpoint.last_error}"
            # One member that hangs silences all: the first to reach the threshold is a witness, not the culprit.
            others = [str(e.rank) for e in seen.endpoints if e.failures and e.rank != endpoint.rank]
            if others:
                message += f" (rank {', '.join(others)} failing too)"
            return found(reason, message, rank=endpoint.rank, node=member.node)
    return None


def _tells_less(step: StepObservation) -> tuple[bool, int]:
    lost = step.exit is None and step.process is Process.EXITED and names_lost_node(step.stderr)
    return not lost, 3 if step.exit is None else _TELLING.get(step.exit.cause, 1)


def _class(g: GroupState, seen: GroupObservation, reason: Reason, step: StepObservation | None) -> FailureClass:
    record = None if step is None else step.exit
    before = g.failure
    return classify(
        reason,
        startup=g.phase is Phase.STARTING,
        launched=step is None or step.spoke or record is not None,
        accepted=any(s.spoke for s in seen.steps)
        or (before is not None and before.kind not in (None, FailureClass.SLURM_REFUSED)),
        words="" if step is None else step.stderr if record is None else record.message,
        disk="" if record is None else record.disk,
        hardware="" if record is None else record.hardware,
    )


def _with_evidence(record: ExitRecord) -> str:
    return "; ".join(part for part in (record.message, record.hardware, record.disk) if part)


def _silent_end(g: GroupState, step: StepObservation) -> tuple[Reason, str, bool]:
    """A step whose holder is gone and whose agent left no word."""
    if step.process is Process.UNKNOWN:
        if g.phase is Phase.STARTING:
            return Reason.TAKEOVER, "the start was interrupted by the coordinator's death: not counted", False
        return Reason.STEP_ENDED, "its srun is gone and nobody saw it end", True
    words = f": {step.stderr}" if step.stderr else ""
    if step.spoke:
        return Reason.STEP_ENDED, f"srun ended with {step.exit_code}{words}", True
    unanswered = any(w in step.stderr for w in srun_words.UNANSWERED)
    return Reason.LAUNCH_FAILED, f"no step was launched, srun ended with {step.exit_code}{words}", not unanswered


def launch_began_at(g: GroupState, seen: GroupObservation) -> float | None:
    """Return from when on the launch may take as long as it may: the start of its last srun; None before that."""
    if any(s.process is Process.QUEUED for s in seen.steps):
        return None
    return max((s.launched_at for s in seen.steps if s.launched_at is not None), default=g.since)


def _late(
    plan: FleetPlan, group: GroupPlan, g: GroupState, seen: GroupObservation, obs: Observation
) -> tuple[Reason, str, StepObservation | None] | None:
    """What takes too long, and the step that keeps it waiting where it is one that has not even begun."""
    pool = plan.pool(group.pool)
    if g.go_sent_at is None:
        began_at = launch_began_at(g, seen)
        if began_at is None:
            return None
        waited = obs.now - began_at
        silent = [s for s in seen.steps if not s.spoke]
        limit = plan.slurm.launch_timeout_s
        if silent and waited >= limit:
            first = next((s for s in silent if s.stderr), silent[0])
            words = f"; srun says: {first.stderr}" if first.stderr else ""
            nodes = ", ".join(s.node for s in silent)
            return Reason.LAUNCH_FAILED, f"no word from the agent on {nodes} for {limit:g} s{words}", first
        unfenced = [f"{s.node}: {s.waiting_for or 'no report'}" for s in seen.steps if not s.fenced]
        limit += pool.fence.timeout_s
        if unfenced and waited >= limit:
            return Reason.LAUNCH_FAILED, f"not fenced after {limit:g} s: {'; '.join(unfenced)}", None
        return None
    if g.marks.go_at is not None and obs.now - g.marks.go_at >= pool.probe.startup_timeout_s:
        listening = {r for s in seen.steps for r in s.listening}
        missing = []
        for member in group.entrypoints:
            endpoint = next((e for e in seen.endpoints if e.rank == member.rank), None)
            if endpoint is not None and endpoint.proved:
                continue
            if member.rank not in listening:
                missing.append(f"rank {member.rank} does not listen on port {member.ports['http']}")
            else:
                missing.append(f"rank {member.rank}: {endpoint.last_error if endpoint else 'not probed'}")
        return (
            Reason.START_TIMEOUT,
            f"not ready after {pool.probe.startup_timeout_s:g} s: {'; '.join(missing)}",
            None,
        )
    return None


def _agent_agrees(group: GroupPlan, pool: PoolPlan, seen: GroupObservation, endpoint: Endpoint) -> bool:
    """The coordinator may be the one that is cut off: does the member's own agent see the failure too?"""
    node = group.members[endpoint.rank].node
    step = next((s for s in seen.steps if s.node == node and not s.sweep), None)
    return step is not None and step.failing.get(endpoint.rank, 0) >= pool.probe.liveness_failure_threshold
