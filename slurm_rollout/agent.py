#!/usr/bin/env python3
"""slurm-rollout-agent: the command of every step of a slurm-rollout run. Nobody starts it by hand.

It gets its orders in the environment variable ROLLOUT_STEP (JSON), proves that nothing of an older incarnation of its
group is left on this node (the fence), waits for the signal to go, starts its engines, watches them, and ends with its
whole process tree dead. What it finds out goes to standard output, one JSON object a line. What an engine prints goes
to that engine's log. docs/agent-protocol.md describes all of it.

Signals: USR2 go, later: write down what the engines' processes are doing; USR1, TERM, INT, HUP, QUIT stop.
Exit status: 0 stopped or swept as asked, 80 an engine ended by itself, 81 a port is busy, 82 a leftover process could
not be ended, 83 GPU memory is not back, 84 an equal or newer incarnation is here, 85 an engine could not be started,
86 bad orders or an unusable node, 87 the coordinator was silent for too long and the engines were ended for it.

One file, standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import errno
import json
import math
import os
import select
import signal
import socket
import stat
import sys
import time
from collections import Counter  # json needs it anyway

# Every import delays every recovery: what only some steps need is imported where it is needed, `typing` not at all.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any

    Origin = tuple[str, int]  # group and incarnation
    Evidence = tuple[Origin, str]  # whose it is, and what gave the process away
    Look = tuple[float, "Process", dict[str, str]]  # when, what, thread -> state and wait channel

STATUS = {
    "stopped": 0,
    "swept": 0,
    "engine_exited": 80,
    "port_busy": 81,
    "leftover_process": 82,
    "gpu_memory": 83,
    "other_incarnation": 84,
    "exec_failed": 85,
    "bad_config": 86,
    "self_fenced": 87,
}
FENCE_CAUSES = ("leftover_process", "port_busy", "gpu_memory")  # where several last to the deadline: the first decides
STOP_SIGNALS = {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
GO_SIGNAL = signal.SIGUSR2
GPU_MASKS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")

FORGET_AFTER_S = 30 * 86400.0  # no start is late by so much: the claims of a run without a process mean nothing then
REPORT_TIMEOUT_S = 1.0  # a reader that is stopped must not stop the agent
QUIET_FENCE_S = 0.2  # what is over sooner than this is not worth a report
TOGETHER_S = 0.1  # within this, a signal that Slurm sends to the whole step reaches the agent after its engine
SMI_PERIOD_S = 0.5
SMI_SILENT_S = 5.0  # from then on nvidia-smi counts as hanging
COUNTER_TIMEOUT_S = 10.0
LOOK_AT_ALL_S = 2.0  # a look at all processes costs 1 ms for 100 of this user's, a tenth of that for others'
PAUSE_LOOK_S = 1.0  # how often the barrier is asked whether the engines sleep
HEARTBEAT_LOOK_S = 1.0  # and how often whether the coordinator lives
HANGS_S = 1.0  # a read of the barrier that takes longer
AWAKE_SHARE = 0.25  # of the silence that ends the engines: so long the agent itself must have run before it ends them
MAX_BODY_BYTES = 8 << 20
LAST_LINES = 20
LAST_LINES_BYTES = 4096
FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
FULL_WORDS = ("no space left on device", "disk quota exceeded", "[errno 28]", "[errno 122]")
FULL_BYTES = 1 << 20  # a file system with less than this is full
DISK_LOOK_S = 0.5  # a file server that hangs must not delay a recovery
KMSG_LOOK_S = 0.05

# Where the GPU, the link or the driver's firmware broke, and no engine did wrong (NVIDIA's Xid catalogue,
# docs.nvidia.com/deploy/xid-errors). Not 63: a row waits to be remapped, and the GPU can be used until then. Not 13, 31
# or 43: these are the engine's own doing.
BROKEN_XIDS = {
    48: "a double-bit memory error",
    64: "a memory row could not be remapped",
    74: "an NVLink error",
    79: "the GPU has fallen off the bus",
    94: "an uncorrectable memory error, contained",
    95: "an uncorrectable memory error, uncontained",
    119: "the GPU's firmware (GSP) does not answer",
    120: "an error of the GPU's firmware (GSP)",
}
BROKEN_WORDS = ("fallen off the bus", "uncorrectable ecc error", "gpu is lost", "uncorrectable nvlink error")
SMI_LOST = {15: "a GPU is lost", 16: "a GPU needs a reset"}  # NVML's codes, with which nvidia-smi exits

GO_AGAIN_S = 2.0  # a coordinator that missed `started` repeats its go: within this, USR2 asks for no snapshot
LOOKS_APART_S = 0.2  # two looks tell what spins from what sleeps
ANSWER_SHARE = 0.8  # of a snapshot's time; the rest is for writing it
MAX_THREADS = 200
MAX_SOCKETS = 100
MAX_STACKS = 4
MAX_ANSWER_BYTES = 256 << 10
SMI_QUESTIONS = ("--query-gpu=index,uuid,utilization.gpu,memory.used", "--query-compute-apps=pid,used_memory")
LISTEN, TIME_WAIT = 10, 6  # states of TCP, as the kernel numbers them
SOCK_DIAG, SOCK_DIAG_DUMP = 4, (20, 0x301)  # netlink's number; SOCK_DIAG_BY_FAMILY with NLM_F_REQUEST | NLM_F_DUMP
NLMSG_ERROR, NLMSG_DONE = 2, 3
TCP_STATES = "? ESTABLISHED SYN_SENT SYN_RECV FIN_WAIT1 FIN_WAIT2 TIME_WAIT CLOSE CLOSE_WAIT LAST_ACK LISTEN CLOSING"

# A loopback address that no connection uses: only sockets that are bound to every address are in its way.
ODD_LOOPBACK = "127.83.108.114"


class End(Exception):
    """Why the agent ends. Its tree is killed before the exit record is written, wherever this was raised."""

    def __init__(self, cause: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.cause = cause
        self.record = {"cause": cause, "message": message, **details}
        self.kernel: KernelLog | None = None


class Reports:
    """What the agent says, one JSON object a line on standard output."""

    def __init__(self) -> None:
        self._kept = b""

    def keep(self, kind: str, **details: Any) -> None:
        """Report this together with what comes next, or with `send`.

        Slurm carries it over TCP without TCP_NODELAY: the second of two small pieces arrives 40 ms late (Nagle's
        algorithm and the delayed ACK; seen with 22.05).
        """
        self._kept += (json.dumps({"report": kind, **details}) + "\n").encode()

    def say(self, kind: str, **details: Any) -> None:
        """Report this now."""
        self.keep(kind, **details)
        self.send()

    def send(self) -> None:
        """Write what was kept. Nobody reading any more (srun is gone), or not now, does not change the agent's duty."""
        text, self._kept = self._kept, b""
        try:
            if text and select.select([], [1], [], REPORT_TIMEOUT_S)[1]:
                while text:
                    text = text[os.write(1, text) :]
        except (OSError, ValueError):
            return


reports = Reports()


# -------------------------------------------------------------------------------------------------------------- orders


class Member:
    """One engine process."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self.rank: int = orders["rank"]
        self.gpus: list[int] = orders["gpus"]
        self.argv: list[str] = orders["argv"]
        self.env: dict[str, str] = orders["env"]
        self.port: int = orders["port"]
        self.ports: list[int] = orders["ports"]
        self.entrypoint: bool = orders["entrypoint"]
        self.log: str = orders["log"]
        self.snapshot: str = orders["snapshot"]


class Step:
    """What ROLLOUT_STEP orders."""

    def __init__(self, orders: dict[str, Any]) -> None:
        if orders["version"] != 2 or orders["mode"] not in ("serve", "sweep"):
            raise ValueError("version must be 1, mode serve or sweep: agent and coordinator are of different releases")
        self.mode: str = orders["mode"]
        self.run_id: str = orders["run_id"]
        self.group: str = orders["group"]
        self.incarnation: int = orders["incarnation"]
        self.node: str = orders["node"]
        self.folder = self.folder_of(self.group)
        self.mark = f"{self.run_id}/{self.group}/{self.incarnation}/{self.node}"
        self.members = [Member(member) for member in orders["members"]]
        self.setup: list[str] = orders["setup"]
        self.fence_timeout_s: float = orders["fence"]["timeout_s"]
        self.gpu_memory_mb: int = orders["fence"]["gpu_memory_mb"]
        self.unshared_gpus: bool = orders["fence"]["unshared_gpus"]
        self.self_fence_s: float = orders["fence"]["self_fence_s"]
        self.barrier: str = orders["fence"]["barrier"]
        self.absent: dict[str, int] = orders["fence"]["absent"]
        self.grace_s: float = orders["stop"]["grace_s"]
        self.snapshot_s: float = orders["stop"]["snapshot_s"]
        self.probe: dict[str, Any] | None = orders["probe"]
        self.log_max_bytes: int = orders["log"]["max_bytes"]
        self.state_dir: str = orders.get("state_dir") or f"/tmp/slurm-rollout-{os.getuid()}"
        self.slurm_step = slurm_step()
        newest_old = self.incarnation if self.mode == "sweep" else self.incarnation - 1
        self.newest_old = {**self.absent, self.group: newest_old}  # by group; what is newer must live

    def folder_of(self, group: str) -> list[str]:
        """Return the way to a group's directory. Raises ValueError."""
        folder = [self.run_id, self.node, group.replace("/", "~")]
        if any(not name.strip(".") or "/" in name or "\0" in name for name in folder):
            raise ValueError("run_id, group and node must be usable in file names")
        return folder


def read_orders() -> Step:
    """Take ROLLOUT_STEP out of the environment, so that no engine inherits it. Raises `End` where it makes no sense."""
    text = os.environ.pop("ROLLOUT_STEP", "")
    if not text:
        raise End("bad_config", "ROLLOUT_STEP is not set: slurm-rollout starts this, nobody by hand; see --help")
    try:
        return Step(json.loads(text))
    except KeyError as error:
        raise End("bad_config", f"ROLLOUT_STEP lacks {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise End("bad_config", f"ROLLOUT_STEP: {error}") from None


def slurm_step() -> dict[str, str]:
    """Return which Slurm step this is. After a requeue (21.08 on) step numbers begin anew: hence the restart count."""
    environ = os.environ
    job = environ.get("SLURM_JOB_ID", "")
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    if not (job and step.isdigit()):  # 26.05: a batch script has -5
        return {}
    return {"job": job, "step": step, "restart": environ.get("SLURM_RESTART_COUNT", "0")}


# ------------------------------------------------------------------------------------------------------------- signals


class Inbox:
    """The signals that came and the children that ended.

    Signals are blocked and taken by sigwaitinfo, so that none is lost or comes at a bad moment, whenever it is sent.
    Time-outs are a timer's signal: where the process was stopped and continued (`scontrol suspend`) and the time has
    passed meanwhile, Python's sigtimedwait returns a signal that never came (seen with 3.11).
    """

    def __init__(self) -> None:
        self.go = False
        self.stop = ""  # name of the signal
        self.exits: dict[int, int] = {}  # pid -> wait status, in the order in which they were reaped
        self.childless = False
        self._heed_stop = True
        # Ignored signals are inherited over exec, and children of a process that ignores SIGCHLD reap themselves.
        self._wanted = {*STOP_SIGNALS, GO_SIGNAL, signal.SIGCHLD, signal.SIGALRM}
        for number in self._wanted:
            signal.signal(number, signal.SIG_DFL)
        self.original_mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._wanted)

    def wait(self, timeout_s: float | None) -> None:
        """Wait for a signal or a child's end, at most `timeout_s`. Raises `End` at the first stop."""
        if timeout_s is None or timeout_s > 0:
            if timeout_s is not None:
                signal.setitimer(signal.ITIMER_REAL, max(timeout_s, 0.0001))  # 0 would be no timer
            self._take(signal.sigwaitinfo(self._wanted).si_signo)
            signal.setitimer(signal.ITIMER_REAL, 0)
        while True:
            info = signal.sigtimedwait(self._wanted, 0)
            if info is None:
                break
            self._take(info.si_signo)
        self._reap()
        if self.stop and self._heed_stop:
            self._heed_stop = False
            raise End("stopped", f"stopped by {self.stop}")

    def ignore_stop(self) -> None:
        """From now on the agent is ending anyway."""
        self._heed_stop = False

    def _take(self, number: int) -> None:
        if number == GO_SIGNAL:
            self.go = True
        elif number in STOP_SIGNALS:
            self.stop = self.stop or signal.Signals(number).name

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.childless = True
                return
            if pid == 0:
                self.childless = False
                return
            self.exits[pid] = status


# ----------------------------------------------------------------------------------------------------------- processes


class Process:
    """One process, as /proc/PID/stat has it; told from a later one with the same pid by its start time."""

    __slots__ = ("dead", "fields", "name", "parent", "pid", "start")

    def __init__(self, pid: int, text: bytes) -> None:
        after = text.rindex(b")")
        fields = text[after + 2 :].split(None, 22)
        self.pid = pid
        self.fields = fields  # from the state on, which is the third in proc(5)
        self.name = text[text.index(b"(") + 1 : after].decode(errors="replace")
        self.parent = int(fields[1])
        self.start = int(fields[19])
        # A main thread that ended is a zombie too, while other threads of the process live on.
        self.dead = fields[0] in (b"Z", b"X") and int(fields[17]) <= 1


def read_process(pid: int) -> Process | None:
    text = read_file(f"/proc/{pid}/stat")
    return Process(pid, text) if text else None


def pids() -> list[str]:
    return [entry for entry in os.listdir("/proc") if entry.isdigit()]


def processes(uid: int | None = None, dead: bool = False, among: Iterable[str] | None = None) -> dict[int, Process]:
    """Return the living processes, with `dead` zombies too, of one user where `uid` is given (most are kernel's)."""
    found = {}
    for entry in pids() if among is None else among:
        try:
            if uid is not None and os.stat("/proc/" + entry).st_uid != uid:
                continue
        except OSError:
            continue
        process = read_process(int(entry))
        if process is not None and (dead or not process.dead):
            found[process.pid] = process
    return found


def below(table: Mapping[int, Process], roots: Iterable[int], spared: Iterable[int] = ()) -> list[Process]:
    """Return the descendants of `roots`, nothing of what is `spared` nor below it."""
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process)
    seen, queue, found = {*roots, *spared}, list(roots), []
    while queue:
        for child in children.get(queue.pop(), ()):
            if child.pid not in seen:
                seen.add(child.pid)
                queue.append(child.pid)
                found.append(child)
    return found


def read_file(path: str) -> bytes:
    """Return the file's bytes; none where it is gone or not for us."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        text = b""
        while True:
            part = os.read(fd, 65536)
            if not part:
                return text
            text += part
    except OSError:
        return b""
    finally:
        os.close(fd)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        return  # it is gone


def load_prctl() -> Callable[[int, int], int]:
    """Return the C library's prctl."""
    try:
        import ctypes

        function = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError) as error:
        raise End("bad_config", f"{sys.executable}: prctl is not available through ctypes: {error}") from None
    return lambda option, value: int(function(option, value, 0, 0, 0))


def become_subreaper(prctl: Callable[[int, int], int]) -> None:
    """From now on whatever an engine leaves behind becomes our child, however it detached itself."""
    if prctl(36, 1) != 0:  # PR_SET_CHILD_SUBREAPER
        raise End("bad_config", "this kernel refuses PR_SET_CHILD_SUBREAPER")


def spawn(
    argv: list[str],
    env: Mapping[str, str],
    inbox: Inbox,
    *,
    stdout: int,
    stderr: int,
    prctl: Callable[[int, int], int] | None = None,
) -> tuple[int, int]:
    """Start a process in a process group of its own. With `prctl`, it dies with this one.

    Returns:
        Its pid, and a pipe that ends when it runs `argv`, or says before that why it does not.
    """
    parent = os.getpid()
    null = os.open("/dev/null", os.O_RDONLY)
    result, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(null)
        os.close(writer)
        return pid, result
    try:
        if prctl is not None:
            prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)
            # Yama's ptrace_scope 1 lets ancestors look into a process; our py-spy will be a sibling.
            prctl(0x59616D61, parent)  # PR_SET_PTRACER
        os.setpgid(0, 0)
        os.dup2(null, 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and that would be inherited
            signal.signal(number, signal.SIG_DFL)
        # Go and stop are not meant for engines, yet reach them: proctrack/linuxproc (seen with 22.05) signals the whole
        # tree of the step, and so does proctrack/cgroup with SignalChildrenProcesses=yes (23.11).
        for number in (GO_SIGNAL, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, inbox.original_mask)
        os.execvpe(argv[0], argv, env)
    except BaseException as error:
        text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        os.write(writer, text.encode()[:512])
    finally:
        os._exit(127)


def ask(argv: list[str], inbox: Inbox) -> tuple[int, int]:
    """Start a program that answers a question; return its pid and the pipe that it writes to."""
    reader, writer = os.pipe()
    pid, result = spawn(argv, os.environ, inbox, stdout=writer, stderr=writer)
    os.close(writer)
    os.close(result)
    return pid, reader


def exit_code(status: int) -> int:
    """Return the exit code in a wait status, or the negative signal that ended the process."""
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)


def end_tree(inbox: Inbox) -> None:
    """Kill every descendant until none is left. A process that does not die (D state) keeps this waiting for ever."""
    inbox.ignore_stop()
    uid: int | None = os.getuid()
    pause_s = 0.002
    while True:
        inbox.wait(0)
        # Orphans come to us: without a child there is no descendant either.
        if inbox.childless:
            return
        for process in below(processes(uid), [os.getpid()]):
            kill(process.pid)
        inbox.wait(pause_s)
        # /proc shows a process with privileges under another user than it runs as: look at all of them from now on.
        uid = None
        pause_s = min(2 * pause_s, 0.25)


# ------------------------------------------------------------------------------------------- claims and process lists


class Records:
    """The node-local directory of one group: claims, and who belongs to an agent that may not be able to say so."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._boot = read_file("/proc/sys/kernel/random/boot_id").decode().strip()
        self._written: list[list[int]] = []
        self._strangers: set[str] = set()
        self._looks_at_all_at = 0.0
        try:
            own_directory(step.state_dir)
            self._path = os.path.join(step.state_dir, *step.folder)
            make_folders(self._path)
        except OSError as error:
            message = f"state directory {step.state_dir} cannot be used: {error}"
            raise End("bad_config", message, **no_room(error, step.state_dir, step.node)) from None

    def claim(self) -> None:
        """Claim the incarnation. Raises `End` where it, or a newer one, was claimed on this node."""
        step = self._step
        try:
            os.close(os.open(os.path.join(self._path, f"claim-{step.incarnation}"), os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            raise self._other(step.incarnation) from None
        except OSError as error:
            message = f"no claim can be written to {self._path}: {error}"
            raise End("bad_config", message, **no_room(error, self._path, step.node)) from None
        # Looked at after our own claim was made, so that of two agents at least the older one sees the other.
        newest = max((n for n, _ in numbered(self._path, "claim-")), default=0)
        if newest > step.incarnation:
            raise self._other(newest)

    def _other(self, incarnation: int) -> End:
        step = self._step
        return End(
            "other_incarnation",
            f"{step.group}: incarnation {incarnation} was started on {step.node} before this one,"
            f" {step.incarnation}: nothing was done",
        )

    def write(self, alone: bool = False) -> None:
        """Write down this process and its descendants (none where it is `alone`), where that has changed."""
        me = os.getpid()
        tree = [] if alone else self._tree(me)
        rows = sorted([p.pid, p.start] for p in [*tree, read_process(me)] if p is not None)
        if rows == self._written:
            return
        name = self._list_name(self._step.incarnation)
        text = json.dumps({"boot": self._boot, "slurm": self._step.slurm_step, "processes": rows})
        try:
            with open(name + ".new", "w", encoding="ascii") as f:
                f.write(text)
            os.rename(name + ".new", name)
        except OSError as error:
            print(f"process list {name}: {error}", file=sys.stderr)
            return
        self._written = rows

    def _tree(self, me: int) -> list[Process]:
        """Return our descendants. Who is none stays none while the pid is theirs: most looks are at new ones only."""
        now = time.monotonic()
        if now >= self._looks_at_all_at:
            self._strangers.clear()
            self._looks_at_all_at = now + LOOK_AT_ALL_S
        among = [pid for pid in pids() if pid not in self._strangers]
        tree = below(processes(os.getuid(), among=among), [me])
        self._strangers.update(among)
        self._strangers.difference_update(str(pid) for pid in (me, *(p.pid for p in tree)))
        return tree

    def remove(self) -> None:
        """Our tree is dead: nobody needs to look for it."""
        if self._written:
            unlink(self._list_name(self._step.incarnation))

    def old(self) -> dict[Origin, dict[str, Any]]:
        """Return the lists of this boot that older agents left."""
        found = {}
        for origin, name in self._old_lists():
            try:
                value = json.loads(read_file(name))
            except ValueError:
                continue
            if value["boot"] == self._boot:
                found[origin] = value
        return found

    def forget_old(self) -> None:
        """Nothing in the older lists is alive any more."""
        for _, name in self._old_lists():
            unlink(name)

    def _old_lists(self) -> Iterator[tuple[Origin, str]]:
        for group, newest in self._step.newest_old.items():
            folder = os.path.join(self._step.state_dir, *self._step.folder_of(group))
            for incarnation, name in numbered(folder, "processes-"):
                if incarnation <= newest:
                    yield (group, incarnation), name

    def _list_name(self, incarnation: int) -> str:
        return os.path.join(self._path, f"processes-{incarnation}")


def unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return  # there was none


def numbered(folder: str, prefix: str) -> list[tuple[int, str]]:
    """Return the files whose names are this prefix and a number; none where there is no such folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [
        (int(name[len(prefix) :]), os.path.join(folder, name))
        for name in names
        if name.startswith(prefix) and name[len(prefix) :].isdigit()
    ]


def forget_ended(step: Step) -> None:
    """Remove the claims and lists of other runs of which nothing was written, and nothing lives here, for a month.

    Only files with our names go: the directory is ours alone, yet what else somebody keeps there stays.
    """
    names = (read_file(f"/proc/{pid}/environ").partition(b"ROLLOUT_MARK=")[2] for pid in processes(os.getuid()))
    spared = {name.partition(b"/")[0].decode(errors="replace") for name in names} | {step.run_id, "locks"}
    for run in os.listdir(step.state_dir):
        try:
            if run not in spared:
                forget(os.path.join(step.state_dir, run))
        except (OSError, ValueError, KeyError, TypeError):  # another agent was faster, or it is none of ours
            continue


def forget(run: str) -> None:
    """Remove what is known of one run, unless it is too new or something of it lives. Follows no symbolic link."""
    if not stat.S_ISDIR(os.lstat(run).st_mode):
        return
    folders, files = [run], list[str]()
    for folder in folders:  # grows
        for path in (os.path.join(folder, name) for name in os.listdir(folder)):
            (folders if stat.S_ISDIR(os.lstat(path).st_mode) else files).append(path)
    if any(time.time() - os.lstat(path).st_mtime < FORGET_AFTER_S for path in (*folders, *files)):
        return
    names = {os.path.basename(path).removesuffix(".new").rstrip("0123456789") for path in files}
    if not names <= {"claim-", "processes-"}:
        return
    for path in files:
        for pid, start in json.loads(read_file(path) or b"{}").get("processes", ()):
            process = read_process(pid)
            if process is not None and process.start == start:
                return
    for path in files:
        os.unlink(path)
    for folder in reversed(folders):
        os.rmdir(folder)


def make_folders(path: str) -> None:
    """Make the folder and those above it, for the owner only."""
    mask = os.umask(0o077)
    try:
        os.makedirs(path, exist_ok=True)
    finally:
        os.umask(mask)


def own_directory(path: str) -> None:
    """Make the directory, or see that it is ours alone to write: its name can be foreseen by others of the node."""
    if not os.path.lexists(path):
        make_folders(path)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(errno.ENOTDIR, "not a directory, or a symbolic link to one")
    if found.st_uid != os.getuid():
        raise OSError(errno.EPERM, f"belongs to {user_name(found.st_uid)}")
    if found.st_mode & 0o022:
        raise OSError(errno.EPERM, "others may write to it")


# ----------------------------------------------------------------------------------------------- leftovers of the past


def leftovers(step: Step, records: Records) -> dict[int, tuple[Process, Evidence]]:
    """Return the living processes of older incarnations of this group on this node, and of groups that left it.

    Known by the mark in their environment; by the list of an older agent (engines erase their environment when they set
    their title); by their Slurm step; or because one of these started them.
    """
    table = processes(os.getuid())
    lists = records.old()
    listed: dict[tuple[int, int], Origin] = {}
    steps: dict[bytes, Origin] = {}
    for origin, old in lists.items():
        for pid, start in old["processes"]:
            listed[pid, start] = origin
        slurm = old["slurm"]
        # A step number means something within one start of the job only, and our own step is no leftover.
        if slurm and step.slurm_step and slurm != step.slurm_step and slurm["restart"] == step.slurm_step["restart"]:
            steps[f"/job_{slurm['job']}/step_{slurm['step']}".encode()] = origin
    spared = {os.getpid(), *(p.pid for p in below(table, [os.getpid()])), *ancestors(table)}
    found: dict[int, tuple[Process, Evidence]] = {}
    for pid, process in table.items():
        if pid in spared:
            continue
        whose, must_live = marked(step, process)
        if must_live:
            spared.add(pid)
        elif whose is not None:
            found[pid] = process, (whose, "mark")
        elif (pid, process.start) in listed:
            found[pid] = process, (listed[pid, process.start], "process list")
        elif steps:
            cgroup = read_file(f"/proc/{pid}/cgroup")
            for part, origin in steps.items():
                if any(part + end in cgroup for end in (b"/", b"\n")):
                    found[pid] = process, (origin, "Slurm step")
    for pid in list(found):
        for process in below(table, [pid], spared):
            found.setdefault(process.pid, (process, (found[pid][1][0], "parent")))
    return found


def ancestors(table: Mapping[int, Process]) -> Iterator[int]:
    pid = os.getppid()
    while pid in table:
        yield pid
        pid = table[pid].parent


def marked(step: Step, process: Process) -> tuple[Origin | None, bool]:
    """Return whose leftover the process is by its mark, None without one; and whether it must live."""
    if process.name in ("srun", "slurmstepd"):
        return None, True  # srun carries the mark of its step, but is the coordinator's; slurmstepd is Slurm's
    mark, orders = b"", b""
    for variable in read_file(f"/proc/{process.pid}/environ").split(b"\0"):
        if variable.startswith(b"ROLLOUT_MARK="):
            mark = variable[13:]
        elif variable.startswith(b"ROLLOUT_STEP="):
            orders = variable[13:]
    if not mark:
        return None, False
    run, _, rest = mark.decode(errors="replace").partition("/")
    group, number, node = rest.rsplit("/", 2) if rest.count("/") > 1 else ("", "", "")
    old = number.isdigit() and 0 < int(number) <= step.newest_old.get(group, 0)
    if not old or (run, node) != (step.run_id, step.node):
        return None, True
    # Only an agent has its orders in the environment that it was started with. A sweep is no leftover: it starts
    # nothing, and two of them (a coordinator was replaced in between) must not end one another.
    if orders and json.loads(orders)["mode"] == "sweep":
        return None, True
    return (group, int(number)), False


def named(step: Step, origin: Origin) -> str:
    """Return an incarnation in words; of this agent's own group its number will do."""
    group, incarnation = origin
    return f"incarnation {incarnation}" if group == step.group else f"incarnation {incarnation} of {group}"


# --------------------------------------------------------------------------------------------------------------- ports


class Row:
    """A TCP socket of this node."""

    __slots__ = ("address", "inode", "listens", "uid", "waits")

    def __init__(self, address: str, state: int, uid: int, inode: str) -> None:
        self.address = address
        self.listens = state == LISTEN
        self.waits = state == TIME_WAIT  # no process holds it
        self.uid = uid
        self.inode = inode


def sockets(port: int) -> list[Row]:
    """Return the TCP sockets whose local port this is."""
    wanted = b":%04X" % port
    return [
        Row(tcp_end(fields[1])[0], int(fields[3], 16), int(fields[7]), fields[9].decode())
        for path in ("/proc/net/tcp", "/proc/net/tcp6")
        for fields in tcp_lines(path)
        if fields[1].endswith(wanted)
    ]


def listeners(port: int) -> list[Row]:
    """Return the TCP sockets that listen on this port.

    Asked for while an engine loads, up to fifty times a second: over netlink (sock_diag(7)) the kernel answers in
    0.1 ms, but for /proc/net/tcp it goes through the table of all connections (7 ms where nothing is connected).
    """
    try:
        return ask_for_listeners(port)
    except OSError:  # a kernel without inet_diag
        return [row for row in sockets(port) if row.listens]


def ask_for_listeners(port: int) -> list[Row]:
    """As `listeners`. Raises OSError where the kernel does not answer that."""
    import struct

    rows = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, SOCK_DIAG) as kernel:
        kernel.settimeout(1.0)
        for family in (socket.AF_INET, socket.AF_INET6):
            question = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, 1 << LISTEN)
            question += struct.pack("!HH", port, 0) + bytes(44)
            kernel.send(struct.pack("=IHHII", 16 + len(question), *SOCK_DIAG_DUMP, 0, 0) + question)
            done = False
            while not done:
                answer = kernel.recv(65536)
                while answer and not done:
                    size, kind = struct.unpack_from("=IH", answer)
                    if kind == NLMSG_ERROR:
                        code = -struct.unpack_from("=i", answer, 16)[0]
                        raise OSError(code, os.strerror(code))
                    done = kind == NLMSG_DONE
                    if not done:
                        state, local = struct.unpack_from("=xBxx2s", answer, 16)
                        uid, inode = struct.unpack_from("=II", answer, 16 + 64)
                        address = socket.inet_ntop(family, answer[24 : 28 if family == socket.AF_INET else 40])
                        if int.from_bytes(local, "big") == port:
                            rows.append(Row(address, state, uid, str(inode)))
                    answer = answer[(size + 3) & ~3 :]
    return rows


def tcp_end(text: bytes) -> tuple[str, int]:
    """Return address and port of one end of a connection, as those tables have it."""
    address, port = text.decode().split(":")
    words = [int(address[n : n + 8], 16).to_bytes(4, sys.byteorder) for n in range(0, len(address), 8)]
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b"".join(words)), int(port, 16)


def tcp_lines(path: str) -> Iterator[list[bytes]]:
    try:
        with open(path, "rb", buffering=0) as table:
            rest, header = b"", True
            while True:
                chunk = table.read(65536)
                if not chunk:
                    return
                lines = (rest + chunk).split(b"\n")
                rest = lines.pop()
                for line in lines:
                    if not header:
                        yield line.split()
                    header = False
    except OSError:
        return


def bindable(family: int, address: str, port: int, reuse: bool) -> bool:
    """Could a server bind this? A family that does not exist is in nobody's way. Raises OSError: nobody knows."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as s:
            if reuse:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            s.bind((address, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        if family == socket.AF_INET6 and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return True
        raise
    return True


def busy(port: int) -> str:
    """Return why an engine could not have this port, or why that is not known; empty when it could."""
    try:
        return held(port)
    except OSError as error:  # EACCES: a privileged port; EMFILE, ENOBUFS: this node is short of something
        return f"port {port} cannot be tried, so nobody knows whether it is free: {error.strerror}"


def held(port: int) -> str:
    """Return why an engine could not have this port; empty when it could. Raises OSError where that is not known.

    A bind with SO_REUSEADDR passes over the remains of connections (TIME_WAIT), but also over a socket that was bound
    with it and does not listen yet, as vLLM's is while it loads. A bind without it fails for both. What is only bound
    is in no table; so: nothing listed means bound, and a socket bound to every address, unlike the remains of
    connections, is in the way of an address that no connection uses.
    """
    v4, v6 = socket.AF_INET, socket.AF_INET6
    if not (bindable(v4, "0.0.0.0", port, True) and bindable(v6, "::", port, True)):
        rows = sockets(port)
        return f"port {port} is held by " + holder(sorted(rows, key=lambda row: (row.waits, not row.listens)))
    plain = bindable(v4, "0.0.0.0", port, False) and bindable(v6, "::", port, False)
    if plain or (bindable(v4, ODD_LOOPBACK, port, False) and sockets(port)):
        return ""
    return f"port {port} is bound, not yet listening, by a process that cannot be named"


def holder(rows: list[Row]) -> str:
    """Return who holds the first of these sockets, in words."""
    if not rows:
        return "a process that cannot be named (bound, not listening)"
    row = rows[0]
    for entry in os.listdir("/proc"):
        if entry.isdigit() and row.inode in (socket_inodes(entry) or ()):
            process = read_process(int(entry))
            if process is not None:
                return f"pid {process.pid} ({process.name}, user {user_name(row.uid)}), on {row.address}"
    return f"a process of user {user_name(row.uid)} that is not visible to this user, on {row.address}"


def socket_inodes(pid: int | str) -> set[str] | None:
    """Return the inodes of the process's sockets; None where that may not be seen."""
    found = set()
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
            except FileNotFoundError:
                continue
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except PermissionError:
        return None
    except OSError:  # it is gone
        pass
    return found


def user_name(uid: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):
        return str(uid)


# ----------------------------------------------------------------------------------------------------------------- GPU


def narrowed(mask: str | None, gpus: list[int], where: str) -> str:
    """Return the part of a mask (numbers or UUIDs) that these indices mean; without a mask, the indices."""
    if mask is None:
        return ",".join(map(str, gpus))
    items = [item.strip() for item in mask.split(",") if item.strip()]
    if max(gpus) >= len(items):
        raise End(
            "bad_config", f"{where} needs the GPUs {gpus} of those that the step was given, but the mask is {mask!r}"
        )
    return ",".join(items[gpu] for gpu in gpus)


def gpu_environment(member: Member) -> dict[str, str]:
    """Return the member's GPU variables."""
    if not member.gpus:
        return {}
    masks = {name: os.environ[name] for name in GPU_MASKS if name in os.environ}
    return {
        name: narrowed(masks.get(name), member.gpus, f"rank {member.rank}: {name}") for name in masks or GPU_MASKS[:1]
    }


class GpuMemory:
    """Is the GPU memory of older incarnations back? nvidia-smi is slow and may hang: it is asked, never waited for."""

    def __init__(self, step: Step, inbox: Inbox) -> None:
        gpus = sorted({gpu for member in step.members for gpu in member.gpus})
        # A sweep has no GPUs (Slurm then hides them): the serving step that follows it judges their memory.
        self._wanted = bool(gpus) and step.mode == "serve"
        self._program = find_program("nvidia-smi") if self._wanted else ""
        self._step = step
        self._inbox = inbox
        self._tokens = narrowed(os.environ.get(GPU_MASKS[0]), gpus, "the step").split(",") if self._wanted else []
        self._running: dict[str, tuple[int, int]] = {}  # question -> pid, pipe
        self._asked_at = self._next_at = 0.0
        self._judged_at: float | None = None
        self._finding = ""  # of its last answer
        self.notes: list[str] = []
        self.lost = ""  # what makes waiting pointless
        if self._wanted and not self._program:
            self.notes.append("nvidia-smi is not on PATH: GPU memory was not judged")

    def waits_for(self, old: Mapping[int, Origin], quiet_since: float) -> str | None:
        """Return what it waits for: None for nothing, "" for an answer that may well come.

        Args:
            old: pid -> whose it was, of every process that was found or listed as a leftover.
            quiet_since: when the last leftover was seen; older answers do not count.
        """
        questions = []
        if self._step.unshared_gpus:
            questions.append("--query-gpu=index,uuid,memory.used")
        if old:
            questions.append("--query-compute-apps=pid,used_memory")
        if not self._program or not questions or (self._judged_at is not None and self._judged_at >= quiet_since):
            return None
        now = time.monotonic()
        if not self._running:
            if now < self._next_at:
                return self._finding
            self._asked_at = now
            how = "--format=csv,noheader,nounits"
            self._running = {question: ask([self._program, question, how], self._inbox) for question in questions}
        if any(pid not in self._inbox.exits for pid, _ in self._running.values()):
            silent_s = now - self._asked_at
            return f"nvidia-smi has not answered for {SMI_SILENT_S:g} s" if silent_s > SMI_SILENT_S else self._finding
        self._finding = self._judge(old)
        self._running = {}
        self._next_at = now if self._asked_at < quiet_since else now + SMI_PERIOD_S
        if not self._finding and self._asked_at >= quiet_since:
            self._judged_at = self._asked_at
            return None
        return self._finding

    def _judge(self, old: Mapping[int, Origin]) -> str:
        answers, trouble = {}, ""
        for question, (pid, reader) in self._running.items():
            text = os.read(reader, 1 << 20).decode(errors="replace")
            os.close(reader)
            code = exit_code(self._inbox.exits[pid])
            if code != 0:
                self.lost = SMI_LOST.get(code, "") or next((w for w in BROKEN_WORDS if w in text.lower()), "")
                trouble = f"nvidia-smi failed (exit {code}): {' '.join(text.split())[:200]}"
            answers[question.split("=")[0]] = [[cell.strip() for cell in row.split(",")] for row in text.splitlines()]
        if trouble:
            return trouble
        for row in answers.get("--query-compute-apps", ()):
            pid = int(row[0]) if row[0].isdigit() else 0
            # The driver lists a process a while after its death; a living one would have been found as a leftover.
            if pid in old and read_process(pid) is None:
                whose = named(self._step, old[pid])
                return f"pid {pid} of {whose} is dead, but still holds {row[-1]} MiB of GPU memory"
        full = []
        rows = answers.get("--query-gpu", [])
        for token in self._tokens if rows else ():
            known = [row for row in rows if token == row[0] or (len(token) > 3 and row[1].startswith(token))]
            if not known or not known[0][2].isdigit():
                note = f"nvidia-smi knows no memory use of GPU {token}: it was not judged"
                self.notes += [note] if note not in self.notes else []
            elif int(known[0][2]) >= self._step.gpu_memory_mb:
                full.append(f"GPU {token} ({known[0][2]} MiB)")
        limit = self._step.gpu_memory_mb
        return f"memory in use on {', '.join(full)}; it counts as back below {limit} MiB" if full else ""


def find_program(name: str) -> str:
    """Return its path, empty when it is not on PATH."""
    paths = (os.path.join(folder, name) for folder in os.get_exec_path())
    return next((path for path in paths if os.access(path, os.X_OK) and not os.path.isdir(path)), "")


# --------------------------------------------------------------------------------------------------------------- fence


def fence(step: Step, records: Records, inbox: Inbox) -> None:
    """Prove that nothing of an older incarnation is left here, then report it. Raises `End` at the deadline."""
    began = time.monotonic()
    gpu = GpuMemory(step, inbox)
    old = {pid: origin for origin, v in records.old().items() for pid, _ in v["processes"]}
    ended: dict[tuple[int, int], dict[str, Any]] = {}
    reported: dict[str, str] = {}
    quiet_since = began
    while True:
        now = time.monotonic()
        waits: dict[str, str] = {}
        left = leftovers(step, records)
        for pid, (process, (origin, evidence)) in left.items():
            found = {"pid": pid, "name": process.name, "incarnation": origin[1], "known_by": evidence}
            if origin[0] != step.group:
                found["group"] = origin[0]
            ended.setdefault((pid, process.start), found)
            old[pid] = origin
            again = read_process(pid)
            if again is not None and again.start == process.start:
                kill(pid)
        if left:
            quiet_since = now
            names = (f"pid {p.pid} ({p.name}) of {named(step, o)}, known by its {e}" for p, (o, e) in left.values())
            waits["leftover_process"] = "; ".join(sorted(names))
        taken = [text for text in map(busy, sorted({p for m in step.members for p in m.ports})) if text]
        if taken:
            waits["port_busy"] = "; ".join(taken)
        gpu_wait = gpu.waits_for(old, quiet_since)
        if gpu_wait is not None:
            waits["gpu_memory"] = gpu_wait
            if gpu.lost:
                raise End("gpu_memory", gpu_wait, hardware=f"{step.node}: nvidia-smi says: {gpu.lost}")
        if not waits:
            break
        elapsed = now - began
        if elapsed >= step.fence_timeout_s:
            cause = next(c for c in FENCE_CAUSES if c in waits)
            words = (text or "nvidia-smi did not answer" for text in waits.values())
            raise End(cause, f"after {step.fence_timeout_s:g} s: {'; '.join(words)}")
        if elapsed >= QUIET_FENCE_S:
            for cause, message in waits.items():
                if message and reported.get(cause) != message:
                    reports.say("fence_waits", cause=cause, message=message)
            reported = waits
        reports.send()
        inbox.wait(min(0.25, max(0.02, elapsed / 10), step.fence_timeout_s - elapsed))
    records.forget_old()
    notes = {"notes": gpu.notes} if gpu.notes else {}
    reports.say("fenced", ended=list(ended.values()), **notes)


# ------------------------------------------------------------------------------------------------------------- engines


class Engine:
    """A member that was started."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.probe: LocalProbe | None = None
        self.strange: list[str] = []  # inodes of the last look that were not ours
        self.stranger = ""  # as reported


def start(step: Step, records: Records, inbox: Inbox, prctl: Callable[[int, int], int]) -> dict[int, Engine]:
    """Start every engine, all at once. Raises `End` where one cannot be."""
    null = os.open("/dev/null", os.O_WRONLY)
    engines: dict[int, Engine] = {}
    waiting: dict[int, Member] = {}
    for member in step.members:
        argv = member.argv
        if step.setup:
            argv = ["bash", "-c", "\n".join(step.setup) + '\nexec "$@"', "bash", *argv]
        env = {**os.environ, **member.env, **gpu_environment(member), "ROLLOUT_MARK": step.mark}
        log = open_log(member, step.node) if member.log else null
        pid, result = spawn(argv, env, inbox, stdout=log, stderr=log, prctl=prctl)
        engines[pid] = Engine(member)
        waiting[result] = member
        if log != null:
            os.close(log)
    os.close(null)
    records.write()
    while waiting:
        ready = select.select(list(waiting), [], [], 0.05)[0]
        for result in ready:
            member = waiting.pop(result)
            error = os.read(result, 512).decode(errors="replace")
            os.close(result)
            if error:
                raise exec_failed(member, "bash" if step.setup else member.argv[0], error)
        if not ready:
            inbox.wait(0)
    reports.say("started", ranks=[e.member.rank for e in engines.values()], pids=list(engines))
    return engines


def open_log(member: Member, node: str) -> int:
    try:
        make_folders(os.path.dirname(member.log) or ".")
        return os.open(member.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        message = f"rank {member.rank}: its log {member.log} cannot be opened: {error.strerror}"
        room = no_room(error, os.path.dirname(member.log), node)
        raise End("exec_failed", message, rank=member.rank, **room) from None


def exec_failed(member: Member, program: str, error: str) -> End:
    if "/" in program and error == os.strerror(errno.ENOENT) and os.path.exists(program):
        error = "the interpreter that its first line names does not exist"
    elif "/" not in program and error == os.strerror(errno.ENOENT):
        error = "not found on PATH"
    return End("exec_failed", f"rank {member.rank}: {program} could not be started: {error}", rank=member.rank)


def watch(step: Step, engines: dict[int, Engine], records: Records, inbox: Inbox) -> None:
    """Watch the engines until one ends or the stop comes; both raise `End`."""
    began = time.monotonic()
    ooms = oom_kills()
    loading = [engine for engine in engines.values() if engine.member.entrypoint]
    probes: list[LocalProbe] = []
    # Engines come first: on a small node every look of ours would delay their start.
    look_at, list_at, rotating = began + 0.05, began + 0.25, False
    logs = [member.log for member in step.members if member.log]
    snapshot: Snapshot | None = None
    silence = Silence(step.barrier, step.self_fence_s) if step.self_fence_s > 0 else None
    while True:
        ended = next((pid for pid in inbox.exits if pid in engines), None)
        if ended is not None:
            await_same_signal(inbox, inbox.exits[ended])
            raise engine_exited(engines[ended].member, inbox.exits[ended], ooms)
        if silence is not None:
            silence.judge()
        if snapshot is not None and snapshot.over(inbox):
            snapshot = None
        inbox.exits.clear()
        now = time.monotonic()
        if inbox.go:
            inbox.go = False
            if snapshot is None and step.snapshot_s > 0 and now - began >= GO_AGAIN_S:
                try:
                    snapshot = Snapshot(step, engines, inbox)
                except (OSError, RuntimeError) as error:  # no process, thread or file is to be had
                    reports.say("snapshot", ranks=[], took_s=0, notes=[str(error)])
        if loading and now >= look_at:
            for engine in loading[:]:
                address = own_listener(engine)
                if address:
                    loading.remove(engine)
                    reports.say("listening", rank=engine.member.rank, port=engine.member.port, address=address)
                    if step.probe is not None:
                        engine.probe = LocalProbe(engine.member, address, step.probe)
                        probes.append(engine.probe)
                        in_background(engine.probe.run)
            # Never later than a fiftieth of the time that loading has taken so far.
            look_at = now + min(0.25, max(0.02, (now - began) / 50))
        if now >= list_at:
            records.write()
            if step.log_max_bytes and logs and not rotating:
                in_background(rotate_logs, logs, step.log_max_bytes)
                rotating = True
            list_at = now + (0.25 if loading or now - began < 60 else 1.0)
        for probe in probes:
            probe.report()
        wake_at = min(look_at, list_at) if loading else list_at
        inbox.wait((min(wake_at, snapshot.ends_at) if snapshot is not None else wake_at) - now)


def await_same_signal(inbox: Inbox, status: int) -> None:
    """Where a stop signal ended the engine, it may have been for the whole step: then the agent was stopped, too."""
    deadline = time.monotonic() + TOGETHER_S
    while -exit_code(status) in STOP_SIGNALS and time.monotonic() < deadline:
        inbox.wait(deadline - time.monotonic())


def engine_exited(member: Member, status: int, ooms_before: int) -> End:
    details: dict[str, Any] = {"rank": member.rank}
    code = exit_code(status)
    if code < 0:
        details["signal"] = -code
        how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
    else:
        details["code"] = code
        how = f"exited with code {code}"
    details["oom"] = oom_kills() > ooms_before
    if details["oom"]:
        how += ", and the kernel killed a process of the step because memory was used up"
    return End("engine_exited", f"rank {member.rank} {how}", **details)


def oom_kills() -> int:
    """Return how many processes of our cgroup the kernel has killed for memory; 0 where that cannot be read."""
    for line in read_file("/proc/self/cgroup").decode(errors="replace").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        if controllers:
            text = read_file(f"/sys/fs/cgroup/memory{path}/memory.oom_control")
        else:
            text = read_file(f"/sys/fs/cgroup{path}/memory.events")
            # The task's own cgroup need not have the memory controller: Slurm's limit is the step's.
            while not text and "/step_" in os.path.dirname(path):
                path = os.path.dirname(path)
                text = read_file(f"/sys/fs/cgroup{path}/memory.events")
        for words in map(bytes.split, text.splitlines()):
            if words[0] == b"oom_kill":
                return int(words[1])
    return 0


def own_listener(engine: Engine) -> str:
    """Return the address on which the engine listens, empty while it does not. Reports a stranger in its place."""
    member = engine.member
    rows = listeners(member.port)
    if not rows:
        engine.strange = []
        return ""
    strange = rows
    for process in below(processes(), [os.getpid()]):
        inodes = socket_inodes(process.pid)
        # Where an engine may not be looked into (file capabilities), its socket cannot be told from a stranger's.
        strange = [row for row in strange if inodes is not None and row.inode not in inodes]
    if not strange:
        return rows[0].address
    # A socket that was just handed from one process to another can be missed by one look, not by two.
    if [row.inode for row in strange] == engine.strange:
        who = holder(strange)
        if who != engine.stranger:
            engine.stranger = who
            reports.say("stranger", rank=member.rank, port=member.port, holder=who)
    engine.strange = [row.inode for row in strange]
    return ""


def graceful(step: Step, engines: dict[int, Engine], inbox: Inbox) -> None:
    """Ask the engines to leave and wait for it, unless one is dead or does not answer: then it would make no sense."""
    failing = any(engine.probe is not None and engine.probe.state[0] for engine in engines.values())
    if step.grace_s <= 0 or failing or any(pid in inbox.exits for pid in engines):
        return
    deadline = time.monotonic() + step.grace_s
    for pid in engines:
        kill(pid, signal.SIGTERM)
    while any(pid not in inbox.exits for pid in engines) and time.monotonic() < deadline:
        inbox.wait(deadline - time.monotonic())


# ---------------------------------------------------------------------------------------------------------------- logs


def in_background(function: Callable[..., None], *arguments: Any) -> threading.Thread:
    """Run it in a thread: a file system or an engine that hangs must not keep the agent from stopping."""
    import threading

    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def rotate_logs(logs: list[str], max_bytes: int) -> None:
    """Keep each log and one older part of it below `max_bytes`, more or less; the engine keeps its open file."""
    said = set()
    while True:
        for log in logs:
            try:
                if os.stat(log).st_size > max_bytes:
                    rotate(log)
            except OSError as error:
                message = f"{log} cannot be rotated: {error.strerror}"
                if message not in said:
                    said.add(message)
                    print(message, file=sys.stderr)
        time.sleep(1.0)


def rotate(log: str) -> None:
    with open(log, "rb") as source, open(log + ".1", "wb", opener=owner_only) as target:
        while True:
            data = source.read(1 << 20)
            if not data:
                break
            target.write(data)
        os.truncate(log, 0)


def owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def last_lines(log: str) -> list[str]:
    try:
        with open(log, "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - LAST_LINES_BYTES))
            text = f.read(LAST_LINES_BYTES)
    except OSError:
        return []
    return text.decode(errors="replace").splitlines()[-LAST_LINES:]


# ------------------------------------------------------------------------------------------------------- whose fault


def no_room(error: BaseException, path: str, node: str) -> dict[str, str]:
    """Return what the exit record says of a full disk where this error means one."""
    number = error.errno if isinstance(error, OSError) else None
    if number not in FULL_ERRORS:
        return {}
    return {"disk": f"{path} on {node} " + ("is full" if number == errno.ENOSPC else "is over its quota")}


def full_disk(step: Step, member: Member, lines: list[str]) -> str:
    """Return which file system is full where the engine's last lines say that one is; empty where they do not."""
    text = "\n".join(lines).lower()
    if not any(words in text for words in FULL_WORDS):
        return ""
    temporary = member.env.get("TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    places = [os.path.dirname(member.log), ".", temporary, "/tmp", "/dev/shm", os.path.expanduser("~")]
    found: list[str] = []
    look = in_background(look_for_room, places, found)
    look.join(DISK_LOOK_S)
    if found:
        return f"{', '.join(found)} on {step.node} is full"
    return f"a file system that {step.node} uses is full or over its quota, as the last lines say"


def look_for_room(places: list[str], found: list[str]) -> None:
    """Add those of these folders to `found` whose file system is full, each file system once."""
    seen = set()
    for place in places:
        try:
            device, room, path = os.stat(place).st_dev, os.statvfs(place), os.path.abspath(place)
        except OSError:
            continue
        # Some file systems do not say how large they are.
        full = room.f_blocks > 0 and room.f_bavail * room.f_frsize < FULL_BYTES
        if device not in seen and (full or (room.f_files > 0 and room.f_favail == 0)):
            found.append(path)
        seen.add(device)


class KernelLog:
    """What the kernel logs from now on. Most sites let only root read it (dmesg_restrict); then it says nothing."""

    def __init__(self) -> None:
        try:
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            self._fd = -1

    def lines(self) -> Iterator[str]:
        """Yield the new lines; a flood of them is left unread."""
        until = time.monotonic() + KMSG_LOOK_S
        while self._fd >= 0 and time.monotonic() < until:
            try:
                record = os.read(self._fd, 8192)
            except BrokenPipeError:  # the oldest were overwritten: the next read goes on behind them
                continue
            except OSError:
                return
            if not record:
                return
            yield record.decode(errors="replace").partition(";")[2]


def broken_gpu(kernel: Iterable[str], lines: list[str]) -> str:
    """Return what the kernel's log, or else the engine's, says of a broken GPU; empty for nothing."""
    for line in kernel:
        # NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python3, GPU has fallen off the bus.
        where, _, rest = line.partition("NVRM: Xid (")[2].partition("): ")
        number = rest.split(",")[0].strip()
        if number.isdigit() and int(number) in BROKEN_XIDS:
            return f"the driver reported Xid {number} of {where}: {BROKEN_XIDS[int(number)]}"
    text = "\n".join(lines).lower()
    return next((f"the last lines say: {words}" for words in BROKEN_WORDS if words in text), "")


# ------------------------------------------------------------------------------------------------------------- barrier


def read_barrier(path: str) -> Any:
    """Return the barrier file's value. Raises OSError or ValueError: shared file systems show it missing or half.

    May hang for ever where its server cannot be reached: never called by the main thread.
    """
    with open(path, "rb", buffering=0) as file:
        return json.loads(file.read())


class Silence:
    """For how long the coordinator has been silent: the barrier's heartbeat, as this node sees it.

    A file that cannot be read is as silent as one that nobody writes, and where the node is cut off from a hard-mounted
    NFS the read itself never returns. Hence a thread reads, and the main thread, which ends the engines, never waits
    for it.
    """

    def __init__(self, path: str, limit_s: float) -> None:
        self._path = path
        self._limit_s = limit_s
        self._judged_at = self._awake_since = since_boot()
        self._newest: tuple[int, int] | None = None
        self._moved_at: float | None = None
        self._looks_since: float | None = None
        self._trouble = ""
        in_background(self._run)

    def judge(self) -> None:
        """Raise `End` where the silence has lasted too long. To be called every second or so."""
        now, moved_at = since_boot(), self._moved_at
        # Where this process did not run (SIGSTOP, `scontrol suspend`, a machine asleep), its reader did not either, and
        # the coordinator may have been stopped with it: both get a moment, although the time counts.
        if now - self._judged_at > AWAKE_SHARE * self._limit_s:
            self._awake_since = now
        self._judged_at = now
        if moved_at is None or now - moved_at < self._limit_s or now - self._awake_since < AWAKE_SHARE * self._limit_s:
            return
        term, seq = self._newest or (0, 0)
        looks_since = self._looks_since
        hangs = looks_since is not None and now - looks_since > HANGS_S
        trouble = "reading it hangs" if hangs else self._trouble
        raise End(
            "self_fenced",
            f"no heartbeat of the coordinator for {now - moved_at:.0f} s (fence.self_fence_s = {self._limit_s:g}):"
            f" it is gone, or this node is cut off; {self._path}: the last was term {term}, seq {seq}; {trouble}",
        )

    def _run(self) -> None:
        """Look for ever: the body of the reader's thread."""
        began, unarmed = since_boot(), True
        while True:
            self._looks_since = since_boot()
            try:
                value = read_barrier(self._path)
                self._note(int(value["term"]), int(value["seq"]))
                self._trouble = "nobody writes it"
            except OSError as error:
                self._trouble = f"it cannot be read: {error.strerror}"
            except (ValueError, KeyError, TypeError):
                self._trouble = "it is no whole barrier file"
            self._looks_since = None
            if unarmed and self._moved_at is None and since_boot() - began >= self._limit_s:
                unarmed = False
                print(
                    f"{self._path} has not moved since go ({self._trouble}): without that, no self-fence",
                    file=sys.stderr,
                )
            time.sleep(HEARTBEAT_LOOK_S)

    def _note(self, term: int, seq: int) -> None:
        newest = self._newest
        if newest is None or (term, seq) > newest:  # what is older comes from a cache
            self._newest = term, seq
            # The first look proves no heartbeat: a dead coordinator's last word can be read, too.
            if newest is not None:
                self._moved_at = since_boot()


def since_boot() -> float:
    """Return seconds on a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# --------------------------------------------------------------------------------------------------------- local probe


class Pause:
    """What the barrier file says of a pool's probes. While it cannot be read, its last word holds."""

    def __init__(self, path: str, pool: str) -> None:
        self._path = path
        self._pool = pool
        self._last = 0

    def number(self) -> int:
        """Return which pause it is, from 1; 0: there is none."""
        try:
            pools = read_barrier(self._path)["pools"]
            mine = next(p for p in pools if p["name"] == self._pool)
            self._last = int(mine["pauses"]) if mine["probes"] == "paused" else 0
        # Missing or half visible, as shared file systems show it.
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            pass
        return self._last


class LocalProbe:
    """The coordinator's liveness probe, asked from here: it tells a dead engine from a coordinator that is cut off."""

    def __init__(self, member: Member, address: str, policy: dict[str, Any]) -> None:
        self._rank = member.rank
        self._port = member.port
        self._address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
        self._policy = policy
        self._timeout_s: float = policy["timeout_s"]
        self._reported = 0
        self._reported_rest = 0
        self._barrier = Pause(policy["barrier"], policy["pool"]) if policy.get("barrier") else None
        self.rests = 0  # the pause in which nothing is asked of engines of this pool, because they sleep; 0: none
        self.state = (0, "")  # failures in a row, the last error; replaced as a whole by the probe's thread

    def report(self) -> None:
        """Report a change, up to the threshold: beyond it nothing new is to be said until the engine answers."""
        rests = self.rests
        if rests != self._reported_rest:
            self._reported_rest = rests
            reports.say("probes", rank=self._rank, paused=rests > 0, pause=rests)
        failures, error = self.state
        failures = min(failures, self._policy["failure_threshold"])
        if failures != self._reported:
            self._reported = failures
            reports.say("local_probe", rank=self._rank, failures=failures, error=error)

    def run(self) -> None:
        """Probe for ever: the body of the probe's thread."""
        seen = None
        while True:
            if self._rest():
                seen = None
            began = time.monotonic()
            error = self._ask_engine()
            took_s = time.monotonic() - began
            counter = self._read_counter()
            moved = counter is not None and seen is not None and counter != seen
            seen = counter if counter is not None else seen
            if not error or moved:
                self._set(0, "")
            # Where we ourselves did not run, nothing was observed.
            elif took_s < self._timeout_s + 2:
                self._set(self.state[0] + 1, error)
            self._pass(began + self._policy["period_s"])

    def _rest(self) -> bool:
        """Ask nothing while the barrier says so, and for one period after it; tell whether it did.

        What failed in a row before goes on then.
        """
        rested = False
        while self._barrier is not None and self._barrier.number():
            rested = True
            while pause := self._barrier.number():
                self._say_rests(pause)  # also of the next one: the end of the last may never have been seen
                time.sleep(PAUSE_LOOK_S)
            self._say_rests(0)
            self._pass(time.monotonic() + self._policy["period_s"])
        return rested

    def _pass(self, until: float) -> None:
        """Let time pass; no longer than a look at the barrier allows, where there is one to look at."""
        while time.monotonic() < until and not (self._barrier is not None and self._barrier.number()):
            step_s = until - time.monotonic() if self._barrier is None else PAUSE_LOOK_S
            time.sleep(max(0.0, min(step_s, until - time.monotonic())))

    def _say_rests(self, pause: int) -> None:
        if pause != self.rests:
            self.rests = pause
            os.kill(os.getpid(), signal.SIGCHLD)

    def _set(self, failures: int, error: str) -> None:
        if (failures, error) != self.state:
            self.state = (failures, error)
            os.kill(os.getpid(), signal.SIGCHLD)  # wakes the main thread, which does all reporting

    def _ask_engine(self) -> str:
        """Return what is wrong with the answer; empty for a good one."""
        try:
            status, body = self._exchange(self._policy["path"], self._policy["body"], self._timeout_s)
        except Exception as error:
            return str(error) or type(error).__name__
        if status != 200:
            return f"HTTP {status}"
        expect = self._policy["expect"]
        if not expect:
            return ""
        try:
            answer = json.loads(body)
        except ValueError:
            return "HTTP 200, but not JSON"
        value = answer.get(expect) if isinstance(answer, dict) else None
        return "" if value and isinstance(value, (list, dict, str)) else f"HTTP 200, but no {expect!r}"

    def _read_counter(self) -> float | None:
        """Return the sum of the progress counter's samples, all labels; None where there is none to read."""
        counter = self._policy["counter"]
        if counter is None:
            return None
        try:
            status, body = self._exchange(counter["path"], "", min(COUNTER_TIMEOUT_S, self._timeout_s))
        except Exception:
            return None
        return sum_samples(body.decode(errors="replace"), counter["name"]) if status == 200 else None

    def _exchange(self, path: str, body: str, timeout_s: float) -> tuple[int, bytes]:
        """One request with one deadline around all of it: a server that drips bytes meets no time-out of a socket."""
        import http.client
        import threading

        deadline = time.monotonic() + timeout_s
        connection = http.client.HTTPConnection(self._address, self._port, timeout=timeout_s)
        try:
            connection.connect()
            wire = connection.sock
            timer = threading.Timer(max(0.0, deadline - time.monotonic()), cut, (wire,))
            timer.daemon = True
            timer.start()
            try:
                headers = {"Connection": "close", "Content-Type": "application/json"}
                connection.request("POST" if body else "GET", path, body.encode() or None, headers)
                response = connection.getresponse()
                answer = response.status, response.read(MAX_BODY_BYTES)
            finally:
                timer.cancel()
            if time.monotonic() >= deadline:
                raise TimeoutError  # what the cut left of the answer looks complete where no length was announced
            return answer
        except Exception:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no complete answer within {timeout_s:g} s") from None
            raise
        finally:
            connection.close()


def cut(wire: socket.socket) -> None:
    try:
        wire.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was closed meanwhile


def sum_samples(page: str, name: str) -> float | None:
    """Add up the samples of exactly this name in a Prometheus text page; None where it has none."""
    total = None
    for line in page.splitlines():
        if line.startswith(name) and line[len(name) : len(name) + 1] in ("{", " ", "\t"):
            sample = line[len(name) :].split(" # ")[0]  # without an exemplar
            try:
                value = float(sample.rpartition("}")[2].split()[0])
            except (ValueError, IndexError):
                continue
            if math.isfinite(value):
                total = (total or 0.0) + value
    return total


# ----------------------------------------------------------------------------------------------------------- black box


class Snapshot:
    """What the engines' processes are doing, written down for people: the group hangs and is about to be stopped.

    What may hang itself (a file system, /proc, py-spy, nvidia-smi) hangs a thread or a child, never the agent. All
    children are started here, at once, so that none is started while the agent ends its tree.
    """

    def __init__(self, step: Step, engines: dict[int, Engine], inbox: Inbox) -> None:
        self._began = time.monotonic()
        self.ends_at = self._began + step.snapshot_s
        self._answers_until = self._began + ANSWER_SHARE * step.snapshot_s
        self._done = False
        self._written: list[int] = []
        self._troubles: list[str] = []
        self._engines = engines
        self._trees: dict[int, list[int]] = {}
        self._asked: dict[str, tuple[int, int]] = {}  # question -> child, pipe
        table = processes(dead=True)
        for main in engines:
            # What detached itself from its engine is our child: with one engine it is known whose it was.
            tree = below(table, [os.getpid() if len(engines) == 1 else main])
            tree.sort(key=lambda process: -int(process.fields[21]))  # resident pages: workers before small helpers
            self._trees[main] = [main, *(process.pid for process in tree if process.pid != main)]
            for pid in list(filter(runs_python, self._trees[main]))[:MAX_STACKS]:
                self._asked[str(pid)] = ask(["py-spy", "dump", "--nonblocking", "--pid", str(pid)], inbox)
        for question in SMI_QUESTIONS:
            self._asked[question] = ask(["nvidia-smi", question, "--format=csv,noheader"], inbox)
        self._children = {child for child, _ in self._asked.values()}
        in_background(self._run)

    def over(self, inbox: Inbox) -> bool:
        """Tell whether it is over, and report it then. Ends the children that did not answer in time."""
        now = time.monotonic()
        self._children -= inbox.exits.keys()
        if not self._done:
            if now < self.ends_at:
                return False
            self._troubles.append(f"not written within {self.ends_at - self._began:g} s")
        for child in self._children:
            kill(-child)
            kill(child)  # under load it may not have come to its setpgid yet
        reports.say("snapshot", ranks=self._written, took_s=round(now - self._began, 3), notes=self._troubles)
        return True

    def _run(self) -> None:
        """Look twice, collect the answers, write: the body of the snapshot's thread."""
        try:
            at, first = time.time(), self._look()
            syscalls: dict[int, list[str]] = {}
            numbers = ((pid, read_file(f"/proc/{pid}/syscall").decode().split()[:1]) for pid in first)
            in_background(syscalls.update, numbers)  # apart: before Linux 5.11 that waits where a process hangs in exec
            time.sleep(max(0.0, min(LOOKS_APART_S, self._answers_until - time.monotonic())))
            second, connections, answers = self._look(), tcp_of(self._trees), self._answers()
            for main, engine in self._engines.items():
                tree = [pid for pid in self._trees[main] if pid in first and pid in second]
                told = {key: answers[key] for key in (*map(str, self._trees[main]), *SMI_QUESTIONS) if key in answers}
                value = {
                    "schema": 1,
                    "rank": engine.member.rank,
                    "at": round(at, 3),
                    "took_s": round(time.monotonic() - self._began, 3),
                    "pid": main,
                    "processes": [process_row(first[pid], second[pid], syscalls.get(pid)) for pid in tree],
                    "sockets": connections[main][:MAX_SOCKETS],
                    "socket_states": Counter(row["state"] for row in connections[main]),
                    "py_spy": {key: text for key, (text, _) in told.items() if key.isdigit() and text},
                    "nvidia_smi": "".join(told[key][0] for key in SMI_QUESTIONS),
                    "log": log_facts(engine.member.log),
                    "local_probe": engine.probe and {"failures": engine.probe.state[0], "error": engine.probe.state[1]},
                    "notes": list(dict.fromkeys(note for _, note in told.values() if note)),
                }
                self._write(engine.member, value)
        except Exception as error:  # whatever it is, it must not be in the way of the stop
            self._troubles.append(f"{type(error).__name__}: {error}")
        self._done = True
        kill(os.getpid(), signal.SIGCHLD)  # wakes the main thread, which does all reporting

    def _look(self) -> dict[int, Look]:
        """Return what each process and its threads do; once it is late, not the threads."""
        found: dict[int, Look] = {}
        for pid in (pid for tree in self._trees.values() for pid in tree):
            process, now = read_process(pid), time.monotonic()
            if process is not None:
                found[pid] = now, process, threads_of(pid) if now < self._answers_until else {}
        return found

    def _answers(self) -> dict[str, tuple[str, str]]:
        """Return by question what was answered until the deadline, and what is wrong with it."""
        pipes = {reader: question for question, (_, reader) in self._asked.items()}
        texts, waiting, ready = dict.fromkeys(pipes, b""), set(pipes), [0]
        while waiting and ready:
            ready = select.select(list(waiting), [], [], max(0.0, self._answers_until - time.monotonic()))[0]
            for reader in ready:
                part = os.read(reader, 65536)
                texts[reader] += part
                if not part or len(texts[reader]) >= MAX_ANSWER_BYTES:
                    waiting.discard(reader)
        for reader in pipes:
            os.close(reader)
        return {question: judged(question, texts[r], r not in waiting) for r, question in pipes.items()}

    def _write(self, member: Member, value: dict[str, Any]) -> None:
        path = member.snapshot
        try:
            make_folders(os.path.dirname(path))
            with open(path + ".new", "w", encoding="ascii", opener=owner_only) as f:
                json.dump(value, f)
            os.rename(path + ".new", path)
            self._written.append(member.rank)
        except OSError as error:
            self._troubles.append(f"rank {member.rank}: {path} cannot be written: {error.strerror}")


def runs_python(pid: int) -> bool:
    """Is its program Python? Its name says nothing: engines set their title."""
    try:
        return "python" in os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False


def judged(question: str, answer: bytes, complete: bool) -> tuple[str, str]:
    """Return what py-spy (asked about a pid) or nvidia-smi answered, and what is wrong with it."""
    text, spy = answer.decode(errors="replace"), question.isdigit()
    program, who = ("py-spy", f"py-spy, pid {question}") if spy else ("nvidia-smi", f"nvidia-smi {question}")
    if complete and not text and not find_program(program):
        return "", f"{program} is not on PATH"
    if spy and text.startswith("Process "):  # the command line, which may have any number of lines, comes first
        text = "".join(text.rpartition("\nPython v")[1:]).lstrip()
    if complete and spy and "\nThread " not in text:
        return "", f"{who}: {' '.join(text.split())[:300] or 'no answer'}"
    return text if spy else f"{question[8:]}\n{text}", "" if complete else f"{who}: no complete answer in time"


def threads_of(pid: int) -> dict[str, str]:
    """Return state and wait channel (which the kernel may hide) of the process's threads, of the first ones only."""
    found = {}
    try:
        for thread in os.listdir(f"/proc/{pid}/task")[:MAX_THREADS]:
            text, wchan = (read_file(f"/proc/{pid}/task/{thread}/{name}") for name in ("stat", "wchan"))
            state = chr(text[text.rindex(b")") + 2])
            found[thread] = state if wchan in (b"", b"0") else f"{state} {wchan.decode()}"
    except (OSError, ValueError):  # it ends
        pass
    return found


def process_row(before: Look, now: Look, syscall: list[str] | None) -> dict[str, Any]:
    """Return what two looks at a process say."""
    (was_at, was, were), (at, process, threads) = before, now
    used_s = [(int(p.fields[11]) + int(p.fields[12])) / os.sysconf("SC_CLK_TCK") for p in (was, process)]
    blocked = {text[2:] for thread, text in threads.items() if text[:1] == "D" and were.get(thread) == text}
    return {
        "pid": process.pid,
        "parent": process.parent,
        "name": process.name,
        "state": process.fields[0].decode(),
        "wchan": threads.get(str(process.pid), "")[2:],
        "blocked": sorted(blocked),
        "syscall": "".join(syscall or ()),
        "threads": int(process.fields[17]),
        "threads_by": Counter(threads.values()),
        "cpu_s": used_s[1],
        "cpu_used_s": round(used_s[1] - used_s[0], 2),
        "within_s": round(at - was_at, 2),
        "rss_mb": int(process.fields[21]) * os.sysconf("SC_PAGE_SIZE") >> 20,
    }


def tcp_of(trees: Mapping[int, list[int]]) -> dict[int, list[dict[str, Any]]]:
    """Return each tree's TCP sockets, those with most in their queues first."""
    owners: dict[str, tuple[int, int]] = {}
    for main, tree in trees.items():
        for pid in tree:
            for inode in socket_inodes(pid) or ():
                owners.setdefault(inode, (main, pid))
    found: dict[int, list[dict[str, Any]]] = {main: [] for main in trees}
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        for fields in tcp_lines(path):
            main, pid = owners.get(fields[9].decode(), (0, 0))
            if main:
                local, remote = (f"[{a}]:{p}" if ":" in a else f"{a}:{p}" for a, p in map(tcp_end, fields[1:3]))
                row = {"local": local, "remote": remote, "state": TCP_STATES.split()[int(fields[3], 16)], "pid": pid}
                tx, rx = (int(queue, 16) for queue in fields[4].split(b":"))
                found[main].append({**row, "rx_queue": rx, "tx_queue": tx})
    return {main: sorted(rows, key=lambda row: -row["rx_queue"] - row["tx_queue"]) for main, rows in found.items()}


def log_facts(path: str) -> dict[str, Any] | None:
    """Return the log's end, and how long it has been silent; None without one."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    silent_s = round(time.time() - found.st_mtime, 1)
    return {"path": path, "size": found.st_size, "silent_s": silent_s, "last_lines": last_lines(path)}


# ---------------------------------------------------------------------------------------------------------------- main


def limit_core_dumps() -> None:
    """Dumping hundreds of gigabytes would delay recovery; a setup line (`ulimit -c`) may raise the limit again."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def serve(step: Step, records: Records, inbox: Inbox) -> None:
    """Fence, go, engines. Ends by raising `End`."""
    records.claim()
    records.write(alone=True)
    for member in step.members:
        gpu_environment(member)  # a wrong mask is found out before anything is ended or started
    fence(step, records, inbox)
    # What needs no proof is prepared while the coordinator collects the reports of the other nodes.
    prctl = load_prctl()
    become_subreaper(prctl)
    limit_core_dumps()
    kernel = KernelLog() if any(member.gpus for member in step.members) else None
    inbox.go = False
    while not inbox.go:
        inbox.wait(None)
    inbox.go = False
    inbox.exits.clear()
    engines = start(step, records, inbox, prctl)
    in_background(forget_ended, step)
    try:
        watch(step, engines, records, inbox)
    except End as end:
        end.kernel = kernel
        if end.cause == "stopped":
            graceful(step, engines, inbox)
        raise


def main() -> int:
    """Carry out ROLLOUT_STEP; return the exit status."""
    inbox = Inbox()
    if sys.argv[1:]:
        if sys.argv[1:] == ["--help"]:
            print(__doc__.strip(), flush=True)
            return 0
        print("it takes no arguments but --help; its orders come in ROLLOUT_STEP", file=sys.stderr)
        return STATUS["bad_config"]
    slurm = slurm_step()
    name = f"{slurm['job']}.{slurm['step']}" if slurm else ""
    reports.keep("hello", pid=os.getpid(), step=name, host=os.uname().nodename)
    records = None
    step = None
    try:
        step = read_orders()
        records = Records(step)
        if step.mode == "sweep":
            fence(step, records, inbox)
            raise End("swept", "nothing of this incarnation or an older one is left")
        serve(step, records, inbox)
    except End as e:
        end = e
    except Exception as error:  # a bug, or a node in trouble: the tree must not outlive us unwatched
        import traceback

        traceback.print_exc()
        room = no_room(error, getattr(error, "filename", None) or "a file system", step.node if step else "this node")
        end = End("bad_config", f"the agent failed: {type(error).__name__}: {error}", **room)
    end_tree(inbox)
    if records is not None:
        records.remove()
    if end.cause == "engine_exited" and step is not None:
        member = next(member for member in step.members if member.rank == end.record["rank"])
        lines = end.record["last_lines"] = last_lines(member.log) if member.log else []
        evidence = {
            "disk": full_disk(step, member, lines),
            "hardware": broken_gpu(end.kernel.lines(), lines) if end.kernel is not None else "",
        }
        end.record.update({key: text for key, text in evidence.items() if text})
    reports.say("exit", **end.record)
    return STATUS[end.cause]


if __name__ == "__main__":
    os._exit(main())
