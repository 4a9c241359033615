"""What the fake controller knows: nodes, jobs, steps, faults."""

from __future__ import annotations

import os
import pwd
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slurm_rollout.core.hostlist import expand, fold

if TYPE_CHECKING:
    from slurm_rollout.testing.fake_slurm.controller import Client

NO_CONTACT = "Unable to contact slurm controller (connect failure)"
ENDED = frozenset({"CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT"})
SHORT = {
    "PENDING": "PD",
    "RUNNING": "R",
    "COMPLETING": "CG",
    "CANCELLED": "CA",
    "COMPLETED": "CD",
    "FAILED": "F",
    "NODE_FAIL": "NF",
    "TIMEOUT": "TO",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a command prints and how it ends."""

    out: str = ""
    err: str = ""
    code: int = 0
    script: str = ""  # a file that sbatch has to send first; "-" is its standard input

    def message(self) -> dict[str, Any]:
        return {"out": self.out, "err": self.err, "code": self.code, "script": self.script}


@dataclass(slots=True, kw_only=True)
class Faults:
    """Those that are on. Each field is set by the method of FakeSlurm that describes it."""

    unreachable_s: float | None = None
    slow: dict[str, float] = field(default_factory=dict)
    refuse: str = ""
    disabled: bool = False
    deaf_s: float = 0.0
    stuck_s: float = 0.0
    vanished: tuple[str, ...] = ()
    lying: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Node:
    """A name, and what is wrong with it."""

    name: str
    cut: bool = False
    dead: bool = False
    down: bool = False
    down_since: float = 0.0


@dataclass(slots=True, kw_only=True)
class Daemon:
    """A slurmstepd, as the controller sees it."""

    node: str
    pid: int
    control: socket.socket
    tasks: dict[int, int | None]  # task -> its wait status once it has ended
    # Our copy of its end of the connection to srun: a node that dies takes no leave, srun hears nothing.
    srun: socket.socket | None = None
    postponed: list[dict[str, object]] = field(default_factory=list)  # orders that a cut node did not get
    gone: bool = False


@dataclass(slots=True, kw_only=True)
class Step:
    """One step of a job; the batch script is one, too."""

    job: Job
    id: str  # "0", "batch"
    name: str
    nodes: tuple[str, ...]
    tasks: int
    cpus: dict[str, int]
    cpus_per_task: int = 0
    gpus: dict[str, tuple[int, ...]] = field(default_factory=dict)
    gres: str = ""
    overlap: bool = True
    distribution: str = "Cyclic"
    srun_pid: int = 0
    client: Client | None = None
    daemons: list[Daemon] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    cancelled: bool = False
    lied: bool = False

    @property
    def label(self) -> str:
        return f"{self.job.id}.{self.id}"

    @property
    def lives(self) -> bool:
        return any(not d.gone for d in self.daemons)


@dataclass(slots=True, kw_only=True)
class Job:
    """A batch job."""

    id: str
    name: str
    script: str
    argv: tuple[str, ...]
    options: dict[str, str]
    environ: dict[str, str]
    cwd: str
    umask: int
    command: str
    count: int  # nodes
    gpus: int  # per node
    cpus: int  # per node, as asked for
    exclusive: bool
    tasks_per_node: int = 1
    comment: str | None = None
    requeue: bool = True
    no_kill: bool = False
    time_limit_s: float | None = None
    state: str = "PENDING"
    reason: str = "None"
    final: str = ""  # the state after COMPLETING
    nodes: tuple[str, ...] = ()
    allocated: tuple[str, ...] = ()  # with the nodes that it lost
    cpus_of: dict[str, int] = field(default_factory=dict)
    gpus_of: dict[str, tuple[int, ...]] = field(default_factory=dict)
    restarts: int = 0
    submitted: float = field(default_factory=time.time)
    begin: float = 0.0  # not before
    started: float | None = None
    ended: float | None = None
    exit_status: int = 0
    steps: dict[str, Step] = field(default_factory=dict)
    pending: list[Client] = field(default_factory=list)
    next_step: int = 0

    @property
    def active(self) -> bool:
        return self.state in ("RUNNING", "COMPLETING")

    @property
    def output(self) -> str:
        return self._path(self.options.get("output", "slurm-%j.out"))

    @property
    def error(self) -> str:
        return self._path(self.options["error"]) if "error" in self.options else self.output

    def _path(self, pattern: str) -> str:
        host = self.nodes[0] if self.nodes else ""
        known = {"j": self.id, "x": self.name, "N": host, "u": self.environ.get("USER", ""), "a": "4294967294"}
        known |= {"A": self.id, "n": "0", "t": "0", "s": "4294967294", "%": "%"}
        name = fill(pattern, known)
        return name if name.startswith("/") else f"{self.options.get('chdir') or self.cwd}/{name}"


def user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's
        return str(os.getuid())


def fill(pattern: str, known: dict[str, str]) -> str:
    """Return a file name pattern with its letters replaced; `%4t` is padded with zeros."""
    text, rest = "", pattern
    while rest:
        head, percent, rest = rest.partition("%")
        text += head
        if not percent:
            break
        digits = len(rest) - len(rest.lstrip("0123456789"))
        width, letter = rest[:digits], rest[digits : digits + 1]
        if letter in known:
            text += known[letter].zfill(int(width or 0))
            rest = rest[digits + 1 :]
        else:
            text += "%"
    return text


def hostlist(text: str) -> tuple[str, ...]:
    """Return the names of a hostlist; none where it is no hostlist."""
    try:
        return expand(text)
    except ValueError:
        return ()


def ranged(names: tuple[str, ...]) -> str:
    return fold(names)


def counted(numbers: list[int]) -> str:
    """Return numbers as Slurm lists them, node by node: `16(x4),8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][0] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return ",".join(str(n) if times == 1 else f"{n}(x{times})" for n, times in runs)
