"""Healthy engines that look ill: nobody may restart them."""

from __future__ import annotations

from tests.scenarios.lab import Lab, live_for, undisturbed

HANG_S = 3.5
"""How long a hang takes to be found here, at most: period + threshold x max(period, timeout)."""

MINUTE_S = 60.0

PATIENT = "probe.liveness = { period_s = 1.0, timeout_s = 2.0 }"
"""A minute is long: a second without a processor must be no time-out in it. A hang still takes much less."""


def test_every_engine_saturated_with_a_rising_counter_is_left_alone(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    fleet.fault("*", saturated=True, slow_s=60)
    fleet.wait_event("slow", "actor/0")
    fleet.wait_event("slow", "actor/1")
    live_for(fleet, 2 * HANG_S)
    assert not fleet.events("unready")
    assert {g["serving"] for g in fleet.barrier()["groups"]} == {True}


def test_a_minute_of_prefill_and_a_minute_under_load_end_no_engine(lab: Lab) -> None:
    """Two of four groups: not so many that the coordinator would suspect itself."""
    fleet = lab.up(groups=4, layout="nodes = 1\nmembers_per_node = 2", pool=PATIENT)
    lab.wait_ready()
    fleet.fault("actor/0", prefill_s=MINUTE_S)
    fleet.fault("actor/1", saturated=True, slow_s=2 * MINUTE_S)
    fleet.wait_event("slow", "actor/0")
    fleet.wait_event("slow", "actor/1")
    live_for(fleet, MINUTE_S)
    assert not fleet.events("unready")
    assert all(undisturbed(fleet, f"actor/{n}") for n in range(4))


def test_a_coordinator_that_is_cut_off_for_a_minute_ends_no_engine(lab: Lab) -> None:
    """Its probes reach nobody; the agents' own, on the nodes, say that all is well."""
    fleet = lab.up(groups=2, pool=PATIENT)
    lab.wait_ready()
    fleet.fault("*", deaf_to="slurm-rollout")
    blind = fleet.wait_event("blind")
    assert blind["reason"] == "probes"
    live_for(fleet, MINUTE_S)
    assert {g["serving"] for g in fleet.barrier()["groups"]} == {True}
    fleet.fault("*", deaf_to="")
    fleet.wait_event("sighted")
    assert not fleet.events("failure")


def test_slow_answers_within_the_time_out_are_answers(lab: Lab) -> None:
    fleet = lab.up(groups=2)
    lab.wait_ready()
    fleet.fault("*", generation="slow:0.25")
    live_for(fleet, 2 * HANG_S)
    assert not fleet.events("unready")
    assert not fleet.events("slow")


def test_a_start_that_takes_longer_than_a_hang_is_no_hang(lab: Lab) -> None:
    fleet = lab.up(groups=2, load_s=HANG_S + 1)
    lab.wait_ready()
    assert undisturbed(fleet, "actor/0")
    assert undisturbed(fleet, "actor/1")
    assert fleet.wait_event("ready", "actor/0")["data"]["start_s"] >= HANG_S + 1
