"""Which rank of a hung group is the first that can be named as stuck? From its agents' snapshots. Pure.

A snapshot shows what every process did at one moment (docs/agent-protocol.md), not why. When one member stops, the
others soon wait for it in a collective and look just as stuck; so the signs are tried in the order in which they tell
the one that stopped from the ones that wait.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SILENT_FIRST_S = 5.0
"""By so much a log must have gone silent before all others to mean something."""

_COLLECTIVE = re.compile(
    r"all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|broadcast|barrier|collective|distributed|nccl|gloo|deep_?ep",
    re.IGNORECASE,
)
_FRAME = re.compile(r"\s+(?P<function>.+ \([^()]*?)(:\d+)?\)")

Snapshots = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    rank: int
    why: str  # for people, one line


def stuck(snapshots: Snapshots) -> Finding | None:
    """Return the first rank that can be named as stuck, and by which sign; None where nothing tells it from the others.

    Args:
        snapshots: rank -> what its agent wrote; of one incarnation. Keys may be missing.

    The strongest sign decides, and of several ranks that show it, the lowest.
    """
    for sign in (_stopped, _in_the_kernel, _gone, _odd_stack, _silent_first):
        found = sign(snapshots)
        if found:
            rank = min(found)
            return Finding(rank=rank, why=found[rank])
    return None


def _stopped(snapshots: Snapshots) -> dict[int, str]:
    def look(process: Mapping[str, Any]) -> str:
        if process.get("state") not in ("T", "t"):
            return ""
        return f"stopped by a signal: {_name(process)} is in state {process['state']}"

    return _by_process(snapshots, look)


def _in_the_kernel(snapshots: Snapshots) -> dict[int, str]:
    def look(process: Mapping[str, Any]) -> str:
        blocked = process.get("blocked")
        if not isinstance(blocked, list) or not blocked:
            return ""
        where = ", ".join(str(name) or "where, it does not say" for name in blocked)
        return f"waits in the kernel ({where}), state D, at two looks: {_name(process)}"

    return _by_process(snapshots, look)


def _gone(snapshots: Snapshots) -> dict[int, str]:
    found = {}
    for rank, snapshot in snapshots.items():
        pid, processes = snapshot.get("pid"), snapshot.get("processes")
        if pid is None or not isinstance(processes, list):
            continue
        main = next((p for p in _processes(snapshot) if p.get("pid") == pid), None)
        if main is None:
            left = f"; {len(processes)} of its processes live" if processes else ""
            found[rank] = f"its main process, pid {pid}, is gone{left}"
        elif main.get("state") in ("Z", "X"):
            found[rank] = f"its main process, {_name(main)}, is dead (state {main['state']})"
    return found


def _odd_stack(snapshots: Snapshots) -> dict[int, str]:
    """Find the member without a Python frame in which all others stand.

    A leader's main process does what no other rank does, by design: rank 0 is named only where the others stand in a
    collective.
    """
    stacks = {rank: found for rank, s in snapshots.items() if (found := _stacks(s))}
    if len(stacks) < 3 or len(stacks) < len(snapshots):
        return {}
    named: dict[int, str] = {}
    for frame in sorted({stack[0] for members in stacks.values() for stack in members}):
        odd = [rank for rank, members in stacks.items() if all(stack[0] != frame for stack in members)]
        if len(odd) != 1:
            continue
        rank = odd[0]
        place, others = next(
            (n, stack)
            for r, members in stacks.items()
            if r != rank
            for n, stack in enumerate(members)
            if frame == stack[0]
        )
        if rank == 0 and not any(_COLLECTIVE.search(f) for f in others):
            continue
        own = stacks[rank][min(place, len(stacks[rank]) - 1)][0]
        named.setdefault(rank, f"is in {own}, where all other ranks are in {frame}")
    return named


def _silent_first(snapshots: Snapshots) -> dict[int, str]:
    silent = sorted(
        (float(log["silent_s"]), rank)
        for rank, s in snapshots.items()
        if isinstance(log := s.get("log"), Mapping) and isinstance(log.get("silent_s"), int | float)
    )
    if len(silent) < 2 or len(silent) < len(snapshots) or silent[-1][0] - silent[-2][0] < SILENT_FIRST_S:
        return {}
    (next_s, _), (longest_s, rank) = silent[-2:]
    return {rank: f"its log went silent first, {longest_s - next_s:.0f} s before any other"}


def _by_process(snapshots: Snapshots, look: Callable[[Mapping[str, Any]], str]) -> dict[int, str]:
    found = {rank: next(filter(None, map(look, _processes(s))), "") for rank, s in snapshots.items()}
    return {rank: why for rank, why in found.items() if why}


def _processes(snapshot: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    found = snapshot.get("processes")
    return (p for p in found if isinstance(p, Mapping)) if isinstance(found, list) else iter(())


def _name(process: Mapping[str, Any]) -> str:
    return f"pid {process.get('pid')} ({process.get('name')})"


def _stacks(snapshot: Mapping[str, Any]) -> list[list[str]]:
    """Return the main thread's frames of each process that py-spy looked at, innermost first, without line numbers."""
    texts = snapshot.get("py_spy")
    if not isinstance(texts, Mapping):
        return []
    return [frames for pid, text in texts.items() if (frames := _main_thread(str(pid), str(text)))]


def _main_thread(pid: str, text: str) -> list[str]:
    frames: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("Thread "):
            if frames:
                break
            inside = '"MainThread"' in line or line.startswith(f"Thread {pid} ")
        elif inside and (match := _FRAME.fullmatch(line)):
            frames.append(match["function"] + ")")
    return frames
