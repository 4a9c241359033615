"""A directory as a client of NFS, or of a FUSE file system, shows it: late, and now and then wrong.

    mount = Mount(NFS, seed=1)
    barrier = Barrier(path, read=mount.read)

Write the files as always. What a reader gets of them is some seconds old, missing, stale or half there, never for
good. A seed gives the same answers to the same looks at the same times.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What a client does to its readers. Chances are from 0 to 1."""

    late_s: float = 0.0
    """For up to so long a name shows what it showed before."""
    missing_s: float = 0.0
    """For up to so long a name that was not there is still not there, unless its directory is listed."""
    stale: float = 0.0
    """Chance that a replaced file shows as ESTALE first."""
    gap: float = 0.0
    """Chance that a replaced file is missing first, for up to `missing_s`, unless its directory is listed."""
    half: float = 0.0
    """Chance that only a part of a new file is visible first: the rest is not there, or zeros."""
    looks: int = 3
    """So many looks in a row, at most, find the file stale or half there."""
    error: float = 0.0
    """Chance of EIO, of any look."""


# nfs(5): names are believed for acregmin (3 s) at least, and their absence for as long as the directory's attributes,
# acdirmin (30 s) at least. An open asks the server (close-to-open) unless it is mounted with `nocto`.
NFS = Habits(late_s=3.0, missing_s=30.0, stale=0.1, half=0.05, error=0.01)
# Some FUSE file systems say ENOENT while a file is replaced, and again and again until the directory is listed.
FUSE = Habits(late_s=1.0, missing_s=30.0, gap=0.1, half=0.1, error=0.01)
DOWN = Habits(error=1.0)


@dataclass(slots=True)
class _Name:
    """What a client believes of one name."""

    version: bytes = b""
    missing: bool = False
    until: float = float("-inf")  # until then it asks nobody
    fault: str = ""  # what the next `looks` looks find instead of `version`
    looks: int = 0


class View:
    """What one client shows. It knows neither clock nor files."""

    def __init__(self, habits: Habits, seed: int) -> None:
        self.habits = habits
        self._random = Random(seed)
        self._names: dict[str, _Name] = {}

    def look(self, path: str, now: float, ask: Callable[[], bytes | None]) -> bytes:
        """Return what `path` shows at `now` (seconds); `ask` returns what the server has, None for nothing.

        Raises:
            OSError: ENOENT, ESTALE or EIO.
        """
        name = self._names.setdefault(path, _Name())
        if self._random.random() < self.habits.error:
            raise _error(errno.EIO, path)
        if now >= name.until:
            self._ask(name, now, ask)
        if name.missing:
            raise _error(errno.ENOENT, path)
        if not name.looks:
            return name.version
        name.looks -= 1
        if name.fault == "stale":
            raise _error(errno.ESTALE, path)
        # A replaced file is another inode, so it never shows as the head of one version with the tail of another.
        cut = self._random.randrange(len(name.version) + 1)
        rest = len(name.version) - cut if self._random.random() < 0.5 else 0
        return name.version[:cut] + b"\0" * rest

    def _ask(self, name: _Name, now: float, ask: Callable[[], bytes | None]) -> None:
        habits, found = self.habits, ask()
        name.missing = found is None
        if found is not None and found != name.version:
            name.version = found
            chances = (habits.stale, habits.half, habits.gap, 1 - habits.stale - habits.half - habits.gap)
            (name.fault,) = self._random.choices(("stale", "half", "gap", ""), chances)
            name.missing = name.fault == "gap"
            name.looks = self._random.randint(1, habits.looks) if name.fault in ("stale", "half") else 0
        name.until = now + self._random.uniform(0, habits.missing_s if name.missing else habits.late_s)

    def listed(self, directory: str) -> None:
        """Names that were missing in the directory are looked for again."""
        for path, name in self._names.items():
            if name.missing and os.path.dirname(path) == directory:
                name.until = float("-inf")


class Mount:
    """A client's view of real files, for `Barrier(read=mount.read)`; threads may share it.

    `habits` may be changed at any time: `mount.habits = DOWN`.
    """

    def __init__(self, habits: Habits = NFS, *, seed: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._view = View(habits, seed)
        self._clock = clock
        self._lock = threading.Lock()

    @property
    def habits(self) -> Habits:
        return self._view.habits

    @habits.setter
    def habits(self, habits: Habits) -> None:
        self._view.habits = habits

    def read(self, path: str) -> bytes:
        """Return what the file shows; OSError as `View.look`."""
        path = os.path.abspath(path)
        _here.mount = self
        with self._lock:
            return self._view.look(path, self._clock(), lambda: _read(path))

    def listed(self, directory: str) -> None:
        """Take notice that the directory was listed. What a thread lists itself is noticed without this."""
        with self._lock:
            self._view.listed(os.path.abspath(directory))


def either(*mounts: Mount, seed: int = 0) -> Callable[[str], bytes]:
    """Return a `read` that goes through any of the mounts each time, as behind gateways that share the load.

    What it shows can be older than what it showed before: each mount only moves forward, but by itself.
    """
    random = Random(seed)
    return lambda path: random.choice(mounts).read(path)


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


_here = threading.local()  # the mount that this thread read through last


def _on_audit(event: str, args: tuple[object, ...]) -> None:
    # A reader lists the real directory, through whatever function it likes; only the interpreter sees each of them.
    if event not in ("os.scandir", "os.listdir"):
        return
    mount = getattr(_here, "mount", None)
    if mount is not None and isinstance(args[0], str | os.PathLike):
        mount.listed(os.fspath(args[0]))


sys.addaudithook(_on_audit)
