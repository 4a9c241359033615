"""Ends a program of `on_event` whose time is up where its coordinator cannot: that was killed, or is stopped.

`hook.py` starts it, once for a coordinator, as a script, and tells it on standard input of each program that it starts
("PID START SECONDS", one line) and that one has ended (an empty line). Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

LOOK_S = 0.2


def main() -> int:
    """Guard one program after the other until standard input ends and the last one is gone."""
    pid = started = 0
    kill_at = 0.0
    unread = b""
    told = True
    while told or pid:
        left_s = max(0.0, kill_at - time.monotonic()) if pid else None
        if told:
            ready = select.select([0], [], [], left_s)[0]
        else:
            time.sleep(min(left_s or 0.0, LOOK_S))
            ready = []
        if ready:
            data = os.read(0, 65536)
            told = bool(data)
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                words = line.split()
                pid, started = (int(words[0]), int(words[1])) if words else (0, 0)
                kill_at = time.monotonic() + float(words[2]) if words else 0.0
        elif pid and time.monotonic() >= kill_at:
            if lives(pid, started):
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
            pid = 0
        elif not told and not lives(pid, started):
            pid = 0
    return 0


def lives(pid: int, started: int) -> bool:
    """Tell whether the process that began at this tick still runs."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
    except OSError:
        return False
    return int(fields[19]) == started and fields[0] not in (b"Z", b"X")


if __name__ == "__main__":
    sys.exit(main())
