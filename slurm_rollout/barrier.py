"""The trainer's view of a rollout fleet: a client of the barrier file (`barrier.json`).

    from slurm_rollout.barrier import Barrier      # or copy this one file into the trainer's tree

    barrier = Barrier()                            # the path comes from ROLLOUT_BARRIER
    state = barrier.wait_ready(timeout=3600)       # raises instead of waiting for a fleet that will not come
    generate(state.urls)
    keep = barrier.is_current("actor/0", 3)        # False: that sample's incarnation is dead, drop it

Standard library only, Python 3.9, imports nothing of its package. The coordinator replaces the file atomically every few
seconds; nothing here opens a connection. A `Barrier` may be shared by threads. One process of a trainer polls and
broadcasts the `State` (it can be pickled); a thousand ranks polling one file is a load that a file system feels.
"""

from __future__ import annotations

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

# Within one look: an atomic replace on NFS shows as ESTALE, on some FUSE file systems as ENOENT, for a moment.
_RETRY_S = (0.02, 0.05, 0.1, 0.2)
_MIN_POLL_S = 0.05
# A last word that says `failed` or `stopped` may be an earlier coordinator's, whose successor is just starting.
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
    """May get requests of this trainer: proved alive, and with current weights where the pool is trained."""
    incarnation: int
    """The n-th start of the group, from 1; 0 before the first."""
    weights: str
    """`stale`: alive, to be pushed into, not serving. `none` where the trainer pushes no weights."""
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
    """`degraded`: ready with fewer groups than desired. `no_file`, `unreadable`, `outdated`, `other_job`: said by this
    client, with phase `waiting`, when there is no word of its own coordinator to go by."""
    message: str
    epoch: int
    """Version of the set of (group, incarnation) that may serve; only grows."""
    term: int
    """The n-th coordinator of the run."""
    seq: int
    """Grows with every heartbeat."""
    run: str
    job: str
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
        """All further URLs called `name` (such as `session`) of the groups that serve now; empty when there are none."""
        return tuple(url for group in self.groups if group.serving for url in group.endpoints.get(name, ()))


class BarrierError(Exception):
    """Root of this module's errors; itself: the barrier file cannot be used, and waiting would not help."""

    def __str__(self) -> str:
        # Subclasses carry all arguments in `args`, message last, so that they survive pickling between processes.
        return str(self.args[-1]) if self.args else ""


class BarrierTimeout(BarrierError):
    """The fleet was not ready in time; the coordinator is alive as far as can be seen."""


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

    `path`: the file; default the environment's ROLLOUT_BARRIER. BarrierError when neither says one.
    `job`, `restart_count`: whose file is wanted; a file of another one means `waiting`. Default: this process's own
    SLURM_JOB_ID and SLURM_RESTART_COUNT; outside Slurm, or with `job=""`, every file is taken.
    `lost_after_s`: silence after which the coordinator counts as lost.
    `grace_s`: how long the last good value is kept while the file cannot be read.
    `clock` (seconds, monotonic), `sleep` (seconds), `read` (path to bytes, raising OSError) are there for tests.
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
        self.path = os.fspath(path or os.environ.get("ROLLOUT_BARRIER", ""))
        if not self.path:
            raise BarrierError(
                "no barrier file given, and ROLLOUT_BARRIER is not set: run the trainer under `slurm-rollout up`, "
                "or pass the path of barrier.json in the run directory"
            )
        if os.path.isdir(self.path):
            raise BarrierError(f"{self.path} is a directory: pass the path of the barrier.json in it")
        own_job = os.environ.get("SLURM_JOB_ID", "")
        self.job = own_job if job is None else str(job)
        # Slurm sets SLURM_RESTART_COUNT only from the first restart on (22.05), and only for the process's own job.
        if restart_count is None and self.job and self.job == own_job:
            restart_count = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self.restart_count = restart_count
        self.lost_after_s = lost_after_s
        self.grace_s = grace_s
        self._clock = clock
        self._sleep = sleep
        self._read = read or _read

        self._lock = threading.Lock()  # for all below; never held while reading or sleeping
        self._parsed: tuple[bytes, State] | None = None
        self._last: State | None = None  # the last good value
        self._mark = (-1, -1)  # highest (term, seq)
        self._epoch = 0  # highest epoch
        self._good_at = _NEVER  # last good read
        self._looked_at: float | None = None
        self._moved_at = _NEVER  # (term, seq) was seen to move
        self._silent_s = 0.0
        self._readable = True

    def current(self) -> State:
        """Return the newest value, at once or after a short retry (below a second).

        A file that cannot be read is no error: the last good value holds for `grace_s`, then the phase is `waiting` and
        `reason` and `message` say why. BarrierError only when the file's schema is newer than this client.
        """
        state, reason, message = self._fetch()
        with self._lock:
            return self._note(state, reason, message)

    def wait_ready(
        self, after_epoch: int | None = None, timeout: float | None = None, poll_s: float = 1.0
    ) -> State:
        """Wait until the fleet is ready, confirmed by a living coordinator, and return what it says then.

        `after_epoch`: return only an epoch above it. `timeout`: seconds; None waits as long as the coordinator lives.
        `poll_s`: seconds between looks, with jitter; at least 0.05.

        Raises FleetFailed, CoordinatorLost, WeightsNeeded, and BarrierTimeout; BarrierError as `current` does.
        """
        started_at = self._clock()
        while True:
            state = self.current()
            waited_s = self._clock() - started_at
            in_time = timeout is None or waited_s < timeout
            if state.phase in ("failed", "stopped"):
                last_word = self._silent_s >= _LAST_WORD_HEARTBEATS * state.heartbeat_s
                if state.confirmed or last_word or not in_time:
                    raise self._fleet_failed(state)
            if self._silent_s >= self.lost_after_s:
                raise self._coordinator_lost(state)
            if state.confirmed and state.phase == "needs_weights":
                raise self._weights_needed(state)
            if state.confirmed and state.phase == "ready":
                if after_epoch is None or state.epoch > after_epoch:
                    return state
            if timeout is not None and not in_time:
                raise self._timed_out(state, waited_s, after_epoch)
            # Ranks that start together would otherwise poll a shared file system in step for hours.
            pause_s = max(poll_s, _MIN_POLL_S) * (0.75 + os.urandom(1)[0] / 512)
            self._sleep(pause_s if timeout is None else min(pause_s, timeout - waited_s))

    def is_current(self, group: str, incarnation: int) -> bool:
        """True iff this incarnation of `group` is the one that serves now, by the file's last word.

        Reads the file and asks nobody. A sample that another incarnation began is to be dropped.
        """
        return any(
            known.id == group and known.incarnation == incarnation and known.serving
            for known in self.current().groups
        )

    # ------------------------------------------------------------------------------------------------------- reading

    def _fetch(self) -> tuple[State | None, str, str]:
        """Return (value, "", "") or (None, reason, message); tries again for a moment."""
        # A file that stayed unreadable through a whole round gets only one more try in the following rounds.
        delays_s = _RETRY_S if self._readable else _RETRY_S[:1]
        reason = message = ""
        for attempt in range(len(delays_s) + 1):
            if attempt:
                self._sleep(delays_s[attempt - 1])
                _list(os.path.dirname(self.path) or ".")
            try:
                state = self._parse(self._read(self.path))
            except FileNotFoundError:
                reason, message = "no_file", "there is no such file (yet)"
            except OSError as error:
                reason, message = "unreadable", f"cannot be read: {error.strerror or error}"
            except ValueError as error:
                reason, message = "unreadable", f"is not a barrier file, or only half visible: {error}"
            else:
                self._readable = True
                return state, "", ""
        self._readable = False
        return None, reason, message

    def _parse(self, raw: bytes) -> State:
        """Parse, unless these are the bytes of the last time: `is_current` is asked once per sample."""
        parsed = self._parsed
        if parsed is None or parsed[0] != raw:
            self._parsed = parsed = (raw, _parse(raw, self.path))
        return parsed[1]

    def _note(self, state: State | None, reason: str, message: str) -> State:
        """Take in what was read just now, and return what is known."""
        now = self._clock()
        # Only time in which this process looked counts as silence: after `scontrol suspend` or SIGSTOP the first look
        # sees a long gap, and the coordinator, stopped as well, needs a moment to speak again.
        if self._looked_at is not None:
            self._silent_s += min(now - self._looked_at, self.lost_after_s / 4)
        self._looked_at = now

        if state is not None and not self._is_wanted(state):
            return self._nothing("other_job", self._unwanted(state))
        if state is not None and ((state.term, state.seq) < self._mark or state.epoch < self._epoch):
            reason = "outdated"
            message = (
                f"holds an outdated word (term {state.term}, seq {state.seq}, epoch {state.epoch}) after term "
                f"{self._mark[0]}, seq {self._mark[1]}, epoch {self._epoch} was seen: a late writer, or a run "
                "directory that was made anew (then make a new Barrier)"
            )
        elif state is not None:
            mark = (state.term, state.seq)
            if mark > self._mark:
                # After a long pause of looking the move may be old: then it confirms no more than a first look does.
                watched = now - self._good_at <= self.lost_after_s
                self._moved_at = now if watched else _NEVER
                self._silent_s = 0.0
            self._last, self._mark, self._epoch, self._good_at = state, mark, state.epoch, now

        if self._last is None or now - self._good_at > self.grace_s:
            return self._nothing(reason, message)
        return self._last._replace(confirmed=now - self._moved_at <= self.lost_after_s)

    def _is_wanted(self, state: State) -> bool:
        # A run outside Slurm has no job: its file is taken also by a reader that happens to be inside one.
        if not self.job or not state.job:
            return True
        return state.job == self.job and self.restart_count in (None, state.restart_count)

    def _unwanted(self, state: State) -> str:
        wanted = f"job {self.job}"
        if self.restart_count is not None:
            wanted += f" restart {self.restart_count}"
        return (
            f"is of job {state.job} restart {state.restart_count}, wanted is {wanted}: its coordinator has not written "
            "yet, or pass job= and restart_count= to Barrier"
        )

    def _nothing(self, reason: str, message: str) -> State:
        """Return the value for "no word of our own coordinator"."""
        return State(
            phase="waiting",
            reason=reason,
            message=message,
            epoch=self._epoch,
            term=max(self._mark[0], 0),
            seq=max(self._mark[1], 0),
            run=self._last.run if self._last else "",
            job=self.job,
            restart_count=self.restart_count or 0,
            heartbeat_s=self._last.heartbeat_s if self._last else 0.0,
            pools=(),
            groups=(),
            clients={},
            confirmed=False,
        )

    # -------------------------------------------------------------------------------------------------------- errors

    def _fleet_failed(self, state: State) -> FleetFailed:
        reason = "stopped" if state.phase == "stopped" else state.reason or "failed"
        return FleetFailed(
            reason,
            f"the fleet {'was' if reason == 'stopped' else 'has'} {state.phase} and will not come back: "
            f"{_said(state)} ({self._where(state)}).{_groups_at_fault(state)} Save and end the trainer; "
            "`slurm-rollout report` has the history",
        )

    def _coordinator_lost(self, state: State) -> CoordinatorLost:
        if state.reason in _NO_WORD:
            seen = f"the file {state.message}"
        else:
            seen = f"seq stays at {state.seq}, its last word was {_said(state)}"
        return CoordinatorLost(
            f"no heartbeat of the coordinator for {self._silent_s:.0f} s (limit {self.lost_after_s:.0f} s): {seen} "
            f"({self._where(state)}). Engines may still run, but nobody watches or restarts them: see whether "
            "`slurm-rollout up` still runs, and the end of its log"
        )

    def _weights_needed(self, state: State) -> WeightsNeeded:
        stale = tuple(group for group in state.groups if group.weights == "stale" and group.urls)
        names = ", ".join(f"{group.id} (incarnation {group.incarnation})" for group in stale)
        return WeightsNeeded(
            stale,
            f"too few groups have current weights: {_said(state)} ({self._where(state)}). Push weights into {names}, "
            "acknowledge the version, then wait again",
        )

    def _timed_out(self, state: State, waited_s: float, after_epoch: int | None) -> BarrierTimeout:
        if state.reason in _NO_WORD:
            seen = f"the file {state.message}"
        elif not state.confirmed:
            seen = f"its last word is {_said(state)}, but seq has not moved, so it may be a dead coordinator's"
        elif state.phase == "ready":
            seen = f"ready, but epoch {state.epoch} is not above {after_epoch}"
        else:
            seen = _said(state)
        return BarrierTimeout(
            f"the fleet is not ready after {waited_s:.0f} s: {seen} ({self._where(state)})."
            f"{_groups_at_fault(state)} See `slurm-rollout status` and `slurm-rollout describe GROUP`, or wait longer"
        )

    def _where(self, state: State) -> str:
        run = f", run {state.run} of job {state.job or '-'}, epoch {state.epoch}, term {state.term}" if state.run else ""
        return f"{self.path}{run}"


_NO_WORD = ("no_file", "unreadable", "outdated", "other_job")


def _said(state: State) -> str:
    return f"`{state.phase}`" + "".join(f", {part}" for part in (state.reason, state.message) if part)


def _groups_at_fault(state: State) -> str:
    lines = [
        f" {group.id} is {group.phase} since {group.since or '?'}" + (f" ({group.reason})" if group.reason else "")
        for group in state.groups
        if not group.serving
    ]
    more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
    return ";".join(lines[:5]) + more + "." if lines else ""


def _read(path: str) -> bytes:
    # Opening is what makes an NFS client ask the server; stat() and exists() answer from its cache.
    with open(path, "rb") as file:
        return file.read()


def _list(directory: str) -> None:
    """List a directory for its side effect: FUSE and NFS clients forget that they did not find a name in it."""
    try:
        with os.scandir(directory) as entries:
            for _ in entries:
                pass
    except OSError:
        pass  # the read that follows says what is wrong


def _parse(raw: bytes, path: str) -> State:
    """Parse a barrier file; ValueError when it is none (yet), BarrierError when it is of a newer schema."""
    import json  # here: a trainer that only imports this module does not pay for it

    top = json.loads(raw)
    try:
        if top["schema"] > SCHEMA:
            raise BarrierError(
                f"{path} has schema {top['schema']}, this client knows {SCHEMA}: the coordinator is newer than this copy "
                f"of barrier.py ({__file__}); copy it again from the installed slurm-rollout"
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
                Pool(
                    name=str(pool["name"]),
                    phase=str(pool["phase"]),
                    ready=int(pool["ready"]),
                    desired=int(pool["desired"]),
                    min_ready=int(pool["min_ready"]),
                )
                for pool in top.get("pools", ())
            ),
            groups=tuple(
                Group(
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
                for group in top.get("groups", ())
            ),
            clients=top.get("clients", {}),
            confirmed=False,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
