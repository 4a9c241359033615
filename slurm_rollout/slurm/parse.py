"""Slurm's text output to values. Pure.

Text, not JSON: `scontrol --json` does not exist before 23.02, and `squeue --json` of 22.05 exits 0 with an empty list
when slurmctld does not answer (measured). Unknown keys and any order of keys are accepted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from slurm_rollout.core.hostlist import expand
from slurm_rollout.core.model import Job, NodeWord
from slurm_rollout.errors import Unobservable


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One line of `scontrol -o show step JOB`."""

    id: str  # "123.4", "123.batch"; a pending step has "123.TDB" (sic, 20.11 to 25.11)
    name: str  # "" while it is pending
    state: str
    srun_host: str
    srun_pid: int | None


_RUNNING = frozenset({"RUNNING", "SUSPENDED", "CONFIGURING", "RESIZING", "SIGNALING", "STOPPED"})
_ENDED = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
        *("REVOKED", "STAGE_OUT", "TIMEOUT"),
        # Requeued: what ran has ended.
        *("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """What `scontrol -o show job JOB` says that we need."""

    state: str
    end_at: float | None  # Unix time; None: unlimited or unknown

    @property
    def job(self) -> Job:
        """A state that we do not know says nothing: it must not end a run."""
        if self.state in _RUNNING:
            return Job.RUNNING
        return Job.ENDING if self.state in _ENDED or self.state == "COMPLETING" else Job.UNKNOWN

    @property
    def batch_ended(self) -> bool:
        """Tell whether the batch script has ended for sure; while the job is COMPLETING it may still write."""
        return self.state in _ENDED


def _fields(line: str) -> dict[str, str]:
    # Values may hold spaces (a Reason), keys never do; "SrunHost:Pid" is one key. Where a key is there twice, the later
    # one is part of a value: Command shows the arguments of the script.
    parts = re.split(r"(?:^|\s)([A-Za-z][\w:/]*)=", line.strip())
    pairs = list(zip(parts[1::2], parts[2::2], strict=True))
    return {key: "" if value.strip() == "(null)" else value.strip() for key, value in reversed(pairs)}


def step_lines(text: str) -> tuple[Step, ...]:
    """Return the steps that the text has lines of."""
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
                srun_pid=int(pid) if pid.isdigit() and pid != "0" else None,
            )
        )
    return tuple(found)


# An array task's steps are called after the array, "<array>_<task>.batch" (seen with 22.05), whatever was asked for.
_OWN_STEP = re.compile(r"\d+(_\d+)?\.(batch|interactive)(\+\d+)?")


def steps(text: str, job: str) -> tuple[Step, ...]:
    """Return the steps of a job.

    Raises:
        Unobservable: the answer does not list the job's batch step. Then it is no valid answer: the job's steps may be
            missing from it too (stepmgr, a half-dead controller).
    """
    found = step_lines(text)
    if not any(_OWN_STEP.fullmatch(s.id) for s in found):
        raise Unobservable(f"`scontrol show step {job}` does not list {job}.batch: not believed")
    return found


def job_record(text: str) -> JobRecord:
    """Return the job's state and end, which is in UTC; of a heterogeneous job the first component's.

    Raises:
        Unobservable: the text is not a job record.
    """
    fields = _fields(text.strip())
    if not fields.get("JobState"):
        raise Unobservable(f"`scontrol show job` answered something else: {text.strip()[:200]!r}")
    try:
        end_at = datetime.fromisoformat(fields.get("EndTime", "")).replace(tzinfo=UTC).timestamp()
    except ValueError:  # "Unknown", "None"
        end_at = None
    return JobRecord(state=fields["JobState"].split()[0], end_at=end_at)


def job_nodes(text: str, job: str) -> tuple[str, ...]:
    """Return the nodes that the job has now: one that Slurm gave up has left it.

    `text` may have a line for each component of a heterogeneous job.

    Raises:
        Unobservable: the text does not say.
    """
    for line in text.splitlines():
        fields = _fields(line)
        if fields.get("JobId") == job and fields.get("NodeList"):
            try:
                return expand(fields["NodeList"])
            except ValueError as e:
                raise Unobservable(f"`scontrol show job {job}`: NodeList: {e}") from None
    raise Unobservable(f"`scontrol show job {job}` does not say which nodes it has")


_DRAIN_WORDS = frozenset({"DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING"})
_DOWN_WORDS = frozenset({"DOWN", "ERROR", "POWERED_DOWN", "POWERING_DOWN", "POWER_DOWN", "FUTURE"})


def nodes(text: str) -> dict[str, tuple[NodeWord, str]]:
    """Return name -> (what Slurm says, its reason) of every node that the text has a line of.

    A state is a base and flags, "MIXED+DRAIN", and up to 20.11 one word, "DRAINING"; a "*" at its end, or from 21.08
    on also the flag NOT_RESPONDING, means that its slurmd does not answer.
    """
    found = {}
    for line in text.splitlines():
        if not line.startswith("NodeName="):
            continue
        fields = _fields(line)
        state = fields.get("State", "")
        words = set(re.findall(r"[A-Z_]+", state))
        if words & _DOWN_WORDS:
            word = NodeWord.DOWN
        elif "*" in state or words & {"NOT_RESPONDING", "NO_RESPOND"}:
            word = NodeWord.SILENT
        elif words & _DRAIN_WORDS:
            word = NodeWord.DRAINING
        else:
            word = NodeWord.UP if words and not words <= {"UNKNOWN"} else NodeWord.UNKNOWN
        found[fields["NodeName"]] = word, fields.get("Reason", "")
    return found
