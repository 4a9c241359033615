"""What the job holds: from the environment of a batch job, from the command line, or made up for the local backend."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path

from slurm_rollout.core.hostlist import expand
from slurm_rollout.core.placement import nodes_needed
from slurm_rollout.core.ports import OutgoingPorts
from slurm_rollout.core.request import Allocation
from slurm_rollout.errors import UsageError
from slurm_rollout.spec import Spec, fleet_request

__all__ = ["Allocation", "from_args", "from_slurm", "ip_of", "local", "outgoing_ports"]

Resolve = Callable[[str], str | None]


def from_slurm(
    environ: Mapping[str, str],
    *,
    address: str = "{node}",
    gpus_per_node: int | None = None,
    cpus_per_node: int | None = None,
    resolve: Resolve | None = None,
) -> Allocation:
    """Return the allocation of the job that this process runs in.

    `address` is a node's address, made of its name. The numbers, where given, stand for what Slurm says. `resolve`
    finds the IP of an address; default: `ip_of`.

    Raises:
        UsageError: this is no job, or its environment makes no sense.
    """
    job = environ.get("SLURM_JOB_ID", "")
    if not job:
        raise UsageError(
            "not inside a Slurm allocation (no SLURM_JOB_ID): run it from your sbatch script, or pass --nodes HOSTLIST "
            "to `plan`, or --backend local"
        )
    # In a heterogeneous job each component has its own variables, with a suffix; the bare ones are the first one's.
    components = int(environ.get("SLURM_HET_SIZE") or 0)
    suffixes = [f"_HET_GROUP_{n}" for n in range(components)] or [""]
    cpus: dict[str, int] = {}
    gpus: dict[str, int] = {}
    het_groups: dict[str, int] = {}
    for component, suffix in enumerate(suffixes):
        nodes = _hosts(environ, f"SLURM_JOB_NODELIST{suffix}")
        node_cpus = [cpus_per_node] * len(nodes) if cpus_per_node else _cpus(environ, suffix, len(nodes))
        node_gpus = gpus_per_node if gpus_per_node is not None else _gpus(environ, suffix, component)
        for node, count in zip(nodes, node_cpus, strict=True):
            if node not in cpus:  # two components can share a node; it counts as the first one's
                cpus[node], gpus[node], het_groups[node] = count, node_gpus, component
    return Allocation(
        job=job,
        restart_count=int(environ.get("SLURM_RESTART_COUNT") or 0),
        nodes=tuple(cpus),
        cpus=cpus,
        gpus=gpus,
        addresses=_addresses(cpus, address),
        ips=_ips(_addresses(cpus, address), resolve),
        het_jobs=tuple(environ.get(f"SLURM_JOB_ID{suffix}", "") for suffix in suffixes) if components else (),
        het_groups=het_groups if components else {},
    )


def from_args(
    hostlist: str,
    *,
    address: str = "{node}",
    gpus_per_node: int | None = None,
    cpus_per_node: int | None = None,
    resolve: Resolve | None = None,
) -> Allocation:
    """Return an allocation of these nodes, for looking at a plan before there is a job; see `from_slurm`.

    Raises:
        UsageError: `hostlist` is none.
    """
    try:
        nodes = tuple(dict.fromkeys(expand(hostlist)))
    except ValueError as e:
        raise UsageError(f"--nodes: {e}") from None
    return Allocation(
        job="",
        nodes=nodes,
        cpus=dict.fromkeys(nodes, cpus_per_node or 1),
        gpus=dict.fromkeys(nodes, gpus_per_node or 0),
        addresses=_addresses(nodes, address),
        ips=_ips(_addresses(nodes, address), resolve),
    )


def local(spec: Spec) -> Allocation:
    """Return as many virtual nodes of this machine as the spec's groups and spares take, all at the loopback address.

    Where the spec does not say how many GPUs a node has, a node has as many as the largest part of a group needs.

    Raises:
        SpecError: a pool's GPUs cannot be laid out on such nodes.
    """
    request = fleet_request(spec)
    gpus = request.gpus_per_node
    if gpus is None:
        gpus = max(-(-(p.gpus or 0) // (p.nodes or 1)) for p in request.pools)
    count = nodes_needed(request.pools, gpus) + request.spares
    nodes = tuple(f"local{n}" for n in range(1, count + 1))
    return Allocation(
        job="",
        nodes=nodes,
        cpus=dict.fromkeys(nodes, len(os.sched_getaffinity(0))),
        gpus=dict.fromkeys(nodes, gpus),
        addresses=dict.fromkeys(nodes, "127.0.0.1"),
        ips=dict.fromkeys(nodes, "127.0.0.1"),
    )


def ip_of(name: str) -> str | None:
    """Return an address of the host that other hosts can use, IPv4 where there is one; None when none is found."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    addresses = [ip_address(str(info[4][0]).partition("%")[0]) for info in found]
    # Debian's installer gives a host's own name the address 127.0.1.1: of no use to any other node.
    usable = [a for a in addresses if not a.is_loopback and not a.is_link_local]
    return str(min(usable, key=lambda a: a.version)) if usable else None


def outgoing_ports(folder: Path = Path("/proc/sys/net/ipv4")) -> OutgoingPorts:
    """Return the ports that this machine's kernel takes for outgoing connections.

    The nodes are taken to be set up alike. Where it cannot be read: the kernel's default, nothing reserved.
    """
    low, high = 32768, 60999
    with contextlib.suppress(OSError, ValueError):
        low, high = map(int, (folder / "ip_local_port_range").read_text(encoding="ascii").split())
    reserved: set[int] = set()
    with contextlib.suppress(OSError, ValueError):
        for part in (folder / "ip_local_reserved_ports").read_text(encoding="ascii").split(","):
            first, _, last = part.strip().partition("-")
            if first:
                reserved.update(range(int(first), int(last or first) + 1))
    return OutgoingPorts(low, high, frozenset(reserved))


def _addresses(nodes: Iterable[str], address: str) -> dict[str, str]:
    return {node: address.replace("{node}", node) for node in nodes}


def _ips(addresses: Mapping[str, str], resolve: Resolve | None) -> dict[str, str]:
    # At once: where a name server does not answer, one name after the other takes minutes.
    with ThreadPoolExecutor(max_workers=32) as threads:
        found = threads.map(resolve or ip_of, addresses.values())
        return {node: ip for node, ip in zip(addresses, found, strict=True) if ip}


def _hosts(environ: Mapping[str, str], variable: str) -> tuple[str, ...]:
    try:
        return expand(environ.get(variable, ""))
    except ValueError as e:
        raise UsageError(f"{variable}: {e}") from None


def _cpus(environ: Mapping[str, str], suffix: str, nodes: int) -> list[int]:
    """Return the CPUs of each node: `16(x4),8` is four nodes with 16 and one with 8."""
    variable = f"SLURM_JOB_CPUS_PER_NODE{suffix}"
    text = environ.get(variable, "")
    cpus: list[int] = []
    for item in text.split(","):
        found = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", item)
        if found is None:
            raise UsageError(f"{variable}={text!r} is not a list such as 16(x4),8; say --cpus-per-node N")
        cpus += [int(found[1])] * int(found[2] or 1)
    if len(cpus) != nodes:
        raise UsageError(
            f"{variable}={text!r} is for {len(cpus)} nodes, and the job has {nodes}; say --cpus-per-node N"
        )
    return cpus


def _gpus(environ: Mapping[str, str], suffix: str, component: int) -> int:
    """Return the GPUs of a component's nodes, taken to be alike; 0 when the job has none, or nothing says how many."""
    asked = environ.get(f"SLURM_GPUS_PER_NODE{suffix}", "")  # "8", "h100:8", "a100:4,v100:2"
    numbers = [item.rpartition(":")[2] for item in asked.split(",")]
    if all(n.isdigit() for n in numbers):
        return sum(map(int, numbers))
    if component:
        return 0  # the other variables are about the node of the batch script, in the first component
    if environ.get("SLURM_GPUS_ON_NODE", "").isdigit():
        return int(environ["SLURM_GPUS_ON_NODE"])
    # Slurm 20.11 sets only this one: the numbers of the GPUs, "0,1,2,3" or "0-3".
    listed = environ.get("SLURM_JOB_GPUS", "")
    try:
        return len(expand(f"[{listed}]")) if listed else 0
    except ValueError:
        return 0
