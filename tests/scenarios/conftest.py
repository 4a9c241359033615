"""Every scenario runs on the local backend, on the fake Slurm and on real Slurm."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm_rollout.testing.fake_slurm import FakeSlurm
from tests.conftest import FAILED
from tests.scenarios.lab import FakeLab, Lab, SlurmLab

# Tests that run beside one another have ports of their own; on real Slurm every cluster has a network of its own.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_BASES = itertools.cycle(list(range(22000, 31000, 160))[_WORKER::_WORKERS])

KILL_WAIT_S = 5.0
"""From TERM to KILL, as on the real cluster: a busy machine takes its time to end a run in order."""


@pytest.fixture
def base() -> int:
    """The first of 160 ports that no other test uses now."""
    return next(_BASES)


@pytest.fixture(params=["local", "fake", pytest.param("slurm", marks=pytest.mark.slurm)])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    place = _make(request, tmp_path)
    try:
        yield place
    finally:
        if request.node.stash.get(FAILED, False):
            print(place.fleet.story())
        place.close()


def _make(request: pytest.FixtureRequest, folder: Path) -> Lab:
    if request.param == "local":
        return Lab(folder, next(_BASES))
    if request.param == "slurm":
        return SlurmLab(request.getfixturevalue("cluster"))
    slurm = FakeSlurm(folder / "slurm", kill_wait_s=KILL_WAIT_S).start()
    request.addfinalizer(slurm.stop)
    return FakeLab(slurm, next(_BASES))
