"""`restart`, `drain`, `resume`, `stop`: ask the coordinator, by a file in `requests/`; it answers by an event."""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from slurm_rollout.cli import add_help, add_run_options
from slurm_rollout.cli.events import EventTail
from slurm_rollout.cli.status import ENDED, check_groups, judge, read_status
from slurm_rollout.cli.table import clean, duration
from slurm_rollout.errors import Rejected, StoreError, Unobservable, UsageError
from slurm_rollout.rundir import RunDir, find_run_dir

POLL_S = 0.1

_REST_S = 1.0
"""How long the other answers to one request may come after the first."""

_VERBS = {
    "restart": "Ends every process of the groups, proves that they are gone, and starts them again. A failed or "
    "stopped group starts again with a fresh budget.",
    "drain": "Ends every process of the groups and keeps them stopped until `resume` or `restart`. A node that is "
    "drained is not used any more: its groups restart on other nodes, or wait for one.",
    "resume": "Starts drained or failed groups again, with a fresh budget; one in backoff starts without waiting. A "
    "node that was drained, lost, or excluded because it failed is used again.",
    "stop": "Ends every group and then the run; a trainer then gets TERM, and KILL 10 s later.",
}

_TAKE_NODES = frozenset({"drain", "resume"})


def add_parser(subparsers: Any) -> None:
    """Add the four commands."""
    for verb, description in _VERBS.items():
        parser = subparsers.add_parser(
            verb,
            description=f"{description} A request that is not answered stays, and is obeyed when a coordinator is "
            "back.",
            epilog="Exit codes: 0 the coordinator took it; its answer says what comes of it, perhaps nothing. 1 it "
            "refused or did not answer; 2 usage.",
            add_help=False,
        )
        add_help(parser)
        add_run_options(parser)
        if verb != "stop":
            takes_nodes = verb in _TAKE_NODES
            parser.add_argument(
                "groups",
                nargs="+",
                metavar="GROUP|NODE" if takes_nodes else "GROUP",
                help="such as actor/0" + (", or the names of nodes" if takes_nodes else ""),
            )
        parser.add_argument(
            "--timeout", type=float, default=10.0, metavar="SECONDS", help="wait so long for the answer (default 10)"
        )
        parser.add_argument("--no-wait", action="store_true", help="do not wait for the answer")
        parser.set_defaults(run=run_request, verb=verb, groups=[])


def run_request(args: argparse.Namespace) -> int:
    """Write the request, print the coordinator's answers; 0 when it agreed."""
    if not args.timeout >= 0:
        raise UsageError(f"--timeout {args.timeout:g}: must not be negative")
    run = find_run_dir(args.run_dir, args.job)
    groups = list(dict.fromkeys(args.groups))
    tail = EventTail(run)
    check_groups(run, groups, nodes=args.verb in _TAKE_NODES)
    _check_not_ended(run)
    tail.skip()
    request = write_request(run, args.verb, groups)
    if args.no_wait:
        print(f"asked: {request}")
        return 0
    answers = _answers(tail, request.stem, expected=max(1, len(groups)), timeout_s=args.timeout)
    if not answers:
        heard = _last_heard(run)
        if not request.exists():
            raise Unobservable(f"no answer within {args.timeout:g} s, but the request was taken; {heard}: see `events`")
        raise Unobservable(
            f"no answer within {args.timeout:g} s; {heard}. The request stays and will be taken when the coordinator "
            f"is back; to withdraw it: rm {request}"
        )
    for answer in answers:
        message = clean(str(answer.get("message") or "agreed"))
        if answer["type"] == "request_refused":
            raise Rejected(f"the coordinator refused: {message}")
        print(message)
    return 0


def write_request(run: RunDir, verb: str, groups: list[str]) -> Path:
    """Write a request file, whole or not at all, and return its path; its stem is the request's id.

    Raises:
        StoreError: it cannot be written.
    """
    # Names sort by time, so that requests are taken in the order in which they were made.
    name = f"{time.time_ns() // 1_000_000}-{os.urandom(4).hex()}"
    content = {"id": name, "verb": verb, "groups": groups, "who": _who()}
    staged = run.requests / f".{name}.tmp"
    path = run.requests / f"{name}.json"
    try:
        with open(staged, "x", encoding="utf-8", opener=lambda p, flags: os.open(p, flags, 0o600)) as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        staged.rename(path)
    except FileNotFoundError:
        raise StoreError(
            f"{run.requests} is not there: no coordinator has run in this directory yet. Nothing was asked"
        ) from None
    except OSError as e:
        staged.unlink(missing_ok=True)
        raise StoreError(f"{path} cannot be written: {e.strerror}. Nothing was asked") from None
    return path


def _answers(tail: EventTail, request: str, *, expected: int, timeout_s: float) -> list[dict[str, Any]]:
    """Return the answers to a request: one refusal, or one event for each group; empty when none came."""
    answers: list[dict[str, Any]] = []
    deadline = time.monotonic() + timeout_s
    while True:
        for _, event in tail.poll():
            if not isinstance(event, dict) or event.get("type") not in ("request", "request_refused"):
                continue
            data = event.get("data")
            if isinstance(data, dict) and data.get("id") == request:
                if not answers:
                    deadline = time.monotonic() + _REST_S
                answers.append(event)
        refused = any(answer["type"] == "request_refused" for answer in answers)
        if refused or len(answers) >= expected or time.monotonic() >= deadline:
            return answers
        time.sleep(POLL_S)


def _check_not_ended(run: RunDir) -> None:
    """A request that outlives its run would hit the next run in the same directory."""
    try:
        document = read_status(run)
        ended = judge(document, time.time() - document["at"])[0] is ENDED
    except (StoreError, KeyError, TypeError):
        return  # not known: the coordinator decides, if there is one
    if ended:
        raise Rejected(f"the run has ended ({document['phase']}): there is nobody to ask. Nothing was asked")


def _last_heard(run: RunDir) -> str:
    try:
        return f"the coordinator was last heard {duration(time.time() - read_status(run)['at'])} ago"
    except (StoreError, KeyError, TypeError):
        return "no word of a coordinator is there"


def _who() -> str:
    import pwd

    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"
