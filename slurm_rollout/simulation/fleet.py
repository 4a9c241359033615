"""A fleet's whole life: hours of faults, then peace, in which everything must become ready again, and the end."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from slurm_rollout.barrier import Barrier, BarrierError, CoordinatorLost, FleetFailed
from slurm_rollout.core import moves
from slurm_rollout.core.bounds import recovery_bound
from slurm_rollout.core.model import Action, Decision, Exclusion, Observation, RunState
from slurm_rollout.core.phases import Phase, PoolPhase, Reason
from slurm_rollout.core.plan import FleetPlan, GroupPlan
from slurm_rollout.core.pools import serves, waits_for_time
from slurm_rollout.rundir import RunDir
from slurm_rollout.simulation import faults as fault_kinds
from slurm_rollout.simulation.broken import Broken
from slurm_rollout.simulation.case import START, Case
from slurm_rollout.simulation.clock import Chance, Timeline
from slurm_rollout.simulation.cluster import NODE_DOWN_S, Cluster
from slurm_rollout.simulation.coordinator import Coordinator, Term
from slurm_rollout.simulation.faults import Fault
from slurm_rollout.simulation.files import SharedFiles
from slurm_rollout.simulation.invariants import Checker
from slurm_rollout.simulation.parts import Engine, Incarnation, Step
from slurm_rollout.simulation.probing import LocalProbing
from slurm_rollout.simulation.trainer import Client
from slurm_rollout.simulation.trainer_faults import KINDS

COORDINATOR_STARTS_S = 0.3
CLIENTS_START_S = (1.0, 10.0)
TRAINER_AFTER_FAILURE_S = 60.0
NEXT_UP_S = 30.0
WARNED_S = 60.0  # `#SBATCH --signal=B:USR1@60`
TRAINER_LOOKS_S = 8.0  # after a fault: long enough for a coordinator that is well to have seen a crash
PEACE_MARGIN_S = 20.0
TRACE_LINES = 3000
SPIN = 1000


class Fleet:
    """A cluster, the coordinators of one job and their supervisor, a trainer that polls, and who watches them."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.plan = case.plan
        self.time = Timeline(START)
        self.chance = Chance(case.seed)
        self.cluster = Cluster(self.plan, self.time, self.chance, self._load_s)
        self.files = SharedFiles(RunDir(folder), self.time, self.chance)
        self.clients = [Client(self, habits) for habits in case.clients]
        self.checker = Checker(self.plan, self.cluster, self.files, self.time, self.clients)
        self.local = LocalProbing(self.plan, self.cluster, self.time, self.chance, self._lateness_s)
        self.coordinator: Coordinator | None = None
        self.slow_starts: dict[str, float] = {}
        self.trace: deque[tuple[float, tuple[object, ...]]] = deque(maxlen=TRACE_LINES)
        self.ticks = 0
        self._second = self._ticks_in_second = 0
        self.terms = 0
        self.ready_s: dict[str, float] = dict.fromkeys((g.id for g in self.plan.groups), 0.0)
        self.first_failed_at: float | None = None
        self.peace = False
        self.unwell_at = START  # when the coordinator was last not able to do its work
        self._serving: dict[str, int] = {}  # group -> incarnation, by the barrier
        self._ready_since: dict[str, float] = {}
        self._first_term = 1
        self.restart_count = 0
        self._crashes: list[float] = []
        self._failed_at: float | None = None
        self._warned = False  # of the job's end, by Slurm
        self._ended = False  # no other `up` follows
        self._requests = 0
        self._up_over = False
        self._trainer = self._new_trainer()
        self._reader_epoch = (0, 0, 0)
        self._groups_shown: list[dict[str, Any]] = []
        self._ups = 0
        self._returns: list[tuple[str, str, str, float]] = []  # node, group, moment, and how long after it
        self.files.clients.on_words = self._on_words
        self.files.clients.on_acks = self._on_acks
        self.cluster.on_listening = self.local.listens
        self.cluster.on_disturbed_sleep = self.checker.trainer.asked_asleep
        self.cluster.on_step = self._on_step
        self.cluster.on_change = self._on_change
        self.cluster.on_launch = self._on_launch
        self.cluster.on_engine_start = self._on_engine_start
        self.cluster.heartbeat_at = self._heartbeat_at
        self.cluster.note = self.note
        self.files.on_barrier = self._on_barrier

    def note(self, *words: object) -> None:
        self.trace.append((self.time.now, words))

    def _load_s(self, group: str, incarnation: int) -> float:
        slow_s = self.slow_starts.pop(group, 0.0)
        return slow_s + self.chance.between(*self.case.load_s, "load", group, incarnation)

    # ---------------------------------------------------------------------------------------------- the cluster's hints

    def _on_step(self, step: Step) -> None:
        if self.coordinator is not None:
            self.coordinator.on_step(step)

    def _on_change(self, incarnation: Incarnation) -> None:
        if self.coordinator is not None:
            self.coordinator.probing.disturb(incarnation)
        self.local.disturb(incarnation)
        self._note_use(incarnation.plan.id)

    def _on_launch(self, step: Step) -> None:
        self.note("srun", step.name, "by term", step.term)
        self.checker.launched(step)

    def _heartbeat_at(self, step: Step) -> float:
        """Return when the newest heartbeat was written that can have reached a node."""
        node = self.cluster.nodes[step.key.node]
        return min(node.cut_at, self.files.heartbeat_at()) if node.cut else self.files.heartbeat_at()

    def _on_engine_start(self, engine: Engine) -> None:
        self.checker.engine_starts(engine)

    def disturb_all(self) -> None:
        if self.coordinator is not None:
            self.coordinator.probing.disturb_all()

    def counts_progress(self, incarnation: Incarnation) -> bool:
        return self.plan.pool(incarnation.plan.pool).probe.counter is not None

    def _on_words(self, client: str, words: dict[str, Any]) -> None:
        self.note("words of", client, words)
        self.checker.trainer.words_visible(client, words)
        if self.coordinator is not None:
            self.coordinator.on_words()

    def _on_acks(self, client: str, newest: int) -> None:
        self.checker.trainer.acks_visible(client, newest)
        if self.coordinator is not None:
            self.coordinator.on_words()

    def _lateness_s(self) -> float | None:
        return None if self.time.now < self.files.errors_until else self.files.delay_s

    # ----------------------------------------------------------------------------------------------------- who looks on

    def decided(self, before: RunState, obs: Observation, decision: Decision) -> None:
        self.ticks += 1
        second = int(self.time.now)
        self._ticks_in_second = self._ticks_in_second + 1 if second == self._second else 0
        self._second = second
        if self._ticks_in_second > SPIN:
            raise Broken(10, f"the loop spins: {SPIN} decisions within a second")
        self.checker.decided(before, obs, decision)

    def committed(self, before: RunState, obs: Observation, decision: Decision) -> None:
        for event in decision.events:
            self.note("   ", event)
        for action in decision.actions:
            self.note("   ->", action)
        self.checker.committed(before, obs, decision)
        if self._returns:
            self._bring_back(decision.state)

    def cut_until(self, node: str, group: str, moment: str, after_s: float) -> None:
        """Cut a node off until so long after a moment of the group that was on it; in time for Slurm, in any case."""
        self.cluster.cut(node, NODE_DOWN_S - 10.0)
        self._returns.append((node, group, moment, after_s))

    def _bring_back(self, run: RunState) -> None:
        for entry in list(self._returns):
            node, group, moment, after_s = entry
            g, excluded = run.group(group), bool(run.node(node).excluded)
            come = {
                "stopping": g.phase is Phase.STOPPING and g.stop_sent_at is not None,
                "verdict": excluded,
                "moved": excluded and bool(g.places) and node not in {p.node for p in g.places},
                "starting": excluded and g.phase is Phase.STARTING,
                "pending": g.phase is Phase.PENDING and g.reason is Reason.NO_NODE,
                "ready": excluded and g.phase is Phase.READY,
            }[moment]
            if come:
                self._returns.remove(entry)
                self.time.after(after_s, lambda n=node: self.cluster.rejoin(n))  # type: ignore[misc]

    def _note_use(self, group: str) -> None:
        """Count the time in which a group is offered to the trainer, and works: a hang that nobody saw is lost."""
        number, now = self._serving.get(group), self.time.now
        truth = None if number is None else self.cluster.incarnations.get((group, number))
        useful = truth is not None and truth.works
        if useful and group not in self._ready_since:
            self._ready_since[group] = now
        elif not useful and group in self._ready_since:
            self.ready_s[group] += now - self._ready_since.pop(group)

    def opened(self, term: int) -> None:
        self.checker.opened(term)

    def _on_barrier(self, document: dict[str, Any]) -> None:
        self.checker.wrote(document)
        now = self.time.now
        self._serving = {g["id"]: g["incarnation"] for g in document["groups"] if g["serving"]}
        for group in self.plan.groups:
            self._note_use(group.id)
        self.local.barrier_says(document["pools"])
        for client in self.clients:
            client.barrier_changed()
        if not self.clients or document["groups"] != self._groups_shown:  # words that are heard are nothing to a reader
            self._groups_shown = document["groups"]
            self.time.after(self.chance.between(0.05, 5.0, "poll", len(self.files.versions), now), self._poll)
        if document["phase"] == PoolPhase.FAILED and self._failed_at is None:
            self._failed_at = now
            self._ended |= self.case.stops
            self.first_failed_at = self.first_failed_at or now
            self.note("the fleet failed: the supervisor ends `up`")
            self.time.after(TRAINER_AFTER_FAILURE_S, self._drain)

    def acts(self, coordinator: Coordinator, action: Action, ports: tuple[str, ...] | None) -> None:
        self.checker.acts(coordinator, action, ports)

    def took_over(self, found: RunState, state: RunState, *, another_up: bool) -> None:
        self.checker.took_over(found, state, another_up=another_up)

    # --------------------------------------------------------------------------------------------------- the supervisor

    def start_coordinator(self) -> None:
        if self.cluster.job_ending or self._ended:
            return
        self.terms += 1
        if self.terms == self._first_term:
            self._begin_up()
        term = Term(
            job="1",
            restart_count=self.restart_count,
            number=self.terms,
            first=self._first_term,
            drain=self._failed_at is not None and self.time.now - self._failed_at >= TRAINER_AFTER_FAILURE_S,
            warned=self._warned,
        )
        self.note("coordinator of term", term.number)
        self.unwell_at = self.time.now
        made = Coordinator(self.plan, self.cluster, self.files, self.time, term, self, self._on_end, self.chance)
        self.coordinator = made
        self.time.after(TRAINER_LOOKS_S, self._poll)
        try:
            made.start()
        except OSError:
            made.die()
            self._on_end(made, "killed")

    def _begin_up(self) -> None:
        """As `store.prepare`; and trainers are the children of their `up`, so they end with it."""
        self._ups += 1
        for client in self.clients:
            client.forget_up()
        self.files.clients.forget()
        self.checker.trainer.new_up()
        for client in self.clients:
            after_s = self.chance.between(*CLIENTS_START_S, "client", client.habits.name, self._ups)
            self.start_client(client, after_s)

    def start_client(self, client: Client, after_s: float) -> None:
        """Have it start, unless its `up` is over by then."""
        up = self._ups

        def start() -> None:
            if up == self._ups and not self._up_over and not self.cluster.job_ending:
                client.start()

        self.time.after(after_s, start)

    def _on_end(self, coordinator: Coordinator, how: str) -> None:
        self.note("coordinator of term", coordinator.term.number, how)
        if coordinator is not self.coordinator:
            return
        self.coordinator = None
        self.unwell_at = self.time.now
        if how == "killed":
            now = self.time.now
            self._crashes = [t for t in self._crashes if now - t < 60.0] + [now]
            delay_s = 0.0 if len(self._crashes) == 1 else min(30.0, 0.5 * 2 ** (len(self._crashes) - 2))
            self.time.after(delay_s + COORDINATOR_STARTS_S, self.start_coordinator)
        elif how == "superseded":
            raise Broken(4, "the newest coordinator lost its lease")
        else:
            self._up_ends(how)

    def _up_ends(self, how: str) -> None:
        """The run is drained, or `up` gave up waiting; what is left is killed."""
        for client in self.clients:
            client.kill()
        left = [s for s in self.cluster.steps if s.goes_on and not self.cluster.unreachable(s.key.node)]
        left = [s for s in left if not self.checker.nodes.is_left(s)]
        if how == "drained" and any(s.term == self.checker.lease for s in left):
            raise Broken(6, f"drained, and {left[0].name} lives")
        for step in left:
            self.cluster.slurm_kills(step)
        self._up_over = True
        if self._ended or self.cluster.job_ending:
            return
        if self._warned:
            self.note("the batch script ends, and the job with it")
            self.end_job(requeue=True)
        else:
            self.time.after(NEXT_UP_S, self._next_up)

    def _next_up(self) -> None:
        """Another `up` in the same allocation."""
        if self._up_over and not self._ended:
            self._up_over = False
            self._failed_at = None
            self._first_term = self.terms + 1
            self.start_coordinator()

    def _drain(self) -> None:
        if self._failed_at is not None and self.coordinator is not None:
            self.coordinator.stop_signal = True
            self.coordinator.poke(self.time.now)

    def kill_coordinator(self) -> None:
        if self.coordinator is not None:
            dead = self.coordinator
            dead.die()
            self._on_end(dead, "killed")

    def supersede(self, after_s: float, *, stalled: bool) -> None:
        """Another `up` takes over while the old coordinator is stopped; then that one goes on."""
        old = self.coordinator
        if old is None or old.paused or self._up_over:
            return
        self.unwell_at = self.time.now
        if stalled:
            old.stall_s = after_s + 5.0
        else:
            old.pause(after_s + 5.0)

        def take_over() -> None:
            if self.coordinator is old and old.paused:
                self.note("term", old.term.number, "is stopped, and another coordinator starts")
                self._first_term = self.terms + 1
                old.superseded = True
                self.files.silence()
                self._failed_at = None
                self.start_coordinator()

        self.time.after(after_s, take_over)

    def end_job(self, *, requeue: bool) -> None:
        """Slurm ends the job; perhaps it comes back, on nodes that are empty."""
        if self.cluster.job_ending:
            return
        self.cluster.end_job()
        for client in self.clients:
            client.kill()
        if requeue:
            self.time.after(90.0, self._requeue)

    def limit_job(self, left_s: float, *, warned: bool) -> None:
        """The job has so much time left. Where Slurm warns, the batch script hears of it before."""
        self.cluster.job_ends_at = ends_at = self.time.now + left_s

        def over() -> None:
            if self.cluster.job_ends_at == ends_at and not self.cluster.job_ending:
                self.note("the job's time is up")
                self.end_job(requeue=True)

        def warn() -> None:
            if self.cluster.job_ends_at == ends_at and not self.cluster.job_ending and not self._up_over:
                self.note("Slurm warns of the job's end")
                self._warned = True
                if self.coordinator is not None:
                    self.coordinator.stop_signal = self.coordinator.end_is_near = True
                    self.coordinator.poke(self.time.now)

        self.time.at(ends_at, over)
        if warned:
            self.time.at(ends_at - WARNED_S, warn)

    def _requeue(self) -> None:
        if self.coordinator is not None:
            self.coordinator.die()
            self.coordinator = None
        self.unwell_at = self.time.now
        self.restart_count += 1
        self._first_term = self.terms + 1
        self._failed_at, self._up_over, self._warned = None, False, False
        self.cluster.empty()
        self._trainer = self._new_trainer()
        self._reader_epoch = (0, 0, 0)
        self.start_coordinator()

    def ask(self, verb: str, *groups: str, delay_s: float = 0.0) -> None:
        self._requests += 1
        made = fault_kinds.request(self._requests, verb, groups)
        self.note("operator:", verb, *groups)
        self.files.requests.append((self.time.now + delay_s, made))
        if self.coordinator is not None:
            self.time.after(delay_s + 0.2, self._wake)

    def _wake(self) -> None:
        if self.coordinator is not None:
            self.coordinator.poke(self.time.now)

    def see_files_soon(self) -> None:
        self.files.delay_s = 0.5

    def see_words_soon(self) -> None:
        self.files.clients.delay_s = 0.5

    # ---------------------------------------------------------------------------------------------------------- trainer

    def _new_trainer(self) -> Barrier:
        return Barrier(
            self.files.run.barrier,
            job="1",
            restart_count=self.restart_count,
            clock=lambda: self.time.now,
            sleep=lambda s: None,
            read=self.files.read,
        )

    def _poll(self) -> None:
        """The trainer looks, and uses what it is offered."""
        self._note_health()
        now = self.time.now
        if self.coordinator is not None:
            self.checker.trainer.look(self.coordinator.state, self.unwell_at)
            self.checker.nodes.look(self.unwell_at)
        try:
            state = self._trainer.wait_ready(timeout=0.0)
        except FleetFailed:
            if all(v.document["phase"] not in ("failed", "stopped") for v in self.files.versions):
                raise Broken(9, "a reader was told that the fleet failed, and no file ever said so") from None
            return
        except CoordinatorLost:
            if now - self.unwell_at > 600.0 and self.files.delay_s < 1.0 and now > self.files.errors_until + 300.0:
                raise Broken(9, "a reader was told that the coordinator is lost, and it is well") from None
            return
        except BarrierError:
            return
        stamp = (state.term, state.seq, state.epoch)
        if stamp < self._reader_epoch or state.epoch < self._reader_epoch[2]:
            raise Broken(4, f"a reader saw {self._reader_epoch}, and then {stamp}")
        self._reader_epoch = stamp
        # While the file cannot be read, the last good value is kept for a time of grace.
        stale_s = self._trainer.grace_s if now < self.files.errors_until + self._trainer.grace_s else 0.0
        self.checker.offered(state.groups, state.epoch, now - self.unwell_at, self.files.delay_s + stale_s)

    def _keep_polling(self) -> None:
        self._poll()
        self.time.after(self.chance.between(40.0, 100.0, "look", self.time.now), self._keep_polling)

    def _note_health(self) -> None:
        """Bring up to date when the coordinator was last not able to do its work."""
        now, mine = self.time.now, self.coordinator
        if mine is None or mine.paused or mine.state.suspect_self_since is not None:
            self.unwell_at = now
            return
        bad_until = max(self.files.full_until, self.cluster.batch_host_cut_until)
        self.unwell_at = max(self.unwell_at, mine.resumed_at, min(now, bad_until))

    # ----------------------------------------------------------------------------------------------------------- phases

    def play(self) -> None:
        """Run the case; raises `Broken` where an invariant does not hold."""
        case, time = self.case, self.time
        for fault in case.faults:
            time.at(fault.at, lambda f=fault: self._happen(f))  # type: ignore[misc]
        self._keep_polling()
        self.start_coordinator()
        time.run(case.peace_at)
        if case.stops:
            self._count_ready()
            return
        self._make_peace()
        if self._is_doomed():
            self._says_that_it_failed()
        else:
            self._all_become_ready()
            self._end()

    def _happen(self, fault: Fault) -> None:
        if not self.peace:
            self.note("FAULT", fault)
            self._note_health()
            KINDS[fault.kind].do(self, fault)
            self.time.after(TRAINER_LOOKS_S, self._poll)

    def _make_peace(self) -> None:
        now = self.time.now
        self.note("PEACE: no fault from now on")
        self.peace = True
        cluster = self.cluster
        cluster.slurm_away_until = cluster.slurm_slow_until = cluster.cancels_lost_until = 0.0
        cluster.refuses_launches_until = cluster.batch_host_cut_until = cluster.blind_until = 0.0
        self.files.full_until = self.files.errors_until = 0.0
        self.slow_starts.clear()
        if not cluster.job_ending:
            cluster.job_ends_at = None  # the time limit is raised
        for node in cluster.nodes.values():
            if node.cut:
                cluster.rejoin(node.name)
            node.deaf_until = node.late_until = node.gpu_stuck_until = node.sick_until = 0.0
            node.strangers.clear()
        for step in cluster.steps:
            cluster.relink(step)
        cluster.let_die()
        self.files.clients.delay_s, self.files.clients.half_until = 0.5, 0.0
        for client in self.clients:
            client.behave()
            if not client.alive:
                self.start_client(client, 1.0)
        if self.coordinator is not None:
            self.coordinator.kill_at, self.coordinator.stall_s = None, 0.0
        self.unwell_at = now

    def _all_become_ready(self) -> None:
        """10: within the bound that `plan` prints; what was drained or is failed, after it is asked to come back."""
        time = self.time
        time.run(time.now + 400.0, lambda: self._is_steady() or self._is_doomed())
        if self._is_doomed():  # its nodes are gone, and that is seen only now
            self._says_that_it_failed()
            return
        if self.cluster.job_ending and not self._ended:
            time.run(time.now + 100.0)
        if not self._is_steady():
            raise Broken(11, "no coordinator came back, or the last one does not end")
        assert self.coordinator is not None
        began = time.now
        deadline = began + self._patience_s()
        asked: dict[str, int] = {}
        while time.now < deadline and not self._all_ready():
            time.run(min(time.now + 5.0, deadline))
            if self.coordinator is None:
                continue
            if self.coordinator.state.ending and self._is_doomed():
                self._says_that_it_failed()
                return
            if self.coordinator.state.ending:
                raise Broken(9, "the run ends, and nobody asked for it")
            down = [g.id for g in self.coordinator.state.groups if g.phase in (Phase.FAILED, Phase.STOPPED)]
            # A second time: a failure of before the peace may be seen only now.
            wanted = [g for g in down if not self._is_hopeless(g) and asked.get(g, 0) < 2]
            waiting = any(g.reason is Reason.NO_NODE for g in self.coordinator.state.groups)
            barred = [
                n.name for n in self.coordinator.state.nodes if n.excluded in (Exclusion.DRAINED, Exclusion.FAILING)
            ]
            barred = [n for n in barred if waiting and asked.get(n, 0) < 2 and not self.cluster.nodes[n].lost]
            if barred:
                self.ask("resume", *barred)
                asked.update({n: asked.get(n, 0) + 1 for n in barred})
                deadline = time.now + self._patience_s()
            if wanted:
                self.ask("resume", *wanted)
                asked.update({g: asked.get(g, 0) + 1 for g in wanted})
                deadline = time.now + self._patience_s()
        if not self._all_ready():
            said = [(g.id, g.phase.value, g.message) for g in self.coordinator.state.groups] if self.coordinator else []
            raise Broken(10, f"not ready {time.now - began:.0f} s after the last fault: {said}")

    def _is_steady(self) -> bool:
        mine = self.coordinator
        return mine is not None and not mine.paused and not mine.state.ending and self._failed_at is None

    def _patience_s(self) -> float:
        patience_s = max(self._bound_s(p.name) for p in self.plan.pools)
        if self.coordinator is not None and any(waits_for_time(g) for g in self.coordinator.state.groups):
            patience_s += self.plan.audit_s  # that the limit was raised is seen when the job is asked about
        if self.clients:
            # A group may have to wait for the trainer's next `syncing`; one that hangs is asked perhaps once a cycle.
            failures = max(p.probe.liveness_failure_threshold for p in self.plan.pools)
            patience_s += (failures + 3) * max(c.habits.cycle_s for c in self.clients)
            patience_s += 2 * max((p.probe.pause_max_s for p in self.plan.pools if p.probe.pause_in), default=0.0)
        return patience_s

    def _bound_s(self, pool: str) -> float:
        planned = self.plan.pool(pool)
        bound = recovery_bound(self.plan, planned)
        # A start that cannot succeed any more, because of a fault that was, is given up first.
        doomed = any(
            i.load_s > planned.probe.startup_timeout_s or any(e.frozen or e.half for e in i.engines.values())
            for i in self.cluster.newest.values()
            if i.worked_at is None
        )
        extra_s = bound.start_s + bound.verify_s if doomed else 0.0
        return bound.total_s + bound.backoff_s + extra_s + PEACE_MARGIN_S

    def _is_hopeless(self, group: str) -> bool:
        """Tell whether nodes of it are gone for good, or were taken from it, and there are no others for it."""
        assert self.coordinator is not None
        unused = (Exclusion.DRAINED, Exclusion.FAILING)
        barred = {n.name for n in self.coordinator.state.nodes if n.excluded in unused}
        return self._lacks_nodes(self.coordinator.placed, self.coordinator.state, group, barred)

    def _lacks_nodes(self, placed: FleetPlan, run: RunState, group: str, barred: set[str]) -> bool:
        barred = barred | {n.name for n in self.cluster.nodes.values() if n.lost}
        mine = placed.group(group)
        others = tuple(g for g in placed.groups if not moves.waits_for_a_node(run.group(g.id)))
        usable = {n for n in self.plan.nodes if n not in barred and self._has_room(others, mine, n)}
        needs = [n for n in mine.nodes if n not in usable]
        return len(needs) > len(usable.difference(mine.nodes))

    def _is_doomed(self) -> bool:
        """Tell whether nodes are gone for good, without which a pool cannot come back."""
        if self.files.state is None or not any(n.lost for n in self.cluster.nodes.values()):
            return False
        placed = moves.placed(self.plan, self.files.state)
        return any(
            sum(not self._lacks_nodes(placed, self.files.state, g.id, set()) for g in pool.groups) < pool.min_ready
            for pool in self.plan.pools
        )

    def _says_that_it_failed(self) -> None:
        """9: nobody is left waiting for a fleet whose nodes are gone."""
        self.time.run(self.time.now + self._patience_s(), lambda: self.first_failed_at is not None)
        if self.first_failed_at is None:
            raise Broken(9, "nodes are gone without which a pool cannot come back, and nobody says so")
        self._ended = True
        self._count_ready()

    def _has_room(self, groups: tuple[GroupPlan, ...], mine: GroupPlan, node: str) -> bool:
        others = [g for g in groups if g.id != mine.id and node in g.nodes]
        gpus = {gpu for g in others for m in g.on(node) for gpu in m.gpus}
        shares = mine.shares_nodes and all(g.shares_nodes for g in others)
        return not others or (shares and gpus.isdisjoint(mine.leader.gpus))

    def _all_ready(self) -> bool:
        mine = self.coordinator
        if mine is None:
            return False
        run, hopeless = mine.state, [g.id for g in mine.state.groups if self._is_hopeless(g.id)]
        for pool in self.plan.pools:
            for g in (run.group(planned.id) for planned in pool.groups):
                # A trainer that waits for a pool that cannot come gets no farther.
                waits = hopeless and (pool.restart.when == "at_barrier" or g.phase is Phase.READY)
                if not (waits or g.id in hopeless or serves(pool, run, g)):
                    return False
        return True

    def _end(self) -> None:
        """The run, or the job, ends: nothing is left, nothing is charged."""
        if self._ended:
            return
        assert self.coordinator is not None
        self._ended = True
        mine, ended_at = self.coordinator, self.time.now
        lives = not self.case.job_ends or any(s.srun_lives for s in self.cluster.steps)
        if self.case.job_ends:
            self.note("the job ends")
            self.end_job(requeue=False)
        else:
            mine.stop_signal = True
            mine.poke(self.time.now)
        self.time.run(self.time.now + 120.0, lambda: self.coordinator is None)
        if self.coordinator is not None:
            if lives:
                raise Broken(9, "the run does not end")
            # No step ended, so nobody asked: Slurm ends the batch step after KillWait, and nothing is left behind.
            mine.die()
            self.coordinator = None
        for g in mine.state.groups:
            if max((*g.runtime_failures, *g.start_failures), default=0.0) > ended_at:
                raise Broken(8, f"{g.id} was charged for the end of the job")
        self._count_ready()

    def _count_ready(self) -> None:
        for group, since in self._ready_since.items():
            self.ready_s[group] += self.time.now - since
        self._ready_since.clear()
