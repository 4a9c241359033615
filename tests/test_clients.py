"""What trainers' client files say, as the coordinator reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout.clients import Clients
from slurm_rollout.core.model import Ack, ClientWords
from slurm_rollout.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path)
    made.clients.mkdir()
    return made


def clients(run: RunDir) -> Clients:
    return Clients(run, job="7", restart_count=1)


def say(run: RunDir, client: str = "trainer", **words: Any) -> None:
    document = {"schema": 1, "client": client, "seq": 1, "job": "7", "restart_count": 1, "phase": "training"} | words
    (run.clients / f"{client}.json").write_text(json.dumps(document))


def ack(n: int = 1, **words: Any) -> str:
    document = {"n": n, "version": 3, "groups": [["actor/0", 2]], "job": "7", "restart_count": 1} | words
    return json.dumps(document) + "\n"


def acknowledge(run: RunDir, text: str, client: str = "trainer") -> None:
    with open(run.clients / f"{client}.acks.jsonl", "a", encoding="utf-8") as file:
        file.write(text)


def test_every_clients_words_are_read(run: RunDir) -> None:
    say(run, seq=4, hold_s=600.0)
    say(run, "generator", phase="generating", waiting_s=30)
    acknowledge(run, ack())
    assert clients(run).read({}) == (
        ClientWords(id="generator", seq=1, phase="generating", waiting_s=30.0),
        ClientWords(
            id="trainer",
            seq=4,
            phase="training",
            hold_s=600.0,
            acks=(Ack(n=1, version=3, groups=(("actor/0", 2),)),),
        ),
    )


def test_a_run_outside_slurm_heeds_clients_of_any_job(run: RunDir) -> None:
    say(run)
    (found,) = Clients(run, job="", restart_count=0).read({})
    assert found.phase == "training"


@pytest.mark.parametrize("words", [{"job": "8"}, {"restart_count": 0}])
def test_what_was_said_in_another_job_is_not_heeded(run: RunDir, words: dict[str, Any]) -> None:
    say(run, **words)
    acknowledge(run, ack(**words))
    assert clients(run).read({}) == ()


@pytest.mark.parametrize("words", [{"job": "", "restart_count": None}, {"job": None}])
def test_a_client_outside_slurm_is_heeded(run: RunDir, words: dict[str, Any]) -> None:
    say(run, **words)
    acknowledge(run, ack(**words))
    (found,) = clients(run).read({})
    assert (found.phase, len(found.acks)) == ("training", 1)


def test_acknowledgements_wait_until_they_are_taken_in(run: RunDir) -> None:
    reader = clients(run)
    acknowledge(run, ack(1) + ack(2))
    for _ in range(2):
        (found,) = reader.read({})
        assert [a.n for a in found.acks] == [1, 2]
    acknowledge(run, ack(3))
    (found,) = reader.read({"trainer": 2})
    assert [a.n for a in found.acks] == [3]
    assert reader.read({"trainer": 3}) == ()
    (found,) = clients(run).read({"trainer": 1})  # the next coordinator reads from the start
    assert [a.n for a in found.acks] == [2, 3]


def test_acknowledgements_that_begin_anew_are_read_from_the_start(run: RunDir) -> None:
    reader = clients(run)
    acknowledge(run, ack(1) + ack(2))
    reader.read({})
    (run.clients / "trainer.acks.jsonl").unlink()
    acknowledge(run, ack(3))
    (found,) = reader.read({"trainer": 2})
    assert [a.n for a in found.acks] == [3]


def test_half_a_line_waits_for_its_end(run: RunDir) -> None:
    reader, line = clients(run), ack()
    acknowledge(run, line[:20])
    assert reader.read({}) == ()
    acknowledge(run, line[20:])
    (found,) = reader.read({})
    assert [a.n for a in found.acks] == [1]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"seq": 1}', '{"seq": "x", "phase": ""}', '{"seq": 1, "phase": "sleeping"}', "[" * 100_000],
)
def test_what_is_not_understood_is_said_once_and_not_heeded(
    run: RunDir, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (run.clients / "trainer.json").write_text(text)
    acknowledge(run, "{\n" + '{"n": 1}\n' + ack(2))
    say(run, "generator")
    reader = clients(run)
    for _ in range(2):
        generator, trainer = reader.read({})
        assert (generator.id, trainer.seq, [a.n for a in trainer.acks]) == ("generator", 0, [2])
    assert sum("trainer.json is not understood" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("name", [".trainer.12.tmp", "..json", "a b.json", "x" * 41 + ".json", "trainer.json.new"])
def test_other_files_are_left_alone(run: RunDir, name: str) -> None:
    (run.clients / name).write_text('{"seq": 1, "phase": ""}')
    assert clients(run).read({}) == ()


def test_a_fifo_holds_nobody_up(run: RunDir) -> None:
    os.mkfifo(run.clients / "trainer.json")
    say(run, "generator")
    assert [c.id for c in clients(run).read({})] == ["generator"]


def test_no_directory_says_nothing(tmp_path: Path) -> None:
    assert clients(RunDir(tmp_path / "gone")).read({}) == ()
