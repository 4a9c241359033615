"""What is asked of Slurm, and whether nodes answer: beside the loop, one question of a kind at a time.

No answer is an answer: what was known before stays as it was, with the time at which it was asked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slurm_rollout.backend import Backend, NodeFacts, monotonic
from slurm_rollout.core.model import Job, Listing, NodeObservation, NodeWord
from slurm_rollout.core.plan import FleetPlan
from slurm_rollout.errors import Unobservable
from slurm_rollout.ports_check import answers

log = logging.getLogger("slurm_rollout")

REACH_PERIOD_S, REACH_TIMEOUT_S = 1.0, 1.0
"""How often it is tried whether nodes answer, where a decision waits for that, and how long each is given."""

QUERY_PAUSE_S = 1.0
"""Least pause between two questions of one kind to Slurm."""

BLIND_PAUSE_S = 15.0
"""It doubles with every question that gets no answer, up to this: a slurmctld that comes back meets all its clients."""


class Background:
    """Work beside the loop, one task of a name at a time."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` is called whenever a task is over."""
        self._wake = wake
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Have it done, unless a task of this name is under way: then nothing of `work` is."""
        if name in self._tasks:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[name] = task
        task.add_done_callback(lambda done: self._finish(name, done))

    def is_under_way(self, name: str) -> bool:
        return name in self._tasks

    def _finish(self, name: str, done: asyncio.Task[None]) -> None:
        self._tasks.pop(name, None)
        if not done.cancelled() and (error := done.exception()) is not None:
            log.error("%s: %s", name, error, exc_info=error)
        self._wake()

    async def settle(self) -> None:
        """Wait until all that is under way now is over."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def aclose(self) -> None:
        """Cancel what is under way."""
        for task in self._tasks.values():
            task.cancel()
        await self.settle()


class Pace:
    """How often Slurm is asked."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}  # when each kind of question was asked last, or found to have no answer
        self._unanswered: dict[str, int] = {}  # how often in a row
        self.failed_at: float | None = None  # when any question found no answer
        self.unanswered_asked_at: float | None = None  # when that one was asked

    def next_at(self, name: str, *, hurry: bool) -> float:
        """Return from when on this may be asked. `hurry`: the run ends, and its drain has a limit."""
        pause_s = (
            QUERY_PAUSE_S
            if hurry
            else min(QUERY_PAUSE_S * 2.0 ** min(self._unanswered.get(name, 0), 10), BLIND_PAUSE_S)
        )
        return self._asked.get(name, float("-inf")) + pause_s

    def note_question(self, name: str, now: float) -> None:
        self._asked[name] = now

    def note_answer(self, name: str, now: float, *, answered: bool) -> None:
        self._unanswered[name] = 0 if answered else self._unanswered.get(name, 0) + 1
        if not answered:
            self.unanswered_asked_at, self.failed_at = self._asked.get(name, now), now
            self._asked[name] = now


@dataclass(slots=True)
class Reach:
    """Whether connections to a node are answered. Only time in which somebody looked counts as silence."""

    answered_at: float | None = None
    silent_s: float = 0.0
    looked_at: float | None = None

    def note(self, answered: bool | None, now: float) -> None:
        """Take in one look; None: it could not be tried."""
        if answered:
            self.answered_at, self.silent_s = now, 0.0
        elif answered is False and self.looked_at is not None:
            self.silent_s += min(now - self.looked_at, REACH_PERIOD_S + REACH_TIMEOUT_S)
        self.looked_at = now if answered is not None else None


def observe_nodes(
    reach: Mapping[str, Reach], said: Mapping[str, NodeFacts], said_at: float | None
) -> tuple[NodeObservation, ...]:
    """Return what is known of nodes: whether they answer, and what Slurm said of them at that time."""
    unknown, silence = NodeFacts(word=NodeWord.UNKNOWN, reason=""), Reach()
    return tuple(
        NodeObservation(
            name=name,
            answered_at=reach.get(name, silence).answered_at,
            silent_s=reach.get(name, silence).silent_s,
            word=said.get(name, unknown).word,
            reason=said.get(name, unknown).reason,
            asked_at=said_at if name in said else None,
        )
        for name in dict.fromkeys((*reach, *said))
    )


class Questions:
    """The coordinator's questions, and their last answers."""

    def __init__(self, plan: FleetPlan, backend: Backend, background: Background, wake: Callable[[], None]) -> None:
        self._plan = plan
        self._backend = backend
        self._background = background
        self._wake = wake
        self._pace = Pace()
        self._reach: dict[str, Reach] = {}
        self._said: Mapping[str, NodeFacts] = {}  # of nodes, by Slurm
        self._said_at: float | None = None
        self.listing: Listing | None = None
        self.job = Job.UNKNOWN
        self.job_asked_at: float | None = None
        self.job_ends_at: float | None = None
        self._job_end_is_known = False

    @property
    def failed_at(self) -> float | None:
        """When a question to Slurm last found no answer."""
        return self._pace.failed_at

    @property
    def unanswered_asked_at(self) -> float | None:
        """When that question was asked."""
        return self._pace.unanswered_asked_at

    def nodes(self) -> tuple[NodeObservation, ...]:
        return observe_nodes(self._reach, self._said, self._said_at)

    def note_time_left(self, left_s: float) -> None:
        """Take somebody's word for the job's end: Slurm need not be asked at once."""
        self.job_ends_at, self._job_end_is_known = monotonic() + left_s, True

    def ask(self, *, listing: bool, job: bool, nodes: bool, hurry: bool) -> None:
        """Ask Slurm what is wanted, unless the same question is under way or was asked just now."""
        wanted = {
            "listing": (listing, self._list),
            "job": (job or not self._job_end_is_known, self._look_at_job),
            "nodes": (nodes, self._ask_of_nodes),
        }
        self._job_end_is_known = True  # it is asked for now
        now = monotonic()
        for name, (is_wanted, question) in wanted.items():
            free = not self._background.is_under_way(name)
            if is_wanted and free and now >= self._pace.next_at(name, hurry=hurry):
                self._pace.note_question(name, now)
                self._background.begin(name, self._answered(name, question))

    async def _answered(self, name: str, question: Callable[[], Coroutine[Any, Any, None]]) -> None:
        error: Unobservable | None = None
        try:
            await question()
        except Unobservable as e:
            error = e
            log.warning("%s", e)
        self._pace.note_answer(name, monotonic(), answered=error is None)

    async def _list(self) -> None:
        self.listing = await self._backend.listing()

    async def _look_at_job(self) -> None:
        asked_at = monotonic()
        try:
            facts = await self._backend.job()
        except Unobservable:
            self.job = Job.UNKNOWN  # its end stays what it was known to be
            raise
        else:
            # On the monotonic clock from here on: a wall clock that jumps must neither stop nor start anything.
            left_s = facts.time_left_s
            self.job, self.job_ends_at = facts.job, None if left_s is None else monotonic() + left_s
        finally:
            self.job_asked_at = asked_at

    async def _ask_of_nodes(self) -> None:
        asked_at = monotonic()
        self._said = await self._backend.nodes(self._plan.nodes)
        self._said_at = asked_at

    def try_nodes(self, names: Sequence[str], placed: FleetPlan) -> None:
        """See which of these nodes answer, each at the first port of every member that has been there, and one more."""
        self._background.begin("reach", self._try_nodes(names, placed))

    async def _try_nodes(self, names: Sequence[str], placed: FleetPlan) -> None:
        ports = {name: {pool.ports.base for pool in self._plan.pools} for name in names}
        for group in (*self._plan.groups, *placed.groups):
            for member in group.members:
                if member.node in ports:
                    ports[member.node].add(member.ports["http"])

        async def look(name: str) -> None:
            host = self._plan.hosts[name].address
            answered = await answers([(host, port) for port in sorted(ports[name])], REACH_TIMEOUT_S)
            self._reach.setdefault(name, Reach()).note(answered, monotonic())

        for name in [n for n in self._reach if n not in ports]:
            del self._reach[name]  # what it was is not what it is
        await asyncio.gather(*(look(name) for name in names))
        self._wake()
        await asyncio.sleep(REACH_PERIOD_S)
