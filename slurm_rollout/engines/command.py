"""The `command` engine: any server, described by a command line with placeholders. Pure.

`{word}` and `{port.NAME}` are placeholders, so that JSON (`{"a": 1}`) can be written as it is. `{{word}}` stands for a
literal `{word}`, and `${word}` is the shell's and is left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from slurm_rollout.core.plan import ProbeRequest
from slurm_rollout.core.request import MemberPlace

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
_INCARNATION = "incarnation"


def placeholders(port_names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of all placeholders of an engine with these ports."""
    return (*PLACEHOLDERS, *(f"port.{name}" for name in port_names))


def used(argument: str) -> tuple[str, ...]:
    """Return the names of the placeholders in one argument, known or not."""
    return tuple(m["name"] for m in _PLACEHOLDER.finditer(argument) if m["name"])


def fill(argument: str, values: Mapping[str, str]) -> str:
    """Return the argument with its placeholders filled; `{incarnation}`, also doubled, stays for `at_launch`.

    Raises:
        KeyError: a placeholder is not in `values`; the spec was not checked.
    """

    def value(found: re.Match[str]) -> str:
        name = found["name"] or found["literal"]
        if name == _INCARNATION:
            return found[0]
        return values[name] if found["name"] else f"{{{name}}}"

    return _PLACEHOLDER.sub(value, argument)


def at_launch(argv: Iterable[str], incarnation: int) -> tuple[str, ...]:
    """Return the planned command line as it is started: with the incarnation in its place."""

    def value(found: re.Match[str]) -> str:
        if found["name"] == _INCARNATION:
            return str(incarnation)
        return f"{{{_INCARNATION}}}" if found["literal"] == _INCARNATION else found[0]

    return tuple(_PLACEHOLDER.sub(value, argument) for argument in argv)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandEngine:
    """A command line for every member; each argument is a template."""

    kind: ClassVar[str] = "command"
    template: tuple[str, ...]
    entrypoints: str = "all"  # or "leader"
    model: str = ""
    port_names: tuple[str, ...] = ()

    @property
    def uses_node_ip(self) -> bool:
        return any("node_ip" in used(argument) for argument in self.template)

    def is_entrypoint(self, rank: int) -> bool:
        return rank == 0 or self.entrypoints == "all"

    def argv(self, place: MemberPlace) -> tuple[str, ...]:
        values = {
            "rank": str(place.rank),
            "size": str(place.size),
            "local_rank": str(place.local_rank),
            "node": place.node,
            "node_ip": place.node_ip,
            "gpus": ",".join(map(str, place.gpus)),
            "master_addr": place.master_addr,
            "master_port": str(place.master_port),
            "http_port": str(place.ports["http"]),
        }
        values |= {f"port.{name}": str(place.ports[name]) for name in self.port_names}
        return tuple(fill(argument, values) for argument in self.template)

    def variables(self, place: MemberPlace) -> Mapping[str, str]:
        return {}

    def readiness_request(self) -> ProbeRequest:
        """One token from the chat interface that all engines of the field have."""
        body: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0}
        return ProbeRequest(body=json.dumps({"model": self.model} | body if self.model else body))
