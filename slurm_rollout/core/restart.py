"""Budget and backoff: how often a group may come back, and how soon. Pure."""

from __future__ import annotations

from slurm_rollout.core.plan import RestartPolicy


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
