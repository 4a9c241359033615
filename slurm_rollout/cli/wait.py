"""`wait`: for trainers that are shell scripts; the trainer's client of the barrier file (`slurm_rollout.barrier`)."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from slurm_rollout import barrier
from slurm_rollout.cli import add_help, add_run_options
from slurm_rollout.errors import RolloutError, UsageError
from slurm_rollout.rundir import default_run_dir, find_run_dir

SCHEMA = 1

FINE, COULD_NOT, NOT_COMING, LOST, TIMED_OUT = 0, 1, 3, 4, 124

_NEVER = sys.maxsize
_POLL_S = 1.0

_HELP = """\
Waits, then prints the epoch in the first line and one serving URL in each further line:

    { read -r epoch; mapfile -t urls; } < <(slurm-rollout wait --for ready)

  --for ready      enough groups serve, said by a coordinator that is alive
  --for epoch=N    the same, at epoch N or later
  --for stopped    the run has ended; prints nothing

Exit codes: 0 so it is, 3 the fleet failed, was stopped, or waits for weights, 4 no heartbeat of the coordinator
for 120 s, 124 time-out; 1, 2 as everywhere. The reason is on standard error."""


def add_parser(subparsers: Any) -> None:
    """Add `wait`."""
    parser = subparsers.add_parser(
        "wait", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    add_help(parser)
    add_run_options(parser)
    parser.add_argument("--barrier", metavar="PATH", help="the barrier file itself (default: ROLLOUT_BARRIER)")
    parser.add_argument("--for", dest="goal", type=_goal, required=True, metavar="WHAT", help="ready, epoch=N, stopped")
    parser.add_argument("--after-epoch", type=int, metavar="N", help="with ready: only an epoch above N will do")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="default: as long as the coordinator lives")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_wait)


def run_wait(args: argparse.Namespace) -> int:
    """Wait, print what there is to know, and return the exit code."""
    after_epoch = args.after_epoch
    if args.goal != "ready":
        if after_epoch is not None:
            raise UsageError("--after-epoch goes with --for ready only")
        after_epoch = _NEVER if args.goal == "stopped" else int(args.goal) - 1
    if args.timeout is not None and not args.timeout >= 0:
        raise UsageError(f"--timeout {args.timeout:g}: must not be negative")
    try:
        # That somebody waits for a ready fleet lets groups start; who waits for its end must not have that effect.
        name = "" if args.goal == "stopped" else "wait"
        client = barrier.Barrier(_barrier_path(args), job=args.job, client=name)
    except barrier.BarrierError as e:
        raise UsageError(str(e)) from None
    try:
        state = _wait(client, after_epoch, args.timeout, through_stale=args.goal == "stopped")
    except barrier.BarrierError as e:
        return _not_so(e, args)
    if args.json:
        print(json.dumps({"meta": {"schema": SCHEMA}, "errors": [], **_content(state)}, indent=2))
    else:
        print("\n".join([str(state.epoch), *state.urls]))
    return FINE


def _wait(
    client: barrier.Barrier, after_epoch: int | None, timeout_s: float | None, *, through_stale: bool
) -> barrier.State:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            return client.wait_ready(after_epoch=after_epoch, timeout=left_s, poll_s=_POLL_S)
        except barrier.WeightsNeeded:
            # Whoever waits for the end does not care about weights.
            if not through_stale or left_s == 0.0:
                raise
            time.sleep(_POLL_S if left_s is None else min(_POLL_S, left_s))


def _not_so(error: barrier.BarrierError, args: argparse.Namespace) -> int:
    """Return the exit code for what the barrier client raised, and say why."""
    stopped = isinstance(error, barrier.FleetFailed) and error.reason == "stopped"
    if args.goal == "stopped" and stopped:
        if args.json:
            print(json.dumps({"meta": {"schema": SCHEMA}, "errors": [], "phase": "stopped"}, indent=2))
        return FINE
    if args.json:
        print(json.dumps({"meta": {"schema": SCHEMA}, "errors": [str(error)]}, indent=2))
    message = f"the run has not stopped within {args.timeout:g} s" if _timed_out_stop(error, args) else str(error)
    print(f"slurm-rollout: {message}", file=sys.stderr)
    if isinstance(error, barrier.BarrierTimeout) or _timed_out_stop(error, args):
        return TIMED_OUT
    if isinstance(error, barrier.CoordinatorLost):
        return LOST
    if isinstance(error, barrier.FleetFailed | barrier.WeightsNeeded):
        return NOT_COMING
    return COULD_NOT


def _timed_out_stop(error: barrier.BarrierError, args: argparse.Namespace) -> bool:
    return args.goal == "stopped" and isinstance(error, barrier.BarrierTimeout | barrier.WeightsNeeded)


def _content(state: barrier.State) -> dict[str, object]:
    return {
        "run": state.run,
        "job": state.job,
        "phase": state.phase,
        "reason": state.reason,
        "epoch": state.epoch,
        "urls": list(state.urls),
        "groups": [
            {
                "id": group.id,
                "incarnation": group.incarnation,
                "serving": group.serving,
                "urls": list(group.urls),
                "endpoints": {name: list(urls) for name, urls in group.endpoints.items()},
            }
            for group in state.groups
        ],
    }


def _barrier_path(args: argparse.Namespace) -> Path | None:
    """Return the path of the barrier file. It need not be there yet: `up` may be starting beside this command."""
    if args.barrier:
        return Path(args.barrier)
    if not args.run_dir and not args.job and os.environ.get("ROLLOUT_BARRIER"):
        return None
    job = {"SLURM_JOB_ID": args.job} if args.job else {}
    named = args.run_dir or (None if args.job else os.environ.get("ROLLOUT_RUN_DIR"))
    path = Path(named) if named else default_run_dir({**os.environ, **job})
    if args.job and not path.is_dir():  # submitted from elsewhere: Slurm knows where
        with contextlib.suppress(RolloutError):
            path = find_run_dir(None, args.job).path
    if not path.is_dir():
        print(f"slurm-rollout: {path} is not there yet", file=sys.stderr)
    return path / "barrier.json"


def _goal(text: str) -> str:
    """Return "ready", "stopped", or the digits of the epoch."""
    if text in ("ready", "stopped"):
        return text
    key, _, number = text.partition("=")
    if key == "epoch" and number.isdecimal():
        return number
    raise argparse.ArgumentTypeError(f"{text!r} is not ready, epoch=N or stopped")
