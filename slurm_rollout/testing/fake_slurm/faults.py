"""What goes wrong on request. The words are Slurm's own, 22.05.8, of the same fault on a real cluster."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from slurm_rollout.testing.fake_slurm import jobs, launch, stepd, steps, tables
from slurm_rollout.testing.fake_slurm.model import NO_CONTACT, Daemon, Faults, Job, Reply, Step

if TYPE_CHECKING:
    from slurm_rollout.testing.fake_slurm.controller import Controller


def owner(c: Controller, request: dict[str, Any]) -> dict[str, Any]:
    """Do what the owner of the cluster asks for, whatever is unreachable."""
    match request["do"]:
        case "set":
            for name, value in request["faults"].items():
                assert name in {f.name for f in fields(Faults)}
                setattr(c.faults, name, tuple(value) if isinstance(value, list) else value)
            applied(c)
        case "heal":
            c.faults = Faults()
            for node in c.nodes:
                join(c, node)
            applied(c)
            for job in c.jobs.values():
                steps.retry(c, job)
        case "kill_node":
            kill(c, request["node"], request["after_s"])
        case "cut_node":
            cut(c, request["node"], request["after_s"])
        case "join_node":
            join(c, request["node"])
        case "pids":
            return {"pids": c.processes()}
    return {}


def applied(c: Controller) -> None:
    """Make what is set felt by what already runs."""
    for step, daemon in list(c.daemons.values()):
        if step.id != "batch":
            c.order(daemon, stuck_s=c.faults.stuck_s)
        launch.lie(c, step)


# ------------------------------------------------------------------------------------------------- the controller away


def needs_controller(request: dict[str, Any]) -> bool:
    argv = request.get("argv", [])
    return argv[:2] != ["show", "hostnames"] and not {"-V", "--version"} & {*argv}


def unreachable(request: dict[str, Any]) -> Reply:
    """Return what a command ends with when slurmctld does not run (measured: after 9 s or 18 s)."""
    program, argv = request["program"], request.get("argv", [])
    target = next((a for a in argv[1:] if not a.startswith("-")), "")
    match program:
        case "squeue" if "--json" in argv:
            # An empty list, and success: only "errors" tells (22.05).
            error = {
                "description": "Failed while looking for jobs",
                "error_number": -1,
                "error": "Unspecified error",
                "source": "slurm_load_jobs",
            }
            return Reply(out=tables.json_document([], [error]))
        case "squeue":
            stepwise = any(a in ("-s", "--steps") or a.startswith(("--steps=", "-s")) for a in argv)
            call = "slurm_get_job_steps" if stepwise else "slurm_load_jobs"
            return Reply(err=f"{call} error: {NO_CONTACT}\n", code=1)
        case "scontrol" if "show" in argv:
            what = argv[argv.index("show") + 1] if len(argv) > argv.index("show") + 1 else ""
            call = {"s": "slurm_get_job_steps", "n": "slurm_load_node"}.get(what[:1], "slurm_load_jobs")
            return Reply(err=f"{call} error: {NO_CONTACT}\n", code=1)
        case "scontrol":
            return Reply(err=f"Unexpected message received for job {target}\n", code=1)
        case "sinfo":
            return Reply(err=f"slurm_load_partitions: {NO_CONTACT}\n", code=1)
        case "sbatch":
            return Reply(err=f"sbatch: error: Batch job submission failed: {NO_CONTACT}\n", code=1)
        case "scancel":
            ids = [a for a in argv if a[:1].isdigit()]
            if any("." in i for i in ids) or len(ids) != len(argv):
                return Reply(err=f"slurm_load_jobs error: {NO_CONTACT}\n", code=1)
            said = "".join(f"scancel: error: Kill job error on job id {i}: {NO_CONTACT}\n" for i in ids)
            return Reply(err=said, code=8)
    return Reply(code=1)  # the twin of a killed srun


# --------------------------------------------------------------------------------------------------------------- nodes


def _there(c: Controller, node: str) -> list[tuple[Step, Daemon]]:
    return [(s, d) for s, d in c.daemons.values() if d.node == node]


def kill(c: Controller, node: str, after_s: float) -> None:
    """Everything on the node dies, nobody is told. Slurm finds out after its SlurmdTimeout."""
    c.nodes[node].dead = True
    for _, daemon in _there(c, node):
        with contextlib.suppress(ProcessLookupError):
            # Stopped, it stays the reaper of its tree, so that nothing gets away.
            os.kill(daemon.pid, signal.SIGSTOP)
            stepd.kill_tree(daemon.pid)
            os.kill(daemon.pid, signal.SIGKILL)
    c.after(after_s, lambda: lose(c, node))


def cut(c: Controller, node: str, after_s: float) -> None:
    """What runs there lives on; neither signals nor output nor orders pass. Slurm gives the node up some time later."""
    if not c.nodes[node].cut:
        for _, daemon in _there(c, node):
            c.order(daemon, cut=True)
        c.nodes[node].cut = True
    c.after(after_s, lambda: lose(c, node))


def join(c: Controller, node: str) -> None:
    """The node is back. If Slurm had given it up, what survived there is killed now."""
    found = c.nodes[node]
    if found.dead and not found.down:
        lose(c, node)
    was_cut, was_down = found.cut, found.down
    found.cut = found.dead = found.down = False
    if was_cut:
        for _, daemon in _there(c, node):
            c.order(daemon, cut=False)
            for order in daemon.postponed:
                c.order(daemon, **order)
            daemon.postponed.clear()
    if was_cut or was_down:
        jobs.schedule(c)


def lose(c: Controller, node: str) -> None:
    """Slurm gives up a node that is silent: DOWN, and its jobs hear of it (measured, 22.05.8, with --no-kill)."""
    found = c.nodes[node]
    if found.down or not (found.cut or found.dead):
        return
    found.down = True
    found.down_since = c.now()
    for job in list(c.jobs.values()):
        if job.active and node in job.nodes:
            _lose_in(c, job, node)


def _lose_in(c: Controller, job: Job, node: str) -> None:
    survives = job.state == "RUNNING" and job.no_kill and len(job.nodes) > 1
    if survives:
        job.nodes = tuple(n for n in job.nodes if n != node)
    elif job.state == "RUNNING":
        job.reason = "NodeDown"
        why = " DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS"
        jobs.terminate(c, job, "REQUEUE" if job.requeue else "NODE_FAIL", why)
    for step in list(job.steps.values()):
        if node not in step.nodes:
            continue
        if step.client:
            step.client.send({"say": f"srun: error: Node failure on {node}\n", "drop": node})
        if survives and step.id == "batch":
            continue  # the job goes on without its script, and the script stays listed
        if survives:
            launch.signal_step(c, step, signal.SIGKILL)
        # Its own part stays listed for another minute and more; a job that ends does not wait for it.
        lost = [d for d in step.daemons if d.node == node]
        delay_s = 0.0 if job.state == "COMPLETING" or len(step.nodes) > 1 else c.config["lost_step_s"]
        for daemon in lost:
            c.order(daemon, signal=signal.SIGKILL)  # which it hears when it is back
            c.after(delay_s, partial(c.drop, step, daemon))
