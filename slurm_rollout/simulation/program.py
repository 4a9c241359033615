"""Programs that wait, on virtual time: a thread that runs only while the timeline waits for it, and sleeps otherwise.

So a trainer can be written down as trainers are, around the real `barrier.Barrier`, whose calls block. Only one thread
runs at any moment, and the timeline says which: nothing depends on how threads are scheduled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from slurm_rollout.simulation.clock import Timeline


class Killed(BaseException):
    """SIGKILL: nothing of the program that was killed does anything any more."""


class Program:
    """One process. What its body raises comes out of the timeline."""

    def __init__(self, time: Timeline, body: Callable[[], None]) -> None:
        self._time = time
        self._body = body
        self._its_turn, self._our_turn = threading.Lock(), threading.Lock()
        self._its_turn.acquire()
        self._our_turn.acquire()
        self._naps = 0  # a newer nap makes the end of an older one void
        self._stopped_until = 0.0
        self._error: BaseException | None = None
        self.alive = True
        self.killed = False
        threading.Thread(target=self._live, daemon=True).start()
        self._wake_at(time.now)

    def _live(self) -> None:
        self._its_turn.acquire()
        try:
            if not self.killed:
                self._body()
        except Killed:
            pass
        except BaseException as e:  # it is the timeline's
            self._error = e
        self.alive = False
        self._our_turn.release()

    def sleep(self, seconds: float) -> None:
        """Called by the body."""
        self._naps += 1
        self._wake_at(self._time.now + seconds)
        self._our_turn.release()
        self._its_turn.acquire()
        if self.killed:
            raise Killed

    def wake(self, after_s: float) -> None:
        """Have the nap that it takes now end at that moment, if not earlier."""
        self._wake_at(self._time.now + after_s)

    def stop(self, for_s: float) -> None:
        """SIGSTOP."""
        self._stopped_until = max(self._stopped_until, self._time.now + for_s)

    def go_on(self) -> None:
        if self._stopped_until > self._time.now:
            self._stopped_until = 0.0
            self._wake_at(self._time.now)

    def kill(self) -> None:
        if self.alive:
            self.killed = True
            self._run()

    def _wake_at(self, at: float) -> None:
        nap = self._naps

        def wake() -> None:
            if not self.alive or nap != self._naps:
                return
            if self._stopped_until > self._time.now:
                self._time.at(self._stopped_until, wake)
                return
            self._run()

        self._time.at(at, wake)

    def _run(self) -> None:
        self._its_turn.release()
        self._our_turn.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
