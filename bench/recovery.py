"""How long a crash costs: slurm-rollout beside the two bash loops that people use today, on one real test cluster.

One member of a 4-member group on 4 nodes is killed with -9. Measured from outside, alike for all three: from the kill
until every member has answered a real /v1/chat/completions request as the next incarnation, minus the engine's own load
time. The loops neither fence nor verify; slurm-rollout does both within its time.

    sudo .venv/bin/python bench/recovery.py [--kills 10]

Needs root and the distribution's Slurm (`.ci/install-slurm`). Figures depend on the machine: read the ratio.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slurm_rollout.testing.fleet import SlurmFleet, stub_spec, wait_for
from slurm_rollout.testing.slurm_cluster import SlurmCluster, why_unavailable

LOAD_S = 1.0
MEMBERS = 4
PORT = 18000
MASTER_PORT = 18001
PATIENCE_S = 30.0

# Runs inside the cluster's network: asks every member again and again, and prints "INCARNATION MOMENT" whenever the
# oldest incarnation among them changes (the monotonic clock is the same on every "node" of one machine).
WATCH = """
import http.client, json, sys, threading, time
hosts = sys.argv[2:]
latest = dict.fromkeys(hosts, (0, 0.0))
body = json.dumps({"model": "stub", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1})
def ask(host):
    while True:
        try:
            c = http.client.HTTPConnection(host, int(sys.argv[1]), timeout=2)
            c.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            answer = json.load(c.getresponse())
            c.close()
            if answer["choices"] and answer["incarnation"] != latest[host][0]:
                latest[host] = answer["incarnation"], time.monotonic()
        except (OSError, ValueError, KeyError, http.client.HTTPException):
            pass
        time.sleep(0.01)
for host in hosts:
    threading.Thread(target=ask, args=(host,), daemon=True).start()
before = 0
while True:
    oldest = min(n for n, _ in latest.values())
    if oldest != before:
        before = oldest
        print(oldest, max(at for _, at in latest.values()), flush=True)
    time.sleep(0.003)
"""

COMMON = """\
#!/bin/bash
#SBATCH --exclusive --gres=gpu:8 --no-kill --no-requeue --output=loop.log
export ROLLOUT_GROUP=actor/0 ROLLOUT_SIZE={members} ROLLOUT_HTTP_PORT={port}
export ROLLOUT_MASTER_ADDR=n1 ROLLOUT_MASTER_PORT={master_port}
engine="{python} -m slurm_rollout.testing.stub_engine --load-s={load_s} --entrypoints=all --model=stub"
n=0
"""

PER_MEMBER = (
    COMMON
    + """\
while true; do
  n=$((n + 1)); export ROLLOUT_INCARNATION=$n; pids=()
  for rank in 0 1 2 3; do
    ROLLOUT_RANK=$rank srun --overlap --mem=0 -N1 -n1 -w n$((rank + 1)) --gres=gpu:8 --job-name=m$rank $engine &
    pids+=($!)
  done
  wait -n ${{pids[@]}}
  scancel $(squeue -h -s -j $SLURM_JOB_ID -o %i | grep -E '\\.[0-9]+$')
  wait
done
"""
)

KILL_ON_BAD_EXIT = (
    COMMON
    + """\
while true; do
  n=$((n + 1)); export ROLLOUT_INCARNATION=$n
  srun --overlap --mem=0 -N4 -n4 --ntasks-per-node=1 --gres=gpu:8 --kill-on-bad-exit=1 \\
    bash -c "ROLLOUT_RANK=\\$SLURM_PROCID exec $engine"
done
"""
)


@contextmanager
def ours(cluster: SlurmCluster) -> Iterator[Path | None]:
    """slurm-rollout, with a budget for every kill."""
    fleet = SlurmFleet(cluster)
    spec = stub_spec(
        python=cluster.python,
        layout=f"nodes = {MEMBERS}",
        load_s=LOAD_S,
        pool="restart.max_restarts = 1000\nrestart.backoff_initial_s = 0.001\nrestart.backoff_max_s = 0.001",
    )
    fleet.start(spec)
    try:
        yield fleet.run.path
    finally:
        cluster.cancel(fleet.job)


def loop(script: str) -> Callable[[SlurmCluster], object]:
    """Return a context manager that runs a bash loop as a batch job."""

    @contextmanager
    def run(cluster: SlurmCluster) -> Iterator[Path | None]:
        text = script.format(members=MEMBERS, port=PORT, master_port=MASTER_PORT, python=cluster.python, load_s=LOAD_S)
        job = cluster.sbatch(text, f"--nodes={MEMBERS}")
        try:
            yield None
        finally:
            cluster.cancel(job)

    return run


def measure(name: str, contender: Callable[[SlurmCluster], object], kills: int) -> list[float]:
    """Return the overhead of each recovery in seconds: kill to all serving, minus the load time."""
    with SlurmCluster(nodes=MEMBERS) as cluster, contender(cluster):  # type: ignore[attr-defined]
        argv: list[str | Path] = [cluster.python, "-c", WATCH, str(PORT), *cluster.nodes]
        watcher = cluster.popen_in_node(cluster.nodes[0], argv)
        seen: list[tuple[int, float]] = []
        threading.Thread(target=collect, args=(watcher.stdout, seen), daemon=True).start()
        try:
            wait_for("the first start", lambda: seen, PATIENCE_S)
            found = []
            for kill in range(1, kills + 1):
                time.sleep(0.5)  # let the members settle: one fault at a time
                rank, incarnation = kill % MEMBERS, seen[-1][0]
                pid = wait_for("the victim", functools.partial(engine, cluster, rank))
                killed_at = time.monotonic()
                os.kill(pid, signal.SIGKILL)
                wait_for("all members to answer again", lambda n=incarnation: seen[-1][0] > n, PATIENCE_S)  # type: ignore[misc]  # mypy cannot infer a lambda with a default
                found.append(seen[-1][1] - killed_at - LOAD_S)
                print(f"{name}: kill {kill}, of rank {rank}: {found[-1]:.3f} s", file=sys.stderr)
            return found
        except AssertionError as e:
            for log in cluster.home.glob("*.log"):
                print(log.read_text(errors="replace")[-2000:], file=sys.stderr)
            raise SystemExit(f"{name}: {e}") from None
        finally:
            watcher.kill()
            watcher.communicate()


def collect(lines: Iterable[str] | None, seen: list[tuple[int, float]]) -> None:
    """Take in what the watcher prints."""
    for line in lines or ():
        incarnation, _, moment = line.partition(" ")
        seen.append((int(incarnation), float(moment)))


def engine(cluster: SlurmCluster, rank: int) -> int | None:
    """Return the pid, as seen from here, of the engine of that rank."""
    for pid in cluster.user_pids("slurm_rollout.testing.stub_engine", cluster.nodes[rank]):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"slurm_rollout.testing.stub_engine" in command and b"srun" not in command[0]:
            return pid
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="recoveries of each contender (default: 10)")
    parser.add_argument("--json", action="store_true", help="every figure, for a script")
    args = parser.parse_args()
    if reason := why_unavailable():
        print(f"bench/recovery.py: real Slurm cannot run here: {reason}", file=sys.stderr)
        return 1
    contenders = {
        "slurm-rollout": ours,
        "bash, one srun per member, scancel": loop(PER_MEMBER),
        "bash, one srun, --kill-on-bad-exit": loop(KILL_ON_BAD_EXIT),
    }
    results = {name: measure(name, contender, args.kills) for name, contender in contenders.items()}
    if args.json:
        print(json.dumps(results))
        return 0
    base = statistics.median(results["bash, one srun per member, scancel"])
    print(
        f"kill -9 of one of {MEMBERS} members until all answer again, minus {LOAD_S:g} s of loading; {args.kills} kills"
    )
    print("| | median | min | max | ratio to the first loop |")
    print("|---|---|---|---|---|")
    for name, found in results.items():
        median = statistics.median(found)
        print(f"| {name} | {median:.3f} s | {min(found):.3f} s | {max(found):.3f} s | {median / base:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
