"""The tables and keys of a spec file, as pydantic models: the shape, each value by itself. `spec.py` reads the file.

A pool's table says what differs from the same table at the top level (`merged`): the defaults are the top level's.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from slurm_rollout.core.model import EVENT_TYPES
from slurm_rollout.core.plan import ProbeRequest
from slurm_rollout.engines.command import CommandEngine

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=40)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
UrlPath = Annotated[str, Field(pattern=r"^/")]


class Table(BaseModel):
    """A table of the file. Unknown keys are errors, and "3" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Nodes(Table):
    include: str | None = None
    count: Count | None = None
    het_group: Annotated[int, Field(ge=0)] | None = None
    spares: Annotated[int, Field(ge=0)] = 0
    lost_after_s: Seconds = 30.0
    max_failures: Annotated[int, Field(ge=1)] = 2
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    address: Annotated[str, Field(pattern=r"^([A-Za-z0-9._-]|\{node\})+$")] = "{node}"


class Env(Table):
    variables: dict[str, str] = {}
    setup: list[str] = []


LATER_ENGINES = ("sglang", "vllm", "lmdeploy")


class Engine(Table):
    kind: Literal["command"]
    argv: Annotated[list[str], Field(min_length=1)]
    entrypoints: Literal["all", "leader"] = "all"
    model: str = ""
    ports: list[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]] = []

    @model_validator(mode="before")
    @classmethod
    def _kind_of_this_version(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("kind") in LATER_ENGINES:
            raise ValueError(
                f'kind = "{data["kind"]}" comes in a later version; this one has "command": give the server\'s own '
                'command line, engine = { kind = "command", argv = ["…", "--port", "{http_port}"] }, with {rank}, '
                "{size}, {master_addr} and {master_port} where it wants them"
            )
        return data

    def adapter(self) -> CommandEngine:
        return CommandEngine(
            template=tuple(self.argv),
            entrypoints=self.entrypoints,
            model=self.model,
            port_names=tuple(self.ports),
        )


class Request(Table):
    path: UrlPath | None = None
    body: dict[str, Any] | None = None
    expect: str | None = None

    @field_validator("body")
    @classmethod
    def _body_is_json(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as e:  # TOML and YAML have dates and infinite numbers
            raise ValueError(f"should be a table that JSON can express: {e}") from None
        return value

    def value(self, default: ProbeRequest) -> ProbeRequest:
        """Return the request: the engine's default without a path; with one, a GET unless there is a body."""
        if self.path is None:
            body = default.body if self.body is None else json.dumps(self.body)
            return ProbeRequest(
                path=default.path, body=body, expect=default.expect if self.expect is None else self.expect
            )
        if self.body is None:
            return ProbeRequest(path=self.path, expect=self.expect or "")
        expect = "choices" if self.expect is None else self.expect
        return ProbeRequest(path=self.path, body=json.dumps(self.body), expect=expect)


class ProgressCounter(Table):
    path: UrlPath = "/metrics"
    name: Annotated[str, Field(min_length=1)]


class Startup(Table):
    timeout_s: Seconds = 3600.0
    period_s: Seconds = 5.0
    request_timeout_s: Seconds = 60.0


class Readiness(Table):
    request: Request = Request()
    failure_threshold: Count = 2


class Liveness(Table):
    period_s: Seconds = 15.0
    timeout_s: Seconds = 30.0
    # With 1 the first group to be probed would be convicted before it is seen that all of them time out.
    failure_threshold: Annotated[int, Field(ge=2)] = 4
    counter: ProgressCounter | None = None


class Probe(Table):
    startup: Startup = Startup()
    readiness: Readiness = Readiness()
    liveness: Liveness = Liveness()
    pause_in: list[Literal["generating", "training", "syncing"]] | None = None
    pause_max_s: Seconds = 3600.0


class Restart(Table):
    max_restarts: Annotated[int, Field(ge=0)] = 5
    max_start_failures: Annotated[int, Field(ge=0)] = 5
    window_s: Seconds = 3600.0
    backoff_initial_s: SecondsOrZero = 5.0
    backoff_max_s: SecondsOrZero = 300.0
    end_margin_s: SecondsOrZero = 60.0
    when: Literal["at_once", "at_barrier"] = "at_once"


class Stop(Table):
    grace_s: SecondsOrZero = 0.0
    cancel_after_s: SecondsOrZero = 1.0
    snapshot_s: Annotated[float, Field(ge=0, le=3)] = 3.0


class Fence(Table):
    timeout_s: Seconds = 120.0
    gpu_memory_mb: Count = 1024
    self_fence_s: SecondsOrZero = 0.0


class Ports(Table):
    base: Annotated[int, Field(ge=1024, le=65535)] = 18000
    stride: Annotated[int, Field(ge=2)] = 16


class Slurm(Table):
    srun_args: list[str] = []
    gpu_option: Literal["gres", "gpus-per-node", "none"] = "gres"
    launch_timeout_s: Seconds = 120.0
    max_launching: Count = 32
    command_timeout_s: Seconds = 90.0
    python: str = ""
    agent: Annotated[str, Field(pattern=r"^(/.*)?$")] = ""
    requeue: Literal["no", "exit", "scontrol"] = "no"


class Trainer(Table):
    signal: Literal["TERM", "INT", "USR1", "USR2"] = "TERM"
    grace_s: SecondsOrZero = 10.0


class Logs(Table):
    max_bytes: Annotated[int, Field(ge=4096)] = 64 * 1024 * 1024
    keep_incarnations: Count = 5


class OnEvent(Table):
    argv: Annotated[list[str], Field(min_length=1)]
    types: list[str] | None = None
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 10.0

    @field_validator("types")
    @classmethod
    def _types_of_events(cls, value: list[str] | None) -> list[str] | None:
        if unknown := [t for t in value or () if t not in EVENT_TYPES]:
            raise ValueError(f"there is no event {', '.join(unknown)}; there are {', '.join(EVENT_TYPES)}")
        return value


class Pool(Table):
    name: Name
    groups: Count
    gpus: Annotated[int, Field(ge=0)] | None = None
    nodes: Count | None = None
    members_per_node: Count = 1
    min_ready: Count = 1
    weights: Literal["frozen", "trained"] = "frozen"
    env: str | None = None
    engine: Engine
    probe: Probe = Probe()
    restart: Restart = Restart()
    stop: Stop = Stop()
    fence: Fence = Fence()
    ports: Ports = Ports()


class Spec(Table):
    """The whole file."""

    name: Name
    nodes: Nodes = Nodes()
    env: dict[str, Env] = {}
    pool: Annotated[list[Pool], Field(min_length=1)]
    probe: Probe = Probe()
    restart: Restart = Restart()
    stop: Stop = Stop()
    fence: Fence = Fence()
    ports: Ports = Ports()
    slurm: Slurm = Slurm()
    trainer: Trainer = Trainer()
    logs: Logs = Logs()
    on_event: OnEvent | None = None
    # Readers judge a coordinator lost after 120 s without a heartbeat.
    heartbeat_s: Annotated[float, Field(gt=0, le=30)] = 5.0
    audit_s: Seconds = 300.0
    degraded_timeout_s: Seconds = 1800.0
    private: bool = False


T = TypeVar("T", bound=Table)


def merged(default: T, override: T) -> T:
    """Return `default` with every key that `override` sets, table by table."""
    changes: dict[str, Any] = {}
    for name in override.model_fields_set:
        old, new = getattr(default, name), getattr(override, name)
        changes[name] = merged(old, new) if isinstance(old, Table) and isinstance(new, Table) else new
    return default.model_copy(update=changes)
