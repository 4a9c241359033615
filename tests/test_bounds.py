"""The worst-case time of a recovery: each stage from its own setting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slurm_rollout.core.bounds import CRASH_DETECT_S, STOP_MARGIN_S, recovery_bound
from slurm_rollout.core.group import SNAPSHOT_MARGIN_S
from slurm_rollout.core.plan import (
    Environment,
    FencePolicy,
    FleetPlan,
    PoolPlan,
    ProbePolicy,
    ProbeRequest,
    RestartPolicy,
    SlurmSettings,
    StopPolicy,
)

POOL = PoolPlan(
    name="actor",
    groups=(),
    min_ready=1,
    weights="frozen",
    engine="command",
    named_ports=(),
    env=Environment(),
    probe=ProbePolicy(request=ProbeRequest(), startup_timeout_s=600, startup_request_timeout_s=20),
    restart=RestartPolicy(max_restarts=2, max_start_failures=1),
    stop=StopPolicy(grace_s=7, cancel_after_s=2, snapshot_s=2),
    fence=FencePolicy(timeout_s=30),
)
PLAN = FleetPlan(
    name="run",
    backend="slurm",
    pools=(POOL,),
    nodes=("n1",),
    spares=(),
    trainer_nodes=(),
    slurm=SlurmSettings(launch_timeout_s=40),
)


def test_every_stage_has_its_own_setting() -> None:
    bound = recovery_bound(PLAN, POOL)
    assert bound.detect_s == 15 + 4 * 30
    assert bound.snapshot_s == 2 + SNAPSHOT_MARGIN_S
    assert bound.stop_s == 7 + 2 + STOP_MARGIN_S
    assert bound.fence_s == 60  # the coordinator's look, then the agents'
    assert bound.start_s == 40 + 600
    assert bound.verify_s == 20
    assert bound.total_s == 135 + 2.5 + 14 + 60 + 640 + 20
    assert bound.crash_total_s == bound.total_s - 135 - 2.5 + CRASH_DETECT_S


def test_without_a_snapshot_nothing_is_waited_for() -> None:
    assert recovery_bound(PLAN, replace(POOL, stop=StopPolicy(snapshot_s=0))).snapshot_s == 0


@pytest.mark.parametrize(
    ("period_s", "timeout_s", "threshold", "detect_s"),
    [(15, 30, 4, 135), (30, 10, 3, 120), (1, 1, 1, 2), (10, 10, 2, 30)],
)
def test_a_hang_is_seen_after_the_threshold(period_s: float, timeout_s: float, threshold: int, detect_s: float) -> None:
    probe = replace(
        POOL.probe,
        liveness_period_s=period_s,
        liveness_timeout_s=timeout_s,
        liveness_failure_threshold=threshold,
    )
    assert recovery_bound(PLAN, replace(POOL, probe=probe)).detect_s == detect_s


@pytest.mark.parametrize(
    ("restarts", "start_failures", "backoff_s"),
    [(0, 0, 0), (1, 0, 0), (2, 0, 5), (2, 1, 10), (5, 5, 300), (10**6, 5, 300)],
)
def test_backoff_is_what_the_budget_allows_at_most(restarts: int, start_failures: int, backoff_s: float) -> None:
    policy = RestartPolicy(max_restarts=restarts, max_start_failures=start_failures)
    assert recovery_bound(PLAN, replace(POOL, restart=policy)).backoff_s == backoff_s
