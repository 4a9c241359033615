"""The placeholders of an engine's command line, and what they stand for at a launch. Pure.

`{word}` and `{port.NAME}` are placeholders, so that JSON (`{"a": 1}`) can be written as it is. `{{word}}` stands for a
literal `{word}`, and `${word}` is the shell's and is left alone. They are filled at each launch, because a group that
moved has other nodes and ports than it was planned with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from slurm_rollout.core.plan import FleetPlan, GroupPlan, Member

PLACEHOLDERS = (
    "rank",
    "size",
    "local_rank",
    "node",
    "node_ip",
    "gpus",
    "master_addr",
    "master_port",
    "http_port",
    "incarnation",
)

_PLACEHOLDER = re.compile(r"\{\{(?P<literal>[A-Za-z_][\w.-]*)\}\}|(?<!\$)\{(?P<name>[A-Za-z_][\w.-]*)\}")


def placeholders(port_names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of all placeholders of an engine with these ports."""
    return (*PLACEHOLDERS, *(f"port.{name}" for name in port_names))


def used(argument: str) -> tuple[str, ...]:
    """Return the names of the placeholders in one argument, known or not."""
    return tuple(m["name"] for m in _PLACEHOLDER.finditer(argument) if m["name"])


def fill(argument: str, values: Mapping[str, str]) -> str:
    """Return the argument with its placeholders filled.

    Raises:
        KeyError: a placeholder is not in `values`; the spec was not checked.
    """
    return _PLACEHOLDER.sub(
        lambda found: values[found["name"]] if found["name"] else f"{{{found['literal']}}}", argument
    )


def command_line(plan: FleetPlan, group: GroupPlan, member: Member, incarnation: int) -> tuple[str, ...]:
    """Return what starts the member where its group is now."""
    values = {
        "rank": str(member.rank),
        "size": str(len(group.members)),
        "local_rank": str(member.local_rank),
        "node": member.node,
        "node_ip": plan.hosts[member.node].ip,
        "gpus": ",".join(map(str, member.gpus)),
        "master_addr": group.master_address,
        "master_port": str(group.master_port),
        "http_port": str(member.ports["http"]),
        "incarnation": str(incarnation),
    }
    values |= {f"port.{name}": str(port) for name, port in member.ports.items()}
    return tuple(fill(argument, values) for argument in member.argv)
