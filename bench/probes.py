"""How long does a sweep over N endpoints take, and is a hung one seen in time while it holds up nobody?

    .venv/bin/python bench/probes.py [--endpoints 100,1000] [--hung 0,1,8] [--sweeps 10] [--hangs 3] [--json]

A sweep is the readiness of all endpoints, due at once: from `set_targets` until every endpoint that answers is proved.
A verdict is what a hang costs: all endpoints are probed for liveness, some stop answering, and each must reach the
threshold within `period + threshold * max(period, timeout)`; an endpoint that answers must never fail. These times are
a tenth of the defaults, so liveness takes ten times the CPU: where others want it too, the prober notices that it lags
and counts nothing meanwhile, and verdicts come late. The prober is the coordinator's own, in a fresh process for each
row. Then the HTTP clients that are importable, by themselves.

The endpoints are as many ports of one other process on loopback, which parses nothing and says what CPU it took.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import multiprocessing
import os
import platform
import resource
import ssl
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import httpx

from slurm_rollout.core.plan import ProbePolicy, ProbeRequest
from slurm_rollout.probes import Key, Prober, Target

BODY = json.dumps({"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]})
ANSWER = json.dumps({"model": "m", "choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}}]})
REQUEST = ProbeRequest(body=BODY)
TENTH = ProbePolicy(  # of the defaults
    request=REQUEST, liveness_period_s=1.5, liveness_timeout_s=3, liveness_failure_threshold=4
)
BOUND_S = TENTH.liveness_period_s + TENTH.liveness_failure_threshold * TENTH.liveness_timeout_s
AT_A_TIME = 100
PATIENCE_S = 60.0

Ask = Callable[[str], Awaitable[object]]

# ------------------------------------------------------------------------------------------------------------ engines


class Engine(asyncio.Protocol):
    """Answers every request the same way, or not at all; keeps a connection open unless it is asked to close it."""

    HEAD = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(ANSWER)}\r\n"
    KEEP = (HEAD + "\r\n" + ANSWER).encode()
    CLOSE = (HEAD + "connection: close\r\n\r\n" + ANSWER).encode()

    def __init__(self, number: int, hung: set[int]) -> None:
        self.number = number
        self.hung = hung
        self.closes = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.closes = self.closes or b"onnection: close\r\n" in data
        if self.number in self.hung or not data.endswith(b"}"):
            return
        self.transport.write(self.CLOSE if self.closes else self.KEEP)
        if self.closes:
            self.transport.close()


def serve(count: int, control: Connection) -> None:
    """Serve on `count` free ports and tell which. Then an int N hangs the last N; the answer is the CPU so far."""
    more_descriptors()
    hung: set[int] = set()

    def order() -> None:
        try:
            last = control.recv()
        except EOFError:
            sys.exit()  # whoever measured is gone
        hung.clear()
        hung.update(range(count - last, count))
        control.send(time.process_time())

    async def main() -> None:
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(lambda n=n: Engine(n, hung), "127.0.0.1", 0) for n in range(count)]  # type: ignore[misc]
        control.send([s.sockets[0].getsockname()[1] for s in servers])
        loop.add_reader(control.fileno(), order)
        await asyncio.Event().wait()

    asyncio.run(main())


@dataclass
class Engines:
    urls: list[str]
    control: Connection

    def hang(self, last: int) -> float:
        """The last so many endpoints hang from now on, the others answer; return the servers' CPU seconds so far."""
        self.control.send(last)
        return float(self.control.recv())


@contextmanager
def engines(count: int) -> Iterator[Engines]:
    more_descriptors()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    servers = context.Process(target=serve, args=(count, theirs), daemon=True)
    servers.start()
    theirs.close()
    try:
        yield Engines([f"http://127.0.0.1:{port}" for port in ours.recv()], ours)
    finally:
        servers.terminate()
        servers.join()


def more_descriptors() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


# ------------------------------------------------------------------------------------------------------------- prober


def probe(count: int, hung: int, sweeps: int, hangs: int) -> dict[str, Any]:
    """One row: `count` endpoints, `hung` of them hang."""
    before_mib = memory_mib()
    with engines(count) as servers:
        servers.hang(hung)
        found = [asyncio.run(sweep(servers, hung)) for _ in range(sweeps)]
        row: dict[str, Any] = {"endpoints": count, "hung": hung}
        row |= {what: [f[what] for f in found] for what in found[0]}
        row |= {"memory_before_mib": before_mib, "memory_most_mib": memory_mib()}
        servers.hang(0)
        if hung and hangs:
            row |= {"bound_s": BOUND_S} | asyncio.run(verdicts(servers, hung, hangs))
    return row


async def sweep(servers: Engines, hung: int) -> dict[str, float]:
    answering = len(servers.urls) - hung
    policy = ProbePolicy(request=REQUEST)
    wakes, done = 0, asyncio.Event()

    def wake() -> None:  # nothing more: what the coordinator does when it is woken is not measured here
        nonlocal wakes
        wakes += 1
        if wakes == answering:
            done.set()

    theirs_s = servers.hang(hung)
    async with Prober(wake=wake) as prober, asyncio.timeout(PATIENCE_S), longest_pause() as pause_s:
        wall, cpu = time.monotonic(), time.process_time()
        prober.set_targets({key(n): Target(url, policy, "startup") for n, url in enumerate(servers.urls)})
        await done.wait()
        wall_s, cpu_s = time.monotonic() - wall, time.process_time() - cpu
        theirs_s = servers.hang(hung) - theirs_s
        assert sum(endpoint(prober, n).proved for n in range(len(servers.urls))) == answering
    return {"wall_s": wall_s, "cpu_s": cpu_s, "servers_cpu_s": theirs_s, "pause_s": pause_s()}


async def verdicts(servers: Engines, hung: int, hangs: int) -> dict[str, Any]:
    """Hang the last endpoints and let them answer again, `hangs` times, at different moments of the period."""
    count, threshold = len(servers.urls), TENTH.liveness_failure_threshold
    seen_at: dict[int, float] = {}
    all_seen = asyncio.Event()

    def wake() -> None:
        for n in range(count - hung, count):
            if n not in seen_at and endpoint(prober, n).failures >= threshold:
                seen_at[n] = time.monotonic()
        if len(seen_at) == hung:
            all_seen.set()

    async def until_all_answer() -> None:
        while not all(endpoint(prober, n).answers for n in range(count)):  # noqa: ASYNC110  a look per wake costs more
            await asyncio.sleep(0.05)

    found: list[float] = []
    wall_s = cpu_s = 0.0
    async with Prober(wake=wake) as prober, asyncio.timeout(PATIENCE_S * hangs):
        prober.set_targets({key(n): Target(url, TENTH, "liveness") for n, url in enumerate(servers.urls)})
        for i in range(hangs):
            await until_all_answer()
            await asyncio.sleep(TENTH.liveness_period_s * i / hangs)
            seen_at.clear()
            all_seen.clear()
            hung_at, cpu = time.monotonic(), time.process_time()
            servers.hang(hung)
            await all_seen.wait()
            wall_s += time.monotonic() - hung_at
            cpu_s += time.process_time() - cpu
            found += [at - hung_at for at in seen_at.values()]
            wrong = [n for n in range(count - hung) if endpoint(prober, n).failures]
            assert not wrong, f"these answer: {wrong}"
            servers.hang(0)
    return {"verdict_s": found, "liveness_share_of_a_core": cpu_s / wall_s}


@asynccontextmanager
async def longest_pause() -> AsyncIterator[Callable[[], float]]:
    """For how long the event loop, asked for a turn every millisecond, gave none."""
    turns = [time.monotonic()]

    async def take_turns() -> None:
        while True:
            await asyncio.sleep(0.001)
            turns.append(time.monotonic())

    task = asyncio.create_task(take_turns())
    try:
        yield lambda: max(b - a for a, b in pairwise(turns))
    finally:
        task.cancel()


def key(number: int) -> Key:
    return Key(f"g/{number}", 1, 0)


def endpoint(prober: Prober, number: int) -> Any:
    return prober.endpoints(f"g/{number}", 1)[0]


def memory_mib() -> float:
    """The most that this process ever held. (ru_maxrss would begin with the parent's.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


# ------------------------------------------------------------------------------------------------------------ clients


def client(name: str, count: int, sweeps: int) -> dict[str, Any]:
    """One row: POST to each of `count` endpoints with one client, all at once and `AT_A_TIME` at a time."""
    make = CLIENTS[name]

    async def measure() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for width in (count, AT_A_TIME):
            turn = asyncio.Semaphore(width)

            async def ask_one(ask: Ask, url: str, turn: asyncio.Semaphore = turn) -> None:
                async with turn, asyncio.timeout(PATIENCE_S):
                    await ask(url)

            async with make() as ask:
                for _ in range(sweeps):
                    wall, cpu = time.monotonic(), time.process_time()
                    await asyncio.gather(*[ask_one(ask, url) for url in servers.urls])
                    how = "at_once" if width == count else "in_turn"
                    found.setdefault(f"{how}_wall_s", []).append(time.monotonic() - wall)
                    found.setdefault(f"{how}_cpu_s", []).append(time.process_time() - cpu)
        return found

    with engines(count) as servers:
        return {"client": name, "endpoints": count} | asyncio.run(measure())


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
HEADERS = {"content-type": "application/json"}
LAST = HEADERS | {"connection": "close"}


@asynccontextmanager
async def httpx_client(**settings: Any) -> AsyncIterator[Ask]:
    async with httpx.AsyncClient(timeout=PATIENCE_S, **settings) as shared:
        yield lambda url: shared.post(url, content=BODY, headers=LAST)


def httpx_tuned() -> Any:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx_client(verify=NO_TLS, trust_env=False, limits=limits)


def request(url: str, headers: dict[str, str]) -> httpx.Request:
    return httpx.Request("POST", url, content=BODY, headers=headers)


@asynccontextmanager
async def httpx_transport() -> AsyncIterator[Ask]:
    """What the prober does: the request is made once, the connection is made each time."""
    requests: dict[str, httpx.Request] = {}

    async def ask(url: str) -> bytes:
        if url not in requests:
            requests[url] = request(url, LAST)
        async with httpx.AsyncHTTPTransport(verify=NO_TLS) as transport:
            return await (await transport.handle_async_request(requests[url])).aread()

    yield ask


@asynccontextmanager
async def httpx_transport_kept() -> AsyncIterator[Ask]:
    async with AsyncExitStack() as stack:
        kept: dict[str, tuple[httpx.AsyncHTTPTransport, httpx.Request]] = {}

        async def ask(url: str) -> bytes:
            if url not in kept:
                transport = await stack.enter_async_context(httpx.AsyncHTTPTransport(verify=NO_TLS))
                kept[url] = transport, request(url, HEADERS)
            transport, its_request = kept[url]
            return await (await transport.handle_async_request(its_request)).aread()

        yield ask


@asynccontextmanager
async def aiohttp_client() -> AsyncIterator[Ask]:
    aiohttp = importlib.import_module("aiohttp")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:

        async def ask(url: str) -> object:
            async with session.post(url, data=BODY, headers=HEADERS) as answer:
                return await answer.read()

        yield ask


@asynccontextmanager
async def streams() -> AsyncIterator[Ask]:
    """The floor: it understands only the servers of this file."""
    head = f"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {len(BODY)}\r\nconnection: close\r\n\r\n"

    async def ask(url: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
        try:
            writer.write((head + BODY).encode())
            return await reader.read()
        finally:
            writer.close()

    yield ask


CLIENTS: dict[str, Callable[[], Any]] = {
    "httpx.AsyncClient, as it comes": httpx_client,
    "httpx.AsyncClient, tuned": httpx_tuned,
    "httpx's transport, one per request": httpx_transport,
    "httpx's transport, one per endpoint, connection kept": httpx_transport_kept,
    "aiohttp": aiohttp_client,
    "asyncio streams, no HTTP parser": streams,
}


def module(name: str) -> ModuleType | None:
    with suppress(ImportError):
        return importlib.import_module(name)
    return None


# ------------------------------------------------------------------------------------------------------------- report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoints", type=numbers, default=[100, 1000], metavar="N,…")
    parser.add_argument("--hung", type=numbers, default=[0, 1, 8], metavar="N,…", help="so many of the endpoints hang")
    parser.add_argument("--sweeps", type=int, default=10, help="sweeps of each row (default: 10); half for clients")
    parser.add_argument("--hangs", type=int, default=3, help="hangs of each row, 15 s each (default: 3; 0: none)")
    parser.add_argument("--json", action="store_true", help="every figure, for a script")
    args = parser.parse_args()

    found = measure(args)
    print(json.dumps(found) if args.json else "\n".join(tables(found)))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    aiohttp = module("aiohttp")
    found: dict[str, Any] = {
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "httpx": httpx.__version__,
        "aiohttp": aiohttp and aiohttp.__version__,
        "load_before": os.getloadavg()[0],
    }
    found["prober"] = [
        alone(probe, count, hung, args.sweeps, args.hangs) for count in args.endpoints for hung in args.hung
    ]
    names = [name for name in CLIENTS if aiohttp or name != "aiohttp"]
    found["clients"] = [alone(client, name, max(args.endpoints), max(1, args.sweeps // 2)) for name in names]
    found["load_after"] = os.getloadavg()[0]
    return found


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def alone(work: Callable[..., dict[str, Any]], *args: object) -> dict[str, Any]:
    """Return what `work` finds in a process of its own, so that no row inherits another's memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(theirs, work, args))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        raise SystemExit("bench/probes.py: no figures; are the CPUs busy with something else? See `uptime`.") from None
    finally:
        process.join()
    print(".", end="", file=sys.stderr, flush=True)
    return found


def tell(found: Connection, work: Callable[..., dict[str, Any]], args: tuple[object, ...]) -> None:
    found.send(work(*args))


def tables(found: dict[str, Any]) -> Iterator[str]:
    aiohttp = f"aiohttp {found['aiohttp']}" if found["aiohttp"] else "aiohttp is not installed and was left out"
    yield f"{found['cpus']} CPUs, Python {found['python']}, httpx {found['httpx']}, {aiohttp};"
    yield f"load {found['load_before']:.2f} before, {found['load_after']:.2f} after. Median (min to max)."
    yield ""
    yield (
        "| endpoints | of them hung | sweep | its CPU | the servers' CPU | longest pause of the loop"
        f" | most memory (before) | verdict, bound {BOUND_S:g} s | liveness CPU |"
    )
    yield "|" + "---|" * 9
    for r in found["prober"]:
        share = f"{r['liveness_share_of_a_core']:.0%} of a core" if r.get("verdict_s") else "–"
        yield (
            f"| {r['endpoints']:,} | {r['hung']} | {spread(r['wall_s'])} | {spread(r['cpu_s'])}"
            f" | {statistics.median(r['servers_cpu_s']):.2f} s | {spread(r['pause_s'])}"
            f" | {r['memory_most_mib']:.0f} ({r['memory_before_mib']:.0f}) MiB"
            f" | {spread(r.get('verdict_s', ()))} | {share} |"
        )
    yield ""
    count = found["clients"][0]["endpoints"]
    yield f"| {count:,} requests | all at once | CPU | {AT_A_TIME} at a time | CPU |"
    yield "|---|---|---|---|---|"
    for r in found["clients"]:
        kinds = ("at_once_wall_s", "at_once_cpu_s", "in_turn_wall_s", "in_turn_cpu_s")
        yield f"| {r['client']} | " + " | ".join(spread(r.get(kind, ())) for kind in kinds) + " |"


def spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
