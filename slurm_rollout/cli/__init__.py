"""The command line. Only the module of the sub-command that was asked for is imported: `status` must stay light.

A sub-command's module offers `add_parser(subparsers)`, which adds its parser(s) and sets the default `run`: a function
from the parsed arguments to the exit code.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys

from slurm_rollout.errors import RolloutError

PROG = "slurm-rollout"

COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "run": {
        "plan": ("plan", "show what a spec means: groups, nodes, ports, the exact srun lines; starts nothing"),
        "up": ("up", "run the fleet (and the trainer) inside the allocation, in the foreground"),
        "submit": ("submit", "submit a job that does so, made from a template"),
        "simulate": ("simulate", "what a spec will go through: recoveries, time lost, availability"),
        "demo": ("demo", "see a crash and a hang being recovered, on this machine, without Slurm"),
    },
    "look": {
        "status": ("status", "phases, restarts, budgets and nodes of a run"),
        "describe": ("describe", "one group: why each of its incarnations ended, stage times, last lines, black box"),
        "events": ("events", "what happened, in order"),
        "logs": ("logs", "what the engines wrote"),
        "wait": ("wait", "wait until the fleet is ready, or stopped"),
    },
    "ask": {
        "restart": ("requests", "restart groups"),
        "drain": ("requests", "stop groups and keep them stopped"),
        "resume": ("requests", "start drained or failed groups again"),
        "stop": ("requests", "stop the fleet and end the run"),
    },
}
"""Kind of command: name: (module under `slurm_rollout.cli`, one line of help)."""

EXAMPLES = """\
examples:
  slurm-rollout plan fleet.toml --nodes 'gpu[01-08]' --gpus-per-node 8
  exec slurm-rollout up fleet.toml -- python train.py      # last line of a batch script
  slurm-rollout submit fleet.toml --nodes 5 --time 2-0 --dry-run -- python train.py
  slurm-rollout status -j 123456 -i 10
  slurm-rollout describe actor/0
  slurm-rollout events -f --group actor/0
  slurm-rollout logs actor/0.1 -f
  slurm-rollout restart actor/0
  slurm-rollout wait --for ready --timeout 3600

`slurm-rollout COMMAND --help` tells more. Exit codes: 0 fine, 1 could not do it or could not observe, 2 usage.
What each failure looks like, and what to do: docs/troubleshooting.md."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` without the program's name; None: this process's."""
    try:
        code = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except RolloutError as e:
        print(f"{PROG}: error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`head`, a closed pager) had enough. The interpreter's own flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def add_help(parser: argparse.ArgumentParser) -> None:
    """Add `--help`; `-h` is `--noheader`, as in Slurm."""
    parser.add_argument("--help", action="help", help="show this help and exit")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which run is meant (`rundir.find_run_dir`)."""
    parser.add_argument("-j", "--job", metavar="JOB", help="the run of this job")
    parser.add_argument(
        "--run-dir", metavar="DIR", help="run directory (default: ROLLOUT_RUN_DIR, else rollout-runs/JOB)"
    )


def _main(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a C locale is no reason to fail
    modules = {name: module for kind in COMMANDS.values() for name, (module, _) in kind.items()}
    name = argv[0] if argv else ""
    parser = _top_parser()
    try:
        if not argv:
            parser.print_help(sys.stderr)
            return 2
        if name not in modules:
            parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
            args = parser.parse_args(argv[:1])
            parser.error(f"no command {args.command!r}: choose one of {', '.join(modules)}")
        subparsers = parser.add_subparsers(prog=PROG, metavar="COMMAND")
        importlib.import_module(f"slurm_rollout.cli.{modules[name]}").add_parser(subparsers)
        # The command's own parser, not the top one: that one treats a `--` in between as its own (Python 3.13).
        # What follows `--` is a trainer's command line: argparse must not see it, whatever options it has.
        end = argv.index("--") if name in ("up", "submit") and "--" in argv else len(argv)
        args = subparsers.choices[name].parse_args(argv[1:end])
        args.after_dashes = argv[end:]
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    return int(args.run(args))


class _Version(argparse.Action):
    """Looking the version up costs more than a whole `status`, so it is done only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(PROG, version("slurm-rollout"))
        parser.exit(0)


def _top_parser() -> argparse.ArgumentParser:
    width = max(len(name) for kind in COMMANDS.values() for name in kind)
    lists = [
        "\n".join([f"{kind}:", *(f"  {name:{width}}  {help}" for name, (_, help) in commands.items())])
        for kind, commands in COMMANDS.items()
    ]
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} COMMAND [OPTION...]",
        description="Fault-tolerant inference fleets for RL training on Slurm.",
        epilog="\n\n".join([*lists, EXAMPLES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    add_help(parser)
    parser.add_argument("-V", "--version", action=_Version, nargs=0, help="show the version and exit")
    return parser
