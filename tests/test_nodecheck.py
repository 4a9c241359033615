"""`slurm-rollout-nodecheck` with real sockets, processes and mounts, and a fake nvidia-smi. Ports 14000 to 14999."""

from __future__ import annotations

import ast
import contextlib
import errno
import importlib.machinery
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slurm_rollout import agent
from slurm_rollout.core import codec
from slurm_rollout.core.model import RunState
from slurm_rollout.core.plan import FencePolicy, FleetPlan
from slurm_rollout.core.ports import OutgoingPorts
from slurm_rollout.rundir import RunDir
from slurm_rollout.spec import build_plan, load_spec
from slurm_rollout.store import Store, prepare
from slurm_rollout.testing.fleet import wait_for
from slurm_rollout.testing.slurm_cluster import SlurmCluster
from slurm_rollout.testing.world import make_plan
from tests.agent_harness import (
    LISTEN,
    Node,
    alive,
    interpreters,
    leave_time_wait,
    member,
    occupied,
    pid_in,
    python,
    start_ticks,
    until,
)

SCRIPT = Path(__file__).parents[1] / "sbin/slurm-rollout-nodecheck"
CHECKS = [
    *("ports", "ephemeral", "leftovers", "gpus", "gpu_memory", "gpu_health"),
    *("directory", "space", "clock", "nodes", "limits", "shm", "python"),
]
Json = dict[str, Any]


def load() -> Any:
    loader = importlib.machinery.SourceFileLoader("nodecheck", str(SCRIPT))
    spec = importlib.util.spec_from_loader("nodecheck", loader)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        loader.exec_module(made)
    finally:
        sys.dont_write_bytecode = before
    return made


module = load()


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "ROLLOUT_", "CUDA_"))}
    return {**kept, **(more or {})}


def run(
    *options: object, env: Mapping[str, str] | None = None, before: Sequence[str] = (), limit_s: float = 60
) -> subprocess.CompletedProcess[str]:
    argv = [*before, sys.executable, "-IS", SCRIPT, *options]
    return subprocess.run(
        list(map(str, argv)), capture_output=True, text=True, env=environment(env), timeout=limit_s, check=False
    )


def rows(*options: object, **how: Any) -> dict[str, Json]:
    """Return the rows by check. The exit code is the one that they give."""
    done = run("--json", *options, **how)
    [line] = done.stdout.splitlines()
    document = json.loads(line)
    found = {row["check"]: row for row in document["checks"]}
    bad = {"fail", "unknown"} & {row["status"] for row in found.values()}
    assert done.returncode == (1 if bad else 0), done
    assert done.stderr == ""
    return found


def asked(*options: str) -> Any:
    return module.Asked(module.parser().parse_args(options))


def free_port() -> int:
    while True:
        port = random.randrange(14000, 14999)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("0.0.0.0", port))
            return port


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    try:
        yield made
    finally:
        made.close()


# --------------------------------------------------------------------------------------------------------------- ports


@contextlib.contextmanager
def a_connections_local_end(port: int) -> Iterator[None]:
    with socket.socket() as listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.bind(("127.0.0.1", port))
        client.connect(listener.getsockname())
        yield


@contextlib.contextmanager
def time_wait(port: int) -> Iterator[None]:
    leave_time_wait(port)
    yield
    assert any(row.waits for row in module.sockets(port)), "it went away too early to prove anything"


@contextlib.contextmanager
def time_wait_and_bound(port: int) -> Iterator[None]:
    leave_time_wait(port)
    with occupied(port, listen=False):
        yield


@contextlib.contextmanager
def udp(port: int) -> Iterator[None]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("0.0.0.0", port))
        yield


Ways = Callable[[int], contextlib.AbstractContextManager[Any]]
HELD: dict[str, tuple[Ways, bool]] = {
    "free": (lambda port: contextlib.nullcontext(), False),
    "TIME_WAIT": (time_wait, False),
    "UDP": (udp, False),
    "TIME_WAIT and bound": (time_wait_and_bound, True),
    "the local end of a connection": (a_connections_local_end, True),
}
for _address in ("0.0.0.0", "127.0.0.1", "::", "::1"):
    for _reuse in (True, False):
        for _listen in (True, False):
            _name = f"{'listening' if _listen else 'bound'}{' with SO_REUSEADDR' if _reuse else ''} on {_address}"

            def _way(port: int, reuse: bool = _reuse, listen: bool = _listen, address: str = _address) -> Any:
                return occupied(port, reuse=reuse, listen=listen, address=address)

            HELD[_name] = _way, True


@pytest.mark.parametrize("how", HELD)
def test_it_judges_a_port_as_the_agents_fence_does(how: str) -> None:
    way, expected = HELD[how]
    port = free_port()
    with way(port):
        verdicts = bool(agent.busy(port)), bool(module.busy(port))
        if how.startswith(("listening", "the local end")):
            told = f"pid {os.getpid()} ("
            assert told in agent.busy(port)
            assert told in module.holder(module.sockets(port))[1]
    assert verdicts == (expected, expected)


def test_the_holder_of_a_port_is_named_with_its_run_and_not_touched(node: Node) -> None:
    held, free = free_port(), free_port()
    holder = node.bystander(argv=python(LISTEN, held), mark=node.mark())
    until(lambda: module.busy(held), "the listener")
    row = rows("--ports", f"{held},{free}")["ports"]
    assert row["status"] == "fail"
    assert f"1 of 2 cannot be bound: {held} held by pid {holder} (" in row["detail"]
    assert f", user {module.user(os.getuid())}, run {node.run_id}, actor/0), on 127.0.0.1" in row["detail"]
    assert [h["port"] for h in row["data"]["held"]] == [held]
    assert alive(holder)


def test_ports_of_one_holder_are_folded() -> None:
    first = next(p for p in range(14900, 14990) if not any(map(module.busy, range(p, p + 4))))
    with occupied(first), occupied(first + 1), occupied(first + 3):
        row = rows("--ports", f"{first}-{first + 3}")["ports"]
    assert f"3 of 4 cannot be bound: {first}-{first + 1},{first + 3} held by pid {os.getpid()} " in row["detail"]


def test_a_port_that_is_held_for_a_moment_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["held by another test of it", ""])
    monkeypatch.setattr(module, "busy", lambda port: next(answers))
    [row] = module.check_ports(asked("--ports", "14001"))
    assert row.status == "ok"


def test_a_port_that_cannot_be_tried_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptor(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(module, "socket", SimpleNamespace(**{**vars(socket), "socket": no_descriptor}))
    found: list[Any] = []
    module.collect(("ports",), module.check_ports, asked("--ports", "14001"), found)
    assert [(row.status, row.detail) for row in found] == [
        ("unknown", "port 14001 could not be tried: Too many open files")
    ]


def test_a_machine_without_ipv6_has_free_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def ipv4_only(family: int, kind: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, kind)

    port = free_port()
    monkeypatch.setattr(module, "socket", SimpleNamespace(**{**vars(socket), "socket": ipv4_only}))
    assert module.busy(port) == ""
    with occupied(port):
        assert module.busy(port)


def test_a_privileged_port_is_not_for_users() -> None:
    if os.getuid():
        assert rows("--ports", "80")["ports"]["status"] == "fail"
        return
    text = SCRIPT.read_text()
    argv = ["/usr/bin/python3", "-IS", "-", "--json", "--ports", "80"]
    done = subprocess.run(argv, input=text, capture_output=True, text=True, user=65534, cwd="/", check=False)
    row = json.loads(done.stdout)["checks"][0]
    assert row["status"] == "fail"
    assert "root only" in row["detail"]


@pytest.mark.parametrize("text", ["x", "0", "70000", "18010-18000", "1-", "18000;18001"])
def test_a_wrong_list_of_ports_is_a_usage_error(text: str) -> None:
    done = run("--ports", text)
    assert done.returncode == 2
    assert "is no port and no range of ports; say 18000-18063,19000" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("text", ["18000-18063,19000", "1,3,5-7", "65535", ""])
def test_lists_of_ports_fold_back(text: str) -> None:
    assert module.folded(module.port_list(text)) == text


def in_a_network(*settings: str) -> list[str]:
    """Return what runs a command in a network of its own, with these settings of net.ipv4."""
    writes = [f"echo '{value}' > /proc/sys/net/ipv4/{name}" for name, value in (s.split("=") for s in settings)]
    argv = ["unshare", "--net", "sh", "-c", "; ".join([*writes, 'exec "$@"']), "sh"]
    if subprocess.run([*argv, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no network namespace can be made here")
    return argv


def test_ports_that_the_kernel_gives_to_others_are_told_with_the_sysctl_that_helps() -> None:
    settings = ["ip_local_port_range=14400 14999", "ip_local_reserved_ports=14450,20000"]
    row = rows("--ports", "14398-14402,14450", before=in_a_network(*settings))["ephemeral"]
    assert row["status"] == "warn"
    assert "14400-14402 lie in 14400-14999" in row["detail"]
    assert "choose ports below 14400, or" in row["detail"]
    value = row["detail"].partition("sysctl -w net.ipv4.ip_local_reserved_ports=")[2]
    assert value == "14400-14402,14450,20000", "a write replaces the list: what is reserved must stay so"
    after = [settings[0], f"ip_local_reserved_ports={value}"]
    assert rows("--ports", "14398-14402,14450", before=in_a_network(*after))["ephemeral"]["status"] == "ok"


# ----------------------------------------------------------------------------------------------------------- leftovers


def mine(found: Mapping[str, Json], node: Node) -> dict[int, str]:
    """Return pid -> mark of the leftovers of this test's run; other tests run at the same time."""
    processes = found["leftovers"]["data"]["processes"]
    return {p["pid"]: p["mark"] for p in processes if p["mark"].startswith(f"{node.run_id}/")}


def test_processes_of_another_run_are_found_and_left_alone(node: Node, tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.symlink_to("/bin/sleep")  # the batch host's srun carries its step's mark
    code = f"echo $$ > {tmp_path}/child.new; mv {tmp_path}/child.new {tmp_path}/child.pid; exec sleep 600"
    parent = node.bystander(mark=node.mark(), argv=["sh", "-c", 'env -i PATH=$PATH sh -c "$0"; true', code])
    child = pid_in(tmp_path / "child.pid")
    others = [node.bystander(), node.bystander(mark=node.mark(), argv=[str(srun), "600"])]
    found = rows()
    assert found["leftovers"]["status"] == "fail"
    assert mine(found, node) == {parent: node.mark(), child: node.mark()}
    assert all(map(alive, (parent, child, *others)))


def leftovers_row(monkeypatch: pytest.MonkeyPatch, node: Node, *options: str, run_id: str = "") -> Any:
    """Return the row, as if this test's processes were all that this user has."""
    ours = {os.getpid(), *node_pids(node)}
    real = module.pids
    monkeypatch.setattr(module, "pids", lambda: [pid for pid in real() if pid in ours])
    monkeypatch.setattr(module, "state_dir", lambda: str(node.state_dir))
    wanted = asked(*options)
    wanted.run_id = run_id
    [row] = module.check_leftovers(wanted)
    return row


def node_pids(node: Node) -> set[int]:
    started = {b.pid for b in node.bystanders} | {a.pid for a in node.agents}
    for pid in list(started):
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                started |= set(map(int, (task / "children").read_text().split()))
    return started


def test_a_run_without_an_agent_is_a_failure(monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    left = node.bystander(mark=node.mark(group="reward/1"))
    row = leftovers_row(monkeypatch, node)
    assert row.status == "fail"
    assert row.detail == (
        f"run {node.run_id} (reward/1) left processes that no agent watches; where it is over: kill -9 {left}"
    )


def test_a_run_that_lives_beside_it_is_a_warning(monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    running = node.agent(member())
    [engine] = running.go()
    row = leftovers_row(monkeypatch, node)
    assert row.status == "warn"
    assert f"run {node.run_id} (actor/0) lives here: 2 processes" in row.detail
    assert {p["pid"] for p in row.data["processes"]} == {running.pid, engine}
    running.stop()


def test_what_an_agent_wrote_down_is_found_but_no_reused_pid(monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    listed, reused, rebooted = node.bystander(), node.bystander(), node.bystander()
    node.write_list(1, (listed, start_ticks(listed)), (reused, start_ticks(reused) - 1))
    node.write_list(2, (rebooted, start_ticks(rebooted)), boot="another")
    row = leftovers_row(monkeypatch, node)
    assert row.status == "fail"
    assert [(p["pid"], p["mark"]) for p in row.data["processes"]] == [(listed, node.mark())]


def test_an_engine_that_erased_its_environment_is_known_by_its_agents_list(
    monkeypatch: pytest.MonkeyPatch, node: Node
) -> None:
    listed = node.bystander()
    node.write_list(1, (listed, start_ticks(listed)))
    monkeypatch.setattr(module, "state_dir", lambda: str(node.state_dir))
    assert module.mark_of(listed) == node.mark()
    assert module.mark_of(node.bystander()) == ""
    node.write_list(1, (listed, start_ticks(listed) - 1))
    assert module.mark_of(listed) == ""


def test_a_list_in_a_directory_of_somebody_else_is_not_believed(monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    if os.getuid():
        pytest.skip("only root can give a directory away")
    listed = node.bystander()
    node.write_list(1, (listed, start_ticks(listed)))
    os.chown(node.state_dir, 65534, 65534)
    assert leftovers_row(monkeypatch, node).status == "ok"


def test_processes_of_the_given_run_are_no_leftovers(
    monkeypatch: pytest.MonkeyPatch, node: Node, tmp_path: Path
) -> None:
    node.bystander(mark=node.mark())
    row = leftovers_row(monkeypatch, node, run_id=node.run_id)
    assert row.status == "ok"
    assert row.detail.endswith("(1 of this run)")
    path = run_directory(tmp_path, make_plan(), node.run_id)
    assert mine(rows("--plan", path, "--node", "n0"), node) == {}
    assert mine(rows(env={"ROLLOUT_MARK": node.mark(incarnation=2)}), node) == {}


# ---------------------------------------------------------------------------------------------------------------- GPUs

SMI = """#!/bin/sh
cd "$(dirname "$0")" || exit
echo "$*" >> calls
[ ! -e hang ] || { sleep 600 & echo $! > sleep.new; mv sleep.new sleep.pid; wait; }
[ ! -e fail ] || { echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."; exit 9; }
case "$1" in
  --query-gpu=*)
    for field in $(cat refused 2>/dev/null); do
      case "$1" in *$field*) echo "Field \\"$field\\" is not a valid field to query."; exit 2 ;; esac
    done
    cat gpus ;;
  --query-compute-apps=gpu_uuid,pid,used_memory) cat apps ;;
  *) echo "what is $1"; exit 2 ;;
esac
"""
IDLE = "".join(f"{n}, GPU-{n}{n}aa, {n + 1}, 0, No, No, None\n" for n in range(4))


@pytest.fixture
def smi(tmp_path: Path) -> Path:
    """A folder with an nvidia-smi that says what its files say: four idle GPUs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(SMI)
    (folder / "nvidia-smi").chmod(0o700)
    (folder / "gpus").write_text(IDLE)
    (folder / "apps").write_text("")
    return folder


def gpu_rows(smi: Path, *options: object, **env: str) -> list[tuple[str, str]]:
    found = rows(*options, env={"PATH": f"{smi}:{os.environ['PATH']}", **env})
    return [(found[name]["status"], found[name]["detail"]) for name in ("gpus", "gpu_memory", "gpu_health")]


def statuses(found: list[tuple[str, str]]) -> list[str]:
    return [status for status, _ in found]


def test_gpus_that_are_idle(smi: Path) -> None:
    found = gpu_rows(smi, "--gpus", 4)
    assert statuses(found) == ["ok", "ok", "ok"]
    assert found[0][1] == "nvidia-smi lists 4, 4 expected (--gpus)"


@pytest.mark.parametrize(
    ("env", "expected_by"),
    [({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE"), ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4"}, "CUDA_VISIBLE")],
)
def test_fewer_gpus_than_expected(smi: Path, env: dict[str, str], expected_by: str) -> None:
    status, detail = gpu_rows(smi, **env)[0]
    assert status == "fail"
    assert detail.startswith("nvidia-smi lists 4 of ")
    assert expected_by in detail


@pytest.mark.parametrize(
    ("options", "status"), [((), "skipped"), (("--gpus", 0), "skipped"), (("--gpus", 8), "unknown")]
)
def test_without_nvidia_smi(tmp_path: Path, options: Sequence[object], status: str) -> None:
    (tmp_path / "empty").mkdir()
    found = rows(*options, env={"PATH": str(tmp_path / "empty")})
    assert {found[name]["status"] for name in ("gpus", "gpu_memory", "gpu_health")} == {status}


def test_a_mask_that_is_smaller_than_what_is_expected(smi: Path) -> None:
    status, detail = gpu_rows(smi, "--gpus", 4, CUDA_VISIBLE_DEVICES="0,1")[0]
    assert (status, "4 are needed, and CUDA_VISIBLE_DEVICES has 2: '0,1'" in detail) == ("fail", True)


def test_an_nvidia_smi_that_hangs_is_unknown_in_time_and_ended(smi: Path) -> None:
    (smi / "hang").touch()
    began = time.monotonic()
    found = gpu_rows(smi, "--timeout", 3)
    assert time.monotonic() - began < 20, "10 s at most, on a machine that does nothing else"
    assert statuses(found) == ["unknown"] * 3
    assert found[0][1].startswith("nvidia-smi has not answered for 3 s")
    pid = pid_in(smi / "sleep.pid")
    wait_for("its end", lambda: not alive(pid))  # it was killed; when it is gone is the kernel's business


def test_a_driver_that_does_not_work(smi: Path) -> None:
    (smi / "fail").touch()
    found = gpu_rows(smi)
    assert statuses(found) == ["fail", "unknown", "unknown"]
    assert "nvidia-smi failed (exit 9): NVIDIA-SMI has failed because" in found[0][1]


BUSY = IDLE.replace("GPU-22aa, 3", "GPU-22aa, 70211")


@pytest.mark.parametrize(
    ("options", "env", "status"),
    [
        (("--gpus", 4), {}, "fail"),
        ((), {}, "warn"),  # nobody said that this machine's GPUs should be idle
        ((), {"CUDA_VISIBLE_DEVICES": "0,GPU-22"}, "fail"),
        ((), {"CUDA_VISIBLE_DEVICES": "0,1,3"}, "ok"),  # somebody else's
    ],
)
def test_memory_in_use_on_gpus_that_should_be_idle(
    smi: Path, options: Sequence[object], env: dict[str, str], status: str
) -> None:
    (smi / "gpus").write_text(BUSY)
    found = gpu_rows(smi, *options, **env)
    assert found[0][0] == "ok"
    assert found[1][0] == status
    assert ("GPU 2 has 70211 MiB in use" in found[1][1]) == (status != "ok")


def test_who_computes_on_a_gpu_is_named(smi: Path, node: Node) -> None:
    pid = node.bystander(mark=node.mark())
    (smi / "gpus").write_text(BUSY)
    (smi / "apps").write_text(f"GPU-22aa, {pid}, 70000\nGPU-gone, 1, 5\nGPU-00aa, 4194304, [N/A]\n")
    status, detail = gpu_rows(smi, "--gpus", 4)[1]
    assert status == "fail"
    me = module.user(os.getuid())
    assert f"pid {pid} (sleep, user {me}, run {node.run_id}, actor/0) computes on GPU 2 (70000 MiB)" in detail
    assert "pid 4194304 (not visible from here) computes on GPU 0" in detail
    assert alive(pid)


def test_memory_that_is_not_known_is_not_ok(smi: Path) -> None:
    (smi / "gpus").write_text(IDLE.replace("GPU-11aa, 2", "GPU-11aa, [N/A]"))
    assert gpu_rows(smi, "--gpus", 4)[1] == ("unknown", "no memory use is known of GPU 1")
    assert gpu_rows(smi, CUDA_VISIBLE_DEVICES="MIG-3f,0")[1] == ("unknown", "no memory use is known of GPU MIG-3f")


@pytest.mark.parametrize(
    ("before", "after", "status", "words"),
    [
        (
            "GPU-00aa, 1, 0",
            "GPU-00aa, 1, 3",
            "warn",
            "GPU 0: uncorrectable memory errors since the driver was loaded (3)",
        ),
        ("GPU-11aa, 2, 0, No", "GPU-11aa, 2, 0, Yes", "warn", "GPU 1: rows wait to be remapped"),
        ("GPU-22aa, 3, 0, No, No", "GPU-22aa, 3, 0, No, Yes", "fail", "GPU 2: row remapping failed"),
        ("GPU-33aa, 4, 0, No, No, None", "GPU-33aa, 4, 0, No, No, Reset", "fail", "GPU 3: the driver asks for: Reset"),
    ],
)
def test_what_the_driver_says_of_a_gpus_health(smi: Path, before: str, after: str, status: str, words: str) -> None:
    assert before in IDLE
    (smi / "gpus").write_text(IDLE.replace(before, after))
    found = gpu_rows(smi)[2]
    assert found[0] == status
    assert words in found[1]


def test_an_older_driver_is_asked_for_less(smi: Path) -> None:
    (smi / "refused").write_text("gpu_recovery_action remapped_rows.failure")
    (smi / "gpus").write_text("".join(f"{n}, GPU-{n}{n}aa, 5, 2, Yes\n" for n in range(4)))
    found = gpu_rows(smi, "--gpus", 4)
    assert statuses(found) == ["ok", "ok", "warn"]
    (smi / "gpus").write_text("".join(f"{n}, GPU-{n}{n}aa, 5, [N/A], [N/A]\n" for n in range(4)))
    assert gpu_rows(smi, "--gpus", 4)[2][0] == "skipped"


# ---------------------------------------------------------------------------------------------------- shared directory


def test_a_good_directory(tmp_path: Path) -> None:
    found = rows("--dir", tmp_path)
    names = ("directory", "space", "clock")
    assert {found[name]["status"] for name in ("directory", "clock")} == {"ok"}
    assert found["directory"]["data"]["flock"] is True
    device = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    kind = found["directory"]["data"]["type"]
    assert device.strip().startswith(kind[:3]), f"{kind}, and stat says {device}"
    assert abs(found["clock"]["data"]["offset_s"]) <= found["clock"]["data"]["error_s"]
    assert all(found[name]["data"] for name in names)
    assert list(tmp_path.iterdir()) == []


def test_without_a_directory_nothing_is_asked_for() -> None:
    found = rows()
    assert {found[name]["status"] for name in ("directory", "space", "clock", "nodes")} == {"skipped"}


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    row = rows("--dir", tmp_path / "none")["directory"]
    assert (row["status"], "no such directory" in row["detail"]) == ("fail", True)


def mounted(tmp_path: Path, options: str) -> tuple[Path, list[str]]:
    """Return a directory, and what runs a command with a small file system on it."""
    target = tmp_path / "mounted"
    target.mkdir()
    setup = f"mount -t tmpfs -o size=4m,nr_inodes=40,{options} none {target}"
    fill = f"head -c ${{FILL:-0}} /dev/zero > {target}/filler; for n in $FILES; do touch {target}/$n; done"
    argv = ["unshare", "--mount", "sh", "-c", f'{setup} && {{ {fill}; }} 2>&-; exec "$@"', "sh"]
    if subprocess.run([*argv, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    return target, argv


def test_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    target, before = mounted(tmp_path, "ro")
    found = rows("--dir", target, before=before)
    assert found["directory"]["status"] == "fail"
    assert "(tmpfs): Read-only file system" in found["directory"]["detail"]
    assert found["clock"]["status"] == "skipped"


@pytest.mark.parametrize(
    ("fill", "directory", "space"), [("3M", "ok", "ok"), ("3950K", "ok", "warn"), ("5M", "fail", "fail")]
)
def test_a_directory_that_fills_up(tmp_path: Path, fill: str, directory: str, space: str) -> None:
    target, before = mounted(tmp_path, "rw")
    found = rows("--dir", target, before=before, env={"FILL": fill})
    assert found["directory"]["status"] == directory
    assert found["space"]["status"] == space
    assert ("No space left on device" in found["directory"]["detail"]) == (directory == "fail")


def test_inodes_run_out_too(tmp_path: Path) -> None:
    target, before = mounted(tmp_path, "rw")
    files = " ".join(map(str, range(100)))
    found = rows("--dir", target, before=before, env={"FILES": files})
    assert found["space"]["status"] == "fail"
    assert "inodes" in found["space"]["detail"]
    assert found["directory"]["status"] == "fail"


@pytest.mark.parametrize(
    ("free", "inodes_free", "inodes", "status"),
    [(60, 60, 100, "ok"), (4, 60, 100, "warn"), (60, 4, 100, "warn"), (60, 0, 0, "ok"), (0, 60, 100, "fail")],
)
def test_what_is_scarce(monkeypatch: pytest.MonkeyPatch, free: int, inodes_free: int, inodes: int, status: str) -> None:
    found = SimpleNamespace(f_bavail=free, f_blocks=100, f_frsize=1 << 30, f_favail=inodes_free, f_files=inodes)
    monkeypatch.setattr(module, "os", SimpleNamespace(**{**vars(os), "statvfs": lambda path: found}))
    assert module.space_row("/somewhere").status == status


def test_a_rename_that_is_not_atomic_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def in_two_steps(source: str, target: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        time.sleep(0.002)
        os.rename(source, target)

    monkeypatch.setattr(module, "os", SimpleNamespace(**{**vars(os), "rename": in_two_steps}))
    row = next(iter(module.check_directory(asked("--dir", str(tmp_path)))))
    module.tidy.clean()
    monkeypatch.setattr(module, "tidy", module.Tidy())
    assert row.status == "warn"
    assert "found no complete file while another replaced it" in row.detail


def test_a_file_system_without_flock_is_told_and_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(module, "tidy", module.Tidy())
    monkeypatch.setattr(module.fcntl, "flock", refuse)
    row = next(iter(module.check_directory(asked("--dir", str(tmp_path)))))
    module.tidy.clean()
    assert row.status == "ok"
    assert "flock does not work (ENOSYS)" in row.detail


@pytest.mark.parametrize(("shift_s", "words"), [(30, "30.0 s ahead of"), (-30, "30.0 s behind")])
def test_a_clock_that_is_not_the_file_servers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shift_s: float, words: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "time", shifted(shift_s))
    row = module.clock_row(str(tmp_path))
    assert row.status == "warn"
    assert f"this clock is {words} the file server's" in row.detail
    assert abs(row.data["offset_s"] + shift_s) < 1


def shifted(shift_s: float) -> SimpleNamespace:
    return SimpleNamespace(time=lambda: time.time() + shift_s, monotonic=time.monotonic, sleep=time.sleep)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_file_and_no_process(smi: Path, tmp_path: Path, number: int) -> None:
    (smi / "hang").touch()
    shared = tmp_path / "shared"
    shared.mkdir()
    argv = [sys.executable, "-IS", SCRIPT, "--dir", shared, "--timeout", 100]
    env = environment({"PATH": f"{smi}:{os.environ['PATH']}", **step(0, 2)})
    with subprocess.Popen(list(map(str, argv)), env=env, stdout=subprocess.PIPE) as process:
        try:
            child = pid_in(smi / "sleep.pid")
            until(lambda: len(list(shared.iterdir())) == 2, "its two folders")
            process.send_signal(number)
            assert process.wait(20) == 128 + number
        finally:
            process.kill()
    assert list(shared.iterdir()) == []
    until(lambda: not alive(child), "the end of nvidia-smi")


# --------------------------------------------------------------------------------------------------------- other nodes


def step(node: int, nodes: int, **more: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "3",
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_NODEID": str(node),
        "SLURM_PROCID": str(node),
        "SLURM_LOCALID": "0",
        "SLURMD_NODENAME": f"n{node + 1}",
        **more,
    }


def together(shared: Path, nodes: Sequence[int], of: int, *options: object, shift: Mapping[int, float]) -> list[Json]:
    """Return the row `nodes` of each of these nodes of a step; some have another clock."""
    started = []
    for number in nodes:
        code = textwrap.dedent(
            f"""
            import runpy, sys, time
            real = time.time
            time.time = lambda: real() + {shift.get(number, 0.0)}
            sys.argv[0] = {str(SCRIPT)!r}
            runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
            """
        )
        argv = [sys.executable, "-IS", "-B", "-c", code, "--json", "--dir", shared, *options]
        env = environment(step(number, of))
        started.append(subprocess.Popen(list(map(str, argv)), env=env, stdout=subprocess.PIPE, text=True))
    found = []
    try:
        for process in started:
            [row] = [r for r in json.loads(process.communicate(timeout=60)[0])["checks"] if r["check"] == "nodes"]
            found.append(row)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return found


def test_nodes_of_a_step_see_one_another(tmp_path: Path) -> None:
    began = time.monotonic()
    found = together(tmp_path, range(3), 3, "--wait", 100, shift={})
    assert time.monotonic() - began < 60, "they leave as soon as all have seen all"
    assert [row["status"] for row in found] == ["ok"] * 3
    assert [row["data"]["seen"] for row in found] == [["n2", "n3"], ["n1", "n3"], ["n1", "n2"]]
    assert all(row["detail"].startswith("met 2 of 2 other nodes within ") for row in found)
    assert list(tmp_path.iterdir()) == []


def test_the_node_whose_clock_is_behind_says_so(tmp_path: Path) -> None:
    found = together(tmp_path, range(3), 3, "--wait", 30, shift={1: -60})
    assert [row["status"] for row in found] == ["ok", "warn", "ok"]
    assert "s behind that of n" in found[1]["detail"]
    assert 40 < found[1]["data"]["behind_at_least_s"] <= 60, "never more than it is"
    assert list(tmp_path.iterdir()) == []


def test_a_node_stays_until_the_others_have_seen_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "tidy", module.Tidy())
    folder = tmp_path / "meeting"
    folder.mkdir()
    (folder / "1.here").write_text(json.dumps({"node": "n2", "at": time.time()}))
    names = ["0.new", "0.here", "0.done"]
    with ThreadPoolExecutor() as threads:
        meeting = threads.submit(module.meet, asked("--wait", "60"), str(folder), names, {"1"})
        try:
            until((folder / "0.done").exists, "it has seen n2")
            assert not wait([meeting], timeout=1.5).done, "n2 has not said that it has seen this node"
        finally:
            (folder / "1.here").rename(folder / "1.done")
        assert meeting.result(20).keys() == {"1"}
    module.tidy.clean()
    assert [path.name for path in folder.iterdir()] == ["1.done"], "the others' files are theirs"


def test_a_node_that_does_not_come_is_waited_for_no_longer_than_said(tmp_path: Path) -> None:
    found = together(tmp_path, (0, 2), 4, "--wait", 6, shift={})
    assert [row["status"] for row in found] == ["unknown", "unknown"]
    assert [row["data"]["seen"] for row in found] == [["n3"], ["n1"]]
    assert [row["data"]["missing"] for row in found] == [["1", "3"], ["1", "3"]]
    waited = re.match(r"met 1 of 3 other nodes within ([\d.]+) s", found[0]["detail"])
    assert waited
    assert 6 <= float(waited[1]) < 10
    assert "not number 1, 3 of the step's node list" in found[0]["detail"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [2, 3, 17, 18, 40])
def test_whom_a_node_waits_for_waits_for_it(count: int) -> None:
    near = [module.neighbours(me, count) for me in range(count)]
    assert all(len(others) == min(count - 1, 16) for others in near)
    assert all(str(me) in near[int(other)] for me in range(count) for other in near[me])
    assert all(str(me) not in near[me] for me in range(count))


def test_a_directory_that_is_not_shared_is_suspected(tmp_path: Path) -> None:
    began = time.monotonic()
    row = rows("--dir", tmp_path, "--wait", 1, env=step(0, 2))["nodes"]
    assert time.monotonic() - began < 20
    assert row["status"] == "unknown"
    assert f"is {tmp_path} shared?" in row["detail"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "env",
    [
        step(0, 1),
        step(0, 2, SLURM_STEP_ID="4294967290"),  # the shell of salloc
        {k: v for k, v in step(0, 2).items() if k != "SLURM_STEP_ID"},  # a batch script
        step(0, 2, SLURM_LOCALID="1"),
    ],
)
def test_where_there_is_nobody_to_meet_it_does_not_wait(tmp_path: Path, env: dict[str, str]) -> None:
    assert rows("--dir", tmp_path, env=env)["nodes"]["status"] == "skipped"


# ---------------------------------------------------------------------------------------------------------------- plan


def run_directory(tmp_path: Path, plan: FleetPlan, run_id: str) -> Path:
    """Return the plan in a run directory as a coordinator makes it."""
    run = RunDir(tmp_path / "run")
    prepare(run, plan)
    Store(run, 1, private=False).write_state(RunState(run_id=run_id, job="", restart_count=0, term=1))
    return run.plan


def write_plan(folder: Path, plan: FleetPlan) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(codec.encode(plan)))
    return folder / "plan.json"


def fleet(tmp_path: Path) -> tuple[FleetPlan, Path]:
    """Return a plan with two groups on one node, a spare and a trainer's node, and the spec that it came from."""
    spec = tmp_path / "fleet.toml"
    spec.write_text(
        textwrap.dedent(
            """
            name = "moe"
            [nodes]
            include = "n[1-3]"
            spares = 1
            gpus_per_node = 8
            [ports]
            base = 14100
            [[pool]]
            name = "actor"
            groups = 1
            gpus = 16
            engine = { kind = "command", argv = ["a"], ports = ["session"] }
            """
        )
    )
    from slurm_rollout import allocation

    made = allocation.from_args("n[1-4]", address="{node}", gpus_per_node=8, cpus_per_node=8)
    plan, _ = build_plan(load_spec(str(spec)), made, backend="slurm", port_range=OutgoingPorts(32768, 60999))
    return plan, spec


def wanted(path: Path, name: str) -> Any:
    options = asked("--plan", str(path), "--node", name)
    plan, options.run_id = module.read_plan(str(path))
    options.take_in(plan, str(path), None)
    return options


def test_a_node_gets_exactly_its_ports_and_gpus_of_the_plan(tmp_path: Path) -> None:
    plan, _ = fleet(tmp_path)
    path = write_plan(tmp_path / "run", plan)
    for planned in plan.groups[0].members:
        found = wanted(path, planned.node)
        assert tuple(found.ports) == planned.fenced_ports
        assert (found.gpus, found.gpus_from, found.indices) == (8, "the plan", list(range(8)))
    assert plan.groups[0].members[0].fenced_ports != plan.groups[0].members[1].fenced_ports, "the leader has a master"


def test_what_the_plan_command_prints_is_as_good(tmp_path: Path) -> None:
    plan, spec = fleet(tmp_path)
    argv = ["plan", spec, "--nodes", "n[1-4]", "--gpus-per-node", "8", "--cpus-per-node", "8", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "slurm_rollout", *map(str, argv)], capture_output=True, text=True, check=True
    )
    printed = tmp_path / "printed.json"
    printed.write_text(done.stdout)
    path = write_plan(tmp_path / "run", plan)
    for name in (*plan.groups[0].nodes, *plan.spares):
        one, other = wanted(path, name), wanted(printed, name)
        assert (one.ports, one.gpus, one.indices) == (other.ports, other.gpus, other.indices)


@pytest.mark.parametrize("name", ["n3", "n4"])
def test_a_spare_and_a_trainers_node_have_no_ports(tmp_path: Path, name: str) -> None:
    path = write_plan(tmp_path / "run", fleet(tmp_path)[0])
    found = rows("--plan", path, "--node", name)
    assert found["ports"]["status"] == "skipped"
    assert found["directory"]["data"]["path"] == str(path.parent), "its directory is the run's"


def test_the_node_is_the_one_that_slurmd_names(tmp_path: Path) -> None:
    path = write_plan(tmp_path / "run", fleet(tmp_path)[0])
    done = run("--plan", path, "--json", env={"SLURMD_NODENAME": "n2"})
    document = json.loads(done.stdout)
    assert document["node"] == "n2"
    assert document["checks"][0]["data"]["asked"] == "14100,14102"


def test_what_the_run_itself_holds_is_no_fault(tmp_path: Path, smi: Path, node: Node) -> None:
    path = run_directory(tmp_path, fleet(tmp_path)[0], node.run_id)
    marked, other = node.bystander(argv=python(LISTEN, 14100), mark=node.mark()), node.bystander()
    until(lambda: module.busy(14100), "the listener")
    (smi / "gpus").write_text("".join(f"{n}, GPU-{n}{n}aa, 70000, 0, No, No, None\n" for n in range(8)))
    (smi / "apps").write_text("".join(f"GPU-{n}{n}aa, {marked}, 69000\n" for n in range(8)))
    env = {"PATH": f"{smi}:{os.environ['PATH']}"}
    found = rows("--plan", path, "--node", "n1", env=env)
    assert (found["ports"]["status"], found["ports"]["data"]["own"]) == ("ok", "14100"), found["ports"]
    assert found["gpu_memory"]["status"] == "ok"
    (smi / "apps").write_text(f"GPU-11aa, {other}, 69000\n")
    found = rows("--plan", path, "--node", "n1", env=env)
    assert found["gpu_memory"]["status"] == "fail"


def test_gpus_that_a_group_shares_may_be_in_use(tmp_path: Path, smi: Path) -> None:
    plan = fleet(tmp_path)[0]
    (smi / "gpus").write_text("".join(f"{n}, GPU-{n}{n}aa, 5000, 0, No, No, None\n" for n in range(8)))

    def judged(plan: FleetPlan) -> str:
        return gpu_rows(smi, "--plan", write_plan(tmp_path / "run", plan), "--node", "n1")[1][0]

    def changed(unshared: bool, limit_mb: int) -> FleetPlan:
        [pool] = plan.pools
        groups = tuple(replace(g, unshared_gpus=unshared) for g in pool.groups)
        return replace(plan, pools=(replace(pool, groups=groups, fence=FencePolicy(gpu_memory_mb=limit_mb)),))

    assert judged(changed(True, 1024)) == "fail"
    assert judged(changed(False, 1024)) == "warn"
    assert judged(changed(True, 6000)) == "ok"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is no plan: "),
        ("[]", "is no plan: "),
        ('{"pools": [{}]}', "is no plan: KeyError: 'groups'"),
        ('{"pools": [], "nodes": ["n1"], "trainer_nodes": ["n2"]}', "is for n1, n2; which of them is elsewhere?"),
    ],
)
def test_a_wrong_plan_is_a_usage_error(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    done = run("--plan", path, "--node", "elsewhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_whose_file_system_hangs_is_unknown(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "plan.json")  # opening it waits for a writer that never comes
    found = rows("--plan", tmp_path / "plan.json", "--timeout", 3, limit_s=60)
    assert found["plan"]["status"] == "unknown"
    assert "not within 3 s" in found["plan"]["detail"]
    assert found["limits"]["status"] in ("ok", "warn"), "the others go on"


# ------------------------------------------------------------------------------------------------- this node, this user


def test_too_few_open_files() -> None:
    row = rows(before=["sh", "-c", 'ulimit -Sn 1024 && ulimit -Hn 4096 && exec "$@"', "sh"])["limits"]
    assert row["status"] == "warn"
    assert "open files 1024 (hard 4096)" in row["detail"]


@pytest.mark.parametrize(("hard", "status"), [(65535, "ok"), (65534, "warn"), (-1, "ok")])
def test_the_hard_limit_counts_as_engines_raise_the_soft_one(
    monkeypatch: pytest.MonkeyPatch, hard: int, status: str
) -> None:
    monkeypatch.setattr(module.resource, "getrlimit", lambda which: (1024, hard))
    [row] = module.check_limits(asked())
    assert row.status == status


def test_shared_memory_that_is_nearly_full(tmp_path: Path) -> None:
    before = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=64m none /dev/shm; : > /dev/shm/psm_1; exec "$@"',
        "sh",
    ]
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    row = rows(before=before)["shm"]
    assert row["status"] == "warn"
    assert "64 MiB of 64 MiB free; 1 files of" in row["detail"]


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("#!/bin/sh\necho 3.9.1\n", "ok", "the agent's is 3.9.1"),
        ("#!/bin/sh\necho 3.8.18\n", "fail", "is 3.8.18; the agent needs 3.9 or newer"),
        ("#!/bin/sh\necho no module named ctypes >&2; exit 1\n", "fail", "failed: no module named ctypes"),
        ("#!/bin/sh\nexec sleep 600\n", "unknown", "has not started within 0.9 s"),
        (None, "fail", "No such file or directory; no agent would start here"),
    ],
)
def test_the_interpreter_that_the_agent_will_get(tmp_path: Path, text: str | None, status: str, words: str) -> None:
    interpreter = tmp_path / "python"
    if text is not None:
        interpreter.write_text(text)
        interpreter.chmod(0o700)
    plan = make_plan()
    path = write_plan(tmp_path / "run", replace(plan, slurm=replace(plan.slurm, python=str(interpreter))))
    row = rows("--plan", path, "--node", "n0", "--timeout", 1 if status == "unknown" else 15)["python"]
    assert (row["status"], words in row["detail"]) == (status, True), row


def test_a_real_interpreter_is_good_enough(tmp_path: Path) -> None:
    plan = make_plan()
    path = write_plan(tmp_path, replace(plan, slurm=replace(plan.slurm, python=interpreters()[0])))
    assert rows("--plan", path, "--node", "n0")["python"]["status"] == "ok"


# -------------------------------------------------------------------------------------------------------------- output


def test_the_json_is_one_line_of_the_documented_shape() -> None:
    done = run("--json", "--ports", "14000-14009", "--node", "me", env={"SLURM_JOB_ID": "42"})
    assert done.stdout.count("\n") == 1
    document = json.loads(done.stdout)
    assert document.keys() == {"meta", "errors", "node", "host", "job", "status", "checks"}
    assert document["meta"].keys() == {"schema", "at", "took_s"}
    assert (document["meta"]["schema"], document["node"], document["job"]) == (1, "me", "42")
    assert [row["check"] for row in document["checks"]] == CHECKS
    for row in document["checks"]:
        assert row.keys() == {"check", "status", "detail", "data"}
        assert row["status"] in module.STATUSES
        assert row["detail"].isprintable()
        assert row["detail"]


def test_the_table_has_a_row_a_check_with_the_nodes_name() -> None:
    lines = run("--ports", "14000-14009", "--node", "gpu07").stdout.splitlines()
    assert lines[0].split() == ["NODE", "CHECK", "STATUS", "DETAIL"]
    assert [line.split()[:2] for line in lines[1:]] == [["gpu07", check] for check in CHECKS]
    assert len({line.index(line.split()[2]) for line in lines}) == 1, "columns"
    assert run("--node", "gpu07", "-h").stdout.splitlines()[0].split()[:2] == ["gpu07", "ports"]


def outcome(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: Sequence[str], *options: str
) -> tuple[int, str]:
    """Return exit code and output where the checks find these statuses."""
    made = [module.Row(f"check{n}", status, "detail", {}) for n, status in enumerate(found)]
    monkeypatch.setattr(module, "run_checks", lambda asked: list(made))
    try:
        return module.main([*options]), capsys.readouterr().out
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        module.tidy = module.Tidy()


@pytest.mark.parametrize(
    ("found", "code", "strict", "worst"),
    [
        (["ok", "skipped"], 0, 0, "ok"),
        (["ok", "warn", "ok"], 0, 1, "warn"),
        (["warn", "unknown"], 1, 1, "unknown"),
        (["fail", "unknown", "warn", "ok"], 1, 1, "fail"),
        (["skipped"], 0, 0, "ok"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: list[str],
    code: int,
    strict: int,
    worst: str,
) -> None:
    got, text = outcome(monkeypatch, capsys, found, "--json")
    assert (got, json.loads(text)["status"]) == (code, worst)
    assert outcome(monkeypatch, capsys, found, "--json", "--strict")[0] == strict
    errors = json.loads(text)["errors"]
    assert errors == [f"check{n}: detail" for n, status in enumerate(found) if status == "unknown"]


def test_quiet_shows_only_what_is_not_ok(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = outcome(monkeypatch, capsys, ["ok", "warn", "skipped", "fail", "unknown"], "--quiet", "-h")[1]
    assert [line.split()[1:3] for line in text.splitlines()] == [
        ["check1", "warn"],
        ["check3", "fail"],
        ["check4", "unknown"],
    ]
    assert outcome(monkeypatch, capsys, ["ok"], "--quiet") == (0, "")
    text = outcome(monkeypatch, capsys, ["ok", "warn"], "--quiet", "--json")[1]
    assert [row["check"] for row in json.loads(text)["checks"]] == ["check1"]


def test_a_check_that_hangs_is_unknown_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(asked: Any) -> Iterator[Any]:
        yield module.Row("space", "ok", "seen before it hung", {})
        time.sleep(5)

    def crash(asked: Any) -> Iterator[Any]:
        raise ZeroDivisionError("a bug")

    checks = ((("directory", "space"), hang, "it does not answer"), (("limits",), crash, ""))
    monkeypatch.setattr(module, "CHECKS", checks)
    began = time.monotonic()
    found = module.run_checks(asked("--timeout", "0.3"))
    assert time.monotonic() - began < 4
    assert [(row.check, row.status) for row in found] == [
        ("directory", "unknown"),
        ("space", "ok"),
        ("limits", "unknown"),
    ]
    assert found[0].detail == "not finished within 0.3 s: it does not answer"
    assert found[2].detail == "the check failed: ZeroDivisionError: a bug"


@pytest.mark.parametrize("options", [("--no-such",), ("--gpus", "-1"), ("--timeout", "0"), ("--wait", "x"), ("extra",)])
def test_usage_errors(options: Sequence[str]) -> None:
    done = run(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert "slurm-rollout-nodecheck: error: " in done.stderr


# --------------------------------------------------------------------------------------------------------------- alone


@pytest.mark.parametrize("interpreter", interpreters(), ids=lambda path: Path(path).parents[1].name)
def test_it_works_when_it_is_copied_alone(tmp_path: Path, interpreter: str) -> None:
    copy = tmp_path / "bin/slurm-rollout-nodecheck"
    copy.parent.mkdir()
    shutil.copy(SCRIPT, copy)
    argv = [interpreter, "-I", "-S", str(copy)]
    help = subprocess.run([*argv, "--help"], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
    assert "--plan FILE" in help.stdout
    done = subprocess.run(
        [*argv, "--json", "--ports", "14000-14009", "--dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=environment(),
        check=False,
    )
    assert done.stderr == ""
    assert [row["check"] for row in json.loads(done.stdout)["checks"]] == CHECKS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


def test_it_is_executable_and_needs_python_39_and_its_library_only() -> None:
    assert SCRIPT.stat().st_mode & 0o111 == 0o111
    assert not SCRIPT.is_symlink()
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


# ---------------------------------------------------------------------------------------------------------- real Slurm


@pytest.mark.slurm
def test_srun_runs_it_on_every_node_of_an_allocation(cluster: SlurmCluster) -> None:
    copy = cluster.home / "slurm-rollout-nodecheck"
    shutil.copy(SCRIPT, copy)
    (cluster.home / "bin").mkdir()
    smi = cluster.home / "bin/nvidia-smi"
    lines = "for n in 0 1 2 3 4 5 6 7; do echo $n, GPU-$n, 3, 0, No, No, None; done"
    smi.write_text(f"#!/bin/sh\ncase $1 in --query-gpu=*) {lines} ;; esac\n")
    for path in (copy, smi):
        path.chmod(0o755)
    listen = (
        "import socket, time; s = socket.create_server(('', 14003)); print('listening', flush=True); time.sleep(600)"
    )
    with cluster.popen_in_node("n2", ["python", "-c", listen], user=False) as stranger:
        try:
            assert stranger.stdout
            assert stranger.stdout.readline() == "listening\n"
            script = textwrap.dedent(
                """\
                #!/bin/bash
                export PATH=$HOME/bin:$PATH
                srun --overlap -N4 --ntasks-per-node=1 --output=line-%N ./slurm-rollout-nodecheck --json --wait 30 \\
                    --ports 14000-14009 --dir "$PWD"
                echo $? > code
                """
            )
            job = cluster.sbatch(script, "-N4", "--exclusive", "--gres=gpu:8")
            cluster.wait_job(job, "COMPLETED", timeout_s=60)
        finally:
            stranger.terminate()
    documents = [json.loads(path.read_text()) for path in cluster.home.glob("line-*")]
    by_node = {d["node"]: {row["check"]: row for row in d["checks"]} for d in documents}
    assert by_node.keys() == set(cluster.nodes)
    assert {d["job"] for d in documents} == {job}
    assert {name: found["ports"]["status"] for name, found in by_node.items()} == {
        "n1": "ok",
        "n2": "fail",
        "n3": "ok",
        "n4": "ok",
    }
    assert "14003 held by a process of user root that is not visible to this user" in by_node["n2"]["ports"]["detail"]
    for name, found in by_node.items():
        assert found["nodes"]["status"] == "ok", found["nodes"]
        assert found["nodes"]["data"]["seen"] == sorted(set(cluster.nodes) - {name})
        assert found["gpus"]["detail"] == "nvidia-smi lists 8, 8 expected (SLURM_GPUS_ON_NODE)"
        assert found["leftovers"]["status"] == "ok"
    assert (cluster.home / "code").read_text() == "1\n"
    assert not list(cluster.home.glob(".nodecheck*"))
