"""Real agents on this host, with small programs as their engines. Everything started is ended with the test."""

from __future__ import annotations

import contextlib
import functools
import glob
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Test files that run beside one another have ports of their own.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_CANDIDATES = range(9000 + _WORKER, 11000, _WORKERS)
_PORTS = itertools.cycle(random.sample(_CANDIDATES, len(_CANDIDATES)))

AGENT = Path(__file__).parent.parent / "slurm_rollout" / "agent.py"
DEADLINE_S = 20.0

Json = dict[str, Any]

# Listens on a port, after `hold` seconds in which it is only bound.
LISTEN = """
import socket, sys, time
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("127.0.0.1", int(sys.argv[1])))
time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
s.listen()
print("listening", flush=True)
time.sleep(600)
"""

# Leaves a process behind: double-forked, in a session of its own, without environment, which listens on the port and
# forks a child when it gets USR1. The pids go to files.
ORPHAN = """
import os, sys
me, port, folder = sys.argv
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        code = '''
import os, signal, socket, sys, time
port, folder = int(sys.argv[1]), sys.argv[2]
def fork(*_):
    pid = os.fork()
    if pid == 0:
        while True: time.sleep(600)
    open(folder + "/child.new", "w").write(str(pid))
    os.rename(folder + "/child.new", folder + "/child.pid")
signal.signal(signal.SIGUSR1, fork)
s = socket.socket()
s.bind(("127.0.0.1", port))
s.listen()
open(folder + "/orphan.new", "w").write(str(os.getpid()))
os.rename(folder + "/orphan.new", folder + "/orphan.pid")
while True: time.sleep(600)
'''
        os.execve(sys.executable, [sys.executable, "-IS", "-c", code, port, folder], {})
    os._exit(0)
import time
time.sleep(600)
"""


def python(code: str, *arguments: object) -> list[str]:
    """Return the command that runs `code`."""
    return [sys.executable, "-IS", "-c", code, *map(str, arguments)]


def until(look: Callable[[], T | None], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Return what `look` finds; fail when it finds nothing in time."""
    end = time.monotonic() + deadline_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < end, f"not in {deadline_s:g} s: {what}"
        time.sleep(0.005)


def free_port() -> int:
    """Return a port below the ephemeral range that nobody has, each time another."""
    while True:
        port = next(_PORTS)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("0.0.0.0", port))
            return port


def alive(pid: int) -> bool:
    """Does it run? A zombie does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text[text.rindex(")") + 2] not in "ZX"


def start_ticks(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[19])


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def pid_in(path: Path) -> int:
    """Wait for a pid in a file."""
    until(path.exists, path.name)
    return int(path.read_text())


def member(rank: int = 0, *, argv: Sequence[str] = ("sleep", "600"), **changes: Any) -> Json:
    return {
        "rank": rank,
        "local_rank": rank,
        "gpus": [],
        "argv": list(argv),
        "env": {},
        "port": 1,
        "ports": [],
        "entrypoint": False,
        "log": "",
        "snapshot": "",
        **changes,
    }


def server(port: int, rank: int = 0, *, argv: Sequence[str] = (), **changes: Any) -> Json:
    """A member with an entrypoint at `port`."""
    argv = argv or python(LISTEN, port)
    return member(rank, argv=argv, **{"port": port, "ports": [port], "entrypoint": True, **changes})


class Agent:
    """A running agent, and what it reported so far."""

    def __init__(self, argv: list[str], env: dict[str, str], stderr: Path, **popen: Any) -> None:
        self.stderr = stderr
        with stderr.open("wb") as err:
            self.process = subprocess.Popen(argv, env=env, stderr=err, stdin=subprocess.DEVNULL, **popen)
        self.pid = self.process.pid
        self.reports: list[Json] = []
        self._reader: threading.Thread | None = None
        if self.process.stdout is not None:
            self._reader = threading.Thread(target=self._read)
            self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.reports.append(json.loads(line))

    def all(self, kind: str) -> list[Json]:
        return [r for r in list(self.reports) if r["report"] == kind]

    def saw(self, kind: str, **values: Any) -> Json:
        """Wait for a report with these values; give it back."""

        def look() -> Json | None:
            return next((r for r in self.all(kind) if values.items() <= r.items()), None)

        def look_or_end() -> Json | None:
            found = look()
            if found is None and self.process.poll() is not None:
                self.join()
                found = look()
                assert found is not None, f"ended without {kind} {values}: {self.told()}"
            return found

        try:
            return until(look_or_end, kind)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.told()}") from None

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def go(self) -> list[int]:
        """Wait for the fence, start the engines, return their pids."""
        self.saw("fenced")
        self.send(signal.SIGUSR2)
        pids: list[int] = self.saw("started")["pids"]
        return pids

    def stop(self) -> Json:
        self.send(signal.SIGUSR1)
        return self.ended("stopped", 0)

    def ended(self, cause: str, status: int) -> Json:
        """Wait for the end; it must be this one."""
        record = self.saw("exit")
        assert (record["cause"], self.join()) == (cause, status), self.told()
        assert record is self.reports[-1]
        return record

    def join(self) -> int:
        status = self.process.wait(DEADLINE_S)
        if self._reader is not None:
            self._reader.join(DEADLINE_S)
        return status

    def told(self) -> str:
        return f"{self.reports}\n{self.stderr.read_text()}"

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.join()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Node:
    """A virtual node: one run's agents with their own state directory, and bystanders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_id = f"test-{uuid.uuid4().hex[:12]}"
        self.state_dir = folder / "state"
        self.agents: list[Agent] = []
        self.bystanders: list[subprocess.Popen[bytes]] = []

    @property
    def records(self) -> Path:
        """Where claims and process lists of the default group are."""
        return self.state_dir / self.run_id / "n1" / "actor~0"

    def orders(self, *members: Json, **changes: Any) -> Json:
        return {
            "version": 2,
            "mode": "serve",
            "run_id": self.run_id,
            "group": "actor/0",
            "incarnation": 1,
            "node": "n1",
            "members": list(members),
            "setup": [],
            "probe": None,
            "log": {"max_bytes": 0},
            "state_dir": str(self.state_dir),
            **changes,
            "stop": {"grace_s": 0, "snapshot_s": 3.0, **changes.get("stop", {})},
            "fence": {
                "timeout_s": 15.0,
                "gpu_memory_mb": 1024,
                "unshared_gpus": False,
                "self_fence_s": 0,
                "absent": {},
                "barrier": "",
                **changes.get("fence", {}),
            },
        }

    def mark(self, *, group: str = "actor/0", incarnation: int = 1, node: str = "n1", run_id: str = "") -> str:
        return f"{run_id or self.run_id}/{group}/{incarnation}/{node}"

    def agent(
        self,
        *members: Json,
        environ: dict[str, str] | None = None,
        interpreter: str = sys.executable,
        patch: str = "",
        popen: Json | None = None,
        **orders: Any,
    ) -> Agent:
        """Start an agent. `patch` is code that changes it before it runs."""
        value = self.orders(*members, **orders)
        marks = {k: value[k] for k in ("group", "incarnation", "node")}
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("ROLLOUT_", "SLURM_", "CUDA_", "ROCR_"))},
            "ROLLOUT_STEP": json.dumps(value),
            "ROLLOUT_MARK": self.mark(**marks),
            **(environ or {}),
        }
        argv = [interpreter, "-IS", str(AGENT)]
        if patch:
            code = f"g = {{'__name__': 'agent'}}\nexec(open({str(AGENT)!r}).read(), g)\n{patch}\n"
            argv = [interpreter, "-IS", "-c", code + "g['os']._exit(g['main']())"]
        options = {"stdout": subprocess.PIPE, **(popen or {})}
        agent = Agent(argv, env, self.folder / f"stderr-{len(self.agents)}", **options)
        self.agents.append(agent)
        return agent

    def bystander(self, *, mark: str = "", argv: Sequence[str] = ("sleep", "600"), reaped: bool = True) -> int:
        """Start a process that is not the agent's; return its pid. One that is killed is reaped, as in life."""
        env = {**os.environ, **({"ROLLOUT_MARK": mark} if mark else {})}
        process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL)
        self.bystanders.append(process)
        until(lambda: cmdline(process.pid).split(b"\0")[0] == argv[0].encode(), "its exec")
        if reaped:
            threading.Thread(target=process.wait, daemon=True).start()
        return process.pid

    def write_list(self, incarnation: int, *processes: tuple[int, int], group: str = "actor/0", **changes: Any) -> None:
        """Write what an older agent would have written."""
        folder = self.records.with_name(group.replace("/", "~"))
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        value = {"boot": boot, "slurm": {}, "processes": [list(p) for p in processes], **changes}
        (folder / f"processes-{incarnation}").write_text(json.dumps(value))

    def listed(self, incarnation: int = 1) -> set[int]:
        """Return the pids that the agent has written down."""
        try:
            return {p for p, _ in json.loads((self.records / f"processes-{incarnation}").read_text())["processes"]}
        except FileNotFoundError:
            return set()

    def close(self) -> None:
        """End everything that this node's tests started, also where a test failed half-way."""
        ours = {a.pid for a in self.agents} | {b.pid for b in self.bystanders}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                environ = Path(f"/proc/{entry}/environ").read_bytes()
                if b"ROLLOUT_MARK=" in environ and self.run_id.encode() in environ:
                    ours.add(int(entry))
        for name in glob.glob(f"{self.folder}/**/processes-*", recursive=True):
            with contextlib.suppress(OSError, ValueError):
                for pid, start in json.loads(Path(name).read_text())["processes"]:
                    if alive(pid) and start_ticks(pid) == start:
                        ours.add(pid)
        for path in self.folder.glob("**/*.pid"):
            if str(self.folder).encode() in cmdline(int(path.read_text())):  # still the process that wrote it
                ours.add(int(path.read_text()))
        for pid in ours:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for agent in self.agents:
            agent.close()
        for process in self.bystanders:
            process.wait(DEADLINE_S)


@contextlib.contextmanager
def occupied(
    port: int, *, reuse: bool = True, listen: bool = True, address: str = "0.0.0.0"
) -> Iterator[socket.socket]:
    """Hold a port in this process."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as s:
        if reuse:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((address, port))
        if listen:
            s.listen()
        yield s


def leave_time_wait(port: int) -> None:
    """Leave the remains of a connection at this local port."""
    with occupied(port) as s, socket.create_connection(("127.0.0.1", port)) as client:
        served, _ = s.accept()
        served.close()  # who closes first keeps TIME_WAIT
        assert client.recv(1) == b""
    wanted = f"0100007F:{port:04X} "
    until(
        lambda: any(wanted in line and " 06 " in line for line in Path("/proc/net/tcp").read_text().splitlines()),
        "TIME_WAIT",
    )


@functools.cache
def interpreters() -> list[str]:
    """Return one interpreter of each Python that the agent supports and this machine has, 3.9 first."""
    candidates = [*filter(None, [os.environ.get("ROLLOUT_PYTHON39")]), sys.executable]
    candidates += [*glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python"))]
    candidates += [path for minor in range(9, 16) if (path := shutil.which(f"python3.{minor}"))]
    found: dict[tuple[int, ...], str] = {}
    for path in candidates:
        code = "import sys; print(*sys.version_info[:2])"
        said = subprocess.run([path, "-IS", "-c", code], capture_output=True, text=True, check=False)
        if said.returncode == 0 and said.stdout:
            found.setdefault(tuple(map(int, said.stdout.split())), path)
    return [found[version] for version in sorted(found) if version >= (3, 9)]
