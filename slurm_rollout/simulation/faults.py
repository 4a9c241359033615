"""What goes wrong, and when: a list that a seed decides, so that a failing one can be made shorter.

A fault names its victim by fractions (the third quarter of the groups), not by what happens to live at that moment: the
same fault hits the same group whatever else is left out of the list. One that finds nothing to break does nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slurm_rollout.core.model import Request
from slurm_rollout.core.plan import GroupPlan
from slurm_rollout.simulation.cluster import NODE_DOWN_S
from slurm_rollout.simulation.coordinator import POINTS
from slurm_rollout.simulation.parts import Engine, Incarnation, Step

if TYPE_CHECKING:
    from slurm_rollout.simulation.fleet import Fleet


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong. `where` and `which` choose the victim; how long it lasts is `for_s`."""

    at: float
    kind: str
    where: float = 0.0
    which: float = 0.0
    for_s: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.at:10.3f}  {self.kind:<22} where {self.where:.3f}  which {self.which:.3f}  for {self.for_s:.1f} s"
        )


@dataclass(frozen=True, slots=True)
class Kind:
    do: Callable[[Fleet, Fault], None]
    weight: float
    least_s: float = 0.0
    most_s: float = 0.0


MOMENTS = ("stopping", "verdict", "moved", "starting", "pending", "ready")
"""When a node comes back that was cut off (`Fleet.cut_until`)."""

KINDS: dict[str, Kind] = {}
"""What happens to fleets; what happens to their trainers is in `trainer_faults`."""


def kind(
    weight: float, least_s: float = 0.0, most_s: float = 0.0, *, among: dict[str, Kind] = KINDS
) -> Callable[..., Callable[[Fleet, Fault], None]]:
    """Register a kind of fault under the function's name."""

    def register(do: Callable[[Fleet, Fault], None]) -> Callable[[Fleet, Fault], None]:
        among[do.__name__] = Kind(do, weight, least_s, most_s)
        return do

    return register


def schedule(
    rng: random.Random,
    begins_at: float,
    hours: float,
    per_hour: float,
    kinds: dict[str, float],
    among: dict[str, Kind] = KINDS,
) -> list[Fault]:
    """Draw faults as they come: singly, and in bursts that hit a recovery in its middle."""
    names, weights = list(kinds), list(kinds.values())
    found: list[Fault] = []
    at = begins_at
    while True:
        at += rng.expovariate(per_hour / 3600.0) if rng.random() < 0.6 else rng.uniform(0.0, 20.0)
        if at >= begins_at + hours * 3600.0:
            return found
        name = rng.choices(names, weights)[0]
        known = among[name]
        for_s = known.least_s * (known.most_s / known.least_s) ** rng.random() if known.least_s else 0.0
        found.append(Fault(round(at, 3), name, rng.randrange(1000) / 1000, rng.randrange(1000) / 1000, round(for_s, 3)))


def every_kind() -> dict[str, float]:
    return {name: k.weight for name, k in KINDS.items()}


# -------------------------------------------------------------------------------------------------------------- victims


def group_of(fleet: Fleet, fault: Fault) -> str:
    groups = fleet.plan.groups
    return groups[int(fault.where * len(groups))].id


def newest(fleet: Fleet, fault: Fault) -> Incarnation | None:
    return fleet.cluster.newest.get(group_of(fleet, fault))


def engine_of(fleet: Fleet, fault: Fault) -> Engine | None:
    found = newest(fleet, fault)
    living = [] if found is None else [e for e in found.engines.values() if e.alive and not e.killed]
    return living[int(fault.which * len(living))] if living else None


def placed(fleet: Fleet, fault: Fault) -> GroupPlan:
    """Return the group where it was started last."""
    found = newest(fleet, fault)
    return fleet.plan.group(group_of(fleet, fault)) if found is None else found.plan


def node_of(fleet: Fleet, fault: Fault) -> str:
    nodes = placed(fleet, fault).nodes
    return nodes[int(fault.which * len(nodes))]


def any_node(fleet: Fleet, fault: Fault) -> str:
    return fleet.plan.nodes[int(fault.where * len(fleet.plan.nodes))]


def step_of(fleet: Fleet, fault: Fault) -> Step | None:
    found = newest(fleet, fault)
    steps = [] if found is None else [s for s in found.steps.values() if s.srun_lives]
    return steps[int(fault.which * len(steps))] if steps else None


# -------------------------------------------------------------------------------------------------------------- engines


@kind(8)
def engine_dies(fleet: Fleet, fault: Fault) -> None:
    if (engine := engine_of(fleet, fault)) is not None:
        engine.incarnation.hurt("died", fleet.time.now)
        fleet.cluster.engine_ends(engine, (0, 1, -9, 137)[int(fault.which * 4)])


@kind(5)
def engine_hangs(fleet: Fleet, fault: Fault) -> None:
    if (engine := engine_of(fleet, fault)) is not None:
        engine.frozen = True
        engine.incarnation.hurt("hung", fleet.time.now)
        fleet.cluster.changed(engine.incarnation)


@kind(3)
def engine_is_half_dead(fleet: Fleet, fault: Fault) -> None:
    """Its HTTP server answers, also with the progress counter; no token comes any more."""
    if (engine := engine_of(fleet, fault)) is not None:
        engine.half = True
        engine.incarnation.hurt("half", fleet.time.now)
        fleet.cluster.changed(engine.incarnation)


@kind(3, 40, 1500)
def engines_are_saturated(fleet: Fleet, fault: Fault) -> None:
    found = newest(fleet, fault)
    if found is not None and fleet.counts_progress(found):
        found.busy_until = fleet.time.now + fault.for_s
        fleet.cluster.changed(found)


@kind(1, 60, 900)
def all_are_saturated(fleet: Fleet, fault: Fault) -> None:
    for found in list(fleet.cluster.newest.values()):
        if fleet.counts_progress(found):
            found.busy_until = fleet.time.now + fault.for_s
            fleet.cluster.changed(found)


@kind(2, 5, 200)
def engines_answer_no(fleet: Fleet, fault: Fault) -> None:
    if (found := newest(fleet, fault)) is not None:
        found.refuses_until = fleet.time.now + fault.for_s
        fleet.cluster.changed(found)


@kind(2, 5, 200)
def engine_cannot_die(fleet: Fleet, fault: Fault) -> None:
    """It hangs in the kernel: no signal ends it, and its ports and memory stay taken."""
    if (engine := engine_of(fleet, fault)) is not None:
        engine.frozen = True
        engine.unkillable_until = fleet.time.now + fault.for_s
        node = fleet.cluster.nodes[engine.member.node]
        node.unkillable_until = max(node.unkillable_until, engine.unkillable_until)
        engine.incarnation.hurt("hung", fleet.time.now)
        fleet.cluster.changed(engine.incarnation)


@kind(3, 10, 4000)
def next_start_is_slow(fleet: Fleet, fault: Fault) -> None:
    fleet.slow_starts[group_of(fleet, fault)] = fault.for_s


@kind(1)
def all_engines_die(fleet: Fleet, fault: Fault) -> None:
    for found in list(fleet.cluster.newest.values()):
        for engine in list(found.engines.values()):
            if engine.alive:
                found.hurt("died", fleet.time.now)
                fleet.cluster.engine_ends(engine, 1)


@kind(1)
def all_engines_hang(fleet: Fleet, fault: Fault) -> None:
    for found in list(fleet.cluster.newest.values()):
        for engine in found.engines.values():
            if engine.alive:
                engine.frozen = True
        found.hurt("hung", fleet.time.now)
        fleet.cluster.changed(found)


# -------------------------------------------------------------------------------------------------- steps, sruns, nodes


@kind(2)
def agent_is_killed(fleet: Fleet, fault: Fault) -> None:
    step = step_of(fleet, fault)
    if step is not None and step.agent not in ("none", "dead"):
        step.incarnation.hurt("died", fleet.time.now)
        fleet.cluster.agent_killed(step)


@kind(2)
def process_is_left_behind(fleet: Fleet, fault: Fault) -> None:
    """The agent is killed, and one engine had detached itself: it goes on, with its port, when its step has ended."""
    if (engine := engine_of(fleet, fault)) is not None:
        engine.detached = True
        step = engine.incarnation.steps[engine.member.node]
        engine.incarnation.hurt("died", fleet.time.now)
        fleet.cluster.agent_killed(step)


@kind(2)
def srun_is_killed(fleet: Fleet, fault: Fault) -> None:
    """Its twin ends the step two seconds later."""
    if (step := step_of(fleet, fault)) is not None:
        fleet.cluster.srun_dies(step)
        fleet.time.after(2.0, lambda: fleet.cluster.slurm_kills(step))


@kind(3)
def srun_lies(fleet: Fleet, fault: Fault) -> None:
    """srun and its twin are gone, or srun says 0; the step goes on, and nobody hears its agent any more."""
    if (step := step_of(fleet, fault)) is not None:
        fleet.cluster.srun_dies(step, 0)


@kind(2, 1, 60)
def srun_is_stopped(fleet: Fleet, fault: Fault) -> None:
    """What the agent says comes late, all at once."""
    if (step := step_of(fleet, fault)) is not None:
        step.srun_linked = False
        fleet.time.after(fault.for_s, lambda: fleet.cluster.relink(step))


@kind(2, 5, 250)
def node_is_cut_off(fleet: Fleet, fault: Fault) -> None:
    fleet.cluster.cut(node_of(fleet, fault), fault.for_s)


@kind(0.5, 5, 250)
def nodes_are_cut_off(fleet: Fleet, fault: Fault) -> None:
    for name in fleet.plan.nodes[int(fault.where * len(fleet.plan.nodes)) :]:
        fleet.cluster.cut(name, fault.for_s)


@kind(1, 5, 290)
def any_node_is_cut_off(fleet: Fleet, fault: Fault) -> None:
    """Also one that is spare, or that a group left."""
    fleet.cluster.cut(any_node(fleet, fault), fault.for_s)


@kind(3, 0.05, 30)
def node_comes_back_just_then(fleet: Fleet, fault: Fault) -> None:
    """It is cut off, and back at a bad moment: while its group is stopped, at the verdict, after the move."""
    at = fault.which * len(MOMENTS)
    nodes = placed(fleet, fault).nodes
    fleet.cut_until(nodes[int(at % 1 * len(nodes))], group_of(fleet, fault), MOMENTS[int(at)], fault.for_s)


@kind(1.5, 20, 600)
def node_is_sick(fleet: Fleet, fault: Fault) -> None:
    """Whatever is started there fails; what runs there goes on."""
    node = fleet.cluster.nodes[node_of(fleet, fault)]
    node.sick_until = fleet.time.now + fault.for_s
    node.sickness = ("srun", "gpu_memory", "exec_failed")[int(fault.which * 3)]


@kind(1, 30, 1500)
def slurm_drains_a_node(fleet: Fleet, fault: Fault) -> None:
    node = fleet.cluster.nodes[any_node(fleet, fault)]
    node.draining = "maintenance"
    fleet.time.after(fault.for_s, lambda: setattr(node, "draining", ""))


@kind(0.3)
def node_is_lost(fleet: Fleet, fault: Fault) -> None:
    name = node_of(fleet, fault)
    if fault.for_s == 0.0 and fault.which < 0.5:
        fleet.cluster.cut(name, NODE_DOWN_S)
    else:
        fleet.cluster.lose(name)


@kind(2, 2, 120)
def agents_are_deaf(fleet: Fleet, fault: Fault) -> None:
    fleet.cluster.nodes[node_of(fleet, fault)].deaf_until = fleet.time.now + fault.for_s


@kind(2, 5, 200)
def agents_hear_late(fleet: Fleet, fault: Fault) -> None:
    fleet.cluster.nodes[node_of(fleet, fault)].late_until = fleet.time.now + fault.for_s


@kind(2, 5, 200)
def gpu_memory_stays(fleet: Fleet, fault: Fault) -> None:
    fleet.cluster.nodes[node_of(fleet, fault)].gpu_stuck_until = fleet.time.now + fault.for_s


@kind(2, 5, 300)
def stranger_takes_a_port(fleet: Fleet, fault: Fault) -> None:
    """As soon as the port is free."""
    group = placed(fleet, fault)
    member = group.members[int(fault.which * len(group.members))]
    node = fleet.cluster.nodes[member.node]
    node.strangers[member.ports["http"]] = fleet.time.now + fault.for_s


# ---------------------------------------------------------------------------------------------------------------- Slurm


@kind(3, 10, 900)
def slurm_is_away(fleet: Fleet, fault: Fault) -> None:
    fleet.cluster.slurm_away_until = max(fleet.cluster.slurm_away_until, fleet.time.now + fault.for_s)


@kind(2, 30, 900)
def slurm_answers_late(fleet: Fleet, fault: Fault) -> None:
    fleet.cluster.slurm_slow_until = max(fleet.cluster.slurm_slow_until, fleet.time.now + fault.for_s)


@kind(2, 5, 120)
def cancels_are_lost(fleet: Fleet, fault: Fault) -> None:
    fleet.cluster.cancels_lost_until = fleet.time.now + fault.for_s


@kind(2, 5, 250)
def steps_stay_completing(fleet: Fleet, fault: Fault) -> None:
    """What ends on a node stays listed for a while: an epilog hangs, or slurmstepd does."""
    node = fleet.cluster.nodes[node_of(fleet, fault)]
    node.completing_until = fleet.time.now + fault.for_s
    node.unkillable_until = max(node.unkillable_until, node.completing_until)


@kind(0.7, 90, 3000)
def job_has_little_time(fleet: Fleet, fault: Fault) -> None:
    """Its time limit is near; it is requeued when that has passed."""
    fleet.limit_job(fault.for_s, warned=fault.which < 0.5)


@kind(1)
def time_limit_is_raised(fleet: Fleet, fault: Fault) -> None:
    fleet.cluster.job_ends_at = None


@kind(1, 2, 60)
def launches_are_refused(fleet: Fleet, fault: Fault) -> None:
    fleet.cluster.refuses_launches_until = fleet.time.now + fault.for_s


# ---------------------------------------------------------------------------------------------------------- coordinator


@kind(4)
def coordinator_is_killed(fleet: Fleet, fault: Fault) -> None:
    fleet.kill_coordinator()


@kind(8)
def coordinator_is_killed_at(fleet: Fleet, fault: Fault) -> None:
    """Between two lines: the n-th time that it comes to this point from now on."""
    if fleet.coordinator is not None:
        fleet.coordinator.kill_at = POINTS[int(fault.where * len(POINTS))], int(fault.which * 6)


@kind(3, 1, 300)
def coordinator_is_stopped(fleet: Fleet, fault: Fault) -> None:
    if fleet.coordinator is not None:
        fleet.coordinator.pause(fault.for_s)


@kind(2, 1, 200)
def coordinator_stalls(fleet: Fleet, fault: Fault) -> None:
    """Stopped between its next journal entry and what it wrote that it would do."""
    if fleet.coordinator is not None:
        fleet.coordinator.stall_s = fault.for_s


@kind(2, 5, 200)
def second_coordinator(fleet: Fleet, fault: Fault) -> None:
    """The old one is stopped, perhaps between journal and deed; another takes over, and then the old one goes on."""
    fleet.supersede(fault.for_s, stalled=fault.which < 0.5)


@kind(1, 20, 300)
def batch_host_is_cut_off(fleet: Fleet, fault: Fault) -> None:
    """The coordinator reaches no engine; srun's own connections outlive it."""
    fleet.cluster.batch_host_cut_until = fleet.time.now + fault.for_s
    fleet.disturb_all()


@kind(2, 5, 200)
def ports_cannot_be_looked_at(fleet: Fleet, fault: Fault) -> None:
    """The batch host has no descriptor left: nothing is observed of any port."""
    fleet.cluster.blind_until = fleet.time.now + fault.for_s


@kind(1, 60, 8000)
def wall_clock_jumps(fleet: Fleet, fault: Fault) -> None:
    fleet.time.wall_is_off_s += fault.for_s if fault.which < 0.5 else -fault.for_s


@kind(2, 5, 300)
def disk_is_full(fleet: Fleet, fault: Fault) -> None:
    fleet.files.full_until = fleet.time.now + fault.for_s


@kind(2, 30, 900)
def files_are_seen_late(fleet: Fleet, fault: Fault) -> None:
    fleet.files.delay_s = 1.0 + 59.0 * fault.which
    fleet.time.after(fault.for_s, fleet.see_files_soon)


@kind(1, 30, 600)
def files_are_stale(fleet: Fleet, fault: Fault) -> None:
    fleet.files.errors_until = fleet.time.now + fault.for_s


# --------------------------------------------------------------------------------------------------------------- people


@kind(3)
def operator_restarts(fleet: Fleet, fault: Fault) -> None:
    fleet.ask("restart", group_of(fleet, fault), delay_s=fault.which * 5)


@kind(1)
def operator_drains(fleet: Fleet, fault: Fault) -> None:
    fleet.ask("drain", group_of(fleet, fault), delay_s=fault.which * 5)


@kind(0.7)
def operator_drains_a_node(fleet: Fleet, fault: Fault) -> None:
    fleet.ask("drain", any_node(fleet, fault), delay_s=fault.which * 5)


@kind(1)
def operator_resumes_nodes(fleet: Fleet, fault: Fault) -> None:
    chosen = fleet.plan.nodes[int(fault.where * len(fleet.plan.nodes)) :]
    fleet.ask("resume", *chosen, delay_s=fault.which * 5)


@kind(2)
def operator_resumes(fleet: Fleet, fault: Fault) -> None:
    fleet.ask("resume", *(g.id for g in fleet.plan.groups), delay_s=fault.which * 5)


@kind(0.3)
def operator_stops(fleet: Fleet, fault: Fault) -> None:
    fleet.ask("stop", delay_s=fault.which * 5)


@kind(0.3)
def operator_errs(fleet: Fleet, fault: Fault) -> None:
    fleet.ask(("restart", "explode")[fault.which < 0.5], "no/such")


@kind(0.3)
def job_is_requeued(fleet: Fleet, fault: Fault) -> None:
    fleet.end_job(requeue=True)


def request(number: int, verb: str, groups: tuple[str, ...]) -> Request:
    return Request(id=f"{verb}-{number}", verb=verb, groups=groups, who="sim")
