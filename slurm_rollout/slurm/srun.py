"""The srun line and the environment of one step. Pure.

Every option is explicit, because sbatch's environment is srun's option input and differs by version: 22.05 and 23.02
ignore SLURM_CPUS_PER_TASK, 23.11 reads it again and dies on a contradiction (release notes and srun(1)).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from slurm_rollout.core.names import step_name
from slurm_rollout.core.plan import FleetPlan, GroupPlan

_KEPT = frozenset({"SLURM_CONF", "SLURM_JOB_ID", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT"})


def step_argv(
    plan: FleetPlan,
    group: GroupPlan,
    node: str,
    incarnation: int,
    job: str,
    *,
    agent: str = "agent.py",
    sweep: bool = False,
    het_component: str = "",
) -> list[str]:
    """Return the complete srun command of the group's step on `node`."""
    slurm = plan.slurm
    gpus = 0 if sweep else group.gpus_per_step[node]
    argv = [
        "srun",
        f"--jobid={job}",
        # From 22.05 on steps then share CPUs, memory and GPUs with every other step: nothing waits for an undead one.
        "--overlap",
        "--mem=0",
        "--nodes=1",
        "--ntasks=1",
        "--ntasks-per-node=1",
        f"--nodelist={node}",
        f"--cpus-per-task={1 if sweep else group.cpus_per_step[node]}",
        "--cpu-bind=none",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--mpi=none",
        "--input=none",
        "--export=ALL",
        f"--job-name={step_name(plan, group.id, incarnation, node, sweep=sweep)}",
    ]
    if het_component:
        argv.append(f"--het-group={het_component}")
    # Steps that overlap are given the same GPUs (measured, 22.05): all of the node's are asked for, the agent narrows.
    if slurm.gpu_option != "none":
        if not gpus:
            argv.append("--gres=none")
        elif slurm.gpu_option == "gres":
            argv.append(f"--gres=gpu:{gpus}")
        else:
            argv.append(f"--{slurm.gpu_option}={gpus}")
    argv += slurm.srun_args
    return [*argv, *agent_argv(plan, agent)]


def agent_argv(plan: FleetPlan, agent: str) -> list[str]:
    """Return the command that runs the agent: isolated, without site packages, since every millisecond counts."""
    return [plan.slurm.python or sys.executable, "-IS", agent]


def scrubbed(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment without the variables that srun would take for options."""
    return {
        k: v
        for k, v in environ.items()
        if k in _KEPT or not k.startswith(("SLURM_", "SRUN_", "SLURMD_", "SBATCH_", "ROLLOUT_"))
    }
