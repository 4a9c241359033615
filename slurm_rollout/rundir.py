"""The run directory: where each file is, and how to read it. Standard library only: `status` must stay light.

Writing is `store.py`'s business. Everything here is for the owner only, but for `status.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slurm_rollout.errors import CorruptFile, StoreError, Unobservable, UsageError

MAX_JSON_BYTES = 64 << 20
"""No file of a run is larger; another user's is not read to its end."""


class RunDir:
    """Paths inside one run directory."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self.barrier = self.path / "barrier.json"
        self.state = self.path / "state.json"
        self.plan = self.path / "plan.json"
        self.status = self.path / "status.json"
        self.lease = self.path / "lease"
        self.exits = self.path / "exits.jsonl"
        self.requests = self.path / "requests"
        self.clients = self.path / "clients"
        self.logs = self.path / "logs"
        self.steps = self.path / "steps"
        self.agent = self.path / "agent.py"
        self.compiled_agent = self.path / "agent.pyc"

    def started_agent(self, python: str, installed: str = "") -> Path:
        """What a step runs: the agent that is installed on the nodes, where one is named; else the run's own, and that
        compiled where the nodes' interpreter (`python`; empty: ours) is the one it is compiled for.
        """
        return Path(installed) if installed else self.agent if python else self.compiled_agent

    def events(self, term: int) -> Path:
        return self.path / f"events.{term}.jsonl"

    def staging(self, term: int) -> Path:
        """Where writers of this term prepare files; a takeover deletes those of older terms."""
        return self.path / f".t{term}"

    def member_log(self, group: str, incarnation: int, rank: int) -> Path:
        return self.logs / group / str(incarnation) / f"{rank}.log"

    def member_snapshot(self, group: str, incarnation: int, rank: int) -> Path:
        """What the member's processes were doing when the group hung, written by its agent."""
        return self.logs / group / str(incarnation) / f"{rank}.snapshot.json"

    def step_reports(self, group: str, incarnation: int, node: str, *, sweep: bool = False) -> Path:
        """What the agent of that step says, written by srun on the batch host."""
        return self.steps / group / str(incarnation) / f"{node}{'.sweep' if sweep else ''}.jsonl"

    def step_stderr(self, group: str, incarnation: int, node: str, *, sweep: bool = False) -> Path:
        return self.steps / group / str(incarnation) / f"{node}{'.sweep' if sweep else ''}.err"


def default_run_dir(environ: dict[str, str] | os._Environ[str] = os.environ) -> Path:
    """Return `rollout-runs/<job>` under the submit directory (outside a job: `rollout-runs/local` here)."""
    base = Path(environ.get("SLURM_SUBMIT_DIR") or ".")
    return base / "rollout-runs" / (environ.get("SLURM_JOB_ID") or "local")


def find_run_dir(run_dir: str | None, job: str | None) -> RunDir:
    """Return the run directory that a reader means: `--run-dir`, ROLLOUT_RUN_DIR, `--job`, or the default.

    Only where a job's run is not in its default place, as seen from here, is Slurm asked, with one `squeue`.

    Raises:
        UsageError: it is not there; the message says where was looked.
        Unobservable: it is not there, and Slurm does not say where else.
        StoreError: it cannot be read.
    """
    if run_dir or (not job and os.environ.get("ROLLOUT_RUN_DIR")):
        path, asked = Path(run_dir or os.environ["ROLLOUT_RUN_DIR"]), ""
    else:
        asked = job or os.environ.get("SLURM_JOB_ID", "")
        path = default_run_dir({**os.environ, "SLURM_JOB_ID": asked})
    try:
        return _entered(path)
    except FileNotFoundError:
        if asked and asked[0].isdigit():
            return _run_of_job(asked, path, own=not job)
        raise UsageError(
            f"no run directory at {path}. Name it with --run-dir (or ROLLOUT_RUN_DIR); "
            "`slurm-rollout up` prints it in its first line"
        ) from None


def _entered(path: Path) -> RunDir:
    try:
        with os.scandir(path):
            pass
    except FileNotFoundError:
        raise
    except PermissionError:
        # A reader who is not the owner may enter and read status.json, but not list.
        if not os.access(path / "status.json", os.R_OK, effective_ids=True):
            raise StoreError(
                f"{path} cannot be read by you: it belongs to somebody else and the run is private"
            ) from None
    except OSError as e:
        raise StoreError(f"{path} cannot be read: {e.strerror}") from None
    return RunDir(path)


def _run_of_job(job: str, default: Path, *, own: bool) -> RunDir:
    """Return what the job's comment or its working directory leads to; `default` was looked at already.

    Of an array, or of a heterogeneous job, Slurm shows all of it. Its number is also that of one of its tasks: it means
    that one only where the number is this process's `own`.
    """
    from slurm_rollout import discovery  # `status` in the directory of its job needs no Slurm, and starts faster

    try:
        # Also a job that ended a moment ago: Slurm forgets it after MinJobAge, 300 s.
        queued = discovery.jobs(f"--jobs={job}", "--states=all")
    except Unobservable as e:
        if "Invalid job id" not in str(e):
            raise Unobservable(f"no run directory at {default}, and where else it is Slurm does not say: {e}") from None
        queued = []
    queued = [j for j in queued if job == (j.id if own else j.shown)] or queued
    marked = {path for j in queued for path in j.marked_dirs}
    others = [Path(path) for path in sorted(marked or {j.default_dir for j in queued if j.default_dir})]
    found = []
    for path in others:
        with contextlib.suppress(FileNotFoundError):
            found.append(_entered(path))
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"job {job} has {len(found)} runs: name one with --run-dir: {', '.join(str(r.path) for r in found)}"
        )
    where = ", nor at ".join(map(str, [default, *others]))
    why = "" if marked or not queued else "; the job's comment names none"
    why += "" if queued else f"; Slurm does not know job {job} (any more)"
    raise UsageError(
        f"no run directory at {where}{why}. Name it with --run-dir; `slurm-rollout up` prints it in its first line"
    )


def read_json(path: Path) -> Any:
    """Return the file's content. It may be another user's: what is no plain file is not waited for, nor followed.

    Raises:
        FileNotFoundError: it is not there.
        CorruptFile: it is not JSON.
        StoreError: it cannot be read.
    """
    try:
        # A FIFO would wait for a writer; a device, or a link to one, might do anything.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise StoreError(f"{path} cannot be read: {e.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StoreError(f"{path} cannot be read: it is no plain file")
        os.set_blocking(fd, True)
        with open(fd, "rb", closefd=False) as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except OSError as e:
        raise StoreError(f"{path} cannot be read: {e.strerror}") from None
    finally:
        os.close(fd)
    if len(content) > MAX_JSON_BYTES:
        raise CorruptFile(f"{path} has more than {MAX_JSON_BYTES >> 20} MiB: not read")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as e:  # of bytes that are no text, too
        raise CorruptFile(f"{path} is not JSON: {e}") from None


def event_files(run: RunDir) -> list[Path]:
    """Return the event files, oldest term first."""
    found = [(int(p.name.split(".")[1]), p) for p in run.path.glob("events.*.jsonl") if p.name.split(".")[1].isdigit()]
    return [path for _, path in sorted(found)]


def read_events(run: RunDir) -> Iterator[dict[str, Any]]:
    """Yield every complete event, oldest first; a half-written last line is left out.

    Raises:
        CorruptFile: a line is not JSON.
    """
    for path in event_files(run):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n"):
                    continue
                try:
                    yield json.loads(line)
                except ValueError as e:
                    raise CorruptFile(f"{path}: {e}") from None
