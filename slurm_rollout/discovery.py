"""Where the runs of jobs are: from the jobs' comments, else from their working directories.

Standard library only, and one `squeue` however many jobs there are. What squeue prints is other users' text.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

from slurm_rollout.errors import Unobservable

MARK = "slurm-rollout:"
"""`up` writes `slurm-rollout:/its/run/directory` into its job's comment; a second one in the job adds its own."""

TIMEOUT_S = 90.0
"""Slurm's clients retry by themselves for as long as a controller takes to be replaced."""

# Whoever writes a comment by hand may put the mark into something else, such as JSON.
_MARKED = re.compile(rf"""(?:^|[\s,;|"'\[{{]){MARK}(/[^\s,;|"'\]}}]*)""")

_KEPT = frozenset({"SLURM_CONF", "SLURM_CLUSTERS"})
_LETTERS = "AijuTLkZ"  # of squeue's --format, the same from 20.11 to 26.05


class QueuedJob(NamedTuple):
    """One job as squeue shows it. A tuple, because `status` must stay light."""

    id: str  # its own number, also of an array's task: what SLURM_JOB_ID says inside
    shown: str  # as Slurm writes it: `12_3` a task of an array, `12+0` a part of a heterogeneous job
    name: str
    user: str
    state: str
    time_left: str  # `1-02:03:04`, or a word
    comment: str
    work_dir: str

    @property
    def marked_dirs(self) -> tuple[str, ...]:
        """The run directories that the comment names."""
        return marked_dirs(self.comment)

    @property
    def default_dir(self) -> str:
        """Where `up` makes its run directory when it is not told otherwise; empty where Slurm does not say."""
        return os.path.join(self.work_dir, "rollout-runs", self.id) if self.work_dir.startswith("/") else ""


def jobs(*options: str, timeout_s: float = TIMEOUT_S) -> list[QueuedJob]:
    """Return the jobs that `squeue` shows with these options (`--user=NAME`, `--jobs=ID`, `--states=all`).

    Raises:
        Unobservable: squeue could not be run, failed, or did not answer.
    """
    # Names, comments and directories may hold anything, line ends included: nobody can have guessed what is between.
    token = os.urandom(8).hex()
    begin, between = f"<{token}>", f"|{token}|"
    pattern = begin + between.join(f"%{letter}" for letter in _LETTERS) + between
    # --all: also jobs in hidden partitions. Without a width squeue cuts nothing.
    text = command("squeue", "--noheader", "--all", *options, f"--format={pattern}", timeout_s=timeout_s)
    found = []
    for record in text.split(begin)[1:]:
        fields = record.split(between)
        if len(fields) != len(_LETTERS) + 1 or not fields[0].isdigit():
            raise Unobservable(f"squeue answered something else than it was asked for: {record[:200]!r}")
        found.append(QueuedJob(*("" if field == "(null)" else field for field in fields[:-1])))
    return found


def command(*argv: str, timeout_s: float) -> str:
    """Run one of Slurm's commands and return what it printed.

    Raises:
        Unobservable: it could not be run, failed, or did not answer in time.
    """
    # SQUEUE_USERS, SLURM_CLUSTERS' like and so on are options, too.
    env = {k: v for k, v in os.environ.items() if k in _KEPT or not k.startswith(("SLURM_", "SQUEUE_", "SCONTROL_"))}
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env | {"LC_ALL": "C"},
            start_new_session=True,
        )
    except OSError as e:
        raise Unobservable(f"{argv[0]} could not be run: {e.strerror}") from None
    with process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise Unobservable(f"{argv[0]} did not answer within {timeout_s:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # of a site's wrapper around the command, too
    if process.returncode != 0:
        said = " ".join((err or out).decode(errors="replace").split())[-300:]
        raise Unobservable(f"{argv[0]} failed with {process.returncode}: {said}")
    return os.fsdecode(out)


def marked_dirs(comment: str) -> tuple[str, ...]:
    """Return the run directories that a job's comment names, each once."""
    found = (os.fsdecode(unquote_to_bytes(os.fsencode(path))) for path in _MARKED.findall(comment))
    return tuple(dict.fromkeys(path for path in found if "\0" not in path))


def marked(comment: str, run_dir: str) -> str | None:
    """Return the comment with `run_dir` named in it; None where the comment is somebody else's, and stays as it is."""
    if run_dir in marked_dirs(comment):
        return comment
    words = comment.split()
    if not all(word.startswith(MARK) for word in words):
        return None
    return " ".join([*words, MARK + quote_from_bytes(os.fsencode(run_dir), safe="/:@+")])
