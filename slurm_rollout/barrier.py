"""The trainer's side of a rollout fleet: reads the barrier file (`barrier.json`), and writes beside it what it says.

    from slurm_rollout.barrier import Barrier  # or copy this one file into the trainer's tree

    barrier = Barrier()  # the path comes from ROLLOUT_BARRIER
    state = barrier.wait_ready(timeout=3600)  # raises instead of waiting for a fleet that will not come
    generate(state.urls)
    keep = barrier.is_current("actor/0", 3)  # False: the incarnation that made this sample is dead, drop it

    snapshot = barrier.stale(version=42)  # before the push: who is alive, and lacks these weights
    push(snapshot.groups)
    barrier.ack_weights(42, snapshot)  # returns when the coordinator knows: these groups serve from now on

Standard library only, Python 3.9, imports nothing of its package. The coordinator replaces the file every few
seconds; nothing here opens a connection. Threads may share a `Barrier`. Let one process of a trainer poll and
broadcast the `State` (it can be pickled): a thousand pollers are a load that a shared file system feels. And let one
process speak for a client: what another one says under the same name takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import threading
import time
from typing import Any, Callable, Mapping, NamedTuple

__all__ = [
    "Barrier",
    "BarrierError",
    "BarrierTimeout",
    "CoordinatorLost",
    "FleetFailed",
    "Group",
    "Hold",
    "Pool",
    "Snapshot",
    "State",
    "WeightsNeeded",
]

SCHEMA = 1

# For a moment, an atomic replace can show as ESTALE (NFS) or as ENOENT (some FUSE file systems).
_RETRY_S = (0.02, 0.05, 0.1, 0.2)
_MIN_POLL_S = 0.05
_ECHO_POLL_S = 0.5  # what the coordinator answers at once is seen at once; then looks grow apart, up to this
# A last word `failed` or `stopped` may be an earlier coordinator's, whose successor is just starting.
_LAST_WORD_HEARTBEATS = 3
# How long the word "I wait" holds, and how often it is said again: a trainer that dies in its wait asks no longer.
_WAITING_S = 30.0
_WAITING_AGAIN_S = 10.0
_PHASES = ("generating", "training", "syncing")
_TAIL_BYTES = 1 << 20  # of the acknowledgements: much more than one of any fleet
_NEVER = float("-inf")


class Pool(NamedTuple):
    """Groups with the same engine settings."""

    name: str
    phase: str
    ready: int
    desired: int
    min_ready: int
    weights_version: int | None = None
    """What its groups need in order to serve; None before the first acknowledgement, and for frozen weights."""
    probes: str = "on"
    """`paused`: generation probes are off, because of a phase that a trainer announced."""
    restarts: str = "at_once"
    """`at_barrier`: a failed group starts again only when a trainer lets it."""
    may_start: str = ""
    """What keeps groups of this pool from being started; empty: nothing."""


class Group(NamedTuple):
    """The members that start, serve and die together."""

    id: str
    phase: str
    serving: bool
    """May get requests: proved alive and, where the pool is trained, with current weights."""
    incarnation: int
    """The n-th start of the group, from 1; 0 before the first."""
    weights: str
    """`current`, or `stale`: alive, to be pushed into, not serving. `none`: the trainer pushes no weights here."""
    weights_version: int | None
    """What was acknowledged for this incarnation."""
    urls: tuple[str, ...]
    """Empty unless this incarnation was proved alive."""
    endpoints: Mapping[str, tuple[str, ...]]
    """Further URLs by name, such as `session`."""
    master: str
    """Rendezvous address `host:port`; never an address for requests."""
    since: str
    """When `phase` was entered, by the coordinator's wall clock: for people only."""
    reason: str
    world_size: int = 0
    """GPUs of the group, or its members where it has none; 0: the coordinator does not say."""
    changed: int = 0
    """The epoch at which this group's incarnation last came or went."""

    @property
    def pool(self) -> str:
        """Name of the group's pool."""
        return self.id.rpartition("/")[0]


class State(NamedTuple):
    """What the barrier file says, or why it says nothing."""

    phase: str
    """`waiting`, `needs_weights`, `ready`, `failed` or `stopped`: the worst of the pools."""
    reason: str
    """`degraded`: ready with fewer groups than desired. `time_left`: what is missing would not be ready before the
    job ends. Of `stopped`: `operator`, `run_ending`, `job_ending` too. This client's own, always with phase `waiting`,
    when there is no word of the trainer's coordinator: `no_file`, `unreadable`, `outdated`, `other_job`."""
    message: str
    epoch: int
    """Version of the sets of (group, incarnation) that are alive and that may serve; only grows."""
    term: int
    """The n-th coordinator of the run."""
    seq: int
    """Grows with every heartbeat."""
    run: str
    job: str
    """Empty for a run outside Slurm."""
    restart_count: int
    heartbeat_s: float
    pools: tuple[Pool, ...]
    groups: tuple[Group, ...]
    clients: Mapping[str, Mapping[str, Any]]
    """What the coordinator has done with the words of trainers, by client: `phase`, `seq`, `hold`, `acks`."""
    confirmed: bool
    """The coordinator was seen alive: `seq` moved while this client watched, at most `lost_after_s` ago."""
    may_start: str = ""
    """Who or what keeps groups from being started, such as `held by trainer`; empty: nothing."""

    @property
    def urls(self) -> tuple[str, ...]:
        """All URLs that may get requests now, of every pool."""
        return tuple(url for group in self.groups if group.serving for url in group.urls)

    def endpoint(self, name: str) -> tuple[str, ...]:
        """All further URLs called `name` of the groups that serve now; empty when there are none."""
        return tuple(url for group in self.groups if group.serving for url in group.endpoints.get(name, ()))


class Snapshot(NamedTuple):
    """Groups to push weights into, as they were before the push; true where there are any.

    The acknowledgement names their incarnations, so it can never speak for one that was not pushed into. Where a
    push reached only some, acknowledge those: `snapshot._replace(groups=reached)`.
    """

    groups: tuple[Group, ...]
    epoch: int
    term: int

    def __bool__(self) -> bool:
        return bool(self.groups)


_NOTHING = State("waiting", "no_file", "", 0, 0, 0, "", "", 0, 0.0, (), (), {}, confirmed=False)
_NO_WORD = ("no_file", "unreadable", "outdated", "other_job")


class BarrierError(Exception):
    """Root of this module's errors; itself: the barrier file cannot be used, and waiting would not help."""

    def __str__(self) -> str:
        # `args` holds all arguments, the message last, so that an error survives pickling between processes.
        return str(self.args[-1]) if self.args else ""


class BarrierTimeout(BarrierError):
    """The fleet was not ready in time, and nothing shows that it never will be."""


class CoordinatorLost(BarrierError):
    """No heartbeat for `lost_after_s`: engines may still run, but nobody watches them."""


class FleetFailed(BarrierError):
    """The fleet will not come back; `reason` is one word.

    `stopped`: it was ended on purpose, or with its job. `time_left`: the job ends before enough groups could be ready.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason


class WeightsNeeded(BarrierError):
    """Enough groups are alive, too few have current weights; `groups` are those to push into."""

    def __init__(self, groups: tuple[Group, ...], message: str) -> None:
        super().__init__(groups, message)
        self.groups = groups


class Barrier:
    """A reader of one barrier file, and the voice of one client.

    `path`: the file; by default the environment's ROLLOUT_BARRIER. BarrierError when neither says one.
    `client`: whose words are written, to `clients/` beside the file: letters, digits, `.`, `_`, `-`, at most 40, a
    letter or digit first; else ValueError. Parts of a trainer that speak for themselves need names of their own.
    Empty: one that only looks; it says nothing, not even that it waits.
    `job`, `restart_count`: whose file is wanted; another one means `waiting`. By default this process's own
    SLURM_JOB_ID and SLURM_RESTART_COUNT; outside Slurm, or with `job=""`, any.
    `lost_after_s`: silence after which the coordinator counts as lost.
    `grace_s`: how long the last good value is kept while the file cannot be read.
    `clock` (monotonic seconds), `sleep` (seconds), `read` (path to bytes, or OSError) are there for tests.

    Whatever waits raises FleetFailed, CoordinatorLost or BarrierTimeout, and never waits for what will not come; its
    `timeout` is in seconds, None: as long as the coordinator lives. Whatever writes raises BarrierError if it cannot.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        client: str = "trainer",
        job: str | int | None = None,
        restart_count: int | None = None,
        lost_after_s: float = 120.0,
        grace_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        read: Callable[[str], bytes] | None = None,
    ) -> None:
        given = os.fspath(path or os.environ.get("ROLLOUT_BARRIER", ""))
        if not given:
            raise BarrierError(
                "no barrier file given, and ROLLOUT_BARRIER is not set: start the trainer with "
                "`slurm-rollout up SPEC -- TRAINER`, or pass the path of barrier.json in the run directory"
            )
        self.path = os.path.abspath(given)
        if os.path.isdir(self.path):
            raise BarrierError(f"{self.path} is a directory: pass the path of the barrier.json in it")
        plain = client.translate({ord(mark): None for mark in "._-"})
        if client and not (client.isascii() and plain.isalnum() and client[0].isalnum() and len(client) <= 40):
            raise ValueError(
                f"client {client!r}: up to 40 letters, digits, `.`, `_` or `-`, and a letter or digit first"
            )
        self.client = client
        self._words_path = os.path.join(os.path.dirname(self.path), "clients", f"{client}.json")
        own_job = os.environ.get("SLURM_JOB_ID", "")
        self.job = own_job if job is None else str(job)
        # Slurm (22.05) sets SLURM_RESTART_COUNT only from the first restart on, and for the own job only.
        if restart_count is None and self.job and self.job == own_job:
            restart_count = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self.restart_count = restart_count
        self.lost_after_s = lost_after_s
        self.grace_s = grace_s
        self._clock = clock
        self._sleep = sleep
        self._read = read or _read

        self._parsed: tuple[bytes, State] | None = None
        self._readable = True
        self._lock = threading.Lock()  # for what follows; never held while reading or sleeping
        self._last = _NOTHING  # the last good value, so the highest (term, seq) and epoch
        self._good_at = _NEVER  # when it was last read
        self._moved_at = _NEVER  # when its (term, seq) was seen to move
        self._looked_at: float | None = None
        self._silent_s = 0.0

        self._pen = threading.RLock()  # for what follows, and for writing
        self._seq = 0  # of the words last written
        self._phase: str | None = None  # last announced; None: not by this process
        self._hold_until = _NEVER  # end of the lease; the coordinator's count begins, and so ends, a little later
        self._waiters = 0  # threads in wait_ready that see a fleet below min_ready
        self._waiting_at = _NEVER  # when it was last tried to say so; _NEVER: nothing is said, or to be taken back

    def current(self) -> State:
        """Return the newest value, at once or after a short retry (below a second).

        A file that cannot be read is no error: the last good value holds for `grace_s`, then the phase is
        `waiting`, and `reason` and `message` say why. BarrierError when the file's schema is newer than this
        client. A hard-mounted NFS whose server hangs holds this call, as it holds every access.
        """
        state, reason, message = self._fetch()
        with self._lock:
            return self._note(state, reason, message)

    def wait_ready(self, after_epoch: int | None = None, timeout: float | None = None, poll_s: float = 1.0) -> State:
        """Wait until a coordinator that is alive says that the fleet is ready, and return what it says.

        `after_epoch`: only an epoch above it will do.
        `poll_s`: seconds between looks, with jitter; at least 0.05.

        While the fleet is below `min_ready`, groups of `at_barrier` pools may be started: this call tells the
        coordinator that somebody waits, where `clients/` can be written.

        Raises WeightsNeeded, too; BarrierError as `current` does, and where this very client holds what it waits for.
        """
        counted = False

        def ready(state: State) -> bool:
            nonlocal counted
            if not state.confirmed:
                return False
            if state.phase == "needs_weights":
                raise self._weights_needed(state)
            if state.phase == "waiting":
                if self._clock() < self._hold_until and self._is_held(state):
                    raise BarrierError(
                        f"client {self.client} holds the fleet that it waits for, and no group is started before it "
                        f"calls `release` or leaves its `with` block: {self._describe(state)}"
                    )
                if self.client and (timeout is None or timeout > 0):
                    self._say_waiting(0 if counted else 1)
                    counted = True
            return state.phase == "ready" and (after_epoch is None or state.epoch > after_epoch)

        wanted = "" if after_epoch is None else f" in an epoch above {after_epoch}"
        try:
            return self._until(ready, timeout, f"the fleet is not ready{wanted}", poll_s)
        finally:
            if counted:
                self._say_waiting(-1)

    def is_current(self, group: str, incarnation: int, version: int | None = None) -> bool:
        """Return whether this incarnation of `group` serves now, and with weights of `version` where one is given.

        By the file's last word: asks nobody else. A sample that another incarnation made is to be dropped.
        """
        return any(
            (known.id, known.incarnation, known.serving) == (group, incarnation, True)
            and version in (None, known.weights_version)
            for known in self.current().groups
        )

    def changed_since(self, epoch: int) -> tuple[Group, ...]:
        """Return the groups whose incarnation came or went after `epoch`; one without URLs is gone.

        For whoever keeps connections or process groups per group: those of all others are as they were.
        Raises BarrierError while nothing is known of the groups.
        """
        return tuple(group for group in self._known().groups if group.changed > epoch)

    def stale(self, version: int | None = None, pool: str | None = None) -> Snapshot:
        """Return the living groups of trained pools that do not have the weights of `version` now.

        `version` None: what their pool is at; before the first acknowledgement, that is every living group.
        `pool`: only that one; ValueError when there is no such pool.

        Raises BarrierError while nothing is known of the groups: that is not the same as "none is stale".
        """
        state = self._known()
        targets = {known.name: known.weights_version for known in state.pools}
        if pool is not None and pool not in {*targets, *(group.pool for group in state.groups)}:
            raise ValueError(f"no pool {pool!r} in {self.path}: there are {', '.join(targets)}")
        groups = []
        for group in state.groups:
            wanted = targets.get(group.pool) if version is None else version
            has_it = wanted is not None and group.weights_version == wanted
            if group.weights != "none" and group.urls and not has_it and pool in (None, group.pool):
                groups.append(group)
        return Snapshot(tuple(groups), state.epoch, state.term)

    def ack_weights(
        self, version: int, snapshot: Snapshot, rollback: bool = False, timeout: float | None = 60.0
    ) -> State:
        """Say that the groups of `snapshot` got the weights of `version`; return once the coordinator knows it.

        Their pools are at `version` from then on: whoever has another one is stale, and does not serve. A group that
        died or restarted meanwhile stays stale; the returned State shows it. An empty snapshot says nothing: the
        State is returned, and nothing is written.

        `rollback`: the trainer went back to an older version. Without it an older one is a ValueError, and nothing
        is written. After a BarrierTimeout the acknowledgement is still there; to repeat it does no harm.
        """
        version = operator.index(version)
        if not snapshot:
            return self.current()

        def write(state: State) -> int:
            names = {group.pool for group in snapshot.groups}
            for pool in state.pools:
                target = pool.weights_version
                if pool.name in names and target is not None and version < target and not rollback:
                    raise ValueError(
                        f"version {version} is older than {target}, which pool {pool.name} is at: nothing was "
                        "acknowledged. Where the trainer really went back to it, say rollback=True"
                    )
            ack = {
                "version": version,
                "groups": [(group.id, group.incarnation) for group in snapshot.groups],
                "rollback": bool(rollback),
                "job": self.job,
                "restart_count": self.restart_count,
            }
            path = f"{self._words_path[: -len('.json')]}.acks.jsonl"
            # Above what the coordinator has, too: where the file was lost, it would not take in a number twice.
            return self._persist(path, lambda: _append(path, ack, self._echo(state, "acks")))

        lacks = f"version {version}, acknowledged by client {self.client}, is not taken in"
        return self._ask(write, "acks", timeout, lacks)

    def announce(self, phase: str, timeout: float | None = 120.0) -> State:
        """Say what the trainer does from now on, and return once the coordinator acts by it.

        `phase`: `generating`, `training` or `syncing`; else ValueError. Where a pool's probes pause in that phase,
        none is in flight any more when this returns. What was announced stays so, also after a BarrierTimeout.
        """
        if phase not in _PHASES:
            raise ValueError(f"phase {phase!r}: one of {', '.join(_PHASES)}")
        lacks = f"`{phase}`, announced by client {self.client}, is not heeded"
        return self._ask(lambda state: self._say(phase=phase), "seq", timeout, lacks)

    def hold(self, lease_s: float = 600.0, timeout: float | None = None) -> Hold:
        """Keep groups from being started, until `release` or the end of the lease; return once it is so.

        Granted when no group is starting, which can take as long as a start does; at least nine tenths of `lease_s`
        are left then. Groups that fail are stopped all the same. Where the call raises, nothing is asked for any more.
        A further call renews the lease; holds do not nest. The result is a context manager that releases:

            with barrier.hold():
                push()

        Raises ValueError when `lease_s` is not above 0.
        """
        if not 0 < lease_s < float("inf"):
            raise ValueError(f"lease_s {lease_s!r}: a number of seconds above 0")
        lease_before = self._hold_until
        asked_at = _NEVER
        first = 0  # the number under which it was asked for

        def granted(state: State) -> bool:
            nonlocal first, asked_at
            if state.reason in _NO_WORD:
                return False
            if first and self._echo(state, "seq") >= first and self._is_held(state):
                return True
            # The lease counts from when it was asked for, and a start that must end first may outlast it.
            if self._clock() - asked_at > lease_s / 10:
                asked_at = self._clock()
                seq = self._say(lease_s=float(lease_s))
                first = first or seq
            return False

        try:
            return Hold(self, self._until(granted, timeout, f"the hold of client {self.client} is not granted"))
        except BaseException:
            if first:
                with contextlib.suppress(BarrierError):
                    self._say(lease_s=max(0.0, lease_before - self._clock()))
            raise

    def release(self, timeout: float | None = 60.0) -> State:
        """End the hold, and return once the coordinator knows; fine also where it had expired, or was never asked."""
        self.current()
        seq = self._say(lease_s=0.0)
        return self._ask(lambda state: seq, "seq", timeout, f"the release by client {self.client} is not heeded")

    def _known(self) -> State:
        """Return the newest value, or raise BarrierError where it says nothing of the groups."""
        state = self.current()
        if state.reason in _NO_WORD:
            raise BarrierError(f"nothing is known of the groups: {self._describe(state)} Call `wait_ready` first")
        return state

    def _until(
        self, done: Callable[[State], bool], timeout: float | None, lacks: str, poll_s: float | None = None
    ) -> State:
        """Look until `done`, and return what was seen then.

        `lacks`: for an error, that what was waited for is not so. `poll_s` None: an answer of the coordinator.
        """
        started_at = self._clock()
        pause_s = max(poll_s or 0.0, _MIN_POLL_S)
        while True:
            state = self.current()
            waited_s = self._clock() - started_at
            timed_out = timeout is not None and waited_s >= timeout
            asked = f"{lacks}: " if poll_s is None else ""
            if state.phase in ("failed", "stopped"):
                last_word = self._silent_s >= _LAST_WORD_HEARTBEATS * state.heartbeat_s
                if state.confirmed or last_word or timed_out:
                    raise self._fleet_failed(state, asked)
            if self._silent_s >= self.lost_after_s:
                raise self._coordinator_lost(state, asked)
            if done(state):
                return state
            if timed_out:
                probes = ", ".join(f"{pool.name} {pool.probes}" for pool in state.pools)
                raise BarrierTimeout(
                    f"{lacks} after {waited_s:.0f} s{f' (probes: {probes})' if asked and probes else ''}: "
                    f"{self._describe(state)} See `slurm-rollout status` and `slurm-rollout events`, or wait longer"
                )
            # Jitter: ranks that start together would otherwise poll a shared file system in step for hours.
            jittered_s = pause_s * (0.75 + os.urandom(1)[0] / 512)
            self._sleep(jittered_s if timeout is None else min(jittered_s, timeout - waited_s))
            if poll_s is None:
                pause_s = min(1.5 * pause_s, _ECHO_POLL_S)

    def _ask(self, write: Callable[[State], int], kind: str, timeout: float | None, lacks: str) -> State:
        """Write something to the coordinator, and wait until its echo reaches the number that it was given."""
        number = 0

        def echoed(state: State) -> bool:
            nonlocal number
            # Only after a look: the number must be above all that this coordinator has heard under this name.
            if state.reason in _NO_WORD:
                return False
            number = number or write(state)
            return self._echo(state, kind) >= number

        return self._until(echoed, timeout, lacks)

    def _echo(self, state: State, kind: str) -> int:
        """Return up to which number the coordinator has done what this client said: `seq` words, `acks`."""
        return int(state.clients.get(self.client, {}).get(kind, 0))

    def _is_held(self, state: State) -> bool:
        return state.clients.get(self.client, {}).get("hold") is True

    def _say(self, phase: str | None = None, lease_s: float | None = None) -> int:
        """Write this client's words, with what is given changed, and return their number."""
        return self._persist(self._words_path, lambda: self._write_words(phase, lease_s))

    def _say_waiting(self, more: int) -> None:
        """Note that so many more threads wait, and tell the coordinator where it is time to. Never fails."""
        with self._pen, contextlib.suppress(OSError):
            self._waiters += more
            now = self._clock()
            if now - self._waiting_at >= _WAITING_AGAIN_S if self._waiters else self._waiting_at > _NEVER:
                self._waiting_at = now if self._waiters else _NEVER
                if not self._others_speak():
                    self._write_words(None, None)

    def _others_speak(self) -> bool:
        """Return whether another process speaks as this client: all ranks of a trainer may sit in `wait_ready`.

        What it holds, or asks for just now, must not be lost to a mere "I wait".
        """
        seq = self._written_seq()
        return seq != self._seq and (seq > self._echo(self._last, "seq") or self._is_held(self._last))

    def _written_seq(self) -> int:
        try:
            return _number(_read(self._words_path), "seq")
        except FileNotFoundError:
            return 0

    def _write_words(self, phase: str | None, lease_s: float | None) -> int:
        now = self._clock()
        last = self._last
        seq = 1 + max(self._seq, self._written_seq(), self._echo(last, "seq"))
        spoken = self._phase if phase is None else phase
        words = {
            "schema": SCHEMA,
            "client": self.client,
            "seq": seq,
            "job": self.job,
            "restart_count": self.restart_count,
            # None: what another process of this client announced stays so until this one says otherwise.
            "phase": last.clients.get(self.client, {}).get("phase", "") if spoken is None else spoken,
            "hold_s": round(max(0.0, self._hold_until - now), 3) if lease_s is None else lease_s,
            "waiting_s": _WAITING_S if self._waiters else 0.0,
        }
        _replace(self._words_path, f".{self.client}.{os.getpid()}.tmp", words)
        self._seq, self._phase = seq, spoken
        if lease_s is not None:
            self._hold_until = now + lease_s if lease_s else _NEVER
        return seq

    def _persist(self, path: str, write: Callable[[], int]) -> int:
        """Call `write`, again for a moment where the file system is not settled; BarrierError when it fails."""
        if not self.client:
            raise BarrierError(f"this reader of {self.path} has no client name: it was made to look, not to speak")
        delays_s = list(_RETRY_S)
        with self._pen:
            while True:
                try:
                    return write()
                except OSError as error:
                    if not delays_s or error.errno not in (errno.ESTALE, errno.ENOENT):
                        raise BarrierError(
                            f"{path} cannot be written: {error.strerror or error}. The coordinator heard nothing; see "
                            f"that {os.path.dirname(self.path)} is its run directory, is yours, and has room"
                        ) from error
                self._sleep(delays_s.pop(0))
                _list(os.path.dirname(path))

    def _fetch(self) -> tuple[State | None, str, str]:
        """Return (value, "", "") or, after trying again for a moment, (None, reason, message)."""
        # A file that stayed unreadable through a whole look gets only one more try in each later look.
        delays_s = _RETRY_S if self._readable else _RETRY_S[:1]
        reason = message = ""
        for delay_s in (0.0, *delays_s):
            if delay_s:
                self._sleep(delay_s)
                _list(os.path.dirname(self.path) or ".")
            try:
                raw = self._read(self.path)
                # `is_current` is asked once per sample: the same bytes are not parsed again.
                parsed = self._parsed
                if parsed is None or parsed[0] != raw:
                    self._parsed = parsed = (raw, _parse(raw, self.path))
            except FileNotFoundError:
                reason, message = "no_file", "does not exist (yet)"
            except OSError as error:
                reason, message = "unreadable", f"cannot be read: {error.strerror or error}"
            except ValueError as error:
                reason, message = "unreadable", f"is not a barrier file, or only half visible: {error}"
            else:
                self._readable = True
                return parsed[1], "", ""
        self._readable = False
        return None, reason, message

    def _note(self, state: State | None, reason: str, message: str) -> State:
        """Take in what was read just now, and return what is known."""
        now = self._clock()
        last = self._last
        # Only time in which this process looked is silence: after `scontrol suspend` the first look sees a
        # long gap, and the coordinator, suspended as well, needs a moment to speak again.
        if self._looked_at is not None:
            self._silent_s += min(now - self._looked_at, self.lost_after_s / 4)
        self._looked_at = now

        if state is not None:
            if not self._is_wanted(state):
                return _nothing(last, "other_job", self._unwanted(state))
            if (state.term, state.seq) < (last.term, last.seq) or state.epoch < last.epoch:
                reason = "outdated"
                message = (
                    f"holds {_stamp(state)}, older than {_stamp(last)} that was there before: "
                    "a late writer, or a run directory made anew"
                )
            else:
                if (state.term, state.seq) > (last.term, last.seq):
                    # After a long pause in looking the move may be old: it proves no more than a first look.
                    watched = now - self._good_at <= self.lost_after_s
                    self._moved_at = now if watched else _NEVER
                    self._silent_s = 0.0
                self._last = last = state
                self._good_at = now

        if now - self._good_at > self.grace_s:
            return _nothing(last, reason, message)
        return last._replace(confirmed=now - self._moved_at <= self.lost_after_s)

    def _is_wanted(self, state: State) -> bool:
        # The file of a run outside Slurm names no job: also a reader that happens to be inside one takes it.
        return not state.job or (self.job in ("", state.job) and self.restart_count in (None, state.restart_count))

    def _unwanted(self, state: State) -> str:
        restart = "any" if self.restart_count is None else self.restart_count
        return (
            f"is of job {state.job}, restart {state.restart_count}, "
            f"and wanted is job {self.job or 'any'}, restart {restart}"
        )

    def _fleet_failed(self, state: State, asked: str) -> FleetFailed:
        ended = state.phase == "stopped" and state.reason != "time_left"
        reason = "stopped" if ended else state.reason or "failed"
        return FleetFailed(
            reason,
            f"{asked}the fleet will not come back: {self._describe(state)} Save and end the trainer; "
            "`slurm-rollout events` has the history",
        )

    def _coordinator_lost(self, state: State, asked: str) -> CoordinatorLost:
        return CoordinatorLost(
            f"{asked}no heartbeat of the coordinator for {self._silent_s:.0f} s (limit {self.lost_after_s:.0f} s): "
            f"{self._describe(state)} Engines may still run, but nobody watches them: see whether "
            "`slurm-rollout up` still runs, and the end of its log"
        )

    def _weights_needed(self, state: State) -> WeightsNeeded:
        stale = tuple(group for group in state.groups if group.weights == "stale" and group.urls)
        return WeightsNeeded(
            stale,
            f"too few groups have current weights: {self._describe(state)} Push weights into "
            f"{', '.join(group.id for group in stale)}, acknowledge the version, and wait again",
        )

    def _describe(self, state: State) -> str:
        """Return sentences for an error: what was seen, where, since when."""
        if state.reason in _NO_WORD:
            return f"{self.path} {state.message}."
        phase = ", ".join(part for part in (f"`{state.phase}`", state.reason, state.message) if part)
        doubt = "" if state.confirmed else " (seq does not move: perhaps a dead coordinator's last word)"
        # What is starting first: it is what a hold waits for.
        idle = sorted((g for g in state.groups if not g.serving), key=lambda g: g.phase != "starting")
        named = "".join(f"; {g.id} {g.phase} since {g.since} {g.reason}".rstrip() for g in idle[:5])
        kept = "".join(f"; {p.name} may not start: {p.may_start}" for p in state.pools if p.may_start)
        more = f"; and {len(idle) - 5} more groups" if len(idle) > 5 else ""
        return (
            f"{self.path} says {phase}{doubt}; run {state.run}, job {state.job or 'none'}, {_stamp(state)}"
            f"{named}{more}{kept}."
        )


class Hold:
    """A granted hold: leaving its `with` block releases it. `state` is what the barrier said when it was granted."""

    def __init__(self, barrier: Barrier, state: State) -> None:
        self._barrier = barrier
        self.state = state

    def release(self, timeout: float | None = 60.0) -> State:
        """As `Barrier.release`."""
        return self._barrier.release(timeout)

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.release()
            return
        # No waiting, and no error of ours: the one that is on its way says what happened.
        with contextlib.suppress(BarrierError):
            self._barrier._say(lease_s=0.0)


def _nothing(last: State, reason: str, message: str) -> State:
    """Return the value for "no word of our own coordinator" after `last`."""
    return last._replace(
        phase="waiting", reason=reason, message=message, pools=(), groups=(), clients={}, confirmed=False, may_start=""
    )


def _stamp(state: State) -> str:
    return f"term {state.term}, seq {state.seq}, epoch {state.epoch}"


def _read(path: str) -> bytes:
    # Opening is what makes an NFS client ask the server; stat() and exists() answer from its cache.
    with open(path, "rb") as file:
        return file.read()


def _list(directory: str) -> None:
    """List a directory for its side effect: NFS and FUSE clients forget that a name was missing in it."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for _ in entries:
            pass


def _number(raw: bytes, key: str) -> int:
    """Return the number that a JSON object has under `key`; 0 where there is none."""
    import json

    with contextlib.suppress(ValueError, TypeError, KeyError):
        return int(json.loads(raw)[key])
    return 0


def _replace(path: str, staging_name: str, words: Mapping[str, Any]) -> None:
    """Replace a client's file as a whole."""
    import json

    staged = os.path.join(os.path.dirname(path), staging_name)
    with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(json.dumps(words).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)


def _append(path: str, ack: Mapping[str, Any], floor: int) -> int:
    """Append an acknowledgement as one line, numbered above `floor` and above all that are there."""
    import json

    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(fd).st_size
        tail = os.pread(fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        n = 1 + max(floor, next(filter(None, (_number(line, "n") for line in reversed(tail.split(b"\n")))), 0))
        # A writer that was killed left half a line: it must not swallow this one.
        begin = b"" if tail.endswith(b"\n") or not tail else b"\n"
        line = begin + json.dumps({"n": n, **ack}).encode() + b"\n"
        if os.write(fd, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    finally:
        os.close(fd)
    return n


def _parse(raw: bytes, path: str) -> State:
    """Parse a barrier file; ValueError when it is none (yet), BarrierError when its schema is newer."""
    import json  # here: a trainer that only imports this module does not pay for it

    top = json.loads(raw)
    try:
        if top["schema"] > SCHEMA:
            raise BarrierError(
                f"{path} has schema {top['schema']}, but {__file__} knows only {SCHEMA}: "
                "update this copy of barrier.py from the slurm-rollout that runs the fleet"
            )
        epoch = int(top["epoch"])
        return State(
            phase=str(top["phase"]),
            reason=str(top.get("reason", "")),
            message=str(top.get("message", "")),
            epoch=epoch,
            term=int(top["term"]),
            seq=int(top["seq"]),
            run=str(top.get("run", "")),
            job=str(top.get("job") or ""),
            restart_count=int(top.get("restart_count", 0)),
            heartbeat_s=float(top.get("heartbeat_s", 5)),
            pools=tuple(
                Pool(**{key: pool[key] for key in Pool._fields if key in pool}) for pool in top.get("pools", ())
            ),
            groups=tuple(_parse_group(group, epoch) for group in top.get("groups", ())),
            clients={str(name): dict(words) for name, words in top.get("clients", {}).items()},
            confirmed=False,
            may_start=str(top.get("may_start", "")),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from error


def _parse_group(group: Mapping[str, Any], epoch: int) -> Group:
    return Group(
        id=str(group["id"]),
        phase=str(group["phase"]),
        serving=group["serving"] is True,
        incarnation=int(group["incarnation"]),
        weights=str(group.get("weights", "none")),
        weights_version=group.get("weights_version"),
        urls=tuple(group.get("urls", ())),
        endpoints={name: tuple(urls) for name, urls in group.get("endpoints", {}).items()},
        master=str(group.get("master", "")),
        since=str(group.get("since", "")),
        reason=str(group.get("reason", "")),
        world_size=int(group.get("world_size", 0)),
        # A coordinator that does not say: it may have been now.
        changed=int(group.get("changed", epoch)),
    )
