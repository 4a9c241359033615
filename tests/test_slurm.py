"""What only real Slurm can show: GPUs, a controller that goes away, steps that others cancel, a reader elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from slurm_rollout import proc
from slurm_rollout.testing.fleet import SlurmFleet, stub_spec, wait_for
from slurm_rollout.testing.slurm_cluster import SlurmCluster
from tests.conftest import FAILED, show_logs

pytestmark = pytest.mark.slurm


@pytest.fixture
def fleet(cluster: SlurmCluster, request: pytest.FixtureRequest) -> Iterator[SlurmFleet[SlurmCluster]]:
    made = SlurmFleet(cluster)
    try:
        yield made
        if request.node.stash.get(FAILED, False):
            print(made.story())
    finally:
        made.end()


def spec(cluster: SlurmCluster, fleet: SlurmFleet[SlurmCluster], **more: object) -> str:
    return stub_spec(python=cluster.python, control=fleet.control, **more)  # type: ignore[arg-type]


def test_two_groups_share_a_node_with_disjoint_gpus_and_do_not_disturb_each_other(
    cluster: SlurmCluster, fleet: SlurmFleet[SlurmCluster]
) -> None:
    if cluster.slurm_version < (22, 5):
        pytest.skip(f"steps of Slurm {cluster.slurm_version} do not share a node's GPUs: that came with 22.05")
    fleet.start(spec(cluster, fleet, groups=2, layout="gpus = 4\nmembers_per_node = 2"), nodes=1)
    fleet.wait_phase("ready")
    seen = {
        (group, rank): proc.environ(fleet.engine(group, rank))["CUDA_VISIBLE_DEVICES"]
        for group in ("actor/0", "actor/1")
        for rank in (0, 1)
    }
    assert sorted(seen.values()) == ["0,1", "2,3", "4,5", "6,7"]
    other = fleet.engine("actor/1", 0)
    fleet.kill("actor/0", 1)
    fleet.wait_serving("actor/0", 2)
    again = [proc.environ(fleet.engine("actor/0", rank))["CUDA_VISIBLE_DEVICES"] for rank in (0, 1)]
    assert again == [seen["actor/0", 0], seen["actor/0", 1]]
    assert fleet.engine("actor/1", 0) == other
    assert not fleet.events("failure", "actor/1")


@pytest.mark.parametrize(("how", "away_s"), [("frozen", 12), ("stopped", 30)])
def test_a_controller_that_is_away_during_a_recovery_costs_only_time(
    cluster: SlurmCluster, fleet: SlurmFleet[SlurmCluster], how: str, away_s: float
) -> None:
    fleet.start(spec(cluster, fleet, groups=2, more="[slurm]\ncommand_timeout_s = 5"))
    fleet.wait_phase("ready")
    survivor = fleet.engine("actor/1", 0)
    if how == "frozen":
        cluster.freeze_controller()
    else:
        cluster.stop_controller()
    away_since = time.monotonic()
    fleet.kill("actor/0", 1)
    # The agents end their trees by themselves: no word of slurmctld is needed for that.
    fleet.wait_event("stopped", "actor/0", 1, timeout_s=5)
    wait_for("enough time without a controller", lambda: time.monotonic() - away_since > away_s, timeout_s=40)
    assert fleet.barrier()["reason"] == "degraded"
    assert not fleet.events("failure", "actor/1")
    if how == "frozen":
        cluster.thaw_controller()
    else:
        cluster.start_controller()
    fleet.wait_phase("ready")
    wait_for("both groups", lambda: all(g["serving"] for g in fleet.barrier()["groups"]), timeout_s=60)
    assert fleet.engine("actor/1", 0) == survivor
    status = json.loads(fleet.run.status.read_text())
    budget = next(g for g in status["groups"] if g["id"] == "actor/0")["budget"]
    assert budget["start_failures"]["left"] == budget["start_failures"]["of"], "a blind Slurm is charged to nobody"


@pytest.fixture
def strict(real_slurm: None, request: pytest.FixtureRequest) -> Iterator[SlurmCluster]:
    """A cluster that limits each user to a burst of 8 requests and one a second after that."""
    made = SlurmCluster(conf_lines=["SlurmctldParameters=rl_enable,rl_bucket_size=8,rl_refill_rate=1"])
    with made as cluster:
        if cluster.slurm_version < (23, 2):
            pytest.skip(f"Slurm {cluster.slurm_version} limits nobody: that came with 23.02")
        yield cluster
        if request.node.stash.get(FAILED, False):
            show_logs(cluster)


@pytest.mark.timeout(300)  # a request a second, for some forty of them
def test_a_limited_rate_of_requests_makes_starts_slow_and_fails_none(strict: SlurmCluster) -> None:
    cluster = strict
    with SlurmFleet(cluster) as fleet:
        # With questions every second or five, sruns of 26.05 get no turn.
        more = "[slurm]\nmax_launching = 4\n"
        fleet.start(spec(cluster, fleet, groups=8, layout="gpus = 2\nmembers_per_node = 1", more=more))
        wait_for("all groups", lambda: [g.get("serving") for g in fleet.barrier().get("groups", [])] == [True] * 8, 120)
        for group in ("actor/0", "actor/7"):
            fleet.kill(group, 0)
            fleet.wait_serving(group, 2, timeout_s=60)
        assert len(fleet.events("failure")) == 2
        log = (cluster.logs / "slurmctld.ctl.log").read_text()
        assert "RPC rate limit exceeded" in log
    cluster.wait_job(fleet.job, "CANCELLED", timeout_s=90)


def test_without_munged_what_runs_goes_on_and_slurm_counts_as_silent(
    cluster: SlurmCluster, fleet: SlurmFleet[SlurmCluster]
) -> None:
    """So it is also where clocks are too far apart: every command is refused, and no signal of srun arrives."""
    fleet.start(spec(cluster, fleet, groups=2, more="audit_s = 1\n"))
    fleet.wait_phase("ready")
    survivor = fleet.engine("actor/1", 0)
    cluster.stop_munged()
    fleet.wait_event("blind", timeout_s=60)
    fleet.kill("actor/0", 1)
    fleet.wait_event("failure", "actor/0", 1)
    seq = fleet.barrier()["seq"]
    wait_for("heartbeats", lambda: fleet.barrier()["seq"] > seq + 10)
    assert not fleet.events("launching", "actor/0", 2)
    cluster.start_munged()
    fleet.wait_event("sighted", timeout_s=90)
    wait_for("both groups", lambda: all(g["serving"] for g in fleet.barrier()["groups"]), timeout_s=90)
    assert fleet.engine("actor/1", 0) == survivor
    status = json.loads(fleet.run.status.read_text())
    for group in status["groups"]:
        left = group["budget"]["start_failures"]
        assert left["left"] == left["of"], "a Slurm that nobody can talk to is charged to nobody"


def test_a_step_that_somebody_cancels_is_a_failure_of_its_group(
    cluster: SlurmCluster, fleet: SlurmFleet[SlurmCluster]
) -> None:
    fleet.start(spec(cluster, fleet, groups=2))
    fleet.wait_phase("ready")
    steps = cluster.run(["squeue", "-s", "-h", "-j", fleet.job, "-o", "%i %j"]).stdout.split("\n")
    victim = next(line.split()[0] for line in steps if ".actor-0.1.1" in line)
    cluster.run(["scancel", victim])
    fleet.wait_serving("actor/0", 2)
    failure = fleet.wait_event("failure", "actor/0")
    # The agent may have a moment to tell of its engine's end before it is killed itself.
    assert failure["reason"] in ("step_ended", "engine_exited")
    assert failure["rank"] == 1
    assert not fleet.events("failure", "actor/1")


def test_the_run_can_be_looked_at_and_stopped_from_another_host(
    cluster: SlurmCluster, fleet: SlurmFleet[SlurmCluster]
) -> None:
    fleet.start(spec(cluster, fleet, groups=2))
    fleet.wait_phase("ready")
    status = cluster.run(["slurm-rollout", "status", "--run-dir", "run", "--json"])
    assert {g["phase"] for g in json.loads(status.stdout)["groups"]} == {"ready"}
    answer = cluster.run(["slurm-rollout", "restart", "actor/1", "--run-dir", "run"])
    assert "restarts" in answer.stdout
    fleet.wait_serving("actor/1", 2)
    assert fleet.wait_event("failure" if fleet.events("failure") else "stopped", "actor/1", 1)["reason"] == "operator"
    cluster.run(["slurm-rollout", "stop", "--run-dir", "run"])
    cluster.wait_job(fleet.job, "COMPLETED")
    status = cluster.run(["slurm-rollout", "status", "--run-dir", "run"], check=False)
    assert status.returncode == 3


def test_a_trainer_beside_the_fleet_decides_the_exit_code_and_keeps_its_own_srun(
    cluster: SlurmCluster, fleet: SlurmFleet[SlurmCluster]
) -> None:
    trainer = cluster.home / "trainer.sh"
    trainer.write_text(
        "#!/bin/bash\n"
        "srun --overlap -N $ROLLOUT_TRAINER_NNODES -n $ROLLOUT_TRAINER_NNODES -w $ROLLOUT_TRAINER_NODELIST "
        "hostname > trainer-nodes\n"
        "slurm-rollout wait --for ready --timeout 20 > trainer-saw || exit 9\n"
        "exit 7\n"
    )
    trainer.chmod(0o755)
    fleet.start(spec(cluster, fleet, groups=1, more="[nodes]\ncount = 2"), trainer=["./trainer.sh"])
    cluster.wait_job(fleet.job, "FAILED")
    shown = cluster.run(["scontrol", "show", "job", fleet.job]).stdout
    assert "ExitCode=7:0" in shown
    assert sorted((cluster.home / "trainer-nodes").read_text().split()) == ["n1", "n2"]
    assert "http://n3:18000" in (cluster.home / "trainer-saw").read_text()
    assert fleet.barrier()["phase"] == "stopped"
