"""`status` of many runs: one squeue, then the world-readable `status.json` of each; one line a run.

Everything here was written by other users. Their file systems may hang, too: whoever looks at all runs at night looks
because something is wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import queue
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from slurm_rollout import discovery
from slurm_rollout.cli.status import ENDED, LOST, NOT_READY, ODD, READY, SCHEMA, UNKNOWN, exit_code, judge, read_status
from slurm_rollout.cli.table import clean, columns, cut, duration, terminal_width
from slurm_rollout.discovery import QueuedJob
from slurm_rollout.errors import RolloutError, Unobservable, UsageError
from slurm_rollout.rundir import RunDir, default_run_dir

COULD_NOT = 1

THREADS = 16

SILENCE_S = 5.0
"""When no file system said anything for so long, those that are still asked are taken to hang."""

CELL_CHARS = 200

_TITLES = ("JOB", "NAME", "USER", "RUN", "PHASE", "GROUPS", "EPOCH", "RESTARTS", "AGE", "LEFT", "MESSAGE")
_RIGHT = (5, 6, 7, 8, 9)


class Place(NamedTuple):
    """Where runs may be: a directory that a job's comment names, or the working directory of some jobs."""

    path: str
    jobs: tuple[QueuedJob, ...]
    marked: bool


class Run(NamedTuple):
    """A run of a job, as far as it can be seen."""

    job: QueuedJob
    path: str
    by: str  # "comment", "work_dir"
    document: dict[str, Any]  # empty where it could not be read
    error: str


class RunsOf:
    """All runs of some users in the queue."""

    def __init__(self, *, user: str | None, everybody: bool, asked: bool) -> None:
        """`user`: comma-separated names; None: this process's. `asked`: people said that they want a list."""
        self._user, self._everybody, self._asked = user, everybody, asked
        self._busy: set[str] = set()  # paths that were asked for, without an answer; over all looks
        self._users = "" if everybody else ",".join(_names(user))

    def look(self, *, as_json: bool, header: bool, one_line: bool) -> int:
        """Print a line for each run; return the exit code."""
        errors: list[str] = []
        meta: dict[str, object] = {"schema": SCHEMA, "users": self._users or None}
        shown: dict[str, object] = {"meta": meta, "errors": errors}
        rows: list[tuple[int, dict[str, object], tuple[object, ...]]] = []
        closed = 0
        try:
            jobs = discovery.jobs(*([f"--user={self._users}"] if self._users else []))
        except Unobservable as e:
            if self._asked:
                errors.append(f"{e}. Nothing is known of any run")
            elif "could not be run" in str(e):
                raise UsageError(f"{self._nowhere()}, and {e}: no other run can be found") from None
            else:
                errors.append(f"{self._nowhere()}, and of other runs nothing is known: {e}")
            code = COULD_NOT
        else:
            runs, closed = self._runs(jobs)
            meta["unseen_jobs"] = closed
            rows = [_row(run) for run in runs]
            code = max((row_code for row_code, _, _ in rows), default=READY)
            shown["runs"] = [entry for _, entry, _ in rows]
        if as_json:
            print(json.dumps(shown, indent=None if one_line else 2))
            return code
        if rows:
            cells = [row_cells for _, _, row_cells in rows]
            width = terminal_width(sys.stdout)
            print("\n".join(columns(cells, titles=_TITLES if header else (), right=_RIGHT, width=width)))
        elif not errors:
            whose = "" if self._everybody else f"of {self._user} " if self._user else "of yours "
            errors.append(f"no job {whose}in the queue has a run that can be found")
        if closed:
            errors.append(
                f"{closed} more jobs say nothing of a run in their comments, and into their working directories you "
                "cannot look: they may have runs"
            )
        for error in errors:
            print(f"slurm-rollout: {clean(error)}", file=sys.stderr)
        return code

    def _nowhere(self) -> str:
        return f"no run directory at {default_run_dir()} (name it with --run-dir or ROLLOUT_RUN_DIR)"

    def _runs(self, jobs: list[QueuedJob]) -> tuple[list[Run], int]:
        """Return the runs of the jobs, and how many jobs there are of which nobody can tell."""
        runs: list[Run] = []
        closed = 0
        for place, answer in self._ask(_places(jobs)):
            if answer is not None:
                runs += answer[0]
                closed += answer[1]
            elif place.marked:
                silent = f"{place.path} does not answer: its file system hangs"
                runs += [Run(job, place.path, "comment", {}, silent) for job in place.jobs]
            else:
                closed += len(place.jobs)
        return sorted(runs, key=lambda run: (run.job.user, int(run.job.id), run.path)), closed

    def _ask(self, places: Iterable[Place]) -> list[tuple[Place, tuple[list[Run], int] | None]]:
        """Return what is at each place; None where it hangs. Threads that hang end with this process."""
        waiting: queue.SimpleQueue[Place] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[Place, tuple[list[Run], int]]] = queue.SimpleQueue()
        silent = dict.fromkeys(places)
        asked = [place for place in silent if place.path not in self._busy]
        for place in asked:
            waiting.put(place)

        def work() -> None:
            while True:
                try:
                    place = waiting.get_nowait()
                except queue.Empty:
                    return
                self._busy.add(place.path)
                answer = look_at(place)
                self._busy.discard(place.path)
                done.put((place, answer))

        for _ in range(min(THREADS, len(asked))):
            threading.Thread(target=work, daemon=True).start()
        answers: list[tuple[Place, tuple[list[Run], int] | None]] = []
        try:
            for _ in asked:
                place, answer = done.get(timeout=SILENCE_S)
                answers.append((place, answer))
                del silent[place]
        except queue.Empty:
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.get_nowait()
        return [*answers, *silent.items()]


def _names(user: str | None) -> list[str]:
    """Return the names of a comma-separated list of names and numbers; None: this process's.

    Raises:
        UsageError: one of them is nobody's. squeue would show the others, and end with 0 (22.05 to 26.05).
    """
    names = []
    for word in [str(os.getuid())] if user is None else user.split(","):
        name = word.strip()
        try:
            names.append((pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)).pw_name)
        except (KeyError, OverflowError):
            raise UsageError(
                f"no user {name!r} is known here, so Slurm cannot be asked for one; -a shows all"
            ) from None
    return names


def _places(jobs: list[QueuedJob]) -> list[Place]:
    """Return where to look: once at each working directory, however many jobs have it."""
    marked: dict[str, list[QueuedJob]] = {}
    unmarked: dict[str, list[QueuedJob]] = {}
    for job in jobs:
        for path in job.marked_dirs:
            marked.setdefault(path, []).append(job)
        # A job that waits for its first start has no run yet; there may be thousands.
        if not job.marked_dirs and job.default_dir and job.state != "PENDING":
            unmarked.setdefault(job.work_dir, []).append(job)
    return [
        *(Place(path, tuple(found), marked=True) for path, found in marked.items()),
        *(Place(path, tuple(found), marked=False) for path, found in unmarked.items()),
    ]


def look_at(place: Place) -> tuple[list[Run], int]:
    """Return the runs at a place, and how many of its jobs nobody can tell anything of."""
    if place.marked:
        return [_read(job, place.path, "comment") for job in place.jobs], 0
    runs = []
    try:
        os.stat(os.path.join(place.path, "rollout-runs"))
        for job in place.jobs:
            try:
                os.stat(job.default_dir)
            except FileNotFoundError:
                continue
            runs.append(_read(job, job.default_dir, "work_dir"))
    except (FileNotFoundError, NotADirectoryError):
        return [], 0
    except OSError:
        return runs, len(place.jobs) - len(runs)
    return runs, 0


def _read(job: QueuedJob, path: str, by: str) -> Run:
    try:
        document = read_status(RunDir(Path(path)))
    except RolloutError as e:
        return Run(job, path, by, {}, str(e))
    if str(document.get("job")) != job.id:
        return Run(job, path, by, {}, f"{path} has the word of a run of another job: {document.get('job')!r}")
    return Run(job, path, by, document, "")


def _row(run: Run) -> tuple[int, dict[str, object], tuple[object, ...]]:
    """Return the exit code that the run alone would give, its entry in the JSON, and its cells."""
    job, document = run.job, run.document
    left_s = _seconds(job.time_left)
    age_s, verdict, error = 0.0, "", run.error
    what: tuple[object, ...] = ("-", "unknown", "-", "-", "-", "-")
    message, code = error, UNKNOWN
    if document:
        try:
            age_s = time.time() - document["at"]
            verdict, error = judge(document, age_s)
            what, message = _summary(document, age_s, verdict, error)
            code = exit_code(document, verdict)
        except ODD as e:
            document, verdict = {}, ""
            error = message = f"{run.path}/status.json is not one of this version: {type(e).__name__} {e}"
    if job.state == "PENDING":
        # Whoever is requeued has only the last words of an ended script.
        what, code, message = (what[0], "-", *what[2:]), NOT_READY, "the job waits to start"
    elif job.state != "RUNNING":
        message = "; ".join(filter(None, [f"the job is {job.state}", message]))
    entry: dict[str, object] = {
        "job": job.shown,
        "job_id": job.id,
        "name": job.name,
        "user": job.user,
        "job_state": job.state,
        "time_left_s": left_s,
        "run_dir": run.path,
        "found_by": run.by,
        "age_s": round(age_s, 3) if document else None,
        "coordinator": verdict or None,
        "error": error,
        "status": document or None,
    }
    left = "-" if job.state == "PENDING" else job.time_left if left_s is None else duration(left_s)
    cells = (job.shown, job.name, job.user, *what, left, message)
    return code, entry, tuple(cut(str(cell), CELL_CHARS) for cell in cells)


def _summary(
    document: dict[str, Any], age_s: float, verdict: str, error: str
) -> tuple[tuple[str, str, str, int, int, str], str]:
    """Return a run's name, phase, groups, epoch, restarts and age, and what else is to be said of it in one line."""
    phase = str(document["phase"])
    said = [str(document["message"])]
    if document["ending"]:
        said.append(f"ending: {document['ending']}")
    if document["blind_since"] is not None:
        said.append(f"blind for {duration(document['at'] - document['blind_since'])}")
    if verdict is LOST:
        said = [f"no heartbeat for {duration(age_s)}; was {phase}" if age_s > 0 else error]
        phase = "unknown"
    elif verdict is ENDED:
        said = ["the run has ended"]
    ready, desired = (sum(pool[key] for pool in document["pools"]) for key in ("ready", "desired"))
    restarts = sum(group["restarts"] for group in document["groups"])
    what = (str(document["run"]), phase, f"{ready}/{desired}", int(document["epoch"]), restarts, duration(age_s))
    return what, "; ".join(filter(None, said))


def _seconds(left: str) -> float | None:
    """Return squeue's `1-02:03:04` or `2:03` in seconds; None for a word, such as UNLIMITED."""
    days, _, clock = left.rpartition("-")
    try:
        total = 0
        for part in clock.split(":"):
            total = total * 60 + int(part)
        return float(total + 86400 * int(days or 0))
    except ValueError:
        return None
