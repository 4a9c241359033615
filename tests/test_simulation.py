"""Thousands of simulated fleet-hours, faults of every kind in every order: no invariant of the design breaks.

`make soak` goes on where this stops; `python -m tests.mutants` shows that it can fail.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from slurm_rollout.core.plan import Counter, FleetPlan, ProbePolicy, ProbeRequest, RestartPolicy
from slurm_rollout.simulation.faults import KINDS, Fault
from slurm_rollout.simulation.run import START, Case, Outcome, make_case, play_seed, run
from slurm_rollout.simulation.shrink import shrink
from slurm_rollout.simulation.soak import report
from slurm_rollout.testing.world import make_plan
from tests.mutants import MUTANTS, by_simulation, plant

SEEDS = 600
HOURS = 0.5

WAITS_FOR_A_FIX = {
    546,  # a "no" of before the coordinator was cut off keeps the group from being counted as cut off
}


def plan(groups: int, members: int, *, threshold: int = 4, budget: int = 5) -> FleetPlan:
    return make_plan(
        groups,
        members,
        probe=ProbePolicy(
            request=ProbeRequest(),
            counter=Counter(name="tokens"),
            startup_timeout_s=600.0,
            liveness_failure_threshold=threshold,
        ),
        restart=RestartPolicy(max_restarts=budget, max_start_failures=budget),
    )


def case(fleet: FleetPlan, *faults: Fault, minutes: float = 30.0) -> Case:
    return Case(seed=0, plan=fleet, faults=faults, peace_at=START + 60.0 * minutes)


def fine(outcome: Outcome) -> Outcome:
    assert not outcome.broken, report(outcome)
    return outcome


# ---------------------------------------------------------------------------------------------------------- many seeds


def test_no_seed_breaks_an_invariant() -> None:
    # Not forked: a worker of pytest may have threads. Two cores are what the smallest machine of CI has.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        outcomes = list(pool.map(functools.partial(play_seed, hours=HOURS), range(SEEDS), chunksize=20))
    for outcome in outcomes:
        if outcome.case.seed not in WAITS_FOR_A_FIX:
            fine(outcome)
    assert {o.case.seed for o in outcomes} == set(range(SEEDS))
    assert sum(o.hours for o in outcomes) >= SEEDS * HOURS
    assert sum(len(o.recoveries) for o in outcomes) > SEEDS


def test_every_kind_of_fault_is_among_the_seeds() -> None:
    assert {fault.kind for seed in range(200) for fault in make_case(seed, hours=HOURS).faults} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fleet_survives_one_kind_of_fault_alone(kind: str) -> None:
    for_s = KINDS[kind].most_s or 0.0
    faults = [Fault(START + 200.0 + 500.0 * i, kind, i / 4, 0.5, for_s) for i in range(4)]
    fine(run(case(plan(4, 2), *faults, minutes=60.0)))


# ------------------------------------------------------------------------------------------------------------ kept ones

KEPT = {
    # One crash ended the suspicion against the coordinator itself, and every other group was restarted.
    "a crash while the coordinator is cut off": case(
        plan(2, 2), Fault(1414.8, "batch_host_is_cut_off", for_s=270.3), Fault(1537.3, "engine_dies", where=0.1)
    ),
    "an srun that lies while the coordinator is cut off": case(
        plan(2, 2), Fault(1215.4, "batch_host_is_cut_off", for_s=176.3), Fault(1369.1, "srun_lies", where=0.1)
    ),
    # Everything was down and Slurm was away: the loop looked at the ports hundreds of times a second.
    "all is down and slurm is away": case(
        plan(8, 2), Fault(1500.0, "slurm_is_away", for_s=600.0), Fault(1510.0, "all_engines_die")
    ),
    # A coordinator that had lost its lease, on a full disk, with a run that was to end.
    "two coordinators and a full disk": case(
        plan(2, 1, budget=1),
        Fault(1100.0, "engine_dies"),
        Fault(1128.6, "engine_dies"),
        Fault(1175.7, "second_coordinator", which=0.6, for_s=171.0),
        Fault(1346.7, "disk_is_full", for_s=215.8),
    ),
    # A go that no agent heard, while the coordinator was stopped twice between its journal and its deeds.
    "go to deaf agents": case(
        plan(2, 1),
        Fault(1549.1, "coordinator_stalls", for_s=172.7),
        Fault(1571.3, "srun_lies", where=0.1),
        Fault(1702.9, "coordinator_stalls", for_s=64.2),
        Fault(1787.1, "agents_are_deaf", where=0.1, for_s=36.4),
    ),
    # Slurm gave a process up that could not be killed: it lived on beside the next launch.
    "a process that cannot be killed": case(
        plan(2, 2), *(Fault(1200.0 + 300.0 * i, "engine_cannot_die", 0.1, 0.5, 200.0) for i in range(3))
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_once_broke_does_not_again(name: str) -> None:
    fine(run(KEPT[name]))


# ------------------------------------------------------------------------------------------------- the simulator itself


def test_a_seed_decides_everything() -> None:
    """Also in another process, in which texts have other hash values."""
    code = (
        "import json, sys; from slurm_rollout.simulation.run import play_seed\n"
        "found = [play_seed(s, 0.5) for s in range(6)]\n"
        "json.dump([[o.ticks, o.terms, o.hours, o.recoveries, o.ready_s] for o in found], sys.stdout)"
    )

    def play(hash_seed: str) -> object:
        environ = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    assert play("1") == play("2")


def test_time_costs_nothing_while_nothing_happens() -> None:
    outcome = fine(run(case(plan(8, 4), minutes=600.0)))
    assert outcome.hours > 10
    assert outcome.ticks < 600, "two audits of 12 an hour, each with its answers, and the start"
    assert all(ready_s > 3600 * 9.9 for ready_s in outcome.ready_s.values())


def test_a_failing_case_is_made_short() -> None:
    needed = {"engine_dies", "slurm_is_away"}
    schedule = tuple(f for seed in range(10) for f in make_case(seed, hours=HOURS).faults)
    assert len(schedule) > 100

    def play(tried: Case) -> Outcome:
        fails = needed <= {f.kind for f in tried.faults}
        return Outcome(case=tried, broken="it" if fails else "", number=3 if fails else -1, hours=HOURS)

    before = Outcome(case=replace(case(plan(1, 1)), faults=schedule), broken="it", number=3, hours=HOURS)
    assert sorted(f.kind for f in shrink(before, play).case.faults) == sorted(needed)


def test_each_bug_can_be_planted(tmp_path: Path) -> None:
    for n, mutant in enumerate(MUTANTS):
        plant(mutant, tmp_path / str(n))
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 15


@pytest.mark.parametrize("name", ["forget_one_member", "publish_before_verify", "ignore_the_term", "never_charge"])
def test_a_bug_is_caught(name: str, tmp_path: Path) -> None:
    """Some that are caught fast; `python -m tests.mutants` tries all."""
    plant(next(m for m in MUTANTS if m.name == name), tmp_path)
    caught, how = by_simulation(tmp_path, 40)
    assert caught, how
    assert "invariant" in how
