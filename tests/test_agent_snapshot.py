"""The black box: what an agent writes down about its engines' processes when it is asked to, in time and in no way."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout.agent import socket_inodes
from slurm_rollout.core.blackbox import stuck
from tests.agent_harness import (
    AGENT,
    ORPHAN,
    Agent,
    Json,
    Node,
    alive,
    free_port,
    interpreters,
    member,
    pid_in,
    python,
    server,
    until,
)

AT_ONCE = "g['GO_AGAIN_S'] = 0"

SPIN = "while True: pass"

TALK = """
import socket, sys, time
s = socket.create_server(("127.0.0.1", int(sys.argv[1])))
client = socket.create_connection(s.getsockname())
served, _ = s.accept()
served.send(b"x" * 100)
open(sys.argv[2], "w").close()
time.sleep(600)
"""

PY_SPY = """#!/bin/sh
echo "$$ $*" >> {folder}/py-spy.calls
echo "Process $4: server --api-key secret
secret, too"
echo "Python v3.11.7 (/usr/bin/python3)

Thread $4 (idle): \\"MainThread\\"
    all_reduce (torch/distributed/distributed_c10d.py:2)"
"""

NVIDIA_SMI = """#!/bin/sh
echo "$$ $*" >> {folder}/nvidia-smi.calls
case "$*" in
*compute-apps*) echo "4711, 400 MiB" ;;
*) echo "0, GPU-1, 100 %, 400 MiB" ;;
esac
"""

HANGS = """#!/bin/sh
echo $$ > {folder}/{name}.new
mv {folder}/{name}.new {folder}/{name}.pid
echo half
sleep 600
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Write programs; return the environment in which they, and no others of their name, are on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(**programs: str) -> dict[str, str]:
        for name, text in programs.items():
            path = folder / name.replace("_", "-")
            path.write_text(text.format(folder=tmp_path, name=path.name))
            path.chmod(0o755)
        return {"PATH": f"{folder}:/usr/bin:/bin"}

    return write


def taken(agent: Agent, *paths: Path) -> list[Json]:
    """Ask for a snapshot, wait for it, return what was written."""
    before = len(agent.all("snapshot"))
    agent.send(signal.SIGUSR2)
    until(lambda: len(agent.all("snapshot")) > before, "the snapshot")
    return [json.loads(path.read_text()) for path in paths]


def ask(agent: Agent) -> None:
    """Ask for a snapshot, wait until the agent knows."""
    agent.send(signal.SIGUSR2)
    until(lambda: not pending(agent.pid), "it takes the signal")


def pending(pid: int) -> bool:
    """Is a signal waiting to be taken by the process?"""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return any(int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd")))


def main_of(snapshot: Json) -> Json:
    found: Json = next(p for p in snapshot["processes"] if p["pid"] == snapshot["pid"])
    return found


@pytest.mark.parametrize("interpreter", interpreters())
def test_what_is_written_down(node: Node, tmp_path: Path, install: Any, interpreter: str) -> None:
    port, path, log = free_port(), tmp_path / "logs" / "1" / "0.snapshot.json", tmp_path / "0.log"
    environ = install(py_spy=PY_SPY, nvidia_smi=NVIDIA_SMI)
    engine = server(port, 3, argv=python(f"print('hello', flush=True)\n{TALK}", port, tmp_path / "up"), log=str(log))
    agent = node.agent(
        {**engine, "snapshot": str(path)},
        patch=AT_ONCE,
        environ=environ,
        interpreter=interpreter,
        stop={"snapshot_s": 20},
    )
    (pid,) = agent.go()
    until((tmp_path / "up").exists, "its sockets")
    until(lambda: Path(f"/proc/{pid}/wchan").read_text() == "hrtimer_nanosleep", "its sleep")
    began = time.time()
    (seen,) = taken(agent, path)

    report = agent.saw("snapshot")
    assert (report["ranks"], report["notes"]) == ([3], [])
    assert 0.2 <= seen["took_s"] <= report["took_s"] < 10
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert (seen["schema"], seen["rank"], seen["pid"], seen["notes"]) == (1, 3, pid, [])
    assert abs(seen["at"] - began) < 5

    main = main_of(seen)
    assert (main["parent"], main["state"], main["threads"]) == (agent.pid, "S", 1)
    assert main["name"].startswith("python")
    assert (main["wchan"], main["threads_by"]) == ("hrtimer_nanosleep", {"S hrtimer_nanosleep": 1})
    assert main["syscall"].isdigit()
    assert (main["blocked"], main["cpu_used_s"]) == ([], 0)
    assert main["within_s"] >= 0.2
    assert 3 <= main["rss_mb"] <= 100

    assert seen["socket_states"] == {"LISTEN": 1, "ESTABLISHED": 2}
    assert len(seen["sockets"]) == 3
    first = seen["sockets"][0]  # what waits to be read comes first
    assert (first["rx_queue"], first["state"], first["pid"]) == (100, "ESTABLISHED", pid)
    assert first["remote"] == f"127.0.0.1:{port}"
    assert f"127.0.0.1:{port}" in [row["local"] for row in seen["sockets"] if row["state"] == "LISTEN"]

    text = seen["py_spy"][str(pid)]
    assert text.startswith("Python v3.11.7")
    assert f'Thread {pid} (idle): "MainThread"\n    all_reduce (' in text
    assert "secret" not in path.read_text()
    assert [line.split()[1:] for line in (tmp_path / "py-spy.calls").read_text().splitlines()] == [
        ["dump", "--nonblocking", "--pid", str(pid)]
    ]
    assert seen["nvidia_smi"].splitlines() == [
        "gpu=index,uuid,utilization.gpu,memory.used",
        "0, GPU-1, 100 %, 400 MiB",
        "compute-apps=pid,used_memory",
        "4711, 400 MiB",
    ]
    assert seen["log"] == {"path": str(log), "size": 6, "silent_s": seen["log"]["silent_s"], "last_lines": ["hello"]}
    assert 0 <= seen["log"]["silent_s"] < 20
    assert seen["local_probe"] is None
    agent.stop()
    assert agent.stderr.read_text() == ""


def test_where_nothing_is_installed(node: Node, tmp_path: Path, install: Any) -> None:
    path = tmp_path / "0.json"
    engine = member(argv=python(SPIN), snapshot=str(path))
    agent = node.agent(engine, patch=AT_ONCE, environ=install(), stop={"snapshot_s": 20})
    agent.go()
    (seen,) = taken(agent, path)
    assert (seen["py_spy"], seen["nvidia_smi"], seen["log"]) == ({}, "", None)
    assert sorted(seen["notes"]) == ["nvidia-smi is not on PATH", "py-spy is not on PATH"]
    assert agent.saw("snapshot")["took_s"] < 10
    agent.stop()


def test_a_stopped_engine(node: Node, tmp_path: Path, install: Any) -> None:
    path = tmp_path / "0.json"
    agent = node.agent(member(snapshot=str(path)), patch=AT_ONCE, environ=install())
    (pid,) = agent.go()
    os.kill(pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "T", "its stop")
    (seen,) = taken(agent, path)
    assert main_of(seen)["state"] == "T"
    assert next(iter(main_of(seen)["threads_by"])).startswith("T")
    found = stuck({0: seen})
    assert found is not None
    assert str(pid) in found.why
    agent.stop()


def test_spinning_and_sleeping_are_told_apart(node: Node, tmp_path: Path, install: Any) -> None:
    paths = [tmp_path / "0.json", tmp_path / "1.json"]
    spins = member(0, argv=python(SPIN), snapshot=str(paths[0]))
    sleeps = member(1, argv=python("import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()"))
    # In a second it gets a few hundredths even of a machine that is busy with others.
    patch = f"{AT_ONCE}\ng['LOOKS_APART_S'] = 1"
    agent = node.agent(spins, {**sleeps, "snapshot": str(paths[1])}, patch=patch, environ=install())
    pids = agent.go()
    until(lambda: len(os.listdir(f"/proc/{pids[1]}/task")) == 2, "its thread")
    spinning, sleeping = map(main_of, taken(agent, *paths))
    assert [spinning["pid"], sleeping["pid"]] == pids
    assert spinning["cpu_used_s"] >= 0.03 > 0.01 >= sleeping["cpu_used_s"]
    assert spinning["state"] == "R"
    assert (sleeping["state"], sleeping["threads"], sum(sleeping["threads_by"].values())) == ("S", 2, 2)
    assert agent.saw("snapshot")["ranks"] == [0, 1]
    agent.stop()


def test_the_whole_tree_and_what_detached_itself(node: Node, tmp_path: Path, install: Any) -> None:
    path = tmp_path / "0.json"
    argv = python(ORPHAN, free_port(), tmp_path)
    agent = node.agent(member(argv=argv, snapshot=str(path)), patch=AT_ONCE, environ=install(py_spy=PY_SPY))
    (pid,) = agent.go()
    orphan = pid_in(tmp_path / "orphan.pid")
    until(lambda: Path(f"/proc/{pid}/task/{pid}/children").read_text(), "its dead child")
    (seen,) = taken(agent, path)
    states = {p["pid"]: p["state"] for p in seen["processes"]}
    assert {states[pid], states[orphan]} == {"S"}
    assert next(iter(states)) == pid
    assert sorted(states.values()) == ["S", "S", "Z"]
    assert next(iter(seen["py_spy"])) == str(pid)
    assert {int(asked) for asked in seen["py_spy"]} == {pid, orphan}
    assert stuck({0: seen}) is None
    agent.stop()


@pytest.mark.parametrize("program", ["py_spy", "nvidia_smi"])
def test_a_program_that_hangs_is_ended_in_time(node: Node, tmp_path: Path, install: Any, program: str) -> None:
    path, name = tmp_path / "0.json", program.replace("_", "-")
    agent = node.agent(
        member(argv=python(SPIN), snapshot=str(path)),
        patch=AT_ONCE,
        environ=install(**{"py_spy": PY_SPY, program: HANGS}),
    )
    (pid,) = agent.go()
    (seen,) = taken(agent, path)
    report = agent.saw("snapshot")
    assert (report["ranks"], report["notes"]) == ([0], []), "written in time"
    assert report["took_s"] >= 2.4, "as long as answers may come"
    assert any(note.startswith(name) and "no complete answer" in note for note in seen["notes"])
    assert "half" in seen["nvidia_smi"] or program == "py_spy"
    assert main_of(seen)["pid"] == pid
    hung = pid_in(tmp_path / f"{name}.pid")
    until(lambda: node.listed() == {agent.pid, pid}, "the end of all that it started")
    assert not alive(hung)
    agent.stop()


def test_a_program_that_fails_has_its_words_in_the_notes(node: Node, tmp_path: Path, install: Any) -> None:
    path = tmp_path / "0.json"
    environ = install(py_spy="#!/bin/sh\necho 'Error: Permission denied\n\nCaused by: ptrace' >&2\nexit 1\n")
    agent = node.agent(member(argv=python(SPIN), snapshot=str(path)), patch=AT_ONCE, environ=environ)
    (pid,) = agent.go()
    (seen,) = taken(agent, path)
    assert f"py-spy, pid {pid}: Error: Permission denied Caused by: ptrace" in seen["notes"]
    assert seen["py_spy"] == {}
    agent.stop()


def test_a_stop_ends_it_at_once(node: Node, tmp_path: Path, install: Any) -> None:
    agent = node.agent(
        member(argv=python(SPIN), snapshot=str(tmp_path / "0.json")),
        patch=AT_ONCE,
        environ=install(py_spy=HANGS, nvidia_smi=HANGS),
        stop={"snapshot_s": 20},
    )
    (pid,) = agent.go()
    agent.send(signal.SIGUSR2)
    hung = [pid_in(tmp_path / "py-spy.pid"), pid_in(tmp_path / "nvidia-smi.pid")]
    began = time.monotonic()
    agent.stop()
    assert time.monotonic() - began < 10
    assert not any(map(alive, [pid, *hung]))
    assert not agent.all("snapshot")


def test_an_engine_that_ends_meanwhile_is_told_at_once(node: Node, tmp_path: Path, install: Any) -> None:
    agent = node.agent(
        member(argv=python(SPIN), snapshot=str(tmp_path / "0.json")),
        patch=AT_ONCE,
        environ=install(py_spy=HANGS),
        stop={"snapshot_s": 20},
    )
    (pid,) = agent.go()
    agent.send(signal.SIGUSR2)
    hung = pid_in(tmp_path / "py-spy.pid")
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert agent.ended("engine_exited", 80)["signal"] == signal.SIGKILL
    assert time.monotonic() - began < 10
    assert not alive(hung)


def test_the_rest_goes_on_meanwhile(node: Node, tmp_path: Path, install: Any) -> None:
    port = free_port()
    engine = server(port, argv=python("import time; time.sleep(0.5)\n" + TALK, port, tmp_path / "up"))
    agent = node.agent(engine, patch=AT_ONCE, environ=install(nvidia_smi=HANGS), stop={"snapshot_s": 20})
    agent.go()
    agent.send(signal.SIGUSR2)
    agent.saw("listening")
    assert not agent.all("snapshot")
    agent.stop()


def test_one_at_a_time_and_the_newest_stays(node: Node, tmp_path: Path, install: Any) -> None:
    path, calls = tmp_path / "0.json", tmp_path / "py-spy.calls"
    agent = node.agent(
        member(argv=python(SPIN), snapshot=str(path)),
        patch=AT_ONCE,
        environ=install(py_spy=PY_SPY + "while [ ! -e {folder}/enough ]; do sleep 0.1; done\n"),
        stop={"snapshot_s": 20},
    )
    agent.go()
    ask(agent)
    until(calls.exists, "a snapshot")
    ask(agent)  # meanwhile
    (tmp_path / "enough").touch()
    agent.saw("snapshot")
    first = json.loads(path.read_text())
    time.sleep(0.1)  # in which one that was only put off would begin
    assert len(calls.read_text().splitlines()) == 1
    (second,) = taken(agent, path)
    assert second["at"] > first["at"]
    assert len(agent.all("snapshot")) == 2
    agent.stop()


@pytest.mark.parametrize("orders", [{}, {"stop": {"snapshot_s": 0}}])
def test_when_a_signal_asks_for_none(node: Node, tmp_path: Path, orders: Json) -> None:
    """It is a repeated go so soon after the start; and none is wanted where it may take no time."""
    path = tmp_path / "0.json"
    engine = member(snapshot=str(path))
    patch = AT_ONCE if orders else "g['GO_AGAIN_S'] = 600"
    agent = node.agent(engine, patch=patch, **{"stop": {"snapshot_s": 0.001}, **orders})
    agent.go()
    for _ in range(3):  # what the first began, it would have reported when it takes the third
        ask(agent)
    agent.stop()
    assert not agent.all("snapshot")
    assert not path.exists()


def test_two_seconds_after_the_start_a_signal_asks_for_one(node: Node, tmp_path: Path, install: Any) -> None:
    path = tmp_path / "0.json"
    agent = node.agent(member(snapshot=str(path)), environ=install())
    agent.saw("fenced")
    began = time.monotonic()
    agent.go()

    def asked() -> list[Json]:
        agent.send(signal.SIGUSR2)
        return agent.all("snapshot")

    until(asked, "a snapshot")
    assert 2 <= time.monotonic() - began < 6
    agent.stop()


@pytest.mark.parametrize("trouble", ["a file is in the way", "full"])
def test_a_file_that_cannot_be_written(node: Node, tmp_path: Path, install: Any, trouble: str) -> None:
    paths = [tmp_path / "none" / "0.json", tmp_path / "1.json"]
    if trouble == "full":
        paths[0].parent.mkdir()
        Path(f"{paths[0]}.new").symlink_to("/dev/full")
    else:
        paths[0].parent.touch()
    members = [member(rank, snapshot=str(path)) for rank, path in enumerate(paths)]
    agent = node.agent(*members, patch=AT_ONCE, environ=install())
    agent.go()
    (seen,) = taken(agent, paths[1])
    report = agent.saw("snapshot")
    assert report["ranks"] == [1]
    (note,) = report["notes"]
    assert note.startswith(f"rank 0: {paths[0]} cannot be written: ")
    assert seen["rank"] == 1
    agent.stop()


def test_a_file_system_that_hangs(node: Node, tmp_path: Path, install: Any) -> None:
    os.mkfifo(tmp_path / "0.json.new")  # opening it waits for a reader
    agent = node.agent(
        member(snapshot=str(tmp_path / "0.json")), patch=AT_ONCE, environ=install(), stop={"snapshot_s": 0.6}
    )
    agent.go()
    taken(agent)
    report = agent.saw("snapshot", ranks=[])
    assert 0.6 <= report["took_s"] < 5
    assert report["notes"] == ["not written within 0.6 s"]
    began = time.monotonic()
    agent.stop()
    assert time.monotonic() - began < 5


def test_it_ends_in_time_whatever_else_the_agent_waits_for(node: Node, tmp_path: Path, install: Any) -> None:
    os.mkfifo(tmp_path / "0.json.new")
    engine = member(snapshot=str(tmp_path / "0.json"))
    agent = node.agent(engine, patch=AT_ONCE, environ=install(), stop={"snapshot_s": 0.02})
    agent.go()
    for _ in range(9):
        taken(agent)
    assert sorted(report["took_s"] for report in agent.all("snapshot"))[4] < 0.15
    agent.stop()


def test_where_no_process_can_be_started(node: Node, tmp_path: Path) -> None:
    broken = "def ask(*_): raise OSError('no more processes')\ng['ask'] = ask"
    agent = node.agent(member(snapshot=str(tmp_path / "0.json")), patch=f"{AT_ONCE}\n{broken}")
    agent.go()
    taken(agent)
    assert agent.saw("snapshot")["notes"] == ["no more processes"]
    agent.stop()


def test_the_local_probes_word(node: Node, tmp_path: Path, install: Any) -> None:
    port, path = free_port(), tmp_path / "0.json"
    probe = {"period_s": 0.05, "timeout_s": 20, "failure_threshold": 3, "path": "/", "body": "", "expect": ""}
    code = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(200 if Handler.asked < 3 else 503)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
    engine = server(port, argv=python(code, port), snapshot=str(path))
    agent = node.agent(engine, patch=AT_ONCE, environ=install(), probe={**probe, "counter": None})
    agent.go()
    agent.saw("local_probe", failures=3)
    (seen,) = taken(agent, path)
    assert seen["local_probe"]["failures"] >= 3
    assert seen["local_probe"]["error"] == "HTTP 503"
    agent.stop()


def test_a_group_of_stub_engines_that_hangs(node: Node, tmp_path: Path, install: Any) -> None:
    """One rank is stopped, the other waits for it: the one that is stopped is named."""
    master, port = free_port(), free_port()
    engine = "slurm_rollout.testing.stub_engine"
    argv = [sys.executable, "-m", engine, "--size=2", "--load-s=0", f"--master=127.0.0.1:{master}", "--host=127.0.0.1"]
    paths = [tmp_path / "0.json", tmp_path / "1.json"]
    agent = node.agent(
        server(port, 0, argv=[*argv, "--rank=0", f"--port={port}"], snapshot=str(paths[0])),
        member(1, argv=[*argv, "--rank=1", f"--port={free_port()}"], snapshot=str(paths[1])),
        patch=AT_ONCE,
        environ={**install(), "PYTHONPATH": str(AGENT.parent.parent)},
        popen={"cwd": tmp_path},
    )
    leader, pid = agent.go()
    agent.saw("listening", rank=0)
    os.kill(pid, signal.SIGSTOP)
    held = socket_inodes(leader)
    with socket.create_connection(("127.0.0.1", port)) as client:  # a request that nobody will answer
        body = b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}'
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        until(lambda: socket_inodes(leader) != held, "its connection")
        snapshots = dict(enumerate(taken(agent, *paths)))
    found = stuck(snapshots)
    assert found is not None
    assert (found.rank, f"pid {pid} " in found.why) == (1, True)
    assert snapshots[0]["socket_states"]["ESTABLISHED"] >= 2
    assert main_of(snapshots[0])["state"] == "S"
    agent.stop()
    assert not alive(pid)
