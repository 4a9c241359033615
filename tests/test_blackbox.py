"""Which rank is named as stuck, from hand-written snapshots."""

from __future__ import annotations

from typing import Any

import pytest

from slurm_rollout.core.blackbox import Finding, stuck

Json = dict[str, Any]


def process(pid: int = 10, state: str = "S", **changes: Any) -> Json:
    return {"pid": pid, "name": "python3", "state": state, "wchan": "", "blocked": [], **changes}


def snapshot(*processes: Json, silent_s: float = 3.0, stacks: list[list[str]] | None = None) -> Json:
    """One member's; `stacks`: frames of each process's main thread, innermost first."""
    texts = {str(10 + n): dump(10 + n, frames) for n, frames in enumerate(stacks or [])}
    return {
        "schema": 1,
        "pid": 10,
        "processes": list(processes) or [process()],
        "log": {"silent_s": silent_s},
        "py_spy": texts,
    }


def dump(pid: int, frames: list[str]) -> str:
    main = "".join(f"    {frame}\n" for frame in frames)
    other = 'Thread 99 (active): "worker"\n    spin (pool.py:1)\n'
    return f'Python v3.11.7 (/usr/bin/python3)\n\n{other}Thread {pid} (idle): "MainThread"\n{main}{other}'


def named(snapshots: list[Json]) -> tuple[int, str]:
    found = stuck(dict(enumerate(snapshots)))
    assert isinstance(found, Finding)
    return found.rank, found.why


WAITS = ["all_reduce (torch/distributed/distributed_c10d.py:{line})", "forward (model.py:5)"]
WORKS = ["decode (model.py:77)", "forward (model.py:5)"]


def waits(line: int = 2804) -> list[str]:
    return [frame.format(line=line) for frame in WAITS]


def test_nothing_tells_them_apart() -> None:
    assert stuck({}) is None
    assert stuck({0: snapshot()}) is None
    assert (
        stuck({0: snapshot(stacks=[waits()]), 1: snapshot(stacks=[waits(1)]), 2: snapshot(stacks=[waits(2)])}) is None
    )


def test_a_stopped_process_anywhere_in_the_tree() -> None:
    worker = process(11, "T", name="VLLM::Worker")
    assert named([snapshot(), snapshot(process(), worker), snapshot()]) == (
        1,
        "stopped by a signal: pid 11 (VLLM::Worker) is in state T",
    )
    assert named([snapshot(), snapshot(process(state="t"), worker)])[1].startswith("stopped by a signal: pid 10 ")


def test_what_waits_in_the_kernel_at_both_looks() -> None:
    blocked = process(11, "S", blocked=["nfs_wait_bit_killable"])
    assert stuck({0: snapshot(process(state="D"))}) is None  # at one look only: it may just read a file
    assert named([snapshot(), snapshot(process(), blocked)]) == (
        1,
        "waits in the kernel (nfs_wait_bit_killable), state D, at two looks: pid 11 (python3)",
    )
    assert "(where, it does not say)" in named([snapshot(process(blocked=[""]))])[1]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (snapshot(process(state="Z")), "its main process, pid 10 (python3), is dead (state Z)"),
        (snapshot(process(11)), "its main process, pid 10, is gone; 1 of its processes live"),
        ({"pid": 10, "processes": []}, "its main process, pid 10, is gone"),
    ],
)
def test_a_dead_main_process(found: Json, words: str) -> None:
    assert named([snapshot(), found]) == (1, words)
    assert stuck({0: snapshot(), 1: {"pid": 10}}) is None  # not looked at is not gone


def test_the_stack_outside_of_what_all_others_wait_in() -> None:
    others = [snapshot(stacks=[waits(line)]) for line in (1, 2, 3)]
    rank, why = named([*others, snapshot(stacks=[WORKS])])
    assert (rank, why) == (
        3,
        "is in decode (model.py), where all other ranks are in all_reduce (torch/distributed/distributed_c10d.py)",
    )
    assert named([snapshot(stacks=[WORKS]), *others])[0] == 0


def test_the_odd_stack_may_be_a_workers() -> None:
    main = ["wait (subprocess.py:1)"]
    leader = [["serve (uvicorn/server.py:1)"], waits()]
    ranks = [snapshot(stacks=leader), snapshot(stacks=[main, waits()]), snapshot(stacks=[main, WORKS])]
    rank, why = named(ranks)
    assert (rank, why.split(",")[0]) == (2, "is in decode (model.py)")
    assert named([ranks[0], ranks[2], ranks[1]])[0] == 1


def test_a_leader_is_different_by_design() -> None:
    followers = [snapshot(stacks=[["wait (subprocess.py:1)"]]) for _ in range(3)]
    assert stuck(dict(enumerate([snapshot(stacks=[["serve (uvicorn/server.py:1)"]]), *followers]))) is None


def test_a_stack_is_no_sign_without_all_others() -> None:
    assert stuck({0: snapshot(stacks=[waits()]), 1: snapshot(stacks=[WORKS])}) is None
    seen = [snapshot(stacks=[waits()]), snapshot(stacks=[waits()]), snapshot(stacks=[WORKS]), snapshot()]
    assert stuck(dict(enumerate(seen))) is None
    two_odd = [*(snapshot(stacks=[waits()]) for _ in range(3)), *(snapshot(stacks=[WORKS]) for _ in range(2))]
    assert stuck(dict(enumerate(two_odd))) is None


def test_the_main_thread_is_known_by_its_number_too() -> None:
    def unnamed(frame: str) -> Json:
        text = f"Python v3.9\n\nThread 99 (active)\n    spin (a.py:1)\nThread 10 (active+gil)\n    {frame} (b.py:1)\n"
        return {"py_spy": {"10": text}}

    assert named([unnamed("barrier"), unnamed("barrier"), unnamed("load")])[0] == 2


def test_the_log_that_went_silent_first() -> None:
    assert named([snapshot(silent_s=20), snapshot(silent_s=62.4), snapshot(silent_s=21)]) == (
        1,
        "its log went silent first, 41 s before any other",
    )
    assert stuck({0: snapshot(silent_s=20), 1: snapshot(silent_s=24.9)}) is None
    assert stuck({0: snapshot(silent_s=90)}) is None
    assert stuck({0: snapshot(silent_s=90), 1: snapshot(silent_s=3), 2: {}}) is None  # the third may be older still


SIGNS: list[Json] = [
    snapshot(process(state="T")),
    snapshot(process(blocked=["futex"])),
    snapshot(process(state="Z")),
    snapshot(stacks=[WORKS]),
    snapshot(silent_s=60, stacks=[waits()]),
]
"""One for each sign, the strongest first."""


@pytest.mark.parametrize("strongest", range(len(SIGNS)))
def test_the_strongest_sign_decides_then_the_lowest_rank(strongest: int) -> None:
    fine = [snapshot(stacks=[waits()]), snapshot(stacks=[waits()])]
    if strongest < 3:
        snapshots = [*fine, *reversed(SIGNS[strongest:])]
        assert named(snapshots) == (len(snapshots) - 1, named([*fine, SIGNS[strongest]])[1])
        assert named([*fine, SIGNS[strongest], SIGNS[strongest]])[0] == 2
    else:
        snapshots = [*fine, *reversed(SIGNS[strongest:])]
        assert named(snapshots)[0] == len(snapshots) - 1


@pytest.mark.parametrize(
    "half",
    [
        {},
        {"pid": None, "processes": None, "py_spy": None, "log": None},
        {"pid": 10, "processes": {}, "py_spy": [], "log": []},
        {"processes": [None, {}, {"blocked": None}], "py_spy": {"10": ""}, "log": {"silent_s": None}},
        {"py_spy": {"10": None}, "log": {}},
    ],
)
def test_half_a_snapshot_is_no_trouble(half: Json) -> None:
    assert stuck({0: half, 1: half, 2: snapshot()}) is None
    assert named([half, snapshot(process(state="T"))])[0] == 1
