"""What srun asks for: read, laid out on the nodes, granted, put off or refused."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slurm_rollout.testing.fake_slurm import launch, options
from slurm_rollout.testing.fake_slurm.launch import unable
from slurm_rollout.testing.fake_slurm.model import NO_CONTACT, Job, Step, hostlist

if TYPE_CHECKING:
    from slurm_rollout.testing.fake_slurm.controller import Client, Controller

VERSION = "slurm-wlm 22.05.8"
BUSY = "Requested nodes are busy"
# srun takes these variables for options (22.05: not SLURM_CPUS_PER_TASK, which sbatch sets).
VARIABLES = {
    "SLURM_JOB_ID": "jobid",
    "SLURM_JOBID": "jobid",
    "SLURM_NNODES": "nodes",
    "SLURM_NTASKS": "ntasks",
    "SLURM_NTASKS_PER_NODE": "ntasks-per-node",
    "SRUN_CPUS_PER_TASK": "cpus-per-task",
    "SLURM_KILL_BAD_EXIT": "kill-on-bad-exit",
    "SLURM_OVERLAP": "overlap",
    "SLURM_EXACT": "exact",
    "SLURM_STEP_GRES": "gres",
    "SLURM_LABELIO": "label",
    "SLURM_OPEN_MODE": "open-mode",
}


class Refused(Exception):
    """What srun says when it gets no step."""


class Busy(Exception):
    """The step has to wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What an srun line asks for."""

    job: Job
    given: dict[str, str]
    argv: tuple[str, ...]
    request: dict[str, Any]


def requested(c: Controller, client: Client) -> None:
    """Create the step that a new srun asks for, or have it wait, or refuse."""
    try:
        given, argv = _given(client.request)
        if "version" in given:
            client.send({"print": f"{VERSION}\n", "exit": 0})
            return
        if "cpu-bind" in given:
            # Where TaskPlugin cannot bind, as on the test cluster.
            client.send({"say": "srun: cluster configuration lacks support for cpu binding\n"})
        if "jobid" not in given:
            raise options.BadOption("fake_slurm: does not know srun without a job: give --jobid or SLURM_JOB_ID")
        if not argv:
            raise Refused("srun: fatal: No command given to execute.\n")
        if c.faults.unreachable_s is not None:
            no = _unconfirmed(given["jobid"], NO_CONTACT)
            c.after(c.faults.unreachable_s, lambda: client.send({"say": no, "exit": 1}))
            return
        wish = Wish(job=_job(c, given["jobid"]), given=given, argv=argv, request=client.request)
    except options.BadOption as e:
        client.send({"say": f"{e}\n", "exit": e.code})
    except Refused as e:
        client.send({"say": str(e), "exit": 1})
    else:
        _create(c, client, wish)


def _given(request: dict[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the options, of the line and of the environment, and the command."""
    given, argv = options.parse("srun", options.SRUN, request["argv"])
    for variable, name in VARIABLES.items():
        value = request["env"].get(variable)
        if value is not None and name not in given:
            given[name] = value
    for name, known in (("export", ("ALL",)), ("input", ("all", "none"))):
        if given.get(name, known[0]) not in known:
            raise options.BadOption(f"fake_slurm: does not know srun --{name}={given[name]}, only {', '.join(known)}")
    for name in ("ntasks", "ntasks-per-node", "cpus-per-task"):
        options.number("srun", name, given)
    if not re.fullmatch(r"(\d+(-\d+)?)?", given.get("nodes", "")):
        raise options.BadOption(f'srun: error: "{given["nodes"]}" is not a valid node count', 255)
    return given, tuple(argv)


def _job(c: Controller, number: str) -> Job:
    job = c.jobs.get(number)
    if job is None:
        raise Refused(_unconfirmed(number, "Invalid job id specified"))
    if job.state == "PENDING":
        raise Refused(_unconfirmed(number, "Job is pending execution"))
    if job.state != "RUNNING":
        raise Refused(f"srun: error: Slurm job {number} has expired\n{_check(number)}")
    return job


def _unconfirmed(number: str, why: str) -> str:
    return f"srun: error: Unable to confirm allocation for job {number}: {why}\n{_check(number)}"


def _check(number: str) -> str:
    return f"srun: Check SLURM_JOB_ID environment variable. Expired or invalid job {number}\n"


def _create(c: Controller, client: Client, wish: Wish) -> None:
    job = wish.job
    try:
        if c.faults.refuse:
            raise Refused(unable(job, c.faults.refuse))
        step, layout = _plan(c, client, wish)
    except Refused as e:
        client.send({"say": str(e), "exit": 1})
    except Busy:
        job.pending.append(client)
        turn = client.retries
        c.after(c.config["retry_s"], lambda: _retry_one(c, job, client, turn))
    else:
        if client.retries:
            client.send({"say": f"srun: Step created for job {job.id}\n"})
        launch.launch(c, client, step, layout, wish.given, wish.argv)


def retry(c: Controller, job: Job) -> None:
    """Let the sruns that wait try again, in their order; those of a job that ends get their refusal."""
    for client in list(job.pending):
        _retry_one(c, job, client, client.retries)


def _retry_one(c: Controller, job: Job, client: Client, turn: int) -> None:
    """An srun that waits is woken when a step of its job ends, or tries again after a long time of its own. Only then
    does it say that it had to wait (measured, 22.05.8)."""
    if client not in job.pending or client.retries != turn:
        return
    job.pending.remove(client)
    if job.state != "RUNNING":
        client.send({"say": unable(job, "Job/step already completing or completed"), "exit": 1})
        return
    how = "still" if client.retries else "temporarily"
    client.retries += 1
    client.send({"say": f"srun: Job {job.id} step creation {how} disabled, retrying ({BUSY})\n"})
    given, argv = _given(client.request)
    _create(c, client, Wish(job=job, given=given, argv=argv, request=client.request))


# -------------------------------------------------------------------------------------------------------------- layout


def _plan(c: Controller, client: Client, wish: Wish) -> tuple[Step, dict[str, list[int]]]:
    job, given = wish.job, wish.given
    if c.faults.disabled:
        raise Busy
    nodes, tasks = _nodes_and_tasks(c, client, wish)
    per_task = options.number("srun", "cpus-per-task", given)
    exact = "exact" in given or bool(per_task)
    layout = _layout(nodes, tasks)
    cpus = {n: len(layout[n]) * (per_task or 1) if exact else job.cpus_of[n] for n in nodes}
    if any(cpus[n] > job.cpus_of[n] for n in nodes):
        raise Refused(unable(job, "More processors requested than permitted"))
    wanted = _gpus(wish)
    overlap = "overlap" in given
    others = [s for s in job.steps.values() if s.lives and s.id != "batch" and not s.overlap]
    gpus = {}
    for node in nodes:
        there = [s for s in others if node in s.nodes]
        if not overlap and cpus[node] + sum(s.cpus[node] for s in there) > job.cpus_of[node]:
            raise Busy
        taken = () if overlap else {g for s in there for g in s.gpus.get(node, ())}
        free = [g for g in job.gpus_of[node] if g not in taken]
        if len(free) < wanted:
            raise Busy
        gpus[node] = tuple(free[:wanted])
    name = given.get("job-name") or os.path.basename(wish.argv[0])
    return (
        Step(
            job=job,
            id=str(job.next_step),
            name=name,
            nodes=nodes,
            tasks=tasks,
            cpus=cpus,
            cpus_per_task=per_task,
            gpus=gpus,
            gres=f"gres:gpu:{wanted}" if wanted else "",
            overlap=overlap,
            distribution="Block" if "ntasks-per-node" in given else "Cyclic",
            srun_pid=wish.request["pid"],
            client=client,
        ),
        layout,
    )


def _nodes_and_tasks(c: Controller, client: Client, wish: Wish) -> tuple[tuple[str, ...], int]:
    job, given = wish.job, wish.given
    wanted = hostlist(given["nodelist"]) if given.get("nodelist") else ()
    excluded = hostlist(given["exclude"]) if given.get("exclude") else ()
    usable = [n for n in job.nodes if n not in excluded]
    if any(n not in usable for n in wanted):
        raise Refused(unable(job, "Requested node configuration is not available"))
    low, _, high = given.get("nodes", "").partition("-")
    count = int(high or low or 0)
    tasks = options.number("srun", "ntasks", given)
    per_node = options.number("srun", "ntasks-per-node", given)
    if count > len(job.nodes):
        raise Refused(f"srun: error: Only allocated {len(job.nodes)} nodes asked for {count}\n")
    if not count:
        count = len(wanted) or min(len(usable), tasks or len(usable))
    if tasks and tasks < count:
        client.send(
            {"say": f"srun: Warning: can't run {tasks} processes on {count} nodes, setting nnodes to {tasks}\n"}
        )
        count = tasks
    if len(wanted) > count:
        client.send(
            {
                "say": "srun: error: Required nodelist includes more nodes than permitted by max-node count "
                f"({len(wanted)} > {count}). Eliminating nodes from the nodelist.\n"
            }
        )
        wanted = wanted[:count]
    chosen = [n for n in usable if n in wanted]
    # A node that does not answer gets no new step, unless it is asked for and not yet known to be down.
    chosen += [n for n in usable if n not in wanted and not c.nodes[n].down][: count - len(chosen)]
    if len(chosen) < count:
        raise Refused(unable(job, "Requested node configuration is not available"))
    tasks = tasks or count * (per_node or 1)
    if per_node and tasks > per_node * count:
        raise Refused(unable(job, "Requested node configuration is not available"))
    nodes = tuple(n for n in job.nodes if n in chosen)
    if tasks * (options.number("srun", "cpus-per-task", given) or 1) > sum(job.cpus_of[n] for n in nodes) and (
        "overcommit" not in given
    ):
        raise Refused(unable(job, "More processors requested than permitted"))
    return nodes, tasks


def _layout(nodes: tuple[str, ...], tasks: int) -> dict[str, list[int]]:
    """Spread the tasks in blocks, as evenly as can be."""
    each, more = divmod(tasks, len(nodes))
    layout: dict[str, list[int]] = {}
    first = 0
    for index, node in enumerate(nodes):
        count = each + (index < more)
        layout[node] = list(range(first, first + count))
        first += count
    return layout


def _gpus(wish: Wish) -> int:
    job, given = wish.job, wish.given
    asked = given.get("gres")
    if asked is None and "gpus-per-node" in given:
        asked = f"gpu:{given['gpus-per-node']}"
    if asked is None:
        return job.gpus  # all that the job asked for (22.05)
    if asked in ("none", "NONE", "0"):
        return 0
    parts = asked.split(":")
    number = parts[-1] if parts[-1].isdigit() else "1"
    if parts[0] != "gpu" or len(parts) > 3:
        raise Refused("srun: error: Invalid generic resource (gres) specification\n")
    if int(number) > job.gpus:
        raise Refused(
            f"srun: error: Step requested gres_per_node=gpu:{number} is more than the job's "
            f"gres_per_node={f'gpu:{job.gpus}' if job.gpus else '(null)'}\n"
            + unable(job, "Invalid generic resource (gres) specification")
        )
    return int(number)
