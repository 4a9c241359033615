"""Has this incarnation failed, and which member is to blame? Pure.

Any end that we did not ask for is a failure, whatever its code: engines lie (vLLM ends with 0 when its engine died,
SGLang's leader kills itself with 9: run, 0.32 and 0.5.23) and srun's code does too (0 on node failure before 23.02).
"""

from __future__ import annotations

from dataclasses import dataclass

from slurm_rollout.core import srun_words
from slurm_rollout.core.model import (
    Endpoint,
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
    "exec_failed": Reason.LAUNCH_FAILED,
    "bad_config": Reason.LAUNCH_FAILED,
    "stopped": Reason.STEP_ENDED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    failure: Failure
    charged: bool  # against the budget; not where we, or a Slurm that does not answer, are the cause


def find_failure(
    plan: FleetPlan,
    group: GroupPlan,
    g: GroupState,
    seen: GroupObservation,
    obs: Observation,
    *,
    ask_agents: bool,
) -> Found | None:
    """Return the failure of the current incarnation, the most telling one first; None when there is none."""
    pool = plan.pool(group.pool)

    def found(reason: Reason, message: str, *, rank: int | None = None, node: str = "", charged: bool = True) -> Found:
        failed_nodes = {s.node for s in seen.steps if s.exit is not None or s.process is not Process.RUNNING}
        silent = {e.rank for e in seen.endpoints if e.failures}
        peers = tuple(m.rank for m in group.members if m.rank not in {rank, *silent} and m.node not in failed_nodes)
        if rank is None:  # nobody knows who was well
            peers = ()
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
                restarted_peers=peers,
            ),
            charged=charged,
        )

    # Engines that died by themselves before those whose agent was only told to stop.
    for step in sorted(seen.steps, key=lambda s: (s.exit is None, s.exit is not None and s.exit.cause == "stopped")):
        if step.exit is not None:
            reason = _CAUSES.get(step.exit.cause, Reason.STEP_ENDED)
            return found(reason, step.exit.message, rank=step.exit.rank, node=step.node)
        if step.process is not Process.RUNNING and step.exited_at is not None:
            reason, message, charged = _silent_end(g, step)
            rank = group.on(step.node)[0].rank
            return found(reason, message, rank=rank, node=step.node, charged=charged)

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
        return None if late is None else found(*late)
    if g.phase in ALIVE:
        for endpoint in seen.endpoints:
            if endpoint.failures < pool.probe.liveness_failure_threshold:
                continue
            if ask_agents and not _agent_agrees(group, pool, seen, endpoint):
                continue
            member = group.members[endpoint.rank]
            reason = Reason.ANSWERS_ERROR if endpoint.refusals else Reason.NOT_ANSWERING
            message = f"{endpoint.failures} liveness probes failed in a row: {endpoint.last_error}"
            # One member that hangs silences all: the first to reach the threshold is a witness, not the culprit.
            others = [str(e.rank) for e in seen.endpoints if e.failures and e.rank != endpoint.rank]
            if others:
                message += f" (rank {', '.join(others)} failing too)"
            return found(reason, message, rank=endpoint.rank, node=member.node)
    return None


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
) -> tuple[Reason, str] | None:
    pool = plan.pool(group.pool)
    if g.go_sent_at is None:
        began_at = launch_began_at(g, seen)
        if began_at is None:
            return None
        waited = obs.now - began_at
        silent = [s.node for s in seen.steps if not s.spoke]
        limit = plan.slurm.launch_timeout_s
        if silent and waited >= limit:
            words = next((f"; srun says: {s.stderr}" for s in seen.steps if s.stderr and not s.spoke), "")
            return Reason.LAUNCH_FAILED, f"no word from the agent on {', '.join(silent)} for {limit:g} s{words}"
        unfenced = [f"{s.node}: {s.waiting_for or 'no report'}" for s in seen.steps if not s.fenced]
        limit += pool.fence.timeout_s
        if unfenced and waited >= limit:
            return Reason.LAUNCH_FAILED, f"not fenced after {limit:g} s: {'; '.join(unfenced)}"
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
        )
    return None


def _agent_agrees(group: GroupPlan, pool: PoolPlan, seen: GroupObservation, endpoint: Endpoint) -> bool:
    """The coordinator may be the one that is cut off: does the member's own agent see the failure too?"""
    node = group.members[endpoint.rank].node
    step = next((s for s in seen.steps if s.node == node and not s.sweep), None)
    return step is not None and step.failing.get(endpoint.rank, 0) >= pool.probe.liveness_failure_threshold
