"""The trainer's side of the barrier: what it says, how it is written, and when it believes that it was heeded."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import barrier as module
from slurm_rollout.barrier import (
    Barrier,
    BarrierError,
    BarrierTimeout,
    CoordinatorLost,
    FleetFailed,
    Group,
    Snapshot,
    State,
    WeightsNeeded,
)
from tests.test_barrier import document, group

_replace = os.replace  # the coordinator's; tests break the client's
LOST_S = 120.0
HEARTBEAT_S = 5.0


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "ROLLOUT_BARRIER"):
        monkeypatch.delenv(name, raising=False)


def trained(index: int, incarnation: int = 1, **fields: Any) -> dict[str, Any]:
    entry = group(f"actor/{index}", incarnation, weights="stale", serving=False, world_size=8, changed=1)
    return entry | fields


class Coordinator:
    """A coordinator that works while its trainer sleeps; time is what the trainer sleeps.

    It takes in acknowledgements and words at each tick, as docs/barrier.md says. `starting_until`: no hold is granted
    before; `drained_at`: no word is heeded before; `deaf`: it lives, and heeds nothing; `dies_at`: the last tick.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "barrier.json"
        self.clients = folder / "clients"
        self.clients.mkdir()
        self.now = 0.0
        self.sleeps: list[float] = []
        self.term = 1
        self.seq = 0
        self.epoch = 7
        self.phase = "ready"
        self.job, self.restart_count = "123456", 0
        self.groups = [trained(0), trained(1)]
        self.targets: dict[str, int] = {}
        self.fields: dict[str, Any] = {}
        self.starting_until = self.drained_at = 0.0
        self.dies_at = float("inf")
        self.deaf = False
        self.heard: dict[str, tuple[float, dict[str, Any]]] = {}
        self.echoes: dict[str, dict[str, Any]] = {}
        self.spoken: list[tuple[float, dict[str, Any]]] = []
        self.plans: list[tuple[float, Callable[[], None]]] = []
        self.tick()

    def barrier(self, **options: Any) -> Barrier:
        return Barrier(self.path, clock=lambda: self.now, sleep=self.sleep, **options)

    def at(self, when: float, do: Callable[[], None]) -> None:
        self.plans.append((when, do))

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.sleeps.append(seconds)
        self.now += max(seconds, 1e-6)  # what is below the clock's precision would not pass
        for when, do in [p for p in self.plans if p[0] <= self.now]:
            self.plans.remove((when, do))
            do()
        self.tick()

    def pass_time(self, seconds: float) -> None:
        """Let time pass in which the trainer does something else, and the coordinator lives."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 1.0)
            self.tick()

    def tick(self) -> None:
        if self.now >= self.dies_at:
            return
        if not self.deaf:
            for path in sorted(self.clients.glob("[!.]*.json")):
                self.hear(path.stem, json.loads(path.read_bytes()))
            for path in sorted(self.clients.glob("*.acks.jsonl")):
                self.take_acks(path.name.removesuffix(".acks.jsonl"), path.read_bytes())
        self.write()

    def hear(self, client: str, words: dict[str, Any]) -> None:
        assert words["client"] == client
        assert words["schema"] == 1
        echo = self.echoes.setdefault(client, {"phase": "", "seq": 0, "hold": False, "acks": 0})
        seen_at, last = self.heard.get(client, (self.now, {"seq": 0}))
        assert words["seq"] >= last["seq"], "the number of words never falls"
        if words["seq"] > last["seq"]:
            seen_at = self.now
            self.heard[client] = (seen_at, words)
            self.spoken.append((self.now, words))
        holds = words["hold_s"] > 0 and self.now < seen_at + words["hold_s"]
        echo["hold"] = holds and (echo["hold"] or self.now >= self.starting_until)
        if self.now >= self.drained_at and echo["hold"] == holds:
            echo.update(seq=words["seq"], phase=words["phase"])

    def take_acks(self, client: str, raw: bytes) -> None:
        echo = self.echoes.setdefault(client, {"phase": "", "seq": 0, "hold": False, "acks": 0})
        for line in raw[: raw.rfind(b"\n") + 1].splitlines():
            try:
                ack = json.loads(line)
            except ValueError:
                continue
            if ack["n"] <= echo["acks"]:
                continue
            echo["acks"] = ack["n"]
            for name, incarnation in ack["groups"]:
                pool = name.partition("/")[0]
                if ack["version"] < self.targets.get(pool, -1) and not ack["rollback"]:
                    continue
                self.targets[pool] = ack["version"]
                for g in self.groups:
                    if (g["id"], g["incarnation"]) == (name, incarnation) and g["urls"]:
                        g["weights_version"] = ack["version"]
            for g in self.groups:
                fresh = g["weights_version"] == self.targets.get(g["id"].partition("/")[0])
                g.update(serving=fresh, weights="current" if fresh else "stale")

    def write(self) -> None:
        self.seq += 1
        content: dict[str, Any] = document(
            job=self.job, restart_count=self.restart_count, term=self.term, seq=self.seq, epoch=self.epoch,
            phase=self.phase, groups=self.groups, clients=self.echoes,
            pools=[{
                "name": "actor", "phase": self.phase, "ready": 0, "desired": 2, "min_ready": 1,
                "weights_version": self.targets.get("actor"), "probes": "on", "restarts": "at_once", "may_start": "",
            }],
        )  # fmt: skip
        staged = self.folder / ".staged"
        staged.write_text(json.dumps(content | self.fields))
        _replace(staged, self.path)

    def words(self, client: str = "trainer") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.clients / f"{client}.json").read_bytes())
        return found

    def acks(self, client: str = "trainer") -> list[dict[str, Any]]:
        raw = (self.clients / f"{client}.acks.jsonl").read_bytes()
        assert raw.endswith(b"\n")
        return [json.loads(line) for line in raw.splitlines() if line.endswith(b"}")]

    def files(self) -> list[str]:
        return sorted(path.name for path in self.clients.iterdir())


@pytest.fixture
def fleet(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path)


# ------------------------------------------------------------------------------------------------ what is announced


def test_an_announcement_is_one_small_file_for_the_owner_only(fleet: Coordinator) -> None:
    old = os.umask(0)
    try:
        fleet.barrier().announce("training")
    finally:
        os.umask(old)
    assert fleet.words() == {
        "schema": 1,
        "client": "trainer",
        "seq": 1,
        "job": "",
        "restart_count": None,
        "phase": "training",
        "hold_s": 0.0,
        "waiting_s": 0.0,
    }
    assert fleet.files() == ["trainer.json"]
    assert stat.S_IMODE((fleet.clients / "trainer.json").stat().st_mode) == 0o600


def test_the_file_is_replaced_as_a_whole_and_synced(fleet: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def syncing(fd: int) -> None:
        done.append("fsync")
        assert os.fstat(fd).st_size > 50
        fsync(fd)

    def replacing(staged: str, path: str) -> None:
        done.append("replace")
        assert Path(staged) == fleet.clients / f".trainer.{os.getpid()}.tmp"
        assert json.loads(Path(staged).read_bytes())["phase"] == "syncing"
        replace(staged, path)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    fleet.barrier().announce("syncing")
    assert done == ["fsync", "replace"]


def test_words_name_the_job_that_is_wanted(fleet: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    fleet.barrier().announce("training")
    assert (fleet.words()["job"], fleet.words()["restart_count"]) == ("123456", 0)
    fleet.restart_count = 2
    fleet.write()
    barrier = fleet.barrier(job=123456, restart_count=2)
    barrier.ack_weights(1, barrier.stale())
    assert (fleet.acks()[-1]["job"], fleet.acks()[-1]["restart_count"]) == ("123456", 2)


@pytest.mark.parametrize("client", ["generator", "a", "R2-d2.x_y", "x" * 40])
def test_each_client_has_files_of_its_own(client: str, fleet: Coordinator) -> None:
    barrier = fleet.barrier(client=client)
    barrier.announce("generating")
    barrier.ack_weights(1, barrier.stale())
    assert fleet.files() == [f"{client}.acks.jsonl", f"{client}.json"]
    assert fleet.words(client)["client"] == client


@pytest.mark.parametrize("client", [".hidden", "-x", "a/b", "../x", "a b", "x" * 41, "é", "a\n", "..", "_"])
def test_a_client_is_a_plain_name(client: str, fleet: Coordinator) -> None:
    with pytest.raises(ValueError, match="up to 40 letters"):
        fleet.barrier(client=client)


def test_a_reader_without_a_name_says_nothing(fleet: Coordinator) -> None:
    barrier = fleet.barrier(client="")
    fleet.phase = "waiting"
    fleet.tick()
    with pytest.raises(BarrierTimeout):
        barrier.wait_ready(timeout=60)
    for say in (lambda: barrier.announce("training"), barrier.hold, lambda: barrier.ack_weights(1, barrier.stale())):
        with pytest.raises(BarrierError, match="has no client name"):
            say()
    assert fleet.files() == []


def test_only_three_phases_can_be_announced(fleet: Coordinator) -> None:
    with pytest.raises(ValueError, match="phase 'sleeping': one of generating, training, syncing"):
        fleet.barrier().announce("sleeping")
    assert fleet.files() == []


def test_an_announcement_returns_once_probes_in_flight_have_ended(fleet: Coordinator) -> None:
    fleet.drained_at = 27.0
    state = fleet.barrier().announce("training")
    assert 27.0 <= fleet.now <= 27.0 + 0.7
    assert state.clients["trainer"] == {"phase": "training", "seq": 1, "hold": False, "acks": 0}
    assert len(fleet.spoken) == 1


def test_an_echo_is_looked_for_quickly_at_first_and_then_twice_a_second(fleet: Coordinator) -> None:
    fleet.drained_at = 60.0
    fleet.barrier().announce("training")
    assert 0.03 < fleet.sleeps[0] < 0.07
    assert sum(fleet.sleeps[:5]) < 1.0
    late = fleet.sleeps[12:]
    assert all(0.37 < pause < 0.63 for pause in late)
    assert len(set(late)) > 10


@pytest.mark.parametrize(("in_file", "in_echo", "expected"), [(0, 0, 1), (41, 0, 42), (41, 40, 42), (3, 41, 42)])
def test_the_number_goes_on_above_the_files_and_the_echos(
    in_file: int, in_echo: int, expected: int, fleet: Coordinator
) -> None:
    """Of a trainer that was started again; the echo must not be an earlier word's."""
    if in_file:
        (fleet.clients / "trainer.json").write_text(json.dumps({"seq": in_file, "phase": "training"}))
    fleet.echoes["trainer"] = {"phase": "training", "seq": in_echo, "hold": False, "acks": 0}
    fleet.write()
    barrier = fleet.barrier()
    barrier.announce("generating")
    assert fleet.words()["seq"] == expected
    fleet.deaf = True
    for further in (1, 2):  # also where the file was lost before it was heard
        with pytest.raises(BarrierTimeout):
            barrier.announce("training", timeout=0)
        assert fleet.words()["seq"] == expected + further
        (fleet.clients / "trainer.json").unlink()


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"\xff\xfe", b'{"seq": null}', b'{"schema": 1}'])
def test_a_client_file_that_is_none_is_replaced(garbage: bytes, fleet: Coordinator) -> None:
    (fleet.clients / "trainer.json").write_bytes(garbage)
    fleet.deaf = True
    with pytest.raises(BarrierTimeout):
        fleet.barrier().announce("training", timeout=0)
    assert fleet.words()["seq"] == 1


def test_what_was_announced_stays_so_whatever_is_said_next(fleet: Coordinator) -> None:
    barrier = fleet.barrier()
    barrier.announce("generating")
    fleet.deaf = True
    with pytest.raises(BarrierTimeout):
        barrier.announce("training", timeout=5)
    with pytest.raises(BarrierTimeout):
        barrier.release(timeout=5)
    assert (fleet.words()["seq"], fleet.words()["phase"]) == (3, "training")


def test_a_timeout_says_what_was_not_heeded_and_what_may_be_in_the_way(fleet: Coordinator) -> None:
    fleet.drained_at = 1000.0
    with pytest.raises(BarrierTimeout) as caught:
        fleet.barrier(client="learner").announce("training", timeout=30)
    assert fleet.now == pytest.approx(30)
    for part in (
        "`training`, announced by client learner, is not heeded after 30 s",
        "probes: actor on",
        "barrier.json",
    ):
        assert part in str(caught.value)
    assert fleet.words("learner")["phase"] == "training"


# ----------------------------------------------------------------------------------------- what waits, and how it ends


def push(barrier: Barrier, timeout: float | None = 60.0) -> State:
    snapshot = Snapshot((only_group(),), 1, 1)
    return barrier.ack_weights(43, snapshot, timeout=timeout)


def only_group() -> Group:
    return Group("actor/0", "ready", True, 1, "stale", None, ("http://n0:18000",), {}, "", "", "")


def announce(barrier: Barrier, timeout: float | None = 60.0) -> State:
    return barrier.announce("syncing", timeout=timeout)


def hold(barrier: Barrier, timeout: float | None = 60.0) -> State:
    return barrier.hold(timeout=timeout).state


def release(barrier: Barrier, timeout: float | None = 60.0) -> State:
    return barrier.release(timeout=timeout)


ASKS: dict[str, tuple[Callable[..., State], str]] = {
    "announce": (announce, "`syncing`, announced by client trainer, is not heeded"),
    "ack_weights": (push, "version 43, acknowledged by client trainer, is not taken in"),
    "hold": (hold, "the hold of client trainer is not granted"),
    "release": (release, "the release by client trainer is not heeded"),
}


@pytest.fixture(params=list(ASKS))
def ask(request: pytest.FixtureRequest) -> tuple[Callable[..., State], str]:
    return ASKS[request.param]


Ask = tuple[Callable[..., State], str]


def test_every_wait_for_an_answer_ends_in_time(ask: Ask, fleet: Coordinator) -> None:
    do, lacks = ask
    fleet.deaf = True
    with pytest.raises(BarrierTimeout, match=f"^{lacks} after 33 s"):
        do(fleet.barrier(), timeout=33.3)
    assert fleet.now == pytest.approx(33.3)


def test_every_wait_for_an_answer_ends_with_the_coordinator(ask: Ask, fleet: Coordinator) -> None:
    do, lacks = ask
    fleet.deaf = True
    fleet.dies_at = 40.0
    with pytest.raises(CoordinatorLost, match=f"^{lacks}: no heartbeat of the coordinator for 12[01] s"):
        do(fleet.barrier(), timeout=None)
    assert 40 + LOST_S - 1 <= fleet.now <= 40 + LOST_S + 2


@pytest.mark.parametrize(("phase", "reason"), [("failed", "budget_spent"), ("stopped", "stopped")])
def test_every_wait_for_an_answer_ends_with_the_fleet(phase: str, reason: str, ask: Ask, fleet: Coordinator) -> None:
    do, lacks = ask
    fleet.deaf = True
    fleet.at(12.0, lambda: setattr(fleet, "phase", phase))
    fleet.at(12.0, lambda: fleet.fields.update(reason="budget_spent"))
    with pytest.raises(FleetFailed, match=f"^{lacks}: the fleet will not come back") as caught:
        do(fleet.barrier(), timeout=None)
    assert caught.value.reason == reason
    assert 12 <= fleet.now <= 13


def test_no_wait_for_an_answer_is_lost_to_a_coordinator_that_is_replaced(ask: Ask, fleet: Coordinator) -> None:
    do, _ = ask
    fleet.deaf = True

    def take_over() -> None:
        fleet.term, fleet.seq, fleet.epoch, fleet.deaf = 2, 0, 8, False
        fleet.dies_at = float("inf")

    fleet.dies_at = 5.0
    fleet.at(60.0, take_over)
    state = do(fleet.barrier(), timeout=None)
    assert state.term == 2
    assert 60 <= fleet.now <= 61


@pytest.mark.parametrize("other", [{"job": "99"}, {"restart_count": 1}])
def test_another_jobs_file_is_no_answer(other: dict[str, Any], ask: Ask, fleet: Coordinator) -> None:
    do, lacks = ask
    mine: dict[str, Any] = {"job": "123456", "restart_count": 0}
    barrier = fleet.barrier(**mine)
    barrier.current()
    echo = {"phase": "syncing", "seq": 999, "hold": True, "acks": 999}
    fleet.fields = other | {"clients": {"trainer": echo}}
    fleet.deaf = True
    fleet.write()
    with pytest.raises(BarrierTimeout, match=f"{lacks} .* wanted is job 123456"):
        do(barrier, timeout=20)
    # What cannot be numbered above what was heard is not said; only a release is said in any case.
    assert fleet.files() == (["trainer.json"] if do is release else [])


def test_nothing_is_said_before_the_coordinator_was_read(ask: Ask, fleet: Coordinator) -> None:
    """It may have heard higher numbers under this name."""
    do, _ = ask
    if do is release:
        pytest.skip("is said in any case")
    fleet.echoes["trainer"] = {"phase": "training", "seq": 41, "hold": True, "acks": 41}
    fleet.dies_at = -1.0
    fleet.path.unlink()
    fleet.at(9.0, lambda: setattr(fleet, "dies_at", float("inf")))
    seen: list[list[str]] = []
    fleet.at(8.9, lambda: seen.append(fleet.files()))
    do(fleet.barrier(), timeout=60)
    assert seen == [[]]
    if do is push:
        assert [ack["n"] for ack in fleet.acks()] == [42]
    else:
        assert fleet.words()["seq"] == 42
    assert 9 <= fleet.now <= 11


# ---------------------------------------------------------------------------------------- where it cannot be written


def test_a_missing_directory_is_named(ask: Ask, fleet: Coordinator) -> None:
    do, _ = ask
    fleet.clients.rmdir()
    with pytest.raises(
        BarrierError, match=r"clients/trainer\.(json|acks\.jsonl) cannot be written: No such file"
    ) as caught:
        do(fleet.barrier())
    assert type(caught.value) is BarrierError
    assert str(fleet.folder) in str(caught.value)
    assert not fleet.clients.exists()
    assert 0.3 < fleet.now < 1.0


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize("where", ["open", "replace", "fsync"])
def test_a_file_system_that_is_not_settled_gets_a_moment(
    where: str, code: int, fleet: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [OSError(code, os.strerror(code)) for _ in range(3)]
    real = getattr(os, where)

    def flaky(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(os, where, flaky)
    fleet.barrier().announce("training")
    assert failures == []
    assert fleet.words()["phase"] == "training"


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_does_not_pass_is_told_at_once(code: int, fleet: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise OSError(code, os.strerror(code))

    barrier = fleet.barrier()
    barrier.announce("generating")
    now = fleet.now
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for do, _ in ASKS.values():
            with pytest.raises(BarrierError, match=os.strerror(code)):
                do(barrier)
    assert fleet.now == now
    assert fleet.words()["phase"] == "generating"
    barrier.release()  # what was not said is not said later on either
    assert (fleet.words()["phase"], fleet.words()["hold_s"]) == ("generating", 0.0)


# ------------------------------------------------------------------------------------------------------------- weights


def test_a_trainer_bootstraps_pushes_and_catches_up(fleet: Coordinator) -> None:
    barrier = fleet.barrier()
    fleet.phase = "needs_weights"
    with pytest.raises(WeightsNeeded) as caught:
        barrier.wait_ready()
    snapshot = barrier.stale()
    assert snapshot.groups == caught.value.groups
    assert [g.id for g in snapshot.groups] == ["actor/0", "actor/1"]
    state = barrier.ack_weights(0, snapshot)
    assert [(g.serving, g.weights, g.weights_version) for g in state.groups] == [(True, "current", 0)] * 2
    assert state.pools[0].weights_version == 0
    assert not barrier.stale()

    assert [g.id for g in barrier.stale(1).groups] == ["actor/0", "actor/1"]
    snapshot = barrier.stale(1)
    fleet.groups[1] = trained(1, 2, weights_version=None)  # dies and comes back while weights are pushed
    fleet.tick()
    state = barrier.ack_weights(1, snapshot)
    assert [(g.id, g.serving, g.weights_version) for g in state.groups] == [
        ("actor/0", True, 1),
        ("actor/1", False, None),
    ]
    assert [(g.id, g.incarnation) for g in barrier.stale(1).groups] == [("actor/1", 2)]
    assert barrier.stale().groups == barrier.stale(1).groups
    state = barrier.ack_weights(1, barrier.stale())
    assert all(g.serving for g in state.groups)
    assert [ack["n"] for ack in fleet.acks()] == [1, 2, 3]


def test_an_acknowledgement_is_one_line(fleet: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    synced: list[int] = []
    write, fsync = os.write, os.fsync

    def writing(fd: int, data: bytes) -> int:
        written.append(data)
        return write(fd, data)

    def syncing(fd: int) -> None:
        synced.append(len(written))
        fsync(fd)

    monkeypatch.setattr(os, "write", writing)
    monkeypatch.setattr(os, "fsync", syncing)
    barrier = fleet.barrier(job="123456", restart_count=0)
    fleet.groups[1]["incarnation"] = 4
    fleet.tick()
    barrier.ack_weights(42, barrier.stale(), rollback=True)
    path = fleet.clients / "trainer.acks.jsonl"
    assert written == [path.read_bytes()]
    assert synced == [1]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert fleet.acks() == [
        {
            "n": 1,
            "version": 42,
            "groups": [["actor/0", 1], ["actor/1", 4]],
            "rollback": True,
            "job": "123456",
            "restart_count": 0,
        }
    ]


def test_an_acknowledgement_returns_once_it_is_taken_in(fleet: Coordinator) -> None:
    fleet.deaf = True
    fleet.at(20.0, lambda: setattr(fleet, "deaf", False))
    barrier = fleet.barrier()
    state = barrier.ack_weights(42, barrier.stale())
    assert 20 <= fleet.now <= 20.7
    assert state.clients["trainer"]["acks"] == 1
    assert len(fleet.acks()) == 1


@pytest.mark.parametrize(
    ("there", "echo", "n"),
    [
        (b"", 0, 1),
        (b'{"n": 7}\n', 0, 8),
        (b'{"n": 7}\n{"n": 8}\n', 8, 9),
        (b'{"n": 7}\n', 9, 10),
        (b"", 9, 10),  # the file was lost: what the coordinator took in has numbers all the same
        (b'{"n": 7}\n{"n": 8, "ver', 7, 8),  # a writer was killed
        (b'{"n": 7}\n{"n": 8}', 7, 9),  # just before its last byte: the line is whole all the same
        (b'{"n": 7}\ngarbage\n[]\n{"n": null}\n\n', 0, 8),
        (b'{"n": 7}\n' + b"x" * (3 << 20), 7, 8),
        (b"".join(b'{"n": %d, "pad": "%s"}\n' % (n, b"x" * 1000) for n in range(1, 4001)), 0, 4001),
    ],
)
def test_numbers_go_on_and_a_torn_line_swallows_none(there: bytes, echo: int, n: int, fleet: Coordinator) -> None:
    path = fleet.clients / "trainer.acks.jsonl"
    path.write_bytes(there)
    fleet.deaf = True
    fleet.echoes["trainer"] = {"acks": echo}
    fleet.write()
    barrier = fleet.barrier()
    with pytest.raises(BarrierTimeout):
        barrier.ack_weights(42, barrier.stale(), timeout=0)
    raw = path.read_bytes()
    assert raw.startswith(there)
    assert raw[len(there) :].startswith(b"\n") == (there != b"" and not there.endswith(b"\n"))
    lines = raw.splitlines()
    assert json.loads(lines[-1])["n"] == n
    assert len(lines) == len(there.splitlines()) + 1
    assert raw.endswith(b"}\n")


def test_a_line_that_does_not_fit_is_no_acknowledgement(fleet: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    barrier = fleet.barrier()
    snapshot = barrier.stale()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:20]))
        with pytest.raises(BarrierError, match="No space left"):
            barrier.ack_weights(42, snapshot)
    assert all(g.serving for g in barrier.ack_weights(42, snapshot).groups)


def test_without_a_group_there_is_nothing_to_acknowledge(fleet: Coordinator) -> None:
    for g in fleet.groups:
        g["urls"] = []
    fleet.targets["actor"] = 41
    fleet.tick()
    barrier = fleet.barrier()
    snapshot = barrier.stale(42)
    assert not snapshot
    state = barrier.ack_weights(42, snapshot)
    assert state == barrier.current()
    assert state.pools[0].weights_version == 41
    assert (fleet.files(), fleet.sleeps) == ([], [])


def test_weights_do_not_go_back_unless_the_trainer_did(fleet: Coordinator) -> None:
    barrier = fleet.barrier()
    barrier.ack_weights(42, barrier.stale())
    before = fleet.acks()
    with pytest.raises(ValueError, match=r"version 41 is older than 42, which pool actor is at.*rollback=True"):
        barrier.ack_weights(41, barrier.stale(41))
    assert fleet.acks() == before
    barrier.ack_weights(42, Snapshot((only_group(),), 1, 1))  # the same again is no step back
    state = barrier.ack_weights(41, barrier.stale(41), rollback=True)
    assert state.pools[0].weights_version == 41
    assert [(ack["version"], ack["rollback"]) for ack in fleet.acks()] == [(42, False), (42, False), (41, True)]


def test_another_pools_version_is_no_bound(fleet: Coordinator) -> None:
    pool = {"name": "critic", "phase": "ready", "ready": 1, "desired": 1, "min_ready": 1, "weights_version": 99}
    fleet.fields = {"pools": [pool, pool | {"name": "actor", "weights_version": None}]}
    fleet.write()
    barrier = fleet.barrier()
    barrier.ack_weights(1, barrier.stale(pool="actor"))
    assert fleet.acks()[0]["version"] == 1


def test_only_whole_numbers_are_versions(fleet: Coordinator) -> None:
    class Whole:
        def __index__(self) -> int:
            return 5

    barrier = fleet.barrier()
    for wrong in (4.5, "4", None):
        with pytest.raises(TypeError):
            barrier.ack_weights(wrong, barrier.stale())  # type: ignore[arg-type]
    assert fleet.files() == []
    barrier.ack_weights(Whole(), barrier.stale())  # type: ignore[arg-type]
    assert fleet.acks()[0]["version"] == 5


@pytest.mark.parametrize(
    ("target", "version", "pool", "expected"),
    [
        (None, None, None, ["actor/0", "actor/1", "actor/2", "critic/0"]),
        (None, 42, None, ["actor/1", "actor/2", "critic/0"]),
        (42, None, None, ["actor/1", "actor/2", "critic/0"]),
        (42, 42, None, ["actor/1", "actor/2", "critic/0"]),
        (42, 43, None, ["actor/0", "actor/1", "actor/2", "critic/0"]),
        (42, 41, None, ["actor/0", "actor/2", "critic/0"]),
        (42, 43, "critic", ["critic/0"]),
        (42, None, "actor", ["actor/1", "actor/2"]),
        (42, 43, "reward", []),
    ],
)
def test_stale_is_who_lives_and_lacks_the_version(
    target: int | None, version: int | None, pool: str | None, expected: list[str], fleet: Coordinator
) -> None:
    fleet.groups = [
        trained(0, weights="current", serving=True, weights_version=42),
        trained(1, weights_version=41),
        trained(2, 3, weights_version=None),
        trained(3, urls=[], phase="starting", weights_version=None),
        group("critic/0", weights="stale", serving=False),
        group("reward/0"),
    ]
    fleet.targets = {} if target is None else {"actor": target}
    fleet.tick()
    snapshot = fleet.barrier().stale(version, pool)
    assert [g.id for g in snapshot.groups] == expected
    assert bool(snapshot) == bool(expected)
    assert (snapshot.epoch, snapshot.term) == (7, 1)
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot


def test_a_pool_that_is_not_there_is_named(fleet: Coordinator) -> None:
    with pytest.raises(ValueError, match=r"no pool 'actors' in .*: there are actor"):
        fleet.barrier().stale(pool="actors")


def test_nothing_known_is_not_nothing_stale(fleet: Coordinator) -> None:
    barrier = fleet.barrier(grace_s=10.0)
    fleet.dies_at = -1.0
    fleet.path.unlink()
    for question in (barrier.stale, lambda: barrier.changed_since(0)):
        with pytest.raises(BarrierError, match=r"nothing is known of the groups: .*barrier\.json does not exist"):
            question()


def test_a_sample_counts_only_with_its_version(fleet: Coordinator) -> None:
    fleet.groups = [trained(0, 3, serving=True, weights="current", weights_version=42), group("reward/0", 1)]
    fleet.tick()
    barrier = fleet.barrier()
    assert barrier.is_current("actor/0", 3)
    assert barrier.is_current("actor/0", 3, 42)
    assert barrier.is_current("actor/0", 3, version=42)
    assert not barrier.is_current("actor/0", 3, 41)
    assert not barrier.is_current("actor/0", 2, 42)
    assert barrier.is_current("reward/0", 1)
    fleet.groups[0]["serving"] = False
    fleet.tick()
    assert not barrier.is_current("actor/0", 3, 42)


def test_changed_groups_are_those_whose_incarnation_came_or_went(fleet: Coordinator) -> None:
    gone = trained(1, 2, changed=9, urls=[], phase="stopping")
    fleet.groups = [trained(0, changed=8), gone, trained(2, changed=5)]
    fleet.epoch = 9
    fleet.tick()
    barrier = fleet.barrier()
    assert [(g.id, g.incarnation, g.urls, g.master, g.world_size) for g in barrier.changed_since(7)] == [
        ("actor/0", 1, ("http://n0:18000",), "n0:18001", 8),
        ("actor/1", 2, (), "n1:18001", 8),
    ]
    assert [g.id for g in barrier.changed_since(8)] == ["actor/1"]
    assert barrier.changed_since(9) == ()
    assert len(barrier.changed_since(0)) == 3


def test_an_older_coordinators_file_is_read_with_defaults(fleet: Coordinator) -> None:
    """It does not say when a group changed: it may have been at the epoch that it does say."""
    pool = {"name": "actor", "phase": "ready", "ready": 2, "desired": 3, "min_ready": 2}
    fleet.fields = {"pools": [pool], "groups": [group()], "clients": {}}
    fleet.write()
    barrier = fleet.barrier()
    state = barrier.current()
    assert state.pools == (module.Pool("actor", "ready", 2, 3, 2, None, "on", "at_once", ""),)
    assert (state.groups[0].world_size, state.groups[0].changed, state.may_start) == (0, 7, "")
    assert [g.id for g in barrier.changed_since(6)] == ["actor/0"]
    assert barrier.changed_since(7) == ()


# --------------------------------------------------------------------------------------------------------------- holds


def test_a_hold_is_granted_when_nothing_is_starting_and_ends_with_its_block(fleet: Coordinator) -> None:
    fleet.starting_until = 25.0
    barrier = fleet.barrier()
    with barrier.hold() as held:
        assert 25.0 <= fleet.now <= 25.7
        assert held.state.clients["trainer"]["hold"] is True
        assert fleet.words()["hold_s"] == 600.0
        assert fleet.echoes["trainer"]["hold"] is True
    assert fleet.words()["hold_s"] == 0.0
    assert fleet.echoes["trainer"] == {"phase": "", "seq": 2, "hold": False, "acks": 0}


def test_a_hold_without_a_block_is_released_by_hand(fleet: Coordinator) -> None:
    barrier = fleet.barrier()
    held = barrier.hold(lease_s=30)
    assert fleet.words()["hold_s"] == 30.0
    assert barrier.release().clients["trainer"]["hold"] is False
    barrier.hold()
    assert barrier.current().clients["trainer"]["hold"] is True
    assert held.release().clients["trainer"]["hold"] is False


class PushFailed(Exception):
    pass


@pytest.mark.parametrize("error", [PushFailed, KeyboardInterrupt, SystemExit])
def test_an_error_inside_releases_at_once_and_is_not_masked(error: type[BaseException], fleet: Coordinator) -> None:
    def fail() -> None:
        fleet.deaf = True
        left_at.append(fleet.now)
        raise error

    left_at: list[float] = []
    with pytest.raises(error), fleet.barrier().hold():
        fail()
    assert fleet.words()["hold_s"] == 0.0
    assert left_at == [fleet.now]  # nobody waits for an echo then


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOSPC])
def test_a_release_that_fails_does_not_mask_the_error_inside(
    code: int, fleet: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    def fail() -> None:
        monkeypatch.setattr(os, "replace", refuse)
        raise PushFailed

    with pytest.raises(PushFailed), fleet.barrier().hold():
        fail()


def test_leaving_without_an_error_waits_for_the_echo(fleet: Coordinator) -> None:
    with pytest.raises(BarrierTimeout, match="the release by client trainer is not heeded after 60 s"):  # noqa: SIM117
        with fleet.barrier().hold():
            fleet.deaf = True
    assert fleet.words()["hold_s"] == 0.0
    assert fleet.now == pytest.approx(60, abs=1.0)


def test_a_hold_that_is_not_granted_in_time_is_withdrawn_and_names_who_starts(fleet: Coordinator) -> None:
    fleet.groups = [trained(0), *(trained(i, urls=[], phase="stopping") for i in range(1, 8))]
    fleet.groups.append(trained(8, urls=[], phase="starting", reason="engine_exited"))
    fleet.fields = {"pools": [{"name": "actor", "phase": "ready", "ready": 1, "desired": 9, "min_ready": 1,
                               "may_start": "held by generator"}]}  # fmt: skip
    fleet.starting_until = 1000.0
    with pytest.raises(BarrierTimeout) as caught:
        fleet.barrier().hold(lease_s=600, timeout=30)
    assert fleet.now == pytest.approx(30)
    for part in (
        "the hold of client trainer is not granted after 30 s",
        "actor/8 starting since 2026-11-22T03:00:00Z engine_exited",
        "actor may not start: held by generator",
    ):
        assert part in str(caught.value)
    assert fleet.words()["hold_s"] == 0.0
    fleet.pass_time(2.0)
    assert fleet.echoes["trainer"]["hold"] is False


def test_a_hold_is_withdrawn_whatever_ends_its_wait(fleet: Coordinator) -> None:
    fleet.starting_until = 1000.0

    def interrupt() -> None:
        raise KeyboardInterrupt

    fleet.at(20.0, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fleet.barrier().hold()
    assert fleet.words()["hold_s"] == 0.0

    fleet.at(30.0, lambda: setattr(fleet, "phase", "failed"))
    with pytest.raises(FleetFailed):
        fleet.barrier().hold()
    assert fleet.words()["hold_s"] == 0.0


def test_a_hold_that_was_never_asked_for_is_not_withdrawn(fleet: Coordinator) -> None:
    barrier = fleet.barrier()
    barrier.current()
    fleet.phase = "failed"
    fleet.sleep(1.0)
    with pytest.raises(FleetFailed):
        barrier.hold()
    assert fleet.files() == []


def test_a_lease_outlasts_the_start_that_it_waits_for(fleet: Coordinator) -> None:
    """A start can take longer than the lease: it is asked for again, and most of it is left when it is granted."""
    fleet.starting_until = 300.0
    fleet.barrier().hold(lease_s=50.0)
    granted_at = fleet.now
    assert 300 <= granted_at <= 301
    asked_at, words = fleet.spoken[-1]
    assert words["hold_s"] == 50.0
    assert granted_at - asked_at <= 6.0
    assert 40 <= len(fleet.spoken) <= 65


def test_a_lease_that_ended_while_the_trainer_stood_still_is_no_hold(fleet: Coordinator) -> None:
    """`scontrol suspend`: its request is heeded by being over."""
    fleet.starting_until = 90.0
    fleet.at(5.0, lambda: fleet.pass_time(80.0))
    held = fleet.barrier().hold(lease_s=30.0)
    assert held.state.clients["trainer"]["hold"] is True
    assert 90 <= fleet.now <= 91


def test_a_slow_echo_of_a_short_lease_is_an_echo(fleet: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared file system may be seconds late: by then it has been asked for again."""
    late: list[tuple[float, bytes]] = []

    def read(path: str) -> bytes:
        late.append((fleet.now, fleet.path.read_bytes()))
        return next(raw for at, raw in reversed(late) if at <= fleet.now - 2.0 or raw is late[0][1])

    barrier = Barrier(fleet.path, clock=lambda: fleet.now, sleep=fleet.sleep, read=read)
    barrier.hold(lease_s=10.0, timeout=30)
    assert fleet.now < 6


def test_a_further_hold_renews_the_lease(fleet: Coordinator) -> None:
    barrier = fleet.barrier()
    barrier.hold(lease_s=100)
    fleet.pass_time(80)
    state = barrier.hold(lease_s=100).state
    assert state.clients["trainer"]["seq"] == fleet.words()["seq"] == 2
    fleet.pass_time(80)
    assert fleet.echoes["trainer"]["hold"] is True
    fleet.pass_time(30)
    assert fleet.echoes["trainer"]["hold"] is False


def test_a_renewal_that_fails_leaves_the_earlier_lease(fleet: Coordinator) -> None:
    barrier = fleet.barrier()
    barrier.hold(lease_s=100)
    fleet.pass_time(40)
    fleet.deaf = True
    with pytest.raises(BarrierTimeout):
        barrier.hold(lease_s=500, timeout=10)
    assert fleet.words()["hold_s"] == pytest.approx(50, abs=1.0)


def test_an_announcement_in_a_hold_keeps_what_is_left_of_it(fleet: Coordinator) -> None:
    barrier = fleet.barrier()
    with barrier.hold(lease_s=100):
        fleet.pass_time(30)
        state = barrier.announce("syncing")
        assert fleet.words()["hold_s"] == pytest.approx(70, abs=1.0)
        assert state.clients["trainer"]["hold"] is True
    assert fleet.words()["phase"] == "syncing"
    assert fleet.words()["hold_s"] == 0.0


def test_after_a_lease_has_ended_everything_goes_on(fleet: Coordinator) -> None:
    barrier = fleet.barrier()
    with barrier.hold(lease_s=20):
        fleet.pass_time(30)
        assert barrier.current().clients["trainer"]["hold"] is False
        barrier.announce("training")
        assert fleet.words()["hold_s"] == 0.0  # what has ended does not come to life again
    assert barrier.release().clients["trainer"]["hold"] is False
    assert barrier.hold().state.clients["trainer"]["hold"] is True


def test_a_hold_of_a_trainer_that_was_started_again_is_released_by_the_next(fleet: Coordinator) -> None:
    fleet.barrier().hold(lease_s=10_000)
    assert fleet.barrier().release().clients["trainer"]["hold"] is False
    assert fleet.words()["seq"] == 2


@pytest.mark.parametrize("lease_s", [0, -1.0, float("inf"), float("nan")])
def test_a_lease_is_a_time(lease_s: float, fleet: Coordinator) -> None:
    with pytest.raises(ValueError, match="seconds above 0"):
        fleet.barrier().hold(lease_s=lease_s)
    assert fleet.files() == []


# ------------------------------------------------------------------------------------- what wait_ready says by itself


def test_whoever_waits_says_so_again_and_again_and_takes_it_back(fleet: Coordinator) -> None:
    fleet.phase = "waiting"
    fleet.tick()
    fleet.at(65.0, lambda: setattr(fleet, "phase", "ready"))
    fleet.barrier().wait_ready()
    fleet.tick()
    said = [(round(at), words["waiting_s"]) for at, words in fleet.spoken]
    assert [waiting_s for _, waiting_s in said] == [30.0] * (len(said) - 1) + [0.0]
    assert said[0][0] <= 3  # once the coordinator is known to live
    pauses = [b - a for (a, _), (b, _) in itertools.pairwise(said[:-1])]
    assert len(pauses) >= 5
    assert all(9 <= pause <= 13 for pause in pauses)
    assert said[-1][0] <= 67
    assert {(words["phase"], words["hold_s"]) for _, words in fleet.spoken} == {("", 0.0)}


@pytest.mark.parametrize("end", ["timeout", "failed", "lost", "needs_weights", "interrupted"])
def test_the_word_is_taken_back_however_the_wait_ends(end: str, fleet: Coordinator) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    fleet.phase = "waiting"
    fleet.tick()
    expected: dict[str, type[BaseException]] = {
        "timeout": BarrierTimeout, "failed": FleetFailed, "lost": CoordinatorLost, "needs_weights": WeightsNeeded,
        "interrupted": KeyboardInterrupt,
    }  # fmt: skip
    if end == "lost":
        fleet.dies_at = 40.0
    elif end == "interrupted":
        fleet.at(40.0, interrupt)
    elif end != "timeout":
        fleet.at(40.0, lambda: setattr(fleet, "phase", end))
    with pytest.raises(expected[end]):
        fleet.barrier().wait_ready(timeout=40 if end == "timeout" else 300)
    assert fleet.words()["waiting_s"] == 0.0
    assert fleet.words()["seq"] > 3


@pytest.mark.parametrize("phase", ["ready", "needs_weights", "failed", "stopped", "missing", "other job"])
def test_a_reader_writes_nothing_unless_it_waits_below_min_ready(phase: str, fleet: Coordinator) -> None:
    fleet.phase = phase if phase in ("ready", "needs_weights", "failed", "stopped") else "waiting"
    if phase == "missing":
        fleet.dies_at = -1.0
        fleet.path.unlink()
    fleet.tick()
    barrier = fleet.barrier(job="9" if phase == "other job" else "")
    barrier.current()
    barrier.is_current("actor/0", 1)
    with pytest.raises(BarrierError):
        barrier.wait_ready(after_epoch=99, timeout=50)
    assert fleet.files() == []


def test_a_dead_coordinators_word_is_not_answered_and_a_look_is_no_wait(fleet: Coordinator) -> None:
    fleet.phase = "waiting"
    fleet.tick()
    barrier = fleet.barrier()
    barrier.current()
    fleet.sleep(1.0)
    assert barrier.current().confirmed
    with pytest.raises(BarrierTimeout):
        barrier.wait_ready(timeout=0)
    assert fleet.files() == []
    fleet.dies_at = fleet.now
    with pytest.raises(BarrierTimeout):
        fleet.barrier().wait_ready(timeout=100)
    assert fleet.files() == []


@pytest.mark.parametrize("why", ["no directory", "a file", "no right"])
def test_a_reader_waits_also_where_it_cannot_write(
    why: str, fleet: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.clients.rmdir()
    if why == "a file":
        fleet.clients.write_text("")
    if why == "no right":
        fleet.clients.mkdir()
        opened, code = os.open, errno.EACCES

        def refusing(path: Any, *args: Any) -> int:
            if "clients" in str(path):
                raise OSError(code, os.strerror(code))
            return opened(path, *args)

        monkeypatch.setattr(os, "open", refusing)
    fleet.deaf = True
    fleet.phase = "waiting"
    fleet.tick()
    fleet.at(40.0, lambda: setattr(fleet, "phase", "ready"))
    assert fleet.barrier().wait_ready().phase == "ready"
    assert all(pause >= 0.75 for pause in fleet.sleeps)  # a mere "I wait" is not tried again and again
    if why == "no directory":
        assert not fleet.clients.exists()


def test_a_wait_of_another_process_keeps_what_was_announced(fleet: Coordinator) -> None:
    """All ranks of a trainer may wait, and only one of them speaks."""
    fleet.barrier().announce("training")
    fleet.phase = "waiting"
    rank_1 = fleet.barrier()
    with pytest.raises(BarrierTimeout):
        rank_1.wait_ready(timeout=25)
    assert fleet.words()["seq"] > 2
    assert fleet.words()["phase"] == "training"
    assert {words["phase"] for _, words in fleet.spoken} == {"training"}


def test_a_wait_of_another_process_does_not_end_a_hold(fleet: Coordinator) -> None:
    fleet.barrier().hold(lease_s=50)
    fleet.phase = "waiting"
    rank_1 = fleet.barrier()
    with pytest.raises(BarrierTimeout):
        rank_1.wait_ready(timeout=40)
    assert (fleet.words()["seq"], fleet.echoes["trainer"]["hold"]) == (1, True)
    with pytest.raises(BarrierTimeout):
        rank_1.wait_ready(timeout=60)
    assert 30.0 in {words["waiting_s"] for at, words in fleet.spoken if at > 50}  # the lease has ended by now


def test_a_wait_of_another_process_does_not_take_back_what_is_asked_just_now(fleet: Coordinator) -> None:
    fleet.starting_until = 60.0
    fleet.phase = "waiting"
    fleet.tick()

    def wait() -> None:
        rank_1 = Barrier(fleet.path, clock=lambda: fleet.now, sleep=sleep)
        with pytest.raises(BarrierTimeout):
            rank_1.wait_ready(timeout=30)

    def sleep(seconds: float) -> None:
        fleet.now += max(seconds, 1e-6)
        fleet.tick()

    fleet.at(5.0, wait)
    fleet.barrier().hold(lease_s=600)
    assert {words["waiting_s"] for _, words in fleet.spoken} == {0.0}
    assert all(words["hold_s"] == 600.0 for _, words in fleet.spoken)


def test_only_the_last_of_several_threads_takes_the_word_back(fleet: Coordinator) -> None:
    fleet.phase = "waiting"
    fleet.tick()
    barrier = fleet.barrier()

    def wait_too() -> None:
        with pytest.raises(BarrierTimeout):
            barrier.wait_ready(timeout=5)
        assert fleet.words()["waiting_s"] == 30.0
        barrier.announce("generating")
        assert (fleet.words()["waiting_s"], fleet.words()["phase"]) == (30.0, "generating")

    fleet.at(13.0, wait_too)
    with pytest.raises(BarrierTimeout):
        barrier.wait_ready(timeout=40)
    assert not fleet.plans
    assert (fleet.words()["waiting_s"], fleet.words()["phase"]) == (0.0, "generating")


def test_nobody_waits_for_a_fleet_that_he_holds_himself(fleet: Coordinator) -> None:
    barrier = fleet.barrier()
    with barrier.hold(lease_s=100):
        assert barrier.wait_ready(timeout=10).phase == "ready"
        fleet.phase = "waiting"
        fleet.tick()
        with pytest.raises(BarrierError, match=r"client trainer holds the fleet that it waits for.*release") as caught:
            barrier.wait_ready()
        assert type(caught.value) is BarrierError
        fleet.pass_time(101)  # the lease has ended: what it waits for may come
        with pytest.raises(BarrierTimeout):
            barrier.wait_ready(timeout=10)
    with pytest.raises(BarrierTimeout):
        barrier.wait_ready(timeout=10)


def test_a_wait_says_why_nothing_is_started(fleet: Coordinator) -> None:
    fleet.phase = "waiting"
    why = "waits until a client announces 'syncing'"
    fleet.fields = {
        "may_start": why,
        "pools": [{"name": "actor", "phase": "waiting", "ready": 0, "desired": 2, "min_ready": 1, "may_start": why}],
    }
    fleet.tick()
    barrier = fleet.barrier()
    assert (barrier.current().may_start, barrier.current().pools[0].may_start) == (why, why)
    with pytest.raises(BarrierTimeout, match="actor may not start: waits until a client announces 'syncing'"):
        barrier.wait_ready(timeout=10)


# -------------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def living(tmp_path: Path) -> Iterator[Coordinator]:
    """A coordinator in a thread of its own, in real time."""
    fleet = Coordinator(tmp_path)
    stop = threading.Event()
    wrong: list[BaseException] = []

    def live() -> None:
        while not stop.wait(0.005):
            fleet.now = time.monotonic()
            try:
                fleet.tick()
            except BaseException as error:
                wrong.append(error)
                return

    fleet.now = time.monotonic()
    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield fleet
    finally:
        stop.set()
        thread.join()
    assert wrong == []


def test_threads_share_a_barrier(living: Coordinator) -> None:
    barrier = Barrier(living.path)
    problems: list[BaseException] = []

    def speak(index: int) -> None:
        try:
            for round_ in range(5):
                if index % 3 == 0:
                    barrier.announce(module._PHASES[round_ % 3], timeout=60)
                elif index % 3 == 1:
                    barrier.ack_weights(1, Snapshot((only_group(),), 1, 1), timeout=60)
                else:
                    barrier.hold(lease_s=600, timeout=60)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=speak, args=(index,)) for index in range(6)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert problems == []
    assert [ack["n"] for ack in living.acks()] == list(range(1, 11))
    assert living.words()["seq"] >= 20
    assert living.words()["hold_s"] > 500
    assert barrier.release().clients["trainer"]["hold"] is False
    assert living.files() == ["trainer.acks.jsonl", "trainer.json"]


def test_threads_write_one_after_the_other(living: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = Barrier(living.path)
    overlaps: list[bool] = []
    again, second = threading.Event(), threading.Thread(target=lambda: barrier.announce("syncing", timeout=60))

    def replacing(staged: str, path: str) -> None:
        if second.ident is None:
            second.start()
            overlaps.append(again.wait(0.5))
        else:
            again.set()
        _replace(staged, path)

    monkeypatch.setattr(os, "replace", replacing)
    try:
        barrier.announce("training", timeout=60)
    finally:
        second.join()
    assert overlaps == [False]
    assert (living.words()["seq"], living.words()["phase"]) == (2, "syncing")
