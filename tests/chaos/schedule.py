"""What is done to a fleet, and when: the same for the same seed. Pure; whom it hits is chosen when it is due."""

from __future__ import annotations

import random
from dataclasses import dataclass

WEIGHTS = {
    "kill": 6,  # a member, with SIGKILL
    "stop": 3,  # a member, with SIGSTOP, for ever: nothing ends, nothing answers
    "lie": 4,  # a member's /health is fine, its generation is dead, garbage, or an error
    "saturate": 3,  # harmless: one request waits for its turn, the counter moves
    "cut": 3,  # a node of the fleet leaves the network, and comes back before Slurm gives it up
    "coordinator": 3,  # killed
    "freeze": 1,  # slurmctld accepts connections and never answers, for a while
    "halt": 1,  # slurmctld is stopped, and started again
}
"""How often each kind is chosen, relative to the others."""

HARMLESS = frozenset({"saturate", "coordinator", "freeze", "halt"})
"""No engine may be restarted because of these."""

LOSS = "loss"
"""A node is cut for so long that Slurm gives it up. There can be as many of these as there are spares: a job with
--no-kill goes on without the node, and never gets it back (22.05.8: "Removing failed node n2 from JobId=1", and when it
is there again "Registered JobId=1 StepId=1.8 on wrong node n2")."""

SILENT_S = 10.0
"""So long a node may be silent. It is DOWN after SlurmdTimeout, 20 s, from the last of pings that come every 7 s."""

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


def schedule(seed: int, *, duration_s: float, every_s: float, losses: int = 0) -> list[Planned]:
    """Return the faults of a run, `losses` of them nodes that Slurm gives up.

    At any time only one node is cut, or slurmctld away: with both, Slurm would give up a node that it should not.
    """
    dice = random.Random(seed)
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    found: list[Planned] = []
    for n in range(losses):  # one in each part of the run, its last third left out
        at_s = (n + dice.uniform(0.1, 0.6)) * duration_s / losses
        lasts_s = dice.uniform(40.0, 60.0)
        found.append(Planned(at_s=at_s, kind=LOSS, lasts_s=lasts_s, luck=dice.random(), detail=dice.random()))
    at_s = 0.0
    while True:
        together = at_s > 0 and dice.random() < AT_ONCE
        at_s += dice.uniform(0, 0.3) if together else dice.uniform(0.3, 1.7) * every_s / (1 - AT_ONCE)
        if at_s >= duration_s:
            return sorted(found, key=lambda fault: fault.at_s)
        kind = dice.choices(kinds, weights)[0]
        fault = Planned(at_s=at_s, kind=kind, lasts_s=_lasts_s(dice, kind), luck=dice.random(), detail=dice.random())
        if not any(_collide(fault, other) for other in found):
            found.append(fault)


def _lasts_s(dice: random.Random, kind: str) -> float:
    longest = {"saturate": 12.0, "freeze": 20.0, "halt": 15.0, "cut": SILENT_S}.get(kind, 0.0)
    return dice.uniform(1.0, longest) if longest else 0.0


def _collide(a: Planned, b: Planned) -> bool:
    if not {a.kind, b.kind} <= {"cut", LOSS, "freeze", "halt"}:
        return False
    margin_s = 2 * SILENT_S
    return a.at_s < b.at_s + b.lasts_s + margin_s and b.at_s < a.at_s + a.lasts_s + margin_s
