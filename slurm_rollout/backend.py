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
    time_left_s: float | None


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


def monotonic() -> float:
    """Return the clock of every decision: it goes on across coordinators of one host, also while it sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
