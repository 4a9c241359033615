"""The job, once more: `scontrol requeue`, when the time of this life is over."""

from __future__ import annotations

import logging
import subprocess

from slurm_rollout.slurm import srun

log = logging.getLogger("slurm_rollout")


def requeue(job: str, *, timeout_s: float) -> bool:
    """Requeue the job that this process runs in; tell whether Slurm took it. What it says otherwise is logged."""
    env = {k: v for k, v in srun.scrubbed().items() if not k.startswith("SCONTROL_")} | {"LC_ALL": "C"}
    argv = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=timeout_s, env=env)
        words = (done.stderr or done.stdout).strip()[-200:]
        said = (words or f"exit code {done.returncode}") if done.returncode else ""
    except OSError as e:
        said = f"scontrol could not be run: {e.strerror}"
    except subprocess.TimeoutExpired:
        said = f"no answer within {timeout_s:g} s"
    if said:
        log.error(
            "job %s is not requeued: %s. It needs `#SBATCH --requeue`; submit it again by hand, the run goes on in the "
            "same run directory",
            job,
            said,
        )
        return False
    log.info("job %s is requeued", job)
    return True
