"""How a step is recognised: by its job name in Slurm, by its mark in a process's environment. Pure."""

from __future__ import annotations

from slurm_rollout.core.plan import FleetPlan

MARK = "ROLLOUT_MARK"
"""The environment variable that carries the mark."""


def step_name(plan: FleetPlan, group: str, incarnation: int, node: str, *, sweep: bool = False) -> str:
    """Return the `--job-name` of one step: unique per (group, incarnation, node) in the job."""
    index = plan.group(group).nodes.index(node)
    return f"{step_prefix(plan, group, incarnation)}{index}{'.sweep' if sweep else ''}"


def step_prefix(plan: FleetPlan, group: str, incarnation: int) -> str:
    """Return what the names of all steps of one incarnation begin with; the plan need not have the group."""
    return f"{plan.name}.{group.replace('/', '-')}.{incarnation}."


def mark(run_id: str, group: str, incarnation: int, node: str) -> str:
    """Return the value of `ROLLOUT_MARK` for every process of one step."""
    return f"{run_id}/{group}/{incarnation}/{node}"
