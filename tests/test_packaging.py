"""What gets installed: wheel and sdist carry the templates and the sbin scripts, and what must stay alone does."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel and sdist."""
    out = tmp_path_factory.mktemp("dist")
    argv = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_wheel_carries_templates_and_the_agent_as_a_script(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (script,) = [n for n in names if n.endswith(".data/scripts/slurm-rollout-agent")]
        # The first line becomes the one that installers fill in with their interpreter.
        installed, own = (
            t.partition(b"\n")[2] for t in (archive.read(script), (ROOT / "slurm_rollout/agent.py").read_bytes())
        )
        assert installed == own
        assert archive.getinfo(script).external_attr >> 16 & 0o111
        assert [n for n in names if n.endswith(".data/scripts/slurm-rollout-nodecheck")]
    assert {f"slurm_rollout/templates/{t.name}" for t in (ROOT / "templates").iterdir()} <= set(names)
    assert "slurm_rollout/py.typed" in names
    assert not [n for n in names if n.startswith("tests")]


def test_the_sdist_builds_the_same_thing(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"} <= names
    assert {f"sbin/slurm-rollout-{name}" for name in ("agent", "nodecheck")} <= names
    assert {"templates/train.sbatch", "templates/fleet.toml", "examples/rl_loop/trainer.py"} <= names


def test_the_agent_runs_alone_as_a_script(tmp_path: Path) -> None:
    copy = tmp_path / "slurm-rollout-agent"
    copy.write_bytes((ROOT / "sbin/slurm-rollout-agent").read_bytes())
    done = subprocess.run([sys.executable, "-IS", copy, "--help"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0
    assert "ROLLOUT_STEP" in done.stdout
