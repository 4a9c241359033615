"""Steps that run: launched on their nodes, signalled, cancelled."""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

from slurm_rollout.testing.fake_slurm import environs
from slurm_rollout.testing.fake_slurm.model import Daemon, Job, Step, fill
from slurm_rollout.testing.fake_slurm.stepd import Launch

if TYPE_CHECKING:
    from slurm_rollout.testing.fake_slurm.controller import Client, Controller


def launch(
    c: Controller,
    client: Client,
    step: Step,
    layout: dict[str, list[int]],
    given: dict[str, str],
    argv: tuple[str, ...],
) -> None:
    """Start the step's daemons and hand srun its connections to them."""
    job, request = step.job, client.request
    job.next_step += 1
    job.steps[step.id] = step
    client.step = step
    base = dict(request["env"])
    if "job-name" in given or "SLURM_JOB_NAME" not in base:
        base["SLURM_JOB_NAME"] = step.name
    if "ntasks-per-node" not in given:
        base["SLURM_DISTRIBUTION"] = "cyclic"
    if "ntasks-per-node" in given:
        base["SLURM_NTASKS_PER_NODE"] = given["ntasks-per-node"]
    cwd = given.get("chdir") or request["cwd"]
    common = environs.step(step, base, os.getuid(), os.getgid(), request["umask"])
    argv = (_found(argv[0], base, cwd), *argv[1:])
    known = {
        "j": job.id,
        "A": job.id,
        "s": step.id,
        "J": step.label,
        "x": request["env"].get("SLURM_JOB_NAME", "(null)"),
        "u": base.get("USER", ""),
    }
    stdin = given.get("input") != "none"
    ends = []
    for index, node in enumerate(step.nodes):
        here = known | {"n": str(index), "N": node}
        if c.nodes[node].cut or c.nodes[node].dead:
            ends.append(_silence(step, node, layout[node]))
            continue
        task_launch = Launch(
            node=node,
            batch=False,
            argv=argv,
            cwd=cwd,
            umask=request["umask"],
            environs={t: environs.task(common, step, layout, node, t) for t in layout[node]},
            stdin=stdin,
            outputs=_files(given.get("output"), here, layout[node], cwd),
            errors=_files(given.get("error", given.get("output")), here, layout[node], cwd),
            append=given.get("open-mode", "").startswith("a"),
            stuck_s=c.faults.stuck_s,
            whole_tree=c.whole_tree,
        )
        end = c.spawn(step, task_launch, with_srun=True)
        assert end is not None
        ends.append(end)
    first = known | {"n": "0", "t": "0", "N": step.nodes[0]}
    message = {
        "step": step.label,
        "nodes": step.nodes,
        "tasks": step.tasks,
        "label": "label" in given,
        "kill_on_bad_exit": given.get("kill-on-bad-exit", "0") != "0",
        "output": _file(given.get("output"), first, cwd),
        "error": _file(given.get("error"), first, cwd),
        "append": given.get("open-mode", "").startswith("a"),
        "stdin": stdin,
    }
    client.send({"launch": message}, [e.fileno() for e in ends])
    for end in ends:
        end.close()
    lie(c, step)
    if silent := [n for n in step.nodes if c.nodes[n].cut or c.nodes[n].dead]:
        c.after(c.config["launch_s"], lambda: _fail(c, client, step, silent))


def _silence(step: Step, node: str, tasks: list[int]) -> socket.socket:
    """Return srun's end of a connection to a node that does not answer."""
    nobody, _ = socket.socketpair()
    ours, sruns = socket.socketpair()
    step.daemons.append(Daemon(node=node, pid=0, control=nobody, tasks=dict.fromkeys(tasks), srun=ours))
    return sruns


def _fail(c: Controller, client: Client, step: Step, silent: list[str]) -> None:
    """What srun says when a node does not take its tasks; 12 s after the launch with 22.05.8."""
    if step.job.steps.get(step.id) is not step:
        return
    why = "Communication connection failure"
    said = [f"error: Task launch for StepId={step.label} failed on node {n}: {why}" for n in silent]
    said += [f"error: Application launch failed: {why}", "Job step aborted"]
    client.send({"say": "".join(f"srun: {words}\n" for words in said), "exit": 233})
    signal_step(c, step, signal.SIGKILL)
    for daemon in step.daemons:
        if daemon.node in silent:
            c.drop(step, daemon)


def _found(command: str, environ: dict[str, str], cwd: str) -> str:
    """srun looks a command up on its own host; what it does not find, execve on the node complains about."""
    if "/" in command:
        return command
    for folder in environ.get("PATH", "").split(":"):
        path = os.path.join(cwd, folder, command)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return command


def _on_node(pattern: str | None) -> bool:
    """Whether the node's daemon opens the file: its name is then another one for each task or node."""
    return pattern is not None and any(f"%{letter}" in pattern.replace("%%", "") for letter in "tnN")


def _files(pattern: str | None, known: dict[str, str], tasks: list[int], cwd: str) -> dict[int, str]:
    if pattern is None or not _on_node(pattern):
        return {}
    return {t: os.path.join(cwd, fill(pattern, known | {"t": str(t)})) for t in tasks}


def _file(pattern: str | None, known: dict[str, str], cwd: str) -> str | None:
    if pattern is None or _on_node(pattern):
        return None
    return os.path.join(cwd, "/dev/null" if pattern == "none" else fill(pattern, known))


# ------------------------------------------------------------------------------------------------------- while it runs


def unable(job: Job, why: str) -> str:
    return f"srun: error: Unable to create step for job {job.id}: {why}\n"


def asked(c: Controller, client: Client, message: dict[str, Any]) -> None:
    """srun says something about its step."""
    step, what = client.step, message["ask"]
    if what == "give_up":
        job = next((j for j in c.jobs.values() if client in j.pending), None)
        if job:
            job.pending.remove(client)
            no = unable(job, "Job/step already completing or completed")
            client.send({"say": f"srun: Cancelled pending job step with signal {message['signal']}\n{no}", "exit": 1})
        return
    if step is None:
        return
    if what == "launched":
        client.has_twin = True
    elif what == "kill_on_bad_exit":
        client.send({"say": f"srun: launch/slurm: _step_signal: Terminating StepId={step.label}\n"})
        signal_step(c, step, signal.SIGTERM)
        c.after(c.kill_wait_s, lambda: signal_step(c, step, signal.SIGKILL))
    elif what == "force":
        if c.faults.unreachable_s is None:
            c.after(message["after_s"], lambda: cancel(c, step))
    elif what == "aborting":
        _wait_for_abort(c, client, step)


def _wait_for_abort(c: Controller, client: Client, step: Step) -> None:
    """srun waits KillWait + 2 s for its tasks, then ends with 0, whatever still lives (measured, 22.05.8)."""
    wait_s = c.kill_wait_s + 2
    client.send({"say": f"srun: Job step aborted: Waiting up to {wait_s:g} seconds for job step to finish.\n"})

    def give_up() -> None:
        if step.lives:
            client.send({"say": "srun: error: Timed out waiting for job step to complete\n", "exit": 0})

    c.after(wait_s, give_up)


def lie(c: Controller, step: Step) -> None:
    """srun ends with 0 and its step goes on, where that fault is on."""
    if step.client and any(part in step.name for part in c.faults.lying):
        step.client.send({"exit": 0})


def signal_step(c: Controller, step: Step, number: int) -> None:
    for daemon in step.daemons:
        c.order(daemon, signal=number)


def cancel(c: Controller, step: Step, *, why: str = "") -> None:
    """SIGKILL to all of the step at once, as `scancel JOB.STEP` does.

    In a job that is being ended nothing happens: its steps live until KillWait has passed (measured, 22.05.8).
    """
    if step.job.state != "RUNNING":
        return
    if not step.cancelled:
        step.cancelled = True
        announce(c, step, why)
        if step.client:
            step.client.send({"abort": True})
    signal_step(c, step, signal.SIGKILL)


def announce(c: Controller, step: Step, why: str = "") -> None:
    """Each daemon says on its standard error that it is cancelled."""
    what = f"JOB {step.job.id}" if step.id == "batch" else f"STEP {step.label}"
    at = time.strftime("%Y-%m-%dT%H:%M:%S")
    for daemon in step.daemons[:1]:  # only the first node's, so that it is said once
        words = f"slurmstepd-{daemon.node}: error: *** {what} ON {daemon.node} CANCELLED AT {at}{why} ***\n"
        c.order(daemon, say=words)
