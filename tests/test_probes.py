"""The prober against real servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from slurm_rollout.core.model import Endpoint
from slurm_rollout.core.plan import Counter, ProbePolicy, ProbeRequest
from slurm_rollout.ports_check import connectable, open_ports
from slurm_rollout.probes import Key, Prober, Target

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
METRICS = "/metrics"

POLICY = ProbePolicy(
    request=ProbeRequest(body=json.dumps({"model": "m", "max_tokens": 1})),
    startup_period_s=0.1,
    startup_request_timeout_s=0.2,
    liveness_period_s=0.2,
    liveness_timeout_s=0.2,
    liveness_failure_threshold=3,
)
BOUND_S = 0.2 + 3 * 0.2
# Of engines that answer: a server here shares its loop with the prober, and a busy machine stalls both.
PATIENT = replace(POLICY, startup_request_timeout_s=10, liveness_timeout_s=10)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def http(status: int, content: object = None, *, raw: bytes = b"", headers: str = "") -> bytes:
    body = raw or (b"" if content is None else json.dumps(content).encode())
    head = f"HTTP/1.1 {status} X\r\n{headers}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


GOOD_CHAT = http(200, {"model": "m", "choices": [{"index": 0, "message": {"content": "a"}}]})
GOOD_MODELS = http(200, {"data": [{"id": "m"}]})


class Engine:
    """A server whose habits can be changed while it runs. An answer of None: it hangs until the other side leaves."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | None] = {CHAT: GOOD_CHAT, MODELS: GOOD_MODELS}
        self.delay_s = 0.0
        self.drips = False
        self.tokens: Callable[[], float] | None = None
        self.asked: list[str] = []
        self.asked_at: list[float] = []
        self.waiting = 0
        self.url = ""
        self._talks: set[asyncio.Task[None]] = set()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        self.waiting += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            path = head.split()[1]
            if "content-length: " in head:
                await reader.readexactly(int(head.split("content-length: ")[1].split()[0]))
            self.asked.append(path)
            self.asked_at.append(time.monotonic())
            reply = self.answers.get(path, http(404))
            if path == METRICS and self.tokens is not None:
                reply = http(200, raw=f"# TYPE tokens counter\ntokens {self.tokens()}\n".encode())
            await asyncio.sleep(self.delay_s)
            if reply is None:
                await reader.read()
                return
            writer.write(reply)
            while self.drips and not writer.is_closing():
                writer.write(b" ")
                await asyncio.sleep(0.02)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.waiting -= 1
            self._talks.discard(task)
            writer.close()

    async def close(self) -> None:
        if self._talks:  # they end when the other side leaves
            await asyncio.wait(self._talks, timeout=5)


@contextlib.asynccontextmanager
async def engines(count: int, port: int = 0) -> AsyncIterator[list[Engine]]:
    async with contextlib.AsyncExitStack() as stack:
        made = [Engine() for _ in range(count)]
        for engine in made:
            server = await asyncio.start_server(engine.talk, "127.0.0.1", port)
            stack.callback(server.close)
            stack.push_async_callback(engine.close)
            engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield made


async def until(holds: Callable[[], object], changed: asyncio.Event | None = None) -> None:
    """Look after each wake-up, and now and then."""
    changed = changed or asyncio.Event()
    async with asyncio.timeout(10):
        while not holds():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), 0.01)
            changed.clear()


class Watched:
    """A prober of one group, and all that its endpoints went through."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.prober = Prober(wake=self.wake)
        self.wakes = 0

    def wake(self) -> None:
        self.wakes += 1
        self.changed.set()

    def probe(self, *targets: Target, incarnation: int = 1) -> None:
        self.prober.set_targets({Key("actor/0", incarnation, rank): t for rank, t in enumerate(targets)})

    def seen(self, rank: int = 0) -> Endpoint:
        return self.prober.endpoints("actor/0", 1)[rank]

    async def until(self, holds: Callable[[], object]) -> None:
        await until(holds, self.changed)


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[Watched]:
    watch = Watched()
    async with watch.prober:
        yield watch
    assert not [t for t in asyncio.all_tasks() if "Prober" in repr(t)], "aclose ended every task"


def startup(engine: Engine, policy: ProbePolicy = POLICY) -> Target:
    return Target(engine.url, policy, "startup")


def liveness(engine: Engine, policy: ProbePolicy = POLICY) -> Target:
    return Target(engine.url, policy, "liveness")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


# ------------------------------------------------------------------------------------------------------------ startup


async def test_a_planned_model_is_looked_up_once_and_one_complete_answer_proves() -> None:
    async with engines(1) as (engine,), watched() as watch:
        engine.answers[CHAT] = http(503, raw=b"warming up")
        watch.probe(startup(engine, replace(PATIENT, model="m")))
        await watch.until(lambda: engine.asked.count(CHAT) >= 3)
        assert watch.wakes == 0, "a starting engine that says no is nobody's news"
        assert watch.seen().last_error == "HTTP 503: warming up"

        engine.answers[CHAT] = GOOD_CHAT
        await watch.until(lambda: watch.seen().proved)

        assert watch.wakes == 1
        assert engine.asked[:2] == [MODELS, CHAT]
        assert engine.asked.count(MODELS) == 1
        assert watch.seen() == Endpoint(rank=0, proved=True, answers=True)


async def test_readiness_is_not_asked_again_once_it_is_proved() -> None:
    async with engines(2) as (engine, slow), watched() as watch:
        slow.answers[CHAT] = None
        watch.probe(startup(engine, PATIENT), startup(slow))
        await watch.until(lambda: watch.seen().proved and len(slow.asked) >= 2)

        assert engine.asked == [CHAT]


async def test_an_engine_that_listens_later_is_proved_then() -> None:
    port = free_port()
    async with watched() as watch:
        watch.probe(Target(f"http://127.0.0.1:{port}", POLICY, "startup"))
        await watch.until(lambda: watch.seen().last_error == "Connection refused")
        async with engines(1, port):
            await watch.until(lambda: watch.seen().proved)


async def test_another_model_is_a_mismatch_and_not_asked_again() -> None:
    async with engines(2) as (wrong, hung), watched() as watch:
        wrong.answers[MODELS] = http(200, {"data": [{"id": "other"}]})
        hung.answers[CHAT] = None
        watch.probe(startup(wrong, replace(PATIENT, model="m")), startup(hung))
        await watch.until(lambda: watch.seen().mismatch and len(hung.asked) >= 2)

        assert watch.seen().mismatch == "serves 'other', planned is 'm'"
        assert not watch.seen().proved
        assert wrong.asked == [MODELS]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (http(200, raw=b"x"), "HTTP 200, but not a JSON object: x"),
        (http(200, {"choices": []}), "HTTP 200, but no 'choices' in the answer"),
        (http(302, headers="location: /good\r\n"), "HTTP 302: (empty)"),
        (http(200, raw=b"[" + b" " * (1 << 20) + b"]"), "HTTP 200 with more than 1 MiB of answer"),
        (http(500, raw=b"CUDA error\n  at line 1"), "HTTP 500: CUDA error at line 1"),
        (b"", "Server disconnected without sending a response."),
        (b"\x00\xff\r\n\r\n", "illegal status line"),
        (b"HTTP/1.1 200 X\r\ncontent-length: 100\r\n\r\n{", "peer closed connection"),
        (b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "illegal chunk header"),
        (b"HTTP/1.1 200 X\r\nx: " + b"a" * 200_000 + b"\r\n\r\n", "Receive buffer too long"),
        (None, "no answer within 0.2 s"),
    ],
    ids=["byte", "empty", "redirect", "huge", "500", "closed", "binary", "cut", "chunks", "header", "hang"],
)
async def test_what_is_not_the_asked_for_answer_proves_nothing(reply: bytes | None, error: str) -> None:
    async with engines(1) as (engine,), watched() as watch:
        engine.answers |= {CHAT: reply, "/good": GOOD_CHAT}
        watch.probe(startup(engine, POLICY if reply is None else PATIENT))
        await watch.until(lambda: watch.seen().last_error)

        assert watch.seen().last_error.startswith(error)
        assert not watch.seen().proved
        assert watch.seen().refusals == (0 if reply is None else 1)
        assert set(engine.asked) <= {CHAT}


async def test_one_deadline_holds_for_a_server_that_drips() -> None:
    async with engines(1) as (engine,), watched() as watch:
        engine.answers[CHAT] = b"HTTP/1.1 200 X\r\ncontent-length: 100000\r\n\r\n{"
        engine.drips = True
        watch.probe(startup(engine))
        await watch.until(lambda: watch.seen().last_error)

        assert watch.seen().last_error == "no answer within 0.2 s"


async def test_proxy_variables_of_the_site_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    async with engines(1) as (engine,), watched() as watch:
        watch.probe(startup(engine))
        await watch.until(lambda: watch.seen().proved)


# ----------------------------------------------------------------------------------------------------------- liveness


async def test_hung_engines_are_seen_within_the_bound_eight_at_once_and_nobody_else_is_held_up() -> None:
    async with engines(9) as made, watched() as watch:
        healthy, *hung = made
        for engine in hung:
            engine.answers[CHAT] = None
        at_once = [0]
        began_at = time.monotonic()
        watch.probe(liveness(healthy, PATIENT), *map(liveness, hung))

        def all_failed() -> bool:
            at_once.append(sum(e.waiting > 0 for e in hung))
            return all(watch.seen(rank).failures >= 3 for rank in range(1, 9))

        await watch.until(all_failed)

        assert time.monotonic() - began_at < BOUND_S + 3, "one after another, they take 4.8 s"
        assert max(at_once) == 8
        gaps_s = [b - a for e in hung for a, b in pairwise(e.asked_at)]
        assert min(gaps_s) < 0.3, "the next probe starts a period after the last one started"
        assert all(e.asked_at[-1] - began_at >= (len(e.asked_at) - 1) * POLICY.liveness_period_s for e in made)
        assert watch.seen(0).failures == watch.seen(0).refusals == 0
        assert len(healthy.asked) >= 3
        assert all(watch.seen(rank).refusals == 0 for rank in range(1, 9))


async def test_a_late_engine_whose_counter_rises_is_slow_and_never_failed() -> None:
    policy = replace(POLICY, counter=Counter(name="tokens"), liveness_timeout_s=2)
    async with engines(1) as (engine,), watched() as watch:
        engine.answers[CHAT] = None
        engine.tokens = time.monotonic
        failures: list[int] = []
        watch.probe(liveness(engine, policy))

        def two_were_late() -> bool:
            failures.append(watch.seen().failures)
            return engine.asked.count(CHAT) >= 3

        await watch.until(two_were_late)

        assert watch.seen().slow
        assert set(failures) == {0}
        assert watch.seen().last_error == "no answer within 2 s"

        engine.answers[CHAT] = GOOD_CHAT
        await watch.until(lambda: not watch.seen().slow)


async def test_a_late_engine_whose_counter_stands_fails() -> None:
    async with engines(2) as (engine, deaf), watched() as watch:
        engine.answers[CHAT] = None
        engine.tokens = lambda: 7.0
        deaf.answers |= {CHAT: None, METRICS: None}
        watch.probe(*(liveness(e, replace(POLICY, counter=Counter(name="tokens"))) for e in (engine, deaf)))
        await watch.until(lambda: watch.seen(0).failures >= 2 and watch.seen(1).failures >= 2)

        assert (watch.seen(0).last_counter, watch.seen(1).last_counter) == (7.0, None)
        assert METRICS in deaf.asked
        assert not watch.seen().slow


async def test_the_counter_is_not_asked_for_while_the_engine_answers() -> None:
    async with engines(1) as (engine,), watched() as watch:
        engine.tokens = time.monotonic
        watch.probe(liveness(engine, replace(PATIENT, counter=Counter(name="tokens"))))
        await watch.until(lambda: len(engine.asked) >= 3)

        assert METRICS not in engine.asked


async def test_a_probe_counts_when_the_engine_hung_early_in_it() -> None:
    """Busy engines, so that every probe is late. Each hangs during its first one: before the looks, between them."""
    policy = replace(POLICY, counter=Counter(name="tokens"), liveness_timeout_s=2)
    probes: dict[int, int] = {}
    async with engines(2) as made, watched() as watch:

        def progress(engine: Engine, looks: int) -> Callable[[], float]:
            return lambda: min(engine.asked.count(METRICS), looks)

        for looks, engine in enumerate(made, start=1):
            engine.answers[CHAT] = None
            engine.tokens = progress(engine, looks)
        watch.probe(*(liveness(e, policy) for e in made))

        def both_failed_twice() -> bool:
            for rank, engine in enumerate(made):
                if watch.seen(rank).failures == 2 and rank not in probes:
                    last_look = len(engine.asked) - engine.asked[::-1].index(METRICS)
                    probes[rank] = engine.asked[:last_look].count(CHAT)
            return len(probes) == 2

        await watch.until(both_failed_twice)

        began_at = watch.seen(0).first_failure_at
        looked_at = [at for path, at in zip(made[0].asked, made[0].asked_at, strict=True) if path == METRICS]

    assert probes == {0: 2, 1: 3}
    assert began_at is not None
    assert 1.0 <= looked_at[0] - began_at < 1.5 <= looked_at[1] - began_at


async def test_an_engine_that_says_no_is_refused_at_once() -> None:
    async with engines(1) as (engine,), watched() as watch:
        watch.probe(startup(engine))
        await watch.until(lambda: watch.seen().proved)
        engine.answers[CHAT] = http(503, raw=b"engine is dead")
        watch.probe(liveness(engine, PATIENT))
        await watch.until(lambda: watch.seen().failures >= 2)
        assert watch.seen().refusals == watch.seen().failures
        assert watch.seen().proved

        engine.answers[CHAT] = GOOD_CHAT
        await watch.until(lambda: watch.seen() == Endpoint(rank=0, proved=True, answers=True))


async def test_a_closed_port_is_a_refusal() -> None:
    async with watched() as watch:
        watch.probe(Target(f"http://127.0.0.1:{free_port()}", PATIENT, "liveness"))
        await watch.until(lambda: watch.seen().failures >= 2)

        assert watch.seen().refusals >= 2
        assert watch.seen().last_error == "Connection refused"


# ------------------------------------------------------------------------------------------------------------ targets


async def test_wanted_targets_are_probed_and_no_others() -> None:
    async with engines(2) as (one, two), watched() as watch:
        watch.probe(liveness(one), liveness(two))
        await watch.until(lambda: one.asked and two.asked)
        watch.probe(liveness(one))
        asked = len(two.asked)
        enough = len(one.asked) + 2
        await watch.until(lambda: len(one.asked) >= enough)

        assert len(two.asked) <= asked + 1  # at most the one that was on its way
        assert len(watch.prober.endpoints("actor/0", 1)) == 2, "what was learnt stays until it is forgotten"


async def test_the_same_targets_again_start_nothing_again() -> None:
    async with engines(1) as (engine,), watched() as watch:
        engine.delay_s = 0.1
        watch.probe(startup(engine, PATIENT))

        def proved_while_wanted_again_and_again() -> bool:
            watch.probe(startup(engine, PATIENT))
            return watch.seen().proved

        await watch.until(proved_while_wanted_again_and_again)

        assert engine.asked == [CHAT]


async def test_many_that_are_due_at_once_start_a_few_at_a_time_and_a_hung_one_takes_nobody_s_place() -> None:
    async with engines(1) as (engine,), watched() as watch:
        engine.answers[CHAT] = None
        begun = [0]
        loop = asyncio.get_running_loop()

        def look_in_each_pass() -> None:
            begun.append(engine.waiting)
            if engine.waiting < 200:
                loop.call_soon(look_in_each_pass)

        look_in_each_pass()
        watch.probe(*[startup(engine, replace(POLICY, startup_request_timeout_s=60))] * 200)
        await watch.until(lambda: begun[-1] == 200)

        assert max(b - a for a, b in pairwise(begun)) <= 20


async def test_one_that_is_not_wanted_any_more_leaves_the_queue_to_the_others() -> None:
    async with engines(2) as (left, engine), watched() as watch:
        watch.probe(*[startup(left)] * 20, startup(engine))
        await asyncio.sleep(0)  # they queue up
        watch.prober.set_targets({Key("actor/0", 1, 20): startup(engine)})
        await watch.until(lambda: watch.seen(20).proved)

        assert left.asked == []


async def test_forget_and_a_newer_incarnation_drop_what_was_learnt() -> None:
    async with engines(1) as (engine,), watched() as watch:
        watch.probe(startup(engine))
        await watch.until(lambda: watch.seen().proved)
        watch.probe(startup(engine), incarnation=2)
        assert watch.prober.endpoints("actor/0", 1) == ()
        assert watch.prober.endpoints("actor/0", 2) == (Endpoint(rank=0),)
        watch.prober.forget("actor/0")
        assert watch.prober.endpoints("actor/0", 2) == ()
        assert watch.prober.endpoints("other/0", 1) == ()
        watch.probe(startup(engine), incarnation=2)
        await watch.until(lambda: watch.prober.endpoints("actor/0", 2)[0].proved)


async def test_a_hung_request_ends_with_its_target() -> None:
    async with engines(1) as (engine,), watched() as watch:
        engine.answers[CHAT] = None
        watch.probe(startup(engine, replace(POLICY, startup_request_timeout_s=60)))
        await watch.until(lambda: engine.waiting)
        watch.probe()
        await watch.until(lambda: not engine.waiting)


async def test_a_task_that_broke_is_not_passed_over() -> None:
    async with watched() as watch:
        target = Target("http://[::1", POLICY, "startup")
        watch.probe(target)
        await asyncio.sleep(0)
        with pytest.raises(Exception, match="Invalid port"):
            watch.probe(target)


# ---------------------------------------------------------------------------------------------------------------- lag

CHILD = """
import asyncio, json, sys
from dataclasses import asdict
from slurm_rollout.core.plan import Counter, ProbePolicy, ProbeRequest
from slurm_rollout.probes import Key, Prober, Target

async def main():
    policy = ProbePolicy(request=ProbeRequest(body="{}"), counter=Counter(name="tokens"),
                         liveness_period_s=0.3, liveness_timeout_s=1.0)
    targets = {Key("actor/0", 1, rank): Target(url, policy, "liveness") for rank, url in enumerate(sys.argv[1:])}
    news = []
    async with Prober(wake=lambda: news.extend(map(asdict, prober.endpoints("actor/0", 1)))) as prober:
        prober.set_targets(targets)
        await asyncio.to_thread(sys.stdin.read)
    print(json.dumps(news))

asyncio.run(main())
"""


async def test_a_stopped_coordinator_counts_nothing_against_the_engines() -> None:
    async with engines(8) as made, asyncio.timeout(20):
        for engine in made:
            engine.delay_s = 0.1  # so that probes are under way whenever it is stopped
            engine.tokens = lambda: 7.0
        pipe = asyncio.subprocess.PIPE
        urls = [e.url for e in made]
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, *urls, stdin=pipe, stdout=pipe)
        try:
            await until(lambda: min(len(e.asked) for e in made) >= 1 and sum(e.waiting for e in made) >= 2)
            os.kill(child.pid, signal.SIGSTOP)
            await asyncio.sleep(2.0)  # the length of the stop is what is tested
            before = [len(e.asked) for e in made]
            os.kill(child.pid, signal.SIGCONT)
            await until(lambda: all(len(e.asked) >= n + 2 for e, n in zip(made, before, strict=True)))
            news, _ = await child.communicate(b"")
        finally:
            if child.returncode is None:
                child.kill()
            await child.wait()

    for endpoint in json.loads(news):
        assert endpoint == asdict(Endpoint(rank=endpoint["rank"], answers=endpoint["answers"]))


@pytest.mark.parametrize("under_way", [True, False], ids=["a probe under way", "between probes"])
async def test_a_blocked_loop_counts_nothing_against_the_engines_and_gives_them_a_period(under_way: bool) -> None:
    policy = replace(POLICY, liveness_period_s=0.25, liveness_timeout_s=0.5)
    async with engines(1) as (engine,), watched() as watch:
        engine.delay_s = 0.1
        watch.probe(liveness(engine, policy))
        await watch.until(lambda: watch.seen().answers)
        if under_way:
            await watch.until(lambda: engine.waiting)
        time.sleep(1.0)  # noqa: ASYNC251
        ended_at, asked = time.monotonic(), len(engine.asked)
        await watch.until(lambda: len(engine.asked) > asked)

        assert engine.asked_at[-1] - ended_at >= policy.liveness_period_s
        await watch.until(lambda: not engine.waiting)
        assert watch.wakes == 1, "nothing changed after the first answer"


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_coordinator_without_descriptors_counts_nothing_against_the_engines() -> None:
    async with engines(1) as (engine,), watched() as watch:
        watch.probe(liveness(engine))
        await watch.until(lambda: watch.seen().answers)
        with no_descriptor_left():
            await watch.until(lambda: watch.seen().last_error)
            assert watch.seen() == Endpoint(rank=0, answers=True, last_error="Too many open files")
        await watch.until(lambda: watch.seen() == Endpoint(rank=0, answers=True))


async def test_a_counter_that_this_host_cannot_read_says_nothing_either() -> None:
    """Where hung requests took the last descriptors, a late engine cannot be asked whether it progresses."""
    async with engines(1) as (engine,), watched() as watch:
        engine.answers[CHAT] = None
        watch.probe(liveness(engine, replace(POLICY, counter=Counter(name="tokens"), liveness_timeout_s=1)))
        await watch.until(lambda: engine.waiting)
        with no_descriptor_left():
            await watch.until(lambda: watch.seen().last_error)
            assert watch.seen() == Endpoint(rank=0, last_error="no answer within 1 s")


# -------------------------------------------------------------------------------------------------------------- ports


async def test_a_port_that_accepts_is_open_and_one_that_refuses_is_not() -> None:
    closed = free_port()
    async with engines(1) as (engine,):
        port = int(engine.url.rpartition(":")[2])

        assert await connectable("127.0.0.1", port, 1) is True
        assert await connectable("127.0.0.1", closed, 1) is False
        assert await open_ports([("127.0.0.1", closed), ("127.0.0.1", port)]) == (f"127.0.0.1:{port}",)
        assert await open_ports([("127.0.0.1", closed)]) == ()


async def test_ports_that_do_not_answer_are_not_open_and_are_tried_in_parallel() -> None:
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        for _ in range(8):  # Linux drops what comes after a full backlog
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(address)
        began_at = time.monotonic()

        assert await open_ports([address] * 20, timeout_s=0.3) == ()
        assert 0.3 <= time.monotonic() - began_at < 5, "one after another, they take 6 s"


async def test_trouble_of_this_host_is_not_an_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    with no_descriptor_left():
        assert await connectable("127.0.0.1", 1, 1) is None
        assert await open_ports([("127.0.0.1", 1)]) is None

    async def unresolved(*_: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(asyncio, "open_connection", unresolved)
    assert await connectable("n1", 1, 1) is None

    async def stopped(*_: object) -> None:
        time.sleep(0.6)  # noqa: ASYNC251
        await asyncio.sleep(5)

    monkeypatch.setattr(asyncio, "open_connection", stopped)
    assert await connectable("n1", 1, 0.1) is None


async def test_a_connection_to_itself_is_no_open_port(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = asyncio.open_connection

    async def from_the_same_port(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await connect(host, port, local_addr=(host, port))

    monkeypatch.setattr(asyncio, "open_connection", from_the_same_port)
    assert await connectable("127.0.0.1", free_port(), 1) is False


# -------------------------------------------------------------------------------------------------------------- pauses


async def test_paused_engines_are_asked_nothing_and_what_failed_before_counts_on() -> None:
    """Else a hang would never be noticed by a trainer that pauses probes in each of its steps."""
    async with engines(1) as (engine,), watched() as watch:
        engine.answers[CHAT] = None
        watch.probe(liveness(engine))
        await watch.until(lambda: watch.seen().failures >= 1)

        watch.prober.pause({"actor/0"})
        await watch.until(lambda: watch.prober.is_quiet("actor/0"))
        before, asked = watch.seen().failures, len(engine.asked)
        await asyncio.sleep(3 * POLICY.liveness_period_s)  # in which it would be asked thrice
        assert len(engine.asked) == asked

        watch.prober.pause(set())
        await watch.until(lambda: watch.seen().failures > before)
        assert watch.seen().failures == before + 1


async def test_a_probe_on_its_way_is_waited_for_and_counts() -> None:
    async with engines(1) as (engine,), watched() as watch:
        engine.answers[CHAT] = None
        watch.probe(liveness(engine, replace(POLICY, liveness_timeout_s=2)))
        await watch.until(lambda: engine.waiting)

        watch.prober.pause({"actor/0"})
        assert not watch.prober.is_quiet("actor/0"), "a request is on its way"
        watch.wakes = 0
        await watch.until(lambda: watch.prober.is_quiet("actor/0"))

        assert watch.wakes, "somebody waits for this"
        await watch.until(lambda: engine.waiting == 0)  # it hears a little later that nobody listens any more
        assert watch.seen().failures == 1


async def test_after_a_pause_one_full_period_passes() -> None:
    policy = replace(POLICY, liveness_period_s=0.4)
    async with engines(1) as (engine,), watched() as watch:
        watch.probe(liveness(engine, policy))
        await watch.until(lambda: watch.seen().answers)
        watch.prober.pause({"actor/0"})
        assert not watch.seen().answers
        await watch.until(lambda: watch.prober.is_quiet("actor/0"))
        engine.asked.clear()
        resumed_at = time.monotonic()
        watch.prober.pause(set())
        await watch.until(lambda: engine.asked)
        assert engine.asked_at[-1] - resumed_at >= policy.liveness_period_s - 0.01


async def test_only_what_is_named_rests_and_starting_engines_are_asked_all_the_same() -> None:
    async with engines(2) as (resting, starting), watched() as watch:
        watch.prober.pause({"actor/0"})
        watch.prober.set_targets(
            {
                Key("actor/0", 1, 0): liveness(resting),
                Key("actor/0", 1, 1): startup(starting),
                Key("reward/0", 1, 0): liveness(starting),
            }
        )
        await watch.until(lambda: watch.seen(1).proved and len(starting.asked) >= 3)
        assert not resting.asked
        assert not watch.prober.is_quiet("reward/0")
