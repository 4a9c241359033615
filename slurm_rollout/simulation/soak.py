"""Play seed after seed: `python -m slurm_rollout.simulation.soak [--first N] [--seeds N] [--hours H]`.

Prints the fleet-hours that a minute of CPU brings, and for a seed that breaks an invariant the shortest trace found.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence

from slurm_rollout.simulation.run import Case, Outcome, play_seed
from slurm_rollout.simulation.shrink import shrink

HOURS = 0.5
TELL_EVERY_S = 20.0
TRACE_LINES = 40


def play(seeds: Sequence[int] | Iterator[int], hours: float) -> Iterator[Outcome]:
    """Yield the outcome of each seed."""
    for seed in seeds:
        yield play_seed(seed, hours)


def report(outcome: Outcome) -> str:
    """Return what a person needs to understand a failing seed: the shortest list of faults, and what followed."""
    shortest = shrink(outcome)
    lines = [f"seed {outcome.case.seed}: {shortest.broken}", describe(shortest.case)]
    lines += [f"  {fault}" for fault in shortest.case.faults]
    lines += [f"  {line}" for line in shortest.trace[-TRACE_LINES:]]
    return "\n".join(lines)


def describe(case: Case) -> str:
    lines = [
        f"  {pool.name}: {len(pool.groups)} groups of {len(pool.groups[0].members)}, min_ready {pool.min_ready}, "
        f"{pool.weights}, {pool.probe}, {pool.restart}, {pool.stop}, {pool.fence}"
        for pool in case.plan.pools
    ]
    return "\n".join(lines + [f"  {habits}" for habits in case.clients])


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 when a seed failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, help="how many (default: until stopped)")
    parser.add_argument("--hours", type=float, default=HOURS, help="of faults in each seed")
    parser.add_argument("--until-failure", action="store_true", help="stop at the first seed that fails, print JSON")
    args = parser.parse_args(argv)
    seeds = itertools.count(args.first) if args.seeds is None else range(args.first, args.first + args.seeds)
    hours, failed, played, told_at = 0.0, 0, 0, time.monotonic()
    try:
        for outcome in play(seeds, args.hours):
            played += 1
            hours += outcome.hours
            if outcome.broken:
                failed += 1
                if args.until_failure:
                    print(json.dumps({"seeds": played, "number": outcome.number, "broken": outcome.broken[:300]}))
                    return 1
                print(report(outcome), flush=True)
            if time.monotonic() - told_at >= TELL_EVERY_S:
                told_at = time.monotonic()
                print(_speed(played, hours, failed), flush=True)
    except KeyboardInterrupt:
        pass
    print(json.dumps({"seeds": played, "number": None}) if args.until_failure else _speed(played, hours, failed))
    return 1 if failed else 0


def _speed(played: int, hours: float, failed: int) -> str:
    minutes = time.process_time() / 60.0
    return f"{played} seeds, {hours:.0f} fleet-hours, {hours / minutes:.0f} per CPU-minute, {failed} failed"


if __name__ == "__main__":
    sys.exit(main())
