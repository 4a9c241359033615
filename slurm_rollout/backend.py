"""What the coordinator needs of the machine that runs steps: Slurm, or this host alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from slurm_rollout.core.model import Job, Listing, NodeWord
from slurm_rollout.core.plan import FleetPlan, GroupPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRef:
    """One step to cancel, as far as it is known."""

    name: str  # job name
    step_id: str  # "JOB.STEP", or "" where its agent never spoke
    pid: int | None  # the process that holds it on this host, while that lives


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What the allocation's state is."""

    job: Job
    time_left_s: float | None  # when it was asked; None: it does not say, or the job has no end


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What Slurm says of a node of the job."""

    word: NodeWord
    reason: str = ""


class Backend(Protocol):
    """Starts and ends steps. Queries raise `Unobservable`; that never means that nothing runs."""

    holder: str
    """Command name of the process that holds a step on this host."""

    def argv(self, plan: FleetPlan, group: GroupPlan, node: str, incarnation: int, *, sweep: bool) -> list[str]:
        """Return the command that holds one step."""
        ...

    def environ(self) -> dict[str, str]:
        """Return the environment that every step starts from."""
        ...

    async def listing(self) -> Listing:
        """Return the steps that live now."""
        ...

    async def job(self) -> JobFacts:
        """Return the allocation's state."""
        ...

    async def nodes(self, names: Sequence[str]) -> Mapping[str, NodeFacts]:
        """Return what is said of these nodes."""
        ...

    async def cancel(self, steps: Sequence[StepRef]) -> None:
        """End steps at once, all in one call where there is one."""
        ...


def told_time_left_s(environ: Mapping[str, str], wall: float) -> float | None:
    """Return what Slurm (23.02 and later) told the batch script when the job began; None where it told nothing.

    A limit that was changed since then is not in it.
    """
    try:
        end_at = float(environ["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return None
    return max(0.0, end_at - wall)


def monotonic() -> float:
    """Return the clock of every decision: it goes on across coordinators of one host, also while it sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
