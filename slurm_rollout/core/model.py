"""The values that decisions are made of: state, observation, actions, events. Pure.

`decide(plan, state, observation)` turns these into a `Decision`. Times called `…_at`, `now`, `since` are seconds of the
batch host's monotonic clock, which goes on when a coordinator is replaced; `wall` is Unix time and only for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from slurm_rollout.core.failure_classes import FailureClass
from slurm_rollout.core.phases import Phase, PoolPhase, Reason

# --------------------------------------------------------------------------------------------------------------- state


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an incarnation ended, as far as it was seen."""

    reason: Reason
    message: str
    incarnation: int
    at: float
    wall: float
    rank: int | None = None
    node: str = ""
    startup: bool = False  # before it was ready: counted apart
    kind: FailureClass | None = None  # None: noted by an older version
    restarted_peers: tuple[int, ...] = ()  # healthy ranks that end and restart because of it


@dataclass(frozen=True, slots=True, kw_only=True)
class StepState:
    """One step of the current incarnation: the srun (local backend: the agent) that holds it."""

    node: str
    pid: int | None = None  # None: intent written, process not known (yet)
    pid_started: int = 0  # start time of that pid in clock ticks, so that a reused pid is not taken for it
    sweep: bool = False  # a fencing step: it ends leftovers and starts no engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """When the stages of the last recovery were reached, for events. None: not yet."""

    seen_at: float | None = None
    stopped_at: float | None = None
    fenced_at: float | None = None  # ports refuse connections
    launched_at: float | None = None
    go_at: float | None = None  # every agent reported its node fenced
    ready_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one member runs since its group moved."""

    node: str
    ports: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupState:
    """All that is remembered of one group."""

    id: str
    phase: Phase = Phase.PENDING
    since: float = 0.0
    since_wall: float = 0.0
    reason: Reason = Reason.NONE
    message: str = ""
    incarnation: int = 0  # the newest that was started; 0: none yet
    steps: tuple[StepState, ...] = ()
    goes_to: Phase = Phase.FENCING  # where STOPPING leads: FENCING (restart), FAILED
    not_before: float = 0.0  # no launch earlier
    stop_sent_at: float | None = None
    cancel_sent_at: float | None = None
    go_sent_at: float | None = None
    sweep_sent_at: float | None = None
    snapshot_sent_at: float | None = None  # a hung group: its agents write down what they see before it is stopped
    failure: Failure | None = None  # the last one
    charge: Failure | None = None  # a failure not yet charged; it is at the next launch, never at the job's end
    runtime_failures: tuple[float, ...] = ()  # times of charged failures, within the budget's window
    start_failures: tuple[float, ...] = ()
    disk_failures: tuple[float, ...] = ()  # charged to nobody: they only make the backoff grow
    restarts: int = 0  # launches after the first, for any reason
    marks: Marks = field(default_factory=Marks)
    slow: bool = False  # answers late, progresses: an event, never a restart
    weights_version: int | None = None  # that the trainer acknowledged for this incarnation
    changed: int = 0  # the epoch in which an incarnation of it last came or went
    start_s: float | None = None  # from its last launch that led to ready until then
    places: tuple[Place, ...] = ()  # by rank; empty: where the plan has it (`core.moves`)
    retired: tuple[str, ...] = ()  # "address:port" that an incarnation on a lost node may still use
    node_failures: int = 0  # incarnations that ended with a node; no budget counts them
    hopeless: bool = False  # it waits for a node, and too many of the fleet's are out of the job for good


@dataclass(frozen=True, slots=True, kw_only=True)
class LostStep:
    """A step that was on a node when that was lost. It may live; it is cancelled when the node is back."""

    group: str
    incarnation: int
    node: str
    name: str
    pid: int | None = None
    cancel_sent_at: float | None = None


class Exclusion(StrEnum):
    """Why a node is not used."""

    NONE = ""
    LOST = "lost"  # silent, or down for Slurm, with a step on it that could not be ended
    GONE = "gone"  # Slurm took it out of the job: it does not come back in this one
    STUCK = "stuck"  # it answers, and a step there does not end
    FAILING = "failing"  # launches or checks failed there again and again
    DRAINED = "drained"  # an operator wants it so


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    """What is remembered of a node that is not as it should be."""

    name: str
    excluded: Exclusion = Exclusion.NONE
    message: str = ""
    since: float = 0.0
    since_wall: float = 0.0
    back: bool = False  # it was lost, answers again, and nothing of before lives on it
    failures: int = 0  # launches and checks in a row that failed on it
    draining: str = ""  # Slurm's reason, while Slurm drains it
    drained: str = ""  # an operator's wish, until he takes it back


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientState:
    """What a trainer's client said last, and how far that is so."""

    id: str
    seq: int = 0  # the newest word that was heard
    heard_at: float = 0.0
    phase: str = ""  # "generating", "training", "syncing"; empty: it never announced one
    phase_since: float | None = None  # when that was echoed first; None: not yet
    hold_s: float = 0.0  # a hold is asked for or kept; expires so long after `heard_at`
    waiting_s: float = 0.0  # it sits in `wait_ready`; that word holds for so long after `heard_at`
    hold: bool = False  # granted
    echo: int = 0  # the newest word of which everything is so
    acks: int = 0  # acknowledgements taken in


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """All that is remembered of the run; written to `state.json` before anything is done about it."""

    run_id: str  # unique; in the environment mark of every process of the run
    job: str
    restart_count: int
    term: int
    epoch: int = 0
    groups: tuple[GroupState, ...] = ()
    serving: tuple[tuple[str, int], ...] = ()  # (group, incarnation) that may serve in this epoch
    alive: tuple[tuple[str, int], ...] = ()  # that have URLs in it: those that serve, and the stale ones
    nodes: tuple[NodeState, ...] = ()
    lost_steps: tuple[LostStep, ...] = ()
    clients: tuple[ClientState, ...] = ()
    paused: tuple[str, ...] = ()  # pools of whose engines nothing is asked, because a client said so
    pauses: Mapping[str, int] = field(default_factory=dict)  # pool -> how often that began
    targets: Mapping[str, int] = field(default_factory=dict)  # trained pool -> the weights version that serves
    pools_once_ready: tuple[str, ...] = ()
    started_at: float = 0.0
    ending: Reason = Reason.NONE  # OPERATOR, RUN_ENDING or JOB_ENDING once the run drains
    ending_at: float = 0.0
    phase: PoolPhase = PoolPhase.WAITING
    blind_since: float | None = None  # Slurm does not answer
    suspect_self_since: float | None = None  # most groups time out at once: the coordinator is the suspect
    suspect_self_told: bool = False

    def group(self, group_id: str) -> GroupState:
        """Return the group; KeyError when the run has no such group."""
        for group in self.groups:
            if group.id == group_id:
                return group
        raise KeyError(group_id)

    def node(self, name: str) -> NodeState:
        """Return what is remembered of a node; of most there is nothing to remember."""
        return next((n for n in self.nodes if n.name == name), NodeState(name=name))


# --------------------------------------------------------------------------------------------------------- observation


class Process(StrEnum):
    """What is known of the process that holds a step on the batch host."""

    RUNNING = "running"
    EXITED = "exited"
    QUEUED = "queued"  # it is not started yet: as many as may are being launched
    UNKNOWN = "unknown"  # the process of an intent was not found, or not looked for yet


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecord:
    """The agent's last word: its members are all dead when it says this."""

    cause: str  # see docs/agent-protocol.md
    message: str
    rank: int | None = None
    code: int | None = None
    signal: int | None = None
    oom: bool = False
    disk: str = ""  # the file system that is full, in words; empty: none, as far as the agent saw
    hardware: str = ""  # what the driver says of a broken GPU; empty: nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class StepObservation:
    """One step of the group's current incarnation, as seen now."""

    node: str
    sweep: bool = False
    process: Process = Process.UNKNOWN
    pid: int | None = None
    pid_started: int = 0
    launched_at: float | None = None  # when the process was started
    exited_at: float | None = None  # when the process was first seen gone, or looked for and not found
    exit_code: int | None = None
    stderr: str = ""  # the last lines srun wrote: while its agent has not spoken, and when it left no word
    spoke: bool = False  # the agent's first report arrived
    fenced: bool = False
    waiting_for: str = ""  # what its fence waits for, with the holder where it can be seen
    started: tuple[int, ...] | None = None  # ranks whose engine process was started
    listening: tuple[int, ...] = ()  # ranks whose HTTP socket is held by the agent's own tree
    stranger: str = ""  # who holds an entrypoint's socket, where it is not the agent's tree
    failing: Mapping[int, int] = field(default_factory=dict)  # rank -> node-local probe failures in a row
    snapshot: bool = False  # the agent wrote down what its engines' processes were doing
    pause: int | None = 0  # in which pause its agent asks its engines nothing; 0: in none; None: it has none to ask
    exit: ExitRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """What the probes of one entrypoint add up to (see `core.health`)."""

    rank: int
    proved: bool = False  # one complete readiness check succeeded
    mismatch: str = ""  # it answers, but as something other than planned
    failures: int = 0  # liveness failures in a row, progress taken into account
    refusals: int = 0  # answers in a row that say "no" (a status, a wrong body, a refused connection)
    slow: bool = False  # late in a row, but the progress counter moves
    last_error: str = ""
    last_counter: float | None = None
    first_failure_at: float | None = None  # when the first probe of that row began
    asked_at: float | None = field(default=None, compare=False)  # when its first readiness probe began, for events
    # Of the newest probe alone, not a sum: False also while a new coordinator has not looked yet.
    answers: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupObservation:
    """One group. `ports_open` is None while its ports were not all checked since nothing of it lives."""

    id: str
    incarnation: int  # what this was observed of; facts of another incarnation are not facts
    steps: tuple[StepObservation, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    ports_open: tuple[str, ...] | None = None  # "address:port" that accept a connection
    probes_paused: bool = False  # the coordinator asks its engines nothing, and no liveness probe is on its way


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One valid answer to "which steps live in this job?". Steps are known by job name and by srun's pid."""

    asked_at: float
    names: frozenset[str]
    pids: frozenset[int]


class NodeWord(StrEnum):
    """What Slurm says of a node."""

    UNKNOWN = ""
    UP = "up"
    DRAINING = "draining"  # it goes on with what it has
    SILENT = "silent"  # not responding, and not yet given up
    DOWN = "down"
    GONE = "gone"  # not in the job any more


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeObservation:
    """One node, as seen from here and by Slurm."""

    name: str
    answered_at: float | None = None  # a connection to it was last accepted or refused
    silent_s: float = 0.0  # for so long since then every connection was tried in vain
    word: NodeWord = NodeWord.UNKNOWN
    reason: str = ""  # Slurm's
    asked_at: float | None = None  # when the question was asked that `word` answers


class Job(StrEnum):
    RUNNING = "running"
    ENDING = "ending"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An operator's wish, from a file in `requests/`."""

    id: str
    verb: str  # "restart", "drain", "resume", "stop"
    groups: tuple[str, ...] = ()  # or names of nodes
    who: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """A trainer's word that it pushed a version of the weights into these incarnations."""

    n: int  # counts from 1 for each client
    version: int
    groups: tuple[tuple[str, int], ...]
    rollback: bool = False  # the version may be lower than the last one


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientWords:
    """What a client's files say now (docs/barrier.md)."""

    id: str
    seq: int = 0
    phase: str = ""
    hold_s: float = 0.0
    waiting_s: float = 0.0
    acks: tuple[Ack, ...] = ()  # in order; those that were taken in already may be left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The world, once per tick. Whatever is missing was not observed."""

    now: float
    wall: float
    groups: tuple[GroupObservation, ...] = ()
    nodes: tuple[NodeObservation, ...] = ()  # of those that were looked at
    listing: Listing | None = None  # the newest valid one
    listing_failed_at: float | None = None  # the newest question that got no valid answer
    unanswered_asked_at: float | None = None  # when that question was asked
    job: Job = Job.UNKNOWN
    job_asked_at: float | None = None  # when the question was asked that `job` answers
    requests: tuple[Request, ...] = ()
    clients: tuple[ClientWords, ...] = ()
    stop_signal: bool = False
    end_is_near: bool = False  # the signal to stop was a warning that Slurm sends before it ends the job
    job_ends_at: float | None = None  # by the time limit, as it was known last; None: unknown, or it has no end

    def group(self, group_id: str) -> GroupObservation | None:
        return next((g for g in self.groups if g.id == group_id), None)

    def node(self, name: str) -> NodeObservation:
        """Return what was seen of a node; a value without facts where it was not looked at."""
        return next((n for n in self.nodes if n.name == name), NodeObservation(name=name))


# ------------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Start a step per node. With `sweep`, on `nodes`: only end leftovers there and report who holds the ports."""

    group: str
    incarnation: int
    nodes: tuple[str, ...]
    sweep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Go:
    """Every agent has fenced its node: start the engines (SIGUSR2)."""

    group: str
    incarnation: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The group hangs: agents write down what its processes are doing, before they are ended (SIGUSR2 after go)."""

    group: str
    incarnation: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Agents end their trees (SIGUSR1)."""

    group: str
    incarnation: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """What the agents did not end is cancelled by Slurm; the shell puts all of one tick into one scancel call."""

    group: str
    incarnation: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelLost:
    """A lost node answers again: what still lives on it of before is cancelled."""

    steps: tuple[LostStep, ...]


Action = Launch | Go | Snapshot | Stop | Cancel | CancelLost


EVENT_TYPES = (
    *("up", "takeover", "launching", "go", "ready", "fence_waits", "slow", "unready", "failure", "snapshot", "stopped"),
    *("fenced", "waiting", "failed", "blind", "sighted", "epoch", "weights", "ack_refused", "phase", "hold"),
    *("hold_expired", "probes", "request", "request_refused", "ending", "drained", "ended"),
    *("node_excluded", "node_back", "node_draining", "moved"),
)
"""Every type of event; docs/troubleshooting.md says what each means."""

PAGED_TYPES = (
    *("up", "takeover", "ready", "unready", "failure", "failed", "fence_waits", "blind", "sighted", "request"),
    *("request_refused", "ack_refused", "hold_expired", "ending", "ended"),
    *("node_excluded", "node_back", "node_draining", "moved"),
)
"""What `on_event` is told of unless the spec says otherwise: all but a recovery's stages and the trainer's routine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of `events.<term>.jsonl`."""

    type: str
    group: str = ""
    incarnation: int = 0
    reason: str = ""
    message: str = ""
    rank: int | None = None
    node: str = ""
    data: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """What the shell should find out next; asking costs, so only what a decision waits for."""

    ports: tuple[str, ...] = ()  # groups whose ports to connect to
    listing: bool = False
    job: bool = False
    nodes: bool = False  # what Slurm says of the fleet's nodes
    reach: tuple[str, ...] = ()  # nodes to connect to


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    state: RunState
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    wants: Wants = field(default_factory=Wants)
    wake_at: float | None = None  # the next moment at which time alone changes a decision
