"""Budget, backoff and the job's end: how often a group may come back, how soon, and how late. Pure."""

from __future__ import annotations

from slurm_rollout.core.model import RunState
from slurm_rollout.core.plan import PoolPlan, RestartPolicy


def recent(times: tuple[float, ...], policy: RestartPolicy, now: float) -> tuple[float, ...]:
    """Return the times that still count against the budget."""
    return tuple(t for t in times if now - t < policy.window_s)


def backoff_s(policy: RestartPolicy, failures: int) -> float:
    """Return the delay before the next incarnation after so many failures in the window.

    The first restart comes at once; then `backoff_initial_s`, doubling, up to `backoff_max_s`.
    """
    if failures <= 1:
        return 0.0
    # The exponent is bounded so that a large max_restarts cannot overflow a float.
    return min(policy.backoff_initial_s * 2.0 ** min(failures - 2, 60), policy.backoff_max_s)


def too_late(pool: PoolPlan, run: RunState, *, now: float, job_ends_at: float | None) -> str:
    """Say why a start in this pool could not be of use before the job ends; empty when it could, or nobody knows.

    What a start takes at least is what the fastest one took that led to ready. Where none did yet, it is tried.
    """
    measured = [s for g in pool.groups if (s := run.group(g.id).start_s) is not None]
    if job_ends_at is None or not measured:
        return ""
    takes_s, margin_s, left_s = min(measured), pool.restart.end_margin_s, max(0.0, job_ends_at - now)
    if left_s >= takes_s + margin_s:
        return ""
    return f"the job had {left_s:.0f} s left; a start took {takes_s:.0f} s at least, and is to serve for {margin_s:g} s"
