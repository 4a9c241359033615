"""What runs on other people's interpreters runs on Python 3.9: barrier.py, copied alone, the agent, the node check.

`.ci/install-python39 DIR` fetches one. ROLLOUT_PYTHON39 names one; ROLLOUT_REQUIRE_PYTHON39=1 makes a missing one a
failure, not a skip.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BEAT_S = 0.02


@pytest.fixture(scope="module")
def python39() -> str:
    """A Python 3.9."""
    named = os.environ.get("ROLLOUT_PYTHON39")
    if named:
        assert is_3_9(named), f"ROLLOUT_PYTHON39={named} is no Python 3.9"
        return named
    candidates = [*map(str, Path.home().glob(".pyenv/versions/3.9*/bin/python")), shutil.which("python3.9")]
    for candidate in candidates:
        if candidate and is_3_9(candidate):
            return candidate
    if os.environ.get("ROLLOUT_REQUIRE_PYTHON39") == "1":
        pytest.fail("ROLLOUT_REQUIRE_PYTHON39=1, but there is no Python 3.9: .ci/install-python39 DIR", pytrace=False)
    pytest.skip("NO PYTHON 3.9 HERE: not tested on it; .ci/install-python39 DIR fetches one, ROLLOUT_PYTHON39 names it")


def is_3_9(python: str) -> bool:
    code = "import sys; print(*sys.version_info[:2])"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run([python, "-IS", "-c", code], capture_output=True, text=True, timeout=60, check=False)
        return said.stdout.strip() == "3 9"
    return False


def run(python: str, *args: str | Path, codes: Sequence[int] = (0,), environ: Mapping[str, str] | None = None) -> str:
    """Run a program on it, warnings as errors, and return what it printed."""
    done = subprocess.run(
        [python, "-I", "-W", "error", *map(str, args)],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **(environ or {})},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode in codes, done.stdout + done.stderr
    assert not done.stderr
    return done.stdout


class FakeCoordinator(threading.Thread):
    """Writes a barrier file as the coordinator of one trained group does: it hears its trainer, and echoes it.

    The group starts when the trainer waits, and serves what is acknowledged. With a file `failed` there, it has failed.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.words = folder / "clients" / "trainer.json"
        self.acks = folder / "clients" / "trainer.acks.jsonl"
        self.over = threading.Event()
        self._seq = 0
        self._alive = False
        self.words.parent.mkdir()
        self._beat()

    def run(self) -> None:
        while not self.over.wait(BEAT_S):
            self._beat()

    def _beat(self) -> None:
        heard: dict[str, Any] = json.loads(self.words.read_text()) if self.words.exists() else {}
        acks = [json.loads(line) for line in self.acks.read_text().splitlines()] if self.acks.exists() else []
        taken = [ack["version"] for ack in acks if ["actor/0", 1] in ack["groups"]]
        version = max(taken, default=None)
        self._alive = self._alive or heard.get("waiting_s", 0) > 0
        self._seq += 1
        phase = "waiting" if not self._alive else "ready" if taken else "needs_weights"
        failed = (self.folder / "failed").exists()
        document = {
            "schema": 1,
            "run": "test",
            "job": "7",
            "restart_count": 2,
            "term": 1,
            "seq": self._seq,
            "heartbeat_s": BEAT_S,
            "epoch": self._alive + bool(taken),
            "phase": "failed" if failed else phase,
            "reason": "budget_spent" if failed else "",
            "message": "5 restarts" if failed else "",
            "clients": {
                "trainer": {
                    "phase": heard.get("phase", ""),
                    "seq": heard.get("seq", 0),
                    "hold": heard.get("hold_s", 0) > 0,
                    "acks": len(acks),
                }
            },
            "pools": [
                {"name": "actor", "phase": phase, "ready": len(taken), "desired": 1, "min_ready": 1}
                | {"weights_version": version, "probes": "on", "restarts": "at_once", "may_start": ""}
            ],
            "may_start": "held by trainer" if heard.get("hold_s", 0) > 0 else "",
            "groups": [
                {
                    "id": "actor/0",
                    "phase": "ready" if self._alive else "starting",
                    "serving": bool(taken),
                    "incarnation": 1,
                    "weights": "current" if taken else "stale",
                    "weights_version": version,
                    "urls": ["http://n1:18000"] if self._alive else [],
                    "endpoints": {"session": ["http://n1:18003"]} if self._alive else {},
                    "master": "n1:18001",
                    "since": "",
                    "reason": "",
                    "world_size": 8,
                    "changed": int(self._alive),
                }
            ],
        }
        staged = self.folder / ".staged"
        staged.write_text(json.dumps(document))
        staged.replace(self.folder / "barrier.json")


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[FakeCoordinator]:
    folder = tmp_path / "run"
    folder.mkdir()
    thread = FakeCoordinator(folder)
    thread.start()
    yield thread
    thread.over.set()
    thread.join()


TRAINER = """
import pathlib
import pickle
import sys

folder = pathlib.Path(__file__).parent
sys.path.insert(0, str(folder))

import barrier as module
from barrier import Barrier, BarrierTimeout, FleetFailed, WeightsNeeded

assert sys.version_info[:2] == (3, 9)


def again(value):
    copy = pickle.loads(pickle.dumps(value))
    assert type(copy) is type(value) and str(copy) == str(value)
    return copy


def caught(error, call, *args, **options):
    try:
        call(*args, **options)
    except error as found:
        return again(found) if isinstance(found, module.BarrierError) else found
    raise AssertionError(f"{call} raised no {error}")


barrier = Barrier()
assert barrier.current().phase == "waiting"
assert caught(module.BarrierError, Barrier(job="8").stale).args
assert "a/b" in str(caught(ValueError, Barrier, client="a/b"))

needed = caught(WeightsNeeded, barrier.wait_ready, timeout=60, poll_s=0.05)
assert [g.id for g in needed.groups] == ["actor/0"]
epoch = barrier.current().epoch
snapshot = barrier.stale()
assert snapshot and again(snapshot) == snapshot
assert [(g.id, g.incarnation, g.urls, g.world_size) for g in snapshot.groups] == [
    ("actor/0", 1, ("http://n1:18000",), 8)
]
assert not barrier.is_current("actor/0", 1)

with barrier.hold(lease_s=60, timeout=60) as hold:
    assert again(hold.state).clients["trainer"]["hold"] is True
    assert barrier.current().may_start == "held by trainer"
    barrier.announce("syncing", timeout=60)
    state = barrier.ack_weights(3, snapshot, timeout=60)
assert state.clients["trainer"]["acks"] == 1
state = barrier.announce("generating", timeout=60)
assert state.clients["trainer"] == {**state.clients["trainer"], "phase": "generating", "hold": False}
assert "older than 3" in str(caught(ValueError, barrier.ack_weights, 2, snapshot))
barrier.release(timeout=60)

state = again(barrier.wait_ready(after_epoch=epoch, timeout=60, poll_s=0.05))
assert (state.phase, state.confirmed, state.urls) == ("ready", True, ("http://n1:18000",))
assert state.endpoint("session") == ("http://n1:18003",)
assert state.pools[0].weights_version == 3
assert barrier.is_current("actor/0", 1) and barrier.is_current("actor/0", 1, version=3)
assert not barrier.is_current("actor/0", 1, version=2) and not barrier.is_current("actor/0", 2)
assert [g.id for g in barrier.changed_since(0)] == ["actor/0"] and barrier.changed_since(state.epoch) == ()
assert not barrier.stale()

assert "in an epoch above" in str(
    caught(BarrierTimeout, barrier.wait_ready, after_epoch=state.epoch, timeout=0.2, poll_s=0.05)
)
(pathlib.Path(barrier.path).parent / "failed").touch()
assert caught(FleetFailed, barrier.wait_ready, after_epoch=state.epoch, timeout=60).reason == "budget_spent"
print("all of it")
"""


def test_a_lone_copy_of_barrier_py_does_all_that_a_trainer_asks(
    python39: str, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    alone = tmp_path / "trainer"
    alone.mkdir()
    shutil.copy(ROOT / "slurm_rollout" / "barrier.py", alone)
    (alone / "train.py").write_text(TRAINER)
    environ = {"ROLLOUT_BARRIER": str(coordinator.folder / "barrier.json")}
    environ |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}
    said = run(python39, alone / "train.py", environ=environ)
    assert said == "all of it\n"
    ack = json.loads(coordinator.acks.read_text())
    assert ack == {"n": 1, "version": 3, "groups": [["actor/0", 1]], "rollback": False, "job": "7", "restart_count": 2}


@pytest.mark.parametrize("name", ["slurm-rollout-agent", "slurm-rollout-nodecheck"])
def test_what_runs_on_nodes_starts(name: str, python39: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "sbin" / name, tmp_path / name)
    assert name in run(python39, tmp_path / name, "--help")


def test_the_node_check_checks(python39: str, tmp_path: Path) -> None:
    program = ROOT / "sbin" / "slurm-rollout-nodecheck"
    # Whether this machine is fit for a fleet is another question.
    said = run(python39, program, "--ports", "31190", "--dir", tmp_path, "--json", codes=(0, 1))
    statuses = {check["status"] for check in json.loads(said)["checks"]}
    assert "ok" in statuses
