"""The text of `describe`, from the document that `describe --json` prints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from slurm_rollout.cli.table import clean, columns, duration
from slurm_rollout.core.failure_classes import RULES, FailureClass
from slurm_rollout.core.hostlist import expand, fold

NOTES = 10
"""So many notes of an incarnation are printed, the newest ones."""

MEMBERS = 4
"""So many members' last lines are printed of an incarnation."""

_KEY_WIDTH = 12
_NEXT = {
    "launch": "the next start",
    "go": "the engines start when every node is fenced",
    "give_up": "the start is given up",
    "cancel": "Slurm ends what the agents did not",
}


def render(document: Mapping[str, Any], *, snapshots: bool) -> list[str]:
    """Return the lines for people; with `snapshots` those are printed whole. No line is cut: a log may be in it."""
    lines = head(document)
    for incarnation in document["incarnations"]:
        lines += ["", *_incarnation(document, incarnation)]
        if snapshots:
            lines += _snapshots(incarnation)
    if not document["incarnations"] and not document["older"]:
        lines += ["", "Nothing of it was started yet, as far as the events tell."]
    if document["older"]:
        lines += ["", f"Older incarnations: {document['older']}, shown with --all"]
    return [clean(line).rstrip() for line in lines]


def head(document: Mapping[str, Any]) -> list[str]:
    """Return how the group stands. KeyError, TypeError or AttributeError when its status is not one of this version."""
    return list(_head(document))


def _row(key: str, *values: str) -> Iterator[str]:
    for n, value in enumerate(values):
        yield f"  {'' if n else key:<{_KEY_WIDTH}} {value}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _stamp(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(at))


def _took(**stages: float | None) -> str:
    return ", ".join(f"{name} {_seconds(s)}" for name, s in stages.items() if s is not None)


def _seconds(s: float) -> str:
    return f"{s:.3g} s" if s < 100 else duration(s)


def _who(rank: int | None, node: str) -> str:
    return "@".join(str(part) for part in (rank, node or None) if part is not None)


# ---------------------------------------------------------------------------------------------------------------- head


def _head(document: Mapping[str, Any]) -> Iterator[str]:
    meta, run, group = document["meta"], document["run"], document["group"]
    at = run.get("at")
    if "phase" not in group:
        yield f"Group {group['id']}: what it does now is not known"
        yield from _members(group)
        return
    since = f" since {duration(at - group['since'])}" if group["since"] else ""
    reason = f" ({group['reason']})" if group["reason"] and group["phase"] != "ready" else ""
    yield f"Group {group['id']}: {group['phase']}{since}{reason}, incarnation {group['incarnation']}"
    if group["message"] and group["phase"] != "ready":
        yield from _row("Message", _one_line(group["message"]))
    if group["slow"]:
        yield from _row("Slow", "answers late, but its progress counter moves: left alone")
    again = f" (restart {run['restart_count']})" if run["restart_count"] else ""
    job = f"job {run['job']}{again}" if run["job"] else "no job"
    yield from _row("Run", f"{run['run']}, {job}: {run['phase']}, epoch {run['epoch']}")
    where, age = f"on {run['host']}, term {run['term']}", duration(meta["age_s"])
    if meta["coordinator"] == "ended":
        yield from _row("Coordinator", f"the run has ended: last word {age} ago, {where}")
    elif meta["coordinator"] == "lost":
        yield from _row("Coordinator", f"NO HEARTBEAT: last word {age} ago, {where}")
    else:
        yield from _row("Coordinator", f"{where}, heard {age} ago")
    yield from _members(group)
    budget = group["budget"]
    left = [
        f"{budget[key]['left']} of {budget[key]['of']} {what}"
        for key, what in (("restarts", "restarts"), ("start_failures", "start-up failures"))
    ]
    yield from _row("Budget", f"{', '.join(left)} left within {duration(budget['window_s'])}")
    coming = group["next"]
    if coming["action"]:
        when = "" if coming["at"] is None else f", in {duration(coming['at'] - at)}"
        yield from _row("Next", f"{coming['action']}{when}: {_NEXT.get(coming['action'], '')}")
    elif group["phase"] == "failed":
        yield from _row("Next", f"nothing; it comes back when asked: slurm-rollout restart {group['id']}")
    version = "" if group["weights_version"] is None else f", version {group['weights_version']}"
    yield from _row("Weights", f"{group['weights']}{version}")


def _members(group: Mapping[str, Any]) -> Iterator[str]:
    on: dict[str, list[str]] = {}
    for member in group["members"]:
        on.setdefault(member["node"], []).append(str(member["rank"]))
    ranks = [rank for there in on.values() for rank in there]
    if len(on) > 2 and len(on) == len(ranks) and expand(fold(on)) == tuple(on):
        yield from _row("Nodes", f"{fold(on)}: rank {ranks[0]} to {ranks[-1]}")
    elif on:
        yield from _row("Nodes", *(f"{node}: rank {', '.join(there)}" for node, there in on.items()))
    elif group.get("nodes"):
        yield from _row("Nodes", fold(group["nodes"]))
    if group.get("master"):
        yield from _row("Master", group["master"])
    if "urls" in group:
        yield from _row("URLs", *(group["urls"] or ["none: not offered to the trainer now"]))
    for name, urls in (group.get("endpoints") or {}).items():
        if urls:
            yield from _row(name, *urls)


# --------------------------------------------------------------------------------------------------------- incarnations


def _incarnation(document: Mapping[str, Any], i: Mapping[str, Any]) -> Iterator[str]:
    group, end = document["group"], i["end"]
    yield _title(document, i)
    if i["launched_at"] is not None:
        stages = _took(launch=i["launch_s"], start=i["start_s"]) + _part("verify", i["verify_s"])
        yield from _row("Launched", f"{_stamp(i['launched_at'])}, term {i['term']}" + (f": {stages}" if stages else ""))
    if i["ready_at"] is not None:
        yield from _row("Ready", _stamp(i["ready_at"]))
    if end is not None:
        yield from _end(end)
    yield from _black_box(i)
    yield from _row("Exit records", *_exits(i))
    for said in i["last_lines"][:MEMBERS]:
        yield from _row("Last lines", f"rank {said['rank']}, {said['path']}")
        yield from (f"    | {line.expandtabs()}" for line in said["lines"])
    if len(i["last_lines"]) > MEMBERS:
        yield from _row("", f"{len(i['last_lines']) - MEMBERS} more members: slurm-rollout logs")
    notes = i["notes"][-NOTES:]
    left_out = len(i["notes"]) - len(notes)
    rows = [f"{left_out} older: slurm-rollout events --group {group['id']}"] if left_out else []
    rows += [f"{_stamp(n['at'])} {_TOLD.get(n['type'], n['type'])}: {_one_line(n['message'])}" for n in notes]
    yield from _row("Notes", *rows)
    if i["launched_at"] is not None:
        yield from _row("Logs", _logs(group, i))


_TOLD = {
    "takeover": "coordinator replaced",
    "up": "`up` was started again",
    "ended": "the run has ended",
    "fence_waits": "the fence waits",
    "fence_failed": "the fence failed",
}


def _title(document: Mapping[str, Any], i: Mapping[str, Any]) -> str:
    group, now = document["group"], document["run"].get("at")
    if i["launched_at"] is None and not i["incarnation"]:
        return "Before the first start"
    name = f"Incarnation {i['incarnation']}" + (f" on {fold(i['nodes'])}" if i["nodes"] else "")
    end, ready_at = i["end"], i["ready_at"]
    until = now if end is None else end["at"]
    served = "" if ready_at is None or until is None else duration(until - ready_at)
    if end is not None:
        return f"{name}: " + (f"served {served}, then {end['reason']}" if served else f"never ready: {end['reason']}")
    if group.get("incarnation") != i["incarnation"]:
        return f"{name}: no end of it was told"
    now_is = "now" if document["meta"]["coordinator"] == "alive" else "the coordinator's last word"
    return f"{name}: {group['phase']}" + (f", served {served} until {now_is}" if served else "")


def _logs(group: Mapping[str, Any], i: Mapping[str, Any]) -> str:
    keep, newest = group["log_keep_incarnations"], group.get("incarnation")
    if i["logs"]["kept"]:
        return str(i["logs"]["path"])
    if keep is not None and newest is not None and i["incarnation"] <= newest - keep:
        return f"deleted, and the exit records with them: those of the last {keep} incarnations are kept"
    return "none: no engine was started" if i["go_at"] is None else f"{i['logs']['path']} is not there"


def _part(name: str, s: float | None) -> str:
    return "" if s is None else f" ({name} {_seconds(s)} of it)"


def _end(end: Mapping[str, Any]) -> Iterator[str]:
    who = _who(end["rank"], end["node"])
    why = " ".join(part for part in (end["reason"], who) if part)
    yield from _row("Ended", f"{_stamp(end['at'])}, {why}: {_one_line(end['message'])}")
    if end["restarted_peers"]:
        yield from _row("", f"rank {', '.join(map(str, end['restarted_peers']))} was healthy and restarted with it")
    if end["kind"] in set(FailureClass) and end["reason"] != "takeover":  # which is no engine's failure to start
        yield from _row("Means", f"{end['kind']}: {RULES[FailureClass(end['kind'])].sentence}")
    took = [
        _took(detect=end["detect_s"]),
        _took(stop=end["stop_s"]) + _part("snapshot", end["snapshot_s"]) if end["stop_s"] is not None else "",
        _took(fence=end["fence_s"], backoff=end["backoff_s"]),
        _took(launch=end["launch_s"], start=end["start_s"]) + _part("verify", end["verify_s"]),
    ]
    if any(took):
        yield from _row("Took", ", ".join(stage for stage in took if stage))
    if end["recovered_as"] is not None:
        yield from _row("Recovered", f"as incarnation {end['recovered_as']}, in {_seconds(end['recovery_s'])}")


def _exits(i: Mapping[str, Any]) -> Iterator[str]:
    """Nodes whose agents say the same share a line."""
    said: dict[str, list[str]] = {}
    for step in i["steps"]:
        if step["cause"]:
            message = _one_line(step["message"])
            facts = [f"{key} {step[key]}" for key in ("code", "signal") if step[key] is not None]
            facts = [fact for fact in facts if fact not in message] + (["out of memory"] if step["oom"] else [])
            text = message if message.startswith(step["cause"]) else f"{step['cause']}: {message}"
            text += f" ({', '.join(facts)})" if facts else ""
        elif i["end"] is not None and (i["logs"]["kept"] or step["srun"]):
            text = "no exit record" + (f"; srun: {_one_line(step['srun'])}" if step["srun"] else "")
        else:
            continue
        said.setdefault(text, []).append(step["node"])
    yield from (f"{fold(nodes)}: {text}" for text, nodes in said.items())


# ----------------------------------------------------------------------------------------------------------- black box


def _black_box(i: Mapping[str, Any]) -> Iterator[str]:
    if not i["snapshots"]:
        if i["end"] is not None and i["end"]["snapshot_s"] is not None:
            yield from _row("Black box", "no snapshot is there: the agents wrote none, or it was deleted with the logs")
        return
    nodes = {rank: step["node"] for step in i["steps"] for rank in step["ranks"]}
    first, said = i["first_stuck"], "no rank could be named"
    if first is not None:
        said = f"first stuck: rank {_who(first['rank'], nodes.get(first['rank'], ''))}: {_one_line(first['why'])}"
    titles = ("MEMBER", "STATE", "WAITS IN", "PROCESSES", "CPU USED", "LOG SILENT", "NOTES")
    rows = [_looked_at(rank, nodes.get(rank, ""), snapshot) for rank, snapshot in i["snapshots"].items()]
    table = columns(rows, titles=titles, right=(3, 4, 5))
    where = f"{i['logs']['path']}/RANK.snapshot.json (all of it: --snapshot)"
    yield from _row("Black box", said, *table, where)


def _looked_at(rank: int, node: str, snapshot: Mapping[str, Any]) -> tuple[str, ...]:
    processes = [p for p in _list(snapshot.get("processes")) if isinstance(p, Mapping)]
    main = next((p for p in processes if p.get("pid") == snapshot.get("pid")), processes[0] if processes else {})
    used = [p["cpu_used_s"] for p in processes if isinstance(p.get("cpu_used_s"), int | float)]
    silent = _mapping(snapshot.get("log")).get("silent_s")
    probe = _mapping(snapshot.get("local_probe"))
    notes = [_one_line(n) for n in _list(snapshot.get("notes"))]
    if probe.get("failures"):
        notes.insert(0, f"local probe failed {probe['failures']}×: {_one_line(probe.get('error', ''))}")
    return (
        _who(rank, node),
        str(main.get("state") or "-"),
        str(main.get("wchan") or "-"),
        str(len(processes)),
        f"{sum(used):.2f} s" if used else "-",
        f"{silent:.0f} s" if isinstance(silent, int | float) else "-",
        "; ".join(notes),
    )


def _snapshots(i: Mapping[str, Any]) -> Iterator[str]:
    for rank, snapshot in i["snapshots"].items():
        yield f"  Snapshot of rank {rank}"
        yield from (f"    {line}" for line in _tree(snapshot))


def _tree(value: Any) -> Iterator[str]:
    """Print any JSON value: flat objects of a list as a table, text of several lines as it is."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            lines = list(_tree(inner))
            if len(lines) == 1 and not isinstance(inner, Mapping | list):
                yield f"{key}: {lines[0]}"
            elif lines:
                yield f"{key}:"
                yield from (f"  {line}" for line in lines)
    elif isinstance(value, list):
        rows = [v for v in value if isinstance(v, Mapping)]
        if rows and len(rows) == len(value):
            keys = list(dict.fromkeys(key for row in rows for key in row))
            yield from columns([[_cell(row.get(key, "")) for key in keys] for row in rows], titles=keys)
        else:
            yield from (line for v in value for line in _tree(v))
    else:
        yield from "" if value is None else str(value).expandtabs().splitlines()


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, Mapping):
        return ",".join(f"{k}:{v}" for k, v in value.items())
    return _one_line(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
