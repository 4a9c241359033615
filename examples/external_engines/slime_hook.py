"""For slime's `--custom-update-weight-post-write-path slime_hook.before_reload`: wait for the fleet before a push.

slime calls it on every trainer rank after a checkpoint is written and before the engines are told to load it. It asks
all engines that it was given at its start, has no time-out for that, and ends when one of them is not there: so nothing
may be missing just then. Rank 0 waits until every group is alive, and says that weights are on their way: probes rest,
for an engine answers nothing while slime has paused it. `attach.py router --versions …` says when that is over.
"""

from __future__ import annotations

import os
from typing import Any

from attach import CLIENT, wait_alive

from slurm_rollout.barrier import Barrier


def before_reload(args: Any, version_dir: str, rollout_engines: Any) -> None:
    """slime waits for all ranks after this, so the others wait with rank 0."""
    if os.environ.get("RANK") == "0":
        barrier = Barrier(client=CLIENT)
        wait_alive(barrier)
        barrier.announce("syncing")
