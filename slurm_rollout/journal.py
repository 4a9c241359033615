"""What the run directory says of the run: in which order it is written, and what follows where that fails.

A decision is so once `state.json` and `barrier.json` both hold it; only then may anything be done about it. Until then
nobody was told and nothing was done, so it can be taken back whole. A coordinator that finds a `state.json` of what was
taken back sees what it would see of one that was killed before it acted.

Events and `status.json` are for people. They follow, are never taken back, and come later where they cannot be written
now. So a coordinator that is killed in between loses its last events. The other order would repeat them instead, and
tell of what never came to be: whoever counts restarts would count wrong.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from slurm_rollout.core import barrier_rules, codec, moves, view
from slurm_rollout.core.model import Decision, Event, Observation, RunState
from slurm_rollout.core.plan import FleetPlan
from slurm_rollout.core.pools import pool_views
from slurm_rollout.hook import EventHook
from slurm_rollout.store import Store, last_seq

log = logging.getLogger("slurm_rollout")

RETRY_S = 1.0
"""Pause between two attempts to write."""


class Journal:
    """One term's. LeaseLost, from every method: a coordinator of a newer term took over."""

    def __init__(self, plan: FleetPlan, store: Store, hook: EventHook | None = None) -> None:
        self._plan = plan
        self._store = store
        self._hook = hook
        self._seq = last_seq(store.run)
        self.due_at = 0.0
        """When the next heartbeat is due; while `blocked`, the next attempt."""
        self.blocked = False
        """The last attempt to write `state.json` or `barrier.json` failed: nothing may be started."""
        self._journalled: RunState | None = None  # what `state.json` says; None: not known
        self._shown: RunState | None = None  # what `barrier.json` was last written of
        self._shown_epoch = 0  # of the newest barrier that readers may have seen
        self._untold: list[tuple[float, tuple[Event, ...]]] = []
        self._status_due = False
        self._tell_at = 0.0
        self._complaints: dict[str, str] = {}  # what follows from it -> what cannot be written

    def note(self, events: Iterable[Event], wall: float) -> None:
        """Say events in the log, and have them written with what is written next."""
        noted = tuple(events)
        for event in noted:
            log.info("%s", view.event_line(codec.encode(event)))
        if noted:
            self._untold.append((wall, noted))
        if self._hook is not None:  # also of what cannot be written: a full disk is worth a page
            self._hook.tell({"at": round(wall, 3), **codec.encode(event)} for event in noted)

    def is_due(self, decision: Decision, now: float) -> bool:
        """Tell whether there is anything to write."""
        if now >= self.due_at or self.blocked or self._untold or self._status_due:
            return True
        return bool(decision.events) or decision.state != self._journalled

    def write(self, before: RunState, decision: Decision, obs: Observation) -> RunState:
        """Write down what was decided, and return what is so now.

        That is `decision.state`, or `before` (in another value) when it could not be written and has to be decided
        again. What a run that is to end decides is so in any case: it starts nothing, and a full disk must not keep it
        from ending.
        """
        if not self._try(before, decision.state, obs.now) and not decision.state.ending:
            # An epoch that may have been seen must not stand for something else.
            seen = self._shown_epoch > before.epoch
            return replace(before, epoch=self._shown_epoch + 1 if seen else before.epoch)
        self.note(decision.events, obs.wall)
        if obs.now >= self._tell_at:
            self._tell(decision.state, obs)
        return decision.state

    def write_last_words(self, state: RunState, now: float) -> None:
        """Write what is still unwritten at the end of the run; that it cannot be written is only said."""
        try:
            if self.blocked:
                self._write(state, now)
            self._write_events()
        except OSError as e:
            log.error("%s: %s. The run has ended; how it did is in this log only", e.filename, e.strerror)

    def _try(self, before: RunState, state: RunState, now: float) -> bool:
        if self.blocked and now < self.due_at:
            return False
        try:
            if self.blocked:  # what is so already comes first: while that cannot be written, nothing new is so
                self._write(before, now)
            self._write(state, now)
        except OSError as e:
            self.blocked, self.due_at = True, now + RETRY_S
            self._complain(e, "Engines that run are left alone, and nothing is started until it can be written")
            return False
        self.blocked = False
        return True

    def _write(self, state: RunState, now: float) -> None:
        """Write `state.json` and `barrier.json`, unless they say so already; OSError when that fails."""
        if state != self._journalled:
            self._journalled = None
            self._store.write_state(state)
            self._journalled = state
        # Which process holds a step is nobody else's business: a recovery must not wait for two more files.
        visible = replace(state, groups=tuple(replace(g, steps=()) for g in state.groups))
        if visible == self._shown and now < self.due_at:
            return
        self._shown_epoch = state.epoch
        self._seq += 1
        plan = moves.placed(self._plan, state)
        self._store.write_barrier(barrier_rules.barrier_document(plan, state, now=now, seq=self._seq))
        self._shown = visible
        self.due_at = now + self._plan.heartbeat_s
        self._status_due = True

    def _tell(self, state: RunState, obs: Observation) -> None:
        failed = None
        for write in (self._write_events, partial(self._write_status, state, obs)):
            try:
                write()
            except OSError as e:
                failed = e
        if failed is not None:
            self._tell_at = obs.now + RETRY_S
            if not self.blocked:
                self._complain(failed, "The run goes on; what happened is written down when that is possible")
        elif self._complaints and not self.blocked:
            # Where the log had no room either, this is all that is said of it.
            what = "; ".join(dict.fromkeys(self._complaints.values()))
            log.warning("%s can be written again; until now: %s", self._store.run.path, what)
            self._complaints.clear()

    def _write_events(self) -> None:
        while self._untold:
            wall, events = self._untold[0]
            self._store.add_events(events, wall)
            del self._untold[0]

    def _write_status(self, state: RunState, obs: Observation) -> None:
        if not self._status_due:
            return
        self._store.write_status(
            view.status_document(
                moves.placed(self._plan, state),
                state,
                now=obs.now,
                wall=obs.wall,
                host=socket.gethostname(),
                seq=self._seq,
                time_left_s=None if obs.job_ends_at is None else round(max(0.0, obs.job_ends_at - obs.now), 1),
                pools=pool_views(self._plan, state, obs.now),
            )
        )
        self._status_due = False

    def _complain(self, error: OSError, consequence: str) -> None:
        """Say once what cannot be written, until all can be."""
        if consequence not in self._complaints:
            what = self._complaints[consequence] = f"{error.filename}: {error.strerror}"
            log.error("%s. %s. Make room, or make it writable: then it goes on by itself", what, consequence)
