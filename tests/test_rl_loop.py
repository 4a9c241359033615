"""`examples/rl_loop`: a loop whose engines are killed throughout keeps no stale sample, and its proof can fail.

Local fleets here have ports 19600 to 19759.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import proc
from slurm_rollout.testing.fleet import LocalFleet, wait_for
from tests.conftest import FAILED
from tests.rl_loop_long import EXAMPLE, SPEC, example_module, figures, run_on_slurm

BASES = itertools.cycle((19600, 19680))

prove = example_module("proof").prove
chaos = example_module("chaos")


# ------------------------------------------------------------------------------------------------------------ the proof

GOOD: dict[str, Any] = {
    "what": "kept",
    "group": "actor/0",
    "incarnation": 1,
    "version": 7,
    "stamp": {"group": "actor/0", "incarnation": 1, "rank": 0, "weights_version": 7},
    "sent_at": 110.0,
    "checked_at": 111.0,
}
EVENTS = [
    {"at": 100.0, "type": "ready", "group": "actor/0", "incarnation": 1, "reason": ""},
    {"at": 101.0, "type": "weights", "data": {"client": "trainer", "version": 7}},
    {"at": 120.0, "type": "weights", "data": {"client": "trainer", "version": 7}},
    {"at": 130.0, "type": "weights", "data": {"client": "trainer", "version": 8}},
    {"at": 200.0, "type": "failure", "group": "actor/0", "incarnation": 1, "reason": "engine_exited"},
    {"at": 200.5, "type": "stopped", "group": "actor/0", "incarnation": 1, "reason": ""},
]
ACKS = [{"n": 1, "version": 7, "groups": [["actor/0", 1]]}, {"n": 2, "version": 8, "groups": [["actor/0", 1]]}]
HARM = [
    {"at": 150.0, "kind": "stutter", "group": "actor/0", "incarnation": 1, "rank": 0},
    {"at": 199.9, "kind": "kill", "group": "actor/0", "incarnation": 1, "rank": 0},
]


def judged(folder: Path, journal: list[dict[str, Any]], harm: list[dict[str, Any]] = HARM) -> dict[str, Any]:
    for name, lines in {
        "events.1.jsonl": EVENTS[:3],
        "events.2.jsonl": EVENTS[3:],
        "clients/trainer.acks.jsonl": ACKS,
        "rl_loop/journal.jsonl": journal,
        "rl_loop/harm.jsonl": harm,
    }.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    verdict = prove(folder)
    assert isinstance(verdict, dict)
    return verdict


def test_the_proof_accepts_good_samples(tmp_path: Path) -> None:
    later = {"version": 8, "stamp": {**GOOD["stamp"], "weights_version": 8}}
    journal = [
        GOOD,
        {**GOOD, "sent_at": 125.0, "checked_at": 130.5},  # the next version's barrier is just being written
        {**GOOD, **later, "sent_at": 199.0, "checked_at": 200.2},  # its engine dies while the answer is on its way
    ]
    verdict = judged(tmp_path, journal)
    assert (verdict["kept"], verdict["stale"], verdict["why"]) == (3, 0, {})
    assert verdict["harm"] == {"stutter": 1, "kill": 1}
    assert verdict["failures"] == {"engine_exited": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stamp": {**GOOD["stamp"], "incarnation": 2}}, "another_incarnation"),
        ({"stamp": {**GOOD["stamp"], "group": "actor/1"}}, "another_incarnation"),
        ({"stamp": None}, "another_incarnation"),
        ({"stamp": {**GOOD["stamp"], "weights_version": None}}, "other_weights"),
        ({"stamp": {**GOOD["stamp"], "weights_version": 6}}, "other_weights"),
        ({"stamp": {**GOOD["stamp"], "weights_version_end": 8}}, "other_weights"),
        ({"sent_at": 99.0}, "not_proved_yet"),
        ({"checked_at": 200.6}, "dead_incarnation"),
        ({"incarnation": 2}, "not_acknowledged"),
        ({"version": 9}, "not_acknowledged"),
        ({"sent_at": 100.5}, "not_the_version_then"),
        ({"sent_at": 132.0, "checked_at": 133.0}, "not_the_version_then"),
        ({"version": 8}, "not_the_version_then"),
        ({"sent_at": 200.1}, "asked_after_its_death"),
    ],
)
def test_the_proof_finds_a_sample_that_should_not_have_been_kept(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    verdict = judged(tmp_path, [GOOD, {**GOOD, **change}])
    assert (verdict["kept"], verdict["stale"]) == (2, 1)
    assert verdict["why"].get(reason) == 1
    assert verdict["examples"][0]["reasons"]


def test_the_proof_counts_what_the_loop_did_not_keep(tmp_path: Path) -> None:
    other = {"stamp": {**GOOD["stamp"], "incarnation": 2}}
    journal = [
        {**GOOD, "what": "dropped", "why": "not_current", **other},
        {**GOOD, "what": "dropped", "why": "not_current"},  # it was good, but its engine died a moment later
        {"what": "dropped", "why": "no_answer", "group": "actor/0", "incarnation": 1},
    ]
    verdict = judged(tmp_path, journal)
    assert (verdict["kept"], verdict["stale"], verdict["caught"]) == (0, 0, 1)
    assert verdict["dropped"] == {"not_current": 2, "no_answer": 1}


# --------------------------------------------------------------------------------------------------------- a real fleet


@pytest.fixture
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path) as fleet:
        yield fleet
        if request.node.stash.get(FAILED, False):
            print(fleet.story())


def spec(update_s: float = 0.1) -> str:
    """The example's own, with ports for this test and its interpreter."""
    text = f"ports.base = {next(BASES)}\n{SPEC}"
    for old, new in (('"python3", "-m"', f'"{sys.executable}", "-m"'), ("--update-s=0.1", f"--update-s={update_s:g}")):
        assert old in text
        text = text.replace(old, new)
    return text


class Loop:
    """The example, run as its README says until it has gone through enough."""

    def __init__(self, fleet: LocalFleet, *options: str, update_s: float = 0.1) -> None:
        self.fleet = fleet
        self.began = len(fleet.output())
        self.until = fleet.folder / "until"
        self.until.unlink(missing_ok=True)
        (fleet.run.path / "rl_loop/journal.jsonl").unlink(missing_ok=True)
        trainer = [sys.executable, str(EXAMPLE / "trainer.py"), "--minutes=1.5", f"--until={self.until}", *options]
        fleet.start(spec(update_s), trainer)

    def ends(self, enough: Callable[[dict[str, Any]], bool]) -> tuple[int, dict[str, Any]]:
        """Return the exit code and the summary, once what would be in the summary is enough."""
        fleet = self.fleet

        def seen() -> bool:
            return fleet.has_ended() or (bool(fleet.events("weights")) and enough(prove(fleet.run.path)))

        wait_for("enough", seen, timeout_s=90, period_s=0.5)
        self.until.touch()
        code = fleet.exit_code(timeout_s=60)
        assert not fleet.processes()
        return code, figures(fleet.output()[self.began :])


@pytest.mark.timeout(300)
def test_a_loop_whose_engines_die_keeps_no_stale_sample(fleet: LocalFleet) -> None:
    def enough(seen: dict[str, Any]) -> bool:
        harm = sum(seen["harm"].values())
        return bool(seen["kept"] > 100 and seen["steps"] >= 3 and seen["recoveries"] >= 4 and harm >= 6)

    code, summary = Loop(fleet, "--chaos=3").ends(enough)
    assert (code, summary["error"], summary["stale"]) == (0, "", 0), summary
    assert enough(summary), summary
    assert summary["version"] == 1 + summary["steps"]
    assert not fleet.events("ack_refused")
    # The checkpoint of the next trainer is older than the fleet's weights: it goes back, and says so.
    code, again = Loop(fleet, "--chaos=0", "--version=2").ends(lambda seen: seen["kept"] > 0)
    assert (code, again["error"], again["stale"]) == (0, "", 0), again
    assert again["version"] < summary["version"]
    assert again["kept"]
    assert not fleet.events("ack_refused")


@pytest.mark.timeout(180)
def test_a_loop_that_trusts_every_answer_is_found_out(fleet: LocalFleet) -> None:
    reasons = {"another_incarnation", "other_weights", "dead_incarnation"}
    loop = Loop(fleet, "--chaos=2", "--harm=kill", "--step-s=4", "--trust-everything")
    code, summary = loop.ends(lambda seen: reasons <= seen["why"].keys())
    assert code == 1
    assert summary["error"] == ""
    assert summary["stale"] > 0
    assert reasons <= summary["why"].keys()


@pytest.mark.timeout(240)
def test_a_loop_whose_engines_all_hang_in_a_push_goes_on(fleet: LocalFleet) -> None:
    """Probes rest while it pushes: pushing again and again, it would wait for engines that nobody looks at."""
    loop = Loop(fleet, "--chaos=0", "--step-s=1", update_s=1)  # so long that the push cannot be missed
    fleet.wait("a step", lambda: len(fleet.events("weights")) > 1, timeout_s=30)
    engines = chaos.engines(fleet.run.path)
    for phase in ("training", "syncing"):
        wait_for(phase, lambda: fleet.barrier()["clients"]["trainer"]["phase"] == phase, period_s=0.002)  # noqa: B023
    for pid in engines:
        os.kill(pid, signal.SIGSTOP)
    steps = len(fleet.events("weights")) - 1  # one before the first step

    def enough(seen: dict[str, Any]) -> bool:
        return bool(seen["pushes_failed"] >= 2 and seen["recoveries"] >= 1 and seen["steps"] > steps)

    code, summary = loop.ends(enough)
    assert code == 0
    assert enough(summary), summary
    assert summary["failures"]["not_answering"] >= 1
    assert summary["stale"] == 0


def test_chaos_touches_engines_of_its_own_run_only(fleet: LocalFleet) -> None:
    fleet.start(spec())
    fleet.wait_phase("needs_weights")
    own = chaos.engines(fleet.run.path)
    assert sorted((e["ROLLOUT_GROUP"], e["ROLLOUT_RANK"]) for e in own.values()) == [
        (group, rank) for group in ("actor/0", "actor/1") for rank in ("0", "1")
    ]
    assert chaos.engines(fleet.run.path.with_name("other")) == {}
    began = time.time()
    others = [*fleet.agents("actor/0"), *fleet.agents("actor/1"), fleet.coordinator()]
    deed = chaos.harm_member(fleet.run.path, "hang", chaos.random.Random(5))

    def stopped() -> list[int]:
        return [pid for pid in (*own, *others) if (found := proc.read(pid)) and found.state == "T"]

    [pid] = wait_for("a stopped process", stopped)
    assert pid == fleet.engine(deed["group"], deed["rank"])
    assert deed["incarnation"] == 1
    assert began <= deed["at"] <= time.time()


def test_chaos_leaves_a_member_alone_that_hangs_already(fleet: LocalFleet) -> None:
    """A stutter would wake it up again, and the log of the harm would be wrong."""
    fleet.start(spec())
    fleet.wait_phase("needs_weights")
    own = chaos.engines(fleet.run.path)
    for pid in own:
        os.kill(pid, signal.SIGSTOP)
    wait_for("them to stop", lambda: all(map(chaos.is_stopped, own)))
    assert chaos.harm_member(fleet.run.path, "stutter", chaos.random.Random(1)) == {}


def test_the_fleet_of_the_example_is_planned_without_a_warning() -> None:
    argv = [sys.executable, "-m", "slurm_rollout", "plan", str(EXAMPLE / "fleet.toml"), "--json"]
    done = subprocess.run(
        [*argv, "--nodes=n[1-4]", "--gpus-per-node=8"], capture_output=True, text=True, timeout=30, check=True
    )
    plan = json.loads(done.stdout)
    assert plan["warnings"] == []
    assert [len(g["members"]) for g in plan["pools"][0]["groups"]] == [2, 2]


@pytest.mark.slurm
@pytest.mark.timeout(240)
def test_the_same_on_real_slurm(request: pytest.FixtureRequest) -> None:
    summary = run_on_slurm(request.getfixturevalue("cluster"), minutes=1, every_s=4, seed=1)
    assert (summary["exit"], summary["error"], summary["stale"]) == ("COMPLETED", "", 0), summary
    assert summary["kept"] > 100
    assert summary["recoveries"] >= 2
