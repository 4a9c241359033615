"""What must hold for trainers, whatever happens: weights, holds, GPUs, sleeping engines, and that every word is heard.

12  weights    what serves has, in truth, the pool's version; acknowledgements count once, for what they name
13  holds      nothing is starting when one is granted, nothing starts while it stands, and it ends by itself
14  barrier    no engine starts on GPUs on which the trainer trains, nor without its leave
15  sleep      nothing is asked of an engine that the trainer put to sleep, and no verdict comes right after it
16  echo       what a client says is echoed once it is so, and that does not take for ever
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slurm_rollout.barrier import Group
from slurm_rollout.core.clients import UNCONFIRMED_S
from slurm_rollout.core.model import Ack, ClientState, Decision, GroupState, Launch, Observation, RunState
from slurm_rollout.core.phases import ALIVE, Phase
from slurm_rollout.core.plan import FleetPlan, PoolPlan, ProbePolicy
from slurm_rollout.simulation.broken import Broken
from slurm_rollout.simulation.clock import Timeline
from slurm_rollout.simulation.parts import Incarnation, Step

if TYPE_CHECKING:
    from slurm_rollout.simulation.files import SharedFiles
    from slurm_rollout.simulation.trainer import Client

MARGIN_S = 3.0
ECHO_MARGIN_S = 10.0


@dataclass(slots=True)
class Word:
    """What a client wrote once."""

    seq: int
    phase: str
    hold_s: float
    waiting_s: float
    visible_at: float
    heard_at: float | None = None  # a decision that was written down had it


@dataclass(slots=True)
class Said:
    """All that is known of one client's words and acknowledgements."""

    words: dict[int, Word] = field(default_factory=dict)
    newest: Word | None = None  # that the coordinator can see
    heard: Word | None = None  # that it has heard
    echo: int = 0
    phase: str = ""  # that was echoed last
    phase_since: float = 0.0  # and when first
    acks: int = 0  # visible
    acks_visible_at: float = 0.0
    taken: int = 0  # acknowledgements, by the account of this checker
    clear_since: float = 0.0  # since then nothing was in the way of the newest word


class TrainerChecker:
    """Looks on at every step of one run."""

    def __init__(self, plan: FleetPlan, files: SharedFiles, time: Timeline, clients: Sequence[Client]) -> None:
        self.plan = plan
        self.files = files
        self.time = time
        self.clients = clients
        self._pools: dict[str, PoolPlan] = {g.id: p for p in plan.pools for g in p.groups}
        self._said: dict[str, Said] = {}
        self._unconfirmed: dict[str, float] = {}  # group -> when the coordinator said that it may still be probed
        self._resumed_at: dict[str, float] = {}  # pool -> when its probes went on
        self._paused_at: dict[str, float] = {}
        self._ready_at: dict[tuple[str, int], float] = {}

    def _of(self, client: str) -> Said:
        return self._said.setdefault(client, Said())

    def pool(self, group: str) -> PoolPlan:
        return self._pools[group]

    # ------------------------------------------------------------------------------------------------------- the files'

    def new_up(self) -> None:
        """What was said before is void."""
        for said in self._said.values():
            said.words.clear()
            said.phase = ""
            said.newest = said.heard = None
            said.acks = said.taken
        self._resumed_at.clear()

    def words_visible(self, client: str, data: dict[str, Any]) -> None:
        said, seq = self._of(client), int(data["seq"])
        word = Word(seq, data["phase"], data["hold_s"], data["waiting_s"], self.time.now)
        said.words[seq] = word
        if said.newest is None or said.newest.seq < seq:
            said.newest = word
        if len(said.words) > 200:
            del said.words[min(said.words)]

    def acks_visible(self, client: str, newest: int) -> None:
        said = self._of(client)
        if newest > said.acks:
            said.acks, said.acks_visible_at = newest, self.time.now

    # ------------------------------------------------------------------------------------------------- the truth's side

    def launched(self, step: Step) -> None:
        """13 and 14: what trainers hold and use."""
        pool, now = self._pools[step.key.group], self.time.now
        for client in self.clients:
            if pool.heeds_holds and now < client.holds_until:
                raise Broken(13, f"{step.name} is launched while {client.habits.name} holds")
        self.engine_starts(step)

    def engine_starts(self, step: Step) -> None:
        """14."""
        if self._pools[step.key.group].restart.when == "at_barrier" and any(c.owns_gpus for c in self.clients):
            raise Broken(14, f"{step.name} starts on GPUs on which the trainer trains")

    def asked_asleep(self, incarnation: Incarnation, local: bool) -> None:
        """15."""
        pool = self._pools[incarnation.plan.id]
        if incarnation.disowned or self._is_over(pool.probe):
            return
        # It was announced that this was not certain, or the engine came after the echo. Only an agent is late.
        uncertain_at = max(self._unconfirmed.get(incarnation.plan.id, 0.0), self._ready_at.get(incarnation.id, 0.0))
        if local and uncertain_at >= self._paused_at.get(pool.name, 0.0):
            return
        who = "its agent" if local else "the coordinator"
        raise Broken(15, f"{who} asks {incarnation.plan.id} incarnation {incarnation.number}, which is asleep")

    # --------------------------------------------------------------------------------------------------- the decision's

    def decided(self, before: RunState, obs: Observation, decision: Decision) -> None:
        for action in decision.actions:
            if isinstance(action, Launch) and not action.sweep:
                self._may_start(self._pools[action.group], action.group, obs)

    def _may_start(self, pool: PoolPlan, group: str, obs: Observation) -> None:
        """13 and 14, by what the coordinator could see."""
        words = []
        seen = {c.id: c.seq for c in obs.clients}
        for client, said in self._said.items():
            word = said.words.get(seen.get(client, 0), said.heard)
            newest = word if said.heard is None or word is None or word.seq > said.heard.seq else said.heard
            words += [] if newest is None else [newest]
        if pool.heeds_holds and (held := [w for w in words if w.hold_s and obs.now < self._since(w, obs) + w.hold_s]):
            raise Broken(13, f"{group} is launched, and a hold of {held[0].hold_s:g} s is asked for")
        if pool.restart.when != "at_barrier" or not any(w.phase for w in words):
            return
        waits = [w for w in words if w.waiting_s and obs.now < self._since(w, obs) + w.waiting_s]
        phases = {w.phase for w in words if w not in waits}
        short = any(p["name"] == pool.name and p["phase"] == "waiting" for p in self.files.newest().get("pools", ()))
        if "training" in phases or not ("syncing" in phases or (waits and short)):
            raise Broken(14, f"{group} is launched, and clients say {sorted(phases)}")

    @staticmethod
    def _since(word: Word, obs: Observation) -> float:
        return obs.now if word.heard_at is None else word.heard_at

    def committed(self, before: RunState, obs: Observation, decision: Decision) -> None:
        """12, 13 and what is in the way of an echo."""
        after = decision.state
        for words in obs.clients:
            said = self._of(words.id)
            word = said.words.get(words.seq)
            if word is not None and word.heard_at is None:
                word.heard_at = obs.now
                said.heard = word
        if before.paused != after.paused:
            self._resumed_at.update(dict.fromkeys(set(before.paused) - set(after.paused), obs.now))
            self._paused_at.update(dict.fromkeys(set(after.paused) - set(before.paused), obs.now))
        for event in decision.events:
            if event.type == "ready":
                self._ready_at[event.group, event.incarnation] = obs.now
            elif event.type == "probes" and event.reason == "unconfirmed":
                self._unconfirmed.update({g.id: obs.now for g in after.groups if g.id in event.message})
        if before.clients != after.clients:
            self._holds(before, after)
        if before.clients != after.clients or before.groups != after.groups:
            self._weights(before, after, obs)
        for client in after.clients:
            said = self._of(client.id)
            if said.newest is None or self._in_the_way(said.newest, after):
                said.clear_since = obs.now
            self._ends_by_itself(client, obs.now)

    def _ends_by_itself(self, client: ClientState, now: float) -> None:
        word = self._of(client.id).heard
        if word is None or word.heard_at is None:
            return
        said_s = now - word.heard_at - 1e-6  # a rounding error is not too long
        if client.hold_s and said_s >= word.hold_s:
            raise Broken(13, f"the hold of {client.id} goes on after its {word.hold_s:g} s")
        if client.waiting_s and said_s >= word.waiting_s:
            raise Broken(14, f"{client.id} counts as waiting after its {word.waiting_s:g} s")

    def _holds(self, before: RunState, after: RunState) -> None:
        granted = {c.id for c in before.clients if c.hold}
        starting = [g.id for g in after.groups if g.phase is Phase.STARTING and self._pools[g.id].heeds_holds]
        for client in after.clients:
            if client.hold and client.id not in granted and starting:
                raise Broken(13, f"a hold of {client.id} is granted while {', '.join(starting)} starts")

    def _in_the_way(self, word: Word, run: RunState) -> bool:
        starting = [self._pools[g.id] for g in run.groups if g.phase is Phase.STARTING]
        return (word.hold_s > 0 and any(p.heeds_holds for p in starting)) or (
            word.phase == "training" and any(p.restart.when == "at_barrier" for p in starting)
        )

    def _weights(self, before: RunState, after: RunState, obs: Observation) -> None:
        """12: every change of a version has its acknowledgement, and every acknowledgement is taken in once."""
        taken = self._taken(before, after, obs)
        named = {(g, n, ack.version) for ack in taken for g, n in ack.groups}
        back = {self._pools[g].name for ack in taken if ack.rollback for g, _ in ack.groups}
        for old, new in zip(before.groups, after.groups, strict=True):
            if new.weights_version == old.weights_version and new.incarnation == old.incarnation:
                continue
            self._explain(old, new, named, back)
        for pool in self.plan.pools:
            old_target, target = before.targets.get(pool.name), after.targets.get(pool.name)
            if target == old_target:
                continue
            if target is None or target not in {v for g, _, v in named if self._pools[g] is pool}:
                raise Broken(12, f"pool {pool.name}: version {old_target} -> {target}, and nobody said so")
            if old_target is not None and target < old_target and pool.name not in back:
                raise Broken(12, f"pool {pool.name}: version {old_target} -> {target} without a rollback")

    def _taken(self, before: RunState, after: RunState, obs: Observation) -> list[Ack]:
        known, found = {c.id: c.acks for c in before.clients}, []
        for client in after.clients:
            old, said = known.get(client.id, 0), self._of(client.id)
            if client.acks == old:
                continue
            for words in obs.clients:
                if words.id == client.id:
                    found += [a for a in words.acks if old < a.n <= client.acks]
            if old < said.taken:
                raise Broken(12, f"acknowledgement {old + 1} of {client.id} is taken in again")
            said.taken = client.acks
        return found

    @staticmethod
    def _explain(old: GroupState, new: GroupState, named: set[tuple[str, int, int]], back: set[str]) -> None:
        if new.weights_version is None:
            if new.incarnation == old.incarnation and new.id.rpartition("/")[0] not in back:
                raise Broken(12, f"{new.id} lost version {old.weights_version}")
        elif new.incarnation != old.incarnation:
            raise Broken(12, f"{new.id} incarnation {new.incarnation} begins with version {new.weights_version}")
        elif (new.id, new.incarnation, new.weights_version) not in named:
            raise Broken(12, f"{new.id} has version {new.weights_version}, and no acknowledgement names it")
        elif old.phase not in ALIVE:
            raise Broken(12, f"{new.id} has version {new.weights_version}, and was {old.phase}")

    def convicts(self, truth: Incarnation) -> None:
        """15: it is ended because it does not answer. One that hangs was not put to sleep: it cannot be told to."""
        pool, who = self._pools[truth.plan.id], f"{truth.plan.id} incarnation {truth.number}"
        if truth.disowned:
            return
        awake_s, resumed_at = self.time.now - truth.woke_at, self._resumed_at.get(pool.name, float("-inf"))
        if truth.asleep and resumed_at < truth.slept_at:
            raise Broken(15, f"{who} is restarted because it does not answer, and it sleeps")
        if awake_s < pool.probe.liveness_period_s and resumed_at >= truth.woke_at:
            raise Broken(15, f"{who} is restarted because it does not answer, and woke up {awake_s:.0f} s ago")

    def _is_over(self, policy: ProbePolicy) -> bool:
        """Tell whether a pause lasts for longer than one may: that it ends then is documented."""
        said = [s for s in self._said.values() if s.phase in policy.pause_in]
        return not any(self.time.now < s.phase_since + policy.pause_max_s for s in said)

    def probed_s(self, group: str) -> float:
        """Return for how long its probes have gone on; 0 while they are paused."""
        pool = self._pools[group]
        for entry in self.files.newest().get("pools", ()):
            if entry["name"] == pool.name and entry["probes"] == "paused":
                return 0.0
        return self.time.now - self._resumed_at.get(pool.name, float("-inf")) - pool.probe.liveness_period_s

    # ----------------------------------------------------------------------------------------------------- the writer's

    def wrote(self, document: dict[str, Any]) -> None:
        """12, 14 and 16, as the file has it."""
        targets = {p["name"]: p["weights_version"] for p in document["pools"]}
        for group in document["groups"]:
            if group["serving"]:
                self._serves(group, targets[self._pools[group["id"]].name])
        starting = [g["id"] for g in document["groups"] if g["phase"] == Phase.STARTING]
        for name, client in document["clients"].items():
            said = self._of(name)
            if client["seq"] > said.echo:
                self._echoed(name, said.words.get(client["seq"]), client, document, starting)
            said.echo = client["seq"]

    def _serves(self, group: dict[str, Any], target: int | None) -> None:
        pool, who = self._pools[group["id"]], f"{group['id']} incarnation {group['incarnation']}"
        if not pool.is_trained:
            if group["weights"] != "none":
                raise Broken(12, f"{who} is of a frozen pool, and its weights are {group['weights']}")
            return
        if group["weights"] != "current" or target is None or group["weights_version"] != target:
            raise Broken(12, f"{who} serves with version {group['weights_version']}, the pool is at {target}")
        self._has(group["id"], group["incarnation"], target)

    def _has(self, group: str, number: int, version: int) -> None:
        """The truth: the version was pushed into it and, where the trainer's last word of it was heard, is in it."""
        trainer = next((c for c in self.clients if c.habits.trains), None)
        truth = self._incarnation(group, number)
        if trainer is None or truth is None:
            return
        if version not in {w.version for w in truth.pushed}:
            raise Broken(
                12, f"{group} incarnation {number} serves as version {version}, which was never pushed into it"
            )
        if not truth.unsettled and truth.weights != trainer.weights_of(version):
            raise Broken(12, f"{group} incarnation {number} serves as version {version}, and has {truth.weights}")

    def _incarnation(self, group: str, number: int) -> Incarnation | None:
        return next((c.fleet.cluster.incarnations.get((group, number)) for c in self.clients), None)

    def _echoed(
        self, name: str, word: Word | None, client: dict[str, Any], document: dict[str, Any], starting: list[str]
    ) -> None:
        if word is None:
            return
        said = self._of(name)
        if word.phase != said.phase:
            said.phase, said.phase_since = word.phase, self.time.now
        if word.phase == "training":
            for group in starting:
                if self._pools[group].restart.when == "at_barrier":
                    raise Broken(14, f"`training` of {name} is echoed, and {group} is starting")
        expired = word.heard_at is not None and self.time.now >= word.heard_at + word.hold_s - 1e-6
        if word.hold_s and not client["hold"] and not expired:
            raise Broken(16, f"word {word.seq} of {name} is echoed, and the hold that it asks for is not granted")
        for pool in document["pools"]:
            policy = self.plan.pool(pool["name"]).probe
            pauses = word.phase in policy.pause_in and self.time.now < said.phase_since + policy.pause_max_s
            if pauses and pool["probes"] != "paused":
                raise Broken(16, f"word {word.seq} of {name} is echoed, and the probes of {pool['name']} go on")

    def took_over(self, found: RunState, state: RunState, *, another_up: bool) -> None:
        """12 and 16: what was pushed and what was heard is not forgotten."""
        if state.targets != found.targets:
            raise Broken(12, f"takeover: versions {found.targets} -> {state.targets}")
        after = {c.id: c for c in state.clients}
        for client in found.clients:
            other = after.get(client.id)
            if other is None or (other.acks, other.echo) != (client.acks, client.echo):
                raise Broken(12, f"takeover: what {client.id} said is forgotten: {client} -> {other}")
            if not another_up and other != client:
                raise Broken(16, f"takeover: {client} -> {other}")
            if another_up and (other.hold_s or other.phase):
                raise Broken(16, f"another up: {client.id} still says {other}")

    def offered(self, groups: Sequence[Group]) -> None:
        """12, from a reader's side, who may see it late."""
        for group in groups:
            if group.serving and self._pools[group.id].is_trained:
                truth = self._incarnation(group.id, group.incarnation)
                if truth is not None and group.weights_version not in {w.version for w in truth.pushed}:
                    raise Broken(
                        12, f"{group.id} is offered with version {group.weights_version}, it has {truth.weights}"
                    )

    # ---------------------------------------------------------------------------------------------------- as time goes

    def look(self, run: RunState, unwell_at: float) -> None:
        """16: with a coordinator that is well and nothing in the way, a word is echoed before long."""
        now, known = self.time.now, {c.id: c for c in run.clients}
        for name, said in self._said.items():
            client, word = known.get(name), said.newest
            taken = 0 if client is None else client.acks
            if taken < said.acks and now - max(said.acks_visible_at, unwell_at) > ECHO_MARGIN_S:
                raise Broken(16, f"acknowledgement {said.acks} of {name} is not taken in")
            if word is None or (client is not None and client.echo >= word.seq):
                continue
            if self._in_the_way(word, run):
                said.clear_since = now
            limit_s = max(p.probe.liveness_timeout_s for p in self.plan.pools) + UNCONFIRMED_S + ECHO_MARGIN_S
            since = max(word.visible_at, said.clear_since, unwell_at)
            if now - since > limit_s:
                raise Broken(16, f"word {word.seq} of {name} is not echoed for {now - since:.0f} s: {word}")
