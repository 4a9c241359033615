"""A world in memory for the decision code: steps, agents, probes and Slurm as values that a test turns by hand.

`World` feeds `decide` and performs its actions at once: a launched step runs, a stopped one ends. What a test wants
to go otherwise it says (`world.deaf`, `world.kill`, `world.blind`). No clock, no process, no file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from slurm_rollout.core.decide import decide
from slurm_rollout.core.model import (
    Cancel,
    Decision,
    Endpoint,
    Event,
    ExitRecord,
    Go,
    GroupObservation,
    GroupState,
    Job,
    Launch,
    Listing,
    Observation,
    Process,
    Request,
    RunState,
    StepObservation,
    Stop,
)
from slurm_rollout.core.names import step_name
from slurm_rollout.core.phases import Phase
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


def make_plan(
    groups: int = 2,
    nodes_per_group: int = 2,
    *,
    min_ready: int = 1,
    entrypoints: str = "all",
    probe: ProbePolicy | None = None,
    restart: RestartPolicy | None = None,
    stop: StopPolicy | None = None,
    fence: FencePolicy | None = None,
) -> FleetPlan:
    """Return a plan of one pool `actor`: a member a node, nodes n0, n1, …"""
    made = []
    for index in range(groups):
        nodes = [f"n{index * nodes_per_group + i}" for i in range(nodes_per_group)]
        members = tuple(
            Member(
                rank=rank,
                node=node,
                local_rank=0,
                gpus=(),
                ports={"http": 18000, "master": 18001},
                entrypoint=entrypoints == "all" or rank == 0,
                url=f"http://{node}:18000",
                argv=("engine",),
                variables={},
            )
            for rank, node in enumerate(nodes)
        )
        made.append(
            GroupPlan(
                id=f"actor/{index}",
                pool="actor",
                members=members,
                addresses={n: n for n in nodes},
                cpus_per_step=dict.fromkeys(nodes, 1),
                gpus_per_step=dict.fromkeys(nodes, 0),
                unshared_gpus=True,
            )
        )
    pool = PoolPlan(
        name="actor",
        groups=tuple(made),
        min_ready=min_ready,
        weights="frozen",
        engine="command",
        named_ports=(),
        env=Environment(),
        probe=probe or ProbePolicy(request=ProbeRequest()),
        restart=restart or RestartPolicy(),
        stop=stop or StopPolicy(),
        fence=fence or FencePolicy(),
    )
    return FleetPlan(
        name="run",
        backend="slurm",
        pools=(pool,),
        nodes=tuple(n for g in made for n in g.nodes),
        spares=(),
        trainer_nodes=(),
        slurm=SlurmSettings(),
    )


@dataclass(slots=True)
class World:
    """Steps that do as they are told, unless a test says otherwise."""

    plan: FleetPlan
    state: RunState = field(init=False)
    now: float = 1000.0
    steps: dict[tuple[str, int, str, bool], StepObservation] = field(default_factory=dict)
    endpoints: dict[tuple[str, int, int], Endpoint] = field(default_factory=dict)
    ports_open: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    listing: Listing | None = None
    listing_failed_at: float | None = None
    job: Job = Job.UNKNOWN
    job_asked_at: float | None = None
    requests: list[Request] = field(default_factory=list)
    stop_signal: bool = False
    blind: bool = False
    deaf: set[str] = field(default_factory=set)  # nodes whose agents do not hear signals
    decisions: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = RunState(
            run_id="r",
            job="1",
            restart_count=0,
            term=1,
            groups=tuple(GroupState(id=g.id, since=self.now) for g in self.plan.groups),
            started_at=self.now,
        )

    # ------------------------------------------------------------------------------------------------------- the loop

    def observe(self) -> Observation:
        """Return the world as it is now."""
        return Observation(
            now=self.now,
            wall=1.7e9 + self.now,
            groups=tuple(
                GroupObservation(
                    id=g.id,
                    incarnation=g.incarnation,
                    steps=tuple(s for k, s in self.steps.items() if k[:2] == (g.id, g.incarnation) and k[2:] in _of(g)),
                    endpoints=tuple(e for k, e in self.endpoints.items() if k[:2] == (g.id, g.incarnation)),
                    ports_open=self.ports_open.get(g.id, ()) if g.phase is Phase.FENCING else None,
                )
                for g in self.state.groups
            ),
            listing=self.listing,
            listing_failed_at=self.listing_failed_at,
            job=self.job,
            job_asked_at=self.job_asked_at,
            requests=tuple(self.requests),
            stop_signal=self.stop_signal,
        )

    def tick(self, after_s: float = 0.01) -> Decision:
        """Let time pass, decide once, and do what was decided."""
        self.now += after_s
        decision = decide(self.plan, self.state, self.observe())
        self.requests.clear()
        self.state = decision.state
        self.decisions.append(decision)
        for action in decision.actions:
            match action:
                case Launch():
                    self._launch(action)
                case Stop():
                    self._stop(action.group, action.incarnation, [n for n in action.nodes if n not in self.deaf])
                case Cancel():
                    self._stop(action.group, action.incarnation, action.nodes)
                case Go():
                    for node in action.nodes:
                        if node not in self.deaf:
                            ranks = tuple(m.rank for m in self.plan.group(action.group).on(node))
                            self.change(action.group, node, started=ranks, listening=ranks)
        if not self.blind:
            if decision.wants.listing:
                self.list()
            if decision.wants.job:
                self.ask_job(self.job if self.job is not Job.UNKNOWN else Job.RUNNING)
        elif decision.wants.listing or decision.wants.job:
            self.listing_failed_at = self.now
        return decision

    def run_until(self, done: object, *, ticks: int = 200, after_s: float = 0.01) -> None:
        """Tick until `done` is true (a callable), or fail."""
        assert callable(done)
        for _ in range(ticks):
            if done():
                return
            self.tick(after_s)
        raise AssertionError(f"not reached: {[(g.id, g.phase.value, g.message) for g in self.state.groups]}")

    def make_ready(self) -> None:
        """Bring every group up: agents fence, engines start, probes succeed."""
        self.run_until(lambda: self.phases() == {Phase.STARTING})
        for group in self.plan.groups:
            self.fence(group.id)
        self.tick()
        for group in self.plan.groups:
            self.prove(group.id)
        self.run_until(lambda: self.phases() == {Phase.READY})

    def phases(self) -> set[Phase]:
        return {g.phase for g in self.state.groups}

    def group(self, index: int = 0) -> GroupState:
        return self.state.groups[index]

    def events(self, type_: str = "") -> list[Event]:
        """Return every event so far, or those of one type."""
        return [e for d in self.decisions for e in d.events if not type_ or e.type == type_]

    def actions(self, kind: type) -> list[object]:
        """Return every action of one kind so far."""
        return [a for d in self.decisions for a in d.actions if isinstance(a, kind)]

    # ------------------------------------------------------------------------------------------------- what agents do

    def change(self, group: str, node: str, *, sweep: bool = False, **facts: object) -> None:
        """Change what is observed of a step of the current incarnation."""
        key = (group, self.state.group(group).incarnation, node, sweep)
        self.steps[key] = replace(self.steps[key], **facts)  # type: ignore[arg-type]  # any field of the observation

    def fence(self, group: str) -> None:
        """Every agent of the group reports its node fenced."""
        for node in self.plan.group(group).nodes:
            self.change(group, node, spoke=True, fenced=True)

    def prove(self, group: str) -> None:
        """Every entrypoint of the current incarnation answers a real request."""
        for member in self.plan.group(group).entrypoints:
            self.probe(group, member.rank, proved=True)

    def probe(self, group: str, rank: int, **facts: object) -> None:
        """Change what the probes of one entrypoint add up to."""
        key = (group, self.state.group(group).incarnation, rank)
        self.endpoints[key] = replace(self.endpoints.get(key, Endpoint(rank=rank)), **facts)  # type: ignore[arg-type]

    def kill(self, group: str, rank: int, code: int = 1) -> None:
        """An engine ends by itself; its agent says so and ends too."""
        node = self.plan.group(group).members[rank].node
        record = ExitRecord(cause="engine_exited", message=f"exit code {code}", rank=rank, code=code)
        self.change(group, node, exit=record, process=Process.EXITED, exited_at=self.now, exit_code=80)

    def vanish(self, group: str, node: str, code: int = 1) -> None:
        """srun ends and the agent left no word: nobody knows whether the step lives."""
        self.change(group, node, process=Process.EXITED, exited_at=self.now, exit_code=code)

    def list(self, *also: str) -> None:
        """Slurm answers which steps live: those whose srun runs, and `also` these names."""
        names = {
            step_name(self.plan, g, n, node, sweep=sweep)
            for (g, n, node, sweep), s in self.steps.items()
            if s.process is Process.RUNNING and s.exit is None
        }
        self.listing = Listing(asked_at=self.now, names=frozenset(names | set(also)), pids=frozenset())

    def ask_job(self, job: Job) -> None:
        """Slurm answers what the job's state is."""
        self.job, self.job_asked_at = job, self.now

    def ask(self, verb: str, *groups: str) -> None:
        """An operator's request."""
        self.requests.append(Request(id=f"{verb}-{len(self.decisions)}", verb=verb, groups=groups, who="me"))

    def _launch(self, action: Launch) -> None:
        for node in action.nodes:
            pid = 100 + len(self.steps)
            self.steps[action.group, action.incarnation, node, action.sweep] = StepObservation(
                node=node, sweep=action.sweep, process=Process.RUNNING, pid=pid, pid_started=pid
            )

    def _stop(self, group: str, incarnation: int, nodes: Iterable[str]) -> None:
        for node in nodes:
            for sweep in (False, True):
                key = (group, incarnation, node, sweep)
                if key in self.steps and self.steps[key].exit is None:
                    self.steps[key] = replace(
                        self.steps[key],
                        exit=ExitRecord(cause="stopped", message="as asked"),
                        process=Process.EXITED,
                        exited_at=self.now,
                        exit_code=0,
                    )


def _of(g: GroupState) -> set[tuple[str, bool]]:
    return {(s.node, s.sweep) for s in g.steps}
