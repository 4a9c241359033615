"""Phases of a group and of a pool, the reasons for them, and the one table of legal transitions.

Pure. `docs/architecture.md` carries a diagram that `python -m slurm_rollout.core.phases` prints from this table.
"""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Where a group stands. The value is what every file and table shows."""

    PENDING = "pending"  # not started yet in this run, or without a node to start on
    FENCING = "fencing"  # nothing of it lives; its ports are checked, leftovers are ended
    BACKOFF = "backoff"  # fenced; waits before the next incarnation
    STARTING = "starting"  # steps launched: agents fence their nodes, go, engines load, readiness is proved
    READY = "ready"  # every entrypoint answered a real request
    UNREADY = "unready"  # was ready; an entrypoint now answers that it cannot serve
    STOPPING = "stopping"  # a failure was seen (or a restart asked for): every step is being ended
    DRAINING = "draining"  # every step is being ended because the operator or the run's end wants it
    STOPPED = "stopped"  # drained; comes back only when asked
    FAILED = "failed"  # budget spent; comes back only when asked


class PoolPhase(StrEnum):
    """What the trainer sees of a pool, and of the whole (the worst of the pools)."""

    WAITING = "waiting"
    NEEDS_WEIGHTS = "needs_weights"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


class Reason(StrEnum):
    """One word for why a phase was entered."""

    NONE = ""
    FIRST_START = "first_start"
    ENGINE_EXITED = "engine_exited"
    STEP_ENDED = "step_ended"  # the step is gone and its agent left no exit record
    NOT_ANSWERING = "not_answering"
    ANSWERS_ERROR = "answers_error"
    START_TIMEOUT = "start_timeout"
    LAUNCH_FAILED = "launch_failed"
    PORT_BUSY = "port_busy"
    LEFTOVER_PROCESS = "leftover_process"
    GPU_MEMORY = "gpu_memory"
    OTHER_INCARNATION = "other_incarnation"
    SELF_FENCED = "self_fenced"  # its agent heard nothing of the coordinator for so long that it ended the engines
    STRANGER_ANSWERS = "stranger_answers"
    MISMATCH = "mismatch"
    OPERATOR = "operator"
    RUN_ENDING = "run_ending"
    JOB_ENDING = "job_ending"
    TAKEOVER = "takeover"  # a start that a coordinator's death interrupted before it was complete
    BUDGET_SPENT = "budget_spent"
    NODE_LOST = "node_lost"
    NODE_EXCLUDED = "node_excluded"  # it moves away from a node that fails again and again, or that an operator drains
    NO_NODE = "no_node"  # none is left that it could run on
    TIME_LEFT = "time_left"  # the job ends before a start could be ready


P = Phase

TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    P.PENDING: frozenset({P.FENCING, P.STOPPED}),
    P.FENCING: frozenset({P.BACKOFF, P.STARTING, P.PENDING, P.FAILED, P.STOPPED, P.DRAINING}),
    P.BACKOFF: frozenset({P.FENCING, P.PENDING, P.STOPPED}),  # time passed: the ports are looked at once more
    P.STARTING: frozenset({P.READY, P.STOPPING, P.DRAINING}),
    P.READY: frozenset({P.UNREADY, P.STOPPING, P.DRAINING}),
    P.UNREADY: frozenset({P.READY, P.STOPPING, P.DRAINING}),
    P.STOPPING: frozenset({P.FENCING, P.FAILED, P.DRAINING}),
    P.DRAINING: frozenset({P.STOPPED}),
    P.STOPPED: frozenset({P.FENCING}),
    P.FAILED: frozenset({P.FENCING, P.STOPPED}),
}
"""Every legal change of phase. Whoever changes a phase goes through `check_transition`."""

ALIVE = frozenset({P.READY, P.UNREADY})
"""Phases of an incarnation that was proved alive: only these may have URLs in the barrier file."""

MAY_HAVE_STEPS = frozenset({P.STARTING, P.READY, P.UNREADY, P.STOPPING, P.DRAINING})
"""Phases in which steps of the group's current incarnation may live."""


class IllegalTransition(Exception):
    """A change of phase that the table does not allow: a bug in the decision code, never a user's doing."""


def check_transition(group: str, before: Phase, after: Phase) -> None:
    """Raise `IllegalTransition` unless the table allows `before` to `after`."""
    if after not in TRANSITIONS[before]:
        raise IllegalTransition(f"{group}: {before} -> {after} is not a legal transition")


def diagram() -> str:
    """Return the table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {P.PENDING}"]
    lines += [f"    {a} --> {b}" for a in Phase for b in Phase if b in TRANSITIONS[a]]
    return "\n".join(lines)


if __name__ == "__main__":
    print(diagram())
