"""The daemon of one step on one node, as slurmstepd: a child of the controller, parent of the tasks, no kin of srun.

It is a subreaper, so that also what daemonises stays in its step and ends with it, as with proctrack/cgroup. A signal
goes to the tasks alone, or, as with proctrack/linuxproc, to all of the step's processes (both measured, 22.05.8).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from slurm_rollout import proc
from slurm_rollout.testing.fake_slurm import wire

BACKLOG = 1 << 18
"""Bytes that wait for a slow srun before the tasks have to wait, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to run on the node."""

    node: str
    batch: bool
    argv: tuple[str, ...]
    cwd: str
    umask: int
    environs: dict[int, dict[str, str]]  # of each task
    stdin: bool  # whether srun sends some
    outputs: dict[int, str] = field(default_factory=dict)  # of each task, where it is not srun that writes
    errors: dict[int, str] = field(default_factory=dict)
    append: bool = False
    stuck_s: float = 0.0
    whole_tree: bool = False  # whether a signal goes to every process of the step


def kill_tree(root: int) -> None:
    """SIGKILL everything below a subreaper, until there is nothing."""
    while below := proc.descendants(root):
        for process in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        if root == os.getpid():
            _reap_all()
        time.sleep(0.001)


def _reap_all() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def become(comm: str, keep: set[int]) -> None:
    """Make a forked controller a daemon of its own: its own session and name, and none of the controller's files."""
    os.setsid()
    Path("/proc/self/comm").write_text(comm)
    signal.set_wakeup_fd(-1)
    # Also those that the owner's owner ignores, under nohup for example.
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if number < signal.SIGRTMIN:
            signal.signal(number, signal.SIG_DFL)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(name))


def run(launch: Launch, control: socket.socket, srun: socket.socket | None) -> NoReturn:
    """Run the tasks to their end; never return into the controller's code."""
    code = 1
    try:
        become("slurmstepd", {control.fileno(), *([srun.fileno()] if srun else [])})
        proc.become_subreaper()
        Daemon(launch, control, srun).run()
        code = 0
    finally:
        os._exit(code)


class Daemon:
    """One slurmstepd."""

    def __init__(self, launch: Launch, control: socket.socket, srun: socket.socket | None) -> None:
        self.launch = launch
        self.control = control
        self.orders = wire.Lines(control)
        self.srun = srun
        self.frames = wire.Frames(srun) if srun else None
        self.backlog = bytearray()
        self.pids: dict[int, int] = {}  # of the tasks that run, to their numbers
        self.pipes: dict[int, tuple[bytes, int]] = {}  # descriptor -> which stream of which task
        self.inputs: dict[int, bytearray] = {}  # descriptor -> what the task has not taken yet
        self.input_ended = False
        self.cut = False
        self.stuck_s = launch.stuck_s  # how long the step's end takes, once its tasks have ended
        self.held: list[tuple[int, int]] = []  # (task, status) that are not told before

    def run(self) -> None:
        wakeup, told = os.pipe()
        os.set_blocking(told, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(told)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        if self.srun:
            self.srun.setblocking(False)
        for task in self.launch.environs:
            self._start(task)
        self._report({"pids": list(self.pids)})
        while self.pids:
            for fd, event in self._wait(wakeup):
                if fd == wakeup:
                    os.read(wakeup, 64)
                    self._reap()
                elif fd == self.control.fileno():
                    self._ordered()
                elif self.srun and fd == self.srun.fileno():
                    self._srun_event(event)
                elif fd in self.pipes:
                    self._pump(fd)
                elif fd in self.inputs:
                    self._feed(fd)
        kill_tree(os.getpid())
        while self.pipes:
            for fd in list(self.pipes):
                self._pump(fd)
        ended = time.monotonic()
        # Cut off, the last words wait for the controller's word that the node is back.
        while self.cut or (left_s := ended + self.stuck_s - time.monotonic()) > 0:
            if select.select([self.control], [], [], None if self.cut else left_s)[0]:
                self._ordered()
        self._tell_ends()
        self._send(b"d", 0)
        if self.srun:
            self.srun.setblocking(True)
            self._flush()

    # --------------------------------------------------------------------------------------------------------- tasks

    def _start(self, task: int) -> None:
        launch = self.launch
        out_read, out_write = self._output(task, launch.outputs)
        same = launch.errors.get(task) is not None and launch.errors.get(task) == launch.outputs.get(task)
        err_read, err_write = (-1, os.dup(out_write)) if same else self._output(task, launch.errors)
        in_read, in_write = os.pipe() if launch.stdin else (os.open(os.devnull, os.O_RDONLY), -1)
        failed_read, failed_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for source, target in ((in_read, 0), (out_write, 1), (err_write, 2)):
                    os.dup2(source, target)
                self._become_task(task)
            except OSError as e:
                os.write(failed_write, json.dumps([e.errno, e.strerror, e.filename]).encode())
                os._exit(e.errno or 1)
            finally:
                os._exit(1)
        for fd in (in_read, out_write, err_write, failed_write):
            os.close(fd)
        failure = os.read(failed_read, 4096)
        os.close(failed_read)
        if failure:
            _, words, _ = json.loads(failure)
            self._say(f"slurmstepd-{launch.node}: error: execve(): {launch.argv[0]}: {words}\n")
        self.pids[pid] = task
        for fd, kind in ((out_read, b"o"), (err_read, b"e")):
            if fd != -1:
                os.set_blocking(fd, False)
                self.pipes[fd] = (kind, task)
        if in_write != -1:
            os.set_blocking(in_write, False)
            self.inputs[in_write] = bytearray()

    def _output(self, task: int, paths: dict[int, str]) -> tuple[int, int]:
        if task not in paths:
            return os.pipe()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if self.launch.append else os.O_TRUNC)
        return -1, os.open(paths[task], flags, 0o666)

    def _become_task(self, task: int) -> NoReturn:
        launch = self.launch
        os.setpgid(0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.umask(launch.umask)
        with contextlib.suppress(OSError):
            os.chdir(launch.cwd)
        environ = launch.environs[task] | {"SLURM_TASK_PID": str(os.getpid())}
        os.execve(launch.argv[0], launch.argv, environ)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = found
                task = self.pids.pop(pid, None)
                if task is None:
                    continue  # an orphan of the step
                for fd, (_, owner) in list(self.pipes.items()):
                    if owner == task:
                        self._pump(fd)
                self.held.append((task, status))
        if not self.stuck_s:
            self._tell_ends()

    def _tell_ends(self) -> None:
        for status in dict.fromkeys(status for _, status in self.held):
            tasks = [task for task, theirs in self.held if theirs == status]
            self._send(b"x", 0, json.dumps({"tasks": tasks, "status": status}).encode())
            self._report({"ended": tasks, "status": status})
        self.held.clear()

    # --------------------------------------------------------------------------------------------------------- loop

    def _wait(self, wakeup: int) -> list[tuple[int, int]]:
        poll = select.poll()
        poll.register(wakeup, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        if self.srun and not self.cut:
            poll.register(self.srun, select.POLLIN | (select.POLLOUT if self.backlog else 0))
        if len(self.backlog) < BACKLOG:
            for fd in self.pipes:
                poll.register(fd, select.POLLIN)
        for fd, waiting in self.inputs.items():
            if waiting:
                poll.register(fd, select.POLLOUT)
        return poll.poll()

    def _pump(self, fd: int) -> None:
        """Take what a task wrote."""
        kind, task = self.pipes[fd]
        while True:
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                os.close(fd)
                del self.pipes[fd]
                return
            self._send(kind, task, data)
            if len(self.backlog) >= BACKLOG and self.pids:
                return

    def _send(self, kind: bytes, number: int, data: bytes = b"") -> None:
        if self.srun:
            self.backlog += wire.frame(kind, number, data)
            self._flush()

    def _flush(self) -> None:
        while self.srun and self.backlog and not self.cut:
            try:
                sent = self.srun.send(self.backlog)
            except BlockingIOError:
                return
            except OSError:
                self._lose_srun()
                return
            del self.backlog[:sent]

    def _lose_srun(self) -> None:
        """srun and its twin are gone: the tasks go on, their output is lost (measured, 22.05.8)."""
        if self.srun:
            self.srun.close()
        self.srun = None
        self.backlog.clear()

    def _srun_event(self, event: int) -> None:
        if self.cut:
            return  # by an order that came in the same moment
        if event & select.POLLOUT:
            self._flush()
        if not self.frames or not event & ~select.POLLOUT:
            return
        frames = self.frames.read()
        if frames is None:
            self._lose_srun()
            return
        for kind, number, data in frames:
            if kind == b"s":
                self._signal(number)
            elif kind == b"i":
                self._input(data)

    def _input(self, data: bytes) -> None:
        self.input_ended |= not data
        for fd in list(self.inputs):
            self.inputs[fd] += data
            self._feed(fd)

    def _feed(self, fd: int) -> None:
        waiting = self.inputs[fd]
        try:
            while waiting:
                del waiting[: os.write(fd, waiting)]
        except BlockingIOError:
            return
        except OSError:  # the task takes no more
            waiting.clear()
        if self.input_ended:
            os.close(fd)
            del self.inputs[fd]

    def _ordered(self) -> None:
        orders = self.orders.read()
        if orders is None:
            # The controller is gone, and with it everything.
            kill_tree(os.getpid())
            os._exit(1)
        for order in orders:
            if "cut" in order:
                self._cut(cut=order["cut"])
            if "stuck_s" in order:
                self.stuck_s = order["stuck_s"]
            if "say" in order:
                self._say(order["say"])
            if "signal" in order:
                self._signal(order["signal"])

    def _cut(self, *, cut: bool) -> None:
        if self.frames and self.cut and not cut:
            # What was sent to it meanwhile got lost on the way.
            with contextlib.suppress(BlockingIOError):
                while self.frames.read():
                    pass
        self.cut = cut
        self._flush()

    def _say(self, text: str) -> None:
        if self.launch.batch:
            with open(self.launch.errors[0], "a", encoding="utf-8") as f:
                f.write(text)
        else:
            self._send(b"m", 0, text.encode())

    def _signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            # Each of them, and what they fork meanwhile; the tasks are reaped by the loop, which needs their statuses.
            while below := [p for p in proc.descendants(os.getpid()) if p.state not in "ZX"]:
                for process in below:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                time.sleep(0.001)
            return
        pids = [p.pid for p in proc.descendants(os.getpid())] if self.launch.whole_tree else list(self.pids)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _report(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.control.sendall(wire.line(message))
