"""The user's spec file: read, checked, and turned into values of the core.

A file is checked in two steps: its shape by `spec_models`, then what only makes sense together (`_problems`). Each step
reports everything that it finds.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard, get_args

from pydantic import ValidationError

from slurm_rollout.core.clients import SYNCING, TRAINING
from slurm_rollout.core.hostlist import expand
from slurm_rollout.core.model import PAGED_TYPES
from slurm_rollout.core.placeholders import placeholders, used
from slurm_rollout.core.placement import place
from slurm_rollout.core.plan import (
    Counter,
    Environment,
    EventHookPlan,
    FencePolicy,
    FleetPlan,
    ProbePolicy,
    RestartPolicy,
    SlurmSettings,
    StopPolicy,
    TrainerPlan,
)
from slurm_rollout.core.ports import HTTP, MASTER, OutgoingPorts
from slurm_rollout.core.request import Allocation, FleetRequest, PoolRequest
from slurm_rollout.errors import SpecError
from slurm_rollout.spec_models import Env, Fence, Nodes, OnEvent, Pool, Probe, Restart, Spec, Table, merged

__all__ = ["Spec", "build_plan", "fleet_request", "load_spec", "parse_spec"]


def fleet_request(spec: Spec) -> FleetRequest:
    """Return the spec in values of the core, defaults merged into every pool."""
    return FleetRequest(
        name=spec.name,
        pools=tuple(_pool_request(spec, pool) for pool in spec.pool),
        include=expand(spec.nodes.include) if spec.nodes.include is not None else (),
        count=spec.nodes.count,
        het_group=spec.nodes.het_group,
        spares=spec.nodes.spares,
        lost_after_s=spec.nodes.lost_after_s,
        max_node_failures=spec.nodes.max_failures,
        gpus_per_node=spec.nodes.gpus_per_node,
        slurm=SlurmSettings(srun_args=tuple(spec.slurm.srun_args), **spec.slurm.model_dump(exclude={"srun_args"})),
        heartbeat_s=spec.heartbeat_s,
        audit_s=spec.audit_s,
        degraded_timeout_s=spec.degraded_timeout_s,
        log_max_bytes=spec.logs.max_bytes,
        log_keep_incarnations=spec.logs.keep_incarnations,
        private=spec.private,
        trainer=TrainerPlan(**spec.trainer.model_dump()),
        on_event=_on_event(spec.on_event),
    )


def _on_event(table: OnEvent | None) -> EventHookPlan | None:
    if table is None:
        return None
    types = PAGED_TYPES if table.types is None else tuple(table.types)
    return EventHookPlan(argv=tuple(table.argv), types=types, timeout_s=table.timeout_s)


def _pool_request(spec: Spec, pool: Pool) -> PoolRequest:
    engine = pool.engine.adapter()
    probe, ports = merged(spec.probe, pool.probe), merged(spec.ports, pool.ports)
    restart = merged(spec.restart, pool.restart)
    env = spec.env[pool.env] if pool.env is not None else Env()
    counter = probe.liveness.counter
    return PoolRequest(
        name=pool.name,
        groups=pool.groups,
        gpus=pool.gpus,
        nodes=pool.nodes,
        members_per_node=pool.members_per_node,
        min_ready=pool.min_ready,
        weights=pool.weights,
        engine=engine,
        env=Environment(variables=env.variables, setup=tuple(env.setup)),
        probe=ProbePolicy(
            request=probe.readiness.request.value(engine.readiness_request()),
            model=engine.model,
            counter=Counter(path=counter.path, name=counter.name) if counter else None,
            startup_timeout_s=probe.startup.timeout_s,
            startup_period_s=probe.startup.period_s,
            startup_request_timeout_s=min(probe.startup.request_timeout_s, probe.startup.timeout_s),
            readiness_failure_threshold=probe.readiness.failure_threshold,
            liveness_period_s=probe.liveness.period_s,
            liveness_timeout_s=probe.liveness.timeout_s,
            liveness_failure_threshold=probe.liveness.failure_threshold,
            pause_in=_pause_in(probe, restart, pool),
            pause_max_s=probe.pause_max_s,
        ),
        restart=RestartPolicy(**restart.model_dump()),
        stop=StopPolicy(**merged(spec.stop, pool.stop).model_dump()),
        fence=FencePolicy(**merged(spec.fence, pool.fence).model_dump()),
        port_base=ports.base,
        port_stride=ports.stride,
    )


def _pause_in(probe: Probe, restart: Restart, pool: Pool) -> tuple[str, ...]:
    """Return the phases in which the pool's engines take weights, or sleep because the trainer uses their GPUs."""
    if probe.pause_in is not None:
        return tuple(dict.fromkeys(probe.pause_in))
    if restart.when == "at_barrier":
        return (TRAINING, SYNCING)
    return (SYNCING,) if pool.weights == "trained" else ()


def build_plan(
    spec: Spec, allocation: Allocation, *, backend: str, port_range: OutgoingPorts
) -> tuple[FleetPlan, tuple[str, ...]]:
    """Return the plan of the spec in this allocation, and the warnings about it.

    `backend` is "slurm" or "local"; `port_range` the kernel's outgoing ports.

    Raises:
        SpecError: the allocation cannot hold the fleet, or the ports do not fit.
    """
    return place(fleet_request(spec), allocation, backend=backend, port_range=port_range)


# -------------------------------------------------------------------------------------------------------------- reading


def load_spec(path: Path | str) -> Spec:
    """Return the checked spec in a .toml, .json or .yaml file.

    Raises:
        SpecError: it cannot be read, or values in it are wrong; the message lists all of them, each with its path in
            the file, the value, and what would be right.
    """
    path = Path(path)
    return parse_spec(_read(path), source=str(path))


def parse_spec(data: Any, *, source: str) -> Spec:
    """Return the checked spec in `data`, as a TOML or JSON parser gives it; `source` names it in messages.

    Raises:
        SpecError: see `load_spec`.
    """
    try:
        spec = Spec.model_validate(data)
    except ValidationError as e:
        problems = [_shape_problem(error["loc"], error, data) for error in e.errors(include_url=False)]
        raise _spec_error(source, problems) from None
    if problems := [_describe(loc, data, why, _value_at(loc, data)) for loc, why in _problems(spec)]:
        raise _spec_error(source, problems)
    return spec


def _spec_error(source: str, problems: Sequence[str]) -> SpecError:
    if len(problems) == 1:
        return SpecError(f"{source}: {problems[0]}")
    return SpecError("\n  ".join([f"{source} has {len(problems)} problems:", *problems]))


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise SpecError(f"{path} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise SpecError(f"{path} is not UTF-8 text: {e}") from None
    kind = path.suffix.lower()
    try:
        if kind == ".toml":
            return tomllib.loads(text)
        if kind == ".json":
            return json.loads(text)
    except ValueError as e:
        raise SpecError(f"{path} is not {kind[1:].upper()}: {e}") from None
    if kind in (".yaml", ".yml"):
        return _read_yaml(path, text)
    raise SpecError(f"{path}: a spec file ends in .toml, .json or .yaml, so that its format is known")


def _read_yaml(path: Path, text: str) -> Any:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise SpecError(
            f"{path}: YAML needs PyYAML, which is not installed: pip install 'slurm-rollout[yaml]', or write TOML"
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise SpecError(f"{path} is not YAML: {e}") from None


# ------------------------------------------------------------------------------------------------------------- messages

Loc = tuple[int | str, ...]

_KEYS_OF_LATER = {
    "container": "containers come with the engine adapters in a later version; in this one, start the container from "
    "engine.argv"
}


def _shape_problem(loc: Loc, error: Any, data: Any) -> str:
    if error["type"] == "missing":
        return f"{_path(loc, data)} is missing"
    if error["type"] == "extra_forbidden":
        key = str(loc[-1])
        return _describe(loc, data, _KEYS_OF_LATER.get(key) or _unknown_key(key, _known_keys(loc[:-1])), error["input"])
    message = re.sub(r"^(Value error, |(Input|String|List) (?=should))", "", str(error["msg"]))
    if error["type"] in ("model_type", "dict_type"):  # pydantic names the Python class here
        message = "should be a table"
    return _describe(loc, data, message, error["input"])


def _unknown_key(key: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
    return f"there is no such key; {hint}"


def _known_keys(loc: Loc) -> tuple[str, ...]:
    """Return the keys of the table at this place of the file."""
    table: type[Table] = Spec
    for part in loc:
        # An index, or the name of an [env.NAME], stays in the table that its list or dict holds.
        if part in table.model_fields:
            annotation = table.model_fields[str(part)].annotation
            table = next(a for a in (annotation, *get_args(annotation)) if _is_table(a))
    return tuple(table.model_fields)


def _is_table(annotation: Any) -> TypeGuard[type[Table]]:
    return isinstance(annotation, type) and issubclass(annotation, Table)


def _describe(loc: Loc, data: Any, why: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{_path(loc, data)}: {why}"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    if len(shown) > 80:
        shown = f"{shown[:77]}…"
    return f"{_path(loc, data)} = {shown}: {why}" if loc else f"{shown}: {why}"


def _path(loc: Loc, data: Any) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    if loc[:1] == ("pool",) and len(loc) > 1:
        name = _value_at((*loc[:2], "name"), data)
        return f"{path} (pool {name})" if isinstance(name, str) else path
    return path


def _value_at(loc: Loc, data: Any) -> Any:
    for part in loc:
        try:
            data = data[part]
        except (LookupError, TypeError):
            return None
    return data


# -------------------------------------------------------------------------------------------------------------- meaning

# The supervisor waits up to 30 s before it replaces a coordinator that keeps dying; readers give up after 120 s.
_SELF_FENCE_MIN_S = 60.0
_SELF_FENCE_MIN_HEARTBEATS = 10
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OUR_SRUN_OPTIONS = re.compile(
    r"--(jobid|job-name|output|error|input|nodelist|nodes|ntasks|ntasks-per-node|het-group)(=.*)?|-[JoeiwNn].*"
)


def _problems(spec: Spec) -> Iterator[tuple[Loc, str]]:
    """Yield what is wrong although each value by itself is right."""
    yield from _node_problems(spec.nodes)
    yield from _fence_problems(spec, spec.fence)
    for name, env in spec.env.items():
        for variable in env.variables:
            loc: Loc = ("env", name, "variables", variable)
            if not _VARIABLE.fullmatch(variable):
                yield loc, "a variable's name has letters, digits and _, and no digit first"
            elif variable.startswith("ROLLOUT_"):
                yield loc, "names that start with ROLLOUT_ are set by slurm-rollout"
    for i, argument in enumerate(spec.slurm.srun_args):
        if _OUR_SRUN_OPTIONS.fullmatch(argument):
            yield ("slurm", "srun_args", i), "slurm-rollout sets this option for every step itself"
    first: dict[str, int] = {}
    for i, pool in enumerate(spec.pool):
        if pool.name in first:
            yield ("pool", i, "name"), f"pool[{first[pool.name]}] has this name already"
        first.setdefault(pool.name, i)
        for loc, why in _pool_problems(spec, pool):
            yield ("pool", i, *loc), why


def _node_problems(nodes: Nodes) -> Iterator[tuple[Loc, str]]:
    ways = [k for k in ("include", "count", "het_group") if getattr(nodes, k) is not None]
    if len(ways) > 1:
        yield ("nodes",), f"{' and '.join(ways)} exclude one another: the fleet's nodes are chosen in one way"
    if nodes.include is not None:
        try:
            expand(nodes.include)
        except ValueError as e:
            yield ("nodes", "include"), str(e)


def _pool_problems(spec: Spec, pool: Pool) -> Iterator[tuple[Loc, str]]:
    if pool.min_ready > pool.groups:
        yield ("min_ready",), f"at most groups = {pool.groups}"
    if pool.nodes is None and not pool.gpus:
        yield (
            ("gpus",) if pool.gpus == 0 else (),
            "say what one group takes: gpus = …, or nodes = … (without GPUs: nodes = …)",
        )
    if pool.env is not None and pool.env not in spec.env:
        nearest = difflib.get_close_matches(pool.env, spec.env, n=1)
        have = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(spec.env) or 'none'}"
        yield ("env",), f"there is no [env.{pool.env}]; {have}"
    yield from _engine_problems(spec, pool)
    yield from _fence_problems(spec, pool.fence)
    startup = merged(spec.probe, pool.probe).startup
    if startup.request_timeout_s > startup.timeout_s and "request_timeout_s" in startup.model_fields_set:
        yield (
            ("probe", "startup"),
            f"request_timeout_s = {startup.request_timeout_s:g} is above timeout_s = {startup.timeout_s:g}",
        )
    restart = merged(spec.restart, pool.restart)
    if restart.backoff_initial_s > restart.backoff_max_s:
        yield (
            ("restart",),
            f"backoff_initial_s = {restart.backoff_initial_s:g} is above backoff_max_s = {restart.backoff_max_s:g}",
        )


def _fence_problems(spec: Spec, fence: Fence) -> Iterator[tuple[Loc, str]]:
    least_s = max(_SELF_FENCE_MIN_S, _SELF_FENCE_MIN_HEARTBEATS * spec.heartbeat_s)
    if 0 < fence.self_fence_s < least_s:
        yield (
            ("fence", "self_fence_s"),
            f"at least {least_s:g} ({_SELF_FENCE_MIN_S:g} s, {_SELF_FENCE_MIN_HEARTBEATS} heartbeats), or 0, never: "
            "a coordinator that is being replaced, or a slow file system, must not end the engines",
        )


def _engine_problems(spec: Spec, pool: Pool) -> Iterator[tuple[Loc, str]]:
    engine = pool.engine
    if not engine.argv[0]:
        yield ("engine", "argv", 0), "the name of a program"
    known = placeholders(engine.ports)
    for i, argument in enumerate(engine.argv):
        for name in used(argument):
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {{{nearest[0]}}}?" if nearest else ""
                yield (
                    ("engine", "argv", i),
                    f"{{{name}}} is no placeholder.{hint} There are {', '.join(f'{{{k}}}' for k in known)}; "
                    f"for a literal {{{name}}} write {{{{{name}}}}}",
                )
    for i, name in enumerate(engine.ports):
        if name in (HTTP, MASTER):
            yield ("engine", "ports", i), f"every member has a port {name} anyway; name only further ones"
        elif name in engine.ports[:i]:
            yield ("engine", "ports", i), "named twice"
    stride = merged(spec.ports, pool.ports).stride
    if stride < len(engine.ports) + 2:
        yield (
            ("engine", "ports"),
            f"with {HTTP} and {MASTER} these are {len(engine.ports) + 2} ports; a member has ports.stride = {stride}",
        )
