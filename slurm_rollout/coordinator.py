"""The coordinator's loop: observe, decide, write, act. It takes no decision itself.

Wake-ups (a process ended, a probe changed, a timer, a signal) are hints: every tick looks at the world again. What was
decided is journalled, and the barrier is written, before anything is done about it: a coordinator may be killed between
any two lines of this file, and the next one goes on from the run directory (`steps.adopt`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from slurm_rollout import proc
from slurm_rollout.backend import Backend, StepRef, monotonic, told_time_left_s
from slurm_rollout.clients import Clients
from slurm_rollout.core import moves
from slurm_rollout.core.decide import decide, is_over
from slurm_rollout.core.model import (
    Action,
    Cancel,
    CancelLost,
    ClientWords,
    Decision,
    Event,
    Go,
    GroupObservation,
    GroupState,
    Launch,
    Listing,
    Observation,
    RunState,
    Snapshot,
    Stop,
)
from slurm_rollout.core.names import MARK, mark, step_prefix
from slurm_rollout.core.phases import ALIVE, Phase
from slurm_rollout.core.plan import FleetPlan
from slurm_rollout.errors import LeaseLost, RolloutError, Unobservable
from slurm_rollout.hook import EventHook
from slurm_rollout.journal import Journal
from slurm_rollout.ports_check import open_ports
from slurm_rollout.probes import Key, Prober, Target
from slurm_rollout.questions import Background, Questions
from slurm_rollout.rundir import RunDir, event_files
from slurm_rollout.steps import Steps
from slurm_rollout.store import Store, load_plan, load_state, read_requests, without_place
from slurm_rollout.supervisor import CANNOT_START, DRAIN_MARGIN_S, GAVE_UP, JOB_END, SUPERSEDED, SUPERVISOR

log = logging.getLogger("slurm_rollout")

FAST_S = 0.005
"""How often reports are looked for while a group changes its phase."""

SLOW_S = 0.25
"""How often otherwise, and how often operators' requests and trainers' words are looked for."""

HOOK_END_S = 2.0
"""So long the last events may take to reach `on_event` at the end of a term."""


@dataclass(slots=True)
class _PortCheck:
    """One look at a group's ports, valid for one stay in FENCING."""

    since: float
    open: tuple[str, ...] | None


class Coordinator:
    """One term."""

    def __init__(
        self,
        plan: FleetPlan,
        run: RunDir,
        state: RunState,
        backend: Backend,
        exits: dict[tuple[int, int], int],
        *,
        first_term: int,
        drain: bool,
        end_is_near: bool = False,
        supervisor: int = 0,
        umask: int = -1,
    ) -> None:
        """`supervisor`: the pid whose end ends the run, 0 for none. `umask`: the steps'; -1 for this process's own."""
        self._plan = plan
        self._placed = moves.placed(plan, state)
        self._state = state
        self._backend = backend
        self._store = Store(run, state.term, private=plan.private)
        self._hook = make_hook(plan, run, state, umask)
        self._journal = Journal(plan, self._store, self._hook)
        self._run = run
        self._woken = asyncio.Event()
        self._steps = Steps(self._placed, run, state.run_id, backend, self._woken.set, umask=umask)
        self._exits = exits
        self._prober = Prober(clock=monotonic, wake=self._woken.set)
        self._ports: dict[str, _PortCheck] = {}
        self._background = Background(self._woken.set)
        self._questions = Questions(plan, backend, self._background, self._woken.set)
        self._stop = drain
        self._end_is_near = end_is_near
        self._supervisor = supervisor
        self._first_term = first_term
        self._audit_at = monotonic() + plan.audit_s
        self._heeded: set[Path] = set()  # requests whose files are not removed yet
        self._clients = Clients(run, job=state.job, restart_count=state.restart_count)
        self._words: tuple[ClientWords, ...] = ()
        self._words_at = 0.0

    async def run(self) -> int:
        """Supervise until the run is drained; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, JOB_END):
            loop.add_signal_handler(number, self._on_stop, number)
        # Asked for only now that it can be heard: without the supervisor nobody would start the next coordinator.
        if self._supervisor and not proc.die_with_parent(signal.SIGTERM, self._supervisor):
            self._stop = True
        try:
            if not self._open():
                return CANNOT_START
            self._steps.adopt(self._state, self._exits)
            self._note_time_left()
            self._announce()
            return await self._loop()
        except LeaseLost as e:
            log.error("%s", e)
            return SUPERSEDED
        finally:
            self._steps.detach()
            await self._background.aclose()
            await self._prober.aclose()
            if self._hook is not None:
                await self._hook.aclose(HOOK_END_S)
            self._store.close()

    def _open(self) -> bool:
        """Begin the term. False: it cannot be written down; the supervisor tries again with another one."""
        try:
            self._store.open()
        except OSError as e:
            log.error(
                "%s: %s. The run directory must be writable for a coordinator to begin. Engines that run go on, "
                "nothing was started or ended. Make room, or make it writable",
                e.filename,
                e.strerror,
            )
            return self._stop  # what is to end is ended all the same
        return True

    def _on_stop(self, number: int) -> None:
        self._stop = True
        self._end_is_near |= number == JOB_END
        self._woken.set()

    def _note_time_left(self) -> None:
        """Take the batch script's word for the job's end, unless it may be old: then Slurm is asked once."""
        left_s = told_time_left_s(os.environ, time.time())
        if left_s is not None and self._state.term == self._first_term:
            self._questions.note_time_left(left_s)

    def _announce(self) -> None:
        adopted = sum(
            s.process == "running" for g in self._state.groups for s in self._steps.observe(g.id, g.incarnation)
        )
        first = self._state.term == self._first_term
        message = f"term {self._state.term} on {socket.gethostname()}" + (
            f", adopted {adopted} steps" if adopted else ""
        )
        lost = [] if first else lost_events(self._state.groups, last_told_at(self._run))
        self._journal.note([*lost, Event(type="up" if first else "takeover", message=message)], time.time())

    async def _loop(self) -> int:
        due, slow_at = 0.0, 0.0
        while True:
            self._woken.clear()
            changed = self._steps.read()
            now = monotonic()
            if changed or now >= due or now >= slow_at:
                decision = await self._tick()
                if is_over(self._state):
                    return await self._end(0)
                if self._state.ending and now - self._state.ending_at > self._drain_bound_s():
                    return await self._end(GAVE_UP)
                slow_at = now + SLOW_S
                due = min(t for t in (decision.wake_at, self._journal.due_at, self._audit_at) if t is not None)
                if self._journal.blocked:  # what is due cannot be done
                    due = max(due, slow_at)
            # A tick may itself have made something due; a wake-up makes everything due.
            timeout_s = max(0.0, min(due, slow_at, now + self._pace_s(now)) - monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._woken.wait()
                    due = 0.0

    def _pace_s(self, now: float) -> float:
        changing = (Phase.STARTING, Phase.STOPPING, Phase.DRAINING, Phase.FENCING)
        fresh = any(g.phase in changing and now - g.since < 10.0 for g in self._state.groups)
        return FAST_S if fresh else SLOW_S

    def _drain_bound_s(self) -> float:
        return max(p.stop.grace_s + p.stop.cancel_after_s for p in self._plan.pools) + DRAIN_MARGIN_S

    # --------------------------------------------------------------------------------------------------------- a tick

    async def _tick(self) -> Decision:
        found = [(path, request) for path, request in read_requests(self._run) if path not in self._heeded]
        obs = self._observe([request for _, request in found])
        decision, before = decide(self._plan, self._state, obs), self._state
        if self._journal.is_due(decision, obs.now):
            write = partial(self._journal.write, self._state, decision, obs)
            self._state = await asyncio.to_thread(write)
        else:
            self._state = decision.state
        if self._state is not decision.state:
            return decision
        if [g.places for g in self._state.groups] != [g.places for g in before.groups]:
            self._placed = moves.placed(self._plan, self._state)
            self._steps.replan(self._placed)
        self._heeded.update(path for path, _ in found)
        if not self._journal.blocked:
            self._remove_requests()
        for action in decision.actions:
            self._act(action)
        self._steps.keep(self._state)
        self._steps.start_queued()
        self._prober.pause({g.id for g in self._plan.groups if g.pool in self._state.paused})
        self._prober.set_targets(self._targets())
        self._find_out(decision, obs)
        return decision

    def _remove_requests(self) -> None:
        for path in tuple(self._heeded):
            with contextlib.suppress(OSError):  # it is not heeded again, and tried again with the next tick
                path.unlink(missing_ok=True)
                self._heeded.discard(path)

    def _observe(self, requests: Iterable[Any]) -> Observation:
        now = monotonic()
        if now - self._words_at >= SLOW_S:
            self._words = self._clients.read({c.id: c.acks for c in self._state.clients})
            self._words_at = now
        groups = []
        for g in self._state.groups:
            check = self._ports.get(g.id)
            valid = check is not None and g.phase is Phase.FENCING and check.since == g.since
            groups.append(
                GroupObservation(
                    id=g.id,
                    incarnation=g.incarnation,
                    steps=self._steps.observe(g.id, g.incarnation),
                    endpoints=self._prober.endpoints(g.id, g.incarnation),
                    ports_open=check.open if check is not None and valid else None,
                    probes_paused=self._prober.is_quiet(g.id),
                )
            )
        return Observation(
            now=now,
            wall=time.time(),
            groups=tuple(groups),
            nodes=self._questions.nodes(),
            listing=self._questions.listing,
            listing_failed_at=self._questions.failed_at,
            unanswered_asked_at=self._questions.unanswered_asked_at,
            job=self._questions.job,
            job_asked_at=self._questions.job_asked_at,
            job_ends_at=self._questions.job_ends_at,
            requests=tuple(requests),
            clients=self._words,
            stop_signal=self._stop,
            end_is_near=self._end_is_near,
        )

    def _act(self, action: Action) -> None:
        match action:
            case Launch():
                self._steps.launch(action)
                self._forget_old_logs(action)
            case Go() | Snapshot() | Stop():
                self._steps.signal(action)
            case Cancel() | CancelLost():
                self._background.begin("cancel", self._cancel())

    def _targets(self) -> dict[Key, Target]:
        """Say which entrypoints are probed, and how: only sockets that an agent found to be its own engine's."""
        targets = {}
        for g in self._state.groups:
            group = self._placed.group(g.id)
            policy = self._plan.pool(group.pool).probe
            if g.phase in ALIVE:
                ranks = {m.rank for m in group.entrypoints}
            elif g.phase is Phase.STARTING:
                ranks = {r for s in self._steps.observe(g.id, g.incarnation) for r in s.listening}
            else:
                continue
            for member in group.entrypoints:
                if member.rank in ranks:
                    key = Key(g.id, g.incarnation, member.rank)
                    targets[key] = Target(
                        url=member.url, policy=policy, mode="startup" if g.phase is Phase.STARTING else "liveness"
                    )
        return targets

    def _forget_old_logs(self, action: Launch) -> None:
        oldest = action.incarnation - self._plan.log_keep_incarnations
        if oldest < 1:
            return
        for folder in (self._run.logs, self._run.steps):
            path = folder / action.group / str(oldest)
            self._background.begin(f"forget {path}", asyncio.to_thread(shutil.rmtree, path, ignore_errors=True))

    async def _end(self, status: int) -> int:
        left = [f"{g.id} on {', '.join(s.node for s in g.steps)}" for g in self._state.groups if g.steps]
        message = "drained" if not status else f"gave up waiting for {'; '.join(left)}"
        self._journal.note([Event(type="ended", message=message)], time.time())
        self._journal.write_last_words(self._state, monotonic())
        return status

    # ---------------------------------------------------------------------------------------------------- finding out

    def _find_out(self, decision: Decision, obs: Observation) -> None:
        wants = decision.wants
        for group_id in wants.ports:
            self._background.begin(f"ports {group_id}", self._check_ports(group_id))
        audit = obs.now >= self._audit_at
        if audit:
            self._audit_at = obs.now + self._plan.audit_s
        self._questions.ask(
            # Slurm alone can say that it answers again, and somebody may look at `status` to see that.
            listing=wants.listing or audit or self._state.blind_since is not None,
            job=wants.job or audit,
            nodes=wants.nodes or audit,
            hurry=bool(self._state.ending),
        )
        if wants.reach:
            self._questions.try_nodes(wants.reach, self._placed)

    async def _check_ports(self, group_id: str) -> None:
        since, before = self._state.group(group_id).since, self._ports.get(group_id)
        found = await open_ports(tuple(self._placed.group(group_id).endpoints()))
        self._ports[group_id] = _PortCheck(since=since, open=found)
        if found is None or found or (before is not None and before.since == since):
            await asyncio.sleep(0.2)  # whatever the group still waits for: no busy loop

    async def _cancel(self) -> None:
        """One call for all that is to be cancelled now, whichever group it belongs to."""
        await asyncio.sleep(0)  # the tick that asked may ask for other groups too
        refs = [
            ref
            for g in self._state.groups
            if g.cancel_sent_at is not None
            for ref in self._steps.refs(
                Cancel(group=g.id, incarnation=g.incarnation, nodes=tuple(s.node for s in g.steps))
            )
        ]
        refs += (
            StepRef(name=step.name, step_id="", pid=None)
            for step in self._state.lost_steps
            if step.cancel_sent_at is not None
        )
        if refs:
            await self._backend.cancel(refs)


def lost_events(groups: Iterable[GroupState], told_at: float | None) -> list[Event]:
    """Return what the coordinator before this one decided, and was killed before it could tell.

    State is written before events are. `told_at`: when it last told anything (Unix time); None: that is not known.
    """
    found = []
    for g in groups:
        if told_at is None:
            break
        told_until = told_at + 0.001  # times of events are rounded
        if g.failure is not None and g.failure.wall > told_until:
            f = g.failure
            found.append(
                Event(
                    type="failure",
                    group=g.id,
                    incarnation=f.incarnation,
                    reason=f.reason.value,
                    message=f.message,
                    rank=f.rank,
                    node=f.node,
                )
            )
        if g.phase is Phase.READY and g.since_wall > told_until:
            message = "every entrypoint answered a real request, just before the takeover"
            found.append(Event(type="ready", group=g.id, incarnation=g.incarnation, message=message))
    return found


def last_told_at(run: RunDir) -> float | None:
    """Return when the newest event that was written down was decided; None where none can be read."""
    with contextlib.suppress(OSError):
        for path in reversed(event_files(run)):
            for line in reversed(path.read_bytes().splitlines(keepends=True)):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if line.endswith(b"\n"):
                        return float(json.loads(line)["at"])
    return None


def make_hook(plan: FleetPlan, run: RunDir, state: RunState, umask: int) -> EventHook | None:
    """Return what tells the user's program of events; None where there is none."""
    if plan.on_event is None:
        return None
    about = {"run": plan.name, "job": state.job, "term": state.term, "run_dir": str(run.path)}
    how = plan.on_event
    return EventHook(how.argv, about, types=how.types, timeout_s=how.timeout_s, umask=umask)


def make_backend(plan: FleetPlan, run: RunDir, run_id: str, job: str) -> Backend:
    """Return the backend that the plan names."""
    if plan.backend == "local":
        from slurm_rollout.local import LocalBackend

        return LocalBackend(plan, run_id, str(run.started_agent(plan.slurm.python)))
    agent = str(run.started_agent(plan.slurm.python, plan.slurm.agent))
    from slurm_rollout.slurm.backend import SlurmBackend

    return SlurmBackend(job, agent, plan.slurm.command_timeout_s, plan.het_job)


def read_exits(path: Path) -> dict[tuple[int, int], int]:
    """Return the exit codes that the supervisor reaped: (pid, start time) to code."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                found[int(entry["pid"]), int(entry["started"])] = int(entry["code"])
    return found


async def refuse(left: Sequence[GroupState], plan: FleetPlan, backend: Backend, run_id: str) -> str:
    """Say why nothing can be started while steps live that the plan has no place for; empty when none does.

    Nothing would watch or end them: their names are those of another plan.
    """
    here = {proc.environ(p.pid).get(MARK) for p in proc.own()}
    steps, doubt = [], ""
    try:
        listing = await backend.listing()
    except Unobservable as e:
        listing, doubt = Listing(asked_at=0.0, names=frozenset(), pids=frozenset()), f" may still run ({e})"
    for g in left:
        named = any(name.startswith(step_prefix(plan, g.id, g.incarnation)) for name in listing.names)
        for step in g.steps:
            marked = mark(run_id, g.id, g.incarnation, step.node) in here
            if doubt or named or marked or step.pid in listing.pids:
                steps.append(f"{g.id} on {step.node}" + (f" (pid {step.pid})" if step.pid else ""))
    if not steps:
        return ""
    return (
        f"steps of an earlier `up` in this job{doubt or ' still run'}, where this plan does not have them: "
        f"{', '.join(steps)}. Nothing was started. Start `up` with the spec that they were started with, end it with "
        "`slurm-rollout stop`, and try again; or end them by hand (kill these pids, or scancel the steps that "
        "`scontrol show step` lists)"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one term; the supervisor starts this."""
    parser = argparse.ArgumentParser(prog="python -m slurm_rollout.coordinator", description=__doc__)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--term", type=int, required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--restart-count", type=int, default=0)
    parser.add_argument("--drain", action="store_true", help="adopt what runs, and end it")
    parser.add_argument("--end-is-near", action="store_true", help="with --drain: because the job's end is near")
    parser.add_argument("--first-term", type=int, required=True, help="term of this `up`'s first coordinator")
    args = parser.parse_args(argv)
    logging.raiseExceptions = False  # a log on a full disk is no reason for anything
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Every probe in flight holds a descriptor; the soft limit of 1,024 makes a fleet of that size blind.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    run = RunDir(args.run_dir)
    umask = os.umask(0o077)
    try:
        plan = load_plan(run)
        left = without_place(run, plan, job=args.job, restart_count=args.restart_count)
        state = load_state(
            run,
            plan,
            job=args.job,
            restart_count=args.restart_count,
            term=args.term,
            first_term=args.first_term,
            now=monotonic(),
        )
    except RolloutError as e:
        log.error("%s", e)
        return CANNOT_START

    async def supervise() -> int:
        backend = make_backend(plan, run, state.run_id, args.job)
        if left and (refusal := await refuse(left, plan, backend, state.run_id)):
            log.error("%s", refusal)
            return CANNOT_START
        coordinator = Coordinator(
            plan,
            run,
            state,
            backend,
            read_exits(run.exits),
            first_term=args.first_term,
            drain=args.drain,
            end_is_near=args.end_is_near,
            supervisor=int(os.environ.get(SUPERVISOR, os.getppid())),
            umask=umask,
        )
        return await coordinator.run()

    return asyncio.run(supervise())


if __name__ == "__main__":
    # Not `sys.exit`: it ends with 120 where the log cannot be flushed, and the supervisor would take that for a crash.
    os._exit(main())
