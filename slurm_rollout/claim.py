"""Who may use a run directory, a name and ports on this host: locks in a node-local directory.

Never on the shared file system: flock on some Lustre mounts is silently node-local.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slurm_rollout.core.plan import FleetPlan
from slurm_rollout.errors import RunDirBusy, StoreError
from slurm_rollout.rundir import RunDir

CLAIM_TIMEOUT_S = 30.0
"""How long a start waits for others that start on this host at the same moment."""


def node_local_dir() -> Path:
    """Return this user's directory on this host, made and checked: nobody else may have prepared it.

    Raises:
        StoreError: it is not ours, or cannot be made.
    """
    path = Path(os.environ.get("ROLLOUT_TMPDIR", "/tmp")) / f"slurm-rollout-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        info = path.lstat()
    except OSError as e:
        raise StoreError(f"{path} cannot be made: {e.strerror}. Name another place in ROLLOUT_TMPDIR") from None
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise StoreError(f"{path} is not a directory that only you can enter: remove it, or set ROLLOUT_TMPDIR")
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A run directory held by this process until it ends."""

    lock: FileLock
    note: Path

    def release(self) -> None:
        self.note.unlink(missing_ok=True)
        self.lock.release()


def claim(run: RunDir, plan: FleetPlan, job: str) -> Claim:
    """Hold the run directory, and the ports of the plan, against every other coordinator of this host.

    Raises:
        RunDirBusy: another one is alive with the same run directory, with the same name in the same job, or with a port
            of this plan. The message names it.
        StoreError: the node-local directory cannot be used.
    """
    locks = node_local_dir() / "locks"
    try:
        locks.mkdir(mode=0o700, exist_ok=True)
        # Two that start at the same moment look at each other's notes one after the other.
        with FileLock(locks / ".order.lock", timeout=CLAIM_TIMEOUT_S):
            return _claim(locks, run, plan, job)
    except Timeout:
        raise RunDirBusy(
            f"another `up` on this host has been starting for {CLAIM_TIMEOUT_S:.0f} s and holds {locks}/.order.lock. "
            "Nothing was started. Try again"
        ) from None
    except OSError as e:
        raise StoreError(f"{e.filename or locks}: {e.strerror}. Name another place in ROLLOUT_TMPDIR") from None


def _claim(locks: Path, run: RunDir, plan: FleetPlan, job: str) -> Claim:
    key = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:20]
    lock = FileLock(locks / f"{key}.lock")
    note = locks / f"{key}.json"
    try:
        lock.acquire(blocking=False)
    except Timeout:
        other = _read_note(note)
        raise RunDirBusy(
            f"{run.path} is in use by the coordinator of run {other.get('name', '?')!r} "
            f"(pid {other.get('pid', '?')} on this host). Nothing was started. "
            f"End it with `slurm-rollout stop --run-dir {run.path}`, "
            "or name another directory with --run-dir"
        ) from None
    ours = {f"{address}:{port}" for group in plan.groups for address, port in group.endpoints()}
    try:
        for other_note in locks.glob("*.json"):
            if other_note != note:
                _refuse_overlap(other_note, plan, job, ours)
        content = {
            "pid": os.getpid(),
            "name": plan.name,
            "job": job,
            "run_dir": str(run.path),
            "ports": sorted(ours),
            "backend": plan.backend,
        }
        note.write_text(json.dumps(content), encoding="utf-8")
        _forget_ended(locks)
    except BaseException:
        lock.release()
        raise
    return Claim(lock=lock, note=note)


def _forget_ended(locks: Path) -> None:
    """Remove what coordinators left that are gone. Safe only under the order's lock: nobody takes another one now."""
    for lock in locks.glob("[0-9a-f]*.lock"):
        with contextlib.suppress(OSError):
            if not _is_held(lock):
                lock.with_suffix(".json").unlink(missing_ok=True)
                lock.unlink(missing_ok=True)


def _is_held(lock: Path) -> bool:
    probe = FileLock(lock)
    try:
        probe.acquire(blocking=False)
    except Timeout:
        return True
    probe.release()
    return False


def _read_note(note: Path) -> dict[str, Any]:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _refuse_overlap(note: Path, plan: FleetPlan, job: str, ours: set[str]) -> None:
    if not _is_held(note.with_suffix(".lock")):  # the note of a coordinator that was killed
        return
    other = _read_note(note)
    who = f"the coordinator of run {other.get('name')!r} (pid {other.get('pid')}, {other.get('run_dir')})"
    if other.get("job") == job and other.get("name") == plan.name and other.get("backend") == plan.backend == "slurm":
        raise RunDirBusy(
            f"{who} runs in this job under the same name. Nothing was started. Give this one another `name`"
        )
    shared = sorted(ours.intersection(other.get("ports", ())))
    if shared:
        raise RunDirBusy(
            f"{who} uses {len(shared)} of the same ports ({', '.join(shared[:3])}{' …' if len(shared) > 3 else ''}). "
            "Nothing was started. Choose other nodes, or another [ports] base"
        )
