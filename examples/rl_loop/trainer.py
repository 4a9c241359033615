"""A reinforcement-learning loop over engines that die under it, and that keeps no stale sample.

    slurm-rollout up examples/rl_loop/fleet.toml --backend local -- python examples/rl_loop/trainer.py --minutes 1

What a trainer owes to the fleet is in `train`, `engines_with`, `sync` and `generate`: copy these. `push_into` and `ask`
talk to the stub engine: put yours there. The journal and the proof are not needed in a trainer: they are there so
that the loop can be shown to keep what it promises, and to be caught where it does not (`--trust-everything`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from proof import prove

from slurm_rollout.barrier import Barrier, BarrierError, Group, State, WeightsNeeded

READY_TIMEOUT_S = 600.0  # a real fleet: hours
PUSH_TIMEOUT_S = 5.0  # an engine that hangs must not hold up the others
REQUEST_TIMEOUT_S = 5.0
LEASE_S = 60.0  # longer than any push; should the trainer die, the fleet is held no longer than this
PATIENCE_S = 10.0  # longer than it takes to notice a hang: `slurm-rollout plan` says how long that is


class Sample(NamedTuple):
    """An answer, and what was known of its engine before the request was sent."""

    group: str
    incarnation: int
    version: int
    answer: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ the loop


def train(barrier: Barrier, version: int, journal: Journal, args: argparse.Namespace) -> int:
    """Step after step until the time is over, or told to end; return the last version of the weights."""
    deadline = time.monotonic() + 60 * args.minutes
    # The fleet may remember a later version than the checkpoint that this trainer starts from: then it goes back.
    state = engines_with(barrier, version, journal, rollback=True)
    while time.monotonic() < deadline and not (args.until and args.until.exists()):
        samples = generate(barrier, state, version, journal, args)
        barrier.announce("training")
        optimize(samples, args)
        version += 1
        state = engines_with(barrier, version, journal)
        journal.write("step", version=version, epoch=state.epoch, term=state.term, samples=len(samples))
    return version


def engines_with(barrier: Barrier, version: int, journal: Journal, rollback: bool = False) -> State:
    """Return once enough engines serve `version`; push it into every one that lacks it.

    That is all of them when the version is new. Later it is one that restarted and has none of our weights, or one that
    was down when they were pushed.
    """
    while True:
        epoch = barrier.current().epoch
        sync(barrier, version, journal, rollback)
        with suppress(WeightsNeeded):  # some are alive, but too few of them took it
            state = barrier.wait_ready(timeout=READY_TIMEOUT_S, poll_s=0.2)
            if serving(state, version):
                return state
        # Their probes rest while we push: let those find out what is wrong before the next attempt.
        wait_for_change(barrier, epoch)


def sync(barrier: Barrier, version: int, journal: Journal, rollback: bool = False) -> None:
    """Push `version` into the living groups that lack it, and acknowledge those that took it, and only those."""
    if barrier.stale(version):
        barrier.announce("syncing")  # probes rest: an engine that takes weights may answer nothing else
        with barrier.hold(lease_s=LEASE_S):  # and none comes up in mid-push
            snapshot = barrier.stale(version)  # before the push: what restarts during it is another incarnation
            with ThreadPoolExecutor(max(1, len(snapshot.groups))) as pool:
                took = pool.map(lambda group: group if push_into(group, version) else None, snapshot.groups)
            reached = tuple(filter(None, took))
            barrier.ack_weights(version, snapshot._replace(groups=reached), rollback=rollback)
        for group in snapshot.groups:
            journal.write("push", version=version, group=group.id, incarnation=group.incarnation, ok=group in reached)
    barrier.announce("generating")


def wait_for_change(barrier: Barrier, epoch: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while barrier.current().epoch == epoch and time.monotonic() < deadline:
        time.sleep(0.2)


def generate(barrier: Barrier, state: State, version: int, journal: Journal, args: argparse.Namespace) -> list[Sample]:
    """Keep every engine busy for a while, all in parallel; return the samples that may be trained on."""
    deadline = time.monotonic() + args.step_s

    def use(target: tuple[Group, str]) -> list[Sample]:
        group, url = target
        kept = []
        while time.monotonic() < deadline:
            sent_at = time.time()
            answer = ask(url)
            if answer is None:  # dead, hung or just restarting
                journal.write("dropped", why="no_answer", group=group.id, incarnation=group.incarnation)
                time.sleep(0.1)
                continue
            # The address outlives the engine: what answered may be the next incarnation, with other weights.
            sample = Sample(group.id, group.incarnation, version, answer)
            checked_at = time.time()
            good = args.trust_everything or barrier.is_current(group.id, group.incarnation, version)
            journal.write_sample(sample, good, sent_at, checked_at)
            if good:
                kept.append(sample)
        return kept

    targets = [(group, url) for group in serving(state, version) for url in group.urls]
    with ThreadPoolExecutor(len(targets)) as pool:
        return [sample for kept in pool.map(use, targets) for sample in kept]


def serving(state: State, version: int) -> list[Group]:
    """Return the groups that may get requests and have these weights."""
    return [group for group in state.groups if group.serving and group.weights_version == version]


# ----------------------------------------------------------------------------------------- put your own engine here


def push_into(group: Group, version: int) -> bool:
    """Give every entrypoint of the group the weights; False when one of them did not take them in time."""
    return all(post(url + "/update_weights", {"version": version}, PUSH_TIMEOUT_S) for url in group.urls)


def ask(url: str) -> dict[str, Any] | None:
    """Ask for one sample; None when there is no answer."""
    wish = {"model": "stub", "messages": [{"role": "user", "content": "2 + 2 = ?"}], "max_tokens": 16}
    return post(url + "/v1/chat/completions", wish, REQUEST_TIMEOUT_S)


def post(url: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return dict(json.load(answer))
    except (OSError, ValueError):  # refused, reset, timed out, an error status, half an answer
        return None


def optimize(samples: list[Sample], args: argparse.Namespace) -> None:
    """Where a real trainer would do its work."""
    time.sleep(args.train_s)


# ------------------------------------------------------------------------------- for the proof; no trainer needs this


class Journal:
    """What the trainer did, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("w", encoding="utf-8")
        self._lock = threading.Lock()

    def write(self, what: str, **facts: object) -> None:
        with self._lock:
            print(json.dumps({"what": what, "at": time.time(), **facts}), file=self._file, flush=True)

    def write_sample(self, sample: Sample, kept: bool, sent_at: float, checked_at: float) -> None:
        facts = {**sample._asdict(), "answer": None, "stamp": sample.answer.get("rollout")}
        why = {} if kept else {"why": "not_current"}
        self.write("kept" if kept else "dropped", **facts, **why, sent_at=sent_at, checked_at=checked_at)


def main() -> int:
    parser = argparse.ArgumentParser(description="A training loop over stub engines, with a proof of what it kept.")
    add = parser.add_argument
    add("--minutes", type=float, default=1.0)
    add("--until", type=Path, help="a file: once it is there, no further step begins")
    add("--version", type=int, default=1, help="version of the weights that it starts from, as from a checkpoint")
    add("--step-s", type=float, default=3.0, help="how long a step generates")
    add("--train-s", type=float, default=0.3, help="how long a step trains")
    add("--chaos", type=float, default=5.0, help="mean time between two deeds of chaos.py, in seconds; 0: never")
    add("--harm", default="kill,hang,stutter,hold", help="what it does")
    add("--seed", type=int, default=1, help="of what it does")
    add("--trust-everything", action="store_true", help="keep every sample: to see that the proof finds it")
    args = parser.parse_args()

    barrier = Barrier()
    run_dir = Path(barrier.path).parent
    journal = Journal(run_dir / "rl_loop" / "journal.jsonl")
    chaos = start_chaos(run_dir, args) if args.chaos else None
    error, version = "", args.version
    try:
        version = train(barrier, version, journal, args)
        settle(barrier)
    except BarrierError as problem:  # the fleet will not come back, or nobody watches it: here a trainer would save
        error = f"{type(problem).__name__}: {problem}"
    finally:
        if chaos:
            error = error or ("chaos.py has ended" if chaos.poll() is not None else "")
            chaos.terminate()
            chaos.wait()
    proof = prove(run_dir)
    print(json.dumps({"error": error, "version": version, **proof}, indent=2))
    return 0 if not error and proof["kept"] and not proof["stale"] else 1


def settle(barrier: Barrier) -> None:
    """Wait until the coordinator has written down all that it knew when the last sample was kept."""
    seq = barrier.current().seq
    deadline = time.monotonic() + 10
    while barrier.current().seq < seq + 2 and time.monotonic() < deadline:
        time.sleep(0.1)


def start_chaos(run_dir: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("chaos.py")
    how = [f"--every={args.chaos}", f"--kinds={args.harm}", f"--seed={args.seed}"]
    return subprocess.Popen([sys.executable, str(script), str(run_dir), *how])


if __name__ == "__main__":
    sys.exit(main())
