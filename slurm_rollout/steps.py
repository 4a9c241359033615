"""The steps of the run as processes of this host: start, adopt, signal, watch, and read what their agents report.

Each holder (srun; on the local backend the agent itself) leads a session of its own, so that it outlives the
coordinator: srun's death kills its step, the coordinator's must not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurm_rollout import proc
from slurm_rollout.backend import Backend, StepRef, monotonic
from slurm_rollout.core.model import (
    Cancel,
    ExitRecord,
    Go,
    Launch,
    Process,
    RunState,
    Snapshot,
    StepObservation,
    Stop,
)
from slurm_rollout.core.names import MARK, mark, step_name
from slurm_rollout.core.placeholders import command_line
from slurm_rollout.core.plan import FleetPlan, GroupPlan, Member
from slurm_rollout.core.srun_words import PUT_OFF, last_words
from slurm_rollout.rundir import RunDir

log = logging.getLogger("slurm_rollout")

# One string of an environment may not be longer on Linux (MAX_ARG_STRLEN).
_ENVIRON_LIMIT = 128 * 1024

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")

LAUNCH_S = 10.0
"""An srun that has been silent for so long has its step: a container that is made there may take minutes."""


@dataclass(frozen=True, slots=True)
class Key:
    """Which step."""

    group: str
    incarnation: int
    node: str
    sweep: bool = False


@dataclass(slots=True)
class _Step:
    """One step that this coordinator knows of."""

    key: Key
    reports: Path
    stderr: Path
    process: Process = Process.UNKNOWN
    pid: int | None = None
    pid_started: int = 0
    popen: subprocess.Popen[bytes] | None = None
    pidfd: int | None = None
    launched_at: float | None = None
    exited_at: float | None = None
    exit_code: int | None = None
    offset: int = 0
    said: int = 0  # bytes of srun's standard error that were read
    words: str = ""  # the last of them, until its agent speaks: then they are no news any more
    # What its agent reported.
    spoke: bool = False
    step_id: str = ""
    waiting_for: str = ""
    fenced: bool = False
    started: tuple[int, ...] | None = None
    listening: set[int] = field(default_factory=set)
    failing: dict[int, int] = field(default_factory=dict)
    pauses: dict[int, int] = field(default_factory=dict)  # rank -> the pause in which the agent asks nothing of it
    snapshot: bool = False
    strangers: dict[int, str] = field(default_factory=dict)  # by rank, until its own engine listens
    exit: ExitRecord | None = None


class Steps:
    """Every step of the current incarnations."""

    def __init__(
        self,
        plan: FleetPlan,
        run: RunDir,
        run_id: str,
        backend: Backend,
        wake: Callable[[], None],
        *,
        umask: int = -1,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`umask`: what the steps start with; -1 for this process's own. `clock`: seconds since boot."""
        self._plan = plan
        self._run = run
        self._run_id = run_id
        self._backend = backend
        self._wake = wake
        self._umask = umask
        self._clock = clock
        self._steps: dict[Key, _Step] = {}
        self._incarnations: dict[str, int] = {}  # of every group, as last kept

    def replan(self, plan: FleetPlan) -> None:
        """From now on groups start where this plan has them."""
        self._plan = plan

    # ------------------------------------------------------------------------------------------------ start and adopt

    def launch(self, action: Launch) -> None:
        """Start the steps, or let those wait for their turn that are too many at once (`start_queued`)."""
        for node in action.nodes:
            key = Key(action.group, action.incarnation, node, action.sweep)
            self._steps.pop(key, None)  # an earlier sweep; the new one comes last
            self._steps[key] = self._new(key)
            self._steps[key].process = Process.QUEUED
        self.start_queued()

    def start_queued(self) -> None:
        """Start as many of the steps that wait as may be launched now, first come, first served.

        Each costs slurmctld two RPCs; where a site limits them (23.02), the default is a burst of 30 and 2 a second.
        A coordinator that dies meanwhile leaves intents without a process: nothing is lost, nothing is started twice.
        """
        queued = [step for step in self._steps.values() if step.process is Process.QUEUED]
        if queued:
            now = self._clock()
            room = self._plan.slurm.max_launching - sum(_is_launching(step, now) for step in self._steps.values())
            for step in queued[: max(0, room)]:
                self._start(step)

    def _start(self, step: _Step) -> None:
        """Start the process. One that cannot even be started is observed as a process that ended."""
        key = step.key
        group = self._plan.group(key.group)
        argv = self._backend.argv(self._plan, group, key.node, key.incarnation, sweep=key.sweep)
        try:
            step.reports.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            environ = self._environ(group, key)
            with open(step.reports, "wb", opener=_private) as out, open(step.stderr, "wb", opener=_private) as err:
                step.popen = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env=environ,
                    start_new_session=True,
                    umask=self._umask,  # srun hands it on to the engines
                )
        except (OSError, ValueError) as e:
            step.process, step.exited_at, step.exit_code = Process.EXITED, self._clock(), 127
            with contextlib.suppress(OSError):
                step.stderr.write_text(f"{argv[0]} could not be started: {e}\n", encoding="utf-8")
            return
        self._hold(step, step.popen.pid)

    def adopt(self, state: RunState, exits: Mapping[tuple[int, int], int]) -> None:
        """Find the steps that an earlier coordinator of this run started.

        Args:
            state: the state that was journalled before they were started.
            exits: what the supervisor reaped meanwhile: (pid, start time) to exit code.
        """
        holders = {}
        for process in proc.own():
            if process.pid != process.session or not process.comm.startswith(self._backend.holder):
                continue
            environ = proc.environ(process.pid)
            # Engines carry the mark too; only the holder still has the step's description.
            if MARK in environ and "ROLLOUT_STEP" in environ:
                holders[environ[MARK], environ.get("ROLLOUT_SWEEP") == "1"] = process
        self.keep(state)
        for g in state.groups:
            for known in g.steps:
                key = Key(g.id, g.incarnation, known.node, known.sweep)
                step = self._new(key)
                self._steps[key] = step
                holder = holders.get((mark(self._run_id, g.id, g.incarnation, known.node), known.sweep))
                if holder is not None:
                    self._hold(step, holder.pid)
                else:
                    step.exited_at = self._clock()
                    if known.pid is not None:
                        step.process, step.pid, step.pid_started = Process.EXITED, known.pid, known.pid_started
                        step.exit_code = exits.get((known.pid, known.pid_started))

    def _new(self, key: Key) -> _Step:
        return _Step(
            key=key,
            reports=self._run.step_reports(key.group, key.incarnation, key.node, sweep=key.sweep),
            stderr=self._run.step_stderr(key.group, key.incarnation, key.node, sweep=key.sweep),
        )

    def _hold(self, step: _Step, pid: int) -> None:
        found = proc.read(pid)
        step.process, step.pid = Process.RUNNING, pid
        step.pid_started = found.started if found is not None else 0
        # The kernel counts from boot, as our clock does: so an adopted one has it, too.
        step.launched_at = found.started * _TICK_S if found is not None else self._clock()
        try:
            step.pidfd = os.pidfd_open(pid)
        except OSError:
            return  # it is gone already: `_look` will see that
        asyncio.get_running_loop().add_reader(step.pidfd, self._on_exit, step)

    def _on_exit(self, step: _Step) -> None:
        self._unwatch(step)
        self._wake()

    def _unwatch(self, step: _Step) -> None:
        if step.pidfd is not None:
            asyncio.get_running_loop().remove_reader(step.pidfd)
            os.close(step.pidfd)
            step.pidfd = None

    # -------------------------------------------------------------------------------------------------------- signals

    def signal(self, action: Go | Snapshot | Stop) -> None:
        """Tell the agents, through their holders: srun forwards USR1 and USR2 to its task."""
        if isinstance(action, Stop):
            self._drop_queued(action)
        number = signal.SIGUSR1 if isinstance(action, Stop) else signal.SIGUSR2
        living = [
            step.pid
            for step in self._of(action)
            if step.process is Process.RUNNING and step.pid is not None and proc.lives(step.pid, step.pid_started)
        ]
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _drop_queued(self, action: Stop) -> None:
        """What still waits for its turn has ended before it began."""
        for step in self._of(action):
            if step.process is Process.QUEUED:
                step.process, step.exited_at = Process.EXITED, self._clock()
                step.exit = ExitRecord(cause="stopped", message="it was not started yet")
                self._wake()

    def refs(self, action: Cancel) -> list[StepRef]:
        """Return what the backend needs to cancel these steps."""
        return [
            StepRef(
                name=step_name(self._plan, step.key.group, step.key.incarnation, step.key.node, sweep=step.key.sweep),
                step_id=step.step_id,
                pid=step.pid if step.process is Process.RUNNING else None,
            )
            for step in self._of(action)
        ]

    def _of(self, action: Go | Snapshot | Stop | Cancel) -> Iterator[_Step]:
        for node in action.nodes:
            for sweep in (False, True):
                step = self._steps.get(Key(action.group, action.incarnation, node, sweep))
                if step is not None:
                    yield step

    # ---------------------------------------------------------------------------------------------------- observation

    def keep(self, state: RunState) -> None:
        """Forget the steps that no group has any more; those whose process still runs are kept until it ends."""
        self._incarnations = {g.id: g.incarnation for g in state.groups}
        wanted = {Key(g.id, g.incarnation, s.node, s.sweep) for g in state.groups for s in g.steps}
        for key, step in list(self._steps.items()):
            if key in wanted:
                continue
            self._look(step)
            if step.process is not Process.RUNNING:
                self._unwatch(step)
                del self._steps[key]

    def read(self) -> bool:
        """Look at every process and read what agents newly reported; tell whether there was anything new."""
        changed = False
        for step in self._steps.values():
            changed |= self._look(step)
        return changed

    def observe(self, group: str, incarnation: int) -> tuple[StepObservation, ...]:
        """Return the steps of one incarnation as `read` last saw them."""
        return tuple(
            _observation(step)
            for key, step in self._steps.items()
            if key.group == group and key.incarnation == incarnation
        )

    def detach(self) -> None:
        """Let go of every process without ending it: the next coordinator adopts them."""
        for step in self._steps.values():
            self._unwatch(step)

    def _look(self, step: _Step) -> bool:
        if step.process is Process.QUEUED:  # the files may be there, of an earlier sweep
            return False
        changed = False
        if step.process is Process.RUNNING:
            if step.popen is not None:
                code = step.popen.poll()
                gone = code is not None
            else:
                code, gone = None, step.pid is None or not proc.lives(step.pid, step.pid_started)
            if gone:
                # After this, what it wrote is complete: the reports are read below, in this same look.
                step.process, step.exited_at, step.exit_code = Process.EXITED, self._clock(), code
                changed = True
        changed |= self._read_reports(step)
        return (not step.spoke and _read_words(step)) or changed

    def _read_reports(self, step: _Step) -> bool:
        try:
            if step.reports.stat().st_size <= step.offset:
                return False
            with open(step.reports, "rb") as f:
                f.seek(step.offset)
                data = f.read()
        except OSError:
            return False
        complete = data[: data.rfind(b"\n") + 1]
        step.offset += len(complete)
        for line in complete.splitlines():
            # A site's prolog or plugin may print here, too: whatever is no report is none of ours.
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                report = json.loads(line)
                if isinstance(report, dict):
                    _take_in(step, report)
        return bool(complete)

    # -------------------------------------------------------------------------------------------------- what they get

    def _environ(self, group: GroupPlan, key: Key) -> dict[str, str]:
        pool = self._plan.pool(group.pool)
        config = {
            "version": 2,
            "mode": "sweep" if key.sweep else "serve",
            "run_id": self._run_id,
            "group": key.group,
            "incarnation": key.incarnation,
            "node": key.node,
            "members": [self._member(group, member, key) for member in group.on(key.node)],
            "setup": list(pool.env.setup),
            "fence": {
                "timeout_s": pool.fence.timeout_s,
                "gpu_memory_mb": pool.fence.gpu_memory_mb,
                "unshared_gpus": group.unshared_gpus,
                "self_fence_s": pool.fence.self_fence_s,
                "absent": self._absent(key.node),
                "barrier": str(self._run.barrier),
            },
            "stop": {"grace_s": pool.stop.grace_s, "snapshot_s": pool.stop.snapshot_s},
            "probe": {
                "period_s": pool.probe.liveness_period_s,
                "timeout_s": pool.probe.liveness_timeout_s,
                "failure_threshold": pool.probe.liveness_failure_threshold,
                "path": pool.probe.request.path,
                "body": pool.probe.request.body,
                "expect": pool.probe.request.expect,
                "counter": None
                if pool.probe.counter is None
                else {"path": pool.probe.counter.path, "name": pool.probe.counter.name},
                "barrier": str(self._run.barrier) if pool.probe.pause_in else "",
                "pool": pool.name,
            },
            "log": {"max_bytes": self._plan.log_max_bytes},
        }
        text = json.dumps(config)
        if len(text) >= _ENVIRON_LIMIT:
            raise ValueError(f"the step's description is {len(text)} bytes long, {_ENVIRON_LIMIT} is the limit")
        environ = self._backend.environ()
        environ["ROLLOUT_STEP"] = text
        environ[MARK] = mark(self._run_id, key.group, key.incarnation, key.node)
        if key.sweep:
            environ["ROLLOUT_SWEEP"] = "1"
        return environ

    def _absent(self, node: str) -> dict[str, int]:
        """Return the groups that are not on a node, with their incarnations: nothing of these may live there."""
        here = {group.id for group in self._plan.groups if node in group.nodes}
        return {group: n for group, n in self._incarnations.items() if n and group not in here}

    def _member(self, group: GroupPlan, member: Member, key: Key) -> dict[str, Any]:
        pool = self._plan.pool(group.pool)
        return {
            "rank": member.rank,
            "local_rank": member.local_rank,
            "gpus": list(member.gpus),
            "argv": list(command_line(self._plan, group, member, key.incarnation)),
            "env": {
                **pool.env.variables,
                **member.variables,
                "ROLLOUT_RUN": self._plan.name,
                "ROLLOUT_RUN_DIR": str(self._run.path),
                "ROLLOUT_GROUP": group.id,
                "ROLLOUT_INCARNATION": str(key.incarnation),
                "ROLLOUT_RANK": str(member.rank),
                "ROLLOUT_SIZE": str(len(group.members)),
                "ROLLOUT_MASTER_ADDR": group.master_address,
                "ROLLOUT_MASTER_PORT": str(group.master_port),
                "ROLLOUT_HTTP_PORT": str(member.ports["http"]),
            },
            "port": member.ports["http"],
            "ports": list(member.fenced_ports),
            "entrypoint": member.entrypoint,
            "log": str(self._run.member_log(group.id, key.incarnation, member.rank)),
            "snapshot": str(self._run.member_snapshot(group.id, key.incarnation, member.rank)),
        }


def _is_launching(step: _Step, now: float) -> bool:
    """Tell whether its srun may still be asking for a step."""
    if step.process is not Process.RUNNING or step.spoke or step.launched_at is None:
        return False
    return now - step.launched_at < LAUNCH_S or PUT_OFF in step.words


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _take_in(step: _Step, report: dict[str, Any]) -> None:
    """Note one report; KeyError, TypeError or ValueError, and nothing noted, when it is not a complete one."""
    match report.get("report"):
        case "hello":
            step.spoke, step.step_id = True, str(report.get("step", ""))
        case "fence_waits":
            step.waiting_for = str(report.get("message", ""))
        case "fenced":
            step.fenced = True
        case "started":
            step.started = tuple(int(r) for r in report["ranks"])
        case "listening":
            step.listening.add(int(report["rank"]))
            step.strangers.pop(int(report["rank"]), None)
        case "stranger":
            said = f"port {report['port']} is held by {report['holder']}, not by our engine"
            step.strangers[int(report["rank"])] = said
        case "local_probe":
            step.failing[int(report["rank"])] = int(report["failures"])
        case "probes":
            step.pauses[int(report["rank"])] = int(report["pause"])
        case "snapshot":
            step.snapshot = True
        case "exit":
            step.exit = ExitRecord(
                cause=str(report.get("cause", "")),
                message=str(report.get("message", "")),
                rank=report.get("rank"),
                code=report.get("code"),
                signal=report.get("signal"),
                oom=bool(report.get("oom")),
                disk=str(report.get("disk") or ""),
                hardware=str(report.get("hardware") or ""),
            )


def _read_words(step: _Step) -> bool:
    """Read what srun says while no agent speaks: that step creation is disabled, say; tell whether it was new."""
    try:
        size = step.stderr.stat().st_size
    except OSError:
        return False
    if size == step.said:
        return False
    step.said, before = size, step.words
    step.words = last_words(_text(step.stderr))
    return step.words != before


def _observation(step: _Step) -> StepObservation:
    stderr = "" if step.spoke else step.words
    if step.process is Process.EXITED and step.exit is None:
        stderr = last_words(_text(step.stderr))
    return StepObservation(
        node=step.key.node,
        sweep=step.key.sweep,
        process=step.process,
        pid=step.pid,
        pid_started=step.pid_started,
        launched_at=step.launched_at,
        exited_at=step.exited_at,
        exit_code=step.exit_code,
        stderr=stderr,
        spoke=step.spoke,
        fenced=step.fenced,
        waiting_for="" if step.fenced else step.waiting_for,
        started=step.started,
        listening=tuple(sorted(step.listening)),
        stranger=next(iter(step.strangers.values()), ""),
        failing=dict(step.failing),
        snapshot=step.snapshot,
        pause=min((step.pauses.get(rank, 0) for rank in step.listening), default=None),
        exit=step.exit,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
