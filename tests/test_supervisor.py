"""The supervisor alone, with a coordinator of a few lines in the place of the real one."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import proc
from slurm_rollout.coordinator import read_exits
from slurm_rollout.rundir import RunDir
from slurm_rollout.testing.fleet import wait_for

TAG = "SUPERVISOR_TEST"

DRIVER = """\
import json, logging, sys, time
from dataclasses import replace
from slurm_rollout import supervisor
from slurm_rollout.rundir import RunDir
from slurm_rollout.testing.world import make_plan
fake, folder, first_term, changes = sys.argv[1:5]
logging.basicConfig(level=logging.INFO, format="%(message)s")
changes = json.loads(changes)
bound_s = changes.pop("drain_bound_s", 20.0)
crashes = changes.pop("crashes", 0)
plan = make_plan(1)
plan = replace(plan, trainer=replace(plan.trainer, **changes.pop("ends_by", {})))
plan = replace(plan, slurm=replace(plan.slurm, requeue=changes.pop("requeue", "no")))
supervisor.drain_bound_s = lambda plan: bound_s
for name, value in changes.items():
    assert hasattr(supervisor, name), name
    setattr(supervisor, name, value)
sys.executable = fake
term = supervisor.Term(job="7", restart_count=2, first_term=int(first_term))
made = supervisor.Supervisor(plan, RunDir(folder), term, sys.argv[5:])
made._crashes = [time.monotonic()] * crashes
code = made.run()
if made.requeue_now:
    open(folder + "/requeued", "w")
sys.exit(code)
"""

COORDINATOR = """\
#!{python} -IS
import json, os, signal, subprocess, sys, time
options = dict(a[2:].split("=", 1) for a in sys.argv[1:] if "=" in a)
folder, term = options["run-dir"], int(options["term"])
told = []

def note(*words):
    with open(folder + "/notes", "a") as f:
        f.write(json.dumps([term, time.monotonic(), *words]) + "\\n")

def barrier(phase, of_term=term, reason=""):
    with open(folder + "/.b", "w") as f:
        json.dump({{"phase": phase, "term": of_term, "reason": reason}}, f)
    os.replace(folder + "/.b", folder + "/barrier.json")

def listen():
    signal.signal(signal.SIGTERM, lambda *_: told.append(note("TERM")))
    signal.signal(signal.SIGUSR1, lambda *_: told.append(note("USR1")))
    os.mkdir(folder + "/.t%d" % term)

def obey(code=0, drain_s=0.0):
    while not told and "--drain" not in sys.argv:
        time.sleep(0.01)
    time.sleep(drain_s)
    barrier("stopped")
    sys.exit(code)

def wait_file(name):
    while not os.path.exists(folder + "/" + name):
        time.sleep(0.01)

def holder(code):
    "As an srun: a session of its own, which outlives the coordinator."
    process = subprocess.Popen([{python!r}, "-IS", "-c", code], start_new_session=True)
    note("holder", process.pid)
    return process

note("start", os.getpid() == os.getsid(0), *sys.argv[1:])
"""

READY = "listen(); barrier('ready'); obey()"
SLEEPS = "import time; time.sleep(600)"


class Up:
    """A supervisor under test."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDir(folder / "run")
        self.run.path.mkdir()
        self.tag = str(folder)
        self.log = folder / "log"
        self.fake = folder / "coordinator"

    def start(
        self,
        coordinator: str = READY,
        trainer: Sequence[str] = (),
        *,
        first_term: int = 1,
        ignored: Sequence[signal.Signals] = (),
        umask: int = -1,
        **changes: Any,
    ) -> Up:
        self.fake.write_text(COORDINATOR.format(python=sys.executable) + coordinator + "\n")
        self.fake.chmod(0o755)
        before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
        try:
            with open(self.log, "wb") as out:
                self.process = subprocess.Popen(
                    [
                        *(sys.executable, "-c", DRIVER),
                        *(str(self.fake), str(self.run.path), str(first_term), json.dumps(changes)),
                        *trainer,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env={**os.environ, TAG: self.tag, "SLURM_NTASKS": "7", "SLURM_JOB_NODELIST": "n[1-2]"},
                    start_new_session=True,
                    umask=umask,
                )
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self

    def python_trainer(self, code: str) -> list[str]:
        return [sys.executable, "-IS", "-c", code, str(self.run.path)]

    def notes(self, word: str, term: int = 0) -> list[list[Any]]:
        """Return [term, time, *words] of every note that begins with `word`."""
        try:
            lines = (self.run.path / "notes").read_text().splitlines()
        except OSError:
            return []
        found = [json.loads(line) for line in lines]
        return [n for n in found if n[2] == word and (not term or n[0] == term)]

    def wait_note(self, word: str, term: int = 0) -> list[Any]:
        found: list[list[Any]] = wait_for(
            f"note {word} of term {term}: {self.output()}", lambda: self.notes(word, term), 10
        )
        return found[0]

    def wait_file(self, name: str) -> str:
        path = self.run.path / name
        wait_for(f"{name}: {self.output()}", path.exists, 10)
        return path.read_text()

    def touch(self, name: str) -> None:
        (self.run.path / name).touch()

    def term(self) -> int:
        self.process.terminate()
        return self.code()

    def code(self, timeout_s: float = 30.0) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end: {self.output()}") from None

    def output(self) -> str:
        return self.log.read_text()

    def left(self) -> list[int]:
        return [p.pid for p in proc.own() if proc.environ(p.pid).get(TAG) == self.tag]

    def close(self) -> None:
        if hasattr(self, "process"):
            self.process.kill()
            self.process.wait()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    made = Up(tmp_path)
    try:
        yield made
    finally:
        made.close()


# ------------------------------------------------------------------------------------------------------ the coordinator


def test_a_coordinator_is_started_with_its_term_in_a_session_of_its_own(up: Up) -> None:
    up.start("if term == 4: os._exit(1)\n" + READY, first_term=4)
    up.wait_note("start", 5)
    assert up.term() == 0
    before = [True, "-P", "-m", "slurm_rollout.coordinator", f"--run-dir={up.run.path}"]
    after = ["--first-term=4", "--job=7", "--restart-count=2"]
    assert [n[3:] for n in up.notes("start")] == [[*before, "--term=4", *after], [*before, "--term=5", *after]]


def test_one_that_crashes_again_and_again_is_started_ever_later_and_the_engines_go_on(up: Up) -> None:
    up.start(f"""
if term == 1:
    holder({SLEEPS!r})
if term < 5:
    os.kill(os.getpid(), signal.SIGKILL) if term % 2 else os._exit(1)
{READY}
""")
    pid = up.wait_note("holder")[3]
    up.wait_note("start", 4)
    at = [n[1] for n in up.notes("start")]
    gaps = [b - a for a, b in pairwise(at)]
    assert gaps[1] >= 0.5
    assert gaps[2] >= 1.0
    holder = proc.read(pid)
    assert holder is not None
    assert holder.state not in "ZX"
    assert holder.parent == up.process.pid, "its new parent"
    for words in ("signal 9", "exit code 1", "the engines go on", "starts in 0.0 s", "starts in 1.0 s"):
        assert words in up.output()


@pytest.mark.parametrize(("status", "said"), [(3, "gave up the drain"), (4, "took over"), (5, "could not start")])
def test_a_last_word_of_the_coordinator_ends_the_run(up: Up, status: int, said: str) -> None:
    up.start(f"os._exit({status})")
    assert up.code() == 1
    assert said in up.output()
    assert len(up.notes("start")) == 1


def test_a_drained_fleet_ends_the_run(up: Up) -> None:
    up.start("listen(); barrier('stopped')")
    assert up.code() == 0
    assert len(up.notes("start")) == 1


def test_a_later_coordinator_that_cannot_start_is_tried_again_for_the_engines_sake(up: Up) -> None:
    """A file system that is away for a moment, when the first coordinator has long started everything."""
    up.start(f"""
if term == 1:
    holder({SLEEPS!r})
    os._exit(1)
if term < 4:
    os._exit(5)
{READY}
""")
    pid = up.wait_note("holder")[3]
    up.wait_note("start", 4)
    found = proc.read(pid)
    assert found is not None
    assert found.state not in "ZX"


def test_what_a_dead_coordinators_children_ended_with_is_kept_for_the_next(up: Up) -> None:
    wait = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
    end = {"seven": "sys.exit(7)", "nine": "os.kill(os.getpid(), 9)", "nought": "pass"}
    codes = [wait.replace("sys.argv[1]", repr(f"{up.run.path}/go")) + word for word in end.values()]
    up.start(f"""
if term == 1:
    for code in {codes!r}:
        holder(code)
    wait_file("known")
    os._exit(1)
{READY}
""")
    wait_for("three holders", lambda: len(up.notes("holder")) == 3)
    pids = [n[3] for n in up.notes("holder")]
    started = {pid: found.started for pid in pids if (found := proc.read(pid)) is not None}
    up.touch("known")
    up.wait_note("start", 2)
    up.touch("go")
    exits = wait_for("three exits", lambda: len(e := read_exits(up.run.exits)) == 3 and e)
    assert exits == {(pids[0], started[pids[0]]): 7, (pids[1], started[pids[1]]): -9, (pids[2], started[pids[2]]): 0}
    assert stat.S_IMODE(up.run.exits.stat().st_mode) == 0o600
    assert all(proc.read(pid) is None for pid in pids), "no zombie"
    assert up.term() == 0


def test_an_exit_that_cannot_be_written_down_is_only_a_lost_hint(up: Up) -> None:
    up.run.exits.mkdir()
    up.start("if term == 1:\n    holder('pass')\n    os._exit(1)\n" + READY)
    pid = up.wait_note("holder")[3]
    wait_for("the holder's end", lambda: proc.read(pid) is None)
    assert up.term() == 0


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_the_fleet_once(up: Up, number: signal.Signals) -> None:
    up.start("listen(); barrier('ready'); note('listens'); obey(drain_s=0.4)")
    up.wait_note("listens")
    up.process.send_signal(number)
    up.wait_note("TERM")
    for again in (signal.SIGTERM, signal.SIGINT, number):
        up.process.send_signal(again)
    assert up.code() == 0
    assert len(up.notes("TERM")) == 1
    assert len(up.notes("start")) == 1
    assert f"{number.name}: draining the fleet" in up.output()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_of_the_jobs_end_drains_the_fleet_and_tells_the_coordinator_why(
    up: Up, number: signal.Signals
) -> None:
    up.start("listen(); barrier('ready'); note('listens'); obey()")
    up.wait_note("listens")
    up.process.send_signal(number)
    assert up.code() == 0
    assert up.notes("USR1")
    assert not up.notes("TERM")
    assert f"{number.name}: draining the fleet" in up.output()


def test_a_coordinator_that_starts_after_a_warning_knows_of_it(up: Up) -> None:
    up.start("listen(); barrier('ready')\nif term == 1:\n    while not told: time.sleep(0.01)\n    os._exit(1)\nobey()")
    wait_for("its ears", lambda: up.run.staging(1).exists())
    up.process.send_signal(signal.SIGUSR1)
    assert up.code() == 0
    assert up.notes("start")[1][-2:] == ["--drain", "--end-is-near"]


ENDS_ON = """
import signal, sys, time
def end(number, _):
    open(sys.argv[1] + "/saved", "w").write(signal.Signals(number).name)
    sys.exit({code})
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, end)
open(sys.argv[1] + "/trains", "w")
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("number", "requeue", "code"),
    [
        (signal.SIGTERM, "no", 3),
        (signal.SIGTERM, "exit", 3),
        (signal.SIGTERM, "exit", 0),
        (signal.SIGTERM, "scontrol", 3),
        (signal.SIGINT, "scontrol", 3),
        (signal.SIGUSR1, "no", 0),
        (signal.SIGUSR1, "exit", 3),
        (signal.SIGUSR1, "scontrol", 0),
        (signal.SIGUSR2, "scontrol", 3),
    ],
)
def test_75_says_that_the_jobs_end_ended_it_and_only_a_warned_job_requeues_itself(
    up: Up, number: signal.Signals, requeue: str, code: int
) -> None:
    up.start(READY, up.python_trainer(ENDS_ON.format(code=code)), requeue=requeue, ends_by={"signal": "USR2"})
    up.wait_file("trains")
    up.process.send_signal(number)
    again = requeue != "no" and number != signal.SIGINT
    assert up.code() == (75 if again else code)
    assert (up.run.path / "saved").read_text() == ("SIGTERM" if number == signal.SIGTERM else "SIGUSR2")
    warned = number in (signal.SIGUSR1, signal.SIGUSR2)
    assert (up.run.path / "requeued").exists() == (requeue == "scontrol" and warned)


def test_a_job_that_is_cancelled_after_its_warning_does_not_requeue_itself(up: Up) -> None:
    up.start("listen(); barrier('ready'); note('listens'); wait_file('go'); obey()", requeue="scontrol")
    up.wait_note("listens")
    up.process.send_signal(signal.SIGUSR1)
    up.wait_note("USR1")
    up.process.terminate()
    up.touch("go")
    assert up.code() == 75
    assert not (up.run.path / "requeued").exists()


@pytest.mark.parametrize("code", [0, 3])
def test_a_trainer_that_ended_before_the_jobs_end_is_not_started_again(up: Up, code: int) -> None:
    trainer = up.python_trainer(f"raise SystemExit({code})")
    up.start("listen(); barrier('ready'); wait_file('go'); obey()", trainer, requeue="exit")
    up.wait_note("TERM")
    up.process.terminate()
    up.touch("go")
    assert up.code() == code


@pytest.mark.parametrize("status", [3, 4])
def test_an_end_that_was_not_orderly_is_no_reason_to_requeue(up: Up, status: int) -> None:
    up.start(f"listen(); barrier('ready'); note('listens'); obey({status})", requeue="exit")
    up.wait_note("listens")
    assert up.term() == 1


@pytest.mark.parametrize(("code", "wanted"), [(0, 0), (3, 75)])
def test_a_trainer_that_ends_for_want_of_time_wants_another_job(up: Up, code: int, wanted: int) -> None:
    trainer = "import os, sys, time\nwhile not os.path.exists(sys.argv[1] + '/late'): time.sleep(0.01)\n"
    up.start(
        "listen(); barrier('ready'); note('ready'); wait_file('trains')\n"
        "barrier('stopped', reason='time_left'); open(folder + '/late', 'w'); obey()",
        up.python_trainer(f"import sys; open(sys.argv[1] + '/trains', 'w')\n{trainer}sys.exit({code})"),
        requeue="scontrol",
    )
    assert up.code() == wanted
    assert (up.run.path / "requeued").exists() == (wanted == 75)


def test_a_fleet_without_the_time_to_start_ends_the_run_and_asks_for_no_other_life(up: Up) -> None:
    """Each life of the job would have as little time."""
    up.start("listen(); barrier('stopped', reason='time_left'); obey()", up.python_trainer("pass"), requeue="exit")
    assert up.code() == 70
    assert "too little time left" in up.output()


def test_what_nohup_and_a_shells_ampersand_ask_for_is_kept(up: Up) -> None:
    up.start("listen(); note('listens'); obey()", ignored=[signal.SIGHUP, signal.SIGINT])
    up.wait_note("listens")
    for number in (signal.SIGHUP, signal.SIGINT):
        up.process.send_signal(number)
    up.process.terminate()
    assert up.code() == 0
    assert "HUP" not in up.output()
    assert "INT" not in up.output()


def test_a_coordinator_that_is_just_starting_is_told_when_it_can_hear(up: Up) -> None:
    """Until its handlers are there, a TERM would be its death, and its successor's, and so on."""
    up.start("wait_file('go'); listen(); obey()")
    up.wait_note("start")
    up.process.terminate()
    wait_for("the signal's arrival", lambda: "draining" in up.output())
    up.touch("go")
    assert up.code() == 0
    assert len(up.notes("start")) == 1
    assert "died" not in up.output()


def test_an_end_in_the_same_moment_as_a_signal_is_not_missed(up: Up) -> None:
    up.start("listen(); note('listens'); wait_file('go'); sys.exit(0)")
    up.wait_note("listens")
    coordinator = next(pid for pid in up.left() if pid != up.process.pid)
    up.process.send_signal(signal.SIGSTOP)
    up.touch("go")
    wait_for("its end", lambda: (p := proc.read(coordinator)) is None or p.state == "Z")
    up.process.terminate()
    up.process.send_signal(signal.SIGCONT)
    began = time.monotonic()
    assert up.code() == 0
    assert time.monotonic() - began < 10


def test_a_signal_while_no_coordinator_lives_starts_one_that_drains(up: Up) -> None:
    up.start("if term == 1: os._exit(1)\nlisten(); obey()", crashes=7)
    wait_for("the wait for the next", lambda: "starts in 30.0 s" in up.output())
    began = time.monotonic()
    assert up.term() == 0
    assert time.monotonic() - began < 10
    assert up.notes("start")[-1][-1] == "--drain"
    assert not up.notes("TERM"), "it might come before it can be heard"


@pytest.mark.parametrize("status", [3, 4])
def test_a_drain_that_was_given_up_is_no_success(up: Up, status: int) -> None:
    up.start(f"listen(); note('listens'); obey({status})")
    up.wait_note("listens")
    assert up.term() == 1


def test_a_drain_that_takes_too_long_is_cut_short_and_is_no_success(up: Up) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    up.start(
        f"holder({deaf!r}); listen(); note('listens'); time.sleep(600); time.sleep(600)",
        drain_bound_s=1.0,
        LAST_MEASURES=[[None, 0.1], [15, 1.5], [9, 2.0]],
    )
    up.wait_note("listens")
    assert up.term() == 1
    assert len(up.notes("TERM")) == 2, "asked to drain, and to end"
    assert "took longer than" in up.output()
    assert f"pid {up.notes('holder')[0][3]}" in up.output()
    assert not up.left()


# ------------------------------------------------------------------------------------------------------------- trainer

ENV = """\
import json, os, sys
mask = os.umask(0)
json.dump([dict(os.environ), mask, os.getsid(0) == os.getpid(), sys.argv[2:]], open(sys.argv[1] + "/.e", "w"))
os.rename(sys.argv[1] + "/.e", sys.argv[1] + "/env")
"""


def test_the_trainer_starts_when_this_runs_barrier_lets_it(up: Up) -> None:
    up.start(
        "listen(); barrier('ready', 4); note('stale'); wait_file('a'); barrier('waiting'); note('waiting');"
        "wait_file('b'); barrier('ready'); obey()",
        up.python_trainer("open(__import__('sys').argv[1] + '/trained', 'w')"),
        first_term=5,
    )
    for word, gate in (("stale", "a"), ("waiting", "b")):
        said_at = up.wait_note(word)[1]
        while time.monotonic() < said_at + 0.6:  # the barrier is looked at five times a second
            time.sleep(0.02)
        assert not (up.run.path / "trained").exists(), word
        up.touch(gate)
    assert up.code() == 0
    assert (up.run.path / "trained").exists()


def test_the_trainer_finds_the_fleet_in_an_environment_that_is_its_own_otherwise(up: Up) -> None:
    up.start(READY.replace("ready", "needs_weights"), [*up.python_trainer(ENV), "--run-dir", "x", "--"], umask=0o026)
    assert up.code() == 0
    environ, mask, leads, argv = json.loads((up.run.path / "env").read_text())
    assert environ["ROLLOUT_BARRIER"] == str(up.run.barrier)
    assert environ["ROLLOUT_RUN_DIR"] == str(up.run.path)
    assert (environ["ROLLOUT_TRAINER_NODELIST"], environ["ROLLOUT_TRAINER_NNODES"]) == ("", "0")
    assert (environ["SLURM_NTASKS"], environ["SLURM_JOB_NODELIST"]) == ("7", "n[1-2]")
    assert mask == 0o026
    assert leads
    assert argv == ["--run-dir", "x", "--"]


@pytest.mark.parametrize(
    ("end", "code"),
    [("sys.exit(0)", 0), ("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137), ("os.kill(os.getpid(), 15)", 143)],
)
def test_the_trainers_end_is_the_runs(up: Up, end: str, code: int) -> None:
    up.start(READY, up.python_trainer(f"import os, sys; {end}"))
    assert up.code() == code
    assert len(up.notes("TERM")) == 1, "the fleet was drained"
    assert f"the trainer ended with {code}" in up.output()


@pytest.mark.parametrize("status", [3, 4])
def test_the_trainers_code_stays_the_runs_when_the_drain_after_it_fails(up: Up, status: int) -> None:
    up.start(f"listen(); barrier('ready'); obey({status})", up.python_trainer("raise SystemExit(7)"))
    assert up.code() == 7


def test_a_trainer_that_cannot_be_started_ends_the_run(up: Up) -> None:
    up.start(READY, ["/nowhere/train", "--x"])
    assert up.code() == 127
    assert "the trainer /nowhere/train could not be started: No such file" in up.output()
    assert len(up.notes("TERM")) == 1


def test_a_trainer_that_is_no_program_ends_the_run(up: Up) -> None:
    up.touch("train.py")
    up.start(READY, [str(up.run.path / "train.py")])
    assert up.code() == 126
    assert "Permission denied" in up.output()


def test_a_signal_reaches_trainer_and_fleet_at_the_same_time(up: Up) -> None:
    """All of the trainer's process group: a shell in front of it must not keep the signal to itself."""
    trainer = (
        "import signal, sys, time\n"
        "def end(*_):\n    open(sys.argv[1] + '/saved', 'w'); sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, end)\nopen(sys.argv[1] + '/trains', 'w')\ntime.sleep(600)"
    )
    inner = up.python_trainer(trainer)
    # The fleet is drained only when the trainer has saved: it was not waited for.
    up.start("listen(); barrier('ready'); wait_file('saved'); obey()", ["sh", "-c", '"$@"; exit $?', "sh", *inner])
    up.wait_file("trains")
    assert up.term() in (3, 143)
    assert (up.run.path / "saved").exists()
    assert len(up.notes("TERM")) == 1
    assert not up.left()


def test_a_trainer_that_does_not_heed_is_killed_in_time(up: Up) -> None:
    trainer = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(sys.argv[1] + '/trains', 'w'); time.sleep(600)"
    )
    up.start(READY, up.python_trainer(trainer), ends_by={"grace_s": 0.5})
    up.wait_file("trains")
    began = time.monotonic()
    assert up.term() == 137
    assert 0.5 <= time.monotonic() - began < 8
    assert not up.left()


def test_a_coordinators_death_is_nothing_to_the_trainer(up: Up) -> None:
    trainer = (
        "import os, sys, time; open(sys.argv[1] + '/trains', 'w')\n"
        "while not os.path.exists(sys.argv[1] + '/taken'): time.sleep(0.01)\nsys.exit(7)"
    )
    up.start(
        "listen(); barrier('ready')\nif term == 1:\n    wait_file('trains'); os._exit(1)\n"
        "open(folder + '/taken', 'w'); obey()",
        up.python_trainer(trainer),
    )
    assert up.code() == 7
    assert len(up.notes("start")) == 2


def test_nothing_that_the_trainer_left_behind_stays(up: Up) -> None:
    sleep = [sys.executable, "-IS", "-c", SLEEPS]
    trainer = (
        f"import subprocess; a = subprocess.Popen({sleep!r}); b = subprocess.Popen({sleep!r}, start_new_session=True)"
    )
    up.start(READY, up.python_trainer(trainer), LAST_MEASURES=[[None, 0.1], [15, 2.0], [9, 2.0]])
    assert up.code() == 0
    assert not up.left()


# -------------------------------------------------------------------------------------------------------- fleet failed

FAILS = "listen(); barrier('ready'); wait_file('trains'); barrier('failed'); obey()"
FAILS_LATER = FAILS.replace("barrier('failed')", "wait_file('go'); barrier('failed')")


def test_a_failed_fleet_without_a_trainer_ends_the_run(up: Up) -> None:
    up.start("listen(); barrier('waiting'); time.sleep(0.1); barrier('failed'); obey()")
    assert up.code() == 70
    assert "the fleet failed: see `slurm-rollout status --run-dir" in up.output()
    assert len(up.notes("TERM")) == 1


def test_a_fleet_that_failed_before_it_was_ready_starts_no_trainer(up: Up) -> None:
    up.start(
        "listen(); barrier('failed'); obey()", up.python_trainer("open(__import__('sys').argv[1] + '/trains', 'w')")
    )
    assert up.code() == 70
    assert not (up.run.path / "trains").exists()


@pytest.mark.parametrize(("own", "code"), [(5, 5), (0, 70)])
def test_after_a_failed_fleet_the_trainer_may_end_itself(up: Up, own: int, code: int) -> None:
    trainer = (
        "import json, sys, time; open(sys.argv[1] + '/trains', 'w')\n"
        "while json.load(open(sys.argv[1] + '/barrier.json'))['phase'] != 'failed': time.sleep(0.01)\n"
        # Longer than the supervisor needs to see it.
        f"time.sleep(0.5); sys.exit({own})"
    )
    up.start(FAILS, up.python_trainer(trainer))
    assert up.code() == code
    assert "TERM" not in up.output()


def test_a_trainer_that_reads_of_the_failure_first_hides_it_not(up: Up) -> None:
    trainer = (
        "import json, os, sys, time; print(os.getpid(), file=open(sys.argv[1] + '/.p', 'w'))\n"
        "os.rename(sys.argv[1] + '/.p', sys.argv[1] + '/trains')\n"
        "while json.load(open(sys.argv[1] + '/barrier.json'))['phase'] != 'failed': time.sleep(0.01)"
    )
    up.start(FAILS_LATER, up.python_trainer(trainer))
    pid = int(up.wait_file("trains"))
    up.process.send_signal(signal.SIGSTOP)
    up.touch("go")
    wait_for("the trainer's end", lambda: (p := proc.read(pid)) is None or p.state == "Z")
    up.process.send_signal(signal.SIGCONT)
    assert up.code() == 70
    assert "the fleet failed" in up.output()


def test_after_a_failed_fleet_no_trainer_waits_for_ever(up: Up) -> None:
    trainer = "import sys, time; open(sys.argv[1] + '/trains', 'w'); time.sleep(600)"
    up.start(FAILS_LATER, up.python_trainer(trainer), TRAINER_AFTER_FAILURE_S=0.5)
    up.wait_file("trains")
    began = time.monotonic()
    up.touch("go")
    assert up.code() == 70
    assert 0.5 <= time.monotonic() - began < 10


def test_a_run_that_is_ending_anyway_has_not_failed(up: Up) -> None:
    """A drain of a fleet that failed keeps its barrier's word; who asked for the drain asked for 0."""
    up.start(
        "listen(); note('listens'); obey_ = obey\nwhile not told: time.sleep(0.01)\nbarrier('failed'); time.sleep(0.5)"
    )
    up.wait_note("listens")
    assert up.term() == 0
