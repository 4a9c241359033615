"""The fake Slurm against the real one: the same command lines on both; what they print and how they end is compared.

What must differ is written out in `_normal`; everything else has to be the same.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from slurm_rollout.core.plan import SlurmSettings
from slurm_rollout.slurm import srun
from slurm_rollout.testing.fake_slurm import FakeSlurm
from slurm_rollout.testing.fleet import wait_for
from slurm_rollout.testing.slurm_cluster import SlurmCluster
from slurm_rollout.testing.world import make_plan

pytestmark = pytest.mark.slurm

# A task and two below it, one of them in a session of its own. Each says which signals it got.
TREE = """\
import os, signal, sys, time
who = "parent"
if os.fork() == 0:
    who = "child"
    if os.fork() == 0:
        os.setsid()
        who = "session"
def heard(number, frame):
    os.write(1, f"{who} {signal.Signals(number).name}\\n".encode())
for number in (1, 2, 3, 10, 12, 15, 18):
    signal.signal(number, heard)
os.write(1, f"{who} up\\n".encode())
ends = time.time() + 60
while time.time() < ends:
    time.sleep(1)
"""

# $JOB runs on n1 to n4, $ENDED has ended, $LINE is the product's srun line for n2 with the step name x.
PRELUDE = """\
until_() { for _ in $(seq 200); do eval "$1" && return; sleep 0.05; done; echo "waited in vain for: $1"; }
name=$RANDOM$RANDOM
tasks() { : >$name.out; "$@" >$name.out 2>$name.err & P=$!; until_ "[ \\$(grep -c up $name.out) -ge ${many:-3} ]"; }
tree() { tasks $LINE "$PYTHON" tree.py; }
heard() { until_ "[ \\$(grep -c $1 $name.out) -ge ${many:-3} ]"; }
ended() { wait $P; echo "srun=$?"; cat $name.out; cat $name.err >&2; }
ids() { squeue -s -h -j $JOB -o '%i %j' | sed -n 's/ x$//p'; }
until_ '! squeue -s -h -j $JOB -o %i | grep -qv batch'
"""


BARE = ":;"
"""Begins a script that needs nothing of the prelude, which waits for the end of all steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A cluster with the jobs that all cases share."""

    cluster: FakeSlurm | SlurmCluster
    job: str
    ended: str
    line: str

    def sh(self, script: str) -> tuple[int, list[str], list[str]]:
        """Run a bash script; return its exit code and its normalised streams, lines sorted: both have many writers."""
        env = {"JOB": self.job, "ENDED": self.ended, "LINE": self.line, "PYTHON": str(self.cluster.python)}
        prelude = "" if script.startswith(BARE) else PRELUDE
        done = self.cluster.run(["bash", "-c", prelude + script], env=env, check=False, timeout_s=90)
        return done.returncode, sorted(self._normal(done.stdout)), sorted(self._normal(done.stderr))

    def _normal(self, text: str) -> list[str]:
        """What must differ: ids, times, pids, the user, the host that commands run on, folders, node addresses."""
        for old, new in (
            (str(self.cluster.home), "HOME"),
            (rf"(?<= ) *\b{self.ended}\b|\b{self.ended}\b", "ENDED"),
            (rf"(?<= ) *\b{self.job}\b|\b{self.job}\b", "JOB"),
            (r"\b(JOB|ENDED)\.\d+", r"\1.STEP"),
            (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", "TIME"),
            (r"(SrunHost:Pid=)(?!\(null\))[\w.-]+:\d+", r"\1HOST:PID"),
            (r"UserId=\d+", "UserId=UID"),
            (r"end_at=\d+\.\d", "end_at=TIME"),
        ):
            text = re.sub(old, new, text)
        # bash tells of what was killed; and an srun that is told to end may do so before the daemon's word is there.
        return [
            line
            for line in text.splitlines()
            if not re.match("(bash|environment): line |Terminated$|slurmstepd.* CANCELLED", line)
        ]


def agents_line(job: str) -> str:
    """Return the srun line that the product runs for n2, without its agent."""
    plan = replace(make_plan(2), slurm=SlurmSettings(gpu_option="gres"))
    group = replace(plan.group("actor/1"), gpus_per_step={"n2": 8}, cpus_per_step={"n2": 16})
    argv = srun.step_argv(plan, group, "n2", 1, job)[: -len(srun.agent_argv(plan, "agent.py"))]
    return shlex.join(["--job-name=x" if a.startswith("--job-name=") else a for a in argv])


SCRIPT = """\
#!/bin/bash
#SBATCH --exclusive --gres=gpu:8 --no-kill --no-requeue
#SBATCH --job-name=fleet
#SBATCH --output=up.log
env >batch.env.new; mv batch.env.new batch.env
sleep 600
"""


def opened(cluster: FakeSlurm | SlurmCluster) -> Site:
    (cluster.home / "tree.py").write_text(TREE)
    (cluster.home / "tree.py").chmod(0o644)
    ended = cluster.sbatch("#!/bin/bash\nexit 3\n", "--nodes=1", "--nodelist=n5", "--comment=a b")
    job = cluster.sbatch(SCRIPT, "--nodes=4", "--exclude=n5", "--comment=fleet in HOME")
    cluster.wait_job(ended, "FAILED")
    cluster.wait_job(job, "RUNNING")
    wait_for("the batch script", (cluster.home / "batch.env").exists)
    return Site(cluster=cluster, job=job, ended=ended, line=agents_line(job))


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with FakeSlurm(
        tmp_path_factory.mktemp("fake"), nodes=5, proctrack="linuxproc", kill_wait_s=5, retry_s=120
    ) as cluster:
        yield opened(cluster)


@pytest.fixture(scope="module")
def real(real_slurm: None) -> Iterator[Site]:
    with SlurmCluster(nodes=5, conf_lines=["FirstJobId=700001"]) as cluster:
        yield opened(cluster)


CASES = {
    # The product's lines.
    "an agent's line": "$LINE sh -c 'echo out; echo err >&2'",
    "exit code": "$LINE sh -c 'exit 3'",
    **{f"a task that ends by {s}": f"$LINE sh -c 'kill -{s} $$'" for s in ("KILL", "TERM", "INT", "ABRT", "USR1")},
    "no such command": "$LINE /nonexistent/agent",
    "no program": "$LINE /etc/passwd",
    "a name that PATH does not have": "$LINE nonesuch",
    "a node of no job": "${LINE/n2/n9} true",
    "a node of another job": "${LINE/n2/n5} true",
    "more GPUs than the job has": "${LINE/gpu:8/gpu:9} true",
    "a GPU that nobody has": "${LINE/gpu:8/foo:8} true",
    "more CPUs than the node has": "${LINE/task=16/task=17} true",
    "a job that never was": "${LINE/jobid=$JOB/jobid=999} true",
    "a job that has ended": "${LINE/jobid=$JOB/jobid=$ENDED} true",
    "no GPUs": "${LINE/gres=gpu:8/gres=none} sh -c 'echo ${CUDA_VISIBLE_DEVICES-none}'",
    "USR1, USR2, then TERM": "tree; kill -USR1 $P; heard USR1; kill -USR2 $P; heard USR2; kill -TERM $P; ended",
    "HUP": "tree; kill -HUP $P; ended",
    "QUIT": "tree; kill -QUIT $P; ended",
    "INT once, then TERM": "tree; kill -INT $P; sleep 1.2; kill -TERM $P; ended",
    "INT twice": "tree; kill -INT $P; sleep 0.3; kill -INT $P; heard INT; ended",
    "CONT, then TERM": "tree; kill -CONT $P; sleep 0.2; kill -TERM $P; ended",
    "srun killed": "tree; kill -KILL $P; ended; until_ '! ids | grep -q .'; pgrep -f tree.py.$name || echo no task",
    "scancel a step": "tree; S=$(ids); scancel $S; echo scancel=$?; ended; scancel $S; echo again=$?",
    "scancel one of three that is there": "tree; scancel $JOB.7000 $(ids) $JOB.7001; echo scancel=$?; ended",
    "scancel a step of an ended job": "scancel $ENDED.0",
    "scancel a step of no job": "scancel 999.0",
    "scancel --signal=TERM a step": "tree; scancel --signal=TERM $(ids); echo scancel=$?; heard TERM; kill $P; ended",
    "scancel --signal=KILL a step": "tree; scancel --signal=KILL $(ids); echo scancel=$?; ended",
    "show step": "tree; scontrol -o show step $JOB; echo $?; kill $P; ended",
    "show step, many lines": "tree; scontrol show step $JOB; echo $?; kill $P; ended",
    "show one step": "tree; scontrol -o show step $(ids); kill $P; ended",
    "show a step that is gone": "scontrol -o show step $JOB.7000",
    "show the batch step": "scontrol -o show step $JOB.batch",
    "show steps of an ended job": "scontrol -o show step $ENDED",
    "show steps of no job": "scontrol -o show step 999",
    "show steps of nonsense": "scontrol -o show step nonsense",
    "show no job": "scontrol -o show job 999",
    "show no node": "scontrol -o show node n9",
    "show some nodes": "scontrol -o show node n2,n3 | grep -oE '^NodeName=[^ ]*| State=[^ ]*'",
    "a time in two zones": "start() { TZ=$1 scontrol -o show job $JOB | grep -oP ' StartTime=\\K[^ ]*'; }; "
    "echo $(($(date -ud $(start XYZ-9) +%s) - $(date -ud $(start UTC0) +%s)))",
    "the job's nodes": "scontrol -o show job $JOB | grep -oE ' NodeList=[^ ]*'",
    # What people and trainers run beside it.
    "two tasks on two nodes": "srun --jobid=$JOB --overlap -N2 -n2 -w n2,n3 sh -c "
    "'echo $SLURM_PROCID; exit $((SLURM_PROCID+4))'",
    "two tasks, both killed": "srun --jobid=$JOB --overlap -N2 -n2 -w n2,n3 sh -c 'kill -9 $$'",
    "all nodes by default": "srun --jobid=$JOB --overlap sh -c "
    "'echo $SLURM_PROCID $SLURMD_NODENAME $SLURM_STEP_NODELIST'",
    "three tasks on two nodes": "srun --jobid=$JOB --overlap -n3 -N2 -w n1,n2 sh -c 'echo $SLURM_PROCID $SLURM_LOCALID "
    "$SLURM_NODEID $SLURMD_NODENAME $SLURM_TASKS_PER_NODE $SLURM_JOB_NODELIST'",
    "the job from the environment": "SLURM_JOB_ID=$JOB SLURM_NTASKS=2 srun --overlap -l sh -c 'echo $SLURMD_NODENAME'",
    "labels": "srun --jobid=$JOB --overlap -l -n2 -N2 -w n1,n2 sh -c 'echo hi; echo ho >&2; printf end'",
    "files": "srun --jobid=$JOB --overlap -n2 -N2 -w n1,n2 -o o.%t -e e.%x sh -c 'echo hi; echo ho >&2'; head o.? e.*",
    "standard input": "echo hello | srun --jobid=$JOB --overlap -n1 -N1 cat",
    "no standard input": "echo hello | srun --jobid=$JOB --overlap --input=none -n1 -N1 cat",
    "without a node": "srun --jobid=$JOB --overlap --exclude=n1 -N1 sh -c 'echo $SLURMD_NODENAME'",
    "more nodes than the job has": "srun --jobid=$JOB --overlap -N5 true",
    "more tasks than CPUs": "srun --jobid=$JOB --overlap -n70 true",
    "fewer tasks than nodes": "srun --jobid=$JOB --overlap -N2 -n1 sh -c 'echo $SLURMD_NODENAME'",
    "more nodes than named": "srun --jobid=$JOB --overlap -N2 -w n2 sh -c 'echo $SLURMD_NODENAME'",
    "fewer nodes than named": "srun --jobid=$JOB --overlap -N1 -w n2,n3 sh -c 'echo $SLURMD_NODENAME'",
    "kill on bad exit": "srun --jobid=$JOB -K1 --overlap -n2 -N2 sh -c "
    "'if [ $SLURM_PROCID = 0 ]; then exit 3; fi; sleep 20'",
    "the node is busy": "srun --jobid=$JOB -N1 -n1 -w n2 sleep 1 & until_ 'squeue -s -h -j $JOB | grep -q sleep';"
    "srun --jobid=$JOB -N1 -n1 -w n2 echo later; wait",
    "TERM while it waits": "srun --jobid=$JOB -N1 -n1 -w n2 sleep 2 & until_ 'squeue -s -h -j $JOB | grep -q sleep';"
    "srun --jobid=$JOB -N1 -n1 -w n2 echo later & P=$!; until_ 'scontrol -o show step $JOB | grep -q TDB';"
    "scontrol -o show step $JOB; kill $P; wait $P; echo srun=$?; wait",
    "two exact steps share the GPUs": "for _ in 1 2; do srun --jobid=$JOB --exact -c4 -N1 -n1 -w n2 --gres=gpu:4 "
    "sh -c 'echo $CUDA_VISIBLE_DEVICES; sleep 0.5' & done; wait",
    "no command": "srun --jobid=$JOB",
    "no numbers": "for o in -n --ntasks-per-node -c -N; do srun --jobid=$JOB $o many true; echo $?; done; "
    "for o in -n -N --time; do printf '#!/bin/sh\\n' | sbatch $o many; echo $?; done",
    "versions": "srun --version; squeue -V; scontrol -V; sinfo --version; scancel -V; sbatch --version",
    "hostnames": "scontrol show hostnames 'n[1-3,05-07],m'; scontrol show hostnames; echo $?",
    "squeue": "squeue -o '%i|%j|%T|%t|%N|%D|%k|%Z|%C|%R|%a|%P'",
    "squeue of one job": "squeue -h -j $JOB -o '%i %T'",
    "squeue of all states": "squeue -t all -h -o '%i %T %k'",
    "squeue of no job": "squeue -j 999",
    "squeue of an ended job": "squeue -j $ENDED; echo $?",
    "squeue, pending only": "squeue -t PD -h",
    "squeue of steps": "tree; squeue -s -j $JOB -o '%.15i %.8j %.9P %N'; squeue -s -h -j 999; echo $?; kill $P; ended",
    "sinfo": "sinfo; sinfo -N; sinfo -N -h -n n1,n5 -o '%N|%T|%t|%E'",
    "scancel nothing": "scancel",
    "scancel no job": "scancel 999; echo $?; scancel foo; echo $?",
    "scancel an ended job": "scancel $ENDED",
    "sbatch of no script": "sbatch --parsable nofile",
    "sbatch without #!": "echo sleep 1 | sbatch",
    "sbatch of too many GPUs": "printf '#!/bin/sh\\n' | sbatch --gres=gpu:9",
    "sbatch of a bad node count": "printf '#!/bin/sh\\n' | sbatch --nodes=many",
    "sbatch of an unknown GPU": "printf '#!/bin/sh\\n' | sbatch --gres=foo:9",
    "requeue of a job that may not": "scontrol requeue $JOB; echo $?; scontrol requeue 999; echo $?",
    "a new comment": "scontrol update JobId=$JOB Comment='new one'; squeue -h -j $JOB -o %k; "
    "scontrol update JobId=$JOB Comment='fleet in HOME'; scontrol update JobId=$ENDED Comment=c; echo $?; "
    "scontrol update JobId=999 Comment=c; echo $?",
    "comments of any kind": "for c in '{\"a\": 1}' 'a=b Comment=c' '%A%i' \"q'u\\\"ote\" $'new\\nline' ü '' "
    '"$(printf x%.0s $(seq 1025))"; do scontrol update JobId=$JOB Comment="$c"; echo $?; '
    "squeue -h -j $JOB -o '<%k>'; done; scontrol update JobId=$JOB Comment='fleet in HOME'",
    "squeue of users": "squeue -h -u $USER,daemon -o '%A %T'; squeue -h -u daemon -o '%A'; "
    "squeue -h -u nonesuch -o %i; echo $?; squeue -h --user=4999,$USER -o %i",
}


@pytest.mark.parametrize("case", CASES)
def test_the_fake_says_what_slurm_says(fake: Site, real: Site, case: str) -> None:
    assert fake.sh(CASES[case]) == real.sh(CASES[case])


# What the fake does not give, or gives its own way: ids, hosts, folders, names of the test clusters.
UNLIKE = re.compile(
    r"HOME|PATH|PYTHON|LINE|PWD|USER|LOGNAME|_|OLDPWD|SLURM_(CONF|.*_(HOST|PORT|IPADDR|CLUSTER|NAME_?.*GROUP_0|UID|GID|USER)|CLUSTER_NAME"
    r"|TASK_PID|SUBMIT_DIR|JOB_?ID|STEP_?ID|JOB_CPUS_PER_NODE_PACK_GROUP_0|CPU_BIND.*)|SRUN_DEBUG"
)


def environ_of(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines())
    return {k: v for k, _, v in pairs if not UNLIKE.fullmatch(k)}


def test_a_batch_script_finds_the_same_environment(fake: Site, real: Site) -> None:
    found = [environ_of((site.cluster.home / "batch.env").read_text()) for site in (fake, real)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "line", ["$LINE", "srun --jobid=$JOB --overlap -N1 -w n3", "SLURM_JOB_ID=$JOB srun --exact -c2 -n1"]
)
def test_a_task_finds_the_same_environment(fake: Site, real: Site, line: str) -> None:
    found = []
    for site in (fake, real):
        code, out, _ = site.sh(f"{line} env")
        assert code == 0
        found.append(environ_of("\n".join(out)))
    assert found[0] == found[1]


INSIDE = """\
import asyncio, os, sys
from slurm_rollout import allocation
from slurm_rollout.slurm.backend import SlurmBackend
from slurm_rollout.errors import RolloutError
def say(what):
    try:
        print(asyncio.run(what))
    except RolloutError as e:
        print("refused:", e)
job, ended = sys.argv[1:]
for number in (job, ended, "999"):
    backend = SlurmBackend(number, "", 30)
    say(backend.job_record())
    try:
        listing = asyncio.run(backend.listing())
        print(sorted(listing.names), [open(f"/proc/{p}/comm").read() for p in listing.pids])
    except RolloutError as e:
        print("refused:", e)
"""


def test_the_product_reads_the_same_answers(fake: Site, real: Site) -> None:
    for site in (fake, real):
        (site.cluster.home / "inside.py").write_text(INSIDE)
        (site.cluster.home / "inside.py").chmod(0o644)
    script = "tree; $PYTHON inside.py $JOB $ENDED; kill $P; ended"
    assert fake.sh(script) == real.sh(script)


FOUND = """\
import os, sys
from slurm_rollout import discovery
from slurm_rollout.errors import RolloutError
job, ended = sys.argv[1:]
for options in [], [f"--jobs={job}"], [f"--jobs={ended}", "--states=all"], ["--jobs=999"], ["--user=daemon"]:
    try:
        for job in sorted(discovery.jobs(*options)):
            print(options, job._replace(time_left="LEFT", user=job.user == os.environ["USER"]))
    except RolloutError as e:
        print("refused:", e)
"""


def test_the_product_finds_the_same_jobs(fake: Site, real: Site) -> None:
    for site in (fake, real):
        (site.cluster.home / "found.py").write_text(FOUND)
        (site.cluster.home / "found.py").chmod(0o644)
    # The job's comment, its name and its directory hold what could be taken for the end of a field.
    script = f"""{BARE}
        mkdir -p $'line\n|dir'; cd $'line\n|dir'
        other=$(printf '#!/bin/sh\nsleep 60\n' | sbatch --parsable --hold --job-name=$'a|b\nc' --comment=$'d\n<%A>')
        $PYTHON ../found.py $JOB $ENDED | sed "s/$other/OTHER/g"; scancel $other
    """
    ours, slurms = fake.sh(script), real.sh(script)
    assert ours == slurms
    assert "OTHER" in "".join(ours[1])


def fields(text: str) -> dict[str, str]:
    parts = re.split(r"(?:^|\s)([A-Za-z][\w:/]*)=", text.strip())
    return {k: v.strip() for k, v in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize("what", ["job $JOB", "job $ENDED", "node n1", "node n5"])
def test_every_field_that_the_fake_shows_is_slurms(fake: Site, real: Site, what: str) -> None:
    own = {"UserId", "GroupId", "Priority", "AllocNode:Sid", "RunTime", "CPULoad", "NodeAddr", "JobId"}
    shown = [site.sh(f"scontrol -o show {what}") for site in (fake, real)]
    assert [code for code, _, _ in shown] == [0, 0]
    ours, slurms = ({k: v for k, v in fields(out[0]).items() if k not in own} for _, out, _ in shown)
    assert ours == {k: slurms.get(k) for k in ours}


JOBS = {
    "a script that ends with 0 and leaves a step": (
        "srun --overlap sleep 100 &\nuntil squeue -s -h -j $SLURM_JOB_ID | grep -q sleep; do sleep 0.05; done\nexit 0",
        "COMPLETED",
    ),
    "a script that fails and leaves a step": (
        "srun --overlap sleep 100 &\nuntil squeue -s -h -j $SLURM_JOB_ID | grep -q sleep; do sleep 0.05; done\nexit 3",
        "FAILED",
    ),
    "a script that is killed": ("kill -9 $$", "FAILED"),
    "a script that ends itself": ("kill -TERM $$", "FAILED"),
    "arguments and variables": (
        "echo $SLURM_JOB_NAME ${SLURM_RESTART_COUNT-never} $SLURM_NTASKS $SLURM_NNODES",
        "COMPLETED",
    ),
    "its own srun": ("srun sh -c 'echo $SLURM_PROCID $SLURM_JOB_NODELIST $SLURM_STEP_ID'", "COMPLETED"),
}


@pytest.mark.parametrize("case", JOBS)
def test_a_job_ends_in_the_same_way(fake: Site, real: Site, case: str) -> None:
    script, state = JOBS[case]
    found = []
    for site in (fake, real):
        job = site.cluster.sbatch(f"#!/bin/bash\n#SBATCH -J short\n{script}\n", "-n2", "-w", "n5", "--output=job.out")
        site.cluster.wait_job(job, state)
        one = replace(site, job=job)
        shown = one.sh("scontrol -o show job $JOB | grep -oE ' (JobState|Reason|ExitCode|NodeList|BatchHost)=[^ ]*'")
        # The fake ends the rest of a script with it, its sruns among that: so does proctrack/cgroup, not linuxproc.
        output = [] if "leaves a step" in case else one._normal((site.cluster.home / "job.out").read_text())
        found.append((shown, sorted(output)))
    assert found[0] == found[1]


CANCELLED = {
    "a script that runs a program": "touch up\nsleep 100\necho after",
    "a script with a trap": "trap 'echo TERM; exit 0' TERM\ntouch up\nsleep 100 & wait\necho after",
    "a program in the place of its script": "exec $PYTHON tree.py",
    "an srun in the place of its script": "exec srun --overlap -N1 -n1 sh -c "
    "'trap : TERM; touch up; while :; do sleep 0.1; done'",
}


def is_up(mark: Path, output: Path) -> bool:
    return mark.exists() or (output.exists() and output.read_text().count("up") == 3)


@pytest.mark.parametrize("case", CANCELLED)
def test_a_cancelled_job_ends_in_the_same_way(fake: Site, real: Site, case: str) -> None:
    found = []
    for site in (fake, real):
        home = site.cluster.home
        for old in ("up", "job.out"):
            (home / old).unlink(missing_ok=True)
        script = f"#!/bin/bash\n{CANCELLED[case].replace('$PYTHON', str(site.cluster.python))}\n"
        job = site.cluster.sbatch(script, "-w", "n5", "--output=job.out")
        site.cluster.wait_job(job, "RUNNING")
        output = home / "job.out"
        wait_for("it", partial(is_up, home / "up", output))
        one = replace(site, job=job)
        # Whoever cancels a step of a job that is being ended hears that there is none.
        late = one.sh(f"{BARE} scancel $JOB; scancel $JOB.0; echo $?")
        site.cluster.wait_job(job, "CANCELLED")
        shown = one.sh("scontrol -o show job $JOB | grep -oE ' (JobState|Reason|ExitCode|NodeList|BatchHost)=[^ ]*'")
        # A shell says so of a program that was running when the signal came to both.
        said = [line for line in one._normal(output.read_text()) if line != "Terminated"]
        found.append((late, shown, sorted(said)))
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------------ faults, last


def test_a_node_that_is_cut_off_and_then_down_looks_the_same(fake: Site, real: Site) -> None:
    """srun to it, its srun, and that of a step that has more nodes; before Slurm knows of it, and after."""
    one, two = "srun --jobid=$JOB --overlap -N1 -w n2", "srun --jobid=$JOB --overlap -N2 -w n2,n3"
    running = f"""{BARE}
        until_() {{ for _ in $(seq 200); do eval "$1" && return; sleep 0.05; done; }}
        {one} sh -c 'echo up; sleep 90' >1.out 2>1.err & A=$!
        {two} sh -c 'echo up; sleep 90' >2.out 2>2.err & B=$!
        until_ '[ $(cat 1.out 2.out | grep -c up) = 3 ]'; touch both
        wait $A; echo $?; wait $B; echo $?; cat 1.err 2.err >&2
        {one} true; echo $?; {two} true; echo $?; scontrol show node n2 | grep -oE ' (State|Reason=Not resp)[^ ]*'
        sinfo -N -h -n n2 -o '%T %E'; squeue -h -j $JOB -o '%N %D'
        srun --jobid=$JOB --overlap -N1 -w n3 sh -c 'echo $SLURM_NODELIST'
    """

    def looks(site: Site) -> list[tuple[int, list[str], list[str]]]:
        with ThreadPoolExecutor() as threads:
            ends = threads.submit(site.sh, running)
            wait_for("both steps", (site.cluster.home / "both").exists)
            if isinstance(site.cluster, FakeSlurm):
                site.cluster.cut_node("n2", after_s=1.5)
            else:
                site.cluster.cut("n2")
            launches = [threads.submit(site.sh, f"{BARE}{line} sh -c 'echo ran'") for line in (one, two)]
            return [each.result() for each in (ends, *launches)]

    ours, slurms = looks(fake), looks(real)
    assert ours == slurms


def test_without_a_controller_every_command_fails_in_the_same_way(fake: Site, real: Site) -> None:
    if isinstance(fake.cluster, FakeSlurm) and isinstance(real.cluster, SlurmCluster):
        fake.cluster.unreachable()
        real.cluster.stop_controller()
    commands = (
        *("scontrol -o show step $JOB", "scontrol -o show job $JOB", "scontrol show node n1", "scontrol requeue $JOB"),
        *("scontrol show hostnames n[1-2]", "squeue -h", "squeue -s -h -j $JOB", "sinfo -N"),
        "squeue --json | $PYTHON -c 'import json, sys; print(json.dumps(json.load(sys.stdin), sort_keys=True))'",
        *("scancel $JOB", "scancel $JOB.7000", "scancel $JOB.7000 $JOB.7001", "scancel --user=$USER"),
        *("$LINE true", "srun --jobid=$JOB --overlap true", "printf '#!/bin/sh\\n' | sbatch"),
    )
    with ThreadPoolExecutor(len(commands)) as threads:
        said = {site: list(threads.map(site.sh, (BARE + c for c in commands))) for site in (fake, real)}
    assert dict(zip(commands, said[fake], strict=True)) == dict(zip(commands, said[real], strict=True))
