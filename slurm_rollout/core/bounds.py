"""The longest that a recovery can take, from the failure until the group is ready. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from slurm_rollout.core.group import SNAPSHOT_MARGIN_S
from slurm_rollout.core.plan import FleetPlan, PoolPlan
from slurm_rollout.core.restart import backoff_s

CRASH_DETECT_S = 1.0
"""An ended step wakes the coordinator at once; this leaves room for a tick that was busy."""

STOP_MARGIN_S = 5.0
"""For the agents' kill, one scancel and one listing of the steps, with a Slurm that answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Seconds, each the longest of its stage; the stages follow one another.

    It holds while Slurm answers, the nodes are up and the budget is not spent, for an engine that comes up within
    its own `startup.timeout_s`: that one makes most of it, and a healthy engine needs a small part of it.
    """

    crash_detect_s: float  # a member's process ended
    detect_s: float  # a member hangs, or is half dead: the liveness threshold has to be reached
    snapshot_s: float  # after a hang: the agents' look at what its processes are doing
    stop_s: float  # grace, then scancel, then the proof that every step ended
    fence_s: float  # the coordinator's look at the ports, then the agents' proof on their nodes
    # Where more than `max_launching` steps of the run start at once, some wait for their turn in addition.
    start_s: float  # srun until its agent speaks, then the engine's own start
    verify_s: float  # a readiness request that was sent just before the start-up's time was over
    backoff_s: float  # not in the total: what a group with failures just behind it can wait in addition

    @property
    def total_s(self) -> float:
        """From a hang, the slowest kind of failure to see, until ready."""
        return self.detect_s + self.snapshot_s + self.stop_s + self.fence_s + self.start_s + self.verify_s

    @property
    def crash_total_s(self) -> float:
        """From the end of a member's process until ready."""
        return self.total_s - self.detect_s - self.snapshot_s + self.crash_detect_s


def recovery_bound(plan: FleetPlan, pool: PoolPlan) -> Bound:
    """Return the bound for any group of the pool.

    A hang is seen after one period in which no probe was due, then `failure_threshold` probes in a row, each of which
    takes its time-out, or a period where that is longer.
    """
    probe, restart = pool.probe, pool.restart
    probe_s = max(probe.liveness_period_s, probe.liveness_timeout_s)
    return Bound(
        crash_detect_s=CRASH_DETECT_S,
        detect_s=probe.liveness_period_s + probe.liveness_failure_threshold * probe_s,
        snapshot_s=pool.stop.snapshot_s + SNAPSHOT_MARGIN_S if pool.stop.snapshot_s else 0.0,
        stop_s=pool.stop.grace_s + pool.stop.cancel_after_s + STOP_MARGIN_S,
        fence_s=2 * pool.fence.timeout_s,
        start_s=plan.slurm.launch_timeout_s + probe.startup_timeout_s,
        verify_s=probe.startup_request_timeout_s,
        backoff_s=backoff_s(restart, restart.max_restarts + restart.max_start_failures),
    )
