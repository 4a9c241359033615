"""`submit` on real Slurm: what submitit would do to `up` does not happen; a run goes on over a requeue and a chain."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import proc
from slurm_rollout.rundir import RunDir, read_json
from slurm_rollout.testing.fleet import SlurmFleet, stub_spec, wait_for
from slurm_rollout.testing.slurm_cluster import SlurmCluster
from tests.conftest import FAILED, expect_no_process_left

pytestmark = pytest.mark.slurm

# Notes every signal that it gets, and where it is; ends on TERM.
TRAINER = """\
    import json, os, signal, sys, time

    def note(**what):
        with open("notes.jsonl", "a") as log:
            print(json.dumps({"job": os.environ["SLURM_JOB_ID"], **what}), file=log)

    def heard(number, frame):
        note(signal=signal.Signals(number).name)
        if number == signal.SIGTERM:
            sys.exit(0)

    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, heard)
    note(rank=int(os.environ["SLURM_PROCID"]), of=int(os.environ["SLURM_NTASKS"]))
    while not os.path.exists("finish"):
        time.sleep(0.05)
"""


class SubmittedFleet(SlurmFleet[SlurmCluster]):
    """A job that `slurm-rollout submit` made."""

    jobs: tuple[str, ...] = ()

    def submit(self, *argv: str, check: bool = True) -> Any:
        """Run `submit` as its user, with submitit; return what it says, as JSON unless it refuses."""
        done = self.cluster.run(
            ["slurm-rollout", "submit", "fleet.toml", *argv], env={"PYTHONPATH": _submitit(self.cluster)}, check=check
        )
        if done.returncode or "--dry-run" in argv:
            return done
        found = json.loads(done.stdout)
        self.jobs = tuple(found["jobs"])
        self.job, self.run = self.jobs[0], RunDir(found["run_dir"])
        return found

    def spec(self, **more: Any) -> None:
        self._give("fleet.toml", stub_spec(python=self.cluster.python, control=self.control, **more))

    def trainer(self, program: str = TRAINER) -> tuple[str, ...]:
        self._give("train.py", textwrap.dedent(program))
        return ("--", "python3", "train.py")

    def _give(self, name: str, text: str) -> None:
        (self.cluster.home / name).write_text(text)

    def output(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in sorted(self.cluster.home.glob("test-*.log")))

    def notes(self, job: str) -> list[dict[str, Any]]:
        try:
            text = (self.cluster.home / "notes.jsonl").read_text()
        except FileNotFoundError:
            return []
        found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [note for note in found if note["job"] == job]

    def up(self) -> int:
        """Return the pid of the `up` that runs now."""
        [pid] = [pid for pid in self.cluster.user_pids() if "bin/slurm-rollout up " in _words(pid)]
        return pid

    def set_job(self, job: str, **fields: str) -> None:
        """Change a job, as an admin."""
        words = [f"{name}={value}" for name, value in fields.items()]
        self.cluster.run(["scontrol", "update", f"JobId={job}", *words], user=False)

    def let_it_start(self) -> None:
        """A requeued job would be held back for two minutes. Not at once: in the second in which its first life ended
        it would be refused (22.05: "Job credential revoked")."""
        self.set_job(self.job, StartTime="now+2")

    def state(self) -> dict[str, Any]:
        found = read_json(self.run.state)["state"]
        assert isinstance(found, dict)
        return found

    def end(self) -> None:
        for job in self.jobs:
            self.cluster.run(["scancel", job], check=False)


def _submitit(cluster: SlurmCluster) -> str:
    """Return a directory with submitit for the cluster's user: it is an extra, which the cluster does not install."""
    folder = cluster.root / "submitit"
    if not folder.exists():
        for name in ("submitit", "cloudpickle", "typing_extensions"):
            distribution = metadata.distribution(name)
            for file in distribution.files or ():
                if file.suffix == ".py" and ".." not in file.parts:
                    target = folder / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(str(distribution.locate_file(file)), target)
        cluster.run(["chmod", "-R", "a+rX", folder], user=False)
    return str(folder)


def _words(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def _parent(pid: int) -> str:
    [line] = [text for text in Path(f"/proc/{pid}/status").read_text().splitlines() if text.startswith("PPid:")]
    found = proc.read(int(line.split()[1]))
    return found.comm if found else ""


@pytest.fixture
def fleet(cluster: SlurmCluster, request: pytest.FixtureRequest) -> Iterator[SubmittedFleet]:
    made = SubmittedFleet(cluster)
    try:
        yield made
        if request.node.stash.get(FAILED, False):
            print(made.story())
    finally:
        made.end()


def test_up_is_the_batch_script_itself_and_hears_of_the_end(fleet: SubmittedFleet) -> None:
    """No srun around it (it would hold the nodes' resources); exec; one result is enough; TERM is not submitit's."""
    fleet.spec(groups=1, more="[nodes]\ncount = 2")
    options = ("--nodes=3", "--time=10", *fleet.trainer())
    script = fleet.submit("--dry-run", *options).stdout
    fleet.submit("--json", *options)
    assert (fleet.cluster.home / f"rollout-runs/.submit/{fleet.job}_submission.sh").read_text() == script
    fleet.wait("the trainer", lambda: fleet.notes(fleet.job), timeout_s=40)
    assert fleet.notes(fleet.job) == [{"job": fleet.job, "rank": 0, "of": 1}]

    # Slurm started it, not a shell, nor srun, nor submitit's Python; and only once, though the job has three nodes.
    up = fleet.up()
    assert _parent(up) == "slurmstepd"
    environ = proc.environ(up)
    assert environ.get("SLURM_STEP_ID", "-5") == "-5", "a batch script is no step (26.05 says so with -5)"
    assert not [name for name in environ if name.startswith("SUBMITIT")]
    steps = fleet.cluster.run(["squeue", "--steps", "--noheader", f"--jobs={fleet.job}", "--format=%j"]).stdout
    assert sorted(steps.split()) == ["batch", "python3", "test.actor-0.1.0", "test.actor-0.1.1"]
    assert not fleet.cluster.user_pids("submitit.core._submit")

    fleet.cluster.cancel(fleet.job)
    fleet.cluster.wait_job(fleet.job, "CANCELLED")
    assert [e["type"] for e in fleet.events()][-1] == "ended"
    assert fleet.barrier()["phase"] == "stopped"
    assert "TERM: draining the fleet" in fleet.output()
    assert "Bypassing signal" not in fleet.output()
    assert not list((fleet.cluster.home / "rollout-runs/.submit").glob("*.pkl"))


@pytest.mark.timeout(240)  # the controller looks at time limits every 30 s
def test_a_chain_goes_on_at_the_time_limit_and_ends_with_the_first_success(fleet: SubmittedFleet) -> None:
    """submitit's own `--signal=USR2@90` would have ended the trainer before that, and have had engines looked into."""
    fleet.spec(groups=2, layout="nodes = 1", more="[nodes]\ncount = 2")
    options = ("--json", "--nodes=3", "--time=10", "--chain=3", "--run-dir=run")
    fleet.submit(*options, *fleet.trainer())
    first, second, third = fleet.jobs
    fleet.wait("the trainer", lambda: fleet.notes(first), timeout_s=40)
    fleet.kill("actor/1", 0)
    fleet.wait_serving("actor/1", 2)
    old = {pid: _words(pid) for pid in fleet.cluster.user_pids()}
    before, epoch, term = fleet.state(), fleet.barrier()["epoch"], fleet.barrier()["term"]
    # The controller looks every 30 s; its warning comes with the same look, or an earlier one.
    fleet.set_job(first, EndTime=(datetime.now() + timedelta(seconds=2)).isoformat(timespec="seconds"))
    fleet.cluster.wait_job(first, "TIMEOUT", timeout_s=60)
    assert not [n for n in fleet.notes(first) if n.get("signal") in ("SIGUSR1", "SIGUSR2")]
    assert not fleet.events("snapshot")
    assert {"job": first, "signal": "SIGTERM"} in fleet.notes(first)
    assert "ended" in {e["type"] for e in fleet.events()}

    fleet.job = second
    fleet.wait("the second job's trainer", lambda: fleet.notes(second), timeout_s=40)
    assert not [pid for pid in fleet.cluster.user_pids() if old.get(pid) == _words(pid)]
    after = fleet.barrier()
    assert after["phase"] == "ready"
    assert after["job"] == second
    assert after["epoch"] > epoch
    assert after["term"] > term
    assert {g["id"]: g["incarnation"] for g in after["groups"]} == {"actor/0": 2, "actor/1": 3}
    assert fleet.state()["run_id"] == before["run_id"]
    assert not fleet.events("fence_waits")

    (fleet.cluster.home / "finish").touch()
    fleet.cluster.wait_job(second, "COMPLETED")
    fleet.cluster.wait_job(third, "CANCELLED")
    assert not fleet.notes(third)


def test_a_requeued_job_goes_on_with_its_run(fleet: SubmittedFleet) -> None:
    fleet.spec(groups=2)
    fleet.submit("--json", "--template=fleet-only", "--nodes=4", "--run-dir=run")
    fleet.wait_phase("ready", timeout_s=40)
    fleet.kill("actor/0", 1)
    fleet.wait_serving("actor/0", 2)
    old = {pid: _words(pid) for pid in fleet.cluster.user_pids()}
    run_id, epoch, seq = fleet.state()["run_id"], fleet.barrier()["epoch"], fleet.barrier()["seq"]
    fleet.cluster.run(["scontrol", "requeue", fleet.job])
    wait_for("it to be pending", lambda: fleet.cluster.job_state(fleet.job) == "PENDING", timeout_s=30)
    fleet.let_it_start()
    fleet.wait("the word of the new `up`", lambda: fleet.barrier()["restart_count"] == 1, timeout_s=30)
    assert not [pid for pid in fleet.cluster.user_pids() if old.get(pid) == _words(pid)]
    fleet.wait_phase("ready")
    after = fleet.barrier()
    assert after["job"] == fleet.job
    assert after["epoch"] > epoch
    assert after["seq"] > seq
    assert {g["id"]: g["incarnation"] for g in after["groups"]} == {"actor/0": 3, "actor/1": 2}
    assert fleet.state()["run_id"] == run_id
    assert not [e for e in fleet.events("failure") if e["term"] == after["term"]], "the old steps' end is no failure"
    assert len(fleet.events("up")) == 2
    assert fleet.output().count("run directory") == 2, "the first life's log is kept"


def test_a_trainer_that_ends_with_75_is_started_again_where_the_site_has_that_in_its_configuration(
    real_slurm: None,
) -> None:
    trainer = """\
        import os, sys
        life = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        print(f"life {life}", flush=True)
        sys.exit(0 if life else 75)
    """
    with SlurmCluster(nodes=2, conf_lines=["RequeueExit=75"]) as cluster:
        fleet = SubmittedFleet(cluster)
        fleet.spec(layout="nodes = 1", more="[nodes]\ncount = 1")
        fleet.submit("--json", "--nodes=2", "--time=10", "--sbatch=requeue", *fleet.trainer(trainer))
        fleet.wait("the end of its first life", lambda: " ended with 75" in fleet.output(), timeout_s=40)
        wait_for("it to be pending", lambda: cluster.job_state(fleet.job) == "PENDING", timeout_s=30)
        fleet.let_it_start()
        cluster.wait_job(fleet.job, "COMPLETED")
        assert [line for line in fleet.output().splitlines() if line.startswith("life")] == ["life 0", "life 1"]
        assert [e["incarnation"] for e in fleet.events("ready")] == [1, 2]
        expect_no_process_left(cluster)


def test_what_slurm_refuses_is_told_in_its_words(fleet: SubmittedFleet) -> None:
    fleet.spec()
    done = fleet.submit("--template=fleet-only", "--partition=nowhere", check=False)
    assert done.returncode == 1
    assert "invalid partition" in done.stderr
    assert "Traceback" not in done.stderr
    assert not fleet.cluster.run(["squeue", "--noheader"]).stdout
