"""The commands that look and ask, against run directories made by hand: no coordinator, no Slurm."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import barrier
from slurm_rollout.cli import main, status, wait
from slurm_rollout.cli import requests as requests_module

DEADLINE_S = 20.0

# ------------------------------------------------------------------------------------------------------------ builders


def group(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "pool": name.partition("/")[0],
        "phase": "ready",
        "since": 940.0,
        "reason": "first_start",
        "message": "",
        "incarnation": 1,
        "restarts": 0,
        "budget": {
            "window_s": 3600.0,
            "restarts": {"left": 5, "of": 5},
            "start_failures": {"left": 5, "of": 5},
        },
        "next": {"action": "", "at": None},
        "failure": None,
        "nodes": ["gpu05", "gpu06", "gpu07", "gpu08"],
        "slow": False,
        "weights": "none",
        "weights_version": None,
    } | changes


def document(*groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "run": "qwen3-moe-rl",
        "job": "123456",
        "restart_count": 0,
        "term": 1,
        "epoch": 7,
        "host": "gpu01",
        "at": 1000.0,
        "seq": 12,
        "heartbeat_s": 5.0,
        "time_left_s": 36000.0,
        "phase": "ready",
        "reason": "",
        "message": "",
        "ending": "",
        "ending_since": None,
        "ended": False,
        "blind_since": None,
        "suspect_self_since": None,
        "pools": [{"name": "actor", "phase": "ready", "ready": 2, "desired": 2, "min_ready": 1, "reason": ""}],
        "groups": list(groups) or [group("actor/0"), group("actor/1")],
        "nodes": ["gpu05", "gpu06", "gpu07", "gpu08"],
        "spares": [],
        "trainer_nodes": ["gpu01"],
    } | changes


TROUBLED = document(
    group(
        "actor/0",
        phase="backoff",
        since=988.0,
        reason="engine_exited",
        message="next start in 48 s",
        incarnation=3,
        restarts=2,
        budget={
            "window_s": 3600.0,
            "restarts": {"left": 3, "of": 5},
            "start_failures": {"left": 4, "of": 5},
        },
        next={"action": "launch", "at": 1048.0},
        failure={
            "incarnation": 3,
            "reason": "engine_exited",
            "class": "engine_crash",
            "means": "an engine's process ended; see its last lines",
            "message": "code -9 (killed), which nobody asked for",
            "rank": 1,
            "node": "gpu06",
            "at": 987.0,
        },
    ),
    group("actor/1", slow=True, weights="stale", nodes=["gpu09"], since=1000.0 - 90061),
    reason="degraded",
    restart_count=1,
    message="actor/0 backoff (engine_exited)",
    blind_since=940.0,
    spares=["gpu20"],
    pools=[{"name": "actor", "phase": "ready", "ready": 1, "desired": 2, "min_ready": 1, "reason": "degraded"}],
)


EXCLUDED = document(
    excluded=[
        {"name": "gpu06", "reason": "lost", "message": "no answer", "since": 900.0, "back": False, "lost_steps": 1},
        {"name": "gpu07", "reason": "lost", "message": "no answer", "since": 900.0, "back": True, "lost_steps": 0},
    ],
    draining={"gpu08": "Kill task failed"},
)


def event(n: int, type_: str, **fields: Any) -> str:
    return json.dumps({"n": n, "at": 1_790_000_000.25 + n, "term": 1, "type": type_} | fields) + "\n"


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ROLLOUT_RUN_DIR", "ROLLOUT_BARRIER", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_SUBMIT_DIR"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "run"
    (path / "requests").mkdir(parents=True)
    return path


def write(path: Path, content: object) -> None:
    """Replace a file as the coordinator does."""
    staged = path.with_name(f".{path.name}")
    staged.write_text(content if isinstance(content, str) else json.dumps(content))
    staged.replace(path)


def put_status(run_dir: Path, content: dict[str, Any], *, age_s: float = 3.0) -> None:
    """Write a status whose last word is `age_s` old; the other times in it move along."""
    shift = time.time() - age_s - content["at"]

    def move(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: move(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [move(v) for v in value]
        moves = key in ("at", "since", "ending_since", "blind_since", "suspect_self_since", "heard")
        return value + shift if moves and value is not None else value

    write(run_dir / "status.json", move(content))


class Command:
    """`slurm-rollout` as a process of its own, whose lines are read as they come."""

    def __init__(self, *argv: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "slurm_rollout", *map(str, argv)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))

    def line(self) -> str:
        return self._lines.get(timeout=DEADLINE_S)

    def end(self, sent: signal.Signals | None = None) -> tuple[int, str]:
        """Return the exit code and what was said on standard error."""
        if sent is not None:
            self.process.send_signal(sent)
        code = self.process.wait(DEADLINE_S)
        assert self.process.stderr is not None
        return code, self.process.stderr.read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def run(*argv: str | Path) -> Command:
        commands.append(Command(*argv))
        return commands[-1]

    yield run
    for command in commands:
        command.close()


@contextmanager
def somebody_else(run_dir: Path) -> Iterator[None]:
    """Be a user who may enter the run directory, but not list it."""
    if os.geteuid() != 0:
        run_dir.chmod(0o111)
        yield
        run_dir.chmod(0o755)
        return
    run_dir.chmod(0o711)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# ---------------------------------------------------------------------------------------------------------------- main


def test_status_imports_nothing_heavy(run_dir: Path) -> None:
    put_status(run_dir, TROUBLED)
    code = (
        "import sys; from slurm_rollout.cli import main; "
        f"assert main(['status', '--run-dir', {str(run_dir)!r}]) == 3; "
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert loaded.isdisjoint({"pydantic", "httpx", "rich", "submitit", "filelock", "asyncio", "ssl", "dataclasses"})
    ours = {name for name in done.stderr.split() if name.startswith("slurm_rollout.cli.")}
    assert ours == {"slurm_rollout.cli.status", "slurm_rollout.cli.table"}


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for name in ("plan", "up", "demo", "status", "events", "logs", "restart", "drain", "resume", "stop", "wait"):
        assert f"\n  {name} " in said
    assert "examples:" in said


@pytest.mark.parametrize("name", ["status", "events", "logs", "restart", "drain", "resume", "stop", "wait"])
def test_every_command_has_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: slurm-rollout {name} ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split()[0] == "slurm-rollout"


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["--nonsense"], ["status", "--nonsense"], ["logs"], ["events", "-h"]]
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "usage: slurm-rollout" in capsys.readouterr().err


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statsu"]) == 2
    assert "no command 'statsu': choose one of plan, up, submit, simulate, demo, status," in capsys.readouterr().err


def test_a_missing_run_directory_is_a_usage_error(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--run-dir", str(run_dir / "none")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("slurm-rollout: error: no run directory at ")
    assert len(said.splitlines()) == 1


def test_a_reader_that_had_enough_is_no_error(run_dir: Path) -> None:
    (run_dir / "events.1.jsonl").write_text("".join(event(n, "ready", message="x" * 100) for n in range(5000)))
    with subprocess.Popen(
        [sys.executable, "-m", "slurm_rollout", "events", "--run-dir", run_dir],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(DEADLINE_S) == 1


# -------------------------------------------------------------------------------------------------------------- status

GOLDEN_80 = """\
Run qwen3-moe-rl, job 123456 (restart 1): ready (degraded), epoch 7
Coordinator on gpu01, term 1, heard 00:00:03 ago, job time left 10:00:00
actor/0 backoff (engine_exited)
Blind since 00:01:00: Slurm does not answer
Nodes gpu[05-08]; spares gpu20; trainer gpu01

POOL  PHASE READY MIN DESIRED REASON
actor ready     1   1       2 degraded

GROUP   PHASE   SINCE      INC RESTARTS BUDGET  NEXT            NODES(REASON)
actor/0 backoff 00:00:12     3        2 3/5,4/5 launch 00:00:48 gpu[05-08] (eng+
actor/1 ready   1-01:01:01   1        0 5/5     -               gpu09 (slow,sta+

GROUP   MESSAGE
actor/0 next start in 48 s

GROUP   FAILED   INC MEMBER  REASON        LAST FAILURE
actor/0 00:00:13   3 1@gpu06 engine_exited code -9 (killed), which nobody asked+

GROUP   CLASS        MEANS
actor/0 engine_crash an engine's process ended; see its last lines"""

GOLDEN_LOST = """\
Run qwen3-moe-rl, job 123456: ready, epoch 7
NO HEARTBEAT: last word 00:05:00 ago, coordinator on gpu01, term 1
Nodes gpu[05-08]; trainer gpu01

POOL  PHASE READY MIN DESIRED REASON
actor ready     2   1       2

GROUP   PHASE SINCE    INC RESTARTS BUDGET NEXT NODES(REASON)
actor/0 ready 00:01:00   1        0 5/5    -    gpu[05-08]
actor/1 ready 00:01:00   1        0 5/5    -    gpu[05-08]
"""


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, True),
        ({"phase": "ready"}, False),
        ({"phase": "stopped", "reason": "operator"}, False),
        ({"failure": None}, False),
        (
            {"failure": {k: v for k, v in TROUBLED["groups"][0]["failure"].items() if k not in ("class", "means")}},
            False,
        ),
    ],
)
def test_what_a_failure_means_is_said_while_it_matters(changes: dict[str, Any], shown: bool) -> None:
    document = {**TROUBLED, "groups": [{**TROUBLED["groups"][0], **changes}]}
    text = status.render(document, age_s=3.0, verdict=status.ALIVE)
    assert ("engine_crash an engine's process ended" in text) is shown


def test_the_table_at_80_columns() -> None:
    assert status.render(TROUBLED, age_s=3.0, verdict=status.ALIVE, width=80) == GOLDEN_80


def test_a_pipe_gets_whole_lines(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_status(run_dir, TROUBLED)
    assert main(["status", "--run-dir", str(run_dir)]) == 3
    said = capsys.readouterr().out
    assert "gpu[05-08] (engine_exited)\n" in said
    assert "code -9 (killed), which nobody asked for\n" in said
    assert "+" not in said


def test_noheader_prints_the_rows_of_the_groups_alone(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_status(run_dir, document())
    assert main(["status", "-h", "--run-dir", str(run_dir)]) == 0
    assert capsys.readouterr().out == (
        "actor/0 ready 00:01:00 1 0 5/5 - gpu[05-08]\nactor/1 ready 00:01:00 1 0 5/5 - gpu[05-08]\n"
    )


def test_json_is_the_document_with_meta_and_errors(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_status(run_dir, TROUBLED)
    assert main(["status", "--json", "--run-dir", str(run_dir)]) == 3
    said = json.loads(capsys.readouterr().out)
    meta = said.pop("meta")
    assert 2.9 < meta.pop("age_s") < DEADLINE_S
    assert meta == {"schema": 1, "run_dir": str(run_dir), "coordinator": "alive"}
    assert said.pop("errors") == []
    assert said == json.loads((run_dir / "status.json").read_text())


FAILED = group("actor/1", phase="failed", reason="budget_spent")


@pytest.mark.parametrize(
    ("content", "age_s", "code"),
    [
        (document(), 3, 0),
        (document(), 119, 0),
        (document(), 121, 4),
        (document(heartbeat_s=60.0), 179, 0),
        (document(heartbeat_s=60.0), 181, 4),
        (document(), -60, 0),
        (document(), -3600, 4),
        (document(group("actor/0"), group("actor/1", phase="unready")), 3, 3),
        (document(group("actor/0"), FAILED, phase="failed"), 3, 3),
        (document(group("actor/0"), FAILED, phase="failed"), 9999, 3),
        (document(phase="stopped", ending="operator", ending_since=990.0), 121, 3),
        (document(phase="stopped", ending="operator", ending_since=990.0, ended=True), 3, 3),
        (document(phase="stopped", ending="operator", ending_since=990.0, ended=True), 9999, 3),
    ],
)
def test_exit_codes(run_dir: Path, content: dict[str, Any], age_s: float, code: int) -> None:
    put_status(run_dir, content, age_s=age_s)
    assert main(["status", "--run-dir", str(run_dir)]) == code
    assert main(["status", "--json", "--run-dir", str(run_dir)]) == code
    assert main(["status", "-h", "--run-dir", str(run_dir)]) == code


def test_a_lost_coordinator_leaves_its_last_word_with_its_age(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_status(run_dir, document(), age_s=300)
    assert main(["status", "--run-dir", str(run_dir)]) == 4
    said = capsys.readouterr()
    assert said.out == GOLDEN_LOST
    assert "no heartbeat of the coordinator on gpu01 (term 1) for 00:05:00 (limit 00:02:00)" in said.err
    assert main(["status", "--json", "--run-dir", str(run_dir)]) == 4
    answer = json.loads(capsys.readouterr().out)
    assert answer["meta"]["coordinator"] == "lost"
    assert len(answer["errors"]) == 1
    assert len(answer["groups"]) == 2


def test_an_ended_run_says_so(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_status(run_dir, document(phase="stopped", ending="operator", ending_since=990.0, ended=True), age_s=3600)
    main(["status", "--run-dir", str(run_dir)])
    assert "\nThe run has ended: last word 01:00:00 ago, coordinator on gpu01, term 1\n" in capsys.readouterr().out


def test_a_run_that_ends_or_suspects_itself_says_so(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_status(run_dir, document(ending="job_ending", ending_since=990.0, suspect_self_since=970.0))
    main(["status", "--run-dir", str(run_dir)])
    said = capsys.readouterr().out
    assert "\nEnding since 00:00:10: job_ending\n" in said
    assert "\nSuspects itself since 00:00:30: " in said


def test_what_trainers_said_is_shown_for_a_group_may_wait_for_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clients = [
        {"id": "generator", "phase": "", "hold": "", "waits": True, "heard": 999.0},
        {"id": "trainer", "phase": "syncing", "hold": "granted", "waits": False, "heard": 940.0},
    ]
    pools = [{**document()["pools"][0], "probes": "paused"}]
    put_status(run_dir, document(clients=clients, pools=pools))
    main(["status", f"--run-dir={run_dir}"])
    text = capsys.readouterr().out
    assert "Client generator: waits for the fleet; heard 00:00:01 ago" in text
    assert "Client trainer: syncing, holds; heard 00:01:00 ago" in text
    assert "Engines of actor are asked nothing" in text


def test_failed_groups_are_shown_with_the_way_back(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_status(run_dir, document(group("actor/0"), FAILED))
    main(["status", "--run-dir", str(run_dir)])
    assert "slurm-rollout restart actor/1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not there: no coordinator has written it yet"),
        ("", "is not JSON"),
        (json.dumps(TROUBLED)[:200], "is not JSON"),
        ("[]", "is not a status file"),
        ("{}", "is not a status file"),
        ('{"schema": 1}', "is not a status file of this version: KeyError 'at'"),
        (json.dumps(TROUBLED | {"groups": [{}]}), "is not a status file of this version"),
        (json.dumps(TROUBLED | {"groups": None}), "is not a status file of this version"),
        ('{"schema": 2}', "has schema 2, this slurm-rollout knows 1"),
    ],
)
def test_a_file_that_cannot_be_understood(
    run_dir: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    if content is not None:
        write(run_dir / "status.json", content)
    assert main(["status", "--run-dir", str(run_dir)]) == 4
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.startswith(f"slurm-rollout: {run_dir / 'status.json'} ")
    assert said in seen.err
    assert main(["status", "--json", "--run-dir", str(run_dir)]) == 4
    answer = json.loads(capsys.readouterr().out)
    assert said in answer["errors"][0]
    assert "groups" not in answer


def test_a_file_that_is_half_visible_for_a_moment_is_read_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "status.json").write_text("")
    monkeypatch.setattr("slurm_rollout.cli.status.time.sleep", lambda _: put_status(run_dir, document()))
    assert main(["status", "--run-dir", str(run_dir)]) == 0


def test_another_user_may_read_the_status_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        run_dir = Path(name)
        (run_dir / "logs/actor/0/1").mkdir(parents=True)
        (run_dir / "logs").chmod(0o700)
        put_status(run_dir, document())
        with somebody_else(run_dir):
            assert main(["status", "--run-dir", name]) == 0
            capsys.readouterr()
            assert main(["events", "--run-dir", name]) == 1
            assert "Only `status` is open to other users" in capsys.readouterr().err
            if os.getuid() == 0:  # an owner without the right to list his directory can still enter `logs`
                assert main(["logs", "actor/0", "--run-dir", name]) == 1
                assert "Only `status` is open to other users" in capsys.readouterr().err


def test_iterate_repeats_with_the_time(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_status(run_dir, document())
    pauses: list[float] = []

    def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("slurm_rollout.cli.status.time.sleep", sleep)
    assert main(["status", "-i", "7", "--run-dir", str(run_dir)]) == 130
    assert pauses == [7.0, 7.0]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("GROUP ") for line in lines) == 2
    time.strptime(lines[0], "%a %b %d %H:%M:%S %Y")


@pytest.mark.parametrize("seconds", ["4.9", "0", "-1", "nan"])
def test_iterate_not_too_often(run_dir: Path, capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    assert main(["status", "-i", seconds, "--run-dir", str(run_dir)]) == 2
    assert "at least 5 s" in capsys.readouterr().err


def test_another_users_file_cannot_steer_the_terminal(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07"
    put_status(run_dir, document(group("actor/0", phase="unready", message=evil), run=evil, host=evil))
    main(["status", "--run-dir", str(run_dir)])
    said = capsys.readouterr().out
    assert "?]0;owned?" in said
    assert "\x1b" not in said


def test_the_run_of_a_job(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the directory where it was submitted; of any other: test_discovery.py."""
    monkeypatch.chdir(run_dir)
    monkeypatch.setenv("PATH", str(run_dir))
    (run_dir / "rollout-runs/77").mkdir(parents=True)
    put_status(run_dir / "rollout-runs/77", document())
    assert main(["status", "-j", "77"]) == 0
    assert main(["status", "-j", "78"]) == 1, "there is no squeue to ask for more"
    assert main(["status", "-j", "x"]) == 2


# -------------------------------------------------------------------------------------------------------------- events


def test_events_of_all_terms_in_order(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    (run_dir / "events.10.jsonl").write_text(event(2, "takeover"))
    (run_dir / "events.9.jsonl").write_text(
        event(0, "up", message="2 groups")
        + event(
            1,
            "failure",
            group="actor/0",
            incarnation=2,
            reason="engine_exited",
            rank=1,
            node="n2",
            message="code -9",
            data={"restarted_peers": [0, 2], "stop_s": 0.031, "fence_s": 0.2},
        )
        + '{"n": 2, "type": "half'
    )
    assert main(["events", "--run-dir", str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2026-09-21T14:13:20.250 -            up         2 groups",
        "2026-09-21T14:13:21.250 actor/0.2    failure    engine_exited 1@n2 code -9 (restarts rank 0,2 too) "
        "stop 0.031 s fence 0.2 s",
        "2026-09-21T14:13:22.250 -            takeover",
    ]
    monkeypatch.undo()
    time.tzset()


def test_events_as_they_are(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = event(1, "up") + event(2, "ready", group="actor/0", data={"start_s": 2})
    (run_dir / "events.1.jsonl").write_text(lines)
    assert main(["events", "--json", "--run-dir", str(run_dir)]) == 0
    assert capsys.readouterr().out == lines


def test_events_of_one_group(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_status(run_dir, document())
    (run_dir / "events.1.jsonl").write_text(
        event(1, "up") + event(2, "ready", group="actor/0") + event(3, "ready", group="actor/1")
    )
    assert main(["events", "--group", "actor/1", "--json", "--run-dir", str(run_dir)]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 3
    assert main(["events", "--group", "actor/7", "--run-dir", str(run_dir)]) == 2
    assert "no group actor/7 in this run; its groups: actor/0, actor/1" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["{nonsense\n", "[]\n", "\0\0\n"])
def test_a_broken_event_is_left_out_and_said(run_dir: Path, capsys: pytest.CaptureFixture[str], broken: str) -> None:
    (run_dir / "events.1.jsonl").write_text(event(1, "up") + broken + event(2, "ready"))
    assert main(["events", "--run-dir", str(run_dir)]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert f"{run_dir / 'events.1.jsonl'}, at byte {len(event(1, 'up'))}, is " in said.err


def test_events_are_followed_over_a_takeover_until_the_run_has_ended(
    run_dir: Path, start: Callable[..., Command]
) -> None:
    first = run_dir / "events.1.jsonl"
    first.write_text(event(1, "up") + '{"n": 2, "at": 0, "type":')
    following = start("events", "-f", "--run-dir", run_dir)
    assert following.line().endswith(" up")
    with first.open("a") as file:
        file.write(' "ready", "message": "whole"}\n')
    assert following.line().endswith(" ready      whole")
    (run_dir / "events.2.jsonl").write_text(event(1, "takeover", term=2))
    assert following.line().endswith(" takeover")
    with (run_dir / "events.2.jsonl").open("a") as file:
        file.write(event(2, "ended", term=2))
    assert following.line().endswith(" ended")
    assert following.end() == (0, "")


def test_an_ended_run_that_was_requeued_is_followed_on(run_dir: Path, start: Callable[..., Command]) -> None:
    (run_dir / "events.1.jsonl").write_text(event(1, "ended"))
    (run_dir / "events.2.jsonl").write_text(event(1, "up", term=2))
    following = start("events", "-f", "--run-dir", run_dir)
    assert following.line().endswith(" ended")
    assert following.line().endswith(" up")
    assert following.process.poll() is None
    assert following.end(signal.SIGINT) == (0, "")


# ---------------------------------------------------------------------------------------------------------------- logs


def put_log(run_dir: Path, name: str, text: str | bytes) -> Path:
    path = run_dir / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_logs_of_the_newest_incarnation(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_log(run_dir, "actor/0/9/0", "old\n")
    put_log(run_dir, "actor/0/10/0", "zero\n")
    put_log(run_dir, "actor/0/10/1", "one\nunfinished")
    put_log(run_dir, "actor/0/10/10", "ten\n")
    assert main(["logs", "actor/0", "--run-dir", str(run_dir)]) == 0
    said = capsys.readouterr()
    assert said.out == "0| zero\n1| one\n1| unfinished\n10| ten\n"
    assert said.err == f"slurm-rollout: actor/0 incarnation 10: {run_dir}/logs/actor/0/10\n"


def test_logs_of_one_member_or_an_older_incarnation(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_log(run_dir, "actor/0/1/0", "old\n")
    put_log(run_dir, "actor/0/2/0", "zero\n")
    put_log(run_dir, "actor/0/2/1", b"\xff\xfe\n")
    assert main(["logs", "actor/0.0", "--run-dir", str(run_dir)]) == 0
    assert capsys.readouterr().out == "zero\n"
    assert main(["logs", "actor/0", "--incarnation", "1", "--run-dir", str(run_dir)]) == 0
    assert capsys.readouterr().out == "old\n"


def test_logs_are_bytes(run_dir: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    put_log(run_dir, "actor/0/1/0", b"\xff\xfe\n")
    assert main(["logs", "actor/0", "--run-dir", str(run_dir)]) == 0
    assert capfdbinary.readouterr().out == b"\xff\xfe\n"


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("lines", [0, 1, 2, 3, 999, 2999, 3000, 3001, 9999])
def test_the_last_lines(run_dir: Path, capsys: pytest.CaptureFixture[str], lines: int, end: str) -> None:
    content = [f"{n} {'x' * 50}" for n in range(3000)]  # some blocks
    put_log(run_dir, "actor/0/1/0", "\n".join(content) + end)
    assert main(["logs", "actor/0", "-n", str(lines), "--run-dir", str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines() == (content[-lines:] if lines else [])


@pytest.mark.parametrize(("lines", "shown"), [(0, ""), (1, "d"), (2, "cd"), (3, "b cd"), (9, "a b cd")])
def test_the_last_lines_of_a_log_that_was_just_rotated(
    run_dir: Path, capsys: pytest.CaptureFixture[str], lines: int, shown: str
) -> None:
    put_log(run_dir, "actor/0/1/0", "d").with_suffix(".log.1").write_text("a\nb\nc")  # cut within a line
    assert main(["logs", "actor/0", "-n", str(lines), "--run-dir", str(run_dir)]) == 0
    assert capsys.readouterr().out.split() == shown.split()


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["actor/7"], 2, "no group actor/7 in this run; its groups: actor/0, actor/1"),
        (["actor/1"], 1, "actor/1 has no logs yet"),
        (["actor/0"], 1, "actor/0 incarnation 2 has no logs yet"),
        (["actor/0.3", "--incarnation", "1"], 2, "actor/0 incarnation 1 has no log of rank 3; its ranks: 0, 1"),
        (["actor/0", "--incarnation", "7"], 2, "no logs of actor/0 incarnation 7; kept incarnations: 1, 2"),
        (["actor"], 2, "'actor' is neither a group (actor/0) nor a member (actor/0.1)"),
        (["actor/0", "-n", "-1"], 2, "must not be negative"),
    ],
)
def test_logs_that_are_not_there(
    run_dir: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, said: str
) -> None:
    put_status(run_dir, document())
    put_log(run_dir, "actor/0/1/0", "")
    put_log(run_dir, "actor/0/1/1", "")
    (run_dir / "logs/actor/0/2").mkdir()
    assert main(["logs", *argv, "--run-dir", str(run_dir)]) == code
    assert said in capsys.readouterr().err


def test_groups_are_known_from_the_plan_before_there_is_a_status(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run_dir / "plan.json", {"pools": [{"groups": [{"id": "actor/0"}]}, {"groups": [{"id": "reward/0"}]}]})
    assert main(["logs", "actor/7", "--run-dir", str(run_dir)]) == 2
    assert "its groups: actor/0, reward/0" in capsys.readouterr().err


def test_logs_are_followed_over_rotation_and_restart(run_dir: Path, start: Callable[..., Command]) -> None:
    log = put_log(run_dir, "actor/0/1/0", "a\n" * 99 + "b\n")
    following = start("logs", "actor/0", "-f", "-n", "1", "--run-dir", run_dir)
    assert following.line() == "b"
    with log.open("a") as file:
        file.write("c\nhalf")
    assert following.line() == "c"
    with log.open("a") as file:
        file.write(" whole\nbefore\n")
    log.with_suffix(".log.1").write_bytes(log.read_bytes())
    log.write_text("after\nlast words")  # in place, as the agent does it: shorter than what was read
    assert [following.line() for _ in range(3)] == ["half whole", "before", "after"]
    put_log(run_dir, "actor/0/2/0", "new 1\nnew 2\n")
    assert [following.line() for _ in range(3)] == ["last words", "new 1", "new 2"]
    code, said = following.end(signal.SIGINT)
    assert code == 0
    assert [line.split(":")[1] for line in said.splitlines()] == [" actor/0 incarnation 1", " actor/0 incarnation 2"]


def test_logs_of_a_group_that_has_not_started_are_waited_for(run_dir: Path, start: Callable[..., Command]) -> None:
    put_status(run_dir, document())
    following = start("logs", "actor/1.0", "-f", "--run-dir", run_dir)
    put_log(run_dir, "actor/1/1/1", "other\n")
    put_log(run_dir, "actor/1/1/0", "mine\n")
    assert following.line() == "mine"
    assert following.end(signal.SIGINT)[0] == 0


# ------------------------------------------------------------------------------------------------------------ requests


@contextmanager
def answering(run_dir: Path, *answers: tuple[str, str], keep: bool = False) -> Iterator[list[dict[str, Any]]]:
    """A coordinator that gives these answers (event type, message) to the first request."""
    taken: list[dict[str, Any]] = []
    over = threading.Event()

    def serve() -> None:
        while not over.is_set() and not taken:
            for path in run_dir.joinpath("requests").glob("[!.]*.json"):
                taken.append(json.loads(path.read_text()))
                if not keep:
                    path.unlink()
                for n, (type_, message) in enumerate(answers):
                    with (run_dir / "events.1.jsonl").open("a") as file:
                        file.write(event(n, "request", data={"id": "another"}))
                        file.write(event(n, type_, message=message, data={"id": taken[0]["id"]}))
                    over.wait(2 * requests_module.POLL_S)  # answers may come one after the other
            over.wait(0.01)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield taken
    finally:
        over.set()
        thread.join()


def test_a_request_that_is_granted(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_status(run_dir, document())
    (run_dir / "events.1.jsonl").write_text(event(0, "up"))
    with answering(run_dir, ("request", "actor/0: restarts"), ("request", "actor/1: restarts")) as taken:
        assert main(["restart", "actor/1", "actor/0", "actor/1", "--run-dir", str(run_dir)]) == 0
    assert capsys.readouterr().out == "actor/0: restarts\nactor/1: restarts\n"
    [request] = taken
    assert request.keys() == {"id", "verb", "groups", "who"}
    assert (request["verb"], request["groups"]) == ("restart", ["actor/1", "actor/0"])
    assert "@" in request["who"]


def test_one_answer_for_several_groups_will_do(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(requests_module, "_REST_S", 0.05)
    put_status(run_dir, document())
    with answering(run_dir, ("request", "both drain")):
        started_at = time.monotonic()
        assert main(["drain", "actor/0", "actor/1", "--timeout", "100", "--run-dir", str(run_dir)]) == 0
        assert time.monotonic() - started_at < DEADLINE_S
    assert capsys.readouterr().out == "both drain\n"


def test_a_request_that_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_status(run_dir, document())
    with answering(run_dir, ("request_refused", "the run is ending")):
        assert main(["resume", "actor/0", "--run-dir", str(run_dir)]) == 1
    assert "the coordinator refused: the run is ending" in capsys.readouterr().err


def test_stop_needs_no_group(run_dir: Path) -> None:
    with answering(run_dir, ("request", "the run is ending")) as taken:
        assert main(["stop", "--run-dir", str(run_dir)]) == 0
    assert (taken[0]["verb"], taken[0]["groups"]) == ("stop", [])


def test_nobody_answers(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_status(run_dir, document(), age_s=300)
    assert main(["drain", "actor/0", "--timeout", "0.1", "--run-dir", str(run_dir)]) == 1
    said = capsys.readouterr().err
    [left] = (run_dir / "requests").iterdir()
    assert "the coordinator was last heard 00:05:00 ago" in said
    assert said.endswith(f"to withdraw it: rm {left}\n")
    assert json.loads(left.read_text())["id"] == left.stem
    assert left.stat().st_mode & 0o077 == 0


def test_a_request_that_was_taken_but_not_answered(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(run_dir):
        assert main(["stop", "--timeout", "0.5", "--run-dir", str(run_dir)]) == 1
    assert "the request was taken; no word of a coordinator is there" in capsys.readouterr().err


def test_no_wait(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop", "--no-wait", "--run-dir", str(run_dir)]) == 0
    [left] = (run_dir / "requests").iterdir()
    assert capsys.readouterr().out == f"asked: {left}\n"


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["restart", "actor/7", "actor/0"], 2, "no group actor/7 in this run; its groups: actor/0, actor/1"),
        (["drain"], 2, "the following arguments are required: GROUP"),
        (["stop", "actor/0"], 2, "unrecognized arguments: actor/0"),
        (["stop", "--timeout", "-1"], 2, "must not be negative"),
    ],
)
def test_requests_that_are_not_made(
    run_dir: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, said: str
) -> None:
    put_status(run_dir, document())
    assert main([*argv, "--run-dir", str(run_dir)]) == code
    assert said in capsys.readouterr().err
    assert list((run_dir / "requests").iterdir()) == []


def test_an_ended_run_is_not_asked(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_status(run_dir, document(phase="stopped", ending="operator", ending_since=990.0, ended=True))
    assert main(["stop", "--run-dir", str(run_dir)]) == 1
    assert "the run has ended (stopped)" in capsys.readouterr().err
    assert list((run_dir / "requests").iterdir()) == []


def test_where_no_coordinator_ever_was_nothing_is_asked(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "requests").rmdir()
    assert main(["stop", "--run-dir", str(run_dir)]) == 1
    assert "Nothing was asked" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- wait


def word(phase: str = "ready", **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "run": "rl",
        "job": "123",
        "restart_count": 0,
        "term": 1,
        "heartbeat_s": 0.02,
        "epoch": 7,
        "phase": phase,
        "reason": "",
        "message": "",
        "clients": {},
        "pools": [],
        "groups": [
            {
                "id": f"actor/{index}",
                "phase": "ready",
                "serving": serving,
                "incarnation": 2,
                "weights": "none" if serving else "stale",
                "weights_version": None,
                "urls": [f"http://n{index}:18000"],
                "endpoints": {},
                "master": "n1:18001",
                "since": "",
                "reason": "",
            }
            for index, serving in enumerate((True, True, False))
        ],
    } | changes


@contextmanager
def heartbeat(run_dir: Path, *words: dict[str, Any]) -> Iterator[None]:
    """A coordinator that says these words, each for some heartbeats, the last one until the end."""
    over = threading.Event()

    def beat() -> None:
        seq = 0
        while not over.wait(0.01):
            write(run_dir / "barrier.json", words[min(seq // 20, len(words) - 1)] | {"seq": seq})
            seq += 1

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "_POLL_S", 0.05)
    monkeypatch.setattr(
        "slurm_rollout.cli.wait.barrier.Barrier", partial(barrier.Barrier, lost_after_s=0.5, grace_s=0.2)
    )


@pytest.mark.usefixtures("impatient")
class TestWait:
    def test_ready(self, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with heartbeat(run_dir, word("waiting", epoch=6), word()):
            assert main(["wait", "--for", "ready", "--run-dir", str(run_dir)]) == 0
        assert capsys.readouterr().out == "7\nhttp://n0:18000\nhttp://n1:18000\n"

    def test_ready_as_json(self, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with heartbeat(run_dir, word(reason="degraded")):
            assert main(["wait", "--for", "ready", "--json", "--barrier", str(run_dir / "barrier.json")]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["errors"] == []
        assert (answer["epoch"], answer["reason"]) == (7, "degraded")
        assert answer["urls"] == ["http://n0:18000", "http://n1:18000"]
        assert [(g["id"], g["incarnation"], g["serving"]) for g in answer["groups"]][2] == ("actor/2", 2, False)

    @pytest.mark.parametrize(
        ("argv", "epoch"),
        [(["ready", "--after-epoch", "7"], 8), (["epoch=8"], 8), (["epoch=7"], 7), (["ready"], 7)],
    )
    def test_epochs(self, run_dir: Path, capsys: pytest.CaptureFixture[str], argv: list[str], epoch: int) -> None:
        with heartbeat(run_dir, *[word()] * 3, word(epoch=8)):
            assert main(["wait", "--run-dir", str(run_dir), "--for", *argv]) == 0
        assert capsys.readouterr().out.splitlines()[0] == str(epoch)

    def test_the_barrier_of_the_trainers_environment(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("ROLLOUT_BARRIER", str(run_dir / "barrier.json"))
        with heartbeat(run_dir, word()):
            assert main(["wait", "--for", "ready"]) == 0
        assert capsys.readouterr().err == ""

    def test_the_default_run_directory_may_still_be_missing(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(run_dir)
        path = Path("rollout-runs/123")
        looks: list[float] = []

        def sleep(pause_s: float) -> None:
            looks.append(pause_s)
            path.mkdir(parents=True, exist_ok=True)
            write(path / "barrier.json", word() | {"seq": len(looks)})

        patient = partial(barrier.Barrier, lost_after_s=60.0, sleep=sleep)
        monkeypatch.setattr("slurm_rollout.cli.wait.barrier.Barrier", patient)
        assert main(["wait", "--for", "ready", "-j", "123"]) == 0
        assert capsys.readouterr().err == "slurm-rollout: rollout-runs/123 is not there yet\n"

    @pytest.mark.parametrize(
        ("goal", "phase", "code", "said"),
        [
            ("ready", "waiting", 124, "the fleet is not ready after"),
            ("ready", "failed", 3, "failed"),
            ("ready", "stopped", 3, "stopped"),
            ("ready", "needs_weights", 3, "Push weights into actor/2"),
            ("stopped", "stopped", 0, ""),
            ("stopped", "failed", 3, "failed"),
            ("stopped", "ready", 124, "the run has not stopped within 0.3 s"),
            ("stopped", "needs_weights", 124, "the run has not stopped within 0.3 s"),
        ],
    )
    def test_exit_codes(
        self, run_dir: Path, capsys: pytest.CaptureFixture[str], goal: str, phase: str, code: int, said: str
    ) -> None:
        with heartbeat(run_dir, word(phase)):
            assert main(["wait", "--for", goal, "--timeout", "0.3", "--run-dir", str(run_dir)]) == code
            seen = capsys.readouterr()
            assert (seen.out, bool(seen.err)) == ("", bool(said))
            assert said in seen.err
            assert main(["wait", "--for", goal, "--timeout", "0.3", "--run-dir", str(run_dir), "--json"]) == code
        assert len(json.loads(capsys.readouterr().out)["errors"]) == bool(said)

    def test_a_run_that_stops_while_it_is_waited_for(self, run_dir: Path) -> None:
        with heartbeat(run_dir, word(), word("needs_weights"), word("stopped")):
            assert main(["wait", "--for", "stopped", "--run-dir", str(run_dir)]) == 0

    @pytest.mark.parametrize(("goal", "says"), [("ready", ["wait.json"]), ("epoch=9", ["wait.json"]), ("stopped", [])])
    def test_only_who_waits_for_a_fleet_says_so(self, run_dir: Path, goal: str, says: list[str]) -> None:
        (run_dir / "clients").mkdir()
        with heartbeat(run_dir, word("waiting")):
            assert main(["wait", "--for", goal, "--timeout", "0.5", "--run-dir", str(run_dir)]) == 124
        assert [p.name for p in (run_dir / "clients").iterdir()] == says

    def test_a_lost_coordinator(self, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write(run_dir / "barrier.json", word() | {"seq": 1})
        for goal in ("ready", "stopped"):
            assert main(["wait", "--for", goal, "--run-dir", str(run_dir)]) == 4
            assert "no heartbeat of the coordinator" in capsys.readouterr().err

    def test_a_barrier_of_a_newer_version(self, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write(run_dir / "barrier.json", word() | {"seq": 1, "schema": 99})
        assert main(["wait", "--for", "ready", "--run-dir", str(run_dir)]) == 1
        assert "has schema 99" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            ([], "required: --for"),
            (["--for", "epoch=x"], "is not ready, epoch=N or stopped"),
            (["--for", "stopped", "--after-epoch", "3"], "--after-epoch goes with --for ready only"),
            (["--for", "ready", "--timeout", "-1"], "must not be negative"),
            (["--for", "ready", "--barrier", "."], "is a directory"),
        ],
    )
    def test_wrong_usage(self, run_dir: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
        assert main(["wait", "--run-dir", str(run_dir), *argv]) == 2
        assert said in capsys.readouterr().err


def test_status_names_the_nodes_that_are_not_used_and_why(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_status(run_dir, EXCLUDED, age_s=0.0)
    main(["status", f"--run-dir={run_dir}"])
    said = capsys.readouterr().out
    assert "Node gpu06 is lost since 00:01:40: no answer; 1 of its steps may still live\n" in said
    assert "Node gpu07 is lost since 00:01:40: no answer; it is back, and used again where no other is free\n" in said
    assert "Node gpu08 is drained by Slurm: Kill task failed\n" in said


def test_only_drain_and_resume_take_nodes_and_never_beside_groups(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_status(run_dir, EXCLUDED)
    for argv, said in (
        (["restart", "gpu06"], "no group gpu06 in this run"),
        (["drain", "gpu99"], "no group or node gpu99 in this run; its groups: actor/0, actor/1; its nodes: gpu[05-08]"),
        (["resume", "gpu06", "actor/0"], "groups and nodes in one request"),
    ):
        assert main([*argv, f"--run-dir={run_dir}"]) == 2
        assert said in capsys.readouterr().err
    assert not list((run_dir / "requests").iterdir())
