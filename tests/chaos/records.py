"""Where a chaos run's records are, and who writes them. Standard library only: nothing of the product is believed.

Every file is JSON lines; every time is Unix time, the same on all "nodes" of the one machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BARRIER, FAULTS, PROBES, PROCESSES, CALLS, END = (
    f"{name}.jsonl" for name in ("barrier", "faults", "probes", "processes", "calls", "end")
)
POLL_S = 0.02
SAMPLE_S = 1.0


class Recorder:
    """Appends lines to one file of the records."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **line: object) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Watch(threading.Thread):
    """Calls `look` again and again, until it is stopped; its error is raised by `stop`."""

    def __init__(self, look: Callable[[], None], period_s: float) -> None:
        super().__init__(daemon=True)
        self._look = look
        self._period_s = period_s
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._ended.wait(self._period_s):
                self._look()
        except BaseException as error:
            self._error = error

    def stop(self) -> None:
        self._ended.set()
        self.join()
        if self._error is not None:
            raise self._error


def barrier_watch(barrier: Path, out: Path) -> Watch:
    """Record every version of the barrier file: when its reading began and ended, and the text where it is no JSON."""
    recorder = Recorder(out / BARRIER)
    last = b""

    def look() -> None:
        nonlocal last
        began = time.time()
        try:
            text = barrier.read_bytes()
        except FileNotFoundError:
            return
        if text == last:
            return
        last = text
        try:
            recorder.write(began=began, at=time.time(), document=json.loads(text))
        except ValueError:
            recorder.write(began=began, at=time.time(), torn=text.decode(errors="replace"))

    return Watch(look, POLL_S)


def process_watch(uid: int, nodes: Mapping[str, str], out: Path) -> Watch:
    """Record which members of which incarnations live where. `nodes` maps a pid namespace to the node that it is."""
    recorder = Recorder(out / PROCESSES)

    def look() -> None:
        at = time.time()
        first = living(uid, nodes)
        found: dict[str, set[int]] = {}
        for member in first:
            found.setdefault(member["group"], set()).add(member["incarnation"])
        if any(len(incarnations) > 1 for incarnations in found.values()):
            # A look takes a while: who ended before the next one began to live has not lived beside it.
            again = [m["pid"] for m in living(uid, nodes)]
            first = [m for m in first if m["pid"] in again]
        recorder.write(at=at, living=first)

    return Watch(look, SAMPLE_S)


def living(uid: int, nodes: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the user's engines that live now, as their environments tell it."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, KeyError, ValueError):
            if not entry.isdigit() or os.stat(f"/proc/{entry}").st_uid != uid:
                continue
            pairs = Path(f"/proc/{entry}/environ").read_bytes().decode(errors="replace").split("\0")
            environ = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            found.append(
                {
                    "pid": int(entry),
                    "group": environ["ROLLOUT_GROUP"],
                    "incarnation": int(environ["ROLLOUT_INCARNATION"]),
                    "rank": int(environ["ROLLOUT_RANK"]),
                    "node": nodes.get(os.readlink(f"/proc/{entry}/ns/pid"), "?"),
                    "state": _state(entry),
                }
            )
    return [member for member in found if member["state"] not in ("Z", "X")]


def _state(pid: str) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]


def user_calls(sdiag: str, uid: int) -> int:
    """Return how many calls of the user slurmctld has answered since its start, as `sdiag` prints it."""
    by_user = sdiag.partition("Remote Procedure Call statistics by user")[2]
    counts = {int(who): int(n) for who, n in re.findall(r"^\s*\S+\s*\(\s*(\d+)\)\s*count:\s*(\d+)", by_user, re.M)}
    return counts.get(uid, 0)
