"""`describe`: one group and its history: why each incarnation ended, how long its recovery took, its black box."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slurm_rollout.cli import add_help, add_run_options
from slurm_rollout.cli.describe_text import head, render
from slurm_rollout.cli.status import judge, known_groups, read_status
from slurm_rollout.cli.table import clean
from slurm_rollout.core import blackbox
from slurm_rollout.core.codec import encode
from slurm_rollout.core.history import UNSEEN, Incarnation, Step, incarnations, step
from slurm_rollout.core.phases import Reason
from slurm_rollout.errors import CorruptFile, RolloutError, StoreError, UsageError
from slurm_rollout.rundir import RunDir, event_files, find_run_dir, read_json

SCHEMA = 1

TAIL_BYTES = 64 * 1024
"""So much of the end of a log is looked at."""

_HELP = """\
Shows one group: how it stands now, then each incarnation (start), the newest first: when it served, why it ended,
what that means, who asked for it, how long each stage of the recovery took, what the agents' exit records say, the
last log lines of the members that failed, and the black box: what a hung group's processes were doing before they
were ended.

Took: detect is the time from the start of the first probe that failed (an engine that exits is seen at once); stop
holds the snapshot of a hung group; fence: until its ports were closed; backoff: the wait before the next start; launch:
steps start and agents fence their nodes; start: the engines load; verify, part of start: from the moment the
last entrypoint listens until all have answered a real request."""

_EPILOG = """\
example: what happened to actor/1 last night, and which rank hung?
  slurm-rollout describe actor/1 -j 123456 --all
  slurm-rollout describe actor/1 -j 123456 --incarnation 4 --snapshot --lines 50

--json: {meta: {schema: 1, run_dir, coordinator, age_s}, errors, run, group, incarnations: [{incarnation, nodes,
launched_at, go_at, ready_at, launch_s, start_s, verify_s, end: {at, reason, kind, message, rank, node, by, detect_s,
stop_s, snapshot_s, fence_s, backoff_s, launch_s, start_s, verify_s, recovery_s, recovered_as, …} or null, steps,
last_lines, logs, snapshots, first_stuck: {rank, why} or null, notes}], older}. `…_at` are Unix seconds, `kind` is the
class of the failure. Unknown is null.

Exit codes: 0; 1 something could not be read (only `status` is open to other users); 2 usage, or no such group."""

_WANTED = frozenset({Reason.OPERATOR, Reason.RUN_ENDING, Reason.JOB_ENDING, UNSEEN})
"""Reasons of ends in which no member failed."""


def add_parser(subparsers: Any) -> None:
    """Add `describe`."""
    parser = subparsers.add_parser(
        "describe",
        description=_HELP,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    add_help(parser)
    add_run_options(parser)
    parser.add_argument("group", metavar="GROUP", help="such as actor/0")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-n", "--last", type=int, default=5, metavar="N", help="the last N incarnations (default 5)")
    which.add_argument("--all", action="store_true", help="all of them")
    which.add_argument("--incarnation", type=int, metavar="N", help="the N-th start alone")
    parser.add_argument(
        "--lines", type=int, default=5, metavar="N", help="log lines of each member that failed (default 5; 0: none)"
    )
    parser.add_argument("--snapshot", action="store_true", help="print all of the snapshots: processes, stacks, …")
    parser.add_argument("--json", action="store_true", help="everything, snapshots included, as one JSON object")
    parser.set_defaults(run=run_describe)


def run_describe(args: argparse.Namespace) -> int:
    """Print the description; return 1 when something of it could not be read, else 0."""
    for option, value in (("-n", args.last), ("--lines", args.lines)):
        if value < 0:
            raise UsageError(f"{option} {value}: must not be negative")
    run = find_run_dir(args.run_dir, args.job)
    try:
        os.scandir(run.path).close()
    except OSError as e:
        raise StoreError(f"{run.path} cannot be read: {e.strerror}. Only `status` is open to other users") from None
    _check_group(run, args.group)
    errors: list[str] = []
    history = incarnations(_events(run, args.group, errors), args.group)
    known = [i.incarnation for i in history]
    if args.incarnation is not None:
        if args.incarnation not in known:
            told = ", ".join(map(str, known)) or "none"
            raise UsageError(f"no incarnation {args.incarnation} of {args.group}; its incarnations: {told}")
        shown = [i for i in history if i.incarnation == args.incarnation]
    else:
        shown = list(history) if args.all else list(history[max(0, len(history) - args.last) :])
    document, warning = _head(run, args.group, errors)
    found = [_incarnation(run, args.group, i, args.lines, errors) for i in reversed(shown)]
    older = [n for n in known if not shown or n < shown[0].incarnation]
    document |= {"errors": [*warning, *errors], "incarnations": found, "older": len(older)}
    if args.json:
        print(json.dumps(document, indent=2))
        return 1 if errors else 0
    print("\n".join(render(document, snapshots=args.snapshot)))
    for error in document["errors"]:
        print(f"slurm-rollout: {clean(error)}", file=sys.stderr)
    return 1 if errors else 0


def _check_group(run: RunDir, group: str) -> None:
    member = re.fullmatch(r"([^/]+/\d+)\.\d+", group)
    if member is not None:
        raise UsageError(
            f"{group} is one member; a group is described as a whole: {member[1]}. "
            f"That member's log: slurm-rollout logs {group}"
        )
    known = known_groups(run)
    if not known:
        raise StoreError(f"{run.path} names no groups: neither status.json nor plan.json is there to be read")
    if group not in known:
        from difflib import get_close_matches

        near = get_close_matches(group, known, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"no group {group} in this run; its groups: {', '.join(known)}.{meant}")


def _events(run: RunDir, group: str, errors: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the events of the group and of the whole run, oldest first; a last line without its end is left out.

    Long runs have many: what is another group's, or a new epoch, is not even parsed.
    """
    own, others, epoch = f'"group": {json.dumps(group)}'.encode(), b'"group": "', b'"type": "epoch"'
    for path in event_files(run):
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n") or (others in line and own not in line) or epoch in line:
                        continue
                    try:
                        event = json.loads(line)
                    except (ValueError, RecursionError) as e:
                        errors.append(f"{path}, line {number}, is not JSON: {e}; left out")
                        continue
                    if isinstance(event, dict):
                        yield event
                    else:
                        errors.append(f"{path}, line {number}, is no event; left out")
        except OSError as e:
            errors.append(f"{path} cannot be read: {e.strerror}")


# ---------------------------------------------------------------------------------------------------------------- head


def _head(run: RunDir, group: str, errors: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return how the group stands now, as far as that can be read, and what to warn of."""
    meta: dict[str, Any] = {"schema": SCHEMA, "run_dir": str(run.path), "coordinator": "unknown", "age_s": None}
    known = {"id": group, **_plan(run, group, errors), **_offered(run, group, errors)}
    document: dict[str, Any] = {"meta": meta, "run": {}, "group": known}
    warning = ""
    try:
        status = read_status(run)
        age_s = time.time() - status["at"]
        verdict, doubt = judge(status, age_s)
        told = ("run", "job", "restart_count", "term", "epoch", "host", "at", "phase", "reason", "ending", "ended")
        whole = {
            "meta": {**meta, "coordinator": verdict, "age_s": round(age_s, 3)},
            "run": {key: status[key] for key in told},
            "group": {**next((g for g in status["groups"] if g["id"] == group), {}), **known},
        }
        head(whole)  # whatever is missing is missed here
        document, warning = whole, doubt
    except RolloutError as e:
        errors.append(str(e))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        errors.append(f"{run.status} is not a status file of this version: {type(e).__name__} {e}")
    return document, [warning] if warning else []


def _plan(run: RunDir, group: str, errors: list[str]) -> dict[str, Any]:
    """Return what was decided before the start: the members, and of how many incarnations the logs are kept."""
    try:
        plan = read_json(run.plan)
        planned = [g for pool in plan["pools"] for g in pool["groups"] if g["id"] == group]
        told = ("rank", "node", "gpus", "ports", "url", "entrypoint")
        members = [{key: m[key] for key in told} for g in planned for m in g["members"]]
        return {"members": members, "log_keep_incarnations": int(plan["log_keep_incarnations"])}
    except FileNotFoundError:
        return {"members": [], "log_keep_incarnations": None}
    except (StoreError, KeyError, TypeError, ValueError) as e:
        errors.append(f"{run.plan} cannot be understood: {type(e).__name__} {e}")
        return {"members": [], "log_keep_incarnations": None}


def _offered(run: RunDir, group: str, errors: list[str]) -> dict[str, Any]:
    """Return what the barrier says of the group, for its owner's eyes."""
    try:
        entry: dict[str, Any] = next((g for g in read_json(run.barrier)["groups"] if g["id"] == group), {})
        return {key: entry[key] for key in ("serving", "urls", "endpoints", "master") if key in entry}
    except FileNotFoundError:
        return {}
    except (StoreError, KeyError, TypeError, AttributeError) as e:
        errors.append(f"{run.barrier} cannot be understood: {type(e).__name__} {e}")
        return {}


# --------------------------------------------------------------------------------------------------------- incarnations


def _incarnation(run: RunDir, group: str, i: Incarnation, lines: int, errors: list[str]) -> dict[str, Any]:
    logs, reports = run.logs / group / str(i.incarnation), run.steps / group / str(i.incarnation)
    names = _names(logs)
    steps = [_step(reports, node) for node in i.nodes or _nodes(reports)]
    snapshots = {}
    for rank in _ranks(names, ".snapshot.json"):
        try:
            snapshots[rank] = _snapshot(run.member_snapshot(group, i.incarnation, rank))
        except (OSError, StoreError) as e:
            errors.append(str(e))
    first = blackbox.stuck(snapshots)
    failed = _failed(i, steps, None if first is None else first.rank, _ranks(names, ".log"))
    last_lines = [
        {"rank": rank, "path": str(path), "lines": found}
        for rank in failed
        if (found := _last_lines(path := run.member_log(group, i.incarnation, rank), rank, steps, lines))
    ]
    return {
        **encode(i),
        "steps": [encode(s) for s in steps],
        "last_lines": last_lines,
        "logs": {"path": str(logs), "kept": bool(names)},
        "snapshots": snapshots,
        "first_stuck": encode(first),
    }


def _step(reports: Path, node: str) -> Step:
    found = []
    for line in _read(reports / f"{node}.jsonl").splitlines():
        try:
            report = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a site's prolog may print here, too; the last line may be half written
        if isinstance(report, dict):
            found.append(report)
    return step(node, found, _read(reports / f"{node}.err"))


def _snapshot(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise CorruptFile(f"{path} is no snapshot")
    return content


def _failed(i: Incarnation, steps: list[Step], stuck: int | None, logs: list[int]) -> list[int]:
    """Return the ranks whose last words are of interest: those that are named, else all of the node, else all."""
    if i.end is None or i.end.reason in _WANTED:
        return []
    named = {i.end.rank, stuck, *(s.rank for s in steps if s.cause == "engine_exited")} - {None}
    there = [rank for s in steps if s.node == i.end.node for rank in s.ranks]
    return sorted(rank for rank in named if rank is not None) or there or logs


def _last_lines(path: Path, rank: int, steps: list[Step], lines: int) -> list[str]:
    """Return the member's last lines from its agent's exit record, or, where that has too few, from its log."""
    if not lines:
        return []
    told = next((list(s.last_lines) for s in steps if s.rank == rank), [])[-lines:]
    found = _read(path, TAIL_BYTES).splitlines()[-lines:]
    return found if len(found) > len(told) else told


# --------------------------------------------------------------------------------------------------------------- files


def _read(path: Path, last_bytes: int | None = None) -> str:
    """Return the text of a file, or its end; empty when it is not there or cannot be read."""
    try:
        with path.open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _ranks(names: list[str], suffix: str) -> list[int]:
    stems = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def _nodes(reports: Path) -> list[str]:
    return sorted(
        name.removesuffix(".jsonl")
        for name in _names(reports)
        if name.endswith(".jsonl") and not name.endswith(".sweep.jsonl")
    )
