"""What a checker raises."""

from __future__ import annotations


class Broken(AssertionError):
    """An invariant does not hold; `number` is its number in docs/simulation.md, 0: a healthy engine was ended."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"invariant {number}: {message}")
        self.number = number
