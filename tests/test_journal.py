"""The order in which the run directory is written, and what holds where a write fails or its writer is killed."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import store
from slurm_rollout.core import codec
from slurm_rollout.core.model import Decision, Event, Observation, RunState, StepState
from slurm_rollout.core.phases import Phase, Reason
from slurm_rollout.errors import LeaseLost
from slurm_rollout.journal import RETRY_S, Journal
from slurm_rollout.rundir import RunDir, read_events
from slurm_rollout.store import Store
from slurm_rollout.testing.world import make_plan

PLAN = make_plan(2)
FILES = ("state", "barrier", "events", "status")
# Whether what failed was done all the same: on NFS an answer may be lost.
MOMENTS = ("before", "after")


class Killed(BaseException):
    """The coordinator was killed here."""


class FaultyStore(Store):
    """A real one whose writes fail, or kill their writer, where a test wants it."""

    def __init__(self, run: RunDir, term: int) -> None:
        super().__init__(run, term, private=False)
        self.faults: dict[tuple[str, str], BaseException] = {}
        self.written: list[str] = []
        self.epochs: list[int] = []

    def fail(self, file: str, moment: str = "before", number: int = errno.ENOSPC) -> None:
        self.faults[file, moment] = OSError(number, os.strerror(number), f"the {file}")

    def write_state(self, state: RunState) -> None:
        self._do("state", lambda: super(FaultyStore, self).write_state(state))

    def write_barrier(self, document: Any) -> None:
        def write() -> None:
            super(FaultyStore, self).write_barrier(document)
            self.epochs.append(document["epoch"])

        self._do("barrier", write)

    def write_status(self, document: Any) -> None:
        self._do("status", lambda: super(FaultyStore, self).write_status(document))

    def add_events(self, events: Any, wall: float) -> list[dict[str, Any]]:
        self._do("events", lambda: super(FaultyStore, self).add_events(events, wall))
        return []

    def _do(self, what: str, write: Callable[[], object]) -> None:
        if (what, "before") in self.faults:
            raise self.faults[what, "before"]
        write()
        self.written.append(what)
        if (what, "after") in self.faults:
            raise self.faults[what, "after"]


class Desk:
    """The state of a run and its journal, as the coordinator has them."""

    def __init__(self, run: RunDir, term: int = 1) -> None:
        self.run = run
        self.store = FaultyStore(run, term)
        self.journal = Journal(PLAN, self.store)
        self.state = store.load_state(run, PLAN, job="1", restart_count=0, term=term, first_term=1, now=1.0)
        self.now = 100.0 * term

    def decide(self, *events: str, **changes: Any) -> Decision:
        return Decision(state=replace(self.state, **changes), events=tuple(Event(type=e) for e in events))

    def serve(self, group: int, *events: str) -> Decision:
        """What is decided when a group became ready."""
        groups = list(self.state.groups)
        groups[group] = replace(groups[group], phase=Phase.READY, incarnation=groups[group].incarnation + 1)
        serving = tuple((g.id, g.incarnation) for g in groups if g.phase is Phase.READY)
        return self.decide(*events, groups=tuple(groups), serving=serving, epoch=self.state.epoch + 1)

    def tick(self, decision: Decision) -> bool:
        """Write it; tell whether it is so, and may be acted upon."""
        obs = Observation(now=self.now, wall=1_000_000.0 + self.now)
        self.state = self.journal.write(self.state, decision, obs)
        return self.state is decision.state

    def later(self, s: float = RETRY_S) -> Desk:
        self.now += s
        return self

    def mend(self) -> Desk:
        self.store.faults.clear()
        return self.later()

    def events(self) -> list[str]:
        return [e["type"] for e in read_events(self.run)]

    def on_disk(self) -> RunState:
        return codec.decode(RunState, json.loads(self.run.state.read_text())["state"])

    def expect_all_said(self) -> None:
        """Every file says what is so."""
        assert self.on_disk() == self.state
        barrier, status = (json.loads(p.read_text()) for p in (self.run.barrier, self.run.status))
        assert barrier["epoch"] == status["epoch"] == self.state.epoch
        assert [g["phase"] for g in barrier["groups"]] == [g.phase for g in self.state.groups]
        assert [g["phase"] for g in status["groups"]] == [g.phase for g in self.state.groups]
        assert self.store.epochs == sorted(self.store.epochs), "an epoch never falls"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    store.prepare(made, PLAN)
    return made


@pytest.fixture
def desk(run: RunDir) -> Desk:
    return Desk(run)


def test_the_order_is_state_barrier_events_status(desk: Desk) -> None:
    assert desk.tick(desk.decide("up"))
    assert desk.tick(desk.serve(0, "ready"))
    assert desk.store.written == ["state", "barrier", "events", "status"] * 2
    desk.expect_all_said()


def test_which_process_holds_a_step_changes_one_file(desk: Desk) -> None:
    desk.tick(desk.decide("up"))
    desk.store.written.clear()
    held = replace(desk.state.groups[0], steps=(StepState(node="n0", pid=5, pid_started=6),))
    assert desk.tick(desk.decide(groups=(held, *desk.state.groups[1:])))
    assert desk.store.written == ["state"]
    assert not desk.journal.is_due(desk.decide(), desk.now)
    assert desk.journal.is_due(desk.decide(), desk.now + PLAN.heartbeat_s)
    assert desk.journal.is_due(desk.decide("event"), desk.now)


def test_a_heartbeat_writes_barrier_and_status(desk: Desk) -> None:
    desk.tick(desk.decide())
    seq = json.loads(desk.run.barrier.read_text())["seq"]
    desk.store.written.clear()
    desk.later(PLAN.heartbeat_s).tick(desk.decide())
    assert desk.store.written == ["barrier", "status"]
    assert json.loads(desk.run.barrier.read_text())["seq"] == seq + 1


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("file", ["state", "barrier"])
def test_what_could_not_be_journalled_is_not_so_and_is_decided_again(desk: Desk, file: str, moment: str) -> None:
    desk.tick(desk.serve(1, "up"))
    desk.store.fail(file, moment)
    for _ in range(3):
        assert not desk.later().tick(desk.serve(0, "ready"))
        assert desk.state.groups[0].phase is Phase.PENDING
        assert desk.journal.blocked
    assert desk.events() == ["up"], "nothing is told of what is not so"
    assert desk.mend().tick(desk.serve(0, "ready"))
    assert desk.events() == ["up", "ready"]
    desk.expect_all_said()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("file", ["state", "barrier"])
def test_what_was_taken_back_leaves_no_trace(desk: Desk, file: str, moment: str) -> None:
    """Say, a server that answers again before the disk does. A next coordinator must not find it failed."""
    desk.tick(desk.serve(1, "up"))
    desk.store.fail(file, moment)
    assert not desk.later().tick(desk.serve(0, "ready"))
    assert desk.mend().tick(desk.decide())
    assert not desk.journal.blocked
    assert desk.state.serving == (("actor/1", 1),)
    assert desk.events() == ["up"]
    desk.expect_all_said()


def test_an_epoch_that_may_have_been_seen_never_stands_for_something_else(desk: Desk) -> None:
    desk.tick(desk.decide())
    desk.store.fail("barrier", "after")
    assert not desk.later().tick(desk.serve(0))
    seen = desk.store.epochs[-1]
    for _ in range(5):
        assert not desk.later().tick(desk.serve(1))
    assert desk.state.epoch == seen + 1, "it does not run away"
    assert desk.mend().tick(desk.serve(1))
    assert json.loads(desk.run.barrier.read_text())["epoch"] > seen
    desk.expect_all_said()


@pytest.mark.parametrize(("file", "moment"), [("events", "before"), ("status", "before"), ("status", "after")])
def test_what_is_for_people_holds_nothing_up_and_comes_later_once(desk: Desk, file: str, moment: str) -> None:
    desk.tick(desk.decide("up"))
    desk.store.fail(file, moment)
    assert desk.later().tick(desk.serve(0, "ready"))
    assert not desk.journal.blocked
    assert desk.later().tick(desk.serve(1, "other"))
    assert desk.on_disk() == desk.state
    assert desk.events() == ["up"] if file == "events" else ["up", "ready", "other"]
    assert desk.mend().tick(desk.decide())
    assert desk.events() == ["up", "ready", "other"]
    desk.expect_all_said()


def test_an_event_keeps_the_time_at_which_it_happened(desk: Desk) -> None:
    desk.store.fail("events")
    desk.tick(desk.decide("up"))
    desk.mend().later(50).tick(desk.decide())
    assert [e["at"] for e in read_events(desk.run)] == [1_000_100.0]


def test_attempts_are_made_once_a_second(desk: Desk) -> None:
    desk.tick(desk.decide())
    desk.store.fail("barrier", "after")
    desk.store.written.clear()
    for _ in range(100):
        desk.later(0.02).tick(desk.serve(0))
    assert 1 <= desk.store.written.count("barrier") <= 3


@pytest.mark.parametrize("file", FILES)
def test_it_is_said_once_that_something_cannot_be_written_and_once_that_it_can(
    desk: Desk, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    with caplog.at_level(logging.WARNING):
        desk.tick(desk.decide())
        for _ in range(2):
            desk.store.fail(file)
            for _ in range(5):
                desk.later().tick(desk.serve(0, "ready"))
            desk.mend().tick(desk.decide())
            desk.later().tick(desk.decide())
    said = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert [level for level, _ in said] == ["ERROR", "WARNING"] * 2
    assert said[0][1].startswith(f"the {file}: No space left on device. ")
    assert ("nothing is started" in said[0][1]) == (file in ("state", "barrier"))
    assert "Make room, or make it writable" in said[0][1]
    assert said[1][1] == f"{desk.run.path} can be written again; until now: the {file}: No space left on device"


@pytest.mark.parametrize("file", FILES)
def test_a_run_that_is_to_end_needs_no_disk(desk: Desk, file: str) -> None:
    desk.tick(desk.serve(0, "up"))
    desk.store.fail(file)
    assert desk.later().tick(desk.decide("ending", ending=Reason.RUN_ENDING))
    assert desk.state.ending
    assert desk.tick(desk.decide("drained")), "no pause either"
    desk.store.faults.clear()
    desk.journal.note([Event(type="ended")], 5.0)
    desk.journal.write_last_words(desk.state, desk.now)
    assert desk.events() == ["up", "ending", "drained", "ended"]
    assert desk.on_disk() == desk.state


def test_an_end_that_cannot_be_written_is_in_the_log(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.tick(desk.decide("up"))
    desk.store.fail("events")
    with caplog.at_level(logging.INFO):
        desk.journal.note([Event(type="ended", message="drained")], 5.0)
        desk.journal.write_last_words(desk.state, desk.now)
    assert "drained" in caplog.text
    assert "the events: No space left on device. The run has ended; how it did is in this log only" in caplog.text


@pytest.mark.parametrize(("file", "moment"), list(itertools.product(FILES, MOMENTS)))
def test_a_writer_that_is_killed_half_way_repeats_no_event_and_no_epoch(run: RunDir, file: str, moment: str) -> None:
    first = Desk(run)
    first.tick(first.serve(1, "up"))
    first.store.faults[file, moment] = Killed()
    with pytest.raises(Killed):
        first.later().tick(first.serve(0, "ready"))
    second = Desk(run, term=2)
    journalled = second.state.groups[0].phase is Phase.READY
    assert journalled == ((file, moment) != ("state", "before"))
    second.store.epochs = first.store.epochs
    # What the next one decides: what is not so yet.
    decision = second.decide("takeover") if journalled else second.serve(0, "takeover", "ready")
    assert second.tick(decision)
    told = not journalled or file == "status" or (file, moment) == ("events", "after")
    assert sorted(second.events()) == sorted(["up", "takeover"] + ["ready"] * told)
    second.expect_all_said()


def test_a_coordinator_that_finds_what_was_taken_back_goes_on_from_it(run: RunDir) -> None:
    """As from the state of one that was killed before it acted."""
    first = Desk(run)
    first.tick(first.decide("up"))
    first.store.fail("barrier", "after")
    assert not first.later().tick(first.serve(0, "ready"))
    second = Desk(run, term=2)
    assert second.state.serving == (("actor/0", 1),)
    second.store.epochs = first.store.epochs
    second.tick(second.decide("takeover"))
    second.expect_all_said()


def test_a_term_that_was_lost_is_no_full_disk(desk: Desk) -> None:
    desk.tick(desk.decide("up"))
    Store(desk.run, 2, private=False).open()
    with pytest.raises(LeaseLost):
        desk.later().tick(desk.serve(0, "ready"))


def test_a_new_term_is_written_down_before_anything_is_decided_in_it(run: RunDir) -> None:
    first = Desk(run)
    first.tick(first.decide("up"))
    second = Desk(run, term=2)
    assert second.tick(second.decide())
    assert second.on_disk().term == 2


def test_a_term_that_could_not_begin_begins_when_it_can(desk: Desk) -> None:
    """A coordinator that is to drain goes on without."""
    away = desk.run.path.with_name("away")
    desk.run.path.rename(away)
    assert desk.tick(desk.decide("up", ending=Reason.RUN_ENDING))
    assert desk.journal.blocked
    away.rename(desk.run.path)
    assert desk.later().tick(desk.decide())
    assert desk.events() == ["up"]
    desk.expect_all_said()
