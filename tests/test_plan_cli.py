"""`slurm-rollout plan`: everything is printed, nothing is started, and what is wrong ends with exit code 2."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from slurm_rollout.cli import main

SPEC = """
name = "run"
[nodes]
count = 5
spares = 1
[[pool]]
name = "actor"
groups = 1
gpus = 16
engine.kind = "command"
engine.argv = ["serve", "--port={http_port}", "a b", "{incarnation}"]
engine.entrypoints = "leader"
engine.ports = ["session"]
[[pool]]
name = "reward"
groups = 2
gpus = 2
engine = { kind = "command", argv = ["rm", "{gpus}"] }
probe.liveness.counter = { name = "tokens" }
"""
NODES = ["--nodes", "n[01-08]", "--gpus-per-node", "8", "--cpus-per-node", "64"]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The spec in an otherwise empty directory, in no job, where nothing may be started."""
    for name in ("SLURM_JOB_ID", "SLURM_SUBMIT_DIR"):
        monkeypatch.delenv(name, raising=False)

    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("plan started a process")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "fleet.toml"
    path.write_text(SPEC)
    return path


def plan(capsys: pytest.CaptureFixture[str], path: Path, *args: str) -> str:
    assert main(["plan", str(path), *args]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return captured.out


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose header starts with `first`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return [line.split() for line in lines[start + 1 : end]]


def test_the_text(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, path, *NODES)
    assert "fleet:     5 nodes: n[04-08]\n" in text
    assert "spares:    1: n08\n" in text
    assert "trainer:   3 nodes: n[01-03]\n" in text
    assert table(text, "POOL    ENGINE") == [
        ["actor", "command", "1", "1", "frozen", "at_once", "2", "2", "16"],
        ["reward", "command", "2", "1", "frozen", "at_once", "1", "1", "2"],
    ]
    assert table(text, "GROUP    RANK") == [
        ["actor/0", "0", "n04", "0-7", "18000", "18001", "18002", "http://n04:18000"],
        ["actor/0", "1", "n05", "0-7", "18000", "-", "18002", "-", "(no", "entrypoint)"],
    ]
    assert table(text, "GROUP     RANK") == [
        ["reward/0", "0", "n06", "0-1", "18000", "18001", "http://n06:18000"],
        ["reward/1", "0", "n06", "2-3", "18016", "18017", "http://n06:18016"],
    ]
    assert table(text, "POOL    DETECT") == [
        ["actor", "135", "3.5", "6", "240", "3720", "60", "4164.5", "4027", "0-300"],
        ["reward", "135", "3.5", "6", "240", "3720", "60", "4164.5", "4027", "0-300"],
    ]
    assert "actor/0 on n05: 64 CPUs, sees all 8 GPUs of the node\n    ROLLOUT_MARK=RUN/actor/0/1/n05\n    srun " in text
    assert "    rank 1: serve --port=18000 'a b' 1\n" in text
    assert "warning: pool actor has no probe.liveness.counter" in text
    assert "warning: n07: in the fleet, but in no group and no spare" in text


def test_an_agent_that_is_installed_on_the_nodes_is_the_one_that_steps_run(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with path.open("a") as spec:
        spec.write('\n[slurm]\npython = "/usr/bin/python3.9"\nagent = "/opt/slurm-rollout/agent"\n')
    text = plan(capsys, path, *NODES)
    lines = [line for line in text.splitlines() if line.startswith("    srun ")]
    assert lines
    assert all(line.endswith(" /usr/bin/python3.9 -IS /opt/slurm-rollout/agent") for line in lines)


def test_the_srun_line_is_the_one_that_the_coordinator_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, path, *NODES)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    srun ")]
    assert len(lines) == 4
    # In a shell the job's variable still works: nothing quotes it away.
    assert lines[0].startswith('srun "--jobid=$SLURM_JOB_ID" ')
    argv = shlex.split(lines[0])
    assert {"--nodelist=n04", "--gres=gpu:8", "--cpus-per-task=64", "--job-name=run.actor-0.1.0"} <= set(argv)


def test_json_has_the_same_and_a_schema(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(plan(capsys, path, *NODES, "--json"))
    assert (data["schema"], data["name"], data["backend"], data["job"]) == (1, "run", "slurm", "")
    assert (data["spares"], data["trainer_nodes"]) == (["n08"], ["n01", "n02", "n03"])
    assert len(data["warnings"]) == 2
    actor, reward = data["pools"]
    (group,) = actor["groups"]
    assert (group["id"], group["master"]) == ("actor/0", "n04:18001")
    assert group["members"][1] == {
        "rank": 1,
        "node": "n05",
        "local_rank": 0,
        "gpus": [0, 1, 2, 3, 4, 5, 6, 7],
        "ports": {"http": 18000, "master": 18001, "session": 18002},
        "entrypoint": False,
        "url": "http://n05:18000",
        "argv": ["serve", "--port=18000", "a b", "1"],
    }
    step = reward["groups"][1]["steps"][0]
    assert (step["node"], step["cpus"], step["gpus"]) == ("n06", 16, 8)
    assert step["mark"] == "ROLLOUT_MARK=RUN/reward/1/1/n06"
    assert "--nodelist=n06" in step["srun"]
    assert actor["bound"]["total_s"] == 4164.5
    assert actor["bound"]["crash_total_s"] == 4027


def test_inside_a_job_the_allocation_is_the_jobs(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "gpu[1-5]",
        "SLURM_JOB_CPUS_PER_NODE": "32(x5)",
        "SLURM_GPUS_ON_NODE": "8",
    }
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    text = plan(capsys, path)
    assert "job:       4711\n" in text
    assert "trainer:   5 nodes: gpu[1-5] (shared with the fleet, which takes all nodes)\n" in text
    assert " --jobid=4711 " in text
    assert f"{path.parent}/rollout-runs/4711/agent.py" in text


def test_the_local_backend_has_virtual_nodes_and_no_srun(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, path, "--backend", "local")
    assert "http://127.0.0.1:18000" in text
    assert "srun" not in text
    data = json.loads(plan(capsys, path, "--backend", "local", "--json"))
    assert data["pools"][0]["groups"][0]["steps"][0]["srun"] is None


def test_noheader(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_header, without = plan(capsys, path, *NODES), plan(capsys, path, *NODES, "-h")
    headers = [line for line in with_header.splitlines() if line.startswith(("POOL", "GROUP"))]
    assert len(headers) == 4
    assert [line for line in with_header.splitlines() if line not in headers] == without.splitlines()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "error: not inside a Slurm allocation"),
        (["--nodes", "n["], "error: --nodes: 'n[' is not a hostlist"),
        (["--nodes", "n[1-2]", "--gpus-per-node", "8"], "error: nodes.count = 5: the allocation has 2: n[1-2]"),
        (["--nodes", "n1", "--gpus-per-node", "-1"], "a whole number is needed, not '-1'"),
        (["--backend", "local", "--nodes", "n1"], "error: --backend local makes up its nodes"),
        (["--backend", "pbs"], "invalid choice: 'pbs'"),
    ],
)
def test_a_usage_error_ends_with_2_and_says_what_to_do(
    path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert main(["plan", str(path), *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_a_wrong_spec_ends_with_2(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(SPEC.replace("groups = 1", "gruops = 1"))
    assert main(["plan", str(path), *NODES]) == 2
    err = capsys.readouterr().err
    assert "pool[0].gruops (pool actor) = 1: there is no such key; did you mean groups?" in err
    assert "Traceback" not in err
