"""Trainers: programs around the real `barrier.Barrier`, and what they really do to engines and GPUs.

A client acts by what it reads and by nothing else. What it does is true in the cluster at once: weights are in an
engine, an engine sleeps, the GPUs of a colocated pool are the trainer's. The checker holds that against what the
coordinator does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from slurm_rollout import barrier
from slurm_rollout.barrier import Barrier, BarrierError, FleetFailed, Group, Snapshot, State, WeightsNeeded
from slurm_rollout.simulation.parts import Incarnation, Weights
from slurm_rollout.simulation.program import Killed, Program

if TYPE_CHECKING:
    from slurm_rollout.simulation.fleet import Fleet

IDLE_LOOK_S = (5.0, 15.0)
"""How long a client that waits looks away when nothing is written, instead of half a second: time costs nothing so."""

HINTED_LOOK_S = (0.02, 0.5)
"""How soon it looks when something is."""

TRIES_AGAIN_S = (3.0, 20.0)
HASTE_S = (1.0, 25.0)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How one client works. Times in seconds: the least and the most."""

    name: str = "trainer"
    trains: bool = True  # has the weights, and pushes them; else it only generates
    announces: bool = True
    lease_s: float = 0.0  # of the hold around each push; 0: it holds nothing
    generates_s: tuple[float, float] = (35.0, 70.0)  # two periods of probes or more
    hasty: bool = False  # generates for some seconds only, until there is peace: probes hardly get a turn
    trains_s: tuple[float, float] = (15.0, 60.0)
    push_s: tuple[float, float] = (0.5, 3.0)  # into one group
    lingers_s: tuple[float, float] = (5.0, 15.0)  # in `syncing`, after its push: groups start then
    syncs_each: int = 1  # so many times it generates before it syncs
    looks_s: tuple[float, float] = IDLE_LOOK_S

    @property
    def cycle_s(self) -> float:
        """The longest that it needs from one `syncing` to the next, a push into eight groups and a hold included."""
        return (
            self.syncs_each * self.generates_s[1]
            + self.trains_s[1]
            + 8 * self.push_s[1]
            + self.lingers_s[1]
            + self.lease_s
        )


ONLY_KEEPS_CURRENT = Habits(announces=False, trains=True, trains_s=(0.0, 0.0), push_s=(0.0, 0.0), looks_s=(60.0, 100.0))
"""A trainer of which a forecast wants to see nothing: what is stale gets its weights at once."""


class Voice(Barrier):
    """The real client, whose words take their time to the coordinator, and which is mute once it is killed."""

    def __init__(self, client: Client, program: Program) -> None:
        fleet = client.fleet
        super().__init__(
            fleet.files.clients.barrier,
            client=client.habits.name,
            job="1",
            restart_count=fleet.restart_count,
            clock=lambda: fleet.time.now,
            sleep=client.look_away,
            read=fleet.files.read,
        )
        self.retries = False  # its pauses are those of a file system that is not settled
        self._files = fleet.files.clients
        self._program = program

    @property
    def lease_ends_at(self) -> float:
        return self._hold_until

    def _write_words(self, phase: str | None, lease_s: float | None) -> int:
        if self._program.killed:  # a `finally` of what is unwound: no such thing runs in a process that is dead
            raise Killed
        number = super()._write_words(phase, lease_s)
        self._files.wrote(self.client, acks=False)
        return number

    def _fetch(self) -> tuple[State | None, str, str]:
        self.retries = True
        try:
            return super()._fetch()
        finally:
            self.retries = False

    def _persist(self, path: str, write: Callable[[], int]) -> int:
        self.retries = True
        try:
            number = super()._persist(path, write)
        finally:
            self.retries = False
        if path.endswith(".jsonl"):
            self._files.wrote(self.client, acks=True)
        return number


class Client:
    """One client of one trainer, over all its lives."""

    def __init__(self, fleet: Fleet, habits: Habits) -> None:
        self.fleet = fleet
        self.habits = habits
        self.program: Program | None = None
        self.looks = False  # it waits for the barrier to change
        # The truth.
        self.owns_gpus = False
        self.holds_until = -math.inf  # by its own reckoning
        self.asleep: list[Incarnation] = []
        # What goes wrong next.
        self.behaves = False
        self.forgets_to_release = self.goes_back = self.push_fails = False
        self.slow_until = 0.0
        self._version = self._saved = 1
        self._lines = {1: 0}  # version -> how often the trainer had gone back when it made these weights
        self._line = 0
        self._back_is_known = True
        self._missed: list[Incarnation] = []  # by the last push
        self._acked: list[tuple[int, tuple[Group, ...]]] = []  # since it last went back
        self._draws = 0
        self._changed_at = -math.inf  # the barrier file
        self._voice: Voice

    @property
    def alive(self) -> bool:
        return self.program is not None and self.program.alive

    def start(self) -> None:
        if self.alive:
            return
        self.holds_until = -math.inf
        self.fleet.note(f"client {self.habits.name} starts, with weights of version {self._saved}")
        if self.habits.trains and self._version != self._saved:
            self._go_back_to(self._saved)
        self.program = Program(self.fleet.time, self._live)
        self._voice = Voice(self, self.program)

    def kill(self) -> None:
        """SIGKILL: GPUs are free, a hold stays until it expires, engines that sleep sleep on."""
        if self.program is not None and self.program.alive:
            self.fleet.note(f"client {self.habits.name} is killed")
            self.program.kill()
            self.owns_gpus = self.looks = False

    def forget_up(self) -> None:
        """Its `up` is over: nobody heeds what it said."""
        self.kill()
        self.holds_until = -math.inf
        for incarnation in self.asleep:
            incarnation.disowned = True

    def barrier_changed(self) -> None:
        self._changed_at = self.fleet.time.now
        if self.looks and self.program is not None:
            self.program.wake(self._draw(HINTED_LOOK_S))

    def behave(self) -> None:
        """Nothing of it goes wrong from now on."""
        self.behaves = True
        self.forgets_to_release = self.goes_back = self.push_fails = False
        self.slow_until = 0.0
        if self.program is not None:
            self.program.go_on()

    def repeat_an_ack(self, which: float) -> None:
        """Another process of the same trainer says again what was acknowledged, later than everything else."""
        if not self._acked:
            return
        version, groups = self._acked[int(which * len(self._acked))]
        ack = {
            "version": version,
            "groups": [(g.id, g.incarnation) for g in groups],
            "rollback": False,
            "job": "1",
            "restart_count": self.fleet.restart_count,
        }
        files = self.fleet.files.clients
        barrier._append(str(files.acks(self.habits.name)), ack, 0)
        files.wrote(self.habits.name, acks=True)

    # ----------------------------------------------------------------------------------------------------------- time

    def look_away(self, seconds: float) -> None:
        """`Barrier`'s sleep. Its jitter is chance that no seed decides, so it is replaced by one that a seed does."""
        assert self.program is not None
        if self._voice.retries:
            self.program.sleep(seconds)
            return
        self.looks = True
        fresh = self.fleet.time.now - self._changed_at < HINTED_LOOK_S[1]  # what it saw may be older than that
        try:
            self.program.sleep(HINTED_LOOK_S[1] if fresh else self._draw(self.habits.looks_s))
        finally:
            self.looks = False

    def _sleep(self, span_s: tuple[float, float]) -> None:
        assert self.program is not None
        slow = 4.0 if self.fleet.time.now < self.slow_until else 1.0
        self.program.sleep(slow * self._draw(span_s))

    def _draw(self, span: tuple[float, float]) -> float:
        self._draws += 1
        return self.fleet.chance.between(*span, "client", self.habits.name, self._draws)

    # -------------------------------------------------------------------------------------------------------- its life

    def _live(self) -> None:
        while True:
            try:
                self._wake_up_all()
                if self.habits == ONLY_KEEPS_CURRENT:
                    self._keep_current()
                self._work()
            except FleetFailed:
                self.owns_gpus = False
                self._sleep(TRIES_AGAIN_S)

    def _keep_current(self) -> None:
        while True:
            epoch = self._wait_ready().epoch
            if self._voice.stale():
                self._acknowledge(self._push(self._voice.stale()))
                self._sleep((1.0, 2.0))
            else:
                self._wait_ready(epoch)

    def _work(self) -> None:
        """Generate, train, push; from a start on, because nobody knows what was pushed half before it."""
        self._wait_ready()
        if self.habits.trains:
            self._push_everywhere()
        while True:
            self._wait_ready()
            self._announce("generating")
            for _ in range(self.habits.syncs_each):
                self._sleep(HASTE_S if self.habits.hasty and not self.behaves else self.habits.generates_s)
            if self.habits.trains:
                self._catch_up()
                self._announce("training")
                self._sleep(self.habits.trains_s)
                self._change_version()
            self._announce("syncing")
            if self.habits.trains:
                self._with_hold(lambda: self._acknowledge(self._push(self._voice.stale(self._version))))
                if self._draw((0.0, 1.0)) < 0.7:
                    self._saved = self._version
            self._sleep(self.habits.lingers_s)

    def _patiently(self, call: Callable[[], T]) -> T:
        """Make a call until it succeeds. Only a fleet that is dead, or needs weights, is told to the caller."""
        while True:
            try:
                return call()
            except (FleetFailed, WeightsNeeded):
                raise
            except BarrierError as e:
                self.fleet.note(f"client {self.habits.name}: {type(e).__name__}")
                if self.holds_until > self.fleet.time.now:  # what it waits for cannot come while it holds
                    self._release()
                self._sleep(TRIES_AGAIN_S)

    def _wait_ready(self, after_epoch: int | None = None) -> State:
        while True:
            try:
                return self._patiently(lambda: self._voice.wait_ready(after_epoch))
            except WeightsNeeded as e:
                if self.habits.trains:
                    state = self._voice.current()
                    self._acknowledge(self._push(Snapshot(e.groups, state.epoch, state.term)))
                self._sleep(TRIES_AGAIN_S)

    # ---------------------------------------------------------------------------------------------------- GPUs, phases

    def _announce(self, phase: str) -> None:
        if not self.habits.announces:
            return
        self.owns_gpus = False
        self._wake_up_all(but_in=phase)
        state = self._patiently(lambda: self._voice.announce(phase))
        self.fleet.note(f"client {self.habits.name}: {phase}, echoed")
        if not self.habits.trains:
            return
        if phase == "training":
            self.owns_gpus = any(p.restart.when == "at_barrier" for p in self.fleet.plan.pools)
        # One that sees the echo late, later than `pause_max_s`, finds that the pause is over, or sees not even that.
        paused = {p.name for p in state.pools if p.probes == "paused"}
        still = {p["name"] for p in self.fleet.files.newest()["pools"] if p["probes"] == "paused"}
        for group in state.groups:
            if group.urls and group.pool in paused and phase in self.fleet.plan.pool(group.pool).probe.pause_in:
                found = self._reach(group)
                if found is not None and not found.asleep:
                    self.fleet.cluster.sleeps(found, asleep=True)
                    found.disowned = group.pool not in still
                    self.asleep.append(found)

    def _wake_up_all(self, but_in: str = "") -> None:
        stay = [i for i in self.asleep if but_in in self.fleet.plan.pool(i.plan.pool).probe.pause_in]
        woken = [i for i in self.asleep if i not in stay]
        self.asleep = stay
        for incarnation in woken:
            self.fleet.cluster.sleeps(incarnation, asleep=False)

    def _reach(self, group: Group) -> Incarnation | None:
        """Return the group's incarnation where all of it can be told to sleep, or to take weights."""
        cluster = self.fleet.cluster
        found = cluster.incarnations.get((group.id, group.incarnation))
        if found is None or not found.works or any(cluster.unreachable(n) for n in found.steps):
            return None
        return found

    # ---------------------------------------------------------------------------------------------------------- weights

    def _change_version(self) -> None:
        if self.goes_back and self._version > 2:
            self.goes_back = False
            self._go_back_to(self._version - 2)
        else:
            # A number is given again only where the coordinator knows that what it stood for is void.
            self._version = 1 + (self._version if self._back_is_known else max(self._lines))
            self._lines[self._version] = self._line

    def _go_back_to(self, version: int) -> None:
        self._version, self._saved = version, min(self._saved, version)
        self._line += 1
        self._back_is_known = False
        self._acked.clear()

    def weights_of(self, version: int) -> Weights:
        """Return what a number stands for: weights that it made after it went back have numbers of before."""
        return Weights(version, self._lines[version])

    def _catch_up(self) -> None:
        """Push into those that came back meanwhile."""
        try:
            snapshot = self._voice.stale(self._version)
        except BarrierError:
            return
        if snapshot:
            self._with_hold(lambda: self._acknowledge(self._push(snapshot)))

    def _push_everywhere(self) -> None:
        def living() -> Snapshot:
            state = self._voice.current()
            return Snapshot(tuple(g for g in state.groups if g.urls and g.weights != "none"), state.epoch, state.term)

        self._with_hold(lambda: self._acknowledge(self._push(living())))

    def _with_hold(self, deed: Callable[[], None]) -> None:
        lease_s = self.habits.lease_s
        if lease_s:
            self._patiently(lambda: self._voice.hold(lease_s, timeout=1200.0))
            self.holds_until = self._voice.lease_ends_at
            self.fleet.note(f"client {self.habits.name} holds")
        try:
            deed()
        except BarrierError as e:
            if isinstance(e, FleetFailed):
                raise
        if lease_s and not self.forgets_to_release:
            self._release()
        self.forgets_to_release = False

    def _release(self) -> None:
        self.holds_until = -math.inf
        self._patiently(self._voice.release)

    def _push(self, snapshot: Snapshot) -> Snapshot:
        """Push into one group after the other; return what to acknowledge: those in which all of it arrived."""
        weights, reached = self.weights_of(self._version), []
        self._missed = []
        for group in snapshot.groups:
            found = self._reach(group)
            if found is None:
                continue
            found.weights, found.unsettled = None, True
            self._sleep(self.habits.push_s)
            if self.push_fails or self._reach(group) is not found:
                self.push_fails = False
                self._missed.append(found)
                continue
            found.weights = weights
            found.pushed.add(weights)
            reached.append(group)
            if 0.0 < self.holds_until - self.fleet.time.now < self.habits.lease_s / 2:
                self._patiently(lambda: self._voice.hold(self.habits.lease_s, timeout=60.0))
                self.holds_until = self._voice.lease_ends_at
        return snapshot._replace(groups=tuple(reached))

    def _acknowledge(self, snapshot: Snapshot) -> None:
        """Say it until the coordinator has it; where it is behind, that the trainer went back."""
        if not snapshot:
            return
        version, back, state = self._version, False, self._voice.current()
        pools = {g.pool for g in snapshot.groups}
        self.fleet.note(f"client {self.habits.name} acknowledges {version} in", *(g.id for g in snapshot.groups))

        def say() -> bool:
            nonlocal back, state
            try:
                state = self._voice.ack_weights(version, snapshot, rollback=back)
            except ValueError:
                back = True
                return False
            # What was refused was taken in, too: only the versions tell.
            back = any(p.weights_version != version for p in state.pools if p.name in pools)
            return not back

        while not self._patiently(say):
            self._sleep((0.1, 1.0))
        self._back_is_known = True
        self._acked.append((version, snapshot.groups))
        del self._acked[:-5]
        for group in snapshot.groups:
            found = self.fleet.cluster.incarnations.get((group.id, group.incarnation))
            if found is not None:
                found.unsettled = False
        # Those in which only half of it arrived are stale by now, unless it was what they had.
        versions = {(g.id, g.incarnation): g.weights_version for g in state.groups}
        for found in self._missed:
            if versions.get(found.id, version) != version:
                found.unsettled = False
