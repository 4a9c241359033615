"""`slurm-rollout demo`: the main job on one machine, without Slurm: a crash and a hang, recovered before your eyes.

It runs the real `up` on the local backend with the stub engine, does the two faults from outside, and reads what
happened from the run directory, as anybody could.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm_rollout import cli, proc
from slurm_rollout.core.view import event_line
from slurm_rollout.errors import RolloutError
from slurm_rollout.rundir import RunDir, read_events

SPEC = """\
name = "demo"

[[pool]]
name = "actor"
groups = 2
nodes = 2
engine = {{ kind = "command", argv = {argv}, entrypoints = "all", model = "stub" }}

# Short, so that a hang is found while you watch. Real engines want the defaults.
[probe.liveness]
period_s = 0.5
timeout_s = 0.5
failure_threshold = 2
counter = {{ path = "/metrics", name = "stub_tokens_total" }}

[ports]
base = {base}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that was done to a member, and when (Unix time)."""

    what: str
    group: str
    rank: int
    at: float


class DemoFailed(RolloutError):
    """Something did not happen in time."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        description="Two groups of two stub engines on this machine, without Slurm and without root. One member is "
        "killed, another is stopped in place (it hangs). Each time the whole group is ended, fenced, started "
        "again and proved. Takes about 15 s and leaves nothing behind.",
        add_help=False,
    )
    cli.add_help(parser)
    parser.add_argument("--load-s", type=float, default=1.5, help="how long a stub engine loads (default: 1.5)")
    parser.add_argument("--port-base", type=int, default=21000, help="first port to use (default: 21000)")
    parser.add_argument("--patience-s", type=float, default=25.0, help="for each of its steps (default: 25)")
    parser.add_argument("--plain", action="store_true", help="lines instead of a live table, also on a terminal")
    parser.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="slurm-rollout-demo-") as folder:
        run = RunDir(Path(folder) / "run")
        spec = Path(folder) / "fleet.toml"
        stub = Path(__file__).parents[1] / "testing" / "stub_engine.py"
        argv = [sys.executable, "-IS", str(stub), f"--load-s={args.load_s}", "--entrypoints=all", "--model=stub"]
        spec.write_text(SPEC.format(argv=argv, base=args.port_base), encoding="utf-8")
        log = Path(folder) / "up.log"
        show = _plain if args.plain or not sys.stdout.isatty() else _live
        with _fleet(spec, run, log) as fleet:
            try:
                with show(run) as refresh:
                    faults = _play(run, fleet, refresh, args.patience_s)
            except DemoFailed as e:
                raise DemoFailed(f"{e}\n{_tail(log)}") from None
        print()
        _summary(run, faults)
        left = [p.pid for p in proc.own() if proc.environ(p.pid).get("ROLLOUT_RUN_DIR") == str(run.path)]
        print(f"\nThe fleet is drained; processes left behind: {len(left)}.")
        return 1 if left or fleet.returncode else 0


# ----------------------------------------------------------------------------------------------------------- the story


@contextlib.contextmanager
def _fleet(spec: Path, run: RunDir, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `up`, and drain it at the end, whatever happened."""
    argv = [sys.executable, "-m", "slurm_rollout", "up", str(spec), "--backend=local", f"--run-dir={run.path}"]
    with open(log, "wb") as out:
        fleet = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    try:
        yield fleet
    finally:
        fleet.terminate()
        try:
            fleet.wait(timeout=25)
        except subprocess.TimeoutExpired:
            fleet.kill()
            fleet.wait()


def _play(
    run: RunDir, fleet: subprocess.Popen[bytes], refresh: Callable[[str], None], patience_s: float
) -> list[Fault]:
    def reached(what: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + patience_s
        while not done():
            if fleet.poll() is not None:
                raise DemoFailed(f"the fleet ended with {fleet.returncode} before {what}")
            if time.monotonic() > deadline:
                raise DemoFailed(f"waited {patience_s:g} s in vain for {what}")
            refresh(what)
            time.sleep(0.05)

    def ready(group: str, incarnation: int) -> bool:
        return any(
            e["type"] == "ready" and e.get("group") == group and e.get("incarnation") == incarnation
            for e in _events(run)
        )

    reached("both groups to be ready", lambda: ready("actor/0", 1) and ready("actor/1", 1))
    faults = [_strike(run, "kill -9", "actor/0", 1, signal.SIGKILL)]
    refresh("fault: kill -9 of actor/0 rank 1. Its whole group must go and come back")
    reached("actor/0 to be ready again", lambda: ready("actor/0", 2))
    faults.append(_strike(run, "hang (SIGSTOP)", "actor/1", 0, signal.SIGSTOP))
    refresh("fault: actor/1 rank 0 hangs (SIGSTOP). Nothing exits; only a real request can tell")
    reached("actor/1 to be ready again", lambda: ready("actor/1", 2))
    refresh("")
    return faults


def _strike(run: RunDir, what: str, group: str, rank: int, number: signal.Signals) -> Fault:
    """Send a signal to one member's engine: not to its agent, which nobody told."""
    for process in proc.own():
        environ = proc.environ(process.pid)
        wanted = {"ROLLOUT_RUN_DIR": str(run.path), "ROLLOUT_GROUP": group, "ROLLOUT_RANK": str(rank)}
        if wanted.items() <= environ.items():
            at = time.time()
            os.kill(process.pid, number)
            return Fault(what=what, group=group, rank=rank, at=at)
    raise DemoFailed(f"{group} rank {rank} has no process")


def _events(run: RunDir) -> list[dict[str, Any]]:
    try:
        return list(read_events(run))
    except (OSError, RolloutError):
        return []


# ------------------------------------------------------------------------------------------------------------- showing


@contextlib.contextmanager
def _plain(run: RunDir) -> Iterator[Callable[[str], None]]:
    """Print each event as a line."""
    printed, said = 0, ""
    began = time.time()

    def refresh(what: str) -> None:
        nonlocal printed, said
        for event in _events(run)[printed:]:
            printed += 1
            print(f"{event['at'] - began:5.1f} s  {event_line(event)}")
        if what.startswith("fault") and what != said:
            said = what
            print(f"{time.time() - began:5.1f} s  *** {what}")
        sys.stdout.flush()

    yield refresh
    refresh("")


@contextlib.contextmanager
def _live(run: RunDir) -> Iterator[Callable[[str], None]]:
    """Keep a table of the groups on the screen, the newest events below it."""
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    from slurm_rollout.rundir import read_json

    colours = {"ready": "green", "starting": "cyan", "stopping": "yellow", "fencing": "yellow", "failed": "red"}
    began = time.time()
    fault = "no fault yet"

    def picture(what: str) -> Group:
        nonlocal fault
        if what.startswith("fault"):
            fault = what
        table = Table(title="slurm-rollout demo: two groups of two, no Slurm", title_justify="left")
        for column in ("group", "phase", "incarnation", "restarts", "last failure"):
            table.add_column(column)
        with contextlib.suppress(FileNotFoundError, RolloutError):
            for group in read_json(run.status)["groups"]:
                failure = group.get("failure") or {}
                table.add_row(
                    group["id"],
                    Text(group["phase"], style=colours.get(group["phase"], "white")),
                    str(group["incarnation"]),
                    str(group["restarts"]),
                    Text(f"{failure.get('reason', '')} {failure.get('message', '')}".strip()),
                )
        lines = [
            Text(f"{e['at'] - began:5.1f} s  {event_line(e)}", overflow="ellipsis", no_wrap=True) for e in _events(run)
        ]
        waits = Text(f"\n{fault}\nwaiting for {what}\n" if what and what != fault else f"\n{fault}\n\n", style="bold")
        return Group(table, waits, *lines[-12:])

    with Live(picture("both groups to be ready"), refresh_per_second=10) as live:
        yield lambda what: live.update(picture(what))


def _summary(run: RunDir, faults: list[Fault]) -> None:
    """Print what each recovery took, from the fault on, by the events' own times."""
    print("seconds after the fault       detected  stopped   fenced    ready")
    for fault in faults:
        after = [e for e in _events(run) if e.get("group") == fault.group and e["at"] >= fault.at]
        times = []
        for kind in ("failure", "stopped", "fenced", "ready"):
            at = next((e["at"] for e in after if e["type"] == kind), None)
            times.append("       -" if at is None else f"{at - fault.at:8.2f}")
        print(f"{fault.what:<15} {fault.group}/{fault.rank}    " + "  ".join(times))
    print("`ready` includes the engine's own loading, and a real /v1/chat/completions request to every entrypoint.")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
