"""Slurm that is blind, slow or strict: what runs goes on, what needs it waits, and nobody is charged for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from typing import Any

import pytest

from slurm_rollout.testing.fake_slurm import FakeSlurm
from slurm_rollout.testing.fleet import Fleet, wait_for
from tests.scenarios.lab import PHASES, FakeLab, Lab, SlurmLab, assert_recovered, budget, heartbeats, unkillable

on_slurm = pytest.mark.parametrize("lab", ["fake", pytest.param("slurm", marks=pytest.mark.slurm)], indirect=True)


def chosen(cases: Iterable[str], *always: str) -> list[Any]:
    """Return the cases, but those that always run marked: all of them on two clusters would take CI many minutes."""
    return [case if case in always else pytest.param(case, marks=pytest.mark.thorough) for case in cases]


on_fake = pytest.mark.parametrize("lab", ["fake"], indirect=True)

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


def engines(fleet: Fleet, group: str) -> dict[int, int]:
    """Return the pids of a group's engines by rank."""
    return {rank: fleet.engine(group, rank) for rank in (0, 1)}


def assert_started_once(fleet: Fleet, *groups: str) -> None:
    """Every incarnation was launched once, and each member of the newest one has one engine."""
    for group in groups or ("actor/0", "actor/1"):
        launched = [e["incarnation"] for e in fleet.events("launching", group)]
        assert launched == sorted(set(launched))
        newest = str(fleet.group(group)["incarnation"])
        for rank in ("0", "1"):
            [environ] = fleet.environs(ROLLOUT_GROUP=group, ROLLOUT_RANK=rank)
            assert environ["ROLLOUT_INCARNATION"] == newest


def assert_blind(lab: FakeLab, since: float) -> None:
    """Status says that Slurm is what does not answer, and since when.

    That is when the question was asked, in Unix time: not before `since`, but for one that was under way then.
    """
    status = lab.status()
    assert status["blind_since"] is not None
    assert since - 3.0 <= status["blind_since"] <= time.time()
    assert "Slurm does not answer" in status["text"]
    assert "Blind since 00:00:" in status["text"]


@on_slurm
@pytest.mark.parametrize("phase", chosen(PHASES, "ready", "launching again"))
def test_a_controller_that_is_away_in_any_phase_costs_only_time(lab: FakeLab, phase: str) -> None:
    fleet = lab.up(groups=2, load_s=1.0, more=BLIND)
    PHASES[phase](fleet)
    away_at, monotonic = time.time(), time.monotonic()
    lab.slurm_away()
    survivors = {g["id"]: engines(fleet, g["id"]) for g in fleet.barrier()["groups"] if g["serving"]}
    if hurt_was(phase):
        survivors.pop("actor/0", None)
    wait_for("blindness", lambda: [e for e in fleet.events("blind") if e["at"] >= away_at], timeout_s=30)
    assert_blind(lab, away_at)
    heartbeats(fleet, 4)
    wait_for("long enough without a controller", lambda: time.monotonic() - monotonic > AWAY_S, timeout_s=60)
    lab.slurm_back()
    wait_for("both groups", lambda: all(g["serving"] for g in fleet.barrier()["groups"]), timeout_s=90)
    fleet.wait_event("sighted", timeout_s=60)
    wait_for("no word of blindness", lambda: lab.status()["blind_since"] is None)
    assert_started_once(fleet)
    assert {group: engines(fleet, group) for group in survivors} == survivors, "what serves is left alone"
    assert not [e for e in fleet.events("failure") if e["reason"] not in ("engine_exited", "launch_failed")]
    for group in ("actor/0", "actor/1"):
        left = budget(fleet, group)
        assert left["start_failures"]["left"] == left["start_failures"]["of"], "a blind Slurm is charged to nobody"
        spent = left["restarts"]["of"] - left["restarts"]["left"]
        assert spent == (group == "actor/0" and hurt_was(phase))


def hurt_was(phase: str) -> bool:
    """Tell whether a member of the first group was killed on the way to the phase."""
    return phase not in ("launching", "loading", "ready")


@on_slurm
def test_a_controller_that_goes_away_between_launch_and_go_keeps_no_group_from_its_start(lab: FakeLab) -> None:
    stranger, _ = lab.occupy(0, BIND)  # refuses connections: only its node's agent meets it
    fleet = lab.up(groups=1, more=BLIND)
    fleet.wait_event("fence_waits", "actor/0", 1)
    away_at = time.time()
    lab.slurm_away()
    wait_for("blindness", lambda: [e for e in fleet.events("blind") if e["at"] >= away_at], timeout_s=30)
    assert_blind(lab, away_at)
    assert not fleet.events("go")
    stranger.kill()
    fleet.wait_serving("actor/0", 1)
    assert lab.status()["blind_since"] is not None, "go and proof need no word of Slurm"
    heartbeats(fleet, 4)
    lab.slurm_back()
    fleet.wait_event("sighted", timeout_s=60)
    assert not fleet.events("failure")


@on_slurm
@pytest.mark.thorough("fake")
@pytest.mark.parametrize(
    "phase", chosen(["launching", "loading", "ready", "failure seen", "loading again"], "ready", "loading again")
)
def test_a_run_that_is_stopped_while_the_controller_is_away_ends_its_engines_at_once(lab: FakeLab, phase: str) -> None:
    fleet = lab.up(groups=2, load_s=1.0, more=BLIND)
    PHASES[phase](fleet)
    if phase == "loading":  # of both: else the drain may have to wait for a start
        fleet.wait_event("go", "actor/1", 1)
    lab.slurm_away()
    fleet.wait_event("blind", timeout_s=30)
    asked_at = time.monotonic()
    lab.cli("stop")
    wait_for("no engine", lambda: not fleet.processes(), timeout_s=10)
    # Where a start was under way only Slurm can say that nothing came of it. The drain does not wait for it for ever.
    ended = fleet.wait_event("ended", timeout_s=40)
    assert time.monotonic() - asked_at < 40
    assert ended["message"] == "drained" or "launch" in phase or phase == "failure seen"
    assert not [e for e in fleet.events("launching") if e["at"] > fleet.wait_event("ending")["at"]]
    lab.slurm_back()
    lab.cluster.wait_job(lab.fleet.job, "COMPLETED" if ended["message"] == "drained" else "FAILED", timeout_s=90)


@on_slurm
@pytest.mark.thorough("fake")
@pytest.mark.parametrize("how", chosen(["hangs", "fails", "does nothing"], "hangs"))
def test_a_scancel_that_has_no_effect_is_given_up_repeated_and_never_run_twice_at_once(lab: FakeLab, how: str) -> None:
    fleet = lab.up(groups=2, more="[slurm]\ncommand_timeout_s = 3\n")
    lab.wait_ready()
    survivors = engines(fleet, "actor/1")
    bad = lab.cluster.home / "bad"
    bad.touch()
    does = {"hangs": "exec sleep 600", "fails": "echo error: no >&2; exit 1", "does nothing": "exit 0"}[how]
    log = lab.wrap("scancel", f"if [ -e {bad} ]; then {does}; fi")
    for agent in fleet.agents("actor/0"):
        os.kill(agent, signal.SIGSTOP)  # nobody but Slurm ends what is left then
    fleet.kill("actor/0", 1)
    fleet.kill("actor/0", 0)
    wait_for("three attempts", lambda: len(log.calls()) >= 3, timeout_s=40)
    assert fleet.group("actor/0")["phase"] == "stopping"
    assert "still ending on" in lab.status()["text"]
    assert not fleet.events("launching", "actor/0", 2)
    assert len(lab.cluster.user_pids("sleep 600")) <= 1
    heartbeats(fleet, 2)
    bad.unlink()
    fleet.wait_serving("actor/0", 2, timeout_s=40)
    assert not lab.cluster.user_pids("sleep 600")
    assert all(len(call.split()) == 2 for call in log.calls()), "one call for both steps"
    assert engines(fleet, "actor/1") == survivors


@on_fake
def test_steps_that_stay_completing_delay_no_recovery(lab: FakeLab) -> None:
    """The agents' own last words are the proof: nobody waits for Slurm's list."""
    assert isinstance(lab.cluster, FakeSlurm)
    fleet = lab.up(groups=2)
    lab.wait_ready()
    lab.cluster.stuck_completing(600)
    survivors = engines(fleet, "actor/1")
    fleet.kill("actor/0", 1)
    assert_recovered(fleet, "actor/0", 2, "engine_exited", 1)
    listed = lab.cluster.run(["scontrol", "-o", "show", "step", lab.fleet.job]).stdout
    assert listed.count(".actor-0.") == 4, "both incarnations' steps are listed"
    assert not fleet.events("blind")
    assert engines(fleet, "actor/1") == survivors
    assert_started_once(fleet)


@on_fake
def test_a_step_that_stays_completing_without_a_word_of_its_agent_is_waited_for(lab: FakeLab) -> None:
    assert isinstance(lab.cluster, FakeSlurm)
    fleet = lab.up(groups=1)
    lab.wait_ready()
    lab.cluster.stuck_completing(4)
    killed_at = time.time()
    for agent in fleet.agents("actor/0"):
        os.kill(agent, signal.SIGKILL)
    fleet.wait_serving("actor/0", 2, timeout_s=40)
    launched = fleet.wait_event("launching", "actor/0", 2)
    assert launched["at"] - killed_at >= 4
    assert_started_once(fleet, "actor/0")


@on_fake
def test_step_creation_that_is_disabled_for_a_while_is_waited_for_and_said(lab: FakeLab) -> None:
    assert isinstance(lab.cluster, FakeSlurm)
    fleet = lab.up(groups=2)
    lab.wait_ready()
    survivors = engines(fleet, "actor/1")
    lab.cluster.disable_steps()
    fleet.kill("actor/0", 1)
    waits = fleet.wait("srun's words", lambda: [e for e in fleet.events("waiting") if "disabled" in e["message"]])
    assert waits[0]["group"] == "actor/0"
    status = lab.status()
    assert "step creation" in status["text"]
    assert status["blind_since"] is None, "Slurm answers; it only puts off"
    heartbeats(fleet, 4)
    lab.cluster.heal()
    fleet.wait_serving("actor/0", 2)
    assert len(fleet.events("failure")) == 1
    assert engines(fleet, "actor/1") == survivors
    assert_started_once(fleet)


@on_fake
def test_a_step_that_slurm_lost_while_it_lives_on_is_fenced_by_its_port(lab: FakeLab) -> None:
    """srun has ended, no list has the step, and the engine still serves."""
    assert isinstance(lab.cluster, FakeSlurm)
    fleet = lab.up(groups=1)
    lab.wait_ready()
    old = engines(fleet, "actor/0")
    for agent in fleet.agents("actor/0"):
        os.kill(agent, signal.SIGSTOP)  # nor does it hear that it is to end
    lab.cluster.deaf_cancel(6)  # else a slow machine cancels before it looks
    lab.cluster.vanish(".actor-0.")
    lab.cluster.lying_srun(".actor-0.1.0")
    lab.cluster.lying_srun(".actor-0.1.1")
    waits = fleet.wait_event("fence_waits", "actor/0", 1)
    assert str(lab.port(0)) in waits["message"] or str(lab.port(1)) in waits["message"]
    lab.cluster.heal()
    fleet.wait_serving("actor/0", 2, timeout_s=60)
    assert not set(engines(fleet, "actor/0").values()) & set(old.values())
    assert_started_once(fleet, "actor/0")


@on_slurm
@pytest.mark.thorough("fake")
@pytest.mark.parametrize("how", chosen(["hangs", "fails"], "hangs"))
def test_an_scontrol_that_does_not_answer_is_asked_less_and_less_often(lab: FakeLab, how: str) -> None:
    fleet = lab.up(groups=2, more=BLIND)
    lab.wait_ready()
    survivors = {group: engines(fleet, group) for group in ("actor/0", "actor/1")}
    bad = lab.cluster.home / "bad"
    bad.touch()
    does = {"hangs": "exec sleep 600", "fails": "echo slurm_load_jobs error: no >&2; exit 1"}[how]
    log = lab.wrap("scontrol", f"if [ -e {bad} ]; then {does}; fi")
    began_at, began = time.time(), time.monotonic()
    fleet.wait_event("blind")
    most = 0

    def watched() -> bool:
        nonlocal most
        most = max(most, len(lab.cluster.user_pids("sleep 600")))
        return time.monotonic() - began > 16

    wait_for("many questions' time", watched, timeout_s=40, period_s=0.2)
    # Three kinds of question, after pauses of 1, 2, 4 and 8 s; every second it would be more than forty.
    assert 4 <= len(log.calls()) <= 18
    assert most <= 3, "one of a kind at once, and each has a deadline"
    status = lab.status()
    assert status["blind_since"] - began_at < 12
    bad.unlink()
    fleet.wait_event("sighted", timeout_s=40)
    assert not fleet.events("failure")
    assert {group: engines(fleet, group) for group in survivors} == survivors


@on_slurm
def test_a_slurm_that_answers_again_is_seen_to_long_before_the_next_audit(lab: FakeLab) -> None:
    """Every group is down: whether the job goes on has to be known before anything is started."""
    fleet = lab.up(groups=1)
    lab.wait_ready()
    bad = lab.cluster.home / "bad"
    bad.touch()
    lab.wrap("scontrol", f"if [ -e {bad} ]; then exit 1; fi")
    fleet.kill("actor/0", 1)
    fleet.wait_event("blind")
    wait_for("the question", lambda: "asking Slurm whether the job is ending" in lab.status()["text"])
    heartbeats(fleet, 4)
    assert not fleet.events("launching", "actor/0", 2)
    bad.unlink()
    fleet.wait_serving("actor/0", 2, timeout_s=40)
    fleet.wait_event("sighted")
    assert_started_once(fleet, "actor/0")


@on_fake
def test_no_more_sruns_than_may_be_wait_for_their_steps_at_once(lab: FakeLab) -> None:
    """Nor are they lost, or started twice, when the coordinator dies with a queue."""
    assert isinstance(lab.cluster, FakeSlurm)
    log = lab.wrap("srun", "")
    lab.cluster.disable_steps()
    fleet = lab.up(groups=2, more="[slurm]\nmax_launching = 2\nlaunch_timeout_s = 60\n")
    waits = fleet.wait_event("waiting", "actor/1", 1)
    assert "slurm.max_launching" in waits["message"]
    assert len(log.calls()) == 2
    assert all(".actor-0." in call for call in log.calls()), "first come, first served"
    os.kill(fleet.coordinator(), signal.SIGKILL)
    fleet.wait_event("takeover")
    fleet.wait_event("launching", "actor/1", 2)
    assert len(log.calls()) == 2
    lab.cluster.heal()
    wait_for("both groups", lambda: all(g.get("serving") for g in fleet.barrier()["groups"]), timeout_s=30)
    assert len(log.calls()) == 4
    assert fleet.group("actor/0")["incarnation"] == 1
    assert fleet.group("actor/1")["incarnation"] == 2
    assert_started_once(fleet)
    assert [e["reason"] for e in fleet.events("failure")] == ["takeover"]
    for group in ("actor/0", "actor/1"):
        left = budget(fleet, group)["start_failures"]
        assert left["left"] == left["of"]


def test_a_process_that_does_not_die_holds_its_group_back_and_is_told_until_it_does(lab: Lab) -> None:
    """On real Slurm until long after UnkillableStepTimeout: then the step is gone, and the process is not."""
    fleet = lab.up(groups=2, pool="fence.timeout_s = 20")
    lab.wait_ready()
    survivors = engines(fleet, "actor/1")
    with unkillable(fleet.engine("actor/0", 0)):
        fleet.kill("actor/0", 1)
        waits = wait_for("the cancel", lambda: "still ending on" in fleet.group("actor/0")["reason"] + told(fleet))
        assert waits
        if isinstance(lab, SlurmLab):
            fleet.wait_event("stopped", "actor/0", 1, timeout_s=150)
            busy = fleet.wait_event("fence_waits", "actor/0", 1, timeout_s=30)
            assert "18000" in busy["message"]
            assert "still accepts" in busy["message"] or "pid" in busy["message"]
        heartbeats(fleet, 2)
        assert not fleet.events("launching", "actor/0", 2)
    fleet.wait_serving("actor/0", 2, timeout_s=120)
    assert engines(fleet, "actor/1") == survivors
    assert_started_once(fleet)


def told(fleet: Fleet) -> str:
    """Return what the barrier says of the whole."""
    return str(fleet.barrier()["message"])
