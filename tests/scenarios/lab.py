"""Where a scenario runs: this machine alone, the fake Slurm, or real Slurm daemons. One interface, same assertions.

Faults are done from outside: to processes, to ports, to files, through the stub engines' control file.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout.testing.fake_slurm import FakeSlurm
from slurm_rollout.testing.fleet import Fleet, LocalFleet, SlurmFleet, stub_spec, wait_for
from slurm_rollout.testing.slurm_cluster import FREEZER, SlurmCluster
from slurm_rollout.testing.watch import BarrierWatch

LISTEN = """\
import socket, sys, time
listener = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("up", flush=True)
time.sleep(600)
"""

ANSWER = """\
import http.server, json, sys

class Impostor(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()
    def do_GET(self):
        body = json.dumps({"choices": [{"message": {"content": "token"}}], "data": [{"id": "stub"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass

server = http.server.HTTPServer(("0.0.0.0", int(sys.argv[1])), Impostor)
print("up", flush=True)
server.serve_forever()
"""

ASK = """\
import json, sys, urllib.request
body = json.dumps({"model": "stub", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}).encode()
request = urllib.request.Request(sys.argv[1] + "/v1/chat/completions", body, {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=5).read().decode())
"""

# What a trainer does, one expression at a time: its words stay in its client file.
TRAIN = """\
import json, re, sys, urllib.request
from slurm_rollout.barrier import Barrier, BarrierError

def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    urls = [url for group in barrier.current().groups for url in group.urls]
    requests = [urllib.request.Request(url + path, data) for url in urls]
    return [urllib.request.urlopen(request, timeout=20).read().decode() for request in requests]

def asleep_requests():
    return [int(re.search(r"^stub_asleep_requests_total\\S* (\\d+)", page, re.M)[1]) for page in ask("/metrics")]

barrier = Barrier(sys.argv[1], job="", client=sys.argv[2])
try:
    print(json.dumps(eval(sys.argv[3])))
except BarrierError as error:
    print(json.dumps(type(error).__name__))
"""

WRAPPER = """\
#!/bin/sh
echo "$*" >>{log}
PATH=${{PATH#*:}}
{body}
exec {real} "$@"
"""

PATIENCE = {"probe_timeout_s": 1.0}
"""Scenarios run beside one another: half a second without a processor must be no time-out."""

# Root on this machine ignores the modes of files; nobody on a cluster does.
WITHOUT_ROOTS_EYE = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


class CommandLog:
    """What a wrapped command was called with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        path.chmod(0o666)

    def calls(self) -> list[str]:
        """Return the arguments of every call."""
        return self.path.read_text().splitlines()


class Lab:
    """The local backend; and what all three have in common."""

    kind = "local"

    def __init__(self, folder: Path, base: int) -> None:
        self.base = base
        self.fleet: Fleet = LocalFleet(folder)
        self.prefix = WITHOUT_ROOTS_EYE
        self.strangers: list[subprocess.Popen[str]] = []
        self._watch: BarrierWatch | None = None

    def up(self, *, minutes: int = 0, **spec: Any) -> Fleet:
        """Start a fleet of stubs, and a reader of its barrier file; return it. `minutes`: the job's time limit."""
        self.start(minutes=minutes, **spec)
        self._watch = BarrierWatch(self.fleet, self.ask)
        self._watch.start()
        return self.fleet

    def start(self, *, minutes: int = 0, **spec: Any) -> Fleet:
        """The same without the reader, which compares times of the wall clock."""
        self._start(self.spec(**spec), minutes)
        return self.fleet

    def wait_ready(self) -> None:
        """Wait until the fleet is ready, and its URLs have been asked: only then may a test hurt an engine."""
        self.fleet.wait_phase("ready")
        assert self._watch is not None
        wait_for("the reader's look at it", self._watch.has_looked)

    def _start(self, spec: str, minutes: int) -> None:
        assert isinstance(self.fleet, LocalFleet)
        ends = {"SLURM_JOB_END_TIME": str(int(time.time() + 60 * minutes))} if minutes else None
        self.fleet.start(spec, environ=ends, prefix=self.prefix)

    def spec(self, **spec: Any) -> str:
        return stub_spec(base=self.base, control=self.fleet.control, **{**PATIENCE, **spec})

    def cli(self, *argv: str, check: bool = True) -> str:
        """Run a command of slurm-rollout on the run, as its owner would; return what it printed.

        `check=False`: also where it says by its exit code that not all is well.
        """
        full = [sys.executable, "-m", "slurm_rollout", *argv, f"--run-dir={self.fleet.run.path}"]
        return subprocess.run(full, capture_output=True, text=True, check=check, timeout=60).stdout

    def trainer(self, does: str, client: str = "trainer") -> Any:
        """Let a trainer do something: a Python expression with its `barrier`, and `ask` and `asleep_requests`.

        Returns its value, or the name of the BarrierError.
        """
        done = self._python([TRAIN, str(self.fleet.run.barrier), client, does])
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def _python(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", *argv], capture_output=True, text=True, check=False, timeout=60)

    # ---------------------------------------------------------------------------------------------- nodes and ports

    def port(self, rank: int) -> int:
        """Return the HTTP port of a member of the first group."""
        return self.base + 16 * rank

    def occupy(self, rank: int, program: str = LISTEN) -> tuple[subprocess.Popen[str], int]:
        """A stranger takes the port of the first group's member; return its process and its pid there."""
        stranger = self._popen(rank, [program, str(self.port(rank))])
        self.strangers.append(stranger)
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "up\n"
        return stranger, self._pid_there(rank, stranger, program)

    def _popen(self, rank: int, python: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", *python], stdout=subprocess.PIPE, text=True)

    def _pid_there(self, rank: int, stranger: subprocess.Popen[str], program: str) -> int:
        return stranger.pid

    def accepts(self, rank: int, port: int) -> bool:
        """Tell whether a port of the member's node accepts a connection."""
        with socket.socket() as s:
            s.settimeout(1)
            return s.connect_ex(("127.0.0.1", port)) == 0

    def ask(self, url: str) -> dict[str, Any]:
        """Ask for one token, as a trainer would; empty when no answer comes."""
        body = json.dumps({"model": "stub", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}).encode()
        request = urllib.request.Request(url + "/v1/chat/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return dict(json.loads(answer.read()))
        except (OSError, ValueError):
            return {}

    def orphan(self, rank: int) -> int:
        """Return the pid, as seen from here, of the process that a stub with the fault `orphan` left behind."""
        log = self.fleet.run.member_log("actor/0", 1, rank)

        def logged() -> str:
            with suppress(OSError):
                return log.read_text().partition("orphan: pid ")[2].partition("\n")[0]
            return ""

        return self._pid_here(rank, int(wait_for("the orphan's pid", logged)))

    def _pid_here(self, rank: int, pid_there: int) -> int:
        return pid_there

    def node(self, index: int) -> str:
        """Return the name of a node of the fleet."""
        return f"local{index + 1}"

    def cut(self, node: str) -> None:
        """Take a node off the network; what runs on it goes on."""
        raise NotImplementedError

    def join(self, node: str) -> None:
        """Bring it back."""
        raise NotImplementedError

    def expect_lost(self, node: str) -> None:
        """From now on the reader lets what was left on this node live."""
        assert self._watch is not None
        self._watch.lost.add(node)

    # ------------------------------------------------------------------------------------------------ files and the end

    def disk_full(self, full: bool) -> None:
        """From now on the coordinator cannot write a byte (EFBIG stands for ENOSPC), or can again."""
        pid = self.fleet.coordinator()
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0 if full else hard, hard))

    def full_for_engines(self, rank: int) -> tuple[str, str]:
        """Return a file for which there is no room on the member's node, and what its agent can say of the place."""
        return "/dev/full", "a file system that "

    def room_again(self, rank: int) -> None:
        """Undo `full_for_engines`."""

    def refuse_steps(self) -> str:
        """Make Slurm refuse every step for what is asked; return its words. A spec may ask, as `[slurm]` says."""
        raise NotImplementedError

    def read_only(self, only: bool) -> None:
        """From now on nothing can be made in the run directory, or it can again."""
        for folder in (self.fleet.run.path, *self.fleet.run.path.glob(".t*")):
            folder.chmod(0o500 if only else 0o700)

    def terminate(self) -> int:
        """End the job as its time limit would; return the exit code of `up`, 0 where only Slurm knows it."""
        assert isinstance(self.fleet, LocalFleet)
        return self.fleet.terminate()

    def end_job(self) -> None:
        """Begin to end the job, and do not wait for it."""
        assert isinstance(self.fleet, LocalFleet)
        self.fleet.process.send_signal(signal.SIGTERM)

    def wait_ended(self) -> None:
        assert isinstance(self.fleet, LocalFleet)
        self.fleet.exit_code()

    def close(self) -> None:
        """End everything, then fail if the barrier ever said what it must not."""
        try:
            if self._watch is not None:
                self._watch.stop()
            self._end()
        finally:
            for stranger in self.strangers:
                stranger.kill()
                stranger.communicate()
        wrong = self._watch.violations() if self._watch is not None else []
        assert not wrong, "\n".join(["the trainer saw:", *wrong])

    def _end(self) -> None:
        self.fleet.end()


class FakeLab(Lab):
    """The same in a job of the fake Slurm, on this machine, without root."""

    kind = "fake"

    def __init__(self, slurm: FakeSlurm, base: int) -> None:
        super().__init__(slurm.home, base)
        self.cluster: FakeSlurm | SlurmCluster = slurm
        self.fleet: SlurmFleet[Any] = SlurmFleet(slurm)

    def _start(self, spec: str, minutes: int) -> None:
        self.fleet.start(spec, directives=_time_limit(minutes), prefix=self.prefix)

    def spec(self, *, nodes: str = "", **spec: Any) -> str:
        return super().spec(nodes=f'address = "127.0.0.1"\n{nodes}', **spec)

    def refuse_steps(self) -> str:
        assert isinstance(self.cluster, FakeSlurm)
        self.cluster.refuse_steps("gres")
        return "Invalid generic resource (gres) specification"

    def cli(self, *argv: str, check: bool = True) -> str:
        return self.cluster.run(["slurm-rollout", *argv, "--run-dir=run"], check=check).stdout

    def node(self, index: int) -> str:
        return self.cluster.nodes[index]

    def cut(self, node: str) -> None:
        assert isinstance(self.cluster, FakeSlurm)
        self.expect_lost(node)
        self.cluster.cut_node(node, after_s=4.0)

    def join(self, node: str) -> None:
        assert isinstance(self.cluster, FakeSlurm)
        self.cluster.join_node(node)

    def status(self) -> dict[str, Any]:
        """Return what `status --json` prints, however the run stands, with the text for people under "text"."""
        argv = ["slurm-rollout", "status", "--run-dir=run"]
        text = self.cluster.run(argv, check=False).stdout
        return {"text": text, **json.loads(self.cluster.run([*argv, "--json"], check=False).stdout)}

    def slurm_away(self) -> None:
        """From now on slurmctld answers nobody; what runs goes on."""
        assert isinstance(self.cluster, FakeSlurm)
        self.cluster.unreachable()

    def slurm_back(self) -> None:
        self.cluster.heal()

    def wrap(self, command: str, body: str) -> CommandLog:
        """Put a site's wrapper around a command of Slurm: a shell script that becomes the real one, unless `body` ends
        it, or hangs, before that."""
        log = CommandLog(self.cluster.home / f"{command}.log")
        folder = self._first_on_path()
        real = folder / f"{command}.real"
        if (folder / command).exists():
            (folder / command).rename(real)
        else:
            real = Path(command)
        (folder / command).write_text(WRAPPER.format(log=log.path, body=body, real=real))
        (folder / command).chmod(0o755)
        return log

    def _first_on_path(self) -> Path:
        assert isinstance(self.cluster, FakeSlurm)
        return self.cluster.commands

    def terminate(self) -> int:
        self.end_job()
        self.wait_ended()
        return 0

    def end_job(self) -> None:
        self.cluster.cancel(self.fleet.job)

    def wait_ended(self) -> None:
        self.cluster.wait_job(self.fleet.job, {"CANCELLED", "COMPLETED"})

    def _end(self) -> None:
        self.fleet.end()
        wait_for("no process of the job", lambda: not self.cluster.user_pids(), timeout_s=30)


class SlurmLab(FakeLab):
    """The same on real Slurm daemons: every node has its own network, processes and pids."""

    kind = "slurm"

    def __init__(self, cluster: SlurmCluster) -> None:
        self.base = 18000
        self.cluster: SlurmCluster = cluster
        self.fleet = SlurmFleet(cluster)
        self.prefix = []
        self.strangers = []
        self._watch = None

    def refuse_steps(self) -> str:
        return "Unable to create step for job"  # 22.05.8 goes on, of a feature that no node has: "Memory required …"

    def _start(self, spec: str, minutes: int) -> None:
        self.fleet.start(spec, directives=_time_limit(minutes), prefix=self.prefix)

    def spec(self, **spec: Any) -> str:
        python = self.cluster.python
        return stub_spec(base=self.base, control=self.fleet.control, python=python, **{**PATIENCE, **spec})

    def cut(self, node: str) -> None:
        self.expect_lost(node)
        self.cluster.cut(node)

    def join(self, node: str) -> None:
        self.cluster.join(node)

    def port(self, rank: int) -> int:
        return self.base

    def slurm_away(self) -> None:
        self.cluster.freeze_controller()

    def slurm_back(self) -> None:
        self.cluster.thaw_controller()

    def _first_on_path(self) -> Path:
        return self.cluster.python.parent

    def _python(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        return self.cluster.in_node(self.cluster.nodes[0], [self.cluster.python, "-c", *argv], check=False)

    def _popen(self, rank: int, python: list[str]) -> subprocess.Popen[str]:
        return self.cluster.popen_in_node(self.cluster.nodes[rank], [self.cluster.python, "-c", *python])

    def _pid_there(self, rank: int, stranger: subprocess.Popen[str], program: str) -> int:
        (pid,) = self.cluster.user_pids(program, self.cluster.nodes[rank])
        return _inner_pid(pid)

    def _pid_here(self, rank: int, pid_there: int) -> int:
        (pid,) = [p for p in self.cluster.user_pids("", self.cluster.nodes[rank]) if _inner_pid(p) == pid_there]
        return pid

    def disk_full(self, full: bool) -> None:
        # As the user: a limit of somebody else's process needs a capability that root in a container may lack.
        pid = _inner_pid(self.fleet.coordinator())
        self.cluster.in_node(
            self.cluster.nodes[0], ["prlimit", f"--pid={pid}", f"--fsize={0 if full else 'unlimited'}:"]
        )

    def full_for_engines(self, rank: int) -> tuple[str, str]:
        node = self.cluster.nodes[rank]
        small = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=1777", "tmpfs", "/dev/shm"]
        self.cluster.in_node(node, small, user=False)
        return "/dev/shm/weights", f"/dev/shm on {node} is full"

    def room_again(self, rank: int) -> None:
        self.cluster.in_node(self.cluster.nodes[rank], ["umount", "-l", "/dev/shm"], user=False)

    def accepts(self, rank: int, port: int) -> bool:
        code = f"import socket; s=socket.socket(); s.settimeout(1); print(s.connect_ex(('127.0.0.1', {port})))"
        done = self.cluster.in_node(self.cluster.nodes[rank], [self.cluster.python, "-c", code])
        return bool(done.stdout.strip() == "0")

    def ask(self, url: str) -> dict[str, Any]:
        # From where the coordinator is; a trainer is there, too.
        done = self.cluster.in_node(self.cluster.nodes[0], [self.cluster.python, "-IS", "-c", ASK, url], check=False)
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    def _end(self) -> None:
        self.fleet.end()  # that no process is left is checked at the end of every test on a cluster


def _time_limit(minutes: int) -> str:
    return f"#SBATCH --time={minutes}" if minutes else ""


def _inner_pid(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return pid


@contextmanager
def unkillable(pid: int) -> Iterator[None]:
    """Until the end of this the process runs not and dies of nothing, as one in state D: its ports stay taken."""
    folder = FREEZER / f"rollout-{pid}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"nothing makes a process unkillable here: {error}")
    try:
        (folder / "cgroup.procs").write_text(str(pid))
        (folder / "freezer.state").write_text("FROZEN")
        wait_for("the frozen process", lambda: (folder / "freezer.state").read_text() == "FROZEN\n")
        yield
    finally:
        (folder / "freezer.state").write_text("THAWED")
        with suppress(OSError):  # it has died
            (FREEZER / "cgroup.procs").write_text(str(pid))
        wait_for("an empty cgroup", lambda: not (folder / "cgroup.procs").read_text())
        folder.rmdir()


def assert_recovered(fleet: Fleet, group: str, incarnation: int, reason: str, rank: int | None = None) -> None:
    """The group came back once, for that reason, and its events tell the whole story in order."""
    entry = fleet.wait_serving(group, incarnation)
    assert entry["urls"]
    fleet.wait_event("ready", group, incarnation)  # events are written after the barrier
    failure = fleet.wait_event("failure", group, incarnation - 1)
    assert failure["reason"] == reason
    if rank is not None:
        assert failure["rank"] == rank
    order = [e["type"] for e in fleet.events(group=group)]
    story = ["failure", "stopped", "fenced", "launching", "go", "ready"]
    last = max(i for i, kind in enumerate(order) if kind == "failure")
    assert [k for k in order[last:] if k in story] == story


def undisturbed(fleet: Fleet, group: str) -> bool:
    """Tell whether the group serves and never failed."""
    return not fleet.events("failure", group) and bool(fleet.group(group).get("serving"))


def budget(fleet: Fleet, group: str) -> dict[str, Any]:
    """Return what is left of a group's budget: {"restarts": {"left", "of"}, "start_failures": …}."""
    seq = fleet.barrier()["seq"]

    def newest() -> dict[str, Any]:
        status = json.loads(fleet.run.status.read_text())
        return status if status["seq"] >= seq else {}

    status = wait_for("a status as new as the barrier", newest)
    found = next(g for g in status["groups"] if g["id"] == group)["budget"]
    assert isinstance(found, dict)
    return found


def heartbeats(fleet: Fleet, count: int) -> None:
    seq = fleet.barrier()["seq"]
    wait_for(f"{count} more heartbeats", lambda: fleet.barrier()["seq"] > seq + count, timeout_s=20 + count)


def live_for(fleet: Fleet, duration_s: float) -> None:
    """Watch for so long that nothing fails; the first failure ends it."""
    until = time.monotonic() + duration_s
    wait_for(
        f"{duration_s:g} s or a failure",
        lambda: time.monotonic() > until or fleet.events("failure"),
        timeout_s=duration_s + 20,
        period_s=0.25,
    )
    assert not fleet.events("failure")


def hurt(fleet: Fleet, event: str, incarnation: int = 1) -> None:
    fleet.wait_phase("ready")
    fleet.kill("actor/0", 1)
    fleet.wait_event(event, "actor/0", incarnation)


PHASES: dict[str, Callable[[Fleet], object]] = {
    "launching": lambda fleet: fleet.wait_event("launching", "actor/0", 1),
    "loading": lambda fleet: fleet.wait_event("go", "actor/0", 1),
    "ready": lambda fleet: fleet.wait_phase("ready"),
    "failure seen": lambda fleet: hurt(fleet, "failure"),
    "stopped": lambda fleet: hurt(fleet, "stopped"),
    "launching again": lambda fleet: hurt(fleet, "launching", 2),
    "loading again": lambda fleet: hurt(fleet, "go", 2),
}
"""Moments of a run, and how to get there."""
