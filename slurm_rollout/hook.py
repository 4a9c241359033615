"""`on_event`: runs a program for each event, with the event as one line of JSON on its standard input.

For pagers and chats. Nothing waits for it: a thread of its own runs one program at a time, each for `timeout_s` at
most, and what it cannot keep up with is dropped, the oldest first. What goes wrong is logged, and changes nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from slurm_rollout import proc
from slurm_rollout.core import view
from slurm_rollout.core.model import PAGED_TYPES

log = logging.getLogger("slurm_rollout")

QUEUE_MOST = 100
"""Events that may wait for their turn."""

TAIL_BYTES = 500
"""So much of the end of a program's output is worth a log line."""

_GUARD = str(Path(__file__).with_name("hook_guard.py"))
_PIPE_BYTES = 1 << 20  # more than a pipe holds
_LOOK_S = 0.02
_KILL_S = 1.0  # from SIGKILL until a process that will not go is left behind


class EventHook:
    """One program for one coordinator.

    Args:
        argv: the program and its arguments. No shell: `["sh", "-c", "…"]` says so where one is wanted.
        about: what each event gets beside its own fields, such as `run`, `job` and `run_dir`.
        types: the types of events that it is for.
        timeout_s: after so many seconds the program and its process group are killed; a little later where this process
            cannot do it, because it was killed or is stopped (`hook_guard`).
        umask: the program's; -1 for this process's own.

    The program leads a session of its own, has this process's environment and working directory, and no descriptors
    but 0, 1 and 2. The end of its output is logged where it failed. What it leaves running when it ends by itself is
    its own business; nobody reads the output of that.
    """

    def __init__(
        self,
        argv: Sequence[str],
        about: Mapping[str, object],
        *,
        types: Iterable[str] = PAGED_TYPES,
        timeout_s: float = 10.0,
        umask: int = -1,
    ) -> None:
        self._argv = list(argv)
        self._about = dict(about)
        self._types = frozenset(types)
        self._timeout_s = timeout_s
        self._umask = umask
        self._changed = threading.Condition()  # for what follows
        self._queue: deque[Mapping[str, Any]] = deque(maxlen=QUEUE_MOST)
        self._thread: threading.Thread | None = None
        self._guard: subprocess.Popen[bytes] | None = None  # of the thread's own
        self._end_by = float("inf")
        self._told = 0
        self._dropped = 0  # since the program was last told of an event
        self._wrong: Counter[str] = Counter()  # events that were not told, by why

    def tell(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Have the program told of events, in this order, if they are of its types. At once, from any thread."""
        wanted = [dict(event) for event in events if event.get("type") in self._types]
        with self._changed:
            if not wanted or self._end_by < float("inf"):
                return
            dropped = max(0, len(self._queue) + len(wanted) - QUEUE_MOST)
            self._queue.extend(wanted)
            self._dropped += dropped
            self._changed.notify()
            starts = None
            if self._thread is None:
                starts = self._thread = threading.Thread(target=self._work, name="on_event", daemon=True)
        if dropped:
            self._complain("dropped", "more events than it can keep up with: the oldest are dropped", count=dropped)
        if starts:
            try:
                starts.start()
            except RuntimeError as e:  # a limit of processes
                self._thread = None  # the next event tries again
                self._complain("without a thread", str(e), count=0)

    async def aclose(self, timeout_s: float) -> None:
        """Take no more events, and return when the last one was told, or after so many seconds (and a little)."""
        with self._changed:
            self._end_by = time.monotonic() + timeout_s
            self._changed.notify()
            thread = self._thread
        # Not `to_thread`: its threads may all be held up by a file system that hangs.
        while thread and thread.is_alive() and time.monotonic() < self._end_by + _KILL_S:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)
        with self._changed:
            if self._queue:
                self._wrong["not told at the end"] += len(self._queue)
                self._queue.clear()
            if untold := self._wrong.total():
                why = ", ".join(f"{count} {kind}" for kind, count in self._wrong.items() if count)
                log.warning(
                    "on_event %s: %d of %d events not told (%s)", self._argv[0], untold, untold + self._told, why
                )

    # ------------------------------------------------------------------------------------------------ in its own thread

    def _work(self) -> None:
        try:
            self._tell_all()
        finally:
            self._dismiss_guard()

    def _tell_all(self) -> None:
        while (event := self._next()) is not None:
            kind, detail = self._run((json.dumps(event) + "\n").encode())
            if kind:
                self._complain(kind, f"for {event['text']}: {detail}")
            else:
                self._told += 1

    def _next(self) -> dict[str, Any] | None:
        """Wait for the next event and return all that is said of it; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._end_by < float("inf"))
            if not self._queue or time.monotonic() >= self._end_by:
                return None
            event = self._queue.popleft()
            dropped, self._dropped = self._dropped, 0
        text = " ".join(view.event_line(event).split())
        return {**self._about, **event, "text": text} | ({"dropped": dropped} if dropped else {})

    def _run(self, document: bytes) -> tuple[str, str]:
        """Run the program once. Return what kind of thing went wrong, and more about it; empty when nothing did."""
        try:
            process = subprocess.Popen(
                self._argv,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=self._umask,
            )
        except (OSError, ValueError) as e:
            return "cannot be started", str(e)
        assert process.stdin is not None
        assert process.stdout is not None
        if found := proc.read(process.pid):
            self._tell_guard(f"{process.pid} {found.started} {self._timeout_s + _KILL_S}")
        try:
            return self._attend(process, process.stdin, process.stdout, document)
        finally:
            self._tell_guard("")
            process.stdin.close()
            process.stdout.close()

    def _tell_guard(self, line: str) -> None:
        try:
            if self._guard is None:
                self._guard = subprocess.Popen(
                    [sys.executable, "-IS", _GUARD],
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                assert self._guard.stdin is not None
                os.set_blocking(self._guard.stdin.fileno(), False)  # it may be stopped, too
            assert self._guard.stdin is not None
            self._guard.stdin.write(f"{line}\n".encode())
        except OSError as e:
            self._complain("without a guard", f"{e}: a program that hangs may outlive a coordinator that dies", count=0)

    def _dismiss_guard(self) -> None:
        if self._guard is None:
            return
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guard.wait(_KILL_S)
            return
        self._guard.kill()
        self._guard.wait()

    def _attend(
        self, process: subprocess.Popen[bytes], stdin: IO[bytes], stdout: IO[bytes], document: bytes
    ) -> tuple[str, str]:
        # Not `communicate`: that waits for whoever holds the other end of a pipe, long after the program has ended, and
        # keeps all that was said.
        os.set_blocking(stdin.fileno(), False)
        os.set_blocking(stdout.fileno(), False)
        unread, said, began = document, b"", time.monotonic()
        while True:
            unread = _write(stdin, unread)
            said = _read(stdout, said)
            left_s = min(began + self._timeout_s, self._end_by) - time.monotonic()
            if left_s <= 0:
                _kill(process)
                if self._end_by < began + self._timeout_s:
                    return "killed at the end", "the run has ended"
                return "killed", f"it took longer than {self._timeout_s:g} s" + _quoted(said)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(min(left_s, _LOOK_S))
                break
        said = _read(stdout, said)
        if code == 0:
            return "", ""
        kind = f"exit code {code}" if code > 0 else f"signal {-code}"
        return kind, kind + _quoted(said)

    def _complain(self, kind: str, detail: str, *, count: int = 1) -> None:
        with self._changed:
            first = kind not in self._wrong
            self._wrong[kind] += count
        if first:
            log.warning(
                "on_event %s: %s. The run goes on; more of this kind is only counted", self._argv[0], detail.rstrip(".")
            )


def _write(pipe: IO[bytes], data: bytes) -> bytes:
    """Write what the pipe takes and return the rest; close it behind the last byte."""
    if pipe.closed:
        return b""
    try:
        data = data[pipe.write(data) or 0 :]
    except BrokenPipeError:
        data = b""  # a program need not read it
    if not data:
        pipe.close()
    return data


def _read(pipe: IO[bytes], said: bytes) -> bytes:
    """Return the end of what was said, with what the pipe holds now."""
    return (said + (pipe.read(_PIPE_BYTES) or b""))[-TAIL_BYTES:]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the program, which was not waited for yet, and its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_S)


def _quoted(said: bytes) -> str:
    text = " ".join(said.decode(errors="replace").split())
    return f", and said: {text}" if text else ""
