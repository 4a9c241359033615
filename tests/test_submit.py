"""`submit`: the script that comes out of a template, what is refused before anything is submitted, rehearsals here.

Ports of this file: 11000 to 11999.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from slurm_rollout import batch_script, cli
from slurm_rollout.errors import UsageError
from slurm_rollout.testing.fleet import Fleet, stub_spec, wait_for

ROOT = Path(__file__).parents[1]
TRAINER = ("--", "python", "train.py")

OWN = """\
#!/bin/bash
# A comment on a directive goes with it.
#SBATCH -N 3 --exclusive -J mine   # so does this one
#SBATCH --gres gpu:8
#SBATCH --time=60 --no-requeue
#SBATCH --output="my log-%j"

# This one stays.
module load cuda
spec=old.toml
run_dir=/scratch/$SLURM_JOB_ID
trainer=(old --command)
exec slurm-rollout up "$spec" --run-dir "$run_dir" -- srun -w $ROLLOUT_TRAINER_NODELIST "${trainer[@]}"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to submit from, with a spec for two nodes, and no Slurm on the PATH."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "fleet.toml").write_text(stub_spec(name="exp", more="[nodes]\ncount = 2"))
    return tmp_path


def slurm(here: Path, answers: Sequence[str]) -> Path:
    """Put an sbatch on the PATH that says these things, one a call (an empty one: it fails), and notes its scripts."""
    (here / "answers").write_text("".join(f"{a}\n" for a in answers))
    sbatch = here / "bin/sbatch"
    sbatch.write_text(
        f"""#!{sys.executable}
import pathlib, sys
here = pathlib.Path({str(here)!r})
answer, *rest = (here / "answers").read_text().splitlines()
(here / "answers").write_text("".join(f"{{a}}\\n" for a in rest))
if not answer:
    sys.exit("sbatch: error: Batch job submission failed: Invalid qos specification")
assert len(sys.argv) == 2, sys.argv
(here / f"seen-{{answer.split()[-1]}}").write_text(pathlib.Path(sys.argv[1]).read_text())
print(answer)
"""
    )
    (here / "bin/srun").write_text("#!/bin/sh\n")
    for program in (sbatch, here / "bin/srun"):
        program.chmod(0o755)
    return here


def dry_run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the script that `submit --dry-run` prints."""
    assert cli.main(["submit", "fleet.toml", "--dry-run", *argv]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return what `submit` says when it refuses."""
    assert cli.main(["submit", *argv]) == 2
    said = capsys.readouterr()
    assert not said.out
    return said.err


def directives(script: str) -> list[str]:
    """Return the directives in a script, without the magic word."""
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


# ----------------------------------------------------------------------------------------------------------- the script


def test_the_script_is_the_template_with_its_lines_set_and_its_directives_overridden(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = dry_run(capsys, "--nodes=3", "--time=2-0", "--account=moe", "--sbatch=constraint=h100", *TRAINER)
    assert directives(script) == [
        "--account=moe",
        "--constraint=h100",
        "--exclusive",
        "--gres=gpu:8",
        "--job-name=exp",
        "--mem=0",
        "--no-kill",
        "--no-requeue",
        "--nodes=3",
        "--open-mode=append",
        "--output=%x-%j.log",
        "--signal=B:CONT@0",
        "--time=2-0",
        "--wckey=''",
    ]
    lines = script.splitlines()
    assert f"spec={here / 'fleet.toml'}" in lines
    assert "trainer=(python train.py)" in lines
    template = batch_script.templates()["train"].read_text().splitlines()
    assert template[-1] in lines
    assert [line for line in lines if line.startswith("run_dir=")] == [t for t in template if t.startswith("run_dir=")]
    subprocess.run(["/bin/bash", "-n"], input=script, text=True, check=True)
    assert not list(here.glob("rollout-runs/**/*")), "a dry run writes nothing"


def test_a_template_of_one_s_own_keeps_all_that_is_not_set(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.sbatch").write_text(OWN)
    script = dry_run(capsys, "--template=own.sbatch", "--sbatch=requeue", "--run-dir", "a b/$c")
    assert directives(script) == [
        "--exclusive",
        "--gres=gpu:8",
        "--job-name=mine",
        "--nodes=3",
        "--open-mode=append",
        "--output='my log-%j'",
        "--requeue",
        "--signal=B:CONT@0",
        "--time=60",
        "--wckey=''",
    ]
    body = script.partition("# setup\n")[2].splitlines()
    expected = OWN.splitlines()[7:]
    expected[2:4] = [f"spec={here / 'fleet.toml'}", f"run_dir='{here}/a b/$c'"]
    assert body[2 : 2 + len(expected)] == expected


def test_a_directive_that_submitit_has_too_is_in_the_script_once(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two equal options sbatch takes the last one, which would mostly be submitit's."""
    more = [
        f"--sbatch={o}" for o in ("open-mode=truncate", "wckey=w", "error=e", "signal=B:TERM@99", "cpus-per-task=4")
    ]
    found = directives(dry_run(capsys, *more, "--job-name=n", *TRAINER))
    names = [d.partition("=")[0] for d in found]
    assert len(set(names)) == len(names)
    assert {"--open-mode=truncate", "--wckey=w", "--error=e", "--signal=B:TERM@99", "--job-name=n"} <= set(found)


def test_the_components_of_a_heterogeneous_job_stay_apart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("fleet.toml").write_text(stub_spec(more="[nodes]\nhet_group = 1"))
    found = directives(dry_run(capsys, "--template=hetjob", "--partition=p", "--time=30", *TRAINER))
    first, second = found[: found.index("hetjob")], found[found.index("hetjob") + 1 :]
    assert {"--nodes=1", "--partition=p", "--time=30"} <= set(first)
    assert second == ["--nodes=2", "--exclusive", "--gpus-per-node=8", "--mem=0"]


def test_the_gpus_of_a_further_component_must_be_asked_for_in_the_way_that_slurm_tells_of(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("fleet.toml").write_text(stub_spec(layout="gpus = 8", more="[nodes]\nhet_group = 1"))
    template = batch_script.templates()["hetjob"].read_text()
    Path("own.sbatch").write_text(template.replace("--gpus-per-node=8", "--gres=gpu:8"))
    assert "only --gpus-per-node tells" in refused(capsys, "fleet.toml", "--template=own.sbatch", "--dry-run")


@pytest.mark.parametrize(
    "trainer", [["python", "a b.py", "--x=$HOME", "it's", ")", 'say "hi"', "*", ""], ["bash", "-c", "a; b\nc `d` $(e)"]]
)
def test_the_trainer_s_words_arrive_as_they_were_written(
    here: Path, capsys: pytest.CaptureFixture[str], trainer: list[str]
) -> None:
    for how in (["--", *trainer], ["--trainer", shlex.join(trainer)]):
        script = dry_run(capsys, *how)
        lines = script.partition("\ntrainer=")[2].partition("\n\n")[0]
        shown = f'trainer={lines}\nprintf "%s\\0" "${{trainer[@]}}"'
        done = subprocess.run(["/bin/bash", "-c", shown], capture_output=True, text=True, check=True)
        assert done.stdout.split("\0")[:-1] == trainer


def test_json_holds_the_script(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(dry_run(capsys, "--json", *TRAINER))
    assert found == {"schema": 1, "executor": "slurm", "jobs": [], "script": dry_run(capsys, *TRAINER)}


def test_submitit_is_imported_in_one_place_and_only_when_needed() -> None:
    users = set()
    for path in (ROOT / "slurm_rollout").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] == "submitit" for name in names):
                users.add(path.name)
    assert users == {"submit.py"}
    code = "import sys, slurm_rollout.submit, slurm_rollout.cli.submit; sys.exit('submitit' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["gone.toml", *TRAINER], "gone.toml cannot be read"),
        (["fleet.toml"], "say which, after `--`"),
        (["fleet.toml", "--"], "no trainer after `--`"),
        (["fleet.toml", "--trainer=", "--nodes=2"], "--trainer is empty"),
        (["fleet.toml", "--trainer=a 'b"], "No closing quotation"),
        (["fleet.toml", "--trainer=a", *TRAINER], "named twice"),
        (["fleet.toml", "--template=fleet-only", *TRAINER], "a template without one starts no trainer"),
        (["fleet.toml", "--template=trian", *TRAINER], "there are colocated, fleet-only, hetjob, train"),
        (["fleet.toml", "--sbatch=-N4", *TRAINER], "by its long name"),
        (["fleet.toml", "--sbatch=array=1-4", *TRAINER], "--array cannot be used"),
        (["fleet.toml", "--sbatch=signal=USR1@300", *TRAINER], "Slurm sends it to every step"),
        (
            ["fleet.toml", "--sbatch=signal=B:ALRM@300", *TRAINER],
            "only TERM, INT, HUP, CONT, USR1, USR2 do not kill `up`",
        ),
        (["fleet.toml", "--chain=2", *TRAINER], "--run-dir rollout-runs/exp"),
        (["fleet.toml", "--chain=2", "--executor=local"], "--chain is for Slurm's time limits"),
        (["fleet.toml", "--chain=0"], "a number from 1 on"),
        (["fleet.toml", "--nodes=1", *TRAINER], "nodes.count = 2: the allocation has 1"),
        (["fleet.toml", "--template=own.sbatch"], "no Slurm here"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_submitted(
    here: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    Path("own.sbatch").write_text(OWN)
    said = refused(capsys, *argv)
    assert words in said
    assert "Traceback" not in said
    assert not [path for path in here.glob("rollout-runs/**/*") if path.is_file()]


def test_a_signal_from_the_environment_is_refused_too(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_SIGNAL", "USR1@60")
    assert "SBATCH_SIGNAL" in refused(capsys, "fleet.toml", "--dry-run", *TRAINER)
    for harmless in ("B:SIGTERM@60", "B:USR1@300"):
        monkeypatch.setenv("SBATCH_SIGNAL", harmless)
        dry_run(capsys, *TRAINER)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("#!/bin/bash\n", "#!/bin/zsh\n"), "the first line must be #!/bin/bash"),
        (("exec slurm-rollout", "slurm-rollout"), "must be `exec slurm-rollout up …`"),
        (("spec=old.toml\n", ""), "has no line `spec=…`"),
        (("spec=old.toml\n", "spec=a\nspec=b\n"), "has 2 lines `spec=…`"),
        (("--time=60", ""), "no time limit"),
        (("-N 3", "-N 1"), "would not have room for the fleet"),
        (("--gres gpu:8", "--mem 0"), "no GPUs are known"),
        (("-N 3", "-Q"), "line 3: '-Q' is not understood"),
        (("-J mine", "-J 'mine"), "line 3: No closing quotation"),
        (("--no-requeue", "--signal=USR2@60"), "would harm the run"),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], words: str
) -> None:
    assert change[0] in OWN
    Path("own.sbatch").write_text(OWN.replace(*change))
    Path("fleet.toml").write_text(stub_spec(layout="gpus = 16", more="[nodes]\ncount = 2"))
    said = refused(capsys, "fleet.toml", "--template=own.sbatch", "--dry-run")
    assert words in said
    assert "own.sbatch" in said


@pytest.mark.parametrize(
    ("nodes", "options", "fits"),
    [
        ('include = "gpu[07-08]"', ["--nodes=2"], True),
        ("het_group = 1", ["--nodes=9"], False),  # there is one component
        ("count = 2", ["--nodes=2-4"], True),
        ("count = 3", ["--nodes=2-4"], False),
        ("count = 2", ["--sbatch=gres=gpu:h100:4"], False),  # groups of 16 take 4 such nodes
        ("count = 4", ["--sbatch=gres=gpu:h100:4(S:0-1)"], True),
        ("count = 2", ["--sbatch=gres=shard:1,gpu:8"], True),
        ("count = 2", ["--sbatch=gres=gpu"], False),
        ("count = 4", ["--sbatch=gres=none", "--sbatch=gpus-per-node=a100:4"], True),
        ("count = 2", ["--sbatch=gres=none", "--sbatch=gpus=16"], True),  # which nodes have how many is Slurm's choice
    ],
)
def test_the_fleet_must_fit_into_the_nodes_that_are_asked_for(
    here: Path, capsys: pytest.CaptureFixture[str], nodes: str, options: list[str], fits: bool
) -> None:
    Path("fleet.toml").write_text(stub_spec(layout="gpus = 16", more=f"[nodes]\n{nodes}"))
    argv = ["submit", "fleet.toml", "--dry-run", *options, *TRAINER]
    assert cli.main(argv) == (0 if fits else 2), capsys.readouterr().err


def test_without_submitit_the_way_out_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    for executor in ("slurm", "local"):
        said = refused(capsys, "fleet.toml", f"--executor={executor}", *TRAINER)
        assert "pip install 'slurm-rollout[submit]'" in said


# ----------------------------------------------------------------------------------------------------------- submission


def test_a_chain_is_submitted_job_by_job(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slurm(here, ["Submitted batch job 41", "Submitted batch job 42", "Submitted batch job 43"])
    assert cli.main(["submit", "fleet.toml", "--chain=3", "--run-dir=run", *TRAINER]) == 0
    said = capsys.readouterr()
    assert "job 41 (exp) submitted" in said.out
    assert "scancel 41 42 43" in said.out
    assert f"slurm-rollout status --run-dir {here / 'run'}" in said.out
    assert not said.err
    first, second, third = [(here / f"seen-{job}").read_text() for job in (41, 42, 43)]
    assert first == dry_run(capsys, "--run-dir=run", *TRAINER)
    assert "--dependency" not in first
    for before, script in ((41, second), (42, third)):
        assert {f"--dependency=afternotok:{before}", "--kill-on-invalid-dep=yes"} <= set(directives(script))
    folder = here / "rollout-runs/.submit"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "41_submission.sh").read_text() == first
    assert not list(folder.glob("*.pkl"))


def test_a_job_on_its_own_and_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slurm(here, ["Submitted batch job 7 on cluster c"])
    assert cli.main(["submit", "fleet.toml", "--json", *TRAINER]) == 0
    run_dir = str(here / "rollout-runs/7")
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1,
        "executor": "slurm",
        "jobs": ["7"],
        "run_dir": run_dir,
        "status": ["slurm-rollout", "status", "--run-dir", run_dir],
    }


def test_a_refusal_keeps_slurm_s_words_and_names_the_jobs_that_were_submitted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm(here, ["", "Submitted batch job 8", ""])
    assert cli.main(["submit", "fleet.toml", *TRAINER]) == 1
    said = capsys.readouterr().err
    assert said.count("Invalid qos specification") == 1
    assert "stay" not in said
    assert cli.main(["submit", "fleet.toml", "--chain=3", "--run-dir=run", *TRAINER]) == 1
    assert "8 were submitted, and stay: scancel 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("rollout-runs/$SLURM_JOB_ID # why", "/sub/rollout-runs/5"),
        ("/a/${SLURM_JOB_ID}/x", "/a/5/x"),
        ('"$HOME/my runs"', "/home/me/my runs"),
        ("~/r", "/home/me/r"),
        ("runs/$SLURM_JOB_NAME", "/sub/runs/exp"),
        ("$SCRATCH_OF_THE_NODE/r", None),
        ("$(mktemp -d)", None),
    ],
)
def test_the_run_directory_is_told_where_it_can_be_known(
    line: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    script = batch_script.Script(
        source="", components=({"chdir": "/sub", "job-name": "exp"},), body=f"a\nrun_dir={line}\nb"
    )
    assert batch_script.run_dir_of(script, "5") == found


def test_a_template_of_the_package_is_found_by_its_name_only() -> None:
    assert set(batch_script.templates()) == {"train", "colocated", "fleet-only", "hetjob"}
    with pytest.raises(UsageError, match="no template 'fleet'"):
        batch_script.read_template("fleet")


# ----------------------------------------------------------------------------------------------------------- rehearsals


class HereFleet(Fleet):
    """What `submit --executor …` started on this machine."""

    pid = 0
    submitted: subprocess.Popen[str] | None = None

    def submit(self, executor: str, *options: str, **environ: str) -> str:
        (self.folder / "fleet.toml").write_text(stub_spec(base=11000, control=self.control))
        argv = [
            sys.executable,
            "-m",
            "slurm_rollout",
            "submit",
            "fleet.toml",
            "--run-dir=run",
            f"--executor={executor}",
        ]
        with (self.folder / "errors").open("w") as errors:
            self.submitted = subprocess.Popen(
                [*argv, *options],
                cwd=self.folder,
                env={**os.environ, **environ},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        if executor == "debug":
            self.pid = self.submitted.pid
            return ""
        said, _ = self.submitted.communicate(timeout=30)
        assert self.submitted.returncode == 0
        return said

    def output(self) -> str:
        logs = [*self.folder.glob("rollout-runs/.submit/*.out"), self.folder / "errors"]
        return "\n".join(log.read_text() for log in logs)

    def end(self) -> None:
        if self.submitted is not None:
            if self.submitted.stdout is not None:
                self.submitted.stdout.close()
            if self.pid and Path(f"/proc/{self.pid}").exists():
                os.kill(self.pid, signal.SIGTERM)
            self.submitted.wait(30)
            wait_for("the end of all of it", lambda: not self._environs_of_run(), timeout_s=30)

    def _environs_of_run(self) -> list[int]:
        return [pid for pid, found in self._environs() if str(self.run.path) in found.get("ROLLOUT_STEP", "")] + (
            self.processes()
        )


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[HereFleet]:
    with HereFleet(tmp_path) as made:
        yield made


def test_a_local_rehearsal_outlives_its_submission_and_recovers(fleet: HereFleet) -> None:
    said = json.loads(fleet.submit("local", "--json", CUDA_VISIBLE_DEVICES="3,5"))
    assert said["run_dir"] == str(fleet.run.path)
    fleet.pid = int(said["jobs"][0])
    fleet.wait_phase("ready")
    fleet.kill("actor/0", 1)
    fleet.wait_serving("actor/0", 2)
    assert "run directory" in Path(said["output"]).read_text()
    [up] = [pid for pid in _children(fleet.pid) if b"slurm_rollout\0up\0" in _cmdline(pid)]
    environ = Path(f"/proc/{up}/environ").read_bytes().split(b"\0")
    assert b"CUDA_VISIBLE_DEVICES=3,5" in environ, "submitit hides the GPUs that it was not asked for"
    assert not [e for e in environ if e.startswith(b"SUBMITIT_")]
    os.kill(fleet.pid, signal.SIGTERM)
    fleet.wait_event("ended")
    assert fleet.barrier()["phase"] == "stopped"


def test_a_debug_rehearsal_is_up_itself(fleet: HereFleet) -> None:
    fleet.submit("debug", "--", sys.executable, "-c", "raise SystemExit(7)")
    assert fleet.submitted is not None
    assert fleet.submitted.wait(30) == 7
    assert [e["type"] for e in fleet.events()][-1] == "ended"


def test_what_a_rehearsal_would_run_can_be_seen(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "fleet.toml", "--executor=local", "--dry-run", *TRAINER]) == 0
    argv = shlex.split(capsys.readouterr().out)
    assert argv[1:5] == ["-P", "-m", "slurm_rollout", "up"]
    assert argv[-3:] == list(TRAINER)
    assert not (here / "rollout-runs").exists()


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
