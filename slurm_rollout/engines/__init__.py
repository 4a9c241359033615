"""Engine adapters: what is special about a kind of engine, and nothing else.

An adapter is pure: from the pool's `engine` table and a member's place it makes the command line, the variables, the
names of the ports, and says which ranks take requests and which request proves inference. `core.request.Engine` is
the whole seam; placement, launching, probing and fencing know no kind of engine.
"""

from __future__ import annotations

from slurm_rollout.core.request import Engine, MemberPlace
from slurm_rollout.engines.command import CommandEngine

__all__ = ["CommandEngine", "Engine", "MemberPlace"]
