"""`python -m slurm_rollout`: the same as the command `slurm-rollout`."""

import sys

from slurm_rollout.cli import main

if __name__ == "__main__":
    sys.exit(main())
