"""plan.json and state.json: what is written is read back the same, and what is not ours is refused."""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm_rollout.core.codec import decode, encode
from slurm_rollout.core.model import Failure, GroupState, Marks, RunState, StepState
from slurm_rollout.core.phases import Phase, PoolPhase, Reason
from slurm_rollout.core.plan import Counter, Environment, FleetPlan, ProbePolicy, ProbeRequest
from slurm_rollout.testing.world import World, make_plan

bounded = settings(derandomize=True, max_examples=60, deadline=None, database=None)

numbers = st.floats(allow_nan=False, allow_infinity=False)
moments = st.none() | numbers
texts = st.text(max_size=20)
counts = st.integers(min_value=0, max_value=10**9)

failures = st.builds(
    Failure,
    reason=st.sampled_from(Reason),
    message=texts,
    incarnation=counts,
    at=numbers,
    wall=numbers,
    rank=st.none() | counts,
    node=texts,
    startup=st.booleans(),
    restarted_peers=st.lists(counts, max_size=3).map(tuple),
)
group_states = st.builds(
    GroupState,
    id=texts,
    phase=st.sampled_from(Phase),
    since=numbers,
    reason=st.sampled_from(Reason),
    message=texts,
    incarnation=counts,
    steps=st.lists(
        st.builds(StepState, node=texts, pid=st.none() | counts, pid_started=counts, sweep=st.booleans()), max_size=3
    ).map(tuple),
    goes_to=st.sampled_from(Phase),
    stop_sent_at=moments,
    go_sent_at=moments,
    failure=st.none() | failures,
    charge=st.none() | failures,
    runtime_failures=st.lists(numbers, max_size=3).map(tuple),
    marks=st.builds(Marks, seen_at=moments, go_at=moments),
    slow=st.booleans(),
    weights_version=st.none() | counts,
)
run_states = st.builds(
    RunState,
    run_id=texts,
    job=texts,
    restart_count=counts,
    term=counts,
    epoch=counts,
    groups=st.lists(group_states, max_size=3).map(tuple),
    serving=st.lists(st.tuples(texts, counts), max_size=3).map(tuple),
    pools_once_ready=st.lists(texts, max_size=2).map(tuple),
    ending=st.sampled_from(Reason),
    phase=st.sampled_from(PoolPhase),
    blind_since=moments,
)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(encode(value)))


@bounded
@given(run_states)
def test_a_state_is_read_back_as_it_was_written(run: RunState) -> None:
    assert decode(RunState, through_json(run)) == run


def rich_plan() -> FleetPlan:
    probe = ProbePolicy(
        request=ProbeRequest(path="/v1/embeddings", body='{"input": "ä"}', expect="data"),
        model="qwen",
        counter=Counter(name="tokens_total"),
        liveness_period_s=7,  # a whole number, as a person writes it
    )
    plan = make_plan(3, 2, probe=probe, named_ports=("session",), entrypoints="leader")
    env = Environment(variables={"A": "1", "B": ""}, setup=("module load cuda", "source 'x y'"))
    pool = replace(plan.pools[0], env=env)
    return replace(plan, pools=(pool,), spares=("n9",), het_group=1, trainer_nodes=("t0", "t1"), private=True)


def test_a_plan_is_read_back_as_it_was_written() -> None:
    plan = rich_plan()
    again = decode(FleetPlan, through_json(plan))
    assert again == plan
    assert isinstance(again.pools[0].probe.liveness_period_s, float)
    assert decode(FleetPlan, through_json(make_plan(1))) == make_plan(1)


@pytest.mark.parametrize("kills", range(5))
def test_the_states_of_a_run_are_read_back_as_they_were_written(kills: int) -> None:
    w = World(make_plan(2))
    w.make_ready()
    for _ in range(kills):
        w.kill("actor/0", 0)
        w.tick()
        w.heal(lambda: w.phases() == {Phase.READY})
    for decision in w.decisions:
        assert decode(RunState, through_json(decision.state)) == decision.state


def test_what_is_read_back_has_the_types_of_its_annotations_all_the_way_down() -> None:
    w = World(make_plan(2))
    w.make_ready()
    w.kill("actor/0", 0)
    w.tick()
    run = decode(RunState, through_json(w.state))
    assert type(run.groups) is tuple
    assert type(run.groups[0].phase) is Phase
    assert type(run.groups[0].failure) is Failure
    assert type(run.groups[0].steps[0]) is StepState
    assert type(run.serving[0]) is tuple
    assert type(run.phase) is PoolPhase


def every_dataclass(kind: Any, found: set[type]) -> set[type]:
    """Every dataclass that is reached from `kind`."""
    if is_dataclass(kind) and isinstance(kind, type):
        if kind not in found:
            found.add(kind)
            for hint in get_type_hints(kind).values():
                every_dataclass(hint, found)
    else:
        for argument in getattr(kind, "__args__", ()):
            every_dataclass(argument, found)
    return found


@pytest.mark.parametrize("root", [RunState, FleetPlan])
def test_a_file_of_an_older_version_lacks_keys_and_gets_their_defaults(root: type) -> None:
    for kind in every_dataclass(root, set()):
        required = {f.name for f in fields(kind) if not has_default(f)}
        value = {
            RunState: lambda: World(make_plan(1)).state,
            FleetPlan: rich_plan,
        }[root]()
        for part in parts(value, kind):
            assert decode(kind, {k: v for k, v in through_json(part).items() if k in required}) is not None


def has_default(f: Field[Any]) -> bool:
    return f.default is not MISSING or f.default_factory is not MISSING


def parts(value: Any, kind: type) -> list[Any]:
    """Every value of type `kind` in `value`."""
    if isinstance(value, kind):
        return [value]
    if is_dataclass(value):
        return [p for f in fields(value) for p in parts(getattr(value, f.name), kind)]
    if isinstance(value, tuple):
        return [p for v in value for p in parts(v, kind)]
    return []


def test_a_missing_key_takes_its_default_and_an_unknown_one_of_a_newer_version_is_left_out() -> None:
    data = {"run_id": "r", "job": "1", "restart_count": 0, "term": 3, "colour": "blue"}
    assert decode(RunState, data) == RunState(run_id="r", job="1", restart_count=0, term=3)
    assert decode(GroupState, {"id": "a/0"}) == GroupState(id="a/0")


GOOD = {"run_id": "r", "job": "1", "restart_count": 0, "term": 3}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "state",
        7,
        {},
        {k: v for k, v in GOOD.items() if k != "term"},
        GOOD | {"term": "three"},
        GOOD | {"term": None},
        GOOD | {"term": 1.5},
        GOOD | {"term": True},
        GOOD | {"job": 1},
        GOOD | {"started_at": "now"},
        GOOD | {"started_at": None},
        GOOD | {"started_at": True},
        GOOD | {"started_at": 10**400},
        GOOD | {"blind_since": "x"},
        GOOD | {"phase": "purple"},
        GOOD | {"phase": 3},
        GOOD | {"ending": None},
        GOOD | {"groups": {}},
        GOOD | {"groups": "abc"},
        GOOD | {"groups": 3},
        GOOD | {"groups": None},
        GOOD | {"groups": ["a"]},
        GOOD | {"groups": [{}]},
        GOOD | {"groups": [{"id": "a/0", "steps": [{"node": "n", "sweep": "yes"}]}]},
        GOOD | {"groups": [{"id": "a/0", "runtime_failures": ["x"]}]},
        GOOD | {"groups": [{"id": "a/0", "failure": "broken"}]},
        GOOD | {"serving": [["a/0"]]},
        GOOD | {"serving": [["a/0", 1, 2]]},
        GOOD | {"serving": ["ab"]},
        GOOD | {"serving": [["a/0", "1"]]},
        GOOD | {"pools_once_ready": "actor"},
        GOOD | {"pools_once_ready": {"actor": 1}},
    ],
    ids=lambda data: repr(data)[:80],
)
def test_what_is_no_state_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decode(RunState, data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("variables", ["A=1"]),
        ("variables", {"A": 1}),
        ("setup", "module load cuda"),
        ("setup", [1]),
    ],
)
def test_what_is_no_environment_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"is not|has no"):
        decode(Environment, {key: value})


@bounded
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | numbers | texts,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(GOOD | {"groups": 0})), inner)
        ),
        max_leaves=12,
    )
)
def test_whatever_json_it_is_given_it_answers_with_a_state_or_a_value_error(data: Any) -> None:
    try:
        run = decode(RunState, data)
    except ValueError:
        return
    assert through_json(run).items() >= {k: v for k, v in data.items() if k in GOOD}.items()
