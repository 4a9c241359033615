"""Slurm's text output to values. Pure.

Text, not JSON: `scontrol --json` does not exist before 23.02, and `squeue --json` of 22.05 exits 0 with an empty list
when slurmctld does not answer (facts: slurm.md §2.4, A3). Unknown keys and any order of keys are accepted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from slurm_rollout.core.model import Job
from slurm_rollout.errors import Unobservable


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One line of `scontrol -o show step JOB`."""

    id: str  # "123.4", "123.batch"; a pending step has "123.TDB" (sic, 20.11 to 25.11)
    name: str
    state: str
    srun_host: str
    srun_pid: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """What `scontrol -o show job JOB` says that we need."""

    state: str
    end_at: float | None  # Unix time; None: unlimited or unknown

    @property
    def job(self) -> Job:
        """RUNNING counts as running, everything else but SUSPENDED as ending."""
        return Job.RUNNING if self.state in ("RUNNING", "SUSPENDED", "CONFIGURING") else Job.ENDING


def _fields(line: str) -> dict[str, str]:
    # Values may hold spaces (a Reason), keys never do; "SrunHost:Pid" is one key.
    parts = re.split(r"(?:^|\s)([A-Za-z][\w:/]*)=", line.strip())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def steps(text: str, job: str) -> tuple[Step, ...]:
    """Return the steps of a job.

    Raises:
        Unobservable: the answer does not list the job's batch step. Then it is no valid answer: the job's steps may be
            missing from it too (stepmgr, a half-dead controller).
    """
    found = []
    for line in text.splitlines():
        if not line.startswith("StepId="):
            continue
        fields = _fields(line)
        host, _, pid = fields.get("SrunHost:Pid", "").rpartition(":")
        found.append(
            Step(
                id=fields["StepId"],
                name=fields.get("Name", ""),
                state=fields.get("State", ""),
                srun_host=host,
                srun_pid=int(pid) if pid.isdigit() else None,
            )
        )
    if not any(s.id.partition("+")[0] == f"{job}.batch" for s in found):
        raise Unobservable(f"`scontrol show step {job}` does not list {job}.batch: not believed")
    return tuple(found)


def job_record(text: str) -> JobRecord:
    """Return the job's state and end.

    Raises:
        Unobservable: the text is not a job record.
    """
    fields = _fields(text.strip())
    if "JobState" not in fields:
        raise Unobservable(f"`scontrol show job` answered something else: {text.strip()[:200]!r}")
    try:
        end_at = datetime.fromisoformat(fields.get("EndTime", "")).timestamp()
    except ValueError:  # "Unknown", "None"
        end_at = None
    return JobRecord(state=fields["JobState"].split()[0], end_at=end_at)
