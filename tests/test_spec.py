"""The spec file: defaults, what a pool overrides, and that each mistake is told with path, value and cure."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slurm_rollout.core.plan import (
    Counter,
    FencePolicy,
    FleetPlan,
    ProbePolicy,
    ProbeRequest,
    RestartPolicy,
    SlurmSettings,
    StopPolicy,
)
from slurm_rollout.core.request import PoolRequest
from slurm_rollout.errors import SpecError, UsageError
from slurm_rollout.spec import fleet_request, load_spec, parse_spec

MINIMAL = """
name = "run"
[[pool]]
name = "actor"
groups = 2
gpus = 4
engine = { kind = "command", argv = ["serve", "{http_port}"] }
"""

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0}


def problem(text: str) -> str:
    """The message about a spec, which has to be wrong."""
    with pytest.raises(SpecError) as raised:
        parse_spec(tomllib.loads(text), source="fleet.toml")
    return str(raised.value)


def pool(text: str, index: int = 0) -> PoolRequest:
    return fleet_request(parse_spec(tomllib.loads(text), source="fleet.toml")).pools[index]


# ------------------------------------------------------------------------------------------------------ what it means


def test_the_defaults_are_those_of_the_plan() -> None:
    request = fleet_request(parse_spec(tomllib.loads(MINIMAL), source=""))
    (one,) = request.pools
    assert replace(one.probe, request=ProbeRequest()) == ProbePolicy(request=ProbeRequest())
    assert one.restart == RestartPolicy()
    assert one.stop == StopPolicy()
    assert one.fence == FencePolicy()
    assert (one.min_ready, one.weights, one.members_per_node) == (1, "frozen", 1)
    assert (one.port_base, one.port_stride) == (18000, 16)
    assert request.slurm == SlurmSettings()
    plan = FleetPlan(name="", backend="", pools=(), nodes=(), spares=(), trainer_nodes=(), slurm=SlurmSettings())
    for name in (
        "heartbeat_s",
        "audit_s",
        "degraded_timeout_s",
        "log_max_bytes",
        "log_keep_incarnations",
        "private",
    ):
        assert getattr(request, name) == getattr(plan, name), name


def test_a_pool_overrides_key_by_key() -> None:
    text = (
        MINIMAL
        + """
probe.liveness.period_s = 3
restart.max_restarts = 9
ports.stride = 32
[[pool]]
name = "reward"
groups = 1
nodes = 1
engine = { kind = "command", argv = ["rm"] }
[probe.liveness]
timeout_s = 7
counter = { name = "tokens_total" }
[restart]
backoff_max_s = 60
[ports]
base = 20000
"""
    )
    actor, reward = pool(text, 0), pool(text, 1)
    assert (actor.probe.liveness_period_s, reward.probe.liveness_period_s) == (3, 15)
    assert (actor.probe.liveness_timeout_s, reward.probe.liveness_timeout_s) == (7, 7)
    assert actor.probe.counter == reward.probe.counter == Counter(path="/metrics", name="tokens_total")
    assert actor.restart == RestartPolicy(max_restarts=9, backoff_max_s=60)
    assert reward.restart == RestartPolicy(backoff_max_s=60)
    assert (actor.port_base, actor.port_stride) == (20000, 32)
    assert (reward.port_base, reward.port_stride) == (20000, 16)


@pytest.mark.parametrize(
    ("engine", "line", "path", "body", "expect"),
    [
        ("", "", "/v1/chat/completions", CHAT, "choices"),
        ('model = "m"', "", "/v1/chat/completions", {"model": "m", **CHAT}, "choices"),
        ("", '{ path = "/health" }', "/health", None, ""),
        ("", '{ path = "/v1/models", expect = "data" }', "/v1/models", None, "data"),
        ("", '{ path = "/g", body = { a = 1 } }', "/g", {"a": 1}, "choices"),
        ("", '{ path = "/e", body = { a = 1 }, expect = "data" }', "/e", {"a": 1}, "data"),
        ("", '{ path = "/e", body = { a = 1 }, expect = "" }', "/e", {"a": 1}, ""),
        ("", "{ body = { a = 1 } }", "/v1/chat/completions", {"a": 1}, "choices"),
        ("", '{ expect = "id" }', "/v1/chat/completions", CHAT, "id"),
    ],
)
def test_the_readiness_request(engine: str, line: str, path: str, body: Any, expect: str) -> None:
    text = MINIMAL.replace('kind = "command"', f'kind = "command", {engine}' if engine else 'kind = "command"')
    request = pool(text + (f"probe.readiness.request = {line}" if line else "")).probe.request
    assert (request.path, request.expect) == (path, expect)
    assert (json.loads(request.body) if request.body else None) == body


def test_the_planned_model_is_checked_and_the_environment_found() -> None:
    text = MINIMAL.replace("gpus = 4", 'gpus = 4\nenv = "sgl"').replace(
        'kind = "command"', 'kind = "command", model = "m"'
    )
    one = pool(text + '[env.sgl]\nvariables = { A = "1" }\nsetup = ["module load cuda"]\n')
    assert one.probe.model == one.engine.model == "m"
    assert (one.env.variables, one.env.setup) == ({"A": "1"}, ("module load cuda",))


def test_agents_fence_themselves_only_where_that_is_asked_for() -> None:
    assert pool(MINIMAL).fence.self_fence_s == 0
    assert pool(MINIMAL + "fence.self_fence_s = 60").fence.self_fence_s == 60
    assert pool(MINIMAL + "fence.self_fence_s = 0\n[fence]\nself_fence_s = 90").fence.self_fence_s == 0
    assert pool("heartbeat_s = 12\n" + MINIMAL + "[fence]\nself_fence_s = 120").fence.self_fence_s == 120


# ---------------------------------------------------------------------------------------------------------- mistakes


def change(old: str, new: str) -> str:
    assert old in MINIMAL
    return MINIMAL.replace(old, new)


ARGV = 'argv = ["serve", "{http_port}"]'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            change("groups = 2", "gropus = 2"),
            "pool[0].gropus (pool actor) = 2: there is no such key; did you mean groups?",
        ),
        (change("groups = 2", "gropus = 2"), "pool[0].groups (pool actor) is missing"),
        (MINIMAL + "[restrat]\nwindow_s = 3", "restrat: there is no such key; did you mean restart?"),
        (
            MINIMAL + "[probe.liveness]\nthreshold = 3",
            "probe.liveness.threshold = 3: there is no such key; did you mean",
        ),
        (MINIMAL + "probe.liveness.counter = { nam = 1 }", "did you mean name?"),
        (MINIMAL + "[env.a]\nvars = 1", "env.a.vars = 1: there is no such key; did you mean variables?"),
        (MINIMAL + "xyz = 1", "there are name, groups, gpus, nodes, "),
        (
            MINIMAL + '[env.a]\ncontainer = { image = "x" }',
            "containers come with the engine adapters in a later version",
        ),
        (
            change('kind = "command"', 'kind = "vllm", tp = 2'),
            'kind = "vllm" comes in a later version; this one has "command"',
        ),
        (
            change('kind = "command"', 'kind = "comand"'),
            "pool[0].engine.kind (pool actor) = \"comand\": should be 'command'",
        ),
        (MINIMAL + 'weights = "train"', "pool[0].weights (pool actor) = \"train\": should be 'frozen' or 'trained'"),
        (
            MINIMAL + 'restart.when = "later"',
            "pool[0].restart.when (pool actor) = \"later\": should be 'at_once' or 'at_barrier'",
        ),
        (
            MINIMAL + "fence.self_fence_s = 59",
            "pool[0].fence.self_fence_s (pool actor) = 59: at least 60 (60 s, 10 heartbeats), or 0, never: a",
        ),
        ("heartbeat_s = 12\n" + MINIMAL + "[fence]\nself_fence_s = 119", "fence.self_fence_s = 119: at least 120"),
        (MINIMAL + 'probe.pause_in = ["sleeping"]', "should be 'generating', 'training' or 'syncing'"),
        (change("groups = 2", "groups = 0"), "pool[0].groups (pool actor) = 0: should be greater than or equal to 1"),
        (change("groups = 2", 'groups = "2"'), 'pool[0].groups (pool actor) = "2": should be a valid integer'),
        (change("groups = 2", "groups = true"), "pool[0].groups (pool actor) = true: should be a valid integer"),
        (MINIMAL + "min_ready = 3", "pool[0].min_ready (pool actor) = 3: at most groups = 2"),
        (change("gpus = 4", ""), "pool[0] (pool actor): say what one group takes: gpus = …, or nodes = …"),
        (change("gpus = 4", "gpus = 0"), "pool[0].gpus (pool actor) = 0: say what one group takes"),
        (change('name = "actor"', 'name = "a/b"'), 'pool[0].name (pool a/b) = "a/b": should match pattern'),
        (change('name = "run"', 'name = "my run"'), 'name = "my run": should match pattern'),
        (change('name = "run"', f'name = "{"x" * 41}"'), "should have at most 40 characters"),
        (change(ARGV, "argv = []"), "pool[0].engine.argv (pool actor) = []: should have at least 1 item"),
        (change(ARGV, 'argv = [""]'), 'pool[0].engine.argv[0] (pool actor) = "": the name of a program'),
        (change(ARGV, 'argv = "serve"'), 'pool[0].engine.argv (pool actor) = "serve": should be a valid list'),
        (change(ARGV, 'argv = ["a", "{http_prt}"]'), "{http_prt} is no placeholder. Did you mean {http_port}?"),
        (change(ARGV, 'argv = ["a", "{prt}"]'), "There are {rank}, {size}, {local_rank}, {node}, {node_ip}, {gpus}, "),
        (change(ARGV, 'argv = ["a", "{port.x}"]'), "for a literal {port.x} write {{port.x}}"),
        (change(ARGV, f'{ARGV}, ports = ["http"]'), "every member has a port http anyway"),
        (change(ARGV, f'{ARGV}, ports = ["a", "a"]'), 'pool[0].engine.ports[1] (pool actor) = "a": named twice'),
        (change(ARGV, f'{ARGV}, ports = ["A"]'), 'pool[0].engine.ports[0] (pool actor) = "A": should match pattern'),
        (
            change(ARGV, f'{ARGV}, ports = ["a"]') + "ports.stride = 2",
            "these are 3 ports; a member has ports.stride = 2",
        ),
        (MINIMAL + "ports.base = 80", "pool[0].ports.base (pool actor) = 80: should be greater than or equal to 1024"),
        (MINIMAL + "ports.base = 65536", "should be less than or equal to 65535"),
        (
            MINIMAL + 'env = "sgll"\n[env.sgl]',
            'pool[0].env (pool actor) = "sgll": there is no [env.sgll]; did you mean sgl?',
        ),
        (MINIMAL + 'env = "sgl"', "there is no [env.sgl]; there are none"),
        (
            MINIMAL + '[env.a]\nvariables = { ROLLOUT_RANK = "1" }',
            "names that start with ROLLOUT_ are set by slurm-rollout",
        ),
        (MINIMAL + '[env.a]\nvariables = { "A B" = "1" }', "a variable's name has letters"),
        (MINIMAL + "[env.a]\nvariables = { A = 1 }", "env.a.variables.A = 1: should be a valid string"),
        (MINIMAL + '[nodes]\ninclude = "n[1-"', "nodes.include = \"n[1-\": 'n[1-' is not a hostlist: at character 2"),
        (MINIMAL + '[nodes]\ninclude = "n1"\ncount = 3', "include and count exclude one another"),
        (MINIMAL + "[nodes]\nspares = -1", "nodes.spares = -1: should be greater than or equal to 0"),
        (MINIMAL + "probe.startup.timeout_s = 0", "probe.startup.timeout_s (pool actor) = 0: should be greater than 0"),
        (MINIMAL + "probe.startup.timeout_s = inf", "should be a finite number"),
        (MINIMAL + "probe.startup.timeout_s = nan", "should be a finite number"),
        (
            MINIMAL + "probe.startup = { timeout_s = 9, request_timeout_s = 60 }",
            "request_timeout_s = 60 is above timeout_s = 9",
        ),
        (MINIMAL + "probe.liveness.failure_threshold = 1", "should be greater than or equal to 2"),
        (MINIMAL + "probe.readiness = 3", "pool[0].probe.readiness (pool actor) = 3: should be a table"),
        (MINIMAL + 'probe.readiness.request = { path = "health" }', "should match pattern '^/'"),
        (
            MINIMAL + "probe.readiness.request = { body = { a = 2020-01-01 } }",
            "should be a table that JSON can express",
        ),
        (MINIMAL + "probe.readiness.request = { body = { a = inf } }", "should be a table that JSON can express"),
        (MINIMAL + "restart.backoff_initial_s = 400", "backoff_initial_s = 400 is above backoff_max_s = 300"),
        (
            MINIMAL + '[slurm]\nsrun_args = ["--mem=0", "--job-name=x"]',
            'slurm.srun_args[1] = "--job-name=x": slurm-rollout sets',
        ),
        (MINIMAL + '[slurm]\nsrun_args = ["-w", "n1"]', 'slurm.srun_args[0] = "-w": slurm-rollout sets'),
        (MINIMAL + '[slurm]\ngpu_option = "gpus"', "should be 'gres', 'gpus-per-node' or 'none'"),
        ('name = "run"', "pool is missing"),
        ('name = "run"\npool = []', "pool = []: should have at least 1 item"),
        (MINIMAL + MINIMAL.split("\n", 2)[2], 'pool[1].name (pool actor) = "actor": pool[0] has this name already'),
        (
            change('name = "run"', 'name = "run"\nheartbeat_s = 60'),
            "heartbeat_s = 60: should be less than or equal to 30",
        ),
    ],
)
def test_a_mistake_is_told_with_its_path_its_value_and_the_cure(text: str, message: str) -> None:
    assert message in problem(text)


def test_every_mistake_is_told_at_once() -> None:
    shape = problem(change("groups = 2", "groups = 0\nx = 1") + 'env = 3\n[fence]\ntimeout_s = "1"\n')
    assert shape.splitlines()[0] == "fleet.toml has 4 problems:"
    assert [line.split(" = ")[0].strip() for line in shape.splitlines()[1:]] == [
        "pool[0].groups (pool actor)",
        "pool[0].env (pool actor)",
        "pool[0].x (pool actor)",
        "fence.timeout_s",
    ]
    meaning = problem(
        change(ARGV, 'argv = ["{a}", "{b}"]')
        + "min_ready = 5\nprobe.startup = { timeout_s = 1, request_timeout_s = 2 }\n"
    )
    assert meaning.splitlines()[0] == "fleet.toml has 4 problems:"


def test_srun_options_that_only_look_like_ours_pass() -> None:
    text = MINIMAL + '[slurm]\nsrun_args = ["--container-image=/x.sqsh", "--ntasks-per-core=1", "--export=ALL"]'
    assert fleet_request(parse_spec(tomllib.loads(text), source="")).slurm.srun_args[0] == "--container-image=/x.sqsh"


# ------------------------------------------------------------------------------------------------------------- files


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(MINIMAL)
    (tmp_path / "a.json").write_text(json.dumps(tomllib.loads(MINIMAL)))
    assert load_spec(tmp_path / "a.toml") == load_spec(str(tmp_path / "a.json"))


def test_yaml_needs_pyyaml_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: run\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(SpecError, match=r"pip install 'slurm-rollout\[yaml\]'"):
        load_spec(path)


def test_yaml_is_read_by_pyyaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class YAMLError(Exception):
        pass

    def safe_load(text: str) -> Any:
        if text == "broken":
            raise YAMLError("line 1")
        return json.loads(text)  # JSON is YAML

    monkeypatch.setitem(sys.modules, "yaml", SimpleNamespace(safe_load=safe_load, YAMLError=YAMLError))
    path = tmp_path / "a.yml"
    path.write_text(json.dumps(tomllib.loads(MINIMAL)))
    assert load_spec(path).name == "run"
    path.write_text("broken")
    with pytest.raises(SpecError, match="is not YAML: line 1"):
        load_spec(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", b"name = \n", "is not TOML: Invalid value (at line 1, column 8)"),
        ("a.json", b"{", "is not JSON: Expecting property name"),
        ("a.json", b"[]", "a.json: []: should be a table"),
        ("a.json", b"null", "a.json: null: should be a table"),
        ("a.ini", b"", "a spec file ends in .toml, .json or .yaml"),
        ("a.toml", b"\xff", "is not UTF-8 text"),
        ("missing.toml", None, "missing.toml cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_no_spec(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as raised:
        load_spec(tmp_path / name)
    assert message in str(raised.value)
    assert raised.value.exit_code == 2
