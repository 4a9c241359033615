"""Jobs: submitted, started, ended, cancelled, requeued; and what a lost node means to them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from typing import TYPE_CHECKING, Any

from slurm_rollout.testing.fake_slurm import environs, launch, options, steps
from slurm_rollout.testing.fake_slurm.model import ENDED, Job, Reply, Step, hostlist, user_name
from slurm_rollout.testing.fake_slurm.stepd import Launch

if TYPE_CHECKING:
    from slurm_rollout.testing.fake_slurm.controller import Controller

INVALID = "Invalid job id specified"


# -------------------------------------------------------------------------------------------------------------- sbatch


def sbatch(c: Controller, request: dict[str, Any]) -> Reply:
    given, argv = options.parse("sbatch", options.SBATCH, request["argv"])
    if "version" in given:
        return Reply(out=f"{steps.VERSION}\n")
    script = request.get("script")
    if script is None and "wrap" not in given:
        return Reply(script=argv[0] if argv else "-")
    if "wrap" in given:
        script = f"#!/bin/sh\n# This script was created by sbatch --wrap.\n\n{given['wrap']}\n"
    assert script is not None
    if not script.startswith("#!"):
        words = (
            "This does not look like a batch script.  The first",
            "line must start with #! followed by the path to an interpreter.",
            "For instance: #!/bin/sh",
        )
        return Reply(err="".join(f"sbatch: error: {w}\n" for w in words), code=1)
    given = _directives(script) | given
    tasks, per_task, per_node = (
        options.number("sbatch", name, given) for name in ("ntasks", "cpus-per-task", "ntasks-per-node")
    )
    tasks, per_task = tasks or 1, per_task or 1
    # Without --nodes as few as can be.
    count = _count(given) if "nodes" in given else max(1, -(-tasks * per_task // c.cpus))
    if "ntasks" not in given:
        tasks = count
    if given.get("export", "ALL") != "ALL":
        raise options.BadOption(f"fake_slurm: does not know sbatch --export={given['export']}, only ALL")
    command = argv[0] if argv and "wrap" not in given else ""
    job = Job(
        id=str(c.next_job),
        name=given.get("job-name")
        or (os.path.basename(command) if command else ("wrap" if "wrap" in given else "sbatch")),
        script=script,
        argv=tuple(argv[1:]),
        options=given,
        environ={k: v for k, v in request["env"].items() if not k.startswith(("SLURM_", "SLURMD_"))},
        cwd=given.get("chdir") or request["cwd"],
        umask=request["umask"],
        command=os.path.join(request["cwd"], command) if command else "",
        count=count,
        gpus=_gpus(given),
        cpus=per_task,
        exclusive="exclusive" in given,
        tasks_per_node=per_node or -(-tasks // count),
        comment=given.get("comment"),
        requeue="no-requeue" not in given,
        no_kill="no-kill" in given and given["no-kill"] != "off",
        time_limit_s=_seconds(given["time"]) if "time" in given else None,
    )
    if job.gpus > c.gpus:
        no = "Requested node configuration is not available"
        return Reply(err=f"sbatch: error: Batch job submission failed: {no}\n", code=1)
    c.next_job += 1
    c.jobs[job.id] = job
    schedule(c)
    return Reply(out=f"{job.id}\n" if "parsable" in given else f"Submitted batch job {job.id}\n")


def _directives(script: str) -> dict[str, str]:
    """Return the options of the #SBATCH lines before the first command; a later one wins."""
    given: dict[str, str] = {}
    for line in script.splitlines()[1:]:
        if line.startswith("#SBATCH"):
            found, rest = options.parse("sbatch", options.SBATCH, shlex.split(line[7:], comments=True))
            if rest:
                raise options.BadOption(f"sbatch: error: Invalid directive found in batch script: {' '.join(rest)}", 1)
            given |= found
        elif line.strip() and not line.startswith("#"):
            break
    return given


def _count(given: dict[str, str]) -> int:
    low, _, high = given["nodes"].partition("-")
    if not low.isdigit() or (high and not high.isdigit()):
        raise options.BadOption(f'sbatch: error: "{given["nodes"]}" is not a valid node count', 255)
    return int(low)


def _gpus(given: dict[str, str]) -> int:
    asked = given.get("gres", "gpu:" + given["gpus-per-node"] if "gpus-per-node" in given else "")
    if not asked:
        return 0
    found = re.fullmatch(r"(?:gres:)?gpu(?::\w+?)??(?::(\d+))?", asked)
    if not found:
        raise options.BadOption("sbatch: error: Invalid generic resource (gres) specification", 1)
    return int(found[1] or 1)


def _seconds(text: str) -> float:
    """Return a time limit such as 30, 1:30, 2:00:00, 1-12 in seconds."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise options.BadOption("sbatch: error: Invalid --time specification", 255)
    days, *parts = (int(part or 0) for part in found.groups())
    if found[1] or found[4]:
        hours, minutes, seconds = parts
    else:
        (minutes, seconds, _), hours = parts, 0
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


# --------------------------------------------------------------------------------------------------------------- start


def schedule(c: Controller) -> None:
    """Start every pending job for which there are nodes, in their order."""
    for job in c.jobs.values():
        if job.state != "PENDING":
            continue
        if time.monotonic() < job.begin:
            continue
        if "hold" in job.options:
            job.reason = "JobHeldUser"
            continue
        if job.count > len(c.nodes):
            job.reason = "PartitionConfig"
            continue
        _place(c, job)
        if job.nodes:
            _start(c, job)
        else:
            job.reason = "Resources"
            break


def _place(c: Controller, job: Job) -> None:
    excluded = hostlist(job.options.get("exclude", "")) if job.options.get("exclude") else ()
    wanted = hostlist(job.options["nodelist"]) if job.options.get("nodelist") else ()
    chosen: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name in [*wanted, *(n for n in c.nodes if n not in wanted)]:
        node = c.nodes.get(name)
        if node is None or name in excluded or node.cut or node.dead or node.down or len(chosen) == job.count:
            continue
        others = [j for j in c.jobs.values() if j.active and name in j.nodes]
        cpus = c.cpus if job.exclusive else job.cpus * job.tasks_per_node
        free = [g for g in range(c.gpus) if not any(g in j.gpus_of[name] for j in others)]
        if cpus + sum(j.cpus_of[name] for j in others) <= c.cpus and len(free) >= job.gpus:
            chosen[name] = (cpus, tuple(free[: job.gpus]))
    if len(chosen) == job.count and {*wanted} <= {*chosen}:
        job.nodes = job.allocated = tuple(n for n in c.nodes if n in chosen)
        job.cpus_of = {n: chosen[n][0] for n in job.nodes}
        job.gpus_of = {n: chosen[n][1] for n in job.nodes}


def _start(c: Controller, job: Job) -> None:
    job.state, job.reason, job.started, job.ended, job.final = "RUNNING", "None", time.time(), None, ""
    job.next_step = 0  # also after a requeue (21.08 and later)
    script = f"{c.config['folder']}/job{job.id}/slurm_script"
    os.makedirs(os.path.dirname(script), exist_ok=True)
    with open(script, "w", encoding="utf-8", errors="surrogateescape") as f:
        f.write(job.script)
    os.chmod(script, 0o700)
    node = job.nodes[0]
    step = Step(
        job=job, id="batch", name="batch", nodes=(node,), tasks=1, cpus={node: 0}, overlap=True, distribution=""
    )
    job.steps = {"batch": step}
    environ = environs.batch(job, c.host, os.getuid(), os.getgid())
    script_launch = Launch(
        node=node,
        batch=True,
        argv=(script, *job.argv),
        cwd=job.cwd,
        umask=job.umask,
        environs={0: environ},
        stdin=False,
        outputs={0: job.output},
        errors={0: job.error},
        append=job.options.get("open-mode", "").startswith("a"),
        whole_tree=c.whole_tree,
    )
    c.spawn(step, script_launch, with_srun=False)
    if job.time_limit_s is not None:
        run = job.restarts
        c.after(job.time_limit_s, lambda: _time_is_up(c, job, run))


def _time_is_up(c: Controller, job: Job, run: int) -> None:
    if job.state == "RUNNING" and job.restarts == run:
        terminate(c, job, "TIMEOUT", " DUE TO TIME LIMIT")


# ----------------------------------------------------------------------------------------------------------------- end


def terminate(c: Controller, job: Job, final: str, why: str = "") -> None:
    """CONT and TERM to the batch script and to the steps, KILL after KillWait."""
    job.state, job.final = "COMPLETING", final
    steps.retry(c, job)
    for step in list(job.steps.values()):
        step.cancelled = True
        launch.announce(c, step, why)
        if step.client:
            step.client.send({"abort": True})
        launch.signal_step(c, step, signal.SIGCONT)
        launch.signal_step(c, step, signal.SIGTERM)
    run = job.restarts
    c.after(c.kill_wait_s, lambda: _kill(c, job, run))


def _kill(c: Controller, job: Job, run: int) -> None:
    if job.restarts == run and job.state == "COMPLETING":
        for step in list(job.steps.values()):
            launch.signal_step(c, step, signal.SIGKILL)


def step_ended(c: Controller, step: Step) -> None:
    """A step has ended on all of its nodes."""
    job = step.job
    if job.steps.get(step.id) is step:
        del job.steps[step.id]
    if step.id == "batch":
        _batch_ended(c, job, step)
    if job.state == "COMPLETING" and not job.steps:
        _finish(c, job)
    steps.retry(c, job)


def _batch_ended(c: Controller, job: Job, step: Step) -> None:
    job.exit_status = step.daemons[0].tasks.get(0) or 0
    if job.final or job.state != "RUNNING":
        return
    job.state, job.final = "COMPLETING", "FAILED" if job.exit_status else "COMPLETED"
    steps.retry(c, job)
    # The steps that it leaves are ended: CONT and TERM, KILL after KillWait.
    for left in list(job.steps.values()):
        left.cancelled = True
        if left.client:
            left.client.send({"abort": True})
        launch.signal_step(c, left, signal.SIGCONT)
        launch.signal_step(c, left, signal.SIGTERM)
    run = job.restarts
    c.after(c.kill_wait_s, lambda: _kill(c, job, run))


def _finish(c: Controller, job: Job) -> None:
    job.ended = time.time()
    if job.final == "REQUEUE":
        job.state, job.final, job.restarts = "PENDING", "", job.restarts + 1
        job.reason, job.begin = "BeginTime", time.monotonic() + c.config["requeue_s"]
        job.nodes, job.cpus_of, job.gpus_of, job.exit_status = (), {}, {}, 0
        c.after(c.config["requeue_s"], lambda: schedule(c))
    else:
        job.state = job.final
        if job.state == "FAILED":
            job.reason = "NonZeroExitCode"
            if os.WIFSIGNALED(job.exit_status):
                job.reason = "JobLaunchFailure"  # sic
        elif job.state == "TIMEOUT":
            job.reason = "TimeLimit"
    schedule(c)


def cancel(c: Controller, job: Job) -> None:
    if job.state == "PENDING":
        job.state, job.ended = "CANCELLED", time.time()
        job.started = job.started or job.ended
    elif job.state == "RUNNING":
        terminate(c, job, "CANCELLED")


def requeue(c: Controller, job: Job) -> bool:
    """Have the job start again; False when it is not one that may."""
    if job.state not in ("RUNNING", "COMPLETED", "FAILED", "TIMEOUT") or not job.requeue:
        return False
    if job.state == "RUNNING":
        terminate(c, job, "REQUEUE", " DUE TO JOB REQUEUE")
    else:
        job.final = "REQUEUE"
        _finish(c, job)
    return True


# ------------------------------------------------------------------------------------------------------------- scancel


def scancel(c: Controller, request: dict[str, Any]) -> Reply:
    given, targets = options.parse("scancel", options.SCANCEL, request["argv"], permute=True)
    if "version" in given:
        return Reply(out=f"{steps.VERSION}\n")
    for name in ("batch", "full", "ctld", "jobname", "name", "state"):
        if name in given:
            raise options.BadOption(f"fake_slurm: does not know scancel --{name}")
    user = given.get("user") or ("me" if "me" in given else "")
    if not targets and not user:
        return Reply(err="scancel: error: No job identification provided\n", code=1)
    number = _signal(given["signal"]) if "signal" in given else 0
    if not targets:
        mine = user in ("me", user_name(), str(os.getuid()))
        targets = [j.id for j in c.jobs.values() if mine and j.state not in ENDED and j.state != "COMPLETING"]
    for target in targets:
        if not re.fullmatch(r"\d+(\.\d+|\.batch)?", target):
            return Reply(err=f"scancel: error: Invalid job id {target}\n", code=1)
    err, code = "", 0
    for target in targets:
        said, failed = _cancel_one(c, target, number)
        err, code = err + said, failed or code
    return Reply(err=err, code=code)


def _cancel_one(c: Controller, target: str, number: int) -> tuple[str, int]:
    id_, _, step_id = target.partition(".")
    job = c.jobs.get(id_)
    if not step_id:
        if job is None:
            # Without a filter scancel is one request, and its "invalid job id" is no error (22.05.8).
            return "", 0
        if number and number != signal.SIGKILL:
            for step in job.steps.values():
                if step.id != "batch":
                    launch.signal_step(c, step, number)
        else:
            _effective(c, lambda: cancel(c, job))
        return "", 0
    found = job.steps.get(step_id) if job else None
    error = "scancel: error: Kill job error on job step id"
    if job is None or found is None or job.state != "RUNNING":
        # A job that has ended, or is about to, is named with its step, a running one is not (22.05.8).
        runs = job is not None and job.state == "RUNNING"
        return f"{error} {id_ if runs else target}: {INVALID}\n", 225 if runs else 1
    if not number:
        _effective(c, lambda: launch.cancel(c, found))
        return "", 0
    _effective(c, lambda: launch.signal_step(c, found, number))
    if found.nodes == job.nodes:
        return "", 0
    # scancel sends a signal to every node of the job, also to those without the step (22.05.8).
    if number == signal.SIGKILL:
        return f"{error} {id_}: No error\n", 0
    return f"{error} {id_}: {INVALID}\n", 225


def _effective(c: Controller, do: Any) -> None:
    """Do it, or let it wait as long as the fault says: scancel itself has then answered."""
    if c.faults.deaf_s:
        c.after(c.faults.deaf_s, do)
    else:
        do()


def _signal(text: str) -> int:
    if text.isdigit():
        return int(text)
    name = text.upper()
    try:
        return int(signal.Signals["SIG" + name.removeprefix("SIG")])
    except KeyError:
        raise options.BadOption(f"scancel: error: Unknown job signal: {text}", 1) from None
