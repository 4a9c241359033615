"""`examples/rl_loop` on a real Slurm cluster of one machine, for as long as wanted; prints the figures.

    python -m tests.rl_loop_long --minutes 10

Engines are killed, stopped and made to stutter from outside, on all nodes, by the same `chaos.py`; on the batch host a
second one asks for holds; and with `--coordinator-every` the coordinator is killed, too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from slurm_rollout.testing.fleet import SlurmFleet
from slurm_rollout.testing.slurm_cluster import SlurmCluster, why_unavailable

EXAMPLE = Path(__file__).parents[1] / "examples" / "rl_loop"
SPEC = (EXAMPLE / "fleet.toml").read_text(encoding="utf-8")


def example_module(name: str) -> ModuleType:
    """Import a file of the example, which is no package."""
    found = importlib.util.spec_from_file_location(f"rl_loop_{name}", EXAMPLE / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def figures(output: str) -> dict[str, Any]:
    """Return the summary that the trainer printed among everything else."""
    text = output[output.index("\n{\n") :]
    summary = json.loads(text[: text.index("\n}\n") + 2])
    assert isinstance(summary, dict)
    return summary


def run_on_slurm(
    cluster: SlurmCluster, *, minutes: float, every_s: float, seed: int, coordinator_every_s: float = 0
) -> dict[str, Any]:
    """Run the example as a job; return its summary, with the job's end and how long recoveries took."""
    shutil.copytree(EXAMPLE, cluster.home / "rl_loop")
    for path in (cluster.home / "rl_loop", *(cluster.home / "rl_loop").iterdir()):
        shutil.chown(path, cluster.uid, cluster.uid)
    fleet = SlurmFleet(cluster)
    trainer = [str(cluster.python), "rl_loop/trainer.py", f"--minutes={minutes}", f"--chaos={2 * every_s}"]
    with fleet, contextlib.ExitStack() as stack:
        fleet.start(SPEC, [*trainer, "--harm=hold", f"--seed={seed}"])
        fleet.wait("the trainer's first sample", lambda: (fleet.run.path / "rl_loop/journal.jsonl").exists(), 60)
        stack.enter_context(outside(fleet, every_s, seed))
        killed = 0
        dice = random.Random(seed)
        deadline = time.monotonic() + 60 * minutes + 120
        due = time.monotonic() + coordinator_every_s
        while (state := cluster.job_state(fleet.job)) in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, "the job does not end"
            if coordinator_every_s and time.monotonic() > due:
                due = time.monotonic() + dice.uniform(0.5, 1.5) * coordinator_every_s
                os.kill(fleet.coordinator(), signal.SIGKILL)
                killed += 1
            time.sleep(0.5)
        return {**figures(fleet.output()), "exit": state, "coordinators_killed": killed, **recovery_times(fleet)}


@contextlib.contextmanager
def outside(fleet: SlurmFleet[SlurmCluster], every_s: float, seed: int) -> Any:
    """Harm engines of all nodes, from where all their processes can be seen."""
    argv = [sys.executable, str(EXAMPLE / "chaos.py"), str(fleet.run.path), f"--every={every_s}", f"--seed={seed}"]
    chaos = subprocess.Popen([*argv, "--kinds=kill,hang,stutter", "--log=harm.outside.jsonl"])
    try:
        yield
        assert chaos.poll() in (None, 0), "chaos.py has ended"
    finally:
        chaos.terminate()
        chaos.wait()


def recovery_times(fleet: SlurmFleet[SlurmCluster]) -> dict[str, Any]:
    """Return the seconds from each failure that was seen to the group's next readiness: median and maximum."""
    failed: dict[str, float] = {}
    took = []
    for e in fleet.events():
        if e["type"] == "failure":
            failed.setdefault(e["group"], e["at"])
        elif e["type"] == "ready" and e["group"] in failed:
            took.append(e["at"] - failed.pop(e["group"]))
    if not took:
        return {}
    return {"recovery_median_s": round(statistics.median(took), 2), "recovery_max_s": round(max(took), 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=5, help="mean time between two deeds, in seconds")
    parser.add_argument("--coordinator-every", type=float, default=0, help="the same for kills of the coordinator")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if reason := why_unavailable():
        parser.error(reason)
    with SlurmCluster() as cluster:
        summary = run_on_slurm(
            cluster,
            minutes=args.minutes,
            every_s=args.every,
            seed=args.seed,
            coordinator_every_s=args.coordinator_every,
        )
    print(json.dumps(summary, indent=2))
    return 0 if summary["exit"] == "COMPLETED" and not summary["stale"] else 1


if __name__ == "__main__":
    sys.exit(main())
