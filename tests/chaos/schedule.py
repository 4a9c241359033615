"""What is done to a fleet, and when: the same for the same seed. Pure; whom it hits is chosen when it is due."""

from __future__ import annotations

import random
from dataclasses import dataclass

WEIGHTS = {
    "kill": 6,  # a member, with SIGKILL
    "stop": 3,  # a member, with SIGSTOP, for ever: nothing ends, nothing answers
    "lie": 4,  # a member's /health is fine, its generation is dead, garbage, or an error
    "saturate": 3,  # harmless: one request waits for its turn, the counter moves
    "cut": 3,  # a node of the fleet leaves the network, and comes back
    "coordinator": 3,  # killed
    "freeze": 1,  # slurmctld accepts connections and never answers, for a while
    "halt": 1,  # slurmctld is stopped, and started again
}
"""How often each kind is chosen, relative to the others."""

HARMLESS = frozenset({"saturate", "coordinator", "freeze", "halt"})
"""No engine may be restarted because of these."""

AT_ONCE = 0.25
"""So many of the faults come together with the one before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One fault. Times in seconds, from the first moment in which all groups were ready."""

    at_s: float
    kind: str
    lasts_s: float  # 0: for ever, or for no time at all
    luck: float  # 0 to 1: which of those that it can hit
    detail: float  # 0 to 1: how exactly


def schedule(seed: int, *, duration_s: float, every_s: float, most_cut: int = 1) -> list[Planned]:
    """Return the faults of a run. At any time at most `most_cut` nodes are cut, and slurmctld is away only once."""
    dice = random.Random(seed)
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    found: list[Planned] = []
    at_s = 0.0
    while True:
        together = bool(found) and dice.random() < AT_ONCE
        at_s += dice.uniform(0, 0.3) if together else dice.uniform(0.3, 1.7) * every_s / (1 - AT_ONCE)
        if at_s >= duration_s:
            return found
        kind = dice.choices(kinds, weights)[0]
        fault = Planned(
            at_s=at_s, kind=kind, lasts_s=_lasts_s(dice, kind, duration_s), luck=dice.random(), detail=dice.random()
        )
        lasting = [f.kind for f in found if f.at_s + f.lasts_s > at_s]
        away = {"freeze", "halt"}
        if (kind in away and away & set(lasting)) or (kind == "cut" and lasting.count("cut") >= most_cut):
            continue
        found.append(fault)


def _lasts_s(dice: random.Random, kind: str, duration_s: float) -> float:
    longest = {"saturate": 12.0, "freeze": 20.0, "halt": 15.0, "cut": 60.0}.get(kind, 0.0)
    if not longest:
        return 0.0
    if kind == "cut" and dice.random() < 0.5:  # over before Slurm, or even a probe, sees it
        longest = 15.0
    return dice.uniform(1.0, min(longest, max(2.0, duration_s / 3)))
