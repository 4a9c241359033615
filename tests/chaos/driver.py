"""One chaos run: a fleet with a spare on a real cluster, faults from outside, and records of all for the checker."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slurm_rollout.testing.fleet import SlurmFleet, wait_for
from slurm_rollout.testing.slurm_cluster import SlurmCluster
from tests.chaos import prober
from tests.chaos.records import (
    CALLS,
    END,
    FAULTS,
    PROBES,
    Recorder,
    barrier_watch,
    living,
    process_watch,
    user_calls,
)
from tests.chaos.schedule import HARMLESS, LOSS, Planned

START_S = 90.0
SETTLE_S = 10.0
"""After all is ready again: time in which nothing may fail."""
RECOVER_S = 240.0
"""After the last fault was lifted: until every group is ready, a node that Slurm had given up included."""
RESUME_AFTER_S = 10.0
"""After a node is back, and Slurm knows it: until the run is told."""
UNHARMED_S = 12.0
"""After a node is back: who has not failed by then has survived it."""
END_S = 60.0
TICK_S = 0.1
LIES = ("dead", "garbage", "503", "empty")

SPEC = """\
name = "chaos"
heartbeat_s = 0.5

[nodes]
count = {nodes}
spares = {spares}

[[pool]]
name = "actor"
groups = {actors}
nodes = 2
engine = {{ kind = "command", argv = {argv}, entrypoints = "all", model = "stub" }}

[[pool]]
name = "reward"
groups = 2
gpus = {half}
engine = {{ kind = "command", argv = {argv}, entrypoints = "all", model = "stub" }}

[probe.startup]
timeout_s = 40

[probe.liveness]
period_s = 1
timeout_s = 2
failure_threshold = 3
counter = {{ path = "/metrics", name = "stub_tokens_total" }}

[restart]
max_restarts = 100000
max_start_failures = 100000
backoff_initial_s = 0.5
backoff_max_s = 2

[fence]
timeout_s = 20

[slurm]
launch_timeout_s = 20
command_timeout_s = 10
"""


def spec(cluster: SlurmCluster, control: Path, nodes: int, spares: int) -> str:
    """Return the spec of a fleet on so many nodes: groups of two nodes, two groups that share one, and spares."""
    argv = [str(cluster.python), "-m", "slurm_rollout.testing.stub_engine", "--load-s=0.5", "--model=stub"]
    argv += ["--entrypoints=all", f"--control={control}"]
    return SPEC.format(
        nodes=nodes, spares=spares, actors=(nodes - spares - 1) // 2, half=cluster.gpus // 2, argv=json.dumps(argv)
    )


class Chaos:
    """Does the faults of a schedule to one fleet, and lifts them."""

    def __init__(self, cluster: SlurmCluster, nodes: int, spares: int, out: Path, say: Callable[[str], None]) -> None:
        self.cluster = cluster
        self.fleet = SlurmFleet(cluster)
        self.out = out
        self._say = say
        self._nodes, self._spares = nodes, spares
        self._fleet_nodes = cluster.nodes[-nodes:]
        self._space = {_namespace(cluster, node): node for node in cluster.nodes}
        self._faults = Recorder(out / FAULTS)
        self._calls = Recorder(out / CALLS)
        self._calls_before = 0  # of slurmctlds that were stopped: they forget what they counted
        self._calls_base = 0
        self._numbers = itertools.count()
        self._lifts: list[tuple[float, int, Callable[[], None]]] = []  # when, and how, a fault is lifted
        # Not recovered yet: kind, group, incarnation, when; of the coordinator "" and its term.
        self._unhealed: list[tuple[str, str, int, float]] = []
        self._lies: list[int] = []
        self._away: set[str] = set()  # nodes that are cut
        self._lost: set[str] = set()  # nodes that Slurm has taken from the job
        self._back: set[str] = set()  # nodes that were, and have to be resumed where the run gave them up
        self._resumed: set[str] = set()
        self._resume_at = 0.0
        self._saturated: set[str] = set()
        self._began = time.time()

    # -------------------------------------------------------------------------------------------------------- the run

    def run(self, plan: Sequence[Planned], duration_s: float) -> None:
        """Start the fleet, do all this, lift it, wait until all is well, and end it."""
        fleet = self.fleet
        fleet.start(spec(self.cluster, fleet.control, self._nodes, self._spares), nodes=len(self.cluster.nodes))
        with fleet:
            fleet.wait("all groups ready", lambda: not self._not_ready(), START_S)
            with self._records():
                self._count_calls()
                self._began = time.time()
                self._go_through(plan, duration_s)
                self._end()

    def _go_through(self, plan: Sequence[Planned], duration_s: float) -> None:
        waiting = list(plan)
        while (now := time.time() - self._began) < duration_s and not self._is_over():
            while self._lifts and self._lifts[0][0] <= time.time():
                heapq.heappop(self._lifts)[2]()
            while waiting and waiting[0].at_s <= now:
                self._do(waiting.pop(0))
            self._note_recoveries()
            self._resume()
            time.sleep(TICK_S)

    def _end(self) -> None:
        """Lift everything, wait until all groups are ready, and let the run end by its own command."""
        for _, _, lift in sorted(self._lifts):
            lift()
        self._lifts.clear()
        self.fleet.control.write_text("{}")
        for n in self._lies:
            self._faults.write(n=n, until=time.time())
        self.cluster.heal()
        self._say("all faults are lifted")
        lifted = time.time()
        while self._not_ready() and time.time() < lifted + RECOVER_S and not self._is_over():
            self._resume()
            if not self._back:  # it may have come too early
                self._back, self._resume_at = self._resumed, time.time() + 2 * RESUME_AFTER_S
            self._note_recoveries()
            time.sleep(2 * TICK_S)
        waited_s, not_ready = time.time() - lifted, self._not_ready()
        if not not_ready:
            time.sleep(SETTLE_S)
        self._count_calls()
        at = time.time()
        self.cluster.run(["slurm-rollout", "stop", "--run-dir=run"], check=False)
        deadline = time.time() + END_S
        while (state := self._job_state()) in ("RUNNING", "COMPLETING") and time.time() < deadline:
            time.sleep(0.5)
        while (left := self.cluster.user_pids()) and time.time() < deadline:
            time.sleep(0.5)
        lines = [f"{pid} {_command_line(pid)}" for pid in left]
        Recorder(self.out / END).write(at=at, waited_s=waited_s, not_ready=not_ready, left=lines, state=state)

    def _is_over(self) -> bool:
        return self.fleet.barrier().get("phase") in ("failed", "stopped")

    def _not_ready(self) -> list[str]:
        groups = self.fleet.barrier().get("groups", [])
        return [g["id"] for g in groups if not g["serving"]] if groups else ["every group"]

    def _job_state(self) -> str:
        # As root: root's questions are not the user's, whose calls are counted.
        shown = self.cluster.run(["scontrol", "--oneliner", "show", "job", self.fleet.job], user=False, check=False)
        return shown.stdout.partition("JobState=")[2].partition(" ")[0]

    # ---------------------------------------------------------------------------------------------------------- faults

    def _do(self, planned: Planned) -> None:
        done = getattr(self, f"_{planned.kind}")(planned)
        if done is None:
            self._say(f"{planned.kind:<12} nobody to do it to")

    def _note(self, planned: Planned, at: float, lift: Callable[[], None] | None = None, **what: Any) -> bool:
        """Write down a fault that began at that time, and when and how it will be lifted."""
        n = next(self._numbers)
        self._faults.write(n=n, at=at, kind=planned.kind, harmless=planned.kind in HARMLESS, **what)
        where = " ".join(f"{name} {value}" for name, value in what.items())
        self._say(f"{planned.kind:<12} {where}" + (f" for {planned.lasts_s:.1f} s" if lift else ""))
        if what.get("group") and planned.kind not in HARMLESS:
            self._unhealed.append((planned.kind, what["group"], what["incarnation"], at))
        if planned.kind == "lie":
            self._lies.append(n)
        if lift:

            def lifted() -> None:
                lift()
                self._faults.write(n=n, until=time.time())
                self._say(f"{planned.kind:<12} lifted: {where}")

            heapq.heappush(self._lifts, (at + planned.lasts_s, n, lifted))
        return True

    def _kill(self, planned: Planned) -> bool | None:
        return self._signal(planned, signal.SIGKILL)

    def _stop(self, planned: Planned) -> bool | None:
        return self._signal(planned, signal.SIGSTOP)

    def _signal(self, planned: Planned, number: int) -> bool | None:
        members = [
            m for m in living(self.cluster.uid, self._space) if m["state"] != "T" and m["node"] not in self._away
        ]
        if not members:
            return None
        member = _chosen(sorted(members, key=lambda m: (m["group"], m["rank"], m["pid"])), planned.luck)
        at = time.time()
        try:
            os.kill(member["pid"], number)
        except ProcessLookupError:
            return None
        return self._note(planned, at, **{name: member[name] for name in ("group", "incarnation", "rank", "node")})

    def _lie(self, planned: Planned) -> bool | None:
        groups = self._serving()
        if not groups:
            return None
        group = _chosen(groups, planned.luck)
        rank = int(planned.luck * 1000) % len(group["urls"])
        lie = _chosen(LIES, planned.detail)
        at = time.time()
        self.fleet.fault(f"{group['id']}/{rank}", generation=lie, incarnations=[group["incarnation"]])
        return self._note(planned, at, group=group["id"], incarnation=group["incarnation"], rank=rank, detail=lie)

    def _saturate(self, planned: Planned) -> bool | None:
        groups = self._serving()
        if not groups:
            return None
        group = _chosen(groups, planned.luck)
        name = group["id"]
        at = time.time()
        self.fleet.fault(name, saturated=True, incarnations=[group["incarnation"]])
        self._saturated.add(name)

        def lift() -> None:
            self.fleet.fault(name, saturated=None)
            self._saturated.discard(name)

        return self._note(planned, at, lift, group=name, incarnation=group["incarnation"])

    def _serving(self) -> list[dict[str, Any]]:
        """Return the groups that may be lied for, or saturated: a saturated one cannot show a lie."""
        lied_for = {(group, incarnation) for kind, group, incarnation, _ in self._unhealed if kind == "lie"}
        return [
            g
            for g in self.fleet.barrier().get("groups", ())
            if g["serving"] and g["id"] not in self._saturated and (g["id"], g["incarnation"]) not in lied_for
        ]

    def _cut(self, planned: Planned) -> bool | None:
        nodes = [n for n in self._fleet_nodes if n not in self._away | self._lost]
        if not nodes:
            return None
        node = _chosen(nodes, planned.luck)
        told = planned.detail < 0.7  # else Slurm sees by itself, after a while, that the node is back
        groups = self.fleet.barrier().get("groups", ())
        on_it = [g for g in groups if any(f"//{node}:" in url for url in g["urls"])]
        at = time.time()
        self.cluster.cut(node)
        self._away.add(node)
        if planned.kind == LOSS:
            self._lost.add(node)

        def lift() -> None:
            self.cluster.join(node)
            if told:
                self.cluster.register(node)
            self._away.discard(node)
            self._back.add(node)
            self._resume_at = time.time() + RESUME_AFTER_S
            heapq.heappush(self._lifts, (time.time() + UNHARMED_S, next(self._numbers), forget))

        def forget() -> None:
            """Who still serves did not mind: what happens to it later is not because of this."""
            self._unhealed = [f for f in self._unhealed if (f[0], f[3]) != (planned.kind, at) or not self._offered(f)]

        self._unhealed += [(planned.kind, g["id"], g["incarnation"], at) for g in on_it]
        return self._note(planned, at, lift, node=node, returns_s=RESUME_AFTER_S if told else None)

    _loss = _cut

    def _resume(self) -> None:
        """Give nodes that are back to the run again, as a person would: one that was given up stays given up."""
        if not self._back or time.time() < self._resume_at:
            return
        for node in sorted(self._back):
            # No answer is waited for, and none is expected where the node was back before it was given up.
            done = self.cluster.run(["slurm-rollout", "resume", node, "--no-wait", "--run-dir=run"], check=False)
            self._say(f"{'resume':<12} {node}: {(done.stdout or done.stderr).strip()[:120]}")
        self._resumed |= self._back
        self._back = set()

    def _coordinator(self, planned: Planned) -> bool | None:
        pid = self._coordinator_pid()
        if pid is None:
            return None
        term = self.fleet.barrier().get("term", 0)
        at = time.time()
        os.kill(pid, signal.SIGKILL)
        self._unhealed.append((planned.kind, "", term, at))
        return self._note(planned, at, detail=f"term {term}")

    def _coordinator_pid(self) -> int | None:
        # Not the fleet's method: that one waits until there is one.
        for pid in self.cluster.user_pids("slurm_rollout.coordinator"):
            if "slurm_rollout.coordinator" in _command_line(pid):
                return pid
        return None

    def _freeze(self, planned: Planned) -> bool | None:
        at = time.time()
        self.cluster.freeze_controller()
        return self._note(planned, at, self.cluster.thaw_controller)

    def _halt(self, planned: Planned) -> bool | None:
        self._calls_before += self._asked() - self._calls_base
        at = time.time()
        self.cluster.stop_controller()
        self._calls_base = 0
        return self._note(planned, at, self.cluster.start_controller)

    def _offered(self, fault: tuple[str, str, int, float]) -> bool:
        groups = self.fleet.barrier().get("groups", ())
        return any(g["urls"] and (g["id"], g["incarnation"]) == fault[1:3] for g in groups)

    def _note_recoveries(self) -> None:
        barrier = self.fleet.barrier()
        numbers = {g["id"]: g["incarnation"] for g in barrier.get("groups", ()) if g["serving"]}
        numbers[""] = barrier.get("term", 0)  # of the coordinator
        for fault in tuple(self._unhealed):
            kind, name, number, at = fault
            if numbers.get(name, 0) > number:
                self._unhealed.remove(fault)
                what = f"{name} serves again" if name else "the next one writes the barrier"
                self._say(f"{kind:<12} recovered: {what} {time.time() - at:.1f} s after it")

    # --------------------------------------------------------------------------------------------------------- records

    @contextmanager
    def _records(self) -> Iterator[None]:
        prober_file = self.cluster.home / "prober.py"
        shutil.copy(prober.__file__, prober_file)
        # As root, so that it is none of the processes that must not be left.
        argv: list[str | Path] = [
            self.cluster.python,
            "-IS",
            prober_file,
            self.fleet.run.barrier,
            self.cluster.home / PROBES,
        ]
        asker = self.cluster.popen_in_node(self.cluster.nodes[0], argv, user=False)
        watches = [
            barrier_watch(self.fleet.run.barrier, self.out),
            process_watch(self.cluster.uid, self._space, self.out),
        ]
        for watch in watches:
            watch.start()
        try:
            yield
            assert asker.poll() is None, f"the prober has ended: {asker.communicate()[0]}"
        finally:
            asker.kill()
            asker.communicate()
            for path in (*self.fleet.run.path.glob("events.*.jsonl"), self.cluster.home / PROBES, *self._logs()):
                if path.exists():
                    shutil.copy(path, self.out / path.name)
            for watch in watches:
                watch.stop()

    def _logs(self) -> Iterator[Path]:
        yield self.cluster.home / "up.log"
        yield from self.cluster.logs.glob("slurmctld.*.log")

    def _asked(self) -> int:
        def answer() -> str:  # a slurmctld that was away a moment ago is slow
            return self.cluster.run(["sdiag"], user=False, check=False).stdout

        return user_calls(wait_for("sdiag", answer, START_S), self.cluster.uid)

    def _count_calls(self) -> None:
        self._calls.write(at=time.time(), calls=self._calls_before + self._asked() - self._calls_base)


def _chosen(those: Sequence[Any], luck: float) -> Any:
    return those[min(int(luck * len(those)), len(those) - 1)]


def _namespace(cluster: SlurmCluster, node: str) -> str:
    """Return the name of the node's pid namespace, as /proc shows it outside."""
    return cluster.in_node(node, ["readlink", "/proc/self/ns/pid"], user=False).stdout.strip()


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "(has ended)"
