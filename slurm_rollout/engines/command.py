"""The `command` engine: any server, described by a command line with placeholders (`core.placeholders`). Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from slurm_rollout.core.placeholders import used
from slurm_rollout.core.plan import ProbeRequest
from slurm_rollout.core.request import MemberPlace


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
        return self.template

    def variables(self, place: MemberPlace) -> Mapping[str, str]:
        return {}

    def readiness_request(self) -> ProbeRequest:
        """One token from the chat interface that all engines of the field have."""
        body: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0}
        return ProbeRequest(body=json.dumps({"model": self.model} | body if self.model else body))
