"""What the truth is made of: engines, incarnations, steps, nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from slurm_rollout.core.plan import GroupPlan, Member
from slurm_rollout.steps import Key


class Weights(NamedTuple):
    """What a trainer calls a version; after it went back, the same number stands for other weights."""

    version: int
    line: int


class Engine:
    """One server process (with its children)."""

    __slots__ = (
        *("alive", "detached", "frozen", "half", "incarnation"),
        *("killed", "listens", "member", "unkillable_until", "up"),
    )

    def __init__(self, member: Member, incarnation: Incarnation) -> None:
        self.member = member
        self.incarnation = incarnation
        self.alive = True
        self.listens = False
        self.up = False
        self.frozen = False  # SIGSTOP, or an all-to-all that waits for ever
        self.half = False  # HTTP lives, generation is dead
        self.killed = False
        self.detached = False  # it outlives an agent that is killed, and its step
        self.unkillable_until = 0.0  # in the kernel, with its ports and its GPU memory


class Incarnation:
    """The truth about one start of a group."""

    def __init__(self, plan: GroupPlan, number: int, load_s: float) -> None:
        self.plan = plan
        self.number = number
        self.load_s = load_s
        self.steps: dict[str, Step] = {}
        self.engines: dict[int, Engine] = {}
        self.works = False
        self.changed_at = 0.0  # of `works`
        self.worked_at: float | None = None  # for the first time
        self.busy_until = 0.0  # saturated: answers come late, work goes on
        self.refuses_until = 0.0
        self.proved: set[int] = set()  # ranks that answered a real request
        self.hurt_at: dict[str, float] = {}  # what was done to it, and when last
        self.weights: Weights | None = None  # that are really in all of it; None: its own, or half of a push
        self.pushed: set[Weights] = set()
        self.unsettled = False  # something was pushed of which the trainer does not know yet that it is acknowledged
        self.asleep = False  # nothing may be asked of it: older vLLM dies of that
        self.slept_at = self.woke_at = float("-inf")
        self.disowned = False  # nobody promised to let it sleep: its `up` is over, or the pause was

    @property
    def id(self) -> tuple[str, int]:
        return self.plan.id, self.number

    def hurt(self, how: str, now: float) -> None:
        self.hurt_at[how] = now


class Step:
    """One srun and what it started."""

    def __init__(
        self,
        key: Key,
        plan: GroupPlan,
        name: str,
        pid: int,
        term: int,
        incarnation: Incarnation,
        now: float,
        absent: Mapping[str, int],
    ) -> None:
        self.key = key
        self.absent = absent  # groups that were not on this node when it was launched -> their incarnations
        self.plan = plan  # as its group stood when it was launched: a sweep's may be another than its incarnation's
        self.name = name
        self.pid = pid
        self.term = term
        self.incarnation = incarnation
        self.launched_at = now
        self.srun_lives = True
        self.srun_linked = True  # False: nothing that the agent says arrives any more
        self.code: int | None = None
        self.ended_at: float | None = None  # of srun
        self.stderr = ""
        self.agent = "none"  # none, fencing, fenced, serving, ending, dead
        self.listed = False
        self.kill_on_return = False  # told to a node that cannot hear it
        self.reports: list[dict[str, Any]] = []  # in srun's output file
        self.unsent: list[dict[str, Any]] = []
        self.waits_for = ""
        self.snapshot_taken = False
        self.was_fenced = False
        self.heard_at: float | None = None  # the newest heartbeat that its agent saw, once it saw one come

    @property
    def engines(self) -> list[Engine]:
        return [e for e in self.incarnation.engines.values() if e.member.node == self.key.node and not self.key.sweep]

    @property
    def lives(self) -> bool:
        """Whether an agent or an engine of it really lives."""
        return self.agent not in ("none", "dead") or any(e.alive for e in self.engines)

    @property
    def goes_on(self) -> bool:
        """Whether it lives, and not only as a process that Slurm could not end and has forgotten."""
        return self.agent not in ("none", "dead") or (self.listed and self.lives)


@dataclass(slots=True)
class Node:
    name: str
    cut: bool = False  # off the network; what runs there goes on
    cut_at: float = 0.0
    lost: bool = False  # Slurm gave it up: no step of this job starts there again
    lost_at: float = 0.0
    back_at: float = float("-inf")
    draining: str = ""  # Slurm's reason
    sick_until: float = 0.0  # whatever is started there fails
    sickness: str = ""  # how
    sick_at: float = float("-inf")  # it was last
    unkillable_until: float = 0.0  # of any process there, also of one that is gone
    completing_until: float = 0.0  # steps that ended there stay listed
    deaf_until: float = 0.0  # agents there hear no signal
    late_until: float = 0.0  # signals take seconds
    gpu_stuck_until: float = 0.0
    strangers: dict[int, float] = field(default_factory=dict)  # port -> held until
    engines: list[Engine] = field(default_factory=list)  # living ones
    claims: dict[str, set[int]] = field(default_factory=dict)
    agents: list[Step] = field(default_factory=list)  # living ones
