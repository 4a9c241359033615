"""The run directory as it is written: who may, with which modes, and what a later reader finds."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import proc, store
from slurm_rollout.cli import up
from slurm_rollout.core import codec
from slurm_rollout.core.model import ClientState, Event, Failure, GroupState, Request, RunState, StepState
from slurm_rollout.core.phases import Phase, PoolPhase, Reason
from slurm_rollout.core.plan import FleetPlan, SlurmSettings
from slurm_rollout.errors import CorruptFile, LeaseLost, RunDirBusy, StoreError
from slurm_rollout.rundir import RunDir, read_events
from slurm_rollout.store import Store
from slurm_rollout.testing.world import make_plan


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run directory that does not exist yet; locks are the test's own."""
    (tmp_path / "node").mkdir()
    monkeypatch.setenv("ROLLOUT_TMPDIR", str(tmp_path / "node"))
    return RunDir(tmp_path / "runs" / "7")


@pytest.fixture
def ready(run: RunDir) -> RunDir:
    """A prepared one."""
    store.prepare(run, make_plan(1))
    return run


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def opened(run: RunDir, term: int, *, private: bool = False) -> Store:
    found = Store(run, term, private=private)
    found.open()
    return found


def some_state(**changes: Any) -> RunState:
    return replace(RunState(run_id="abc", job="12", restart_count=0, term=1), **changes)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --------------------------------------------------------------------------------------------------------------- modes


def fill(run: RunDir, *, private: bool) -> None:
    store.prepare(run, replace(make_plan(1), private=private))
    store.write_lease(run, job="12", restart_count=0, ended=False)
    writer = opened(run, 1, private=private)
    writer.add_events([Event(type="up")], time.time())
    writer.write_state(some_state())
    writer.write_barrier({"seq": 1})
    writer.write_status({"seq": 1})
    writer.close()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o027])
def test_others_may_read_the_status_and_nothing_else(run: RunDir, mask: int) -> None:
    with umask(mask):
        fill(run, private=False)
    assert mode(run.path) == 0o711, "to be entered, not listed"
    assert mode(run.path.parent) & 0o011 == 0o011, "the way to it"
    for path in run.path.rglob("*"):
        assert mode(path) & 0o077 == (0o044 if path == run.status else 0), path
        assert mode(path) & 0o600 == 0o600, path


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_of_a_private_run_others_may_read_nothing(run: RunDir, mask: int) -> None:
    with umask(mask):
        fill(run, private=True)
    for path in (run.path, *run.path.rglob("*")):
        assert mode(path) & 0o077 == 0, path
        assert mode(path) & 0o600 == 0o600, path


def test_a_directory_that_was_there_keeps_its_mode(run: RunDir) -> None:
    """`--run-dir .` must not take a project's directory from the project."""
    run.path.mkdir(parents=True)
    run.path.chmod(0o2775)
    run.path.parent.chmod(0o750)
    fill(run, private=False)
    assert (mode(run.path), mode(run.path.parent)) == (0o2775, 0o750)
    assert mode(run.plan) == 0o600


def test_what_cannot_be_made_is_named(run: RunDir) -> None:
    run.path.parent.write_text("a file")
    with pytest.raises(StoreError, match=rf"{run.path.parent}.*must be writable; nothing was started"):
        store.prepare(run, make_plan(1))
    run.path.parent.unlink()
    run.path.mkdir(parents=True)
    run.logs.write_text("a file")
    with pytest.raises(StoreError, match=rf"{run.logs}: File exists"):
        store.prepare(run, make_plan(1))


def test_a_run_directory_is_prepared_again_with_another_plan(run: RunDir) -> None:
    store.prepare(run, make_plan(1))
    (run.requests / "x.json").write_text("{}")
    other = replace(make_plan(2), name="other", slurm=SlurmSettings(python="/opt/python"))
    store.prepare(run, other)
    assert store.load_plan(run) == other
    assert (run.requests / "x.json").exists()


def test_a_plan_that_is_missing_or_broken_is_named(ready: RunDir) -> None:
    ready.plan.write_text("[]")
    with pytest.raises(CorruptFile, match=str(ready.plan)):
        store.load_plan(ready)
    ready.plan.write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptFile, match=str(ready.plan)):
        store.load_plan(ready)
    ready.plan.unlink()
    with pytest.raises(StoreError, match=r"plan\.json is missing: `slurm-rollout up` writes it"):
        store.load_plan(ready)


# ------------------------------------------------------------------------------------------------------------- writing


def test_a_reader_never_sees_half_a_file(ready: RunDir) -> None:
    writer = opened(ready, 1)
    writer.write_state(some_state())
    states = [some_state(epoch=n, run_id="x" * (n * 997 % 50_000)) for n in range(200)]
    done = threading.Event()
    broken: list[Exception] = []

    def read() -> None:
        while not done.is_set():
            try:
                json.loads(ready.state.read_text())
            except (OSError, ValueError) as e:
                broken.append(e)

    reader = threading.Thread(target=read)
    reader.start()
    for state in states:
        writer.write_state(state)
    done.set()
    reader.join()
    writer.close()
    assert not broken
    assert codec.decode(RunState, json.loads(ready.state.read_text())["state"]) == states[-1]
    assert [p.name for p in ready.staging(1).iterdir()] == []


def test_a_write_that_fails_leaves_the_old_file(ready: RunDir) -> None:
    writer = opened(ready, 1)
    writer.write_barrier({"seq": 1})
    ready.staging(1).joinpath("barrier.json").mkdir()  # as good as a full disk
    with pytest.raises(OSError, match="barrier"):
        writer.write_barrier({"seq": 2})
    writer.close()
    assert store.last_seq(ready) == 1


@pytest.mark.parametrize(("text", "seq"), [(None, 0), ("", 0), ("[]", 0), ('{"seq": "x"}', 0), ('{"seq": 41}', 41)])
def test_the_last_seq_is_what_readers_may_have_seen(ready: RunDir, text: str | None, seq: int) -> None:
    if text is not None:
        ready.barrier.write_text(text)
    assert store.last_seq(ready) == seq


# ------------------------------------------------------------------------------------------------- the lease of a term


def write_all(writer: Store, word: str) -> list[Any]:
    """Write every file; return what the attempts raised."""
    raised: list[Any] = []
    for write in (
        lambda: writer.write_state(some_state(run_id=word)),
        lambda: writer.write_barrier({"seq": 1, "word": word}),
        lambda: writer.write_status({"word": word}),
        lambda: writer.add_events([Event(type=word)], 1.0),
    ):
        try:
            write()
        except Exception as e:
            raised.append(type(e))
    return raised


def words(run: RunDir) -> list[str]:
    return [path.read_text() for path in sorted(run.path.glob("*.json*"))]


def test_a_writer_that_was_taken_over_changes_nothing(ready: RunDir) -> None:
    old = opened(ready, 1)
    assert write_all(old, "old") == []
    new = opened(ready, 2)
    assert write_all(new, "new") == []
    before = words(ready)
    assert write_all(old, "late") == [LeaseLost] * 4
    assert words(ready) == before
    assert [p.name for p in ready.path.glob(".t*")] == [".t2"]
    with pytest.raises(LeaseLost, match=r"took over\. This one writes and stops nothing"):
        old.write_state(some_state())
    for writer in (old, new):
        writer.close()


@pytest.mark.parametrize("moment", ["open", "replace"])
def test_a_takeover_in_the_middle_of_a_write_wins(ready: RunDir, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    old = opened(ready, 1)
    old.write_barrier({"seq": 1})
    real, new = getattr(os, moment), Store(ready, 2, private=False)

    def taken_over(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        new.open()
        return real(*args, **kwargs)

    monkeypatch.setattr(os, moment, taken_over)
    with pytest.raises(LeaseLost):
        old.write_barrier({"seq": 9})
    assert store.last_seq(ready) == 1
    assert [p.name for p in ready.path.glob(".t*")] == [".t2"]
    for writer in (old, new):
        writer.close()


def test_a_writer_in_full_flight_is_stopped_by_a_takeover(ready: RunDir) -> None:
    """A directory that is emptied file by file can be written into meanwhile, and then it stays."""
    for term in range(1, 60, 2):
        old, lost = opened(ready, term), threading.Event()

        def write(old: Store = old, lost: threading.Event = lost) -> None:
            try:
                while True:
                    old.write_barrier({"seq": 1})
                    old.write_status({"word": "old"})
            except LeaseLost:
                lost.set()

        thread = threading.Thread(target=write)
        thread.start()
        while not ready.barrier.exists():
            time.sleep(0.001)
        new = opened(ready, term + 1)
        new.write_barrier({"seq": 2})
        thread.join(5)
        assert lost.is_set()
        assert store.last_seq(ready) == 2
        old.close()
        new.close()
    assert len(list(ready.path.glob(".t*"))) <= 2


def test_a_late_starter_of_an_older_term_takes_nothing_over(ready: RunDir) -> None:
    new = opened(ready, 2)
    with pytest.raises(LeaseLost):
        Store(ready, 1, private=False).open()
    assert write_all(new, "new") == []
    new.close()


def test_a_run_directory_that_cannot_be_written_is_no_lost_lease(ready: RunDir) -> None:
    writer = opened(ready, 1)
    ready.barrier.mkdir()  # a rename onto it fails
    with pytest.raises(IsADirectoryError):
        writer.write_barrier({"seq": 1})
    writer.close()


def test_every_term_is_above_all_that_left_a_trace(ready: RunDir) -> None:
    assert store.next_term(ready) == 1
    opened(ready, 1).close()
    assert store.next_term(ready) == 2
    writer = opened(ready, 6)
    assert store.next_term(ready) == 7
    writer.write_state(some_state(term=9))
    writer.close()
    assert store.next_term(ready) == 10
    (ready.path / ".tmp").mkdir()
    ready.state.write_bytes(b"\xff broken")
    assert store.next_term(ready) == 7, "the staging directory still tells"


# -------------------------------------------------------------------------------------------------------------- events


def test_events_are_numbered_lines_without_empty_fields(ready: RunDir) -> None:
    writer = opened(ready, 3)
    events = [
        Event(type="up", message="term 3"),
        Event(type="failure", group="actor/0", incarnation=2, reason="engine_exited", rank=0, node="n1"),
        Event(type="epoch", data={"epoch": 0}),
    ]
    lines = writer.add_events(events[:2], 1000.12345)
    lines += writer.add_events([], 1001.0)
    lines += writer.add_events(events[2:], 1002.0)
    writer.close()
    assert lines == [
        {"n": 1, "at": 1000.123, "term": 3, "type": "up", "message": "term 3"},
        {
            "n": 2,
            "at": 1000.123,
            "term": 3,
            "type": "failure",
            "group": "actor/0",
            "incarnation": 2,
            "reason": "engine_exited",
            "rank": 0,
            "node": "n1",
        },
        {"n": 3, "at": 1002.0, "term": 3, "type": "epoch", "data": {"epoch": 0}},
    ]
    assert list(read_events(ready)) == lines


def test_a_half_written_last_event_hides_no_other(ready: RunDir) -> None:
    writer = opened(ready, 1)
    writer.add_events([Event(type="up")], 1.0)
    writer.close()
    with open(ready.events(1), "a") as f:
        f.write('{"n": 2, "ty')
    second = opened(ready, 2)
    second.add_events([Event(type="takeover")], 2.0)
    second.close()
    assert [e["type"] for e in read_events(ready)] == ["up", "takeover"]


def test_an_event_that_could_not_be_written_is_written_once_when_it_can(ready: RunDir) -> None:
    """The same decision is made again after a full disk: what the first attempt left must not be there twice."""
    writer = opened(ready, 1)
    writer.add_events([Event(type="up")], 1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for attempt in range(3):
        resource.setrlimit(resource.RLIMIT_FSIZE, (ready.events(1).stat().st_size + 10 * attempt, limits[1]))
        try:
            with pytest.raises(OSError, match=r"large|space"):
                writer.add_events([Event(type="failure", message="x" * 50), Event(type="stopped")], 2.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.add_events([Event(type="failure", message="x" * 50), Event(type="stopped")], 3.0)
    writer.close()
    assert [(e["n"], e["type"]) for e in read_events(ready)] == [(1, "up"), (2, "failure"), (3, "stopped")]


@pytest.mark.parametrize("moment", ["write", "close"])
def test_events_that_a_server_took_half_or_whole_without_saying_so_are_there_once(
    ready: RunDir, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """NFS says at close() what a write failed of; and where the answer is lost, all may have been written."""
    writer = opened(ready, 1)
    writer.add_events([Event(type="up")], 1.0)
    real = getattr(os, moment)

    def fails(fd: int, *data: bytes) -> int:
        real(fd, *(d[: len(d) // 2] for d in data))
        monkeypatch.setattr(os, "ftruncate", fails_too)
        raise OSError(5, "Input/output error")

    def fails_too(fd: int, size: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, moment, fails)
    with pytest.raises(OSError, match="Input/output error") as e:
        writer.add_events([Event(type="failure"), Event(type="stopped")], 2.0)
    assert e.value.filename == str(ready.events(1))
    monkeypatch.undo()
    writer.add_events([Event(type="failure"), Event(type="stopped")], 3.0)
    writer.close()
    assert [(e["n"], e["type"]) for e in read_events(ready)] == [(1, "up"), (2, "failure"), (3, "stopped")]


def test_what_cannot_be_written_is_named(ready: RunDir) -> None:
    """The error of a full disk names no file by itself."""
    writer = opened(ready, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        for write, path in (
            (lambda: writer.write_state(some_state()), ready.state),
            (lambda: writer.write_barrier({"seq": 1}), ready.barrier),
            (lambda: writer.write_status({"seq": 1}), ready.status),
            (lambda: writer.add_events([Event(type="up")], 1.0), ready.events(1)),
        ):
            with pytest.raises(OSError, match="File too large") as e:
                write()
            assert (e.value.filename, e.value.filename2) == (str(path), None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_events_go_on_where_the_file_was_taken_away(ready: RunDir) -> None:
    writer = opened(ready, 1)
    writer.add_events([Event(type="up")], 1.0)
    ready.events(1).rename(ready.path / "away")
    writer.add_events([Event(type="ready")], 2.0)
    writer.add_events([Event(type="ended")], 3.0)
    writer.close()
    assert [e["type"] for e in read_events(ready)] == ["ready", "ended"]


# ------------------------------------------------------------------------------------------------ what is found again


def live_state() -> RunState:
    """Two groups in trouble, of a run that has a history."""
    failure = Failure(reason=Reason.ENGINE_EXITED, message="", incarnation=3, at=5.0, wall=5.0)
    steps = (StepState(node="n0", pid=5, pid_started=6), StepState(node="n1"))
    return RunState(
        run_id="abc",
        job="12",
        restart_count=1,
        term=4,
        epoch=17,
        groups=(
            GroupState(
                id="actor/0", phase=Phase.READY, since=3.0, since_wall=4.0, incarnation=3, steps=steps, start_s=40.0
            ),
            GroupState(
                id="actor/1",
                phase=Phase.STOPPING,
                since=3.0,
                incarnation=7,
                restarts=6,
                goes_to=Phase.FAILED,
                charge=failure,
                failure=failure,
                steps=(StepState(node="n2", pid=8, pid_started=9), StepState(node="n3")),
                runtime_failures=(1.0, 2.0),
            ),
        ),
        serving=(("actor/0", 3),),
        pools_once_ready=("actor",),
        started_at=1.0,
        ending=Reason.OPERATOR,
        ending_at=9.0,
        phase=PoolPhase.READY,
        blind_since=8.0,
        suspect_self_since=8.0,
    )


def written(run: RunDir, state: RunState) -> RunState:
    writer = opened(run, state.term)
    writer.write_state(state)
    writer.close()
    return state


def load(run: RunDir, plan: FleetPlan | None = None, **changes: Any) -> RunState:
    first_term = 5 if changes.pop("first", False) else 4
    how: dict[str, Any] = {
        "job": "12",
        "restart_count": 1,
        "term": 5,
        "first_term": first_term,
        "now": 100.0,
        **changes,
    }
    return store.load_state(run, plan or make_plan(2), **how)


def test_a_new_run_begins_with_nothing(ready: RunDir) -> None:
    state = load(ready, job="12", term=1, first=True)
    assert (state.term, state.epoch, state.job, state.restart_count, state.started_at) == (1, 0, "12", 1, 100.0)
    assert [(g.id, g.phase, g.incarnation, g.since) for g in state.groups] == [
        ("actor/0", Phase.PENDING, 0, 100.0),
        ("actor/1", Phase.PENDING, 0, 100.0),
    ]
    assert len(state.run_id) == 12
    assert load(ready).run_id != state.run_id
    assert "/" not in state.run_id


def test_the_next_coordinator_of_the_same_up_goes_on_where_the_last_one_was(ready: RunDir) -> None:
    old = written(ready, live_state())
    assert load(ready) == replace(old, term=5, blind_since=None, suspect_self_since=None)


@pytest.mark.parametrize(
    ("changes", "boot"),
    [
        ({"job": "13"}, None),
        ({"restart_count": 2}, None),
        ({}, "another boot"),
        ({"job": "", "restart_count": 0}, None),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_in_another_allocation_groups_start_over_and_numbers_go_on(
    ready: RunDir, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], boot: str | None, first: bool
) -> None:
    old = written(ready, live_state())
    if boot:
        monkeypatch.setattr(proc, "boot_id", lambda: boot)
    state = load(ready, first=first, **changes)
    assert (state.run_id, state.epoch, state.term, state.serving) == ("abc", 17, 5, old.serving)
    assert (state.job, state.restart_count) == (changes.get("job", "12"), changes.get("restart_count", 1))
    assert (state.pools_once_ready, state.started_at) == ((), 100.0)
    assert (state.ending, state.ending_at, state.blind_since) == (Reason.NONE, 0.0, None)
    for group, before in zip(state.groups, old.groups, strict=True):
        assert (group.phase, group.steps, group.since) == (Phase.PENDING, (), 100.0)
        assert (group.incarnation, group.restarts) == (before.incarnation, before.restarts)
        assert group.start_s == before.start_s, "the next job need not learn again what a start takes"
        assert (group.runtime_failures, group.failure, group.charge) == ((), None, None)


def group(phase: Phase, **changes: Any) -> GroupState:
    return GroupState(id="actor/0", phase=phase, since=3.0, incarnation=3, restarts=2, **changes)


@pytest.mark.parametrize("phase", [Phase.STOPPED, Phase.FAILED])
def test_a_new_up_in_the_same_allocation_begins_ended_groups_again(ready: RunDir, phase: Phase) -> None:
    written(ready, replace(live_state(), groups=(group(phase, start_failures=(1.0,)),)))
    assert load(ready, make_plan(1)).groups[0].phase is phase
    (begun,) = load(ready, make_plan(1), first=True).groups
    assert (begun.phase, begun.incarnation, begun.restarts, begun.start_failures) == (Phase.PENDING, 3, 2, ())


def test_a_new_up_is_a_new_one_until_one_of_its_coordinators_wrote_so(ready: RunDir) -> None:
    written(ready, replace(live_state(), groups=(group(Phase.FAILED),)))
    (begun,) = load(ready, make_plan(1), term=7, first_term=5).groups
    assert begun.phase is Phase.PENDING, "terms 5 and 6 died too early"
    written(ready, replace(live_state(), term=7, groups=(group(Phase.FAILED),)))
    (failed,) = load(ready, make_plan(1), term=8, first_term=5).groups
    assert failed.phase is Phase.FAILED


def test_a_new_up_in_the_same_allocation_brings_back_what_was_being_drained(ready: RunDir) -> None:
    steps = (StepState(node="n0", pid=5, pid_started=6), StepState(node="n1"))
    draining = group(Phase.DRAINING, steps=steps, goes_to=Phase.FAILED, stop_sent_at=4.0)
    written(ready, replace(live_state(), groups=(draining,)))
    (begun,) = load(ready, make_plan(1), first=True).groups
    assert (begun.phase, begun.goes_to, begun.steps) == (Phase.STOPPING, Phase.FENCING, steps)
    assert begun.stop_sent_at == 4.0


def test_a_new_up_in_the_same_allocation_adopts_what_lives_and_waits_for_all_its_groups_again(ready: RunDir) -> None:
    """The old `up` was killed, engines live on; but the trainer that is to start is a new one."""
    old = written(ready, live_state())
    state = load(ready, first=True)
    assert state.groups[0] == old.groups[0]
    assert (state.ending, state.pools_once_ready, state.started_at) == (Reason.NONE, (), 100.0)
    assert (state.epoch, state.serving) == (17, old.serving)


@pytest.mark.parametrize("again", [{"first": True}, {"job": "13", "first": True}, {"restart_count": 2, "first": True}])
def test_a_new_trainer_begins_anew_but_versions_go_on(ready: RunDir, again: dict[str, Any]) -> None:
    """What an earlier trainer said is void, holds and phases; what it pushed stays the version that counts."""
    said = ClientState(id="trainer", seq=9, heard_at=3.0, phase="training", hold_s=60.0, hold=True, echo=8, acks=4)
    written(ready, replace(live_state(), clients=(said,), paused=("actor",), targets={"actor": 41}))
    for name in ("trainer.json", "trainer.acks.jsonl"):
        (ready.clients / name).touch()

    store.prepare(ready, make_plan(2))
    state = load(ready, **again)

    assert state.clients == (ClientState(id="trainer", seq=8, echo=8, acks=4),)
    assert (state.paused, state.targets) == ((), {"actor": 41})
    assert [p.name for p in ready.clients.iterdir()] == ["trainer.acks.jsonl"]


def test_the_next_coordinator_of_the_same_up_keeps_to_what_trainers_said(ready: RunDir) -> None:
    said = ClientState(id="trainer", seq=9, heard_at=3.0, phase="training", hold_s=60.0, hold=True, echo=8, acks=4)
    written(ready, replace(live_state(), clients=(said,), paused=("actor",)))
    assert load(ready).clients == (said,)


def renamed(plan: FleetPlan, nodes: dict[str, str]) -> FleetPlan:
    """The same fleet on other nodes."""
    text = json.dumps(codec.encode(plan))
    for old, new in nodes.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    return codec.decode(FleetPlan, json.loads(text))


@pytest.mark.parametrize(
    ("nodes", "groups"),
    [
        ({}, []),
        ({"n1": "n8"}, ["actor/0"]),
        ({"n0": "x", "n1": "n0", "x": "n1"}, ["actor/0"]),  # the same nodes: but names count by their order
        ({"n0": "n8", "n3": "n9"}, ["actor/0", "actor/1"]),
    ],
)
def test_groups_that_the_plan_has_elsewhere_are_found_and_begin_again(
    ready: RunDir, nodes: dict[str, str], groups: list[str]
) -> None:
    old, plan = written(ready, live_state()), renamed(make_plan(2), nodes)
    left = store.without_place(ready, plan, job="12", restart_count=1)
    assert [g.id for g in left] == groups
    for now, before in zip(load(ready, plan, first=True).groups, old.groups, strict=True):
        if before.id in groups:
            assert (now.phase, now.steps, now.incarnation) == (Phase.PENDING, (), before.incarnation)
        else:
            assert now == before
    for job, count in (("13", 1), ("12", 2)):
        assert store.without_place(ready, plan, job=job, restart_count=count) == (), (
            "nothing of another allocation lives"
        )


def test_a_group_that_the_plan_does_not_have_is_found_where_it_has_steps(ready: RunDir) -> None:
    written(ready, live_state())
    assert [g.id for g in store.without_place(ready, make_plan(1), job="12", restart_count=1)] == ["actor/1"]
    rests = replace(live_state().groups[1], steps=(), phase=Phase.STOPPED)
    written(ready, replace(live_state(), groups=(live_state().groups[0], rests)))
    assert store.without_place(ready, make_plan(1), job="12", restart_count=1) == ()
    sweeps = replace(rests, phase=Phase.FENCING, steps=(StepState(node="n3", sweep=True),))
    written(ready, replace(live_state(), groups=(sweeps,)))
    assert store.without_place(ready, make_plan(2), job="12", restart_count=1) == ()
    assert store.without_place(ready, make_plan(1), job="12", restart_count=1) == (sweeps,)


def test_without_a_state_nothing_is_anywhere(ready: RunDir) -> None:
    assert store.without_place(ready, make_plan(1), job="12", restart_count=1) == ()
    ready.state.write_text("{")
    with pytest.raises(CorruptFile):
        store.without_place(ready, make_plan(1), job="12", restart_count=1)


def test_groups_come_and_go_with_the_plan(ready: RunDir) -> None:
    old = written(ready, live_state())
    assert [g.id for g in load(ready, make_plan(1)).groups] == ["actor/0"]
    three = load(ready, make_plan(3)).groups
    assert three[:2] == old.groups
    assert (three[2].phase, three[2].since) == (Phase.PENDING, 100.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"state": {}}',
        '{"state": []}',
        '{"boot_id": "", "state": {"run_id": 5}}',
        "\x00\x00",
        "null",
    ],
)
def test_a_state_that_is_not_understood_is_never_taken_for_none(ready: RunDir, text: str) -> None:
    ready.state.write_text(text)
    with pytest.raises(CorruptFile, match=r"state\.json.*move it away only if no trainer relies on them"):
        load(ready)


def test_a_state_that_cannot_be_read_is_never_taken_for_none(ready: RunDir) -> None:
    ready.state.mkdir()
    with pytest.raises(StoreError, match=r"state\.json cannot be read"):
        load(ready)


# ------------------------------------------------------------------------------------------------------------ requests


def ask(run: RunDir, name: str, content: object) -> Path:
    path = run.requests / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_requests_are_read_in_the_order_in_which_they_were_made(ready: RunDir) -> None:
    second = ask(ready, "a.json", {"id": "a", "verb": "drain", "groups": ["actor/0", "actor/1"], "who": "u@h"})
    first = ask(ready, "b.json", {"id": "b", "verb": "stop"})
    os.utime(first, (1000, 1000))
    os.utime(second, (2000, 2000))
    ask(ready, ".tmp.json", "{")
    ask(ready, "note.txt", "hello")
    assert store.read_requests(ready) == [
        (first, Request(id="b", verb="stop")),
        (second, Request(id="a", verb="drain", groups=("actor/0", "actor/1"), who="u@h")),
    ]


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "{",
        "[]",
        "null",
        "5",
        "{}",
        '{"id": "x"}',
        '{"verb": "stop"}',
        '{"id": "x", "verb": "drain", "groups": 5}',
        b"\xff\xfe\x00",
        "[" * 100_000,
    ],
    ids=lambda g: str(g)[:20],
)
def test_what_is_no_request_is_one_that_will_be_refused(ready: RunDir, garbage: str | bytes) -> None:
    path = ask(ready, "x.json", garbage)
    assert store.read_requests(ready) == [(path, Request(id="x", verb=""))]


def test_a_request_that_is_withdrawn_or_is_no_file_disturbs_nobody(
    ready: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that stumbles over one would do so in every later term, too."""
    (ready.requests / "folder.json").mkdir()
    (ready.requests / "gone.json").symlink_to("nowhere")
    os.mkfifo(ready.requests / "pipe.json")
    path = ask(ready, "x.json", {"id": "x", "verb": "stop"})
    found = [(path, Request(id="x", verb="stop"))]
    assert store.read_requests(ready) == found
    withdrawn = ask(ready, "w.json", {"id": "w", "verb": "stop"})
    real = Path.glob

    def listed(self: Path, pattern: str) -> Iterator[Path]:
        names = list(real(self, pattern))
        withdrawn.unlink(missing_ok=True)
        return iter(names)

    monkeypatch.setattr(Path, "glob", listed)
    assert store.read_requests(ready) == found


def test_requests_that_cannot_be_looked_at_now_wait(ready: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ask(ready, "x.json", {"id": "x", "verb": "stop"})

    def stale(*args: Any, **kwargs: Any) -> Any:
        raise OSError(116, "Stale file handle")

    for name in ("glob", "lstat"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, stale)
            assert store.read_requests(ready) == []
    assert store.read_requests(ready) == [(path, Request(id="x", verb="stop"))]


# --------------------------------------------------------------------------------------------- lease, across hosts

FAKE = """\
#!/bin/sh
echo "$@" >> {log}
{body}
"""


class Scontrol:
    """A `scontrol` of our own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "calls"

    def does(self, body: str) -> None:
        path = self.folder / "scontrol"
        path.write_text(FAKE.format(log=self.log, body=body))
        path.chmod(0o755)

    def says(self, state: str) -> None:
        self.does(f"echo 'JobId=12 JobName=x JobState={state} EndTime=Unknown'")


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scontrol:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    found = Scontrol(tmp_path / "bin")
    found.does("exit 99")
    return found


def lease(run: RunDir, **changes: Any) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    content = {"host": "elsewhere", "pid": 1, "job": "12", "restart_count": 0, "ended": False, "at": 1.0, **changes}
    run.lease.write_text(json.dumps(content))


def check(
    run: RunDir, job: str = "13", restart_count: int = 0, backend: str = "slurm", command_timeout_s: float = 20
) -> None:
    plan = replace(make_plan(1), backend=backend, slurm=SlurmSettings(command_timeout_s=command_timeout_s))
    up._check_lease(run, plan, job, restart_count)


def test_the_lease_says_who_has_the_run_directory(ready: RunDir) -> None:
    assert store.read_lease(ready) == {}
    store.write_lease(ready, job="12", restart_count=3, ended=False)
    found = store.read_lease(ready)
    assert abs(found.pop("at") - time.time()) < 5
    assert found == {"host": socket.gethostname(), "pid": os.getpid(), "job": "12", "restart_count": 3, "ended": False}


@pytest.mark.parametrize("state", ["RUNNING", "SUSPENDED", "COMPLETING", "STOPPED", "A_STATE_OF_LATER"])
def test_a_job_elsewhere_that_may_still_write_keeps_its_run_directory(
    run: RunDir, scontrol: Scontrol, state: str
) -> None:
    lease(run)
    scontrol.says(state)
    with pytest.raises(RunDirBusy, match=r"by job 12 on elsewhere.*Nothing was started.*--run-dir") as e:
        check(run)
    assert state in str(e.value)
    assert scontrol.log.read_text() == "-o show job 12\n"


@pytest.mark.parametrize(
    "body",
    [
        "echo 'JobId=12 JobName=x JobState=COMPLETED EndTime=Unknown'",
        "echo 'JobId=12 JobName=x JobState=NODE_FAIL EndTime=Unknown'",
        "echo 'JobId=12 JobName=x JobState=PENDING EndTime=Unknown'",
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
    ],
)
def test_a_job_elsewhere_that_ended_is_taken_over(run: RunDir, scontrol: Scontrol, body: str) -> None:
    lease(run)
    scontrol.does(body)
    check(run)
    assert scontrol.log.exists()


@pytest.mark.parametrize(
    ("body", "timeout_s", "said"),
    [
        ("echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1", 20, "Unable to contact"),
        ("sleep 30", 0.5, "did not answer within 0.5 s"),
        ("echo hello", 20, "something else"),
        ("exit 0", 20, "something else"),
    ],
)
def test_a_silent_slurm_takes_nobodys_run_directory(
    run: RunDir, scontrol: Scontrol, body: str, timeout_s: float, said: str
) -> None:
    lease(run)
    scontrol.does(body)
    with pytest.raises(RunDirBusy, match="Slurm does not say whether") as e:
        check(run, command_timeout_s=timeout_s)
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("changes", "job", "restart_count"),
    [
        ({"ended": True}, "13", 0),
        ({"host": os.uname().nodename}, "13", 0),  # the lock of this host was free
        ({}, "12", 1),  # this very job, requeued: its old batch step has ended
    ],
)
def test_where_it_is_known_slurm_is_not_asked(
    run: RunDir, scontrol: Scontrol, changes: dict[str, Any], job: str, restart_count: int
) -> None:
    lease(run, **changes)
    check(run, job, restart_count)
    assert not scontrol.log.exists()


def test_the_same_start_of_the_same_job_elsewhere_is_asked_about(run: RunDir, scontrol: Scontrol) -> None:
    """Two batch hosts cannot run one start of a job; who claims so is wrong, and gets nothing."""
    lease(run)
    scontrol.says("RUNNING")
    with pytest.raises(RunDirBusy):
        check(run, "12", 0)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_lease_that_is_not_understood_is_not_taken_for_none(run: RunDir, scontrol: Scontrol, content: str) -> None:
    run.path.mkdir(parents=True)
    run.lease.write_text(content)
    with pytest.raises(StoreError, match=rf"{run.lease}.*remove it"):
        check(run)
    check(run, backend="local")


def test_no_lease_is_nobodys(run: RunDir, scontrol: Scontrol) -> None:
    check(run)
    assert not scontrol.log.exists()
