"""The agent ends its engines by itself when the coordinator has been silent for too long, and only then."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agent_harness import Agent, Node, alive, cmdline, member, python, until

LIMIT_S = 2.0  # `up` allows 60 at least

# An engine that only SIGKILL ends.
STAYS = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"

# A look each 50 ms instead of each second.
OFTEN = "g['HEARTBEAT_LOOK_S'] = 0.05"

# Writes down which heartbeat was heard last, from the one on that arms the self-fence.
TELLS = """
real = g['Silence']._note
def note(silence, term, seq):
    real(silence, term, seq)
    if silence._moved_at is not None:
        open({path!r}, 'w').write(str(seq))
g['Silence']._note = note
"""


class Coordinator:
    """Writes the barrier file as one does: replaced each time, `seq` grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard = path.with_name("heard")
        self.term, self.seq = 1, 0
        self.wrote_at = 0.0
        self._beating = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def write(self) -> None:
        staged = self.path.with_suffix(".new")
        staged.write_text(json.dumps({"term": self.term, "seq": self.seq, "pools": []}))
        self.wrote_at = time.monotonic()
        staged.rename(self.path)

    def _run(self) -> None:
        while not self._end.wait(0.1):
            if self._beating.is_set():
                self.seq += 1
                self.write()

    def start(self) -> None:
        self.write()
        self._beating.set()
        self._thread.start()

    def silent(self) -> None:
        self._beating.clear()
        time.sleep(0.15)  # the write that had begun

    def back(self) -> None:
        self._beating.set()

    def close(self) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    try:
        yield node
    finally:
        node.close()


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    found = Coordinator(tmp_path / "barrier.json")
    yield found
    found.close()


def start(
    node: Node, coordinator: Coordinator, limit_s: float = LIMIT_S, patch: str = "", **orders: Any
) -> tuple[Agent, int]:
    """Start an agent with one engine; return it and the engine's pid."""
    fence = {"self_fence_s": limit_s, "barrier": str(coordinator.path)}
    patch = "\n".join([OFTEN, TELLS.format(path=str(coordinator.heard)), patch])
    agent = node.agent(member(argv=python(STAYS)), patch=patch, fence=fence, **orders)
    (engine,) = agent.go()
    until(lambda: b"IGN" in cmdline(engine), "the engine's program")
    return agent, engine


def moved(coordinator: Coordinator) -> None:
    """Wait until the agent has seen the barrier move."""
    seq = coordinator.seq
    until(lambda: coordinator.heard.exists() and int(coordinator.heard.read_text() or 0) > seq, "a heartbeat")


def test_a_silent_coordinator_ends_the_engines_and_the_record_says_why(node: Node, coordinator: Coordinator) -> None:
    coordinator.start()
    agent, engine = start(node, coordinator, stop={"grace_s": 30.0})
    moved(coordinator)
    coordinator.silent()
    record = agent.ended("self_fenced", 87)
    assert LIMIT_S <= time.monotonic() - coordinator.wrote_at < LIMIT_S + 5, "no sooner, and without the grace"
    assert not alive(engine)
    said = record["message"]
    assert re.search(r"no heartbeat of the coordinator for [234] s \(fence.self_fence_s = 2\)", said), said
    assert f"{coordinator.path}: the last was term 1, seq {coordinator.seq}; nobody writes it" in said
    assert "rank" not in record


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("gone", "it cannot be read: No such file or directory"),
        ("half", "it is no whole barrier file"),
        ("hangs", "reading it hangs"),
    ],
)
def test_a_file_that_cannot_be_read_is_as_silent(node: Node, coordinator: Coordinator, fault: str, says: str) -> None:
    coordinator.start()
    agent, engine = start(node, coordinator)
    moved(coordinator)
    coordinator.close()
    if fault == "half":
        coordinator.path.write_text('{"term": 1, "se')
    else:
        coordinator.path.unlink()
    if fault == "hangs":
        os.mkfifo(coordinator.path)  # whoever opens it waits for a writer, for ever
    assert says in agent.ended("self_fenced", 87)["message"]
    assert not alive(engine)


def test_silence_that_ends_in_time_ends_nothing(node: Node, coordinator: Coordinator) -> None:
    limit_s = 2 * LIMIT_S
    coordinator.start()
    agent, engine = start(node, coordinator, limit_s)
    for _ in range(5):  # together longer than the limit
        moved(coordinator)
        coordinator.silent()
        until(lambda: time.monotonic() - coordinator.wrote_at > limit_s / 4, "a quarter of the limit")
        coordinator.back()
    moved(coordinator)
    assert alive(engine), agent.told()
    agent.stop()


def test_a_new_coordinator_is_heard_whose_count_begins_anew(node: Node, coordinator: Coordinator) -> None:
    coordinator.seq = 1000
    coordinator.start()
    agent, engine = start(node, coordinator)
    moved(coordinator)
    coordinator.seq, coordinator.term = 0, 2  # in this order: term 2 never has the old count
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 1.5 * LIMIT_S, "longer than the limit")
    assert alive(engine), agent.told()
    agent.stop()


@pytest.mark.parametrize("how", ["last word", "older", "off"])
def test_without_a_heartbeat_since_go_or_where_it_is_off_nothing_is_ended(
    node: Node, coordinator: Coordinator, how: str
) -> None:
    coordinator.seq = 100
    coordinator.write()
    fence = {"self_fence_s": 0 if how == "off" else LIMIT_S, "barrier": str(coordinator.path)}
    agent = node.agent(member(), patch=OFTEN, fence=fence)
    (engine,) = agent.go()
    if how == "off":
        coordinator.start()
        until(lambda: coordinator.seq >= 108, "eight heartbeats")
        coordinator.silent()
    began = time.monotonic()
    while how == "older" and time.monotonic() - began < LIMIT_S / 2:
        coordinator.seq -= 1  # as a cache of the file system may show it
        coordinator.write()
        time.sleep(0.1)
    until(lambda: time.monotonic() - began > 2 * LIMIT_S, "twice the limit")
    assert alive(engine), agent.told()
    agent.stop()
    if how != "off":
        assert "has not moved since go" in agent.stderr.read_text()


def test_an_agent_that_was_stopped_for_longer_looks_before_it_judges(node: Node, coordinator: Coordinator) -> None:
    limit_s = 2 * LIMIT_S
    coordinator.start()
    # Both get half of the limit, so that a busy machine is no silence.
    agent, engine = start(node, coordinator, limit_s, patch="g['AWAKE_SHARE'] = 0.5")
    moved(coordinator)

    def stopped() -> float:
        agent.send(signal.SIGSTOP)
        at = time.monotonic()
        until(lambda: time.monotonic() - at > 1.2 * limit_s, "longer than the limit")
        woken = time.monotonic()
        agent.send(signal.SIGCONT)
        return woken

    coordinator.silent()  # as `scontrol suspend` stops both
    woken = stopped()
    time.sleep(0.1)  # the agent is faster
    coordinator.back()
    moved(coordinator)
    until(lambda: time.monotonic() - woken > 0.7 * limit_s, "longer than the moment that both get")
    assert alive(engine), agent.told()
    # Time in which it did not run counts: with a coordinator that is gone, it waits no whole limit again.
    coordinator.silent()
    woken = stopped()
    agent.ended("self_fenced", 87)
    assert 0.5 * limit_s <= time.monotonic() - woken < limit_s
    assert not alive(engine)


def test_a_stop_is_no_silence(node: Node, coordinator: Coordinator) -> None:
    coordinator.start()
    agent, _ = start(node, coordinator)
    moved(coordinator)
    coordinator.silent()
    agent.stop()
