"""The agent's fence with real processes and sockets: what is a leftover, what is a busy port, what is never killed."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from slurm_rollout import agent as module
from tests.agent_harness import (
    LISTEN,
    ORPHAN,
    Agent,
    Json,
    Node,
    alive,
    free_port,
    leave_time_wait,
    member,
    occupied,
    pid_in,
    python,
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


# ----------------------------------------------------------------------------------------------------------- leftovers


def test_what_carries_an_older_mark_is_ended(node: Node) -> None:
    old = [node.bystander(mark=node.mark(incarnation=n)) for n in (1, 2)]
    os.kill(old[1], signal.SIGSTOP)
    agent = node.agent(member(), incarnation=3)
    ended = agent.saw("fenced")["ended"]
    assert not any(map(alive, old))
    expected = [{"pid": p, "name": "sleep", "incarnation": n, "known_by": "mark"} for n, p in enumerate(old, 1)]
    assert sorted(ended, key=lambda e: e["incarnation"]) == expected
    agent.stop()


def test_nobody_else_is_ended(node: Node, tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.symlink_to("/bin/sleep")  # the batch host's srun carries its step's mark
    others = [
        node.bystander(mark=node.mark(group="actor/1")),
        node.bystander(mark=node.mark(group="actor/00")),
        node.bystander(mark=node.mark(node="n2")),
        node.bystander(mark=node.mark(node="xn1")),
        node.bystander(mark=node.mark(run_id="another")),
        node.bystander(mark=node.mark(incarnation=2)),
        node.bystander(mark=node.mark(incarnation=3)),
        node.bystander(mark="nonsense"),
        node.bystander(),
        node.bystander(mark=node.mark(), argv=[str(srun), "600"]),
    ]
    # Not even when an older list names them: a mark of its own tells whose a process is.
    node.write_list(1, *((pid, start_ticks(pid)) for pid in (*others[:8], others[9])))
    agent = node.agent(member(), incarnation=2)
    assert agent.saw("fenced")["ended"] == []
    assert all(map(alive, others))
    agent.stop()
    assert all(map(alive, others))


def test_a_child_of_a_leftover_is_spared_where_it_carries_another_groups_mark(node: Node, tmp_path: Path) -> None:
    pidfile = tmp_path / "child.pid"
    other = node.mark(group="actor/1")
    code = f"ROLLOUT_MARK={other} sh -c 'echo $$ > {pidfile}.new; mv {pidfile}.new {pidfile}; exec sleep 600'; true"
    parent = node.bystander(mark=node.mark(), argv=["sh", "-c", code])
    child = pid_in(pidfile)
    agent = node.agent(member(), incarnation=2)
    assert [e["pid"] for e in agent.saw("fenced")["ended"]] == [parent]
    assert alive(child)
    agent.stop()


def test_what_an_older_list_names_is_ended_but_never_a_reused_pid(node: Node) -> None:
    listed, reused, rebooted = node.bystander(), node.bystander(), node.bystander()
    node.write_list(1, (listed, start_ticks(listed)), (reused, start_ticks(reused) - 1))
    node.write_list(2, (rebooted, start_ticks(rebooted)), boot="another")
    node.write_list(4, (reused, start_ticks(reused)))  # a newer incarnation's
    agent = node.agent(member(), incarnation=3)
    ended = agent.saw("fenced")["ended"]
    assert ended == [{"pid": listed, "name": "sleep", "incarnation": 1, "known_by": "process list"}]
    assert [alive(p) for p in (listed, reused, rebooted)] == [False, True, True]
    assert sorted(p.name for p in node.records.glob("processes-*")) == ["processes-3", "processes-4"]
    agent.stop()


def test_what_a_group_left_behind_on_a_node_that_it_left_is_ended_too(node: Node) -> None:
    gone = node.bystander(mark=node.mark(group="actor/1", incarnation=2))
    newer = node.bystander(mark=node.mark(group="actor/1", incarnation=3))
    neighbour = node.bystander(mark=node.mark(group="actor/2"))
    listed, newest = node.bystander(), node.bystander()
    node.write_list(2, (listed, start_ticks(listed)), group="actor/1")
    node.write_list(3, (newest, start_ticks(newest)), group="actor/1")
    agent = node.agent(member(), fence={"absent": {"actor/1": 2, "actor/3": 7}})
    ended = {e["pid"]: (e["group"], e["incarnation"], e["known_by"]) for e in agent.saw("fenced")["ended"]}
    assert ended == {gone: ("actor/1", 2, "mark"), listed: ("actor/1", 2, "process list")}
    assert [alive(p) for p in (gone, listed, newer, newest, neighbour)] == [False, False, True, True, True]
    agent.stop()


def test_a_leftover_of_another_group_is_named_with_it(node: Node) -> None:
    pid = node.bystander(mark=node.mark(group="actor/1"))
    agent = node.agent(
        member(),
        fence={"absent": {"actor/1": 1}, "timeout_s": 0.5},
        patch="g['kill'] = lambda pid, number=9: None",
    )
    message = agent.ended("leftover_process", 82)["message"]
    assert f"pid {pid} (sleep) of incarnation 1 of actor/1, known by its mark" in message


def test_a_list_that_is_no_json_is_no_list(node: Node) -> None:
    node.write_list(1)
    (node.records / "processes-1").write_text("{")
    node.agent(member(), incarnation=2).saw("fenced")


@pytest.mark.parametrize("child", ["", "with a child that no list names"])
def test_an_orphan_without_environment_that_holds_the_port(node: Node, tmp_path: Path, child: str) -> None:
    port = free_port()
    old = node.agent(member(argv=python(ORPHAN, port, tmp_path), ports=[port]))
    (engine,) = old.go()
    orphan = pid_in(tmp_path / "orphan.pid")
    until(lambda: orphan in node.listed(), "the process list")
    old.send(signal.SIGKILL)
    until(lambda: not alive(engine), "the engine's end")
    assert alive(orphan)
    grandchild = 0
    if child:
        os.kill(orphan, signal.SIGUSR1)
        grandchild = pid_in(tmp_path / "child.pid")
    new = node.agent(member(ports=[port]), incarnation=2)
    ended = {e["pid"]: (e["known_by"], e["incarnation"]) for e in new.saw("fenced")["ended"]}
    assert ended == {orphan: ("process list", 1), **({grandchild: ("parent", 1)} if child else {})}
    assert not alive(orphan)
    new.stop()


def test_an_older_agent_that_lives_is_ended_with_its_engines(node: Node) -> None:
    old = node.agent(member())
    (engine,) = old.go()
    new = node.agent(member(), incarnation=2)
    assert {e["pid"] for e in new.saw("fenced")["ended"]} == {old.pid, engine}
    assert old.join() == -signal.SIGKILL
    assert not alive(engine)
    new.stop()


@pytest.mark.parametrize(
    ("cgroup", "listed", "own", "leftover"),
    [
        ("0::/slurmstepd.scope/job_5/step_3/user/task_0\n", ("5", "3", "0"), ("5", "4", "0"), True),
        ("4:memory:/slurm/uid_0/job_5/step_3\n", ("5", "3", "0"), ("5", "4", "0"), True),
        ("0::/slurmstepd.scope/job_5/step_31/user/task_0\n", ("5", "3", "0"), ("5", "4", "0"), False),
        ("0::/slurmstepd.scope/job_15/step_3/user/task_0\n", ("5", "3", "0"), ("5", "4", "0"), False),
        # After a requeue step 3 may be anybody's.
        ("0::/slurmstepd.scope/job_5/step_3/user/task_0\n", ("5", "3", "0"), ("5", "4", "1"), False),
        ("0::/slurmstepd.scope/job_5/step_3/user/task_0\n", ("5", "3", "0"), ("5", "3", "0"), False),
        ("0::/slurmstepd.scope/job_5/step_3/user/task_0\n", ("5", "3", "0"), ("", "", ""), False),
    ],
)
def test_what_is_in_an_older_step_is_a_leftover(
    node: Node, cgroup: str, listed: tuple[str, str, str], own: tuple[str, str, str], leftover: bool
) -> None:
    pid = node.bystander()
    node.write_list(1, slurm=dict(zip(("job", "step", "restart"), listed, strict=True)))
    agent = node.agent(
        member(),
        incarnation=2,
        environ=dict(zip(("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"), own, strict=True)),
        patch=f"real = g['read_file']\n"
        f"g['read_file'] = lambda path: {cgroup.encode()!r} if path == '/proc/{pid}/cgroup' else real(path)",
    )
    ended = {e["pid"]: (e["known_by"], e["incarnation"]) for e in agent.saw("fenced")["ended"]}
    assert ended == ({pid: ("Slurm step", 1)} if leftover else {})
    assert alive(pid) is not leftover
    agent.stop()


def test_a_leftover_that_does_not_die(node: Node) -> None:
    pid = node.bystander(mark=node.mark())
    agent = node.agent(
        member(),
        incarnation=2,
        patch="g['QUIET_FENCE_S'] = 0\ng['kill'] = lambda pid, number=9: None",
        fence={"timeout_s": 0.4},
    )
    said = agent.saw("fence_waits")
    assert (said["cause"], f"pid {pid} (sleep)" in said["message"]) == ("leftover_process", True)
    message = agent.ended("leftover_process", 82)["message"]
    assert f"pid {pid} (sleep) of incarnation 1, known by its mark" in message


def test_a_dead_leftover_that_nobody_reaps_is_none(node: Node) -> None:
    pid = node.bystander(mark=node.mark(), reaped=False)
    node.write_list(1, (pid, start_ticks(pid)))
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), "its end")
    agent = node.agent(member(), incarnation=2)
    assert agent.saw("fenced")["ended"] == []


# --------------------------------------------------------------------------------------------------------------- sweep


def test_a_sweep_ends_its_own_incarnation_too_and_starts_nothing(node: Node) -> None:
    agent = node.agent(member(), incarnation=2)
    (engine,) = agent.go()
    newer = node.bystander(mark=node.mark(incarnation=3))
    sweep = node.agent(member(), incarnation=2, mode="sweep")
    assert {e["pid"] for e in sweep.saw("fenced")["ended"]} == {agent.pid, engine}
    sweep.ended("swept", 0)
    assert [r["report"] for r in sweep.reports] == ["hello", "fenced", "exit"]
    assert not alive(engine)
    assert alive(newer)
    assert not node.listed(2)
    node.agent(member(), incarnation=3).saw("fenced")  # it claimed nothing


def test_sweeps_do_not_end_one_another(node: Node) -> None:
    port = free_port()
    with occupied(port):
        sweeps = [node.agent(member(ports=[port]), mode="sweep") for _ in range(2)]
        for sweep in sweeps:
            sweep.saw("fence_waits")
    for sweep in sweeps:
        sweep.ended("swept", 0)


def test_a_sweep_names_who_holds_a_port(node: Node) -> None:
    port = free_port()
    with occupied(port):
        sweep = node.agent(member(ports=[port]), mode="sweep", fence={"timeout_s": 0.1})
        assert f"pid {os.getpid()} " in sweep.ended("port_busy", 81)["message"]


def test_a_sweep_can_be_stopped(node: Node) -> None:
    port = free_port()
    with occupied(port):
        sweep = node.agent(member(ports=[port]), mode="sweep")
        sweep.saw("fence_waits")
        sweep.stop()


# --------------------------------------------------------------------------------------------------------------- ports


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "::", "::1"])
def test_a_stranger_that_listens_is_named_and_never_killed(node: Node, address: str) -> None:
    port = free_port()
    code = LISTEN.replace("socket.socket()", f"socket.socket({10 if ':' in address else 2})")
    stranger = node.bystander(argv=python(code.replace("127.0.0.1", address), port))
    until(lambda: port_is_taken(port), "the stranger")
    agent = node.agent(member(0), member(1, ports=[free_port(), port]), fence={"timeout_s": 2})
    said = agent.saw("fence_waits")
    name = Path(f"/proc/{stranger}/comm").read_text().strip()
    assert said["cause"] == "port_busy"
    assert f"port {port} is held by pid {stranger} ({name}, user " in said["message"]
    assert said["message"] in agent.ended("port_busy", 81)["message"]
    assert alive(stranger)


def port_is_taken(port: int) -> bool:
    return bool(module.listeners(port))


def test_the_remains_of_connections_are_in_nobodys_way(node: Node) -> None:
    port = free_port()
    leave_time_wait(port)
    agent = node.agent(member(ports=[port]), fence={"timeout_s": 0})
    agent.saw("fenced")
    assert any(row.waits for row in module.sockets(port)), "they went away too early to prove anything"
    agent.stop()


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "::", "::1"])
def test_a_socket_that_is_bound_and_does_not_listen_yet_is_in_the_way(node: Node, reuse: bool, address: str) -> None:
    port = free_port()
    with occupied(port, reuse=reuse, listen=False, address=address):
        agent = node.agent(member(ports=[port]))
        said = agent.saw("fence_waits")
        assert said["cause"] == "port_busy"
        assert f"port {port} is " in said["message"]
        assert "not" in said["message"]
    agent.saw("fenced")
    agent.stop()


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_it_is_told_from_the_remains_of_connections_at_the_same_port(node: Node, address: str) -> None:
    port = free_port()
    leave_time_wait(port)
    with occupied(port, listen=False, address=address):
        agent = node.agent(member(ports=[port]))
        agent.saw("fence_waits", cause="port_busy")
    agent.saw("fenced")
    assert any(row.waits for row in module.sockets(port)), "they went away too early to prove anything"
    agent.stop()


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "::", "::1"])
def test_netlink_and_proc_name_the_same_listeners(address: str) -> None:
    port = free_port()
    assert module.ask_for_listeners(port) == []
    leave_time_wait(port)
    with occupied(port, listen=False, address=address):
        assert module.ask_for_listeners(port) == []
    with occupied(port, address=address):
        by_netlink, by_proc = module.ask_for_listeners(port), [row for row in module.sockets(port) if row.listens]
        for [row] in (by_netlink, by_proc):
            assert row.address == address
            assert row.uid == os.getuid()
        assert by_netlink[0].inode == by_proc[0].inode


def test_without_netlink_listeners_are_found_in_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOCK_DIAG", 31)  # no such family: as a kernel without inet_diag
    port = free_port()
    with occupied(port):
        with pytest.raises(OSError, match="not supported"):
            module.ask_for_listeners(port)
        assert [row.address for row in module.listeners(port)] == ["0.0.0.0"]


def test_the_local_end_of_a_connection_is_named(node: Node) -> None:
    port = free_port()
    with socket.socket() as listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.bind(("127.0.0.1", port))
        client.connect(listener.getsockname())
        agent = node.agent(member(ports=[port]), fence={"timeout_s": 0})
        assert f"port {port} is held by pid {os.getpid()} " in agent.ended("port_busy", 81)["message"]


def test_a_holder_of_another_user_is_named_as_far_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with occupied(port):
        monkeypatch.setattr(module, "socket_inodes", lambda pid: None)
        user = module.user_name(os.getuid())
        expected = f"port {port} is held by a process of user {user} that is not visible to this user, on 0.0.0.0"
        assert module.busy(port) == expected


@pytest.mark.parametrize("failed", ["socket", "bind"])
def test_a_port_that_cannot_be_tried_is_not_free(node: Node, tmp_path: Path, failed: str) -> None:
    port, enough = free_port(), tmp_path / "enough"
    # At first no descriptor is to be had, or the system refuses the bind.
    refuse = f"""
real = g["socket"].socket
class Refusing(real):
    def {"__init__" if failed == "socket" else "bind"}(self, *given, **named):
        if not g["os"].path.exists({str(enough)!r}):
            {"real.__init__(self, *given, **named); self.close()" if failed == "socket" else "pass"}
            raise OSError(24, "Too many open files")
        real.{"__init__" if failed == "socket" else "bind"}(self, *given, **named)
g["socket"].socket = Refusing
"""
    agent = node.agent(member(ports=[port]), patch=refuse)
    said = agent.saw("fence_waits", cause="port_busy")["message"]
    assert said == f"port {port} cannot be tried, so nobody knows whether it is free: Too many open files"
    enough.touch()
    agent.saw("fenced")
    agent.stop()


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


def test_every_change_of_what_it_waits_for_is_told_once(node: Node, tmp_path: Path) -> None:
    first, second = free_port(), free_port()
    looks = tmp_path / "looks"
    looks.touch()
    count = f"real = g['busy']\ng['busy'] = lambda port: open({str(looks)!r}, 'a').write('x') and real(port)"

    def looked_again() -> None:
        wanted = looks.stat().st_size + 6
        until(lambda: looks.stat().st_size >= wanted, "three more looks at both ports")

    with occupied(second):
        with occupied(first):
            agent = node.agent(member(ports=[first, second]), patch=count)
            agent.saw("fence_waits")
            looked_again()
        until(lambda: str(first) not in agent.all("fence_waits")[-1]["message"], "the second wait")
        looked_again()
    agent.saw("fenced")
    messages = [r["message"] for r in agent.all("fence_waits")]
    assert all(before != after for before, after in itertools.pairwise(messages))
    assert [str(port) in messages[0] for port in (first, second)] == [True, True]
    assert [str(port) in messages[-1] for port in (first, second)] == [False, True]
    agent.stop()


# ----------------------------------------------------------------------------------------------------------------- GPU

SMI = """#!/bin/sh
cd "$(dirname "$0")" || exit
echo "$*" >> calls
case "$1" in
  --query-gpu=index,uuid,memory.used) cat gpus ;;
  --query-compute-apps=pid,used_memory) cat apps ;;
  *) echo "what is $1"; exit 2 ;;
esac
[ ! -e later ] || { mv later gpus; sleep 0.3; }
[ ! -e after ] || while kill -0 "$(cat after)" 2>/dev/null; do sleep 0.01; done
[ ! -e hang ] || exec sleep 600
[ ! -e fail ] || { echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18; }
"""

FREE = "0, GPU-aa00, 3\n1, GPU-bb11, 4\n2, GPU-cc22, 5\n3, GPU-dd33, [N/A]\n"
BUSY = "0, GPU-aa00, 70000\n1, GPU-bb11, 80000\n2, GPU-cc22, 5\n3, GPU-dd33, [N/A]\n"


@pytest.fixture
def smi(tmp_path: Path) -> Path:
    """A folder with an nvidia-smi that says what its files say."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(SMI)
    (folder / "nvidia-smi").chmod(0o700)
    (folder / "gpus").write_text(FREE)
    (folder / "apps").write_text("")
    return folder


def with_gpus(node: Node, smi: Path, gpus: list[int], mask: str | None = None, **changes: object) -> Agent:
    environ = {"PATH": f"{smi}:{os.environ['PATH']}", **({} if mask is None else {"CUDA_VISIBLE_DEVICES": mask})}
    orders: Json = {"incarnation": 2, **changes}
    return node.agent(member(gpus=gpus), environ=environ, **orders)


def rewrite(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


UNSHARED = {"unshared_gpus": True}


def test_memory_of_unshared_gpus_must_be_back(node: Node, smi: Path) -> None:
    rewrite(smi / "gpus", BUSY)
    agent = with_gpus(node, smi, [0, 2], "1,0,2", fence=UNSHARED)
    said = agent.saw("fence_waits")
    assert said["cause"] == "gpu_memory"
    assert "GPU 1 (80000 MiB)" in said["message"]
    assert "70000" not in said["message"]
    rewrite(smi / "gpus", FREE)
    assert agent.saw("fenced") == {"report": "fenced", "ended": []}
    agent.stop()


@pytest.mark.parametrize(
    ("mask", "gpus", "full"),
    [
        (None, [1, 2], "GPU 1 (80000 MiB)"),
        ("GPU-aa00,GPU-cc22", [0], "GPU GPU-aa00 (70000 MiB)"),
        ("GPU-aa,GPU-cc22", [0], "GPU GPU-aa (70000 MiB)"),
    ],
)
def test_memory_that_never_comes_back(node: Node, smi: Path, mask: str | None, gpus: list[int], full: str) -> None:
    rewrite(smi / "gpus", BUSY)
    agent = with_gpus(node, smi, gpus, mask, fence={**UNSHARED, "timeout_s": 2})
    message = agent.ended("gpu_memory", 83)["message"]
    assert full in message
    assert "1024 MiB" in message


@pytest.mark.parametrize(("gpus", "mask"), [([2], "0,1,2"), ([1], "GPU-aa00,GPU-cc22"), ([2], None)])
def test_other_gpus_do_not_matter(node: Node, smi: Path, gpus: list[int], mask: str | None) -> None:
    rewrite(smi / "gpus", BUSY)
    agent = with_gpus(node, smi, gpus, mask, fence=UNSHARED)
    assert agent.saw("fenced") == {"report": "fenced", "ended": []}
    agent.stop()


def test_the_totals_of_shared_gpus_say_nothing(node: Node, smi: Path) -> None:
    rewrite(smi / "gpus", BUSY)
    with_gpus(node, smi, [0]).saw("fenced")
    with_gpus(node, smi, [0], mode="sweep", fence=UNSHARED, group="actor/1").ended("swept", 0)
    with_gpus(node, smi, [], fence=UNSHARED, group="actor/2").saw("fenced")
    assert not (smi / "calls").exists()


def test_a_dead_process_that_still_holds_memory(node: Node, smi: Path) -> None:
    pid = node.bystander(mark=node.mark())
    stranger, reused, dead = node.bystander(), node.bystander(), node.bystander()
    node.write_list(1, (reused, start_ticks(reused) - 1))
    os.kill(dead, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{dead}").exists(), "its end")
    others = f"{stranger}, 70000\n{reused}, 70000\n{dead}, 70000\n"
    (smi / "apps").write_text(f"{others}{pid}, 60000\n")
    (smi / "after").write_text(f"{pid}")  # a zombie is not gone: no answer before it is reaped
    agent = with_gpus(node, smi, [0])
    said = agent.saw("fence_waits", cause="gpu_memory")
    assert said["message"] == f"pid {pid} of incarnation 1 is dead, but still holds 60000 MiB of GPU memory"
    rewrite(smi / "apps", others)
    agent.saw("fenced")
    agent.stop()


def test_an_answer_from_before_the_last_leftovers_end_does_not_count(node: Node, smi: Path) -> None:
    pid = node.bystander(mark=node.mark())
    # The first answer is slow and says that all is free, every later one says the contrary.
    (smi / "later").write_text(BUSY)
    agent = node.agent(
        member(gpus=[0]),
        incarnation=2,
        environ={"PATH": f"{smi}:{os.environ['PATH']}"},
        fence=UNSHARED,
        patch="import itertools\nreal, count = g['kill'], itertools.count()\n"
        "g['kill'] = lambda pid, number=9: next(count) < 5 or real(pid, number)",
    )
    agent.saw("fence_waits", cause="gpu_memory")
    assert not alive(pid)
    rewrite(smi / "gpus", FREE)
    agent.saw("fenced")
    agent.stop()


@pytest.mark.parametrize(("trouble", "words"), [("fail", "exit 18"), ("hang", "did not answer")])
def test_an_nvidia_smi_in_trouble_proves_nothing(node: Node, smi: Path, trouble: str, words: str) -> None:
    (smi / trouble).touch()
    agent = with_gpus(node, smi, [0], fence={**UNSHARED, "timeout_s": 3})
    message = agent.ended("gpu_memory", 83)["message"]
    assert "nvidia-smi" in message
    assert words in message


@pytest.mark.parametrize(
    ("says", "code", "lost"),
    [
        ("No devices were found", 15, "a GPU is lost"),
        ("Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.", 255, "gpu is lost"),
    ],
)
def test_a_lost_gpu_is_not_waited_for(node: Node, smi: Path, says: str, code: int, lost: str) -> None:
    (smi / "nvidia-smi").write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    agent = with_gpus(node, smi, [0], fence={**UNSHARED, "timeout_s": 600})
    record = agent.ended("gpu_memory", 83)
    assert record["hardware"] == f"n1: nvidia-smi says: {lost}"


def test_an_nvidia_smi_that_hangs_is_told_and_can_be_stopped(node: Node, smi: Path) -> None:
    (smi / "hang").touch()
    agent = node.agent(
        member(gpus=[0]),
        environ={"PATH": f"{smi}:{os.environ['PATH']}"},
        fence=UNSHARED,
        patch="g['SMI_SILENT_S'] = 0.3",
    )
    assert "has not answered for" in agent.saw("fence_waits", cause="gpu_memory")["message"]
    agent.stop()


def test_hello_does_not_wait_for_the_fence(node: Node, smi: Path) -> None:
    (smi / "hang").touch()
    agent = with_gpus(node, smi, [0], fence=UNSHARED)
    agent.saw("hello")
    agent.stop()
    assert [r["report"] for r in agent.reports] == ["hello", "exit"]


def test_without_nvidia_smi_the_fence_says_that_it_did_not_judge(node: Node, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for program in ("sleep", "sh"):
        (tmp_path / "bin" / program).symlink_to(f"/bin/{program}")
    agent = node.agent(member(gpus=[0]), environ={"PATH": str(tmp_path / "bin")}, fence=UNSHARED)
    (note,) = agent.saw("fenced")["notes"]
    assert "nvidia-smi is not on PATH" in note
    agent.stop()


@pytest.mark.parametrize(("gpus", "mask"), [([3], None), ([0], "MIG-7")])
def test_a_gpu_whose_use_is_unknown_is_let_through_and_told(
    node: Node, smi: Path, gpus: list[int], mask: str | None
) -> None:
    agent = with_gpus(node, smi, gpus, mask, fence=UNSHARED)
    (note,) = agent.saw("fenced")["notes"]
    assert "not judged" in note
    agent.stop()
