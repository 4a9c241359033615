"""The run directory in the job's comment, where people on a login node find it: written once, beside the start of `up`.

`start` runs this module as a process of its own: a controller that does not answer must not hold up a fleet. Whatever
goes wrong is a warning.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from slurm_rollout import discovery
from slurm_rollout.errors import Unobservable
from slurm_rollout.rundir import RunDir

log = logging.getLogger("slurm_rollout")

MAX_CHARS = 1024
"""A longer comment is refused (Slurm source, 20.11 to 26.05)."""


def start(run: RunDir, locks: Path, *, timeout_s: float) -> None:
    """Begin to write the run directory into the comment of the job that this process is in; do not wait for the end.

    `locks` is a directory of this user on this host: two `up` of one job must not overwrite each other's word.
    """
    job = os.environ["SLURM_JOB_ID"]
    argv = [sys.executable, "-m", __name__, job, update_name(os.environ), str(run.path)]
    argv += [str(locks / "comment.lock"), str(timeout_s)]
    try:
        # Not subprocess: the supervisor reaps whatever ends, and a Popen that nobody waits for complains. Signals that
        # `up` holds back must reach it.
        os.posix_spawn(
            argv[0],
            argv,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            setsigmask=[],
        )
    except OSError as e:
        _warn(run.path, f"{argv[0]}: {e.strerror}")


def update_name(environ: Mapping[str, str]) -> str:
    """Return the job's name for `scontrol update`.

    The bare number of a heterogeneous job's first part is also that of the whole, and the bare number of an array that
    of its last task: an update of it changes every part, every task (Slurm source, 20.11 to 26.05).
    """
    if environ.get("SLURM_ARRAY_JOB_ID") and environ.get("SLURM_ARRAY_TASK_ID"):
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    if environ.get("SLURM_HET_SIZE"):
        return f"{environ['SLURM_JOB_ID']}+0"
    return environ["SLURM_JOB_ID"]


def write(job: str, name: str, run_dir: str, *, timeout_s: float) -> str:
    """Name the run directory in the comment of a job, called `name` by `scontrol update`, if that is empty or ours.

    Returns why readers elsewhere will not find the run; empty when they will.

    Raises:
        Unobservable: Slurm does not say what the comment is, or did not take the new one.
    """
    queued = [j for j in discovery.jobs(f"--jobs={job}", timeout_s=timeout_s) if j.id == job]
    if not queued:
        raise Unobservable(f"squeue does not show job {job}")
    before, default = queued[0].comment, queued[0].default_dir
    comment = discovery.marked(before, run_dir)
    if comment is None or len(comment) > MAX_CHARS:
        if default and os.path.realpath(default) == os.path.realpath(run_dir):
            return ""  # there they look next
        return "which says something else, and stays" if comment is None else f"of at most {MAX_CHARS} characters"
    if comment != before:
        discovery.command("scontrol", "update", f"JobId={name}", f"Comment={comment}", timeout_s=timeout_s)
    return ""


def main(argv: list[str]) -> int:
    """Write the comment; say on standard error what went wrong."""
    job, name, run_dir, lock, timeout_s = argv
    os.setsid()  # a terminal's Ctrl-C is for `up`
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        with open(lock, "w", encoding="ascii") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if why := write(job, name, run_dir, timeout_s=float(timeout_s)):
                _warn(run_dir, why)
    except (Unobservable, OSError) as e:
        _warn(run_dir, str(e))
    return 0


def _warn(run_dir: Path | str, why: str) -> None:
    log.warning(
        "warning: the run directory is not named in the job's comment (%s): unless it is rollout-runs/JOB in the job's "
        "working directory, others find this run only with --run-dir %s",
        why,
        run_dir,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
