"""Runs of other directories and other users: the word in a job's comment, `status` of many runs, `-j` from anywhere.

Ports: 15000 to 15999 (the test clusters have networks of their own).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import discovery, proc
from slurm_rollout.cli import main, runs
from slurm_rollout.errors import Unobservable
from slurm_rollout.rundir import MAX_JSON_BYTES, RunDir
from slurm_rollout.slurm import comment
from slurm_rollout.testing.fake_slurm import FakeSlurm
from slurm_rollout.testing.fleet import SlurmFleet, stub_spec, wait_for
from slurm_rollout.testing.slurm_cluster import SlurmCluster
from tests.conftest import FAILED
from tests.test_cli_read import TROUBLED, document, put_status, write

pytest_plugins = ["slurm_rollout.testing.plugin"]

BASES = iter(range(15000, 15920, 80))

# ------------------------------------------------------------------------------------------------------------- comment

NAMED = {
    "": (),
    "(null)": (),
    "slurm-rollout:/a/run": ("/a/run",),
    "slurm-rollout:/a slurm-rollout:/b slurm-rollout:/a": ("/a", "/b"),
    "project=x,slurm-rollout:/a;slurm-rollout:/b": ("/a", "/b"),
    '{"site": 1, "run": "slurm-rollout:/a"}': ("/a",),
    "slurm-rollout:/a%20b%22%0A": ('/a b"\n',),
    "slurm-rollout:/a%2520": ("/a%20",),
    "slurm-rollout:/a%00b slurm-rollout:/c": ("/c",),
    "slurm-rollout:relative slurm-rollout: not-slurm-rollout:/a": (),
    '{"autoresume": {"n": 1}}': (),
}


@pytest.mark.parametrize("text", NAMED)
def test_run_directories_are_found_in_any_comment(text: str) -> None:
    assert discovery.marked_dirs(text) == NAMED[text]


WEIRD = [
    "/a",
    "/a b",
    '/"q"',
    "/100%",
    "/a|b;c,d",
    "/ü\udcff",
    "/new\nline",
    "/{x}[y]",
    "/a=b:c@d+e",
    "/slurm-rollout:/x",
]


@pytest.mark.parametrize("path", WEIRD)
def test_a_comment_names_any_directory_in_one_plain_word(path: str) -> None:
    text = discovery.marked("", path)
    assert text is not None
    assert re.fullmatch(r"slurm-rollout:/[\w/.%:@+~-]*", text, re.ASCII)
    assert discovery.marked_dirs(text) == (path,)
    assert discovery.marked(text, path) == text
    both = discovery.marked(text, "/other")
    assert both is not None
    assert set(discovery.marked_dirs(both)) == {path, "/other"}


@pytest.mark.parametrize("text", ['{"n": 1}', "project=x", "slurm-rollout:/a and more"])
def test_somebody_elses_comment_stays(text: str) -> None:
    assert discovery.marked(text, "/run") is None


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5"}, "12_5"),
        ({"SLURM_JOB_ID": "12", "SLURM_HET_SIZE": "2"}, "12+0"),
    ],
)
def test_the_name_of_a_job_is_that_of_nothing_more(environ: dict[str, str], name: str) -> None:
    assert comment.update_name(environ) == name


# --------------------------------------------------------------------------------------------------- a queue of our own

PROGRAM = """\
#!{python} -IS
import json, os, re, sys
with open({log!r}, "a") as f:
    f.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
given = dict(word.partition("=")[::2] for word in sys.argv[1:])
with open({queue!r}) as f:
    queue = json.load(f)
if any(name.startswith("SQUEUE_") for name in os.environ):
    sys.exit("an option out of the environment")
if queue["fails"]:
    print(queue["fails"], file=sys.stderr)
    sys.exit(1)
if sys.argv[0].endswith("scontrol"):
    sys.exit(0)
jobs = queue["jobs"]
if "--jobs" in given:
    jobs = [j for j in jobs if given["--jobs"] in (j["A"], j["i"], re.split("[_+]", j["i"])[0])]
    if not jobs:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
elif "--user" in given:
    jobs = [j for j in jobs if j["u"] in given["--user"].split(",")]
for job in jobs:
    sys.stdout.buffer.write(os.fsencode(re.sub("%(.)", lambda m: job[m[1]], given["--format"]) + "\\n"))
"""


class Queue:
    """A squeue and a scontrol that know what the test says, and remember what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log, self._file = folder / "calls", folder / "queue.json"
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        for name in ("squeue", "scontrol"):
            text = PROGRAM.format(python=sys.executable, log=str(self._log), queue=str(self._file))
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        self.jobs: list[dict[str, str]] = []
        self.say()

    def say(self, fails: str = "") -> None:
        self._file.write_text(json.dumps({"jobs": self.jobs, "fails": fails}))

    def add(self, number: int, run: Path | str = "", **changes: str) -> None:
        """Put a job into the queue, whose comment names `run`."""
        job = {"A": str(number), "i": str(number), "j": "fleet", "u": "root", "T": "RUNNING", "L": "10:00:00"}
        word = discovery.marked("", str(run)) if run else "(null)"
        self.jobs.append(job | {"k": str(word), "Z": str(self.folder / "no-such-dir")} | changes)
        self.say()

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()] if self._log.exists() else []


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """A queue on PATH; the working directory is one without runs, outside of any job."""
    for name in [n for n in os.environ if n.startswith(("SLURM_", "ROLLOUT_", "SQUEUE_"))]:
        monkeypatch.delenv(name)
    made = Queue(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{made.bin}:/usr/bin:/bin")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return made


def make_run(path: Path, content: dict[str, Any] | None = None, *, age_s: float = 3.0, **changes: Any) -> Path:
    path.mkdir(parents=True)
    put_status(path, (content or document()) | changes, age_s=age_s)
    return path


def rows(said: str) -> list[list[str]]:
    return [line.split(maxsplit=10) for line in said.splitlines()]


# --------------------------------------------------------------------------------------------------------- many runs

TABLE = """\
JOB  NAME  USER   RUN   PHASE   GROUPS EPOCH RESTARTS      AGE       LEFT MESSAGE
20_1 fleet daemon qwen3 ready      2/2     7        0 00:00:??   10:00:00
17   fleet root   qwen3 ready      1/2     7        2 00:00:??   10:00:00 actor/0 backoff; blind for 00:01:00
18   fleet root   qwen3 unknown    2/2     7        0 00:05:??  UNLIMITED no heartbeat for 00:05:??; was ready
19   fleet root   qwen3 stopped    2/2     7        0 00:00:?? 1-02:03:04 the job is COMPLETING; the run has ended
"""


def test_one_line_for_each_run_and_one_question_to_slurm(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.add(17, make_run(tmp_path / "a", TROUBLED, job="17", run="qwen3", message="actor/0 backoff"))
    queue.add(18, make_run(tmp_path / "b", job="18", run="qwen3", age_s=300), L="UNLIMITED")
    ended = make_run(tmp_path / "c", job="19", run="qwen3", phase="stopped", ended=True)
    queue.add(19, ended, T="COMPLETING", L="1-02:03:04")
    queue.add(21, make_run(tmp_path / "d", job="21", run="qwen3"), i="20_1", u="daemon")
    queue.add(22, u="daemon")
    assert main(["status", "-a"]) == 4
    said = capsys.readouterr()
    assert re.sub(r"\b(00:0[05]):\d\d\b", r"\1:??", said.out) == TABLE
    assert said.err == ""
    assert len(queue.calls()) == 1
    assert main(["status", "-a", "-h"]) == 4
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main(["status", "-u", "daemon"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_whose_runs(queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, user in enumerate(("root", "daemon", "nobody"), 1):
        queue.add(number, make_run(tmp_path / user, job=str(number)), u=user)
    me = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    for argv, asked in (
        (["--me"], me),
        ([], me),
        (["-u", "daemon"], "daemon"),
        (["-u", "nobody, daemon"], "nobody,daemon"),
        (["-u", "1"], "daemon"),
        (["-a"], ""),
    ):
        main(["status", *argv])
        options = [word for word in queue.calls()[-1] if word.startswith("--user")]
        assert options == ([f"--user={asked}"] if asked else [])
    capsys.readouterr()
    assert main(["status", "-u", "nobody,daemon", "-h"]) == 0
    assert [row[2] for row in rows(capsys.readouterr().out)] == ["daemon", "nobody"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-u", "no-such-user"], "no user 'no-such-user'"),
        (["-u", "4999999999"], "no user '4999999999'"),
        (["-u", "root,"], "no user ''"),
        (["-u", "root", "-j", "12"], "name one run"),
        (["-a", "--run-dir", "x"], "name one run"),
        (["-a", "--me"], "not allowed with"),
        (["-a", "-i", "4.9"], "at least 5 s"),
        (["--me", "-i", "0"], "at least 5 s"),
    ],
)
def test_wrong_usage_asks_nobody(queue: Queue, capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    assert main(["status", *argv]) == 2
    assert said in capsys.readouterr().err
    assert queue.calls() == []


def test_json_has_what_the_lines_have_and_the_documents(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "a", job="17")
    queue.add(17, run)
    queue.add(18, tmp_path / "missing", L="NOT_SET")
    assert main(["status", "-a", "--json"]) == 4
    answer = json.loads(capsys.readouterr().out)
    assert answer["meta"] == {"schema": 1, "users": None, "unseen_jobs": 0}
    assert answer["errors"] == []
    first, second = answer["runs"]
    assert first.pop("status") == json.loads((run / "status.json").read_text())
    assert 2.9 < first.pop("age_s") < 20
    assert first == {
        "job": "17",
        "job_id": "17",
        "name": "fleet",
        "user": "root",
        "job_state": "RUNNING",
        "time_left_s": 36000.0,
        "run_dir": str(run),
        "found_by": "comment",
        "coordinator": "alive",
        "error": "",
    }
    assert second["status"] is second["age_s"] is second["coordinator"] is second["time_left_s"] is None
    assert f"{tmp_path}/missing/status.json is not there" in second["error"]


def test_no_run_is_no_failure(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    queue.add(17)
    assert main(["status", "-a"]) == 0
    assert capsys.readouterr() == ("", "slurm-rollout: no job in the queue has a run that can be found\n")


def test_a_run_in_its_default_place_needs_no_comment(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    make_run(work / "rollout-runs/17", job="17")
    make_run(work / "rollout-runs/18", job="18")
    make_run(work / "rollout-runs/19", job="19")
    queue.add(17, Z=str(work), k='{"site": 1}')
    queue.add(18, Z=str(work), T="PENDING")
    queue.add(19, make_run(tmp_path / "there", job="19", run="there"), Z=str(work))
    queue.add(20, Z=str(work))
    assert main(["status", "-a", "-h"]) == 0
    assert [(row[0], row[3]) for row in rows(capsys.readouterr().out)] == [("17", "qwen3-moe-rl"), ("19", "there")]


def test_several_runs_of_one_job(queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (make_run(tmp_path / name, job="17", run=name) for name in ("a", "b"))
    queue.add(17, k=f"slurm-rollout:{a} slurm-rollout:{b}")
    assert main(["status", "-a", "-h"]) == 0
    assert [row[3] for row in rows(capsys.readouterr().out)] == ["a", "b"]
    assert main(["status", "-j", "17"]) == 2
    assert f"job 17 has 2 runs: name one with --run-dir: {a}, {b}" in capsys.readouterr().err
    (b / "status.json").unlink()
    b.rmdir()
    assert main(["status", "-j", "17"]) == 0


def test_a_requeued_job_that_waits_has_no_news(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.add(17, make_run(tmp_path / "a", job="17", age_s=9999), T="PENDING")
    assert main(["status", "-a", "-h"]) == 3
    [row] = rows(capsys.readouterr().out)
    assert row[4] == "-"
    assert row[10] == "the job waits to start"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path)


def link(path: Path) -> None:
    write(path.with_name("other"), document(job="17"))
    path.symlink_to("other")


def huge(path: Path) -> None:
    with path.open("wb") as f:
        f.truncate(MAX_JSON_BYTES + 1)


def secret(path: Path) -> None:
    path.touch(mode=0)


BAD: dict[str, tuple[str | Callable[[Path], None], str]] = {
    "a FIFO": (fifo, "no plain file"),
    "a directory": (Path.mkdir, "no plain file"),
    "a link that leads to itself": (loop, "Too many levels of symbolic links"),
    "a link": (link, "Too many levels of symbolic links"),
    "without an end": (huge, "more than 64 MiB"),
    "not there": (lambda _: None, "is not there"),
    "empty": ("", "is not JSON"),
    "no text": ("\udcff\udcfe", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "a list": ("[]", "is not a status file"),
    "newer": ('{"schema": 2, "job": "17"}', "has schema 2"),
    "another job's": (json.dumps(document(job="16")), "of another job: '16'"),
    "no job's": (json.dumps(document(job="")), "of another job: ''"),
    "without fields": ('{"schema": 1, "job": "17"}', "KeyError 'at'"),
    "without a message": (
        json.dumps({k: v for k, v in document(job="17").items() if k != "message"}),
        "KeyError 'message'",
    ),
    "with no pools": (json.dumps(document(job="17", pools=None)), "TypeError"),
    "with other pools": (json.dumps(document(job="17", pools=[{"ready": "2", "desired": []}])), "TypeError"),
    "of no time": (json.dumps(document(job="17", at=float("nan"))), "ValueError"),
    "of the end of time": (json.dumps(document(job="17", at=float("-inf"))), "OverflowError"),
    "of a large number": (json.dumps(document(job="17", at=10**400)), "OverflowError"),
    "of a time to come": (json.dumps(document(job="17", at=9e9)), "in the future"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_run_that_cannot_be_read_is_unknown_not_absent(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    content, why = BAD[case]
    (tmp_path / "a").mkdir()
    path = tmp_path / "a/status.json"
    if isinstance(content, str):
        path.write_bytes(content.encode(errors="surrogateescape"))
    else:
        content(path)
    queue.add(17, tmp_path / "a")
    queue.add(18, make_run(tmp_path / "b", job="18"))
    assert main(["status", "-a", "-h"]) == 4
    said = capsys.readouterr()
    bad, good = rows(said.out)
    assert (bad[0], bad[4], good[4]) == ("17", "unknown", "ready")
    assert why in bad[10]
    assert said.err == ""
    assert main(["status", "-a", "--json"]) == 4
    assert why in json.loads(capsys.readouterr().out)["runs"][0]["error"]
    # Of one run alone it is the same, but for whose it is.
    if "job's" not in case:
        assert main(["status", "-j", "17"]) == 4
        said = capsys.readouterr()
        assert said.out == "" or case == "of a time to come"
        assert "status.json" in said.err or case == "of a time to come"


def test_what_others_wrote_cannot_steer_the_terminal(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07\n\r\x9b2J\u202e"
    path = make_run(tmp_path / f"a{evil}", job="17", run=evil, message=evil + "m" * 5000)
    queue.add(17, path, j=f"{evil}|<%i", u=evil)
    queue.add(18, tmp_path / f"none{evil}", j=evil)
    for _ in range(2):
        assert main(["status", "-a"]) == 4
        said = capsys.readouterr()
        assert len(said.out.splitlines()) == 3
        assert said.out.replace("\n", "").isprintable()
        assert "?]0;owned?" in said.out
        assert len(max(said.out.splitlines(), key=len)) < 600


def test_a_comment_cannot_pass_for_another_job(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is in a field: a line end, what stands between fields, what squeue's format is made of."""
    forged = "|x|\n<0123456789abcdef>99|0123456789abcdef|99 %A %i slurm-rollout:/etc"
    queue.add(17, k=forged, Z="/a\nb|c<d>", j="%A\n")
    [job] = discovery.jobs()
    assert (job.id, job.comment, job.work_dir, job.name) == ("17", forged, "/a\nb|c<d>", "%A\n")


def test_options_out_of_the_environment_are_not_ours(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SQUEUE_USERS", "daemon")
    queue.add(17)
    assert main(["status", "-a"]) == 0
    assert "no job" in capsys.readouterr().err


def test_when_slurm_does_not_answer_nothing_is_known(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.add(17, make_run(tmp_path / "a", job="17"))
    queue.say(fails="slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    for argv, more in (([], "no run directory at rollout-runs/local"), (["-a"], "Nothing is known of any run")):
        assert main(["status", *argv]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert "squeue failed with 1: slurm_load_jobs error: Unable to contact" in said.err
        assert more in said.err
    assert main(["status", "-a", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert "Unable to contact" in answer["errors"][0]
    assert "runs" not in answer
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["status", "-a"]) == 1
    assert "squeue could not be run: No such file" in capsys.readouterr().err
    assert main(["status"]) == 2, "a laptop: the person can mend it"
    said = capsys.readouterr()
    assert said.err.startswith("slurm-rollout: error: no run directory at rollout-runs/local (name it with --run-dir")


def test_a_squeue_that_hangs_or_talks_nonsense(queue: Queue, tmp_path: Path) -> None:
    child = tmp_path / "child"
    (queue.bin / "squeue").write_text(f"#!/bin/sh\nsleep 60 & echo $! > {child}; wait\n")
    with pytest.raises(Unobservable, match=r"squeue did not answer within 0\.5 s"):
        discovery.jobs(timeout_s=0.5)
    wait_for("the end of what it started", lambda: not Path(f"/proc/{child.read_text().strip()}").exists())
    (queue.bin / "squeue").write_text('#!/bin/sh\nfor a; do echo "${a#--format=}" | tr -d %; done\n')
    with pytest.raises(Unobservable, match="something else than it was asked for"):
        discovery.jobs()


def test_a_file_system_that_hangs_hides_no_other_run(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.add(17, tmp_path / "hangs")
    queue.add(18, make_run(tmp_path / "b", job="18"))
    queue.add(19, Z=str(tmp_path / "hangs too"))
    real, back, asked = runs.look_at, threading.Event(), []

    def look_at(place: runs.Place) -> Any:
        asked.append(place.path)
        if "hangs" in Path(place.path).name:
            back.wait(60)
        return real(place)

    monkeypatch.setattr(runs, "look_at", look_at)
    monkeypatch.setattr(runs, "SILENCE_S", 1.5)
    looks = runs.RunsOf(user=None, everybody=True, asked=True)
    try:
        for _ in range(2):  # it is not asked again while it hangs
            assert looks.look(as_json=False, header=False, one_line=False) == 4
            said = capsys.readouterr()
            first, second = rows(said.out)
            assert first[10] == f"{tmp_path}/hangs does not answer: its file system hangs"
            assert second[4] == "ready"
            assert "1 more jobs" in said.err
        assert sorted(asked) == sorted(
            [str(tmp_path / "hangs"), str(tmp_path / "hangs too"), *[str(tmp_path / "b")] * 2]
        )
    finally:
        back.set()
    wait_for("an answer", lambda: not looks._busy)
    assert looks.look(as_json=False, header=False, one_line=False) == 4
    assert "is not there" in capsys.readouterr().out


@pytest.mark.skipif(os.getuid() != 0, reason="NOT TESTED as an ordinary user: only root can become one")
def test_what_a_stranger_sees(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with a world-readable status, a private one, and a job whose working directory is closed."""
    for folder in tmp_path.parents:
        if folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    tmp_path.chmod(0o755)
    readable, private = make_run(tmp_path / "open", job="17"), make_run(tmp_path / "private", job="18")
    readable.chmod(0o711)
    private.chmod(0o700)
    closed = tmp_path / "closed"
    make_run(closed / "rollout-runs/19", job="19")
    closed.chmod(0o700)
    queue.add(17, readable)
    queue.add(18, private)
    queue.add(19, Z=str(closed))
    found = discovery.jobs()  # now: the interpreter of our squeue may be closed to others
    monkeypatch.setattr(discovery, "jobs", lambda *o, **_: [j for j in found if "--jobs" not in o[0] or j.id in o[0]])
    os.seteuid(65534)
    try:
        assert main(["status", "-u", "root", "-h"]) == 4
        said = capsys.readouterr()
        first, second = rows(said.out)
        assert first[:6] == ["17", "fleet", "root", "qwen3-moe-rl", "ready", "2/2"]
        assert second[4] == "unknown"
        assert "Permission denied" in second[10]
        assert "1 more jobs say nothing of a run in their comments" in said.err
        assert main(["status", "-j", "17"]) == 0
        for number in ("18", "19"):
            assert main(["status", "-j", number]) == 1
            assert "cannot be read by you" in capsys.readouterr().err
    finally:
        os.seteuid(0)


def test_many_runs_are_looked_at_again_and_a_silent_slurm_is_no_end(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.add(17, make_run(tmp_path / "a", job="17"))
    pauses: list[float] = []
    real = time.sleep

    def sleep(pause_s: float) -> None:
        if pause_s < 1:  # of subprocess
            real(pause_s)
            return
        pauses.append(pause_s)
        queue.say(fails="no answer" if len(pauses) == 1 else "")
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("slurm_rollout.cli.status.time.sleep", sleep)
    assert main(["status", "--me", "-i", "5"]) == 130
    said = capsys.readouterr()
    assert pauses == [5.0] * 3
    assert said.out.count(" ready ") == 2
    assert said.err.count("no answer") == 1
    assert len(queue.calls()) == 3


# --------------------------------------------------------------------------------------------------------- one run, -j


@pytest.mark.parametrize("where", ["comment", "work_dir"])
@pytest.mark.parametrize("command", [["status"], ["events"], ["describe", "actor/0"], ["logs", "actor/0"]])
def test_the_run_of_a_job_is_found_from_anywhere(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, command: list[str]
) -> None:
    if where == "comment":
        run = make_run(tmp_path / "a b", job="17")
        queue.add(17, run)
    else:
        run = make_run(tmp_path / "work/rollout-runs/17", job="17")
        queue.add(17, Z=str(tmp_path / "work"))
    (run / "events.1.jsonl").touch()
    (run / "requests").mkdir()
    (run / "logs/actor/0/1").mkdir(parents=True)
    (run / "logs/actor/0/1/0.log").write_text("hello\n")
    assert main([*command, "-j", "17"]) == 0, capsys.readouterr()
    assert "Traceback" not in capsys.readouterr().err
    [call] = queue.calls()
    assert {"--jobs=17", "--states=all"} <= set(call)


def test_slurm_is_not_asked_for_what_is_here(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "elsewhere/rollout-runs/17", job="17")
    make_run(tmp_path / "elsewhere/rollout-runs/local", job="")
    for argv in (["-j", "17"], ["--run-dir", "rollout-runs/17"], []):
        assert main(["status", *argv]) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert main(["status"]) == 0
    assert main(["status", "--run-dir", "none"]) == 2
    monkeypatch.setenv("ROLLOUT_RUN_DIR", "none")
    assert main(["status"]) == 2
    assert queue.calls() == []


def test_inside_a_job_the_run_is_that_of_the_job(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.add(17, make_run(tmp_path / "a", job="17"))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert main(["status"]) == 0
    assert capsys.readouterr().out.startswith("Run qwen3-moe-rl, job 17")
    assert main(["status", "--me"]) == 0
    assert capsys.readouterr().out.startswith("JOB ")


def test_a_task_of_an_array_is_one_job(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of the array is also that of one of its tasks."""
    for number, task in ((20, 2), (21, 1)):
        queue.add(number, make_run(tmp_path / str(task), job=str(number), run=f"task{task}"), i=f"20_{task}")
    for asked, task in (("20_1", 1), ("21", 1), ("20_2", 2)):
        assert main(["status", "-j", asked]) == 0
        assert f"Run task{task}, job 2" in capsys.readouterr().out
    assert main(["status", "-j", "20"]) == 2
    assert f"job 20 has 2 runs: name one with --run-dir: {tmp_path}/1, {tmp_path}/2" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "20")
    assert main(["status"]) == 0
    assert "Run task2, job 20" in capsys.readouterr().out


def test_a_heterogeneous_job_has_its_run_in_the_first_part(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.add(13, i="12+1", k="second")
    queue.add(12, make_run(tmp_path / "a", job="12"), i="12+0")
    for asked in ("12", "12+0"):
        assert main(["status", "-j", asked]) == 0
    assert main(["status", "-a", "-h"]) == 0
    assert rows(capsys.readouterr().out)[-1][0] == "12+0"


NOWHERE: dict[str, tuple[str, dict[str, str], int, list[str]]] = {
    "a job that is gone": ("99", {}, 2, ["rollout-runs/99; Slurm does not know job 99 (any more)"]),
    "no word": ("17", {"Z": "/nowhere"}, 2, ["nor at /nowhere/rollout-runs/17; the job's comment names none"]),
    "a wrong word": ("17", {"k": "slurm-rollout:/gone/run"}, 2, ["nor at /gone/run. Name it with --run-dir"]),
    "no number": ("latest", {}, 2, ["no run directory at rollout-runs/latest. Name it"]),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_a_run_that_is_nowhere(queue: Queue, capsys: pytest.CaptureFixture[str], case: str) -> None:
    job, changes, code, words = NOWHERE[case]
    queue.add(17, **changes)
    assert main(["events", "-j", job]) == code
    said = capsys.readouterr().err
    assert said.startswith(f"slurm-rollout: error: no run directory at rollout-runs/{job}")
    for word in words:
        assert word in said


def test_a_silent_slurm_is_not_a_missing_run(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    queue.say(fails="Unable to contact slurm controller")
    assert main(["status", "-j", "17"]) == 1
    said = capsys.readouterr().err
    assert "no run directory at rollout-runs/17, and where else it is Slurm does not say: squeue failed with 1" in said


def test_one_run_needs_nothing_of_this(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    code = f"import sys; from slurm_rollout.cli import main; main(['status', '--run-dir', {str(tmp_path / 'a')!r}]); "
    code += (
        "assert not {'subprocess', 'threading', 'slurm_rollout.discovery', 'slurm_rollout.cli.runs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# ---------------------------------------------------------------------------------------------- writing the comment


def written(queue: Queue) -> list[list[str]]:
    return [call[2:] for call in queue.calls() if call[0] == "scontrol"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("(null)", "slurm-rollout:/the/run"),
        ("", "slurm-rollout:/the/run"),
        ("slurm-rollout:/other", "slurm-rollout:/other slurm-rollout:/the/run"),
        ("slurm-rollout:/the/run", ""),
        ('{"run": "slurm-rollout:/the/run"}', ""),
    ],
)
def test_the_comment_is_written_once_where_it_is_empty_or_ours(queue: Queue, before: str, after: str) -> None:
    queue.add(18, k="another's", i="17+1")
    queue.add(17, k=before)
    assert comment.write("17", "17+0", "/the/run", timeout_s=10) == ""
    assert written(queue) == ([["JobId=17+0", f"Comment={after}"]] if after else [])


@pytest.mark.parametrize(
    ("before", "run_dir", "why"),
    [
        ('{"n": 1}', "/the/run", "says something else, and stays"),
        ("(null)", "/" + "x" * 1020, "at most 1024 characters"),
        ("slurm-rollout:/" + "x" * 990, "/the/run", "at most 1024 characters"),
    ],
)
def test_a_comment_that_cannot_be_written_says_why(queue: Queue, before: str, run_dir: str, why: str) -> None:
    queue.add(17, k=before)
    assert why in comment.write("17", "17", run_dir, timeout_s=10)
    assert written(queue) == []


def test_where_others_look_anyway_a_comment_is_not_missed(queue: Queue, tmp_path: Path) -> None:
    queue.add(17, k="{}", Z=str(tmp_path))
    assert comment.write("17", "17", f"{tmp_path}/rollout-runs/17", timeout_s=10) == ""


def test_a_comment_that_slurm_does_not_take_is_a_warning(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [sys.executable, "-m", "slurm_rollout.slurm.comment", "17", "17", "/the/run", str(tmp_path / "lock"), "5"]

    def told() -> str:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    assert "squeue failed with 1: slurm_load_jobs error: Invalid job id" in told()
    queue.add(17)
    (queue.bin / "scontrol").write_text("#!/bin/sh\necho 'Access/permission denied for job 17' >&2\nexit 1\n")
    said = told()
    assert "warning: the run directory is not named in the job's comment (scontrol failed with 1: Access/perm" in said
    assert "only with --run-dir /the/run" in said
    (queue.bin / "scontrol").unlink()
    monkeypatch.setenv("PATH", str(queue.bin))
    assert "scontrol could not be run: No such file" in told()


def test_the_end_of_up_ends_it_too(queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`up` holds back the signals that end it while it starts; what it starts must hear them."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    (queue.bin / "squeue").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    children = {p.pid for p in proc.descendants(os.getpid())}
    try:
        comment.start(RunDir("/the/run"), tmp_path, timeout_s=30)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    [child] = {p.pid for p in proc.descendants(os.getpid())} - children
    asked = tmp_path / "pid"
    try:
        wait_for("its question", lambda: asked.exists() and asked.read_text())
        os.kill(child, signal.SIGTERM)
        wait_for("its end", lambda: os.waitpid(child, os.WNOHANG)[0])
    finally:
        for pid in (child, int(asked.read_text() or 0)):
            if pid and (found := proc.read(pid)) and found.state not in "ZX":
                os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------ on a fake Slurm

WHOLE = ("--nodes=2", "--exclusive", "--output=job.out")


def comment_of(cluster: FakeSlurm | SlurmCluster, job: str) -> str:
    return cluster.run(["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%k"]).stdout.strip()


@pytest.fixture
def fleet(fake_slurm: FakeSlurm, request: pytest.FixtureRequest) -> Iterator[SlurmFleet[FakeSlurm]]:
    made = SlurmFleet(fake_slurm)
    try:
        yield made
        if request.node.stash.get(FAILED, False):
            print(made.story())
    finally:
        made.end()


def small(fleet: SlurmFleet[Any], **more: Any) -> str:
    return stub_spec(control=fleet.control, layout="nodes = 1", load_s=0.05, **more)


def test_up_names_its_run_and_is_found(fake_slurm: FakeSlurm, fleet: SlurmFleet[FakeSlurm], tmp_path: Path) -> None:
    fleet.start(small(fleet, base=next(BASES), more='[nodes]\naddress = "127.0.0.1"'), nodes=1)
    fleet.wait_phase("ready")
    wait_for("the comment", lambda: comment_of(fake_slurm, fleet.job) == f"slurm-rollout:{fleet.run.path}")
    for argv in (["-j", fleet.job], ["--me", "-h"]):
        done = fake_slurm.run(["slurm-rollout", "status", *argv], cwd=tmp_path)
        assert "ready" in done.stdout
        assert fleet.job in done.stdout
    assert "warning" not in fleet.output()
    fake_slurm.run(["slurm-rollout", "stop", "-j", fleet.job], cwd=tmp_path)
    fake_slurm.wait_job(fleet.job, "COMPLETED")
    assert "ending what is left" not in fleet.output()


def test_a_controller_that_does_not_answer_holds_up_no_fleet(
    fake_slurm: FakeSlurm, fleet: SlurmFleet[FakeSlurm]
) -> None:
    fake_slurm.slow("squeue", 600)
    fleet.start(small(fleet, base=next(BASES), more='[nodes]\naddress = "127.0.0.1"'), nodes=1)
    fleet.wait_phase("ready")
    started = time.monotonic()
    fleet.cluster.cancel(fleet.job)
    fake_slurm.wait_job(fleet.job, "CANCELLED")
    assert time.monotonic() - started < 10


def test_two_at_once_forget_neither(fake_slurm: FakeSlurm) -> None:
    word = "python3 -m slurm_rollout.slurm.comment $SLURM_JOB_ID $SLURM_JOB_ID /run/%s $PWD/lock 30 &\n"
    python = str(fake_slurm.python)
    script = "#!/bin/bash\n" + "".join(word % n for n in range(5)).replace("python3", python) + "wait; sleep 600\n"
    job = fake_slurm.sbatch(script, *WHOLE)
    wait_for("all of them", lambda: len(discovery.marked_dirs(comment_of(fake_slurm, job))) == 5)
    fake_slurm.cancel(job)


# ------------------------------------------------------------------------------------------------------- on real Slurm

# What `up` does, without a fleet.
NAMES_ITS_RUN = """\
$PYTHON -c 'import os; from pathlib import Path; from slurm_rollout.rundir import RunDir
from slurm_rollout.slurm import comment
comment.start(RunDir("/runs/" + os.environ["SLURM_JOB_ID"]), Path("/tmp"), timeout_s=30)'
sleep 300
"""
HET = "#SBATCH --output=job.out\n#SBATCH hetjob\n#SBATCH --comment=second\n"
ARRAY = "#SBATCH --output=job.out --array=1-3\n"


def named(cluster: SlurmCluster) -> dict[str, str]:
    """Return the comments of the jobs in the queue, by their number."""
    lines = cluster.run(["squeue", "--noheader", "--format=%A %k"]).stdout.splitlines()
    return {job: text for job, _, text in (line.partition(" ") for line in lines)}


@pytest.mark.slurm
def test_the_comment_is_that_of_one_job_alone(cluster: SlurmCluster) -> None:
    """Not of all parts of a heterogeneous job, nor of all tasks of an array, whatever their number is."""
    body = NAMES_ITS_RUN.replace("$PYTHON", str(cluster.python))
    het = cluster.sbatch(f"#!/bin/bash\n{HET}{body}")
    array = cluster.sbatch(f"#!/bin/bash\n{ARRAY}{body}")
    single = cluster.sbatch(f"#!/bin/bash\n{body}", "--output=job.out")

    def all_written() -> bool:
        return sum(text == f"slurm-rollout:/runs/{job}" for job, text in named(cluster).items()) == 5

    wait_for("all comments", all_written, 60)
    found = named(cluster)
    assert {het, array, single} <= set(found)
    assert sorted(text for job, text in found.items() if text != f"slurm-rollout:/runs/{job}") == ["second"]
    # A requeued job has its comment still.
    cluster.run(["scontrol", "requeue", single])
    cluster.wait_job(single, "PENDING")
    assert named(cluster)[single] == f"slurm-rollout:/runs/{single}"


@pytest.mark.slurm
def test_runs_of_two_users(cluster: SlurmCluster) -> None:
    """One with a word in its comment, one private, one whose comment is a site's, and one that is gone."""
    cluster.home.chmod(0o711)
    theirs = cluster.root / "theirs"
    theirs.mkdir()
    theirs.chmod(0o711)
    os.chown(theirs, 65534, 65534)

    def theirs_is(name: str, mode: int) -> str:
        path = theirs / name
        argv = ["sbatch", "--parsable", "--uid=nobody", f"--chdir={theirs}", f"--comment=slurm-rollout:{path}"]
        script = "#!/bin/bash\nsleep 300\n"
        job = cluster.run([*argv, "--output=/dev/null"], user=False, stdin=script).stdout.strip()
        make_run(path, job=job, run=name)
        path.chmod(mode)
        for each in (path, path / "status.json"):
            os.chown(each, 65534, 65534)
        return job

    fleet = SlurmFleet(cluster)
    with fleet:
        try:
            public, private = theirs_is("public", 0o711), theirs_is("private", 0o700)
            weird = cluster.home / "we ird|\n"
            weird.mkdir()
            weird.chmod(0o711)
            os.chown(weird, cluster.uid, cluster.uid)
            site = cluster.run(
                ["sbatch", "--parsable", '--comment={"site": "a b|c\n"}', "--output=/dev/null"],
                stdin="#!/bin/bash\nsleep 300\n",
                cwd=weird,
            ).stdout.strip()
            run = make_run(weird / "rollout-runs" / site, job=site, run="weird")
            for each in (run, run.parent):
                each.chmod(0o711)
            fleet.start(small(fleet, python=cluster.python), nodes=1)
            fleet.wait_phase("ready", 60)
            wait_for("the comment", lambda: named(cluster)[fleet.job] == f"slurm-rollout:{fleet.run.path}", 30)

            def seen(*argv: str, user: bool = True) -> tuple[int, dict[str, list[str]]]:
                done = cluster.run(["slurm-rollout", "status", "-h", *argv], cwd=Path("/"), user=user, check=False)
                assert done.stderr == ""
                return done.returncode, {row[0]: row[2:5] for row in rows(done.stdout)}

            mine = {fleet.job: ["rollout", "test", "ready"], site: ["rollout", "weird", "ready"]}
            open_ = {public: ["nobody", "public", "ready"]}
            assert seen() == seen("--me") == seen("-u", "rollout") == (0, mine)
            assert seen("-a") == (4, mine | open_ | {private: ["nobody", "-", "unknown"]})
            assert seen("-a", user=False) == (0, mine | open_ | {private: ["nobody", "private", "ready"]})
            for job, code in ((public, 0), (site, 0), (fleet.job, 0), (private, 1), ("99999", 2)):
                done = cluster.run(["slurm-rollout", "status", "-j", job], cwd=Path("/"), check=False)
                assert done.returncode == code, done.stderr
            # They may not write into each other's comments.
            argv = [
                str(cluster.python),
                "-m",
                "slurm_rollout.slurm.comment",
                public,
                public,
                "/evil",
                "/tmp/lock",
                "30",
            ]
            assert f"Invalid user id for job {public}" in cluster.run(argv).stderr
        finally:
            cluster.run(["scancel", "--user=nobody"], user=False)
