"""A run directory that cannot be written, a plan that changed, a supervisor that is gone: with real processes.

Faults are done from outside: a limit on the size of files (every write fails with EFBIG), the mode of the directory
(EACCES), a file system of one megabyte (ENOSPC).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from slurm_rollout import proc
from slurm_rollout.coordinator import refuse
from slurm_rollout.core.model import GroupState, Listing, RunState, StepObservation, StepState
from slurm_rollout.errors import Unobservable
from slurm_rollout.testing.fleet import LocalFleet, stub_spec, wait_for
from slurm_rollout.testing.world import make_plan
from tests.conftest import FAILED
from tests.test_steps import FakeBackend, Lab

BASES = iter(range(16000, 17920, 80))

# Root may write where nobody may; `up` and all that it starts may not.
AS_ORDINARY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []

CANNOT = "nothing is started until it can be written"
CAN = "can be written again"


@pytest.fixture
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path) as made:
        try:
            yield made
            if request.node.stash.get(FAILED, False):
                print(made.story())
        finally:
            with contextlib.suppress(OSError):
                made.run.path.chmod(0o700)
            if made.has_ended():  # then no coordinator may live, and one that does would start engines again
                for pid in coordinators(made):
                    os.kill(pid, signal.SIGKILL)


def start(fleet: LocalFleet, spec: str, trainer: Sequence[str] = (), *, prefix: Sequence[str] = ()) -> LocalFleet:
    """Run `up` with Python's own buffering of its log."""
    return fleet.start(spec, trainer, {"PYTHONUNBUFFERED": ""}, prefix=prefix)


def small(fleet: LocalFleet, **more: object) -> str:
    how = {"layout": "nodes = 1", "load_s": 0.05, "base": next(BASES), "control": fleet.control, **more}
    return stub_spec(**how)  # type: ignore[arg-type]


def coordinators(fleet: LocalFleet) -> list[int]:
    found = []
    for process in proc.own():
        with contextlib.suppress(OSError):
            if f"--run-dir={fleet.run.path}\0" in Path(f"/proc/{process.pid}/cmdline").read_text(errors="replace"):
                found.append(process.pid)
    return found


def alive(pids: Sequence[int]) -> bool:
    return any((p := proc.read(pid)) is not None and p.state != "Z" for pid in pids)


def agents_of(fleet: LocalFleet, group: str) -> list[int]:
    """Return the pids of its agents, as the journal has them."""
    state = json.loads(fleet.run.state.read_text())["state"]
    return [step["pid"] for g in state["groups"] if g["id"] == group for step in g["steps"]]


def nothing_is_left(fleet: LocalFleet) -> None:
    wait_for("no process of the fleet", lambda: not fleet.processes(), 5)
    assert not coordinators(fleet)


@contextlib.contextmanager
def no_room(*pids: int) -> Iterator[None]:
    """Let these processes write nothing into any file; what is open for reading, and pipes, are as before."""
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    for pid, (_, hard) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        for pid, limit in limits.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)


@contextlib.contextmanager
def no_right(fleet: LocalFleet, mode: int = 0o500) -> Iterator[None]:
    """Take away the right to write into the run directory; with 0 also to look at it."""
    folders = [fleet.run.path, fleet.run.requests, *fleet.run.path.glob(".t*")]
    modes = {folder: folder.stat().st_mode for folder in folders}
    for folder in folders:
        folder.chmod(mode)
    try:
        yield
    finally:
        for folder, before in modes.items():
            with contextlib.suppress(FileNotFoundError):
                folder.chmod(before)


def hears(fleet: LocalFleet, words: str, times: int = 1) -> None:
    fleet.wait(f"{words!r} in the log", lambda: fleet.output().count(words) >= times)


def seq_grows(fleet: LocalFleet) -> None:
    before = fleet.barrier()["seq"]
    fleet.wait("a heartbeat", lambda: fleet.barrier()["seq"] > before)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------- a run directory without room


@pytest.mark.parametrize("lost", ["", "the agents' reports too"])
def test_without_room_engines_go_on_and_with_room_what_died_comes_back(fleet: LocalFleet, lost: str) -> None:
    start(fleet, small(fleet, groups=2, more="audit_s = 1"))
    fleet.wait_phase("ready")
    coordinator, healthy, epoch = fleet.coordinator(), fleet.engine("actor/1", 0), fleet.barrier()["epoch"]
    agents = agents_of(fleet, "actor/0")
    with no_room(coordinator, *(agents if lost else [])):
        fleet.wait("a heartbeat that fails", lambda: stands_still(fleet))
        before, began = cpu_s(coordinator), time.monotonic()
        fleet.kill("actor/0", 0)
        wait_for("the end of its agent", lambda: not alive(agents))
        # Time in which it would start it again, were it not for the disk.
        wait_for("three more attempts", lambda: time.monotonic() - began > 3)
        assert not fleet.processes(ROLLOUT_GROUP="actor/0")
        assert fleet.engine("actor/1", 0) == healthy
        assert cpu_s(coordinator) - before < 1.5, "it waits, it does not spin"
    fleet.wait_serving("actor/0", 2)
    seq_grows(fleet)
    assert fleet.coordinator() == coordinator
    assert fleet.engine("actor/1", 0) == healthy
    assert fleet.barrier()["term"] == 1
    assert fleet.barrier()["epoch"] > epoch
    (failure,) = fleet.events("failure")
    assert failure["reason"] == ("step_ended" if lost else "engine_exited")
    assert [(e["group"], e["incarnation"]) for e in fleet.events("launching")] == [
        ("actor/0", 1),
        ("actor/1", 1),
        ("actor/0", 2),
    ]
    numbers = [e["n"] for e in fleet.events()]
    assert numbers == list(range(1, len(numbers) + 1))
    # Its log had no room either.
    hears(fleet, CAN)
    assert fleet.output().count(CANNOT) == fleet.output().count(CAN) == 1
    assert "json: File too large. Engines that run are left alone" in fleet.output()
    assert re.search(r"can be written again; until now: \S+\.json: File too large\n", fleet.output())
    assert "Traceback" not in fleet.output()
    assert fleet.terminate() == 0
    nothing_is_left(fleet)


def stands_still(fleet: LocalFleet) -> bool:
    """Tell whether two heartbeats are missing."""
    return time.time() - fleet.run.barrier.stat().st_mtime > 1.2


def test_a_start_that_could_not_be_reported_is_made_again(fleet: LocalFleet) -> None:
    """An agent whose words are lost: nobody knows that its engine listens, until the start-up time is over."""
    spec = small(fleet, load_s=1.0).replace("timeout_s = 30", "timeout_s = 3")
    start(fleet, spec)
    fleet.wait_event("go")
    fleet.engine("actor/0", 0)  # which has a log of its own to write
    with no_room(*agents_of(fleet, "actor/0")):
        fleet.wait_event("failure", timeout_s=10)
    fleet.wait_serving("actor/0", 2)
    assert fleet.events("failure")[0]["reason"] == "start_timeout"
    assert fleet.terminate() == 0
    nothing_is_left(fleet)


@pytest.mark.parametrize("trainer", [False, True])
def test_without_room_it_still_drains_with_the_right_exit_code(fleet: LocalFleet, trainer: bool) -> None:
    wait = (
        f"import os, sys, time\nwhile not os.path.exists({str(fleet.folder / 'end')!r}): time.sleep(0.02)\nsys.exit(7)"
    )
    start(fleet, small(fleet, groups=2), [sys.executable, "-c", wait] if trainer else [])
    fleet.wait_phase("ready")
    if trainer:
        hears(fleet, "trainer started")
    coordinator = fleet.coordinator()
    with no_room(coordinator, fleet.process.pid):
        fleet.wait("a heartbeat that fails", lambda: stands_still(fleet))
        began = time.monotonic()
        if trainer:
            (fleet.folder / "end").touch()
            assert fleet.exit_code() == 7
        else:
            assert fleet.terminate() == 0
        assert time.monotonic() - began < 5
    assert fleet.barrier()["phase"] == "ready", "there was no room for more"
    assert fleet.barrier()["term"] == 1
    assert "Traceback" not in fleet.output()
    nothing_is_left(fleet)


def test_without_the_right_to_write_it_is_the_same(fleet: LocalFleet) -> None:
    start(fleet, small(fleet, groups=2), prefix=AS_ORDINARY)
    fleet.wait_phase("ready")
    coordinator, healthy = fleet.coordinator(), fleet.engine("actor/1", 0)
    agents = agents_of(fleet, "actor/0")
    with no_right(fleet):
        hears(fleet, CANNOT)
        assert "barrier.json: Permission denied. Engines that run are left alone" in fleet.output()
        fleet.kill("actor/0", 0)
        wait_for("the end of its agent", lambda: not alive(agents))
        assert not fleet.events("failure")
    fleet.wait_serving("actor/0", 2)
    hears(fleet, CAN)
    assert len(fleet.events("failure")) == 1
    assert (fleet.coordinator(), fleet.engine("actor/1", 0)) == (coordinator, healthy)
    assert fleet.output().count(CANNOT) == fleet.output().count(CAN) == 1
    with no_right(fleet, 0):
        hears(fleet, CANNOT, 2)
        assert fleet.terminate() == 0
    assert "Traceback" not in fleet.output()
    nothing_is_left(fleet)


def test_a_request_whose_file_cannot_be_removed_is_obeyed_once(fleet: LocalFleet) -> None:
    start(fleet, small(fleet), prefix=AS_ORDINARY)
    fleet.wait_phase("ready")
    request = fleet.run.requests / "r.json"
    request.write_text(json.dumps({"id": "r", "verb": "restart", "groups": ["actor/0"]}))
    fleet.run.requests.chmod(0o500)
    fleet.wait_serving("actor/0", 2)
    seq_grows(fleet)
    assert len(fleet.events("request")) == 1
    fleet.run.requests.chmod(0o700)
    wait_for("its removal", lambda: not request.exists())
    assert fleet.group("actor/0")["incarnation"] == 2
    assert fleet.terminate() == 0


@pytest.fixture
def full_disk(fleet: LocalFleet) -> Iterator[Path]:
    """A file system of one megabyte for the run directory and the log of `up`."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if os.getuid() != 0 or mount is None or umount is None:
        pytest.skip("NOT TESTED on a disk that is really full: only root can mount one")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m,mode=755", "none", str(fleet.folder)], check=False)
    if done.returncode:
        pytest.skip("NOT TESTED on a disk that is really full: it may not be mounted here")
    try:
        yield fleet.folder / "ballast"
    finally:
        fleet.end()
        subprocess.run([umount, "--lazy", str(fleet.folder)], check=True)


def fill(fleet: LocalFleet, ballast: Path) -> None:
    """Take every byte until nothing can be written, also those that come free meanwhile."""

    def filled() -> bool:
        _fill(ballast)
        return stands_still(fleet)

    fleet.wait("a heartbeat that fails", filled)


def _fill(ballast: Path) -> None:
    with open(ballast, "ab", buffering=0) as f, contextlib.suppress(OSError):
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    f.write(b"x" * size)


def test_a_disk_that_is_really_full(fleet: LocalFleet, full_disk: Path) -> None:
    start(fleet, small(fleet, groups=2))
    fleet.wait_phase("ready")
    coordinator, healthy = fleet.coordinator(), fleet.engine("actor/1", 0)
    agents = agents_of(fleet, "actor/0")
    fill(fleet, full_disk)
    fleet.kill("actor/0", 0)
    wait_for("the end of its agent", lambda: not alive(agents))
    assert not fleet.events("failure")
    full_disk.unlink()
    fleet.wait_serving("actor/0", 2)
    seq_grows(fleet)
    assert (fleet.coordinator(), fleet.engine("actor/1", 0)) == (coordinator, healthy)
    assert len(fleet.events("failure")) == 1
    hears(fleet, CAN)
    fill(fleet, full_disk)
    assert fleet.terminate() == 0
    assert "Traceback" not in fleet.output()
    nothing_is_left(fleet)


# -------------------------------------------------------------------------------------------- a term that cannot begin


def test_a_coordinator_that_cannot_begin_says_so_and_the_next_one_tries_again(fleet: LocalFleet) -> None:
    start(fleet, small(fleet), prefix=AS_ORDINARY)
    fleet.wait_phase("ready")
    engine = fleet.engine("actor/0", 0)
    with no_right(fleet):
        os.kill(fleet.coordinator(), signal.SIGKILL)
        hears(fleet, "The run directory must be writable for a coordinator to begin", 2)
        assert f"{fleet.run.path}/.t1: Permission denied" in fleet.output()
        assert "Make room, or make it writable" in fleet.output()
    (takeover,) = fleet.wait("a takeover", lambda: fleet.events("takeover"))
    assert "adopted 1 steps" in takeover["message"]
    fleet.wait_serving("actor/0", 1)
    assert fleet.engine("actor/0", 0) == engine
    assert "Traceback" not in fleet.output()
    assert fleet.terminate() == 0
    nothing_is_left(fleet)


def test_a_coordinator_that_cannot_begin_drains_all_the_same(fleet: LocalFleet) -> None:
    start(fleet, small(fleet), prefix=AS_ORDINARY)
    fleet.wait_phase("ready")
    with no_right(fleet):
        os.kill(fleet.coordinator(), signal.SIGKILL)
        hears(fleet, "must be writable for a coordinator to begin")
        began = time.monotonic()
        assert fleet.terminate() == 0
        assert time.monotonic() - began < 5
    assert "ending what is left" not in fleet.output()
    assert "Traceback" not in fleet.output()
    nothing_is_left(fleet)


@pytest.mark.parametrize("when", ["while it runs", "before it begins"])
def test_a_lost_lease_ends_a_coordinator_quietly(fleet: LocalFleet, when: str) -> None:
    start(fleet, small(fleet))
    fleet.wait_phase("ready")
    if when == "while it runs":
        shutil.rmtree(fleet.run.staging(1))
    (fleet.run.path / ".t99").mkdir()
    if when == "before it begins":
        os.kill(fleet.coordinator(), signal.SIGKILL)
    assert fleet.exit_code() == 1
    assert fleet.output().count("took over. This one writes and stops nothing") == 1
    assert "another coordinator took over the run directory" in fleet.output()
    assert "Traceback" not in fleet.output()
    assert not fleet.events("ended")


# -------------------------------------------------------------------------------------------------- what it hands on


@pytest.mark.parametrize("lost", ["ready", "failure", "nothing"])
def test_what_a_killed_coordinator_had_no_time_to_tell_the_next_one_tells(fleet: LocalFleet, lost: str) -> None:
    start(fleet, small(fleet))
    fleet.wait_serving("actor/0", 1)
    fleet.wait_event("ready", "actor/0", 1)
    if lost == "failure":
        os.kill(fleet.engine("actor/0", 0), signal.SIGKILL)
        fleet.wait_event("failure", "actor/0", 1)
    fleet.process.send_signal(signal.SIGSTOP)  # the supervisor: no takeover before the events are gone
    os.kill(coordinator := fleet.coordinator(), signal.SIGKILL)
    wait_for("its end", lambda: not alive([coordinator]))
    events = fleet.run.events(1)
    lines = events.read_text().splitlines(keepends=True)
    if lost != "nothing":
        told = next(n for n, line in enumerate(lines) if json.loads(line)["type"] == lost)
        events.write_text("".join(lines[:told]))
    fleet.process.send_signal(signal.SIGCONT)
    fleet.wait("a takeover", lambda: fleet.events("takeover"))
    again = [
        e for e in fleet.events() if e["term"] == 2 and e["type"] in ("ready", "failure") and e["incarnation"] == 1
    ]
    if lost == "failure":
        assert [(e["type"], e["rank"], e["reason"]) for e in again] == [("failure", 0, "engine_exited")]
    else:
        assert [e["type"] for e in again] == ([] if lost == "nothing" else ["ready"])


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_engines_have_the_umask_of_up_and_the_run_directory_is_its_owners(fleet: LocalFleet, mask: int) -> None:
    before = os.umask(mask)
    try:
        start(fleet, small(fleet))
    finally:
        os.umask(before)
    fleet.wait_phase("ready")
    status = Path(f"/proc/{fleet.engine('actor/0', 0)}/status").read_text()
    assert f"Umask:\t{mask:04o}" in status
    for path in fleet.run.path.rglob("*"):
        allowed = 0o044 if path == fleet.run.status else 0
        assert path.stat().st_mode & 0o077 in (0, allowed), path
    assert fleet.terminate() == 0


def lone(fleet: LocalFleet, supervisor: int) -> subprocess.Popen[bytes]:
    """Start the next coordinator as if that process had been its supervisor."""
    argv = [sys.executable, "-m", "slurm_rollout.coordinator", f"--run-dir={fleet.run.path}", "--job="]
    return subprocess.Popen(
        [*argv, "--term=2", "--first-term=1"],
        env={**os.environ, "ROLLOUT_SUPERVISOR": str(supervisor)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_a_coordinator_whose_supervisor_is_gone_before_it_looks_drains(fleet: LocalFleet) -> None:
    start(fleet, small(fleet))
    fleet.wait_phase("ready")
    kill_all_but_steps(fleet)
    assert fleet.processes()
    process = lone(fleet, fleet.process.pid)
    try:
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
    assert fleet.barrier()["phase"] == "stopped"
    nothing_is_left(fleet)


def kill_all_but_steps(fleet: LocalFleet) -> None:
    """As whoever kills `up` and the coordinator by hand, and leaves the engines."""
    fleet.process.send_signal(signal.SIGSTOP)
    os.kill(fleet.coordinator(), signal.SIGKILL)
    fleet.process.kill()
    fleet.process.wait()


# ------------------------------------------------------------------------------------------------- another plan


def starts(fleet: LocalFleet, spec: str) -> int:
    """Run `up` until it ends by itself; return its exit code."""
    return start(fleet, spec).exit_code()


def test_steps_that_another_plan_left_keep_a_new_one_from_starting(fleet: LocalFleet) -> None:
    old = small(fleet, groups=2)
    fewer = old.replace("groups = 2", "groups = 1")
    start(fleet, old)
    fleet.wait_phase("ready")
    agents, engines = agents_of(fleet, "actor/1"), fleet.processes()
    kill_all_but_steps(fleet)
    assert starts(fleet, fewer) == 1
    said = fleet.output()
    assert f"still run, where this plan does not have them: actor/1 on local2 (pid {agents[0]}). Nothing" in said
    assert "Start `up` with the spec that they were started with" in said
    assert "Traceback" not in said
    assert all(alive([pid]) for pid in engines), "nothing was ended"
    assert len(fleet.events("launching")) == 2
    # What the message advises.
    start(fleet, old)
    fleet.wait("its takeover", lambda: fleet.barrier().get("term") == 2)
    assert fleet.terminate() == 0
    nothing_is_left(fleet)
    start(fleet, fewer)
    fleet.wait_serving("actor/0", 2)
    assert fleet.terminate() == 0


def test_a_group_that_moved_is_refused_while_it_lives_and_then_begins_again(fleet: LocalFleet) -> None:
    old = small(fleet, layout="nodes = 2")
    moved = old.replace("nodes = 2", "nodes = 1")
    start(fleet, old)
    fleet.wait_phase("ready")
    agents = agents_of(fleet, "actor/0")
    kill_all_but_steps(fleet)
    assert starts(fleet, moved) == 1
    for node in ("local1", "local2"):
        assert f"actor/0 on {node} (pid" in fleet.output()
    for pid in agents:  # by hand, and without a last word
        os.kill(pid, signal.SIGKILL)
    wait_for("the end of its engines", lambda: not fleet.processes())
    start(fleet, moved)
    fleet.wait_serving("actor/0", 2)
    assert "Traceback" not in fleet.output()
    assert fleet.terminate() == 0
    nothing_is_left(fleet)


class Slurm(FakeBackend):
    """What Slurm lists, or why it does not."""

    def __init__(self, names: Sequence[str] = (), pids: Sequence[int] = (), silent: str = "") -> None:
        super().__init__()
        self._answer = Listing(asked_at=1.0, names=frozenset(names), pids=frozenset(pids))
        self._silent = silent

    async def listing(self) -> Listing:
        if self._silent:
            raise Unobservable(self._silent)
        return self._answer


@pytest.mark.parametrize(
    ("slurm", "words"),
    [
        (Slurm(), []),
        (Slurm(["run.actor-1.4.0", "run.actor-11.3.0", "other.actor-1.3.0", "batch"], [7]), []),
        (Slurm(["run.actor-1.3.1"]), ["still run", "actor/1 on n2 (pid 8), actor/1 on n3. Nothing was started"]),
        (Slurm(["another name"], [8]), ["still run", "not have them: actor/1 on n2 (pid 8). Nothing was started"]),
        (Slurm(silent="no answer"), ["may still run (no answer), where", "actor/1 on n2 (pid 8), actor/1 on n3."]),
    ],
)
def test_steps_without_a_place_are_known_by_name_or_by_their_srun_and_in_doubt_live(
    slurm: Slurm, words: list[str]
) -> None:
    steps = (StepState(node="n2", pid=8, pid_started=9), StepState(node="n3"))
    left = [GroupState(id="actor/1", incarnation=3, steps=steps)]
    said = asyncio.run(refuse(left, make_plan(1), slurm, "no such run"))
    assert bool(said) == bool(words)
    for word in words:
        assert word in said


# -------------------------------------------------------------------------------------------------------- a stranger


def test_a_stranger_that_left_before_anybody_looked_is_no_stranger(tmp_path: Path) -> None:
    """As a coordinator finds it that takes over, or that could not write while it was there."""
    lab = Lab(tmp_path)
    state = RunState(
        run_id=lab.run_id,
        job="",
        restart_count=0,
        term=2,
        groups=(GroupState(id="actor/0", incarnation=1, steps=(StepState(node="n0", pid=1, pid_started=2),)),),
    )
    lab.run.step_reports("actor/0", 1, "n0").parent.mkdir(parents=True)
    steps = lab.steps()
    steps.adopt(state, {})

    def seen(*reports: dict[str, object]) -> StepObservation:
        lab.say(*reports)
        assert steps.read()
        (step,) = steps.observe("actor/0", 1)
        return step

    for rank in (0, 1):
        seen({"report": "stranger", "rank": rank, "port": 8000 + rank, "holder": "pid 3 (nginx)"})
    assert seen({"report": "listening", "rank": 1}).stranger == "port 8000 is held by pid 3 (nginx), not by our engine"
    assert seen({"report": "listening", "rank": 0}).stranger == ""
    again = seen({"report": "stranger", "rank": 1, "port": 8001, "holder": "pid 4 (nginx)"})
    assert again.stranger == "port 8001 is held by pid 4 (nginx), not by our engine"
