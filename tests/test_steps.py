"""Steps as processes: started, adopted, signalled, watched, and what is made of their agents' reports.

A holder is a few lines of Python here; reports are written by the test into the file that srun would write.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import proc
from slurm_rollout.backend import JobFacts, NodeFacts, StepRef, monotonic
from slurm_rollout.core.model import (
    Cancel,
    ExitRecord,
    Go,
    GroupState,
    Launch,
    Listing,
    Process,
    RunState,
    StepObservation,
    StepState,
    Stop,
)
from slurm_rollout.core.names import MARK, mark
from slurm_rollout.core.plan import Counter, Environment, FleetPlan, GroupPlan, ProbePolicy, ProbeRequest
from slurm_rollout.rundir import RunDir
from slurm_rollout.steps import Steps
from slurm_rollout.testing.fleet import wait_for
from slurm_rollout.testing.world import make_plan

GROUP, NODES = "actor/0", ("n0", "n1")
RUN_IDS = (f"steps{os.getpid()}x{n}" for n in itertools.count())

SLEEPS = "import time; time.sleep(600)"
ENDS = "import sys; sys.stderr.write(sys.argv[2]); sys.exit(int(sys.argv[1]))"
# As the agent does: USR2 is go, USR1 stop; what it got is told by reports.
OBEYS = """\
import json, signal, sys, time
def say(**report):
    print(json.dumps(report), flush=True)
def stop(*_):
    say(report="exit", cause="stopped", message="as asked")
    sys.exit(0)
signal.signal(signal.SIGUSR2, lambda *_: say(report="started", ranks=[int(sys.argv[1])], pids=[1]))
signal.signal(signal.SIGUSR1, stop)
say(report="hello", step="12.4")
while True:
    time.sleep(1)
"""


class FakeBackend:
    """Holders as a test wants them."""

    holder = "python"

    def __init__(self) -> None:
        self.argvs: dict[str, list[str]] = {}  # by node
        self.variables: dict[str, str] = {}

    def script(self, text: str, *args: str, node: str = "") -> None:
        for name in [node] if node else NODES:
            self.argvs[name] = [sys.executable, "-IS", "-c", text, *args]

    def argv(self, plan: FleetPlan, group: GroupPlan, node: str, incarnation: int, *, sweep: bool) -> list[str]:
        return self.argvs[node]

    def environ(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], **self.variables}

    async def listing(self) -> Listing:
        raise AssertionError("nobody asked")

    async def job(self) -> JobFacts:
        raise AssertionError("nobody asked")

    async def nodes(self, names: Sequence[str]) -> Mapping[str, NodeFacts]:
        raise AssertionError("nobody asked")

    async def cancel(self, steps: Sequence[StepRef]) -> None:
        raise AssertionError("nobody asked")


class Lab:
    """Steps of one run, and every process of it."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDir(folder / "run")
        self.run_id = next(RUN_IDS)
        self.plan = make_plan(1)
        self.backend = FakeBackend()
        self.backend.script(SLEEPS)
        self.woken = asyncio.Event()
        self.strangers: list[subprocess.Popen[bytes]] = []

    def steps(self) -> Steps:
        """A coordinator's view; each call is another coordinator."""
        return Steps(self.plan, self.run, self.run_id, self.backend, self.woken.set)

    def pids(self) -> list[int]:
        return [p.pid for p in proc.own() if proc.environ(p.pid).get(MARK, "").startswith(f"{self.run_id}/")]

    def say(self, *lines: object, node: str = "n0", sweep: bool = False, end: str = "\n") -> None:
        """Write a step's reports as srun would; text is written as it is."""
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end
        with open(self.run.step_reports(GROUP, 1, node, sweep=sweep), "a", encoding="utf-8") as f:
            f.write(text)

    def stranger(self, environ: Mapping[str, str], *, leader: bool = True, argv: Sequence[str] = ()) -> int:
        """Start a process that is no step; return its pid."""
        process = subprocess.Popen(
            argv or [sys.executable, "-IS", "-c", SLEEPS], env={**environ}, start_new_session=leader
        )
        self.strangers.append(process)
        return process.pid

    def close(self) -> None:
        for process in self.strangers:
            process.kill()
            process.wait()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    try:
        yield made
    finally:
        made.close()


def launch(*nodes: str, incarnation: int = 1, sweep: bool = False) -> Launch:
    return Launch(group=GROUP, incarnation=incarnation, nodes=nodes or NODES, sweep=sweep)


def go(*nodes: str, incarnation: int = 1) -> Go:
    return Go(group=GROUP, incarnation=incarnation, nodes=nodes or NODES)


def stop(*nodes: str, incarnation: int = 1) -> Stop:
    return Stop(group=GROUP, incarnation=incarnation, nodes=nodes or NODES)


def state(*steps: StepState, incarnation: int = 1) -> RunState:
    group = GroupState(id=GROUP, incarnation=incarnation, steps=steps)
    return RunState(run_id="", job="", restart_count=0, term=1, groups=(group,))


def seen(steps: Steps, node: str = "n0", *, sweep: bool = False) -> StepObservation:
    (found,) = [s for s in steps.observe(GROUP, 1) if s.node == node and s.sweep is sweep]
    return found


async def until(steps: Steps, done: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while steps.read() or not done():
        assert time.monotonic() < deadline, f"waited in vain; seen: {steps.observe(GROUP, 1)}"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def ending(lab: Lab, steps: Steps) -> AsyncIterator[Steps]:
    """End every process of the lab and collect it, whatever happens in between."""
    try:
        yield steps
    finally:

        def ended() -> bool:
            lab.close()  # again and again: a process that has just been started shows no environment for a moment
            return all(s.process is not Process.RUNNING for s in steps.observe(GROUP, 1))

        await until(steps, ended)
        steps.detach()


def in_loop(lab: Lab, work: Callable[[Steps], Coroutine[Any, Any, None]]) -> None:
    """Run a test's body in an event loop, with a coordinator's `Steps`."""

    async def body() -> None:
        async with ending(lab, lab.steps()) as steps:
            await work(steps)

    asyncio.run(body())


# --------------------------------------------------------------------------------------------------------------- start


@pytest.fixture
def input_of_ours() -> Iterator[None]:
    """Something to read on this process's standard input, which belongs to the trainer and to nobody else."""
    reader, writer = os.pipe()
    os.write(writer, b"for the trainer")
    os.close(writer)
    before = os.dup(0)
    os.dup2(reader, 0)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(reader)


@pytest.mark.usefixtures("input_of_ours")
def test_a_step_is_a_session_of_its_own_and_gets_its_orders_in_one_variable(lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "seen.json"
    lab.backend.script(
        "import json, os, sys; environ = dict(os.environ); line = sys.stdin.read(); "
        "json.dump([environ, line, os.getsid(0) == os.getpid()], open(sys.argv[1], 'w'))",
        str(out),
        node="n1",
    )
    lab.backend.variables["USERS"] = "own"
    (pool,) = lab.plan.pools
    (group,) = pool.groups
    member = replace(group.members[1], argv=("serve", "--n={incarnation}"), variables={"OWN": "b"}, gpus=(4, 5))
    pool = replace(
        pool,
        groups=(replace(group, members=(group.members[0], member)),),
        env=Environment(variables={"OWN": "a", "POOL": "1"}, setup=("module load x",)),
        probe=ProbePolicy(request=ProbeRequest(), counter=Counter(name="tokens"), liveness_period_s=7.0),
    )
    lab.plan = replace(lab.plan, pools=(pool,))

    async def work(steps: Steps) -> None:
        steps.launch(launch("n1", incarnation=3))
        await until(steps, lambda: steps.observe(GROUP, 3)[0].process is Process.EXITED)

    in_loop(lab, work)
    environ, line, leads = json.loads(out.read_text())
    assert line == ""
    assert leads
    orders = json.loads(environ.pop("ROLLOUT_STEP"))
    assert environ.pop(MARK) == f"{lab.run_id}/actor/0/3/n1"
    assert environ["USERS"] == "own"
    assert "ROLLOUT_SWEEP" not in environ
    assert {k: orders[k] for k in ("version", "mode", "run_id", "group", "incarnation", "node", "setup")} == {
        "version": 2,
        "mode": "serve",
        "run_id": lab.run_id,
        "group": GROUP,
        "incarnation": 3,
        "node": "n1",
        "setup": ["module load x"],
    }
    assert orders["probe"]["counter"] == {"path": "/metrics", "name": "tokens"}
    assert orders["probe"]["period_s"] == 7.0
    (found,) = orders["members"]
    assert found["argv"] == ["serve", "--n=3"]
    assert (found["rank"], found["gpus"], found["ports"]) == (1, [4, 5], [18000])
    assert found["log"] == str(lab.run.member_log(GROUP, 3, 1))
    assert found["env"] == {
        "OWN": "b",
        "POOL": "1",
        "ROLLOUT_RUN": "run",
        "ROLLOUT_RUN_DIR": str(lab.run.path),
        "ROLLOUT_GROUP": GROUP,
        "ROLLOUT_INCARNATION": "3",
        "ROLLOUT_RANK": "1",
        "ROLLOUT_SIZE": "2",
        "ROLLOUT_MASTER_ADDR": "n0",
        "ROLLOUT_MASTER_PORT": "18001",
        "ROLLOUT_HTTP_PORT": "18000",
    }


def test_what_a_step_writes_is_the_owners_alone(lab: Lab) -> None:
    async def work(steps: Steps) -> None:
        steps.launch(launch())
        paths = [lab.run.step_reports(GROUP, 1, "n0"), lab.run.step_stderr(GROUP, 1, "n1")]
        assert [stat.S_IMODE(p.stat().st_mode) for p in paths] == [0o600, 0o600]
        assert stat.S_IMODE(paths[0].parent.stat().st_mode) == 0o700

    before = os.umask(0)
    try:
        in_loop(lab, work)
    finally:
        os.umask(before)


def test_a_sweep_and_the_step_of_the_same_node_are_two(lab: Lab) -> None:
    async def work(steps: Steps) -> None:
        steps.launch(launch())
        steps.launch(launch("n0", sweep=True))
        lab.say({"report": "hello"})
        lab.say({"report": "fence_waits", "message": "port 5 is held"}, sweep=True)
        await until(steps, lambda: seen(steps).spoke and seen(steps, sweep=True).waiting_for)
        assert len(steps.observe(GROUP, 1)) == 3
        assert not seen(steps).waiting_for
        assert not seen(steps, sweep=True).spoke
        assert seen(steps).pid != seen(steps, sweep=True).pid
        sweep = seen(steps, sweep=True).pid
        assert sweep is not None
        assert proc.environ(sweep)["ROLLOUT_SWEEP"] == "1"
        assert json.loads(proc.environ(sweep)["ROLLOUT_STEP"])["mode"] == "sweep"
        assert {r.name for r in steps.refs(Cancel(group=GROUP, incarnation=1, nodes=("n0",)))} == {
            "run.actor-0.1.0",
            "run.actor-0.1.0.sweep",
        }

    in_loop(lab, work)


def test_a_holder_that_cannot_be_started_is_a_step_that_ended_and_says_why(lab: Lab) -> None:
    lab.backend.argvs["n0"] = ["/nowhere/srun", "--x"]
    lab.backend.argvs["n1"] = [str(lab.run.path.parent)]  # a directory: not executable

    async def work(steps: Steps) -> None:
        before = monotonic()
        steps.launch(launch())
        for node, why in (("n0", "/nowhere/srun could not be started: "), ("n1", "could not be started: ")):
            step = seen(steps, node)
            assert (step.process, step.exit_code, step.pid) == (Process.EXITED, 127, None)
            assert step.exited_at is not None
            assert step.exited_at >= before
            assert why in step.stderr
        assert "No such file" in seen(steps).stderr
        assert [r.pid for r in steps.refs(Cancel(group=GROUP, incarnation=1, nodes=NODES))] == [None, None]
        steps.signal(stop())  # nobody to tell, and no error

    in_loop(lab, work)


def test_a_description_that_no_environment_can_hold_is_a_step_that_ended_and_says_so(lab: Lab) -> None:
    (pool,) = lab.plan.pools
    (group,) = pool.groups

    def with_argument(size: int) -> FleetPlan:
        members = (replace(group.members[0], argv=("engine", "x" * size)), group.members[1])
        return replace(lab.plan, pools=(replace(pool, groups=(replace(group, members=members),)),))

    async def work(steps: Steps) -> None:
        lab.plan = with_argument(140_000)
        async with ending(lab, lab.steps()) as first:
            first.launch(launch("n0"))
            assert (seen(first).process, seen(first).exit_code) == (Process.EXITED, 127)
            found = re.search(r"is (\d+) bytes long, 131072 is the limit", seen(first).stderr)
            assert found
        # Just below the limit by itself, and too long with the variable's name.
        lab.plan = with_argument(140_000 - int(found[1]) + 131_070)
        async with ending(lab, lab.steps()) as second:
            second.launch(launch("n0"))
            assert (seen(second).process, seen(second).exit_code) == (Process.EXITED, 127)
            assert "Argument list too long" in seen(second).stderr
        lab.plan = with_argument(140_000 - int(found[1]) + 131_000)
        async with ending(lab, lab.steps()) as third:
            third.launch(launch("n0"))
            assert seen(third).process is Process.RUNNING

    in_loop(lab, work)


def test_a_run_directory_that_cannot_be_written_is_a_step_that_ended(lab: Lab) -> None:
    lab.run.path.mkdir()
    lab.run.steps.write_text("in the way")

    async def work(steps: Steps) -> None:
        steps.launch(launch())
        assert {s.process for s in steps.observe(GROUP, 1)} == {Process.EXITED}

    in_loop(lab, work)
    assert not lab.pids()


# ------------------------------------------------------------------------------------------------------------- reports


def test_every_report_is_taken_in(lab: Lab) -> None:
    async def work(steps: Steps) -> None:
        steps.launch(launch())
        step = seen(steps)
        assert (step.process, step.spoke, step.fenced, step.started, step.exit) == (
            Process.RUNNING,
            False,
            False,
            None,
            None,
        )
        lab.say({"report": "hello", "pid": 1, "step": "12.7", "host": "h"})
        lab.say({"report": "fence_waits", "cause": "port_busy", "message": "port 18000 is held by 77 (nginx)"})
        await until(steps, lambda: seen(steps).waiting_for)
        assert seen(steps).spoke
        assert seen(steps).waiting_for == "port 18000 is held by 77 (nginx)"
        assert [r.step_id for r in steps.refs(Cancel(group=GROUP, incarnation=1, nodes=NODES))] == ["12.7", ""]
        lab.say({"report": "fenced", "ended": [], "notes": []}, {"report": "started", "ranks": [0, 3], "pids": [5, 6]})
        await until(steps, lambda: seen(steps).started)
        assert seen(steps).fenced
        assert not seen(steps).waiting_for
        assert seen(steps).started == (0, 3)
        lab.say({"report": "listening", "rank": 3, "port": 18000, "address": "0.0.0.0"})
        lab.say({"report": "listening", "rank": 0, "port": 18000, "address": "::"})
        lab.say({"report": "local_probe", "rank": 3, "failures": 2, "error": "timed out"})
        await until(steps, lambda: seen(steps).failing)
        assert seen(steps).listening == (0, 3)
        assert seen(steps).failing == {3: 2}
        lab.say({"report": "local_probe", "rank": 3, "failures": 0})
        lab.say({"report": "stranger", "rank": 0, "port": 18000, "holder": "77 (nginx)"})
        await until(steps, lambda: seen(steps).stranger)
        assert seen(steps).failing == {3: 0}
        assert "18000 is held by 77 (nginx)" in seen(steps).stranger
        lab.say({"report": "exit", "cause": "engine_exited", "message": "m", "rank": 3, "signal": 9, "oom": True})
        await until(steps, lambda: seen(steps).exit)
        assert seen(steps).exit == ExitRecord(cause="engine_exited", message="m", rank=3, signal=9, oom=True)
        assert seen(steps, "n1").spoke is False
        assert seen(steps).process is Process.RUNNING, "its srun may take a moment more"

    in_loop(lab, work)


def test_half_a_line_waits_for_its_other_half(lab: Lab) -> None:
    async def work(steps: Steps) -> None:
        steps.launch(launch())
        lab.say('{"report": "hello"}', '{"report": "fen', end="")
        await until(steps, lambda: seen(steps).spoke)
        assert not steps.read(), "half a line is nothing new"
        assert not seen(steps).fenced
        lab.say('ced"}', '{"report": "started", "ranks": [0]', end="")
        await until(steps, lambda: seen(steps).fenced)
        assert seen(steps).started is None
        lab.say("}")
        await until(steps, lambda: seen(steps).started == (0,))

    in_loop(lab, work)


NOISE = [
    "TaskProlog says hello",
    "",
    "null",
    "[1, 2]",
    '"fenced"',
    "{}",
    '{"report": "of a later version", "x": 1}',
    '{"report": "local_probe"}',
    '{"report": "local_probe", "rank": "x", "failures": 1}',
    '{"report": "local_probe", "rank": null, "failures": 1}',
    '{"report": "listening"}',
    '{"report": "started"}',
    '{"report": "started", "ranks": 5}',
    '{"report": "started", "ranks": ["x"]}',
    '{"report": "stranger"}',
    '{"report": ["hello"]}',
    "{" * 5000,
    '{"report": ' + "[" * 100_000,
    "\x00\x00",
]


@pytest.mark.parametrize("noise", NOISE, ids=lambda text: text[:30])
def test_a_line_that_is_no_report_is_passed_over(lab: Lab, noise: str) -> None:
    """A prolog, a container runtime or a plugin of the site may print to a step's standard output, too."""

    async def work(steps: Steps) -> None:
        steps.launch(launch())
        lab.say(noise, {"report": "fenced"})
        await until(steps, lambda: seen(steps).fenced)
        assert seen(steps).started is None
        assert not seen(steps).spoke

    in_loop(lab, work)


def test_bytes_that_are_no_text_are_passed_over(lab: Lab) -> None:
    async def work(steps: Steps) -> None:
        steps.launch(launch())
        lab.run.step_reports(GROUP, 1, "n0").write_bytes(b'\xff\xfe{"report": "hello"}\n{"report": "fenced"}\n')
        await until(steps, lambda: seen(steps).fenced)
        assert not seen(steps).spoke

    in_loop(lab, work)


# ----------------------------------------------------------------------------------------------------- signals and end


def test_go_and_stop_reach_the_agents_of_the_named_nodes(lab: Lab) -> None:
    for rank, node in enumerate(NODES):
        lab.backend.script(OBEYS, str(rank), node=node)

    async def work(steps: Steps) -> None:
        steps.launch(launch())
        await until(steps, lambda: seen(steps).spoke and seen(steps, "n1").spoke)
        steps.signal(go("n1"))
        steps.signal(go(incarnation=2))  # of another incarnation: nobody is meant
        await until(steps, lambda: seen(steps, "n1").started == (1,))
        steps.signal(stop("n1"))
        await until(steps, lambda: seen(steps, "n1").process is Process.EXITED)
        ended = seen(steps, "n1")
        assert (ended.exit_code, ended.stderr) == (0, "")
        assert ended.exit == ExitRecord(cause="stopped", message="as asked")
        assert seen(steps).process is Process.RUNNING
        assert seen(steps).started is None
        steps.signal(stop())  # one of them has ended: no error
        await until(steps, lambda: seen(steps).process is Process.EXITED)
        refs = steps.refs(Cancel(group=GROUP, incarnation=1, nodes=NODES))
        assert [(r.step_id, r.pid) for r in refs] == [("12.4", None), ("12.4", None)]

    in_loop(lab, work)


def test_an_end_wakes_the_coordinator_and_its_reports_are_complete_then(lab: Lab) -> None:
    lab.backend.script(
        'import sys; sys.stdout.write(\'{"report": "local_probe", "rank": 0, "failures": 1}\\n\' * 20000); '
        'sys.stdout.write(\'{"report": "exit", "cause": "engine_exited", "rank": 0, "code": 0}\\n\'); '
        "sys.stdout.flush(); sys.exit(80)",
        node="n0",
    )

    async def work(steps: Steps) -> None:
        steps.launch(launch())
        async with asyncio.timeout(10):
            await lab.woken.wait()
        assert seen(steps).process is Process.RUNNING, "nobody looked yet"
        assert steps.read()
        step = seen(steps)
        assert (step.process, step.exit_code) == (Process.EXITED, 80)
        assert step.exit == ExitRecord(cause="engine_exited", message="", rank=0, code=0)

    in_loop(lab, work)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("", ""),
        ("srun: error: n0: task 0: Killed\n", "task 0: Killed"),
        ("srun: first\nsrun: cluster configuration lacks support for cpu binding\n", "first"),
        ("srun: cluster configuration lacks support for cpu binding\n", ""),
        ("x" * 5000, "x" * 300),
    ],
)
def test_what_srun_said_last_is_told_where_the_agent_said_nothing(lab: Lab, said: str, shown: str) -> None:
    lab.backend.script(ENDS, "1", said)

    async def work(steps: Steps) -> None:
        steps.launch(launch())
        await until(steps, lambda: seen(steps).process is Process.EXITED)
        assert shown in seen(steps).stderr
        assert bool(shown) == bool(seen(steps).stderr)
        assert len(seen(steps).stderr) <= 300
        assert seen(steps).exit_code == 1

    in_loop(lab, work)


def test_a_holder_that_a_signal_ends_has_its_number_as_code(lab: Lab) -> None:
    async def work(steps: Steps) -> None:
        steps.launch(launch())
        pid = seen(steps).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(steps, lambda: seen(steps).process is Process.EXITED)
        assert seen(steps).exit_code == -signal.SIGKILL

    in_loop(lab, work)


def test_steps_that_no_group_has_any_more_are_forgotten_once_they_ended(lab: Lab) -> None:
    async def work(steps: Steps) -> None:
        descriptors = len(os.listdir("/proc/self/fd"))
        steps.launch(launch())
        steps.keep(state(StepState(node="n0"), StepState(node="n1")))
        assert len(steps.observe(GROUP, 1)) == 2
        pid = seen(steps).pid
        assert pid is not None
        steps.keep(state(incarnation=2))
        assert len(steps.observe(GROUP, 1)) == 2, "they run"
        os.kill(pid, signal.SIGKILL)
        await until(steps, lambda: seen(steps).process is Process.EXITED)
        steps.keep(state(incarnation=2))
        assert [s.node for s in steps.observe(GROUP, 1)] == ["n1"]
        other = seen(steps, "n1").pid
        assert other is not None
        os.kill(other, signal.SIGKILL)
        await until(steps, lambda: seen(steps, "n1").process is Process.EXITED)
        steps.keep(state(incarnation=2))
        assert not steps.observe(GROUP, 1)
        assert len(os.listdir("/proc/self/fd")) == descriptors

    in_loop(lab, work)


# --------------------------------------------------------------------------------------------------------------- queue


def at_most(lab: Lab, most: int) -> None:
    lab.plan = replace(lab.plan, slurm=replace(lab.plan.slurm, max_launching=most))


def test_what_is_too_much_at_once_waits_for_its_turn_and_is_started_when_an_agent_speaks(lab: Lab) -> None:
    at_most(lab, 1)
    lab.backend.script(OBEYS, "0")

    async def work(steps: Steps) -> None:
        steps.launch(launch())
        assert (seen(steps).process, seen(steps, "n1").process) == (Process.RUNNING, Process.QUEUED)
        assert seen(steps, "n1") == StepObservation(node="n1", process=Process.QUEUED, pause=None)
        steps.start_queued()
        assert len(lab.pids()) <= 1
        await until(steps, lambda: seen(steps).spoke)
        steps.start_queued()
        assert seen(steps, "n1").process is Process.RUNNING
        began = seen(steps).launched_at, seen(steps, "n1").launched_at
        assert None not in began
        await until(steps, lambda: seen(steps, "n1").spoke)

    in_loop(lab, work)


def test_a_launch_that_ended_makes_room_and_so_does_one_that_has_been_silent_for_long(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_most(lab, 1)
    lab.backend.script(ENDS, "1", "no", node="n0")

    async def work(steps: Steps) -> None:
        steps.launch(launch("n0"))
        steps.launch(launch("n1"))
        steps.launch(launch("n0", sweep=True))
        await until(steps, lambda: seen(steps).process is Process.EXITED)
        steps.start_queued()
        assert seen(steps, "n1").process is Process.RUNNING, "first come, first served"
        assert seen(steps, sweep=True).process is Process.QUEUED
        monkeypatch.setattr("slurm_rollout.steps.LAUNCH_S", 0.0)
        steps.start_queued()
        assert seen(steps, sweep=True).process is not Process.QUEUED
        await until(steps, lambda: seen(steps, sweep=True).process is Process.EXITED)

    in_loop(lab, work)


def test_an_srun_that_says_that_its_step_is_put_off_gives_no_room(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    at_most(lab, 1)
    said = "srun: Job 1 step creation temporarily disabled, retrying (Requested nodes are busy)\n"
    lab.backend.script("import sys, time; sys.stderr.write(sys.argv[1]); sys.stderr.flush(); time.sleep(600)", said)
    monkeypatch.setattr("slurm_rollout.steps.LAUNCH_S", 0.0)

    async def work(steps: Steps) -> None:
        steps.launch(launch("n0"))
        await until(steps, lambda: "put" in seen(steps).stderr or "disabled" in seen(steps).stderr)
        steps.launch(launch("n1"))
        assert seen(steps, "n1").process is Process.QUEUED

    in_loop(lab, work)


def test_what_is_stopped_before_its_turn_has_ended_and_is_never_started(lab: Lab) -> None:
    at_most(lab, 1)

    async def work(steps: Steps) -> None:
        steps.launch(launch())
        steps.signal(stop("n1"))
        assert lab.woken.is_set()
        assert seen(steps, "n1").exit == ExitRecord(cause="stopped", message="it was not started yet")
        pid = seen(steps).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(steps, lambda: seen(steps).process is Process.EXITED)
        steps.start_queued()
        assert seen(steps, "n1").process is Process.EXITED
        assert not lab.pids()

    in_loop(lab, work)


def test_a_sweep_in_the_queue_is_not_judged_by_the_reports_of_the_one_before(lab: Lab) -> None:
    at_most(lab, 1)
    lab.backend.script(ENDS, "0", "", node="n0")

    async def work(steps: Steps) -> None:
        steps.launch(launch("n0", sweep=True))
        await until(steps, lambda: seen(steps, sweep=True).process is Process.EXITED)
        lab.say({"report": "exit", "cause": "swept", "message": "nothing"}, sweep=True)
        steps.launch(launch("n1"))
        steps.launch(launch("n0", sweep=True))
        steps.read()
        assert seen(steps, sweep=True) == StepObservation(node="n0", sweep=True, process=Process.QUEUED, pause=None)

    in_loop(lab, work)


def test_a_coordinator_that_dies_with_a_queue_leaves_intents_that_nobody_takes_for_running(lab: Lab) -> None:
    at_most(lab, 1)

    async def work(steps: Steps) -> None:
        steps.launch(launch())
        await until(steps, lab.pids)  # it is found by its mark, which a new process does not show for a moment
        first = seen(steps)
        steps.detach()
        successor = lab.steps()
        successor.adopt(state(known(first), StepState(node="n1")), {})
        assert (seen(successor).process, seen(successor).launched_at) == (Process.RUNNING, first.launched_at)
        assert seen(successor, "n1").process is Process.UNKNOWN
        assert seen(successor, "n1").exited_at is not None
        successor.start_queued()
        assert len(lab.pids()) <= 1
        successor.detach()

    in_loop(lab, work)


# --------------------------------------------------------------------------------------------------------------- adopt


def known(step: StepObservation) -> StepState:
    return StepState(node=step.node, pid=step.pid, pid_started=step.pid_started, sweep=step.sweep)


def test_the_next_coordinator_finds_the_steps_with_all_that_they_said(lab: Lab) -> None:
    for rank, node in enumerate(NODES):
        lab.backend.script(OBEYS, str(rank), node=node)

    async def work(first: Steps) -> None:
        first.launch(launch())
        await until(first, lambda: seen(first).spoke and seen(first, "n1").spoke)
        first.signal(go())
        await until(first, lambda: seen(first).started and seen(first, "n1").started)
        first.detach()
        # The pids were not journalled yet when it died: the mark alone finds them.
        async with ending(lab, lab.steps()) as second:
            second.adopt(state(StepState(node="n0"), StepState(node="n1")), {})
            second.read()
            for node, rank in (("n0", 0), ("n1", 1)):
                then, now = seen(first, node), seen(second, node)
                assert (now.process, now.pid, now.pid_started) == (Process.RUNNING, then.pid, then.pid_started)
                assert (now.spoke, now.started) == (True, (rank,))
            lab.woken.clear()
            second.signal(stop())
            async with asyncio.timeout(10):
                await lab.woken.wait()  # also of a process that is not its own child
            await until(second, lambda: all(s.process is Process.EXITED for s in second.observe(GROUP, 1)))
            assert seen(second).exit_code is None, "not its child: only the supervisor sees the code"
            assert seen(second).exit == ExitRecord(cause="stopped", message="as asked")

    in_loop(lab, work)


def test_a_sweep_is_adopted_as_a_sweep(lab: Lab) -> None:
    async def work(first: Steps) -> None:
        first.launch(launch("n0", sweep=True))
        await until(first, lab.pids)  # it is found by its mark, which a new process does not show for a moment
        first.detach()
        async with ending(lab, lab.steps()) as second:
            second.adopt(state(StepState(node="n0"), StepState(node="n0", sweep=True)), {})
            assert seen(second, sweep=True).process is Process.RUNNING
            assert seen(second).process is Process.UNKNOWN

    in_loop(lab, work)


def test_only_the_holder_itself_is_adopted(lab: Lab) -> None:
    """Engines carry the mark, srun's twin shares its environment, another run or incarnation has other steps."""
    mine = {MARK: mark(lab.run_id, GROUP, 1, "n0")}
    orders = {"ROLLOUT_STEP": "{}"}
    lab.stranger(mine)  # an engine that leads a session
    lab.stranger({**mine, **orders}, leader=False)  # the twin
    lab.stranger({**mine, **orders}, argv=["sleep", "600"])  # some other command
    lab.stranger({MARK: mark(lab.run_id, GROUP, 2, "n0"), **orders})
    lab.stranger({MARK: mark(f"{lab.run_id}0", GROUP, 1, "n0"), **orders})
    lab.stranger({**mine, **orders, "ROLLOUT_SWEEP": "1"})
    wait_for("all marks", lambda: all(MARK in proc.environ(s.pid) for s in lab.strangers), 5)

    async def work(steps: Steps) -> None:
        before = monotonic()
        steps.adopt(state(StepState(node="n0")), {})
        step = seen(steps)
        assert (step.process, step.pid, step.exit_code) == (Process.UNKNOWN, None, None)
        assert step.exited_at is not None
        assert step.exited_at >= before, "what Slurm said earlier says nothing about it"

    in_loop(lab, work)


def test_a_pid_that_somebody_else_has_now_is_not_adopted(lab: Lab) -> None:
    other = lab.stranger({})
    found = proc.read(other)
    assert found is not None
    steps_known = (
        StepState(node="n0", pid=other, pid_started=found.started - 100),
        StepState(node="n1", pid=other, pid_started=found.started),  # the very process, but it carries no mark
    )

    async def work(steps: Steps) -> None:
        steps.adopt(state(*steps_known), {(other, found.started): 3})
        assert {s.process for s in steps.observe(GROUP, 1)} == {Process.EXITED}
        assert seen(steps).exit_code is None
        steps.signal(stop())
        assert [r.pid for r in steps.refs(Cancel(group=GROUP, incarnation=1, nodes=NODES))] == [None, None]

    in_loop(lab, work)
    assert lab.strangers[0].returncode == -signal.SIGKILL, "nothing but the test's own end ended it"


def test_an_end_between_two_coordinators_is_told_with_its_code_and_its_last_words(lab: Lab) -> None:
    lab.backend.script(ENDS, "7", "srun: error: lost\n", node="n0")

    async def work(first: Steps) -> None:
        first.launch(launch())
        await until(first, lambda: seen(first).process is Process.EXITED)
        journalled = tuple(known(seen(first, node)) for node in NODES)
        lab.say({"report": "exit", "cause": "port_busy", "message": "held"}, node="n1")
        pid = seen(first, "n1").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(first, lambda: seen(first, "n1").process is Process.EXITED)
        exits = {
            (journalled[0].pid or 0, journalled[0].pid_started): 7,
            (journalled[1].pid or 0, journalled[1].pid_started + 1): 5,  # of a later process with that pid
        }
        async with ending(lab, lab.steps()) as second:
            second.adopt(state(*journalled), exits)
            second.read()
            step, other = seen(second), seen(second, "n1")
            assert (step.process, step.pid, step.exit_code) == (Process.EXITED, journalled[0].pid, 7)
            assert "lost" in step.stderr
            assert step.exited_at is not None
            assert other.exit_code is None
            assert other.exit == ExitRecord(cause="port_busy", message="held")

    in_loop(lab, work)


def test_the_end_of_a_coordinator_ends_no_step(lab: Lab) -> None:
    async def work(steps: Steps) -> None:
        steps.launch(launch())
        pids = {seen(steps, node).pid for node in NODES}
        steps.detach()
        del steps
        # A process that has just been started shows no environment for a moment.
        wait_for("both holders", lambda: pids == set(lab.pids()), 5)

    in_loop(lab, work)
