"""Which ports each member listens on. Pure: the same demands in the same order give the same ports.

Every member gets a block of `stride` ports on its address. The blocks of one base follow one another from that base,
so that pools with the same base share the room and pools with different bases can be told apart at a firewall.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from slurm_rollout.errors import SpecError

HTTP, MASTER = "http", "master"
"""The first two ports of every block; an engine's own names follow."""

HIGHEST = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class PortDemand:
    """One member's wish. `stride` is at least the number of names."""

    pool: str
    member: str  # "actor/0 rank 1 on n1", for messages
    address: str
    base: int
    stride: int
    names: tuple[str, ...]


def assign(demands: Iterable[PortDemand]) -> tuple[Mapping[str, int], ...]:
    """Return name -> port for each demand; no two members share a port of one address.

    Raises:
        SpecError: a block ends above 65535, or blocks of two pools overlap.
    """
    blocks: list[tuple[str, int, PortDemand]] = []
    next_start: dict[tuple[str, int], int] = {}
    for demand in demands:
        start = next_start.get((demand.address, demand.base), demand.base)
        next_start[demand.address, demand.base] = start + demand.stride
        if start + len(demand.names) - 1 > HIGHEST:
            raise SpecError(
                f"pool {demand.pool}: {demand.member} would get the ports {start} to {start + len(demand.names) - 1}; "
                f"the highest port is {HIGHEST}. Choose a lower ports.base (now {demand.base}) or a smaller "
                f"ports.stride (now {demand.stride})"
            )
        blocks.append((demand.address, start, demand))
    for (address, start, one), (other_address, other_start, other) in pairwise(sorted(blocks, key=lambda b: b[:2])):
        if address == other_address and other_start < start + one.stride:
            raise SpecError(
                f"pools {one.pool} and {other.pool} would use the same ports on {address}: {one.member} has "
                f"{start}-{start + one.stride - 1}, {other.member} has {other_start}-{other_start + other.stride - 1}. "
                "Give both the same ports.base, or bases that are further apart"
            )
    return tuple({name: start + i for i, name in enumerate(d.names)} for _, start, d in blocks)


@dataclass(frozen=True, slots=True)
class OutgoingPorts:
    """Where the kernel takes ports for outgoing connections: from `low` to `high`, but for those that are reserved."""

    low: int
    high: int
    reserved: frozenset[int] = frozenset()

    def __contains__(self, port: int) -> bool:
        return self.low <= port <= self.high and port not in self.reserved


def ephemeral_warnings(
    demands: Sequence[PortDemand], ports: Sequence[Mapping[str, int]], outgoing: OutgoingPorts
) -> tuple[str, ...]:
    """Return a warning for each pool with ports that the kernel also takes for outgoing connections."""
    inside: dict[str, list[int]] = {}
    for demand, assigned in zip(demands, ports, strict=True):
        inside.setdefault(demand.pool, []).extend(p for p in assigned.values() if p in outgoing)
    return tuple(
        f"pool {pool}: its ports {min(found)} to {max(found)} lie in {outgoing.low}-{outgoing.high}, where the kernel "
        "takes ports for outgoing connections (net.ipv4.ip_local_port_range): any process can take one before an "
        f"engine binds it. Choose ports.base so that they stay below {outgoing.low}, or have an administrator reserve "
        "them (net.ipv4.ip_local_reserved_ports)"
        for pool, found in inside.items()
        if found
    )
