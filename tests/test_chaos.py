"""The chaos run: its schedule, its checker, each of whose invariants a doctored history turns red, and a short run."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import checker, prober, records
from tests.chaos.__main__ import run
from tests.chaos.checker import Bounds, Fault, History, Version, violations
from tests.chaos.schedule import HARMLESS, LOSS, SILENT_S, WEIGHTS, schedule

BOUNDS = Bounds()
GROUPS = {"actor/0": ["n2", "n3"], "actor/1": ["n4", "n5"], "reward/0": ["n6"]}
URLS = {group: [f"http://{node}:18000" for node in nodes] for group, nodes in GROUPS.items()}


def version(at: float, *, epoch: int = 1, term: int = 1, down: Sequence[str] = (), **incarnations: int) -> Version:
    """The barrier at that time: all groups serve their first incarnation, but for those that are said."""
    groups = [
        {
            "id": group,
            "serving": group not in down,
            "incarnation": incarnations.get(group.replace("/", "_"), 1),
            "urls": [] if group in down else URLS[group],
            "reason": "engine_exited" if group in down else "",
        }
        for group in GROUPS
    ]
    seq = int(at * 10)
    document = {"epoch": epoch, "term": term, "seq": seq, "heartbeat_s": 0.5, "groups": groups}
    return Version(began=at - 0.001, at=at, document=document)


def event(at: float, type_: str, group: str, incarnation: int, **more: Any) -> dict[str, Any]:
    return {"at": at, "type": type_, "group": group, "incarnation": incarnation, **more}


def launching(at: float, group: str, incarnation: int) -> dict[str, Any]:
    return event(at, "launching", group, incarnation, data={"nodes": GROUPS[group]})


def probe(at: float, group: str, incarnation: int, took_s: float = 0.01, **found: Any) -> dict[str, Any]:
    found = found or {"answered_by": [group, incarnation]}
    return {"at": at, "ended": at + took_s, "url": URLS[group][0], "group": group, "incarnation": incarnation, **found}


def sample(at: float, *members: tuple[str, int, int, str]) -> dict[str, Any]:
    names = ("group", "incarnation", "rank", "node")
    return {"at": at, "living": [dict(zip(names, member, strict=True)) for member in members]}


def beats(start: float, stop: float, **how: Any) -> list[Version]:
    """A version every half second."""
    return [version(start + n / 2, **how) for n in range(int((stop - start) * 2))]


KILL = Fault(at=110.0, kind="kill", group="actor/0", incarnation=1, rank=1, node="n3")
STOP = dataclasses.replace(KILL, kind="stop")
CUT = Fault(at=110.0, kind="cut", node="n3", until=140.0, returns_s=10.0)
KILLED: dict[str, Any] = {"epoch": 2, "down": ["actor/0"]}
AGAIN: dict[str, Any] = {"epoch": 3, "actor_0": 2}

GOOD = History(
    faults=(
        KILL,
        Fault(at=120.0, kind="saturate", group="actor/1", incarnation=1, until=126.0, harmless=True),
        Fault(at=130.0, kind="coordinator", harmless=True, detail="term 1"),
    ),
    versions=(
        *beats(100.0, 110.5),
        *beats(110.5, 112.5, **KILLED),
        *beats(112.5, 130.0, **AGAIN),
        *beats(132.0, 160.0, term=2, **AGAIN),
    ),
    events=(
        *(launching(90.0, group, 1) for group in GROUPS),
        *(event(99.0, "ready", group, 1) for group in GROUPS),
        event(110.3, "failure", "actor/0", 1, reason="engine_exited", message="rank 1 ended with signal 9"),
        launching(111.0, "actor/0", 2),
        event(112.45, "ready", "actor/0", 2),
    ),
    probes=(
        probe(101.0, "actor/0", 1),
        probe(109.9, "actor/0", 1, took_s=5.0, error="TimeoutError: timed out"),
        probe(110.4, "actor/0", 1, took_s=2.5, answered_by=["actor/0", 2]),
        probe(121.0, "actor/1", 1, took_s=5.0, error="TimeoutError: timed out"),
    ),
    samples=(
        sample(105.0, ("actor/0", 1, 0, "n2"), ("actor/0", 1, 1, "n3"), ("reward/0", 1, 0, "n6")),
        sample(112.0, ("actor/0", 2, 0, "n2"), ("actor/0", 2, 1, "n3"), ("reward/0", 1, 0, "n6")),
    ),
    calls=({"at": 100.0, "calls": 10}, {"at": 160.0, "calls": 12}),
    end={"at": 160.0, "waited_s": 1.0, "not_ready": [], "left": [], "state": "COMPLETED"},
)


QUIET = dataclasses.replace(GOOD, faults=(), versions=tuple(beats(100.0, 160.0)), events=GOOD.events[:6], probes=())
"""A run in which nothing happened."""


def found(history: History) -> set[str]:
    """The names of the invariants that are broken."""
    return {line.partition(":")[0] for line in violations(history, BOUNDS)}


def doctored(**changes: Any) -> History:
    """The good history, with these records instead of, or after, its own."""
    return dataclasses.replace(GOOD, **changes)


def with_event(*events: dict[str, Any]) -> History:
    return doctored(events=tuple(sorted((*GOOD.events, *events), key=lambda e: float(e["at"]))))


def with_version(*versions: Version) -> History:
    """`versions` in the place of those that were there at about that time."""
    times = [v.at for v in versions]
    kept = [v for v in GOOD.versions if not times[0] <= v.at <= times[-1]]
    return doctored(versions=tuple(sorted((*kept, *versions), key=lambda v: v.at)))


def test_a_run_in_which_all_was_well_is_found_so() -> None:
    assert violations(GOOD, BOUNDS) == []


@pytest.mark.parametrize(
    "versions",
    [
        [version(140.0, term=2, **{**AGAIN, "epoch": 2, "down": ["actor/0"]})],
        [version(140.0, term=1, **AGAIN)],
        [version(140.0, term=2, epoch=4, actor_0=2, actor_1=2), version(140.5, term=2, epoch=5, actor_0=2)],
        [dataclasses.replace(version(140.0), document={})],
        [version(140.0, term=2, **AGAIN), dataclasses.replace(version(139.0, term=2, **AGAIN), at=140.1)],
    ],
    ids=["epoch", "term", "incarnation", "torn", "seq"],
)
def test_what_must_only_grow(versions: list[Version]) -> None:
    assert "nothing_falls" in found(with_version(*versions))


@pytest.mark.parametrize("changed", [{"down": ["actor/1"]}, {"actor_1": 2}])
def test_an_epoch_that_stayed_when_the_membership_changed(changed: dict[str, Any]) -> None:
    assert "an_epoch_is_one_membership" in found(with_version(version(140.0, term=2, **AGAIN | changed)))


def test_an_epoch_that_stayed_when_a_group_only_stopped_serving() -> None:
    odd = version(140.0, term=2, **AGAIN)
    odd.document["groups"][2]["serving"] = False
    assert found(with_version(odd)) == {"an_epoch_is_one_membership"}


@pytest.mark.parametrize("at", [112.6, None])
def test_urls_of_what_was_not_proved_yet(at: float | None) -> None:
    events = [e for e in GOOD.events if (e["type"], e["incarnation"]) != ("ready", 2)]
    if at is not None:
        events.append(event(at, "ready", "actor/0", 2))
    assert found(doctored(events=tuple(events))) == {"offered_when_proved"}


@pytest.mark.parametrize(("told_at", "fine"), [(115.0, True), (140.0, False), (None, False)])
def test_what_a_killed_coordinator_had_no_time_to_tell_the_next_one_tells(told_at: float | None, fine: bool) -> None:
    events = [e for e in GOOD.events if (e["type"], e["incarnation"]) != ("ready", 2)]
    if told_at is not None:
        events.append(event(told_at, "ready", "actor/0", 2))
    killed = Fault(at=112.6, kind="coordinator", harmless=True)
    history = doctored(events=tuple(events), faults=(*GOOD.faults, killed))
    assert found(history) == (set() if fine else {"offered_when_proved"})


def test_a_group_that_serves_without_a_url() -> None:
    odd = version(140.0, term=2, **AGAIN)
    odd.document["groups"][2]["urls"] = []
    assert "offered_when_proved" in found(with_version(odd))


@pytest.mark.parametrize(
    "line",
    [
        probe(105.0, "actor/0", 1, error="HTTP 503"),
        probe(135.0, "actor/0", 2, error="ConnectionRefusedError: refused"),
        probe(135.0, "actor/0", 2, answered_by=["actor/0", 1]),
        probe(135.0, "actor/0", 2, answered_by=["actor/1", 2]),
        probe(105.0, "actor/0", 1, answered_by=["actor/0", 2]),
        probe(128.0, "actor/1", 1, error="TimeoutError: timed out"),
    ],
    ids=["before", "after", "older", "stranger", "newer", "not saturated any more"],
)
def test_a_url_that_does_not_answer_or_as_somebody_else(line: dict[str, Any]) -> None:
    assert found(doctored(probes=(*GOOD.probes, line))) == {"offered_urls_answer"}


@pytest.mark.parametrize("fault", [KILL, STOP, dataclasses.replace(KILL, kind="lie", detail="dead"), CUT])
def test_urls_that_stay_after_a_fault(fault: Fault) -> None:
    assert found(dataclasses.replace(QUIET, faults=(fault,))) == {"urls_leave_after_faults"}


def test_urls_that_stay_although_the_failure_was_seen() -> None:
    late = (*beats(100.0, 112.0), *beats(112.0, 160.0, **KILLED))
    assert found(dataclasses.replace(QUIET, faults=(KILL,), versions=late)) == set()
    seen = (*QUIET.events, event(110.3, "failure", "actor/0", 1, reason="engine_exited"))
    history = dataclasses.replace(QUIET, faults=(KILL,), versions=late, events=seen)
    assert found(history) == {"urls_leave_after_faults"}


def test_a_fault_that_is_lifted_in_time_need_not_be_seen() -> None:
    short = dataclasses.replace(CUT, until=118.0)
    assert found(dataclasses.replace(QUIET, faults=(short,))) == set()


def test_the_bound_begins_anew_with_a_coordinator() -> None:
    late = (*beats(100.0, 121.0), *beats(121.0, 160.0, **KILLED))
    faults = (KILL, Fault(at=111.0, kind="coordinator", harmless=True))
    history = dataclasses.replace(QUIET, versions=late)
    assert found(dataclasses.replace(history, faults=(KILL,))) == {"urls_leave_after_faults"}
    assert found(dataclasses.replace(history, faults=faults)) == set()


@pytest.mark.parametrize(
    ("others", "longer"),
    [
        ([], False),
        ([Fault(at=109.0, kind="stop", group="reward/0", incarnation=1)], True),
        ([Fault(at=109.0, kind="kill", group="reward/0", incarnation=1)], False),
        ([Fault(at=109.0, kind="lie", group="reward/0", incarnation=1, detail="dead")], True),
        ([Fault(at=109.0, kind="lie", group="reward/0", incarnation=1, detail="503")], False),
        ([Fault(at=109.0, kind="stop", group="reward/0", incarnation=9)], False),
        ([Fault(at=109.0, kind="cut", node="n6", until=109.5)], False),
        ([Fault(at=109.0, kind="cut", node="n6", until=112.0)], True),
        ([Fault(at=112.0, kind="loss", node="n6", until=160.0)], True),
    ],
    ids=[
        "alone",
        "two stop",
        "the other ends",
        "it is dead",
        "it says no",
        "it was restarted",
        "it is back",
        "it is cut",
        "it is lost",
    ],
)
def test_a_coordinator_that_suspects_itself_may_take_longer(others: list[Fault], longer: bool) -> None:
    late = (*beats(100.0, 126.0), *beats(126.0, 160.0, **KILLED))
    history = dataclasses.replace(QUIET, versions=late, faults=(STOP, *others))
    mine = [line for line in violations(history, BOUNDS) if "stop actor/0.1" in line]
    assert bool(mine) is not longer


@pytest.mark.parametrize("kind", ["failure", "unready"])
@pytest.mark.parametrize("why", ["saturated", "nothing", "another's", "another incarnation's"])
def test_a_failure_without_a_fault(kind: str, why: str) -> None:
    at, group, incarnation = {
        "saturated": (124.0, "actor/1", 1),
        "nothing": (105.0, "actor/0", 1),
        "another's": (110.5, "actor/1", 1),
        "another incarnation's": (140.0, "actor/0", 2),
    }[why]
    assert "failures_have_causes" in found(with_event(event(at, kind, group, incarnation, reason="not_answering")))


def test_a_group_that_leaves_the_barrier_without_a_word() -> None:
    gone = version(140.0, term=2, **AGAIN | {"epoch": 4, "down": ["actor/1"]})
    assert "failures_have_causes" in found(with_version(gone, *beats(140.5, 160.0, term=2, **AGAIN | {"epoch": 5})))


@pytest.mark.parametrize(
    ("fault", "excused"),
    [
        (None, False),
        (Fault(at=144.0, kind="cut", node="n3", until=146.0), True),
        (Fault(at=144.0, kind="cut", node="n5", until=146.0), False),
        (Fault(at=143.0, kind="coordinator", harmless=True), False),
        (Fault(at=145.5, kind="coordinator", harmless=True), True),
        (Fault(at=120.0, kind="freeze", until=130.0, harmless=True), True),
        (Fault(at=20.0, kind="halt", until=30.0, harmless=True), False),
    ],
)
def test_a_start_may_also_fail_because_of_slurm_or_the_coordinator(fault: Fault | None, excused: bool) -> None:
    history = with_event(
        launching(145.0, "actor/0", 3), event(146.0, "failure", "actor/0", 3, reason="launch_failed", message="")
    )
    faults = (*GOOD.faults, *((fault,) if fault else ()))
    assert found(dataclasses.replace(history, faults=faults)) == (set() if excused else {"failures_have_causes"})


@pytest.mark.parametrize(
    ("members", "broken"),
    [
        ([("actor/0", 1, 1, "n3"), ("actor/0", 2, 0, "n2")], True),
        ([("actor/0", 2, 0, "n2"), ("actor/0", 2, 0, "n2")], True),
        ([("actor/0", 1, 1, "n5"), ("actor/0", 2, 0, "n2")], False),
    ],
    ids=["two incarnations", "twice the same", "on a node that is cut"],
)
def test_what_lives_at_the_same_time(members: list[tuple[str, int, int, str]], broken: bool) -> None:
    cut = Fault(at=100.0, kind="cut", node="n5", until=104.0, returns_s=10.0)
    history = doctored(samples=(*GOOD.samples, sample(113.0, *members)), faults=(*GOOD.faults, cut))
    assert found(history) == ({"one_incarnation_lives"} if broken else set())


def test_a_node_is_back_after_a_while() -> None:
    cut = Fault(at=90.0, kind="cut", node="n3", until=95.0, returns_s=10.0)
    two = sample(113.0, ("actor/0", 1, 1, "n3"), ("actor/0", 2, 0, "n2"))
    history = doctored(samples=(two,), faults=(*GOOD.faults, cut))
    assert found(history) == {"one_incarnation_lives"}


@pytest.mark.parametrize("kills", [0, 1])
def test_a_coordinator_that_does_not_come_back(kills: int) -> None:
    silent = tuple(v for v in GOOD.versions if not 128.0 < v.at < 150.0)
    faults = GOOD.faults if kills else GOOD.faults[:2]
    assert found(doctored(versions=silent, faults=faults)) == {"coordinators_come_back"}


def test_a_coordinator_that_is_gone_at_the_end() -> None:
    silent = tuple(v for v in GOOD.versions if v.at < 145.0)
    assert found(doctored(versions=silent)) == {"coordinators_come_back"}


@pytest.mark.parametrize(
    "end",
    [
        {},
        {**GOOD.end, "not_ready": ["actor/0"]},
        {**GOOD.end, "left": ["4711 python stub"]},
        {**GOOD.end, "state": "FAILED"},
    ],
)
def test_an_end_that_is_none(end: dict[str, Any]) -> None:
    assert found(doctored(end=end)) == {"all_is_well_at_the_end"}


def test_too_many_calls() -> None:
    assert found(doctored(calls=(GOOD.calls[0], {"at": 160.0, "calls": 90}))) == {"calls_stay_within_budget"}


def test_the_figures() -> None:
    figures = checker.summary(GOOD, BOUNDS)
    assert figures["faults"] == {"kill": 1, "saturate": 1, "coordinator": 1}
    assert figures["recoveries"] == {
        "coordinator": {"n": 1, "median_s": 2.0, "max_s": 2.0},
        "kill": {"n": 1, "median_s": 2.5, "max_s": 2.5},
    }
    assert (figures["calls"], figures["calls_per_minute"], figures["calls_per_launch"]) == (2, 2.0, 0.0)
    assert figures["incarnations"] == {"actor/0": 2, "actor/1": 1, "reward/0": 1}
    assert figures["violations"] == []


@pytest.mark.parametrize(("until", "took_s"), [(108.0, 7.5), (95.0, None)])
def test_what_fails_long_after_a_cut_is_no_recovery_of_it(until: float, took_s: float | None) -> None:
    cut = Fault(at=until - 3.0, kind="cut", node="n3", until=until)
    early = dataclasses.replace(GOOD, versions=(*beats(90.0, 100.0), *GOOD.versions))
    assert checker.recovery_s(early, BOUNDS, cut) == took_s


# ------------------------------------------------------------------------------------- the schedule, and the imports


def test_a_schedule_is_the_same_for_the_same_seed_and_has_every_kind() -> None:
    plan = schedule(1, duration_s=1800, every_s=6)
    assert plan == schedule(1, duration_s=1800, every_s=6)
    assert plan != schedule(2, duration_s=1800, every_s=6)
    assert {fault.kind for fault in plan} == set(WEIGHTS) >= HARMLESS
    assert 1800 / 9 < len(plan) < 1800 / 4
    assert any(b.at_s - a.at_s < 0.3 for a, b in itertools.pairwise(plan))


@pytest.mark.parametrize("seed", range(5))
def test_nodes_are_not_cut_while_slurmctld_is_away_and_only_one_at_a_time(seed: int) -> None:
    plan = schedule(seed, duration_s=1800, every_s=3, losses=2)
    lasting = [fault for fault in plan if fault.kind in ("cut", LOSS, "freeze", "halt")]
    assert [fault.kind for fault in lasting].count(LOSS) == 2
    assert len(lasting) > 10
    for before, after in itertools.pairwise(lasting):
        assert before.at_s + before.lasts_s + SILENT_S < after.at_s


@pytest.mark.parametrize("module", [checker, prober, records])
def test_the_checker_and_its_records_import_nothing_of_the_product(module: Any) -> None:
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({module.__file__!r}, run_name='alone')\n"
        "print([name for name in sys.modules if name.startswith('slurm_rollout') or name.startswith('tests')])"
    )
    done = subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "[]\n"


# -------------------------------------------------------------------------------------------------------- the real run


@pytest.mark.slurm
@pytest.mark.timeout(420)
@pytest.mark.usefixtures("real_slurm")
def test_a_short_run_breaks_nothing(tmp_path: Path) -> None:
    figures = run(seed=1, duration_s=40, every_s=4, nodes=4, out=tmp_path)
    assert figures["violations"] == []
    assert sum(figures["faults"].values()) >= 5
    assert figures["recoveries"]
    assert figures["probes"] > 100
    assert figures["samples"] > 30
