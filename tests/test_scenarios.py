"""The main job, hurt in every way that we know, on the local backend and on real Slurm: same code, same assertions.

They look at the barrier, the events, processes and ports, never at log text.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import proc
from slurm_rollout.testing.fleet import Fleet, LocalFleet, SlurmFleet, stub_spec, wait_for
from tests.conftest import FAILED

LISTEN = """\
import socket, sys, time
listener = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("up", flush=True)
time.sleep(600)
"""


class Lab:
    """Where a scenario runs."""

    kind = "local"

    def __init__(self, folder: Path, base: int) -> None:
        self.base = base
        self.fleet: Fleet = LocalFleet(folder)
        self.strangers: list[subprocess.Popen[str]] = []

    def up(self, **spec: Any) -> Fleet:
        """Start a fleet of stubs and return it."""
        assert isinstance(self.fleet, LocalFleet)
        return self.fleet.start(self.spec(**spec))

    def spec(self, **spec: Any) -> str:
        return stub_spec(base=self.base, control=self.fleet.control, **spec)

    def occupy(self, group_rank: int, port_offset: int = 0) -> tuple[subprocess.Popen[str], int]:
        """A stranger takes a port of the first group's member; return its process and its pid there."""
        port = self.base + 16 * group_rank + port_offset
        stranger = subprocess.Popen([sys.executable, "-c", LISTEN, str(port)], stdout=subprocess.PIPE, text=True)
        self.strangers.append(stranger)
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "up\n"
        return stranger, stranger.pid

    def terminate(self) -> int:
        """Send TERM to `up` and return its exit code."""
        assert isinstance(self.fleet, LocalFleet)
        return self.fleet.terminate()

    def accepts(self, node: int, port: int) -> bool:
        """Tell whether a port of the group's node accepts a connection."""
        with socket.socket() as s:
            s.settimeout(1)
            return s.connect_ex(("127.0.0.1", port)) == 0

    def close(self) -> None:
        self.fleet.end()
        for stranger in self.strangers:
            stranger.kill()
            stranger.communicate()


class SlurmLab(Lab):
    """The same on a test cluster."""

    kind = "slurm"

    def __init__(self, cluster: Any) -> None:
        self.base = 18000
        self.cluster = cluster
        self.fleet = SlurmFleet(cluster)
        self.strangers = []

    def up(self, **spec: Any) -> Fleet:
        assert isinstance(self.fleet, SlurmFleet)
        return self.fleet.start(self.spec(**spec))

    def spec(self, **spec: Any) -> str:
        return stub_spec(base=self.base, control=self.fleet.control, python=self.cluster.python, **spec)

    def occupy(self, group_rank: int, port_offset: int = 0) -> tuple[subprocess.Popen[str], int]:
        node = self.cluster.nodes[group_rank]
        argv = [self.cluster.python, "-c", LISTEN, str(self.base + port_offset)]
        stranger: subprocess.Popen[str] = self.cluster.popen_in_node(node, argv)
        self.strangers.append(stranger)
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "up\n"
        (pid,) = self.cluster.user_pids(LISTEN, node)
        return stranger, _inner_pid(pid)

    def terminate(self) -> int:
        """TERM reaches `up` by scancel of the whole job; its exit code is not Slurm's to tell then."""
        self.cluster.cancel(self.fleet.job)  # type: ignore[attr-defined]  # a SlurmFleet here
        self.cluster.wait_job(self.fleet.job, {"CANCELLED", "COMPLETED"})  # type: ignore[attr-defined]
        return 0

    def accepts(self, node: int, port: int) -> bool:
        code = f"import socket; s=socket.socket(); s.settimeout(1); print(s.connect_ex(('127.0.0.1', {port})))"
        done = self.cluster.in_node(self.cluster.nodes[node], [self.cluster.python, "-c", code])
        return bool(done.stdout.strip() == "0")

    def close(self) -> None:
        self.fleet.end()
        for stranger in self.strangers:
            stranger.kill()
            stranger.communicate()


def _inner_pid(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return pid


_BASES = iter(range(22000, 31000, 160))


@pytest.fixture(params=["local", pytest.param("slurm", marks=pytest.mark.slurm)])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    place = SlurmLab(request.getfixturevalue("cluster")) if request.param == "slurm" else Lab(tmp_path, next(_BASES))
    try:
        yield place
        if request.node.stash.get(FAILED, False):
            print(place.fleet.story())
    finally:
        place.close()


def assert_recovered(fleet: Fleet, group: str, incarnation: int, reason: str, rank: int | None = None) -> None:
    """The group came back once, for that reason, and its events tell the whole story in order."""
    entry = fleet.wait_serving(group, incarnation)
    assert entry["urls"]
    failure = fleet.wait_event("failure", group, incarnation - 1)
    assert failure["reason"] == reason
    if rank is not None:
        assert failure["rank"] == rank
    order = [e["type"] for e in fleet.events(group=group)]
    story = ["failure", "stopped", "fenced", "launching", "go", "ready"]
    last = max(i for i, kind in enumerate(order) if kind == "failure")
    assert [k for k in order[last:] if k in story] == story


def undisturbed(fleet: Fleet, group: str) -> bool:
    return not fleet.events("failure", group) and bool(fleet.group(group).get("serving"))


# ------------------------------------------------------------------------------------------------------------ crashes


@pytest.mark.parametrize("rank", [0, 1], ids=["leader", "follower"])
def test_a_killed_member_brings_its_whole_group_back_and_no_other(lab: Lab, rank: int) -> None:
    fleet = lab.up(groups=2)
    fleet.wait_phase("ready")
    master = fleet.group("actor/0")["master"]
    urls = fleet.group("actor/0")["urls"]
    epoch = fleet.barrier()["epoch"]
    fleet.kill("actor/0", rank)
    assert_recovered(fleet, "actor/0", 2, "engine_exited", rank)
    assert fleet.wait_event("failure", "actor/0")["data"]["restarted_peers"] == [1 - rank]
    assert fleet.group("actor/0")["master"] == master
    assert fleet.group("actor/0")["urls"] == urls
    assert fleet.barrier()["epoch"] == epoch + 2
    assert undisturbed(fleet, "actor/1")
    assert fleet.group("actor/1")["incarnation"] == 1


def test_two_groups_that_die_at_once_recover_in_parallel(lab: Lab) -> None:
    fleet = lab.up(groups=2, load_s=1.0)
    fleet.wait_phase("ready")
    for group in ("actor/0", "actor/1"):
        fleet.kill(group, 1)
    for group in ("actor/0", "actor/1"):
        assert_recovered(fleet, group, 2, "engine_exited", 1)
    launched = [fleet.wait_event("launching", g, 2)["at"] for g in ("actor/0", "actor/1")]
    ready = [fleet.wait_event("ready", g, 2)["at"] for g in ("actor/0", "actor/1")]
    assert max(launched) < min(ready)


def test_a_start_that_crashes_until_the_budget_is_spent_fails_its_group_and_disturbs_no_other(lab: Lab) -> None:
    lab.fleet.fault("actor/0/1", crash_at_start=True)
    fleet = lab.up(groups=2, pool="restart.max_start_failures = 2\nrestart.backoff_initial_s = 0.1")
    failed = fleet.wait_event("failed", "actor/0")
    assert failed["reason"] == "budget_spent"
    assert len(fleet.events("failure", "actor/0")) == 3
    fleet.wait_serving("actor/1", 1)
    # An event is written just before the barrier that goes with it.
    fleet.wait("actor/0 to be failed", lambda: fleet.group("actor/0").get("phase") == "failed")
    fleet.wait_phase("ready")
    assert fleet.barrier()["reason"] == "degraded"
    assert undisturbed(fleet, "actor/1")


# -------------------------------------------------------------------------------------------------------------- hangs


@pytest.mark.parametrize("rank", [0, 1], ids=["leader", "follower"])
def test_a_stopped_process_is_a_hang_and_is_ended_and_replaced(lab: Lab, rank: int) -> None:
    fleet = lab.up(groups=2)
    fleet.wait_phase("ready")
    began = time.time()
    hung = fleet.engine("actor/0", rank)
    os.kill(hung, signal.SIGSTOP)
    assert_recovered(fleet, "actor/0", 2, "not_answering")
    # period + threshold x max(period, timeout) is 2 s here; the rest is the machine's noise.
    assert fleet.wait_event("failure", "actor/0")["at"] - began < 2.0 + 1.5
    assert proc.read(hung) is None
    assert undisturbed(fleet, "actor/1")


def test_a_single_group_that_hangs_is_believed_when_its_own_agents_see_it_too(lab: Lab) -> None:
    fleet = lab.up(groups=1)
    fleet.wait_phase("ready")
    fleet.kill("actor/0", 0, signal.SIGSTOP)
    assert_recovered(fleet, "actor/0", 2, "not_answering")


def test_generation_dead_behind_a_good_health_page_is_found(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    fleet.wait_phase("ready")
    fleet.fault("actor/0/1", generation="dead", incarnations=[1])
    assert_recovered(fleet, "actor/0", 2, "not_answering")
    assert undisturbed(fleet, "actor/1")


def test_a_saturated_engine_whose_counter_rises_is_left_alone(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    fleet.wait_phase("ready")
    fleet.fault("*", saturated=True, slow_s=60)
    fleet.wait_event("slow", "actor/0")
    fleet.wait_event("slow", "actor/1")
    seq = fleet.barrier()["seq"]
    # Four times as long as a hang takes to be found.
    wait_for("sixteen more heartbeats", lambda: fleet.barrier()["seq"] > seq + 16)
    assert not fleet.events("failure")
    assert not fleet.events("unready")
    assert {g["serving"] for g in fleet.barrier()["groups"]} == {True}


def test_an_engine_that_answers_with_garbage_leaves_the_barrier_and_is_then_replaced(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    fleet.wait_phase("ready")
    fleet.fault("actor/0/0", generation="garbage", incarnations=[1])
    fleet.wait_event("unready", "actor/0")
    assert_recovered(fleet, "actor/0", 2, "answers_error", 0)


# --------------------------------------------------------------------------------------------------- ports and orphans


def test_a_port_that_a_stranger_holds_is_waited_for_named_and_never_taken_by_force(lab: Lab) -> None:
    stranger, pid = lab.occupy(1)
    fleet = lab.up(groups=1, pool="restart.max_start_failures = 0\nfence.timeout_s = 4")
    waits = wait_for("the holder's name", lambda: [e for e in fleet.events("fence_waits") if str(pid) in e["message"]])
    assert waits[0]["group"] == "actor/0"
    failure = fleet.wait_event("failure", "actor/0")
    assert failure["reason"] == "port_busy"
    assert str(pid) in failure["message"]
    fleet.wait_event("failed", "actor/0")
    fleet.wait_phase("failed")
    assert stranger.poll() is None
    assert not fleet.events("launching")


def test_a_port_that_a_stranger_gives_back_in_time_lets_the_group_start(lab: Lab) -> None:
    stranger, _ = lab.occupy(0)
    fleet = lab.up(groups=1)
    fleet.wait_event("fence_waits", "actor/0")
    stranger.kill()
    fleet.wait_serving("actor/0", 1)


def test_an_orphan_that_holds_a_port_without_a_mark_is_ended_before_the_next_start(lab: Lab) -> None:
    """It left its session and emptied its environment; its agent, the only parent that knew it, is killed with it."""
    lab.fleet.fault("actor/0/1", orphan=True, incarnations=[1])
    fleet = lab.up(groups=1, load_s=2.0)
    fleet.wait_phase("ready")
    port = int(fleet.group("actor/0")["urls"][1].rpartition(":")[2])
    orphans = wait_for("the orphan", lambda: _holders_of_orphan(fleet))
    for agent in fleet.agents("actor/0"):
        os.kill(agent, signal.SIGKILL)
    fleet.wait_serving("actor/0", 2, timeout_s=90)
    assert all(proc.read(pid) is None or proc.read(pid).state == "Z" for pid in orphans)  # type: ignore[union-attr]
    assert lab.accepts(1, port)


def _holders_of_orphan(fleet: Fleet) -> list[int]:
    """The stub logs its orphan's pid as seen on its node; find it from outside by what it is."""
    uid = os.stat(fleet.run.path).st_uid
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == uid and not proc.environ(int(entry)):
                cmdline = Path(f"/proc/{entry}/cmdline").read_bytes()
                if b"socket" in cmdline or b"orphan" in cmdline or b"sleep" in cmdline:
                    found.append(int(entry))
        except OSError:
            continue
    return found


# --------------------------------------------------------------------------------------------------- the coordinator


PHASES: dict[str, Callable[[Fleet], object]] = {
    "launching": lambda fleet: fleet.wait_event("launching", "actor/0", 1),
    "loading": lambda fleet: fleet.wait_event("go", "actor/0", 1),
    "ready": lambda fleet: fleet.wait_phase("ready"),
    "failure seen": lambda fleet: _hurt(fleet, "failure"),
    "stopped": lambda fleet: _hurt(fleet, "stopped"),
    "launching again": lambda fleet: _hurt(fleet, "launching", 2),
    "loading again": lambda fleet: _hurt(fleet, "go", 2),
}


def _hurt(fleet: Fleet, event: str, incarnation: int = 1) -> None:
    fleet.wait_phase("ready")
    fleet.kill("actor/0", 1)
    fleet.wait_event(event, "actor/0", incarnation)


@pytest.mark.parametrize("phase", PHASES)
def test_a_coordinator_killed_at_any_moment_is_replaced_and_nothing_is_started_twice(lab: Lab, phase: str) -> None:
    fleet = lab.up(groups=1, load_s=1.0)
    PHASES[phase](fleet)
    before = fleet.barrier()
    killed = time.time()
    os.kill(fleet.coordinator(), signal.SIGKILL)
    takeover = fleet.wait_event("takeover")
    assert takeover["at"] - killed < 2.0
    fleet.wait("the new term's first word", lambda: fleet.barrier().get("term") == 2)
    fleet.wait_phase("ready")
    after = fleet.barrier()
    assert after["term"] == 2
    assert after["epoch"] >= before["epoch"]
    assert after["seq"] > before["seq"]
    incarnation = fleet.group("actor/0")["incarnation"]
    for rank in (0, 1):
        alive = fleet.processes(ROLLOUT_GROUP="actor/0", ROLLOUT_RANK=str(rank))
        assert len(alive) == 1, "one engine a member"
        assert proc.environ(alive[0])["ROLLOUT_INCARNATION"] == str(incarnation)
    if phase in ("ready", "loading"):
        assert incarnation == 1, "what ran was adopted"
    launched = [e["incarnation"] for e in fleet.events("launching", "actor/0")]
    assert launched == sorted(set(launched)), "every incarnation was launched once"


def test_a_failure_that_happens_while_no_coordinator_lives_is_not_forgotten(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    fleet.wait_phase("ready")
    coordinator = fleet.coordinator()
    victim = fleet.engine("actor/0", 1)
    os.kill(coordinator, signal.SIGKILL)
    os.kill(victim, signal.SIGKILL)
    fleet.wait_event("takeover")
    assert_recovered(fleet, "actor/0", 2, "engine_exited", 1)
    assert undisturbed(fleet, "actor/1")


def test_a_coordinator_that_was_stopped_for_a_while_blames_no_engine(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    fleet.wait_phase("ready")
    coordinator = fleet.coordinator()
    os.kill(coordinator, signal.SIGSTOP)
    stopped_at, seq = time.monotonic(), fleet.barrier()["seq"]
    # Longer than any hang takes to be found.
    wait_for("five seconds without a heartbeat", lambda: time.monotonic() - stopped_at > 5.0)
    assert fleet.barrier()["seq"] <= seq + 1
    os.kill(coordinator, signal.SIGCONT)
    resumed = fleet.barrier()["seq"]
    wait_for("ten heartbeats after it", lambda: fleet.barrier()["seq"] > resumed + 10)
    assert not fleet.events("failure")


# ---------------------------------------------------------------------------------------------------------------- end


@pytest.mark.parametrize("phase", ["launching", "loading", "ready", "failure seen", "loading again"])
def test_term_in_any_phase_drains_and_leaves_no_process(lab: Lab, phase: str) -> None:
    fleet = lab.up(groups=1, load_s=1.0)
    PHASES[phase](fleet)
    began = time.monotonic()
    assert lab.terminate() == 0
    assert time.monotonic() - began < 20
    assert fleet.barrier()["phase"] == "stopped"
    assert {g["phase"] for g in fleet.barrier()["groups"]} == {"stopped"}
    assert all(not g["urls"] for g in fleet.barrier()["groups"])
    wait_for("no process of the run", lambda: not fleet.processes(), timeout_s=5)
    assert [e["type"] for e in fleet.events()][-1] == "ended"


@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.2, 0.3, 0.4])
def test_term_before_the_coordinator_can_take_a_signal_drains_all_the_same(tmp_path: Path, delay_s: float) -> None:
    """Local only: in a batch job nobody can aim that well."""
    with LocalFleet(tmp_path).start(stub_spec(base=21500)) as fleet:
        wait_for("up's first line", lambda: "run directory" in fleet.output())
        began = time.monotonic()
        wait_for("a moment of the start", lambda: time.monotonic() - began >= delay_s, period_s=0.002)
        assert fleet.terminate(timeout_s=15) == 0
        assert not fleet.processes()
