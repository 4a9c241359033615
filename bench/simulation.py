"""How many fleet-hours a minute of CPU simulates, with faults, every invariant checked at every step.

    .venv/bin/python bench/simulation.py [--hours 20] [--seeds 3]

A fleet of 8 groups of 4 members on 32 nodes. What an hour costs is what happens in it: the rates are told beside the
figures, and with them the recoveries that there were. The target is 1,000 fleet-hours with faults a CPU-minute.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from slurm_rollout.core.plan import Counter, FleetPlan, ProbePolicy, ProbeRequest, RestartPolicy
from slurm_rollout.simulation.run import make_case, run
from slurm_rollout.testing.world import make_plan

GROUPS, MEMBERS = 8, 4


def fleet() -> FleetPlan:
    return make_plan(
        GROUPS,
        MEMBERS,
        probe=ProbePolicy(request=ProbeRequest(), counter=Counter(name="tokens"), startup_timeout_s=600.0),
        restart=RestartPolicy(max_restarts=20, max_start_failures=20),
    )


def measure(per_hour: float, hours: float, seeds: int) -> dict[str, float]:
    """Play seeds at one rate; faults come singly and in bursts (`faults.schedule`)."""
    played, faults, recoveries, ticks, began = 0.0, 0, 0, 0, time.process_time()
    for seed in range(seeds):
        outcome = run(make_case(seed, hours=hours, per_hour=per_hour, plan=fleet()))
        if outcome.broken:
            raise SystemExit(f"seed {seed}: {outcome.broken}")
        played += outcome.hours
        faults += outcome.faults
        recoveries += len(outcome.recoveries)
        ticks += outcome.ticks
    cpu_s = time.process_time() - began
    return {
        "faults_per_hour": round(faults / played, 1),
        "recoveries_per_hour": round(recoveries / played, 1),
        "decisions_per_hour": round(ticks / played),
        "fleet_hours_per_cpu_minute": round(played / cpu_s * 60.0),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for per_hour in (0.3, 1.0, 3.0):
        found = measure(per_hour, args.hours, args.seeds)
        print(json.dumps({"bench": "simulation", "groups": GROUPS, "members": MEMBERS, **found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
