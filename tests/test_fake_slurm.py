"""The fake Slurm by itself: its faults, and that nothing of it is ever left behind. What it says is compared with real
Slurm in test_conformance.py.

Ports: 18000 to 18999 (the test clusters have networks of their own).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from slurm_rollout import proc
from slurm_rollout.testing.fake_slurm import FakeSlurm, FakeSlurmError
from slurm_rollout.testing.fleet import SlurmFleet, stub_spec, wait_for
from tests.conftest import FAILED

WHOLE = ("--nodes=4", "--exclusive", "--gres=gpu:8", "--no-kill", "--no-requeue", "--output=job.out")


@pytest.fixture
def fake_slurm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeSlurm]:
    """The plugin's, with the KillWait that the test asks for."""
    with FakeSlurm(tmp_path / "fake-slurm", kill_wait_s=getattr(request, "param", 2.0)) as slurm:
        yield slurm


def kill_wait(seconds: float) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fake_slurm", [seconds], indirect=True, ids=[f"KillWait {seconds:g}"])


@pytest.fixture
def job(fake_slurm: FakeSlurm) -> str:
    """A job that holds all four nodes and does nothing."""
    job = fake_slurm.sbatch("#!/bin/bash\nexec sleep 600\n", *WHOLE)
    fake_slurm.wait_job(job, "RUNNING")
    return job


OPEN: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_open_sruns() -> Iterator[None]:
    yield
    while OPEN:
        srun = OPEN.pop()
        srun.kill()
        srun.communicate()


class Step:
    """An srun beside the job's script, whose task says `up` and then sleeps."""

    def __init__(
        self,
        slurm: FakeSlurm,
        job: str,
        name: str = "server",
        *,
        node: str = "n2",
        script: str = "",
        options: Sequence[str] = (),
    ) -> None:
        self.slurm, self.job, self.name = slurm, job, name
        command = script or "echo up; exec sleep 600"
        line = ["srun", f"--jobid={job}", "--overlap", "-N1", "-w", node, "--job-name", name, *options]
        self.srun = slurm.popen([*line, "sh", "-c", command])
        OPEN.append(self.srun)

    def up(self) -> Step:
        assert self.srun.stdout
        assert self.srun.stdout.readline() == "up\n"
        return self

    @property
    def tasks(self) -> list[int]:
        return [p for p in self.slurm.user_pids(f"SLURM_JOB_NAME={self.name} ") if "srun" not in _comm(p)]

    @property
    def id(self) -> str:
        lines = self.slurm.run(["squeue", "-s", "-h", "-j", self.job, "-o", "%i %j"]).stdout.splitlines()
        return next((line.split()[0] for line in lines if line.endswith(f" {self.name}")), "")

    def ends(self, timeout_s: float = 10) -> tuple[int, str]:
        """Return srun's exit code and what else was printed."""
        out, _ = self.srun.communicate(timeout=timeout_s)
        return self.srun.returncode, out


def _comm(pid: int) -> str:
    found = proc.read(pid)
    return found.comm if found else ""


def took(do: Callable[[], object]) -> float:
    started = time.monotonic()
    do()
    return time.monotonic() - started


# --------------------------------------------------------------------------------------------------------------- fleet


@pytest.fixture
def fleet(fake_slurm: FakeSlurm, request: pytest.FixtureRequest) -> Iterator[SlurmFleet[FakeSlurm]]:
    made = SlurmFleet(fake_slurm)
    try:
        yield made
        if request.node.stash.get(FAILED, False):
            print(made.story())
    finally:
        made.end()


@kill_wait(20)  # a drain has to end within it
def test_a_fleet_comes_up_recovers_and_ends(fake_slurm: FakeSlurm, fleet: SlurmFleet[FakeSlurm]) -> None:
    fleet.start(stub_spec(groups=2, base=18000, control=fleet.control, more='[nodes]\naddress = "127.0.0.1"'))
    fleet.wait_phase("ready")
    other = fleet.engine("actor/1", 0)
    fleet.kill("actor/0", 1)
    fleet.wait_serving("actor/0", 2)
    assert fleet.engine("actor/1", 0) == other
    fake_slurm.cancel(fleet.job)
    fake_slurm.wait_job(fleet.job, "CANCELLED")
    assert not fleet.processes()
    assert fleet.barrier()["phase"] == "stopped"


# ---------------------------------------------------------------------------------------------------------------- jobs


def test_a_cancelled_job_gets_term_then_kill_and_only_the_script_itself_is_told(tmp_path: Path) -> None:
    script = """\
        #!/bin/bash
        sh -c 'trap "echo child" TERM; echo ready; while :; do sleep 0.05; done' &
        trap 'echo script' TERM
        while :; do sleep 0.05; done
        """
    with FakeSlurm(tmp_path, kill_wait_s=3) as slurm:
        job = slurm.sbatch(textwrap.dedent(script), "--output=job.out")
        output = slurm.home / "job.out"
        wait_for("the script", lambda: output.exists() and "ready" in output.read_text())
        began = time.monotonic()
        slurm.cancel(job)
        assert slurm.job_state(job) == "COMPLETING"
        slurm.wait_job(job, "CANCELLED")
        assert time.monotonic() - began >= 3
        lines = output.read_text().splitlines()
        assert lines[0] == "ready"
        assert lines[1].startswith(f"slurmstepd-n1: error: *** JOB {job} ON n1 CANCELLED AT ")
        assert lines[2:] == ["script"]
        assert not slurm.user_pids()


def test_a_requeued_job_starts_again_and_knows_it(fake_slurm: FakeSlurm) -> None:
    job = fake_slurm.sbatch(
        "#!/bin/bash\necho run ${SLURM_RESTART_COUNT-first}\nexec sleep 600\n",
        "--open-mode=append",
        "--output=%j.out",
    )
    output = fake_slurm.home / f"{job}.out"
    wait_for("the first run", lambda: output.exists() and "run first" in output.read_text())
    fake_slurm.run(["scontrol", "requeue", job])
    wait_for("the second run", lambda: "run 1" in output.read_text())
    assert "DUE TO JOB REQUEUE" in output.read_text()
    assert "Restarts=1" in fake_slurm.run(["scontrol", "-o", "show", "job", job]).stdout


def test_jobs_wait_for_nodes_and_gpus_and_get_different_ones(fake_slurm: FakeSlurm) -> None:
    half = ("--nodes=1", "--nodelist=n1", "--gres=gpu:4", "--output=%j.out")
    first, second, third = (
        fake_slurm.sbatch("#!/bin/bash\necho $CUDA_VISIBLE_DEVICES\nexec sleep 600\n", *half) for _ in range(3)
    )
    outputs = [fake_slurm.home / f"{job}.out" for job in (first, second)]
    wait_for("both", lambda: all(o.exists() and o.read_text() for o in outputs))
    assert [o.read_text() for o in outputs] == ["0,1,2,3\n", "4,5,6,7\n"]
    assert fake_slurm.job_state(third) == "PENDING"
    fake_slurm.cancel(second)
    fake_slurm.wait_job(third, "RUNNING")


# --------------------------------------------------------------------------------------------------------------- steps


def test_srun_killed_ends_its_step_through_its_twin_and_both_killed_leave_it(fake_slurm: FakeSlurm, job: str) -> None:
    step = Step(fake_slurm, job).up()
    step.srun.kill()
    wait_for("no task", lambda: not step.tasks)
    assert step.ends()[0] == -signal.SIGKILL
    wait_for("no step", lambda: not step.id)

    other = Step(fake_slurm, job, "orphan").up()
    (twin,) = proc.descendants(other.srun.pid)
    assert twin.comm == "srun"
    os.kill(other.srun.pid, signal.SIGSTOP)  # so that neither acts on the other's end
    os.kill(twin.pid, signal.SIGKILL)
    other.srun.kill()
    other.ends()
    time.sleep(1)
    assert other.tasks
    assert other.id
    fake_slurm.run(["scancel", other.id])
    wait_for("no task", lambda: not other.tasks)


def test_a_stopped_srun_holds_its_task_up_once_the_buffers_are_full(fake_slurm: FakeSlurm, job: str) -> None:
    script = "echo up >&2; i=0; while :; do i=$((i+1)); echo $i > count; head -c 65536 /dev/zero; done"
    step = Step(fake_slurm, job, script=script, options=["--output=/dev/null", "--error=/dev/stdout"]).up()
    count = fake_slurm.home / "count"

    def counted() -> int:
        return int(count.read_text() or 0) if count.exists() else 0

    def stands() -> bool:
        before = counted()
        time.sleep(0.3)
        return counted() == before

    wait_for("more than the buffers hold", lambda: counted() > 40)
    os.kill(step.srun.pid, signal.SIGSTOP)
    wait_for("a halt", lambda: stands() and stands() and counted() > 40)
    halted_at = counted()
    os.kill(step.srun.pid, signal.SIGCONT)
    wait_for("it goes on", lambda: counted() > halted_at)


def test_what_daemonises_ends_with_its_step(fake_slurm: FakeSlurm, job: str) -> None:
    step = Step(
        fake_slurm, job, script="(setsid sleep 601 >/dev/null 2>&1 &); echo up; until [ -e go ]; do :; done"
    ).up()
    wait_for("the daemon", lambda: fake_slurm.user_pids("sleep 601"))
    (fake_slurm.home / "go").touch()
    assert step.ends() == (0, "")
    wait_for("its end", lambda: not fake_slurm.user_pids("sleep 601"))


REFUSED = {
    "srun --no-such": "fake_slurm: does not know srun --no-such",
    "srun --jobid=1 --export=NONE true": "fake_slurm: does not know srun --export=NONE, only ALL",
    "srun true": "fake_slurm: does not know srun without a job: give --jobid or SLURM_JOB_ID",
    "srun -Z true": "fake_slurm: does not know srun -Z",
    "sbatch --array=1-3 script": "fake_slurm: does not know sbatch --array",
    "scancel --ctld 1": "fake_slurm: does not know scancel --ctld",
    "scontrol reconfigure": "fake_slurm: does not know scontrol reconfigure",
    "scontrol update NodeName=n1 State=DRAIN": "fake_slurm: does not know scontrol update NodeName=n1 State=DRAIN, "
    "only JobId= Comment=",
    "squeue --start": "fake_slurm: does not know squeue --start",
    "squeue -o %q": "fake_slurm: does not know squeue --format %q",
    "sinfo --json": "fake_slurm: does not know sinfo --json",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_it_does_not_know_is_refused(fake_slurm: FakeSlurm, line: str) -> None:
    done = fake_slurm.run(line.split(), check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{REFUSED[line]}\n")


# -------------------------------------------------------------------------------------------------------------- faults


@kill_wait(0.5)
def test_unreachable(fake_slurm: FakeSlurm, job: str) -> None:
    step = Step(fake_slurm, job, script="trap 'echo usr1' USR1; echo up; while :; do sleep 0.05; done").up()
    fake_slurm.unreachable(0.2)
    ask = ["scontrol", "-o", "show", "step", job]
    assert took(lambda: fake_slurm.run(ask, check=False)) > 0.2
    done = fake_slurm.run(ask, check=False)
    words = "slurm_get_job_steps error: Unable to contact slurm controller (connect failure)\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", words)
    answer = json.loads(fake_slurm.run(["squeue", "--json"]).stdout)
    assert answer["jobs"] == []
    assert answer["errors"]
    step.srun.send_signal(signal.SIGUSR1)
    assert step.srun.stdout
    assert step.srun.stdout.readline() == "usr1\n"
    step.srun.terminate()
    code, said = step.ends()
    assert code == 0
    assert "Timed out waiting for job step to complete" in said
    assert step.tasks, "it was told to end, and nobody could be asked to do it"
    fake_slurm.heal()
    assert step.id


def test_slow(fake_slurm: FakeSlurm) -> None:
    fake_slurm.slow("squeue", 0.5)
    assert took(lambda: fake_slurm.run(["squeue"])) >= 0.5
    fake_slurm.slow("squeue", 30)
    assert took(lambda: fake_slurm.run(["sinfo"])) < 30


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nodes", "Requested node configuration is not available"),
        ("memory", "Memory required by task is not available"),
        ("No such luck", "No such luck"),
    ],
)
def test_refuse_steps(fake_slurm: FakeSlurm, job: str, kind: str, words: str) -> None:
    fake_slurm.refuse_steps(kind)
    assert Step(fake_slurm, job).ends() == (1, f"srun: error: Unable to create step for job {job}: {words}\n")
    fake_slurm.heal()
    Step(fake_slurm, job).up()


def test_disable_steps(fake_slurm: FakeSlurm, job: str) -> None:
    fake_slurm.disable_steps()
    step = Step(fake_slurm, job)
    assert step.srun.stdout
    line = step.srun.stdout.readline()
    assert line == f"srun: Job {job} step creation temporarily disabled, retrying (Requested nodes are busy)\n"
    assert f"StepId={job}.TDB " in fake_slurm.run(["scontrol", "-o", "show", "step", job]).stdout
    fake_slurm.heal()
    lines = [step.srun.stdout.readline() for _ in range(3)]
    assert f"srun: Step created for job {job}\n" in lines


def test_deaf_cancel(fake_slurm: FakeSlurm, job: str) -> None:
    step = Step(fake_slurm, job).up()
    fake_slurm.deaf_cancel(3)
    step_id = step.id
    began = time.monotonic()
    fake_slurm.run(["scancel", step_id])
    assert time.monotonic() - began < 3
    assert step.srun.poll() is None
    assert step.ends()[0] == 137
    assert time.monotonic() - began >= 3


@kill_wait(0.5)
def test_stuck_completing(fake_slurm: FakeSlurm, job: str) -> None:
    step = Step(fake_slurm, job).up()
    fake_slurm.stuck_completing(30)
    step_id = step.id
    fake_slurm.run(["scancel", step_id])
    wait_for("no task", lambda: not step.tasks)
    assert step.id == step_id
    code, said = step.ends()
    assert code == 0
    assert "Timed out" in said
    assert "Killed" not in said
    assert step.id == step_id
    fake_slurm.heal()
    wait_for("no step", lambda: not step.id)


def test_vanish(fake_slurm: FakeSlurm, job: str) -> None:
    step = Step(fake_slurm, job).up()
    fake_slurm.vanish("serv")
    shown = fake_slurm.run(["scontrol", "-o", "show", "step", job]).stdout
    assert f"StepId={job}.batch " in shown
    assert "server" not in shown
    assert not step.id
    fake_slurm.vanish("batch")
    assert fake_slurm.run(["scontrol", "-o", "show", "step", job], check=False).returncode == 1
    fake_slurm.heal()
    assert step.id


def test_lying_srun(fake_slurm: FakeSlurm, job: str) -> None:
    step = Step(fake_slurm, job).up()
    fake_slurm.lying_srun("server")
    assert step.ends() == (0, "")
    later = Step(fake_slurm, job, "server2")
    assert later.ends()[0] == 0
    for each in (step, later):
        assert wait_for("its task", functools.partial(getattr, each, "tasks"))
        assert each.id


def test_kill_node(fake_slurm: FakeSlurm, job: str) -> None:
    step, other = Step(fake_slurm, job).up(), Step(fake_slurm, job, "other", node="n3").up()
    began = time.monotonic()
    fake_slurm.kill_node("n2", after_s=3)
    assert not step.tasks
    assert step.srun.poll() is None
    assert step.id
    assert step.ends()[0] == 0, "as measured: 22.05.8"
    assert time.monotonic() - began >= 3
    state = fake_slurm.run(["sinfo", "-N", "-h", "-o", "%N %T"]).stdout.split("\n")
    assert "n2 down*" in state
    assert "NodeList=n[1,3-4] " in fake_slurm.run(["scontrol", "-o", "show", "job", job]).stdout
    wait_for("the step is given up", lambda: not step.id)
    words = f"srun: error: Unable to create step for job {job}: Requested node configuration is not available\n"
    assert Step(fake_slurm, job).ends() == (1, words)
    assert other.tasks
    fake_slurm.heal()
    assert "n2 idle" in fake_slurm.run(["sinfo", "-N", "-h", "-o", "%N %T"]).stdout


def test_a_job_that_does_not_say_no_kill_ends_with_its_node(fake_slurm: FakeSlurm) -> None:
    job = fake_slurm.sbatch("#!/bin/bash\nexec sleep 600\n", "--nodes=2", "--no-requeue")
    fake_slurm.wait_job(job, "RUNNING")
    fake_slurm.kill_node("n2", after_s=0.1)
    fake_slurm.wait_job(job, "NODE_FAIL")


@kill_wait(0.5)
def test_cut_node(fake_slurm: FakeSlurm, job: str) -> None:
    script = "trap 'echo usr1; touch heard' USR1; echo up; while :; do sleep 0.05; done"
    step = Step(fake_slurm, job, script=script).up()
    fake_slurm.cut_node("n2", after_s=600)
    step.srun.send_signal(signal.SIGUSR1)
    assert Step(fake_slurm, job, "late").ends()[0] == 233
    step_id = step.id
    fake_slurm.run(["scancel", step_id])
    code, said = step.ends()
    assert code == 0
    assert "Timed out" in said
    assert step.tasks
    assert step.id == step_id
    assert not (fake_slurm.home / "heard").exists()
    fake_slurm.join_node("n2")
    wait_for("no task", lambda: not step.tasks)
    wait_for("no step", lambda: not step.id)


def test_a_node_that_is_cut_off_for_a_moment_loses_nothing(fake_slurm: FakeSlurm, job: str) -> None:
    step = Step(fake_slurm, job, script="echo up; until [ -e go ]; do sleep 0.02; done; echo said; exec sleep 600").up()
    fake_slurm.cut_node("n2", after_s=600)
    (fake_slurm.home / "go").touch()
    wait_for("the task went on", lambda: fake_slurm.user_pids("sleep 600"))
    assert step.srun.stdout
    fake_slurm.join_node("n2")
    assert step.srun.stdout.readline() == "said\n"
    step.srun.terminate()
    assert step.ends()[0] == 137


@pytest.mark.parametrize("survives", [True, False], ids=["job goes on", "job ends"])
def test_a_node_that_comes_back_after_it_was_given_up_ends_what_survived(fake_slurm: FakeSlurm, survives: bool) -> None:
    options = ["--no-kill"] if survives else ["--no-requeue"]
    job = fake_slurm.sbatch("#!/bin/bash\nexec sleep 600\n", "--nodes=2", "--exclusive", *options)
    fake_slurm.wait_job(job, "RUNNING")
    step = Step(fake_slurm, job, script="trap : TERM; echo up; while :; do sleep 0.05; done").up()
    fake_slurm.cut_node("n2", after_s=0.1)
    assert "Node failure on n2" in step.ends()[1]
    if not survives:
        fake_slurm.wait_job(job, "NODE_FAIL")
    assert step.tasks
    fake_slurm.join_node("n2")
    wait_for("no task", lambda: not step.tasks)


def test_a_job_with_no_kill_outlives_the_node_of_its_script(fake_slurm: FakeSlurm, job: str) -> None:
    step, beside = Step(fake_slurm, job).up(), Step(fake_slurm, job, "beside", node="n1").up()
    fake_slurm.kill_node("n1", after_s=0.1)
    wait_for("the loss of its step", lambda: not beside.id)
    assert fake_slurm.job_state(job) == "RUNNING"
    assert not fake_slurm.user_pids("slurm_script")
    shown = fake_slurm.run(["scontrol", "-o", "show", "step", job]).stdout
    assert f"StepId={job}.batch " in shown, "as measured: 22.05.8"
    assert step.id


def test_a_node_that_is_none(fake_slurm: FakeSlurm) -> None:
    with pytest.raises(FakeSlurmError, match="n9 is not one of n1, n2, n3, n4"):
        fake_slurm.cut_node("n9")


# -------------------------------------------------------------------------------------------------- nothing left behind

OWNER = """\
import signal, sys, time
from pathlib import Path
from slurm_rollout.testing.fake_slurm import FakeSlurm
slurm = FakeSlurm(Path(sys.argv[1])).start()
job = slurm.sbatch("#!/bin/bash\\nsrun --overlap sh -c '(setsid sleep 602 &); echo >> up; exec sleep 600'\\n", "-N4")
slurm.wait_job(job, "RUNNING")
outside = slurm.popen(["srun", f"--jobid={job}", "--overlap", "-N1", "sh", "-c", "echo >> up; exec sleep 603"])
while not (slurm.home / "up").exists() or (slurm.home / "up").read_text() != 5 * "\\n":
    time.sleep(0.02)
if sys.argv[2] != "controller killed":  # which leaves nobody who knows of a stopped one
    outside.send_signal(signal.SIGSTOP)
print("up", flush=True)
sys.stdin.read()
slurm.stop()
"""


def started_under(root: Path) -> list[proc.Proc]:
    """Return every process that has the folder in its environment or command line, or descends from one that has."""
    mark = str(root).encode()
    found: dict[int, proc.Proc] = {}
    for process in proc.own():
        path = Path(f"/proc/{process.pid}")
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes() + (path / "cmdline").read_bytes():
                found |= {p.pid: p for p in (process, *proc.descendants(process.pid))}
    return list(found.values())


@pytest.mark.parametrize("how", ["stop", "owner killed", "controller killed", "controller told to end"])
def test_no_process_is_left(tmp_path: Path, how: str) -> None:
    owner: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdin
    assert owner.stdout
    try:
        assert owner.stdout.readline() == "up\n"
        (controller,) = (p for p in proc.descendants(owner.pid) if p.comm == "slurmctld")
        processes = {p.pid: p for p in (*started_under(tmp_path), *proc.descendants(owner.pid))}.values()
        assert {"slurmctld", "slurmstepd", "srun", "sleep"} <= {p.comm for p in processes}
        if how == "stop":
            owner.stdin.close()
        elif how == "owner killed":
            owner.kill()
        else:
            os.kill(controller.pid, signal.SIGKILL if how == "controller killed" else signal.SIGTERM)
        ours = [p for p in processes if p.pid != owner.pid]
        wait_for("their end", lambda: not [p for p in ours if proc.lives(p.pid, p.started)], timeout_s=10)
    finally:
        owner.kill()
        owner.wait()
        for stream in (owner.stdin, owner.stdout):
            stream.close()
    assert not started_under(tmp_path)


def test_what_a_dead_daemon_of_a_step_leaves_ends_with_the_cluster(tmp_path: Path) -> None:
    with FakeSlurm(tmp_path) as slurm:
        job = slurm.sbatch("#!/bin/bash\nexec sleep 604\n")
        pids = wait_for("the script", lambda: slurm.user_pids("sleep 604"))
        (script,) = [found for pid in pids if (found := proc.read(pid))]
        os.kill(script.parent, signal.SIGKILL)
        wait_for("the end of the job", lambda: slurm.job_state(job) == "COMPLETED")
        assert proc.lives(script.pid, script.started)
    assert not proc.lives(script.pid, script.started)


def test_two_side_by_side_do_not_disturb_each_other(tmp_path: Path) -> None:
    with FakeSlurm(tmp_path / "a", nodes=2) as one, FakeSlurm(tmp_path / "b", nodes=3) as two:
        jobs = [s.sbatch("#!/bin/bash\nexec sleep 600\n", "--nodes=2", *WHOLE[1:]) for s in (one, two)]
        steps = [Step(s, j).up() for s, j in zip((one, two), jobs, strict=True)]
        one.unreachable()
        two.run(["squeue"])
        assert {*one.user_pids()}.isdisjoint(two.user_pids())
        assert len(two.run(["sinfo", "-N", "-h"]).stdout.splitlines()) == 3
        one.stop()
        assert steps[1].tasks
        steps[1].srun.terminate()
        assert steps[1].ends()[0] == 137
        steps[0].ends()


def test_another_process_sets_faults_and_a_shell_finds_the_commands(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from slurm_rollout.testing.fake_slurm import FakeSlurm;"
    code += "FakeSlurm(Path(sys.argv[1])).cut_node('n2', after_s=0)"
    shell = f'{sys.executable} -c "$1" "$2" && until sinfo -h -o "%t %D %N"  | grep "down. 1 n2"; do sleep 0.1; done'
    argv = [sys.executable, "-m", "slurm_rollout.testing.fake_slurm", str(tmp_path), "--nodes=2"]
    done = subprocess.run(
        [*argv, "--", "sh", "-c", shell, "sh", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "down* 1 n2\n", "")


def test_it_can_be_stopped_twice_and_started_again(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path)
    slurm.stop()
    for _ in range(2):
        with slurm:
            slurm.run(["sinfo"])
        slurm.stop()
    assert "its controller has ended" in slurm.run(["squeue"], check=False).stderr


def test_a_command_that_fails_is_an_error_with_its_words(fake_slurm: FakeSlurm) -> None:
    with pytest.raises(FakeSlurmError, match="Invalid job id"):
        fake_slurm.run(["squeue", "-j", "1"])
    failed = fake_slurm.sbatch("#!/bin/bash\necho last words\nexit 4\n")
    with pytest.raises(FakeSlurmError, match=r"has ended: FAILED \(NonZeroExitCode\)[^$]*last words"):
        fake_slurm.wait_job(failed, "COMPLETED")
