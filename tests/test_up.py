"""`slurm-rollout up`: what it refuses, what the trainer beside the fleet gets, and how both end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import cli, proc, supervisor
from slurm_rollout.testing.fleet import LocalFleet, SlurmFleet, stub_spec, wait_for
from slurm_rollout.testing.slurm_cluster import SlurmCluster
from tests.conftest import FAILED

BASES = iter(range(12000, 15920, 80))

# ---------------------------------------------------------------------------------------------------------- refused

SPEC = """\
name = "run"
[[pool]]
name = "actor"
groups = 2
gpus = 8
engine = { kind = "command", argv = ["serve", "{http_port}"] }
"""
JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_CPUS_PER_NODE": "16(x2)",
    "SLURM_GPUS_ON_NODE": "8",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a spec in it, in no job, where nothing may be started."""
    for name in [n for n in os.environ if n.startswith(("SLURM_", "ROLLOUT_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "node").mkdir()
    monkeypatch.setenv("ROLLOUT_TMPDIR", str(tmp_path / "node"))

    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("`up` started something")

    monkeypatch.setattr(supervisor.Supervisor, "run", started)
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "fleet.toml").write_text(SPEC)
    monkeypatch.chdir(folder)
    # From a certain point on `up` holds signals back: in a test it is no process of its own.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield folder
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Said:
    """What `up` said and did when it refused."""

    def __init__(self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self._capsys = capsys
        self._caplog = caplog

    def up(self, *argv: str) -> tuple[int, str]:
        """Run it; return its exit code and all that it said. Nothing may have been made."""
        before = sorted(Path.cwd().rglob("*"))
        with self._caplog.at_level(logging.INFO):
            code = cli.main(["up", *argv])
        captured = self._capsys.readouterr()
        text = captured.out + captured.err + self._caplog.text
        assert "Traceback" not in text
        assert sorted(Path.cwd().rglob("*")) == before, "nothing was made"
        return code, text


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Said:
    return Said(capsys, caplog)


WRONG = {
    "an unknown key": (("groups = 2", "grups = 2"), ["pool[0].grups (pool actor)", "did you mean groups?"]),
    "a missing key": (("groups = 2\n", ""), ["pool[0].groups", "is missing"]),
    "a wrong type": (("groups = 2", 'groups = "2"'), ['pool[0].groups (pool actor) = "2"', "valid integer"]),
    "a value out of range": (("groups = 2", "groups = 0"), ["groups", "= 0", "greater than or equal to 1"]),
    "an unknown placeholder": (("{http_port}", "{htp_port}"), ["{htp_port} is no placeholder", "{http_port}"]),
    "no layout": (("gpus = 8\n", ""), ["pool[0] (pool actor)", "say what one group takes"]),
    "no TOML": (("[[pool]]", "[[pool"), ["fleet.toml is not TOML", "line 2"]),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_a_wrong_spec_is_named_with_its_place_and_what_would_be_right(
    place: Path, said: Said, case: str, backend: str
) -> None:
    (old, new), words = WRONG[case]
    assert old in SPEC
    (place / "fleet.toml").write_text(SPEC.replace(old, new))
    code, text = said.up("fleet.toml", f"--backend={backend}")
    assert code == 2
    for word in ["fleet.toml", *words]:
        assert word in text


def test_a_spec_that_cannot_be_read_is_named(place: Path, said: Said) -> None:
    (place / "folder.toml").mkdir()
    (place / "bytes.toml").write_bytes(b"name = '\xff'")
    (place / "fleet.txt").write_text(SPEC)
    for name, why in [
        ("nowhere.toml", "No such file"),
        ("folder.toml", "Is a directory"),
        ("bytes.toml", "is not UTF-8 text"),
        ("fleet.txt", "ends in .toml, .json or .yaml"),
    ]:
        code, text = said.up(name, "--backend=local")
        assert code == 2, name
        assert name in text
        assert why in text


def test_wrong_usage(place: Path, said: Said) -> None:
    for argv, why in [
        ([], "SPEC"),
        (["fleet.toml", "--backend=pbs"], "pbs"),
        (["fleet.toml", "--gpus-per-node=many"], "many"),
        (["fleet.toml", "--trainer", "x"], "--trainer"),
        (["fleet.toml", "--backend=local", "--"], "no trainer after `--`"),
    ]:
        code, text = said.up(*argv)
        assert code == 2, argv
        assert why in text


def test_no_allocation(place: Path, said: Said) -> None:
    code, text = said.up("fleet.toml")
    assert code == 2
    for word in ("no SLURM_JOB_ID", "sbatch script", "--backend local"):
        assert word in text


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_CPUS_PER_NODE": "16"}, ["2 nodes", "1"]),
        ({"SLURM_GPUS_ON_NODE": "0"}, ["gpus"]),
        ({"SLURM_JOB_CPUS_PER_NODE": "many"}, ["SLURM_JOB_CPUS_PER_NODE='many'"]),
        ({"SLURM_JOB_NODELIST": "n["}, ["SLURM_JOB_NODELIST"]),
    ],
)
def test_an_allocation_that_cannot_hold_the_fleet(
    place: Path, said: Said, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], words: list[str]
) -> None:
    for name, value in {**JOB, **environ}.items():
        monkeypatch.setenv(name, value)
    code, text = said.up("fleet.toml")
    assert code == 2
    for word in words:
        assert word in text


def test_a_trainer_that_is_not_there_is_found_missing_before_anything_is_loaded(place: Path, said: Said) -> None:
    (place / "train.py").write_text("")
    for trainer, code in (("no-such-trainer", 127), ("./no/train.py", 127), ("./train.py", 126)):
        found, text = said.up("fleet.toml", "--backend=local", "--", trainer, "--epochs", "3")
        assert found == code
        assert trainer in text
        assert "Nothing was started" in text


def test_a_run_directory_that_cannot_be_one(place: Path, said: Said) -> None:
    (place / "file").write_text("")
    for path in ("file", "file/run"):
        code, text = said.up("fleet.toml", "--backend=local", f"--run-dir={path}")
        assert code == 1
        assert str(place / "file") in text
        assert "must be writable; nothing was started" in text


def test_a_run_directory_of_a_job_elsewhere_that_slurm_is_silent_about(
    place: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**JOB, "PATH": str(place)}.items():
        monkeypatch.setenv(name, value)
    (place / "old").mkdir()
    lease = {"host": "elsewhere", "pid": 1, "job": "11", "restart_count": 0, "ended": False, "at": 1.0}
    for content, why in [
        (json.dumps(lease), "used by job 11 on elsewhere"),
        ("{", "does not say who uses this run directory"),
    ]:
        (place / "old" / "lease").write_text(content)
        code, text = said.up("fleet.toml", "--run-dir=old")
        assert code == 1
        assert why in text
        assert "Nothing was started" in text
    # The refusal left no claim behind.
    assert not list((Path(os.environ["ROLLOUT_TMPDIR"])).rglob("locks/*.json"))


@pytest.mark.skipif(os.getuid() != 0, reason="NOT TESTED as an ordinary user: only root can become one")
def test_what_an_ordinary_user_may_not_touch(place: Path) -> None:
    """In a child of its own that gives root away; the modules are imported before."""
    from slurm_rollout import allocation, spec, store  # noqa: F401

    for folder in (place, *place.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    (place / "secret.toml").write_text(SPEC)
    (place / "secret.toml").chmod(0o600)
    shutil.rmtree(os.environ["ROLLOUT_TMPDIR"])
    Path(os.environ["ROLLOUT_TMPDIR"]).mkdir()
    Path(os.environ["ROLLOUT_TMPDIR"]).chmod(0o1777)
    for argv, code, why in [
        (["secret.toml", "--backend=local"], 2, "secret.toml cannot be read: Permission denied"),
        (["fleet.toml", "--backend=local"], 1, "rollout-runs: Permission denied. The run directory must be writable"),
        (["fleet.toml", "--backend=local", f"--run-dir={place}"], 1, "Permission denied. The run directory must be"),
    ]:
        out = os.memfd_create("out")
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(out, 1)
                os.dup2(out, 2)
                sys.stdout = sys.stderr = os.fdopen(out, "w")
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                found = cli.main(["up", *argv])
                sys.stderr.flush()
                os._exit(found)
            finally:
                os._exit(99)
        _, status = os.waitpid(pid, 0)
        text = os.pread(out, 100_000, 0).decode()
        os.close(out)
        assert os.waitstatus_to_exitcode(status) == code, text
        assert why in text
    assert sorted(p.name for p in place.iterdir()) == ["fleet.toml", "secret.toml"]


@pytest.mark.parametrize(("line", "step"), [("", ""), ("", "-5"), ("exec ", ""), ("exec ", "-5")])
def test_up_warns_where_signals_will_not_reach_it(tmp_path: Path, line: str, step: str) -> None:
    """Slurm (22.05) starts a job's script as `/bin/bash …/slurm_script`, and signals that process alone.

    From 26.05 on the script has a step number, which is none.
    """
    (tmp_path / "fleet.toml").write_text(SPEC)
    (tmp_path / "file").write_text("")
    script = tmp_path / "slurm_script"
    command = f"{line}{sys.executable} -m slurm_rollout up fleet.toml --backend=local --run-dir=file"
    script.write_text(f"#!/bin/bash\n{command}\n{'' if line else 'exit $?'}\n")
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"SLURM_JOB_ID": "12"}
    environ |= {"SLURM_STEP_ID": step} if step else {}
    done = subprocess.run(
        ["/bin/bash", str(script)], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 1
    assert ("write `exec slurm-rollout up" in done.stderr) == (not line)


# --------------------------------------------------------------------------------------------------------- a real fleet


@pytest.fixture
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path) as made:
        yield made
        if request.node.stash.get(FAILED, False):
            print(made.story())
        if made.has_ended():  # then no coordinator may live, and one that does would start engines again
            for pid in coordinators(made):
                os.kill(pid, signal.SIGKILL)


def small(fleet: LocalFleet, base: int = 0, **more: Any) -> str:
    """A fleet of one server that is there at once."""
    how = {"layout": "nodes = 1", "load_s": 0.05, "base": base or next(BASES), "control": fleet.control}
    return stub_spec(**{**how, **more})


def coordinators(fleet: LocalFleet) -> list[int]:
    found = []
    for process in proc.own():
        with contextlib.suppress(OSError):
            if f"--run-dir={fleet.run.path}\0" in Path(f"/proc/{process.pid}/cmdline").read_text(errors="replace"):
                found.append(process.pid)
    return found


def nothing_is_left(fleet: LocalFleet) -> None:
    wait_for("no process of the fleet", lambda: not fleet.processes(), 5)
    assert not coordinators(fleet)


TRAINER = """\
import json, os, sys
from slurm_rollout.barrier import Barrier, FleetFailed
first = json.load(open(os.environ["ROLLOUT_BARRIER"]))
mask = os.umask(0o022)
state = Barrier().wait_ready(timeout=20, poll_s=0.1)
environ = {k: v for k, v in os.environ.items() if k.startswith(("ROLLOUT_", "SLURM_"))}
word = {"first": first["phase"], "mask": mask, "argv": sys.argv[2:], "environ": environ, "urls": state.urls}
with open("word.tmp", "w") as f:
    json.dump(word, f)
os.rename("word.tmp", "word")
"""


def trainer(fleet: LocalFleet, rest: str) -> list[str]:
    path = fleet.folder / "train.py"
    path.write_text(f"import os\nos.chdir({str(fleet.folder)!r})\n{TRAINER}{rest}\n")
    return [sys.executable, str(path)]


def word(fleet: LocalFleet) -> dict[str, Any]:
    path = fleet.folder / "word"
    fleet.wait("the trainer's word", path.exists)
    found = json.loads(path.read_text())
    assert isinstance(found, dict)
    return found


def test_the_trainer_gets_a_ready_fleet_and_its_end_is_the_runs(fleet: LocalFleet) -> None:
    environ = {"SLURM_NTASKS": "9", "SLURM_JOB_NODELIST": "n[1-4]", "ROLLOUT_BARRIER": "/of/another/run"}
    before = os.umask(0o027)
    try:
        argv = [sys.executable, *trainer(fleet, "sys.exit(7)")[1:], "-", "--run-dir", "x", "--", "--help"]
        fleet.start(small(fleet), argv, environ)
    finally:
        os.umask(before)
    found = word(fleet)
    assert fleet.exit_code() == 7
    assert found["first"] == "ready"
    assert found["mask"] == 0o027, "not the run directory's"
    assert found["argv"] == ["--run-dir", "x", "--", "--help"]
    assert len(found["urls"]) == 1
    seen = found["environ"]
    assert seen["ROLLOUT_BARRIER"] == str(fleet.run.barrier)
    assert seen["ROLLOUT_RUN_DIR"] == str(fleet.run.path)
    assert (seen["ROLLOUT_TRAINER_NODELIST"], seen["ROLLOUT_TRAINER_NNODES"]) == ("local1", "1")
    assert {k: v for k, v in seen.items() if k.startswith("SLURM_")} == {
        k: v for k, v in {**os.environ, **environ}.items() if k.startswith("SLURM_")
    }
    assert fleet.barrier()["phase"] == "stopped"
    assert [e["type"] for e in fleet.events()][-1] == "ended"
    assert json.loads(fleet.run.lease.read_text())["ended"] is True
    assert stat.S_IMODE(fleet.run.path.stat().st_mode) == 0o711
    nothing_is_left(fleet)


def test_a_trainer_that_waits_for_a_dead_fleet_is_told(fleet: LocalFleet) -> None:
    waits = """
try:
    Barrier().wait_ready(after_epoch=state.epoch, poll_s=0.1)
except FleetFailed as e:
    open("failed", "w").write(e.reason)
"""
    fleet.start(small(fleet, pool="restart.max_restarts = 0"), trainer(fleet, waits))
    word(fleet)
    fleet.kill("actor/0", 0)
    assert fleet.exit_code() == 70, "the trainer itself ended with 0"
    assert (fleet.folder / "failed").read_text() == "budget_spent"
    assert fleet.barrier()["phase"] == "failed", "what was said stays said"
    nothing_is_left(fleet)


def test_a_server_that_is_no_program_fails_its_group_and_the_run(fleet: LocalFleet) -> None:
    spec = small(
        fleet, pool="restart.max_start_failures = 1\nrestart.backoff_initial_s = 0.1", python="/no/such/server"
    )
    fleet.start(spec, [sys.executable, "-c", "open('/nowhere/trains')"])
    assert fleet.exit_code() == 70
    failures = fleet.events("failure", "actor/0")
    assert len(failures) == 2
    assert {f["reason"] for f in failures} == {"launch_failed"}
    assert all("/no/such/server" in f["message"] for f in failures)
    assert "/no/such/server" in fleet.events("failed")[0]["message"]
    assert "Traceback" not in fleet.output()
    assert "trainer started" not in fleet.output()
    nothing_is_left(fleet)


def test_ports_and_a_run_directory_have_one_coordinator(fleet: LocalFleet, tmp_path: Path) -> None:
    base = next(BASES)
    fleet.start(small(fleet, base))
    fleet.wait_phase("ready")
    (tmp_path / "second").mkdir()
    with LocalFleet(tmp_path / "second") as second, LocalFleet(tmp_path) as same_place:
        assert second.start(small(second, base + 1, name="second")).exit_code() == 1
        for said in (f"127.0.0.1:{base + 1}", str(fleet.run.path), "Nothing was started", "[ports] base"):
            assert said in second.output()
        assert not second.run.path.exists()
        assert same_place.start(small(same_place, name="third")).exit_code() == 1
        assert f"{fleet.run.path} is in use by the coordinator of run 'test'" in same_place.output()
        assert not fleet.events("failure")
        assert fleet.group("actor/0")["serving"]
        assert fleet.barrier()["term"] == 1
        assert fleet.terminate() == 0
        second.start(small(second, base + 1, name="second")).wait_phase("ready")
        assert second.terminate() == 0


def test_term_reaches_the_trainer_and_the_fleet(fleet: LocalFleet) -> None:
    waits = (
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\nopen('waits', 'w')\ntime.sleep(99)"
    )
    fleet.start(small(fleet, more="trainer.grace_s = 60"), trainer(fleet, waits))
    fleet.wait("the trainer", (fleet.folder / "waits").exists)
    began = time.monotonic()
    assert fleet.terminate() == 3
    assert time.monotonic() - began < 15
    assert fleet.barrier()["phase"] == "stopped"
    nothing_is_left(fleet)


def test_term_in_the_first_moment_is_heeded(fleet: LocalFleet) -> None:
    fleet.start(small(fleet))
    fleet.coordinator()  # it has just been started, and cannot take a signal yet
    began = time.monotonic()
    assert fleet.terminate() == 0
    assert time.monotonic() - began < 15
    assert "died" not in fleet.output()
    nothing_is_left(fleet)


def test_term_with_the_death_of_the_coordinator_still_drains(fleet: LocalFleet) -> None:
    """As at the end of a job, where every process of the batch step gets TERM."""
    fleet.start(small(fleet))
    fleet.wait_phase("ready")
    os.kill(fleet.coordinator(), signal.SIGKILL)
    assert fleet.terminate() == 0
    assert fleet.barrier()["phase"] == "stopped"
    assert fleet.barrier()["term"] == 2
    nothing_is_left(fleet)


def test_without_its_supervisor_a_coordinator_drains_and_the_next_up_goes_on(fleet: LocalFleet) -> None:
    spec = small(fleet, groups=2)
    fleet.start(spec)
    fleet.wait_phase("ready")
    coordinator, epoch = fleet.coordinator(), fleet.barrier()["epoch"]
    fleet.process.kill()
    assert fleet.exit_code() == -signal.SIGKILL
    wait_for("the coordinator's end", lambda: (p := proc.read(coordinator)) is None or p.state == "Z")
    assert fleet.barrier()["phase"] == "stopped"
    nothing_is_left(fleet)
    fleet.start(spec)
    fleet.wait_serving("actor/1", 2)
    fleet.wait_serving("actor/0", 2)
    after = fleet.barrier()
    assert after["term"] == 2
    assert after["epoch"] > epoch
    assert len({e["term"] for e in fleet.events("launching")}) == 2
    assert fleet.terminate() == 0


def test_a_program_is_told_of_events(fleet: LocalFleet) -> None:
    """Also of the last ones: the run does not end before they are told."""
    told = fleet.folder / "told"
    hook = {"argv": ["sh", "-c", 'exec cat >> "$1"', "hook", str(told)], "types": ["failure", "failed", "ended"]}
    more = "[on_event]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in hook.items())
    fleet.start(stub_spec(base=next(BASES), groups=1, layout="nodes = 1", more=more))
    fleet.wait_phase("ready")
    fleet.kill("actor/0", 0)
    fleet.wait_serving("actor/0", 2)
    assert fleet.terminate() == 0
    events = [json.loads(line) for line in told.read_text().splitlines()]
    assert [e["type"] for e in events] == ["failure", "ended"]
    assert (events[0]["group"], events[0]["reason"], events[0]["rank"]) == ("actor/0", "engine_exited", 0)
    assert (events[0]["run"], events[0]["run_dir"]) == ("test", str(fleet.run.path))


def test_a_state_that_cannot_be_read_for_a_moment_costs_no_engine(fleet: LocalFleet) -> None:
    fleet.start(small(fleet))
    fleet.wait_phase("ready")
    engine = fleet.engine("actor/0", 0)
    fleet.process.send_signal(signal.SIGSTOP)
    os.kill(fleet.coordinator(), signal.SIGKILL)
    fleet.run.state.rename(fleet.run.path / "away")
    fleet.run.state.mkdir()
    fleet.process.send_signal(signal.SIGCONT)
    fleet.wait("a coordinator that cannot start", lambda: "state.json cannot be read" in fleet.output())
    fleet.run.state.rmdir()
    (fleet.run.path / "away").rename(fleet.run.state)
    fleet.wait_event("takeover")
    fleet.wait_serving("actor/0", 1)
    assert fleet.engine("actor/0", 0) == engine
    assert fleet.terminate() == 0


def test_garbage_among_the_requests_is_refused_and_removed(fleet: LocalFleet) -> None:
    fleet.start(small(fleet))
    fleet.wait_phase("ready")
    (fleet.run.requests / "folder.json").mkdir()

    def about(request: str) -> list[dict[str, Any]]:
        return [e for e in fleet.events() if e.get("data", {}).get("id") == request]

    for name, content in {"a": b"\xff\xfe", "b": b"{", "c": b'{"id": "c", "verb": "explode"}', "d": b""}.items():
        (fleet.run.requests / f"{name}.json").write_bytes(content)
        answers = fleet.wait(f"the answer to {name}", partial(about, name))
        assert answers[0]["type"] == "request_refused"
    wait_for("their removal", lambda: [p.name for p in fleet.run.requests.iterdir()] == ["folder.json"], 5)
    assert fleet.barrier()["term"] == 1, "no coordinator stumbled"
    assert fleet.group("actor/0")["serving"]
    assert fleet.terminate() == 0


def test_the_exit_code_outlives_the_run_directory(fleet: LocalFleet) -> None:
    """The trainer deletes what it thinks it does not need any more."""
    rest = "import shutil; shutil.rmtree(os.environ['ROLLOUT_RUN_DIR'], ignore_errors=True); sys.exit(7)"
    fleet.start(small(fleet), trainer(fleet, rest))
    assert fleet.exit_code(40) == 7
    assert "Traceback" not in fleet.output()
    nothing_is_left(fleet)


# ---------------------------------------------------------------------------------------------------------- real Slurm

HET = """\
#SBATCH --nodes=1 --exclusive --gres=gpu:8 --output=up.log
#SBATCH hetjob
#SBATCH --nodes=2 --exclusive --gres=gpu:8
srun --overlap --nodes=1 --ntasks=1 --job-name=trainer sleep 300 &
while ! scontrol -o show step $SLURM_JOB_ID | grep -q Name=trainer; do sleep 0.05; done
"""
ARRAY = "#SBATCH --nodes=2 --exclusive --gres=gpu:8 --output=up.log --array=5\n"


@pytest.mark.slurm
@pytest.mark.parametrize("kind", ["het", "array"])
def test_jobs_whose_steps_have_ids_of_their_own_kind(cluster: SlurmCluster, kind: str) -> None:
    """Killed agents say nothing: only a listing that is understood lets the group come back."""
    fleet = SlurmFleet(cluster)
    with fleet:
        spec = stub_spec(
            python=cluster.python, control=fleet.control, more="nodes.het_group = 1" if kind == "het" else ""
        )
        path = fleet.folder / "fleet.toml"
        path.write_text(spec)
        path.chmod(0o644)
        head = HET if kind == "het" else ARRAY
        fleet.job = cluster.sbatch(f"#!/bin/bash\n{head}exec slurm-rollout up fleet.toml --run-dir run\n")
        fleet.wait_phase("ready", 40)
        for agent in fleet.agents("actor/0"):
            os.kill(agent, signal.SIGKILL)
        fleet.wait_serving("actor/0", 2)
        assert fleet.events("failure")[0]["reason"] == "step_ended"
        if kind == "het":
            assert "Name=trainer" in cluster.run(["scontrol", "-o", "show", "step", fleet.job]).stdout
