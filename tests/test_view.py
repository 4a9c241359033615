"""What `status.json` says, and what it must never say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from slurm_rollout.cli.status import ALIVE, render
from slurm_rollout.core.failure_classes import FailureClass
from slurm_rollout.core.model import Exclusion, Failure, GroupState, LostStep, Marks, NodeState, RunState
from slurm_rollout.core.phases import Phase, PoolPhase, Reason
from slurm_rollout.core.plan import (
    Environment,
    FencePolicy,
    FleetPlan,
    GroupPlan,
    Member,
    PoolPlan,
    ProbePolicy,
    ProbeRequest,
    RestartPolicy,
    SlurmSettings,
    StopPolicy,
)
from slurm_rollout.core.pools import PoolView
from slurm_rollout.core.view import MESSAGE_CHARS, status_document

NOW, WALL = 5_000.0, 1_790_000_000.0


def make_group(index: int, nodes: tuple[str, ...]) -> GroupPlan:
    members = tuple(
        Member(
            rank=rank,
            node=node,
            local_rank=0,
            gpus=(0, 1),
            ports={"http": 18000, "master": 18001},
            entrypoint=rank == 0,
            url=f"http://{node}.secret-domain:18000",
            argv=("serve", "--api-key", "secret-argument"),
            variables={"TOKEN": "secret-variable"},
        )
        for rank, node in enumerate(nodes)
    )
    return GroupPlan(
        id=f"actor/{index}",
        pool="actor",
        members=members,
        addresses={node: f"{node}.secret-domain" for node in nodes},
        cpus_per_step=dict.fromkeys(nodes, 8),
        gpus_per_step=dict.fromkeys(nodes, 2),
        unshared_gpus=True,
    )


def make_plan() -> FleetPlan:
    pool = PoolPlan(
        name="actor",
        groups=(make_group(0, ("n1", "n2")), make_group(1, ("n3", "n4"))),
        min_ready=1,
        weights="frozen",
        engine="command",
        named_ports=(),
        env=Environment(variables={"KEY": "secret-environment"}, setup=("source secret-setup",)),
        probe=ProbePolicy(request=ProbeRequest(path="/secret-path"), startup_timeout_s=600.0),
        restart=RestartPolicy(max_restarts=5, max_start_failures=3, window_s=3600.0),
        stop=StopPolicy(grace_s=2.0, cancel_after_s=1.0),
        fence=FencePolicy(),
    )
    return FleetPlan(
        name="rl",
        backend="slurm",
        pools=(pool,),
        nodes=("n1", "n2", "n3", "n4", "n5"),
        spares=("n5",),
        trainer_nodes=("n0",),
        slurm=SlurmSettings(srun_args=("--secret-option",)),
    )


def ready(index: int, **changes: Any) -> GroupState:
    group = GroupState(
        id=f"actor/{index}",
        phase=Phase.READY,
        since=NOW - 60,
        since_wall=WALL - 60,
        reason=Reason.FIRST_START,
        incarnation=1,
    )
    return replace(group, **changes)


def make_state(*groups: GroupState, **changes: Any) -> RunState:
    state = RunState(
        run_id="r",
        job="123",
        restart_count=0,
        term=2,
        epoch=7,
        groups=groups or (ready(0), ready(1)),
        phase=PoolPhase.READY,
    )
    return replace(state, **changes)


def document(state: RunState, *, reason: str = "", time_left_s: float | None = 7200.0) -> dict[str, Any]:
    alive = sum(g.phase is Phase.READY for g in state.groups)
    pool = PoolView(name="actor", phase=state.phase, ready=alive, desired=2, min_ready=1, reason=reason)
    return status_document(
        make_plan(), state, pools=(pool,), now=NOW, wall=WALL, host="n0", seq=9, time_left_s=time_left_s
    )


def test_a_node_that_is_not_used_and_what_is_left_there() -> None:
    node = NodeState(
        name="n1", excluded=Exclusion.LOST, message="see http://n1:1/", since=NOW - 5, draining="Kill task failed"
    )
    left = LostStep(group="actor/0", incarnation=1, node="n1", name="rl.actor-0.1.0")
    found = document(make_state(nodes=(node, NodeState(name="n2", failures=1)), lost_steps=(left,)))
    assert found["excluded"] == [
        {
            "name": "n1",
            "reason": "lost",
            "message": "see (url)",
            "since": WALL - 5,
            "back": False,
            "lost_steps": 1,
        }
    ]
    assert found["draining"] == {"n1": "Kill task failed"}
    assert "n1" not in found["spares"]


def group_of(state: RunState) -> dict[str, Any]:
    group: dict[str, Any] = document(state)["groups"][0]
    return group


def test_a_healthy_run() -> None:
    assert document(make_state()) == {
        "schema": 1,
        "run": "rl",
        "job": "123",
        "restart_count": 0,
        "term": 2,
        "epoch": 7,
        "host": "n0",
        "at": WALL,
        "seq": 9,
        "heartbeat_s": 5.0,
        "time_left_s": 7200.0,
        "phase": "ready",
        "reason": "",
        "message": "",
        "ending": "",
        "ending_since": None,
        "ended": False,
        "blind_since": None,
        "suspect_self_since": None,
        "pools": [
            {
                "name": "actor",
                "phase": "ready",
                "ready": 2,
                "desired": 2,
                "min_ready": 1,
                "reason": "",
                "weights_version": None,
                "probes": "on",
            }
        ],
        "clients": [],
        "groups": [
            {
                "id": f"actor/{index}",
                "pool": "actor",
                "phase": "ready",
                "since": WALL - 60,
                "reason": "first_start",
                "message": "",
                "incarnation": 1,
                "restarts": 0,
                "node_failures": 0,
                "budget": {
                    "window_s": 3600.0,
                    "restarts": {"left": 5, "of": 5},
                    "start_failures": {"left": 3, "of": 3},
                },
                "next": {"action": "", "at": None},
                "failure": None,
                "nodes": nodes,
                "slow": False,
                "weights": "none",
                "weights_version": None,
            }
            for index, nodes in enumerate((["n1", "n2"], ["n3", "n4"]))
        ],
        "nodes": ["n1", "n2", "n3", "n4", "n5"],
        "spares": ["n5"],
        "excluded": [],
        "draining": {},
        "trainer_nodes": ["n0"],
    }


def test_what_others_may_not_see_is_not_in_it() -> None:
    failure = Failure(
        reason=Reason.ANSWERS_ERROR,
        message="http://n1.secret-domain:18000/secret-path answered 500",
        incarnation=1,
        at=NOW,
        wall=WALL,
    )
    group = ready(0, phase=Phase.STOPPING, message="HTTPS://secret@n1/ is\n down", failure=failure)
    text = json.dumps(document(make_state(group, ready(1))))
    assert "secret" not in text
    assert group_of(make_state(group))["message"] == "(url) is down"
    assert group_of(make_state(group))["failure"]["message"] == "(url) answered 500"


def test_long_messages_are_cut() -> None:
    message = group_of(make_state(ready(0, message="x" * 1000)))["message"]
    assert len(message) == MESSAGE_CHARS
    assert message.endswith("x…")


@pytest.mark.parametrize(
    ("changes", "action", "in_s"),
    [
        ({"phase": Phase.READY}, "", None),
        ({"phase": Phase.UNREADY}, "", None),
        ({"phase": Phase.PENDING}, "launch", None),
        ({"phase": Phase.FENCING, "not_before": NOW - 1}, "launch", None),
        ({"phase": Phase.FENCING, "not_before": NOW + 20}, "launch", 20.0),
        ({"phase": Phase.BACKOFF, "not_before": NOW + 40}, "launch", 40.0),
        ({"phase": Phase.STARTING}, "go", None),
        ({"phase": Phase.STARTING, "marks": Marks(go_at=NOW - 100)}, "give_up", 500.0),
        ({"phase": Phase.STOPPING}, "cancel", None),
        ({"phase": Phase.STOPPING, "stop_sent_at": NOW - 1}, "cancel", 2.0),
        ({"phase": Phase.DRAINING, "stop_sent_at": NOW - 9, "cancel_sent_at": NOW - 6}, "cancel", None),
        ({"phase": Phase.STOPPED}, "", None),
        ({"phase": Phase.FAILED}, "", None),
    ],
)
def test_next_action(changes: dict[str, Any], action: str, in_s: float | None) -> None:
    at = None if in_s is None else WALL + in_s
    assert group_of(make_state(ready(0, **changes)))["next"] == {"action": action, "at": at}


def test_nothing_is_launched_in_a_run_that_ends() -> None:
    state = make_state(ready(0, phase=Phase.FENCING), ending=Reason.OPERATOR, ending_at=NOW - 3)
    assert group_of(state)["next"] == {"action": "", "at": None}
    assert document(state)["ending"] == "operator"
    assert document(state)["ending_since"] == WALL - 3


def test_only_failures_within_the_window_count_and_start_failures_apart() -> None:
    group = ready(0, runtime_failures=(NOW - 3600, NOW - 3599, NOW - 1), start_failures=(NOW - 9,) * 5, restarts=8)
    assert group_of(make_state(group))["budget"] == {
        "window_s": 3600.0,
        "restarts": {"left": 3, "of": 5},
        "start_failures": {"left": 0, "of": 3},
    }
    assert group_of(make_state(group))["restarts"] == 8


def test_the_last_failure() -> None:
    failure = Failure(
        reason=Reason.ENGINE_EXITED,
        message="code 9",
        incarnation=1,
        at=NOW - 5,
        wall=WALL - 5,
        rank=1,
        node="n2",
        kind=FailureClass.ENGINE_CRASH,
        restarted_peers=(0,),
    )
    assert group_of(make_state(ready(0, failure=failure)))["failure"] == {
        "incarnation": 1,
        "reason": "engine_exited",
        "class": "engine_crash",
        "means": "an engine's process ended; see its last lines",
        "message": "code 9",
        "rank": 1,
        "node": "n2",
        "at": WALL - 5,
    }


def test_the_whole_says_what_is_wrong() -> None:
    groups = (
        ready(0, phase=Phase.BACKOFF, reason=Reason.ENGINE_EXITED),
        ready(1, phase=Phase.PENDING, reason=Reason.NONE),
    )
    seen = document(make_state(*groups, phase=PoolPhase.WAITING))
    assert (seen["phase"], seen["message"]) == ("waiting", "actor/0 backoff (engine_exited), actor/1 pending")
    many = document(make_state(*[ready(0, phase=Phase.PENDING, reason=Reason.NONE)] * 5))
    assert many["message"] == "actor/0 pending, actor/0 pending, actor/0 pending and 2 more"
    assert document(make_state(), reason="degraded")["reason"] == "degraded"


def test_blindness_is_told_with_its_time() -> None:
    seen = document(make_state(blind_since=NOW - 42, suspect_self_since=NOW - 7))
    assert (seen["blind_since"], seen["suspect_self_since"]) == (WALL - 42, WALL - 7)


def test_ended_only_when_everything_is_stopped_because_of_the_end() -> None:
    stopped = (ready(0, phase=Phase.STOPPED), ready(1, phase=Phase.STOPPED))
    assert document(make_state(*stopped))["ended"] is False  # drained by an operator
    assert document(make_state(stopped[0], ready(1), ending=Reason.RUN_ENDING))["ended"] is False
    assert document(make_state(*stopped, ending=Reason.RUN_ENDING))["ended"] is True


def test_status_prints_what_this_module_makes() -> None:
    failure = Failure(reason=Reason.NOT_ANSWERING, message="late", incarnation=2, at=NOW, wall=WALL, rank=0, node="n1")
    group = ready(0, phase=Phase.BACKOFF, not_before=NOW + 10, failure=failure, message="next start in 10 s")
    seen = json.loads(json.dumps(document(make_state(group, ready(1)))))
    text = render(seen, age_s=1.0, verdict=ALIVE)
    assert "launch 00:00:10" in text
    assert "0@n1" in text
