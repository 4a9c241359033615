"""The demo is the first thing that a newcomer runs: it must work, be quick, and leave nothing behind."""

from __future__ import annotations

import re
import subprocess
import sys
import time


def test_the_demo_recovers_a_crash_and_a_hang_and_leaves_nothing_behind() -> None:
    began = time.monotonic()
    argv = [sys.executable, "-m", "slurm_rollout", "demo", "--load-s=0.5", "--port-base=20000"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 45
    for line in (r"kill -9 +actor/0/1", r"hang \(SIGSTOP\) +actor/1/0"):
        match = re.search(rf"^{line} +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)
        assert match, done.stdout
        times = [float(t) for t in match.groups()]
        assert times == sorted(times)
    assert "processes left behind: 0" in done.stdout


def test_a_demo_whose_ports_are_taken_says_so() -> None:
    """The stranger's port is named; the demo fails instead of hanging for ever."""
    import socket

    with socket.create_server(("0.0.0.0", 20500)):
        argv = [sys.executable, "-m", "slurm_rollout", "demo", "--port-base=20500", "--patience-s=15"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "20500" in done.stderr
