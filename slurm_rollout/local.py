"""Steps without Slurm: every "node" is this host, every step an agent that the coordinator starts itself.

For rehearsals, `make demo` and tests. What a site's Slurm would do at a step's end is done by killing what carries the
step's mark, or descends from its agent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence

from slurm_rollout import proc
from slurm_rollout.backend import JobFacts, NodeFacts, StepRef, monotonic, told_time_left_s
from slurm_rollout.core.model import Job, Listing, NodeWord
from slurm_rollout.core.names import MARK, step_name
from slurm_rollout.core.plan import FleetPlan, GroupPlan
from slurm_rollout.slurm.srun import agent_argv


class LocalBackend:
    """Steps are processes of this host."""

    holder = "python"

    def __init__(self, plan: FleetPlan, run_id: str, agent: str) -> None:
        self._plan = plan
        self._run_id = run_id
        self._agent = agent

    def argv(self, plan: FleetPlan, group: GroupPlan, node: str, incarnation: int, *, sweep: bool) -> list[str]:
        return agent_argv(plan, self._agent)

    def environ(self) -> dict[str, str]:
        return {k: v for k, v in os.environ.items() if not k.startswith("ROLLOUT_")}

    async def listing(self) -> Listing:
        asked_at = monotonic()
        found = self._marked()
        return Listing(
            asked_at=asked_at, names=frozenset(name for name, _ in found), pids=frozenset(pid for _, pid in found)
        )

    async def job(self) -> JobFacts:
        # Inside of an allocation, or of a rehearsal of one.
        return JobFacts(job=Job.RUNNING, time_left_s=told_time_left_s(os.environ, time.time()))

    async def nodes(self, names: Sequence[str]) -> Mapping[str, NodeFacts]:
        return {name: NodeFacts(word=NodeWord.UP) for name in names}

    async def cancel(self, steps: Sequence[StepRef]) -> None:
        names = {s.name for s in steps}
        victims = {pid for name, pid in self._marked() if name in names}
        for step in steps:
            if step.pid is not None:
                victims |= {step.pid, *(p.pid for p in proc.descendants(step.pid))}
        for pid in victims:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def _marked(self) -> list[tuple[str, int]]:
        """Return (step name, pid) of every process that carries a mark of this run."""
        found = []
        for process in proc.own():
            environ = proc.environ(process.pid)
            run_id, _, rest = environ.get(MARK, "").partition("/")
            if run_id != self._run_id:
                continue
            group, incarnation, node = rest.rsplit("/", 2)
            try:
                name = step_name(self._plan, group, int(incarnation), node, sweep=environ.get("ROLLOUT_SWEEP") == "1")
            except (KeyError, ValueError):  # of a plan that this run no longer has
                continue
            found.append((name, process.pid))
        return found
