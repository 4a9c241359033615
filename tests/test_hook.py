"""The `on_event` hook, with real programs: what they get, and that none of them can hold up the run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import proc
from slurm_rollout.hook import QUEUE_MOST, TAIL_BYTES, EventHook

ABOUT = {"run": "moe-rl", "job": "123", "run_dir": "/runs/123"}
FLUSH_S = 20.0
COLLECT = 'cat >> "$0"'


def failure(n: int = 1, **fields: Any) -> dict[str, Any]:
    event = {"n": n, "at": 1795.5, "term": 2, "type": "failure", "group": "actor/0", "incarnation": 3}
    return event | {"reason": "hang", "message": "no token in 30 s", "rank": 1, "node": "n2"} | fields


def run(hook: EventHook, *events: dict[str, Any], flush_s: float = FLUSH_S) -> float:
    """Tell of events and end in order; return how long the end took."""

    async def main() -> float:
        hook.tell(events)
        began = time.monotonic()
        await hook.aclose(flush_s)
        return time.monotonic() - began

    return asyncio.run(main())


def sh(script: str, *args: object, **options: Any) -> EventHook:
    return EventHook(["/bin/sh", "-c", script, *map(str, args)], ABOUT, **options)


def told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def until(what: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Callable[[], list[int]]]:
    """Processes that a program wrote down, one per line in `pids`; they end with the test."""
    path = tmp_path / "pids"

    def found() -> list[int]:
        return [int(word) for word in path.read_text().split()] if path.exists() else []

    yield found
    for pid in found():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def living(pids: Sequence[int]) -> list[int]:
    return [pid for pid in pids if (found := proc.read(pid)) is not None and found.state not in "ZX"]


# ------------------------------------------------------------------------------------------------------ what it is told


def test_an_event_is_one_line_of_json_that_says_whose_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    run(sh(COLLECT, out), failure(message="a\nb ✓"))
    assert out.read_text().count("\n") == 1
    assert out.read_text().endswith("\n")
    assert told(out) == [
        failure(message="a\nb ✓") | ABOUT | {"text": "actor/0.3 failure hang 1@n2 a b ✓"},
    ]
    assert not warnings(caplog)


def test_events_come_in_their_order_and_only_those_of_its_types(tmp_path: Path) -> None:
    out = tmp_path / "out"
    types = ("failure", "ended")
    run(sh(COLLECT, out, types=types), failure(1), failure(2, type="epoch"), failure(3), failure(4, type="ended"))
    assert [e["n"] for e in told(out)] == [1, 3, 4]


def test_by_default_it_is_told_what_people_want_to_know_and_no_routine(tmp_path: Path) -> None:
    out = tmp_path / "out"
    types = ["launching", "go", "ready", "failure", "stopped", "fenced", "epoch", "weights", "failed", "ended", "new"]
    run(sh(COLLECT, out), *(failure(n, type=type_) for n, type_ in enumerate(types)))
    assert [e["type"] for e in told(out)] == ["ready", "failure", "failed", "ended"]


def test_arguments_reach_no_shell_and_the_environment_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("PAGER_TEAM", "rl")
    monkeypatch.chdir(tmp_path)
    code = "import os, sys; open('out', 'w').write('|'.join([*sys.argv[1:], os.environ['PAGER_TEAM']]))"
    run(EventHook([sys.executable, "-IS", "-c", code, "a b", "$HOME; touch x", "*"], ABOUT), failure())
    assert out.read_text() == "a b|$HOME; touch x|*|rl"
    assert not (tmp_path / "x").exists()


def test_a_program_has_a_session_of_its_own_the_umask_and_no_descriptor_of_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import json, os; print(json.dumps({'sid': os.getsid(0), 'pid': os.getpid(), 'umask': os.umask(0),"
        " 'open': [n for n in range(256) if os.path.exists(f'/proc/self/fd/{n}')]}),"
        " file=open(os.environ['OUT'], 'w'))"
    )
    ours = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(ours, True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OUT", str(out))
            run(EventHook([sys.executable, "-IS", "-c", code], ABOUT, umask=0o027), failure())
    finally:
        os.close(ours)
    (said,) = told(out)
    assert said["sid"] == said["pid"] != os.getsid(0)
    assert said["umask"] == 0o027
    assert said["open"] == [0, 1, 2]


def test_one_program_at_a_time_whatever_thread_tells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    hook = sh('mkdir "$0.lock" && cat >> "$0" && sleep 0.02 && rmdir "$0.lock"', out)
    threads = [threading.Thread(target=hook.tell, args=([failure(n)],)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(hook)
    assert sorted(e["n"] for e in told(out)) == list(range(10))
    assert not warnings(caplog)


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_one_that_hangs_is_killed_with_its_group_and_the_next_event_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pids: Callable[[], list[int]]
) -> None:
    script = 'cat >> "$0"; sleep 600 & echo $$ $! >> "$1"; echo calling the pager; wait'
    out = tmp_path / "out"
    began = time.monotonic()
    run(sh(script, out, tmp_path / "pids", timeout_s=0.5), failure(1), failure(2))
    assert 1.0 <= time.monotonic() - began < 10
    assert [e["n"] for e in told(out)] == [1, 2]
    assert len(pids()) == 4
    until(lambda: not living(pids()))
    first, last = warnings(caplog)
    for part in ("on_event /bin/sh", "actor/0.3 failure hang", "longer than 0.5 s", "said: calling the pager"):
        assert part in first
    assert "2 of 2 events not told (2 killed)" in last


def test_one_that_ignores_term_is_killed_all_the_same(tmp_path: Path, pids: Callable[[], list[int]]) -> None:
    script = "trap '' TERM INT HUP; echo $$ >> \"$0\"; while :; do sleep 600; done"
    run(sh(script, tmp_path / "pids", timeout_s=0.5), failure())
    assert len(pids()) == 1
    until(lambda: not living(pids()))


@pytest.mark.parametrize("detach", ["setsid", ""])
def test_one_that_leaves_a_process_behind_holds_up_nobody(
    detach: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, pids: Callable[[], list[int]]
) -> None:
    """The daemon has the pipes, and for itself it lives as long as it likes."""
    script = f'cat >> "$0"; {detach} sh -c \'echo $$ >> "$0"; exec sleep 600\' "$1" & '
    out = tmp_path / "out"
    began = time.monotonic()
    run(sh(script, out, tmp_path / "pids", timeout_s=30), failure(1), failure(2))
    assert time.monotonic() - began < 10
    assert [e["n"] for e in told(out)] == [1, 2]
    until(lambda: len(pids()) == 2)
    assert living(pids()) == pids()
    assert not warnings(caplog)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/nonexistent/page"], "No such file or directory: '/nonexistent/page'"),
        (["/etc/passwd"], "Permission denied: '/etc/passwd'"),
        (["/bin/sh", "-c", "true \0"], "embedded null byte"),
    ],
)
def test_one_that_cannot_be_started_is_said_once(
    argv: list[str], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(EventHook(argv, ABOUT), *(failure(n) for n in range(5)))
    first, last = warnings(caplog)
    assert f"on_event {argv[0]}: for actor/0.3 failure" in first
    assert expected in first
    assert "5 of 5 events not told (5 cannot be started)" in last


def test_each_way_to_fail_is_said_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    script = """
        read -r line; echo "$line" >> "$0"
        case $line in *fine*) exit 0;; *even*) echo no >&2; exit 3;; *) kill -9 $$;; esac
    """
    kinds = {0: "fine", 1: "odd", 2: "even", 3: "odd", 4: "even", 5: "odd"}
    run(sh(script, out), *(failure(n, message=message) for n, message in kinds.items()))
    assert [e["n"] for e in told(out)] == list(kinds)
    first, second, last = warnings(caplog)
    assert "failure hang 1@n2 odd: signal 9" in first
    assert "failure hang 1@n2 even: exit code 3, and said: no." in second
    assert "5 of 6 events not told (3 signal 9, 2 exit code 3)" in last


def test_what_it_says_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    run(sh("head -c 3000000 /dev/zero | tr '\\0' x; echo last words >&2; exit 1"), failure())
    first, _ = warnings(caplog)
    assert "last words" in first
    assert len(first) < TAIL_BYTES + 200


def test_one_that_reads_nothing_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    assert run(sh("exec true"), failure(message="x" * 1_000_000), failure(2)) < 5
    assert not warnings(caplog)


def test_one_that_hangs_before_it_reads_is_killed_in_time(caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    run(sh("exec sleep 20", timeout_s=0.5), failure(message="x" * 1_000_000))
    assert time.monotonic() - began < 10
    assert "longer than 0.5 s" in warnings(caplog)[0]


def test_one_that_reads_late_gets_all_of_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(sh(f"sleep 0.3; {COLLECT}", out), failure(message="x" * 1_000_000))
    assert [len(e["message"]) for e in told(out)] == [1_000_000]


def test_a_thousand_events_at_once_neither_block_nor_pile_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, gate = tmp_path / "out", tmp_path / "gate"
    hook = sh(f'{COLLECT}; while [ ! -e "$1" ]; do sleep 0.02; done', out, gate, timeout_s=60)

    async def main() -> float:
        hook.tell([failure(0)])
        await asyncio.to_thread(until, lambda: told(out))
        began = time.monotonic()
        for n in range(1, 1001):
            hook.tell([failure(n)])
        took_s = time.monotonic() - began
        gate.touch()
        await hook.aclose(60)
        return took_s

    assert asyncio.run(main()) < 1.0
    events = told(out)
    assert [e["n"] for e in events] == [0, *range(1001 - QUEUE_MOST, 1001)]
    assert [e.get("dropped") for e in events] == [None, 1000 - QUEUE_MOST, *([None] * (QUEUE_MOST - 1))]
    first, last = warnings(caplog)
    assert "the oldest are dropped" in first
    assert "900 of 1001 events not told (900 dropped)" in last


# -------------------------------------------------------------------------------------------------------------- the end


def test_the_end_waits_for_what_is_to_be_told_and_takes_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    hook = sh(f"sleep 0.05; {COLLECT}", out)
    run(hook, *(failure(n) for n in range(5)))
    assert [e["n"] for e in told(out)] == list(range(5))
    run(hook, failure(6))
    assert len(told(out)) == 5
    assert not warnings(caplog)


def test_the_end_waits_no_longer_than_it_may(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pids: Callable[[], list[int]]
) -> None:
    hook = sh('echo $$ >> "$0"; exec sleep 600', tmp_path / "pids", timeout_s=300)
    hook.tell([failure()])
    until(pids)
    assert run(hook, failure(1), failure(2), flush_s=0.3) < 3
    until(lambda: not living(pids()))
    (last,) = [w for w in warnings(caplog) if "not told (" in w]
    assert "3 of 3 events not told" in last
    assert "1 killed at the end" in last
    assert "2 not told at the end" in last


def test_a_hook_that_was_never_told_of_anything_ends_at_once(caplog: pytest.LogCaptureFixture) -> None:
    assert run(sh("exit 1")) < 1
    assert not caplog.records


def test_the_loop_goes_on_while_a_program_hangs(tmp_path: Path, pids: Callable[[], list[int]]) -> None:
    hook = sh('echo $$ >> "$0"; exec sleep 600', tmp_path / "pids", timeout_s=1.0)

    async def main() -> float:
        hook.tell([failure()])
        pauses = []
        end = time.monotonic() + 0.6
        while (before := time.monotonic()) < end:
            await asyncio.sleep(0.005)
            pauses.append(time.monotonic() - before)
        await hook.aclose(0.1)
        return sorted(pauses)[len(pauses) // 2]

    assert asyncio.run(main()) < 0.05
    assert pids()


# ------------------------------------------------------------------------------------- a coordinator that cannot do it

COORDINATOR = """
import asyncio, sys
from slurm_rollout.hook import EventHook

async def main():
    hook = EventHook(["/bin/sh", "-c", sys.argv[1], *sys.argv[2:]], {}, timeout_s=2.0)
    hook.tell([{"n": 1, "type": "failure", "group": "a/0", "incarnation": 1}])
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """A process with a hook that runs this script; it ends with the test."""
    made: list[subprocess.Popen[bytes]] = []

    def start(script: str) -> subprocess.Popen[bytes]:
        made.append(subprocess.Popen([sys.executable, "-c", COORDINATOR, script, str(tmp_path / "pids")]))
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()


def guards_of(pid: int) -> list[int]:
    return [p.pid for p in proc.descendants(pid) if b"hook_guard.py" in Path(f"/proc/{p.pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_hangs_does_not_outlive_its_time_where_its_coordinator_was_killed_or_stopped(
    coordinator: Callable[[str], subprocess.Popen[bytes]], pids: Callable[[], list[int]], number: signal.Signals
) -> None:
    process = coordinator('sleep 600 & echo $$ $! > "$0.new"; mv "$0.new" "$0"; wait')
    began = time.monotonic()
    until(lambda: len(pids()) == 2)
    (guard,) = until(lambda: guards_of(process.pid))
    process.send_signal(number)
    until(lambda: not living(pids()))
    assert time.monotonic() - began > 1.5, "it had its time"
    if number == signal.SIGKILL:
        until(lambda: not living([guard]))


def test_what_ended_by_itself_before_is_left_alone_and_the_guard_goes(
    coordinator: Callable[[str], subprocess.Popen[bytes]], pids: Callable[[], list[int]]
) -> None:
    process = coordinator('sleep 600 & echo $! > "$0.new"; mv "$0.new" "$0"')
    until(lambda: len(pids()) == 1)
    (guard,) = until(lambda: guards_of(process.pid))
    until(lambda: len(proc.descendants(process.pid)) <= 1)
    process.kill()
    until(lambda: not living([guard]))
    assert living(pids())
