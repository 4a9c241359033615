"""A world in memory for the decision code: steps, agents, probes and Slurm as values that a test turns by hand.

`World` feeds `decide` and performs its actions at once: a launched step runs, a stopped one ends. What a test wants
to go otherwise it says (`world.deaf`, `world.kill`, `world.blind`). No clock, no process, no file.

What is observed and what is true are two things here: `steps` holds what the coordinator can see, `living` tells what
really lives. `orphans` are the difference: steps that live on although their srun is gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from slurm_rollout.core import codec, moves
from slurm_rollout.core.decide import decide
from slurm_rollout.core.model import (
    Ack,
    Cancel,
    CancelLost,
    ClientWords,
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
    NodeObservation,
    NodeWord,
    Observation,
    Process,
    Request,
    RunState,
    Snapshot,
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
    Host,
    Member,
    PoolPlan,
    ProbePolicy,
    ProbeRequest,
    RestartPolicy,
    SlurmSettings,
    StopPolicy,
)

A = TypeVar("A", Launch, Go, Snapshot, Stop, Cancel, CancelLost)

Key = tuple[str, int, str, bool]
"""One step: group, incarnation, node, whether it is a sweep."""


def make_plan(
    groups: int = 2,
    nodes_per_group: int = 2,
    *,
    pool: str = "actor",
    min_ready: int = 1,
    weights: str = "frozen",
    entrypoints: str = "all",
    named_ports: tuple[str, ...] = (),
    probe: ProbePolicy | None = None,
    restart: RestartPolicy | None = None,
    stop: StopPolicy | None = None,
    fence: FencePolicy | None = None,
    spares: int = 0,
) -> FleetPlan:
    """Return a plan of one pool: a member a node, nodes n0, n1, …, then the spares."""
    used = groups * nodes_per_group
    fleet = tuple(f"n{i}" for i in range(used + spares))
    made = []
    for index in range(groups):
        nodes = [f"n{index * nodes_per_group + i}" for i in range(nodes_per_group)]
        members = tuple(
            Member(
                rank=rank,
                node=node,
                local_rank=0,
                gpus=(),
                ports={"http": 18000, "master": 18001} | {name: 18002 + i for i, name in enumerate(named_ports)},
                entrypoint=entrypoints == "all" or rank == 0,
                url=f"http://{node}:18000",
                argv=("engine",),
                variables={},
            )
            for rank, node in enumerate(nodes)
        )
        made.append(
            GroupPlan(
                id=f"{pool}/{index}",
                pool=pool,
                members=members,
                addresses={n: n for n in nodes},
                cpus_per_step=dict.fromkeys(nodes, 1),
                gpus_per_step=dict.fromkeys(nodes, 0),
                unshared_gpus=True,
            )
        )
    planned = PoolPlan(
        name=pool,
        groups=tuple(made),
        min_ready=min_ready,
        weights=weights,
        engine="command",
        named_ports=named_ports,
        env=Environment(),
        probe=probe or ProbePolicy(request=ProbeRequest()),
        restart=restart or RestartPolicy(),
        stop=stop or StopPolicy(),
        fence=fence or FencePolicy(),
    )
    return FleetPlan(
        name="run",
        backend="slurm",
        pools=(planned,),
        nodes=fleet,
        hosts={n: Host(address=n, ip=n, cpus=1, gpus=0) for n in fleet},
        spares=fleet[used:],
        trainer_nodes=(),
        slurm=SlurmSettings(),
    )


@dataclass(slots=True)
class World:
    """Steps that do as they are told, unless a test says otherwise."""

    plan: FleetPlan
    state: RunState = field(init=False)
    now: float = 1000.0
    steps: dict[Key, StepObservation] = field(default_factory=dict)
    endpoints: dict[tuple[str, int, int], Endpoint] = field(default_factory=dict)
    ports_open: dict[str, tuple[str, ...] | None] = field(default_factory=dict)  # by group; None: not looked at yet
    listing: Listing | None = None
    listing_failed_at: float | None = None
    unanswered_asked_at: float | None = None
    job: Job = Job.UNKNOWN
    job_asked_at: float | None = None
    requests: list[Request] = field(default_factory=list)
    clients: dict[str, ClientWords] = field(default_factory=dict)
    probing: set[str] = field(default_factory=set)  # groups with a probe that stays on its way
    stop_signal: bool = False
    end_is_near: bool = False
    job_ends_at: float | None = None
    blind: bool = False  # Slurm does not answer
    crowded: bool = False  # new sruns wait for their turn
    deaf: set[str] = field(default_factory=set)  # nodes whose agents do not hear signals
    undying: set[str] = field(default_factory=set)  # nodes where not even Slurm ends a step; its srun ends all the same
    orphans: set[Key] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)  # nodes off the network: what runs there goes on
    words: dict[str, NodeWord] = field(default_factory=dict)  # what Slurm says of nodes; up, where nothing is said here
    nodes: dict[str, NodeObservation] = field(default_factory=dict)  # what was seen of them
    names: dict[Key, str] = field(default_factory=dict)  # of the steps
    decisions: list[Decision] = field(default_factory=list)
    launched: int = 0

    def __post_init__(self) -> None:
        self.state = RunState(
            run_id="r",
            job="1",
            restart_count=0,
            term=1,
            groups=tuple(GroupState(id=g.id, since=self.now) for g in self.plan.groups),
            started_at=self.now,
        )

    @property
    def placed(self) -> FleetPlan:
        """The plan as it stands now."""
        return moves.placed(self.plan, self.state)

    # ------------------------------------------------------------------------------------------------------- the loop

    def observe(self) -> Observation:
        """Return the world as the coordinator sees it now."""
        return Observation(
            now=self.now,
            wall=1.7e9 + self.now,
            groups=tuple(
                GroupObservation(
                    id=g.id,
                    incarnation=g.incarnation,
                    steps=tuple(self.steps[k] for k in self._watched(g)),
                    endpoints=tuple(e for k, e in self.endpoints.items() if k[:2] == (g.id, g.incarnation)),
                    ports_open=self.ports_open.get(g.id, ()) if g.phase is Phase.FENCING else None,
                    probes_paused=self._rests(g.id) and g.id not in self.probing,
                )
                for g in self.state.groups
            ),
            nodes=tuple(self.nodes.values()),
            listing=self.listing,
            listing_failed_at=self.listing_failed_at,
            unanswered_asked_at=self.unanswered_asked_at,
            job=self.job,
            job_asked_at=self.job_asked_at,
            requests=tuple(self.requests),
            clients=tuple(self.clients.values()),
            stop_signal=self.stop_signal,
            end_is_near=self.end_is_near,
            job_ends_at=self.job_ends_at,
        )

    def _rests(self, group: str) -> bool:
        return self.plan.group(group).pool in self.state.paused

    def _pause(self, group: str) -> int:
        return self.state.pauses[self.plan.group(group).pool] if self._rests(group) else 0

    def _watched(self, g: GroupState) -> list[Key]:
        """The steps of the state, and those whose srun lingers after their agent's last word."""
        wanted = {(s.node, s.sweep) for s in g.steps}
        return [
            k
            for k, s in self.steps.items()
            if k[:2] == (g.id, g.incarnation) and (k[2:] in wanted or s.process is Process.RUNNING)
        ]

    def tick(self, after_s: float = 0.01, *, act: bool = True) -> Decision:
        """Let time pass, decide once, and do what was decided; without `act` the coordinator dies before it acts."""
        self.now += after_s
        decision = decide(self.plan, self.state, self.observe())
        self.requests.clear()
        self.state = decision.state
        self.decisions.append(decision)
        if not act:
            return decision
        for action in decision.actions:
            if isinstance(action, CancelLost):
                self._cancel_lost(action)
                continue
            for node in action.nodes:
                self._perform(action, node)
        for name in decision.wants.reach:
            self._try(name, after_s)
        if self.blind:
            if decision.wants.listing or decision.wants.job or decision.wants.nodes:
                self.listing_failed_at = self.now
        else:
            if decision.wants.nodes:
                self.ask_of_nodes()
            if decision.wants.listing:
                self.list_steps()
            if decision.wants.job:
                self.ask_job(self.job if self.job is not Job.UNKNOWN else Job.RUNNING)
        return decision

    def _try(self, name: str, waited_s: float) -> None:
        """Connect to a node."""
        seen = self.nodes.get(name, NodeObservation(name=name))
        if name in self.cut:
            self.nodes[name] = replace(seen, silent_s=seen.silent_s + waited_s)
        else:
            self.nodes[name] = replace(seen, answered_at=self.now, silent_s=0.0)

    def ask_of_nodes(self) -> None:
        """Slurm answers how the nodes are."""
        for name in self.plan.nodes:
            seen, word = self.nodes.get(name, NodeObservation(name=name)), self.words.get(name, NodeWord.UP)
            self.nodes[name] = replace(seen, word=word, reason="a reason", asked_at=self.now)

    def _perform(self, action: Launch | Go | Snapshot | Stop | Cancel, node: str) -> None:
        if isinstance(action, Launch):
            key = (action.group, action.incarnation, node, action.sweep)
            self.names[key] = step_name(self.placed, *key[:3], sweep=action.sweep)
            queued = StepObservation(node=node, sweep=action.sweep, process=Process.QUEUED)
            self.steps[key] = queued if self.crowded else self._begun(queued)
            return
        for sweep in (False, True):
            key = (action.group, action.incarnation, node, sweep)
            step = self.steps.get(key)
            if step is None or step.exit is not None:
                continue
            if isinstance(action, Cancel):
                self._cancel(key, step)
            elif isinstance(action, Stop) and step.process is Process.QUEUED:
                record = ExitRecord(cause="stopped", message="it was not started yet")
                self.steps[key] = replace(step, exit=record, process=Process.EXITED, exited_at=self.now)
            elif step.process is not Process.RUNNING or node in self.deaf | self.cut:
                continue
            elif isinstance(action, Snapshot):
                self.steps[key] = replace(step, snapshot=True)
            elif isinstance(action, Stop):
                record = ExitRecord(cause="stopped", message="as asked")
                self.steps[key] = replace(step, exit=record, process=Process.EXITED, exited_at=self.now, exit_code=0)
            elif not sweep:
                ranks = tuple(m.rank for m in self.placed.group(action.group).on(node))
                self.steps[key] = replace(step, started=ranks, listening=ranks)

    def _cancel_lost(self, action: CancelLost) -> None:
        for lost in action.steps:
            if lost.node not in self.undying | self.cut:
                self.orphans.discard((lost.group, lost.incarnation, lost.node, False))

    def _begun(self, step: StepObservation) -> StepObservation:
        self.launched += 1
        pid = 100 + self.launched
        return replace(step, process=Process.RUNNING, pid=pid, pid_started=pid, launched_at=self.now)

    def _cancel(self, key: Key, step: StepObservation) -> None:
        """Slurm kills at once: no last word of the agent."""
        if key[2] not in self.undying | self.cut:
            self.orphans.discard(key)
        elif step.process is Process.RUNNING:
            self.orphans.add(key)
        if step.process is Process.RUNNING:
            self.steps[key] = replace(step, process=Process.EXITED, exited_at=self.now, exit_code=137)

    def restart(self) -> None:
        """A new coordinator: the state as it was journalled, and of the steps only what a newcomer can find."""
        journal = json.loads(json.dumps(codec.encode(self.state)))
        state = codec.decode(RunState, journal)
        self.state = replace(state, term=state.term + 1, blind_since=None, suspect_self_since=None)
        self.endpoints.clear()
        self.listing, self.listing_failed_at, self.unanswered_asked_at = None, None, None
        self.job, self.job_asked_at = Job.UNKNOWN, None
        for g in self.state.groups:
            for known in g.steps:
                key = (g.id, g.incarnation, known.node, known.sweep)
                step = self.steps.get(key, StepObservation(node=known.node, sweep=known.sweep))
                if step.process is not Process.RUNNING:
                    found = Process.EXITED if known.pid is not None else Process.UNKNOWN
                    step = replace(step, process=found, pid=known.pid, exited_at=self.now)
                self.steps[key] = step

    def run_until(self, done: Callable[[], bool], *, ticks: int = 200, after_s: float = 0.01) -> None:
        """Tick until `done`, or fail."""
        for _ in range(ticks):
            if done():
                return
            self.tick(after_s)
        raise AssertionError(f"not reached: {[(g.id, g.phase.value, g.message) for g in self.state.groups]}")

    def heal(self, done: Callable[[], bool], *, ticks: int = 200) -> None:
        """Let healthy agents and engines work until `done`. Time passes only to the next moment that `decide` named."""
        for _ in range(ticks):
            if done():
                return
            decision = self.tick()
            asked = decision.actions or decision.wants.listing or decision.wants.job or decision.wants.nodes
            if not self.settle() and not asked and decision.wake_at is not None:
                self.now = max(self.now, decision.wake_at)
        raise AssertionError(f"not reached: {[(g.id, g.phase.value, g.message) for g in self.state.groups]}")

    def settle(self) -> bool:
        """Every healthy agent and engine does its next thing; tell whether any had something to do."""
        before = dict(self.steps), dict(self.endpoints)
        for g in self.state.groups:
            keys = self._watched(g)
            for key in keys:
                step = self.steps[key]
                if step.process is Process.QUEUED and not self.crowded:
                    self.steps[key] = step = self._begun(step)
                if step.process is not Process.RUNNING or step.exit is not None or step.node in self.deaf | self.cut:
                    continue
                if step.sweep:
                    if any(port.startswith(f"{step.node}:") for port in self.ports_open.get(g.id) or ()):
                        continue  # waits for it
                    record = ExitRecord(cause="swept", message="")
                    step = replace(step, exit=record, process=Process.EXITED, exited_at=self.now, exit_code=0)
                else:
                    step = replace(step, spoke=True, fenced=True, waiting_for="", pause=self._pause(g.id))
                self.steps[key] = step
            if keys and all(self.steps[k].started is not None for k in keys):
                for member in self.placed.group(g.id).entrypoints:
                    self.endpoints[g.id, g.incarnation, member.rank] = Endpoint(
                        rank=member.rank, proved=True, answers=True
                    )
        return before != (self.steps, self.endpoints)

    def make_ready(self) -> None:
        """Bring every group up: agents fence, engines start, probes succeed."""
        self.heal(lambda: self.phases() == {Phase.READY})

    # ------------------------------------------------------------------------------------------------------ what is so

    def phases(self) -> set[Phase]:
        return {g.phase for g in self.state.groups}

    def group(self, index: int = 0) -> GroupState:
        return self.state.groups[index]

    def living(self, group: str) -> set[int]:
        """Return the incarnations of which a step really lives, whatever was observed of it."""
        return {
            k[1]
            for k, s in self.steps.items()
            if k[0] == group and (k in self.orphans or (s.process is Process.RUNNING and s.exit is None))
        }

    def events(self, type_: str = "") -> list[Event]:
        """Return every event so far, or those of one type."""
        return [e for d in self.decisions for e in d.events if not type_ or e.type == type_]

    def actions(self, kind: type[A]) -> list[A]:
        """Return every action of one kind so far."""
        return [a for d in self.decisions for a in d.actions if isinstance(a, kind)]

    # ------------------------------------------------------------------------------------------------- what is done

    def change(self, group: str, node: str, *, sweep: bool = False, **facts: object) -> None:
        """Change what is observed of a step of the current incarnation."""
        key = self._key(group, node, sweep=sweep)
        self.steps[key] = replace(self.steps[key], **facts)  # type: ignore[arg-type]  # any field of the observation

    def _key(self, group: str, node: str, *, sweep: bool = False) -> Key:
        return group, self.state.group(group).incarnation, node, sweep

    def fence(self, group: str) -> None:
        """Every agent of the group reports its node fenced."""
        for node in self.placed.group(group).nodes:
            self.change(group, node, spoke=True, fenced=True)

    def prove(self, group: str) -> None:
        """Every entrypoint of the current incarnation answers a real request."""
        for member in self.placed.group(group).entrypoints:
            self.probe(group, member.rank, proved=True, answers=True)

    def probe(self, group: str, rank: int, **facts: object) -> None:
        """Change what the probes of one entrypoint add up to."""
        key = (group, self.state.group(group).incarnation, rank)
        self.endpoints[key] = replace(self.endpoints.get(key, Endpoint(rank=rank)), **facts)  # type: ignore[arg-type]

    def kill(self, group: str, rank: int, code: int = 1) -> None:
        """An engine ends by itself; its agent says so and ends too."""
        node = self.placed.group(group).members[rank].node
        record = ExitRecord(cause="engine_exited", message=f"exit code {code}", rank=rank, code=code)
        self.change(group, node, exit=record, process=Process.EXITED, exited_at=self.now, exit_code=80)

    def vanish(self, group: str, node: str, *, sweep: bool = False, lives: bool = False, **facts: object) -> None:
        """srun ends and the agent left no word; with `lives` the step goes on all the same."""
        facts = {"exit_code": 1} | facts
        self.change(group, node, sweep=sweep, process=Process.EXITED, exited_at=self.now, **facts)
        if lives:
            self.orphans.add(self._key(group, node, sweep=sweep))

    def snapshot(self) -> Listing:
        """Return what Slurm would answer now to the question which steps live."""
        living = {
            k: s for k, s in self.steps.items() if k in self.orphans or (s.process is Process.RUNNING and not s.exit)
        }
        return Listing(
            asked_at=self.now,
            names=frozenset(self.names[k] for k in living),
            pids=frozenset(s.pid for s in living.values() if s.pid is not None),
        )

    def list_steps(self) -> None:
        """Slurm answers which steps live."""
        self.listing = self.snapshot()

    def ask_job(self, job: Job) -> None:
        """Slurm answers what the job's state is."""
        self.job, self.job_asked_at = job, self.now

    def say(self, client: str = "trainer", **words: object) -> None:
        """A trainer's client says something; what it said before and does not name stays said."""
        known = self.clients.get(client, ClientWords(id=client))
        self.clients[client] = replace(known, seq=known.seq + 1, **words)  # type: ignore[arg-type]  # any of its words

    def ack(self, version: int, *groups: str, client: str = "trainer", rollback: bool = False) -> None:
        """A client acknowledges a push into the groups' current incarnations."""
        known = self.clients.get(client, ClientWords(id=client))
        named = tuple((g, self.state.group(g).incarnation) for g in groups)
        ack = Ack(n=len(known.acks) + 1, version=version, groups=named, rollback=rollback)
        self.clients[client] = replace(known, acks=(*known.acks, ack))

    def ask(self, verb: str, *groups: str) -> None:
        """An operator's request."""
        self.requests.append(Request(id=f"{verb}-{len(self.decisions)}", verb=verb, groups=groups, who="me"))
