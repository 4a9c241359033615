"""What the README shows is what is in `templates/`, and it works: on real Slurm, with a stub for the engine."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout.rundir import RunDir
from slurm_rollout.testing.fleet import Fleet, SlurmFleet, wait_for
from slurm_rollout.testing.slurm_cluster import SlurmCluster
from tests.conftest import FAILED, expect_no_process_left, show_logs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEMPLATES = ROOT / "templates"
FILES = ("fleet.toml", "train.sbatch")


def block_after(text: str, heading: str) -> str:
    """Return the first code block after a line that names it."""
    found = re.search(rf"{re.escape(heading)}.*?\n```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found, f"no code block after {heading!r}"
    return found[1]


@pytest.mark.parametrize("name", FILES)
def test_the_readme_shows_the_template_itself(name: str) -> None:
    assert block_after(README, f"**`{name}`**") == (TEMPLATES / name).read_text(encoding="utf-8")


def test_the_template_is_planned_as_its_comments_say() -> None:
    argv = [sys.executable, "-m", "slurm_rollout", "plan", str(TEMPLATES / "fleet.toml")]
    done = subprocess.run(
        [*argv, "--nodes=gpu[01-05]", "--gpus-per-node=8", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["warnings"] == []
    assert plan["trainer_nodes"] == ["gpu01"]
    assert [len(g["members"]) for p in plan["pools"] for g in p["groups"]] == [2, 2]
    leader, follower = plan["pools"][0]["groups"][0]["members"]
    assert leader["entrypoint"]
    assert not follower["entrypoint"]
    assert not [word for m in (leader, follower) for word in m["argv"] if "{" in word]


def test_the_batch_script_is_a_valid_one() -> None:
    script = (TEMPLATES / "train.sbatch").read_text(encoding="utf-8")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert lines[-1].startswith("exec slurm-rollout up ")
    last_directive = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert last_directive < first_command, "sbatch reads no directive after the first command"


# ------------------------------------------------------------------------------------------------------ on real Slurm

# What the README leaves to its reader, around the loop that it shows. A step holds on, between generating and training,
# as long as a file called `hold` is there: so the test knows that samples are in hand while it kills their engine.
TRAINER = """\
import json, os, time, urllib.request
from pathlib import Path
from typing import NamedTuple

class Sample(NamedTuple):
    group: str
    incarnation: int
    answered_by: int

trained = []

def note(**what):
    with open("train.jsonl", "a") as log:
        print(json.dumps(what), file=log)

def done():
    return {{("actor/0", 2), ("actor/1", 2)}} <= {{(s.group, s.incarnation) for s in trained}}

def push_weights(groups, version):
    note(pushed=[g.id for g in groups], version=version)

def ask(url):
    wish = {{"model": "policy", "messages": [{{"role": "user", "content": "hi"}}], "max_tokens": 1}}
    headers = {{"Content-Type": "application/json"}}
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(wish).encode(), headers)
    with urllib.request.urlopen(request, timeout=1) as answer:
        return json.load(answer)["incarnation"]

def generate(groups):
    samples = []
    for group in groups:
        for url in group.urls:
            try:
                samples.append(Sample(group.id, group.incarnation, ask(url)))
            except OSError as error:
                note(lost=group.id, error=str(error))
    note(generated=samples)
    while Path("hold").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    return samples

def train(samples):
    trained.extend(samples)
    note(trained=samples)

note(nodes=os.environ["ROLLOUT_TRAINER_NODELIST"], count=os.environ["ROLLOUT_TRAINER_NNODES"])
{loop}
raise SystemExit(7)
"""


class ExampleFleet(SlurmFleet[SlurmCluster]):
    """The README's job."""

    def submit(self) -> None:
        """As its reader would: both files and a train.py in one directory, and `sbatch train.sbatch`."""
        home, uid = self.cluster.home, self.cluster.uid
        # The template activates two environments: here both are the one that the cluster has.
        for name in ("sglang", "trainer"):
            activate = home / "envs" / name / "bin/activate"
            activate.parent.mkdir(parents=True)
            activate.write_text(f'export PATH="{self.cluster.python.parent}:$PATH"\n')
        (home / "fleet.toml").write_text(stub_instead_of_engine((TEMPLATES / "fleet.toml").read_text()))
        (home / "train.py").write_text(TRAINER.format(loop=block_after(README, "**`train.py`**")))
        shutil.copy(TEMPLATES / "train.sbatch", home)
        for path in home.rglob("*"):
            shutil.chown(path, uid, uid)
        self.job = self.cluster.run(["sbatch", "--parsable", "train.sbatch"]).stdout.strip()
        self.run = RunDir(home / "rollout-runs" / self.job)

    def output(self) -> str:
        logs = sorted(self.cluster.home.glob("moe-rl-*.log"))
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def trainer_notes(self, what: str) -> list[Any]:
        """Return what the trainer noted of one kind, complete lines only."""
        try:
            text = (self.cluster.home / "train.jsonl").read_text()
        except FileNotFoundError:
            return []
        notes = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [n[what] for n in notes if what in n]


def stub_instead_of_engine(spec: str) -> str:
    """Return the template with another engine command and shorter times; the rest stays as it is."""
    stub = ["python3", "-m", "slurm_rollout.testing.stub_engine", "--load-s=1", "--model=policy"]
    spec, commands = re.subn(r"(?ms)^argv = \[$.*?^\]$", f"argv = {json.dumps(stub)}", spec)
    assert commands == 1
    assert spec.count("sglang:realtime_tokens_total") == 1
    spec = spec.replace("sglang:realtime_tokens_total", "stub_tokens_total")
    # The template ends in the table [pool.probe.liveness].
    return spec + "period_s = 0.5\ntimeout_s = 0.5\nfailure_threshold = 3\n\n[probe.startup]\nrequest_timeout_s = 5\n"


@pytest.fixture
def example(request: pytest.FixtureRequest, real_slurm: None) -> Iterator[ExampleFleet]:
    with SlurmCluster(nodes=5) as cluster:
        fleet = ExampleFleet(cluster)
        try:
            yield fleet
            if request.node.stash.get(FAILED, False):
                print(fleet.story())
                show_logs(cluster)
        finally:
            fleet.end()
        expect_no_process_left(cluster)


def recovery(fleet: Fleet, group: str, fault_at: float) -> dict[str, float]:
    """Return the seconds from the fault until each stage of the recovery."""
    kinds = {"failure": "seen", "stopped": "stopped", "fenced": "fenced", "ready": "ready"}
    after = [e for e in fleet.events(group=group) if e["at"] >= fault_at]
    return {
        name: round(next(e["at"] for e in after if e["type"] == kind) - fault_at, 3) for kind, name in kinds.items()
    }


@pytest.mark.slurm
def test_the_readme_s_example_recovers_from_a_kill_and_a_hang_and_ends_with_its_trainer(example: ExampleFleet) -> None:
    fleet, home = example, example.cluster.home
    fleet.submit()
    fleet.wait("the trainer's first step", lambda: fleet.trainer_notes("trained"), timeout_s=60)
    assert fleet.trainer_notes("nodes") == ["n1"]
    assert fleet.trainer_notes("count") == ["1"]
    before = {g: fleet.group(g) for g in ("actor/0", "actor/1")}

    # Samples of both groups are in the trainer's hand when a member of one of them is killed.
    (home / "hold").touch()
    steps = len(fleet.trainer_notes("generated"))
    fleet.wait("a step that holds on", lambda: len(fleet.trainer_notes("generated")) > steps)
    killed_at = time.time()
    fleet.kill("actor/0", 1)
    fleet.wait("actor/0 to leave the barrier", lambda: not fleet.group("actor/0").get("serving"))
    generated, trained = fleet.trainer_notes("generated")[-1], len(fleet.trainer_notes("trained"))
    assert {(s[0], s[1]) for s in generated} == {("actor/0", 1), ("actor/1", 1)}
    (home / "hold").unlink()
    fleet.wait("that step's training", lambda: len(fleet.trainer_notes("trained")) > trained)
    kept = fleet.trainer_notes("trained")[trained]
    assert [s[:2] for s in kept] == [["actor/1", 1]], "the dead incarnation's samples are dropped, the others kept"
    fleet.wait_serving("actor/0", 2)
    kill = recovery(fleet, "actor/0", killed_at)
    assert fleet.wait_event("failure", "actor/0")["reason"] == "engine_exited"

    # The follower hangs: nothing exits, and its own HTTP port is no entrypoint. The trainer has samples in hand again.
    (home / "hold").touch()
    hung_at = time.time()
    fleet.kill("actor/1", 1, signal.SIGSTOP)
    fleet.wait_event("ready", "actor/1", 2)  # it does not serve before the trainer goes on, and pushes into it
    hang = recovery(fleet, "actor/1", hung_at)
    assert fleet.wait_event("failure", "actor/1")["reason"] == "not_answering"

    for group, entry in before.items():
        assert fleet.group(group)["urls"] == entry["urls"]
        assert fleet.group(group)["master"] == entry["master"]
    status = fleet.cluster.run(["slurm-rollout", "status", "-j", fleet.job]).stdout
    (home / "hold").unlink()
    wait_for("the job's end", lambda: fleet.cluster.job_state(fleet.job) == "FAILED", timeout_s=30)
    job = fleet.cluster.run(["scontrol", "--oneliner", "show", "job", fleet.job]).stdout
    assert " ExitCode=7:0 " in job, "the trainer's exit code"
    trained_on = [s for samples in fleet.trainer_notes("trained") for s in samples]
    assert all(incarnation == answered_by for _, incarnation, answered_by in trained_on)
    pushed = fleet.trainer_notes("pushed")
    assert pushed[0] == ["actor/0", "actor/1"]
    assert ["actor/1"] in pushed, "a group that is down gets nothing"
    assert fleet.barrier()["pools"][0]["weights_version"] == fleet.trainer_notes("version")[-1]
    assert [e["type"] for e in fleet.events()][-1] == "ended"
    wait_for("no process of the run", lambda: not fleet.processes(), timeout_s=5)

    print(f"seconds after the kill {kill}\nseconds after the hang {hang}\n{status}")
    print(fleet.cluster.run(["slurm-rollout", "events", "-j", fleet.job]).stdout)
