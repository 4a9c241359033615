"""`slurm-rollout up`: the fleet, in the foreground, with or without a trainer beside it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm_rollout import cli
from slurm_rollout.errors import RunDirBusy, StoreError, Unobservable, UsageError
from slurm_rollout.rundir import RunDir, default_run_dir

if TYPE_CHECKING:
    from slurm_rollout.core.plan import FleetPlan

log = logging.getLogger("slurm_rollout")

HELP = "run the fleet in the foreground, inside an allocation"

DESCRIPTION = """\
Run the fleet that SPEC describes, until it is told to end (TERM, USR1, USR2, Ctrl-C, `slurm-rollout stop`), or, with
a TRAINER, until the trainer ends. The trainer is started once every pool can serve; it finds the barrier file in
ROLLOUT_BARRIER and the nodes that are its own in ROLLOUT_TRAINER_NODELIST.

Let it be the last line of the batch script, with `exec`: otherwise TERM, the time limit and preemption reach the shell
only, and the fleet is killed without a word to the trainer."""

EPILOG = """\
exit codes: the trainer's (127 not found, 126 no program, 128 + n ended by signal n); 0 drained; 1 could not start,
or not all of it ended; 2 wrong spec or usage, nothing was started; 70 the fleet failed; 75 with `slurm.requeue` in the
spec: ended because its job ends (TERM, USR1, USR2, or too little time left), and not finished

examples:
  exec slurm-rollout up fleet.toml -- python train.py
  slurm-rollout up fleet.toml --backend local        a rehearsal on this machine, without Slurm"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "up",
        help=HELP,
        description=DESCRIPTION,
        epilog=EPILOG,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="slurm-rollout up SPEC [--run-dir D] [--backend slurm|local] [-- TRAINER ...]",
    )
    cli.add_help(parser)
    parser.add_argument("spec", metavar="SPEC", help="the fleet: .toml, .json or .yaml")
    parser.add_argument("--run-dir", metavar="D", help="default: rollout-runs/<job> in the submit directory")
    parser.add_argument("--backend", choices=("slurm", "local"), default="slurm", help="default: slurm")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="instead of what the allocation says")
    parser.set_defaults(run=run_up)


def run_up(args: argparse.Namespace) -> int:
    trainer = args.after_dashes[1:]
    if args.after_dashes and not trainer:
        raise UsageError("no trainer after `--`: name its command, or leave the `--` out. Nothing was started")
    # Heavy ones only here: the other commands must stay light.
    from slurm_rollout import allocation, spec, store
    from slurm_rollout.claim import claim
    from slurm_rollout.slurm import comment, requeue
    from slurm_rollout.supervisor import Supervisor, Term, drain_bound_s, hold_signals

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    wanted = spec.load_spec(args.spec)
    if args.backend == "local":
        where = allocation.local(wanted)
    else:
        where = allocation.from_slurm(os.environ, address=wanted.nodes.address, gpus_per_node=args.gpus_per_node)
    plan, warnings = spec.build_plan(wanted, where, backend=args.backend, port_range=allocation.outgoing_ports())
    for warning in warnings:
        log.warning("warning: %s", warning)
    _warn_unless_exec()
    if trainer and shutil.which(trainer[0]) is None:
        log.error("the trainer %s is not there, or no program. Nothing was started", trainer[0])
        return 126 if Path(trainer[0]).exists() else 127
    run = RunDir(Path(args.run_dir) if args.run_dir else default_run_dir())
    held = claim(run, plan, where.job)
    try:
        _check_lease(run, plan, where.job, where.restart_count)
        hold_signals()
        store.prepare(run, plan)
        store.write_lease(run, job=where.job, restart_count=where.restart_count, ended=False)
        if plan.backend == "slurm":
            comment.start(run, held.note.parent, timeout_s=plan.slurm.command_timeout_s)
        log.info("run directory %s", run.path)
        log.info(
            "look with `slurm-rollout status --run-dir %s`; from TERM to the end it takes at most %.0f s",
            run.path,
            drain_bound_s(plan),
        )
        term = Term(job=where.job, restart_count=where.restart_count, first_term=store.next_term(run))
        supervisor = Supervisor(plan, run, term, trainer)
        code = supervisor.run()
        try:
            store.write_lease(run, job=where.job, restart_count=where.restart_count, ended=True)
        except StoreError as e:  # the run has ended all the same, and its exit code is the trainer's word
            log.warning("warning: %s", e)
        if supervisor.requeue_now:  # after the last word: Slurm ends this process, too
            requeue.requeue(where.job, timeout_s=plan.slurm.command_timeout_s)
        return code
    finally:
        held.release()


def _warn_unless_exec() -> None:
    """In a batch script, TERM reaches only the process that Slurm started (measured, 22.05.8)."""
    in_a_step = os.environ.get("SLURM_STEP_ID", "").isdigit()  # 26.05: -5 in a batch script; before, none
    if "SLURM_JOB_ID" not in os.environ or in_a_step:
        return
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return
    if b"slurm_script" in parent:
        log.warning(
            "warning: this is not the batch script's own process. TERM, the time limit and preemption will not "
            "reach it: write `exec slurm-rollout up …` as the script's last line"
        )


def _check_lease(run: RunDir, plan: FleetPlan, job: str, restart_count: int) -> None:
    """Refuse a run directory that a coordinator of another host may still write.

    Raises:
        RunDirBusy: Slurm says that the old job runs, or does not say that it ended.
    """
    from slurm_rollout import store

    lease = {} if plan.backend == "local" else store.read_lease(run)
    if not lease or lease.get("ended"):
        return
    old = str(lease.get("job"))
    if lease.get("host") == os.uname().nodename or (old == job and lease.get("restart_count", 0) < restart_count):
        return  # the lock of this host was free; and a requeued job's old batch step has ended
    if not old.isdigit():
        return
    from slurm_rollout.slurm.backend import SlurmBackend

    try:
        record = asyncio.run(SlurmBackend(old, "", plan.slurm.command_timeout_s).job_record())
    except Unobservable as e:
        if "Invalid job id" in str(e):  # Slurm forgot it: MinJobAge after its end
            return
        raise RunDirBusy(
            f"{run.path} was last used by job {old} on {lease.get('host')}, and Slurm does not say whether that ended "
            f"({e}). Nothing was started. Try again, or name another directory with --run-dir"
        ) from None
    if not record.batch_ended:
        raise RunDirBusy(
            f"{run.path} is in use by job {old} on {lease.get('host')}, which is {record.state}. Nothing was started. "
            "Wait for its end, or name another directory with --run-dir"
        )
