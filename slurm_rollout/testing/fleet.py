"""A real fleet of stub engines under a test's hand: started with `up`, hurt from outside, watched through its files.

The same class serves the local backend and a real (test) Slurm: only how `up` is started and ended differs. Faults are
done to processes and through the stub's control file, never through the product.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from slurm_rollout import proc
from slurm_rollout.errors import RolloutError
from slurm_rollout.rundir import RunDir, read_events
from slurm_rollout.testing.stub_engine import set_fault


def wait_for(what: str, done: Callable[[], Any], timeout_s: float = 20.0, period_s: float = 0.02) -> Any:
    """Return what `done` returns once that is true; AssertionError when it stays false until the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (result := done()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(period_s)
    return result


def stub_spec(
    *,
    python: str | Path = sys.executable,
    name: str = "test",
    groups: int = 1,
    layout: str = "nodes = 2",
    load_s: float = 0.3,
    entrypoints: str = "all",
    control: str | Path = "",
    stub_args: Iterable[str] = (),
    base: int = 18000,
    pool: str = "",
    more: str = "",
    nodes: str = "",
    reward: int = 0,
    probe_timeout_s: float = 0.5,
) -> str:
    """Return a spec of stub engines whose probes are fast enough for a test: a hang is seen within 3 s, by default.

    A probe fails after `probe_timeout_s`, a hang is three of them: more of it is for busy machines.

    `more` comes before the pool, `pool` into it, `nodes` into its table. `reward` groups of one node are a second pool.
    """
    argv = [str(python), "-m", "slurm_rollout.testing.stub_engine", f"--load-s={load_s}", "--model=stub"]
    argv += [f"--entrypoints={entrypoints}", *([f"--control={control}"] if control else []), *stub_args]
    engine = (
        f'engine = {{ kind = "command", argv = {json.dumps(argv)}, entrypoints = "{entrypoints}", model = "stub" }}'
    )
    second = f'[[pool]]\nname = "reward"\ngroups = {reward}\nnodes = 1\n{engine}' if reward else ""
    return f"""\
name = "{name}"
heartbeat_s = 0.5
{more}
{f"[nodes]{chr(10)}{nodes}" if nodes else ""}

[[pool]]
name = "actor"
groups = {groups}
{layout}
{engine}
{pool}

{second}

[probe.startup]
timeout_s = 30

[probe.liveness]
period_s = 0.5
timeout_s = {probe_timeout_s}
failure_threshold = 3
counter = {{ path = "/metrics", name = "stub_tokens_total" }}

[restart]
backoff_initial_s = 0.5

[ports]
base = {base}
"""


class Fleet:
    """One `up`. Use as a context manager: whatever happens, it is ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = RunDir(folder / "run")
        self.control = folder / "control.json"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            print(self.story())
        self.end()

    def end(self) -> None:
        """End it by any means."""
        raise NotImplementedError

    def output(self) -> str:
        """Return what `up` printed."""
        raise NotImplementedError

    def has_ended(self) -> bool:
        """Tell whether `up` is known to have ended."""
        return False

    # -------------------------------------------------------------------------------------------------------- watching

    def wait(self, what: str, done: Callable[[], Any], timeout_s: float = 20.0) -> Any:
        """`wait_for`, but without patience for a fleet that has ended."""

        def done_or_ended() -> Any:
            ended = self.has_ended()
            result = done()
            if ended and not result:
                raise AssertionError(f"the fleet ended before {what}")
            return result

        return wait_for(what, done_or_ended, timeout_s)

    def barrier(self) -> dict[str, Any]:
        """Return the barrier file; empty while there is none."""
        try:
            document = json.loads(self.run.barrier.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        assert isinstance(document, dict)
        return document

    def group(self, group: str) -> dict[str, Any]:
        """Return the barrier's entry of a group; empty while there is none."""
        return next((g for g in self.barrier().get("groups", ()) if g["id"] == group), {})

    def events(self, type_: str = "", group: str = "", incarnation: int = 0) -> list[dict[str, Any]]:
        """Return the events so far, those that match."""
        try:
            found = list(read_events(self.run))
        except (OSError, RolloutError):
            return []
        return [
            e
            for e in found
            if (not type_ or e["type"] == type_)
            and (not group or e.get("group") == group)
            and (not incarnation or e.get("incarnation") == incarnation)
        ]

    def wait_event(self, type_: str, group: str = "", incarnation: int = 0, timeout_s: float = 20.0) -> dict[str, Any]:
        """Return the first event that matches, as soon as it is there."""
        what = f"event {type_} {group} {incarnation or ''}"
        events = self.wait(what, lambda: self.events(type_, group, incarnation), timeout_s)
        assert isinstance(events, list)
        first = events[0]
        assert isinstance(first, dict)
        return first

    def wait_phase(self, phase: str, timeout_s: float = 20.0) -> None:
        """Wait until the barrier says `phase` of the whole."""
        self.wait(f"barrier phase {phase}", lambda: self.barrier().get("phase") == phase, timeout_s)

    def wait_serving(self, group: str, incarnation: int, timeout_s: float = 20.0) -> dict[str, Any]:
        """Wait until that incarnation of the group is offered to the trainer; return its entry."""

        def serves() -> dict[str, Any]:
            entry = self.group(group)
            return entry if entry.get("serving") and entry.get("incarnation") == incarnation else {}

        found = self.wait(f"{group} serving as incarnation {incarnation}", serves, timeout_s)
        assert isinstance(found, dict)
        return found

    def story(self) -> str:
        """Return what happened, for a failed test's report."""
        lines = [json.dumps(e) for e in self.events()]
        logs = [
            f"--- {log}\n" + log.read_text(errors="replace")[-800:]
            for folder, pattern in ((self.run.logs, "*.log"), (self.run.steps, "*.err"))
            for log in sorted(folder.rglob(pattern))[-8:]
        ]
        return "\n".join(["--- up", self.output()[-6000:], "--- events", *lines, *logs])

    # ------------------------------------------------------------------------------------------------------- processes

    def processes(self, **environ: str) -> list[int]:
        """Return the pids of the run's engines (and what descends from them) whose environment has these values."""
        return list(self._matching(environ))

    def environs(self, **environ: str) -> list[dict[str, str]]:
        """Return the environments of the same processes."""
        return list(self._matching(environ).values())

    def _matching(self, environ: Mapping[str, str]) -> dict[int, dict[str, str]]:
        wanted = {"ROLLOUT_RUN_DIR": str(self.run.path), **environ}
        return {pid: found for pid, found in self._environs() if wanted.items() <= found.items()}

    def engine(self, group: str, rank: int) -> int:
        """Return the pid of a member's engine."""

        def find() -> list[int]:
            return self.processes(ROLLOUT_GROUP=group, ROLLOUT_RANK=str(rank))

        pids = wait_for(f"a process of {group} rank {rank}", find)
        assert isinstance(pids, list)
        return int(pids[0])

    def agents(self, group: str) -> list[int]:
        """Return the pids of the agents of a group's newest incarnation."""
        mark = f"/{group}/{self.group(group)['incarnation']}/"
        return [
            pid
            for pid, found in self._environs()
            if mark in found.get("ROLLOUT_MARK", "")
            and str(self.run.path) in found.get("ROLLOUT_STEP", "")
            and _comm(pid).startswith("python")
        ]

    def coordinator(self) -> int:
        """Return the pid of the living coordinator."""

        def find() -> list[int]:
            return [
                int(p.name)
                for p in Path("/proc").iterdir()
                if p.name.isdigit() and self._is_coordinator(_cmdline(int(p.name))) and _state(int(p.name)) not in "ZX"
            ]

        pids = wait_for("a coordinator", find)
        assert isinstance(pids, list)
        return int(pids[0])

    def _is_coordinator(self, cmdline: str) -> bool:
        return "slurm_rollout.coordinator" in cmdline and f"--run-dir={self.run.path}\0" in cmdline

    def kill(self, group: str, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one member's engine."""
        os.kill(self.engine(group, rank), number)

    def fault(self, member: str, **fault: object) -> None:
        """Set a fault of the stub (see `stub_engine`): `member` is "*", a group, or "<group>/<rank>"."""
        set_fault(self.control, member, **fault)
        self.control.chmod(0o644)

    def _environs(self) -> list[tuple[int, dict[str, str]]]:
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and _state(int(entry)) not in "ZX":
                environ = proc.environ(int(entry))
                if "ROLLOUT_MARK" in environ:
                    found.append((int(entry), environ))
        return found


class LocalFleet(Fleet):
    """`up --backend local` as a child of this process."""

    process: subprocess.Popen[bytes]

    def start(
        self,
        spec: str,
        trainer: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        *,
        prefix: Sequence[str] = (),
    ) -> Self:
        """Run `up` on the text of a spec; `prefix` is a command that becomes it, such as setpriv."""
        path = self.folder / "fleet.toml"
        path.write_text(spec, encoding="utf-8")
        argv = [sys.executable, "-m", "slurm_rollout", "up", str(path), "--backend=local", f"--run-dir={self.run.path}"]
        with open(self.folder / "up.log", "ab") as out:
            self.process = subprocess.Popen(
                [*prefix, *argv, *(["--", *trainer] if trainer else [])],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **(environ or {})},
                start_new_session=True,
            )
        return self

    def terminate(self, timeout_s: float = 25.0) -> int:
        """Send TERM and return the exit code."""
        self.process.terminate()
        return self.exit_code(timeout_s)

    def exit_code(self, timeout_s: float = 25.0) -> int:
        """Return the exit code once it has ended."""
        return self.process.wait(timeout=timeout_s)

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        if not hasattr(self, "process"):
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=25)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid, environ in self._environs():
            if environ.get("ROLLOUT_RUN_DIR") == str(self.run.path) or str(self.run.path) in environ.get(
                "ROLLOUT_STEP", ""
            ):
                os.kill(pid, signal.SIGKILL)

    def output(self) -> str:
        try:
            return (self.folder / "up.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


class Cluster(Protocol):
    """What a fleet needs of a test cluster: real Slurm's or the fake's."""

    home: Path
    gpus: int

    def sbatch(self, script_text: str, *args: str) -> str: ...

    def cancel(self, job: str) -> None: ...

    def heal(self) -> None: ...


C = TypeVar("C", bound=Cluster)


class SlurmFleet(Fleet, Generic[C]):
    """`up` as the last line of a batch job on a test cluster."""

    job: str = ""

    def __init__(self, cluster: C) -> None:
        super().__init__(cluster.home)
        self.cluster = cluster

    def start(
        self,
        spec: str,
        trainer: Sequence[str] = (),
        *,
        nodes: int = 4,
        directives: str = "",
        prefix: Sequence[str] = (),
    ) -> Self:
        """Submit a job that runs `up` on the text of a spec; `prefix` is a command that becomes it."""
        path = self.folder / "fleet.toml"
        path.write_text(spec, encoding="utf-8")
        path.chmod(0o644)
        tail = f"-- {' '.join(trainer)}" if trainer else ""
        script = f"""\
#!/bin/bash
#SBATCH --exclusive --gres=gpu:{self.cluster.gpus} --no-kill --no-requeue --output=up.log
{directives}
exec {shlex.join(prefix)} slurm-rollout up fleet.toml --run-dir run {tail}
"""
        self.job = self.cluster.sbatch(script, f"--nodes={nodes}")
        return self

    def end(self) -> None:
        if self.job:
            self.cluster.heal()
            self.cluster.cancel(self.job)

    def output(self) -> str:
        try:
            return (self.folder / "up.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


def _cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _comm(pid: int) -> str:
    found = proc.read(pid)
    return found.comm if found else ""


def _state(pid: int) -> str:
    found = proc.read(pid)
    return found.state if found else "X"
