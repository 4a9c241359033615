"""An OpenAI-shaped inference server without a model, with the habits and the faults of the real engines.

Run it as `python -m slurm_rollout.testing.stub_engine` or as `python stub_engine.py`: it is one file, of
the standard library only. Rank, ports and master come from a member's ROLLOUT_* environment or from
`--help`'s options.

Life of a member: rendezvous of all ranks at rank 0's master port, `--load-s` of loading, then the HTTP port
listens. A rank of another group, size or incarnation is refused at the rendezvous. Every inference request
is a round trip to every rank, so one stopped rank hangs the group, without a time-out, while `/health` goes
on saying 200. A dead rank does the same (`--on-peer-death hang`), as with NCCL. With `--entrypoints leader`
(the default) the other ranks serve only a dummy `/health`.

`/metrics`: `stub_tokens_total` counts prompt and generated tokens together and rises with any progress,
also in a long prefill; `stub_generated_tokens_total` stands still then; `stub_iterations_total` counts
steps of either kind.

Weights, of an entrypoint: `POST /update_weights {"version": 42}` answers when they are applied, after `--update-s` and
a round trip to every rank; what is generated meanwhile goes on with the old ones. An update that has begun is finished
even if its client leaves. `GET /weights` says `{"version": null, …}` until the first one. Every completion is stamped
with `"rollout": {"group", "incarnation", "rank", "weights_version"}`, the version being the one with which it began,
and with `"weights_version_end"` where that had changed by the end.

`POST /sleep` and `POST /wake_up`. A generation that is asked for, or still runs, while the engine sleeps is the crime:
it is counted (`stub_asleep_requests_total`) and hangs until somebody wakes the engine up; with `--asleep-request
crash` it ends the engine, as in older versions of vLLM. Nothing else minds the sleep, but an update: 409.

Faults come from outside, in a JSON file (`--control`, or STUB_CONTROL), read again within 50 ms of a change
and at each request. It maps "*", a group ("actor/0") or a member ("actor/0/1") to faults; the narrower one
wins, name by name. `set_fault` and `clear_faults` write it.

generation, health,   "ok", "dead" (hangs until cleared), "503" or another status, "garbage" (200, not JSON),
update                "empty" (200, no choices), "slow:2.5" (seconds; the counters move at the end). A dead
                      generation hangs the group's requests also on a rank that is no entrypoint.
saturated             true: as if thousands of requests ran: tokens rise, one waits `slow_s` (default 60)
prefill_s             from now on nothing is generated for so many seconds; prompt tokens and iterations rise
deaf_to               text: requests whose User-Agent has it are never answered, as if the network between were cut.
                      "slurm-rollout" is the coordinator; agents' own probes have none
exit                  end at once with this code
write                 a path: write there without end, and end of the first error, which the log's last line tells
                      as Python's last line would ("/dev/full" has no room for anybody)
ignore_term           true: SIGTERM and SIGINT do nothing
crash_at_start        true: exit 1 before the rendezvous
never_listens         true, at start: the HTTP port is never opened, by this rank
load_s                overrides --load-s
orphan                true, at start: leave a double-forked process, in its own session, with no environment,
                      that holds the HTTP port after the engine's death (ends by itself after ten minutes)
daemon_child          true, at start: the same with the environment kept and without the port
incarnations          [1, 2]: the faults beside it are for these incarnations only
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time

# Every import delays every start that a benchmark measures. Type checkers know this name without `typing`.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from io import BufferedReader
    from pathlib import Path
    from typing import Any, NoReturn

    Response = tuple[int, str, bytes]
    Handler = Callable[["Request"], Response]

START_FAULTS = frozenset({"crash_at_start", "load_s", "never_listens", "orphan", "daemon_child"})
ANSWERS = frozenset({"generation", "health", "update"})
LIVE_FAULTS = ANSWERS | {"saturated", "slow_s", "prefill_s", "deaf_to", "exit", "write", "ignore_term"}
FAULT_NAMES = START_FAULTS | LIVE_FAULTS | {"incarnations"}
COUNTERS = ("tokens_total", "generated_tokens_total", "iterations_total", "asleep_requests_total")
GAUGES = ("requests_running", "requests_waiting")
POLL_S = 0.05
BUSY_TICK_S = 0.2
HELLO_TIMEOUT_S = 5.0
LEFTOVER_LIFE_S = 600


class Member(argparse.Namespace):
    """This process: what its environment and command line say, and its log."""

    rank: int
    size: int
    group: str
    incarnation: int
    host: str
    port: int
    session_port: int
    master: str
    load_s: float
    token_s: float
    update_s: float
    rendezvous_timeout_s: float
    model: str
    entrypoints: str
    on_peer_death: str
    asleep_request: str
    control: str
    bind_early: bool

    def serves(self) -> bool:
        return self.rank == 0 or self.entrypoints == "all"

    def log(self, text: str) -> None:
        line = f"stub {self.group}/{self.rank} incarnation {self.incarnation}: {text}\n"
        with contextlib.suppress(OSError):  # when nobody reads any more, an engine goes on without its log
            os.write(1, line.encode())

    def fail(self, text: str) -> NoReturn:
        self.log(f"{text}; exit 1")
        os._exit(1)

    def bind(self, port: int, *, share: bool = False) -> socket.socket:
        """A bound socket that does not listen yet; exit 1 when the port is taken."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share)
        try:
            listener.bind((self.host, port))
        except OSError as error:
            self.fail(f"cannot bind {self.host}:{port}: {error.strerror}")
        return listener


def parse_member(argv: list[str], environment: dict[str, str]) -> Member:
    """Read the command line; ends the process with status 2 and a message when it makes no sense."""
    env = environment.get
    master = f"{env('ROLLOUT_MASTER_ADDR', '')}:{env('ROLLOUT_MASTER_PORT', '')}".strip(":")
    parser = argparse.ArgumentParser(prog="stub_engine", description="An inference server without a model.")
    add = parser.add_argument
    add("--rank", type=int, default=env("ROLLOUT_RANK", "0"))
    add("--size", type=int, default=env("ROLLOUT_SIZE", "1"))
    add("--group", default=env("ROLLOUT_GROUP", "stub/0"))
    add("--incarnation", type=int, default=env("ROLLOUT_INCARNATION", "1"))
    add("--host", default="0.0.0.0", help="IPv4 address for every listening port")
    add("--port", type=int, default=env("ROLLOUT_HTTP_PORT", "0"))
    add("--session-port", type=int, default=0, help="a second endpoint, which answers 200 on /")
    add("--master", default=master, metavar="ADDR:PORT", help="where the ranks meet; rank 0 listens there")
    add("--load-s", type=float, default=1.0)
    add("--token-s", type=float, default=0.0, help="time for each token that a request asks for")
    add("--update-s", type=float, default=0.1, help="time from a request for new weights until they are applied")
    add("--rendezvous-timeout-s", type=float, default=300.0)
    add("--model", default="", help="any other model name in a request is answered with 404")
    add("--entrypoints", choices=["all", "leader"], default="leader")
    add("--on-peer-death", choices=["hang", "exit"], default="hang")
    add("--asleep-request", choices=["hang", "crash"], default="hang", help="what a generation does while it sleeps")
    add("--control", default=env("STUB_CONTROL", ""), help="JSON file with the faults")
    add("--bind-early", action="store_true", help="bind, before loading, a port that others may share (vLLM)")
    member = parser.parse_args(argv, namespace=Member())
    if not 0 <= member.rank < member.size:
        parser.error(f"--rank {member.rank} is not below --size {member.size}")
    if not 0 < member.port < 65536:
        parser.error(f"--port (or ROLLOUT_HTTP_PORT) must be 1 to 65535, not {member.port}")
    port = member.master.rpartition(":")[2]
    if member.size > 1 and not (port.isdigit() and 0 < int(port) < 65536):
        parser.error(f"--size {member.size} needs --master ADDR:PORT, not {member.master!r}")
    return member


# ------------------------------------------------------------------------------------------------ faults


def check_faults(faults: object) -> None:
    """Raise ValueError, with what would be right, unless this maps known faults to usable values."""
    if not isinstance(faults, dict):
        raise ValueError(f"faults must be a mapping of fault to value, not {faults!r}")
    if unknown := sorted(set(faults) - FAULT_NAMES):
        raise ValueError(f"no such fault: {', '.join(unknown)}; there are {', '.join(sorted(FAULT_NAMES))}")
    for name in faults.keys() & {"slow_s", "prefill_s", "load_s", "exit"}:
        if not isinstance(faults[name], int | float):
            raise ValueError(f"{name} must be a number, not {faults[name]!r}")
    for name in faults.keys() & ANSWERS:
        kind, _, seconds = str(faults[name]).partition(":")
        if kind == "slow":
            float(seconds)
        elif kind not in ("ok", "dead", "garbage", "empty") and not kind.isdigit():
            raise ValueError(f"{name} must be ok, dead, garbage, empty, slow:SECONDS or a status, not {kind!r}")


def faults_of(control: dict[str, Any], group: str, rank: int, incarnation: int) -> dict[str, Any]:
    """The faults of one member, out of the content of a control file."""
    merged: dict[str, Any] = {}
    for address in ("*", group, f"{group}/{rank}"):
        faults = control.get(address, {})
        check_faults(faults)
        if incarnation in faults.get("incarnations", [incarnation]):
            merged.update(faults)
    return merged


def set_fault(control: Path, member: str, **fault: object) -> None:
    """Add faults for `member` ("*", a group, or "<group>/<rank>"); the control file is replaced atomically.

    Faults that were set before stay; `None` takes one back. Raises ValueError for an unknown fault.
    """
    content: dict[str, dict[str, object]] = json.loads(control.read_text()) if control.exists() else {}
    merged = content.get(member, {}) | fault
    faults = {name: value for name, value in merged.items() if value is not None}
    check_faults(faults)
    _replace(control, {**content, member: faults})


def clear_faults(control: Path) -> None:
    """Take every fault back. What has already happened (an exit, an orphan) stays."""
    _replace(control, {})


def _replace(control: Path, content: dict[str, dict[str, object]]) -> None:
    staged = control.with_name(f".{control.name}.{os.getpid()}")
    staged.write_text(json.dumps(content, indent=1))
    staged.replace(control)


class Faults:
    """This member's view of the control file."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._lock = threading.RLock()  # a signal handler may come in between
        self._seen: object = None
        self._active: dict[str, Any] = {}
        self._prefill_until = 0.0

    def get(self, name: str, default: Any = None) -> Any:
        self.refresh()
        return self._active.get(name, default)

    def prefilling(self) -> bool:
        self.refresh()
        return time.monotonic() < self._prefill_until

    def refresh(self) -> None:
        """Read the file again if it changed, and do at once what a new fault asks for."""
        if not self._member.control:
            return
        with self._lock:
            try:
                status = os.stat(self._member.control)
                seen: object = (status.st_ino, status.st_mtime_ns, status.st_size)
            except FileNotFoundError:
                seen = None
            if seen == self._seen:
                return
            self._seen = seen
            try:
                new = self._read() if seen else {}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                self._member.log(f"{self._member.control} is left unused: {error}")
                return
            before, self._active = self._active, new
            if new != before:
                self._member.log(f"faults: {json.dumps(new)}")
            if new.get("prefill_s") != before.get("prefill_s"):
                self._prefill_until = time.monotonic() + float(new.get("prefill_s", 0))
            if "exit" in new:
                self._member.log(f"exit with {new['exit']}, as the control file asks")
                os._exit(int(new["exit"]))
            if "write" in new:
                self._write_to(str(new["write"]))

    def _read(self) -> dict[str, Any]:
        with open(self._member.control, "rb") as file:
            control = json.loads(file.read())
        return faults_of(control, self._member.group, self._member.rank, self._member.incarnation)

    def _write_to(self, path: str) -> NoReturn:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            for _ in range(1024):
                os.write(fd, bytes(1 << 16))
        except OSError as error:
            self._member.log(f"OSError: {error}")
            os._exit(1)
        self._member.fail(f"there was room for 64 MiB in {path}")

    def watch(self) -> None:
        while True:
            self.refresh()
            time.sleep(POLL_S)


# -------------------------------------------------------------------------------------------- collective


class Collective:
    """The links of the ranks, a star around rank 0. One line per message: `ask N`, answered by `done N`."""

    def __init__(self, member: Member, faults: Faults) -> None:
        self._member = member
        self._faults = faults
        self._peers = set(range(1, member.size)) if member.rank == 0 else {0}
        self._links: dict[int, socket.socket] = {}
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._owed: dict[int, set[int]] = {}
        self._rounds = 0
        self._hello = {name: getattr(member, name) for name in ("rank", "group", "size", "incarnation")}
        self.loaded = threading.Event()

    def rendezvous(self) -> None:
        """Return once every rank has joined; exit 1 if that takes too long or this one is refused."""
        if self._member.size == 1:
            return
        deadline = time.monotonic() + self._member.rendezvous_timeout_s
        if self._member.rank == 0:
            self._gather(deadline)
        else:
            self._join(deadline)
        self._member.log("rendezvous complete")

    def _gather(self, deadline: float) -> None:
        port = int(self._member.master.rpartition(":")[2])
        listener = self._member.bind(port)
        listener.listen(128)
        # For life, as a TCPStore: a rank that comes late or from elsewhere must hear that it is refused.
        spawn(accept_all, listener, self._welcome)
        with self._changed:
            self._changed.wait_for(lambda: self._links.keys() == self._peers, deadline - time.monotonic())
        if missing := sorted(self._peers - self._links.keys()):
            self._member.fail(f"rendezvous timed out; still missing: ranks {missing}")
        for link in self._links.values():
            self._send(link, "go")

    def _welcome(self, link: socket.socket) -> None:
        link.settimeout(HELLO_TIMEOUT_S)
        lines = link.makefile("rb")
        try:
            hello = json.loads(lines.readline())
            rank = int(hello["rank"])
            refusal = self._refusal(hello, rank)
        except (OSError, ValueError, KeyError, TypeError):
            refusal = "a connection to the master port that does not say who it is"
        if refusal:
            self._member.log(f"refused {refusal}")
            self._send(link, f"refused {refusal}")
            lines.close()
            link.close()
            return
        link.settimeout(None)
        with self._changed:
            self._links[rank] = link
            self._changed.notify_all()
        self._listen_to(rank, link, lines)

    def _refusal(self, hello: dict[str, Any], rank: int) -> str:
        for name in ("group", "size", "incarnation"):
            if hello[name] != self._hello[name]:
                return f"rank {rank}: its {name} is {hello[name]}, here it is {self._hello[name]}"
        if rank not in self._peers:
            return f"rank {rank}: no such rank in a group of {self._member.size}"
        return f"rank {rank}: it is here already" if rank in self._links else ""

    def _join(self, deadline: float) -> None:
        host, _, port = self._member.master.rpartition(":")
        pause_s = 0.002
        while True:
            link = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            link.settimeout(max(0.001, deadline - time.monotonic()))
            lines = link.makefile("rb")
            word = rest = ""
            with contextlib.suppress(OSError, ValueError):  # nobody there yet, or a stranger
                link.connect((host, int(port)))
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._send(link, json.dumps(self._hello))
                word, _, rest = lines.readline().decode().strip().partition(" ")
            if word == "go":
                link.settimeout(None)
                self._links[0] = link
                spawn(self._listen_to, 0, link, lines)
                return
            lines.close()
            link.close()
            if word == "refused":
                self._member.fail(f"rank 0 at {self._member.master} refused {rest}")
            if time.monotonic() >= deadline:
                self._member.fail(f"rendezvous timed out: no group at {self._member.master}")
            time.sleep(pause_s)
            pause_s = min(POLL_S, pause_s * 1.5)

    def _listen_to(self, rank: int, link: socket.socket, lines: BufferedReader) -> None:
        with contextlib.suppress(OSError):
            while line := lines.readline():
                word, _, number = line.decode().strip().partition(" ")
                if word == "ask":
                    # Not here: rank 0 answers a follower only after it has asked this same follower.
                    spawn(self._answer, link, number)
                elif word == "done":
                    with self._changed:
                        self._owed.get(int(number), set()).discard(rank)
                        self._changed.notify_all()
        self._member.log(f"rank {rank} is gone; on peer death: {self._member.on_peer_death}")
        if self._member.on_peer_death == "exit":
            os._exit(1)

    def _answer(self, link: socket.socket, number: str) -> None:
        self.loaded.wait()
        while self._faults.get("generation") == "dead":
            time.sleep(POLL_S)
        if self._member.rank == 0:
            self.round_trip()
        self._send(link, f"done {number}")

    def _send(self, link: socket.socket, line: str) -> None:
        # To a dead peer nothing is sent: whoever waits for its answer waits for ever, and that is the point.
        with self._sending, contextlib.suppress(OSError):
            link.sendall(line.encode() + b"\n")

    def round_trip(self, still_wanted: Callable[[], None] = lambda: None) -> None:
        """Return when every rank has answered, however long that takes.

        `still_wanted` is called now and then and may raise to give up.
        """
        if self._member.size == 1:
            return
        with self._changed:
            self._rounds += 1
            number = self._rounds
            owed = self._owed[number] = set(self._peers)
        try:
            for link in self._links.values():
                self._send(link, f"ask {number}")
            while True:
                with self._changed:
                    if self._changed.wait_for(lambda: not owed, POLL_S):
                        return
                still_wanted()
        finally:
            with self._changed:
                del self._owed[number]


# -------------------------------------------------------------------------------------------------- HTTP


class ClientGone(Exception):
    """The client hung up while its request waited."""


class Request:
    """One HTTP request, and whether somebody still waits for the answer."""

    def __init__(self, connection: socket.socket, method: str, path: str, body: bytes, client: str) -> None:
        self._connection = connection
        self.route = f"{method} {path.partition('?')[0]}"
        self.body = body
        self.client = client

    def still_wanted(self) -> None:
        try:
            if self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        raise ClientGone

    def wait_while(self, condition: Callable[[], object]) -> None:
        while condition():
            self.still_wanted()
            time.sleep(POLL_S)

    def wait_for(self, duration_s: float) -> None:
        deadline = time.monotonic() + duration_s
        while (left_s := deadline - time.monotonic()) > 0:
            self.still_wanted()
            time.sleep(min(POLL_S, left_s))


def reply(status: int, content: object) -> Response:
    return status, "application/json", json.dumps(content).encode()


def problem(status: int, message: str) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return reply(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})


def converse(connection: socket.socket, handler: Handler) -> None:
    """Answer the requests of one connection, HTTP/1.1 with keep-alive, until either side has enough."""
    with connection, connection.makefile("rb") as lines:
        try:
            while (words := lines.readline().decode("latin-1").split()) and len(words) == 3:
                headers: dict[str, str] = {}
                while (line := lines.readline().decode("latin-1").strip()) and len(headers) < 256:
                    name, _, value = line.partition(":")
                    headers[name.lower()] = value.strip()
                body = lines.read(int(headers.get("content-length", "0")))
                request = Request(connection, words[0], words[1], body, headers.get("user-agent", ""))
                status, kind, content = handler(request)
                keep = words[2] == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
                head = (
                    f"HTTP/1.1 {status} {'OK' if status < 400 else 'Error'}\r\n"
                    f"Content-Type: {kind}\r\nContent-Length: {len(content)}\r\n"
                    f"Connection: {'keep-alive' if keep else 'close'}\r\n\r\n"
                )
                connection.sendall(head.encode() + content)
                if not keep:
                    return
        except (OSError, ValueError, ClientGone):
            return  # a client that left or does not speak HTTP


class Server:
    """What an entrypoint answers, and the counters behind `/metrics`."""

    def __init__(self, member: Member, faults: Faults, collective: Collective) -> None:
        self._member = member
        self._faults = faults
        self._collective = collective
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTERS + GAUGES, 0)
        self._updating = threading.Lock()
        self._version: int | None = None
        self._asleep = False

    def handle(self, request: Request) -> Response:
        request.wait_while(lambda: (deaf_to := self._faults.get("deaf_to")) and deaf_to in request.client)
        if request.route == "GET /health":
            return self._faulty("health", request) or (200, "text/plain", b"")
        if not self._member.serves():
            return problem(404, "this rank is not an entrypoint; it serves a dummy /health only")
        if request.route == "GET /metrics":
            return 200, "text/plain; version=0.0.4", self._metrics().encode()
        if request.route == "GET /v1/models":
            model = {"id": self._member.model or "stub", "object": "model", "created": 0, "owned_by": "stub"}
            return reply(200, {"object": "list", "data": [model]})
        if request.route in ("POST /v1/chat/completions", "POST /v1/completions"):
            return self._completions(request)
        if request.route == "GET /weights":
            return reply(200, {"version": self._version, "asleep": self._asleep, "updating": self._updating.locked()})
        if request.route == "POST /update_weights":
            return self._update_weights(request)
        if request.route in ("POST /sleep", "POST /wake_up"):
            return self._sleep(request.route == "POST /sleep")
        return problem(404, f"no such endpoint: {request.route}")

    def _completions(self, request: Request) -> Response:
        try:
            wish = json.loads(request.body)
            model = wish.get("model", self._member.model or "stub")
            tokens = int(wish.get("max_completion_tokens") or wish.get("max_tokens") or 16)
        except (ValueError, AttributeError, TypeError) as error:
            return problem(400, f"the body is not a JSON object of this API: {error}")
        if self._member.model and model != self._member.model:
            return problem(404, f"the model {model!r} does not exist, only {self._member.model!r}")
        if wish.get("stream"):
            return problem(400, "the stub engine does not stream")
        if self._asleep:
            self._asked_asleep(1)
        self._count(requests_waiting=1)
        try:
            self._wait_for_turn(request)
        finally:
            self._count(requests_waiting=-1)
        self._count(requests_running=1)
        began_with = self._version
        try:
            if fault := self._faulty("generation", request):
                return fault
            request.wait_for(tokens * self._member.token_s)
            self._collective.round_trip(request.still_wanted)
            request.wait_while(lambda: self._asleep)
            self._count(tokens_total=tokens + 1, generated_tokens_total=tokens, iterations_total=tokens)
        finally:
            self._count(requests_running=-1)
        return reply(200, self._completion(model, tokens, began_with, chat="chat" in request.route))

    def _wait_for_turn(self, request: Request) -> None:
        turn = time.monotonic() + float(self._faults.get("slow_s", 60))
        request.wait_while(lambda: self._faults.get("saturated") and time.monotonic() < turn)
        request.wait_while(self._faults.prefilling)
        request.wait_while(lambda: self._asleep)

    def _update_weights(self, request: Request) -> Response:
        try:
            version = json.loads(request.body)["version"]
        except (ValueError, KeyError, TypeError) as error:
            return problem(400, f'the body is not {{"version": 42}}: {error!r}')
        if not isinstance(version, int):
            return problem(400, f"the version must be a whole number, not {version!r}")
        if fault := self._faulty("update", request):
            return fault
        while not self._updating.acquire(timeout=POLL_S):  # one after another
            request.still_wanted()
        try:
            request.still_wanted()
            if self._asleep:
                return problem(409, "asleep: wake up first")
            # From here on nobody asks whether the client still waits: engines do not, either.
            time.sleep(self._member.update_s)
            self._collective.round_trip()
            self._version = version
        finally:
            self._updating.release()
        self._member.log(f"weights are version {version}")
        return reply(200, {"version": version})

    def _sleep(self, asleep: bool) -> Response:
        with self._lock:
            self._asleep = asleep
            running = self._counts["requests_running"]
        self._member.log("asleep" if asleep else "awake")
        if asleep and running:
            self._asked_asleep(running)
        return reply(200, {"asleep": asleep})

    def _asked_asleep(self, requests: int) -> None:
        self._count(asleep_requests_total=requests)
        self._member.log(f"{requests} generation(s) asked for while asleep")
        if self._member.asleep_request == "crash":
            self._member.fail("crash of a generation without weights, as --asleep-request says")

    def _faulty(self, name: str, request: Request) -> Response | None:
        """The answer that a fault prescribes; None means: answer as usual."""
        request.wait_while(lambda: self._faults.get(name) == "dead")
        kind, _, seconds = str(self._faults.get(name, "ok")).partition(":")
        if kind == "slow":
            request.wait_for(float(seconds))
        elif kind == "garbage":
            return 200, "application/json", b'{"choices": [{"mess\x00\xff'
        elif kind == "empty":
            return reply(200, {"id": "stub", "object": "chat.completion", "choices": []})
        elif kind.isdigit():
            return problem(int(kind), f"the {name} fault is set")
        return None

    def _completion(self, model: str, tokens: int, began_with: int | None, *, chat: bool) -> dict[str, object]:
        text = " ".join(["token"] * tokens)
        answer = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        who = {"group": self._member.group, "rank": self._member.rank, "incarnation": self._member.incarnation}
        ended_with = self._version
        mixed = {} if ended_with == began_with else {"weights_version_end": ended_with}
        return {
            "id": f"stub-{os.getpid()}-{time.monotonic_ns()}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "choices": [{"index": 0, **answer, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1},
            **who,
            "rollout": {**who, "weights_version": began_with, **mixed},
        }

    def _count(self, **changes: int) -> None:
        with self._lock:
            for name, change in changes.items():
                self._counts[name] += change

    def _metrics(self) -> str:
        with self._lock:
            counts = dict(self._counts)
        kinds = dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(GAUGES, "gauge")
        return "".join(f"# TYPE stub_{name} {kinds[name]}\nstub_{name} {counts[name]}\n" for name in counts)

    def be_busy(self) -> None:
        """While saturated or prefilling, work as for requests that nobody sent; it needs every rank, too."""
        while True:
            time.sleep(BUSY_TICK_S)
            prefilling = self._faults.prefilling()
            if self._faults.get("generation") == "dead" or not (prefilling or self._faults.get("saturated")):
                continue
            self._collective.round_trip()
            if prefilling:
                self._count(tokens_total=512, iterations_total=1)
            else:
                self._count(tokens_total=64, generated_tokens_total=64, iterations_total=1)


# ----------------------------------------------------------------------------------------------- process


def spawn(target: Callable[..., None], *args: object) -> None:
    threading.Thread(target=target, args=args, daemon=True).start()


def accept_all(listener: socket.socket, talk: Callable[..., None], *args: object) -> NoReturn:
    while True:
        try:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:  # out of descriptors, or the client left before it was accepted
            time.sleep(POLL_S)
            continue
        spawn(talk, connection, *args)


def leave_behind(member: Member, name: str, environment: dict[str, str], held: list[int]) -> None:
    """Fork twice, so that the process has no tie to this one, and keep the descriptors `held` open in it.

    Must run before the first thread is started: only the forking thread goes on in a fork.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    member.log(f"{name}: pid {os.getpid()}")
    for descriptor in held:
        os.set_inheritable(descriptor, True)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    argv = [sys.executable, "-IS", "-c", f"import time; time.sleep({LEFTOVER_LIFE_S})"]
    os.execve(sys.executable, argv, environment)


def session_root(request: Request) -> Response:
    return (200, "text/plain", b"") if request.route == "GET /" else problem(404, "only / is here")


def main() -> NoReturn:
    member = parse_member(sys.argv[1:], dict(os.environ))
    faults = Faults(member)

    def on_term(number: int, _frame: object) -> None:
        if not faults.get("ignore_term"):
            os._exit(0)
        member.log(f"signal {number} ignored, as the control file asks")

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGINT, on_term)
    member.log(f"start, pid {os.getpid()}")
    if faults.get("crash_at_start"):
        member.fail("crash at start, as the control file asks")
    orphan = faults.get("orphan")
    # vLLM sets SO_REUSEPORT: a new engine starts beside an old one, and the kernel deals requests to both.
    early = member.bind_early or orphan
    listener = member.bind(member.port, share=member.bind_early) if early else None
    if orphan and listener:
        leave_behind(member, "orphan", {}, [listener.fileno()])
    if faults.get("daemon_child"):
        leave_behind(member, "daemon_child", dict(os.environ), [])
    if member.control:
        spawn(faults.watch)

    collective = Collective(member, faults)
    collective.rendezvous()
    time.sleep(float(faults.get("load_s", member.load_s)))
    collective.loaded.set()
    server = Server(member, faults, collective)
    if member.serves():
        collective.round_trip()  # the warm-up: nobody serves before every rank has loaded
        if member.control:
            spawn(server.be_busy)
    if member.session_port:
        session = member.bind(member.session_port)
        session.listen(128)
        spawn(accept_all, session, converse, session_root)
    if faults.get("never_listens"):
        threading.Event().wait()
    listener = listener or member.bind(member.port)
    listener.listen(1024)
    member.log(f"listening on {member.host}:{member.port}")
    accept_all(listener, converse, server.handle)


if __name__ == "__main__":
    main()
