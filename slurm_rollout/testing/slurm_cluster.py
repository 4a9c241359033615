"""A real Slurm cluster on one machine, for rehearsals and tests: real slurmctld, slurmd and munged, fake GPUs.

    with SlurmCluster(nodes=4, gpus=8) as cluster:
        job = cluster.sbatch("#!/bin/bash\\nsrun hostname\\n", "-N4", "--exclusive", "--gres=gpu:8")

or, by hand and as root: ``python -m slurm_rollout.testing.slurm_cluster --nodes 4``.

Every node, and the controller's host ``ctl``, is a set of Linux namespaces (network, processes, mounts, host name) with
a first process that ends when the owner of the cluster ends, however it ends; the kernel then ends everything in it.
The machine itself is not touched: no user, no bridge, no line in /etc/hosts, no mount. All that a killed owner leaves
is one directory, and the next start removes it.

With another system's root directory, such as `.ci/slurm-chroot` makes, all of a host but the kernel is that system's:
another version of Slurm runs, beside the machine's. ROLLOUT_SLURM_ROOT names one for all clusters.

The nodes share the machine's file system; private to each are /tmp, /dev/shm and /proc. So a process has one pid on its
node and another one outside; ``user_pids`` gives the latter. The network is private too: from outside, a port of a
node is reached only through ``in_node`` or ``run``.
"""

import argparse
import contextlib
import fcntl
import os
import pwd
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from slurm_rollout.testing.cluster_venv import fill

# Only root can write here, so nobody can plant what a cluster would run. Not in /run: often mounted noexec and nodev.
BASE = Path("/var/lib/slurm-rollout-cluster")
# A cluster claims the first free one, for its user and for its directory: clusters side by side share neither.
UIDS = range(59000, 59100)
USER = "rollout"
CONTROLLER = "ctl"
NETWORK = "10.77.0"
CONTROLLER_PORT = 6817
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FREEZER = Path("/sys/fs/cgroup/freezer")
MACHINE_PROGRAMS = ("chroot", "ip", "mount", "nsenter", "unshare")
HOST_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "setpriv")
UNSHARE = ("unshare", "--net", "--pid", "--mount", "--uts", "--fork")

# $1: a directory of files for /etc; $2: the host name; $3: its root directory, "" for the machine's; what follows is
# shared with the machine. It prints its pid as seen outside (the new /proc would say 1) and waits for the end of its
# standard input. `wait` also reaps orphans, the duty of a first process.
FIRST_PROCESS = """
read -r pid rest </proc/self/stat
etc=$1 name=$2 root=$3
shift 3
for path; do mount --rbind "$path" "$root$path"; done
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
for path in "$etc"/*; do mount --bind "$path" "$root/etc/${path##*/}"; done
hostname "$name"
ip link set lo up
exec chroot "$root/" sh -euc 'exec 3<&0; cat <&3 >/dev/null & echo "$1"; wait' sh "$pid"
"""

Argv = Sequence[str | Path]
Env = Mapping[str, str] | None


class SlurmClusterError(RuntimeError):
    """The cluster, or a command in it, failed; the message ends with the last lines of the log or of the output."""


def why_unavailable(slurm_root: Path | None = None) -> str | None:
    """One line that says why no cluster can run on this machine; None when it can. ``slurm_root`` as for a cluster."""
    slurm_root = slurm_root or root_from_environment()
    if sys.platform != "linux":
        return f"real Slurm needs Linux; this is {sys.platform}"
    if os.geteuid() != 0:
        return "real Slurm needs root here: it makes namespaces and starts slurmd"
    if missing := [*_missing(MACHINE_PROGRAMS), *_missing(() if slurm_root else HOST_PROGRAMS)]:
        return f"not installed: {', '.join(missing)} (Debian, Ubuntu: apt-get install slurm-wlm munge iproute2)"
    if slurm_root and (missing := _missing(HOST_PROGRAMS, slurm_root)):
        return f"not in {slurm_root}: {', '.join(missing)} (.ci/slurm-chroot makes such a directory)"
    trial = "mount -t proc proc /proc; ip link add b0 type bridge; ip link add v0 type veth peer name v1"
    done = subprocess.run([*UNSHARE, "sh", "-euc", trial], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"no namespaces here: {' '.join(done.stderr.split()) or f'unshare ended with {done.returncode}'}"
    return None


def root_from_environment() -> Path | None:
    """The root directory that ROLLOUT_SLURM_ROOT names."""
    named = os.environ.get("ROLLOUT_SLURM_ROOT")
    return Path(named).absolute() if named else None


def _missing(programs: Collection[str], root: Path = Path("/")) -> list[str]:
    # Links of Debian's alternatives are absolute: from outside of their root they lead nowhere.
    folders = [root / folder[1:] for folder in SYSTEM_PATH.split(":")]
    return [program for program in programs if not any(os.path.lexists(folder / program) for folder in folders)]


def wait_until(what: str, seen: Callable[[], bool], timeout_s: float, period_s: float = 0.05) -> None:
    """Return once ``seen()`` is true. TimeoutError: ``what`` did not come true within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not seen():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s in vain for: {what}")
        time.sleep(period_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Host:
    process: subprocess.Popen[str]
    pid: int


class SlurmCluster:
    """A cluster of ``nodes`` nodes ``n1`` … with ``cpus`` CPUs and ``gpus`` fake GPUs each; a context manager.

    The batch script of a job runs on the first node of its allocation. ``slurmd_timeout_s`` is Slurm's SlurmdTimeout:
    how long a node may be silent before it is DOWN. ``proctrack`` is how Slurm finds the processes of a step: by their
    parents (``linuxproc``: one that daemonises escapes for a minute), or with ``cgroup``, as most sites do, for which
    the machine must have the cgroup v1 freezer. ``conf_lines`` are added to slurm.conf. ``slurm_root`` is the root
    directory of another system, whose Slurm, Python and other programs then run; ROLLOUT_SLURM_ROOT if it is not given.
    Raises SlurmClusterError when it cannot start, and then leaves nothing behind.

    ``env`` is the whole environment of the ordinary user ``user`` (``uid``), who owns ``home``; ``python`` runs
    slurm_rollout as it was on disk when the cluster started; ``logs`` are the daemons' logs; ``slurm_version`` is such
    as (22, 5).
    """

    def __init__(
        self,
        *,
        nodes: int = 4,
        gpus: int = 8,
        cpus: int = 16,
        slurmd_timeout_s: int = 20,
        proctrack: Literal["linuxproc", "cgroup"] = "linuxproc",
        conf_lines: Sequence[str] = (),
        slurm_root: Path | None = None,
    ) -> None:
        self.nodes = tuple(f"n{index}" for index in range(1, nodes + 1))
        self.gpus = gpus
        self.cpus = cpus
        self.slurmd_timeout_s = slurmd_timeout_s
        self.proctrack = proctrack
        self.conf_lines = tuple(conf_lines)
        self.slurm_root = slurm_root or root_from_environment()
        self.user = USER
        self._hosts: dict[str, _Host] = {}
        self._were_cut: set[str] = set()
        self._lock: int | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Without ``with``; then ``stop`` is the caller's duty. Returns when all nodes are idle."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        if reason := why_unavailable(self.slurm_root):
            raise SlurmClusterError(reason)
        if self.proctrack == "cgroup" and not FREEZER.exists():
            raise SlurmClusterError(f"proctrack=cgroup needs cgroup v1; there is no {FREEZER}")
        self.slurm_version = _slurm_version(self.slurm_root)
        self.uid, self._lock = _claim()
        self.root = BASE / str(self.uid)
        self.logs = self.root / "log"
        self.home = self.root / "home"
        self.conf = self.root / "etc/slurm/slurm.conf"
        self.python = self.root / "venv/bin/python"
        self.enter = self.root / "enter"
        self.env = {
            "PATH": f"{self.python.parent}:{SYSTEM_PATH}",
            "HOME": str(self.home),
            "USER": USER,
            "LOGNAME": USER,
            "SHELL": "/bin/bash",
            "LC_ALL": "C",
            "SLURM_CONF": str(self.conf),
        }
        self._write_files()
        for name in (CONTROLLER, *self.nodes):
            self._boot(name)
        self._wire()
        self._write_enter()
        self.start_munged()
        # -c forgets all state: right for the first start only.
        self._daemon(CONTROLLER, "slurmctld", "-c", "-f", str(self.conf))
        for node in self.nodes:
            self._daemon(node, "slurmd", "-N", node, "-f", str(self.conf))
        self._install()
        self._wait_controller()
        self.wait_idle(timeout_s=30)

    def _install(self) -> None:
        venv = self.root / "venv"
        self.run([self._interpreter(), "-m", "venv", "--without-pip", venv], user=False)
        try:
            fill(venv, BASE)
        except subprocess.CalledProcessError as error:
            raise SlurmClusterError(_failure(error.cmd, "this machine", error)) from None
        self.run([self.python, "-m", "compileall", "-q", *venv.glob("lib/*/*/slurm_rollout")], user=False)
        _checked(["chmod", "-R", "a+rX", str(venv)])

    def _interpreter(self) -> str:
        """The first Python, 3.11 or newer, that the user can run: the one that runs this may be closed to them."""
        ours = [] if self.slurm_root else [os.path.realpath(sys.executable)]
        test = "import sys, venv; sys.exit(sys.version_info < (3, 11))"
        for candidate in [*ours, "python3", *(f"python3.{minor}" for minor in range(20, 10, -1))]:
            if self.run([candidate, "-I", "-c", test], check=False).returncode == 0:
                return candidate
        closed = "" if self.slurm_root else f"{sys.executable} is closed to them, and "
        raise SlurmClusterError(
            f"no Python 3.11 or newer that an ordinary user can run: {closed}in {SYSTEM_PATH} "
            f"{f'of {self.slurm_root} ' if self.slurm_root else ''}there is none; install one there"
        )

    def stop(self) -> None:
        """End and remove everything. May be called at any time, and again."""
        for host in self._hosts.values():
            if host.process.poll() is None:
                os.kill(host.pid, signal.SIGKILL)
        for host in self._hosts.values():
            host.process.communicate(timeout=30)
        self._hosts.clear()
        self._were_cut.clear()
        if self._lock is not None:
            _remove(self.uid)
            os.close(self._lock)
            self._lock = None

    def _write_files(self) -> None:
        for name, owner, mode in (
            (".", 0, 0o755),
            ("log", 0, 0o755),
            ("munge", 0, 0o755),
            ("state", 0, 0o700),
            ("gpu", 0, 0o755),
            ("home", self.uid, 0o700),
        ):
            directory = self.root / name
            directory.mkdir()
            directory.chmod(mode)
            os.chown(directory, owner, owner)
        for index in range(self.gpus):
            os.mknod(self.root / f"gpu/gpu{index}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (self.root / "munge/key").touch(mode=0o600)
        (self.root / "munge/key").write_bytes(os.urandom(128))
        etc = (self.slurm_root or Path("/")) / "etc"
        addresses = [f"{NETWORK}.{index} {node}\n" for index, node in enumerate(self.nodes, 1)]
        files = {
            "hosts": "".join(["127.0.0.1 localhost\n", f"{NETWORK}.254 {CONTROLLER}\n", *addresses]),
            # First, so that it also wins over a real user of that name.
            "passwd": f"{USER}:x:{self.uid}:{self.uid}::{self.home}:/bin/bash\n{(etc / 'passwd').read_text()}",
            "group": f"{USER}:x:{self.uid}:\n{(etc / 'group').read_text()}",
            "slurm/slurm.conf": self._slurm_conf(),
            "slurm/gres.conf": "AutoDetect=off\n",
        }
        if self.gpus:
            files["slurm/gres.conf"] += f"Name=gpu File={self.root}/gpu/gpu[0-{self.gpus - 1}]\n"
        # Never its own detection: slurmd 22.05 ends where there is no cgroup file system, though linuxproc needs none;
        # told v1, it does not look. "disabled" is known since 24.05. 20.11 knows no plugins, but needs the file.
        off = self.slurm_version >= (24, 5) and self.proctrack != "cgroup"
        plugin = f"CgroupPlugin={'disabled' if off else 'cgroup/v1'}\n"
        files["slurm/cgroup.conf"] = plugin if self.slurm_version >= (22, 5) else ""
        for name, text in files.items():
            path = self.root / "etc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        _checked(["chmod", "-R", "a+rX", str(self.root / "etc")])

    def _slurm_conf(self) -> str:
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        hardware = f"CPUs={self.cpus} RealMemory=20000{gres}"
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr={NETWORK}.{index} {hardware}"
            for index, node in enumerate(self.nodes, 1)
        ]
        nodes_and_more = "\n".join([*nodes, *self.conf_lines])
        # config_overrides: else a node with more CPUs than this machine is INVAL. SchedulerParameters: a batch job
        # starts within a second, not three (22.05; the first one of a controller is late all the same); so does a
        # heterogeneous one, which only the backfill scheduler starts.
        return f"""\
ClusterName=rehearsal
SlurmctldHost={CONTROLLER}({NETWORK}.254)
SlurmctldPort={CONTROLLER_PORT}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={self.root}/munge/socket
StateSaveLocation={self.root}/state
SlurmdSpoolDir={self.root}/spool-%n
SlurmctldPidFile={self.root}/slurmctld.{CONTROLLER}.pid
SlurmctldLogFile={self.logs}/slurmctld.{CONTROLLER}.log
SlurmdPidFile={self.root}/slurmd.%n.pid
SlurmdLogFile={self.logs}/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/{self.proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=1
ReturnToService=2
KillWait=5
SlurmdTimeout={self.slurmd_timeout_s}
{"GresTypes=gpu" if self.gpus else ""}
PartitionName=main Nodes={",".join(self.nodes)} Default=YES MaxTime=INFINITE State=UP
{nodes_and_more}
"""

    def _boot(self, name: str) -> None:
        log = self.logs / f"boot.{name}.log"
        shared = ("/dev", "/sys", BASE) if self.slurm_root else ()
        if self.slurm_root:
            (self.slurm_root / BASE.relative_to("/")).mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            # In a session of its own: Ctrl-C at the owner's terminal must not reach it, the owner decides.
            process = subprocess.Popen(
                [*UNSHARE, "sh", "-euc", FIRST_PROCESS, "sh", self.root / "etc", name, self.slurm_root or "", *shared],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        assert process.stdout
        if line := process.stdout.readline():
            self._hosts[name] = _Host(process=process, pid=int(line))
        else:
            process.communicate()
            raise SlurmClusterError(f"host {name} did not start:\n{_tail(log)}")

    def _wire(self) -> None:
        bridge = [f"link add br0 type bridge\naddr add {NETWORK}.254/24 dev br0\nlink set br0 up"]
        for node in self.nodes:
            # The pid is the one of outside: `ip` must enter the network namespace only.
            bridge.append(f"link add {node} type veth peer name eth0 netns {self._hosts[node].pid}")
            bridge.append(f"link set {node} master br0 up")
        self._ip(CONTROLLER, *bridge)
        for index, node in enumerate(self.nodes, 1):
            self._ip(node, f"addr add {NETWORK}.{index}/24 dev eth0", "link set eth0 up")

    def _ip(self, host: str, *commands: str) -> None:
        network = f"--net=/proc/{self._hosts[host].pid}/ns/net"
        _checked(["nsenter", network, "ip", "-batch", "-"], stdin="\n".join(commands))

    def _write_enter(self) -> None:
        terminal = {"TERM": os.environ.get("TERM", "dumb")}
        shells = {host: shlex.join(self._entering(host, ["bash"], user=True, env=terminal)) for host in self._hosts}
        cases = "".join(f"{host}) exec {shell} ;;\n" for host, shell in shells.items())
        self.enter.write_text(
            f'#!/bin/sh\ncase "${{1:-{CONTROLLER}}}" in\n{cases}*) echo "no such node: $1" >&2; exit 2 ;;\nesac\n'
        )
        self.enter.chmod(0o700)

    def _daemon(self, host: str, program: str, *options: str) -> None:
        log = self.logs / f"{program}.{host}.log"
        try:
            self.in_node(host, [program, *options], user=False)
        except SlurmClusterError as error:
            raise SlurmClusterError(f"{program} on {host} did not start: {error}\n{_tail(log)}") from None

    def _daemon_pid(self, host: str, program: str) -> int | None:
        """The daemon's pid on its host, None when it does not run."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.root / f"{program}.{host}.pid").read_text())
            if Path(f"/proc/{self._hosts[host].pid}/root/proc/{pid}").exists():
                return pid
        return None

    def _wait_controller(self) -> None:
        # From the kernel's table, not with a command of Slurm: those take seconds to give up.
        table = Path(f"/proc/{self._hosts[CONTROLLER].pid}/net/tcp")
        listening = f":{CONTROLLER_PORT:04X} 00000000:0000 0A"
        try:
            wait_until("slurmctld listens", lambda: listening in table.read_text(), timeout_s=20, period_s=0.02)
        except TimeoutError as error:
            raise SlurmClusterError(f"{error}\n{_tail(self.logs / f'slurmctld.{CONTROLLER}.log')}") from None

    # Commands

    def run(
        self,
        argv: Argv,
        *,
        node: str = CONTROLLER,
        user: bool = True,
        timeout_s: float = 60,
        env: Env = None,
        cwd: Path | None = None,
        stdin: str = "",
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, outside of Slurm, as the user or as root: on the controller's host, as on a login node, or on
        a node. ``env`` is added to the cluster's; ``cwd`` is the user's home if it is not given.

        Raises SlurmClusterError when the exit code is not 0 and ``check`` is true; subprocess.TimeoutExpired after
        ``timeout_s``: the command, though not what it started, is dead then.
        """
        entering = self._entering(node, argv, user=user, env=env, cwd=cwd)
        done = subprocess.run(entering, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
        if check and done.returncode != 0:
            raise SlurmClusterError(_failure(argv, node, done))
        return done

    def in_node(
        self, node: str, argv: Argv, *, user: bool = True, timeout_s: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """``run`` on a node."""
        return self.run(argv, node=node, user=user, timeout_s=timeout_s, check=check)

    def popen_in_node(self, node: str, argv: Argv, *, user: bool = True, env: Env = None) -> subprocess.Popen[str]:
        """The same, not waited for. All output is in ``stdout``; ``kill()`` and ``terminate()`` both kill."""
        return subprocess.Popen(
            self._entering(node, argv, user=user, env=env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _entering(self, host: str, argv: Argv, *, user: bool, env: Env = None, cwd: Path | None = None) -> list[str]:
        # nsenter forks, because no process changes its own pid namespace, and passes no signal on: hence pdeathsig.
        # It arrives in / whatever the working directory was: hence chdir.
        return [
            *("nsenter", f"--target={self._hosts[host].pid}", "--net", "--pid", "--mount", "--root", "--uts", "--"),
            *("setpriv", "--pdeathsig=KILL", "--clear-groups"),
            *((f"--reuid={self.uid}", f"--regid={self.uid}") if user else ()),
            *("env", "--ignore-environment", f"--chdir={cwd or self.home}"),
            *(f"{key}={value}" for key, value in {**self.env, **(env or {})}.items()),
            *map(str, argv),
        ]

    # Jobs

    def sbatch(self, script_text: str, *args: str) -> str:
        """Submit a batch script as the user, from their home; the job's id."""
        return self.run(["sbatch", "--parsable", *args], stdin=script_text).stdout.strip().split(";")[0]

    def job_state(self, job: str) -> str:
        """As Slurm writes it, such as ``RUNNING``. Slurm forgets a job five minutes after its end."""
        return _field(self._show_job(job), "JobState")

    def _show_job(self, job: str) -> str:
        return self.run(["scontrol", "--oneliner", "show", "job", job]).stdout

    def wait_job(self, job: str, states: str | Collection[str], timeout_s: float = 30) -> str:
        """Return the state once it is one of ``states``.

        SlurmClusterError, with the job's output, when that takes longer than ``timeout_s`` or the job ended otherwise.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + timeout_s
        while (state := _field(shown := self._show_job(job), "JobState")) not in wanted:
            ended = state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED")
            if ended or time.monotonic() > deadline:
                what = f"job {job} {'has ended' if ended else f'after {timeout_s:g} s'}: {state}"
                output = _tail(Path(_field(shown, "StdOut")))
                raise SlurmClusterError(f"{what} ({_field(shown, 'Reason')}), wanted {sorted(wanted)}\n{output}")
            time.sleep(0.1)
        return state

    def cancel(self, job: str) -> None:
        """Ask Slurm to end the job; ``wait_job`` tells when it did."""
        self.run(["scancel", job])

    def wait_idle(self, timeout_s: float = 30) -> None:
        """Return once no node has anything to do or anything wrong. SlurmClusterError says which has, and its log."""
        seen = ""

        def idle() -> bool:
            nonlocal seen
            seen = self.run(["sinfo", "--noheader", "--Node", "--format=%N %T %E"], check=False).stdout
            return [line.split()[:2] for line in seen.splitlines()] == [[node, "idle"] for node in self.nodes]

        try:
            wait_until("all nodes idle", idle, timeout_s)
        except TimeoutError as error:
            bad = [line.split()[0] for line in seen.splitlines() if " idle " not in line]
            tails = [f"slurmd.{node}.log:\n{_tail(self.logs / f'slurmd.{node}.log')}" for node in bad]
            raise SlurmClusterError("\n".join([str(error), seen, *tails])) from None

    # Faults

    def cut(self, node: str) -> None:
        """Take the node off the network: from elsewhere it looks like a loss of power, but what runs on it goes on."""
        self._ip(node, "link set eth0 down")
        self._were_cut.add(node)

    def join(self, node: str) -> None:
        """Bring it back. If Slurm had given it up, it returns when Slurm next looks (after 15 to 90 s, 22.05), and only
        then what had survived there is killed."""
        self._ip(node, "link set eth0 up")

    def register(self, node: str) -> None:
        """Have Slurm see at once that a node is back."""
        self._signal(node, "slurmd", "HUP")

    def freeze_controller(self) -> None:
        """SIGSTOP slurmctld: it accepts connections and never answers. Running jobs go on."""
        self._signal(CONTROLLER, "slurmctld", "STOP")

    def thaw_controller(self) -> None:
        """SIGCONT slurmctld."""
        self._signal(CONTROLLER, "slurmctld", "CONT")

    def stop_controller(self, timeout_s: float = 30) -> None:
        """End slurmctld, its state saved: connections are refused. Running jobs go on."""
        self._signal(CONTROLLER, "slurmctld", "TERM")
        wait_until("slurmctld ended", lambda: self._daemon_pid(CONTROLLER, "slurmctld") is None, timeout_s)

    def start_controller(self) -> None:
        """Start slurmctld again, with the state that it had."""
        self._daemon(CONTROLLER, "slurmctld", "-f", str(self.conf))
        self._wait_controller()

    def stop_munged(self) -> None:
        """End the one munged that all hosts use: every command is refused, as where clocks are minutes apart."""
        self._signal(CONTROLLER, "munged", "TERM")
        wait_until("munged ended", lambda: self._daemon_pid(CONTROLLER, "munged") is None, timeout_s=10)

    def start_munged(self) -> None:
        """Start munged, or start it again."""
        munge = {"key-file": "munge/key", "socket": "munge/socket", "seed-file": "munge/seed"}
        munge |= {"pid-file": f"munged.{CONTROLLER}.pid", "log-file": f"log/munged.{CONTROLLER}.log"}
        self._daemon(CONTROLLER, "munged", *(f"--{option}={self.root / path}" for option, path in munge.items()))

    def heal(self) -> None:
        """Undo every fault above, and have Slurm see at once that the nodes are back."""
        if not self._daemon_pid(CONTROLLER, "munged"):
            self.start_munged()
        if self._daemon_pid(CONTROLLER, "slurmctld"):
            self.thaw_controller()
        else:
            self.start_controller()
        for node in self._were_cut:
            self.join(node)
            self.register(node)
        self._were_cut.clear()

    def _signal(self, host: str, program: str, name: str) -> None:
        pid = self._daemon_pid(host, program)
        if pid is None:
            raise SlurmClusterError(f"{program} does not run on {host}\n{_tail(self.logs / f'{program}.{host}.log')}")
        self.in_node(host, ["sh", "-c", f"kill -{name} {pid}"], user=False)

    # Processes

    def user_pids(self, mark: str = "", node: str | None = None) -> list[int]:
        """Pids, as seen outside, of all live processes of the user.

        With ``mark`` only those that have it in their command line or environment, with ``node`` only those there.
        """
        space = os.readlink(f"/proc/{self._hosts[node].pid}/ns/pid") if node else None
        found = []
        for pid in _pids_of(self.uid):
            with contextlib.suppress(OSError):
                proc = Path(f"/proc/{pid}")
                if space and os.readlink(proc / "ns/pid") != space:
                    continue
                text = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
                if mark.encode() in text.replace(b"\0", b" "):
                    found.append(pid)
        return found

    def kill_user_processes(self, timeout_s: float = 10) -> None:
        """SIGKILL them all, and return when they are gone."""
        wait_until("the user's processes gone", lambda: _kill(_pids_of(self.uid)), timeout_s)


def _claim() -> tuple[int, int]:
    """A user id that no other cluster has, and the descriptor of its lock; removes what dead clusters left."""
    BASE.mkdir(exist_ok=True)
    BASE.chmod(0o755)
    claimed = None
    for uid in UIDS:
        lock = BASE / f"{uid}.lock"
        if claimed and not lock.exists():
            continue
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # The kernel drops a lock with its owner: what we can lock, nobody needs.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            continue
        _remove(uid)
        if claimed or _is_real_user(uid):
            os.close(fd)
        else:
            claimed = uid, fd
    if not claimed:
        raise SlurmClusterError(f"all {len(UIDS)} places for clusters in {BASE} are taken")
    return claimed


def _remove(uid: int) -> None:
    root = BASE / str(uid)

    def gone() -> bool:
        # Processes of an owner that was killed a moment ago may still be ending, and writing.
        shutil.rmtree(root, ignore_errors=True)
        return _kill(_pids_of(uid)) and not root.exists()

    if root.exists():
        wait_until(f"{root} removed", gone, timeout_s=15)
    # The node directories stay, empty: other clusters use the same ones.
    for cgroup in sorted(FREEZER.glob(f"slurm_n*/uid_{uid}/**/"), reverse=True):
        with contextlib.suppress(OSError):
            cgroup.rmdir()


def _is_real_user(uid: int) -> bool:
    try:
        return bool(pwd.getpwuid(uid))
    except KeyError:
        return False


def _pids_of(uid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (entry / "status").read_text()
            if f"\nUid:\t{uid}\t" in status and "\nState:\tZ" not in status:
                found.append(int(entry.name))
    return sorted(found)


def _kill(pids: list[int]) -> bool:
    """SIGKILL to each; true if there was none."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return not pids


def _slurm_version(root: Path | None) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)", _checked(["chroot", str(root or "/"), "slurmctld", "-V"]))
    return tuple(int(part) for part in found.groups()) if found else ()


def _checked(argv: Sequence[str], *, stdin: str = "", timeout_s: float = 60) -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        raise SlurmClusterError(_failure(argv, "this machine", done))
    return done.stdout


def _failure(argv: Argv, where: str, done: subprocess.CompletedProcess[str] | subprocess.CalledProcessError) -> str:
    output = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
    return f"{shlex.join(map(str, argv))} on {where}: exit code {done.returncode}\n{output}"


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    return f"(no {log})"


def _field(text: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S*)", text)
    return found[1] if found else ""


def main() -> int:
    parser = argparse.ArgumentParser(description="A real Slurm cluster on this machine, until Ctrl-C.")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--gpus", type=int, default=8, help="fake GPUs per node")
    parser.add_argument("--cpus", type=int, default=16, help="CPUs per node, which may be more than there are")
    parser.add_argument(
        "--slurm-root",
        type=Path,
        metavar="DIR",
        help="root directory of another system, as .ci/slurm-chroot makes them",
    )
    parser.add_argument("--slurmd-timeout", type=int, default=20, metavar="SECONDS", help="until a silent node is DOWN")
    args = parser.parse_args()
    if reason := why_unavailable(args.slurm_root):
        print(f"slurm_cluster: {reason}", file=sys.stderr)
        return 1
    # As Ctrl-C does: through the end of the `with` below.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with SlurmCluster(
            nodes=args.nodes,
            gpus=args.gpus,
            cpus=args.cpus,
            slurmd_timeout_s=args.slurmd_timeout,
            slurm_root=args.slurm_root,
        ) as cluster:
            print(
                f"{len(cluster.nodes)} nodes are up. In another terminal, as root:\n"
                f"    {cluster.enter}       a shell as user {cluster.user}, with sbatch, squeue, slurm-rollout\n"
                f"    {cluster.enter} n1    the same on a node\n"
                f"Logs: {cluster.logs}   SLURM_CONF={cluster.conf}\n"
                "Ctrl-C ends it and removes everything.",
                flush=True,
            )
            signal.pause()
    except KeyboardInterrupt:
        return 0
    except SlurmClusterError as error:
        print(f"slurm_cluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
