"""Whatever happens to a fleet, in whatever order: the invariants of the decisions hold after every tick.

One machine turns a world in memory: engines die, sruns vanish while their steps live on, agents go deaf, Slurm goes
blind or answers late, ports stay open, probes lie, time jumps, operators ask, coordinators die between their journal
and their deeds. At the end of each example the faults end, and every group must become ready, and then the run end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, settings
from hypothesis import Phase as Stage
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from slurm_rollout.core.bounds import recovery_bound
from slurm_rollout.core.decide import decide, is_over
from slurm_rollout.core.model import (
    Cancel,
    Decision,
    Exclusion,
    Go,
    GroupState,
    Job,
    Launch,
    Listing,
    NodeWord,
    Observation,
    Process,
    RunState,
    Stop,
)
from slurm_rollout.core.moves import waits_for_a_node
from slurm_rollout.core.phases import ALIVE, MAY_HAVE_STEPS, Phase, PoolPhase, Reason
from slurm_rollout.core.plan import FencePolicy, FleetPlan, ProbePolicy, ProbeRequest, RestartPolicy, StopPolicy
from slurm_rollout.testing.world import World, make_plan

WINDOW_S = 1000.0
STEP_ENDS = ("kill", "vanish", "orphan", "refused")


@dataclass
class Ledger:
    """What the machine itself remembers of a group, to judge the decisions by."""

    runtime_failures: list[float] = field(default_factory=list)  # of incarnations that were ready
    start_failures: list[float] = field(default_factory=list)
    pending: tuple[str, float] | None = None  # a failure whose launch has not come yet
    last_end: float = 0.0


def without_sweeps_pids(run: RunState) -> RunState:
    """A sweep that is launched again has the name of the last one, whose process is what is seen until then."""
    groups = [
        replace(g, steps=tuple(replace(s, pid=None, pid_started=0) if s.sweep else s for s in g.steps))
        for g in run.groups
    ]
    return replace(run, groups=tuple(groups))


def without_wall(run: RunState) -> RunState:
    """Leave out what is only shown to people: times of a clock that somebody may set."""
    groups = [
        replace(
            g,
            since_wall=0.0,
            failure=None if g.failure is None else replace(g.failure, wall=0.0),
            charge=None if g.charge is None else replace(g.charge, wall=0.0),
        )
        for g in run.groups
    ]
    nodes = tuple(replace(n, since_wall=0.0) for n in run.nodes)
    return replace(run, groups=tuple(groups), nodes=nodes)


class Fleet(RuleBasedStateMachine):
    world: World
    placed: FleetPlan

    @initialize(
        groups=st.integers(1, 3),
        nodes=st.integers(1, 2),
        budget=st.integers(0, 3),
        up=st.booleans(),
        spares=st.integers(0, 2),
    )
    def begin(self, groups: int, nodes: int, budget: int, up: bool, spares: int) -> None:
        plan = make_plan(
            groups,
            nodes,
            probe=ProbePolicy(request=ProbeRequest(), startup_timeout_s=200.0),
            restart=RestartPolicy(max_restarts=budget, max_start_failures=budget, window_s=WINDOW_S),
            stop=StopPolicy(grace_s=0.5),
            fence=FencePolicy(timeout_s=30.0),
            spares=spares,
        )
        self.world = World(plan)
        self.ledgers = {g.id: Ledger() for g in plan.groups}
        self.late_answer: Listing | None = None
        self.proved: set[tuple[str, int, int]] = set()
        self.drained: set[str] = set()  # by the operator
        if up:
            self.until(lambda: self.world.phases() == {Phase.READY})

    # ------------------------------------------------------------------------------------------------ what can happen

    def some_group(self, data: st.DataObject) -> GroupState:
        return data.draw(st.sampled_from(self.world.state.groups), label="group")

    @rule(after_s=st.sampled_from([0.01, 0.01, 0.3, 1.2, 6.0, 31.0, 130.0, 700.0]), times=st.integers(1, 4))
    def time_passes(self, after_s: float, times: int) -> None:
        for _ in range(times):
            self.tick(after_s)

    @rule(times=st.integers(2, 8), pause_s=st.sampled_from([0.01, 0.01, 3.0]))
    def everybody_works(self, times: int, pause_s: float) -> None:
        for _ in range(times):
            self.tick(pause_s)
            self.settle()

    @rule(data=st.data(), how=st.sampled_from(STEP_ENDS))
    def a_step_ends(self, data: st.DataObject, how: str) -> None:
        w, g = self.world, self.some_group(data)
        running = [
            s.node
            for s in g.steps
            if not s.sweep
            and (seen := w.steps.get((g.id, g.incarnation, s.node, False)))
            and seen.process is Process.RUNNING
            and seen.exit is None
        ]
        if not running:
            return
        node = data.draw(st.sampled_from(running), label="node")
        if how == "kill":
            w.kill(g.id, w.placed.group(g.id).on(node)[0].rank)
        elif how == "refused" and g.phase is Phase.STARTING:
            words = data.draw(st.sampled_from(["", "Unable to contact slurm controller", "invalid node"]))
            w.vanish(g.id, node, spoke=False, stderr=words)
        else:
            w.vanish(g.id, node, lives=how == "orphan")
        self.tick(0.01)

    @rule(data=st.data(), lives=st.booleans())
    def a_sweep_vanishes(self, data: st.DataObject, lives: bool) -> None:
        w, g = self.world, self.some_group(data)
        for s in g.steps:
            key = (g.id, g.incarnation, s.node, True)
            if s.sweep and key in w.steps and w.steps[key].process is Process.RUNNING:
                w.vanish(g.id, s.node, sweep=True, lives=lives)

    @rule()
    def everything_ends(self) -> None:
        w = self.world
        for g in w.state.groups:
            for s in g.steps:
                key = (g.id, g.incarnation, s.node, False)
                if key in w.steps and w.steps[key].process is Process.RUNNING and w.steps[key].exit is None:
                    w.kill(g.id, w.placed.group(g.id).on(s.node)[0].rank)
        self.tick(0.01)

    @rule(data=st.data(), sort=st.sampled_from(["deaf", "undying", "cut", "cut", "cut"]))
    def a_node_goes_bad_or_good(self, data: st.DataObject, sort: str) -> None:
        nodes: set[str] = getattr(self.world, sort)
        nodes ^= {data.draw(st.sampled_from(self.world.plan.nodes), label="node")}

    @rule(data=st.data(), word=st.sampled_from([*NodeWord, NodeWord.DOWN, NodeWord.SILENT]))
    def slurm_says_of_a_node(self, data: st.DataObject, word: NodeWord) -> None:
        """That it is gone is for ever, and ends what runs there."""
        w = self.world
        node = data.draw(st.sampled_from(w.plan.nodes), label="node")
        if w.words.get(node) is not NodeWord.GONE:
            w.words[node] = word
        if w.words.get(node) is NodeWord.GONE:
            w.cut.add(node)

    @rule(data=st.data(), verb=st.sampled_from(["drain", "resume", "resume"]))
    def the_operator_asks_for_a_node(self, data: st.DataObject, verb: str) -> None:
        w = self.world
        node = data.draw(st.sampled_from(w.plan.nodes), label="node")
        w.ask(verb, node)
        if not w.state.ending and not w.stop_signal and w.job is not Job.ENDING:
            (self.drained.add if verb == "drain" else self.drained.discard)(node)
        self.tick(0.01)

    @rule(blind=st.booleans())
    def slurm_goes(self, blind: bool) -> None:
        self.world.blind = blind

    @rule(crowded=st.booleans())
    def sruns_wait_for_their_turn(self, crowded: bool) -> None:
        self.world.crowded = crowded

    @rule()
    def slurm_is_asked(self) -> None:
        self.late_answer = self.world.snapshot()

    @precondition(lambda self: self.late_answer is not None)
    @rule()
    def slurm_s_answer_comes_late(self) -> None:
        self.world.listing = self.late_answer

    @rule(job=st.sampled_from([Job.RUNNING, Job.RUNNING, Job.UNKNOWN]), age_s=st.sampled_from([0.0, 10.0]))
    def the_job_is_looked_at(self, job: Job, age_s: float) -> None:
        self.world.job, self.world.job_asked_at = job, self.world.now - age_s

    @rule(data=st.data(), ports=st.sampled_from(["open", "closed", "unknown"]))
    def ports_are(self, data: st.DataObject, ports: str) -> None:
        w, g = self.world, self.some_group(data)
        node = w.placed.group(g.id).nodes[-1]
        w.ports_open[g.id] = {"open": (f"{node}:18000",), "closed": (), "unknown": None}[ports]
        if ports == "open" and g.phase in ALIVE:
            w.kill(g.id, 0)
            self.tick(0.01)

    @rule(
        data=st.data(),
        said=st.sampled_from(["fine", "late", "late", "no", "no", "late and no", "slow"]),
        failures=st.sampled_from([1, 3, 4, 5]),
        agent=st.sampled_from([0, 3, 4]),
    )
    def probes_say(self, data: st.DataObject, said: str, failures: int, agent: int) -> None:
        w, g = self.world, self.some_group(data)
        member = data.draw(st.sampled_from(w.placed.group(g.id).entrypoints), label="member")
        late = failures if said.startswith("late") else 0
        no = 2 if said.endswith("no") else 0
        fine = said == "fine"
        w.probe(g.id, member.rank, failures=late, refusals=no, slow=said == "slow", answers=fine, last_error="x")
        if (g.id, g.incarnation, member.node, False) in w.steps:
            w.change(g.id, member.node, failing={member.rank: agent})
        self.tick(0.01)

    @rule(data=st.data(), what=st.sampled_from(["mismatch", "stranger", "waiting"]))
    def something_odd_is_seen(self, data: st.DataObject, what: str) -> None:
        w, g = self.world, self.some_group(data)
        member = data.draw(st.sampled_from(w.placed.group(g.id).members), label="member")
        if what == "mismatch":
            w.probe(g.id, member.rank, mismatch="another model")
        elif (g.id, g.incarnation, member.node, False) in w.steps:
            seen = {"stranger": "nginx" if what == "stranger" else "", "waiting_for": "a port of nginx"}
            w.change(g.id, member.node, sweep=False, **seen)
        self.tick(0.01)

    @rule(data=st.data(), verb=st.sampled_from(["restart", "drain", "resume", "resume", "nonsense"]))
    def the_operator_asks(self, data: st.DataObject, verb: str) -> None:
        self.world.ask(verb, self.some_group(data).id)
        self.tick(0.01)

    @rule(act=st.booleans())
    def the_coordinator_dies(self, act: bool) -> None:
        self.tick(0.01, act=act)
        self.world.restart()
        self.late_answer = None

    @rule(how=st.sampled_from(["signal", "job"]))
    @precondition(lambda self: len(self.world.decisions) > 40)
    def the_run_is_to_end(self, how: str) -> None:
        if how == "signal":
            self.world.stop_signal = True
        else:
            self.world.ask_job(Job.ENDING)

    # ----------------------------------------------------------------------------------------------------- one tick

    def settle(self) -> bool:
        changed = self.world.settle()
        self.proved |= {k for k, e in self.world.endpoints.items() if e.proved}
        return changed

    def tick(self, after_s: float, *, act: bool = True) -> Decision:
        w = self.world
        before = w.state
        w.now += after_s
        obs = w.observe()
        living = {g.id: w.living(g.id) for g in before.groups}
        self.placed = w.placed  # as it was decided by
        decision = w.tick(0.0, act=act)
        self.the_decision_repeats_itself_and_then_rests(before, obs, decision)
        self.numbers_never_fall(before, decision.state)
        self.only_what_is_proved_serves(before, obs, decision)
        for action in decision.actions:
            if isinstance(action, Launch):
                self.a_launch_has_the_field_to_itself(action, before, obs, decision, living[action.group])
            elif isinstance(action, Go):
                self.go_follows_the_last_fence(action, obs)
        self.the_budget_holds(before, obs, decision)
        self.nobody_starts_where_nothing_may(decision)
        self.what_is_left_is_on_lost_nodes(decision.state)
        self.one_incarnation_lives()
        return decision

    def nobody_starts_where_nothing_may(self, decision: Decision) -> None:
        after = decision.state
        excluded = {n.name for n in after.nodes if n.excluded}
        for action in decision.actions:
            if isinstance(action, Launch):
                assert not (excluded | self.drained).intersection(action.nodes)
        taken: dict[str, str] = {}
        rest = {g.id for g in after.groups if g.phase in (Phase.PENDING, Phase.STOPPED, Phase.FAILED)}
        for group in self.world.placed.groups:
            for node in group.nodes if group.id not in rest else ():
                assert taken.setdefault(node, group.id) == group.id, "two groups are on one node"

    def what_is_left_is_on_lost_nodes(self, after: RunState) -> None:
        for step in after.lost_steps:
            assert after.node(step.node).excluded in (Exclusion.LOST, Exclusion.GONE, Exclusion.STUCK)
            assert (step.group, step.incarnation) not in after.alive
        for g in after.groups:
            if g.failure is not None and g.failure.reason is Reason.NODE_LOST:
                assert g.failure.at not in (*g.runtime_failures, *g.start_failures), "a lost node was charged"

    def the_decision_repeats_itself_and_then_rests(self, before: RunState, obs: Observation, made: Decision) -> None:
        plan = self.world.plan
        assert decide(plan, before, obs) == made
        # Whatever the wall clock says: somebody may set it, by hours and in either direction.
        elsewhere = decide(plan, without_wall(before), replace(obs, wall=obs.wall - 40_000.0))
        assert replace(elsewhere, state=without_wall(elsewhere.state)) == replace(made, state=without_wall(made.state))
        obs = replace(obs, requests=())
        last = made
        for _ in before.groups:  # each may have moved, or wait for a node no longer: that goes on at once
            if last.wake_at is None or last.wake_at > obs.now:
                break
            last = decide(plan, last.state, obs)
        again = decide(plan, last.state, obs)
        assert without_sweeps_pids(again.state) == without_sweeps_pids(last.state)
        assert again.actions == ()
        assert again.events == ()
        assert last.wake_at is None or last.wake_at > obs.now

    def numbers_never_fall(self, before: RunState, after: RunState) -> None:
        assert after.epoch == before.epoch + (after.serving != before.serving)
        assert after.term == before.term
        for old, new in zip(before.groups, after.groups, strict=True):
            assert new.incarnation in (old.incarnation, old.incarnation + 1)
            assert new.restarts >= old.restarts

    def only_what_is_proved_serves(self, before: RunState, obs: Observation, decision: Decision) -> None:
        after = decision.state
        assert after.serving == tuple((g.id, g.incarnation) for g in after.groups if g.phase is Phase.READY)
        for old, g in zip(before.groups, after.groups, strict=True):
            entrypoints = self.world.plan.group(g.id).entrypoints
            seen = obs.group(g.id)
            assert seen is not None
            if g.phase in ALIVE:
                assert {(g.id, g.incarnation, m.rank) for m in entrypoints} <= self.proved
                assert all(s.exit is None and s.process is Process.RUNNING for s in seen.steps)
                assert not any(e.mismatch for e in seen.endpoints)
            if g.phase is Phase.READY:
                assert not any(e.refusals >= 2 for e in seen.endpoints)
                if old.phase is Phase.UNREADY:
                    assert {m.rank for m in entrypoints} <= {e.rank for e in seen.endpoints if e.answers}
            if old.phase is not Phase.FAILED and g.phase is Phase.FAILED:
                assert any(e.type == "failed" and e.group == g.id for e in decision.events)
        touched = {a.group for a in decision.actions if isinstance(a, Stop | Cancel | Launch)}
        assert not touched & {g for g, _ in after.serving}

    def a_launch_has_the_field_to_itself(
        self, action: Launch, before: RunState, obs: Observation, decision: Decision, living: set[int]
    ) -> None:
        old, seen = before.group(action.group), obs.group(action.group)
        assert seen is not None
        left = {s.incarnation for s in before.lost_steps if s.group == action.group}
        assert living <= left, "a step of it lives"
        assert not before.ending
        if action.sweep:
            assert seen.ports_open
            assert set(action.nodes) <= set(self.placed.group(action.group).nodes)
            return
        assert seen.ports_open == (), "its ports were not seen closed"
        assert action.incarnation == old.incarnation + 1
        assert action.nodes == self.placed.group(action.group).nodes
        assert obs.now >= old.not_before or obs.requests
        ended_at = self.ledgers[action.group].last_end
        others = any(
            s.process is Process.RUNNING and s.exit is None for g in obs.groups if g.id != action.group for s in g.steps
        )
        if ended_at and not others:
            asked = obs.job is Job.RUNNING and obs.job_asked_at is not None and obs.job_asked_at >= ended_at
            assert asked, "nothing else runs, and nobody knows whether the job goes on"

    def go_follows_the_last_fence(self, action: Go, obs: Observation) -> None:
        seen = obs.group(action.group)
        assert seen is not None
        assert {s.node for s in seen.steps if s.fenced} == set(self.placed.group(action.group).nodes)

    def the_budget_holds(self, before: RunState, obs: Observation, decision: Decision) -> None:
        policy, now = self.world.plan.pools[0].restart, self.world.now
        ready_now = {e.group for e in decision.events if e.type == "ready"}
        for old, g in zip(before.groups, decision.state.groups, strict=True):
            ledger = self.ledgers[g.id]
            if old.phase in (Phase.FAILED, Phase.STOPPED) and g.phase not in (Phase.FAILED, Phase.STOPPED):
                self.ledgers[g.id] = ledger = Ledger()
            if old.phase is Phase.STOPPING and g.phase is not Phase.STOPPING and self.slurm_was_blind(old, obs):
                ledger.pending = None
            for event in decision.events:
                if event.group != g.id:
                    continue
                if event.type == "failure":
                    self.book(ledger)
                    ledger.last_end = now
                    assert g.failure is not None
                    charged = g.charge is not None or g.goes_to is Phase.FAILED
                    kind = "start" if g.failure.startup else "runtime"
                    assert g.failure.startup is (old.phase not in ALIVE and g.id not in ready_now)
                    assert charged or g.failure.reason in (Reason.TAKEOVER, Reason.LAUNCH_FAILED)
                    ledger.pending = (kind, now) if charged else None
                elif event.type == "launching":
                    self.book(ledger)
                elif event.type == "failed":
                    ledger.pending = None
            if g.node_failures > old.node_failures:  # nor what failed there before that was known
                ledger.pending = None
                ledger.start_failures = [t for t in ledger.start_failures if t in g.start_failures]
            if g.reason is Reason.OPERATOR and g.phase in (Phase.STOPPING, Phase.DRAINING):
                ledger.pending = None
                ledger.last_end = g.marks.seen_at or 0.0
            for times, most in (
                (ledger.runtime_failures, policy.max_restarts),
                (ledger.start_failures, policy.max_start_failures),
            ):
                assert len([t for t in times if now - t < WINDOW_S]) <= most

    def slurm_was_blind(self, g: GroupState, obs: Observation) -> bool:
        refused = g.failure is not None and g.failure.reason is Reason.LAUNCH_FAILED
        return refused and obs.listing_failed_at is not None and obs.listing_failed_at >= g.since - 60.0

    def book(self, ledger: Ledger) -> None:
        if ledger.pending is not None:
            kind, at = ledger.pending
            (ledger.start_failures if kind == "start" else ledger.runtime_failures).append(at)
            ledger.pending = None

    def one_incarnation_lives(self) -> None:
        for g in self.world.state.groups:
            may_live = {g.incarnation} if g.phase in MAY_HAVE_STEPS | {Phase.FENCING} else set()
            may_live |= {s.incarnation for s in self.world.state.lost_steps if s.group == g.id}
            assert self.world.living(g.id) <= may_live, "a step lives that is nobody's, or was taken for ended"

    # --------------------------------------------------------------------------------------------------- how it ends

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        w = self.world
        w.deaf.clear()
        w.undying.clear()
        w.orphans.clear()
        w.blind = w.crowded = False
        w.cut = {n for n, word in w.words.items() if word is NodeWord.GONE}
        w.words = {n: word for n, word in w.words.items() if word is NodeWord.GONE}
        w.ports_open.clear()
        self.forget_odd_sights()
        if not w.state.ending and not w.stop_signal and w.job is not Job.ENDING:
            w.ask("resume", *w.plan.nodes)
            self.drained.clear()
            bound, began = recovery_bound(w.plan, w.plan.pools[0]), w.now
            self.until(lambda: {g.phase for g in self.with_nodes()} <= {Phase.READY, Phase.FAILED, Phase.STOPPED})
            assert w.now - began <= bound.total_s + bound.backoff_s + w.plan.lost_after_s
            resting = [g.id for g in w.state.groups if g.phase in (Phase.FAILED, Phase.STOPPED)]
            if resting:
                w.ask("resume", *resting)
                self.tick(0.01)
            self.until(lambda: {g.phase for g in self.with_nodes()} <= {Phase.READY})
            if self.with_nodes() == w.state.groups:
                assert w.state.phase is PoolPhase.READY
            self.until(lambda: not any(s.node not in w.cut for s in w.state.lost_steps))
            assert all(w.living(g.id) - self.left_on_gone_nodes(g.id) == {g.incarnation} for g in self.with_nodes())
        w.stop_signal = True
        self.until(lambda: is_over(w.state))
        assert not any(w.living(g.id) - self.left_on_gone_nodes(g.id) for g in w.state.groups)

    def with_nodes(self) -> tuple[GroupState, ...]:
        """Return the groups but for those that wait for a node, while nobody could start on what nobody uses."""
        w = self.world
        gone = {n for n, word in w.words.items() if word is NodeWord.GONE}
        waiting = {g.id for g in w.state.groups if waits_for_a_node(g)}
        used = {n for g in w.placed.groups for n in g.nodes if g.id not in waiting}
        free = len(set(w.plan.nodes) - gone - used)
        return tuple(g for g in w.state.groups if g.id not in waiting or free >= len(w.plan.group(g.id).nodes))

    def left_on_gone_nodes(self, group: str) -> set[int]:
        w = self.world
        return {s.incarnation for s in w.state.lost_steps if s.group == group and s.node in w.cut}

    def forget_odd_sights(self) -> None:
        w = self.world
        w.endpoints = {k: replace(e, mismatch="", failures=0, refusals=0) for k, e in w.endpoints.items()}
        w.steps = {k: replace(s, stranger="", failing={}) for k, s in w.steps.items()}

    def until(self, done: Callable[[], bool]) -> None:
        """Time passes only to the moments that `decide` names: if it forgot one, this never ends well."""
        w = self.world
        for _ in range(150):
            if done():
                return
            before = w.state
            decision = self.tick(0.01)
            asked = decision.actions or decision.wants.listing or decision.wants.job or decision.wants.nodes
            rests = w.state == before and not decision.actions  # what is asked again and again brings nothing new
            if not self.settle() and (rests or not asked) and decision.wake_at is not None:
                w.now = max(w.now, decision.wake_at)
        told = [(g.id, g.phase.value, g.message) for g in w.state.groups]
        raise AssertionError(f"not reached: {told}, {w.state.nodes}, {w.state.lost_steps}, {w.nodes}")


TestFleet = Fleet.TestCase
TestFleet.settings = settings(
    derandomize=True,
    max_examples=300,
    phases=tuple(stage for stage in Stage if stage is not Stage.explain),  # that traces every line: five times as slow
    stateful_step_count=60,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
