"""`events`: what happened in a run, over all its coordinators, in order."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slurm_rollout.cli import add_help, add_run_options
from slurm_rollout.cli.status import check_groups
from slurm_rollout.cli.table import clean
from slurm_rollout.core.view import event_line
from slurm_rollout.errors import CorruptFile, StoreError
from slurm_rollout.rundir import RunDir, event_files, find_run_dir

POLL_S = 1.0


def add_parser(subparsers: Any) -> None:
    """Add `events`."""
    parser = subparsers.add_parser(
        "events",
        description="Prints the events of a run, those of earlier coordinators first. With -f it goes on, also over "
        "a change of coordinator, until the run has ended or Ctrl-C. A line: time, group.incarnation, event, reason, "
        "rank@node, message, seconds that stages took. docs/troubleshooting.md explains each event.",
        epilog="Exit codes: 0; 1 not all of it could be read (only `status` is open to other users); 2 usage.",
        add_help=False,
    )
    add_help(parser)
    add_run_options(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="wait for more")
    parser.add_argument("--group", metavar="GROUP", help="only this group's")
    parser.add_argument("--json", action="store_true", help="the lines as they are in the files")
    parser.set_defaults(run=run_events)


def run_events(args: argparse.Namespace) -> int:
    """Print the events; return 1 when a line could not be understood, else 0."""
    run = find_run_dir(args.run_dir, args.job)
    tail = EventTail(run)
    if args.group is not None:
        check_groups(run, [args.group])
    code = 0
    last = ""
    try:
        while True:
            for line, event in tail.poll():
                if isinstance(event, CorruptFile):
                    print(f"slurm-rollout: {event}; left out", file=sys.stderr)
                    code = 1
                    continue
                last = str(event.get("type"))
                if args.group is None or event.get("group") == args.group:
                    print(line if args.json else format_event(event))
            sys.stdout.flush()
            if not args.follow or last == "ended":
                return code
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        return code


class EventTail:
    """Reads the event files of a run, each line once, a new coordinator's file after the old one's.

    Raises StoreError when this user may not list the run directory.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._offsets: dict[Path, int] = {}
        try:
            os.scandir(run.path).close()
        except OSError as e:
            raise StoreError(f"{run.path} cannot be read: {e.strerror}. Only `status` is open to other users") from None

    def skip(self) -> None:
        """Leave out what is there now."""
        for path in event_files(self._run):
            self._offsets[path] = path.stat().st_size

    def poll(self) -> Iterator[tuple[str, dict[str, Any] | CorruptFile]]:
        """Yield what is new: each complete line and its event, or what is wrong with it.

        A last line without its end is still being written and comes with a later call.
        """
        for path in event_files(self._run):
            try:
                with path.open("rb") as file:
                    file.seek(self._offsets.get(path, 0))
                    for raw in file:
                        if not raw.endswith(b"\n"):
                            break
                        start = self._offsets.get(path, 0)
                        self._offsets[path] = start + len(raw)
                        yield raw.decode(errors="replace").rstrip("\n"), _parse(raw, path, start)
            except OSError as e:
                raise StoreError(f"{path} cannot be read: {e.strerror}") from None


def _parse(raw: bytes, path: Path, start: int) -> dict[str, Any] | CorruptFile:
    try:
        event = json.loads(raw)
    except ValueError as e:
        return CorruptFile(f"{path}, at byte {start}, is not JSON: {e}")
    return event if isinstance(event, dict) else CorruptFile(f"{path}, at byte {start}, is no event")


def format_event(event: dict[str, Any]) -> str:
    """Return an event in one line, with its local time."""
    at = float(event.get("at") or 0.0)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(at)) + f".{int(at % 1 * 1000):03}"
    return clean(f"{stamp} {event_line(event)}")
