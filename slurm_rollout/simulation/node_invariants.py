"""What must hold for nodes and places, whatever happens: who is given up, where groups go, what is left behind.

17  places     nothing is started on an excluded node, groups share no GPU and no port, what was left on a lost node
               meets nobody, is not forgotten, and ends when the node is back; nodes that are well are not given up
"""

from __future__ import annotations

from typing import Any

from slurm_rollout.core import moves
from slurm_rollout.core.model import Decision, Event, Exclusion, Launch, Observation, RunState
from slurm_rollout.core.phases import Phase, Reason
from slurm_rollout.core.plan import FleetPlan
from slurm_rollout.simulation.broken import Broken
from slurm_rollout.simulation.clock import Timeline
from slurm_rollout.simulation.cluster import NODE_SILENT_S, Cluster
from slurm_rollout.simulation.parts import Engine, Node, Step

GIVEN_UP = (Exclusion.LOST, Exclusion.GONE, Exclusion.STUCK)

LATE_ANSWER_S = 90.0
"""So old an answer of Slurm may be when it comes."""

ENDS_S = 200.0
"""Within this a step that was left on a lost node is ended when the node is back: it is looked for every minute at
least, and Slurm needs a minute to give up on what cannot be killed."""

FAILS_S = 900.0
"""Failures in a row on one node are at most so far apart."""


class NodeChecker:
    """Looks on at every step of one run."""

    def __init__(self, plan: FleetPlan, cluster: Cluster, time: Timeline) -> None:
        self.plan = plan
        self.cluster = cluster
        self.time = time
        self.moves = 0
        self._left: set[tuple[str, str]] = set()  # (name, node) of steps that were left on lost nodes
        self._dead: set[tuple[str, int]] = set()  # incarnations that have such a step
        self._drained: set[str] = set()  # by an operator
        self._excluded_at: dict[str, float] = {}

    def is_left(self, step: Step) -> bool:
        """Tell whether the coordinator knows of a step that it had to leave on a lost node."""
        return (step.name, step.key.node) in self._left

    def _see(self, run: RunState) -> None:
        self._left = {(s.name, s.node) for s in run.lost_steps}
        self._dead = {(s.group, s.incarnation) for s in run.lost_steps}

    # ------------------------------------------------------------------------------------------------- the truth's side

    def launched(self, step: Step) -> None:
        """Groups share no port and no GPU."""
        mine = step.plan.on(step.key.node)
        ports, gpus = {p for m in mine for p in m.fenced_ports}, {g for m in mine for g in m.gpus}
        for other in self.cluster.nodes[step.key.node].agents:
            if other.key.group == step.key.group:
                if other is not step and other.goes_on and self.is_left(other):
                    raise Broken(17, f"{step.name} is launched on {step.key.node}, where {other.name} was left")
                continue
            if other.key.sweep:
                continue
            theirs = other.plan.on(other.key.node)
            if taken := ports & {p for m in theirs for p in m.fenced_ports}:
                raise Broken(17, f"{step.name} is launched on {step.key.node} beside {other.name}: both have {taken}")
            if not gpus or gpus & {g for m in theirs for g in m.gpus}:
                raise Broken(17, f"{step.name} is launched on {step.key.node} on the GPUs of {other.name}")

    def engine_starts(self, engine: Engine) -> None:
        """No old rank can join the new rendezvous."""
        mine = engine.incarnation.plan
        for node in self.cluster.nodes.values():
            for other in node.engines:
                theirs = other.incarnation.plan
                if theirs.id != mine.id or other.incarnation is engine.incarnation:
                    continue
                if (theirs.master_address, theirs.master_port) == (mine.master_address, mine.master_port):
                    raise Broken(
                        17,
                        f"{mine.id} incarnation {engine.incarnation.number} meets at {mine.master_address}:"
                        f"{mine.master_port}, and so does incarnation {other.incarnation.number}, alive on {node.name}",
                    )

    # --------------------------------------------------------------------------------------------------- the decision's

    def decided(self, decision: Decision) -> None:
        excluded = {n.name for n in decision.state.nodes if n.excluded}
        for action in decision.actions:
            if isinstance(action, Launch) and (there := (excluded | self._drained).intersection(action.nodes)):
                raise Broken(17, f"{action.group} is launched on {', '.join(there)}, which is not to be used")

    def committed(self, before: RunState, obs: Observation, decision: Decision) -> None:
        after = decision.state
        for request in obs.requests:
            if not before.ending and not after.ending and set(request.groups) <= set(self.plan.nodes):
                if request.verb == "drain":
                    self._drained.update(request.groups)
                elif request.verb == "resume":
                    self._drained.difference_update(request.groups)
        if after.lost_steps != before.lost_steps:
            self._lost_steps(before, after)
        if after.nodes != before.nodes:
            for event in decision.events:
                if event.type == "node_excluded":
                    self._excluded_at[event.node] = obs.now
                    self._given_up(event, after)
        if any(new.places is not old.places for old, new in zip(before.groups, after.groups, strict=True)):
            self.moves += 1
            self._places(after)
        for g in after.groups:
            if g.phase is Phase.PENDING and g.reason is Reason.NO_NODE and "no other node is free" not in g.message:
                raise Broken(17, f"{g.id} waits for a node, and says {g.message!r}")

    def _lost_steps(self, before: RunState, after: RunState) -> None:
        known = {(s.name, s.node) for s in before.lost_steps}
        self._see(after)
        for step in after.lost_steps:
            if (step.name, step.node) not in known and after.node(step.node).excluded not in GIVEN_UP:
                raise Broken(17, f"{step.name} is left on {step.node}, which is not lost")
        for name, node in known - self._left:
            for held in self.cluster.steps:
                if (held.name, held.key.node) == (name, node) and held.goes_on:
                    raise Broken(17, f"{name} is taken for gone, and lives on {node}")

    def _given_up(self, event: Event, run: RunState) -> None:
        """A node that is well is not given up: not when we are cut off, nor Slurm is away, nor all launches fail."""
        node, now = self.cluster.nodes[event.node], self.time.now
        why = Exclusion(event.reason)
        if why is Exclusion.GONE and not node.lost:
            raise Broken(17, f"{node.name} is given up as gone, and is in the job")
        if why is Exclusion.LOST:
            if not self._is_away(node) and now - node.back_at > LATE_ANSWER_S:
                raise Broken(17, f"{node.name} is given up, and is well: {event.message}")
            slurm_hears = not node.lost and now - node.cut_at < NODE_SILENT_S
            others = [n for n in self.cluster.nodes.values() if n is not node and not run.node(n.name).excluded]
            silent = [n.name for n in others if n.cut and now - n.cut_at > 5.0]
            if self._is_away(node) and slurm_hears and (silent or now < self.cluster.batch_host_cut_until - 5.0):
                raise Broken(17, f"{node.name} is given up while {silent or 'all'} are silent: {event.message}")
        if why is Exclusion.FAILING and now - self._ailed_at(node) > FAILS_S:
            raise Broken(17, f"{node.name} is not used any more, and never was at fault: {event.message}")

    def _ailed_at(self, node: Node) -> float:
        """Return when something was last wrong with a node."""
        now = self.time.now
        moments = [node.sick_at, node.gpu_stuck_until, node.back_at, node.lost_at, node.unkillable_until]
        moments += [now] if self._is_away(node) else []
        return max(min(now, at) for at in (*moments, *node.strangers.values()))

    def _places(self, run: RunState) -> None:
        """Groups have GPUs and ports of their own, on nodes that may be used."""
        ports: dict[tuple[str, int], str] = {}
        gpus: dict[tuple[str, int], str] = {}
        whole: dict[str, str] = {}
        # Who waits for a node, or is stopped, holds none that another could use.
        rest = {g.id for g in run.groups if g.phase in (Phase.PENDING, Phase.STOPPED, Phase.FAILED)}
        for group in (g for g in moves.placed(self.plan, run).groups if g.id not in rest):
            for member in group.members:
                for port in member.ports.values():
                    if (other := ports.setdefault((member.node, port), group.id)) != group.id:
                        raise Broken(17, f"{group.id} and {other} both have port {port} on {member.node}")
                for gpu in member.gpus:
                    if (other := gpus.setdefault((member.node, gpu), group.id)) != group.id:
                        raise Broken(17, f"{group.id} and {other} both have GPU {gpu} on {member.node}")
                if not group.shares_nodes and (other := whole.setdefault(member.node, group.id)) != group.id:
                    raise Broken(17, f"{group.id} and {other} both have {member.node}")

    def took_over(self, found: RunState, state: RunState) -> None:
        """What is known of nodes goes on in the same allocation, and only there."""
        if found.restart_count == state.restart_count:
            if (found.nodes, found.lost_steps) != (state.nodes, state.lost_steps):
                raise Broken(11, f"takeover: {found.nodes}, {found.lost_steps} -> {state.nodes}, {state.lost_steps}")
        else:
            self._drained.clear()
        self._see(state)

    # ----------------------------------------------------------------------------------------------------- the writer's

    def wrote(self, group: dict[str, Any]) -> None:
        """What has URLs is where they say, and nothing of it was given up."""
        mine = group["id"], group["incarnation"]
        if mine in self._dead:
            raise Broken(3, f"{mine} is in the barrier, and a part of it was left on a lost node")
        plan = self.cluster.incarnations[mine].plan
        said, true = (group["urls"], group["master"]), [m.url for m in plan.entrypoints]
        if said != (true, f"{plan.master_address}:{plan.master_port}"):
            raise Broken(3, f"{mine} is at {said} in the barrier, and really at {true}")

    # ---------------------------------------------------------------------------------------------------- as time goes

    def look(self, unwell_at: float) -> None:
        """What was left on a node ends when that is back."""
        cluster, now = self.cluster, self.time.now
        bad_until = max(
            unwell_at, cluster.slurm_away_until, cluster.slurm_slow_until + LATE_ANSWER_S, cluster.cancels_lost_until
        )
        bad_until = max(bad_until, cluster.batch_host_cut_until, cluster.blind_until)
        for step in cluster.steps:
            node = cluster.nodes[step.key.node]
            if not self.is_left(step) or not step.goes_on or self._is_away(node):
                continue
            since = max(bad_until, node.back_at, self._excluded_at.get(node.name, 0.0), node.unkillable_until)
            if now - since > ENDS_S:
                raise Broken(17, f"{step.name} lives on {node.name}, which is back for {now - since:.0f} s")

    @staticmethod
    def _is_away(node: Node) -> bool:
        return node.cut or node.lost
