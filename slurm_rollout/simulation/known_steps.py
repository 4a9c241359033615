"""`steps.Steps` on the cluster's sruns: what a report means, and what is kept of a step, is real."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from slurm_rollout.core.model import Cancel, Go, Launch, Process, RunState, Snapshot, StepObservation, Stop
from slurm_rollout.core.plan import FleetPlan
from slurm_rollout.rundir import RunDir
from slurm_rollout.simulation.clock import Timeline
from slurm_rollout.simulation.cluster import Cluster
from slurm_rollout.simulation.parts import Step
from slurm_rollout.steps import Key, Steps, _observation, _Step, _take_in


class SimSteps(Steps):
    """What is known of steps, with the cluster's sruns in place of processes."""

    def __init__(
        self,
        plan: FleetPlan,
        run: RunDir,
        run_id: str,
        cluster: Cluster,
        time: Timeline,
        term: int,
        wake: Callable[[], None],
    ) -> None:
        super().__init__(plan, run, run_id, backend=None, wake=wake, clock=lambda: time.now)  # type: ignore[arg-type]
        self._cluster = cluster
        self._time = time
        self._term = term
        self._truth: dict[Key, Step] = {}
        self._seen: dict[tuple[str, int], tuple[StepObservation, ...]] = {}

    def launch(self, action: Launch) -> None:
        super().launch(action)
        self._seen.pop((action.group, action.incarnation), None)

    def _start(self, step: _Step) -> None:
        absent = self._absent(step.key.node)
        self._take(step, self._cluster.launch(step.key, self._plan, self._term, absent))
        self._seen.pop((step.key.group, step.key.incarnation), None)

    def has_queued(self) -> bool:
        """Tell whether a step waits for its turn."""
        return any(step.process is Process.QUEUED for step in self._steps.values())

    def adopt(self, state: RunState, exits: Mapping[tuple[int, int], int]) -> None:
        """As `Steps.adopt`: sruns that live are found by mark, of the others only the journal is known."""
        self.keep(state)
        living = {s.key: s for s in self._cluster.steps if s.srun_lives}
        gone = {s.key: s for s in self._cluster.steps if not s.srun_lives}
        for g in state.groups:
            for known in g.steps:
                key = Key(g.id, g.incarnation, known.node, known.sweep)
                self._steps[key] = step = self._new(key)
                holder = living.get(key)
                if holder is not None:
                    self._take(step, holder)
                    continue
                step.exited_at = self._time.now
                if known.pid is not None:
                    step.process, step.pid, step.pid_started = Process.EXITED, known.pid, known.pid_started
                    step.exit_code = exits.get((known.pid, known.pid_started))
                self._truth[key] = gone.get(key) or self._cluster.past(key)  # its reports can still be read
                self._look(step)

    def _take(self, step: _Step, held: Step) -> None:
        self._truth[step.key] = held
        step.process, step.pid, step.pid_started = Process.RUNNING, held.pid, held.pid
        step.launched_at = held.launched_at
        self._look(step)

    def _look(self, step: _Step) -> bool:
        if step.process is Process.QUEUED:
            return False
        held = self._held(step.key)
        changed = len(held.reports) > step.offset
        if step.process is Process.RUNNING and not held.srun_lives:
            step.process, step.exited_at, step.exit_code = Process.EXITED, self._time.now, held.code
            changed = True
        for report in held.reports[step.offset :]:
            _take_in(step, report)
        step.offset = len(held.reports)
        if changed:
            self._seen.pop((step.key.group, step.key.incarnation), None)
        return changed

    def read(self) -> bool:
        changed = False
        for step in self._steps.values():
            if step.process is Process.QUEUED:
                continue
            held = self._held(step.key)
            if len(held.reports) > step.offset or (step.process is Process.RUNNING and not held.srun_lives):
                changed |= self._look(step)
        return changed

    def observe(self, group: str, incarnation: int) -> tuple[StepObservation, ...]:
        found = self._seen.get((group, incarnation))
        if found is None:
            found = tuple(
                self._with_words(_observation(step), self._held(key))
                for key, step in self._steps.items()
                if key.group == group and key.incarnation == incarnation
            )
            self._seen[group, incarnation] = found
        return found

    @staticmethod
    def _with_words(seen: StepObservation, held: Step) -> StepObservation:
        if seen.process is Process.EXITED and seen.exit is None and held.stderr:
            return replace(seen, stderr=held.stderr)
        return seen

    def keep(self, state: RunState) -> None:
        known = len(self._steps)
        super().keep(state)
        if len(self._steps) != known:
            self._seen.clear()

    def held(self, action: Go | Snapshot | Stop | Cancel) -> list[Step]:
        return [self._held(s.key) for s in self._of(action)]

    def _held(self, key: Key) -> Step:
        """Return what is behind a step: one that was intended only may be launched late, by the last coordinator."""
        if key not in self._truth or not self._truth[key].pid:
            self._truth[key] = self._cluster.past(key)
        return self._truth[key]

    def signal(self, action: Go | Snapshot | Stop) -> None:
        if isinstance(action, Stop):
            self._drop_queued(action)
            self._seen.pop((action.group, action.incarnation), None)
        for step in self._of(action):
            held = self._held(step.key)
            if step.process is Process.RUNNING and held.srun_lives:
                self._cluster.signal(held, stop=isinstance(action, Stop))

    def detach(self) -> None:
        """The sruns go on."""
