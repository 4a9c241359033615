"""What was decided before anything starts: groups, members, nodes, GPUs, ports, policies. Pure values.

`spec.py` and `core/placement.py` make a `FleetPlan` from the user's file and the allocation; it is written to the run
directory as `plan.json` and does not change while the run lives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRequest:
    """One HTTP request and what its answer must hold.

    With a `body` (JSON text) it is a POST, else a GET. The answer must be status 200; where `expect` is not empty, a
    JSON object in which `expect` is a non-empty list, object or string (`choices`: a list with `choices[0]`).
    """

    path: str = "/v1/chat/completions"
    body: str = ""
    expect: str = "choices"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """Where an engine's progress can be read: a Prometheus text page and the name of a sample in it.

    All samples of that name (labels ignored) are added up. It must grow while the engine works on anything.
    """

    path: str = "/metrics"
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePolicy:
    """How an entrypoint is probed. Times in seconds."""

    request: ProbeRequest
    model: str = ""  # planned model: /v1/models must list it; empty: not checked
    counter: Counter | None = None
    startup_timeout_s: float = 3600.0  # from `go` to ready
    startup_period_s: float = 5.0  # the cadence that the first, faster probes slow down to
    startup_request_timeout_s: float = 60.0  # one readiness request of a starting engine
    readiness_failure_threshold: int = 2  # answers that say "no" until `unready`
    liveness_period_s: float = 15.0
    liveness_timeout_s: float = 30.0
    liveness_failure_threshold: int = 4
    pause_in: tuple[str, ...] = ()  # phases of the trainer in which nothing is asked of engines that were proved
    pause_max_s: float = 3600.0  # so long at most, counted from the announcement


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Budget and backoff. At most `max_restarts` in any `window_s`; start-up failures are counted apart."""

    max_restarts: int = 5
    max_start_failures: int = 5
    window_s: float = 3600.0
    backoff_initial_s: float = 5.0
    backoff_max_s: float = 300.0
    end_margin_s: float = 60.0  # a start that leaves the group less time than this before the job ends is not made
    when: str = "at_once"  # "at_barrier": only while the trainer permits it, because it uses the same GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class StopPolicy:
    """How an incarnation is ended."""

    grace_s: float = 0.0  # TERM first and this long to leave; 0: killed at once
    cancel_after_s: float = 1.0  # then scancel for what the agents did not end
    snapshot_s: float = (
        3.0  # so long a hung group's agents may look at its processes before it is stopped; 0: not at all
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FencePolicy:
    """How the proof that the old incarnation is gone is made."""

    timeout_s: float = 120.0
    gpu_memory_mb: int = 1024  # a GPU that no other group shares counts as back below this
    self_fence_s: float = 0.0  # agents end their engines when they saw no heartbeat for so long; 0: never


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """How processes start on a node: variables, and the user's own shell lines run before the engine."""

    variables: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PortBlocks:
    """Each member has `stride` ports in a row on its address; the first block begins at `base`."""

    base: int = 18000
    stride: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A node of the fleet, as the allocation has it."""

    address: str  # the host part of its URLs
    ip: str  # one that other nodes can use; the address where none was found
    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One server process of a group. What its argv still has placeholders for is known at each launch."""

    rank: int
    node: str
    local_rank: int  # place among the group's members on its node
    gpus: tuple[int, ...]  # indices into the GPUs that the step was given, not hardware numbers
    ports: Mapping[str, int]  # "http", "master" and the named ones; "master" is used on the leader only
    entrypoint: bool
    url: str
    argv: tuple[str, ...]
    variables: Mapping[str, str]  # engine variables of this member (ROLLOUT_* are added at launch)

    @property
    def fenced_ports(self) -> tuple[int, ...]:
        """Every port that must be free on the member's node before it starts, ascending."""
        return tuple(sorted(v for k, v in self.ports.items() if k != "master" or self.rank == 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """Members that start, serve and die together."""

    id: str  # "pool/index"
    pool: str
    members: tuple[Member, ...]
    addresses: Mapping[str, str]  # node -> the host part of its URLs
    cpus_per_step: Mapping[str, int]  # node -> CPUs of the group's step there
    gpus_per_step: Mapping[str, int]  # node -> all GPUs of that node (the agent narrows); 0: none asked
    unshared_gpus: bool  # no other group uses a GPU of this one's
    shares_nodes: bool = False  # it takes a part of a node, and other groups may have the rest

    @property
    def nodes(self) -> tuple[str, ...]:
        """Its nodes, in the order of their first member."""
        return tuple(dict.fromkeys(m.node for m in self.members))

    @property
    def leader(self) -> Member:
        return self.members[0]

    @property
    def master_address(self) -> str:
        return self.addresses[self.leader.node]

    @property
    def master_port(self) -> int:
        return self.leader.ports["master"]

    @property
    def world_size(self) -> int:
        """Workers of its engine, as a trainer's update group counts them: its GPUs; its members where it has none."""
        return sum(len(m.gpus) for m in self.members) or len(self.members)

    @property
    def entrypoints(self) -> tuple[Member, ...]:
        return tuple(m for m in self.members if m.entrypoint)

    def on(self, node: str) -> tuple[Member, ...]:
        """The members on one node."""
        return tuple(m for m in self.members if m.node == node)

    def endpoints(self) -> Iterator[tuple[str, int]]:
        """Every (address, port) that must be free before the group starts."""
        for member in self.members:
            for port in member.fenced_ports:
                yield self.addresses[member.node], port


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """Groups with the same engine settings."""

    name: str
    groups: tuple[GroupPlan, ...]
    min_ready: int
    weights: str  # "frozen"; "trained": serves once the trainer acknowledged its push into the incarnation
    engine: str  # kind
    named_ports: tuple[str, ...]  # published as endpoints
    ports: PortBlocks = field(default_factory=PortBlocks)
    env: Environment
    probe: ProbePolicy
    restart: RestartPolicy
    stop: StopPolicy
    fence: FencePolicy

    @property
    def is_trained(self) -> bool:
        return self.weights == "trained"

    @property
    def heeds_holds(self) -> bool:
        """Whether its starts can be in a trainer's way: it pushes weights into it, or uses the same GPUs."""
        return self.is_trained or self.restart.when == "at_barrier"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmSettings:
    """How Slurm's commands are called."""

    srun_args: tuple[str, ...] = ()  # the user's own, put last
    gpu_option: str = "gres"  # "gres", "gpus-per-node" or "none"
    launch_timeout_s: float = 120.0  # srun started -> its agent spoke
    max_launching: int = 32  # sruns at once that wait for their step; a site limits a user to a burst of 30, say
    command_timeout_s: float = 90.0  # every other command; clients retry for a minute by themselves
    python: str = ""  # interpreter for the agent on the nodes; empty: the coordinator's own
    agent: str = ""  # path of an agent that is installed on the nodes; empty: the run's own copy
    requeue: str = "no"  # when the job's end ended `up`: "exit" with 75, or call "scontrol" requeue before that


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerPlan:
    """How a trainer that `up` started is ended."""

    signal: str = "TERM"  # without "SIG"
    grace_s: float = 10.0  # from that to KILL


@dataclass(frozen=True, slots=True, kw_only=True)
class EventHookPlan:
    """A program that is told of events (`hook.py`)."""

    argv: tuple[str, ...]
    types: tuple[str, ...]
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """The whole run, decided."""

    name: str
    backend: str  # "slurm" or "local"
    pools: tuple[PoolPlan, ...]
    nodes: tuple[str, ...]  # the fleet's, spares included
    hosts: Mapping[str, Host] = field(default_factory=dict)  # of each of them
    spares: tuple[str, ...]
    trainer_nodes: tuple[str, ...]  # all of the allocation where the fleet takes all of it
    het_group: int | None = None  # component of a heterogeneous job that the fleet's nodes belong to
    het_job: str = ""  # and that component's own job id
    slurm: SlurmSettings
    lost_after_s: float = 30.0  # a node that is silent for so long, with a step that does not end, is lost
    max_node_failures: int = 2  # launches or checks in a row that fail on one node before it is excluded
    trainer: TrainerPlan = field(default_factory=TrainerPlan)
    heartbeat_s: float = 5.0
    audit_s: float = 300.0
    degraded_timeout_s: float = 1800.0
    log_max_bytes: int = 64 * 1024 * 1024
    log_keep_incarnations: int = 5
    private: bool = False
    on_event: EventHookPlan | None = None

    @property
    def groups(self) -> tuple[GroupPlan, ...]:
        return tuple(g for p in self.pools for g in p.groups)

    def pool(self, name: str) -> PoolPlan:
        return next(p for p in self.pools if p.name == name)

    def pool_of(self, group_id: str) -> PoolPlan:
        """Return the pool of a group; KeyError when the run has no such group."""
        return self.pool(self.group(group_id).pool)

    def group(self, group_id: str) -> GroupPlan:
        """Return the group; KeyError when the run has no such group."""
        for group in self.groups:
            if group.id == group_id:
                return group
        raise KeyError(group_id)
