"""Probes on virtual time: the real `health.fold` over answers that the cluster gives.

Probes of an engine that is fine, and of which nothing bad is remembered, would change nothing: they are left out until
something happens to it. That is what makes an hour of a healthy fleet cost nothing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from typing import Any

from slurm_rollout.agent import PAUSE_LOOK_S
from slurm_rollout.core.health import ProbeResult, fold, rested
from slurm_rollout.core.model import Endpoint
from slurm_rollout.core.plan import FleetPlan, ProbePolicy
from slurm_rollout.probes import FIRST_PAUSE_S, Key
from slurm_rollout.simulation.clock import Chance, Timeline
from slurm_rollout.simulation.cluster import Answer, Cluster
from slurm_rollout.simulation.parts import Incarnation, Step

ANSWERED: frozenset[Answer] = frozenset({"no", "refused"})
WORDS: dict[Answer, str] = {"late": "no answer in time", "no": "HTTP 503: no", "refused": "Connection refused"}


class Probing:
    """The coordinator's prober (`probes.Prober`), one per term."""

    def __init__(self, plan: FleetPlan, cluster: Cluster, time: Timeline, wake: Callable[[], None]) -> None:
        self._cluster = cluster
        self._time = time
        self._wake = wake
        self._policies = {g.id: p.probe for p in plan.pools for g in p.groups}
        self._modes: dict[Key, str] = {}
        self._turns: dict[Key, int] = {}  # a newer turn of the same key makes the older one void
        self._idle: set[Key] = set()
        self._asking: set[Key] = set()
        self._known: dict[str, tuple[int, dict[int, Endpoint]]] = {}
        self._paused: Set[str] = frozenset()
        self._resumed_at: dict[str, float] = {}
        self._resting: set[Key] = set()
        self._stopped = False

    def set_targets(self, targets: dict[Key, str]) -> None:
        """Probe exactly these; a mode is "startup" or "liveness"."""
        if targets == self._modes:
            return
        for key, mode in list(self._modes.items()):
            if targets.get(key) != mode:
                self._drop(key)
        for key, mode in targets.items():
            if key in self._modes:
                continue
            self._modes[key] = mode
            if self._known.get(key.group, (0, {}))[0] != key.incarnation:
                self._known[key.group] = key.incarnation, {}
            self._known[key.group][1].setdefault(key.rank, Endpoint(rank=key.rank))
            if mode == "startup":
                self._plan_turn(key, self._time.now, lambda k=key: self._is_ready(k, FIRST_PAUSE_S))  # type: ignore[misc]
            else:
                self._plan_liveness(key, self._time.now)

    def _drop(self, key: Key) -> None:
        del self._modes[key]
        self._turns[key] = self._turns.get(key, 0) + 1
        self._idle.discard(key)
        self._asking.discard(key)
        self._resting.discard(key)

    def endpoints(self, group: str, incarnation: int) -> tuple[Endpoint, ...]:
        known, ranks = self._known.get(group, (incarnation, {}))
        return tuple(ranks[rank] for rank in sorted(ranks)) if known == incarnation else ()

    def disturb(self, incarnation: Incarnation) -> None:
        """Something happened to it: probe it again."""
        group, number = incarnation.id
        for key in [k for k in self._modes if k.group == group and k.incarnation == number and k in self._idle]:
            self._plan_liveness(key, self._time.now)

    def disturb_all(self) -> None:
        for key in sorted(self._idle):
            self._plan_liveness(key, self._time.now)

    def pause(self, groups: Set[str]) -> None:
        """As `Prober.pause`."""
        if groups == self._paused:
            return
        now, over = self._time.now, self._paused - groups
        for group in groups ^ self._paused:
            _, ranks = self._known.get(group, (0, {}))
            ranks.update({rank: rested(endpoint) for rank, endpoint in ranks.items()})
        self._resumed_at.update(dict.fromkeys(over, now))
        self._paused = frozenset(groups)
        for key in sorted(k for k in self._resting | self._idle if k.group in over):  # it is not known how they are
            self._plan_liveness(key, now)

    def is_quiet(self, group: str) -> bool:
        """As `Prober.is_quiet`."""
        return group in self._paused and not any(key.group == group for key in self._asking)

    def stop(self) -> None:
        self._stopped = True

    def go_on(self) -> None:
        """The coordinator was stopped: what was under way says nothing, and a full period passes before the next."""
        self._stopped = False
        for key, mode in self._modes.items():
            if key in self._idle or key in self._resting:
                continue
            if key in self._asking:
                self._asking.discard(key)
                now = self._time.now
                self._learn(key, ProbeResult(kind="liveness", ok=False, started_at=now, ended_at=now, lagged=True))
            if mode == "startup":
                self._plan_turn(key, self._time.now, lambda k=key: self._is_ready(k, FIRST_PAUSE_S))  # type: ignore[misc]
            else:
                self._plan_liveness(key, self._time.now + self._policies[key.group].liveness_period_s)

    def close(self) -> None:
        for key in list(self._modes):
            self._drop(key)

    # ---------------------------------------------------------------------------------------------------------- turns

    def _plan_turn(self, key: Key, at: float, do: Callable[[], None]) -> None:
        self._idle.discard(key)
        self._resting.discard(key)
        turn = self._turns[key] = self._turns.get(key, 0) + 1

        def take() -> None:
            if self._turns.get(key) == turn and not self._stopped:
                do()

        self._time.at(at, take)

    def _incarnation(self, key: Key) -> Incarnation:
        return self._cluster.incarnations[key.group, key.incarnation]

    def _is_ready(self, key: Key, pause_s: float) -> None:
        policy, now = self._policies[key.group], self._time.now
        incarnation = self._incarnation(key)
        answer = self._cluster.answer(incarnation, key.rank)
        if answer == "late":  # asked until its time-out; it answers when it is able to
            limit = policy.startup_request_timeout_s
            self._plan_turn(key, now + min(1.0, limit), lambda: self._is_ready(key, pause_s))
            return
        ok = answer == "ok"
        if ok:
            incarnation.proved.add(key.rank)
        self._learn(key, _result("readiness", answer, now, now))
        if not ok:
            self._plan_turn(key, now + pause_s, lambda: self._is_ready(key, min(2 * pause_s, policy.startup_period_s)))

    def _plan_liveness(self, key: Key, earliest: float) -> None:
        period_s = self._policies[key.group].liveness_period_s
        turn_s = zlib.crc32(repr(key).encode()) / 2**32 * period_s
        self._plan_turn(key, earliest + (turn_s - earliest) % period_s, lambda: self._is_alive(key))

    def _is_alive(self, key: Key) -> None:
        policy, started_at = self._policies[key.group], self._time.now
        if key.group in self._paused:
            self._resting.add(key)
            return
        rested_until = self._resumed_at.get(key.group, -math.inf) + policy.liveness_period_s
        if started_at < rested_until:
            self._plan_liveness(key, rested_until)
            return
        incarnation = self._incarnation(key)
        answer = self._cluster.answer(incarnation, key.rank)
        if answer == "late":
            timeout_s = policy.liveness_timeout_s
            looks: list[float | None] = []
            self._asking.add(key)
            # The same moments as the real prober's; an engine that recovers meanwhile answers the waiting request.
            for part in (0.5, 0.75):
                self._time.at(started_at + part * timeout_s, lambda: looks.append(self._look(key, policy)))
            self._plan_turn(key, started_at + timeout_s, lambda: self._liveness_over(key, started_at, looks))
            return
        counter = None if answer == "ok" else self._look(key, policy)
        self._over(key, _result("liveness", answer, started_at, started_at, counter=counter), started_at)

    def _look(self, key: Key, policy: ProbePolicy) -> float | None:
        return None if policy.counter is None else self._cluster.counter(self._incarnation(key), key.rank)

    def _liveness_over(self, key: Key, started_at: float, looks: list[float | None]) -> None:
        self._asking.discard(key)
        answer = self._cluster.answer(self._incarnation(key), key.rank)
        answer = "ok" if answer == "ok" else "late"
        baseline, counter = looks if answer == "late" and len(looks) == 2 else (None, None)
        result = _result("liveness", answer, started_at, self._time.now, baseline=baseline, counter=counter)
        self._over(key, result, started_at)

    def _over(self, key: Key, result: ProbeResult, started_at: float) -> None:
        if result.ok:
            self._incarnation(key).proved.add(key.rank)
        self._learn(key, result)
        if key.group in self._paused:
            self._wake()  # its end was waited for
        if key not in self._modes:
            return
        if result.ok and self._cluster.is_fine(self._incarnation(key)):
            self._idle.add(key)
            return
        period_s = self._policies[key.group].liveness_period_s
        self._plan_turn(key, max(self._time.now, started_at + period_s), lambda: self._is_alive(key))

    def _learn(self, key: Key, result: ProbeResult) -> None:
        known, ranks = self._known[key.group]
        if known != key.incarnation:
            return
        before = ranks[key.rank]
        after = ranks[key.rank] = fold(before, result)
        if after != before or after.answers != before.answers:
            self._wake()


def _result(kind: str, answer: Answer, started_at: float, ended_at: float, **looks: float | None) -> ProbeResult:
    made = ProbeResult(
        kind="readiness" if kind == "readiness" else "liveness",
        ok=answer == "ok",
        answered=answer != "late",
        error=WORDS.get(answer, ""),
        started_at=started_at,
        ended_at=ended_at,
    )
    return replace(made, **looks) if looks else made  # type: ignore[arg-type]


@dataclass(slots=True, eq=False)
class _Local:
    """What one agent's probe of one entrypoint knows."""

    step: Step
    rank: int
    turn: int = 0  # a newer one makes the older one void
    busy: bool = False  # a turn is planned, or taken
    asking: bool = False
    failures: int = 0
    counter: float | None = None
    seen: int = 0  # how new the barrier file is that it saw last
    paused: int = 0  # the pause of which that spoke; 0: none
    rests: int = 0  # the pause in which it asks nothing


@dataclass(slots=True)
class _Pause:
    """What the barrier file says of a pool's probes."""

    changes: int = 0
    number: int = 0  # of the pause; 0: none
    locals: list[_Local] = field(default_factory=list)  # those that look at it


class LocalProbing:
    """The agents' own probes, on their nodes (`agent.LocalProbe`): no network between, and only changes are reported.

    Each looks at the barrier file by itself, when it comes to it, and as late as its node shows it.
    """

    def __init__(
        self, plan: FleetPlan, cluster: Cluster, time: Timeline, chance: Chance, lateness_s: Callable[[], float | None]
    ) -> None:
        """`lateness_s`: how late a reader may see the barrier file now; None: it cannot be read."""
        self._cluster = cluster
        self._time = time
        self._chance = chance
        self._lateness_s = lateness_s
        self._policies = {g.id: p.probe for p in plan.pools for g in p.groups}
        self._pauses = {p.name: _Pause() for p in plan.pools if p.probe.pause_in}
        self._locals: dict[tuple[str, int, int], _Local] = {}
        self._looks = 0

    def disturb(self, incarnation: Incarnation) -> None:
        if incarnation.worked_at is None:  # its probe begins when the engine listens
            return
        for member in incarnation.plan.entrypoints:
            step = incarnation.steps.get(member.node)
            if step is None:
                continue
            local = self._local(step, member.rank)
            if not local.busy and not local.rests:
                period_s, now = self._policy(local).liveness_period_s, self._time.now
                turn_s = zlib.crc32(repr(("local", (*incarnation.id, member.rank))).encode()) / 2**32 * period_s
                self._plan_turn(local, now + (turn_s - now) % period_s)

    def _local(self, step: Step, rank: int) -> _Local:
        return self._locals.setdefault((*step.incarnation.id, rank), _Local(step, rank))

    def _policy(self, local: _Local) -> ProbePolicy:
        return self._policies[local.step.incarnation.plan.id]

    def _plan_turn(self, local: _Local, at: float) -> None:
        local.busy = True
        local.turn += 1
        turn = local.turn

        def take() -> None:
            if local.turn == turn and not self._ends(local):
                self._ask(local)

        self._time.at(at, take)

    def _ends(self, local: _Local) -> bool:
        if local.step.agent == "serving":
            return False
        local.busy = local.asking = False
        self._locals.pop((*local.step.incarnation.id, local.rank), None)
        return True

    def _ask(self, local: _Local) -> None:
        asked_at = self._time.now
        if self._cluster.answer(local.step.incarnation, local.rank, local=True) == "late":
            local.asking = True
            self._time.after(self._policy(local).liveness_timeout_s, lambda: self._count(local, asked_at))
        else:
            self._count(local, asked_at)

    def _count(self, local: _Local, asked_at: float) -> None:
        local.asking = False
        if self._ends(local):
            return
        policy, incarnation = self._policy(local), local.step.incarnation
        before = local.failures
        if self._cluster.answer(incarnation, local.rank, local=True) == "ok":
            local.failures, local.counter = 0, None
        else:
            counter = self._cluster.counter(incarnation, local.rank, local=True) if policy.counter else None
            moved = counter is not None and local.counter is not None and counter != local.counter
            local.failures = 0 if moved else local.failures + 1
            local.counter = counter if counter is not None else local.counter
        limit = policy.liveness_failure_threshold
        if min(local.failures, limit) != min(before, limit):
            self._cluster.say(local.step, report="local_probe", rank=local.rank, failures=min(local.failures, limit))
        fine = (
            incarnation.works
            and not incarnation.asleep
            and self._time.now >= max(incarnation.busy_until, incarnation.refuses_until)
        )
        if local.paused:
            self._rest(local)
        elif local.failures == 0 and fine:
            local.busy, local.counter = False, None
        else:
            self._plan_turn(local, max(self._time.now, asked_at + policy.liveness_period_s))

    # ---------------------------------------------------------------------------------------------------------- pauses

    def listens(self, step: Step, rank: int) -> None:
        """An entrypoint listens: its probe begins, with a look at the barrier file."""
        if (pause := self._pauses.get(step.incarnation.plan.pool)) is not None:
            pause.locals = [known for known in pause.locals if known.step.agent == "serving"]
            pause.locals.append(local := self._local(step, rank))
            self._look_later(local, pause.changes, pause.number, 0.0)

    def barrier_says(self, pools: list[dict[str, Any]]) -> None:
        """The barrier file was written."""
        for pool in pools:
            pause, number = self._pauses.get(pool["name"]), int(pool["pauses"]) if pool["probes"] == "paused" else 0
            if pause is None or pause.number == number:
                continue
            pause.changes, pause.number = pause.changes + 1, number
            for local in pause.locals:
                if local.step.agent == "serving":
                    self._look_later(local, pause.changes, number, PAUSE_LOOK_S)

    def _look_later(self, local: _Local, change: int, number: int, pause_s: float) -> None:
        self._looks += 1
        late_s = self._lateness_s() or 0.0
        after_s = self._chance.between(0.0, pause_s, "look", self._looks)
        after_s += self._chance.between(0.0, 1.0, "late look", self._looks) ** 4 * late_s
        self._time.after(after_s, lambda: self._look(local, change, number))

    def _look(self, local: _Local, change: int, number: int) -> None:
        if local.step.agent != "serving" or change < local.seen:
            return
        if self._lateness_s() is None or self._cluster.nodes[local.step.key.node].cut:
            self._look_later(local, change, number, 5.0)  # its last word holds
            return
        local.seen, local.paused = change, number
        if number and not local.asking and local.rests != number:
            self._rest(local)
        elif not number and local.rests:
            local.rests = 0
            self._cluster.say(local.step, report="probes", rank=local.rank, paused=False, pause=0)
            self._plan_turn(local, self._time.now + self._policy(local).liveness_period_s)

    def _rest(self, local: _Local) -> None:
        local.turn += 1
        local.counter, local.busy, local.rests = None, False, local.paused
        self._cluster.say(local.step, report="probes", rank=local.rank, paused=True, pause=local.rests)
