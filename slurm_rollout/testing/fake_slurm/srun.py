"""The fake srun: asks for a step, carries output and signals, and ends with its tasks' exit code.

Imported by a fake command: nothing here that is slow to load.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from typing import Any

from slurm_rollout.testing.fake_slurm import client, wire

# What Slurm forwards to the tasks, and what makes srun end the step (srun(1) and measured, 22.05.8).
FORWARDED = (signal.SIGUSR1, signal.SIGUSR2)
FATAL = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
HEARD = (*FORWARDED, *FATAL, signal.SIGINT, signal.SIGCONT, signal.SIGALRM)


class Srun:
    """One srun, from its request to its exit code."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.control = wire.connect(folder)
        self.lines = wire.Lines(self.control)
        self.poll = select.poll()
        self.daemons: dict[int, wire.Frames] = {}
        self.nodes: dict[int, str] = {}
        self.sockets: dict[int, socket.socket] = {}
        self.step = ""
        self.label = False
        self.out: dict[bytes, int] = {b"o": 1, b"e": 2}
        self.partial: dict[tuple[bytes, int], bytes] = {}
        self.tasks: set[int] = set()
        self.kill_on_bad_exit = self.killing = False
        self.quiet_kills = self.terminated = False
        self.forced = self.aborting = False
        self.code = 0
        self.signalled = 0
        self.interrupted_at = 0.0
        self.twin_pipe = -1
        self.done: int | None = None
        self.stdin = False

    def say(self, text: str) -> None:
        sys.stderr.write(f"srun: {text}\n")
        sys.stderr.flush()

    def run(self) -> int:
        wakeup, told = os.pipe()
        os.set_blocking(told, False)
        for heard in HEARD:
            signal.signal(heard, lambda *_: None)
        signal.set_wakeup_fd(told)
        self.poll.register(self.control, select.POLLIN)
        self.poll.register(wakeup, select.POLLIN)
        request: dict[str, Any] = {"program": "srun", "argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}
        request["umask"] = os.umask(0)
        os.umask(request["umask"])
        request["pid"] = os.getpid()
        self.control.sendall(wire.line(request))
        while self.done is None:
            for fd, _ in self.poll.poll():
                if fd == wakeup:
                    for number in os.read(wakeup, 64):
                        self._signalled(number)
                elif fd == self.control.fileno():
                    self._told()
                elif fd in self.daemons:
                    self._heard(fd)
                elif fd == 0:
                    self._read_stdin()
            if self.step and not self.daemons and self.done is None:
                self._finish()
        return self.done

    # ---------------------------------------------------------------------------------------------------- controller

    def _told(self) -> None:
        messages = self.lines.read()
        if messages is None:
            self.poll.unregister(self.control)
            if not self.step or self.done is None:
                self.say("error: fake_slurm: its controller has ended")
                self.done = 1
            return
        for message in messages:
            if "say" in message:
                sys.stderr.write(message["say"])
                sys.stderr.flush()
            if "print" in message:
                sys.stdout.write(message["print"])
            if "launch" in message:
                self._launch(message["launch"])
            for fd in [f for f, node in self.nodes.items() if node == message.get("drop") and f in self.daemons]:
                self._forget(fd)
            if message.get("abort"):
                self._abort()
            if "exit" in message:
                self.done = message["exit"]

    def _launch(self, launch: dict[str, Any]) -> None:
        self.step = launch["step"]
        self.label = launch["label"]
        self.kill_on_bad_exit = launch["kill_on_bad_exit"]
        for kind, path in ((b"o", launch["output"]), (b"e", launch["error"])):
            if path is not None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if launch["append"] else os.O_TRUNC)
                self.out[kind] = os.open(path, flags, 0o644)
        if launch["output"] is not None and launch["error"] is None:
            self.out[b"e"] = self.out[b"o"]
        for node, fd in zip(launch["nodes"], self.lines.fds, strict=True):
            connection = socket.socket(fileno=fd)
            self.daemons[fd], self.nodes[fd], self.sockets[fd] = wire.Frames(connection), node, connection
            self.poll.register(fd, select.POLLIN)
        self.tasks = set(range(launch["tasks"]))
        if launch["stdin"]:
            self.stdin = True
            self.poll.register(0, select.POLLIN)
        self._fork_twin()

    def _fork_twin(self) -> None:
        """As srun does: when this process is killed, its twin cancels the step (measured, 22.05.8: within 2 s)."""
        read, self.twin_pipe = os.pipe()
        if os.fork() == 0:
            os.close(self.twin_pipe)
            for fd in self.daemons:
                os.close(fd)
            self.control.close()
            # Whoever reads this srun's output must see its end when srun ends.
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            signal.set_wakeup_fd(-1)
            for number in HEARD:
                signal.signal(number, signal.SIG_IGN)
            if not os.read(read, 1):
                client.ask(self.folder, {"program": "twin", "step": self.step})
            os._exit(0)
        os.close(read)
        self._ask("launched")

    # --------------------------------------------------------------------------------------------------------- tasks

    def _heard(self, fd: int) -> None:
        frames = self.daemons[fd].read()
        if frames is None:
            self._forget(fd)
            return
        for kind, number, data in frames:
            if kind in self.out:
                self._write(kind, number, data)
            elif kind == b"m":  # the daemon's own words
                _write_all(self.out[b"e"], data)
            elif kind == b"x":
                self._exited(self.nodes[fd], **json.loads(data))
            elif kind == b"d":
                self._forget(fd)

    def _forget(self, fd: int) -> None:
        self.poll.unregister(fd)
        del self.daemons[fd]
        self.sockets.pop(fd).close()

    def _write(self, kind: bytes, task: int, data: bytes) -> None:
        if not self.label:
            _write_all(self.out[kind], data)
            return
        *complete, rest = (self.partial.pop((kind, task), b"") + data).split(b"\n")
        if rest and data:
            self.partial[kind, task] = rest
        elif rest:
            complete.append(rest)
        for text in complete:
            _write_all(self.out[kind], f"{task}: ".encode() + text + b"\n")

    def _exited(self, node: str, tasks: list[int], status: int) -> None:
        self.tasks.difference_update(tasks)
        who = _named(tasks)
        bad = True
        if os.WIFSIGNALED(status):
            number = signal.Signals(os.WTERMSIG(status))
            core = " (core dumped)" if os.WCOREDUMP(status) else ""
            if not self.quiet_kills:
                self.say(f"error: {node}: {who}: {signal.strsignal(number)}{core}")
            self.signalled = max(self.signalled, int(number))
            self.terminated |= number in (signal.SIGTERM, signal.SIGKILL)
        elif code := os.WEXITSTATUS(status):
            self.say(f"error: {node}: {who}: Exited with exit code {code}")
            self.code = max(self.code, code)
        else:
            bad = False
        if bad and self.kill_on_bad_exit and not self.killing:
            self.killing = True
            self._ask("kill_on_bad_exit")

    def _finish(self) -> None:
        for kind, task in list(self.partial):
            self._write(kind, task, b"")
        if self.terminated and not self.forced:
            self.say(f"Force Terminated StepId={self.step}")
        self.done = 128 + self.signalled if self.signalled else self.code

    def _read_stdin(self) -> None:
        try:
            data = os.read(0, 1 << 16)
        except OSError:  # srun was started without one
            data = b""
        if not data:
            self.poll.unregister(0)
        for connection in self.sockets.values():
            try:
                connection.sendall(wire.frame(b"i", 0, data))
            except OSError:
                continue  # it has just ended

    # ------------------------------------------------------------------------------------------------------- signals

    def _signalled(self, number: int) -> None:
        if not self.step:
            if number in FATAL or number == signal.SIGINT:
                if number == signal.SIGQUIT:
                    self.say("Quit")
                self._ask("give_up", signal=number)
        elif number in FATAL:
            if number == signal.SIGQUIT:
                self.say("Quit")
            self._force()
        elif number == signal.SIGINT:
            self._interrupted()
        elif number == signal.SIGCONT:
            self.say("got SIGCONT")
        elif number in FORWARDED:
            self._forward(number)

    def _interrupted(self) -> None:
        now = _monotonic()
        if now - self.interrupted_at > 1:
            self.interrupted_at = now
            self.say("interrupt (one more within 1 sec to abort)")
            if self.tasks:
                self.say(f"StepId={self.step} {_named(sorted(self.tasks))}: running")
            return
        self.quiet_kills = True
        self.say(f"sending Ctrl-C to StepId={self.step}")
        self._forward(signal.SIGINT)
        # They hear it a moment before they are killed.
        self._force(after_s=0.05)

    def _force(self, after_s: float = 0.0) -> None:
        self.forced = True
        self.say("forcing job termination")
        self._ask("force", after_s=after_s)
        self._abort()

    def _abort(self) -> None:
        self.forced = True
        if not self.aborting:
            self.aborting = True
            self._ask("aborting")

    def _forward(self, number: int) -> None:
        for connection in self.sockets.values():
            try:
                connection.sendall(wire.frame(b"s", number))
            except OSError:
                continue  # it has just ended

    def _ask(self, what: str, **more: Any) -> None:
        try:
            self.control.sendall(wire.line({"ask": what, **more}))
        except OSError:
            self.done = 1

    def close(self) -> None:
        if self.twin_pipe != -1:
            os.write(self.twin_pipe, b".")


def _write_all(fd: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BrokenPipeError:
            return


def _monotonic() -> float:
    return os.times().elapsed


def _named(numbers: list[int]) -> str:
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    ranges = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in found)
    return f"task{'s' if len(numbers) > 1 else ''} {ranges}"


def main(folder: str) -> int:
    """Run srun; return its exit code."""
    try:
        srun = Srun(folder)
    except OSError as e:
        sys.stderr.write(f"srun: error: fake_slurm: its controller has ended ({e.strerror})\n")
        return 1
    code = srun.run()
    srun.close()
    return code
