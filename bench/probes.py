"""How long does a sweep over N endpoints take, and does a hung one hold up the others?

    python bench/probes.py [N ...]         default: 100 1000

The endpoints are as many ports of one other process on loopback. First what httpx alone needs, by the way it is
called; then the prober itself, from `set_targets` until every endpoint that answers is proved; then detection of hung
endpoints. CPU is this process's own; on a machine with two cores the servers take the other one.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import resource
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection

import httpx

from slurm_rollout.core.plan import ProbePolicy, ProbeRequest
from slurm_rollout.probes import Key, Prober, Target

BODY = json.dumps({"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]})
ANSWER = json.dumps({"model": "m", "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}}]})
HEADERS = {"content-type": "application/json", "connection": "close"}
SWEEPS = 3


class Engine(asyncio.Protocol):
    """Answers every request the same way, or not at all."""

    def __init__(self, hung: bool) -> None:
        self.hung = hung

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.hung and data.endswith(b"}"):
            head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(ANSWER)}\r\nconnection: close\r\n\r\n"
            self.transport.write((head + ANSWER).encode())
            self.transport.close()


def serve(answering: int, hung: int, ports: Connection) -> None:
    more_descriptors()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        kinds = [False] * answering + [True] * hung
        servers = [await loop.create_server(lambda h=h: Engine(h), "127.0.0.1", 0) for h in kinds]  # type: ignore[misc]
        ports.send([s.sockets[0].getsockname()[1] for s in servers])
        await asyncio.Event().wait()

    asyncio.run(main())


def more_descriptors() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def clients(urls: list[str]) -> None:
    """httpx by itself: the fastest of some sweeps."""
    no_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def client() -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        return httpx.AsyncClient(verify=no_tls, trust_env=False, timeout=None, limits=limits)

    async def bare(url: str) -> bytes:
        async with httpx.AsyncHTTPTransport(verify=no_tls, trust_env=False) as transport:
            response = await transport.handle_async_request(httpx.Request("POST", url, content=BODY, headers=HEADERS))
            return await response.aread()

    async with AsyncExitStack() as stack:
        shared = await stack.enter_async_context(client())
        own = {url: await stack.enter_async_context(client()) for url in urls}
        ways: dict[str, Callable[[str], Awaitable[object]]] = {
            "one AsyncClient, no keep-alive": lambda url: shared.post(url, content=BODY, headers=HEADERS),
            "an AsyncClient per endpoint": lambda url: own[url].post(url, content=BODY, headers=HEADERS),
            "a transport per request": bare,
        }
        for name, ask in ways.items():
            best = min([await timed(asyncio.gather(*map(ask, urls))) for _ in range(SWEEPS)])
            report(f"httpx: {name}", len(urls), *best)


async def timed(work: Awaitable[object]) -> tuple[float, float]:
    wall, cpu = time.monotonic(), time.process_time()
    await work
    return time.monotonic() - wall, time.process_time() - cpu


async def prober_sweep(urls: list[str], answering: int) -> None:
    """Readiness of all, in one go: the endpoints behind the first `answering` URLs answer, the others hang."""
    policy = ProbePolicy(request=ProbeRequest(body=BODY), model="")
    changed = asyncio.Event()

    async def sweep() -> None:
        async with Prober(wake=changed.set) as prober:
            prober.set_targets({Key("g", 1, rank): Target(url, policy, "startup") for rank, url in enumerate(urls)})
            while sum(e.proved for e in prober.endpoints("g", 1)) < answering:
                changed.clear()
                await changed.wait()

    best = min([await timed(sweep()) for _ in range(SWEEPS)])
    report(f"prober: all proved, {len(urls) - answering} hung beside them", answering, *best)


async def prober_detection(urls: list[str], answering: int) -> None:
    """From the switch to liveness until each of the hung endpoints reached the threshold."""
    policy = ProbePolicy(
        request=ProbeRequest(body=BODY), liveness_period_s=3, liveness_timeout_s=3, liveness_failure_threshold=2
    )
    hung, changed = len(urls) - answering, asyncio.Event()

    async def detect() -> None:
        async with Prober(wake=changed.set) as prober:
            prober.set_targets({Key("g", 1, rank): Target(url, policy, "liveness") for rank, url in enumerate(urls)})
            failed: set[int] = set()
            while len(failed) < hung:
                await changed.wait()
                changed.clear()
                failed = {e.rank for e in prober.endpoints("g", 1) if e.failures >= policy.liveness_failure_threshold}
            wrong = failed - set(range(answering, len(urls)))
            assert not wrong, f"these answer: {wrong}"

    wall, cpu = await timed(detect())
    report(f"prober: {hung} hung seen (period and time-out 3 s, threshold 2: bound 9 s)", len(urls), wall, cpu)


def report(what: str, count: int, wall_s: float, cpu_s: float) -> None:
    print(f"{what:70} {count:5} endpoints  wall {wall_s:6.3f} s  cpu {cpu_s:6.3f} s", flush=True)


def main() -> None:
    more_descriptors()
    context = multiprocessing.get_context("spawn")
    for count in [int(a) for a in sys.argv[1:]] or [100, 1000]:
        receiver, sender = context.Pipe(duplex=False)
        servers = context.Process(target=serve, args=(count, 8, sender), daemon=True)
        servers.start()
        urls = [f"http://127.0.0.1:{port}" for port in receiver.recv()]
        try:
            asyncio.run(clients(urls[:count]))
            for hung in (0, 1, 8):
                asyncio.run(prober_sweep(urls[: count + hung], count))
            for hung in (1, 8):
                asyncio.run(prober_detection(urls[: count + hung], count))
        finally:
            servers.terminate()
            servers.join()
    print(f"memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB at most")


if __name__ == "__main__":
    main()
