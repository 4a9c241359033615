"""A shell inside a fake Slurm: `python -m slurm_rollout.testing.fake_slurm DIR`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from slurm_rollout.testing.fake_slurm.cluster import FakeSlurm, FakeSlurmError


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m slurm_rollout.testing.fake_slurm",
        usage="%(prog)s DIR [--nodes N] [--gpus N] [--cpus N] [-- COMMAND ...]",
        description="Run COMMAND, by default your shell, inside a fake Slurm; with it ends all that was started there.",
    )
    parser.add_argument("root", metavar="DIR", type=Path, help="a folder of its own; it stays")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--gpus", type=int, default=8, help="per node; there need not be any")
    parser.add_argument("--cpus", type=int, default=16, help="per node, which may be more than there are")
    words = sys.argv[1:]
    dashes = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:dashes])
    command = words[dashes + 1 :] or [os.environ.get("SHELL", "/bin/sh")]
    try:
        with FakeSlurm(args.root, nodes=args.nodes, gpus=args.gpus, cpus=args.cpus) as slurm:
            path = f"{slurm.commands}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
            return subprocess.run(command, env={**os.environ, "PATH": path}, check=False).returncode
    except (FakeSlurmError, OSError) as e:
        print(f"fake_slurm: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
