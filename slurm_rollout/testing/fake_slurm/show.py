"""What scontrol prints, as 22.05.8 does."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slurm_rollout.testing.fake_slurm import jobs, options
from slurm_rollout.testing.fake_slurm.environs import PARTITION
from slurm_rollout.testing.fake_slurm.jobs import INVALID
from slurm_rollout.testing.fake_slurm.model import ENDED, Job, Node, Reply, Step, hostlist, ranged, user_name
from slurm_rollout.testing.fake_slurm.steps import VERSION

if TYPE_CHECKING:
    from slurm_rollout.testing.fake_slurm.controller import Controller

TIME = "%Y-%m-%dT%H:%M:%S"
YEAR_S = 365 * 86400
MAX_COMMENT_BYTES = 1024


# ------------------------------------------------------------------------------------------------------------ scontrol


def scontrol(c: Controller, request: dict[str, Any]) -> Reply:
    given, words = options.parse("scontrol", options.SCONTROL, request["argv"], permute=True)
    if "version" in given:
        return Reply(out=f"{VERSION}\n")
    one_line = "oneliner" in given
    match words:
        case ["show", "step" | "steps", *which] if len(which) < 2:
            return _show_step(c, which[0] if which else "", one_line=one_line)
        case ["show", "job" | "jobs", *which] if len(which) < 2:
            return _show_job(c, which[0] if which else "", one_line=one_line)
        case ["show", "node" | "nodes", *which] if len(which) < 2:
            return _show_node(c, which[0] if which else "", one_line=one_line)
        case ["show", "hostnames" | "hostname", *which] if len(which) < 2:
            names = hostlist(which[0]) if which else ()
            if not names:
                return Reply(err="scontrol: error: host list is empty\n")
            return Reply(out="".join(f"{n}\n" for n in names))
        case ["requeue", job]:
            found = c.jobs.get(job)
            if found is None:
                return Reply(err=f"{INVALID} for job {job}\n", code=1)
            if not jobs.requeue(c, found):
                return Reply(err=f"Requested operation is presently disabled for job {job}\n", code=1)
            return Reply()
        case ["update", *pairs]:
            return _update(c, pairs)
    raise options.BadOption(f"fake_slurm: does not know scontrol {' '.join(words)}")


def _update(c: Controller, pairs: Sequence[str]) -> Reply:
    fields = {k.lower(): v for k, _, v in (p.partition("=") for p in pairs)}
    if set(fields) != {"jobid", "comment"}:
        raise options.BadOption(f"fake_slurm: does not know scontrol update {' '.join(pairs)}, only JobId= Comment=")
    job = c.jobs.get(fields["jobid"])
    if job is None:
        return Reply(err=f"{INVALID} for job {fields['jobid']}\n", code=1)
    if job.state in ENDED:
        return Reply(err=f"Job has already finished for job {job.id}\n", code=1)
    if len(fields["comment"].encode(errors="surrogateescape")) > MAX_COMMENT_BYTES:
        too_long = "Pathname of a file, directory or other parameter too long"
        return Reply(err=f"{too_long} for job {job.id}\n", code=1)
    job.comment = fields["comment"]
    return Reply()


def _lines(groups: Sequence[Sequence[str]], *, one_line: bool) -> str:
    text = [" ".join(g) for g in groups]
    return " ".join(text) + " \n" if one_line else "\n   ".join(text) + "\n\n"


def _show_step(c: Controller, which: str, *, one_line: bool) -> Reply:
    job_id, dot, step_id = which.partition(".")
    if dot and not step_id.isdigit():
        step_id = "0"  # as it reads a name (22.05.8)
    if which and not job_id.isdigit():
        job_id = ""  # it does not complain about nonsense, it shows all
    if job_id and job_id not in c.jobs:
        return Reply(err=f"slurm_get_job_steps error: {INVALID}\n", code=1)
    texts = []
    for job in c.jobs.values():
        if job_id and job.id != job_id:
            continue
        for step in listed_steps(c, job):
            if not dot or step.id == step_id:
                texts.append(_lines(_step(c, step), one_line=one_line).replace(" \n", "\n"))
        if not dot:
            pending = [_lines(_pending(c, job, client.request["pid"]), one_line=one_line) for client in job.pending]
            texts += [text.replace(" \n", "\n") for text in pending]
    if not texts and which:
        return Reply(out=f"Job step {job_id}.{step_id} not found\n", code=1)
    return Reply(out="".join(texts))


def listed_steps(c: Controller, job: Job) -> list[Step]:
    """Return the steps that Slurm lists, the batch step first."""
    return [s for s in job.steps.values() if not any(part in s.name for part in c.faults.vanished)]


def _step(c: Controller, step: Step) -> list[list[str]]:
    cpus = sum(step.cpus.values())
    tres = "(null)" if step.id == "batch" else f"cpu={cpus},mem=0,node={len(step.nodes)}"
    srun = f"{c.host}:{step.srun_pid}" if step.srun_pid else "(null):0"
    freq = ["CPUFreqReq=Default"] + ([f"Dist={step.distribution}"] if step.distribution else [])
    groups = [
        [
            f"StepId={step.label}",
            f"UserId={os.getuid()}",
            f"StartTime={time.strftime(TIME, time.localtime(step.started))}",
            "TimeLimit=UNLIMITED",
        ],
        ["State=RUNNING", f"Partition={PARTITION}", f"NodeList={ranged(step.nodes)}"],
        [f"Nodes={len(step.nodes)}", f"CPUs={cpus}", f"Tasks={step.tasks}", f"Name={step.name}", "Network=(null)"],
        [f"TRES={tres}"],
        ["ResvPorts=(null)"],
        freq,
        [f"SrunHost:Pid={srun}"],
    ]
    if step.cpus_per_task:
        groups.append([f"TresPerStep=cpu:{step.cpus_per_task * step.tasks}"])
    if step.gres:
        groups.append([f"TresPerNode={step.gres}"])
    if step.cpus_per_task:
        groups.append([f"TresPerTask=cpu:{step.cpus_per_task}"])
    return groups


def _pending(c: Controller, job: Job, pid: int) -> list[list[str]]:
    return [
        # "TDB": sic, 20.11 to 25.11.
        [f"StepId={job.id}.TDB", f"UserId={os.getuid()}", "StartTime=Unknown", "TimeLimit=UNLIMITED"],
        ["State=PENDING", f"Partition={PARTITION}", f"NodeList={ranged(job.nodes)}"],
        [f"Nodes={len(job.nodes)}", "CPUs=1", "Tasks=1", "Name=(null)", "Network=(null)"],
        ["TRES=(null)"],
        ["ResvPorts=(null)"],
        ["CPUFreqReq=Default", "Dist=Unknown"],
        [f"SrunHost:Pid={c.host}:{pid}"],
    ]


def _show_job(c: Controller, which: str, *, one_line: bool) -> Reply:
    if which and which not in c.jobs:
        return Reply(err=f"slurm_load_jobs error: {INVALID}\n", code=1)
    shown = [c.jobs[which]] if which else list(c.jobs.values())
    if not shown:
        return Reply(out="No jobs in the system\n")
    return Reply(out="".join(_lines(_job(c, j), one_line=one_line) for j in shown))


def at(moment: float | None, otherwise: str = "Unknown") -> str:
    return otherwise if moment is None else time.strftime(TIME, time.localtime(moment))


def run_s(job: Job) -> float:
    if job.started is None or job.state == "PENDING":
        return 0.0
    return (job.ended if job.ended is not None else time.time()) - job.started


def _job(c: Controller, job: Job) -> list[list[str]]:
    user, group = user_name(), os.getgid()
    status = job.exit_status
    code = f"{os.WEXITSTATUS(status)}:0" if not os.WIFSIGNALED(status) else f"0:{os.WTERMSIG(status)}"
    started = job.started if job.state != "PENDING" else None
    limit_s = job.time_limit_s
    if limit_s is None and started is not None:
        limit_s = YEAR_S  # what a job without a limit is given where the partition has none
    limit = "UNLIMITED" if limit_s is None else span(limit_s, full=True)
    end = job.ended
    if end is None and started is not None and limit_s is not None:
        end = started + limit_s
    nodes, count = ranged(job.nodes), len(job.nodes) or job.count
    cpus = sum(job.cpus_of.values()) or job.count * job.cpus
    return [
        [f"JobId={job.id}", f"JobName={job.name}"],
        [f"UserId={user}({os.getuid()})", f"GroupId={user}({group})", "MCS_label=N/A"],
        ["Priority=4294901759", "Nice=0", "Account=(null)", "QOS=(null)"],
        [f"JobState={job.state}", f"Reason={job.reason}", "Dependency=(null)"],
        [f"Requeue={int(job.requeue)}", f"Restarts={job.restarts}", "BatchFlag=1", "Reboot=0", f"ExitCode={code}"],
        [f"RunTime={span(run_s(job), full=True)}", f"TimeLimit={limit}", "TimeMin=N/A"],
        [f"SubmitTime={at(job.submitted)}", f"EligibleTime={at(job.submitted)}"],
        [f"StartTime={at(started)}", f"EndTime={at(end)}", "Deadline=N/A"],
        [f"Partition={PARTITION}", f"AllocNode:Sid={c.host}:0"],
        [
            f"ReqNodeList={job.options.get('nodelist') or '(null)'}",
            f"ExcNodeList={job.options.get('exclude') or '(null)'}",
        ],
        [f"NodeList={nodes}"],
        *([[f"BatchHost={job.allocated[0]}"]] if job.nodes else []),
        [
            f"NumNodes={count}",
            f"NumCPUs={cpus}",
            f"NumTasks={job.options.get('ntasks') or count * job.tasks_per_node}",
            f"CPUs/Task={job.cpus}",
        ],
        [f"TRES=cpu={cpus},node={count},billing={cpus}"],
        [f"OverSubscribe={'NO' if job.exclusive else 'OK'}", "Contiguous=0", "Licenses=(null)", "Network=(null)"],
        [f"Command={job.command or '(null)'}"],
        [f"WorkDir={job.cwd}"],
        *([[f"Comment={job.comment} "]] if job.comment else []),
        [f"StdErr={job.error}"],
        ["StdIn=/dev/null"],
        [f"StdOut={job.output}"],
        ["Power="],
        *([[f"TresPerNode=gres:gpu:{job.gpus}"]] if job.gpus else []),
    ]


def span(seconds: float, *, full: bool = False) -> str:
    """Return a time span as Slurm writes it: `0:05`, `1:00:00`, `1-00:00:00`; with `full` always with hours."""
    whole = int(seconds)
    days, rest = divmod(whole, 86400)
    hours, minutes, rest = rest // 3600, rest // 60 % 60, rest % 60
    if full or days:
        text = f"{hours:02}:{minutes:02}:{rest:02}"
        return f"{days}-{text}" if days else text
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# --------------------------------------------------------------------------------------------------------------- nodes


def node_state(c: Controller, node: Node) -> str:
    """Return the state as `sinfo -o %T` writes it; a star: it does not answer."""
    if node.down:
        return "down*"
    active = [j for j in c.jobs.values() if j.active and node.name in j.nodes]
    cpus = sum(j.cpus_of[node.name] for j in active)
    if active and all(j.state == "COMPLETING" for j in active):
        return "completing"
    return "idle" if not cpus else "allocated" if cpus >= c.cpus else "mixed"


def _show_node(c: Controller, which: str, *, one_line: bool) -> Reply:
    names = hostlist(which) if which else tuple(c.nodes)
    out, code = "", 0
    for name in names:
        if name not in c.nodes:
            out, code = out + f"Node {name} not found\n", 1
            continue
        node = c.nodes[name]
        state = node_state(c, node)
        used = sum(j.cpus_of[name] for j in c.jobs.values() if j.active and name in j.nodes)
        groups = [
            [f"NodeName={name}", "Arch=x86_64", "CoresPerSocket=1 "],
            [f"CPUAlloc={used}", f"CPUEfctv={c.cpus}", f"CPUTot={c.cpus}", "CPULoad=0.00"],
            ["AvailableFeatures=(null)"],
            ["ActiveFeatures=(null)"],
            [f"Gres={f'gpu:{c.gpus}' if c.gpus else '(null)'}"],
            ["NodeAddr=127.0.0.1", f"NodeHostName={name}", "Version=22.05.8"],
            [f"State={'DOWN+NOT_RESPONDING' if node.down else state.upper()}", "ThreadsPerCore=1", "TmpDisk=0"],
            [f"Partitions={PARTITION} "],
        ]
        if node.down:
            groups.append([f"Reason=Not responding [root@{at(node.down_since)}]"])
        out += _lines(groups, one_line=one_line).replace(" \n", "\n") if one_line else _lines(groups, one_line=False)
    return Reply(out=out, code=code)
