"""`coordinator.Coordinator` on virtual time: observe, decide, write, act, in the same order, around the same rules.

What is real: `decide`, the barrier's rules, the journal's round trip through JSON, `store.load_state`, the store's
lease, `steps.Steps` (what is kept of a step, what a report means), `clients.Clients`, `health.fold`. Made up:
processes, HTTP, time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from slurm_rollout import proc
from slurm_rollout.backend import NodeFacts, StepRef
from slurm_rollout.clients import Clients
from slurm_rollout.coordinator import FAST_S, SLOW_S
from slurm_rollout.core import codec, moves
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
    Job,
    Launch,
    Listing,
    NodeObservation,
    Observation,
    Request,
    RunState,
    Snapshot,
    Stop,
)
from slurm_rollout.core.phases import ALIVE, Phase
from slurm_rollout.core.plan import FleetPlan
from slurm_rollout.errors import LeaseLost
from slurm_rollout.journal import Journal
from slurm_rollout.probes import Key as ProbeKey
from slurm_rollout.questions import REACH_PERIOD_S, REACH_TIMEOUT_S, Pace, Reach, observe_nodes
from slurm_rollout.simulation.clock import Chance, Timeline
from slurm_rollout.simulation.cluster import Cluster
from slurm_rollout.simulation.files import SharedFiles, SimStore
from slurm_rollout.simulation.known_steps import SimSteps
from slurm_rollout.simulation.parts import Step
from slurm_rollout.simulation.probing import Probing
from slurm_rollout.store import load_state
from slurm_rollout.supervisor import DRAIN_MARGIN_S

CHANGING = frozenset({Phase.STARTING, Phase.STOPPING, Phase.DRAINING, Phase.FENCING})
PORT_TIMEOUT_S = 1.0

POINTS = ("state", "barrier", "events", "heeded", "act", "acted")
"""Where a coordinator can be killed in a tick: before the state, the barrier, the events are written; before requests
are taken away, before each action, and after all."""


class Killed(Exception):
    """This coordinator does not live to see the next line."""


class Watch(Protocol):
    """Who looks on (see `invariants`)."""

    def decided(self, before: RunState, obs: Observation, decision: Decision) -> None: ...
    def committed(self, before: RunState, obs: Observation, decision: Decision) -> None: ...
    def opened(self, term: int) -> None: ...
    def acts(self, coordinator: Coordinator, action: Action, group_ports: tuple[str, ...] | None) -> None: ...
    def took_over(self, found: RunState, state: RunState, *, another_up: bool) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """What a coordinator is started with."""

    job: str
    restart_count: int
    number: int
    first: int
    drain: bool = False
    warned: bool = False  # that Slurm will end the job


class Coordinator:
    """One term."""

    def __init__(
        self,
        plan: FleetPlan,
        cluster: Cluster,
        files: SharedFiles,
        time: Timeline,
        term: Term,
        watch: Watch,
        over: Callable[[Coordinator, str], None],
        chance: Chance,
    ) -> None:
        self.plan = plan
        self.term = term
        self.alive = True
        self.paused = False
        self.superseded = False
        self.resumed_at = 0.0
        self.kill_at: tuple[str, int] | None = None  # point, and how many times it is passed before
        self.stall_s = 0.0  # stopped for so long between its next journal entry and the action
        self.stop_signal = term.drain or term.warned
        self.end_is_near = term.warned
        self.late_deeds = False  # it does what it wrote down before it was stopped
        self._cluster = cluster
        self._files = files
        self._time = time
        self._watch = watch
        self._over = over
        self._chance = chance
        self._store = SimStore(files, term.number, plan.heartbeat_s, self._pass)
        found = self._load()
        self.journal = Journal(plan, self._store)
        self.state = found
        self.placed = moves.placed(plan, found)
        self.steps = SimSteps(self.placed, files.run, found.run_id, cluster, time, term.number, self._step_changed)
        self.probing = Probing(plan, cluster, time, self._probed)
        self._ports: dict[str, tuple[float, tuple[str, ...] | None]] = {}
        self._reach: dict[str, Reach] = {}
        self._said: dict[str, NodeFacts] = {}
        self._said_at: float | None = None
        self._nodes: tuple[NodeObservation, ...] = ()
        self._pace = Pace()
        self._under_way: set[str] = set()
        self._listing: Listing | None = None
        self._job = Job.UNKNOWN
        self._job_asked_at: float | None = None
        self._job_ends_at: float | None = None
        self._heeded: set[str] = set()
        self._clients = Clients(files.run, job=term.job, restart_count=term.restart_count)
        self._words: tuple[ClientWords, ...] = ()
        self._words_read = -1  # of how many changes to clients' files
        self._audit_at = time.now + plan.audit_s
        self._due: float | None = None
        self._degraded_at = found.started_at + plan.degraded_timeout_s

    def _load(self) -> RunState:
        run, term = self._files.run, self.term
        if self._files.state is not None:
            journal = {"boot_id": proc.boot_id(), "state": codec.encode(self._files.state)}
            run.state.write_text(json.dumps(journal), encoding="utf-8")
        state = load_state(
            run,
            self.plan,
            job=term.job,
            restart_count=term.restart_count,
            term=term.number,
            first_term=term.first,
            now=self._time.now,
        )
        if self._files.intent is not None:
            # Its writer was killed once `state.json` held it: it is so.
            intent, self._files.intent = self._files.intent, None
            if self._files.state is intent[2].state:
                self._watch.committed(*intent)
        if self._files.state is not None:
            self._watch.took_over(self._files.state, state, another_up=self._files.state.term < term.first)
        return state

    def start(self) -> None:
        """Take the lease, adopt what runs, and begin.

        Raises:
            OSError: the term cannot be begun now.
        """
        self._store.open()
        self._watch.opened(self.term.number)
        self.steps.adopt(self.state, self._cluster.exits())
        first = self.term.number == self.term.first
        self.journal.note([Event(type="up" if first else "takeover")], self._time.wall)
        self.poke(self._time.now)

    # --------------------------------------------------------------------------------------------------------- wake-ups

    def poke(self, at: float) -> None:
        """Have a tick at this moment at the latest."""
        if not self.alive or (self._due is not None and self._due <= at):
            return
        self._due = at

        def due() -> None:
            if self._due == at:
                self._due = None
                self.tick()

        self._time.at(at, due)

    def on_step(self, step: Step) -> None:
        """A process ended, or its report is in the file."""
        now = self._time.now
        fresh = any(g.phase in CHANGING and now - g.since < 10.0 for g in self.state.groups)
        self.poke(now + (FAST_S if fresh or not step.srun_lives else SLOW_S / 2))

    def _step_changed(self) -> None:
        self.poke(self._time.now + 0.001)

    def on_words(self) -> None:
        """A client's file is another one than before."""
        self.poke(self._time.now + self._chance.between(0.0, SLOW_S, "words", self._files.clients.changes))

    def _probed(self) -> None:
        self.poke(self._time.now + 0.001)

    # ------------------------------------------------------------------------------------------------------ life, death

    def die(self) -> None:
        """SIGKILL."""
        if self.alive:
            self.alive = False
            if not self.superseded:
                self._files.silence()
            self.probing.close()
            self._store.close()

    def pause(self, for_s: float) -> None:
        """SIGSTOP, swapped out, or a file system that hangs."""
        if self.paused or not self.alive:
            return
        self.paused = True
        if not self.superseded:
            self._files.silence()
        self.probing.stop()
        self._time.after(for_s, self._resume)

    def _resume(self) -> None:
        if not self.alive:
            return
        self.paused = False
        self.resumed_at = self.journal.due_at = self._time.now
        self.probing.go_on()
        self.poke(self._time.now)

    def _pass(self, point: str) -> None:
        if self.kill_at is not None and self.kill_at[0] == point:
            if self.kill_at[1] <= 0:
                raise Killed(point)
            self.kill_at = point, self.kill_at[1] - 1

    # ----------------------------------------------------------------------------------------------------------- a tick

    def tick(self) -> None:
        if not self.alive or self.paused:
            return
        try:
            self._tick()
        except Killed:
            self.die()
            self._over(self, "killed")
        except LeaseLost:
            self.superseded = True
            self.die()
            self._over(self, "superseded")

    def _tick(self) -> None:
        self.steps.read()
        requests = [r for r in self._files.waiting() if r.id not in self._heeded]
        obs = self._observe(requests)
        before = self.state
        decision = decide(self.plan, before, obs)
        self._watch.decided(before, obs, decision)
        if self.journal.is_due(decision, obs.now):
            self._files.intent = before, obs, decision
            self.state = self.journal.write(before, decision, obs)
            if self.journal.blocked:
                self._files.silence()
            else:
                self.journal.due_at = math.inf  # heartbeats are not written one by one (`files.Version`)
        else:
            self.state = decision.state
        self._files.intent = None
        if self.state is not decision.state:
            self.poke(self.journal.due_at + 0.001)
            return
        if self.state.groups is not before.groups and any(
            new.places is not old.places for old, new in zip(before.groups, self.state.groups, strict=True)
        ):
            self.placed = moves.placed(self.plan, self.state)
            self.steps.replan(self.placed)
        self._watch.committed(before, obs, decision)
        self._heeded.update(r.id for r in requests)
        self._pass("heeded")
        if not self.journal.blocked:
            self._files.heeded(self._heeded)
        if self.stall_s and decision.actions:
            stall_s, self.stall_s = self.stall_s, 0.0
            self.pause(stall_s)
            self._time.after(stall_s, lambda: self._act_late(before, decision, obs))
            return
        self._act_and_go_on(before, decision, obs)

    def _act_late(self, before: RunState, decision: Decision, obs: Observation) -> None:
        self.late_deeds = True
        try:
            self._act_and_go_on(before, decision, obs)
        except Killed:
            self.die()
            self._over(self, "killed")
        finally:
            self.late_deeds = False

    def _act_and_go_on(self, before: RunState, decision: Decision, obs: Observation) -> None:
        if not self.alive:
            return
        for action in decision.actions:
            self._pass("act")
            self._act(action)
        self._pass("acted")
        self.steps.start_queued()
        if decision.state.groups != before.groups:
            self.steps.keep(self.state)
        self.probing.pause({g.id for g in self.plan.groups if g.pool in self.state.paused})
        self.probing.set_targets(self._targets())
        self._find_out(decision, obs)
        if is_over(self.state):
            self._end("drained")
        elif self.state.ending and self._time.now - self.state.ending_at > self._drain_bound_s():
            self._end("gave up")
        else:
            self._sleep(decision, changed=decision.state != before)

    def _end(self, how: str) -> None:
        self.journal.write_last_words(self.state, self._time.now)
        self.die()
        self._over(self, how)

    def _drain_bound_s(self) -> float:
        return max(p.stop.grace_s + p.stop.cancel_after_s for p in self.plan.pools) + DRAIN_MARGIN_S

    def _sleep(self, decision: Decision, *, changed: bool) -> None:
        """The real loop decides every `SLOW_S`; where nothing changed it would decide the same again."""
        now = self._time.now
        dues = [now + SLOW_S if changed else self._audit_at]
        if decision.wake_at is not None:
            dues.append(max(decision.wake_at, now + 0.001))
        if self._degraded_at > now:
            dues.append(self._degraded_at)
        if self.state.ending or self.journal.blocked or self.steps.has_queued():
            dues.append(now + 1.0)
        self.poke(min(dues))

    def _observe(self, requests: list[Request]) -> Observation:
        if self._words_read != self._files.clients.changes:
            self._words_read = self._files.clients.changes
            self._words = self._clients.read({c.id: c.acks for c in self.state.clients})
        groups = []
        for g in self.state.groups:
            ports = None
            if g.phase is Phase.FENCING:
                check = self._ports.get(g.id)
                ports = check[1] if check is not None and check[0] == g.since else None
            groups.append(
                GroupObservation(
                    id=g.id,
                    incarnation=g.incarnation,
                    steps=self.steps.observe(g.id, g.incarnation),
                    endpoints=self.probing.endpoints(g.id, g.incarnation),
                    ports_open=ports,
                    probes_paused=self.probing.is_quiet(g.id),
                )
            )
        now = self._time.now
        return Observation(
            now=now,
            wall=self._time.wall,
            groups=tuple(groups),
            nodes=self._nodes,
            listing=self._listing,
            listing_failed_at=self._pace.failed_at,
            unanswered_asked_at=self._pace.unanswered_asked_at,
            job=self._job,
            job_asked_at=self._job_asked_at,
            job_ends_at=self._job_ends_at,
            requests=tuple(requests),
            clients=self._words,
            stop_signal=self.stop_signal,
            end_is_near=self.end_is_near,
        )

    def _act(self, action: Action) -> None:
        if isinstance(action, CancelLost):
            self._watch.acts(self, action, None)
            self._begin("cancel", 0.0, self._cancel)
            return
        check = self._ports.get(action.group)
        self._watch.acts(self, action, check[1] if check is not None else None)
        match action:
            case Launch():
                self.steps.launch(action)
            case Go() | Snapshot() | Stop():
                self.steps.signal(action)
            case Cancel():
                self._begin("cancel", 0.0, self._cancel)

    def _cancel(self) -> None:
        held = []
        for g in self.state.groups:
            if g.cancel_sent_at is not None:
                every = Cancel(group=g.id, incarnation=g.incarnation, nodes=tuple(s.node for s in g.steps))
                refs: list[StepRef] = self.steps.refs(every)
                held += [step for step, _ in zip(self.steps.held(every), refs, strict=True)]
        lost = {s.name for s in self.state.lost_steps if s.cancel_sent_at is not None}
        held += [s for s in self._cluster.steps if s.name in lost and s.listed]
        if held:
            self._cluster.cancel(held)

    def _targets(self) -> dict[ProbeKey, str]:
        targets = {}
        for g in self.state.groups:
            group = self.placed.group(g.id)
            if g.phase in ALIVE:
                for member in group.entrypoints:
                    targets[ProbeKey(g.id, g.incarnation, member.rank)] = "liveness"
            elif g.phase is Phase.STARTING:
                for rank in {r for s in self.steps.observe(g.id, g.incarnation) for r in s.listening}:
                    if group.members[rank].entrypoint:
                        targets[ProbeKey(g.id, g.incarnation, rank)] = "startup"
        return targets

    # ------------------------------------------------------------------------------------------------------ finding out

    def _find_out(self, decision: Decision, obs: Observation) -> None:
        for group_id in decision.wants.ports:
            self._check_ports(group_id)
        audit = obs.now >= self._audit_at
        if audit:
            self._audit_at = obs.now + self.plan.audit_s
        if decision.wants.listing or audit or self.state.blind_since is not None:
            self._ask("listing", self._list)
        if decision.wants.job or audit or self._job_asked_at is None:
            self._ask("job", self._look_at_job)
        if decision.wants.nodes or audit:
            self._ask("nodes", self._ask_of_nodes)
        if decision.wants.reach:
            self._try_nodes(decision.wants.reach)

    def _ask(self, name: str, question: Callable[[], None]) -> None:
        now = self._time.now
        if name in self._under_way:
            return
        next_at = self._pace.next_at(name, hurry=bool(self.state.ending))
        if now >= next_at:
            self._pace.note_question(name, now)
            question()
        else:
            self.poke(next_at + 0.001)

    def _begin(self, name: str, delay_s: float, done: Callable[[], None]) -> None:
        if name in self._under_way:
            return
        self._under_way.add(name)

        def finish() -> None:
            self._under_way.discard(name)
            if not self.alive:
                return
            if self.paused:  # it comes in once the loop runs again
                self._begin(name, 1.0, done)
                return
            done()
            self.poke(self._time.now)

        self._time.after(delay_s, finish)

    def _list(self) -> None:
        answer = self._cluster.list_steps()

        def done() -> None:
            self._pace.note_answer("listing", self._time.now, answered=answer.listing is not None)
            if answer.listing is not None:
                self._listing = answer.listing

        self._begin("listing", answer.delay_s, done)

    def _look_at_job(self) -> None:
        asked_at = self._time.now
        known, ends_at, delay_s = self._cluster.look_at_job()

        def done() -> None:
            self._pace.note_answer("job", self._time.now, answered=known is not None)
            self._job = Job.UNKNOWN if known is None else known
            if known is not None:
                self._job_ends_at = ends_at
            self._job_asked_at = asked_at

        self._begin("job", delay_s, done)

    def _ask_of_nodes(self) -> None:
        asked_at = self._time.now
        known, delay_s = self._cluster.look_at_nodes()

        def done() -> None:
            self._pace.note_answer("nodes", self._time.now, answered=known is not None)
            if known is not None:
                said = {name: NodeFacts(word=word, reason="as Slurm says") for name, word in known.items()}
                self._said, self._said_at = said, asked_at
                self._observe_nodes()

        self._begin("nodes", delay_s, done)

    def _try_nodes(self, names: Sequence[str]) -> None:
        """As the real one, but it wakes nobody where all is as it was: `decide` names the moment of the next look."""
        if "reach" in self._under_way:
            return
        for name in [n for n in self._reach if n not in names]:
            del self._reach[name]
        late = any(self._cluster.reaches(n) is False for n in names)

        def done() -> None:
            if not self.alive:
                self._under_way.discard("reach")
                return
            now = self._time.now
            if self.paused:
                self._time.after(1.0, done)
                return
            changed = False
            for name in names:
                known = self._reach.setdefault(name, Reach())
                before = known.answered_at is not None, known.silent_s > 0
                known.note(self._cluster.reaches(name), now)
                changed |= before != (known.answered_at is not None, known.silent_s > 0)
            self._observe_nodes()
            self._time.after(REACH_PERIOD_S, lambda: self._under_way.discard("reach"))
            if changed:
                self.poke(now)

        self._under_way.add("reach")
        self._time.after(REACH_TIMEOUT_S if late else 0.002, done)

    def _observe_nodes(self) -> None:
        self._nodes = observe_nodes(self._reach, self._said, self._said_at)

    def _check_ports(self, group_id: str) -> None:
        g, group = self.state.group(group_id), self.placed.group(group_id)
        late = any(self._cluster.unreachable(n) for n in group.nodes)

        def done() -> None:
            found = tuple(
                f"{group.addresses[m.node]}:{p}"
                for m in group.members
                for p in m.fenced_ports
                if self._cluster.accepts(self._cluster.nodes[m.node], p)
            )
            self._ports[group_id] = g.since, None if self._time.now < self._cluster.blind_until else found

        self._begin(f"ports {group_id}", (PORT_TIMEOUT_S if late else 0.002) + self._again_s(group_id), done)

    def _again_s(self, group_id: str) -> float:
        """What keeps a group waiting is looked at again, but not in a busy loop."""
        check = self._ports.get(group_id)
        return 0.2 if check is not None and check[0] == self.state.group(group_id).since else 0.0
