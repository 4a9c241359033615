"""Harm the engines of one run, at random and for as long as it lives: kills, hangs, stutters, and holds of the fleet.

    python examples/rl_loop/chaos.py RUN_DIR --every 5

A killed member dies at once (SIGKILL); a hung one is stopped in place (SIGSTOP), so that nothing exits and only a real
request can tell; one that stutters goes on after a few seconds, if it still lives then. A hold keeps the coordinator
from starting anything for a moment. What was done, and when, goes to RUN_DIR/rl_loop/harm.jsonl.

Only processes on this machine whose environment carries the mark of an engine of this very run are ever touched.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from slurm_rollout.barrier import Barrier, BarrierError

SIGNALS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP, "stutter": signal.SIGSTOP}
STUTTER_S = 6.0


def engines(run_dir: Path) -> dict[int, dict[str, str]]:
    """Return the engines of this run that live here: pid to environment."""
    found = {int(entry): environment_of(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()}
    return {pid: environment for pid, environment in found.items() if is_engine(environment, run_dir)}


def is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T"
    return False


def is_engine(environment: dict[str, str], run_dir: Path) -> bool:
    return environment.get("ROLLOUT_RUN_DIR") == str(run_dir) and {"ROLLOUT_MARK", "ROLLOUT_RANK"} <= environment.keys()


def environment_of(pid: int) -> dict[str, str]:
    """Return a process's environment; empty for one that has ended, or is somebody else's."""
    with suppress(OSError):
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return {}


def harm_member(run_dir: Path, kind: str, dice: random.Random) -> dict[str, object]:
    """Kill or stop one member, whichever the dice choose; return which, or nothing where none lives here."""
    # One that hangs already must go on hanging: a stutter would wake it up again.
    living = [pid for pid in sorted(engines(run_dir)) if not is_stopped(pid)]
    with suppress(OSError, IndexError):  # none lives, or it ends by itself just now
        pid = dice.choice(living)
        process = os.pidfd_open(pid)  # so that a pid that was given away meanwhile cannot be hit
        try:
            environment = environment_of(pid)
            if is_engine(environment, run_dir):
                return strike(process, environment, kind, dice)
        finally:
            os.close(process)
    return {}


def strike(process: int, environment: dict[str, str], kind: str, dice: random.Random) -> dict[str, object]:
    signal.pidfd_send_signal(process, SIGNALS[kind])
    at = time.time()
    if kind == "stutter":
        time.sleep(dice.uniform(0.2, STUTTER_S))
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGCONT)
    number = {name: int(environment[f"ROLLOUT_{name.upper()}"]) for name in ("incarnation", "rank")}
    return {"at": at, "group": environment["ROLLOUT_GROUP"], **number}


def hold(barrier: Barrier, dice: random.Random) -> dict[str, object]:
    """Keep the fleet from starting anything for up to two seconds."""
    with suppress(BarrierError):
        with barrier.hold(lease_s=10, timeout=10):
            time.sleep(dice.uniform(0, 2))
        return {"at": time.time(), "client": barrier.client}
    return {}


def main() -> int:
    parser = argparse.ArgumentParser(description="Harm the engines of one run, at random.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--every", type=float, default=5.0, help="mean time between two deeds, in seconds")
    parser.add_argument("--kinds", default="kill,hang,stutter,hold", help="which, and by repetition how often")
    parser.add_argument("--log", default="harm.jsonl", help="name of the file that says what was done (harm*.jsonl)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.run_dir = args.run_dir.absolute()
    dice = random.Random(args.seed)
    barrier = Barrier(args.run_dir / "barrier.json", client="chaos", job="")
    log = args.run_dir / "rl_loop" / args.log
    log.parent.mkdir(exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        while barrier.current().phase not in ("failed", "stopped"):
            time.sleep(dice.uniform(0.2, 1.8) * args.every)
            kind = dice.choice(args.kinds.split(","))
            deed = hold(barrier, dice) if kind == "hold" else harm_member(args.run_dir, kind, dice)
            if deed:
                print(json.dumps({"kind": kind, **deed}), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
