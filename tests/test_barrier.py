"""The trainer's client of the barrier file: what it believes, what it ignores, when it gives up."""

from __future__ import annotations

import ast
import contextlib
import errno
import json
import os
import pickle
import subprocess
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
    State,
    WeightsNeeded,
)

SOURCE = Path(module.__file__)
HEARTBEAT_S = 5.0
LOST_S = 120.0
GRACE_S = 60.0


def group(id: str = "actor/0", incarnation: int = 1, **fields: Any) -> dict[str, Any]:
    index = int(id.rpartition("/")[2])
    return {
        "id": id,
        "phase": "ready",
        "serving": True,
        "incarnation": incarnation,
        "weights": "none",
        "weights_version": None,
        "urls": [f"http://n{index}:18000"],
        "endpoints": {"session": [f"http://n{index}:18003"]},
        "master": f"n{index}:18001",
        "since": "2026-11-22T03:00:00Z",
        "reason": "",
    } | fields


def document(**fields: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "run": "qwen3-moe-rl",
        "job": "123456",
        "restart_count": 0,
        "term": 1,
        "seq": 1,
        "heartbeat_s": HEARTBEAT_S,
        "epoch": 7,
        "phase": "ready",
        "reason": "",
        "message": "",
        "clients": {"trainer": {"phase": "generating", "seq": 12}},
        "pools": [{"name": "actor", "phase": "ready", "ready": 2, "desired": 3, "min_ready": 2}],
        "groups": [group()],
    } | fields


def encode(**fields: Any) -> bytes:
    return json.dumps(document(**fields)).encode()


def beats(now: float) -> int:
    """Return the seq of a coordinator that has been alive since time 0."""
    return 1 + int(now // HEARTBEAT_S)


def alive(**fields: Any) -> Callable[[float], bytes]:
    return lambda now: encode(seq=beats(now), **fields)


def dead(**fields: Any) -> Callable[[float], bytes]:
    return lambda now: encode(**{"seq": 4711, **fields})


class World:
    """A clock that only sleeping moves, and a file whose content is a function of the time."""

    def __init__(self, word: Callable[[float], bytes]) -> None:
        self.now = 0.0
        self.word = word
        self.sleeps: list[float] = []
        self.reads = 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.sleeps.append(seconds)
        self.now += seconds

    def read(self, path: str) -> bytes:
        self.reads += 1
        return self.word(self.now)

    def barrier(self, **options: Any) -> Barrier:
        return Barrier("/run/barrier.json", clock=self.clock, sleep=self.sleep, read=self.read, **options)


def failing(error: OSError) -> Callable[[float], bytes]:
    def word(now: float) -> bytes:
        raise error

    return word


def os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))  # becomes FileNotFoundError and the like by itself


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "ROLLOUT_BARRIER"):
        monkeypatch.delenv(name, raising=False)


# ----------------------------------------------------------------------------------------------- what it says


def test_every_field_of_the_file_is_there() -> None:
    stale = group("actor/1", 2, serving=False, weights="stale", weights_version=41, reason="restarted")
    pool = {"name": "actor", "phase": "ready", "ready": 2, "desired": 3, "min_ready": 2, "weights_version": 42}
    content: dict[str, Any] = {
        "reason": "degraded",
        "message": "on 1 of 2",
        "may_start": "held by trainer",
        "pools": [pool | {"probes": "paused", "restarts": "at_barrier", "may_start": "held by trainer"}],
        "groups": [group(), stale | {"world_size": 16, "changed": 6}],
    }
    state = World(dead(**content)).barrier().current()
    assert state == State(
        phase="ready",
        reason="degraded",
        message="on 1 of 2",
        epoch=7,
        term=1,
        seq=4711,
        run="qwen3-moe-rl",
        job="123456",
        restart_count=0,
        heartbeat_s=5.0,
        pools=(module.Pool("actor", "ready", 2, 3, 2, 42, "paused", "at_barrier", "held by trainer"),),
        groups=(
            module.Group(
                "actor/0", "ready", True, 1, "none", None, ("http://n0:18000",),
                {"session": ("http://n0:18003",)}, "n0:18001", "2026-11-22T03:00:00Z", "", 0, 7,
            ),
            module.Group(
                "actor/1", "ready", False, 2, "stale", 41, ("http://n1:18000",),
                {"session": ("http://n1:18003",)}, "n1:18001", "2026-11-22T03:00:00Z", "restarted", 16, 6,
            ),
        ),
        clients={"trainer": {"phase": "generating", "seq": 12}},
        confirmed=False,
        may_start="held by trainer",
    )  # fmt: skip
    assert state.groups[0].pool == "actor"


def test_urls_and_endpoints_are_those_of_serving_groups() -> None:
    groups = [group("actor/0"), group("actor/1", serving=False), group("reward/2", endpoints={})]
    state = World(dead(groups=groups)).barrier().current()
    assert state.urls == ("http://n0:18000", "http://n2:18000")
    assert state.endpoint("session") == ("http://n0:18003",)
    assert state.endpoint("other") == ()


def test_unknown_fields_are_ignored_and_optional_ones_may_lack() -> None:
    small = {"id": "actor/0", "phase": "ready", "serving": True, "incarnation": 3, "colour": "red"}
    top = {"schema": 1, "phase": "ready", "epoch": 1, "term": 1, "seq": 1, "groups": [small], "new": {}}
    barrier = World(lambda now: json.dumps(top).encode()).barrier()
    assert barrier.is_current("actor/0", 3)
    assert barrier.current().heartbeat_s == 5.0


def test_values_and_errors_survive_pickling_and_values_cannot_be_changed() -> None:
    state = World(dead()).barrier().current()
    assert pickle.loads(pickle.dumps(state)) == state
    with pytest.raises(AttributeError):
        state.phase = "failed"  # type: ignore[misc]
    errors: list[BarrierError] = [
        BarrierError("a"),
        BarrierTimeout("b"),
        CoordinatorLost("c"),
        FleetFailed("budget_spent", "d"),
        WeightsNeeded(state.groups, "e"),
    ]
    for error in errors:
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert vars(copy) == vars(error)
        assert len(str(copy)) == 1
        assert str(copy) == str(error)


def test_a_newer_schema_asks_for_a_newer_client() -> None:
    with pytest.raises(BarrierError, match=r"schema 2.*knows only 1.*update this copy"):
        World(dead(schema=2)).barrier().current()


# ------------------------------------------------------------------------------------------------- which file


def test_path_comes_from_the_argument_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BarrierError, match="ROLLOUT_BARRIER is not set"):
        Barrier()
    with pytest.raises(BarrierError, match=r"is a directory: .*barrier\.json"):
        Barrier(tmp_path)
    (tmp_path / "barrier.json").write_bytes(encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROLLOUT_BARRIER", "barrier.json")
    from_environment, from_argument = Barrier(), Barrier(tmp_path / "barrier.json")
    monkeypatch.chdir("/")  # as trainers do
    assert from_environment.current().epoch == 7
    assert from_argument.current() == from_environment.current()


OTHER = "waiting"
OURS = "ready"


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ({}, {}, OURS),
        ({"SLURM_JOB_ID": "123456"}, {}, OURS),
        ({"SLURM_JOB_ID": "123456", "SLURM_RESTART_COUNT": "0"}, {}, OURS),
        ({"SLURM_JOB_ID": "123457"}, {}, OTHER),
        ({"SLURM_JOB_ID": "123456", "SLURM_RESTART_COUNT": "1"}, {}, OTHER),
        ({"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "3"}, {"job": 123456}, OURS),
        ({"SLURM_JOB_ID": "1"}, {"job": "123456", "restart_count": 1}, OTHER),
        ({"SLURM_JOB_ID": "123456", "SLURM_RESTART_COUNT": "1"}, {"restart_count": 0}, OURS),
        ({"SLURM_JOB_ID": "1"}, {"job": ""}, OURS),
        ({}, {"job": "1"}, OTHER),
        ({}, {"restart_count": 1}, OTHER),
    ],
)
def test_only_the_own_jobs_file_counts(
    environment: dict[str, str], options: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    barrier = World(dead()).barrier(**options)
    state = barrier.current()
    assert state.phase == expected
    assert state.reason == ("other_job" if expected == OTHER else "")
    assert barrier.is_current("actor/0", 1) == (expected == OURS)


def test_a_reader_outside_slurm_takes_the_file_of_a_requeued_job() -> None:
    assert World(dead(restart_count=1)).barrier().current().phase == "ready"


def test_the_file_of_a_run_outside_slurm_is_taken_inside_a_job_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert World(dead(job="")).barrier().current().phase == "ready"


# ------------------------------------------------------------------------------------------- transient faults


FAULTS: dict[str, Callable[[float], bytes]] = {
    "ESTALE": failing(os_error(errno.ESTALE)),
    "ENOENT": failing(os_error(errno.ENOENT)),
    "EIO": failing(os_error(errno.EIO)),
    "EACCES": failing(os_error(errno.EACCES)),
    "empty": lambda now: b"",
    "half": lambda now: encode()[:100],
    "zeros": lambda now: b"\0" * 300,
    "not UTF-8": lambda now: b"\xff\xfe\xfd",
    "a list": lambda now: b"[]",
    "no fields": lambda now: b'{"schema": 1}',
    "wrong type": lambda now: encode(groups=[3]),
    "wrong number": lambda now: encode(epoch="many"),
    "wrong clients": lambda now: encode(clients={"trainer": 3}),
    "wrong pools": lambda now: encode(pools=[{"name": "actor"}]),
}


@pytest.fixture(params=list(FAULTS))
def fault(request: pytest.FixtureRequest) -> Callable[[float], bytes]:
    return FAULTS[request.param]


def test_a_transient_fault_is_retried_within_one_look(
    fault: Callable[[float], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(dead())
    world.word = lambda now: fault(now) if world.reads < 4 else encode()
    listed: list[tuple[str, int]] = []
    scandir = os.scandir

    def recording(path: str) -> Iterator[Any]:
        listed.append((path, world.reads))
        return scandir("/")

    monkeypatch.setattr(os, "scandir", recording)
    assert world.barrier().current().phase == "ready"
    assert world.now < 1.0
    assert world.sleeps == sorted(world.sleeps)  # backs off
    assert listed == [("/run", 1), ("/run", 2), ("/run", 3)]  # before every retry, and only then


def test_the_last_good_value_is_kept_for_a_grace_time(fault: Callable[[float], bytes]) -> None:
    world = World(dead())
    barrier = world.barrier()
    good = barrier.current()
    world.word = fault
    while world.now < GRACE_S - 2:
        assert barrier.current() == good
        assert barrier.is_current("actor/0", 1)
        world.now += 1
    world.now = GRACE_S + 1
    state = barrier.current()
    assert (state.phase, state.urls, state.groups, state.epoch) == ("waiting", (), (), 7)
    assert state.reason == ("no_file" if fault is FAULTS["ENOENT"] else "unreadable")
    assert state.message
    assert not barrier.is_current("actor/0", 1)
    world.word = dead()
    assert barrier.current() == good


def test_a_file_that_was_never_there_means_waiting(fault: Callable[[float], bytes]) -> None:
    state = World(fault).barrier().current()
    assert (state.phase, state.groups, state.confirmed) == ("waiting", (), False)
    assert state.reason == ("no_file" if fault is FAULTS["ENOENT"] else "unreadable")


def test_a_lasting_fault_costs_one_long_look_and_then_short_ones() -> None:
    world = World(failing(os_error(errno.ENOENT)))
    barrier = world.barrier()

    def cost() -> float:
        before = world.now
        barrier.current()
        return world.now - before

    long = cost()
    assert 0.3 < long < 1.0
    assert 0 < cost() < 0.1 * long
    assert 0 < cost() < 0.1 * long
    world.word = dead()
    assert cost() == 0
    world.word = failing(os_error(errno.ENOENT))
    assert cost() == pytest.approx(long)


# ----------------------------------------------------------------------------------------------- late writers


@pytest.mark.parametrize(
    "late",
    [
        {"term": 1, "seq": 900, "epoch": 7},
        {"term": 2, "seq": 9, "epoch": 7},
        {"term": 1, "seq": 900, "epoch": 9},
        {"term": 2, "seq": 11, "epoch": 6},
        {"term": 3, "seq": 1, "epoch": 6},
    ],
)
def test_a_late_writer_loses(late: dict[str, Any]) -> None:
    world = World(lambda now: encode(term=2, seq=10))
    barrier = world.barrier()
    barrier.current()
    world.word = lambda now: encode(**late, groups=[group(incarnation=99)])
    state = barrier.current()
    assert (state.term, state.seq, state.epoch) == (2, 10, 7)
    assert not barrier.is_current("actor/0", 99)
    world.now = GRACE_S + 1  # nor does it win by staying
    state = barrier.current()
    assert (state.phase, state.reason, state.epoch) == ("waiting", "outdated", 7)
    world.word = lambda now: encode(term=2, seq=12)
    assert barrier.current().seq == 12


def test_an_overtaken_read_of_another_thread_loses() -> None:
    world = World(dead())
    barrier = world.barrier()

    def slow_read(now: float) -> bytes:
        world.word = lambda now: encode(seq=12)
        assert barrier.current().seq == 12
        return encode(seq=11)

    world.word = slow_read
    assert barrier.current().seq == 12


# ------------------------------------------------------------------------------------------------- wait_ready


def test_the_first_look_is_unconfirmed_until_seq_moves() -> None:
    world = World(alive())
    world.now = 1.0
    barrier = world.barrier()
    assert not barrier.current().confirmed
    state = barrier.wait_ready()
    assert state.confirmed
    assert (state.phase, state.seq) == ("ready", 2)
    assert HEARTBEAT_S <= world.now <= HEARTBEAT_S + 1.25


def test_a_confirmed_reader_returns_at_once() -> None:
    world = World(alive())
    barrier = world.barrier()
    barrier.wait_ready()
    world.now += 60
    before = world.now
    barrier.wait_ready(timeout=0)
    assert world.now == before


def test_a_new_term_moves_seq_too() -> None:
    world = World(lambda now: encode(term=1, seq=900) if now < 20 else encode(term=2, seq=1))
    state = world.barrier().wait_ready(timeout=30)
    assert (state.term, state.seq) == (2, 1)


def test_a_dead_runs_last_word_is_not_believed() -> None:
    world = World(dead())
    with pytest.raises(CoordinatorLost, match=r"/run/barrier\.json says `ready` .*seq 4711") as caught:
        world.barrier().wait_ready()
    assert LOST_S <= world.now <= LOST_S + 1.25
    assert "120 s" in str(caught.value)
    assert "slurm-rollout up" in str(caught.value)


@pytest.mark.parametrize("phase", ["waiting", "ready"])
def test_a_coordinator_that_falls_silent_is_lost(phase: str) -> None:
    # Ready in an epoch that is not wanted, so that only silence can end the wait.
    world = World(lambda now: encode(seq=beats(min(now, 50.0)), phase=phase))
    with pytest.raises(CoordinatorLost, match=r"for 3[01] s .limit 30 s"):
        world.barrier(lost_after_s=30.0).wait_ready(after_epoch=7)
    assert 80.0 <= world.now <= 82.5


@pytest.mark.parametrize("phase", ["ready", "needs_weights"])
def test_silence_counts_over_several_calls_and_outweighs_the_last_word(phase: str) -> None:
    world = World(lambda now: encode(seq=beats(min(now, 5.0)), phase=phase))
    barrier = world.barrier()
    while world.now <= LOST_S + 4:
        with contextlib.suppress(WeightsNeeded):
            barrier.wait_ready(timeout=20)
        world.now += 1
    world.now += 2
    with pytest.raises(CoordinatorLost):
        barrier.wait_ready(timeout=20)
    assert world.now < LOST_S + 10


def test_a_pause_in_looking_makes_the_next_look_a_first_one() -> None:
    world = World(lambda now: encode(seq=beats(min(now, 3000.0))))
    barrier = world.barrier()
    barrier.wait_ready()
    world.now = 3600.0  # trained for an hour; the coordinator died ten minutes ago, ready until then
    assert not barrier.current().confirmed
    with pytest.raises(CoordinatorLost):
        barrier.wait_ready()
    assert world.now < 3600.0 + LOST_S + 2


def test_a_word_that_aged_between_looks_is_not_confirmed() -> None:
    world = World(lambda now: encode(seq=beats(min(now, 5.0))))
    barrier = world.barrier()
    barrier.wait_ready()
    for _ in range(2):
        world.now += 0.9 * LOST_S
        state = barrier.current()
    assert not state.confirmed


def test_a_suspended_job_is_not_a_lost_coordinator() -> None:
    resumed_at = 10_000.0
    world = World(lambda now: encode(seq=beats(now) if now < 20 or now > resumed_at + 4 else beats(20)))
    barrier = world.barrier()
    barrier.wait_ready()
    world.now = 20.0
    barrier.current()
    world.now = resumed_at  # trainer and coordinator stood still together
    assert barrier.wait_ready(timeout=30).confirmed
    assert resumed_at + 4 < world.now < resumed_at + 6


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES])
def test_a_file_that_stays_away_is_a_lost_coordinator(code: int) -> None:
    world = World(failing(os_error(code)))
    with pytest.raises(CoordinatorLost, match=r"/run/barrier\.json (does not exist|cannot be read: Perm)"):
        world.barrier().wait_ready()
    assert LOST_S <= world.now <= LOST_S + 1.5


def test_a_run_directory_of_another_job_is_named() -> None:
    world = World(alive())
    with pytest.raises(CoordinatorLost, match=r"is of job 123456, restart 0, and wanted is job 9"):
        world.barrier(job="9").wait_ready()
    assert LOST_S <= world.now <= LOST_S + 1.25


def test_a_fault_within_the_grace_time_does_not_stop_a_ready_fleet() -> None:
    world = World(alive())
    barrier = world.barrier()
    barrier.wait_ready()
    world.word = failing(os_error(errno.ESTALE))
    assert barrier.wait_ready(timeout=5).phase == "ready"


@pytest.mark.parametrize(
    ("phase", "said", "reason"),
    [
        ("failed", "below_min_ready", "below_min_ready"),
        ("failed", "", "failed"),
        ("stopped", "operator", "stopped"),
    ],
)
def test_a_fleet_that_will_not_come_back_ends_the_wait(phase: str, said: str, reason: str) -> None:
    def word(now: float) -> bytes:
        if now < 12:
            return encode(seq=beats(now), phase="waiting")
        idle = group(serving=False, phase="failed", reason="budget_spent")
        return encode(seq=beats(12) + 1, phase=phase, reason=said, message="5 restarts", groups=[idle])

    world = World(word)
    with pytest.raises(FleetFailed) as caught:
        world.barrier().wait_ready(after_epoch=100)
    assert caught.value.reason == reason
    for part in (phase, said, "5 restarts", "/run/barrier.json", "actor/0 failed since 2026", "budget_spent"):
        assert part in str(caught.value)
    assert world.now < 12 + 1.25


@pytest.mark.parametrize("phase", ["failed", "stopped"])
def test_an_unconfirmed_last_word_gets_a_moment_to_be_replaced(phase: str) -> None:
    """Second `up` in the same allocation and run directory, the trainer was faster than it."""
    world = World(lambda now: encode(seq=4711, phase=phase) if now < 8 else encode(term=2, seq=beats(now), epoch=8))
    assert world.barrier().wait_ready(timeout=60).term == 2

    world = World(dead(phase=phase))
    with pytest.raises(FleetFailed, match="dead coordinator's last word"):
        world.barrier().wait_ready()
    assert 3 * HEARTBEAT_S <= world.now <= 3 * HEARTBEAT_S + 1.25

    world = World(dead(phase=phase))
    with pytest.raises(FleetFailed):
        world.barrier().wait_ready(timeout=4)
    assert world.now == pytest.approx(4)


def test_stale_groups_that_live_are_asked_weights_for() -> None:
    groups = [
        group("actor/0", weights="acknowledged", weights_version=42),
        group("actor/1", 3, serving=False, weights="stale", weights_version=41),
        group("actor/2", serving=False, weights="stale", urls=[], phase="starting"),
    ]
    world = World(alive(phase="needs_weights", groups=groups))
    with pytest.raises(WeightsNeeded, match="actor/1") as caught:
        world.barrier().wait_ready()
    assert [(g.id, g.incarnation, g.urls) for g in caught.value.groups] == [("actor/1", 3, ("http://n1:18000",))]
    assert world.now >= HEARTBEAT_S  # a dead run's word asks for nothing
    with pytest.raises(BarrierTimeout):
        World(dead(phase="needs_weights", groups=groups)).barrier().wait_ready(timeout=30)


def test_a_timeout_says_what_was_seen() -> None:
    idle = group(serving=False, phase="starting", reason="first_start", urls=[])
    world = World(alive(phase="waiting", message="0 of 2 groups", groups=[idle]))
    with pytest.raises(BarrierTimeout) as caught:
        world.barrier().wait_ready(timeout=33.3)
    assert world.now == pytest.approx(33.3)
    for part in (
        "after 33 s", "/run/barrier.json says `waiting`, 0 of 2 groups", "run qwen3-moe-rl", "job 123456",
        "term 1, seq 7, epoch 7", "actor/0 starting since 2026-11-22T03:00:00Z first_start",
        "slurm-rollout status",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert "dead coordinator" not in str(caught.value)


def test_many_groups_do_not_flood_the_message() -> None:
    groups = [group(f"actor/{i}", serving=False, phase="starting") for i in range(100)]
    with pytest.raises(BarrierTimeout, match=r"actor/4 starting.*; and 95 more groups") as caught:
        World(alive(phase="waiting", groups=groups)).barrier().wait_ready(timeout=10)
    assert "actor/5 " not in str(caught.value)


def test_timeout_zero_is_one_look() -> None:
    world = World(alive())
    with pytest.raises(BarrierTimeout):
        world.barrier().wait_ready(timeout=0)
    assert (world.now, world.reads) == (0.0, 1)


def test_after_epoch_waits_for_a_higher_one() -> None:
    world = World(lambda now: encode(seq=beats(now), epoch=7 if now < 40 else 8))
    barrier = world.barrier()
    assert barrier.wait_ready(after_epoch=6).epoch == 7
    with pytest.raises(BarrierTimeout, match="in an epoch above 7"):
        barrier.wait_ready(after_epoch=7, timeout=10)
    assert barrier.wait_ready(after_epoch=7).epoch == 8
    assert 40 <= world.now <= 41.25


def test_polls_with_jitter_and_never_in_a_tight_loop() -> None:
    world = World(alive(phase="waiting"))
    with pytest.raises(BarrierTimeout):
        world.barrier().wait_ready(timeout=200)
    polls = world.sleeps[:-1]  # the last one is cut by the time-out
    assert all(0.75 <= pause <= 1.25 for pause in polls)
    assert len(set(polls)) > 20
    world = World(alive(phase="waiting"))
    with pytest.raises(BarrierTimeout):
        world.barrier().wait_ready(timeout=2, poll_s=0)
    assert all(0.03 < pause < 0.07 for pause in world.sleeps[:-1])


# ------------------------------------------------------------------------------------------------- is_current


def test_only_the_serving_incarnation_is_current() -> None:
    world = World(dead(groups=[group("actor/0", 3), group("actor/1", 3, serving=False)]))
    barrier = world.barrier()
    assert barrier.is_current("actor/0", 3)
    assert not barrier.is_current("actor/0", 2)
    assert not barrier.is_current("actor/0", 4)
    assert not barrier.is_current("actor/1", 3)
    assert not barrier.is_current("actor/7", 3)
    world.word = dead(seq=4712, groups=[group("actor/0", 4)])
    assert not barrier.is_current("actor/0", 3)
    assert barrier.is_current("actor/0", 4)


def test_unchanged_bytes_are_not_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    parse = module._parse

    def counting(raw: bytes, path: str) -> State:
        parsed.append(raw)
        return parse(raw, path)

    monkeypatch.setattr(module, "_parse", counting)
    world = World(alive())
    barrier = world.barrier()
    for _ in range(1000):
        assert barrier.is_current("actor/0", 1)
        world.now += 0.01
    assert world.reads == 1000
    assert len(parsed) == 2


# ------------------------------------------------------------------------------------------------- real files


HAMMER = """
import json, os, sys, time
path, way = sys.argv[1:]
staged = path + ".staged"
document = json.load(open(path))
seq = 0
while True:
    seq += 1
    document.update(term=1 + seq // 100, seq=seq % 100, epoch=7 + seq, message=str(seq))
    for group in document["groups"]:
        group["incarnation"] = seq
    raw = json.dumps(document).encode()
    if way == "in place":
        with open(path, "r+b") as file:
            file.truncate()
            for start in range(0, len(raw), 5000):
                file.write(raw[start:start + 5000])
                file.flush()
        time.sleep(0.001)  # else it is hardly ever whole
        continue
    with open(staged, "wb") as file:
        file.write(raw)
    if way == "gap":
        os.unlink(path)
    os.replace(staged, path)
"""


@pytest.mark.parametrize("way", ["replace", "gap", "in place"])
def test_a_hammering_writer_never_shows_torn_or_older_state(way: str, tmp_path: Path) -> None:
    """The file replaced atomically, with a gap (as on FUSE), or filled bit by bit (half visible)."""
    path = tmp_path / "barrier.json"
    path.write_bytes(encode(seq=0, message="0", groups=[group(f"actor/{i}", 0) for i in range(50)]))
    barrier = Barrier(path)
    barrier.current()  # a good value for the grace time, in case that the first looks all hit a gap
    problems: list[str] = []

    def look() -> None:
        last = (0, 0, 0)
        distinct: set[tuple[int, int, int]] = set()
        deadline = time.monotonic() + 60
        while len(distinct) < 50 and not problems:
            state = barrier.current()
            this = (state.term, state.seq, state.epoch)
            if this < last:
                problems.append(f"went back from {last} to {this}")
            if state.phase != "ready":
                problems.append(f"{state.phase} {state.reason} {state.message}")
            elif {group.incarnation for group in state.groups} != {int(state.message)}:
                problems.append(f"torn at {this}")
            last = this
            distinct.add(this)
            if time.monotonic() > deadline:
                problems.append(f"saw only {len(distinct)} versions in a minute")

    readers = [threading.Thread(target=look) for _ in range(3)]
    writer = subprocess.Popen([sys.executable, "-c", HAMMER, str(path), way])
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in readers:
            thread.start()
        for thread in readers:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        writer.kill()
        writer.wait()
    assert not problems


def test_waits_for_a_real_coordinator_in_real_time(tmp_path: Path) -> None:
    path = tmp_path / "barrier.json"
    stop = threading.Event()

    def beat() -> None:
        seq = 0
        while not stop.wait(0.02):
            seq += 1
            staged = tmp_path / ".barrier.json"
            staged.write_bytes(encode(seq=seq, phase="waiting" if seq < 5 else "ready"))
            staged.replace(path)

    writer = threading.Thread(target=beat)
    try:
        writer.start()
        state = Barrier(path).wait_ready(timeout=30, poll_s=0.05)
    finally:
        stop.set()
        writer.join()
    assert state.confirmed
    assert state.urls == ("http://n0:18000",)


# -------------------------------------------------------------------------------------------- alone and cheap


def test_imports_only_the_standard_library_in_python_3_9_syntax() -> None:
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 9))
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module
            imported.add(node.module)
    assert imported
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_import_loads_nothing_heavy() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); import barrier; "
        "print(*sorted({'json', 'dataclasses', 'inspect', 'random', 'asyncio', 'subprocess', 'logging', "
        "'pathlib', 'tempfile', 'socket'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == ""
