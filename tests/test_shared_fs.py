"""The barrier client on shared file systems: replaced often, shown late, stale, missing for a moment, half visible.

ROLLOUT_SHARED_FS_S: how long the test with real files lasts, in seconds (default: 6).
"""

from __future__ import annotations

import errno
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from slurm_rollout.barrier import Barrier, State
from slurm_rollout.rundir import RunDir
from slurm_rollout.store import Store
from slurm_rollout.testing.shared_fs import DOWN, FUSE, NFS, Habits, Mount, View, either

ROOT = Path(__file__).parents[1]
PATH = "/run/barrier.json"
DURATION_S = float(os.environ.get("ROLLOUT_SHARED_FS_S", "6"))
PER_S = 25  # replaces: 1,500 a minute
GROUPS = 8
GRACE_S = 60.0

# Worse than what they are made of: nearly every second version is at fault first, some for longer than one look of a
# reader lasts. What is late is so by less, so that a short test sees many versions.
ROUGH_NFS = replace(NFS, late_s=0.5, stale=0.25, half=0.15, looks=8, error=0.02)
ROUGH_FUSE = replace(FUSE, late_s=0.2, gap=0.25, half=0.15, looks=8, error=0.02)

# ----------------------------------------------------------------------------------------------------- what is written


def document(n: int) -> dict[str, Any]:
    """The n-th version: every field of it follows from n, so a reader's value can be held against it whole.

    Every fifth one is a new epoch: one group is gone, the one that was gone is back as its next incarnation. Every
    hundredth is another coordinator's.
    """
    epoch = 1 + n // 5
    groups = []
    for i in range(GROUPS):
        gone, incarnation = (epoch + i) % GROUPS == 0, 1 + (epoch + i) // GROUPS
        url = f"http://n{i}:{18000 + incarnation}"
        groups.append(
            {
                "id": f"actor/{i}",
                "phase": "starting" if gone else "ready",
                "serving": not gone,
                "incarnation": incarnation,
                "urls": [] if gone else [url],
                "endpoints": {} if gone else {"session": [f"{url}/session"]},
                "master": f"n{i}:{17000 + incarnation}",
                "since": str(epoch),
                "reason": "engine_exited" if gone else "",
            }
        )
    return {
        "schema": 1,
        "run": "test",
        "job": "",
        "restart_count": 0,
        "term": 1 + n // 100,
        "seq": n,
        "heartbeat_s": 1 / PER_S,
        "epoch": epoch,
        "phase": "ready",
        "reason": "degraded",
        "message": f"version {n}",
        "clients": {},
        "pools": [{"name": "actor", "phase": "ready", "ready": GROUPS - 1, "desired": GROUPS, "min_ready": 1}],
        "groups": groups,
    }


@functools.cache
def encoded(n: int) -> bytes:
    return json.dumps(document(n)).encode()


@functools.cache
def written(n: int) -> State:
    return Barrier(PATH, read=lambda path: encoded(n)).current()


def write(folder: Path, seconds: float) -> None:
    """Replace the barrier file as a coordinator does, and its successors, then say what was written in which time."""
    run, began = RunDir(folder), time.monotonic()
    last = round(PER_S * seconds)
    store = Store(run, 0, private=False)
    for n in range(last + 1):
        version = document(n)
        if n % 100 == 0:
            store = Store(run, version["term"], private=False)
            store.open()
        store.write_barrier(version)
        time.sleep(max(0.0, began + n / PER_S - time.monotonic()))
    print(json.dumps({"last": last, "took_s": time.monotonic() - began}))


class Witness:
    """Remembers what one poller was told, and complains of what it must never be told."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.newest = -1
        self.versions = 0
        self._last = (0, 0, 0)
        self._incarnations: Counter[str] = Counter()

    def hear(self, state: State) -> None:
        if state.phase != "ready":
            self.wrong.append(f"{state.phase}, {state.reason}: {state.message}")
            return
        if state._replace(confirmed=False) != written(state.seq):
            self.wrong.append(f"was never written: {state}")
        now = (state.term, state.seq, state.epoch)
        if now < self._last or state.epoch < self._last[2]:
            self.wrong.append(f"{now} after {self._last}")
        for group in state.groups:
            if group.incarnation < self._incarnations[group.id]:
                self.wrong.append(f"{group.urls} of {group.id} in epoch {state.epoch}: withdrawn before {self._last}")
            self._incarnations[group.id] = group.incarnation
        self.versions += now != self._last
        self._last = now
        self.newest = max(self.newest, state.seq)


# ------------------------------------------------------------------------------------------------------------ the shim


def shows(view: View, now: float, server: bytes | None) -> bytes | str:
    try:
        return view.look(PATH, now, lambda: server)
    except OSError as e:
        return errno.errorcode[e.errno or 0]


def test_an_older_version_shows_for_a_while_and_no_longer() -> None:
    view = View(Habits(late_s=3.0), seed=1)
    assert shows(view, 0.0, b"old") == b"old"
    seen = [shows(view, t / 10, b"new") for t in range(31)]
    since = seen.index(b"new")
    assert seen == [b"old"] * since + [b"new"] * (31 - since)
    assert since > 0


def test_a_name_that_was_missing_stays_so_until_its_directory_is_listed() -> None:
    view = View(Habits(missing_s=30.0), seed=2)
    assert shows(view, 0.0, None) == "ENOENT"
    assert shows(view, 1.0, b"new") == "ENOENT"
    view.listed("/elsewhere")
    assert shows(view, 2.0, b"new") == "ENOENT"
    view.listed("/run")
    assert shows(view, 3.0, b"new") == b"new"
    assert shows(view, 4.0, None) == "ENOENT"
    assert shows(view, 34.0, b"new") == b"new"


@pytest.mark.parametrize(
    ("habits", "expected"),
    [
        (Habits(stale=1.0), "ESTALE"),
        (Habits(gap=1.0, missing_s=30.0), "ENOENT"),
        (Habits(error=1.0), "EIO"),
        (Habits(half=1.0), "part"),
    ],
)
def test_a_replaced_file_is_at_fault_for_a_few_looks(habits: Habits, expected: str) -> None:
    view = View(habits, seed=3)
    whole = b"0123456789"
    seen = [shows(view, t, whole) for t in range(4)]
    found = seen[0]
    if isinstance(found, bytes):
        assert found != whole
        head = found.rstrip(b"\0")
        assert whole.startswith(head)
        assert len(found) in (len(head), len(whole))
        found = "part"
    assert found == expected
    if habits.gap:
        view.listed("/run")
    assert (shows(view, 4, whole) == whole) == (not habits.error)
    assert (shows(view, 5, whole) == whole) == (not habits.error)  # the fault was of that version, and is over


def test_the_same_seed_gives_the_same_answers() -> None:
    def story(seed: int) -> list[bytes | str]:
        view = View(ROUGH_NFS, seed)
        return [shows(view, t / 20, encoded(t)) for t in range(400)]

    assert story(1) == story(1) != story(2)
    whole = {encoded(n) for n in range(400)}
    kinds = Counter(s if isinstance(s, str) else "whole" if s in whole else "part" for s in story(1))
    assert set(kinds) == {"ESTALE", "EIO", "whole", "part"}
    assert kinds["whole"] > 100


def test_a_listing_by_whatever_means_reaches_the_mount_of_the_thread_that_made_it(tmp_path: Path) -> None:
    path = tmp_path / "barrier.json"
    ours, theirs = (Mount(Habits(missing_s=3600.0), seed=i) for i in range(2))

    def missing(mount: Mount) -> bool:
        try:
            return not mount.read(str(path))
        except FileNotFoundError:
            return True

    for list_it in (os.listdir, os.scandir, lambda p: list(p.iterdir()), lambda p: list(p.glob("*"))):
        path.unlink(missing_ok=True)
        for mount in (ours, theirs):
            mount.listed(str(tmp_path))
            assert missing(mount)
        path.write_bytes(b"here")
        assert missing(theirs)
        assert missing(ours)
        listing: Any = list_it(tmp_path)
        getattr(listing, "close", list)()
        assert not missing(ours)
        assert missing(theirs)


def test_two_mounts_with_different_delays_show_an_older_version_after_a_newer_one(tmp_path: Path) -> None:
    path, now = tmp_path / "barrier.json", 0.0
    mounts = [Mount(Habits(late_s=late_s), seed=1, clock=lambda: now) for late_s in (0.0, 10.0)]
    read = either(*mounts, seed=1)
    seen = []
    for n in range(100):
        now = n / 10
        path.write_text(str(n))
        seen.append(int(read(str(path))))
    assert seen != sorted(seen)


# ------------------------------------------------------------------------------------------------ the client, simulated


class World:
    """A clock that only sleeping moves, and a real file that holds version `PER_S * now` whenever it is read."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.now = 0.0
        self.random = Random(seed)
        self.path = folder / "barrier.json"

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def version(self) -> int:
        return int(PER_S * self.now)

    def mount(self, habits: Habits, seed: int) -> Mount:
        return Mount(habits, seed=seed, clock=self.clock)

    def barrier(self, through: Callable[[str], bytes]) -> Barrier:
        def read(path: str) -> bytes:
            self.path.write_bytes(encoded(self.version()))
            return through(path)

        return Barrier(self.path, clock=self.clock, sleep=self.sleep, read=read, grace_s=GRACE_S, job="")


@pytest.mark.parametrize("seed", range(9))
def test_every_value_was_written_and_none_is_older_than_the_last(seed: int, tmp_path: Path) -> None:
    world, witness = World(tmp_path, seed), Witness()
    habits = [ROUGH_NFS, ROUGH_FUSE, replace(ROUGH_NFS, late_s=5.0)]
    barrier = world.barrier(either(*(world.mount(h, seed) for h in habits[seed % 3 :]), seed=seed))
    first_value(barrier)
    while world.now < 120:
        witness.hear(barrier.current())
        world.now += world.random.uniform(0, 0.4)
    assert not witness.wrong
    assert witness.versions > 30
    assert witness.newest > PER_S * (120 - 10)


def test_what_is_wrong_for_a_moment_is_never_seen(tmp_path: Path) -> None:
    """Neither at the first look, when there is no last good value, nor later: each look finds what is there."""
    world = World(tmp_path)
    always = Habits(missing_s=3600.0, stale=0.34, gap=0.33, half=0.33, looks=4)
    for seed in range(100):
        mount = world.mount(always, seed)
        barrier = Barrier(world.path, clock=world.clock, sleep=world.sleep, read=mount.read, job="")
        for n in range(5):
            world.path.write_bytes(encoded(n))
            assert barrier.current()._replace(confirmed=False) == written(n)


def test_a_grace_time_bridges_an_outage(tmp_path: Path) -> None:
    world, witness = World(tmp_path), Witness()
    mount = world.mount(ROUGH_NFS, 1)
    barrier = world.barrier(mount.read)
    first_value(barrier)
    down_at, mount.habits = world.now, DOWN
    while world.now < down_at + GRACE_S - 2:
        witness.hear(barrier.current())
        world.now += 1
    assert not witness.wrong
    assert witness.versions == 1
    world.now = down_at + GRACE_S + 1
    state = barrier.current()
    assert (state.phase, state.reason, state.urls) == ("waiting", "unreadable", ())
    mount.habits = ROUGH_NFS
    assert first_value(barrier).seq > PER_S * (down_at + GRACE_S)
    assert world.now < down_at + GRACE_S + 5


def first_value(barrier: Barrier) -> State:
    """Look until there is a last good value; only from then on may nothing wrong be seen."""
    for _ in range(100):
        state = barrier.current()
        if state.phase == "ready":
            return state
    raise AssertionError(f"no look of a hundred saw the file: {state}")


# ----------------------------------------------------------------------------------------------- the client, real files

# 64 pollers are 64 threads of this process. What they share with pollers of other processes is the file, and what
# tells processes apart on a shared file system, what a client remembers, each has for itself in a mount of its own.
# Sixteen of them share a Barrier with three others, as threads of one trainer do. The writer is another process.
ALONE, SHARED, AT_ONE = 48, 16, 4


class Poller:
    def __init__(self, barrier: Barrier, over: threading.Event, seed: int) -> None:
        self.witness = Witness()
        self.waits = 0
        self._barrier = barrier
        self._over = over
        self._random = Random(seed)
        self._waits = seed % 8 == 0
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._over.wait(self._random.uniform(0.02, 0.12)):
                self._look()
        except Exception as e:  # the test shall hear of it, whatever it is
            self.witness.wrong.append(f"{type(e).__name__}: {e}")

    def _look(self) -> None:
        state = self._barrier.current()
        self.witness.hear(state)
        group = self._random.choice(state.groups)
        if self._barrier.is_current(group.id, group.incarnation - 1):
            self.witness.wrong.append(f"{group.id}.{group.incarnation - 1} is current after epoch {state.epoch}")
        if self._waits and state.seq < PER_S * (DURATION_S - 2):
            later = self._barrier.wait_ready(after_epoch=state.epoch, timeout=60, poll_s=0.05)
            self.witness.hear(later)
            self.waits += later.epoch > state.epoch


def test_64_pollers_and_a_real_writer(tmp_path: Path) -> None:
    path = tmp_path / "barrier.json"
    path.write_bytes(encoded(0))
    over = threading.Event()
    barriers = []
    for i in range(ALONE + SHARED // AT_ONE):
        mounts = [Mount(ROUGH_NFS, seed=2 * i), Mount(ROUGH_FUSE, seed=2 * i + 1)]
        read = either(*mounts, seed=i) if i % 2 else mounts[i // 2 % 2].read
        barriers.append(Barrier(path, read=read, job=""))
    barriers += barriers[ALONE:] * (AT_ONE - 1)
    for barrier in barriers:
        first_value(barrier)
    pollers = [Poller(barrier, over, i) for i, barrier in enumerate(barriers)]
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.test_shared_fs", str(tmp_path), str(DURATION_S)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for poller in pollers:
            poller.thread.start()
        said, _ = writer.communicate(timeout=DURATION_S + 60)
        result = json.loads(said)
        deadline = time.monotonic() + 30
        while any(p.witness.newest < result["last"] and not p.witness.wrong for p in pollers):
            assert time.monotonic() < deadline, f"behind {result['last']}: {[p.witness.newest for p in pollers]}"
            time.sleep(0.05)
    finally:
        over.set()
        writer.kill()
        writer.wait()
        if writer.stdout:
            writer.stdout.close()
        for poller in pollers:
            poller.thread.join()
    assert not [f"{i}: {wrong}" for i, p in enumerate(pollers) for wrong in p.witness.wrong][:5]
    assert result["last"] / result["took_s"] * 60 >= 1000
    assert len(pollers) == 64
    assert all(p.witness.versions >= 5 for p in pollers)
    assert sum(p.waits for p in pollers) >= 5


if __name__ == "__main__":
    write(Path(sys.argv[1]), float(sys.argv[2]))
