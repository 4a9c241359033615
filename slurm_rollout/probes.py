"""Asks the entrypoints whether they serve: readiness of starting engines, liveness of ready ones.

Every target has its own task, every request its own connection and one deadline, so a hung engine holds up nobody.
What answers mean is in `core.health`. Requests go through httpx's transport, without its client: that is faster, and
neither redirects nor proxy variables nor cookies can come in between. A connection is never used twice, because servers
drop idle ones after about a probe's period (uvicorn: 5 s), and a probe should see that a new one is accepted.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import math
import os
import socket
import ssl
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Set
from contextlib import aclosing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, NamedTuple, Self

import httpx

from slurm_rollout.core.health import ProbeResult, Verdict, counter_value, fold, judge, judge_models, one_line, rested
from slurm_rollout.core.model import Endpoint
from slurm_rollout.core.plan import ProbePolicy
from slurm_rollout.ports_check import OWN_TROUBLE

if importlib.util.find_spec("sniffio") is None:
    # httpcore 1.0 tries this import six times per request, and newer anyio does not bring the module along: to search
    # the path for it was a third of a probe's CPU time (bench/probes.py). The import fails as before, only at once.
    sys.modules["sniffio"] = None  # type: ignore[assignment]

MAX_ANSWER_BYTES = 1 << 20
MAX_METRICS_BYTES = 16 << 20  # the page of an engine with many data-parallel ranks has megabytes
FIRST_PAUSE_S = 0.05  # between readiness checks; doubles up to the policy's period
STARTS_PER_PASS = 4  # of readiness checks, in one pass of the event loop
BEAT_S = 0.1
PAUSED_LOOK_S = 1.0  # how often a paused probe looks whether it goes on
LATE_BEAT_S = 0.2  # a beat this late is lag; less is an ordinary busy moment

_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the URLs are http; without it every transport loads a CA bundle
_SILENCE = frozenset({errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT})


class Key(NamedTuple):
    """Which entrypoint, of which incarnation."""

    group: str
    incarnation: int
    rank: int


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be asked of an entrypoint. `startup`: until it is ready; `liveness`: for good."""

    url: str
    policy: ProbePolicy
    mode: Literal["startup", "liveness"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    ok: bool
    answered: bool = True
    mismatch: str = ""
    error: str = ""
    latency_s: float = 0.0
    own_trouble: bool = False


class Prober:
    """Probes the wanted targets until told otherwise, and calls `wake` when a flag or a count of one changed.

    An async context manager; needs a running event loop. Uses at most two file descriptors per target at a time.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, wake: Callable[[], None] = lambda: None) -> None:
        self._clock = clock
        self._wake = wake
        self._pulse = _Pulse(clock)
        self._gate = _Gate()
        self._running: dict[Key, tuple[Target, asyncio.Task[None]]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._known: dict[str, tuple[int, dict[int, Endpoint]]] = {}  # group -> incarnation, endpoints by rank
        self._paused: Set[str] = frozenset()
        self._resumed_at: dict[str, float] = {}
        self._asking: set[Key] = set()  # liveness probes that are on their way

    def set_targets(self, targets: Mapping[Key, Target]) -> None:
        """Probe exactly these from now on; the same targets again change nothing.

        What was learnt of a target that is not wanted any more stays until `forget`, or the group's next incarnation.
        """
        self._pulse.start()
        for key, (target, task) in list(self._running.items()):
            if task.done():
                task.result()  # raises what should never happen, instead of going on blind
            if targets.get(key) != target:
                self._end(key)
        for key, target in targets.items():
            if key in self._running:
                continue
            if self._known.get(key.group, (0, {}))[0] != key.incarnation:
                self._known[key.group] = key.incarnation, {}
            self._known[key.group][1].setdefault(key.rank, Endpoint(rank=key.rank))
            probing = self._until_ready(key, target) if target.mode == "startup" else self._for_good(key, target)
            self._running[key] = target, asyncio.create_task(probing)

    def pause(self, groups: Set[str]) -> None:
        """Ask nothing more of ready engines of these groups, and of no others.

        A probe that is on its way is let end: whoever pauses waits for that (`is_quiet`). Afterwards one full period
        passes before the first: the engine may be waking up. What failed in a row before goes on then.
        """
        for group in groups ^ self._paused:
            _, ranks = self._known.get(group, (0, {}))
            ranks.update({rank: rested(endpoint) for rank, endpoint in ranks.items()})
        for group in self._paused - groups:
            self._resumed_at[group] = self._clock()
        self._paused = frozenset(groups)

    def is_quiet(self, group: str) -> bool:
        """Tell whether the group is paused, and no liveness probe of it is on its way any more."""
        return group in self._paused and not any(key.group == group for key in self._asking)

    def endpoints(self, group: str, incarnation: int) -> tuple[Endpoint, ...]:
        """Return what the probes of this incarnation add up to, by rank."""
        known, ranks = self._known.get(group, (incarnation, {}))
        return tuple(ranks[rank] for rank in sorted(ranks)) if known == incarnation else ()

    def forget(self, group: str) -> None:
        """Drop what was learnt of the group; a target of it that is still wanted starts anew."""
        self._known.pop(group, None)
        for key in [k for k in self._running if k.group == group]:
            self._end(key)

    async def aclose(self) -> None:
        """End every probe; returns when their connections are closed."""
        self._pulse.stop()
        for key in list(self._running):
            self._end(key)
        await asyncio.gather(*self._leaving, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _end(self, key: Key) -> None:
        _, task = self._running.pop(key)
        task.cancel()
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _until_ready(self, key: Key, target: Target) -> None:
        """Readiness: the planned model is listed (asked once), and one complete request is answered."""
        policy, pause_s = target.policy, FIRST_PAUSE_S
        questions = (
            [_models_question(target), _service_question(target)] if policy.model else [_service_question(target)]
        )
        while True:
            await self._gate.passed()
            watch = self._pulse.watch()
            answer = await questions[0].ask(policy.startup_request_timeout_s)
            if answer.ok and len(questions) > 1:
                del questions[0]
                continue
            result = self._result("readiness", watch, policy.startup_request_timeout_s, answer)
            self._learn(key, result)
            if answer.ok or (answer.mismatch and not result.lagged):
                return  # asked again, it would not become another model
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, policy.startup_period_s)

    async def _for_good(self, key: Key, target: Target) -> None:
        """Liveness, each period. The endpoints' turns are spread over the period by their keys."""
        policy, question = target.policy, _service_question(target)
        period_s, timeout_s = policy.liveness_period_s, policy.liveness_timeout_s
        turn_s = zlib.crc32(repr(key).encode()) / 2**32 * period_s

        def next_turn(earliest: float) -> float:
            return earliest + (turn_s - earliest) % period_s

        start_at = next_turn(self._clock())
        while True:
            await asyncio.sleep(max(0.0, start_at - self._clock()))
            if key.group in self._paused:
                start_at = self._clock() + min(PAUSED_LOOK_S, period_s)
                continue
            rested_until = self._resumed_at.get(key.group, -math.inf) + period_s
            if start_at < rested_until:
                start_at = next_turn(rested_until)
                continue
            lagged = self._clock() - start_at > _lag_allowed_s(timeout_s)
            if not lagged:
                self._asking.add(key)
                try:
                    result = await self._probe_liveness(target, question)
                finally:
                    self._asking.discard(key)
                self._learn(key, result)
                if key.group in self._paused:
                    self._wake()  # its end is waited for
                lagged = result.lagged
            now = self._clock()
            # After a lag one full period passes before the next verdict: the engines may have been stopped with us.
            start_at = next_turn(now + period_s) if lagged else max(now, start_at + period_s)

    async def _probe_liveness(self, target: Target, question: _Question) -> ProbeResult:
        """One request, and looks at the progress counter only when it is late or fails; all within the time-out.

        The looks are half and three quarters into the time-out. An engine that hangs later than the first look is seen
        to progress, and this probe does not count; when it hangs before, it does. So the bound of a hang's detection,
        `period + threshold * max(period, timeout)`, holds also where the time-out is up to twice the period.
        """
        timeout_s = target.policy.liveness_timeout_s
        watch = self._pulse.watch()
        baseline = counter = _Look()
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(question.ask(timeout_s))
            await asyncio.wait({asking}, timeout=timeout_s / 2)
            if not asking.done():
                baseline = await _look(target, timeout_s / 4)
                await asyncio.wait({asking}, timeout=max(0.0, watch.started_at + timeout_s * 3 / 4 - self._clock()))
            if not (asking.done() and asking.result().ok):
                counter = await _look(
                    target, min(timeout_s / 4, max(0.0, watch.started_at + timeout_s - self._clock()))
                )
            answer = await asking
        if baseline.own_trouble or counter.own_trouble:
            answer = replace(answer, own_trouble=True)
        return self._result("liveness", watch, timeout_s, answer, baseline=baseline.value, counter=counter.value)

    def _result(
        self,
        kind: Literal["readiness", "liveness"],
        watch: _Watch,
        timeout_s: float,
        answer: _Answer,
        *,
        baseline: float | None = None,
        counter: float | None = None,
    ) -> ProbeResult:
        lagged = self._pulse.lost_s() - watch.lost_s > _lag_allowed_s(timeout_s)
        return ProbeResult(
            kind=kind,
            ok=answer.ok,
            answered=answer.answered,
            mismatch=answer.mismatch,
            error="" if lagged else answer.error,
            latency_s=answer.latency_s,
            baseline=baseline,
            counter=counter,
            started_at=watch.started_at,
            ended_at=self._clock(),
            lagged=not answer.ok and (lagged or answer.own_trouble),
        )

    def _learn(self, key: Key, result: ProbeResult) -> None:
        _, ranks = self._known[key.group]
        before = ranks[key.rank]
        after = ranks[key.rank] = fold(before, result)
        if _telling(before) != _telling(after):
            self._wake()


def _telling(e: Endpoint) -> tuple[object, ...]:
    """What a decision can depend on. A starting engine refuses all the time; nobody needs to be woken by that."""
    return e.proved, e.answers, e.mismatch, e.failures, e.slow, e.proved and e.refusals


class _Gate:
    """Lets a few through in each pass of the event loop, those that came first.

    A thousand endpoints are due at once when their groups start together. Begun all in one pass, their requests hold up
    the loop for a third of a second, and cost more: that many at once are a burden to Python's garbage collector
    (bench/probes.py). Nobody waits here for an answer, so a hung endpoint holds up nobody. Liveness needs no gate: its
    turns are spread.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def passed(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._open)
        self._waiting.append(mine := loop.create_future())
        await mine

    def _open(self) -> None:
        for _ in range(min(STARTS_PER_PASS, len(self._waiting))):
            first = self._waiting.popleft()
            if not first.done():  # cancelled with its target
                first.set_result(None)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._open)


# ---------------------------------------------------------------------------------------------------------------- lag


def _lag_allowed_s(timeout_s: float) -> float:
    """So much of a probe's time may be lost by this process before the probe's failure says nothing."""
    return min(1.0, timeout_s / 4)


@dataclass(frozen=True, slots=True)
class _Watch:
    started_at: float
    lost_s: float


class _Pulse:
    """Measures how long this process did not run when it should have: stopped, swapped out, or held up by itself."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due_at = 0.0
        self._lost_s = 0.0
        self._next: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._next is None:
            self._expect_beat()

    def stop(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def lost_s(self) -> float:
        """Seconds lost since the start, those of a beat that is overdue right now included."""
        late_s = self._clock() - self._due_at
        return self._lost_s + (late_s if late_s > LATE_BEAT_S else 0.0)

    def watch(self) -> _Watch:
        return _Watch(self._clock(), self.lost_s())

    def _expect_beat(self) -> None:
        self._due_at = self._clock() + BEAT_S
        self._next = asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    def _beat(self) -> None:
        self._lost_s = self.lost_s()
        self._expect_beat()


# --------------------------------------------------------------------------------------------------------------- HTTP


@dataclass(frozen=True, slots=True)
class _Question:
    """A request, which may be sent any number of times, and the judge of its answer."""

    request: httpx.Request
    judged: Callable[[int, bytes], Verdict]

    async def ask(self, timeout_s: float) -> _Answer:
        """One deadline around everything: httpx's own are per phase, and a server that drips bytes meets none."""
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                status, body = await _exchange(self.request, MAX_ANSWER_BYTES)
        except TimeoutError:
            return _Answer(ok=False, answered=False, error=f"no answer within {timeout_s:g} s", latency_s=timeout_s)
        except _TooLong as error:
            return _Answer(ok=False, error=str(error))
        except httpx.HTTPError as error:
            return _no_answer(error)
        ok, mismatch, error_line = self.judged(status, body)
        return _Answer(ok=ok, mismatch=mismatch, error=error_line, latency_s=time.monotonic() - began_at)


def _service_question(target: Target) -> _Question:
    request, model = target.policy.request, target.policy.model
    return _Question(
        _request(target.url + request.path, request.body), lambda status, body: judge(status, body, request, model)
    )


def _models_question(target: Target) -> _Question:
    model = target.policy.model
    return _Question(_request(target.url + "/v1/models"), lambda status, body: judge_models(status, body, model))


class _Look(NamedTuple):
    """What was seen of the progress counter. None: there is none, or the engine did not let it be read."""

    value: float | None = None
    own_trouble: bool = False


async def _look(target: Target, timeout_s: float) -> _Look:
    counter = target.policy.counter
    if counter is None:
        return _Look()
    try:
        async with asyncio.timeout(timeout_s):
            status, body = await _exchange(_request(target.url + counter.path), MAX_METRICS_BYTES)
    except (_TooLong, TimeoutError):
        return _Look()
    except httpx.HTTPError as error:
        return _Look(own_trouble=_no_answer(error).own_trouble)
    return _Look(counter_value(body.decode(errors="replace"), counter.name) if status == 200 else None)


def _request(url: str, body: str = "") -> httpx.Request:
    headers = {"connection": "close", "accept-encoding": "identity", "user-agent": "slurm-rollout"}
    if not body:
        return httpx.Request("GET", url, headers=headers)
    return httpx.Request("POST", url, headers={**headers, "content-type": "application/json"}, content=body.encode())


class _TooLong(Exception):
    pass


async def _exchange(request: httpx.Request, limit: int) -> tuple[int, bytes]:
    body = bytearray()
    async with (
        httpx.AsyncHTTPTransport(verify=_NO_TLS) as transport,
        aclosing(await transport.handle_async_request(request)) as response,
    ):
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > limit:
                raise _TooLong(f"HTTP {response.status_code} with more than {limit >> 20} MiB of answer")
    return response.status_code, bytes(body)


def _no_answer(error: httpx.HTTPError) -> _Answer:
    """A connection that failed: the other side said no, is silent, or the trouble is on this host."""
    root: BaseException = error
    while (cause := root.__cause__ or root.__context__) is not None:
        root = cause
    if isinstance(root, ExceptionGroup):  # one failure for each address of a name
        root = root.exceptions[0]
    number = root.errno if isinstance(root, OSError) else None
    own_trouble = number in OWN_TROUBLE or isinstance(root, socket.gaierror)
    return _Answer(
        ok=False,
        answered=not own_trouble and number not in _SILENCE,
        # not asyncio's own words for errno: they hold the address, and status files are for everybody
        error=os.strerror(number) if number and number > 0 else one_line(str(root) or repr(root)),
        own_trouble=own_trouble,
    )
