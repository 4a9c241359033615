"""A reader of the barrier file that forgets nothing: what a trainer saw, held against what really happened.

It polls as a trainer does, only faster, and asks every URL that it has not seen before. `violations` then compares what
it saw with the run's events.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from slurm_rollout.testing.fleet import Fleet

POLL_S = 0.005

WRITE_S = 1.0
"""An event bears the time of its decision: so much later, on a busy machine, the barrier may be written."""

Ask = Callable[[str], dict[str, Any]]
"""Send a real request to a URL and return the answer; empty when none came."""

Incarnation = tuple[str, int]


class BarrierWatch:
    """Watches from `start` to `stop`, in a thread."""

    def __init__(self, fleet: Fleet, ask: Ask) -> None:
        self._fleet = fleet
        self._ask = ask
        self.lost: set[str] = set()
        """Nodes that were cut off: what was left there may live on beside its successor."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._documents: list[tuple[float, dict[str, Any]]] = []  # when its reading began, and what was read
        self._seen: dict[Incarnation, float] = {}  # first offered to the trainer at
        self._looked = 0
        self._wrong: list[str] = []
        self._unanswered: list[tuple[float, str, Incarnation]] = []
        self._strange: list[tuple[str, Incarnation, Incarnation]] = []  # offered as one, answered as another

    def start(self) -> None:
        self._thread.start()

    def has_looked(self) -> bool:
        """Tell whether it has seen, and asked, everything that the barrier file offers now."""
        return self._looked > 0 and self._looked >= int(self._fleet.barrier().get("seq", 0))

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        last: object = None
        while not self._ended.wait(POLL_S):
            began = time.time()
            try:
                found = self._fleet.run.barrier.stat()
                if (found.st_ino, found.st_mtime_ns) == last:
                    continue
                document = json.loads(self._fleet.run.barrier.read_bytes())
                last = (found.st_ino, found.st_mtime_ns)
            except FileNotFoundError:
                continue
            except ValueError as e:
                self._wrong.append(f"the barrier file was torn: {e}")
                continue
            self._documents.append((began, document))
            for group in document["groups"]:
                self._look(group)
            self._looked = document["seq"]

    def _look(self, group: dict[str, Any]) -> None:
        """An incarnation that is offered for the first time has to be alone, and has to be what answers."""
        key = (group["id"], group["incarnation"])
        if not group["urls"] or key in self._seen:
            return
        self._seen[key] = time.time()
        older = [n for n in self._living(group["id"]) if n < group["incarnation"]]
        if older:
            self._wrong.append(f"{group['id']}: incarnation {group['incarnation']} is offered while {older} live")
        for url in group["urls"]:
            answer = self._ask(url)
            if "group" not in answer:
                self._unanswered.append((time.time(), url, key))
            elif (found := (str(answer["group"]), int(answer.get("incarnation", 0)))) != key:
                self._strange.append((url, key, found))

    def _living(self, group: str) -> list[int]:
        found = self._fleet.environs(ROLLOUT_GROUP=group)
        return [int(e["ROLLOUT_INCARNATION"]) for e in found if e["ROLLOUT_MARK"].rpartition("/")[2] not in self.lost]

    def violations(self) -> list[str]:
        """Return everything that a trainer must never see, and did."""
        wrong = list(self._wrong)
        for (_, before), (_, after) in zip(self._documents, self._documents[1:], strict=False):
            for word in ("epoch", "term", "seq"):
                if after[word] < before[word]:
                    wrong.append(f"{word} fell from {before[word]} to {after[word]}")
        events = self._fleet.events()
        ready = {_key(e): e["at"] for e in reversed(events) if e["type"] == "ready"}
        failed = {_key(e): e["at"] for e in events if e["type"] == "failure"}
        stopped = {_key(e): e["at"] for e in events if e["type"] == "stopped"}
        for began, document in self._documents:
            for group in document["groups"]:
                key = (group["id"], group["incarnation"])
                if group["serving"] and not group["urls"]:
                    wrong.append(f"{key} serves without a URL")
                if not group["urls"]:
                    continue
                if key not in ready:
                    wrong.append(f"{key} is offered, and no event says that it was verified")
                if began > stopped.get(key, began) + WRITE_S:
                    wrong.append(f"{key} is offered {began - stopped[key]:.3f} s after all of it ended")
        for url, key, found in self._strange:
            # To ask takes a moment, in which it may have been restarted. That it left the file in time is seen above.
            if not (found[0] == key[0] and found[1] > key[1] and key in stopped):
                wrong.append(f"{url}, offered as {key}, is {found[0]}.{found[1]}")
        for at, url, key in self._unanswered:
            # It may have died just then; that has to be seen soon.
            if not (key in failed and failed[key] < at + 5.0) and key not in stopped:
                wrong.append(f"{url} of {key} did not answer when it was offered for the first time")
        return sorted(set(wrong))


def _key(event: dict[str, Any]) -> Incarnation:
    return event.get("group", ""), event.get("incarnation", 0)
