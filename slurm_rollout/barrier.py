"""The trainer's view of a rollout fleet: a client of the barrier file (`barrier.json`).

    from slurm_rollout.barrier import Barrier  # or copy this one file into the trainer's tree

    barrier = Barrier()  # the path comes from ROLLOUT_BARRIER
    state = barrier.wait_ready(timeout=3600)  # raises instead of waiting for a fleet that will not come
    generate(state.urls)
    keep = barrier.is_current("actor/0", 3)  # False: the incarnation that made this sample is dead, drop it

Standard library only, Python 3.9, imports nothing of its package. The coordinator replaces the file every few
seconds; nothing here opens a connection. Threads may share a `Barrier`. Let one process of a trainer poll and
broadcast the `State` (it can be pickled): a thousand pollers are a load that a shared file system feels.
"""

from __future__ import annotations

import contextlib
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
    "Pool",
    "State",
    "WeightsNeeded",
]

SCHEMA = 1

# For a moment, an atomic replace can show as ESTALE (NFS) or as ENOENT (some FUSE file systems).
_RETRY_S = (0.02, 0.05, 0.1, 0.2)
_MIN_POLL_S = 0.05
# A last word `failed` or `stopped` may be an earlier coordinator's, whose successor is just starting.
_LAST_WORD_HEARTBEATS = 3
_NEVER = float("-inf")


class Pool(NamedTuple):
    """Groups with the same engine settings."""

    name: str
    phase: str
    ready: int
    desired: int
    min_ready: int


class Group(NamedTuple):
    """The members that start, serve and die together."""

    id: str
    phase: str
    serving: bool
    """May get requests: proved alive and, where the pool is trained, with current weights."""
    incarnation: int
    """The n-th start of the group, from 1; 0 before the first."""
    weights: str
    """`stale`: alive, to be pushed into, not serving. `none`: the trainer pushes no weights here."""
    weights_version: int | None
    urls: tuple[str, ...]
    """Empty unless this incarnation was proved alive."""
    endpoints: Mapping[str, tuple[str, ...]]
    """Further URLs by name, such as `session`."""
    master: str
    """Rendezvous address `host:port`; never an address for requests."""
    since: str
    """When `phase` was entered, by the coordinator's wall clock: for people only."""
    reason: str

    @property
    def pool(self) -> str:
        """Name of the group's pool."""
        return self.id.rpartition("/")[0]


class State(NamedTuple):
    """What the barrier file says, or why it says nothing."""

    phase: str
    """`waiting`, `needs_weights`, `ready`, `failed` or `stopped`: the worst of the pools."""
    reason: str
    """`degraded`: ready with fewer groups than desired. This client's own, always with phase `waiting`, when
    there is no word of the trainer's coordinator: `no_file`, `unreadable`, `outdated`, `other_job`."""
    message: str
    epoch: int
    """Version of the set of (group, incarnation) that may serve; only grows."""
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
    """What the coordinator heard from trainers, by client."""
    confirmed: bool
    """The coordinator was seen alive: `seq` moved while this client watched, at most `lost_after_s` ago."""

    @property
    def urls(self) -> tuple[str, ...]:
        """All URLs that may get requests now, of every pool."""
        return tuple(url for group in self.groups if group.serving for url in group.urls)

    def endpoint(self, name: str) -> tuple[str, ...]:
        """All further URLs called `name` of the groups that serve now; empty when there are none."""
        return tuple(url for group in self.groups if group.serving for url in group.endpoints.get(name, ()))


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
    """The fleet will not come back; `reason` is one word, `stopped` when it was ended on purpose."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason


class WeightsNeeded(BarrierError):
    """Enough groups are alive, too few have current weights; `groups` are those to push into."""

    def __init__(self, groups: tuple[Group, ...], message: str) -> None:
        super().__init__(groups, message)
        self.groups = groups


class Barrier:
    """A reader of one barrier file.

    `path`: the file; by default the environment's ROLLOUT_BARRIER. BarrierError when neither says one.
    `job`, `restart_count`: whose file is wanted; another one means `waiting`. By default this process's own
    SLURM_JOB_ID and SLURM_RESTART_COUNT; outside Slurm, or with `job=""`, any.
    `lost_after_s`: silence after which the coordinator counts as lost.
    `grace_s`: how long the last good value is kept while the file cannot be read.
    `clock` (monotonic seconds), `sleep` (seconds), `read` (path to bytes, or OSError) are there for tests.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
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
        `timeout`: seconds; None: as long as the coordinator lives.
        `poll_s`: seconds between looks, with jitter; at least 0.05.

        Raises FleetFailed, CoordinatorLost, WeightsNeeded, BarrierTimeout; BarrierError as `current` does.
        """
        started_at = self._clock()
        while True:
            state = self.current()
            waited_s = self._clock() - started_at
            timed_out = timeout is not None and waited_s >= timeout
            if state.phase in ("failed", "stopped"):
                last_word = self._silent_s >= _LAST_WORD_HEARTBEATS * state.heartbeat_s
                if state.confirmed or last_word or timed_out:
                    raise self._fleet_failed(state)
            if self._silent_s >= self.lost_after_s:
                raise self._coordinator_lost(state)
            if state.confirmed and state.phase == "needs_weights":
                raise self._weights_needed(state)
            new_enough = after_epoch is None or state.epoch > after_epoch
            if state.confirmed and state.phase == "ready" and new_enough:
                return state
            if timed_out:
                raise self._timed_out(state, waited_s, after_epoch)
            # Jitter: ranks that start together would otherwise poll a shared file system in step for hours.
            pause_s = max(poll_s, _MIN_POLL_S) * (0.75 + os.urandom(1)[0] / 512)
            self._sleep(pause_s if timeout is None else min(pause_s, timeout - waited_s))

    def is_current(self, group: str, incarnation: int) -> bool:
        """Return whether this incarnation of `group` is the one that serves now, by the file's last word.

        Reads the file and asks nobody else. A sample that another incarnation made is to be dropped.
        """
        return any(
            known.serving and known.id == group and known.incarnation == incarnation for known in self.current().groups
        )

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

    def _fleet_failed(self, state: State) -> FleetFailed:
        reason = "stopped" if state.phase == "stopped" else state.reason or "failed"
        return FleetFailed(
            reason,
            f"the fleet will not come back: {self._describe(state)} Save and end the trainer; "
            "`slurm-rollout events` has the history",
        )

    def _coordinator_lost(self, state: State) -> CoordinatorLost:
        return CoordinatorLost(
            f"no heartbeat of the coordinator for {self._silent_s:.0f} s (limit {self.lost_after_s:.0f} s): "
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

    def _timed_out(self, state: State, waited_s: float, after_epoch: int | None) -> BarrierTimeout:
        wanted = "" if after_epoch is None else f" in an epoch above {after_epoch}"
        return BarrierTimeout(
            f"the fleet is not ready{wanted} after {waited_s:.0f} s: {self._describe(state)} "
            "See `slurm-rollout status` and `slurm-rollout events`, or wait longer"
        )

    def _describe(self, state: State) -> str:
        """Return sentences for an error: what was seen, where, since when."""
        if state.reason in _NO_WORD:
            return f"{self.path} {state.message}."
        phase = ", ".join(part for part in (f"`{state.phase}`", state.reason, state.message) if part)
        doubt = "" if state.confirmed else " (seq does not move: perhaps a dead coordinator's last word)"
        idle = [group for group in state.groups if not group.serving]
        named = "".join(f"; {g.id} {g.phase} since {g.since} {g.reason}".rstrip() for g in idle[:5])
        more = f"; and {len(idle) - 5} more groups" if len(idle) > 5 else ""
        return (
            f"{self.path} says {phase}{doubt}; run {state.run}, job {state.job or 'none'}, {_stamp(state)}"
            f"{named}{more}."
        )


def _nothing(last: State, reason: str, message: str) -> State:
    """Return the value for "no word of our own coordinator" after `last`."""
    return last._replace(
        phase="waiting", reason=reason, message=message, pools=(), groups=(), clients={}, confirmed=False
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
        return State(
            phase=str(top["phase"]),
            reason=str(top.get("reason", "")),
            message=str(top.get("message", "")),
            epoch=int(top["epoch"]),
            term=int(top["term"]),
            seq=int(top["seq"]),
            run=str(top.get("run", "")),
            job=str(top.get("job") or ""),
            restart_count=int(top.get("restart_count", 0)),
            heartbeat_s=float(top.get("heartbeat_s", 5)),
            pools=tuple(
                Pool(p["name"], p["phase"], int(p["ready"]), int(p["desired"]), int(p["min_ready"]))
                for p in top.get("pools", ())
            ),
            groups=tuple(_parse_group(group) for group in top.get("groups", ())),
            clients=top.get("clients", {}),
            confirmed=False,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from error


def _parse_group(group: Mapping[str, Any]) -> Group:
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
    )
