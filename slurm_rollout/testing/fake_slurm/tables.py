"""What squeue and sinfo print, as 22.05.8 does."""

from __future__ import annotations

import json
import os
import pwd
import re
import time
from typing import TYPE_CHECKING, Any

from slurm_rollout.testing.fake_slurm import options
from slurm_rollout.testing.fake_slurm.environs import PARTITION
from slurm_rollout.testing.fake_slurm.jobs import INVALID
from slurm_rollout.testing.fake_slurm.model import ENDED, SHORT, Job, Node, Reply, hostlist, ranged, user_name
from slurm_rollout.testing.fake_slurm.show import YEAR_S, at, listed_steps, node_state, run_s, span
from slurm_rollout.testing.fake_slurm.steps import VERSION

if TYPE_CHECKING:
    from slurm_rollout.testing.fake_slurm.controller import Controller

SHORT_NODE = {"allocated": "alloc", "mixed": "mix", "unknown": "unk", "completing": "comp"}


def sinfo(c: Controller, request: dict[str, Any]) -> Reply:
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


def squeue(c: Controller, request: dict[str, Any]) -> Reply:
    given, _ = options.parse("squeue", options.SQUEUE, request["argv"], permute=True)
    if "version" in given:
        return Reply(out=f"{VERSION}\n")
    for name in ("name", "nodelist"):
        if name in given:
            raise options.BadOption(f"fake_slurm: does not know squeue --{name}")
    wanted = given["jobs"].split(",") if given.get("jobs") else []
    if given.get("steps"):
        wanted = given["steps"].split(",")
    users = given["user"].split(",") if given.get("user") else []
    mine = not users or not {*users}.isdisjoint((user_name(), str(os.getuid()), request["env"].get("USER")))
    nobody = "".join(f"squeue: error: Invalid user: {u}\n\n" for u in users if not _is_user(u))
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
    table = _table("squeue", rows, heads, given.get("format", default), head="noheader" not in given)
    return Reply(out=table, err=nobody)  # and the others are shown (22.05.8)


def _is_user(name: str) -> bool:
    try:
        return bool(pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name))
    except KeyError:
        return False


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
        "k": "(null)" if job.comment is None else job.comment,
        "Z": job.cwd,
        "C": str(sum(job.cpus_of.values()) or job.count * job.cpus),
        "a": "(null)",
        "l": limit,
        "L": limit if left_s is None else span(left_s),
        "S": at(job.started if job.state != "PENDING" else None, "N/A"),
        "e": at(job.ended, "N/A"),
        "V": at(job.submitted),
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
        "comment": job.comment or "",
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
