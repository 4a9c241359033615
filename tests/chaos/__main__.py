"""Chaos on a real Slurm cluster of this machine: python -m tests.chaos --seed 1 --minutes 30."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from slurm_rollout.testing.slurm_cluster import SlurmCluster, why_unavailable
from tests.chaos.checker import Bounds, load, summary
from tests.chaos.driver import Chaos
from tests.chaos.records import FAULTS
from tests.chaos.schedule import schedule


def run(
    *, seed: int, duration_s: float, every_s: float, nodes: int, out: Path, spares: int = 1, losses: int = 0
) -> dict[str, Any]:
    """Do it; return the figures and the violations that the checker finds in the records, which are in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.time()

    def say(line: str) -> None:
        print(f"{time.time() - began:7.1f} s  {line}", flush=True)

    plan = schedule(seed, duration_s=duration_s, every_s=every_s, losses=losses)
    say(f"seed {seed}: {len(plan)} faults in {duration_s:.0f} s on {nodes} nodes; records in {out}")
    with SlurmCluster(nodes=nodes + 1) as cluster:
        say(f"Slurm {'.'.join(map(str, cluster.slurm_version))} is up")
        Chaos(cluster, nodes, spares, out, say).run(plan, duration_s)
    return summary(load(out), Bounds())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="A fleet on a real Slurm cluster of this machine, hurt at random from outside, and judged by a "
        "checker that imports nothing of the product. Needs root and Slurm.",
        epilog="Exit codes: 0 all was well; 1 an invariant was broken, or it could not be run.",
    )
    add = parser.add_argument
    add("--seed", type=int, default=1, help="the faults and their times follow from it (default: 1)")
    add("--minutes", type=float, default=30.0, help="of faults (default: 30)")
    add("--every", type=float, default=6.0, metavar="S", help="mean seconds between faults (default: 6)")
    add("--nodes", type=int, default=6, help="of the fleet, a spare included (default: 6)")
    add("--spares", type=int, default=1, help="nodes of them that are in no group at first (default: 1)")
    add("--losses", type=int, default=1, help="nodes that Slurm gives up, at most as many as spares (default: 1)")
    add("--out", type=Path, help="folder for the records (default: chaos-SEED here); those of an earlier run go")
    args = parser.parse_args()
    if args.nodes < args.spares + 3:
        parser.error(f"--nodes: at least {args.spares + 3}: a group of two, two groups that share one, and the spares")
    if not 0 <= args.losses <= args.spares:
        parser.error(f"--losses: 0 to {args.spares}: a job never gets a node back that Slurm gave up")
    if reason := why_unavailable():
        print(f"tests.chaos: real Slurm cannot run here: {reason}", file=sys.stderr)
        return 1
    out = (args.out or Path(f"chaos-{args.seed}")).absolute()
    if (out / FAULTS).exists():
        shutil.rmtree(out)
    elif out.exists() and any(out.iterdir()):
        parser.error(f"--out {out}: has other files than records of a run")
    found = run(
        seed=args.seed,
        duration_s=60 * args.minutes,
        every_s=args.every,
        nodes=args.nodes,
        spares=args.spares,
        losses=args.losses,
        out=out,
    )
    text = json.dumps(found, indent=2)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
