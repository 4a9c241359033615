"""The environment of a batch script and of a task, as seen with Slurm 22.05.8. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from slurm_rollout.testing.fake_slurm.model import Job, Step, counted, ranged

CLUSTER = "fake"
PARTITION = "main"


def _gpus(numbers: tuple[int, ...]) -> dict[str, str]:
    listed = ",".join(map(str, numbers))
    if not listed:
        return {}
    # The names of all vendors: Slurm does not know whose the GPUs are.
    names = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK")
    return {**dict.fromkeys(names, listed), "SLURM_GPUS_ON_NODE": str(len(numbers))}


def batch(job: Job, host: str, uid: int, gid: int) -> dict[str, str]:
    """Return the whole environment of the job's batch script."""
    nodes = ranged(job.nodes)
    gpus = job.gpus_of.get(job.nodes[0], ())
    found = {
        **job.environ,
        "ENVIRONMENT": "BATCH",
        "HOSTNAME": job.nodes[0],
        "TMPDIR": job.environ.get("TMPDIR", "/tmp"),
        "SLURMD_NODENAME": job.nodes[0],
        "SLURM_CLUSTER_NAME": CLUSTER,
        "SLURM_CPUS_ON_NODE": str(job.cpus_of[job.nodes[0]]),
        "SLURM_GTIDS": "0",
        "SLURM_JOBID": job.id,
        "SLURM_JOB_CPUS_PER_NODE": counted([job.cpus_of[n] for n in job.nodes]),
        "SLURM_JOB_GID": str(gid),
        "SLURM_JOB_ID": job.id,
        "SLURM_JOB_NAME": job.name,
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_JOB_NUM_NODES": str(len(job.nodes)),
        "SLURM_JOB_PARTITION": PARTITION,
        "SLURM_JOB_UID": str(uid),
        "SLURM_JOB_USER": job.environ.get("USER", ""),
        "SLURM_LOCALID": "0",
        "SLURM_NNODES": str(len(job.nodes)),
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": nodes,
        "SLURM_NODE_ALIASES": "(null)",
        "SLURM_PRIO_PROCESS": "0",
        "SLURM_PROCID": "0",
        "SLURM_SUBMIT_DIR": job.cwd,
        "SLURM_SUBMIT_HOST": host,
        "SLURM_TASKS_PER_NODE": counted(
            [job.cpus_of[n] if job.exclusive and "ntasks" not in job.options else job.tasks_per_node for n in job.nodes]
        ),
        "SLURM_TOPOLOGY_ADDR": job.nodes[0],
        "SLURM_TOPOLOGY_ADDR_PATTERN": "node",
        **_gpus(gpus),
    }
    if gpus:
        found["SLURM_JOB_GPUS"] = ",".join(map(str, gpus))
    if "gpus-per-node" in job.options:
        found["SLURM_GPUS_PER_NODE"] = job.options["gpus-per-node"]
    if "ntasks" in job.options:
        found["SLURM_NTASKS"] = found["SLURM_NPROCS"] = job.options["ntasks"]
    if "ntasks-per-node" in job.options:
        found["SLURM_NTASKS_PER_NODE"] = job.options["ntasks-per-node"]
    if "cpus-per-task" in job.options:
        found["SLURM_CPUS_PER_TASK"] = job.options["cpus-per-task"]
    if job.restarts:
        found["SLURM_RESTART_COUNT"] = str(job.restarts)
    return found


def step(step: Step, base: Mapping[str, str], uid: int, gid: int, umask: int) -> dict[str, str]:
    """Return what all tasks of the step have in common, on top of srun's own environment."""
    job = step.job
    nodes = ranged(step.nodes)
    found = {
        **base,
        "SLURM_JOBID": job.id,
        "SLURM_JOB_GID": str(gid),
        "SLURM_JOB_ID": job.id,
        "SLURM_JOB_NODELIST": base.get("SLURM_JOB_NODELIST", nodes),
        "SLURM_JOB_PARTITION": PARTITION,
        "SLURM_JOB_UID": str(uid),
        "SLURM_JOB_USER": base.get("USER", ""),
        "SLURM_NNODES": str(len(step.nodes)),
        "SLURM_NODELIST": ranged(job.nodes),  # without those that it lost
        "SLURM_NPROCS": str(step.tasks),
        "SLURM_NTASKS": str(step.tasks),
        "SLURM_PRIO_PROCESS": "0",
        "SLURM_STEPID": step.id,
        "SLURM_STEP_ID": step.id,
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_NUM_NODES": str(len(step.nodes)),
        "SLURM_STEP_NUM_TASKS": str(step.tasks),
        "SLURM_TOPOLOGY_ADDR_PATTERN": "node",
        "SLURM_UMASK": f"{umask:04o}",
        "TMPDIR": base.get("TMPDIR", "/tmp"),
    }
    if step.cpus_per_task:
        found["SLURM_CPUS_PER_TASK"] = str(step.cpus_per_task)
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK"):
        found.pop(name, None)  # the batch script's own: a step has its own GPUs, or none
    return found


def task(
    common: Mapping[str, str], step: Step, layout: Mapping[str, list[int]], node: str, number: int
) -> dict[str, str]:
    """Return one task's environment."""
    local = layout[node]
    per_node = counted([len(layout[n]) for n in step.nodes])
    gpus = step.gpus.get(node, ())
    found = {
        **common,
        "SLURMD_NODENAME": node,
        "SLURM_CPUS_ON_NODE": str(step.cpus[node]),
        "SLURM_GTIDS": ",".join(map(str, local)),
        "SLURM_LOCALID": str(local.index(number)),
        "SLURM_NODEID": str(step.nodes.index(node)),
        "SLURM_PROCID": str(number),
        "SLURM_STEP_TASKS_PER_NODE": per_node,
        "SLURM_TASKS_PER_NODE": per_node,
        "SLURM_TOPOLOGY_ADDR": node,
        **_gpus(gpus),
    }
    if gpus:
        found["SLURM_STEP_GPUS"] = ",".join(map(str, gpus))
    return found
