"""The run directory on a shared file system: one writer per term, readers that see it late.

Who may write is decided by the real `store.Store` on a real directory; the contents are kept in memory, with the time
at which each version was written, so that every reader can be shown what its cache would show.
"""

from __future__ import annotations

import errno
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from slurm_rollout.core.model import Decision, Event, Observation, Request, RunState
from slurm_rollout.rundir import RunDir
from slurm_rollout.simulation.clock import Chance, Timeline
from slurm_rollout.simulation.words import ClientFiles
from slurm_rollout.store import Store


@dataclass(slots=True)
class Version:
    """One content of `barrier.json`, and the heartbeats that followed it."""

    at: float
    document: dict[str, Any]
    heartbeat_s: float
    until: float | None = None  # no heartbeat of this writer came later; None: it still writes

    def seq(self, now: float) -> int:
        """Return the newest `seq` at a moment. Heartbeats change nothing else, so they are not written one by one."""
        end = now if self.until is None else min(now, self.until)
        return int(self.document["seq"]) + max(0, int((end - self.at) / self.heartbeat_s))


class SharedFiles:
    """What lies in the run directory."""

    def __init__(self, run: RunDir, time: Timeline, chance: Chance) -> None:
        self.run = run
        self.clients = ClientFiles(run, time, chance)
        self._time = time
        self._chance = chance
        self.state: RunState | None = None
        self.intent: tuple[RunState, Observation, Decision] | None = None  # what is being written
        self.on_barrier: Callable[[dict[str, Any]], None] = lambda document: None
        self.versions: list[Version] = []
        self._starts: list[float] = []
        self.requests: list[tuple[float, Request]] = []  # visible from, request
        self.full_until = 0.0  # nothing can be written
        self.delay_s = 0.5  # how old a reader's view may be
        self.errors_until = 0.0  # readers get ESTALE and ENOENT now and then
        self._reads = 0

    # ----------------------------------------------------------------------------------------------------- the writer's

    @property
    def is_full(self) -> bool:
        return self._time.now < self.full_until

    def seq(self) -> int:
        return self.versions[-1].seq(self._time.now) if self.versions else 0

    def put_barrier(self, document: dict[str, Any], heartbeat_s: float) -> None:
        now = self._time.now
        if self.versions and self.versions[-1].until is None:
            self.versions[-1].until = now
        self.versions.append(Version(now, document, heartbeat_s))
        self._starts.append(now)
        self.on_barrier(document)
        if len(self.versions) > 400:
            del self.versions[:200], self._starts[:200]

    def silence(self) -> None:
        """The writer stops: no heartbeat from now on."""
        if self.versions and self.versions[-1].until is None:
            self.versions[-1].until = self._time.now

    def heartbeat_at(self) -> float:
        """Return when the last heartbeat was written."""
        if not self.versions:
            return 0.0
        until = self.versions[-1].until
        return self._time.now if until is None else until

    def waiting(self) -> list[Request]:
        return [r for visible_at, r in self.requests if visible_at <= self._time.now]

    def heeded(self, done: set[str]) -> None:
        self.requests = [(at, r) for at, r in self.requests if r.id not in done]
        done.clear()

    # ------------------------------------------------------------------------------------------------------- a reader's

    def read(self, path: str) -> bytes:
        """Return the barrier as a reader sees it: perhaps late, perhaps older than last time, perhaps not at all."""
        self._reads += 1
        age_s = self._chance.between(0.0, 1.0, "read", self._reads) ** 4 * self.delay_s
        if self._time.now < self.errors_until and self._chance.between(0.0, 1.0, "error", self._reads) < 0.5:
            if self._reads % 3:
                raise OSError(116, "Stale file handle", path)
            raise FileNotFoundError(2, "No such file or directory", path)
        seen_at = self._time.now - age_s
        index = bisect_right(self._starts, seen_at) - 1
        if index < 0:
            raise FileNotFoundError(2, "No such file or directory", path)
        version = self.versions[index]
        text = json.dumps({**version.document, "seq": version.seq(seen_at)})
        if self._time.now < self.errors_until and self._reads % 7 == 0:
            text = text[: len(text) // 2]
        return text.encode()

    def newest(self) -> dict[str, Any]:
        """Return what is in the file now."""
        return self.versions[-1].document if self.versions else {}


class SimStore(Store):
    """The real rules of who may write; contents in memory. `passes` is told what is written next."""

    def __init__(self, files: SharedFiles, term: int, heartbeat_s: float, passes: Callable[[str], None]) -> None:
        super().__init__(files.run, term, private=True)
        self._files = files
        self._heartbeat_s = heartbeat_s
        self._passes = passes

    def open(self) -> None:
        self._needs_room()
        super().open()

    def add_events(self, events: Iterable[Event], wall: float) -> list[dict[str, Any]]:
        self._passes("events")
        self._begin()
        self._check_lease()
        self._needs_room()
        return []

    def write_state(self, state: RunState) -> None:
        self._passes("state")
        self._begin()
        self._check_lease()
        self._needs_room()
        self._files.state = state

    def write_barrier(self, document: Any) -> None:
        self._passes("barrier")
        self._begin()
        self._check_lease()
        self._needs_room()
        # Heartbeats that were not written one by one were seen all the same.
        document["seq"] = max(int(document["seq"]), self._files.seq() + 1)
        super().write_barrier(document)
        self._files.put_barrier(document, self._heartbeat_s)

    def write_status(self, document: Any) -> None:
        self._check_lease()

    def _needs_room(self) -> None:
        if self._files.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.run.path))
