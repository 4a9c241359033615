"""Processes of this host, from /proc. Linux only; standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Proc:
    """One process, told from a later one with the same pid by its start time."""

    pid: int
    started: int  # clock ticks after boot
    parent: int
    session: int
    state: str
    comm: str


def read(pid: int) -> Proc | None:
    """Return the process, also as a zombie; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            text = f.read()
    except OSError:
        return None
    comm, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
    return Proc(pid=pid, started=int(rest[19]), parent=int(rest[1]), session=int(rest[3]), state=rest[0], comm=comm)


def lives(pid: int, started: int) -> bool:
    """Tell whether that very process runs (a zombie does not)."""
    found = read(pid)
    return found is not None and found.started == started and found.state not in "ZX"


def own() -> Iterator[Proc]:
    """Yield every process of this user that is not a zombie."""
    uid = os.getuid()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            if entry.stat().st_uid != uid:
                continue
        except OSError:
            continue
        found = read(int(entry.name))
        if found is not None and found.state not in "ZX":
            yield found


def environ(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with; empty where it cannot be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as f:
            raw = f.read()
    except OSError:
        return {}
    pairs = (item.partition(b"=") for item in raw.split(b"\0") if b"=" in item)
    return {os.fsdecode(k): os.fsdecode(v) for k, _, v in pairs}


def descendants(root: int) -> list[Proc]:
    """Return the living processes below `root`, parents before children."""
    children: dict[int, list[Proc]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (found := read(int(entry))) is not None and found.state not in "ZX":
            children.setdefault(found.parent, []).append(found)
    below, queue = [], [root]
    while queue:
        for child in children.get(queue.pop(0), ()):
            below.append(child)
            queue.append(child.pid)
    return below


def become_subreaper() -> None:
    """Make this process the parent of orphans among its descendants."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(signal_number: int, parent: int) -> bool:
    """Ask for a signal when the parent dies. False: that process is no longer the parent, no signal will come."""
    _prctl(_PR_SET_PDEATHSIG, signal_number)
    return os.getppid() == parent


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def boot_id() -> str:
    """Return what tells this boot of this host from every other."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
        return f.read().strip()
    return ""
