"""Nodes that are lost, back at a bad moment, drained: their groups move, and nobody else's.

On the local backend every node is this machine, so none can be lost; on the fake one a cut node still answers, so that
Slurm's verdict is what counts; on real Slurm connections that time out lead.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from slurm_rollout.testing.fleet import Fleet
from tests.scenarios.lab import FakeLab, Lab, budget, undisturbed


@pytest.fixture
def slurm_lab(lab: Lab) -> FakeLab:
    if not isinstance(lab, FakeLab):
        pytest.skip("a node of the local backend is this machine")
    return lab


def nodes(fleet: Fleet, group: str) -> list[str]:
    """Return where status.json has the group."""
    status = json.loads(fleet.run.status.read_text())
    return next(list(map(str, g["nodes"])) for g in status["groups"] if g["id"] == group)


def up(lab: Lab, *, spares: int = 1, **spec: Any) -> Fleet:
    """Start one group of two nodes and one of one node, which leaves a fourth node: a spare, or nobody's."""
    count = "" if spares else "count = 3\n"
    fleet = lab.up(groups=1, reward=1, nodes=f"{count}spares = {spares}\nlost_after_s = 3\n", **spec)
    lab.wait_ready()
    return fleet


def test_a_group_whose_node_is_lost_moves_to_the_spare_at_no_cost(slurm_lab: FakeLab) -> None:
    lab = slurm_lab
    fleet = up(lab)
    before, old = budget(fleet, "actor/0"), fleet.group("actor/0")
    lost = nodes(fleet, "actor/0")[1]
    left, killed = fleet.engine("actor/0", 1), fleet.engine("actor/0", 0)
    lab.cut(lost)
    os.kill(killed, signal.SIGKILL)
    new = fleet.wait_serving("actor/0", 2, timeout_s=60)
    assert nodes(fleet, "actor/0") == [nodes(fleet, "actor/0")[0], lab.cluster.nodes[3]]
    assert new["urls"][0] == old["urls"][0], "only what was on the lost node has another address"
    assert new["urls"][1] != old["urls"][1]
    assert new["master"].split(":")[0] == old["master"].split(":")[0]
    assert new["master"] != old["master"], "an old rank must not find the new rendezvous"
    assert budget(fleet, "actor/0") == before
    assert fleet.wait_event("node_excluded")["node"] == lost
    assert fleet.wait_event("moved", "actor/0")["reason"] == "node_lost"
    assert undisturbed(fleet, "reward/0")
    assert f"Node {lost} is " in lab.cli("status")
    lab.join(lost)
    fleet.wait("the end of what was left there", lambda: left not in fleet.processes(), timeout_s=100)
    assert fleet.group("actor/0")["incarnation"] == 2


def test_without_a_spare_a_group_waits_and_starts_by_itself_when_its_node_is_back(slurm_lab: FakeLab) -> None:
    """It is back before Slurm gives it up: then it would not be in the job any more."""
    lab = slurm_lab
    fleet = up(lab, spares=0)
    lost, killed = nodes(fleet, "actor/0")[1], fleet.engine("actor/0", 0)
    lab.cut(lost)
    os.kill(killed, signal.SIGKILL)
    if lab.kind == "fake":  # its ports answer all the time: only Slurm can say that the node is lost, and then takes it
        assert fleet.wait_event("waiting", "actor/0", timeout_s=40)["reason"] == "no_node"
        fleet.wait_phase("failed")
        assert fleet.barrier()["reason"] == "no_node"
        return
    fleet.wait("actor/0 to be pending", lambda: fleet.group("actor/0").get("phase") == "pending", timeout_s=18)
    assert fleet.group("actor/0")["reason"] == "no_node"
    assert fleet.barrier()["phase"] == "waiting"
    lab.join(lost)
    fleet.wait_serving("actor/0", 2, timeout_s=60)
    assert lost in nodes(fleet, "actor/0")
    assert undisturbed(fleet, "reward/0")


def test_a_drained_node_loses_its_group_to_the_spare_and_is_taken_back(lab: Lab) -> None:
    fleet = up(lab)
    before = budget(fleet, "actor/0")
    drained = nodes(fleet, "actor/0")[0]
    said = lab.cli("drain", drained)
    assert f"{drained}: is not used any more; actor/0 moves away from it" in said
    fleet.wait_serving("actor/0", 2)
    fleet.wait("its new place", lambda: drained not in nodes(fleet, "actor/0"))
    assert budget(fleet, "actor/0") == before
    assert undisturbed(fleet, "reward/0")
    assert "is used again" in lab.cli("resume", drained)
    assert "nothing to do" in lab.cli("resume", drained)


@pytest.mark.parametrize("lab", [pytest.param("slurm", marks=pytest.mark.slurm)], indirect=True)
def test_the_only_group_needs_no_verdict_of_slurm_when_its_node_alone_is_silent(lab: FakeLab) -> None:
    """Most groups time out, so the coordinator suspects itself, and no agent can agree that is cut off."""
    include = 'include = "n[2-4]"\n'  # n1 is the coordinator's own
    fleet = lab.up(groups=1, entrypoints="leader", nodes=f"{include}spares = 1\nlost_after_s = 3\n")
    lab.wait_ready()
    before = budget(fleet, "actor/0")
    lab.cut("n2")
    failure = fleet.wait_event("failure", "actor/0", timeout_s=40)
    assert (failure["reason"], failure["node"]) == ("not_answering", "n2")
    fleet.wait_serving("actor/0", 2, timeout_s=60)
    assert nodes(fleet, "actor/0") == ["n4", "n3"]
    assert fleet.wait_event("node_excluded")["node"] == "n2"
    assert budget(fleet, "actor/0") == before
