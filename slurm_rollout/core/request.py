"""What placement is made from: the allocation, and the spec in values of the core. Pure values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from slurm_rollout.core.plan import (
    Environment,
    EventHookPlan,
    FencePolicy,
    ProbePolicy,
    ProbeRequest,
    RestartPolicy,
    SlurmSettings,
    StopPolicy,
    TrainerPlan,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The nodes that the job holds. `cpus`, `gpus` and `addresses` have an entry for every node."""

    job: str  # "" outside a job
    restart_count: int = 0
    nodes: tuple[str, ...]
    cpus: Mapping[str, int]
    gpus: Mapping[str, int]  # 0: none, or not known
    addresses: Mapping[str, str]  # node -> the host part of its URLs
    ips: Mapping[str, str] = field(default_factory=dict)  # where one was found that other nodes can use
    het_jobs: tuple[str, ...] = ()  # job id of each component of a heterogeneous job
    het_groups: Mapping[str, int] = field(default_factory=dict)  # node -> its component; empty in other jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberPlace:
    """What an engine adapter knows of a member when it makes its command line.

    Where the member runs is not in it: that can change. For node, addresses and ports it puts placeholders.
    """

    rank: int
    size: int
    local_rank: int
    gpus: tuple[int, ...]


class Engine(Protocol):
    """An engine adapter: what a kind of engine needs, as pure functions of a member's place."""

    @property
    def kind(self) -> str: ...

    @property
    def model(self) -> str:
        """The planned model, which `/v1/models` must list; "": not checked."""

    @property
    def port_names(self) -> tuple[str, ...]:
        """The ports of a member beside `http` and `master`; published as endpoints."""

    @property
    def uses_node_ip(self) -> bool: ...

    def is_entrypoint(self, rank: int) -> bool: ...

    def argv(self, place: MemberPlace) -> tuple[str, ...]:
        """Return the command line, with placeholders (`core.placeholders`) for what is known at each launch."""

    def variables(self, place: MemberPlace) -> Mapping[str, str]: ...

    def readiness_request(self) -> ProbeRequest:
        """Return the request that proves inference, for pools whose spec names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRequest:
    """One pool of the spec. At least one of `gpus` and `nodes` is given."""

    name: str
    groups: int
    gpus: int | None  # of one group
    nodes: int | None  # of one group, whole ones
    members_per_node: int
    min_ready: int
    weights: str
    engine: Engine
    env: Environment
    probe: ProbePolicy
    restart: RestartPolicy
    stop: StopPolicy
    fence: FencePolicy
    port_base: int
    port_stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRequest:
    """The spec, in values of the core. At most one of `include`, `count` and `het_group` is given."""

    name: str
    pools: tuple[PoolRequest, ...]
    include: tuple[str, ...]
    count: int | None
    het_group: int | None
    spares: int
    lost_after_s: float
    max_node_failures: int
    gpus_per_node: int | None  # overrides the allocation's
    slurm: SlurmSettings
    heartbeat_s: float
    audit_s: float
    degraded_timeout_s: float
    log_max_bytes: int
    log_keep_incarnations: int
    private: bool
    on_event: EventHookPlan | None = None
    trainer: TrainerPlan = field(default_factory=TrainerPlan)
