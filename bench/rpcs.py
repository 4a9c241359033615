"""What a fleet costs Slurm: the remote procedure calls that slurmctld answers, counted by `sdiag` before and after.

Each size of fleet runs on a real test cluster of its own, all of them side by side, and beside them one with a job that
only sleeps: what Slurm's daemons say to one another without a fleet. Counted are the steady state for --minutes, one
recovery after a kill -9, and one `status` of each kind from a login node. The fleets have the default probes and audit.

    sudo .venv/bin/python bench/rpcs.py [--minutes 10] [--members 2,8,32]

Needs root and the distribution's Slurm (`.ci/install-slurm`). The counts do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from slurm_rollout.testing.fleet import SlurmFleet
from slurm_rollout.testing.slurm_cluster import SlurmCluster, SlurmClusterError, why_unavailable

NODES = 4
PATIENCE_S = 180.0  # of whoever starts many engines at once on few cores
SETTLED_S = 20.0
"""After a start or a recovery what is still asked because of it has been asked."""

RECOVERY = "one recovery"
STATUS = {
    "`status --me`": "status --me",
    "`status -j JOB`": "status -j {job}",
    "`status --run-dir D`": "status --run-dir run",
}
OUR_OWN = "REQUEST_STATS_INFO"  # sdiag itself

SPEC = """\
name = "rpcs"

[[pool]]
name = "actor"
groups = {groups}
nodes = 2
members_per_node = {per_node}

[pool.engine]
kind = "command"
argv = {argv}
entrypoints = "all"
model = "stub"
"""

ENOUGH = threading.Event()
"""Somebody's part has failed: nobody's is of use."""

IDLE = "#!/bin/bash\n#SBATCH --exclusive --gres=gpu:8\nexec sleep infinity\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What slurmctld has answered so far, or in a period: in all by type, and the user's part of it."""

    types: Counter[str]
    user: int

    def __sub__(self, before: Calls) -> Calls:
        types = {kind: n - before.types[kind] for kind, n in self.types.items() if n != before.types[kind]}
        return Calls(types=Counter(types), user=self.user - before.user)

    @property
    def others(self) -> int:
        """Those of the daemons, which no limit of a site counts."""
        return self.types.total() - self.user


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The figures of one fleet, or of the cluster without one: of the steady state, and of what was done after it."""

    members: int
    steady: Calls
    after: Mapping[str, Calls]


def parsed(sdiag: str, uid: int) -> Calls:
    """Return the counts that sdiag prints, in all of its versions; its own are left out."""
    by_type, _, by_user = sdiag.partition("Remote Procedure Call statistics by user")
    types = {kind: int(n) for kind, n in re.findall(r"^\s*(\w+)\s*\(\s*\d+\)\s*count:\s*(\d+)", by_type, re.M)}
    users = {int(who): int(n) for who, n in re.findall(r"^\s*\S+\s*\(\s*(\d+)\)\s*count:\s*(\d+)", by_user, re.M)}
    types.pop(OUR_OWN, None)
    return Calls(types=Counter(types), user=users.get(uid, 0))


def count(cluster: SlurmCluster) -> Calls:
    """Ask, as root: root's questions are not the user's."""
    return parsed(cluster.run(["sdiag"], user=False).stdout, cluster.uid)


def pause(duration_s: float) -> None:
    if ENOUGH.wait(duration_s):
        raise SystemExit("given up")


def watch_idle(minutes: float, begin: threading.Barrier) -> Found:
    """Count what an idle job costs."""
    with SlurmCluster(nodes=NODES) as cluster:
        job = cluster.sbatch(IDLE, f"--nodes={NODES}")
        cluster.wait_job(job, "RUNNING")
        try:
            begin.wait()
            before = count(cluster)
            pause(60 * minutes)
            return Found(members=0, steady=count(cluster) - before, after={})
        finally:
            cluster.cancel(job)


def watch_fleet(members: int, minutes: float, begin: threading.Barrier) -> Found:
    """Count what a fleet of so many members costs: one group on two nodes, or two groups."""
    groups = 1 if members == 2 else 2
    with SlurmCluster(nodes=NODES) as cluster:
        fleet = SlurmFleet(cluster)
        argv = [str(cluster.python), "-m", "slurm_rollout.testing.stub_engine", "--load-s=1", "--model=stub"]
        argv += ["--entrypoints=all"]
        spec = SPEC.format(groups=groups, per_node=members // groups // 2, argv=json.dumps(argv))
        fleet.start(spec, nodes=NODES)
        try:
            for group in range(groups):
                fleet.wait_serving(f"actor/{group}", 1, timeout_s=PATIENCE_S)
            pause(SETTLED_S)
            begin.wait()
            before = count(cluster)
            pause(60 * minutes)
            steady = count(cluster) - before
            if fleet.events("failure"):
                raise SystemExit(f"{members} members: this was no steady state\n{fleet.story()}")
            print(f"{members} members: steady state counted", file=sys.stderr)
            after = {RECOVERY: count_recovery(cluster, fleet), **count_status(cluster, fleet.job)}
            return Found(members=members, steady=steady, after=after)
        except AssertionError as e:
            raise SystemExit(f"{members} members: {e}\n{fleet.story()}") from None
        finally:
            fleet.end()


def count_recovery(cluster: SlurmCluster, fleet: SlurmFleet[SlurmCluster]) -> Calls:
    """Kill one member, wait until all serve again and nothing more is asked about it."""
    victim = fleet.engine("actor/0", 1)
    before = count(cluster)
    os.kill(victim, signal.SIGKILL)
    fleet.wait_serving("actor/0", 2, timeout_s=PATIENCE_S)
    pause(SETTLED_S)
    return count(cluster) - before


def count_status(cluster: SlurmCluster, job: str) -> dict[str, Calls]:
    """Count each way to ask for the status once."""
    found = {}
    for name, words in STATUS.items():
        before = count(cluster)
        cluster.run(["slurm-rollout", *words.format(job=job).split()])
        found[name] = count(cluster) - before
    return found


def by_type(calls: Calls, without: Calls) -> str:
    """Return the types that were asked more often than without a fleet, the most frequent first."""
    more = {kind: n - without.types[kind] for kind, n in calls.types.items() if n > without.types[kind]}
    return ", ".join(f"{n} {kind}" for kind, n in sorted(more.items(), key=lambda item: (-item[1], item[0]))) or "none"


def report(minutes: float, idle: Found, fleets: Sequence[Found]) -> str:
    """Return the table, as Markdown, and what it is made of."""
    nothing = Calls(types=Counter(), user=0)
    columns = [RECOVERY, *STATUS]
    lines = [
        f"Calls of the job's user; {minutes:g} minutes of steady state.",
        f"| members | steady state, a minute | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for found in fleets:
        cells = [f"{found.steady.user / minutes:.1f}", *(str(found.after[column].user) for column in columns)]
        lines.append(f"| {found.members} | {' | '.join(cells)} |")
    lines += ["", f"Without a fleet, {NODES} nodes: {by_type(idle.steady, nothing)}", ""]
    for found in fleets:
        counted = {"steady state": (found.steady, idle.steady)} | {k: (v, nothing) for k, v in found.after.items()}
        for name, (calls, without) in counted.items():
            who = f"user {calls.user}, daemons {calls.others - without.others}"
            lines.append(f"{found.members} members, {name}: {who}: {by_type(calls, without)}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of steady state (default: 10)")
    parser.add_argument("--members", default="2,8,32", help="sizes of the fleets (default: 2,8,32)")
    args = parser.parse_args()
    try:
        sizes = [int(size) for size in args.members.split(",")]
    except ValueError:
        parser.error(f"--members {args.members}: numbers, with commas between them")
    if wrong := [size for size in sizes if size != 2 and (size < NODES or size % NODES)]:
        parser.error(f"--members {wrong[0]}: 2, or a multiple of {NODES}: two groups on {NODES} nodes")
    if not args.minutes > 0:
        parser.error("--minutes: more than 0")
    if reason := why_unavailable():
        print(f"bench/rpcs.py: real Slurm cannot run here: {reason}", file=sys.stderr)
        return 1
    begin = threading.Barrier(1 + len(sizes))

    def watched(part: partial[Found]) -> Found:
        try:
            return part(args.minutes, begin)
        except BaseException:
            ENOUGH.set()
            begin.abort()
            raise

    with ThreadPoolExecutor(1 + len(sizes)) as threads:
        parts = [partial(watch_idle), *(partial(watch_fleet, size) for size in sizes)]
        watches = [threads.submit(watched, part) for part in parts]
        try:
            idle, *fleets = [each.result() for each in watches]
        except KeyboardInterrupt:
            ENOUGH.set()
            raise
        except (SlurmClusterError, threading.BrokenBarrierError) as e:
            print(f"bench/rpcs.py: {e}", file=sys.stderr)
            return 1
    print(report(args.minutes, idle, fleets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
