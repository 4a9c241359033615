"""`status`: how a run stands, from `status.json` alone, whether its coordinator lives or not.

A line for each of many runs is the business of `runs.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from slurm_rollout.cli import add_help, add_run_options
from slurm_rollout.cli.table import clean, columns, cut, duration, terminal_width
from slurm_rollout.core.hostlist import fold
from slurm_rollout.errors import CorruptFile, RolloutError, StoreError, UsageError
from slurm_rollout.rundir import RunDir, default_run_dir, find_run_dir, read_json

SCHEMA = 1

LOST_AFTER_S = 120.0
"""Silence after which the coordinator counts as lost."""

MIN_INTERVAL_S = 5.0
"""More often tells nothing new (the coordinator writes every few seconds) and loads the file system or slurmctld."""

READY, NOT_READY, UNKNOWN = 0, 3, 4

# An atomic replace on NFS may show as ESTALE, ENOENT or an empty file for a moment.
_RETRY_S = (0.02, 0.05, 0.1)

ALIVE, LOST, ENDED = "alive", "lost", "ended"

WANTED = frozenset({"first_start", "operator", "run_ending", "job_ending", "takeover"})
"""Reasons for which a group is not ready although nothing failed."""

ODD = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What the content of another version's status file, or of none, may raise."""

_HELP = """\
Shows the last word of the run's coordinator, and how old it is. Times are as of that word.

Which run: --run-dir, ROLLOUT_RUN_DIR, the job in which or in whose submit directory you are; --job, wherever it was
submitted. Else, and with -u, -a, --me: a line for each run of these users' jobs in the queue, with one squeue. A run
is found by the word slurm-rollout:/its/directory in its job's comment, else as rollout-runs/JOB in the job's working
directory. There AGE is that of the coordinator's word, LEFT the job's time; what cannot be read is "unknown".

BUDGET is restarts left/of within the window; where a start-up failed, start-up failures follow: left/of.
NEXT is what time will bring, and in how long: launch (after a backoff), go (engines start when every node is
fenced), give_up (loading takes too long), cancel (Slurm ends what the agents did not).
MESSAGE is what keeps a group from going on, LAST FAILURE is history: it stays when the group is ready again.
CLASS, of groups that are not ready, is what the evidence says that it was, and MEANS what that means.
"Blind": Slurm does not answer. "Suspects itself": most groups time out at once, so only the agents are believed.

Exit codes: 0 all groups ready, 3 some not (or the run has ended), 4 unknown: no heartbeat of the coordinator
for 120 s, or no status file that can be read; of many runs the worst; 1 Slurm does not answer; 2 usage. What to do:
docs/troubleshooting.md."""


def add_parser(subparsers: Any) -> None:
    """Add `status`."""
    parser = subparsers.add_parser(
        "status", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    add_help(parser)
    add_run_options(parser)
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument("--me", action="store_true", help="a line for each of your runs")
    whose.add_argument("-u", "--user", metavar="USER,...", help="a line for each run of these users")
    whose.add_argument("-a", "--all-users", action="store_true", help="a line for each run of anybody")
    parser.add_argument("--json", action="store_true", help="the whole document, with `meta` and `errors`")
    parser.add_argument("-h", "--noheader", action="store_true", help="only the rows of the groups, or of the runs")
    parser.add_argument(
        "-i", "--iterate", type=float, metavar="SECONDS", help="repeat, with the time, until Ctrl-C; at least 5"
    )
    parser.set_defaults(run=run_status)


def run_status(args: argparse.Namespace) -> int:
    """Print the status once, or every `-i` seconds; return the exit code of the last look."""
    if args.iterate is not None and not args.iterate >= MIN_INTERVAL_S:
        raise UsageError(
            f"-i {args.iterate:g}: at least {MIN_INTERVAL_S:g} s. The coordinator writes no more often, and to look at "
            "all runs is a question to slurmctld"
        )
    look = _what_to_look_at(args)
    while True:
        if args.iterate is not None and not args.json:
            print(time.strftime("%a %b %d %H:%M:%S %Y"))
        code = look(as_json=args.json, header=not args.noheader, one_line=args.iterate is not None)
        if args.iterate is None:
            return code
        if not args.json:
            print()
        sys.stdout.flush()
        time.sleep(args.iterate)


def _what_to_look_at(args: argparse.Namespace) -> Callable[..., int]:
    many = args.me or args.all_users or args.user is not None
    if many and (args.job or args.run_dir):
        raise UsageError("-j and --run-dir name one run, --me, -u and -a ask for many")
    named = args.job or args.run_dir or os.environ.get("ROLLOUT_RUN_DIR") or os.environ.get("SLURM_JOB_ID")
    if not many and (named or os.path.exists(default_run_dir())):
        return partial(_look, find_run_dir(args.run_dir, args.job))
    from slurm_rollout.cli.runs import RunsOf  # one run needs nothing of this

    return RunsOf(user=args.user, everybody=args.all_users, asked=many).look


def _look(run: RunDir, *, as_json: bool, header: bool, one_line: bool) -> int:
    document: dict[str, Any] = {}
    meta: dict[str, object] = {"schema": SCHEMA, "run_dir": str(run.path)}
    errors: list[str] = []
    text = ""
    code = UNKNOWN
    try:
        document = read_status(run)
        age_s = time.time() - document["at"]
        verdict, error = judge(document, age_s)
        text = render(document, age_s=age_s, verdict=verdict, header=header, width=terminal_width(sys.stdout))
        meta |= {"age_s": round(age_s, 3), "coordinator": verdict}
        code = exit_code(document, verdict)
        if error:
            errors.append(error)
    except RolloutError as e:
        errors.append(str(e))
    except ODD as e:
        document = {}
        errors.append(f"{run.status} is not a status file of this version: {type(e).__name__} {e}")
    if as_json:
        print(json.dumps({"meta": meta, "errors": errors, **document}, indent=None if one_line else 2))
        return code
    if text:
        print(text)
    for error in errors:
        print(f"slurm-rollout: {clean(error)}", file=sys.stderr)
    return code


def read_status(run: RunDir) -> dict[str, Any]:
    """Return the content of `status.json`.

    Raises:
        StoreError: it is not there, cannot be read, is no status file, or is one of a newer version.
    """
    for pause_s in _RETRY_S:
        try:
            return _read(run)
        except StoreError:
            time.sleep(pause_s)
    return _read(run)


def _read(run: RunDir) -> dict[str, Any]:
    try:
        document = read_json(run.status)
    except FileNotFoundError:
        raise StoreError(
            f"{run.status} is not there: no coordinator has written it yet, or this is not a run directory"
        ) from None
    if not isinstance(document, dict) or not isinstance(document.get("schema"), int):
        raise CorruptFile(f"{run.status} is not a status file")
    if document["schema"] > SCHEMA:
        raise StoreError(
            f"{run.status} has schema {document['schema']}, this slurm-rollout knows {SCHEMA}: use the version that "
            "the run uses"
        )
    return document


def judge(document: dict[str, Any], age_s: float) -> tuple[str, str]:
    """Return what can be said of the coordinator (`alive`, `lost`, `ended`), and the error when that is unknown."""
    limit_s = max(LOST_AFTER_S, 3 * document["heartbeat_s"])
    silent = age_s > limit_s
    # A fleet that failed ends the coordinator too; its last word stays true when it is old.
    if document["ended"] or (silent and document["phase"] in ("failed", "stopped")):
        return ENDED, ""
    where = f"the coordinator on {document['host']} (term {document['term']})"
    if silent:
        return LOST, (
            f"no heartbeat of {where} for {duration(age_s)} (limit {duration(limit_s)}): engines may still run, but "
            "nobody watches them. Does `slurm-rollout up` still run? See the end of the job's output"
        )
    if age_s < -limit_s:
        return LOST, (
            f"the last word of {where} is {duration(-age_s)} in the future: the clocks of its host and of this one "
            "disagree, so nobody can say how old it is"
        )
    return ALIVE, ""


def exit_code(document: dict[str, Any], verdict: str) -> int:
    """Return what `status` ends with for a run of which `judge` said `verdict`."""
    if verdict is LOST:
        return UNKNOWN
    return NOT_READY if verdict is ENDED or any(g["phase"] != "ready" for g in document["groups"]) else READY


def known_groups(run: RunDir) -> tuple[str, ...]:
    """Return the ids of the run's groups, as far as the run directory tells; empty when it does not."""
    for read in (lambda: read_status(run)["groups"], lambda: _planned_groups(run)):
        try:
            return tuple(str(group["id"]) for group in read())
        except (StoreError, OSError, KeyError, TypeError):
            continue
    return ()


def known_nodes(run: RunDir) -> tuple[str, ...]:
    """Return the fleet's nodes, as far as the run directory tells; empty when it does not."""
    for path in (run.status, run.plan):
        try:
            return tuple(str(node) for node in read_json(path)["nodes"])
        except (StoreError, OSError, KeyError, TypeError):
            continue
    return ()


def check_groups(run: RunDir, groups: list[str], *, nodes: bool = False) -> None:
    """Raise UsageError when one of `groups` is known not to be one of the run's; with `nodes` they may be nodes."""
    known = known_groups(run)
    fleet = known_nodes(run) if nodes else ()
    unknown = [name for name in groups if name not in known and name not in fleet]
    if known and unknown:
        also = f"; its nodes: {fold(fleet)}" if fleet else ""
        kinds = "no group or node" if nodes else "no group"
        raise UsageError(f"{kinds} {', '.join(unknown)} in this run; its groups: {', '.join(known)}{also}")
    if any(name in fleet for name in groups) and any(name in known for name in groups):
        raise UsageError("groups and nodes in one request: ask for the one, then for the other. Nothing was asked")


def _planned_groups(run: RunDir) -> list[Any]:
    return [group for pool in read_json(run.plan)["pools"] for group in pool["groups"]]


# --------------------------------------------------------------------------------------------------------------- text


def render(
    document: dict[str, Any], *, age_s: float, verdict: str, header: bool = True, width: int | None = None
) -> str:
    """Return the text for people. `width`: longer lines are cut; None: none is."""
    at = document["at"]
    groups = document["groups"]
    rows = [_group_row(group, at) for group in groups]
    if not header:
        return "\n".join(columns(rows, right=(3, 4), width=width))
    lines = [cut(clean(line), width) for line in _head(document, age_s, verdict)]
    pools = [(p["name"], p["phase"], p["ready"], p["min_ready"], p["desired"], p["reason"]) for p in document["pools"]]
    lines += ["", *columns(pools, titles=("POOL", "PHASE", "READY", "MIN", "DESIRED", "REASON"), right=(2, 3, 4))]
    titles = ("GROUP", "PHASE", "SINCE", "INC", "RESTARTS", "BUDGET", "NEXT", "NODES(REASON)")
    lines += ["", *columns(rows, titles=titles, right=(3, 4), width=width)]
    messages = [(g["id"], g["message"]) for g in groups if g["message"] and g["phase"] != "ready"]
    if messages:
        lines += ["", *columns(messages, titles=("GROUP", "MESSAGE"), width=width)]
    failures = [_failure_row(g["id"], g["failure"], at) for g in groups if g["failure"]]
    if failures:
        headings = ("GROUP", "FAILED", "INC", "MEMBER", "REASON", "LAST FAILURE")
        lines += ["", *columns(failures, titles=headings, right=(2,), width=width)]
    down = [g for g in groups if g["phase"] != "ready" and g["reason"] not in WANTED]
    meanings = [(g["id"], g["failure"]["class"], g["failure"]["means"]) for g in down if _class(g)]
    if meanings:
        lines += ["", *columns(meanings, titles=("GROUP", "CLASS", "MEANS"), width=width)]
    failed = [g["id"] for g in groups if g["phase"] == "failed"]
    if failed and verdict is ALIVE:
        lines += ["", cut(clean(f"Comes back only when asked: slurm-rollout restart {' '.join(failed)}"), width)]
    return "\n".join(lines)


def _head(document: dict[str, Any], age_s: float, verdict: str) -> list[str]:
    at = document["at"]
    again = f" (restart {document['restart_count']})" if document["restart_count"] else ""
    reason = f" ({document['reason']})" if document["reason"] else ""
    job = f"job {document['job']}{again}" if document["job"] else "no job"
    lines = [f"Run {document['run']}, {job}: {document['phase']}{reason}, epoch {document['epoch']}"]
    host = f"on {document['host']}, term {document['term']}"
    if verdict is ENDED:
        lines.append(f"The run has ended: last word {duration(age_s)} ago, coordinator {host}")
    elif verdict is LOST:
        lines.append(f"NO HEARTBEAT: last word {duration(age_s)} ago, coordinator {host}")
    else:
        left = document["time_left_s"]
        time_left = "" if left is None else f", job time left {duration(left)}"
        lines.append(f"Coordinator {host}, heard {duration(age_s)} ago{time_left}")
    if document["message"]:
        lines.append(document["message"])
    if document["ending"] and verdict is not ENDED:
        lines.append(f"Ending since {duration(at - document['ending_since'])}: {document['ending']}")
    if document["blind_since"] is not None:
        lines.append(f"Blind since {duration(at - document['blind_since'])}: Slurm does not answer")
    if document["suspect_self_since"] is not None:
        since = duration(at - document["suspect_self_since"])
        lines.append(f"Suspects itself since {since}: most groups time out at once; it asks the agents")
    lines += [_client(client, at) for client in document.get("clients", ())]
    paused = [p["name"] for p in document["pools"] if p.get("probes") == "paused"]
    if paused:
        lines.append(f"Engines of {', '.join(paused)} are asked nothing: a client said that they sleep or take weights")
    lines += [_excluded(node, at) for node in document.get("excluded", ())]
    lines += [f"Node {name} is drained by Slurm: {why}" for name, why in document.get("draining", {}).items()]
    nodes = [("Nodes", document["nodes"]), ("spares", document["spares"]), ("trainer", document["trainer_nodes"])]
    lines.append("; ".join(f"{what} {fold(names)}" for what, names in nodes if names))
    return lines


def _excluded(node: dict[str, Any], at: float) -> str:
    """Return why a node is not used, and what became of it."""
    words = [f"Node {node['name']} is {node['reason']} since {duration(at - node['since'])}: {node['message']}"]
    if node["back"]:
        words.append("it is back, and used again where no other is free")
    elif node["lost_steps"]:
        words.append(f"{node['lost_steps']} of its steps may still live")
    return "; ".join(words)


def _client(client: dict[str, Any], at: float) -> str:
    """Return what a trainer's client said last: it may be what a group waits for."""
    words = [client["phase"], {"granted": "holds", "asked": "asks for a hold"}.get(client["hold"], "")]
    words += ["waits for the fleet"] if client["waits"] else []
    said = ", ".join(word for word in words if word) or "nothing"
    return f"Client {client['id']}: {said}; heard {duration(at - client['heard'])} ago"


def _failure_row(group: str, failure: dict[str, Any], at: float) -> tuple[object, ...]:
    who = "@".join(str(part) for part in (failure["rank"], failure["node"] or None) if part is not None)
    ago = duration(at - failure["at"])
    return group, ago, failure["incarnation"], who, failure["reason"], failure["message"]


def _class(group: dict[str, Any]) -> str:
    """Return the class of the group's last failure; empty without one, or where an older version noted it."""
    return (group["failure"] or {}).get("class") or ""


def _group_row(group: dict[str, Any], at: float) -> tuple[object, ...]:
    budget = group["budget"]
    left = [budget["restarts"]]
    if budget["start_failures"]["left"] < budget["start_failures"]["of"]:
        left.append(budget["start_failures"])
    step = group["next"]
    when = "" if step["at"] is None else f" {duration(step['at'] - at)}"
    notes = [group["reason"]] if group["phase"] != "ready" and group["reason"] else []
    notes += ["slow"] if group["slow"] else []
    notes += ["stale"] if group["phase"] == "ready" and group["weights"] == "stale" else []
    return (
        group["id"],
        group["phase"],
        duration(at - group["since"]) if group["since"] else "-",
        group["incarnation"],
        group["restarts"],
        ",".join(f"{b['left']}/{b['of']}" for b in left),
        f"{step['action']}{when}" or "-",
        fold(group["nodes"]) + (f" ({','.join(notes)})" if notes else ""),
    )
