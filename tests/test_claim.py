"""Who may use a run directory, a name and ports on one host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from slurm_rollout.claim import claim, node_local_dir
from slurm_rollout.core.plan import FleetPlan
from slurm_rollout.errors import RunDirBusy, StoreError
from slurm_rollout.rundir import RunDir
from slurm_rollout.testing.world import make_plan


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run directory that does not exist yet; locks are the test's own."""
    (tmp_path / "node").mkdir()
    monkeypatch.setenv("ROLLOUT_TMPDIR", str(tmp_path / "node"))
    return RunDir(tmp_path / "runs" / "7")


def test_a_run_directory_has_one_coordinator(run: RunDir) -> None:
    plan = make_plan(1)
    held = claim(run, plan, "12")
    with pytest.raises(RunDirBusy) as e:
        claim(run, replace(plan, name="other"), "13")
    for part in (str(run.path), "'run'", f"pid {os.getpid()}", "Nothing was started", "stop --run-dir", "--run-dir"):
        assert part in str(e.value)
    held.release()
    claim(run, plan, "12").release()
    assert not run.path.exists()


def test_a_run_directory_is_the_same_by_every_path_to_it(run: RunDir, tmp_path: Path) -> None:
    run.path.mkdir(parents=True)
    (tmp_path / "link").symlink_to(run.path)
    held = claim(run, make_plan(1), "12")
    with pytest.raises(RunDirBusy, match="is in use by"):
        claim(RunDir(tmp_path / "link"), make_plan(1), "12")
    held.release()


def moved(plan: FleetPlan, port: int) -> FleetPlan:
    """The same fleet with all ports elsewhere."""
    (pool,) = plan.pools
    groups = tuple(
        replace(g, members=tuple(replace(m, ports={"http": port, "master": port + 1}) for m in g.members))
        for g in pool.groups
    )
    return replace(plan, pools=(replace(pool, groups=groups),))


def test_two_coordinators_of_one_host_share_no_port(run: RunDir) -> None:
    plan, second = make_plan(2), RunDir(run.path.with_name("8"))
    held = claim(run, plan, "12")
    with pytest.raises(RunDirBusy, match=r"uses 6 of the same ports \(n0:18000, n0:18001, n1:18000 …\)") as e:
        claim(second, replace(plan, name="other"), "13")
    assert str(run.path) in str(e.value)
    assert "Choose other nodes, or another [ports] base" in str(e.value)
    other = claim(second, replace(moved(plan, 19000), name="other"), "13")
    held.release()
    # The refusal has left no claim behind, and the first one's end gives its ports back.
    third = claim(RunDir(run.path.with_name("9")), replace(plan, name="third"), "13")
    for each in (other, third):
        each.release()


def test_two_coordinators_of_one_job_have_different_names(run: RunDir) -> None:
    plan, second = make_plan(1), RunDir(run.path.with_name("8"))
    held = claim(run, plan, "12")
    with pytest.raises(RunDirBusy, match="runs in this job under the same name"):
        claim(second, moved(plan, 19000), "12")
    claim(second, moved(plan, 19000), "13").release()
    claim(second, replace(moved(plan, 19000), name="other"), "12").release()
    held.release()
    # Without Slurm there are no step names to confuse.
    local = replace(plan, backend="local")
    held = claim(run, local, "")
    claim(second, moved(local, 19000), "").release()
    held.release()


def test_what_a_killed_coordinator_left_is_no_claim(run: RunDir) -> None:
    code = f"""
import os
from slurm_rollout.claim import claim
from slurm_rollout.rundir import RunDir
from slurm_rollout.testing.world import make_plan
claim(RunDir({str(run.path)!r}), make_plan(1), "12")
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (note,) = (node_local_dir() / "locks").glob("*.json")
    assert json.loads(note.read_text())["name"] == "run"
    claim(RunDir(run.path.with_name("8")), make_plan(1), "12").release()
    claim(run, make_plan(1), "12").release()


def test_what_ended_coordinators_left_is_removed_and_what_is_held_stays(run: RunDir) -> None:
    locks = node_local_dir() / "locks"
    plan = make_plan(1)
    held = claim(run, plan, "12")
    (lock,) = {p for p in locks.glob("*.lock") if not p.name.startswith(".")}
    for n in range(3):
        (locks / f"{n:020x}.lock").touch()
    (locks / f"{1:020x}.json").write_text("{}")
    (locks / "somebody-s.lock").touch()
    other = claim(RunDir(run.path.with_name("8")), replace(moved(plan, 19000), name="other"), "13")
    assert {p.name for p in locks.iterdir()} == {
        ".order.lock",
        "somebody-s.lock",
        lock.name,
        lock.with_suffix(".json").name,
        other.note.name,
        other.note.with_suffix(".lock").name,
    }
    with pytest.raises(RunDirBusy):
        claim(run, plan, "12")
    held.release()
    other.release()


def test_a_claim_that_waits_for_another_in_vain_says_so(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm_rollout.claim.CLAIM_TIMEOUT_S", 0.1)
    locks = node_local_dir() / "locks"
    locks.mkdir()
    with FileLock(locks / ".order.lock"), pytest.raises(RunDirBusy, match=r"another `up`.*Try again"):
        claim(run, make_plan(1), "12")


@pytest.mark.parametrize("kind", ["file", "open to all", "link", "missing parent"])
def test_a_node_local_directory_that_is_not_ours_alone_is_refused(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    base = Path(os.environ["ROLLOUT_TMPDIR"])
    path = base / f"slurm-rollout-{os.getuid()}"
    if kind == "file":
        path.write_text("")
    elif kind == "open to all":
        path.mkdir()
        path.chmod(0o755)
    elif kind == "link":
        (base / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(base / "elsewhere")
    else:
        monkeypatch.setenv("ROLLOUT_TMPDIR", str(base / "nowhere"))
    with pytest.raises(StoreError, match="ROLLOUT_TMPDIR"):
        claim(run, make_plan(1), "12")


def test_locks_that_cannot_be_made_are_named(run: RunDir) -> None:
    (node_local_dir() / "locks").write_text("")
    with pytest.raises(StoreError, match=r"locks: File exists.*ROLLOUT_TMPDIR"):
        claim(run, make_plan(1), "12")
