"""`slurm-rollout plan`: what a spec means in an allocation. Starts nothing, writes nothing."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from slurm_rollout import allocation as allocations
from slurm_rollout.cli import add_help
from slurm_rollout.core.bounds import Bound, recovery_bound
from slurm_rollout.core.hostlist import fold
from slurm_rollout.core.names import MARK, mark
from slurm_rollout.core.placeholders import command_line
from slurm_rollout.core.plan import FleetPlan, GroupPlan, Member
from slurm_rollout.core.request import Allocation
from slurm_rollout.errors import UsageError
from slurm_rollout.rundir import RunDir, default_run_dir
from slurm_rollout.slurm.srun import step_argv
from slurm_rollout.spec import Spec, build_plan, load_spec

SCHEMA = 1
JOB = "$SLURM_JOB_ID"
INCARNATION = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan`."""
    parser = subparsers.add_parser(
        "plan",
        help="show what a spec means: groups, nodes, ports, the exact srun lines; starts nothing",
        description="Show what a spec means in this allocation, or on the nodes that --nodes names: groups, members, "
        "nodes, GPUs, ports, URLs, the exact srun lines of the first incarnation, and the longest that a recovery can "
        "take. Nothing is started or written.",
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("spec", metavar="SPEC", help="the spec file (.toml, .json, .yaml)")
    add("--nodes", metavar="HOSTLIST", help="plan for these nodes, such as gpu[01-08], instead of the job's")
    add("--gpus-per-node", metavar="N", type=_number, help="GPUs of a node (default: what the job says)")
    add(
        "--cpus-per-node", metavar="N", type=_number, help="CPUs of a node (default: what the job says; with --nodes 1)"
    )
    add("--backend", choices=["slurm", "local"], default="slurm", help="local: virtual nodes on this machine")
    add("--json", action="store_true", help="print JSON")
    add("-h", "--noheader", action="store_true", help="no header lines in tables")
    add_help(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        UsageError: no allocation; SpecError: the spec is wrong, or does not fit into the allocation.
    """
    spec = load_spec(args.spec)
    allocation = _allocation(args, spec)
    port_range = allocations.outgoing_ports()
    plan, warnings = build_plan(spec, allocation, backend=args.backend, port_range=port_range)
    if args.json:
        print(json.dumps(as_json(plan, warnings, allocation.job), indent=1, ensure_ascii=False))
    else:
        print("\n".join(as_text(plan, warnings, allocation, header=not args.noheader)))
    return 0


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number is needed, not {text!r}")
    return int(text)


def _allocation(args: argparse.Namespace, spec: Spec) -> Allocation:
    numbers = {"gpus_per_node": args.gpus_per_node, "cpus_per_node": args.cpus_per_node}
    if args.backend == "local":
        if args.nodes is not None or any(n is not None for n in numbers.values()):
            raise UsageError(
                "--backend local makes up its nodes: --nodes, --gpus-per-node and --cpus-per-node do not apply. "
                "nodes.gpus_per_node in the spec sets how many GPUs a virtual node has"
            )
        return allocations.local(spec)
    if args.nodes is not None:
        return allocations.from_args(args.nodes, address=spec.nodes.address, **numbers)
    return allocations.from_slurm(os.environ, address=spec.nodes.address, **numbers)


# ----------------------------------------------------------------------------------------------------------------- JSON


def as_json(plan: FleetPlan, warnings: Sequence[str], job: str) -> dict[str, Any]:
    """Return the plan for programs. Keys are only ever added while `schema` stays the same."""
    return {
        "schema": SCHEMA,
        "name": plan.name,
        "backend": plan.backend,
        "job": job,
        "nodes": list(plan.nodes),
        "spares": list(plan.spares),
        "trainer_nodes": list(plan.trainer_nodes),
        "warnings": list(warnings),
        "pools": [
            {
                "name": pool.name,
                "engine": pool.engine,
                "weights": pool.weights,
                "restarts": pool.restart.when,
                "pause_in": list(pool.probe.pause_in),
                "min_ready": pool.min_ready,
                "bound": _bound_json(recovery_bound(plan, pool)),
                "groups": [_group_json(plan, group, job) for group in pool.groups],
            }
            for pool in plan.pools
        ],
    }


def _bound_json(bound: Bound) -> dict[str, float]:
    return {**asdict(bound), "total_s": bound.total_s, "crash_total_s": bound.crash_total_s}


def _group_json(plan: FleetPlan, group: GroupPlan, job: str) -> dict[str, Any]:
    return {
        "id": group.id,
        "master": f"{group.master_address}:{group.master_port}",
        "members": [
            {
                "rank": m.rank,
                "node": m.node,
                "local_rank": m.local_rank,
                "gpus": list(m.gpus),
                "ports": dict(m.ports),
                "entrypoint": m.entrypoint,
                "url": m.url,
                "argv": list(command_line(plan, group, m, INCARNATION)),
            }
            for m in group.members
        ],
        "steps": [
            {
                "node": node,
                "cpus": group.cpus_per_step[node],
                "gpus": group.gpus_per_step[node],
                "mark": _mark(group, node),
                "srun": _srun(plan, group, node, job),
            }
            for node in group.nodes
        ],
    }


def _mark(group: GroupPlan, node: str) -> str:
    return f"{MARK}={mark('RUN', group.id, INCARNATION, node)}"


def _srun(plan: FleetPlan, group: GroupPlan, node: str, job: str) -> list[str] | None:
    if plan.backend == "local":
        return None
    run = RunDir(default_run_dir({**os.environ, "SLURM_JOB_ID": job or "JOB"}))
    het = "" if plan.het_group is None else str(plan.het_group)
    agent = str(run.started_agent(plan.slurm.python, plan.slurm.agent))
    return step_argv(plan, group, node, INCARNATION, job or JOB, agent=agent, het_component=het)


# ----------------------------------------------------------------------------------------------------------------- text


def as_text(plan: FleetPlan, warnings: Sequence[str], allocation: Allocation, *, header: bool) -> Iterator[str]:
    """Yield the lines for people."""
    yield from _where(plan, allocation)
    yield ""
    yield from _table(_pool_rows(plan), header)
    for pool in plan.pools:
        yield ""
        yield from _table(_member_rows(pool.groups, pool.named_ports), header)
    yield ""
    yield "worst case from failure to ready, in seconds (while Slurm answers and nodes are up):"
    yield from _table(_bound_rows(plan), header)
    yield ""
    yield f"steps of incarnation {INCARNATION} (RUN in the mark is unique to the run):"
    for group in plan.groups:
        for node in group.nodes:
            yield from _step(plan, group, node, allocation.job)
    for warning in warnings:
        yield ""
        yield f"warning: {warning}"


def _where(plan: FleetPlan, allocation: Allocation) -> Iterator[str]:
    shared = " (shared with the fleet, which takes all nodes)" if plan.trainer_nodes == allocation.nodes else ""
    facts = {
        "run": plan.name,
        "backend": plan.backend,
        "job": allocation.job or "none",
        "fleet": f"{len(plan.nodes)} nodes: {fold(plan.nodes)}",
        "spares": f"{len(plan.spares)}{f': {fold(plan.spares)}' if plan.spares else ''}",
        "trainer": f"{len(plan.trainer_nodes)} nodes: {fold(plan.trainer_nodes)}{shared}",
    }
    if plan.het_group is not None:
        facts["het group"] = str(plan.het_group)
    for name, value in facts.items():
        yield f"{name + ':':<11}{value}"


def _pool_rows(plan: FleetPlan) -> Iterator[list[str]]:
    yield ["POOL", "ENGINE", "GROUPS", "MIN_READY", "WEIGHTS", "RESTARTS", "MEMBERS", "NODES", "GPUS"]
    for pool in plan.pools:
        one = pool.groups[0]
        gpus = sum(len(m.gpus) for m in one.members)
        members, nodes = len(one.members), len(one.nodes)
        numbers = [str(n) for n in (members, nodes, gpus)]
        how = [pool.weights, pool.restart.when]
        yield [pool.name, pool.engine, str(len(pool.groups)), str(pool.min_ready), *how, *numbers]


def _member_rows(groups: Sequence[GroupPlan], named_ports: Sequence[str]) -> Iterator[list[str]]:
    yield ["GROUP", "RANK", "NODE", "GPUS", "HTTP", "MASTER", *(n.upper() for n in named_ports), "URL"]
    for group in groups:
        for m in group.members:
            master = str(m.ports["master"]) if m.rank == 0 else "-"
            named = [str(m.ports[n]) for n in named_ports]
            url = m.url if m.entrypoint else "- (no entrypoint)"
            yield [group.id, str(m.rank), m.node, _gpus(m), str(m.ports["http"]), master, *named, url]


def _gpus(member: Member) -> str:
    if not member.gpus:
        return "-"
    return f"{member.gpus[0]}-{member.gpus[-1]}" if len(member.gpus) > 1 else str(member.gpus[0])


def _bound_rows(plan: FleetPlan) -> Iterator[list[str]]:
    yield [
        "POOL",
        "DETECT",
        "SNAPSHOT",
        "STOP",
        "FENCE",
        "START",
        "VERIFY",
        "HANG_TOTAL",
        "CRASH_TOTAL",
        "BACKOFF_ADDS",
    ]
    for pool in plan.pools:
        b = recovery_bound(plan, pool)
        stages = (b.detect_s, b.snapshot_s, b.stop_s, b.fence_s, b.start_s, b.verify_s, b.total_s, b.crash_total_s)
        yield [pool.name, *(f"{s:g}" for s in stages), f"0-{b.backoff_s:g}"]


def _step(plan: FleetPlan, group: GroupPlan, node: str, job: str) -> Iterator[str]:
    cpus, gpus = group.cpus_per_step[node], group.gpus_per_step[node]
    srun = _srun(plan, group, node, job)
    yield f"{group.id} on {node}: {cpus} CPUs" + (f", sees all {gpus} GPUs of the node" if srun and gpus else "")
    yield f"    {_mark(group, node)}"
    if srun is not None:
        yield f"    {_shell(srun)}"
    for m in group.on(node):
        yield f"    rank {m.rank}: {_shell(command_line(plan, group, m, INCARNATION))}"


def _shell(argv: Sequence[str]) -> str:
    """Return the line for a shell, in which the job's variable still works."""
    return shlex.join(argv).replace(f"'--jobid={JOB}'", f'"--jobid={JOB}"')


def _table(rows: Iterator[list[str]], header: bool) -> Iterator[str]:
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines if header else lines[1:]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
