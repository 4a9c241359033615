"""`logs`: what the engines of a group wrote, also while they write it and over restarts."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from slurm_rollout.cli import add_help, add_run_options
from slurm_rollout.cli.status import check_groups
from slurm_rollout.errors import RolloutError, StoreError, UsageError
from slurm_rollout.rundir import RunDir, find_run_dir

POLL_S = 1.0

_BLOCK = 64 * 1024


def add_parser(subparsers: Any) -> None:
    """Add `logs`."""
    parser = subparsers.add_parser(
        "logs",
        description="Prints the end of the engine logs of a group's newest incarnation, or of one member's. Lines of "
        "several members are marked `rank| `. With -f it goes on, over restarts too, until Ctrl-C. Logs of the last "
        "incarnations of a group are kept, 5 unless the spec says otherwise.",
        epilog="Exit codes: 0; 1 no logs yet, or they cannot be read (only `status` is open to other users); 2 usage, "
        "no such group, member or incarnation.",
        add_help=False,
    )
    add_help(parser)
    add_run_options(parser)
    parser.add_argument("target", metavar="GROUP[.RANK]", help="such as actor/0 or actor/0.1")
    parser.add_argument("-f", "--follow", action="store_true", help="wait for more")
    parser.add_argument(
        "-n", "--lines", type=int, default=100, metavar="LINES", help="the last so many of each member (default 100)"
    )
    parser.add_argument("--incarnation", type=int, metavar="N", help="the N-th start (default: the newest)")
    parser.set_defaults(run=run_logs)


def run_logs(args: argparse.Namespace) -> int:
    """Print the logs and return 0."""
    parsed = re.fullmatch(r"([^/]+/\d+)(?:\.(\d+))?", args.target)
    if parsed is None:
        raise UsageError(f"{args.target!r} is neither a group (actor/0) nor a member (actor/0.1)")
    if args.lines < 0:
        raise UsageError(f"-n {args.lines}: must not be negative")
    group, rank = parsed[1], None if parsed[2] is None else int(parsed[2])
    run = find_run_dir(args.run_dir, args.job)
    incarnations = _incarnations(run, group)
    if not incarnations:
        check_groups(run, [group])
    if args.incarnation is not None and args.incarnation not in incarnations:
        kept = ", ".join(map(str, incarnations)) or "none"
        raise UsageError(f"no logs of {group} incarnation {args.incarnation}; kept incarnations: {kept}")
    if not incarnations and not args.follow:
        raise RolloutError(f"{group} has no logs yet: nothing of it was started, or its nodes are still being fenced")
    try:
        if args.follow:
            _follow(run, group, rank, args.lines, args.incarnation)
        else:
            _print_last(run, group, rank, args.lines, args.incarnation or incarnations[-1])
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        raise
    except OSError as e:
        raise StoreError(f"{e.filename or run.logs} cannot be read: {e.strerror}") from None
    return 0


def _print_last(run: RunDir, group: str, rank: int | None, lines: int, incarnation: int) -> None:
    ranks = _ranks(run, group, incarnation)
    if not ranks:
        raise RolloutError(f"{group} incarnation {incarnation} has no logs yet: its engines were not started")
    if rank is not None and rank not in ranks:
        known = ", ".join(map(str, ranks))
        raise UsageError(f"{group} incarnation {incarnation} has no log of rank {rank}; its ranks: {known}")
    _announce(run, group, incarnation)
    for shown in ranks if rank is None else [rank]:
        with Tail(run.member_log(group, incarnation, shown), lines) as tail:
            _write(tail.read(all_of_it=True), shown, marked=rank is None and len(ranks) > 1)


def _follow(run: RunDir, group: str, rank: int | None, lines: int, only: int | None) -> None:
    tails: dict[int, Tail] = {}
    shown = 0  # incarnation
    try:
        while True:
            newest = only or max(_incarnations(run, group), default=0)
            over = newest != shown
            if over:
                for r, tail in tails.items():
                    _write(tail.read(all_of_it=True), r, marked=len(tails) > 1)
                    tail.close()
                # Of an incarnation that starts while somebody follows, no line is left out.
                first, tails = not shown, {}
                shown = newest
                _announce(run, group, shown)
            for r in _ranks(run, group, shown):
                if r not in tails and rank in (None, r):
                    tails[r] = Tail(run.member_log(group, shown, r), lines if over and first else None)
            for r, tail in tails.items():
                _write(tail.read(), r, marked=len(tails) > 1)
            time.sleep(POLL_S)
    finally:
        for tail in tails.values():
            tail.close()


class Tail:
    """One member's log from its last `lines` on (None: from its start), also while its agent rotates it.

    The agent copies a log that grew too large to `RANK.log.1` and cuts it in place, as the engine keeps it open.
    """

    def __init__(self, path: Path, lines: int | None) -> None:
        self._path = path
        self._older = path.with_name(f"{path.name}.1")
        self._file = path.open("rb")
        self._first: list[bytes] = []
        self._rest = b""
        if lines is not None:
            missing = _seek_last_lines(self._file, lines)
            if missing and self._older.exists():
                with self._older.open("rb") as older:
                    _seek_last_lines(older, missing)
                    self._first = older.readlines()

    def __enter__(self) -> Tail:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, *, all_of_it: bool = False) -> Iterator[bytes]:
        """Yield the new lines; a last one without its end only with `all_of_it`."""
        yield from self._lines(self._first)
        self._first = []
        read = self._file.tell()
        if os.fstat(self._file.fileno()).st_size < read:
            with suppress(FileNotFoundError), self._older.open("rb") as older:
                older.seek(read)
                yield from self._lines(older)
            self._file.seek(0)
        yield from self._lines(self._file)
        if all_of_it and self._rest:
            yield self._rest + b"\n"
            self._rest = b""

    def _lines(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        for part in parts:
            line = self._rest + part
            if line.endswith(b"\n"):
                self._rest = b""
                yield line
            else:
                self._rest = line


def _seek_last_lines(file: BufferedReader, lines: int) -> int:
    """Go back from the end of `file` to where its last `lines` begin; return how many of them it does not have.

    A last line without its end counts as one.
    """
    position = end = file.seek(0, os.SEEK_END)
    if not lines:
        return 0
    missing = lines
    while position > 0:
        start = max(0, position - _BLOCK)
        file.seek(start)
        block = file.read(position - start)
        # Each line end is the start of a line, but for the one at the end of the file.
        at = len(block) - 1 if position == end and block.endswith(b"\n") else len(block)
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            missing -= 1
            if not missing:
                file.seek(start + at + 1)
                return 0
        position = start
    file.seek(0)
    return missing - 1 if end else missing


def _incarnations(run: RunDir, group: str) -> list[int]:
    return _numbers(run.logs / group, "")


def _ranks(run: RunDir, group: str, incarnation: int) -> list[int]:
    return _numbers(run.logs / group / str(incarnation), ".log")


def _numbers(directory: Path, suffix: str) -> list[int]:
    """Return the N of every `N<suffix>` in a directory, ascending."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise StoreError(f"{directory} cannot be read: {e.strerror}. Only `status` is open to other users") from None
    stems = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def _announce(run: RunDir, group: str, incarnation: int) -> None:
    if incarnation:
        where = run.logs / group / str(incarnation)
        print(f"slurm-rollout: {group} incarnation {incarnation}: {where}", file=sys.stderr)


def _write(lines: Iterator[bytes], rank: int, *, marked: bool) -> None:
    # Bytes as they are: a log may hold anything, and what is not text must not end this command.
    mark = f"{rank}| ".encode() if marked else b""
    sys.stdout.flush()
    for line in lines:
        sys.stdout.buffer.write(mark + line)
    sys.stdout.buffer.flush()
