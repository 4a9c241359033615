"""pytest fixtures for recipes: `pytest_plugins = ["slurm_rollout.testing.plugin"]`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm_rollout.testing.fake_slurm import FakeSlurm


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    """A fake Slurm of four nodes with eight GPUs each, its commands first on the test's own PATH, too."""
    with FakeSlurm(tmp_path / "fake-slurm") as slurm:
        monkeypatch.setenv("PATH", slurm.env["PATH"])
        yield slurm
