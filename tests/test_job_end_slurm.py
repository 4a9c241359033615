"""The job's end on real Slurm: warning, time limit, preemption; what is told, what is left, and how the run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest

from slurm_rollout.testing.fleet import SlurmFleet, stub_spec, wait_for
from slurm_rollout.testing.slurm_cluster import SlurmCluster
from tests.conftest import expect_no_process_left

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]  # the controller looks at time limits every 30 s

TRAIN = """\
import json, os, signal, sys, time
life = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
def note(**words):
    with open("notes.jsonl", "a") as f:
        f.write(json.dumps({"life": life, **words}) + "\\n")
def end(number, _):
    note(signal=signal.Signals(number).name)
    time.sleep(1.0)  # a checkpoint
    note(saved=True)
    sys.exit(3)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, end)
note(trains=True)
while not os.path.exists("finish"):
    time.sleep(0.05)
"""

# As the templates start it.
LAUNCH = """\
exec srun --overlap --cpu-bind=none --kill-on-bad-exit=1 --ntasks-per-node=1 --nodes=$ROLLOUT_TRAINER_NNODES \\
  --nodelist=$ROLLOUT_TRAINER_NODELIST python3 -u train.py
"""

BY_USR1 = '[trainer]\nsignal = "USR1"\ngrace_s = 20\n'


class Job:
    """One job with a fleet of two groups, and a trainer on a node of its own."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster = cluster
        self.fleet: SlurmFleet[SlurmCluster] = SlurmFleet(cluster)

    def start(self, *directives: str, more: str = "") -> None:
        home = self.cluster.home
        (home / "train.py").write_text(TRAIN)
        (home / "train.sh").write_text(LAUNCH)
        spec = stub_spec(
            groups=2,
            layout="nodes = 1",
            python=self.cluster.python,
            control=self.fleet.control,
            more=f"audit_s = 1.0\n[nodes]\ncount = 2\n{more}",
        )
        lines = "\n".join(f"#SBATCH {d}" for d in (*directives, "--open-mode=append"))
        self.fleet.start(spec, ["bash", "train.sh"], nodes=3, directives=lines)

    @property
    def id(self) -> str:
        return self.fleet.job

    def notes(self, life: int = 0) -> list[dict[str, Any]]:
        try:
            text = (self.cluster.home / "notes.jsonl").read_text()
        except FileNotFoundError:
            return []
        found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [{k: v for k, v in note.items() if k != "life"} for note in found if note["life"] == life]

    def wait_trains(self, life: int = 0) -> None:
        self.fleet.wait("the trainer", lambda: self.notes(life), timeout_s=60)

    def ends_in(self, left_s: float) -> None:
        """Change its time limit, as an admin."""
        at = (datetime.now() + timedelta(seconds=left_s)).isoformat(timespec="seconds")
        self.cluster.run(["scontrol", "update", f"JobId={self.id}", f"EndTime={at}"], user=False)

    def wait_state(self, state: str, timeout_s: float = 90) -> None:
        wait_for(f"job {state}", lambda: self.cluster.job_state(self.id) == state, timeout_s, 0.2)

    def last_words(self) -> tuple[str, str, str]:
        barrier = self.fleet.barrier()
        return barrier["phase"], barrier["reason"], self.fleet.events()[-1]["type"]

    def launched(self) -> list[tuple[str, int]]:
        return sorted((e["group"], e["incarnation"]) for e in self.fleet.events("launching"))

    def status(self) -> str:
        return self.cluster.run(["slurm-rollout", "status", "--run-dir=run"], check=False).stdout

    def time_left_s(self) -> float:
        return float(json.loads(self.fleet.run.status.read_text())["time_left_s"])

    def nothing_is_charged(self) -> None:
        """Slurm ends the steps when it tells `up`, or before: that is seen as failures, and must stay at that."""
        groups = json.loads(self.fleet.run.state.read_text())["state"]["groups"]
        assert [(g["runtime_failures"], g["start_failures"]) for g in groups] == [([], []), ([], [])]

    def goes_on(self, before: dict[str, Any]) -> None:
        """Let the requeued job start, see that it goes on with its run, and let it finish."""
        # Not at once: in the second in which its first life ended Slurm would refuse it (22.05).
        self.cluster.run(["scontrol", "update", f"JobId={self.id}", "StartTime=now+2"], user=False)
        self.wait_trains(life=1)
        after = self.fleet.barrier()
        assert (after["job"], after["restart_count"], after["phase"]) == (self.id, 1, "ready")
        assert after["epoch"] > before["epoch"]
        assert after["term"] > before["term"]
        assert {g["id"]: g["incarnation"] for g in after["groups"]} == {"actor/0": 2, "actor/1": 2}
        assert not [e for e in self.fleet.events("failure") if e["term"] == after["term"]]
        (self.cluster.home / "finish").touch()
        self.wait_state("COMPLETED")
        expect_no_process_left(self.cluster)


@contextmanager
def job(*conf_lines: str) -> Iterator[Job]:
    with SlurmCluster(nodes=3, conf_lines=conf_lines) as cluster:
        made = Job(cluster)
        with made.fleet:
            yield made


@pytest.mark.parametrize(("requeue", "conf"), [("exit", ["RequeueExit=75"]), ("scontrol", [])])
def test_a_warned_job_ends_in_order_and_is_requeued(real_slurm: None, requeue: str, conf: list[str]) -> None:
    with job(*conf) as j:
        j.start("--requeue", "--time=10", "--signal=B:USR1@60", more=f'{BY_USR1}[slurm]\nrequeue = "{requeue}"\n')
        j.wait_trains()
        before = j.fleet.barrier()
        j.ends_in(85)  # the warning comes with the next look
        j.fleet.wait("the barrier's word", lambda: j.fleet.barrier().get("phase") == "stopped", timeout_s=60)
        j.wait_state("PENDING")
        assert j.last_words() == ("stopped", "job_ending", "ended")
        assert j.notes() == [{"trains": True}, {"signal": "SIGUSR1"}, {"saved": True}], "srun passed it on, and waited"
        assert "USR1: draining the fleet" in j.fleet.output()
        assert j.fleet.output().count(f"job {j.id} is requeued") == (requeue == "scontrol")
        assert not j.cluster.user_pids()
        j.nothing_is_charged()
        assert j.launched() == [("actor/0", 1), ("actor/1", 1)]
        j.goes_on(before)


def test_time_that_is_too_short_for_a_start_is_told_and_more_time_brings_it_back(real_slurm: None) -> None:
    with job() as j:
        j.start("--time=10")
        j.wait_trains()
        j.ends_in(50)
        j.fleet.wait("the new limit", lambda: 0 < j.time_left_s() < 60)
        j.fleet.kill("actor/0", 0)
        waiting = j.fleet.wait_event("waiting", "actor/0")
        assert waiting["reason"] == "time_left"
        assert "s left; a start took" in waiting["message"]
        j.fleet.wait("the barrier's word", lambda: j.fleet.barrier()["reason"] == "time_left")
        assert j.fleet.barrier()["phase"] == "ready"
        j.fleet.wait("the word of `status`", lambda: "ready (time_left)" in j.status())
        assert "actor/0 the job had" in j.status()
        j.ends_in(500)
        j.fleet.wait_serving("actor/0", 2)
        # And then the limit itself, of which nothing warned.
        j.ends_in(2)
        j.fleet.wait("the new limit", lambda: j.time_left_s() < 10)
        j.wait_state("TIMEOUT")
        assert j.last_words() == ("stopped", "job_ending", "ended")
        assert j.notes()[-1] == {"saved": True}, "KillWait is longer than it needs"
        assert j.launched() == [("actor/0", 1), ("actor/0", 2), ("actor/1", 1)]
        expect_no_process_left(j.cluster)


def test_a_preempted_job_ends_in_order_and_goes_on_when_it_is_let(real_slurm: None) -> None:
    with job("PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE") as j:
        admin: Callable[..., Any] = lambda *words: j.cluster.run(["scontrol", *words], user=False)  # noqa: E731
        admin("update", "PartitionName=main", "PriorityTier=1")
        admin("create", "PartitionName=high", "Nodes=ALL", "PriorityTier=10", "PreemptMode=OFF")
        j.start("--requeue", "--time=10", more='[slurm]\nrequeue = "scontrol"\n')
        j.wait_trains()
        before = j.fleet.barrier()
        other = j.cluster.sbatch("#!/bin/bash\nexec sleep 600\n", "--nodes=3", "--exclusive", "--partition=high")
        j.wait_state("PENDING")
        assert j.last_words() == ("stopped", "run_ending", "ended")
        assert j.notes()[-1] == {"saved": True}
        j.nothing_is_charged()
        assert "is requeued" not in j.fleet.output(), "that is Slurm's affair"
        assert j.launched() == [("actor/0", 1), ("actor/1", 1)]
        j.cluster.cancel(other)
        j.goes_on(before)
