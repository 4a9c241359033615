"""Thousands of simulated fleet-hours, faults of every kind in every order: no invariant of the design breaks.

`make soak` goes on where this stops; `python -m tests.mutants` shows that it can fail.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout.cli import simulate as simulate_cli
from slurm_rollout.core.plan import Counter, FleetPlan, ProbePolicy, ProbeRequest, RestartPolicy
from slurm_rollout.simulation.broken import Broken
from slurm_rollout.simulation.case import sharing, with_frozen, with_spares
from slurm_rollout.simulation.clock import Timeline
from slurm_rollout.simulation.faults import Fault
from slurm_rollout.simulation.fleet import Fleet as SimulatedFleet
from slurm_rollout.simulation.program import Program
from slurm_rollout.simulation.rates import Rates, forecast
from slurm_rollout.simulation.run import START, Case, Outcome, make_case, play_seed, run
from slurm_rollout.simulation.shrink import shrink
from slurm_rollout.simulation.soak import report
from slurm_rollout.simulation.trainer import Habits
from slurm_rollout.simulation.trainer_faults import KINDS, TRAINER_KINDS
from slurm_rollout.store import load_plan
from slurm_rollout.testing.fleet import Fleet, LocalFleet, SlurmFleet, stub_spec
from slurm_rollout.testing.slurm_cluster import SlurmCluster
from slurm_rollout.testing.world import make_plan
from tests.mutants import MUTANTS, by_simulation, plant

SEEDS = 150
HOURS = 0.5


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


def trained(
    groups: int,
    *,
    colocated: bool = False,
    frozen: int = 0,
    threshold: int = 4,
    pause_max_s: float = 900.0,
    **pool: Any,
) -> FleetPlan:
    """Groups of one member, the last of them in a pool of their own that no trainer pushes into."""
    bare = plan(groups, 1, threshold=threshold)
    (known,) = bare.pools
    pause_in = ("training", "syncing") if colocated else ("syncing",)
    probe = replace(known.probe, pause_in=pause_in, pause_max_s=pause_max_s)
    restart = replace(known.restart, when="at_barrier" if colocated else "at_once")
    return with_frozen(bare, replace(known, weights="trained", probe=probe, restart=restart, **pool), frozen)


def case(fleet: FleetPlan, *faults: Fault, minutes: float = 30.0, **what: Any) -> Case:
    return Case(seed=0, plan=fleet, faults=faults, peace_at=START + 60.0 * minutes, **what)


TRAINER = (Habits(),)
HASTY = (Habits(hasty=True),)


def fine(outcome: Outcome) -> Outcome:
    assert not outcome.broken, report(outcome)
    return outcome


# ---------------------------------------------------------------------------------------------------------- many seeds


@pytest.mark.timeout(400)  # alone it takes about one minute
def test_no_seed_breaks_an_invariant() -> None:
    # Not forked: a worker of pytest may have threads. Two cores are what the smallest machine of CI has.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        outcomes = list(pool.map(functools.partial(play_seed, hours=HOURS), range(SEEDS), chunksize=20))
    for outcome in outcomes:
        fine(outcome)
    assert {o.case.seed for o in outcomes} == set(range(SEEDS))
    assert sum(o.hours for o in outcomes) >= SEEDS * HOURS
    assert sum(len(o.recoveries) for o in outcomes) > SEEDS


def test_every_kind_of_fault_is_among_the_seeds() -> None:
    assert {fault.kind for seed in range(200) for fault in make_case(seed, hours=HOURS).faults} == set(KINDS)


def four(kind: str) -> list[Fault]:
    for_s = KINDS[kind].most_s or 0.0
    return [Fault(START + 200.0 + 500.0 * i, kind, i / 4, 0.5, for_s) for i in range(4)]


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in TRAINER_KINDS])
def test_a_fleet_survives_one_kind_of_fault_alone(kind: str) -> None:
    fine(run(case(plan(4, 2), *four(kind), minutes=60.0)))


@pytest.mark.parametrize("colocated", [False, True], ids=["apart", "colocated"])
@pytest.mark.parametrize("kind", KINDS)
def test_so_does_one_with_a_trainer(kind: str, *, colocated: bool) -> None:
    fine(run(case(trained(4, colocated=colocated), *four(kind), minutes=60.0, clients=TRAINER)))


# ------------------------------------------------------------------------------------------------------------ kept ones

KEPT = {
    # One crash ended the suspicion against the coordinator itself, and every other group was restarted.
    "a crash while the coordinator is cut off": case(
        plan(2, 2), Fault(1414.8, "batch_host_is_cut_off", for_s=270.3), Fault(1537.3, "engine_dies", where=0.1)
    ),
    "an srun that lies while the coordinator is cut off": case(
        plan(2, 2), Fault(1215.4, "batch_host_is_cut_off", for_s=176.3), Fault(1369.1, "srun_lies", where=0.1)
    ),
    # A probe that had seen the engine progress counted all the same when the counter could not be read at its end.
    "cut off in the middle of a probe that saw progress": case(
        plan(3, 4, threshold=2),
        Fault(2219.2, "engines_are_saturated", where=0.1, for_s=837.3),
        Fault(2764.8, "batch_host_is_cut_off", for_s=43.7),
        minutes=60.0,
    ),
    # A "no" of before kept a group from being counted as cut off, and then from being believed with the others.
    "a no before the coordinator is cut off": case(
        plan(3, 1, threshold=2),
        Fault(1842.4, "engines_answer_no", 0.4, 0.0, 13.8),
        Fault(1854.5, "batch_host_is_cut_off", for_s=258.8),
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
    # An srun that was just started, to be refused at once, was a sign that the job goes on: the others were charged.
    "the job ends while a lost node is tried again": case(
        trained(3),
        Fault(1547.1, "node_is_lost", where=0.6),
        Fault(1549.4, "slurm_is_away", for_s=688.8),
        Fault(2238.1, "slurm_is_away", for_s=141.9),
        Fault(2372.8, "slurm_is_away", for_s=171.1),
        Fault(2460.6, "slurm_answers_late", for_s=645.7),
        Fault(2463.6, "slurm_is_away", for_s=224.9),
        clients=TRAINER,
        job_ends=True,
    ),
    # It was used again when it was back, although an operator had drained it meanwhile.
    "a lost node is drained, and comes back": case(
        plan(1, 2),
        Fault(1884.7, "node_comes_back_just_then", 0.9, 0.586, 11.2),
        Fault(1889.6, "operator_drains_a_node", 0.8, 0.2),
        minutes=60.0,
    ),
    # The group that had left the node came back to its place with the old master port.
    "a process outlives its step on a node that is lost": case(
        with_spares(plan(2, 2), 1),
        Fault(1664.6, "process_is_left_behind", 0.3, 0.9),
        Fault(1664.7, "node_is_cut_off", 0.3, 0.9, 250.0),
        minutes=60.0,
    ),
    # Both groups of the node moved to the one spare.
    "a shared node is lost": case(
        with_spares(sharing(plan(4, 1)), 1), Fault(1500.0, "node_is_cut_off", 0.1, 0.0, 280.0), minutes=60.0
    ),
    # Every launch was refused for a while: that is no fault of a node, and burned the spare.
    "slurm refuses launches": case(
        replace(with_spares(plan(3, 1), 1), max_node_failures=1),
        Fault(1500.0, "launches_are_refused", for_s=60.0),
        Fault(1501.0, "engine_dies", 0.1),
        minutes=60.0,
    ),
    # The groups of the new run had changed in epoch 0.
    "a requeue": case(trained(2), Fault(1121.9, "job_is_requeued"), clients=TRAINER),
    # What the trainer made after it had gone back had a number of before, and an engine that was absent had it, too.
    "a number that stands for two weights": case(
        trained(3),
        Fault(1164.0, "engine_hangs", 0.9, 0.9),
        Fault(1538.4, "engine_hangs", 0.8, 0.3),
        Fault(1774.5, "push_fails"),
        Fault(1785.7, "engine_hangs", 0.8, 0.6),
        Fault(1799.5, "engines_answer_no", where=0.1, for_s=79.1),
        Fault(1899.5, "trainer_goes_back"),
        Fault(1917.2, "engine_hangs", 0.2, 0.7),
        clients=TRAINER,
    ),
    # An engine got half of the next version, and served again when the trainer went back to the one that it had before.
    "half of a version, and back": case(
        trained(3, colocated=True),
        Fault(1099.1, "client_is_killed", for_s=112.5),
        Fault(1216.3, "client_is_killed", for_s=68.1),
        Fault(1359.3, "push_fails"),
        Fault(1377.4, "engine_hangs", 0.5, 0.6),
        Fault(1390.0, "client_is_killed", for_s=89.3),
        clients=HASTY,
    ),
    # It waited for a group of which nobody asked whether it answers again, and each "I wait" made the pause longer.
    "a trainer that waits in a pause": case(
        trained(2, pause_max_s=200.0, min_ready=2),
        Fault(1132.0, "engines_answer_no", where=0.3, for_s=109.8),
        clients=TRAINER,
    ),
    # Each pause began the count of failures anew: a hang was never seen.
    "an engine hangs, and its trainer pauses probes often": case(
        trained(2, colocated=True), Fault(2276.9, "engine_hangs", 0.5, 0.8), clients=TRAINER
    ),
    # A group that is asked nothing counted as one that answers, and so the coordinator was not the suspect.
    "the coordinator is cut off in a pause": case(
        trained(2, colocated=True, frozen=1, threshold=2),
        Fault(1229.2, "batch_host_is_cut_off", for_s=39.9),
        Fault(1332.8, "batch_host_is_cut_off", for_s=20.1),
        Fault(1337.3, "batch_host_is_cut_off", for_s=229.7),
        clients=TRAINER,
    ),
    # That it rests an agent had said in the pause before: it saw that one's end later than this one's echo was given.
    "an agent that sees the file late": case(
        trained(3, colocated=True),
        Fault(1249.1, "files_are_seen_late", which=0.4, for_s=93.9),
        Fault(1265.2, "files_are_seen_late", which=0.7, for_s=41.3),
        clients=HASTY,
    ),
    # Only the group's own next start looked for what was left behind, and that was on another node.
    "another group comes to where one left a process behind": case(
        with_spares(plan(2, 1), 1),
        Fault(1300.0, "process_is_left_behind"),
        Fault(1300.1, "operator_drains_a_node"),
        Fault(1500.0, "operator_resumes_nodes"),
        Fault(1600.0, "operator_drains_a_node", where=0.5),
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_once_broke_does_not_again(name: str) -> None:
    fine(run(KEPT[name]))


# ------------------------------------------------------------------------------------------------- beside the real one


def lost_s(fleet: Fleet, group: str, number: int) -> float:
    """Signal rank 0 of a group that serves, and return how long it takes until its next incarnation does."""
    fleet.wait_serving(group, 1)
    began = time.monotonic()
    fleet.kill(group, 0, number)
    fleet.wait_serving(group, 2)
    return time.monotonic() - began


def local_fleet(request: pytest.FixtureRequest, folder: Path, **spec: Any) -> Fleet:
    return LocalFleet(folder).start(stub_spec(base=19000, **spec))


def slurm_fleet(request: pytest.FixtureRequest, folder: Path, **spec: Any) -> Fleet:
    cluster: SlurmCluster = request.getfixturevalue("cluster")
    return SlurmFleet(cluster).start(stub_spec(python=cluster.python, **spec))


@pytest.mark.parametrize("start", [local_fleet, pytest.param(slurm_fleet, marks=pytest.mark.slurm)])
def test_it_agrees_with_a_real_run(request: pytest.FixtureRequest, tmp_path: Path, start: Callable[..., Fleet]) -> None:
    """A crash and a hang of stub engines, on the local backend or on real Slurm, and the same two in the simulation."""
    load_s = 1.0
    with start(request, tmp_path, groups=2, load_s=load_s, pool="stop.snapshot_s = 0") as fleet:
        real = lost_s(fleet, "actor/0", signal.SIGKILL), lost_s(fleet, "actor/1", signal.SIGSTOP)
        plan = load_plan(fleet.run)

    def simulated(kind: str) -> tuple[float, float]:
        """The shortest and the longest: it depends on when the fault meets the probes."""
        begins = [START + 30.0 + 0.1 * n for n in range(12)]
        cases = [
            Case(seed=0, plan=plan, faults=faults, peace_at=START + 60.0, load_s=(load_s, load_s), stops=True)
            for faults in [(), *((Fault(at, kind),) for at in begins)]
        ]
        ready = [fine(run(c)).ready_s["actor/0"] for c in cases]
        lost = [ready[0] - r for r in ready[1:]]
        return min(lost), max(lost)

    for took_s, kind in zip(real, ("engine_dies", "engine_hangs"), strict=True):
        least_s, most_s = simulated(kind)
        print(f"{kind}: {took_s:.2f} s were lost, {least_s:.2f} to {most_s:.2f} s in the simulation")
        # The noise of a machine that is busy with other tests makes the real one slower, never faster.
        assert least_s - 0.3 <= took_s <= most_s + 1.0


def test_a_forecast_adds_up() -> None:
    rates = Rates(crash_h=20.0, hang_h=0.0, node_h=0.0, slurm_h=0.0, coordinator_h=0.0)
    found = forecast(plan(4, 2), rates, hours=24.0, load_s=60.0, fleets=10, seed=0)
    (pool,) = found.pools
    assert found.failures.keys() == {"engine_exited"}
    assert found.failures["engine_exited"] == pytest.approx(24.0 * 8 / 20.0, rel=0.4)
    assert pool.recoveries == pytest.approx(found.failures["engine_exited"], rel=0.1)
    assert pool.recovery_median_s == pytest.approx(60.0, abs=8.0)
    # The first start, and a load for each crash; a crash while it loads costs what was left of that.
    assert pool.lost_group_h == pytest.approx((4 + pool.recoveries) * 60.0 / 3600.0, rel=0.15)
    assert found == forecast(plan(4, 2), rates, hours=24.0, load_s=60.0, fleets=10, seed=0)


def test_a_lost_node_stays_lost_unless_there_is_a_spare() -> None:
    rates = Rates(crash_h=0.0, hang_h=0.0, node_h=300.0, slurm_h=0.0, coordinator_h=0.0)
    without, spared = (
        forecast(plan(4, 2), rates, hours=24.0, load_s=60.0, fleets=10, seed=0, spare_nodes=n).pools[0] for n in (0, 1)
    )
    assert without.availability < spared.availability


def test_a_forecast_of_trained_weights_supposes_that_they_are_pushed_at_once() -> None:
    rates = Rates(crash_h=4.0, hang_h=0.0, node_h=0.0, slurm_h=0.0, coordinator_h=10.0)
    frozen, pushed = (
        forecast(fleet, rates, hours=12.0, load_s=60.0, fleets=3, seed=0).pools[0]
        for fleet in (plan(4, 1), trained(4, colocated=True))
    )
    assert pushed.recoveries == frozen.recoveries > 0
    assert pushed.availability == pytest.approx(frozen.availability, abs=5e-4)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(stub_spec(groups=2, load_s=1.0))

    def simulate(*args: str) -> int:
        parser = argparse.ArgumentParser()
        simulate_cli.add_parser(parser.add_subparsers())
        parsed = parser.parse_args(["simulate", str(path), "--hours=4", "--fleets=3", "--load=20", "--crash=2", *args])
        return int(parsed.run(parsed))

    assert simulate("--json") == 0
    told = json.loads(capsys.readouterr().out)
    choices = {c["choice"]: c for c in told["choices"]}
    assert list(choices) == ["as planned", "one more spare", "liveness threshold -1", "liveness threshold +1"]
    (pool,) = choices["as planned"]["pools"]
    assert 0.9 < pool["availability"] < 1.0
    assert 1 <= pool["restarts_spent"] <= pool["restarts_limit"] == 5
    assert simulate() == 0
    text = capsys.readouterr().out
    assert "3 fleets of 2 groups (4 members), 4 h each" in text
    assert f"{pool['availability']:.3%}" in text
    assert simulate("--seed=7", "--json") == 0
    assert json.loads(capsys.readouterr().out)["choices"][0]["pools"] != choices["as planned"]["pools"]


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


def test_a_program_sleeps_on_virtual_time_until_it_is_killed() -> None:
    time, did = Timeline(0.0), list[object]()

    def live() -> None:
        try:
            while True:
                program.sleep(10.0)
                did.append(time.now)
        finally:
            did.append("unwound")

    program = Program(time, live)
    time.run(25.0)
    assert did == [10.0, 20.0]
    program.stop(30.0)
    time.run(56.0)
    assert did == [10.0, 20.0, 55.0]  # what was due while it was stopped comes when it goes on
    program.wake(1.0)
    time.run(58.0)
    program.kill()
    assert did == [10.0, 20.0, 55.0, 57.0, "unwound"]
    assert not program.alive
    time.run(100.0)
    assert did[-1] == "unwound"


def test_what_a_program_raises_comes_out_of_the_timeline() -> None:
    time = Timeline(0.0)

    def fail() -> None:
        raise Broken(12, "here")

    program = Program(time, fail)
    with pytest.raises(Broken, match="here"):
        time.run(1.0)
    assert not program.alive


def test_a_client_that_is_killed_says_nothing_more(tmp_path: Path) -> None:
    """Not even what the real client's `finally` would take back: that it waits."""
    fleet = SimulatedFleet(case(trained(1), clients=TRAINER), tmp_path)
    said = fleet.files.clients.barrier.parent / "clients" / "trainer.json"
    (client,) = fleet.clients
    fleet.time.at(START, fleet.start_coordinator)
    fleet.time.run(START + 600.0, said.exists)
    client.kill()
    assert json.loads(said.read_bytes())["waiting_s"] > 0.0
    assert not client.alive


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
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 40


@pytest.mark.parametrize(
    "name",
    [
        *("forget_one_member", "publish_before_verify", "ignore_the_term", "never_charge"),
        *("serve_a_stale_group", "grant_a_hold_while_a_group_starts", "echo_before_probes_are_drained"),
        *("charge_a_lost_node", "move_before_the_node_is_lost"),
    ],
)
def test_a_bug_is_caught(name: str, tmp_path: Path) -> None:
    """Some that are caught fast; `python -m tests.mutants` tries all."""
    plant(next(m for m in MUTANTS if m.name == name), tmp_path)
    caught, how = by_simulation(tmp_path, 40)
    assert caught, how
    assert "invariant" in how
