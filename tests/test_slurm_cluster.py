"""The rehearsal cluster itself: what every other test in this directory relies on."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from slurm_rollout.testing.slurm_cluster import (
    BASE,
    FREEZER,
    SlurmCluster,
    SlurmClusterError,
    wait_until,
    why_unavailable,
)

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("real_slurm")]

WHOLE_CLUSTER = ("-N4", "--exclusive", "--gres=gpu:8", "--output=job.out")
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1)"
LISTEN = "import socket, time; s = socket.create_server(('', 18000)); print('listening', flush=True); time.sleep(600)"


def script(body: str) -> str:
    return "#!/bin/bash\nset -eu\n" + textwrap.dedent(body)


def output(cluster: SlurmCluster, body: str, *args: str) -> list[str]:
    job = cluster.sbatch(script(body), *(args or WHOLE_CLUSTER))
    cluster.wait_job(job, "COMPLETED")
    return (cluster.home / "job.out").read_text().splitlines()


def reachable(cluster: SlurmCluster, origin: str, target: str, port: int = 6818) -> bool:
    return cluster.in_node(origin, ["python", "-c", CONNECT, target, str(port)], check=False).returncode == 0


def test_job_runs_on_every_node_as_the_user(cluster: SlurmCluster) -> None:
    lines = output(cluster, "echo batch on $(hostname); srun sh -c 'echo $(hostname) $(id -un) $SLURM_PROCID'")
    assert lines[0] == "batch on n1"
    assert sorted(lines[1:]) == [f"n{rank + 1} rollout {rank}" for rank in range(4)]


def test_step_sees_its_gpus(cluster: SlurmCluster) -> None:
    lines = output(
        cluster,
        """
        srun -N1 -n1 -w n2 --gres=gpu:8 sh -c 'echo all $CUDA_VISIBLE_DEVICES'
        srun -N1 -n1 -w n2 --gres=gpu:2 --exact sh -c 'echo two $CUDA_VISIBLE_DEVICES'
        """,
    )
    assert lines == ["all 0,1,2,3,4,5,6,7", "two 0,1"]


def test_steps_of_one_node_overlap(cluster: SlurmCluster) -> None:
    # Each step waits for the other one, so the job ends only if both run at once. Before 22.05 they share CPUs alone.
    gpus = "gpu:8" if cluster.slurm_version >= (22, 5) else "none"
    lines = output(
        cluster,
        f"""
        meet() {{ touch $1; until [ -e $2 ]; do sleep 0.05; done; echo $1 on $(hostname); }}
        export -f meet
        step="srun -N1 -n1 -w n3 --overlap --mem=0 --gres={gpus} --cpus-per-task=16"
        $step bash -c 'meet a b' & $step bash -c 'meet b a' & wait
        """,
    )
    assert sorted(lines) == ["a on n3", "b on n3"]


def test_every_node_reaches_every_other_and_itself_by_name(cluster: SlurmCluster) -> None:
    lines = output(
        cluster,
        f"""
        srun -n4 sh -c 'for node in localhost n1 n2 n3 n4 ctl; do
            port=6818; [ $node != ctl ] || port=6817
            python -c "{CONNECT}" $node $port && echo $(hostname) $node
        done'
        """,
    )
    assert len(lines) == 24


def test_cut_node_is_silent_and_comes_back(cluster: SlurmCluster) -> None:
    cluster.cut("n3")
    assert not reachable(cluster, "n1", "n3")
    assert not reachable(cluster, "n3", "n1")
    assert reachable(cluster, "n3", "localhost")
    assert reachable(cluster, "n1", "n2")
    cluster.join("n3")
    wait_until("n3 answers", lambda: reachable(cluster, "n1", "n3"), timeout_s=10)
    assert output(cluster, "srun -N1 -n1 -w n3 hostname") == ["n3"]


def test_job_survives_the_controller(cluster: SlurmCluster) -> None:
    job = cluster.sbatch(script("srun sleep 600"), *WHOLE_CLUSTER)
    cluster.wait_job(job, "RUNNING")
    wait_until("a sleep on every node", lambda: all(cluster.user_pids("sleep", node) for node in cluster.nodes), 10)
    before = cluster.user_pids()
    cluster.stop_controller()
    assert not reachable(cluster, "n1", "ctl", port=6817)
    cluster.start_controller()
    assert cluster.job_state(job) == "RUNNING"
    assert cluster.user_pids() == before
    cluster.cancel(job)
    cluster.wait_job(job, "CANCELLED")
    wait_until("no process left", lambda: not cluster.user_pids(), timeout_s=10)
    cluster.wait_idle()


def test_frozen_controller_accepts_and_does_not_answer(cluster: SlurmCluster) -> None:
    cluster.freeze_controller()
    assert reachable(cluster, "n1", "ctl", port=6817)
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.run(["squeue"], timeout_s=1)
    cluster.thaw_controller()
    assert cluster.run(["squeue", "--noheader"], timeout_s=5).stdout == ""


def test_stranger_holds_a_port_of_one_node_only(cluster: SlurmCluster) -> None:
    with cluster.popen_in_node("n2", ["python", "-c", LISTEN], user=False) as stranger:
        try:
            assert stranger.stdout
            assert stranger.stdout.readline() == "listening\n"
            assert reachable(cluster, "n1", "n2", 18000)
            assert not reachable(cluster, "n1", "n3", 18000)
        finally:
            stranger.terminate()
    wait_until("the port is free", lambda: not reachable(cluster, "n1", "n2", 18000), timeout_s=5)


def test_user_runs_this_source_with_its_dependencies(cluster: SlurmCluster) -> None:
    program = "import slurm_rollout, pydantic, httpx, filelock, submitit, rich; print(slurm_rollout.__file__)"
    lines = output(cluster, f"srun -N1 -n1 -w n4 {cluster.python} -c '{program}'; command -v slurm-rollout")
    [copy] = cluster.python.parent.parent.glob("lib/python3.*/site-packages/slurm_rollout")
    assert lines == [f"{copy}/__init__.py", f"{cluster.python.parent}/slurm-rollout"]
    source = Path(sys.modules[SlurmCluster.__module__].__file__ or "")
    assert (copy / "testing" / source.name).read_text() == source.read_text()


def test_another_root_is_all_that_a_host_sees(cluster: SlurmCluster) -> None:
    root = cluster.slurm_root
    if root is None:
        pytest.skip("ROLLOUT_SLURM_ROOT names no other system")
    lines = output(cluster, "srun --version; srun -N1 -n1 -w n2 cat /etc/slurm-chroot")
    version = (root / "etc/slurm-chroot").read_text().strip()
    assert lines[0].startswith(f"slurm-wlm {version}.")
    assert lines[1] == version
    year, month = version.split(".")
    assert cluster.slurm_version == (int(year), int(month))


def test_directory_without_slurm_is_named(tmp_path: Path) -> None:
    assert f"not in {tmp_path}: slurmctld, slurmd" in (why_unavailable(tmp_path) or "")
    with pytest.raises(SlurmClusterError, match=r"slurm-chroot"):
        SlurmCluster(slurm_root=tmp_path).start()


def test_home_is_closed_to_others(cluster: SlurmCluster) -> None:
    assert cluster.home.stat().st_mode & 0o777 == 0o700
    assert cluster.home.stat().st_uid == cluster.uid


def test_ended_job_says_what_it_printed(cluster: SlurmCluster) -> None:
    job = cluster.sbatch(script("echo the reason; exit 3"), *WHOLE_CLUSTER)
    with pytest.raises(SlurmClusterError, match=r"has ended: FAILED \(NonZeroExitCode\)(?s:.*)the reason"):
        cluster.wait_job(job, "COMPLETED")


def test_daemon_that_does_not_start_is_named_and_nothing_stays() -> None:
    broken = SlurmCluster(nodes=2, conf_lines=["NoSuchParameter=1"])
    with pytest.raises(SlurmClusterError, match=r"slurmctld on ctl did not start(?s:.*)NoSuchParameter"), broken:
        pass
    assert not broken.root.exists()


def test_clusters_live_side_by_side(cluster: SlurmCluster) -> None:
    with SlurmCluster(nodes=1, gpus=0) as other:
        assert other.uid != cluster.uid
        job = other.sbatch(script("sleep 600"))
        other.wait_job(job, "RUNNING")
        assert cluster.user_pids() == []
        assert cluster.run(["squeue", "--noheader"]).stdout == ""
    assert not other.root.exists()
    cluster.wait_idle()


@pytest.mark.skipif(not FREEZER.exists(), reason=f"proctrack/cgroup needs cgroup v1; there is no {FREEZER}")
def test_cgroup_proctrack_ends_what_left_its_parents() -> None:
    with SlurmCluster(nodes=1, proctrack="cgroup") as cluster:
        job = cluster.sbatch(script("(setsid sleep 601 &); sleep 600"))
        cluster.wait_job(job, "RUNNING")
        wait_until("the daemon runs", lambda: bool(cluster.user_pids("sleep 601")), timeout_s=10)
        cluster.cancel(job)
        wait_until("no process left", lambda: not cluster.user_pids(), timeout_s=10)
    assert not list(FREEZER.glob(f"slurm_n*/uid_{cluster.uid}"))


def test_killed_owner_leaves_nothing_after_the_next_start(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import signal
        from slurm_rollout.testing.slurm_cluster import SlurmCluster
        with SlurmCluster(nodes=2) as cluster:
            job = cluster.sbatch("#!/bin/bash\\nsrun -n2 sleep 600\\n", "-N2")
            cluster.wait_job(job, "RUNNING")
            print(cluster.uid, *(host.pid for host in cluster._hosts.values()), flush=True)
            signal.pause()
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout
            uid, *pids = owner.stdout.readline().split()
        finally:
            owner.send_signal(signal.SIGKILL)
    wait_until("its hosts ended", lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), timeout_s=10)
    left = BASE / uid / "etc/slurm/slurm.conf"
    assert left.exists()
    with SlurmCluster(nodes=1) as next_one:
        assert not left.exists() or "n2 " not in left.read_text()
        assert next_one.user_pids() == []
