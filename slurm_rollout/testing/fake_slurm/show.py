"""What scontrol, squeue and sinfo print, as 22.05.8 does."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slurm_rollout.testing.fake_slurm import jobs, options
from slurm_rollout.testing.fake_slurm.environs import PARTITION
from slurm_rollout.testing.fake_slurm.jobs import INVALID
from slurm_rollout.testing.fake_slurm.model import ENDED, SHORT, Job, Node, Reply, Step, hostlist, ranged, user_name
from slurm_rollout.testing.fake_slurm.steps import VERSION

if TYPE_CHECKING:
    from slurm_rollout.testing.fake_slurm.controller import Controller

TIME = "%Y-%m-%dT%H:%M:%S"
YEAR_S = 365 * 86400
SHORT_NODE = {"allocated": "alloc", "mixed": "mix", "unknown": "unk", "completing": "comp"}


def answer(c: Controller, request: dict[str, Any]) -> Reply:
    """Answer scontrol, squeue and sinfo."""
    try:
        return {"scontrol": _scontrol, "squeue": _squeue, "sinfo": _sinfo}[request["program"]](c, request)
    except options.BadOption as e:
        return Reply(err=f"{e}\n", code=e.code)


# ------------------------------------------------------------------------------------------------------------ scontrol


def _scontrol(c: Controller, request: dict[str, Any]) -> Reply:
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


def _at(moment: float | None, otherwise: str = "Unknown") -> str:
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
        [f"SubmitTime={_at(job.submitted)}", f"EligibleTime={_at(job.submitted)}"],
        [f"StartTime={_at(started)}", f"EndTime={_at(end)}", "Deadline=N/A"],
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
            groups.append([f"Reason=Not responding [root@{_at(node.down_since)}]"])
        out += _lines(groups, one_line=one_line).replace(" \n", "\n") if one_line else _lines(groups, one_line=False)
    return Reply(out=out, code=code)


def _sinfo(c: Controller, request: dict[str, Any]) -> Reply:
    given, rest = options.parse("sinfo", options.SINFO, request["argv"], permute=True)
    if "version" in given:
        return Reply(out=f"{VERSION}\n")
    for name in ("states", "long"):
        if name in given:
            raise options.BadOption(f"fake_slurm: does not know sinfo --{name}")
    if rest:
        raise options.BadOption(f"fake_slurm: does not know sinfo {' '.join(rest)}")
    wanted = hostlist(given["nodes"]) if given.get("nodes") else tuple(c.nodes)
    nodes = [n for n in c.nodes.values() if n.name in wanted]
    rows: list[dict[str, str]] = []
    by_state: dict[str, list[Node]] = {}
    for node in nodes:
        by_state.setdefault(node_state(c, node) if "Node" not in given else node.name, []).append(node)
    for group in by_state.values():
        state = node_state(c, group[0])
        base = state.rstrip("*")
        names = ranged(tuple(n.name for n in group))
        rows.append(
            {
                "N": names,
                "D": str(len(group)),
                "P": f"{PARTITION}*",
                "T": state,
                "t": SHORT_NODE.get(base, base) + state[len(base) :],
                "E": "Not responding" if group[0].down else "none",
                "a": "up",
                "l": "infinite",
                "R": PARTITION,
                "n": names,
            }
        )
    heads = {"N": "NODELIST", "D": "NODES", "P": "PARTITION", "T": "STATE", "t": "STATE", "E": "REASON", "a": "AVAIL"}
    heads |= {"l": "TIMELIMIT", "R": "PARTITION", "n": "HOSTNAMES"}
    default = "%#N %.5D %.9P %6t" if "Node" in given else "%#P %.5a %.10l %.6D %.6t %N"
    return Reply(out=_table("sinfo", rows, heads, given.get("format", default), head="noheader" not in given))


# -------------------------------------------------------------------------------------------------------------- squeue


def _squeue(c: Controller, request: dict[str, Any]) -> Reply:
    given, _ = options.parse("squeue", options.SQUEUE, request["argv"], permute=True)
    if "version" in given:
        return Reply(out=f"{VERSION}\n")
    for name in ("name", "nodelist"):
        if name in given:
            raise options.BadOption(f"fake_slurm: does not know squeue --{name}")
    wanted = given["jobs"].split(",") if given.get("jobs") else []
    if given.get("steps"):
        wanted = given["steps"].split(",")
    user = given.get("user", "")
    mine = not user or user in (user_name(), str(os.getuid()), request["env"].get("USER"))
    if "json" in given:
        # 22.05 heeds no filter.
        return Reply(out=json_document([_json(j) for j in c.jobs.values()], []))
    if "steps" in given:
        rows = [r for r in _step_rows(c) if not wanted or r["i"] in wanted or r["i"].partition(".")[0] in wanted]
        heads = {
            "i": "STEPID",
            "j": "NAME",
            "P": "PARTITION",
            "u": "USER",
            "M": "TIME",
            "N": "NODELIST",
            "k": "COMMENT",
        }
        default = "%.15i %.8j %.9P %.8u %.9M %N"
        return Reply(out=_table("squeue", rows, heads, given.get("format", default), head="noheader" not in given))
    if len(wanted) == 1 and wanted[0] not in c.jobs:
        return Reply(err=f"slurm_load_jobs error: {INVALID}\n", code=1)
    states = {s.upper() for s in given["states"].split(",")} if given.get("states") else set()
    shown = [
        j
        for j in c.jobs.values()
        if mine
        and (not wanted or j.id in wanted)
        and ("ALL" in states or (states & {j.state, SHORT[j.state]} if states else j.state not in ENDED))
    ]
    heads = {
        "i": "JOBID",
        "P": "PARTITION",
        "j": "NAME",
        "u": "USER",
        "t": "ST",
        "T": "STATE",
        "M": "TIME",
        "D": "NODES",
    }
    heads |= {"R": "NODELIST(REASON)", "N": "NODELIST", "k": "COMMENT", "Z": "WORK_DIR", "C": "CPUS", "a": "ACCOUNT"}
    heads |= {
        "L": "TIME_LEFT",
        "A": "JOBID",
        "r": "REASON",
        "l": "TIME_LIMIT",
        "S": "START_TIME",
        "e": "END_TIME",
        "V": "SUBMIT_TIME",
    }
    default = "%.18i %.9P %.8j %.8u %.2t %.10M %.6D %R"
    # Pending ones first, as squeue sorts them.
    rows = [_job_row(j) for j in sorted(shown, key=lambda j: j.state != "PENDING")]
    return Reply(out=_table("squeue", rows, heads, given.get("format", default), head="noheader" not in given))


def _job_row(job: Job) -> dict[str, str]:
    nodes = ranged(job.nodes)
    limit_s = job.time_limit_s if job.time_limit_s or job.state == "PENDING" else YEAR_S
    limit = "UNLIMITED" if limit_s is None else span(limit_s)
    left_s = None if limit_s is None else limit_s - run_s(job)
    return {
        "i": job.id,
        "A": job.id,
        "P": PARTITION,
        "j": job.name,
        "u": user_name(),
        "t": SHORT[job.state],
        "T": job.state,
        "M": span(run_s(job)),
        "D": str(len(job.nodes) or job.count),
        "N": nodes,
        "R": nodes if job.state not in ("PENDING", "FAILED", "TIMEOUT") else f"({job.reason})",
        "r": job.reason,
        "k": job.comment or "(null)",
        "Z": job.cwd,
        "C": str(sum(job.cpus_of.values()) or job.count * job.cpus),
        "a": "(null)",
        "l": limit,
        "L": limit if left_s is None else span(left_s),
        "S": _at(job.started if job.state != "PENDING" else None, "N/A"),
        "e": _at(job.ended, "N/A"),
        "V": _at(job.submitted),
    }


def _step_rows(c: Controller) -> list[dict[str, str]]:
    rows = []
    for job in c.jobs.values():
        found = listed_steps(c, job)
        # The batch step last.
        for step in sorted(found, key=lambda s: s.id == "batch"):
            rows.append(
                {
                    "i": step.label,
                    "j": step.name,
                    "P": PARTITION,
                    "u": user_name(),
                    "M": span(time.time() - step.started),
                    "N": ranged(step.nodes),
                    "k": "(null)",
                }
            )
    return rows


def _json(job: Job) -> dict[str, Any]:
    return {
        "job_id": int(job.id),
        "name": job.name,
        "comment": job.comment,
        "job_state": job.state,
        "nodes": ranged(job.nodes),
        "user_name": user_name(),
        "current_working_directory": job.cwd,
    }


def json_document(found: list[dict[str, Any]], errors: list[dict[str, Any]]) -> str:
    version = {"major": 22, "micro": 8, "minor": 5}
    meta = {
        "plugin": {"type": "openapi/v0.0.38", "name": "Slurm OpenAPI v0.0.38"},
        "Slurm": {"version": version, "release": "22.05.8"},
    }
    return json.dumps({"meta": meta, "errors": errors, "jobs": found}, indent=2) + "\n"


def _table(program: str, rows: list[dict[str, str]], heads: dict[str, str], pattern: str, *, head: bool) -> str:
    """Fill a pattern such as `%.18i %j`: a width cuts and fills, a dot in front of it aligns to the right."""
    parts = re.split(r"(%#?\.?\d*[A-Za-z])", pattern)
    for part in parts:
        if re.fullmatch(r"%#?\.?\d*[A-Za-z]", part) and part[-1] not in heads:
            raise options.BadOption(f"fake_slurm: does not know {program} --format {part}")
    lines = []
    for row in [*([heads] if head else []), *rows]:
        text = ""
        for part in parts:
            found = re.fullmatch(r"%(#?)(\.?)(\d*)([A-Za-z])", part)
            if not found:
                text += part
                continue
            free, dot, width, letter = found.groups()
            value = row[letter]
            # "#", our own: as wide as the widest, at least as Slurm's columns.
            wide = (
                max(10 if letter == "N" else 9, *(len(r[letter]) for r in rows)) if free and rows else int(width or 0)
            )
            if wide:
                value = value[:wide].rjust(wide) if dot else value[:wide].ljust(wide)
            text += value
        lines.append(text + "\n")
    return "".join(lines)
