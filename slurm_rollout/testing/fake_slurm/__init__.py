"""A fake Slurm for tests and for rehearsals on a laptop: no root, no namespaces, nothing to install.

    with FakeSlurm(Path("/tmp/rehearsal")) as slurm:
        job = slurm.sbatch("#!/bin/bash\\nsrun hostname\\n", "-N4", "--exclusive", "--gres=gpu:8")

`srun scancel scontrol squeue sinfo sbatch` are real programs on a PATH, jobs and steps are real processes, and faults
can be had on request. What they say and how they end is that of Slurm 22.05.8, for the options that they know; any
other option is refused. The nodes are names: all of them are this host, so a fleet needs `[nodes] address =
"127.0.0.1"`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slurm_rollout.testing.fake_slurm.cluster import FakeSlurm, FakeSlurmError

__all__ = ["FakeSlurm", "FakeSlurmError"]


def __getattr__(name: str) -> Any:
    # Every fake command imports this package first, and must be as fast as the real one.
    if name in __all__:
        from slurm_rollout.testing.fake_slurm import cluster

        return getattr(cluster, name)
    raise AttributeError(name)
