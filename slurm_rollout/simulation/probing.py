"""Probes on virtual time: the real `health.fold` over answers that the cluster gives.

Probes of an engine that is fine, and of which nothing bad is remembered, would change nothing: they are left out until
something happens to it. That is what makes an hour of a healthy fleet cost nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

from slurm_rollout.core.health import ProbeResult, fold
from slurm_rollout.core.model import Endpoint
from slurm_rollout.core.plan import FleetPlan, ProbePolicy
from slurm_rollout.probes import FIRST_PAUSE_S, Key
from slurm_rollout.simulation.clock import Timeline
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

    def pause(self) -> None:
        self._stopped = True

    def resume(self) -> None:
        """The coordinator was stopped: what was under way says nothing, and a full period passes before the next."""
        self._stopped = False
        for key, mode in self._modes.items():
            if key in self._idle:
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

    # ------------------------------------------------------------------------------------------------------------ turns

    def _plan_turn(self, key: Key, at: float, do: Callable[[], None]) -> None:
        self._idle.discard(key)
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


class LocalProbing:
    """The agents' own probes, on their nodes: no network between, and only changes are reported."""

    def __init__(self, plan: FleetPlan, cluster: Cluster, time: Timeline) -> None:
        self._cluster = cluster
        self._time = time
        self._policies = {g.id: p.probe for p in plan.pools for g in p.groups}
        self._busy: set[tuple[str, int, int]] = set()
        self._failures: dict[tuple[str, int, int], tuple[int, float | None]] = {}

    def disturb(self, incarnation: Incarnation) -> None:
        if incarnation.worked_at is None:  # its probe begins when the engine listens
            return
        for member in incarnation.plan.entrypoints:
            who = (*incarnation.id, member.rank)
            if who in self._busy:
                continue
            self._busy.add(who)
            period_s = self._policies[incarnation.plan.id].liveness_period_s
            turn_s = zlib.crc32(repr(("local", who)).encode()) / 2**32 * period_s
            now = self._time.now
            self._time.at(
                now + (turn_s - now) % period_s,
                lambda r=member.rank, w=who: self._ask(incarnation, r, w),  # type: ignore[misc]
            )

    def _ask(self, incarnation: Incarnation, rank: int, who: tuple[str, int, int]) -> None:
        step = incarnation.steps.get(incarnation.plan.members[rank].node)
        if step is None or step.agent != "serving":
            self._busy.discard(who)
            self._failures.pop(who, None)
            return
        policy, asked_at = self._policies[incarnation.plan.id], self._time.now
        answer = self._cluster.answer(incarnation, rank, local=True)
        wait_s = policy.liveness_timeout_s if answer == "late" else 0.0
        if wait_s:
            self._time.after(wait_s, lambda: self._count(incarnation, rank, who, asked_at, step))
        else:
            self._count(incarnation, rank, who, asked_at, step)

    def _count(
        self, incarnation: Incarnation, rank: int, who: tuple[str, int, int], asked_at: float, step: Step
    ) -> None:
        if step.agent != "serving":
            self._busy.discard(who)
            self._failures.pop(who, None)
            return
        policy = self._policies[incarnation.plan.id]
        failures, seen = self._failures.get(who, (0, None))
        before = failures
        if self._cluster.answer(incarnation, rank, local=True) == "ok":
            failures, seen = 0, None
        else:
            counter = self._cluster.counter(incarnation, rank, local=True) if policy.counter else None
            moved = counter is not None and seen is not None and counter != seen
            failures = 0 if moved else failures + 1
            seen = counter if counter is not None else seen
        self._failures[who] = failures, seen
        limit = policy.liveness_failure_threshold
        if min(failures, limit) != min(before, limit):
            self._cluster.say(step, report="local_probe", rank=rank, failures=min(failures, limit))
        fine = incarnation.works and self._time.now >= max(incarnation.busy_until, incarnation.refuses_until)
        if failures == 0 and fine:
            self._busy.discard(who)
            self._failures.pop(who, None)
            return
        again_at = max(self._time.now, asked_at + policy.liveness_period_s)
        self._time.at(again_at, lambda: self._ask(incarnation, rank, who))
