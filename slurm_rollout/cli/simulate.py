"""`slurm-rollout simulate`: what a spec will go through, from the real decision code on a simulated cluster."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from slurm_rollout import allocation as allocations
from slurm_rollout.cli import add_help
from slurm_rollout.cli.table import columns, duration
from slurm_rollout.core.plan import FleetPlan
from slurm_rollout.core.request import Allocation
from slurm_rollout.errors import RolloutError
from slurm_rollout.simulation.rates import Flawed, Forecast, Rates, forecast, with_threshold
from slurm_rollout.spec import Spec, build_plan, load_spec

SCHEMA = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `simulate`."""
    parser = subparsers.add_parser(
        "simulate",
        help="what a spec will go through: recoveries, time lost, availability; starts nothing",
        description="Play fleets of this spec against a simulated cluster in which members crash and hang, nodes are "
        "lost, Slurm goes away and coordinators die, at the rates that you give; the decisions are those of the real "
        "program. Says how many recoveries there will be, how much time is lost, how much of the budget is spent, and "
        "what one more spare or another liveness threshold would change. Nothing is started or written.",
        epilog="The default rates are round numbers and no measurement: give your own. 0 means never.",
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("spec", metavar="SPEC", help="the spec file (.toml, .json, .yaml)")
    add("--nodes", metavar="HOSTLIST", help="the nodes (default: as many as the spec needs)")
    add("--gpus-per-node", metavar="N", type=_count, help="GPUs of a node (default: what the spec needs)")
    add("--hours", metavar="H", type=_positive, default=24.0, help="of each fleet (default: 24)")
    add("--load", metavar="S", type=_positive, default=300.0, help="seconds that an engine loads (default: 300)")
    add("--crash", metavar="H", type=_hours, default=500.0, help="mean hours until one member crashes (default: 500)")
    add("--hang", metavar="H", type=_hours, default=1000.0, help="mean hours until one member hangs (default: 1000)")
    add("--node", metavar="H", type=_hours, default=5000.0, help="mean hours until one node is lost (default: 5000)")
    add("--slurm", metavar="H", type=_hours, default=100.0, help="mean hours until Slurm is away for 5 min (100)")
    add("--coordinator", metavar="H", type=_hours, default=500.0, help="mean hours until a coordinator dies (500)")
    add("--fleets", metavar="N", type=_count, default=10, help="how many fleets are played (default: 10)")
    add("--seed", metavar="N", type=int, default=0, help="of the first fleet; the same seed gives the same numbers")
    add("--json", action="store_true", help="print JSON")
    add("-h", "--noheader", action="store_true", help="no header lines in tables")
    add_help(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the forecast.

    Raises:
        SpecError: the spec is wrong, or does not fit on the nodes; UsageError: the nodes make no sense.
        RolloutError: a bug was found; the message says how to tell us.
    """
    spec = load_spec(args.spec)
    plan, _ = build_plan(spec, _allocation(args, spec), backend="slurm", port_range=allocations.outgoing_ports())
    rates = Rates(
        crash_h=args.crash,
        hang_h=args.hang,
        node_h=args.node,
        slurm_h=args.slurm,
        coordinator_h=args.coordinator,
    )
    try:
        found = _forecasts(plan, rates, args)
    except Flawed as e:
        said = str(e).splitlines()[0]
        raise RolloutError(f"the simulation broke an invariant: please report this spec and these words: {said}") from e
    if args.json:
        print(json.dumps(as_json(plan, rates, args.load, found), indent=1))
    else:
        print("\n".join(as_text(plan, found, header=not args.noheader)))
    return 0


def _hours(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"hours, or 0 for never, are needed, not {text!r}")
    return value


def _positive(text: str) -> float:
    value = _hours(text)
    if not value:
        raise argparse.ArgumentTypeError("a number above 0 is needed")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, not {text!r}")
    return int(text)


def _allocation(args: argparse.Namespace, spec: Spec) -> Allocation:
    hostlist = args.nodes or spec.nodes.include
    if hostlist is None:
        return allocations.local(spec)
    # No name is looked up: the nodes need not exist.
    return allocations.from_args(
        hostlist, gpus_per_node=args.gpus_per_node or spec.nodes.gpus_per_node, resolve=lambda name: "127.0.0.1"
    )


def _forecasts(plan: FleetPlan, rates: Rates, args: argparse.Namespace) -> dict[str, Forecast]:
    """Return the forecast as planned, and those of the other choices, with the same faults."""

    def play(what: FleetPlan, spare_nodes: int = 0) -> Forecast:
        return forecast(
            what,
            rates,
            hours=args.hours,
            load_s=args.load,
            fleets=args.fleets,
            seed=args.seed,
            spare_nodes=spare_nodes,
        )

    found = {"as planned": play(plan)}
    if rates.node_h:
        found["one more spare"] = play(plan, 1)
    for change in (-1, 1):
        other = with_threshold(plan, change)
        if other is not None:
            found[f"liveness threshold {change:+}"] = play(other)
    return found


def as_json(plan: FleetPlan, rates: Rates, load_s: float, found: dict[str, Forecast]) -> dict[str, Any]:
    """Return the forecasts for programs. Keys are only ever added while `schema` stays the same."""
    return {
        "schema": SCHEMA,
        "name": plan.name,
        "rates": asdict(rates),
        "load_s": load_s,
        "choices": [{"choice": name, **asdict(f)} for name, f in found.items()],
    }


def as_text(plan: FleetPlan, found: dict[str, Forecast], *, header: bool) -> Iterator[str]:
    """Yield the lines for people."""
    planned = found["as planned"]
    members = sum(len(g.members) for g in plan.groups)
    yield f"{planned.fleets} fleets of {len(plan.groups)} groups ({members} members), {planned.hours:g} h each"
    yield f"fleets that failed: {planned.failed}"
    yield ""
    titles = [
        "POOL",
        "GROUPS",
        "AVAILABLE",
        "+/-",
        "LOST_GROUP_H",
        "RECOVERIES",
        "MEDIAN",
        "LONGEST",
        "RESTARTS",
        "START_FAILURES",
    ]
    rows = [
        (
            p.name,
            p.groups,
            f"{p.availability:.3%}",
            f"{p.availability_error:.3%}",
            f"{p.lost_group_h:.2f}",
            f"{p.recoveries:.1f}",
            _time(p.recovery_median_s),
            _time(p.recovery_longest_s),
            f"{p.restarts_spent}/{p.restarts_limit}",
            f"{p.start_failures_spent}/{p.start_failures_limit}",
        )
        for p in planned.pools
    ]
    yield from columns(rows, titles=titles if header else (), right=range(1, len(titles)))
    if planned.failures:
        yield ""
        rates = [(reason, f"{number:.2f}") for reason, number in planned.failures.items()]
        yield from columns(rates, titles=("FAILURE", "A_FLEET") if header else (), right=(1,))
    yield ""
    titles = ["CHOICE", "POOL", "AVAILABLE", "LOST_GROUP_H", "RECOVERIES", "FAILED_FLEETS"]
    choices = [
        (name, p.name, f"{p.availability:.3%}", f"{p.lost_group_h:.2f}", f"{p.recoveries:.1f}", f.failed)
        for name, f in found.items()
        for p in f.pools
    ]
    yield from columns(choices, titles=titles if header else (), right=range(2, len(titles)))


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)
