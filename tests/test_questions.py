"""How often Slurm is asked, and what counts as a node's silence."""

from __future__ import annotations

import asyncio

import pytest

from slurm_rollout.backend import NodeFacts
from slurm_rollout.core.model import Listing, NodeWord
from slurm_rollout.errors import Unobservable
from slurm_rollout.questions import (
    BLIND_PAUSE_S,
    QUERY_PAUSE_S,
    REACH_PERIOD_S,
    REACH_TIMEOUT_S,
    Background,
    Pace,
    Questions,
    Reach,
    observe_nodes,
)
from slurm_rollout.testing.world import make_plan
from tests.test_steps import FakeBackend


def test_a_slurm_that_does_not_answer_is_asked_less_and_less_often() -> None:
    pace, now, pauses = Pace(), 100.0, []
    assert pace.next_at("listing", hurry=False) <= now
    for _ in range(7):
        pace.note_question("listing", now)
        pace.note_answer("listing", now := now + 9.0, answered=False)
        pauses.append(pace.next_at("listing", hurry=False) - now)
    assert pauses == [2.0, 4.0, 8.0, 15.0, 15.0, 15.0, 15.0]
    assert pauses[-1] == BLIND_PAUSE_S
    assert (pace.unanswered_asked_at, pace.failed_at) == (now - 9.0, now)
    assert pace.next_at("listing", hurry=True) == now + QUERY_PAUSE_S
    assert pace.next_at("job", hurry=False) <= now, "each kind of question has a pace of its own"


def test_one_answer_brings_the_pace_back() -> None:
    pace = Pace()
    for now in (1.0, 2.0, 3.0):
        pace.note_answer("job", now, answered=False)
    pace.note_question("job", 20.0)
    pace.note_answer("job", 20.1, answered=True)
    assert pace.next_at("job", hurry=False) == 20.0 + QUERY_PAUSE_S
    assert pace.failed_at == 3.0


def test_only_time_in_which_somebody_looked_counts_as_silence() -> None:
    reach = Reach()
    reach.note(False, 10.0)
    assert reach.silent_s == 0.0, "since when, nobody knows"
    reach.note(False, 11.5)
    assert reach.silent_s == 1.5
    reach.note(False, 500.0)  # this process was stopped
    assert reach.silent_s == 1.5 + REACH_PERIOD_S + REACH_TIMEOUT_S
    reach.note(None, 501.0)  # no descriptor was left
    reach.note(False, 502.0)
    assert reach.silent_s == 1.5 + REACH_PERIOD_S + REACH_TIMEOUT_S
    reach.note(True, 503.0)
    assert (reach.silent_s, reach.answered_at) == (0.0, 503.0)


def test_what_slurm_said_of_a_node_is_as_old_as_its_answer() -> None:
    said = {"n1": NodeFacts(word=NodeWord.DOWN, reason="Not responding")}
    here, there = observe_nodes({"n0": Reach(answered_at=7.0)}, said, 5.0)
    assert (here.name, here.answered_at, here.word, here.asked_at) == ("n0", 7.0, NodeWord.UNKNOWN, None)
    assert (there.name, there.answered_at, there.word, there.asked_at) == ("n1", None, NodeWord.DOWN, 5.0)


class Slow(FakeBackend):
    """Its listings come when they may."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.blind = False

    async def listing(self) -> Listing:
        self.asked += 1
        await self.may_answer.wait()
        if self.blind:
            raise Unobservable("no answer")
        return Listing(asked_at=1.0, names=frozenset(), pids=frozenset())


@pytest.mark.parametrize("blind", [False, True])
def test_a_question_that_is_under_way_is_not_asked_again(blind: bool) -> None:
    async def run() -> None:
        slurm, wakes = Slow(), list[int]()
        background = Background(wake=lambda: wakes.append(1))
        questions = Questions(make_plan(1), slurm, background, wake=lambda: None)
        questions.note_time_left(60.0)
        slurm.blind = blind
        for _ in range(3):
            questions.ask(listing=True, job=False, nodes=False, hurry=True)
            await asyncio.sleep(0)
        assert slurm.asked == 1
        slurm.may_answer.set()
        await background.settle()
        await asyncio.sleep(0)
        assert wakes, "the loop hears of the answer, or that there is none"
        assert (questions.listing is None) is blind
        assert (questions.failed_at is not None) is blind
        questions.ask(listing=True, job=False, nodes=False, hurry=True)
        await background.settle()
        assert slurm.asked == 1, "nor within the pause"

    asyncio.run(run())


def test_what_is_under_way_is_cancelled_at_the_end() -> None:
    async def run() -> None:
        ended = []

        async def work() -> None:
            try:
                await asyncio.sleep(600)
            finally:
                ended.append(1)

        background = Background(wake=lambda: None)
        background.begin("work", work())
        background.begin("work", work())  # not begun, and no warning of a coroutine that was never awaited
        await asyncio.sleep(0)
        await background.aclose()
        assert ended == [1]

    asyncio.run(run())
