"""`fence.self_fence_s`: agents that hear nothing of the coordinator end their engines by themselves."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from slurm_rollout import proc
from slurm_rollout.testing.fleet import Fleet, wait_for
from slurm_rollout.testing.slurm_cluster import SlurmCluster
from tests.scenarios.lab import Lab, SlurmLab, assert_recovered, heartbeats, undisturbed

SILENCE_S = 6.0

# A spec says 60 s at least. What the agents of these tests are told is shorter: their interpreter changes their orders.
HASTY = """\
#!{python}
import json, os, sys
orders = json.loads(os.environ["ROLLOUT_STEP"])
assert orders["fence"]["self_fence_s"] == 60, orders
orders["fence"]["self_fence_s"] = {silence_s}
os.environ["ROLLOUT_STEP"] = json.dumps(orders)
os.execv("{python}", ["{python}", *sys.argv[1:]])
"""


def hasty(folder: Path, python: str) -> str:
    """Return what a spec needs so that agents fence themselves after `SILENCE_S`."""
    path = folder / "hasty-python"
    path.write_text(HASTY.format(python=python, silence_s=SILENCE_S))
    path.chmod(0o755)
    return f'[slurm]\npython = "{path}"\n[fence]\nself_fence_s = 60\n'


def up(lab: Lab, groups: int) -> Fleet:
    python = lab.cluster.python if isinstance(lab, SlurmLab) else sys.executable
    fleet = lab.up(groups=groups, more=hasty(lab.fleet.folder, str(python)))
    lab.wait_ready()
    heartbeats(fleet, 8)  # every agent has seen some
    return fleet


@pytest.mark.parametrize("how", [pytest.param("frozen", marks=pytest.mark.thorough), "gone"])
@pytest.mark.thorough("fake")
def test_engines_without_a_coordinator_are_ended_and_the_next_one_starts_them_again(lab: Lab, how: str) -> None:
    fleet = up(lab, groups=2)
    coordinator = fleet.coordinator()
    found = proc.read(coordinator)
    assert found is not None
    stopped = coordinator if how == "frozen" else found.parent
    os.kill(stopped, signal.SIGSTOP)
    try:
        if how == "gone":
            os.kill(coordinator, signal.SIGKILL)
        wait_for("no engine", lambda: not fleet.processes(), timeout_s=SILENCE_S + 20)
    finally:
        os.kill(stopped, signal.SIGCONT)
    for group in ("actor/0", "actor/1"):
        assert_recovered(fleet, group, 2, "self_fenced")
        assert "no heartbeat of the coordinator for" in fleet.wait_event("failure", group, 1)["message"]


@pytest.mark.slurm
def test_the_engines_of_a_node_that_is_cut_off_end_while_it_is(cluster: SlurmCluster) -> None:
    lab = SlurmLab(cluster)
    try:
        fleet = up(lab, groups=2)
        others = fleet.processes(ROLLOUT_GROUP="actor/0")
        assert cluster.user_pids("ROLLOUT_GROUP=actor/1", "n4")
        nothing = fleet.folder / "nothing"
        nothing.mkdir()
        # Whoever is cut off has no shared file system, either.
        cluster.in_node("n4", ["mount", "--bind", str(nothing), str(fleet.run.path)], user=False)
        cluster.cut("n4")
        wait_for("no process on n4", lambda: not cluster.user_pids(node="n4"), timeout_s=SILENCE_S + 20)
        cluster.in_node("n4", ["umount", str(fleet.run.path)], user=False)
        assert fleet.processes(ROLLOUT_GROUP="actor/0") == others
        assert undisturbed(fleet, "actor/0")
    except AssertionError:
        print(lab.fleet.story())
        raise
    finally:
        lab.close()
