"""Slurm that is blind, slow or strict: what runs goes on, what needs it waits, and nobody is charged for it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from slurm_rollout.testing.fleet import Fleet, wait_for
from tests.scenarios.lab import PHASES, FakeLab, budget, heartbeats

pytestmark = pytest.mark.parametrize("lab", ["fake", pytest.param("slurm", marks=pytest.mark.slurm)], indirect=True)

BLIND = "audit_s = 2\n[slurm]\ncommand_timeout_s = 3\n"
"""Blindness is found out within seconds also where nothing else is asked of Slurm."""

AWAY_S = 8.0

BIND = """\
import socket, sys, time
holder = socket.socket()
holder.bind(("0.0.0.0", int(sys.argv[1])))
print("up", flush=True)
time.sleep(600)
"""


def serving(fleet: Fleet) -> dict[tuple[str, int], int]:
    """Return the engines of the groups that serve now."""
    return {
        (g["id"], rank): fleet.engine(g["id"], rank)
        for g in fleet.barrier()["groups"]
        for rank in (0, 1)
        if g["serving"]
    }


def assert_started_once(fleet: Fleet) -> None:
    """Every incarnation was launched once, and each member of the newest one has one engine."""
    for group in ("actor/0", "actor/1"):
        launched = [e["incarnation"] for e in fleet.events("launching", group)]
        assert launched == sorted(set(launched))
        newest = str(fleet.group(group)["incarnation"])
        for rank in ("0", "1"):
            [environ] = fleet.environs(ROLLOUT_GROUP=group, ROLLOUT_RANK=rank)
            assert environ["ROLLOUT_INCARNATION"] == newest


def assert_blind(lab: FakeLab, since: float) -> None:
    """Status says that Slurm is what does not answer, and since when: not before `since`, in Unix time."""
    status = lab.status()
    assert status["blind_since"] is not None
    assert since - 0.1 <= status["blind_since"] <= time.time()
    assert "Slurm does not answer" in status["text"]
    assert "Blind since 00:00:" in status["text"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_controller_that_is_away_in_any_phase_costs_only_time(lab: FakeLab, phase: str) -> None:
    fleet = lab.up(groups=2, load_s=1.0, more=BLIND)
    PHASES[phase](fleet)
    lab.slurm_away()
    away_at, monotonic = time.time(), time.monotonic()
    served = serving(fleet)
    fleet.wait_event("blind", timeout_s=30)
    assert_blind(lab, away_at)
    heartbeats(fleet, 4)
    wait_for("long enough without a controller", lambda: time.monotonic() - monotonic > AWAY_S, timeout_s=60)
    lab.slurm_back()
    for group in ("actor/0", "actor/1"):
        wait_for(f"{group} serving", lambda group=group: fleet.group(group)["serving"], timeout_s=90)
    fleet.wait_event("sighted", timeout_s=60)
    wait_for("no word of blindness", lambda: lab.status()["blind_since"] is None)
    assert_started_once(fleet)
    for (group, rank), pid in served.items():
        if group == "actor/1" or phase == "ready":
            assert fleet.engine(group, rank) == pid, "what serves is left alone"
    assert not [e for e in fleet.events("failure") if e["reason"] not in ("engine_exited", "launch_failed")]
    for group in ("actor/0", "actor/1"):
        left = budget(fleet, group)
        assert left["start_failures"]["left"] == left["start_failures"]["of"], "a blind Slurm is charged to nobody"
        spent = left["restarts"]["of"] - left["restarts"]["left"]
        assert spent == (group == "actor/0" and hurt_was(phase))


def hurt_was(phase: str) -> bool:
    """Tell whether a member of the first group was killed on the way to the phase."""
    return phase not in ("launching", "loading", "ready")
