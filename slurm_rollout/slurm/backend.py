"""Steps of the allocation: srun, scancel, scontrol."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence

from slurm_rollout.backend import JobFacts, NodeFacts, StepRef, monotonic
from slurm_rollout.core.model import Job, Listing, NodeWord
from slurm_rollout.core.plan import FleetPlan, GroupPlan
from slurm_rollout.errors import Unobservable
from slurm_rollout.slurm import parse, srun


class SlurmBackend:
    """Steps of one job."""

    holder = "srun"

    def __init__(self, job: str, agent: str, command_timeout_s: float, component_job: str = "") -> None:
        """`component_job`: the fleet's component of a heterogeneous job has this job id of its own."""
        self._job = job
        self._component_job = component_job
        self._agent = agent
        self._timeout_s = command_timeout_s
        self._ids: dict[str, str] = {}  # step name -> id, of the newest listing

    def argv(self, plan: FleetPlan, group: GroupPlan, node: str, incarnation: int, *, sweep: bool) -> list[str]:
        het = str(plan.het_group) if self._component_job else ""
        return srun.step_argv(
            plan, group, node, incarnation, self._job, agent=self._agent, sweep=sweep, het_component=het
        )

    def environ(self) -> dict[str, str]:
        return srun.scrubbed()

    async def listing(self) -> Listing:
        asked_at = monotonic()
        steps = await self._own_steps()
        if self._component_job not in ("", self._job):
            steps += parse.step_lines(await self._show_steps(self._component_job))
        self._ids = {s.name: s.id for s in steps if s.name}
        return Listing(
            asked_at=asked_at,
            names=frozenset(self._ids),
            pids=frozenset(s.srun_pid for s in steps if s.srun_pid is not None),
        )

    async def _own_steps(self) -> tuple[parse.Step, ...]:
        """Return the steps of the batch script's job, in an answer that can be believed."""
        text = await self._show_steps(self._job)
        try:
            return parse.steps(text, self._job)
        except Unobservable:
            # The batch step of a job that is being ended may go first; then the job's own record has to say so.
            if (await self.job_record()).job is not Job.ENDING:
                raise
            return parse.step_lines(text)

    async def _show_steps(self, job: str) -> str:
        """Return what Slurm lists; empty where it says that there is nothing to list."""
        try:
            return await self._run("scontrol", "-o", "show", "step", job)
        except Unobservable as e:
            if "not found" not in str(e):
                raise
            return ""

    async def job_record(self) -> parse.JobRecord:
        """Return what Slurm says of the job.

        Raises:
            Unobservable: it does not say.
        """
        # Times have no zone, and when clocks go back an hour is there twice: Slurm's commands obey TZ (22.05.8).
        return parse.job_record(await self._run("scontrol", "-o", "show", "job", self._job, TZ="UTC0"))

    async def job(self) -> JobFacts:
        record = await self.job_record()
        left = None if record.end_at is None else max(0.0, record.end_at - time.time())
        return JobFacts(job=record.job, time_left_s=left)

    async def nodes(self, names: Sequence[str]) -> Mapping[str, NodeFacts]:
        job = self._component_job or self._job
        left = set(parse.job_nodes(await self._run("scontrol", "-o", "show", "job", job), job))
        # By name: otherwise it is every node of the cluster. slurmctld sends all of them in any case.
        said = parse.nodes(await self._run("scontrol", "-o", "show", "node", ",".join(names)))
        found = {name: NodeFacts(word=word, reason=reason) for name, (word, reason) in said.items() if name in names}
        return found | {name: NodeFacts(word=NodeWord.GONE) for name in names if name not in left}

    async def cancel(self, steps: Sequence[StepRef]) -> None:
        """One scancel for all. A step without an id has no name yet either: its srun is told to give up.

        scancel downloads every job record of the cluster, then sends one RPC a step (Slurm source, 22.05 to 25.11).
        """
        if not all(self._id(s) for s in steps):
            with contextlib.suppress(Unobservable):
                await self.listing()
        for step in steps:
            if not self._id(step) and step.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(step.pid, signal.SIGTERM)  # "forcing job termination", also of a pending step
        if ids := [i for i in map(self._id, steps) if i]:
            # A step that ended meanwhile makes scancel fail: what counts is what the next listing says.
            with contextlib.suppress(Unobservable):
                await self._run("scancel", *ids)

    def _id(self, step: StepRef) -> str:
        """Return the id of a step; empty while it is not known."""
        # In a component, agents find the first component's job id in their environment (seen with 22.05): the same
        # number there is another step, perhaps the trainer's.
        said = "" if self._component_job else step.step_id
        return said or self._ids.get(step.name, "")

    async def _run(self, *argv: str, **environ: str) -> str:
        """Run one Slurm command, with more in its environment, and return what it printed.

        Raises:
            Unobservable: it could not be run, failed, or did not answer in time.
        """
        # SCANCEL_INTERACTIVE and its like are options, too.
        env = {k: v for k, v in srun.scrubbed().items() if not k.startswith(("SCANCEL_", "SCONTROL_"))}
        env |= {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"} | environ
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=env,
                start_new_session=True,
            )
        except OSError as e:
            raise Unobservable(f"{argv[0]} could not be run: {e.strerror}") from None
        try:
            async with asyncio.timeout(self._timeout_s):
                out, err = await process.communicate()
        except TimeoutError:
            raise Unobservable(f"{' '.join(argv)} did not answer within {self._timeout_s:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # of a site's wrapper around the command, too
                await process.wait()
        if process.returncode != 0:
            said = (err or out).decode(errors="replace").strip()[-200:]
            raise Unobservable(f"{' '.join(argv)} failed with {process.returncode}: {said}")
        return out.decode(errors="replace")
