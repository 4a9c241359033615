"""Real Slurm for every test that is marked so. Without it they are skipped, or fail if ROLLOUT_REQUIRE_SLURM=1."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from slurm_rollout.testing.slurm_cluster import SlurmCluster, SlurmClusterError, wait_until, why_unavailable

# Whoever runs the tests under nohup or behind an `&` has these ignored, and every process that a test starts with them.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_number, signal.SIG_DFL)

FAILED = pytest.StashKey[bool]()
"""Whether a test failed, for fixtures that then tell why."""

settings.register_profile("patient", deadline=None)  # a machine that is busy with other tests is no failure
settings.load_profile("patient")


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """Scenarios may run beside one another; the tests of any other file share its ports, and keep to one worker."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if "scenarios/" in nodeid else nodeid.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if os.environ.get("ROLLOUT_THOROUGH") == "1":
        return
    case = getattr(item, "callspec", None)
    backend = case.params.get("lab") if case is not None else None
    if any(not mark.args or backend in mark.args for mark in item.iter_markers("thorough")):
        pytest.skip("one more case of many: `make test-thorough` runs it")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.fixture(scope="session")
def real_slurm() -> None:
    reason = why_unavailable()
    if reason and os.environ.get("ROLLOUT_REQUIRE_SLURM") == "1":
        pytest.fail(f"ROLLOUT_REQUIRE_SLURM=1, but {reason}", pytrace=False)
    if reason:
        pytest.skip(f"REAL SLURM NOT TESTED: {reason}")


@pytest.fixture(scope="session")
def clusters(real_slurm: None) -> Iterator[list[SlurmCluster]]:
    """The next test's cluster: a controller starts its first batch job only when it is three seconds old."""
    waiting = [SlurmCluster().start()]
    yield waiting
    for cluster in waiting:
        cluster.stop()


@pytest.fixture
def cluster(request: pytest.FixtureRequest, clusters: list[SlurmCluster]) -> Iterator[SlurmCluster]:
    """Four nodes of eight fake GPUs, new for each test: a start takes 0.3 s, until one is idle again takes longer."""
    cluster = clusters.pop() if clusters else SlurmCluster().start()
    try:
        clusters.append(SlurmCluster().start())
        yield cluster
        if request.node.stash.get(FAILED, False):
            show_logs(cluster)
        expect_no_process_left(cluster)
    finally:
        cluster.stop()


def show_logs(cluster: SlurmCluster) -> None:
    for log in sorted([*cluster.logs.glob("slurm*.log"), *cluster.home.rglob("*.out")]):
        print(f"---- {log}", *log.read_text(errors="replace").splitlines()[-15:], sep="\n")


def expect_no_process_left(cluster: SlurmCluster, timeout_s: float = 30) -> None:
    """Whatever a test left running, faults included, must end by scancel alone, as it would on a site."""
    try:
        cluster.heal()
        cluster.run(["scancel", f"--user={cluster.user}"])
        wait_until("no process of the user is left", lambda: not cluster.user_pids(), timeout_s)
    except (SlurmClusterError, TimeoutError) as error:
        left = "\n".join(f"{pid} {command_line(pid)}" for pid in cluster.user_pids())
        pytest.fail(f"after scancel: {error}\n{left}", pytrace=False)


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return "(has ended)"
