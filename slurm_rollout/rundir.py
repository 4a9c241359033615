"""The run directory: where each file is, and how to read it. Standard library only: `status` must stay light.

Writing is `store.py`'s business. Everything here is for the owner only, but for `status.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slurm_rollout.errors import CorruptFile, StoreError, UsageError


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

    def started_agent(self, python: str) -> Path:
        """What a step runs: compiled, where the nodes' interpreter (`python`; empty: ours) is the one it is for."""
        return self.agent if python else self.compiled_agent

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

    Raises:
        UsageError: it is not there; the message says where was looked.
        StoreError: it cannot be read.
    """
    if run_dir or (not job and os.environ.get("ROLLOUT_RUN_DIR")):
        path = Path(run_dir or os.environ["ROLLOUT_RUN_DIR"])
    elif job:
        path = default_run_dir({**os.environ, "SLURM_JOB_ID": job})
    else:
        path = default_run_dir()
    try:
        with os.scandir(path):
            pass
    except FileNotFoundError:
        raise UsageError(
            f"no run directory at {path}. Name it with --run-dir (or ROLLOUT_RUN_DIR); "
            "`slurm-rollout up` prints it in its first line"
        ) from None
    except PermissionError:
        # A reader who is not the owner may enter and read status.json, but not list.
        if not os.access(path / "status.json", os.R_OK):
            raise StoreError(
                f"{path} cannot be read by you: it belongs to somebody else and the run is private"
            ) from None
    except OSError as e:
        raise StoreError(f"{path} cannot be read: {e.strerror}") from None
    return RunDir(path)


def read_json(path: Path) -> Any:
    """Return the file's content.

    Raises:
        FileNotFoundError: it is not there.
        CorruptFile: it is not JSON.
        StoreError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as e:
        raise StoreError(f"{path} cannot be read: {e.strerror}") from None
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
