"""The fake's one daemon: slurmctld, and the slurmd of every node. It ends, with all that it started, with its owner.

Single-threaded: one loop over sockets, timers and children. It forks the daemon of each step itself, so that a start
takes no interpreter's start, and is the subreaper of everything: what a test leaves behind is found by its parents.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import random
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurm_rollout import proc
from slurm_rollout.testing.fake_slurm import faults, jobs, launch, options, show, stepd, steps, tables, wire
from slurm_rollout.testing.fake_slurm.model import Daemon, Faults, Job, Node, Reply, Step


@contextlib.contextmanager
def time_zone(name: str | None) -> Iterator[None]:
    """Tell times as the command that asks would: in its own zone, None being the system's."""
    ours = os.environ.get("TZ")
    _set_time_zone(name)
    try:
        yield
    finally:
        _set_time_zone(ours)


def _set_time_zone(name: str | None) -> None:
    if name is None:
        os.environ.pop("TZ", None)
    else:
        os.environ["TZ"] = name
    time.tzset()


@dataclass(eq=False, slots=True)
class Client:
    """A command that waits for its answer; srun stays until its step has ended."""

    connection: socket.socket
    lines: wire.Lines
    request: dict[str, Any] = field(default_factory=dict)
    step: Step | None = None
    retries: int = 0
    has_twin: bool = False

    def send(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        with contextlib.suppress(OSError):  # it was killed
            if fds:
                socket.send_fds(self.connection, [wire.line(message)], fds)
            else:
                self.connection.sendall(wire.line(message))


class Controller:
    """The state of the cluster, and the loop."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.gpus: int = config["gpus"]
        self.cpus: int = config["cpus"]
        self.whole_tree: bool = config["proctrack"] == "linuxproc"
        self.kill_wait_s: float = config["kill_wait_s"]
        self.host = os.uname().nodename.partition(".")[0]
        self.nodes = {name: Node(name=name) for name in config["nodes"]}
        self.jobs: dict[str, Job] = {}
        # Not 1: job ids tell runs of one host apart, and clusters side by side share this one.
        self.next_job = random.randrange(1_000, 10_000_000)
        self.faults = Faults()
        self.poll = select.poll()
        self.readers: dict[int, Callable[[], None]] = {}
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.serial = itertools.count()
        self.daemons: dict[int, tuple[Step, Daemon]] = {}  # pid -> whose
        self.sruns: dict[int, int] = {}  # pid -> start time
        self.ending = False

    # ---------------------------------------------------------------------------------------------------------- loop

    def serve(self, listener: socket.socket, owner: int) -> None:
        """Serve until the owner's end of the pipe is closed, then end everything."""
        wakeup, told = os.pipe()
        os.set_blocking(told, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._owner_ended)
        signal.set_wakeup_fd(told)
        self.watch(owner, self._owner_ended)
        self.watch(wakeup, lambda: self._reap(wakeup))
        self.watch(listener.fileno(), lambda: self._accept(listener))
        while not self.ending:
            for fd, _ in self.poll.poll(self._patience_ms()):
                if fd in self.readers:
                    self.readers[fd]()
            while self.timers and self.timers[0][0] <= time.monotonic():
                heapq.heappop(self.timers)[2]()
        self.end_everything()

    def watch(self, fd: int, do: Callable[[], None]) -> None:
        self.readers[fd] = do
        self.poll.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        if self.readers.pop(fd, None):
            self.poll.unregister(fd)

    def after(self, delay_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.timers, (time.monotonic() + delay_s, next(self.serial), do))

    def _patience_ms(self) -> float | None:
        return max(0.0, (self.timers[0][0] - time.monotonic()) * 1000 + 1) if self.timers else None

    def _owner_ended(self, *_: object) -> None:
        self.ending = True

    def end_everything(self) -> None:
        """SIGKILL all that this fake ever started: its own tree, and the sruns that others started."""
        for pid, started in self.sruns.items():
            if proc.lives(pid, started):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        stepd.kill_tree(os.getpid())

    # ------------------------------------------------------------------------------------------------------ requests

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        client = Client(connection, wire.Lines(connection))
        self.watch(connection.fileno(), lambda: self._read(client))

    def _read(self, client: Client) -> None:
        messages = client.lines.read()
        if messages is None:
            self._lost(client)
            return
        for message in messages:
            if "program" in message:
                client.request = message
                self._delayed(client)
            else:
                launch.asked(self, client, message)

    def _lost(self, client: Client) -> None:
        self.unwatch(client.connection.fileno())
        client.connection.close()
        for job in self.jobs.values():
            if client in job.pending:
                job.pending.remove(client)
        if client.step and not client.has_twin:
            launch.cancel(self, client.step)  # killed too early for anybody else to do it

    def _delayed(self, client: Client) -> None:
        program = client.request["program"]
        if program == "owner":
            client.send(faults.owner(self, client.request))
            return
        if program == "srun":
            found = proc.read(client.request["pid"])
            if found:
                self.sruns[found.pid] = found.started
        delay_s = self.faults.slow.get(program, 0.0)
        if delay_s:
            self.after(delay_s, lambda: self._guarded(client))
        else:
            self._guarded(client)

    def _guarded(self, client: Client) -> None:
        """Answer, and let no mistake of ours end the whole cluster."""
        try:
            self._reached(client)
        except Exception:
            why = f"fake_slurm: {client.request['argv']} met a mistake of the fake:\n{traceback.format_exc()}"
            client.send({"say": why, "exit": 1, "err": why, "code": 1})

    def _reached(self, client: Client) -> None:
        """Answer, or not: a controller that is away is seen only after the command's patience."""
        request = client.request
        patience_s = self.faults.unreachable_s
        if request["program"] == "srun":
            steps.requested(self, client)
        elif patience_s is not None and faults.needs_controller(request):
            self.after(patience_s, lambda: client.send(faults.unreachable(request).message()))
        else:
            client.send(self._answer(request).message())

    def _answer(self, request: dict[str, Any]) -> Reply:
        program = request["program"]
        if program == "twin":
            if step := self.step(request["step"]):
                # What its twin is told is too late for srun.
                self.after(self.config["twin_s"], lambda: launch.cancel(self, step))
            return Reply()
        try:
            with time_zone(request["env"].get("TZ")):
                return COMMANDS[program](self, request)
        except options.BadOption as e:
            return Reply(err=f"{e}\n", code=e.code)

    def step(self, label: str) -> Step | None:
        job, _, step = label.partition(".")
        return self.jobs[job].steps.get(step) if job in self.jobs else None

    # ------------------------------------------------------------------------------------------------------- daemons

    def spawn(self, step: Step, what: stepd.Launch, *, with_srun: bool) -> socket.socket | None:
        """Start the daemon of a step on one node; return srun's end of the connection to it."""
        ours, its = socket.socketpair()
        sruns, to_srun = socket.socketpair() if with_srun else (None, None)
        pid = os.fork()
        if pid == 0:
            stepd.run(what, its, to_srun)
        its.close()
        daemon = Daemon(node=what.node, pid=pid, control=ours, tasks=dict.fromkeys(what.environs), srun=to_srun)
        step.daemons.append(daemon)
        self.daemons[pid] = (step, daemon)
        lines = wire.Lines(ours)
        self.watch(ours.fileno(), lambda: self._reported(step, daemon, lines))
        return sruns

    def order(self, daemon: Daemon, **order: object) -> None:
        """Tell a daemon something; one on a cut node hears it when that is back."""
        if self.nodes[daemon.node].cut:
            daemon.postponed.append(order)
            return
        with contextlib.suppress(OSError):  # it has ended
            daemon.control.sendall(wire.line(order))

    def _reported(self, step: Step, daemon: Daemon, lines: wire.Lines) -> None:
        messages = lines.read()
        if messages is None:
            self.unwatch(daemon.control.fileno())
            return
        for message in messages:
            if "ended" in message:
                daemon.tasks |= dict.fromkeys(message["ended"], message["status"])

    def _reap(self, wakeup: int) -> None:
        os.read(wakeup, 512)
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                if pid in self.daemons:
                    step, daemon = self.daemons.pop(pid)
                    self._daemon_ended(step, daemon)

    def _daemon_ended(self, step: Step, daemon: Daemon) -> None:
        # Its last words may still wait to be read.
        if daemon.control.fileno() in self.readers:
            self.readers[daemon.control.fileno()]()
            self.unwatch(daemon.control.fileno())
        daemon.control.close()
        if self.nodes[daemon.node].dead:
            return  # nobody is there to tell: the controller finds out for itself
        self.drop(step, daemon)

    def drop(self, step: Step, daemon: Daemon) -> None:
        """The step has ended on that node, or Slurm gave up waiting for it."""
        if daemon.srun:
            daemon.srun.close()
            daemon.srun = None
        if not daemon.gone:
            daemon.gone = True
            if not step.lives:
                jobs.step_ended(self, step)

    def now(self) -> float:
        return time.time()

    def processes(self) -> list[int]:
        """Return the pids of what runs on the cluster for its user: scripts, tasks, sruns."""
        daemons = set(self.daemons)
        below = {p.pid for p in proc.descendants(os.getpid())} - daemons
        sruns = {pid for pid, started in self.sruns.items() if proc.lives(pid, started)}
        return sorted(below | sruns)


COMMANDS: dict[str, Callable[[Controller, dict[str, Any]], Reply]] = {
    "sbatch": jobs.sbatch,
    "scancel": jobs.scancel,
    "scontrol": show.scontrol,
    "squeue": tables.squeue,
    "sinfo": tables.sinfo,
}


def main() -> None:
    """Run the controller: the configuration is the first line of standard input, which then stays open."""
    import json

    buffer = b""
    while not buffer.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit(1)
        buffer += byte
    config = json.loads(buffer)
    Path("/proc/self/comm").write_text("slurmctld")
    proc.become_subreaper()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    folder = os.open(config["folder"], os.O_RDONLY | os.O_DIRECTORY)
    listener = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(wire.SOCKET, dir_fd=folder)
    listener.bind(wire.address(folder))
    listener.listen(512)
    os.write(1, b"up\n")
    Controller(config).serve(listener, 0)
