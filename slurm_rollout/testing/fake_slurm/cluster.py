"""The owner's side of the fake: start it, run commands in it, hurt it, end it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import slurm_rollout
from slurm_rollout.testing.fake_slurm import client
from slurm_rollout.testing.fake_slurm.model import user_name

PROGRAMS = ("srun", "scancel", "scontrol", "squeue", "sinfo", "sbatch")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_STUB = """\
#!{python} -IS
import sys
sys.path.insert(0, {package!r})
from slurm_rollout.testing.fake_slurm import {module}
sys.exit({module}.main({arguments}))
"""

Argv = Sequence[str | Path]

Refusal = Literal["nodes", "memory", "cpus", "gres", "completing", "limit"]
REFUSALS: Mapping[str, str] = {
    "nodes": "Requested node configuration is not available",
    # Also what every srun gets in the first second after slurmctld was restarted (measured, 22.05.8).
    "memory": "Memory required by task is not available",
    "cpus": "More processors requested than permitted",
    "gres": "Invalid generic resource (gres) specification",
    "completing": "Job/step already completing or completed",
    "limit": "Step limit reached for this job",
}


class FakeSlurmError(RuntimeError):
    """The fake, or a command in it, failed; the message ends with the last lines of the output."""


class FakeSlurm:
    """A fake cluster of `nodes` nodes `n1` … with `cpus` CPUs and `gpus` GPUs each; a context manager.

    Names and meanings are those of `SlurmCluster` where both have them. The nodes are names of this host. `commands` is
    the folder of srun and its like, `env` a whole environment with that folder on its PATH.

    The faults can also be set by another process, through a FakeSlurm of the same `root` that it does not start.

    Args:
        root: a folder of its own, made where it is missing; it stays. `home` is in it.
        proctrack: who gets a signal that is not KILL: a step's tasks and a job's script alone, as with `cgroup`, which
            most sites have, or all that descends from them, as with `linuxproc`.
        kill_wait_s: Slurm's KillWait: from TERM to KILL when a job ends (a site's default is 30).
        twin_s: how long after srun was killed its twin cancels the step (measured: up to 2 s).
        retry_s: after how long an srun that waits for its step tries again (real: 60 to 129 s).
        launch_s: how long srun tries to reach a silent node (measured: 3 to 12 s).
        requeue_s: how long a requeued job waits (real: 120 s).
        lost_step_s: how long the step of a node that is DOWN stays listed (measured: more than 60 s).

    Raises FakeSlurmError when it cannot start, and then leaves nothing behind.
    """

    def __init__(
        self,
        root: Path,
        *,
        nodes: int = 4,
        gpus: int = 8,
        cpus: int = 16,
        proctrack: Literal["cgroup", "linuxproc"] = "cgroup",
        kill_wait_s: float = 2.0,
        twin_s: float = 0.2,
        retry_s: float = 0.5,
        launch_s: float = 0.5,
        requeue_s: float = 0.5,
        lost_step_s: float = 2.0,
    ) -> None:
        self.root = root.absolute()
        self.nodes = tuple(f"n{index}" for index in range(1, nodes + 1))
        self.gpus = gpus
        self.cpus = cpus
        self.home = self.root / "home"
        self.python = Path(sys.executable)
        self.user = user_name()
        self._folder = self.root / "slurm"
        self.commands = self._folder / "bin"
        self._config = {
            "folder": str(self._folder),
            "nodes": self.nodes,
            "gpus": gpus,
            "cpus": cpus,
            "proctrack": proctrack,
            "kill_wait_s": kill_wait_s,
            "twin_s": twin_s,
            "retry_s": retry_s,
            "launch_s": launch_s,
            "requeue_s": requeue_s,
            "lost_step_s": lost_step_s,
        }
        self._controller: subprocess.Popen[bytes] | None = None
        self._forget_faults()
        self.env = {
            "PATH": f"{self.commands}:{self.python.parent}:{SYSTEM_PATH}",
            "HOME": str(self.home),
            "USER": self.user,
            "LOGNAME": self.user,
            "SHELL": "/bin/bash",
            "LC_ALL": "C",
            # Whoever tests a copy of a package wants its jobs to run that copy, too.
            **({"PYTHONPATH": path} if (path := os.environ.get("PYTHONPATH")) else {}),
        }

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Without `with`; then `stop` is the caller's duty."""
        if self._controller:
            raise FakeSlurmError("it was started already")
        self.home.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        self.commands.mkdir(parents=True)
        package = str(Path(slurm_rollout.__file__).parent.parent)
        for program in PROGRAMS:
            alone = program == "srun"
            stub = _STUB.format(
                python=sys.executable,
                package=package,
                module="srun" if alone else "client",
                arguments=repr(str(self._folder)) if alone else f"{program!r}, {str(self._folder)!r}",
            )
            (self.commands / program).write_text(stub)
            (self.commands / program).chmod(0o755)
        log = self._folder / "slurmctld.log"
        code = f"import sys; sys.path.insert(0, {package!r}); from slurm_rollout.testing.fake_slurm import controller"
        with log.open("wb") as errors:
            self._controller = subprocess.Popen(
                [sys.executable, "-IS", "-c", f"{code}; controller.main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={"PATH": SYSTEM_PATH, "LC_ALL": "C", **({"TZ": os.environ["TZ"]} if "TZ" in os.environ else {})},
                cwd="/",
                start_new_session=True,
            )
        assert self._controller.stdin
        assert self._controller.stdout
        with contextlib.suppress(BrokenPipeError):
            self._controller.stdin.write(json.dumps(self._config).encode() + b"\n")
            self._controller.stdin.flush()
        if self._controller.stdout.readline() != b"up\n":
            self.stop()
            raise FakeSlurmError(f"the controller did not start:\n{log.read_text()}")
        return self

    def stop(self) -> None:
        """End every process that was ever started in it. May be called at any time, and again."""
        controller, self._controller = self._controller, None
        if controller is None:
            return
        assert controller.stdin
        with contextlib.suppress(BrokenPipeError):
            controller.stdin.close()
        try:
            controller.wait(timeout=10)
        except subprocess.TimeoutExpired:
            controller.kill()  # the daemons of its steps then end what they have
            controller.wait()
        if controller.stdout:
            controller.stdout.close()

    # Commands

    def run(
        self,
        argv: Argv,
        *,
        timeout_s: float = 60,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: str = "",
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command outside of any job, as on a login node; `env` is added to the cluster's, `cwd` is `home`.

        Raises FakeSlurmError when the exit code is not 0 and `check` is true; subprocess.TimeoutExpired.
        """
        environ = {**self.env, **(env or {})}
        program = shutil.which(str(argv[0]), path=environ["PATH"]) or str(argv[0])
        done = subprocess.run(
            [program, *map(str, argv[1:])],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environ,
            cwd=cwd or self.home,
            check=False,
        )
        if check and done.returncode != 0:
            output = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise FakeSlurmError(f"{' '.join(map(str, argv))}: exit code {done.returncode}\n{output}")
        return done

    def popen(self, argv: Argv, *, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """The same, not waited for. All output is in `stdout`."""
        environ = {**self.env, **(env or {})}
        return subprocess.Popen(
            [shutil.which(str(argv[0]), path=environ["PATH"]) or str(argv[0]), *map(str, argv[1:])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environ,
            cwd=self.home,
        )

    # Jobs

    def sbatch(self, script_text: str, *args: str) -> str:
        """Submit a batch script from `home`; the job's id."""
        return self.run(["sbatch", "--parsable", *args], stdin=script_text).stdout.strip()

    def job_state(self, job: str) -> str:
        """As Slurm writes it, such as `RUNNING`."""
        return _field(self._show_job(job), "JobState")

    def _show_job(self, job: str) -> str:
        return self.run(["scontrol", "--oneliner", "show", "job", job]).stdout

    def wait_job(self, job: str, states: str | Collection[str], timeout_s: float = 30) -> str:
        """Return the state once it is one of `states`.

        FakeSlurmError, with the job's output, when that takes longer than `timeout_s` or the job ended otherwise.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + timeout_s
        while (state := _field(shown := self._show_job(job), "JobState")) not in wanted:
            ended = state not in ("PENDING", "RUNNING", "COMPLETING")
            if ended or time.monotonic() > deadline:
                what = f"job {job} {'has ended' if ended else f'after {timeout_s:g} s'}: {state}"
                output = _tail(Path(_field(shown, "StdOut")))
                raise FakeSlurmError(f"{what} ({_field(shown, 'Reason')}), wanted {sorted(wanted)}\n{output}")
            time.sleep(0.05)
        return state

    def cancel(self, job: str) -> None:
        """Ask Slurm to end the job; `wait_job` tells when it did."""
        self.run(["scancel", job])

    # Faults

    def unreachable(self, after_s: float = 0.5) -> None:
        """slurmctld is away: each command fails after `after_s` (real: 9 to 20 s), with Slurm's words and code.
        `squeue --json` ends with 0, an empty list and filled "errors". Running steps go on; signals through srun
        arrive; srun, told to end, gives up after KillWait + 2 s with code 0 and its tasks alive."""
        self._set(unreachable_s=after_s)

    def slow(self, command: str, seconds: float) -> None:
        """Every `command` takes so much longer."""
        self._slow[command] = seconds
        self._set(slow=self._slow)

    def refuse_steps(self, kind: Refusal | str = "nodes") -> None:
        """srun gets no step: exit code 1 and the words of `kind`, or your own."""
        self._set(refuse=REFUSALS.get(kind, kind))

    def disable_steps(self) -> None:
        """srun gets no step for now, and waits: "step creation temporarily disabled, retrying"."""
        self._set(disabled=True)

    def deaf_cancel(self, seconds: float) -> None:
        """scancel ends with 0 at once; what it asks for happens so much later."""
        self._set(deaf_s=seconds)

    def stuck_completing(self, seconds: float) -> None:
        """A step whose processes have all ended stays in Slurm's list so much longer, and its srun waits for it."""
        self._set(stuck_s=seconds)

    def vanish(self, name: str) -> None:
        """Steps with this in their name are not listed, though they run. `batch` is the batch step's name."""
        self._vanished.append(name)
        self._set(vanished=self._vanished)

    def lying_srun(self, name: str) -> None:
        """The srun of each step with this in its name ends with 0; the step lives on."""
        self._lying.append(name)
        self._set(lying=self._lying)

    def kill_node(self, node: str, after_s: float = 2.0) -> None:
        """Everything on the node dies at once. srun hears of it `after_s` later (SlurmdTimeout, a site's default is
        300 s): "Node failure". A job with --no-kill goes on without the node."""
        self._owner("kill_node", node=self._known(node), after_s=after_s)

    def cut_node(self, node: str, after_s: float = 2.0) -> None:
        """What runs on the node lives on, but no signal, order or output passes; after `after_s` Slurm gives the node
        up, as above. Its ports still answer: it is this host."""
        self._owner("cut_node", node=self._known(node), after_s=after_s)

    def join_node(self, node: str) -> None:
        """Bring a dead or cut node back. If Slurm had given it up, what survived there is killed."""
        self._owner("join_node", node=self._known(node))

    def heal(self) -> None:
        """Undo every fault above."""
        self._owner("heal")
        self._forget_faults()

    def _known(self, node: str) -> str:
        if node not in self.nodes:
            raise FakeSlurmError(f"{node} is not one of {', '.join(self.nodes)}")
        return node

    def _forget_faults(self) -> None:
        self._slow: dict[str, float] = {}
        self._vanished: list[str] = []
        self._lying: list[str] = []

    def _set(self, **faults: object) -> None:
        self._owner("set", faults=faults)

    def _owner(self, do: str, **more: object) -> dict[str, Any]:
        answer = client.ask(str(self._folder), {"program": "owner", "do": do, **more})
        if answer.get("err"):
            raise FakeSlurmError(answer["err"].strip())
        return answer

    # Processes

    def user_pids(self, mark: str = "") -> list[int]:
        """Pids of all live processes of the cluster's user, sruns included.

        With `mark` only those that have it in their command line or environment.
        """
        found = []
        for pid in self._owner("pids")["pids"]:
            with contextlib.suppress(OSError):
                path = Path(f"/proc/{pid}")
                text = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
                if mark.encode() in text.replace(b"\0", b" "):
                    found.append(pid)
        return found

    def kill_user_processes(self) -> None:
        """SIGKILL them all."""
        for pid in self.user_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    return f"(no {log})"


def _field(text: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S*)", text)
    return found[1] if found else ""
