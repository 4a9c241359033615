"""Every template runs as it is, on real Slurm, and survives a kill. Only the engines are stubs, with shorter times.

What stands for the site: the two environments that the templates activate, and the trainer.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import pytest

from slurm_rollout import cli
from slurm_rollout.batch_script import read_template
from slurm_rollout.rundir import RunDir
from slurm_rollout.testing.fleet import SlurmFleet, wait_for
from slurm_rollout.testing.slurm_cluster import FREEZER, SlurmCluster
from tests.conftest import FAILED, expect_no_process_left, show_logs

TEMPLATES = Path(__file__).parents[1] / "templates"
SPECS = {"train": "fleet", "colocated": "colocated", "fleet-only": "fleet-only", "hetjob": "hetjob"}

QUICK = """
period_s = 0.5
timeout_s = 0.5
failure_threshold = 3

[probe.startup]
request_timeout_s = 5
"""


def rehearsed(spec: str) -> str:
    """Return a template's spec with the stub for its engine, and shorter times; the rest stays as it is."""
    [model] = re.findall(r'^model = "([\w-]+)"', spec, re.MULTILINE)
    stub = ["python3", "-m", "slurm_rollout.testing.stub_engine", "--load-s=0.5", f"--model={model}"]
    spec, engines = re.subn(r"(?ms)^argv = \[$.*?^\]$", f"argv = {json.dumps(stub)}", spec)
    spec, counters = re.subn(r'(?<=name = ")(sglang|vllm):\w+(?=" })', "stub_tokens_total", spec)
    spec, names = re.subn(r'\A(#.*\n)*\n(name = ".*"\n)', r"\2heartbeat_s = 0.5\n", spec)
    assert engines == counters == names == 1
    table = spec.rindex("\n[")
    assert spec[table:].startswith("\n[pool.probe.liveness]"), "the shorter times go to its end"
    return f"{spec.rstrip()}{QUICK}"


def test_every_template_has_its_spec_and_nothing_else_is_there() -> None:
    assert {p.name for p in TEMPLATES.iterdir()} == {
        *(f"{name}.sbatch" for name in SPECS),
        *(f"{spec}.toml" for spec in SPECS.values()),
    }


@pytest.mark.parametrize("name", SPECS)
def test_a_template_is_a_valid_script_that_names_its_spec(name: str) -> None:
    path = TEMPLATES / f"{name}.sbatch"
    text = path.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", path], check=True)
    script = read_template(name)
    assert f"\nspec={SPECS[name]}.toml\n" in f"\n{script.body}\n"
    last = text.rstrip().splitlines()[-1]
    assert last.startswith('exec slurm-rollout up "$spec" --run-dir "$run_dir"')
    for options in script.components:
        # Those that come with --exclusive alone are not given to steps (22.05), and memory is the site's default.
        assert {"exclusive", "mem", "nodes"} <= set(options)
        assert {"gres", "gpus-per-node"} & set(options)
    assert "time" in script.options
    assert {"requeue", "no-requeue"} & set(script.options), "the site's default differs from site to site"


@pytest.mark.parametrize("name", SPECS)
def test_a_template_asks_for_the_nodes_that_its_spec_needs(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = str(TEMPLATES / f"{SPECS[name]}.toml")
    trainer = [] if name == "fleet-only" else ["--", "python", "train.py"]
    options = ["submit", spec, f"--template={name}", "--dry-run"]
    assert cli.main([*options, *trainer]) == 0, capsys.readouterr().err
    fewer = [*options, "--nodes=1"] if name != "hetjob" else ["submit", spec, "--dry-run", "--nodes=9"]
    assert cli.main([*fewer, *trainer]) == 2


@pytest.mark.parametrize("name", [n for n in SPECS if n != "hetjob"])
def test_the_plan_of_a_template_s_spec_has_no_warning(name: str) -> None:
    nodes = read_template(name).options["nodes"]
    argv = [sys.executable, "-m", "slurm_rollout", "plan", str(TEMPLATES / f"{SPECS[name]}.toml"), "--json"]
    done = subprocess.run([*argv, f"--nodes=gpu[1-{nodes}]", "--gpus-per-node=8"], capture_output=True, check=True)
    plan = json.loads(done.stdout)
    assert plan["warnings"] == []
    assert (plan["trainer_nodes"] == plan["nodes"]) == (name != "train")


# ------------------------------------------------------------------------------------------------------- on real Slurm


class TemplateFleet(SlurmFleet[SlurmCluster]):
    """The job of one template."""

    def submit(self, name: str, trainer: str = "", *options: str, run_dir: str = "rollout-runs/{job}") -> None:
        """As its reader would: script, spec and train.py in one directory, and `sbatch NAME.sbatch`."""
        home = self.cluster.home
        for environment in ("sglang", "vllm"):
            activate = home / "envs" / environment / "bin/activate"
            activate.parent.mkdir(parents=True)
            activate.write_text(f'export PATH="{self.cluster.python.parent}:$PATH"\n')
        spec = f"{SPECS[name]}.toml"
        (home / spec).write_text(rehearsed((TEMPLATES / spec).read_text()))
        (home / "train.py").write_text(textwrap.dedent(trainer))
        shutil.copy(TEMPLATES / f"{name}.sbatch", home)
        for path in home.rglob("*"):
            shutil.chown(path, self.cluster.uid, self.cluster.uid)
        self.job = self.cluster.run(["sbatch", "--parsable", *options, f"{name}.sbatch"]).stdout.strip()
        self.run = RunDir(home / run_dir.format(job=self.job))

    def output(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in sorted(self.cluster.home.glob("*-*.log")))

    def notes(self, what: str) -> list[Any]:
        """Return what the trainer noted of one kind, complete lines only."""
        try:
            text = (self.cluster.home / "notes.jsonl").read_text()
        except FileNotFoundError:
            return []
        notes = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [n[what] for n in notes if what in n]

    def has(self, name: str) -> None:
        """Make a file that the trainer looks for."""
        (self.cluster.home / name).touch()


@pytest.fixture
def start(
    request: pytest.FixtureRequest, real_slurm: None
) -> Iterator[Any]:  # a function from a number of nodes to a fleet
    with ExitStack() as stack:

        def begin(nodes: int, proctrack: Literal["linuxproc", "cgroup"] = "linuxproc") -> TemplateFleet:
            cluster = stack.enter_context(SlurmCluster(nodes=nodes, proctrack=proctrack))
            fleet = TemplateFleet(cluster)

            def end() -> None:
                failed = request.node.stash.get(FAILED, False)
                if failed:
                    print(fleet.story())
                    show_logs(cluster)
                fleet.end()
                expect_no_process_left(cluster)

            stack.callback(end)
            return fleet

        yield begin


PRELUDE = """\
import json, os, signal, socket, sys, time
from pathlib import Path

rank = int(os.environ["SLURM_PROCID"])

def note(**what):
    with open("notes.jsonl", "a") as log:
        print(json.dumps(what), file=log)
"""

# A rank that has its checkpoint ready a second after TERM.
TRAINER = f"""{PRELUDE}
def save(*_):
    time.sleep(1)
    note(saved=rank)
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
note(rank=[rank, socket.gethostname()])
while True:
    time.sleep(0.05)
"""


@pytest.mark.slurm
def test_train_has_a_trainer_on_several_nodes_that_hears_of_the_end(start: Any) -> None:
    # proctrack/cgroup is what sites have: there TERM reaches the tasks themselves, and of the batch script only `up`.
    fleet: TemplateFleet = start(6, "cgroup" if FREEZER.exists() else "linuxproc")
    fleet.submit("train", TRAINER, "--nodes=6")
    fleet.wait("both ranks", lambda: len(fleet.notes("rank")) == 2, timeout_s=60)
    assert sorted(fleet.notes("rank")) == [[0, "n1"], [1, "n2"]]
    fleet.kill("actor/0", 1)
    fleet.wait_event("ready", "actor/0", 2)  # this trainer pushes no weights: stale
    assert not fleet.events("failure", "actor/1")
    assert {g["master"] for g in fleet.barrier()["groups"]} == {"n3:18001", "n5:18001"}
    fleet.cluster.cancel(fleet.job)
    fleet.cluster.wait_job(fleet.job, "CANCELLED")
    assert [e["type"] for e in fleet.events()][-1] == "ended"
    if FREEZER.exists():
        assert sorted(fleet.notes("saved")) == [0, 1]
    wait_for("no process of the run", lambda: not fleet.processes(), timeout_s=5)


@pytest.mark.slurm
def test_fleet_only_serves_readers_elsewhere(start: Any) -> None:
    fleet: TemplateFleet = start(2)
    fleet.submit("fleet-only", run_dir="rollout-runs/teacher")
    fleet.wait("its run directory", lambda: fleet.run.barrier.exists(), timeout_s=30)
    reader = ["slurm-rollout", "wait", "--for=ready", "--timeout=60", "--run-dir=rollout-runs/teacher"]
    said = fleet.cluster.run(reader).stdout
    assert {f"http://{n}:{p}" for n in ("n1", "n2") for p in (18000, 18016)} <= set(said.split())
    fleet.kill("teacher/3", 0)
    fleet.wait_serving("teacher/3", 2)
    assert fleet.group("teacher/3")["urls"] == ["http://n2:18016"]
    assert [e["group"] for e in fleet.events("failure")] == ["teacher/3"]


@pytest.mark.slurm
def test_hetjob_has_trainer_and_fleet_in_components_of_their_own(start: Any) -> None:
    fleet: TemplateFleet = start(3)
    fleet.submit("hetjob", TRAINER)
    fleet.wait("the trainer", lambda: fleet.notes("rank"), timeout_s=60)
    assert fleet.notes("rank") == [[0, "n1"]]
    fleet.kill("actor/1", 0)
    fleet.wait_serving("actor/1", 2)
    assert fleet.group("actor/1")["urls"] == ["http://n3:18000"]
    assert not fleet.events("failure", "actor/0")
    steps = fleet.cluster.run(["scontrol", "--oneliner", "show", "step", str(int(fleet.job) + 1)]).stdout
    assert sorted(re.findall(r" Name=moe-het\.(\S+)", steps)) == ["actor-0.1.0", "actor-1.2.0"]
    fleet.cluster.run(["slurm-rollout", "stop", "--run-dir", str(fleet.run.path)])
    wait_for("the job's end", lambda: fleet.cluster.job_state(fleet.job) in ("COMPLETED", "FAILED"), timeout_s=30)
    wait_for("no process of the run", lambda: not fleet.processes(), timeout_s=5)


# Pushes, generates and trains in turns, all on the same GPUs. Holds on in its training while a file `hold` is there.
COLOCATED = f"""{PRELUDE}
import urllib.request

def post(url, what):
    request = urllib.request.Request(url, json.dumps(what).encode(), {{"Content-Type": "application/json"}})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)

def push(version):
    deadline = time.monotonic() + 60
    while not all(group.urls for group in barrier.current().groups) and time.monotonic() < deadline:
        time.sleep(0.02)
    snapshot = barrier.stale(version)
    for url in (url for group in snapshot.groups for url in group.urls):
        post(url + "/update_weights", {{"version": version}})
    barrier.ack_weights(version, snapshot)

def generate(state):
    wish = {{"model": "policy", "max_tokens": 1, "messages": [{{"role": "user", "content": "hi"}}]}}
    answers = [post(url + "/v1/chat/completions", wish)["rollout"] for url in state.urls]
    return [[a["group"], a["incarnation"], a["weights_version"]] for a in answers]

note(rank=[rank, socket.gethostname()])
if rank:
    while not Path("finish").exists():
        time.sleep(0.05)
    sys.exit()

from slurm_rollout.barrier import Barrier

barrier = Barrier()
version = 0
while not Path("finish").exists():
    version += 1
    barrier.announce("syncing")
    push(version)
    state = barrier.wait_ready(timeout=60)
    barrier.announce("generating")
    samples = generate(state)
    barrier.announce("training")
    note(training=[version, samples])
    while Path("hold").exists():
        time.sleep(0.02)
"""


@pytest.mark.slurm
def test_colocated_starts_a_dead_group_again_when_the_trainer_is_off_the_gpus(start: Any) -> None:
    fleet: TemplateFleet = start(4)
    fleet.has("hold")
    fleet.submit("colocated", COLOCATED)
    [version, samples] = fleet.wait("the first training", lambda: fleet.notes("training"), timeout_s=60)[0]
    assert version == 1
    assert sorted(samples) == [[f"actor/{n}", 1, 1] for n in range(4)]
    assert sorted(rank for rank, _ in fleet.notes("rank")) == [0, 1, 2, 3]

    fleet.kill("actor/2", 0)
    fleet.wait_event("stopped", "actor/2", 1)
    seq = fleet.barrier()["seq"]
    fleet.wait("a heartbeat", lambda: fleet.barrier()["seq"] > seq)
    assert not fleet.events("launching", "actor/2", 2), "the trainer is on its GPUs"
    assert fleet.group("actor/2")["urls"] == []
    assert "syncing" in fleet.barrier()["pools"][0]["may_start"]
    steps = len(fleet.notes("training"))
    (fleet.cluster.home / "hold").unlink()
    fleet.wait_serving("actor/2", 2)
    fleet.wait(
        "samples of it", lambda: ["actor/2", 2] in [s[:2] for t in fleet.notes("training")[steps:] for s in t[1]]
    )
    for version, samples in fleet.notes("training"):
        assert {s[2] for s in samples} == {version}, "all samples are of the newest weights"
    assert [e["group"] for e in fleet.events("failure")] == ["actor/2"]
    fleet.has("finish")
    fleet.cluster.wait_job(fleet.job, "COMPLETED")
