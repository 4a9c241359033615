"""Clients' files on a shared file system: trainers write them on one host, the coordinator sees them later on another.

Both sides are real: `barrier.Barrier` writes into one directory, `clients.Clients` reads another one, and what was
written comes from there to here as late as the file system is. A file's versions come in their order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurm_rollout.rundir import RunDir
from slurm_rollout.simulation.clock import Chance, Timeline


class ClientFiles:
    """What lies in `clients/`, as its writers and as its reader see it."""

    def __init__(self, run: RunDir, time: Timeline, chance: Chance) -> None:
        self.barrier = run.path / "trainers-host" / "barrier.json"
        """The path that clients are given. What they read there comes from `files.SharedFiles`."""
        self.delay_s = 0.5  # how late the coordinator may see what was written
        self.half_until = 0.0  # until then a file may be seen half first
        self.changes = 0  # of what the coordinator sees
        self.on_words: Callable[[str, dict[str, Any]], None] = lambda client, words: None
        self.on_acks: Callable[[str, int], None] = lambda client, newest: None
        self._written, self._seen = self.barrier.parent / "clients", run.clients
        self._written.mkdir(parents=True)
        self._seen.mkdir()
        self._time = time
        self._chance = chance
        self._arrives: dict[str, float] = {}
        self._count = 0
        self._era = 0

    def forget(self) -> None:
        """As `store.prepare`: the words of trainers of before are gone, what they acknowledged stays."""
        self._era += 1
        self.changes += 1
        for folder in (self._written, self._seen):
            for words in folder.glob("*.json"):
                words.unlink()

    def acks(self, client: str) -> Path:
        """Return the file of a client's acknowledgements, where it writes them."""
        return self._written / f"{client}.acks.jsonl"

    def wrote(self, client: str, *, acks: bool) -> None:
        """Let the coordinator see what a client wrote just now."""
        name = f"{client}.acks.jsonl" if acks else f"{client}.json"
        data, now, era = (self._written / name).read_bytes(), self._time.now, self._era
        self._count += 1
        late_s = self._chance.between(0.0, 1.0, "words", self._count) ** 4 * self.delay_s
        at = max(now + 0.001 + late_s, self._arrives.get(name, 0.0))
        if now < self.half_until and self._count % 2:
            self._time.at(at, lambda: self._show(name, data[: len(data) - 9], era))
            at += self._chance.between(0.1, 5.0, "half", self._count)
        self._arrives[name] = at
        self._time.at(at, lambda: self._show(name, data, era, client))

    def _show(self, name: str, data: bytes, era: int, client: str = "") -> None:
        acks = name.endswith(".jsonl")
        if era != self._era and not acks:
            return
        (self._seen / name).write_bytes(data)
        self.changes += 1
        if client and acks:
            self.on_acks(client, int(json.loads(data.splitlines()[-1])["n"]))
        elif client:
            self.on_words(client, json.loads(data))
