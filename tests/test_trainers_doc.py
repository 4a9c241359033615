"""What `docs/trainers.md` shows works: its code blocks are run against real fleets of stub engines.

Fleets here have ports 19568 to 19599.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from slurm_rollout.barrier import Barrier, Group, Snapshot, State, WeightsNeeded
from slurm_rollout.testing.fleet import LocalFleet, stub_spec, wait_for
from tests.conftest import FAILED

TEXT = (Path(__file__).parents[1] / "docs/trainers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n# run\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def block(first: str) -> str:
    """Return the block of code that begins with this, or has it as a line of its own."""
    [found] = [code for code in BLOCKS if code.startswith(first) or f"\n{first}" in code]
    assert isinstance(found, str)
    return found


def test_every_block_of_code_is_run() -> None:
    assert len(BLOCKS) == TEXT.count("```") / 2 == 5


def post(url: str, body: dict[str, Any], timeout_s: float = 5.0) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.load(answer)


def metric(url: str, name: str) -> int:
    with urllib.request.urlopen(url + "/metrics", timeout=5) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return int(dict(lines)[f"stub_{name}"])


class Trainer:
    """What a reader of the page has already: the names that its code uses and does not define."""

    def __init__(self, fleet: LocalFleet, steps: int) -> None:
        self.fleet = fleet
        self.steps = steps
        self.trained: list[tuple[int, str, int]] = []
        self.barrier = Barrier(fleet.run.barrier)
        self.asleep_requests = 0
        self.in_training: Callable[[], None] = lambda: None
        self.names: dict[str, Any] = {
            "Barrier": Barrier,
            "ThreadPoolExecutor": ThreadPoolExecutor,
            "WeightsNeeded": WeightsNeeded,
            "barrier": self.barrier,
            "done": lambda: not self.steps,
            "free_gpu_memory": lambda: None,
            "generate": self.generate,
            "load_checkpoint": lambda: 3,
            "push_into": self.push_into,
            "put_to_sleep": self.put_to_sleep,
            "suppress": suppress,
            "train": self.train,
            "uuid4": uuid4,
            "wait_for_change": self.wait_for_change,
            "wake_up": self.wake_up,
        }

    def run(self, *first: str) -> dict[str, Any]:
        for line in first:
            exec(compile(block(line), "docs/trainers.md", "exec"), self.names)
        return self.names

    def push_into(self, group: Group, version: int) -> bool:
        try:
            return all(post(url + "/update_weights", {"version": version}) for url in group.urls)
        except OSError:
            return False

    def generate(self, state: State, version: int) -> list[Group]:
        samples = []
        for group in state.groups:
            if group.serving and group.weights_version == version:
                answer = post(group.urls[0] + "/v1/chat/completions", {"messages": [], "max_tokens": 1})
                if self.barrier.is_current(group.id, group.incarnation, version):
                    assert answer["rollout"]["weights_version"] == version
                    assert answer["rollout"]["incarnation"] == group.incarnation
                    samples.append(group)
        assert samples
        return samples

    def train(self, samples: list[Group]) -> None:
        self.in_training()
        self.steps -= 1
        for group in samples:
            assert group.weights_version is not None
            self.trained.append((group.weights_version, group.id, group.incarnation))

    def wait_for_change(self, epoch: int, timeout: float) -> None:
        wait_for("another epoch", lambda: self.barrier.current().epoch != epoch, timeout)

    def put_to_sleep(self, groups: list[Group]) -> None:
        for group in groups:
            for url in group.urls:
                post(url + "/sleep", {})

    def wake_up(self, groups: list[Group]) -> None:
        for group in groups:
            for url in group.urls:
                with suppress(OSError):  # it died in its sleep
                    self.asleep_requests += metric(url, "asleep_requests_total")
                    post(url + "/wake_up", {})


@pytest.fixture
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalFleet]:
    when = getattr(request, "param", "at_once")
    with LocalFleet(tmp_path) as fleet:
        fleet.start(
            stub_spec(
                groups=2,
                layout="nodes = 1",
                base=19568,
                control=fleet.control,
                stub_args=["--update-s=0"],
                pool=f'weights = "trained"\nrestart.when = "{when}"',
            )
        )
        fleet.wait_phase("needs_weights")
        yield fleet
        if request.node.stash.get(FAILED, False):
            print(fleet.story())


def test_the_loop_with_gpus_of_its_own(fleet: LocalFleet) -> None:
    trainer = Trainer(fleet, steps=4)

    def kill_once() -> None:
        if trainer.steps == 3:
            fleet.kill("actor/1", 0)
            fleet.wait("actor/1 to be back, stale", lambda: fleet.group("actor/1")["incarnation"] == 2)

    trainer.in_training = kill_once
    trainer.run("def sync(version", "    train(samples)\n    version += 1\n    state")
    fleet.wait_serving("actor/1", 2)
    versions = {version for version, _, _ in trainer.trained}
    assert versions == {3, 4, 5, 6}
    assert (3, "actor/1", 1) in trainer.trained
    assert fleet.barrier()["pools"][0]["weights_version"] == 7
    assert len([e for e in fleet.events("hold") if e["message"] == "trainer: granted"]) >= 5
    # A trainer that begins again from its checkpoint goes back to it.
    trainer.steps = 1
    trainer.in_training = lambda: None
    trainer.run("    train(samples)\n    version += 1\n    state")
    assert trainer.trained[-1][0] == 3
    assert not fleet.events("ack_refused")


@pytest.mark.parametrize("fleet", ["at_barrier"], indirect=True)
def test_the_loop_on_the_same_gpus(fleet: LocalFleet) -> None:
    trainer = Trainer(fleet, steps=5)

    def in_training() -> None:
        if trainer.steps == 4:
            fleet.kill("actor/1", 0)
            fleet.wait_event("failure", "actor/1", 1)
        # Long enough for probes to come, if any did, and for a start, if one were permitted.
        seq = fleet.barrier()["seq"]
        wait_for("heartbeats", lambda: fleet.barrier()["seq"] >= seq + 4)
        assert len(fleet.events("launching", "actor/1")) == (1 if trainer.steps >= 4 else 2)

    trainer.in_training = in_training
    trainer.run("def sync(version", "    put_to_sleep(sleeping)\n")
    fleet.wait_serving("actor/1", 2)
    assert {version for version, _, _ in trainer.trained} == {3, 4, 5, 6, 7}
    assert trainer.asleep_requests == 0
    assert not fleet.events("failure", "actor/0")
    assert len(fleet.events("failure", "actor/1")) == 1


def test_what_several_clients_say(fleet: LocalFleet) -> None:
    Trainer(fleet, steps=0).run("generator = Barrier(")
    clients = fleet.barrier()["clients"]
    assert {name: client["phase"] for name, client in clients.items()} == {
        "generator": "generating",
        "trainer": "generating",
    }
    assert fleet.barrier()["pools"][0]["probes"] == "on"


class UpdateGroup(NamedTuple):
    name: str
    epoch: int
    members: list[str]


def test_a_process_group_is_made_anew_when_an_engine_was(fleet: LocalFleet) -> None:
    trainer = Trainer(fleet, steps=0)
    said: list[tuple[str, dict[str, Any]]] = []
    ports = iter(range(29500, 29600))
    trainer.names.update(
        UpdateGroup=UpdateGroup,
        drop_communicator=lambda name: said.append(("drop", {"group_name": name})),
        free_port=lambda: next(ports),
        join_as_rank_0=lambda **where: said.append(("join", where)),
        own_address=lambda: "10.0.0.1",
        post=lambda url, body: said.append((url, body)),
    )
    update_group = trainer.run("def update_group")["update_group"]
    first, second = (fleet.group(group)["urls"][0] for group in ("actor/0", "actor/1"))
    snapshot = trainer.barrier.stale(1)
    made = update_group(snapshot, UpdateGroup("", -1, []))
    assert made.members == ["actor/0", "actor/1"]
    where = {"master_address": "10.0.0.1", "master_port": 29500, "group_name": made.name, "backend": "nccl"}
    where["world_size"] = 3
    assert sorted(said, key=str) == sorted(
        [
            ("join", where),
            (f"{first}/init_weights_update_group", {**where, "rank_offset": 1}),
            (f"{second}/init_weights_update_group", {**where, "rank_offset": 2}),
        ],
        key=str,
    )

    said.clear()
    trainer.barrier.ack_weights(1, snapshot)
    assert update_group(trainer.barrier.stale(2), made) is made
    assert said == []

    fleet.kill("actor/1", 0)
    fleet.wait("actor/1 to be back", lambda: fleet.group("actor/1").get("urls") and incarnation(fleet) == 2)
    again = update_group(trainer.barrier.stale(2), made)
    assert again.name != made.name
    assert said[0] == ("drop", {"group_name": made.name})
    assert said[1] == (f"{first}/destroy_weights_update_group", {"group_name": made.name})
    assert [body["master_port"] for _, body in said[2:]] == [29501] * 3
    assert {body["group_name"] for _, body in said[2:]} == {again.name}

    said.clear()
    alone = Snapshot(trainer.barrier.stale(2).groups[:1], trainer.barrier.current().epoch, 1)
    assert update_group(alone, again).members == ["actor/0"]
    assert len(said) == 4


def incarnation(fleet: LocalFleet) -> int:
    return int(fleet.group("actor/1")["incarnation"])
