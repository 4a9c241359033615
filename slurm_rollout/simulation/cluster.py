"""The truth: nodes, srun, steps, agents, engines, ports, and a Slurm that can be away.

Nothing here knows the coordinator. It starts and signals steps, asks Slurm and probes engines; what it gets to see of
the truth may be late, lost or a lie. Times that are not given are those measured on Slurm 22.05.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

from slurm_rollout.core.model import Job, Listing, NodeWord
from slurm_rollout.core.names import step_name
from slurm_rollout.core.plan import FleetPlan
from slurm_rollout.simulation.clock import Chance, Timeline
from slurm_rollout.simulation.parts import Engine, Incarnation, Node, Step
from slurm_rollout.steps import Key

AGENT_STARTS_S = 0.06
KILL_S = 0.03
SRUN_ENDS_S = 0.02
CANCEL_S = 0.2
TWIN_S = 2.0  # srun killed -9: its twin ends the step
KILL_WAIT_S = 7.0  # srun gives up on a cut node's step after KillWait and 2 s, and exits with 0
UNKILLABLE_S = 60.0  # slurmstepd gives up on a process that does not die: the step counts as ended
NODE_DOWN_S = 300.0  # SlurmdTimeout
NODE_SILENT_S = 100.0  # slurmctld asks nodes whether they live every third of that
NODE_GONE_S = 2.0  # from DOWN until the job has one node less (--no-kill)
GIVES_UP_S = 9.0  # srun, while slurmctld does not answer

Answer = Literal["ok", "late", "no", "refused"]


class Slurm(NamedTuple):
    """What one question to the controller will bring: the answer, or None, and after how long."""

    listing: Listing | None
    delay_s: float


class Cluster:
    """Everything that is true."""

    def __init__(self, plan: FleetPlan, time: Timeline, chance: Chance, load_s: Callable[[str, int], float]) -> None:
        self.plan = plan
        self.time = time
        self.chance = chance
        self.load_s = load_s
        self.nodes = {n: Node(n) for n in plan.nodes}
        self.incarnations: dict[tuple[str, int], Incarnation] = {}
        self.newest: dict[str, Incarnation] = {}
        self.steps: list[Step] = []  # those that Slurm lists, whose srun or agent lives, or whose engines do
        self.slurm_away_until = 0.0
        self.slurm_slow_until = 0.0
        self.cancels_lost_until = 0.0
        self.refuses_launches_until = 0.0
        self.batch_host_cut_until = 0.0
        self.blind_until = 0.0  # the batch host has no descriptor left to look at a port
        self.job_ends_at: float | None = None  # by its time limit
        self.job_ending = False
        self.job_ended_at = 0.0
        self.questions = 0
        self._pids = 100
        # Hints to whoever watches: something of this step, or of this incarnation, is different now.
        self.on_step: Callable[[Step], None] = lambda step: None
        self.on_change: Callable[[Incarnation], None] = lambda incarnation: None
        self.on_engine_start: Callable[[Engine], None] = lambda engine: None
        self.on_launch: Callable[[Step], None] = lambda step: None
        self.heartbeat_at: Callable[[Step], float] = lambda step: self.time.now  # the newest that its agent can see
        self.on_listening: Callable[[Step, int], None] = lambda step, rank: None
        self.on_disturbed_sleep: Callable[[Incarnation, bool], None] = lambda incarnation, local: None
        self.note: Callable[..., None] = lambda *words: None
        self._groups = {g.id: g for g in plan.groups}
        self._pools = {g.id: p for p in plan.pools for g in p.groups}

    # ----------------------------------------------------------------------------------------------------------- launch

    def launch(self, key: Key, placed: FleetPlan, term: int, absent: Mapping[str, int]) -> Step:
        """Start one srun, of a group as it stands now."""
        group = placed.group(key.group)
        name = step_name(placed, key.group, key.incarnation, key.node, sweep=key.sweep)
        found = self.incarnations.get((key.group, key.incarnation))
        if found is None:
            found = Incarnation(group, key.incarnation, self.load_s(key.group, key.incarnation))
            self.incarnations[found.id] = found
            self.newest[key.group] = found
            old = key.incarnation - 20
            self.incarnations.pop((key.group, old), None)
        self._pids += 1
        step = Step(key, group, name, self._pids, term, found, self.time.now, absent)
        self.on_launch(step)
        if not key.sweep:
            found.steps[key.node] = step
        self.steps.append(step)
        node, now = self.nodes[key.node], self.time.now
        if self.job_ending:
            self._refuse(step, 0.05, 1, "job has expired")
        elif now < self.slurm_away_until:
            self._refuse(step, GIVES_UP_S, 1, "Unable to contact slurm controller (connect failure)")
        elif node.lost:
            self._refuse(step, 0.05, 1, "Requested node configuration is not available")
        elif now < self.refuses_launches_until:
            self._refuse(step, 0.1, 1, "Unable to create step: Memory required by task is not available")
        else:
            step.listed = True
            delay_s = AGENT_STARTS_S + self.chance.between(0.0, 0.1, "launch", key)
            self.time.after(delay_s, lambda: self._agent_starts(step))
        return step

    def _refuse(self, step: Step, after_s: float, code: int, words: str) -> None:
        step.incarnation.hurt("launch", self.time.now)
        self.time.after(after_s, lambda: self._srun_ends(step, code, words))

    def _agent_starts(self, step: Step) -> None:
        node = self.nodes[step.key.node]
        if not step.srun_lives or not step.listed:
            step.listed = False
            return
        if node.cut or node.lost:
            step.listed = False
            self._refuse(step, 3.1, 233, "Task launch failed: Communication connection failure")
            return
        if self.time.now < node.sick_until:
            node.sick_at = self.time.now
            if node.sickness == "srun":
                step.listed = False
                self._refuse(step, 0.1, 1, "Task launch failed on node: Slurmd could not execve job")
                return
        step.agent = "fencing"
        node.agents.append(step)
        self.say(step, report="hello", step=f"1.{step.pid}")
        if self.time.now < node.sick_until and not step.key.sweep:
            self._agent_ends(step, node.sickness, "the node is sick")
            return
        claims = node.claims.setdefault(step.key.group, set())
        if not step.key.sweep:
            if any(c >= step.key.incarnation for c in claims):
                self._agent_ends(step, "other_incarnation", "an equal or newer claim is on this node")
                return
            claims.add(step.key.incarnation)
        deadline = self.time.now + self._pools[step.key.group].fence.timeout_s
        self._fence(step, deadline, 0.02)

    def _fence(self, step: Step, deadline: float, pause_s: float) -> None:
        """Until nothing old lives, every port can be bound and the memory is back."""
        if step.agent != "fencing":
            return
        node, now = self.nodes[step.key.node], self.time.now
        waits_for, cause = "", ""
        for agent in list(node.agents):
            if agent is not step and not agent.key.sweep and self._is_leftover(step, agent.key):
                self.agent_killed(agent)
        for engine in list(node.engines):
            if self._is_leftover(step, Key(*engine.incarnation.id, node.name, False)):
                self.kill(engine)
                waits_for, cause = f"a process of incarnation {engine.incarnation.number}", "leftover_process"
        if not waits_for:
            for port in self._ports_of(step):
                if holder := self.port_holder(node, port):
                    waits_for, cause = f"port {port} is held by {holder}", "port_busy"
                    break
        if not waits_for and now < node.gpu_stuck_until and not step.key.sweep:
            waits_for, cause = "GPU memory", "gpu_memory"
        if not waits_for:
            if step.key.sweep:
                self._agent_ends(step, "swept", "")
                return
            step.agent, step.was_fenced = "fenced", True
            self.say(step, report="fenced")
        elif now >= deadline:
            self._agent_ends(step, cause, waits_for)
        else:
            if waits_for != step.waits_for:
                step.waits_for = waits_for
                self.say(step, report="fence_waits", message=waits_for)
            self.time.after(pause_s, lambda: self._fence(step, deadline, min(2 * pause_s, 1.0)))

    @staticmethod
    def _is_leftover(step: Step, other: Key) -> bool:
        newest = step.key.incarnation if step.key.sweep else step.key.incarnation - 1
        return other.incarnation <= {**step.absent, step.key.group: newest}.get(other.group, 0)

    def _ports_of(self, step: Step) -> Iterable[int]:
        for member in step.plan.on(step.key.node):
            yield from member.fenced_ports

    def port_holder(self, node: Node, port: int) -> str:
        """Return who has bound a port; empty when nobody has."""
        for engine in node.engines:
            if port in engine.member.ports.values():
                return f"{engine.incarnation.plan.id} incarnation {engine.incarnation.number}"
        return "a stranger" if node.strangers.get(port, 0.0) > self.time.now else ""

    def accepts(self, node: Node, port: int) -> bool:
        """Tell whether a connection from the batch host is accepted."""
        if node.cut or node.lost or self.time.now < self.batch_host_cut_until:
            return False
        if node.strangers.get(port, 0.0) > self.time.now:
            return True
        return any(e.listens and port == e.member.ports["http"] for e in node.engines)

    # ---------------------------------------------------------------------------------------------------------- signals

    def hears(self, step: Step) -> bool:
        node = self.nodes[step.key.node]
        return step.srun_lives and not node.cut and self.time.now >= node.deaf_until

    def signal(self, step: Step, *, stop: bool) -> None:
        """SIGUSR1 or SIGUSR2 to an srun, which forwards it."""
        hear = self.usr1 if stop else self.usr2
        if self.time.now < self.nodes[step.key.node].late_until:
            self.time.after(self.chance.between(0.5, 8.0, "signal", step.key, self.time.now), lambda: hear(step))
        else:
            hear(step)

    def usr2(self, step: Step) -> None:
        """Go; when the engines run already, a snapshot."""
        if not self.hears(step):
            return
        if step.agent == "fenced":
            step.agent = "serving"
            node, now = self.nodes[step.key.node], self.time.now
            members = step.plan.on(step.key.node)
            for member in members:
                engine = Engine(member, step.incarnation)
                step.incarnation.engines[member.rank] = engine
                node.engines.append(engine)
                self.on_engine_start(engine)
                self.time.at(now + step.incarnation.load_s, lambda e=engine: self._loaded(step, e))  # type: ignore[misc]
            self.say(step, report="started", ranks=[m.rank for m in members], pids=[0 for _ in members])
            if limit_s := self._pools[step.key.group].fence.self_fence_s:
                self.time.after(limit_s, lambda: self._listen(step, now, limit_s))
        elif step.agent == "serving" and not step.snapshot_taken:
            step.snapshot_taken = True
            delay_s = self.chance.between(0.1, 2.9, "snapshot", step.key)
            self.time.after(delay_s, lambda: self.say(step, report="snapshot"))

    def _listen(self, step: Step, since: float, limit_s: float) -> None:
        """An agent that saw heartbeats come, and then none for so long, ends its engines."""
        if step.agent != "serving":
            return
        now, heard_at = self.time.now, self.heartbeat_at(step)
        if heard_at > since:
            step.heard_at = max(heard_at, step.heard_at or 0.0)
        if step.heard_at is not None and now - step.heard_at >= limit_s:
            step.incarnation.hurt("silence", now)
            self._agent_ends(step, "self_fenced", f"no heartbeat for {now - step.heard_at:.0f} s")
            return
        due = now if step.heard_at is None else step.heard_at
        self.time.at(max(due + limit_s, now + 1.0), lambda: self._listen(step, since, limit_s))

    def _loaded(self, step: Step, engine: Engine) -> None:
        if not engine.alive or engine.frozen or engine.killed:
            return
        engine.up = engine.listens = True
        self.changed(step.incarnation)
        if engine.member.entrypoint and step.agent == "serving":
            self.say(step, report="listening", rank=engine.member.rank, port=engine.member.ports["http"], address="")
            self.on_listening(step, engine.member.rank)

    def usr1(self, step: Step) -> None:
        """Stop."""
        if not self.hears(step):
            return
        if step.agent == "none":
            step.listed = False
            self._srun_ends(step, 138, "")
        elif step.agent != "dead":
            self._agent_ends(step, "stopped", "as asked")

    # ------------------------------------------------------------------------------------------------------ how it ends

    def kill(self, engine: Engine) -> None:
        """SIGKILL: it is gone in a moment, unless it hangs in the kernel."""
        if engine.alive and not engine.killed:
            engine.killed = True
            gone_at = max(self.time.now + KILL_S, engine.unkillable_until)
            self.time.at(gone_at, lambda: self._gone(engine))
            self.changed(engine.incarnation)

    def _gone(self, engine: Engine) -> None:
        if engine.alive:
            engine.alive = False
            self.nodes[engine.member.node].engines.remove(engine)
            self.changed(engine.incarnation)

    def engine_ends(self, engine: Engine, code: int) -> None:
        """An engine ends by itself."""
        step = engine.incarnation.steps.get(engine.member.node)
        self._gone(engine)
        if step is not None and step.agent == "serving":
            message = f"exit code {code}"
            self._agent_ends(step, "engine_exited", message, rank=engine.member.rank, code=code)

    def _agent_ends(self, step: Step, cause: str, message: str, **facts: object) -> None:
        """The agent kills its tree, and says its last word when all of it is dead."""
        if step.agent in ("ending", "dead"):
            return
        step.agent = "ending"
        for engine in step.engines:
            self.kill(engine)
        self._last_word(step, {"report": "exit", "cause": cause, "message": message, **facts})

    def _last_word(self, step: Step, record: dict[str, object]) -> None:
        if step.agent != "ending":
            return
        living = [e for e in step.engines if e.alive]
        if living:
            at = max(self.time.now + 0.01, *(e.unkillable_until for e in living))
            self.time.at(at, lambda: self._last_word(step, record))
            return
        self.say(step, **record)
        self._bury(step)
        self._step_ends(step, {"stopped": 0, "swept": 0}.get(str(record["cause"]), 80))

    def agent_killed(self, step: Step) -> None:
        """SIGKILL for the agent: its engines die with it, and there is no last word."""
        if step.agent in ("none", "dead"):
            return
        self._bury(step)
        for engine in step.engines:
            if not engine.detached:
                self.kill(engine)
        self._step_ends(step, 137)

    def _bury(self, step: Step) -> None:
        step.agent = "dead"
        agents = self.nodes[step.key.node].agents
        if step in agents:
            agents.remove(step)

    def _step_ends(self, step: Step, code: int) -> None:
        """The node tells Slurm and srun, when it can."""
        if self.nodes[step.key.node].cut:
            step.kill_on_return = True
            return
        self.time.after(SRUN_ENDS_S, lambda: self._srun_ends(step, code, ""))
        self.time.after(2 * SRUN_ENDS_S, lambda: self._unlist(step))

    def _unlist(self, step: Step) -> None:
        """It is over for Slurm, unless the step stays completing: a prolog, an epilog or a file server that hangs."""
        completing_until = self.nodes[step.key.node].completing_until
        if self.time.now < completing_until:
            self.time.at(completing_until, lambda: self._unlist(step))
        else:
            step.listed = False

    def _srun_ends(self, step: Step, code: int, words: str) -> None:
        if step.srun_lives:
            step.srun_lives, step.ended_at = False, self.time.now
            step.code, step.stderr = code, words
            step.incarnation.hurt("srun", self.time.now)
            self.note("srun of", step.name, "ends with", code, words)
            self.on_step(step)

    def slurm_kills(self, step: Step, code: int = 137) -> None:
        """Slurm ends the step: SIGKILL for all of it. It counts as ended when all is dead, or after a while."""
        node = self.nodes[step.key.node]
        if not step.listed:
            return
        if node.cut:
            step.kill_on_return = True
            self.time.after(KILL_WAIT_S, lambda: self._srun_ends(step, 0, ""))
            return
        if step.agent == "none":
            step.listed = False
            self._srun_ends(step, code, "")
            return
        engines = step.engines
        if step.agent != "dead":
            self._bury(step)
        for engine in engines:
            self.kill(engine)
        gone_at = max([self.time.now + KILL_S, *(e.unkillable_until for e in engines if e.alive)])
        ended_at = min(gone_at, self.time.now + UNKILLABLE_S) + SRUN_ENDS_S
        self.time.at(ended_at, lambda: self._srun_ends(step, code, ""))
        self.time.at(ended_at + SRUN_ENDS_S, lambda: self._unlist(step))

    # ---------------------------------------------------------------------------------------------------------- reports

    def say(self, step: Step, /, **report: object) -> None:
        """The agent says something: it is in srun's file a moment later, where there still is an srun to write it."""
        step.unsent.append(report)
        delay_s = 0.002 + self.chance.between(0.0, 0.02, "say", step.key, len(step.reports) + len(step.unsent))
        if report["report"] == "exit":
            delay_s = 0.001  # srun ends after that, and what it wrote is complete then
        self.time.after(delay_s, lambda: self._deliver(step))

    def _deliver(self, step: Step) -> None:
        if not step.unsent or self.nodes[step.key.node].cut or not step.srun_linked:
            return
        if not step.srun_lives:
            step.unsent.clear()
            return
        step.reports += step.unsent
        step.unsent.clear()
        self.on_step(step)

    # ----------------------------------------------------------------------------------------------------------- health

    def changed(self, incarnation: Incarnation) -> None:
        """Bring up to date whether the incarnation serves: with one member gone or hung, none of them does."""
        engines = incarnation.engines
        works = len(engines) == len(incarnation.plan.members) and all(
            e.alive and e.up and not e.frozen and not e.half and not e.killed for e in engines.values()
        )
        if works != incarnation.works:
            incarnation.works = works
            incarnation.changed_at = self.time.now
            if works and incarnation.worked_at is None:
                incarnation.worked_at = self.time.now
        self.on_change(incarnation)

    def answer(self, incarnation: Incarnation, rank: int, *, local: bool = False) -> Answer:
        """Return what one real request to an entrypoint brings."""
        now = self.time.now
        if not local and (self.unreachable(incarnation.plan.members[rank].node) or now < self.batch_host_cut_until):
            return "late"
        engine = incarnation.engines.get(rank)
        if engine is None or not engine.alive or not engine.listens:
            return "refused"
        if incarnation.asleep:
            self.on_disturbed_sleep(incarnation, local)
            return "late"
        if engine.frozen or engine.killed:
            return "late"
        if now < incarnation.refuses_until:
            return "no"
        return "ok" if incarnation.works and now >= incarnation.busy_until else "late"

    def counter(self, incarnation: Incarnation, rank: int, *, local: bool = False) -> float | None:
        """Return the progress counter, where its page can be read."""
        now = self.time.now
        if not local and (self.unreachable(incarnation.plan.members[rank].node) or now < self.batch_host_cut_until):
            return None
        engine = incarnation.engines.get(rank)
        if engine is None or not engine.alive or not engine.listens or engine.frozen or engine.killed:
            return None
        if incarnation.asleep:
            return incarnation.slept_at
        return now if incarnation.works else incarnation.changed_at

    def unreachable(self, node: str) -> bool:
        found = self.nodes[node]
        return found.cut or found.lost

    def is_fine(self, incarnation: Incarnation) -> bool:
        """Tell whether every probe of it succeeds now, and will until `on_change` says otherwise."""
        now = self.time.now
        return (
            incarnation.works
            and not incarnation.asleep
            and now >= incarnation.busy_until
            and now >= incarnation.refuses_until
            and now >= self.batch_host_cut_until
            and not any(self.unreachable(n) for n in incarnation.steps)
        )

    def sleeps(self, incarnation: Incarnation, *, asleep: bool) -> None:
        """The trainer puts its engines to sleep, or wakes them up."""
        incarnation.asleep = asleep
        if asleep:
            incarnation.slept_at = self.time.now
        else:
            incarnation.woke_at = self.time.now
        self.on_change(incarnation)

    # ------------------------------------------------------------------------------------------------------------ Slurm

    def list_steps(self) -> Slurm:
        """Answer which steps live. The answer is as old as the question."""
        self.questions += 1
        now = self.time.now
        if now < self.slurm_away_until:
            return Slurm(None, self.chance.between(9.0, 18.0, "listing", self.questions))
        self._forget()
        listed = [s for s in self.steps if s.listed]
        delay_s = 0.02
        if now < self.slurm_slow_until:
            delay_s = self.chance.between(1.0, 80.0, "listing", self.questions)
            if self.chance.between(0, 1, "valid", self.questions) < 0.2:
                return Slurm(None, delay_s)  # an answer without the batch step is none
        return Slurm(
            Listing(
                asked_at=now,
                names=frozenset(s.name for s in listed if s.agent != "none"),
                pids=frozenset(s.pid for s in listed),
            ),
            delay_s,
        )

    def look_at_job(self) -> tuple[Job | None, float | None, float]:
        """Answer whether the job goes on, and when its time is up; and say after how long that comes."""
        self.questions += 1
        if self.time.now < self.slurm_away_until:
            return None, None, self.chance.between(9.0, 18.0, "job", self.questions)
        slow = self.time.now < self.slurm_slow_until
        delay_s = self.chance.between(1.0, 80.0, "job", self.questions) if slow else 0.02
        return Job.ENDING if self.job_ending else Job.RUNNING, self.job_ends_at, delay_s

    def look_at_nodes(self) -> tuple[dict[str, NodeWord] | None, float]:
        """Answer how the nodes are. None: Slurm does not answer."""
        self.questions += 1
        if self.time.now < self.slurm_away_until:
            return None, self.chance.between(9.0, 18.0, "nodes", self.questions)
        slow = self.time.now < self.slurm_slow_until
        delay_s = self.chance.between(1.0, 80.0, "nodes", self.questions) if slow else 0.02
        return {name: self.word(node) for name, node in self.nodes.items()}, delay_s

    def word(self, node: Node) -> NodeWord:
        """Return what slurmctld thinks of a node now."""
        now = self.time.now
        if node.lost:
            return NodeWord.GONE if now - node.lost_at >= NODE_GONE_S else NodeWord.DOWN
        if node.cut and now - node.cut_at >= NODE_SILENT_S:
            return NodeWord.SILENT
        return NodeWord.DRAINING if node.draining else NodeWord.UP

    def reaches(self, name: str) -> bool | None:
        """Tell whether a node answers a connection from the batch host; None: that cannot be tried now."""
        if self.time.now < self.blind_until:
            return None
        return not self.unreachable(name) and self.time.now >= self.batch_host_cut_until

    def past(self, key: Key) -> Step:
        """Return a step of which only its files are left; one that was never launched has none."""
        found = self.incarnations.get((key.group, key.incarnation))
        step = None if found is None or key.sweep else found.steps.get(key.node)
        if step is None:
            group = self._groups[key.group]
            step = Step(key, group, "", 0, 0, Incarnation(group, key.incarnation, 0.0), self.time.now, {})
            step.srun_lives = False
        return step

    def exits(self) -> dict[tuple[int, int], int]:
        """Return what the supervisor could write down of what it reaped: (pid, start time) to exit code."""
        ended = [s for s in self.steps if s.code is not None and self.chance.between(0.0, 1.0, "exit", s.pid) < 0.5]
        return {(s.pid, s.pid): s.code for s in ended if s.code is not None}

    def _forget(self) -> None:
        self.steps = [s for s in self.steps if s.listed or s.srun_lives or s.lives]

    def cancel(self, steps: Iterable[Step]) -> None:
        """One scancel. A step whose id nobody knows has only its srun, which is told to give up."""
        now = self.time.now
        if now < self.slurm_away_until or now < self.cancels_lost_until:
            return
        for step in steps:
            self.time.after(CANCEL_S, lambda s=step: self.slurm_kills(s))  # type: ignore[misc]

    def end_job(self) -> None:
        """The job ends: Slurm kills every step."""
        self.job_ending, self.job_ended_at = True, self.time.now
        for step in list(self.steps):
            self.slurm_kills(step, 143)

    # ----------------------------------------------------------------------------------------------------------- faults

    def cut(self, name: str, for_s: float) -> None:
        """Cut a node off; Slurm gives it up when that lasts."""
        node = self.nodes[name]
        if node.cut or node.lost:
            return
        node.cut, node.cut_at = True, self.time.now
        self._touch_node(node)
        since = node.cut_at

        def over() -> None:
            if node.cut and node.cut_at == since:
                end = self.lose if for_s >= NODE_DOWN_S else self.rejoin
                end(name)

        self.time.after(min(for_s, NODE_DOWN_S), over)

    def rejoin(self, name: str) -> None:
        node = self.nodes[name]
        if not node.cut:
            return
        node.cut, node.back_at = False, self.time.now
        for step in [s for s in self.steps if s.key.node == name]:
            if step.srun_lives:
                self._deliver(step)
            if step.kill_on_return:
                step.kill_on_return = False
                if step.agent == "dead":
                    self._step_ends(step, 137)
                else:
                    self.slurm_kills(step)
        self._touch_node(node)

    def lose(self, name: str) -> None:
        """A node is gone for good: powered off, or given up by Slurm. Its steps end as far as Slurm can tell."""
        node = self.nodes[name]
        if node.lost:
            return
        node.lost, node.cut, node.lost_at = True, False, self.time.now
        for step in [s for s in self.steps if s.key.node == name]:
            step.listed = False
            step.unsent.clear()
            self._bury(step)
            self.time.after(1.0, lambda s=step: self._srun_ends(s, 1, f"Node failure on {name}"))  # type: ignore[misc]
        for engine in list(node.engines):
            self._gone(engine)
        self._touch_node(node)

    def _touch_node(self, node: Node) -> None:
        for incarnation in self.newest.values():
            if node.name in incarnation.steps:
                incarnation.hurt("node", self.time.now)
                self.on_change(incarnation)

    def srun_dies(self, step: Step, code: int = -9) -> None:
        """srun is gone, the step goes on: what its agent says from now on is lost."""
        step.incarnation.hurt("srun", self.time.now)
        self._srun_ends(step, code, "")

    def relink(self, step: Step) -> None:
        step.srun_linked = True
        self._deliver(step)

    def let_die(self) -> None:
        """No process hangs in the kernel any more, and no step stays completing."""
        for step in self.steps:
            if self.nodes[step.key.node].completing_until > self.time.now and not (step.lives or step.srun_lives):
                step.listed = False
        for node in self.nodes.values():
            node.completing_until = 0.0
            for engine in list(node.engines):
                engine.unkillable_until = 0.0
                if engine.killed:
                    self._gone(engine)

    def empty(self) -> None:
        """Another allocation: nothing of the last one is there."""
        for step in self.steps:
            step.srun_lives = step.listed = False
            step.agent = "dead"
        for name, node in list(self.nodes.items()):
            for engine in list(node.engines):
                self._gone(engine)
            self.nodes[name] = Node(name, back_at=self.time.now)
        self.steps.clear()
        self.job_ending, self.job_ends_at = False, None
