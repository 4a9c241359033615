"""`slurm-rollout submit`: a job that runs `up`, made from a template."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm_rollout import cli
from slurm_rollout.errors import UsageError
from slurm_rollout.rundir import default_run_dir

if TYPE_CHECKING:
    from slurm_rollout.batch_script import Script

SCHEMA = 1

TEMPLATE = "train"

OWN_OPTIONS = ("nodes", "time", "partition", "account", "qos", "job-name")
"""Options of sbatch that have one of the same name here."""

HELP = "submit a job that runs the fleet (and the trainer)"

DESCRIPTION = """\
Make a batch script from a template, see that the spec is right and that the fleet fits into the nodes that the script
asks for, and submit it with sbatch, through submitit.

Templates: train (trainer and fleet on nodes of their own), colocated (both on every node), fleet-only (no trainer),
hetjob (trainer and fleet are components of a heterogeneous job), or a batch script of your own: copy one of templates/
and change what your site needs. They work with plain sbatch, too. `submit` sets the lines spec=, run_dir= and
trainer=(), and the options below override directives (in a heterogeneous job: those of the first component)."""

EPILOG = """\
The spec is read again when the job starts. The trainer is started as it is written, by no shell; the templates start it
with srun, once on each of its nodes.

exit codes: 0 submitted; 1 Slurm said no; 2 wrong spec or usage, nothing was submitted. With --executor debug: as `up`

examples:
  slurm-rollout submit fleet.toml --nodes 5 --time 2-00:00:00 --account moe -- python train.py
  slurm-rollout submit fleet.toml --template my.sbatch --dry-run
  slurm-rollout submit fleet.toml --run-dir rollout-runs/moe --chain 4 -- python train.py
  slurm-rollout submit fleet.toml --executor local -- python train.py     a rehearsal on this machine, without Slurm"""


def add_parser(subparsers: Any) -> None:
    """Add `submit`."""
    parser = subparsers.add_parser(
        "submit",
        help=HELP,
        description=DESCRIPTION,
        epilog=EPILOG,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="slurm-rollout submit SPEC [OPTION...] [-- TRAINER ...]",
    )
    add = parser.add_argument
    add("spec", metavar="SPEC", help="the fleet: .toml, .json or .yaml")
    add("--template", metavar="NAME", default=TEMPLATE, help=f"a template, or a file (default: {TEMPLATE})")
    add("--trainer", metavar="COMMAND", help="the trainer in one word, instead of what follows `--`")
    add("--run-dir", metavar="D", help="default: what the template says; in ours rollout-runs/<job>")
    add(
        "--executor",
        choices=("slurm", "local", "debug"),
        default="slurm",
        help="local, debug: run it here",
    )
    for name in OWN_OPTIONS:
        add(f"--{name}", metavar=name.upper().replace("-", "_"), help=f"sbatch's --{name}")
    add(
        "--sbatch",
        metavar="NAME[=VALUE]",
        action="append",
        default=[],
        help="any other option of sbatch; repeatable",
    )
    add(
        "--chain",
        metavar="N",
        type=_count,
        default=1,
        help="N jobs on one run directory; each starts if the one before it ends without success, as at its time limit",
    )
    add("--dry-run", action="store_true", help="print the script; submit nothing. Needs no Slurm")
    add("--json", action="store_true", help="print JSON")
    cli.add_help(parser)
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1 on is needed, not {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Submit, or show what would be submitted.

    Raises:
        UsageError: it cannot work as asked; SpecError: the spec is wrong, or does not fit; Rejected: Slurm said no.
    """
    from slurm_rollout import batch_script, submit
    from slurm_rollout.spec import load_spec

    trainer = _trainer(args)
    spec = load_spec(args.spec)
    if args.executor != "slurm":
        return _rehearse(args, trainer)
    template = batch_script.read_template(args.template)
    options = _options(args)
    if args.template in batch_script.templates():
        # What they say is an example of a name, and of a trainer.
        options.setdefault("job-name", spec.name)
        if not trainer and args.template != "fleet-only":
            raise UsageError(
                f"template {args.template} starts a trainer beside the fleet: say which, after `--` at the end, such "
                "as -- python train.py. Without a trainer: --template fleet-only"
            )
    script = batch_script.fill_in(
        template, options, spec=Path(args.spec), run_dir=Path(args.run_dir) if args.run_dir else None, trainer=trainer
    )
    batch_script.check_fits(spec, script)
    if args.chain > 1 and batch_script.run_dir_of(script, "1") != batch_script.run_dir_of(script, "2"):
        raise UsageError(
            "--chain needs a run directory that all its jobs share, and this one has the job's id in it: say, for "
            f"example, --run-dir rollout-runs/{spec.name}"
        )
    if args.dry_run:
        return _show(args, script, submit.script_text(script, _folder()))
    jobs = submit.submit(script, _folder(), chain=args.chain)
    _tell(args, script, jobs)
    return 0


def _trainer(args: argparse.Namespace) -> list[str]:
    after: list[str] = args.after_dashes[1:]
    if args.after_dashes and not after:
        raise UsageError("no trainer after `--`: name its command, or leave the `--` out. Nothing was submitted")
    if args.trainer is None:
        return after
    if after:
        raise UsageError("the trainer is named twice: by --trainer, and after `--`")
    try:
        words = shlex.split(args.trainer)
    except ValueError as e:
        raise UsageError(f"--trainer {args.trainer!r}: {e}") from None
    if not words:
        raise UsageError("--trainer is empty: name a command")
    return words


def _options(args: argparse.Namespace) -> dict[str, str]:
    from slurm_rollout.batch_script import parse_option

    own = {name: getattr(args, name.replace("-", "_")) for name in OWN_OPTIONS}
    return {
        **{name: value for name, value in own.items() if value is not None},
        **dict(parse_option(text) for text in args.sbatch),
    }


def _folder() -> Path:
    """Where submitit keeps its files: beside the runs."""
    return Path("rollout-runs/.submit").absolute()


# --------------------------------------------------------------------------------------------------------------- output


def _show(args: argparse.Namespace, script: Script, text: str) -> int:
    if args.json:
        print(json.dumps({"schema": SCHEMA, "executor": "slurm", "jobs": [], "script": text}))
        return 0
    sys.stdout.write(text)
    if args.chain > 1:
        print(
            f"{args.chain - 1} more would follow, each with --dependency=afternotok:<the job before it> and "
            "--kill-on-invalid-dep=yes",
            file=sys.stderr,
        )
    return 0


def _tell(args: argparse.Namespace, script: Script, jobs: tuple[str, ...]) -> None:
    from slurm_rollout.batch_script import run_dir_of

    run_dir = run_dir_of(script, jobs[0])
    status = ["slurm-rollout", "status", *(["--run-dir", run_dir] if run_dir else ["-j", jobs[0]])]
    if args.json:
        found = {"schema": SCHEMA, "executor": "slurm", "jobs": list(jobs), "run_dir": run_dir, "status": status}
        print(json.dumps(found))
        return
    print(f"job {jobs[0]} ({script.options.get('job-name', 'unnamed')}) submitted")
    if len(jobs) > 1:
        print(
            f"then {', '.join(jobs[1:])}: each starts if the one before it ends without success, as at its time limit; "
            f"the first success ends the chain. To end all: scancel {' '.join(jobs)}"
        )
    print(f"run directory {run_dir or '(the job decides)'}\nlook with `{shlex.join(status)}` once it runs")


# ------------------------------------------------------------------------------------------------------------ rehearsal


def _rehearse(args: argparse.Namespace, trainer: list[str]) -> int:
    from slurm_rollout import submit

    if args.chain > 1:
        raise UsageError(f"--chain is for Slurm's time limits; --executor {args.executor} has none")
    run_dir = Path(args.run_dir).absolute() if args.run_dir else default_run_dir({}).absolute()
    argv = [sys.executable, "-P", "-m", "slurm_rollout", "up", str(Path(args.spec).absolute())]
    argv += ["--backend=local", f"--run-dir={run_dir}", *(["--", *trainer] if trainer else [])]
    if args.dry_run:
        found: dict[str, object] = {"schema": SCHEMA, "executor": args.executor, "jobs": [], "command": argv}
        print(json.dumps(found) if args.json else shlex.join(argv))
        return 0
    pid, output = submit.rehearse(args.executor, argv, _folder())
    status = ["slurm-rollout", "status", "--run-dir", str(run_dir)]
    if args.json:
        found = {"schema": SCHEMA, "executor": "local", "jobs": [str(pid)], "run_dir": str(run_dir), "status": status}
        print(json.dumps(found | {"output": str(output)}))
        return 0
    print(f"`up` runs here, held by process {pid}; its output is in {output}")
    print(f"run directory {run_dir}\nlook with `{shlex.join(status)}`")
    print(f"end it with `{shlex.join(['slurm-rollout', 'stop', '--run-dir', str(run_dir)])}`")
    return 0
