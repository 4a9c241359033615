"""A failing case, made shorter while it still fails in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from slurm_rollout.simulation.faults import Fault
from slurm_rollout.simulation.run import START, Case, Outcome, run

TRIES = 200


def shrink(outcome: Outcome, play: Callable[[Case], Outcome] = run, tries: int = TRIES) -> Outcome:
    """Leave out faults, in halves and then one by one, while the same invariant breaks; return the shortest outcome."""
    best = outcome
    left = tries

    def fails(case: Case) -> bool:
        nonlocal best, left
        left -= 1
        found = play(case)
        if found.broken and found.number == outcome.number:
            best = found
            return True
        return False

    # What comes after the failure has no part in it.
    moment = START + outcome.hours * 3600.0
    fails(replace(outcome.case, faults=tuple(f for f in outcome.case.faults if f.at <= moment)))
    size = max(1, len(best.case.faults) // 2)
    while left > 0:
        start, shorter = 0, False
        while start < len(best.case.faults) and left > 0:
            faults = best.case.faults
            fewer = faults[:start] + faults[start + size :]
            if fails(replace(best.case, faults=fewer)):
                shorter = True
            else:
                start += size
        if size == 1 and not shorter:
            break
        size = max(1, size // 2)
    return best


def as_code(faults: tuple[Fault, ...]) -> str:
    """Return the faults as lines of a regression test."""
    return "\n".join(f"    {fault!r}," for fault in faults)
