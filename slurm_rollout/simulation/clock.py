"""Virtual time: nothing waits, the next thing that happens is simply next."""

from __future__ import annotations

import heapq
import random
import zlib
from collections.abc import Callable

WALL = 1.7e9
"""Unix time at which the virtual clock shows 0."""


class Timeline:
    """What is going to happen, in order; things of the same moment in the order in which they were planned."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.wall_is_off_s = 0.0  # somebody set the wall clock
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0

    @property
    def wall(self) -> float:
        return WALL + self.now + self.wall_is_off_s

    def at(self, when: float, do: Callable[[], None]) -> None:
        """Plan `do` for a moment; one that is over is now."""
        self._planned += 1
        heapq.heappush(self._heap, (when if when > self.now else self.now, self._planned, do))

    def after(self, delay_s: float, do: Callable[[], None]) -> None:
        self.at(self.now + delay_s, do)

    def run(self, until: float, over: Callable[[], bool] = lambda: False) -> None:
        """Let time pass to `until`, or to the moment at which `over` says yes."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, do = heapq.heappop(heap)
            do()
            if over():
                return
        self.now = max(self.now, until)


class Chance:
    """Random numbers by name: what is drawn for one thing does not depend on what else happens.

    So a fault that is left out of a schedule changes only what follows from it, and a failing seed can be shrunk.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def of(self, *name: object) -> random.Random:
        return random.Random(zlib.crc32(repr((self._seed, name)).encode()))

    def between(self, low: float, high: float, *name: object) -> float:
        """Return a number, the same for the same name, evenly spread."""
        return low + (high - low) * zlib.crc32(repr((self._seed, name)).encode()) / 2**32
