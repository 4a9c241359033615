"""What does it cost a trainer to poll the barrier file?

    .venv/bin/python bench/barrier.py [--groups 1,100] [--polls 2000] [--pollers 64] [--seconds 10] [--json]

One poll: CPU time of `Barrier.current()` while the file stays as it is, and when it was replaced since; beside it, in
the same turn, what a trainer would write by hand, `json.load(open(path))`, and the file only opened and read.

Then a process with 64 pollers, each of which asks once a second (the default of `wait_ready`) while another process
replaces the file once a second, beside one whose 64 threads only sleep: how much of a core they take, and how much of
its work a loop of the same process still does. The loop runs with and without pollers in turn, so read the ratio.

Everything is CPU time, user and system, of this process, on the file system of TMPDIR.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from slurm_rollout.barrier import Barrier
from slurm_rollout.rundir import RunDir
from slurm_rollout.store import Store

ROUNDS = 10
POLL_S = 1.0


def document(groups: int, seq: int) -> dict[str, Any]:
    """A barrier file as of a fleet of `groups` groups with one entrypoint each."""
    return {
        "schema": 1,
        "run": "bench",
        "job": "123456",
        "restart_count": 0,
        "term": 1,
        "seq": seq,
        "heartbeat_s": 5.0,
        "epoch": 7,
        "phase": "ready",
        "reason": "",
        "message": "",
        "may_start": "",
        "clients": {"trainer": {"phase": "generating", "seq": 12, "hold": False, "acks": 3}},
        "pools": [
            {"name": "actor", "phase": "ready", "ready": groups, "desired": groups, "min_ready": 1}
            | {"weights_version": 42, "probes": "on", "restarts": "at_once", "may_start": ""}
        ],
        "groups": [
            {
                "id": f"actor/{i}",
                "phase": "ready",
                "serving": True,
                "incarnation": 1,
                "weights": "current",
                "weights_version": 42,
                "urls": [f"http://gpu{i:03}:18000"],
                "endpoints": {"session": [f"http://gpu{i:03}:18003"]},
                "master": f"gpu{i:03}:18001",
                "since": "2026-11-22T16:15:55.658+00:00",
                "reason": "",
                "world_size": 8,
                "changed": 7,
            }
            for i in range(groups)
        ],
    }


class Run:
    """A run directory whose barrier file is replaced as the coordinator does it."""

    def __init__(self, folder: str, groups: int) -> None:
        self._run = RunDir(folder)
        self._store = Store(self._run, 1, private=False)
        self._document = document(groups, 0)
        self.path = str(self._run.barrier)
        self.replace()

    def replace(self) -> None:
        self._document["seq"] += 1
        self._store.write_barrier(self._document)


# -------------------------------------------------------------------------------------------------------------- a poll


def one_poll(groups: int, polls: int) -> dict[str, Any]:
    """One row: CPU seconds of a poll, by who polls, while the file is unchanged and when it changed."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, groups)
        barrier = Barrier(run.path, job="")
        ways: dict[str, Callable[[], object]] = {
            "client": barrier.current,
            "by hand": lambda: by_hand(run.path),
            "read only": lambda: read_only(run.path),
        }
        found: dict[str, dict[str, list[float]]] = {way: {"unchanged": [], "changed": []} for way in ways}
        for _ in range(ROUNDS):  # in turn, so that what else the machine does meets all alike
            for way, look in ways.items():
                look()
                began = time.process_time()
                for _ in range(polls // ROUNDS):
                    look()
                found[way]["unchanged"].append((time.process_time() - began) / (polls // ROUNDS))
                spent = 0.0
                for _ in range(polls // ROUNDS):
                    run.replace()
                    began = time.process_time()
                    look()
                    spent += time.process_time() - began
                found[way]["changed"].append(spent / (polls // ROUNDS))
        return {"groups": groups, "bytes": os.path.getsize(run.path), "s": found}


def by_hand(path: str) -> Any:
    with open(path) as file:
        return json.load(file)


def read_only(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


# ---------------------------------------------------------------------------------------------------------- pollers


def many(groups: int, pollers: int, seconds: float) -> dict[str, Any]:
    """One row: what as many threads cost that poll, each way, or only sleep."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, groups)
        barriers = [Barrier(run.path, job="") for _ in range(pollers)]
        ways: dict[str, list[Callable[[], object]]] = {
            "sleep": [lambda: None] * pollers,
            "client": [barrier.current for barrier in barriers],
            "by hand": [lambda: by_hand(run.path)] * pollers,
            "one client": [barriers[0].current],
        }
        context = multiprocessing.get_context("spawn")
        over = context.Event()
        writer = context.Process(target=heartbeat, args=(folder, groups, over))
        writer.start()
        row: dict[str, Any] = {"groups": groups, "pollers": pollers, "core": {}, "work": {}}
        try:
            for way, looks in ways.items():
                with polling(looks):
                    row["core"][way] = busy(seconds)
            for _ in range(ROUNDS // 2):
                for way, looks in ways.items():
                    with polling(looks):
                        row["work"].setdefault(way, []).append(work(seconds / 5))
        finally:
            over.set()
            writer.join()
    return row


def heartbeat(folder: str, groups: int, over: Any) -> None:
    run = Run(folder, groups)
    while not over.wait(POLL_S):
        run.replace()


@contextmanager
def polling(looks: Sequence[Callable[[], object]]) -> Iterator[None]:
    """Threads that look once in POLL_S each, spread over it, and have all looked once."""
    over = threading.Event()

    def poll(look: Callable[[], object], first_s: float) -> None:
        pause_s = first_s
        while not over.wait(pause_s):
            look()
            pause_s = POLL_S

    threads = [threading.Thread(target=poll, args=(look, POLL_S * i / len(looks))) for i, look in enumerate(looks)]
    for thread in threads:
        thread.start()
    time.sleep(POLL_S)
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def busy(seconds: float) -> float:
    """Return the share of a core that this process takes while its main thread sleeps."""
    wall, cpu = time.monotonic(), time.process_time()
    time.sleep(seconds)
    return (time.process_time() - cpu) / (time.monotonic() - wall)


def work(seconds: float) -> float:
    """Return how many rounds a loop that computes does in a second of this process's CPU time."""
    cpu, rounds, end = time.process_time(), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        sum(i * i for i in range(1000))
        rounds += 1
    return rounds / (time.process_time() - cpu)


# ------------------------------------------------------------------------------------------------------------- report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=numbers, default=[1, 100], metavar="N,…")
    parser.add_argument("--polls", type=int, default=2000, help="of each kind (default: 2000)")
    parser.add_argument("--pollers", type=int, default=64, help="threads (default: 64)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each kind of pollers (default: 10)")
    parser.add_argument("--json", action="store_true", help="every figure, for a script")
    args = parser.parse_args()
    found: dict[str, Any] = {
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "polls": [one_poll(groups, args.polls) for groups in args.groups],
        "many": [many(groups, args.pollers, args.seconds) for groups in args.groups],
        "load_after": os.getloadavg()[0],
    }
    print(json.dumps(found) if args.json else "\n".join(tables(found)))
    return 0


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def tables(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['cpus']} CPUs, Python {found['python']}; load {found['load_before']:.2f} before, "
        f"{found['load_after']:.2f} after. CPU of one poll: median (min to max) of {ROUNDS} rounds.",
        "",
        "| groups | file | the file is | client | by hand | opened and read | client to by hand |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["polls"]:
        for case in ("unchanged", "changed"):
            client, hand, read = (row["s"][way][case] for way in ("client", "by hand", "read only"))
            ratio = statistics.median(client) / statistics.median(hand)
            cells = [f"{row['groups']:,}", f"{row['bytes']:,} bytes", case, spread(client), spread(hand), spread(read)]
            lines.append(f"| {' | '.join(cells)} | {ratio:.2f} |")
    lines += [
        "",
        f"Each thread polls once in {POLL_S:g} s. What they take of a core; what a loop of their process does per"
        " second of its CPU, as a part of what it does beside threads that sleep.",
        "",
        "| groups | threads | that | of a core | loop |",
        "|---|---|---|---|---|",
    ]
    for row in found["many"]:
        alone = statistics.median(row["work"]["sleep"])
        for way, share in row["core"].items():
            threads = 1 if way == "one client" else row["pollers"]
            loop = statistics.median(row["work"][way]) / alone
            lines.append(f"| {row['groups']:,} | {threads} | {way} | {share:.2%} | {loop:.3f} |")
    return lines


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values) * 1e6:.0f} µs ({min(values) * 1e6:.0f} to {max(values) * 1e6:.0f})"


if __name__ == "__main__":
    sys.exit(main())
