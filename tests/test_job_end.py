"""When the job ends, as the coordinator gets to know it; and how `up` has the job requeued."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from slurm_rollout import questions
from slurm_rollout.backend import JobFacts, monotonic, told_time_left_s
from slurm_rollout.coordinator import Coordinator
from slurm_rollout.core.model import Decision, Job, Observation
from slurm_rollout.errors import Unobservable
from slurm_rollout.local import LocalBackend
from slurm_rollout.questions import Background, Questions
from slurm_rollout.rundir import RunDir
from slurm_rollout.slurm.requeue import requeue
from slurm_rollout.testing.world import World, make_plan
from tests.test_steps import FakeBackend


class Slurm(FakeBackend):
    """It answers about the job, and counts that."""

    def __init__(self) -> None:
        super().__init__()
        self.left_s: float | None = None
        self.silent = False
        self.asked = 0

    async def job(self) -> JobFacts:
        self.asked += 1
        if self.silent:
            raise Unobservable("no answer")
        return JobFacts(job=Job.RUNNING, time_left_s=self.left_s)


@pytest.fixture
def slurm() -> Slurm:
    return Slurm()


def look(folder: Path, slurm: Slurm, *, ticks: int = 3, first_term: int = 1) -> list[Observation]:
    """Return what is observed in each of some ticks that want nothing."""
    seen: list[Observation] = []

    async def run() -> None:
        plan = make_plan(1)
        made = Coordinator(plan, RunDir(folder), World(plan).state, slurm, {}, first_term=first_term, drain=False)
        made._note_time_left()
        for _ in range(ticks):
            obs = made._observe([])
            seen.append(obs)
            made._find_out(Decision(state=made._state), obs)
            await made._background.settle()
        await made._background.aclose()
        await made._prober.aclose()

    asyncio.run(run())
    return seen


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setattr(questions, "QUERY_PAUSE_S", 0.0)


def test_slurm_is_asked_once_at_the_start_where_nobody_was_told(tmp_path: Path, slurm: Slurm) -> None:
    slurm.left_s = 100.0
    before = monotonic()
    first, *later = look(tmp_path, slurm)
    assert first.job_ends_at is None
    assert slurm.asked == 1
    for obs in later:
        assert obs.job_ends_at is not None
        assert before + 100 <= obs.job_ends_at <= monotonic() + 100


def test_what_the_batch_script_was_told_spares_the_question(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 100))
    first = look(tmp_path, slurm)[0]
    assert first.job_ends_at is not None
    assert first.job_ends_at == pytest.approx(monotonic() + 100, abs=5)
    assert slurm.asked == 0


def test_a_later_coordinator_asks_for_the_limit_may_have_been_changed(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 100))
    slurm.left_s = 9000.0
    first, *_, last = look(tmp_path, slurm, first_term=0)
    assert first.job_ends_at is None
    assert slurm.asked == 1
    assert last.job_ends_at == pytest.approx(monotonic() + 9000, abs=5)


def test_a_wall_clock_that_jumps_and_a_silent_slurm_change_nothing_and_no_limit_is_none(
    tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.left_s = 100.0

    async def run() -> None:
        background = Background(wake=lambda: None)
        made = Questions(make_plan(1), slurm, background, wake=lambda: None)

        async def ask() -> None:
            made.ask(listing=False, job=True, nodes=False, hurry=True)
            await background.settle()

        await ask()
        known = made.job_ends_at
        assert known is not None
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 7200)
        assert made.job_ends_at == known
        slurm.silent = True
        await ask()
        assert (made.job_ends_at, made.job) == (known, Job.UNKNOWN)
        assert made.failed_at is not None
        slurm.silent, slurm.left_s = False, None
        await ask()
        assert made.job_ends_at is None
        assert slurm.asked == 3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("said", "left_s"), [({}, None), ({"SLURM_JOB_END_TIME": "x"}, None), ({"SLURM_JOB_END_TIME": "1600"}, 600.0)]
)
def test_what_slurm_tells_the_batch_script(said: dict[str, str], left_s: float | None) -> None:
    assert told_time_left_s(said, 1000.0) == left_s
    assert told_time_left_s({"SLURM_JOB_END_TIME": "1"}, 1000.0) == 0.0


def test_a_rehearsal_may_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LocalBackend(make_plan(1), "r", "agent")
    assert asyncio.run(backend.job()).time_left_s is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 100))
    assert asyncio.run(backend.job()).time_left_s == pytest.approx(100, abs=5)


# -------------------------------------------------------------------------------------------------------------- requeue


def scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_job_is_requeued_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SCONTROL_ALL", "1")
    scontrol(tmp_path, monkeypatch, f'echo "$*" "$SCONTROL_ALL" "$LC_ALL" > {tmp_path}/said')
    caplog.set_level("INFO", "slurm_rollout")
    assert requeue("7", timeout_s=10)
    assert (tmp_path / "said").read_text().split() == ["requeue", "7", "C"]
    assert "job 7 is requeued" in caplog.text


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("echo 'Requested operation is presently disabled' >&2; exit 1", "presently disabled"),
        ("exit 1", "exit code 1"),
        ("exec sleep 60", "no answer within 0.2 s"),
    ],
)
def test_a_job_that_slurm_does_not_requeue_says_why_and_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    does: str,
    words: str,
) -> None:
    scontrol(tmp_path, monkeypatch, does)
    assert not requeue("7", timeout_s=0.2 if "sleep" in does else 10)
    assert "job 7 is not requeued: " in caplog.text
    assert words in caplog.text
    assert "#SBATCH --requeue" in caplog.text
