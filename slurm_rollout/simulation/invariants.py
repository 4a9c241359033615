"""What must hold whatever happens: the truth of the cluster and the files, held against what was decided.

The checker sees both sides. It never asks why the code did something, only whether it may: a launch beside a living
process, a URL of a dead incarnation, a restart of an engine that was well, a budget that does not add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slurm_rollout.core.bounds import recovery_bound
from slurm_rollout.core.failure_classes import FailureClass
from slurm_rollout.core.group import BLIND_ECHO_S
from slurm_rollout.core.model import (
    Action,
    Cancel,
    CancelLost,
    Decision,
    Event,
    Go,
    GroupState,
    Launch,
    Observation,
    RunState,
    Stop,
)
from slurm_rollout.core.phases import ALIVE, Phase, PoolPhase, Reason
from slurm_rollout.core.plan import FleetPlan, PoolPlan
from slurm_rollout.simulation.broken import Broken
from slurm_rollout.simulation.clock import Timeline
from slurm_rollout.simulation.cluster import Cluster
from slurm_rollout.simulation.node_invariants import NodeChecker
from slurm_rollout.simulation.parts import Engine, Step
from slurm_rollout.simulation.trainer_invariants import TrainerChecker
from slurm_rollout.steps import LAUNCH_S

if TYPE_CHECKING:
    from slurm_rollout.simulation.coordinator import Coordinator
    from slurm_rollout.simulation.files import SharedFiles
    from slurm_rollout.simulation.trainer import Client

HANGS = frozenset({Reason.NOT_ANSWERING, Reason.ANSWERS_ERROR})
UNCHARGED = frozenset({Reason.TAKEOVER, Reason.LAUNCH_FAILED, Reason.SELF_FENCED})
MARGIN_S = 3.0


@dataclass(slots=True)
class Ledger:
    """What was seen of one group's failures, apart from what its own state says."""

    runtime: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    pending: tuple[str, float] | None = None  # a failure that its next launch will be charged for
    at_job_end: tuple[tuple[float, ...], tuple[float, ...]] | None = None


_Sets = tuple[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]]
"""(group, incarnation) of those that are alive, and of those that serve."""


def _sets(groups: Iterable[tuple[str, int, bool, bool]]) -> _Sets:
    known = tuple(groups)
    return tuple((g, n) for g, n, alive, _ in known if alive), tuple((g, n) for g, n, _, serves in known if serves)


class Checker:
    """Looks on at every step of one run."""

    def __init__(
        self, plan: FleetPlan, cluster: Cluster, files: SharedFiles, time: Timeline, clients: Sequence[Client]
    ) -> None:
        self.plan = plan
        self.trainer = TrainerChecker(plan, files, time, clients)
        self.nodes = NodeChecker(plan, cluster, time)
        self.cluster = cluster
        self.files = files
        self.time = time
        self.lease = 0  # the newest term that opened its store
        self.epoch = 0
        self.recoveries: list[tuple[str, float, str]] = []  # pool, seconds, reason
        self.failures: dict[str, int] = {}
        self.spent: dict[str, tuple[int, int]] = {}
        self._policies: dict[str, PoolPlan] = {g.id: p for p in plan.pools for g in p.groups}
        self._ledgers = {g.id: Ledger() for g in plan.groups}
        self._stood_for: dict[int, _Sets] = {0: ((), ())}
        self._changed: dict[str, tuple[int, int]] = {}  # group -> incarnation that is alive or 0, since which epoch
        self._launched: set[tuple[str, int, str]] = set()
        self._sights: dict[str, float] = {}
        self._last_start_s: dict[str, float] = {}  # group -> from launch to ready
        self._fastest_s: dict[str, float] = {}  # pool -> of all its starts so far
        self._bounds = {p.name: recovery_bound(plan, p) for p in plan.pools}

    # ------------------------------------------------------------------------------------------------- the truth's side

    def launched(self, step: Step) -> None:
        """2 and 11: nothing of the group lives, nothing is started twice."""
        key, now = step.key, self.time.now
        holds_lease = step.term == self.lease
        if holds_lease:
            self._are_not_too_many()
        if not key.sweep:
            who = (key.group, key.incarnation, key.node)
            if who in self._launched:
                raise Broken(11, f"{step.name} was started twice")
            self._launched.add(who)
        if not holds_lease:
            return  # a deed that was journalled before the takeover; the agents' claims and fences end it
        for other in self.cluster.steps:
            if other is step or other.key.group != key.group or self.nodes.is_left(other):
                continue
            same = other.key.incarnation == key.incarnation and other.key.sweep == key.sweep
            if other.goes_on and not same and other.term == self.lease and not other.key.sweep:
                raise Broken(2, f"{step.name} is launched while {other.name} lives")
        if key.sweep:
            return
        self.trainer.launched(step)
        self.nodes.launched(step)
        for member in step.plan.members:
            ports = set(member.ports.values())
            node = self.cluster.nodes[member.node]
            for engine in node.engines:
                older = engine.incarnation.plan.id == key.group and engine.incarnation.number < key.incarnation
                looked_at = now - MARGIN_S
                seen = not self._is_away(node.name) and looked_at > max(node.back_at, self.cluster.batch_host_cut_until)
                if older and engine.listens and seen and set(engine.member.ports.values()) & ports:
                    raise Broken(
                        2,
                        f"{step.name} is launched while a port of incarnation {engine.incarnation.number} still "
                        f"accepts connections on {node.name}",
                    )

    def _are_not_too_many(self) -> None:
        """18: no more sruns than allowed ask Slurm for their steps at once."""
        now, limit = self.time.now, self.plan.slurm.max_launching
        asking = [
            s
            for s in self.cluster.steps
            if s.term == self.lease and s.srun_lives and not s.reports and now - s.launched_at < LAUNCH_S
        ]
        if len(asking) > limit:
            raise Broken(
                18, f"{len(asking)} sruns wait for their steps at once, {limit} are allowed: {asking[-1].name}"
            )

    def engine_starts(self, engine: Engine) -> None:
        """1 and 2: only one incarnation has engines, and they start after every node was fenced."""
        mine = engine.incarnation
        if (step := mine.steps.get(engine.member.node)) is not None and step.term == self.lease:
            self.trainer.engine_starts(step)
            self.nodes.engine_starts(engine)
        unfenced = [n for n in mine.plan.nodes if mine.steps.get(n) is None or not mine.steps[n].was_fenced]
        if unfenced:
            raise Broken(2, f"{mine.id} rank {engine.member.rank} starts, but {unfenced} are not fenced")
        for node in self.cluster.nodes.values():
            for other in node.engines:
                if other.incarnation is not mine and other.incarnation.plan.id == mine.plan.id:
                    held = other.incarnation.steps.get(node.name)
                    if held is not None and (self.nodes.is_left(held) or self._is_beyond(held)):
                        continue
                    # Its group left the node, and what outlived its step there nobody can know of.
                    if (held is None or not held.goes_on) and node.name not in mine.plan.nodes:
                        continue
                    raise Broken(
                        1, f"{mine.id} starts, and incarnation {other.incarnation.number} lives on {node.name}"
                    )

    def _is_beyond(self, step: Step) -> bool:
        """Tell whether it is on a node that is away, and none of this coordinator's, or forgotten by Slurm."""
        return self._is_away(step.key.node) and (step.term != self.lease or not step.goes_on)

    def _is_away(self, name: str) -> bool:
        node = self.cluster.nodes[name]
        return node.cut or node.lost

    # --------------------------------------------------------------------------------------------------- the decision's

    def decided(self, before: RunState, obs: Observation, decision: Decision) -> None:
        after = decision.state
        if after.epoch < before.epoch or after.term != before.term:
            raise Broken(4, f"epoch {before.epoch} -> {after.epoch}, term {before.term} -> {after.term}")
        sets = (before.alive, before.serving), (after.alive, after.serving)
        if (after.epoch != before.epoch) is not (sets[0] != sets[1]):
            raise Broken(4, f"epoch {before.epoch} -> {after.epoch} while {sets[0]} -> {sets[1]}")
        if decision.wake_at is not None and decision.wake_at < obs.now:  # a rounding error is no spin
            raise Broken(10, f"asks to be woken at {decision.wake_at:.3f}, and it is {obs.now:.3f}")
        for action in decision.actions:
            if isinstance(action, Launch):
                if before.ending:
                    raise Broken(8, f"{action.group} is launched while the run ends")
                seen = obs.group(action.group)
                if seen is None or seen.ports_open is None:
                    raise Broken(7, f"{action.group} is launched, and nobody looked at its ports")
        self.trainer.decided(before, obs, decision)
        self.nodes.decided(decision)

    def committed(self, before: RunState, obs: Observation, decision: Decision) -> None:
        """It is written down, so it is so."""
        self.trainer.committed(before, obs, decision)
        self.nodes.committed(before, obs, decision)
        for old, new in zip(before.groups, decision.state.groups, strict=True):
            if old.phase is not new.phase and new.phase in (Phase.FAILED, Phase.STOPPED):
                self._rests(new)
        if not decision.events:
            return
        self._says_that_time_is_short(decision.state)
        for old, new in zip(before.groups, decision.state.groups, strict=True):
            if new.incarnation not in (old.incarnation, old.incarnation + 1):
                raise Broken(11, f"{old.id}: incarnation {old.incarnation} -> {new.incarnation}")
            self._book(old, new, obs, decision)

    def _says_that_time_is_short(self, run: RunState) -> None:
        """18: a trainer hears of it when too few groups can be ready before the job ends."""
        for pool in self.plan.pools:
            groups = [run.group(g.id) for g in pool.groups]
            late = sum(g.phase is Phase.BACKOFF and g.reason is Reason.TIME_LEFT for g in groups)
            if late and len(groups) - late < pool.min_ready and run.phase not in (PoolPhase.STOPPED, PoolPhase.FAILED):
                raise Broken(
                    18, f"{late} groups of {pool.name} do not start for want of time, and the run is {run.phase}"
                )

    def _rests(self, g: GroupState) -> None:
        """6: what has failed or was drained left nothing behind."""
        for step in self.cluster.steps:
            mine = step.key.group == g.id and step.term == self.lease and step.goes_on
            if mine and not self._is_away(step.key.node) and not self.nodes.is_left(step):
                raise Broken(6, f"{g.id} is {g.phase}, and {step.name} lives")

    def _book(self, old: GroupState, new: GroupState, obs: Observation, decision: Decision) -> None:
        policy = self._policies[new.id].restart
        ledger, now = self._ledgers[new.id], obs.now
        if old.phase in (Phase.FAILED, Phase.STOPPED) and new.phase not in (Phase.FAILED, Phase.STOPPED):
            self._ledgers[new.id] = ledger = Ledger()
        excused = (
            new.failure is not None
            and new.failure.reason is Reason.LAUNCH_FAILED
            and obs.listing_failed_at is not None
            and obs.listing_failed_at >= new.failure.at - BLIND_ECHO_S
        )
        if old.phase is Phase.STOPPING and new.phase is not Phase.STOPPING and excused:
            ledger.pending = None
        if new.node_failures > old.node_failures:  # nor what failed there before that was known
            ledger.pending = None
            ledger.start = [t for t in ledger.start if t in new.start_failures]
        for event in decision.events:
            if event.group != new.id:
                continue
            if event.type == "failure":
                assert new.failure is not None
                if ledger.pending is not None:
                    self._charge(ledger)
                self.failures[event.reason] = self.failures.get(event.reason, 0) + 1
                self._justify(old, event)
                booked = now in new.runtime_failures or now in new.start_failures
                charged = new.charge is not None or new.goes_to is Phase.FAILED or booked
                kind = "start" if new.failure.startup else "runtime"
                full = new.failure.kind is FailureClass.DISK_FULL
                if full and charged:
                    raise Broken(8, f"{new.id} is charged for a full disk")
                lost = new.node_failures > old.node_failures
                if charged and new.failure.reason is Reason.SELF_FENCED:
                    raise Broken(8, f"{new.id} is charged for the coordinator's silence")
                if not (charged or full or lost) and new.failure.reason not in UNCHARGED:
                    raise Broken(8, f"{new.id}: {event.reason} is not charged")
                ledger.pending = (kind, now) if charged else None
                if new.goes_to is Phase.FAILED:
                    self._is_spent(new, ledger, kind)
            elif event.type == "launching":
                lost = new.failure is not None and new.failure.reason is Reason.NODE_LOST
                if lost and new.failure.at in (*new.runtime_failures, *new.start_failures):  # type: ignore[union-attr]
                    raise Broken(8, f"{new.id} was charged for a lost node")
                if ledger.pending is not None:
                    self._charge(ledger)
                self._may_launch(new, ledger, policy)
                self._is_in_time(new, obs)
            elif event.type == "waiting" and event.reason == Reason.TIME_LEFT:
                self._lacks_time(new, obs)
            elif event.type == "failed":
                ledger.pending = None
            if event.type == "ready" and old.phase is Phase.STARTING:
                self._note_start(new)
            if event.type == "ready" and old.phase is Phase.STARTING and new.marks.seen_at is not None:
                took_s = now - new.marks.seen_at
                why = new.failure.reason if new.failure is not None else ""
                self.recoveries.append((self._policies[new.id].name, took_s, why))
        if new.reason is Reason.OPERATOR and old.phase is not new.phase:
            ledger.pending = None
        if old.phase is Phase.STOPPING and new.phase is Phase.DRAINING:
            ledger.pending = None

    def _note_start(self, g: GroupState) -> None:
        truth = self.cluster.incarnations[g.id, g.incarnation]
        took_s = self.time.now - min(s.launched_at for s in truth.steps.values())
        pool = self._policies[g.id].name
        self._last_start_s[g.id] = took_s
        self._fastest_s[pool] = min(took_s, self._fastest_s.get(pool, took_s))

    def _is_in_time(self, g: GroupState, obs: Observation) -> None:
        """18: what is started can be of use before the job ends, as far as anybody knows."""
        pool = self._policies[g.id]
        fastest_s = self._fastest_s.get(pool.name)
        if obs.job_ends_at is None or fastest_s is None:
            return
        left_s = obs.job_ends_at - obs.now
        if left_s < fastest_s + pool.restart.end_margin_s - MARGIN_S:
            raise Broken(
                18, f"{g.id} is started {left_s:.0f} s before the job ends; no start took below {fastest_s:.0f} s"
            )

    def _lacks_time(self, g: GroupState, obs: Observation) -> None:
        """18: nothing waits for time that there is."""
        pool = self._policies[g.id]
        if obs.job_ends_at is None:
            raise Broken(18, f"{g.id} does not start for want of time, and the job has no end")
        known = [self._last_start_s[m.id] for m in pool.groups if m.id in self._last_start_s]
        left_s = obs.job_ends_at - obs.now
        if known and left_s > min(known) + pool.restart.end_margin_s + MARGIN_S:
            raise Broken(
                18, f"{g.id} does not start {left_s:.0f} s before the job ends; a start took {min(known):.0f} s"
            )

    @staticmethod
    def _charge(ledger: Ledger) -> None:
        assert ledger.pending is not None
        kind, at = ledger.pending
        (ledger.start if kind == "start" else ledger.runtime).append(at)
        ledger.pending = None

    def _is_spent(self, g: GroupState, ledger: Ledger, kind: str) -> None:
        policy, now = self._policies[g.id].restart, self.time.now
        times, limit = (
            (ledger.start, policy.max_start_failures) if kind == "start" else (ledger.runtime, policy.max_restarts)
        )
        spent = [t for t in times if now - t < policy.window_s]
        if len(spent) < limit:
            raise Broken(8, f"{g.id} is given up with {len(spent)} of {limit} restarts spent")

    def _may_launch(self, g: GroupState, ledger: Ledger, policy: Any) -> None:
        now, counted = self.time.now, list[int]()
        for kind, times, limit in (
            ("run-time failures", ledger.runtime, policy.max_restarts),
            ("start-up failures", ledger.start, policy.max_start_failures),
        ):
            recent = [t for t in times if now - t < policy.window_s]
            counted.append(len(recent))
            if len(recent) > limit:
                raise Broken(8, f"{g.id} is launched after {len(recent)} {kind}, {limit} are allowed")
        before = self.spent.get(g.id, (0, 0))
        self.spent[g.id] = max(before[0], counted[0]), max(before[1], counted[1])
        if self.cluster.job_ending and not any(s.srun_lives and s.key.group != g.id for s in self.cluster.steps):
            ended_at = self.cluster.job_ended_at
            if now - ended_at > MARGIN_S and g.marks.seen_at is not None and g.marks.seen_at >= ended_at:
                raise Broken(8, f"{g.id} is launched although the job ends")

    def _justify(self, old: GroupState, event: Event) -> None:
        """0: an engine that was well may not be ended by a verdict of ours."""
        reason = Reason(event.reason)
        truth = self.cluster.incarnations.get((old.id, old.incarnation))
        if truth is None:
            return
        could_hear = self.time.now - max(n.deaf_until for n in self.cluster.nodes.values()) > MARGIN_S
        waiting = not truth.engines and all(s.was_fenced for s in truth.steps.values())
        if reason is Reason.START_TIMEOUT and waiting and could_hear:
            raise Broken(10, f"{old.id} incarnation {old.incarnation}: nobody told its agents to go")
        if old.phase not in ALIVE:
            return
        probe = self._policies[old.id].probe
        span_s = self._bounds[self._policies[old.id].name].detect_s + probe.liveness_timeout_s + MARGIN_S
        hurt = max(truth.hurt_at.values(), default=0.0)
        if reason in HANGS:
            self.trainer.convicts(truth)
            broken = not truth.works or self.time.now - truth.changed_at < span_s
            broken |= truth.asleep or self.time.now - truth.woke_at < span_s
            node = any(self._is_away(n) or self.time.now - self.cluster.nodes[n].back_at < span_s for n in truth.steps)
            refuses = truth.refuses_until > self.time.now - span_s
            if not (broken or node or refuses):
                raise Broken(0, f"{old.id} incarnation {old.incarnation} was well, and is restarted: {event.message}")
        elif not truth.hurt_at or (truth.works and self.time.now - hurt > 3600.0):
            raise Broken(0, f"{old.id} incarnation {old.incarnation} was well, and is restarted: {event.message}")

    # ----------------------------------------------------------------------------------------------------- the writer's

    def opened(self, term: int) -> None:
        if term <= self.lease:
            raise Broken(4, f"term {term} opens after term {self.lease}")
        self.lease = term

    def wrote(self, document: dict[str, Any]) -> None:
        """3, 4 and 9: what the file says is proved, and numbers only grow."""
        if document["term"] != self.lease:
            raise Broken(4, f"term {document['term']} writes, and term {self.lease} has taken over")
        epoch = int(document["epoch"])
        for group in document["groups"]:
            if group["urls"] or group["serving"]:
                self._is_proved(group)
                self.nodes.wrote(group)
            if group["serving"] and not group["urls"]:
                raise Broken(3, f"{group['id']} serves, and has no URL")
            self._has_changed(group, epoch)
        if epoch < self.epoch:
            raise Broken(4, f"epoch {self.epoch} -> {epoch} in the file")
        sets = _sets((g["id"], g["incarnation"], bool(g["urls"]), g["serving"]) for g in document["groups"])
        known = self._stood_for.setdefault(epoch, sets)
        if known != sets:
            raise Broken(4, f"epoch {epoch} stood for {known}, and now for {sets}")
        self.epoch = epoch
        self.trainer.wrote(document)
        for pool in self.plan.pools:
            possible = sum(
                g["phase"] != Phase.FAILED for g in document["groups"] if g["id"].startswith(pool.name + "/")
            )
            if possible < pool.min_ready and document["phase"] != PoolPhase.FAILED:
                raise Broken(9, f"{pool.name} cannot come back, and the barrier says {document['phase']}")

    def _has_changed(self, group: dict[str, Any], epoch: int) -> None:
        """4: `changed` is the epoch in which an incarnation last came or went."""
        alive, changed = group["incarnation"] if group["urls"] else 0, group["changed"]
        was, since = self._changed.get(group["id"], (0, 0))
        if not (self.epoch < changed <= epoch if alive != was else changed == since):
            raise Broken(
                4,
                f"{group['id']}: incarnation {was or 'none'} in epoch {self.epoch}, {alive or 'none'} in {epoch}, "
                f"and its `changed` goes from {since} to {changed}",
            )
        self._changed[group["id"]] = alive, changed

    def _is_proved(self, group: dict[str, Any]) -> None:
        truth = self.cluster.incarnations.get((group["id"], group["incarnation"]))
        wanted = {m.rank for m in self.plan.group(group["id"]).entrypoints}
        if truth is None or not wanted <= truth.proved:
            raise Broken(3, f"{group['id']} incarnation {group['incarnation']} is in the barrier, and is not proved")

    def acts(self, coordinator: Coordinator, action: Action, ports: tuple[str, ...] | None) -> None:
        """3 and 7: URLs leave the file first; nothing starts that could not be written down."""
        if isinstance(action, Launch) and coordinator.journal.blocked:
            raise Broken(7, f"{action.group} is launched, and the barrier cannot be written")
        if isinstance(action, Go | CancelLost):
            return
        stale = coordinator.term.number != self.lease
        if stale and not coordinator.late_deeds:
            raise Broken(4, f"term {coordinator.term.number} acts, and term {self.lease} has taken over")
        if stale or coordinator.journal.blocked or (isinstance(action, Launch) and action.sweep):
            return
        if isinstance(action, Stop | Cancel | Launch):
            for group in self.files.newest().get("groups", ()):
                if group["id"] == action.group and (group["urls"] or group["serving"]):
                    raise Broken(3, f"{action.group}: {type(action).__name__} while its URLs are in the barrier")

    def took_over(self, found: RunState, state: RunState, *, another_up: bool) -> None:
        """4 and 11: a takeover goes on."""
        if state.epoch < found.epoch or state.term <= found.term:
            raise Broken(4, f"takeover: epoch {found.epoch} -> {state.epoch}, term {found.term} -> {state.term}")
        self.trainer.took_over(found, state, another_up=another_up)
        self.nodes.took_over(found, state)
        for g in found.groups:
            after = state.group(g.id)
            if after.incarnation < g.incarnation:
                raise Broken(11, f"takeover: {g.id} incarnation {g.incarnation} -> {after.incarnation}")
            if after.start_s is None:
                self._last_start_s.pop(g.id, None)
            if another_up and after.phase is Phase.PENDING:  # it begins anew, its budget too
                self._ledgers[g.id] = Ledger()
            elif (after.runtime_failures, after.start_failures) != (g.runtime_failures, g.start_failures):
                raise Broken(8, f"takeover: {g.id} has another budget than before")

    # ----------------------------------------------------------------------------------------------------- the reader's

    def offered(self, groups: tuple[Any, ...], epoch: int, well_s: float, delay_s: float) -> None:
        """3, from the trainer's side: what it is offered was proved, and is not long dead."""
        sets = _sets((g.id, g.incarnation, bool(g.urls), g.serving) for g in groups)
        known = self._stood_for.get(epoch)
        if known is not None and known != sets:
            raise Broken(4, f"a reader sees epoch {epoch} with {sets}; it stands for {known}")
        self.trainer.offered(groups)
        for group in groups:
            if not group.serving:
                continue
            self._is_proved({"id": group.id, "incarnation": group.incarnation})
            truth = self.cluster.incarnations[group.id, group.incarnation]
            if truth.works or any(self._is_away(n) for n in truth.steps):
                continue
            bound = self._bounds[self._policies[group.id].name]
            limit_s = bound.detect_s + self._policies[group.id].probe.liveness_timeout_s + delay_s + MARGIN_S
            ends = [s.ended_at for s in truth.steps.values() if s.ended_at is not None]
            if ends and self.time.now - min(ends) > bound.crash_detect_s + delay_s + MARGIN_S < well_s:
                raise Broken(3, f"{group.id} incarnation {group.incarnation} is offered, and its srun has ended")
            if min(well_s, self.trainer.probed_s(group.id), self.time.now - truth.changed_at) > limit_s:
                raise Broken(
                    3,
                    f"{group.id} incarnation {group.incarnation} is offered, and is dead for "
                    f"{self.time.now - truth.changed_at:.0f} s",
                )
