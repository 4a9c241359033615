"""The agent's life with real processes: orders, go, engines, logs, local probe, stop, exit record."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import agent as module
from tests.agent_harness import (
    AGENT,
    DEADLINE_S,
    LISTEN,
    ORPHAN,
    Agent,
    Json,
    Node,
    alive,
    free_port,
    interpreters,
    member,
    occupied,
    pid_in,
    python,
    server,
    start_ticks,
    until,
)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    try:
        yield made
    finally:
        made.close()


# ------------------------------------------------------------------------------------------------------------ the file


def test_one_file_of_the_standard_library_in_the_syntax_of_3_9() -> None:
    tree = ast.parse(AGENT.read_text(), feature_version=(3, 9))
    imported = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {n.module or "." for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
    at_the_top = {alias.name for n in tree.body if isinstance(n, ast.Import) for alias in n.names}
    slow = {"subprocess", "threading", "http.client", "ctypes", "typing", "argparse", "logging", "dataclasses"}
    assert not at_the_top & slow


def test_it_explains_itself_where_it_is_installed_alone() -> None:
    said = subprocess.run(
        [AGENT.parent.parent / "sbin" / "slurm-rollout-agent", "--help"], capture_output=True, text=True, check=True
    )
    assert "command of every step" in said.stdout
    wrong = subprocess.run([sys.executable, AGENT, "--halp"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (86, "")
    assert "ROLLOUT_STEP" in wrong.stderr


def test_no_status_that_means_something_to_slurm() -> None:
    assert not {108, 137, 143, 253} & set(module.STATUS.values())


# -------------------------------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not set"),
        ("{", "ROLLOUT_STEP"),
        ("[]", "ROLLOUT_STEP"),
        ("{}", "version"),
        ('{"version": 1, "mode": "serve"}', "releases"),
    ],
)
def test_orders_that_make_no_sense(node: Node, text: str, words: str) -> None:
    agent = node.agent(environ={"ROLLOUT_STEP": text})
    assert words in agent.ended("bad_config", 86)["message"]
    assert agent.reports[0]["report"] == "hello"


@pytest.mark.parametrize("key", ["members", "fence", "stop", "log", "run_id", "setup"])
def test_a_missing_key_is_named(node: Node, key: str) -> None:
    orders = node.orders(member())
    del orders[key]
    agent = node.agent(environ={"ROLLOUT_STEP": json.dumps(orders)})
    assert key in agent.ended("bad_config", 86)["message"]


def test_a_name_that_leaves_the_state_directory_is_refused(node: Node) -> None:
    node.agent(member(), node="..").ended("bad_config", 86)
    node.agent(member(), node="../../etc").ended("bad_config", 86)


def test_hello_says_who_it_is(node: Node) -> None:
    agent = node.agent(member(), environ={"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "3"})
    assert agent.saw("hello") == {"report": "hello", "pid": agent.pid, "step": "77.3", "host": os.uname().nodename}
    outside = node.agent(member(), group="actor/1")
    assert outside.saw("hello")["step"] == ""


# -------------------------------------------------------------------------------------------------------------- claims


def test_an_equal_or_newer_claim_ends_it(node: Node) -> None:
    first = node.agent(member(), incarnation=2)
    first.saw("fenced")
    assert "incarnation 2" in node.agent(member(), incarnation=2).ended("other_incarnation", 84)["message"]
    assert "incarnation 2" in node.agent(member(), incarnation=1).ended("other_incarnation", 84)["message"]
    assert first.pid in node.listed(2)
    # Other groups and other nodes have claims of their own.
    node.agent(member(), incarnation=2, group="actor/1").saw("fenced")
    node.agent(member(), incarnation=2, node="n2").saw("fenced")
    first.stop()
    # A claim lasts longer than its agent; a process list does not.
    node.agent(member(), incarnation=2).ended("other_incarnation", 84)
    assert not node.listed(2)


@pytest.mark.parametrize("trouble", ["link", "file", "open to others", "not ours"])
def test_a_state_directory_that_others_control_is_refused(node: Node, tmp_path: Path, trouble: str) -> None:
    if trouble == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        node.state_dir.symlink_to(tmp_path / "elsewhere")
    elif trouble == "file":
        node.state_dir.touch()
    elif trouble == "open to others":
        node.state_dir.mkdir()
        node.state_dir.chmod(0o777)
    elif os.getuid() == 0:
        node.state_dir.mkdir(mode=0o700)
        os.chown(node.state_dir, 12345, 12345)
    else:
        node.state_dir = Path("/root") if Path("/root").exists() else Path("/")
    assert "state directory" in node.agent(member()).ended("bad_config", 86)["message"]


# ---------------------------------------------------------------------------------------------------- a life, go, stop


@pytest.mark.parametrize("interpreter", interpreters())
def test_a_whole_life(node: Node, tmp_path: Path, mode: Path, interpreter: str) -> None:
    port = free_port()
    log = tmp_path / "logs" / "actor" / "1" / "0.log"
    show = (
        "import json, os, sys\n"
        "print(json.dumps(dict(env=dict(os.environ), stdin=os.readlink('/proc/self/fd/0'),"
        " group=os.getpgid(0), fds=os.listdir('/proc/self/fd'))), flush=True)\n"
        "print('to stderr', file=sys.stderr, flush=True)\n"
    )
    probe = probing(period_s=0.05)
    engine = server(port, argv=python(show + ENGINE, port, mode), log=str(log), env={"MINE": "1"})
    agent = node.agent(engine, interpreter=interpreter, probe=probe, environ={"ROLLOUT_MARK": "the launcher's"})
    (pid,) = agent.go()
    assert agent.saw("started") == {"report": "started", "ranks": [0], "pids": [pid]}
    assert agent.saw("listening") == {"report": "listening", "rank": 0, "port": port, "address": "127.0.0.1"}
    until(lambda: pid in node.listed() and agent.pid in node.listed(), "the process list")
    more_probes(mode, 2)
    die(agent, mode)
    first, second = log.read_text().splitlines()[:2]
    seen = json.loads(first)
    assert second == "to stderr"
    assert seen["env"]["MINE"] == "1"
    assert seen["env"]["ROLLOUT_MARK"] == node.mark()
    assert "ROLLOUT_STEP" not in seen["env"]
    assert (seen["stdin"], seen["group"]) == ("/dev/null", pid)
    assert len(seen["fds"]) == 4, "standard ones, and the folder that it lists"
    assert [stat.S_IMODE(p.stat().st_mode) for p in (log, log.parent, log.parent.parent)] == [0o600, 0o700, 0o700]
    assert stat.S_IMODE(node.state_dir.stat().st_mode) == 0o700
    assert agent.stop() == {"report": "exit", "cause": "stopped", "message": "stopped by SIGUSR1"}
    assert not alive(pid)
    assert [r["report"] for r in agent.reports if r["report"] != "local_probe"] == [
        "hello", "fenced", "started", "listening", "exit",
    ]  # fmt: skip
    assert not node.listed()
    assert agent.stderr.read_text() == ""


def test_slurm_may_send_go_and_stop_to_the_engines_too(node: Node) -> None:
    agent = node.agent(member(), patch="g['TOGETHER_S'] = 60")
    (pid,) = agent.go()
    for number in (signal.SIGUSR2, signal.SIGUSR1):
        os.kill(pid, number)
    os.kill(pid, 0)
    os.kill(pid, signal.SIGTERM)
    until(lambda: not alive(pid), "the engine's end by TERM alone")
    agent.send(signal.SIGTERM)
    assert agent.ended("stopped", 0)["message"] == "stopped by SIGTERM"


def test_an_engine_that_somebody_terminates_has_failed(node: Node) -> None:
    agent = node.agent(member())
    (pid,) = agent.go()
    os.kill(pid, signal.SIGTERM)
    assert agent.ended("engine_exited", 80)["signal"] == signal.SIGTERM


def test_engines_inherit_no_dispositions_and_no_core_dumps(node: Node, tmp_path: Path) -> None:
    def allow_core_dumps() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))

    log = tmp_path / "0.log"
    show = "grep -E 'SigBlk|SigIgn' /proc/self/status; ulimit -c; echo end; exec sleep 600"
    agent = node.agent(member(argv=["sh", "-c", show], log=str(log)), popen={"preexec_fn": allow_core_dumps})
    agent.go()
    until(lambda: log.read_text().endswith("end\n"), "the engine's output")
    # Only the agent's own USR1 and USR2 are ignored, besides what whoever runs the tests already ignores.
    bare = subprocess.run(["grep", "SigIgn", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    handled = sum(1 << (n - 1) for n in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM))  # by the agent
    ignored = f"{int(bare.split()[1], 16) & ~handled | 0xA00:016x}"
    assert log.read_text().split() == ["SigBlk:", "0" * 16, "SigIgn:", ignored, "0", "end"]
    agent.stop()


def test_go_twice_starts_once(node: Node, tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    agent = node.agent(member(argv=python("print('x', flush=True); import time; time.sleep(600)"), log=str(log)))
    agent.go()
    agent.send(signal.SIGUSR2)
    until(log.read_text, "the engine's start")
    agent.send(signal.SIGUSR2)
    agent.stop()
    assert log.read_text() == "x\n"
    assert len(agent.all("started")) == 1


def test_go_before_the_fence_is_through_starts_nothing(node: Node) -> None:
    port = free_port()
    with occupied(port):
        agent = node.agent(member(ports=[port]))
        agent.saw("fence_waits")
        agent.send(signal.SIGUSR2)
    agent.saw("fenced")
    agent.stop()
    assert not agent.all("started")


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *((m, signal.SIGUSR1) for m in ("at hello", "in the fence", "before go", "with go", "after go")),
        ("in the fence", signal.SIGTERM),
        *(("after go", n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)),
    ],
)
def test_a_stop_at_any_moment(node: Node, moment: str, number: int) -> None:
    port = free_port()
    with occupied(port):
        agent = node.agent(member(ports=[port] if moment == "in the fence" else []))
        agent.saw({"at hello": "hello", "in the fence": "fence_waits"}.get(moment, "fenced"))
        if moment == "after go":
            agent.go()
        elif moment == "with go":
            agent.send(signal.SIGUSR2)
        agent.send(number)
        agent.ended("stopped", 0)
    for started in agent.all("started"):
        assert not any(map(alive, started["pids"]))


def test_signals_that_its_parent_ignored_work_all_the_same(node: Node) -> None:
    def ignore() -> None:
        for number in (signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    agent = node.agent(member(argv=["sh", "-c", "exit 4"]), popen={"preexec_fn": ignore})
    agent.saw("fenced")
    agent.send(signal.SIGUSR2)
    assert agent.ended("engine_exited", 80)["code"] == 4


def test_nobody_reads_its_reports(node: Node, tmp_path: Path) -> None:
    marker = tmp_path / "engine.pid"
    agent = node.agent(
        member(argv=["sh", "-c", f"echo $$ > {marker}.new; mv {marker}.new {marker}; exec sleep 600"]),
        popen={"stdout": broken_pipe()},
    )
    until(node.listed, "its process list")

    def started() -> bool:
        agent.send(signal.SIGUSR2)  # whether its fence is through cannot be seen: go again is nothing
        return marker.exists()

    until(started, "its engine")
    pid = pid_in(marker)
    agent.send(signal.SIGUSR1)
    assert agent.join() == 0
    assert not alive(pid)


def test_a_reader_that_is_stopped_does_not_stop_it(node: Node) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"\n" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    agent = node.agent(member(), popen={"stdout": writer}, patch="g['REPORT_TIMEOUT_S'] = 0.01")
    until(node.listed, "its process list")
    agent.send(signal.SIGUSR1)
    assert agent.join() == 0
    os.close(writer)
    os.close(reader)


def broken_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


# ---------------------------------------------------------------------------------------------------------- exec, setup


@pytest.mark.parametrize("setup", [[], [": nothing"]])
def test_arguments_arrive_as_they_are(node: Node, tmp_path: Path, setup: list[str]) -> None:
    log = tmp_path / "0.log"
    words = ["a b", "$HOME", "'\"", "", "*", "\n"]
    agent = node.agent(member(argv=python("import sys; print(sys.argv[1:])", *words), log=str(log)), setup=setup)
    agent.go()
    agent.ended("engine_exited", 80)
    assert log.read_text() == f"{words}\n"


def test_setup_runs_in_the_engines_own_process(node: Node, tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    agent = node.agent(
        member(
            argv=python("import os, time; print(os.environ['A'], os.getpid(), flush=True); time.sleep(600)"),
            log=str(log),
        ),
        setup=["A='two words'", "export A"],
    )
    (pid,) = agent.go()
    assert until(log.read_text, "the engine's output") == f"two words {pid}\n"
    agent.stop()


def test_setup_and_a_program_that_does_not_exist(node: Node, tmp_path: Path) -> None:
    agent = node.agent(member(argv=["no-such-program"], log=str(tmp_path / "0.log")), setup=["true"])
    agent.saw("fenced")
    agent.send(signal.SIGUSR2)
    record = agent.ended("engine_exited", 80)
    assert record["code"] == 127
    assert "no-such-program" in record["last_lines"][-1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: "no-such-program", "not found on PATH"),
        (lambda folder: str(folder / "missing"), "No such file"),
        (lambda folder: script(folder, "#!/no/such/interpreter\n", 0o700), "interpreter"),
        (lambda folder: script(folder, "#!/bin/sh\n", 0o600), "Permission denied"),
        (lambda folder: "nul\0byte", "embedded null"),
    ],
)
def test_an_engine_that_cannot_be_started(node: Node, tmp_path: Path, make: Any, words: str) -> None:
    agent = node.agent(member(0), member(1, argv=[make(tmp_path)]))
    agent.saw("fenced")
    agent.send(signal.SIGUSR2)
    record = agent.ended("exec_failed", 85)
    assert words in record["message"]
    assert record["rank"] == 1
    assert not agent.all("started")
    # `ended` has seen the agent's end: its rank 0, a child without a parent now, would be alive here.
    assert not node_processes(node)


def test_a_log_that_cannot_be_opened(node: Node, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    agent = node.agent(member(0), member(1, log=str(tmp_path / "file" / "1.log")))
    agent.saw("fenced")
    agent.send(signal.SIGUSR2)
    assert "1.log" in agent.ended("exec_failed", 85)["message"]
    assert not node_processes(node)


def script(folder: Path, text: str, mode: int) -> str:
    path = folder / "engine"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def node_processes(node: Node) -> list[int]:
    """The living processes that carry a mark of this node's run."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"ROLLOUT_MARK={node.run_id}/".encode() in Path(f"/proc/{entry}/environ").read_bytes() and alive(
                int(entry)
            ):
                found.append(int(entry))
        except OSError:
            continue
    return found


# ------------------------------------------------------------------------------------------------------------------ GPU


def masks_of(log: Path) -> dict[str, str]:
    until(lambda: log.exists() and log.read_text().endswith("end\n"), "the engine's output")
    return dict(line.split("=", 1) for line in log.read_text().splitlines()[:-1])


@pytest.mark.parametrize(
    ("inherited", "gpus", "narrowed"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [2, 3], {"CUDA_VISIBLE_DEVICES": "2,3"}),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, [0, 2], {"CUDA_VISIBLE_DEVICES": "4,6"}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb"}, [1], {"CUDA_VISIBLE_DEVICES": "GPU-bb"}),
        ({}, [1, 2], {"CUDA_VISIBLE_DEVICES": "1,2"}),
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, [], {"CUDA_VISIBLE_DEVICES": "4,5"}),
        ({}, [], {}),
        ({"ROCR_VISIBLE_DEVICES": "4,5"}, [1], {"ROCR_VISIBLE_DEVICES": "5"}),
        (
            {"ASCEND_RT_VISIBLE_DEVICES": "4,5", "CUDA_VISIBLE_DEVICES": "0,1"},
            [1],
            {"ASCEND_RT_VISIBLE_DEVICES": "5", "CUDA_VISIBLE_DEVICES": "1"},
        ),
    ],
)
def test_gpus_are_narrowed_through_the_inherited_mask(
    node: Node, tmp_path: Path, inherited: Json, gpus: list[int], narrowed: Json
) -> None:
    log = tmp_path / "0.log"
    engine = member(argv=["sh", "-c", "env | grep VISIBLE; echo end; exec sleep 600"], gpus=gpus, log=str(log))
    agent = node.agent(engine, environ=inherited)
    agent.go()
    assert masks_of(log) == narrowed
    agent.stop()


@pytest.mark.parametrize("mask", ["0,1", ""])
def test_fewer_gpus_than_planned(node: Node, mask: str) -> None:
    agent = node.agent(member(gpus=[2]), environ={"CUDA_VISIBLE_DEVICES": mask})
    assert "CUDA_VISIBLE_DEVICES" in agent.ended("bad_config", 86)["message"]


# ------------------------------------------------------------------------------------------------------- an engine ends


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("exit 0", {"code": 0}),
        ("exit 3", {"code": 3}),
        ("kill -9 $$", {"signal": 9}),
        ("kill -40 $$", {"signal": 40}),
    ],
)
def test_any_end_of_an_engine_is_its_failure(node: Node, tmp_path: Path, code: str, says: Json) -> None:
    talk = f"i=0; while [ $i -lt 30 ]; do echo line $i; i=$((i+1)); done; {code}"
    agent = node.agent(member(0), member(1, argv=["sh", "-c", talk], log=str(tmp_path / "1.log")))
    other, _ = agent.go()
    record = agent.ended("engine_exited", 80)
    assert not alive(other)
    message = record.pop("message")
    assert message.startswith("rank 1 ")
    assert str(next(iter(says.values()))) in message
    expected = {"report": "exit", "cause": "engine_exited", "rank": 1, "oom": False, **says}
    assert record == {**expected, "last_lines": [f"line {n}" for n in range(10, 30)]}


def test_the_last_lines_are_bounded(node: Node, tmp_path: Path) -> None:
    code = "import sys; sys.stdout.buffer.write(b'\\xff\\0' * 100000 + b'\\nthe end')"
    agent = node.agent(member(argv=python(code), log=str(tmp_path / "0.log")))
    agent.go()
    lines = agent.ended("engine_exited", 80)["last_lines"]
    assert lines[-1] == "the end"
    assert sum(map(len, lines)) <= 4096


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.events": "low 0\noom 2\noom_kill 3\n"}, 3),
        (
            {
                "/proc/self/cgroup": "5:cpu:/x\n4:memory:/a\n0::/\n",
                "/sys/fs/cgroup/memory/a/memory.oom_control": "under_oom 0\noom_kill 2\n",
            },
            2,
        ),
        (  # Slurm limits the step; its tasks' cgroups need not have the memory controller
            {
                "/proc/self/cgroup": "0::/s.scope/job_5/step_0/user/task_0\n",
                "/sys/fs/cgroup/s.scope/job_5/step_0/memory.events": "oom 1\noom_kill 1\noom_group_kill 0\n",
                "/sys/fs/cgroup/s.scope/job_5/memory.events": "oom_kill 7\n",
            },
            1,
        ),
        (  # what happens to other jobs is not ours
            {
                "/proc/self/cgroup": "0::/s.scope/job_5/step_0/user/task_0\n",
                "/sys/fs/cgroup/s.scope/job_5/memory.events": "oom_kill 7\n",
            },
            0,
        ),
        ({"/proc/self/cgroup": "0::/a\n"}, 0),
        ({}, 0),
    ],
)
def test_kills_for_memory_are_counted(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], kills: int) -> None:
    monkeypatch.setattr(module, "read_file", lambda path: files.get(path, "").encode())
    assert module.oom_kills() == kills


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A memory cgroup of 80 MiB, version 1, where this machine lets us make one."""
    folder = Path("/sys/fs/cgroup/memory") / f"test-{uuid.uuid4().hex[:12]}"
    if not Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists() or not os.access(folder.parent, os.W_OK):
        pytest.skip("no memory cgroup (version 1) can be made here")
    folder.mkdir()
    try:
        for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
            with contextlib.suppress(OSError):  # swap is not counted everywhere
                (folder / name).write_text(str(80 << 20))
        yield folder
    finally:
        folder.rmdir()


def test_the_kernels_kill_for_memory_is_seen(node: Node, small_memory: Path) -> None:
    enter = f"open('{small_memory}/cgroup.procs', 'w').write(str(g['os'].getpid()))"
    agent = node.agent(member(argv=python("b'x' * (300 << 20)")), patch=enter)
    agent.go()
    record = agent.ended("engine_exited", 80)
    assert (record["signal"], record["oom"]) == (signal.SIGKILL, True)
    assert "because memory was used up" in record["message"]


def test_an_end_for_lack_of_memory_is_told(node: Node) -> None:
    patch = "counts = iter([1, 2])\ng['oom_kills'] = lambda: next(counts)"
    agent = node.agent(member(argv=["sh", "-c", "kill -9 $$"]), patch=patch)
    agent.go()
    record = agent.ended("engine_exited", 80)
    assert record["oom"] is True
    assert "memory" in record["message"]


# -------------------------------------------------------------------------------------------------- whose fault it was


ROOM = """
import types
real = os.statvfs
def statvfs(path):
    free = 0 if path == {full!r} else 1 << 30
    return types.SimpleNamespace(f_blocks=1 << 30, f_bavail=free, f_frsize=1, f_files=9, f_favail=9)
os.statvfs = statvfs
"""


def dies_saying(node: Node, tmp_path: Path, words: str, *, patch: str = "", **changes: Any) -> Json:
    log = tmp_path / "engine.log"
    engine = member(argv=["sh", "-c", f'echo "{words}"; exit 1'], log=str(log), **changes)
    agent = node.agent(engine, patch=f"import os\n{patch}")
    agent.go()
    return agent.ended("engine_exited", 80)


@pytest.mark.parametrize(
    "words",
    [
        "OSError: [Errno 28] No space left on device: 'x'",
        "RuntimeError: no space left on device",
        "Disk quota exceeded",
        "OSError: [Errno 122]",
    ],
)
def test_an_engine_that_says_that_its_disk_is_full(node: Node, tmp_path: Path, words: str) -> None:
    record = dies_saying(node, tmp_path, words, patch=ROOM.format(full="nowhere"))
    assert record["disk"] == "a file system that n1 uses is full or over its quota, as the last lines say"


def test_the_full_file_system_is_named_where_it_can_be_seen(node: Node, tmp_path: Path) -> None:
    full = tmp_path / "scratch"
    full.mkdir()
    patch = ROOM.format(full=str(full)) + "devices = iter(range(99))\nreal_stat = os.stat\n"
    patch += "g['DISK_LOOK_S'] = 20\n"
    patch += (
        "os.stat = lambda p, **o: types.SimpleNamespace(st_dev=next(devices)) if p == {!r} else real_stat(p, **o)\n"
    )
    record = dies_saying(
        node, tmp_path, "No space left on device", patch=patch.format(str(full)), env={"TMPDIR": str(full)}
    )
    assert record["disk"] == f"{full} on n1 is full"


def test_a_full_disk_of_which_the_engine_says_nothing_is_not_why_it_died(node: Node, tmp_path: Path) -> None:
    record = dies_saying(node, tmp_path, "assertion failed", patch=ROOM.format(full="/tmp"))
    assert "disk" not in record


def test_a_file_server_that_hangs_does_not_keep_the_agent(node: Node, tmp_path: Path) -> None:
    patch = "import time\nos.statvfs = lambda path: time.sleep(600)"
    began = time.monotonic()
    record = dies_saying(node, tmp_path, "No space left on device", patch=patch)
    assert time.monotonic() - began < 10
    assert "as the last lines say" in record["disk"]


@pytest.mark.parametrize(("number", "says"), [("ENOSPC", "is full"), ("EDQUOT", "is over its quota"), ("EACCES", None)])
def test_a_log_for_which_there_is_no_room(node: Node, tmp_path: Path, number: str, says: str | None) -> None:
    folder = tmp_path / "logs"
    patch = f"""
import errno, os
real = os.open
def full(path, *rest, **more):
    if str(path).startswith({str(folder)!r}):
        raise OSError(errno.{number}, os.strerror(errno.{number}), path)
    return real(path, *rest, **more)
os.open = full
"""
    agent = node.agent(member(log=str(folder / "0.log")), patch=patch)
    agent.saw("fenced")
    agent.send(signal.SIGUSR2)
    record = agent.ended("exec_failed", 85)
    assert record.get("disk") == (says and f"{folder} on n1 {says}")


def test_a_state_directory_for_which_there_is_no_room(node: Node) -> None:
    patch = """
import errno, os
def full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
g["make_folders"] = full
"""
    record = node.agent(member(), patch=patch).ended("bad_config", 86)
    assert record["disk"] == f"{node.state_dir} on n1 is full"


XID = "NVRM: Xid (PCI:0000:3b:00): {}, pid=1234, name=python3, {}"


@pytest.mark.parametrize(
    ("kernel", "lines", "says"),
    [
        ([XID.format(79, "GPU has fallen off the bus.")], [], "Xid 79 of PCI:0000:3b:00: the GPU has fallen off"),
        ([XID.format(31, "MMU fault"), XID.format(48, "DBE")], [], "Xid 48"),
        (["NVRM: Xid (0000:03:00): 95, pid='<unknown>'"], [], "Xid 95 of 0000:03:00"),
        ([XID.format(31, "MMU fault"), XID.format(13, ""), XID.format(43, "")], [], ""),
        ([XID.format(63, "Row Remapper: New row marked for remapping")], [], ""),
        (["NVRM: Xid (", "NVRM: Xid (PCI:0): x", "usb 1-1: 79"], [], ""),
        ([], ["CUDA error: uncorrectable ECC error encountered"], "the last lines say: uncorrectable ecc error"),
        ([], ["CUDA error: an illegal memory access was encountered"], ""),
        ([], ["CUDA out of memory"], ""),
    ],
)
def test_what_a_broken_gpu_is_known_by(kernel: list[str], lines: list[str], says: str) -> None:
    found = module.broken_gpu(kernel, lines)
    assert says in found
    assert bool(found) is bool(says)


@pytest.mark.parametrize("gpus", [[0], []])
def test_what_the_kernel_said_while_the_engines_ran_is_in_the_exit_record(
    node: Node, tmp_path: Path, gpus: list[int]
) -> None:
    log = tmp_path / "kmsg"
    log.write_text("4,1,1,-;" + XID.format(95, "of yesterday") + "\n")
    patch = f"""
real = os.open
os.open = lambda path, *rest, **more: real({str(log)!r} if path == "/dev/kmsg" else path, *rest, **more)
"""
    words = f"x\" && echo '4,2,2,-;{XID.format(79, 'lost')}' >> {log} && echo \"y"
    record = dies_saying(node, tmp_path, words, patch=patch, gpus=gpus)
    seen = "the driver reported Xid 79 of PCI:0000:3b:00: the GPU has fallen off the bus"
    assert record.get("hardware") == (seen if gpus else None)


def test_a_kernel_log_that_is_not_for_us_says_nothing(node: Node, tmp_path: Path) -> None:
    patch = """
real = os.open
def refuse(path, *rest, **more):
    if path == "/dev/kmsg":
        raise PermissionError(1, "Operation not permitted")
    return real(path, *rest, **more)
os.open = refuse
"""
    assert "hardware" not in dies_saying(node, tmp_path, "x", patch=patch, gpus=[0])


@pytest.mark.parametrize("end", ["stop", "engine"])
def test_what_detached_itself_is_ended_too(node: Node, tmp_path: Path, end: str) -> None:
    agent = node.agent(member(argv=python(ORPHAN, free_port(), tmp_path)))
    (pid,) = agent.go()
    orphan = pid_in(tmp_path / "orphan.pid")
    if end == "stop":
        agent.stop()
    else:
        os.kill(pid, signal.SIGKILL)
        agent.ended("engine_exited", 80)
    assert not alive(orphan)


def test_its_own_death_takes_the_engines_along(node: Node) -> None:
    agent = node.agent(member(0), member(1), setup=["true"])
    pids = agent.go()
    agent.send(signal.SIGKILL)
    until(lambda: not any(map(alive, pids)), "the engines' end")


# ----------------------------------------------------------------------------------------------------------------- stop


def test_a_stopped_engine_is_ended(node: Node) -> None:
    agent = node.agent(member())
    (pid,) = agent.go()
    os.kill(pid, signal.SIGSTOP)
    agent.stop()
    assert not alive(pid)


LEAVES = (
    "import signal, sys, time\n"
    "def leave(*_): print('bye', flush=True); sys.exit()\n"
    "signal.signal(signal.SIGTERM, leave); print('ready', flush=True); time.sleep(600)"
)
STAYS = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"


def old_run(node: Node, name: str, **processes: list[list[int]]) -> Path:
    """What a run left on this node longer than a month ago; with `processes` a list that names them."""
    run = node.state_dir / name
    group = run / "n1" / "actor~0"
    group.mkdir(parents=True, mode=0o700)
    (group / "claim-1").touch()
    (group / "claim-12").touch()
    if processes:
        (group / "processes-12").write_text(json.dumps({"boot": "x", "slurm": {}, **processes}))
    return run


def age(run: Path) -> None:
    at = time.time() - module.FORGET_AFTER_S - 60
    for path in (run, *run.rglob("*")):
        os.utime(path, (at, at), follow_symlinks=False)


def test_what_ended_runs_left_is_removed_after_a_month(node: Node, tmp_path: Path) -> None:
    alive_still = node.bystander()
    gone = old_run(node, "gone", processes=[[2**22 - 1, 7], [alive_still, 7]])
    lives = old_run(node, "lives", processes=[[alive_still, start_ticks(alive_still)]])
    marked = old_run(node, "marked")
    node.bystander(mark="marked/actor/0/12/n1")
    kept = old_run(node, "kept")
    (kept / "n1" / "actor~0" / "notes").touch()
    new = old_run(node, "new")
    own = old_run(node, node.run_id).parent / node.run_id / "n2"
    own.mkdir()
    (own.parent / "n1" / "actor~0" / "claim-12").unlink()
    (own.parent / "n1" / "actor~0" / "claim-1").unlink()
    locks = node.state_dir / "locks"
    locks.mkdir()
    elsewhere = tmp_path / "elsewhere"
    old_run(node, "target").rename(elsewhere)
    (node.state_dir / "link").symlink_to(elsewhere)
    (old_run(node, "linked") / "n2").symlink_to(elsewhere)
    for run in (gone, lives, marked, kept, new, own.parent, locks, elsewhere, *node.state_dir.glob("link*")):
        age(run)
    (new / "n1" / "actor~0" / "claim-12").touch()

    agent = node.agent(member())
    agent.go()
    until(lambda: not gone.exists(), "the month-old run to be forgotten")
    agent.stop()
    age(own.parent)
    module.forget_ended(module.Step(node.orders()))  # the agent's may not have come to the end
    for run in (lives, marked, kept, new, elsewhere):
        assert sorted(p.name for p in run.rglob("claim-*")) == ["claim-1", "claim-12"], run
    assert own.is_dir()
    assert locks.is_dir()
    assert (node.state_dir / "linked" / "n2").is_symlink()


def test_being_stopped_and_continued_ends_nothing(node: Node) -> None:
    agent = node.agent(member())
    (engine,) = agent.go()

    def looks() -> int:
        text = Path(f"/proc/{agent.pid}/status").read_text()
        return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    for _ in range(3):
        agent.send(signal.SIGSTOP)
        stopped = time.monotonic()
        until(lambda at=stopped: time.monotonic() - at > 1.2, "longer than it ever waits")  # type: ignore[misc]
        before = looks()
        agent.send(signal.SIGCONT)
        until(lambda n=before: not alive(agent.pid) or looks() > n + 5, "some looks")  # type: ignore[misc]
        assert alive(agent.pid), agent.told()
    assert alive(engine)
    agent.stop()


def test_grace_lets_an_engine_leave_by_itself(node: Node, tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    agent = node.agent(member(argv=python(LEAVES), log=str(log)), stop={"grace_s": 600})
    agent.go()
    until(log.read_text, "the engine")
    agent.stop()
    assert log.read_text() == "ready\nbye\n"


def test_grace_ends(node: Node, tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    agent = node.agent(member(argv=python(STAYS), log=str(log)), stop={"grace_s": 0.2})
    (pid,) = agent.go()
    until(log.read_text, "the engine")
    agent.stop()
    assert not alive(pid)


def test_no_grace_where_an_engine_is_dead_already(node: Node, tmp_path: Path) -> None:
    log = tmp_path / "1.log"
    agent = node.agent(member(0), member(1, argv=python(STAYS), log=str(log)), stop={"grace_s": 600})
    first, _ = agent.go()
    until(log.read_text, "the engine")
    agent.send(signal.SIGSTOP)
    os.kill(first, signal.SIGKILL)
    until(lambda: not alive(first), "its end")
    agent.send(signal.SIGUSR1)
    agent.send(signal.SIGCONT)  # it sees both at once
    agent.stop()


def test_without_grace_nobody_is_asked(node: Node, tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    agent = node.agent(member(argv=python(LEAVES), log=str(log)))
    agent.go()
    until(log.read_text, "the engine")
    agent.stop()
    assert log.read_text() == "ready\n"


def test_no_grace_where_an_engine_does_not_answer(node: Node, mode: Path) -> None:
    port = free_port()
    agent = node.agent(
        server(port, argv=python("import signal; signal.signal(15, signal.SIG_IGN)\n" + ENGINE, port, mode)),
        stop={"grace_s": 600},
        probe=probing(),
    )
    agent.go()
    more_probes(mode, 2)
    die(agent, mode)
    agent.stop()


# ------------------------------------------------------------------------------------------------------------ listening


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "::", "::1"])
def test_listening_is_told_once_it_listens(node: Node, address: str) -> None:
    port = free_port()
    code = (
        "import socket, sys, time\n"
        "s = socket.socket(socket.AF_INET6 if ':' in sys.argv[2] else socket.AF_INET)\n"
        "s.bind((sys.argv[2], int(sys.argv[1]))); time.sleep(0.3); s.listen(); time.sleep(600)"
    )
    agent = node.agent(server(port, argv=python(code, port, address)), member(1))
    agent.go()
    assert agent.saw("listening") == {"report": "listening", "rank": 0, "port": port, "address": address}
    agent.stop()
    assert len(agent.all("listening")) == 1


def test_a_stranger_on_the_entrypoints_port(node: Node, tmp_path: Path) -> None:
    port = free_port()
    wait = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'now')!r}): time.sleep(0.01)\n"
    agent = node.agent(server(port, argv=python(wait + LISTEN, port)))
    agent.saw("fenced")
    with occupied(port):
        agent.go()
        said = agent.saw("stranger")
        assert (said["rank"], said["port"]) == (0, port)
        assert f"pid {os.getpid()} " in said["holder"]
    (tmp_path / "now").touch()
    agent.saw("listening")
    agent.stop()
    assert len(agent.all("stranger")) == 1


# ----------------------------------------------------------------------------------------------------------------- logs


def test_logs_are_rotated(node: Node, tmp_path: Path) -> None:
    log, old = tmp_path / "0.log", tmp_path / "0.log.1"
    code = (
        "import time, itertools\nfor n in itertools.count():\n print('%08d' % n * 20, flush=True); time.sleep(0.0005)"
    )
    agent = node.agent(member(argv=python(code), log=str(log)), log={"max_bytes": 20000})
    agent.go()
    until(old.exists, "the first rotation")

    def goes_on() -> bool:
        copied, fresh = old.read_bytes().splitlines(), log.read_bytes().splitlines()
        # Not more: the log was not cut off yet. Much more: a rotation came in between, or the copy is not complete yet.
        return bool(copied and fresh) and 1 <= int(fresh[0][:8]) - int(copied[-1][:8]) <= 2

    until(goes_on, "the same lines go on")
    first = old.read_bytes()[:8]
    until(lambda: old.read_bytes()[:8] not in (b"", first), "the second rotation")
    agent.stop()
    assert stat.S_IMODE(old.stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.glob("*.log*")) == ["0.log", "0.log.1"]


# ---------------------------------------------------------------------------------------------------------- local probe

# Answers as the file says; the requests it got are counted beside it. "busy": dead, but the counter moves.
ENGINE = """
import http.server, os, sys, time
port, path = int(sys.argv[1]), sys.argv[2]
tokens = [0]
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        mode = open(path).read()
        tokens[0] += mode in ("ok", "busy")
        text = "# HELP tokens x\\ntokens{dp=\\"0\\"} %d\\ntokens{dp=\\"1\\"} 1\\ntokens_total 9\\n" % tokens[0]
        self.answer(200, text.encode())
    def do_POST(self):
        mode = open(path).read()
        assert self.rfile.read(int(self.headers["Content-Length"])) == b'{"a": 1}'
        with open(path + ".asked", "a") as f:
            f.write("x")
        if mode in ("dead", "busy"):
            while open(path).read() == mode: time.sleep(0.01)
        elif mode == "drip":
            self.send_response(200); self.end_headers()
            while open(path).read() == mode:
                self.wfile.write(b" "); self.wfile.flush(); time.sleep(0.01)
        elif mode == "503": self.answer(503, b"")
        elif mode == "empty": self.answer(200, b'{"choices": []}')
        elif mode == "garbage": self.answer(200, b"<html>")
        else: self.answer(200, b'{"choices": [{"text": "x"}]}')
    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def handle(self):
        try: super().handle()
        except OSError: pass
http.server.ThreadingHTTPServer.allow_reuse_address = True
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def probing(**changes: Any) -> Json:
    return {
        "period_s": 0.05,
        "timeout_s": 0.3,
        "failure_threshold": 3,
        "path": "/v1/chat/completions",
        "body": '{"a": 1}',
        "expect": "choices",
        "counter": {"path": "/metrics", "name": "tokens"},
        **changes,
    }


def asked(mode: Path) -> int:
    try:
        return Path(f"{mode}.asked").stat().st_size
    except FileNotFoundError:
        return 0


@pytest.fixture
def mode(tmp_path: Path) -> Path:
    path = tmp_path / "mode"
    path.write_text("ok")
    return path


def more_probes(mode: Path, count: int) -> None:
    """Wait until the engine was asked so often again."""
    before = asked(mode)
    until(lambda: asked(mode) >= before + count, f"{count} more probes")


def die(agent: Agent, mode: Path) -> None:
    """Let the engine answer no more; wait until that was told. What was told before may be one late answer's."""
    before = len(agent.all("local_probe"))
    mode.write_text("dead")
    until(lambda: any(r["failures"] for r in agent.all("local_probe")[before:]), "a failure")


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("dead", "no complete answer within 0.3 s"),
        ("drip", "no complete answer within 0.3 s"),
        ("503", "HTTP 503"),
        ("empty", "no 'choices'"),
        ("garbage", "not JSON"),
    ],
)
def test_failures_are_told_up_to_the_threshold(node: Node, mode: Path, trouble: str, words: str) -> None:
    port = free_port()
    short = trouble in ("dead", "drip")
    policy = probing() if short else probing(timeout_s=DEADLINE_S)
    agent = node.agent(server(port, argv=python(ENGINE, port, mode)), probe=policy)
    agent.go()
    more_probes(mode, 2)
    mode.write_text(trouble)
    agent.saw("local_probe", failures=3)
    more_probes(mode, 2)
    mode.write_text("ok")
    until(lambda: agent.all("local_probe")[-1]["failures"] == 0, "its answer")
    said = agent.all("local_probe")
    told = "".join(str(r["failures"]) for r in said)
    # An agent without a processor tells the newest number only; and where time is short, good answers were late, too.
    assert re.match("(1?2?0)?1?2?30" if short else "1?2?30", told), told
    assert all(words in r["error"] if r["failures"] else r["error"] == "" for r in said)
    assert {r["rank"] for r in said} == {0}
    agent.stop()


def test_progress_is_life(node: Node, mode: Path) -> None:
    port = free_port()
    agent = node.agent(server(port, argv=python(ENGINE, port, mode)), probe=probing())
    agent.go()
    more_probes(mode, 2)
    mode.write_text("busy")
    more_probes(mode, 5)
    # On a busy machine a page may be late once; without progress it would be 3 by now.
    assert all(r["failures"] < 3 for r in agent.all("local_probe"))
    mode.write_text("dead")
    agent.saw("local_probe", failures=3)
    mode.write_text("busy")
    until(lambda: agent.all("local_probe")[-1]["failures"] == 0, "its progress")
    agent.stop()


def test_an_engine_that_never_answered_is_counted_too_and_its_first_answer_clears_it(node: Node, mode: Path) -> None:
    """It may have hung right after the coordinator's proof; while it loads, nobody asks for the count."""
    port = free_port()
    mode.write_text("503")
    agent = node.agent(server(port, argv=python(ENGINE, port, mode)), probe=probing())
    agent.go()
    agent.saw("local_probe", failures=3)
    mode.write_text("ok")
    agent.saw("local_probe", failures=0)
    mode.write_text("503")
    more_probes(mode, 2)
    agent.stop()


def test_a_hang_of_the_whole_engine(node: Node, mode: Path) -> None:
    port = free_port()
    agent = node.agent(server(port, argv=python(ENGINE, port, mode)), probe=probing(counter=None, timeout_s=0.1))
    (pid,) = agent.go()
    more_probes(mode, 2)
    os.kill(pid, signal.SIGSTOP)
    agent.saw("local_probe", failures=3)
    agent.stop()
    assert not alive(pid)


@pytest.mark.parametrize(
    ("page", "total"),
    [
        ("t 1\n", 1.0),
        ('t{a="}"} 1 1700000000\nt{b="x y"} 2.5e3\n', 2501.0),
        ('t{a="1"} 5 # {trace="x"} 1 2\n', 5.0),
        ("t_total 4\n# t 9\nxt 3\n", None),
        ("t NaN\nt 2\n", 2.0),
        ("t\nt x\n", None),
    ],
)
def test_samples_are_added_up(page: str, total: float | None) -> None:
    assert module.sum_samples(page, "t") == total


def barrier(path: Path, *, paused: bool) -> None:
    """Replace the file, as the coordinator does."""
    actor = {"name": "actor", "probes": "paused" if paused else "on", "pauses": 3}
    pools = [actor, {"name": "reward", "probes": "on", "pauses": 1}]
    (path.parent / "staged").write_text(json.dumps({"pools": pools}))
    (path.parent / "staged").rename(path)


def test_it_asks_nothing_while_the_barrier_says_that_engines_sleep(node: Node, mode: Path, tmp_path: Path) -> None:
    path = tmp_path / "barrier.json"
    barrier(path, paused=False)
    port = free_port()
    policy = probing(barrier=str(path), pool="actor")
    agent = node.agent(server(port, argv=python(ENGINE, port, mode)), probe=policy)
    agent.go()
    mode.write_text("503")
    agent.saw("local_probe", failures=3)

    barrier(path, paused=True)
    agent.saw("probes", rank=0, paused=True, pause=3)
    before = asked(mode)
    path.write_text('{"pools": [{"na')  # half visible: its last word holds
    time.sleep(1.5)  # longer than it takes to look at the barrier again, and thirty periods
    assert asked(mode) == before

    barrier(path, paused=False)
    agent.saw("probes", paused=False, pause=0)
    more_probes(mode, 1)
    assert not [r for r in agent.all("local_probe") if r["failures"] == 0], "what failed before the pause counts on"
    mode.write_text("ok")
    agent.saw("local_probe", failures=0)
    agent.stop()


def test_another_pools_pause_is_none_of_its_business(node: Node, mode: Path, tmp_path: Path) -> None:
    path = tmp_path / "barrier.json"
    barrier(path, paused=True)
    port = free_port()
    policy = probing(barrier=str(path), pool="reward")
    agent = node.agent(server(port, argv=python(ENGINE, port, mode)), probe=policy)
    agent.go()
    more_probes(mode, 3)
    agent.stop()
