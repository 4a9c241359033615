"""Slurm's commands as text: what we say to srun, and what scontrol and scancel say to us. Most of it needs no Slurm."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from slurm_rollout import proc
from slurm_rollout.backend import StepRef, monotonic
from slurm_rollout.core.model import Job, NodeWord
from slurm_rollout.core.plan import FleetPlan, SlurmSettings
from slurm_rollout.errors import Unobservable
from slurm_rollout.slurm import parse, srun
from slurm_rollout.slurm.backend import SlurmBackend
from slurm_rollout.testing.fleet import wait_for
from slurm_rollout.testing.slurm_cluster import SlurmCluster
from slurm_rollout.testing.world import make_plan

# --------------------------------------------------------------------------------------------- scontrol show step JOB

BATCH = "StepId=12.batch UserId=59000 State=RUNNING NodeList=n1 Name=batch SrunHost:Pid=(null):0"

# 22.05.8, as it was printed; the others from that with what each version adds (Slurm source).
SHOW_STEP = {
    "20.11": """\
StepId=12.batch UserId=1000 StartTime=2026-11-22T15:56:34 TimeLimit=UNLIMITED State=RUNNING Partition=main NodeList=n1 \
Nodes=1 CPUs=0 Tasks=1 Name=batch Network=(null) TRES=(null) ResvPorts=(null) CPUFreqReq=Default SrunHost:Pid=(null):0
StepId=12.0 UserId=1000 StartTime=2026-11-22T15:56:34 TimeLimit=UNLIMITED State=RUNNING Partition=main NodeList=n2 \
Nodes=1 CPUs=16 Tasks=1 Name=run.actor-0.1.0 Network=(null) TRES=cpu=16,mem=0,node=1 ResvPorts=(null) \
CPUFreqReq=Default Dist=Block SrunHost:Pid=n1:25
""",
    "22.05": """\
StepId=12.batch UserId=59000 StartTime=2026-11-22T15:56:34 TimeLimit=UNLIMITED State=RUNNING Partition=main \
NodeList=n1 Nodes=1 CPUs=0 Tasks=1 Name=batch Network=(null) TRES=(null) ResvPorts=(null) CPUFreqReq=Default \
SrunHost:Pid=(null):0
StepId=12.0 UserId=59000 StartTime=2026-11-22T15:56:34 TimeLimit=UNLIMITED State=RUNNING Partition=main NodeList=n2 \
Nodes=1 CPUs=16 Tasks=1 Name=run.actor-0.1.0 Network=(null) TRES=cpu=16,mem=0,node=1 ResvPorts=(null) \
CPUFreqReq=Default Dist=Block SrunHost:Pid=n1:25
""",
    "24.11": """\
StepId=12.extern UserId=59000 StartTime=2026-11-22T15:56:34 TimeLimit=UNLIMITED State=RUNNING Partition=main \
NodeList=n[1-2] Nodes=2 CPUs=32 Tasks=2 Name=extern Network=(null) TRES=cpu=32,mem=2G,node=2,billing=32 \
ResvPorts=(null) CPUFreqReq=Default SrunHost:Pid=(null):0 Container=(null) ContainerID=(null)
StepId=12.batch UserId=59000 StartTime=2026-11-22T15:56:34 TimeLimit=UNLIMITED State=RUNNING Partition=main \
NodeList=n1 Nodes=1 CPUs=16 Tasks=1 Name=batch Network=(null) TRES=cpu=16,node=1 ResvPorts=(null) CPUFreqReq=Default \
SrunHost:Pid=(null):0 Container=(null) ContainerID=(null)
StepId=12.0 UserId=59000 StartTime=2026-11-22T15:56:34 TimeLimit=UNLIMITED State=RUNNING Partition=main NodeList=n2 \
Nodes=1 CPUs=16 Tasks=1 Name=run.actor-0.1.0 Network=(null) TRES=cpu=16,mem=0,node=1 ResvPorts=(null) \
CPUFreqReq=Default Dist=Cyclic SrunHost:Pid=n1:25 TresPerStep=gres/gpu:8 Container=(null) ContainerID=(null)
""",
    "25.11": """\
StepId=12.batch SLUID=s4XJ2 UserId=59000 State=RUNNING NodeList=n1 Name=batch SrunHost:Pid=(null):0 \
StdIn=/dev/null StdErr=/home/u/a b.out StdOut=/home/u/a b.out
SrunHost:Pid=n1:25 Name=run.actor-0.1.0 Tomorrow:s/Key= NodeList=n2 State=RUNNING StepId=ignored StdOut=
StepId=12.0 SLUID=s4XJ3 SrunHost:Pid=n1:25 Name=run.actor-0.1.0 Tomorrow:s/Key= NodeList=n2 State=RUNNING StdOut=
""",
}


@pytest.mark.parametrize("version", SHOW_STEP)
def test_a_running_step_is_read_from_every_versions_record(version: str) -> None:
    *others, step = parse.steps(SHOW_STEP[version], "12")
    assert {s.id for s in others} <= {"12.batch", "12.extern"}
    assert step.id == "12.0"
    assert step.name == "run.actor-0.1.0"
    assert (step.state, step.srun_host, step.srun_pid) == ("RUNNING", "n1", 25)


def test_a_pending_step_has_no_name_yet_and_is_known_by_its_srun() -> None:
    pending = (
        "StepId=12.TDB UserId=59000 StartTime=Unknown TimeLimit=UNLIMITED State=PENDING Partition=main "
        "NodeList=n[1-2] Nodes=2 CPUs=1 Tasks=1 Name=(null) Network=(null) TRES=(null) ResvPorts=(null) "
        "CPUFreqReq=Default Dist=Unknown SrunHost:Pid=n1:60"
    )
    older = pending.replace("Name=(null)", "Name=").replace(":60", ":62")
    _, first, second = parse.steps(f"{BATCH}\n{pending}\n{older}\n", "12")
    assert (first.id, first.name, first.state, first.srun_pid) == ("12.TDB", "", "PENDING", 60)
    assert (second.name, second.srun_pid) == ("", 62)


def test_the_batch_step_has_no_srun() -> None:
    (batch,) = parse.steps(BATCH, "12")
    assert batch.srun_pid is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "No job steps in the system\n",
        "Job step 12. not found\n",
        "StepId=12.0 Name=run.actor-0.1.0 State=RUNNING SrunHost:Pid=n1:25\n",  # stepmgr that cannot be reached
        "slurm_get_job_steps error: Unable to contact slurm controller (connect failure)",
        "<html>proxy</html>",
        "StepId=12.extern Name=extern State=RUNNING SrunHost:Pid=(null):0",
        "StepId=12.0 Name=12.batch State=RUNNING SrunHost:Pid=n1:25",
    ],
)
def test_an_answer_without_the_jobs_own_step_is_no_answer(text: str) -> None:
    with pytest.raises(Unobservable, match=r"show step 12"):
        parse.steps(text, "12")


@pytest.mark.parametrize(
    "own",
    [
        "12.batch",
        "12.batch+0",  # a heterogeneous job's
        "11_3.batch",  # of an array task the id is the array's, whatever was asked for (seen with 22.05)
        "12.interactive",  # salloc with LaunchParameters=use_interactive_step
    ],
)
def test_the_jobs_own_step_is_recognised(own: str) -> None:
    text = f"StepId={own} State=RUNNING Name=x SrunHost:Pid=(null):0\nStepId=12.0 Name=a SrunHost:Pid=n1:5\n"
    assert [s.name for s in parse.steps(text, "12")] == ["x", "a"]


# ----------------------------------------------------------------------------------------------- scontrol show job JOB

SHOW_JOB = {
    "20.11": "JobId=1 JobName=a b UserId=u(1) GroupId=u(1) MCS_label=N/A Priority=1 Nice=0 Account=(null) QOS=normal "
    "JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 TimeLimit=00:10:00 "
    "StartTime=2026-11-22T15:56:34 EndTime=2026-11-22T16:06:34 Deadline=N/A Command=/x/job.sh WorkDir=/x Power= ",
    "22.05": "JobId=1 JobName=sbatch UserId=rollout(59000) GroupId=rollout(59000) MCS_label=N/A Priority=4294901759 "
    "Nice=0 Account=(null) QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 "
    "Reboot=0 ExitCode=0:0 RunTime=00:00:03 TimeLimit=00:10:00 TimeMin=N/A SubmitTime=2026-11-22T15:56:33 "
    "EligibleTime=2026-11-22T15:56:33 AccrueTime=2026-11-22T15:56:33 StartTime=2026-11-22T15:56:34 "
    "EndTime=2026-11-22T16:06:34 Deadline=N/A SuspendTime=None SecsPreSuspend=0 LastSchedEval=2026-11-22T15:56:34 "
    "Scheduler=Backfill Partition=main AllocNode:Sid=ctl:0 ReqNodeList=(null) ExcNodeList=(null) NodeList=n[1-2] "
    "BatchHost=n1 NumNodes=2 NumCPUs=32 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:* TRES=cpu=32,node=2,billing=32 "
    "Socks/Node=* NtasksPerN:B:S:C=0:0:*:* CoreSpec=* MinCPUsNode=1 Command=(null) Power= \n",
    "24.11": "JobId=1 JobName=sbatch UserId=u(1) JobState=RUNNING Reason=None SegmentSize=0 RunTime=00:00:03 "
    "EndTime=2026-11-22T16:06:34 Licenses=(null) LicensesAlloc=(null) Command=/x/job.sh WorkDir=/x StdOut=/x/a.out "
    "Comment={ 'JobState': 1 } TresPerTask=cpu=1\n",
    "an argument of the script that looks like a field": "JobId=1 JobName=x JobState=RUNNING "
    "EndTime=2026-11-22T16:06:34 Command=/x/job.sh JobState=COMPLETED EndTime=Unknown WorkDir=/x\n",
    "a heterogeneous job, one line a component": "JobId=3 HetJobId=3 HetJobOffset=0 JobState=RUNNING "
    "EndTime=2026-11-22T16:06:34 Power= \nJobId=4 HetJobId=3 HetJobOffset=1 JobState=COMPLETED EndTime=Unknown\n",
    "another order": "JobState=RUNNING  EndTime=2026-11-22T16:06:34 \n   JobId=1",
}


@pytest.mark.parametrize("version", SHOW_JOB)
def test_a_running_job_and_its_end_are_read_from_every_versions_record(version: str) -> None:
    record = parse.job_record(SHOW_JOB[version])
    assert record.job is Job.RUNNING
    assert record.end_at == datetime(2026, 11, 22, 16, 6, 34, tzinfo=UTC).timestamp()


@pytest.mark.parametrize("end", ["EndTime=Unknown", "EndTime=None", "EndTime=", "EndTime=2026-13-01T00:00:00", ""])
def test_a_job_without_an_end_has_none(end: str) -> None:
    assert parse.job_record(f"JobId=1 JobState=RUNNING {end} TimeLimit=UNLIMITED").end_at is None


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ("IDLE", NodeWord.UP),
        ("MIXED", NodeWord.UP),
        ("ALLOCATED", NodeWord.UP),
        ("IDLE+CLOUD", NodeWord.UP),
        ("IDLE+COMPLETING", NodeWord.UP),
        ("MIXED+DRAIN", NodeWord.DRAINING),
        ("DRAINING", NodeWord.DRAINING),  # up to 20.11
        ("ALLOCATED+FAIL", NodeWord.DRAINING),
        ("MIXED*", NodeWord.SILENT),
        ("ALLOCATED+NOT_RESPONDING", NodeWord.SILENT),
        ("MIXED*+DRAIN", NodeWord.SILENT),
        ("DOWN", NodeWord.DOWN),
        ("DOWN*", NodeWord.DOWN),
        ("DOWN+NOT_RESPONDING", NodeWord.DOWN),
        ("DOWN*+DRAIN", NodeWord.DOWN),
        ("IDLE+POWERED_DOWN", NodeWord.DOWN),
        ("UNKNOWN", NodeWord.UNKNOWN),
        ("UNKNOWN+DRAIN", NodeWord.DRAINING),
        ("", NodeWord.UNKNOWN),
    ],
)
def test_what_a_nodes_state_means(state: str, word: NodeWord) -> None:
    text = f"NodeName=n3 Arch=x86_64 State={state} Weight=1 Reason=Kill task failed [root@2026-11-30T12:00:00]\n"
    assert parse.nodes(text) == {"n3": (word, "Kill task failed [root@2026-11-30T12:00:00]")}


def test_the_nodes_that_a_job_still_has() -> None:
    text = "JobId=12 HetJobId=12 JobState=RUNNING ReqNodeList=(null) NodeList=n1 Command=./a NodeList=x\n"
    text += "JobId=13 HetJobId=12 JobState=RUNNING ReqNodeList=(null) ExcNodeList=n9 NodeList=n[2-3,7]\n"
    assert parse.job_nodes(text, "13") == ("n2", "n3", "n7")
    for bad in (text.replace("13", "14"), "JobId=13 NodeList=(null)", "JobId=13 NodeList=n[2-", ""):
        with pytest.raises(Unobservable):
            parse.job_nodes(bad, "13")


@pytest.mark.parametrize(
    ("state", "job", "batch_ended"),
    [
        ("RUNNING", Job.RUNNING, False),
        ("CONFIGURING", Job.RUNNING, False),
        ("SUSPENDED", Job.RUNNING, False),
        ("RESIZING", Job.RUNNING, False),
        ("SIGNALING", Job.RUNNING, False),
        ("STOPPED", Job.RUNNING, False),
        ("COMPLETING", Job.ENDING, False),
        ("COMPLETED", Job.ENDING, True),
        ("CANCELLED", Job.ENDING, True),
        ("CANCELLED by 1000", Job.ENDING, True),
        ("TIMEOUT", Job.ENDING, True),
        ("PREEMPTED", Job.ENDING, True),
        ("NODE_FAIL", Job.ENDING, True),
        ("FAILED", Job.ENDING, True),
        ("OUT_OF_MEMORY", Job.ENDING, True),
        ("PENDING", Job.ENDING, True),  # requeued
        ("REQUEUED", Job.ENDING, True),
        ("SPECIAL_EXIT", Job.ENDING, True),
        ("A_STATE_OF_LATER", Job.UNKNOWN, False),
    ],
)
def test_what_a_jobs_state_means_for_the_run(state: str, job: Job, batch_ended: bool) -> None:
    record = parse.job_record(f"JobId=1 JobState={state} EndTime=Unknown")
    assert record.job is job
    assert record.batch_ended is batch_ended


@pytest.mark.parametrize("text", ["", "No jobs in the system\n", "JobId=1 JobState= EndTime=Unknown", "{}", "JobState"])
def test_what_is_no_job_record_is_no_answer(text: str) -> None:
    with pytest.raises(Unobservable, match="show job"):
        parse.job_record(text)


# ------------------------------------------------------------------------------------------------------- the srun line


def gpu_plan(**slurm: object) -> FleetPlan:
    plan = make_plan(1)
    (pool,) = plan.pools
    (group,) = pool.groups
    group = replace(group, gpus_per_step={"n0": 8, "n1": 4}, cpus_per_step={"n0": 32, "n1": 16})
    settings = replace(SlurmSettings(python="/opt/py/bin/python3"), **slurm)  # type: ignore[arg-type]
    return replace(plan, pools=(replace(pool, groups=(group,)),), slurm=settings)


COMMON = """\
srun --jobid=12 --overlap --mem=0 --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist={node} --cpus-per-task={cpus} \
--cpu-bind=none --kill-on-bad-exit=0 --wait=0 --mpi=none --input=none --export=ALL --job-name={name}{more} \
/opt/py/bin/python3 -IS /run/agent.py"""

LINES: dict[str, tuple[dict[str, Any], dict[str, Any], str, int, str, str]] = {
    "GPUs of the node": ({}, {}, "n0", 32, "run.actor-0.3.0", " --gres=gpu:8"),
    "the second node": ({}, {}, "n1", 16, "run.actor-0.3.1", " --gres=gpu:4"),
    "as GPUs a node": ({"gpu_option": "gpus-per-node"}, {}, "n0", 32, "run.actor-0.3.0", " --gpus-per-node=8"),
    "no option for GPUs": ({"gpu_option": "none"}, {}, "n0", 32, "run.actor-0.3.0", ""),
    "a sweep takes no GPU": ({}, {"sweep": True}, "n0", 1, "run.actor-0.3.0.sweep", " --gres=none"),
    "a sweep, as GPUs a node": (
        {"gpu_option": "gpus-per-node"},
        {"sweep": True},
        "n1",
        1,
        "run.actor-0.3.1.sweep",
        " --gres=none",
    ),
    "a component of a heterogeneous job": (
        {},
        {"het_component": "1"},
        "n0",
        32,
        "run.actor-0.3.0",
        " --het-group=1 --gres=gpu:8",
    ),
    "the first component": ({}, {"het_component": "0"}, "n0", 32, "run.actor-0.3.0", " --het-group=0 --gres=gpu:8"),
    "the user's own options last": (
        {"srun_args": ("--container-image=/img/a b.sqsh", "--network=x")},
        {},
        "n0",
        32,
        "run.actor-0.3.0",
        " --gres=gpu:8 '--container-image=/img/a b.sqsh' --network=x",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_the_srun_line(case: str) -> None:
    settings, options, node, cpus, name, more = LINES[case]
    plan = gpu_plan(**settings)
    argv = srun.step_argv(plan, plan.group("actor/0"), node, 3, "12", agent="/run/agent.py", **options)
    assert shlex.join(argv) == COMMON.format(node=node, cpus=cpus, name=name, more=more)


def test_a_group_without_gpus_asks_for_none() -> None:
    plan = make_plan(1)
    argv = srun.step_argv(plan, plan.group("actor/0"), "n0", 1, "12")
    assert "--gres=none" in argv
    assert argv[-3:] == [sys.executable, "-IS", "agent.py"]


def test_the_backends_line_is_the_one_that_plan_prints() -> None:
    plan = gpu_plan()
    group = plan.group("actor/0")
    backend = SlurmBackend("12", "/run/agent.py", 1.0)
    assert backend.argv(plan, group, "n1", 3, sweep=False) == srun.step_argv(
        plan, group, "n1", 3, "12", agent="/run/agent.py"
    )
    het = SlurmBackend("12", "/run/agent.py", 1.0, component_job="13")
    assert het.argv(replace(plan, het_group=1), group, "n1", 3, sweep=True) == srun.step_argv(
        plan, group, "n1", 3, "12", agent="/run/agent.py", sweep=True, het_component="1"
    )


# What srun (22.05 to 26.05) takes for an option when it finds it in its environment (srun(1)).
OPTIONS = """\
SLURM_ACCOUNT SLURM_ACCTG_FREQ SLURM_BCAST SLURM_COMPRESS SLURM_CONSTRAINT SLURM_CORE_SPEC SLURM_CPU_BIND
SLURM_CPU_BIND_TYPE SLURM_CPU_FREQ_REQ SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_DEBUG SLURM_DEPENDENCY
SLURM_DISTRIBUTION SLURM_EXACT SLURM_EXCLUSIVE SLURM_EXPORT_ENV SLURM_GPU_BIND SLURM_GPU_FREQ SLURM_GPUS
SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_GRES SLURM_GRES_FLAGS SLURM_HINT SLURM_IMMEDIATE SLURM_JOB_NAME
SLURM_JOB_NUM_NODES SLURM_JOB_NODELIST SLURM_NODELIST SLURM_KILL_BAD_EXIT SLURM_LABELIO SLURM_MEM_BIND
SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE SLURM_MPI_TYPE SLURM_NETWORK SLURM_NNODES SLURM_NO_KILL
SLURM_NPROCS SLURM_NTASKS SLURM_NTASKS_PER_NODE SLURM_NTASKS_PER_GPU SLURM_OPEN_MODE SLURM_OVERCOMMIT SLURM_OVERLAP
SLURM_PARTITION SLURM_PROFILE SLURM_PROLOG SLURM_QOS SLURM_REMOTE_CWD SLURM_RESERVATION SLURM_RESV_PORTS
SLURM_SPREAD_JOB SLURM_STDERRMODE SLURM_STDINMODE SLURM_STDOUTMODE SLURM_STEP_GRES SLURM_TASK_EPILOG
SLURM_TASK_PROLOG SLURM_THREADS SLURM_THREADS_PER_CORE SLURM_TIMELIMIT SLURM_TRES_PER_TASK SLURM_UNBUFFEREDIO
SLURM_USE_MIN_NODES SLURM_WAIT SLURM_WCKEY SLURM_WORKING_DIR SLURM_HET_SIZE SLURM_STEP_ID SLURM_STEP_NODELIST
SRUN_CPUS_PER_TASK SRUN_CONTAINER SRUN_EXPORT_ENV SRUN_ERROR SRUN_INPUT SRUN_OUTPUT SRUN_SEGMENT_SIZE
SBATCH_EXPORT SLURMD_NODENAME"""


def test_no_option_in_the_environment_reaches_srun_and_all_else_does() -> None:
    users = {
        "PATH": "/bin",
        "HOME": "/home/u",
        "NCCL_DEBUG": "WARN",
        "MY_SLURM_THING": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        "EMPTY": "",
        "SLURM_CONF": "/etc/slurm/slurm.conf",
        "SLURM_JOB_ID": "12",
        "SLURM_CLUSTERS": "alpha",
    }
    ours = {"ROLLOUT_BARRIER": "/x", "ROLLOUT_STEP": "{}"}
    assert srun.scrubbed({**dict.fromkeys(OPTIONS.split(), "7"), **ours, **users}) == users


# ------------------------------------------------------------------------------------------------ scontrol and scancel

FAKE = """\
#!/bin/sh
printf '%s' "$0" >> "$FAKE_LOG"
for a in "$@"; do printf ' %s' "$a" >> "$FAKE_LOG"; done
printf '\\n' >> "$FAKE_LOG"
env > "$FAKE_LOG.env"
"""


class Fakes:
    """Commands of our own on PATH, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "calls"

    def make(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(FAKE + body)
        path.chmod(0o755)

    def answer(self, name: str, text: str, code: int = 0) -> None:
        (self.folder / f"{name}.txt").write_text(text)
        self.make(name, f"cat {self.folder}/{name}.txt\nexit {code}\n")

    def calls(self) -> list[list[str]]:
        if not self.log.exists():
            return []
        lines = self.log.read_text().splitlines()
        return [[Path(line.split()[0]).name, *line.split()[1:]] for line in lines]


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    found = Fakes(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_LOG", str(found.log))
    return found


def backend(timeout_s: float = 10.0) -> SlurmBackend:
    return SlurmBackend("12", "agent.py", timeout_s)


def ref(name: str, step_id: str = "", pid: int | None = None) -> StepRef:
    return StepRef(name=name, step_id=step_id, pid=pid)


def test_a_listing_has_the_names_and_the_sruns_of_all_steps(fakes: Fakes) -> None:
    pending = "StepId=12.TDB State=PENDING Name=(null) SrunHost:Pid=n1:60"
    fakes.answer("scontrol", f"{SHOW_STEP['22.05']}{pending}\n")
    before = monotonic()
    listing = asyncio.run(backend().listing())
    assert before <= listing.asked_at <= monotonic()
    assert listing.names == {"batch", "run.actor-0.1.0"}
    assert listing.pids == {25, 60}
    assert fakes.calls() == [["scontrol", "-o", "show", "step", "12"]]


@pytest.mark.parametrize(
    ("state", "believed"), [("COMPLETING", True), ("CANCELLED", True), ("RUNNING", False), ("ODD", False)]
)
def test_a_listing_without_the_batch_step_is_believed_only_of_a_job_that_is_being_ended(
    fakes: Fakes, state: str, believed: bool
) -> None:
    step = "StepId=12.4 State=RUNNING Name=run.actor-0.1.1 SrunHost:Pid=n1:61"
    job = f"JobId=12 JobState={state} EndTime=Unknown"
    fakes.make("scontrol", f'if [ "$3" = step ]; then echo "{step}"; else echo "{job}"; fi\n')
    if believed:
        assert asyncio.run(backend().listing()).names == {"run.actor-0.1.1"}
    else:
        with pytest.raises(Unobservable, match="not believed"):
            asyncio.run(backend().listing())


def test_the_jobs_facts_are_the_same_in_every_time_zone(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XYZ-9")
    end = "$(date -d '+600 seconds' +%Y-%m-%dT%H:%M:%S)"
    fakes.make("scontrol", f"echo JobId=12 JobState=RUNNING EndTime={end} TimeLimit=1\n")
    facts = asyncio.run(backend().job())
    assert facts.job is Job.RUNNING
    assert facts.time_left_s is not None
    assert 590 < facts.time_left_s <= 600
    assert fakes.calls() == [["scontrol", "-o", "show", "job", "12"]]
    fakes.answer("scontrol", "JobId=12 JobState=CANCELLED EndTime=2020-01-01T00:00:00\n")
    facts = asyncio.run(backend().job())
    assert (facts.job, facts.time_left_s) == (Job.ENDING, 0.0)


BAD = {
    "slurmctld is away": (
        "echo slurm_get_job_steps error: Unable to contact slurm controller >&2; exit 1",
        "Unable to contact",
    ),
    "it fails and says nothing": ("exit 1", "failed with 1"),
    "it is killed": ("kill -9 $$", "failed with -9"),
    "it says something else": ("echo hello", "scontrol show"),
    "it says nothing": ("exit 0", "scontrol show"),
    "it says no text": (r"printf '\377\376\000x'", "scontrol show"),
    "it fails although its answer looks right": (f"echo '{BATCH} JobState=RUNNING'; exit 1", "failed with 1"),
}


@pytest.mark.parametrize("question", ["listing", "job"])
@pytest.mark.parametrize("case", BAD)
def test_a_command_that_fails_is_no_answer(fakes: Fakes, case: str, question: str) -> None:
    body, said = BAD[case]
    fakes.make("scontrol", body + "\n")
    with pytest.raises(Unobservable, match=said):
        asyncio.run(getattr(backend(), question)())


def test_a_missing_command_is_no_answer(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fakes.folder))
    with pytest.raises(Unobservable, match="scontrol could not be run: No such file"):
        asyncio.run(backend().listing())


def test_a_command_that_hangs_is_no_answer_and_ends_with_all_that_it_started(fakes: Fakes) -> None:
    """Sites put wrappers around Slurm's commands: to kill the shell alone would leave the command."""
    child = fakes.folder / "child"
    fakes.make("scontrol", f"sleep 60 & echo $! > {child}; wait\n")
    began = time.monotonic()
    with pytest.raises(Unobservable, match=r"scontrol -o show step 12 did not answer within 0\.5 s"):
        asyncio.run(backend(0.5).listing())
    assert time.monotonic() - began < 5
    pid = int(child.read_text())
    try:
        wait_for("the end of the wrapper's child", lambda: (p := proc.read(pid)) is None or p.state in "ZX", 5)
    finally:
        if (left := proc.read(pid)) is not None and left.comm == "sleep":
            os.kill(pid, signal.SIGKILL)


def test_commands_get_no_options_from_the_environment(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    # SCANCEL_INTERACTIVE would ask for a confirmation, SCANCEL_STATE leave most steps alone.
    for name in ("SLURM_NTASKS", "SCANCEL_INTERACTIVE", "SCANCEL_STATE", "SCONTROL_LOCAL", "ROLLOUT_STEP"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    fakes.answer("scancel", "")
    asyncio.run(backend().cancel([ref("a", "12.4")]))
    environ = dict(line.partition("=")[::2] for line in Path(f"{fakes.log}.env").read_text().splitlines())
    assert not [k for k in environ if k.startswith(("SCANCEL_", "SCONTROL_", "ROLLOUT_"))]
    assert "SLURM_NTASKS" not in environ
    assert (environ["LC_ALL"], environ["SLURM_TIME_FORMAT"]) == ("C", "standard")


# ------------------------------------------------------------------------------------------------------------- cancel


@pytest.fixture
def srun_process() -> Iterator[subprocess.Popen[bytes]]:
    """Something with a pid that a signal ends."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_node_is_what_slurm_says_of_it_and_gone_when_the_job_has_lost_it(fakes: Fakes) -> None:
    show = "case $3 in job) echo JobId=12 NodeList=n[1-2];; node) echo NodeName=n1 State=MIXED; "
    fakes.make("scontrol", show + "echo NodeName=n2 State=DOWN Reason=why; echo NodeName=n3 State=IDLE;; esac")
    found = asyncio.run(backend().nodes(["n1", "n2", "n3"]))
    assert {name: (facts.word, facts.reason) for name, facts in found.items()} == {
        "n1": (NodeWord.UP, ""),
        "n2": (NodeWord.DOWN, "why"),
        "n3": (NodeWord.GONE, ""),
    }


def test_one_scancel_for_any_number_of_steps(fakes: Fakes) -> None:
    fakes.answer("scancel", "")
    asyncio.run(backend().cancel([ref(f"s{i}", f"12.{i}") for i in range(40)]))
    assert fakes.calls() == [["scancel", *(f"12.{i}" for i in range(40))]]


def test_a_step_whose_agent_never_spoke_is_looked_up_by_its_name(fakes: Fakes) -> None:
    fakes.answer("scontrol", SHOW_STEP["22.05"])
    fakes.answer("scancel", "")
    asyncio.run(backend().cancel([ref("run.actor-0.1.0"), ref("other", "12.9")]))
    assert fakes.calls() == [["scontrol", "-o", "show", "step", "12"], ["scancel", "12.0", "12.9"]]


def test_a_step_that_has_no_id_yet_is_cancelled_through_its_srun(
    fakes: Fakes, srun_process: subprocess.Popen[bytes]
) -> None:
    fakes.answer("scontrol", f"{BATCH}\nStepId=12.TDB State=PENDING Name=(null) SrunHost:Pid=n1:{srun_process.pid}\n")
    fakes.answer("scancel", "")
    asyncio.run(backend().cancel([ref("run.actor-0.1.0", pid=srun_process.pid)]))
    assert srun_process.wait(5) == -signal.SIGTERM
    assert [c[0] for c in fakes.calls()] == ["scontrol"]


def test_where_slurm_is_silent_the_sruns_are_told(fakes: Fakes, srun_process: subprocess.Popen[bytes]) -> None:
    fakes.make("scontrol", "exit 1\n")
    fakes.make("scancel", "exit 1\n")
    no_such_pid = 2**22 + 1
    refs = [ref("a", "12.4"), ref("b", pid=srun_process.pid), ref("c"), ref("d", pid=no_such_pid)]
    asyncio.run(backend().cancel(refs))
    assert srun_process.wait(5) == -signal.SIGTERM
    assert fakes.calls()[-1] == ["scancel", "12.4"]


def test_a_scancel_that_fails_or_is_missing_is_no_error(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that ended meanwhile makes it fail; what lives is what the next listing says."""
    fakes.make(
        "scancel",
        "echo 'scancel: error: Kill job error on job step id 12.4: Job/step already completing' >&2\nexit 1\n",
    )
    asyncio.run(backend().cancel([ref("a", "12.4")]))
    monkeypatch.setenv("PATH", "/nowhere")
    asyncio.run(backend().cancel([ref("a", "12.4")]))


# ------------------------------------------------------------------------------------------------- heterogeneous jobs

PER_JOB = """\
case "$4" in
12) cat {folder}/12.txt;;
13) if [ -s {folder}/13.txt ]; then cat {folder}/13.txt; else echo "Job step 13. not found"; exit 1; fi;;
esac
"""
OTHER_STEP = f"{BATCH}\nStepId=12.0 Name=trainer SrunHost:Pid=n1:31\n"


def het(fakes: Fakes, leader: str, component: str) -> SlurmBackend:
    (fakes.folder / "12.txt").write_text(leader)
    (fakes.folder / "13.txt").write_text(component)
    fakes.make("scontrol", PER_JOB.format(folder=fakes.folder))
    fakes.answer("scancel", "")
    return SlurmBackend("12", "agent.py", 10.0, component_job="13")


def test_the_steps_of_a_component_are_in_an_answer_of_their_own(fakes: Fakes) -> None:
    listing = asyncio.run(het(fakes, OTHER_STEP, "StepId=13.0 Name=a SrunHost:Pid=n1:26\n").listing())
    assert listing.names == {"batch", "trainer", "a"}
    assert listing.pids == {31, 26}


def test_a_component_without_any_step_is_a_valid_answer(fakes: Fakes) -> None:
    listing = asyncio.run(het(fakes, OTHER_STEP, "").listing())
    assert listing.names == {"batch", "trainer"}


@pytest.mark.parametrize("leader", ["", "StepId=12.0 Name=trainer SrunHost:Pid=n1:31\n"])
def test_a_components_answer_is_believed_only_beside_a_valid_one_of_the_batch_scripts(
    fakes: Fakes, leader: str
) -> None:
    with pytest.raises(Unobservable):
        asyncio.run(het(fakes, leader, "StepId=13.0 Name=a SrunHost:Pid=n1:26\n").listing())


def test_a_component_that_slurm_is_silent_about_is_no_empty_one(fakes: Fakes) -> None:
    het_backend = het(fakes, OTHER_STEP, "")
    fakes.make("scontrol", f"[ $4 = 12 ] && exec cat {fakes.folder}/12.txt; echo 'Socket timed out' >&2; exit 1\n")
    with pytest.raises(Unobservable, match="Socket timed out"):
        asyncio.run(het_backend.listing())


def test_a_step_of_a_component_is_cancelled_by_the_components_own_id(fakes: Fakes) -> None:
    """Its agent says 12.0, the job id that it finds in its environment (22.05): that is the trainer's step."""
    het_backend = het(fakes, OTHER_STEP, "StepId=13.0 Name=a SrunHost:Pid=n1:26\n")
    asyncio.run(het_backend.cancel([ref("a", "12.0")]))
    assert fakes.calls()[-1] == ["scancel", "13.0"]


# ---------------------------------------------------------------------------------------------------------- real Slurm


@pytest.mark.slurm
def test_what_this_slurm_prints_is_understood(cluster: SlurmCluster) -> None:
    """An array task, with a running step, one that waits for its turn, and the job before and after its end."""
    script = """\
#!/bin/sh
srun --overlap --nodes=1 --ntasks=1 --job-name=run.actor-0.1.0 sleep 300 &
srun --exact --nodes=1 --ntasks=1 --cpus-per-task=16 --job-name=all sleep 300 &
while ! scontrol -o show step $SLURM_JOB_ID | grep -q Name=all; do sleep 0.1; done
srun --exact --nodes=1 --ntasks=1 --cpus-per-task=16 --job-name=late sleep 300 &
echo $! > late
wait
"""
    job = cluster.sbatch(script, "--nodes=1", "--exclusive", "--array=3", "--time=5", "--output=job.out")
    cluster.wait_job(job, "RUNNING")

    def show(what: str) -> str:
        return cluster.run(["scontrol", "-o", "show", what, job], check=False).stdout

    def steps() -> dict[str, parse.Step]:
        try:
            return {s.name or s.state: s for s in parse.steps(show("step"), job)}
        except Unobservable:
            return {}

    found = wait_for("three steps", lambda: len(s := steps()) == 4 and s)
    assert found["batch"].id == f"{job}_3.batch"
    assert found["run.actor-0.1.0"].state == "RUNNING"
    assert found["run.actor-0.1.0"].srun_host == "n1"
    assert found["PENDING"].id.endswith(".TDB")
    assert found["PENDING"].srun_pid == int((cluster.home / "late").read_text())
    record = parse.job_record(show("job"))
    assert record.job is Job.RUNNING
    assert record.end_at is not None
    assert 240 < record.end_at - time.time() < 301

    cluster.run(["scancel", found["run.actor-0.1.0"].id])
    wait_for("its end", lambda: "run.actor-0.1.0" not in (s := steps()) and s)
    cluster.cancel(job)
    cluster.wait_job(job, "CANCELLED")
    assert parse.job_record(show("job")).batch_ended
    with pytest.raises(Unobservable):
        parse.steps(show("step"), job)
