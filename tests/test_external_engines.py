"""`examples/external_engines`: a router follows the barrier; a trainer that knows neither gets its pushes acknowledged.

The routers are stubs of the three kinds that behave as the real ones were seen to (sglang-router 0.3.2, vllm-router
0.1.17) or read (LMDeploy 0.16). With ROLLOUT_TEST_ROUTERS=/path/to/python, an interpreter that has them, the first two
are run for real, too. Fleets here have ports 19760 to 19919, real routers 19920 to 19999; stub routers any free one.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import tomllib
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from slurm_rollout.barrier import Barrier, Group
from slurm_rollout.testing.fleet import LocalFleet, stub_spec, wait_for
from tests.conftest import FAILED

EXAMPLE = Path(__file__).parents[1] / "examples" / "external_engines"
BASES = itertools.cycle((19760, 19840))
REAL = os.environ.get("ROLLOUT_TEST_ROUTERS", "")
ROUTERS = ["sglang", "vllm", "lmdeploy", *(["real sglang", "real vllm"] if REAL else [])]

sys.path.insert(0, str(EXAMPLE))
attach = importlib.import_module("attach")
slime_hook = importlib.import_module("slime_hook")
sys.path.remove(str(EXAMPLE))


# ------------------------------------------------------------------------------------------------------- stub routers


class StubRouter:
    """Has a list of workers, in the words of one kind. What sglang-router accepts it does a moment later."""

    def __init__(self, kind: str) -> None:
        self.workers: dict[str, str] = {}
        self.log: list[str] = []
        router = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or "{}")
                parts = urlsplit(self.path)
                url = parse_qs(parts.query).get("url", [""])[0] or body.get("url", "")
                status, content = getattr(router, kind)(self.command, parts.path, url)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def add(self, url: str) -> None:
        if url not in self.workers:
            self.workers[url] = str(uuid.uuid4())
            self.log.append(f"+ {url}")

    def remove(self, url: str) -> None:
        if self.workers.pop(url, None):
            self.log.append(f"- {url}")

    def sglang(self, method: str, path: str, url: str) -> tuple[int, Any]:
        if (method, path) == ("GET", "/workers"):
            return 200, {"workers": [{"url": u, "id": i, "is_healthy": True} for u, i in self.workers.items()]}
        if (method, path) == ("POST", "/workers"):
            threading.Timer(0.2, self.add, [url]).start()
            return 202, {"status": "accepted"}
        named = {i: u for u, i in self.workers.items()}.get(path.removeprefix("/workers/"))
        if method == "DELETE" and named:
            threading.Timer(0.2, self.remove, [named]).start()
            return 202, {"status": "accepted"}
        return 404, {}

    def vllm(self, method: str, path: str, url: str) -> tuple[int, Any]:
        if (method, path) == ("GET", "/list_workers"):
            return 200, {"urls": list(self.workers)}
        if (method, path) == ("POST", "/add_worker"):
            if url in self.workers:
                return 400, f"Worker {url} already exists"
            self.add(url)
            return 200, {}
        if (method, path) == ("POST", "/remove_worker"):
            self.remove(url)
            return 200, {}
        return 404, {}

    def lmdeploy(self, method: str, path: str, url: str) -> tuple[int, Any]:
        if (method, path) == ("GET", "/nodes/status"):
            return 200, {u: {"models": ["stub"]} for u in self.workers}
        if (method, path) == ("POST", "/nodes/add"):
            self.add(url)
            return 200, "Added successfully"
        if (method, path) == ("POST", "/nodes/remove"):
            self.remove(url)
            return 200, "Deleted successfully"
        return 404, {}

    def listed(self) -> set[str]:
        return set(self.workers)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class RealRouter:
    """sglang-router or vllm-router itself."""

    def __init__(self, kind: str, folder: Path) -> None:
        port = {"sglang": 19920, "vllm": 19960}[kind]
        argv = [REAL, "-m", f"{kind}_router.launch_router", "--host=127.0.0.1", f"--port={port}"]
        self.url = f"http://127.0.0.1:{port}"
        self._kind = attach.KINDS[kind](self.url)
        with (folder / "router.log").open("wb") as log:
            self._process = subprocess.Popen([*argv, f"--prometheus-port={port + 1}"], stdout=log, stderr=log)
        wait_for("the router", lambda: self.listed() is not None, timeout_s=40)

    def listed(self) -> set[str] | None:
        try:
            return set(self._kind.listed())
        except OSError:
            return None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(params=ROUTERS)
def router(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    kind = request.param.split()[-1]
    made = RealRouter(kind, tmp_path) if request.param.startswith("real") else StubRouter(kind)
    made.kind = kind  # type: ignore[union-attr]
    yield made
    made.stop()


# -------------------------------------------------------------------------------------------------------------- fleet


@pytest.fixture
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalFleet]:
    """Two groups of one engine, whose weights somebody trains."""
    with LocalFleet(tmp_path) as fleet:
        fleet.start(
            stub_spec(
                groups=2,
                layout="nodes = 1",
                base=next(BASES),
                control=fleet.control,
                stub_args=["--update-s=0.05"],
                pool='weights = "trained"',
            )
        )
        fleet.wait_phase("needs_weights")
        yield fleet
        if request.node.stash.get(FAILED, False):
            print(fleet.story())


def url(fleet: LocalFleet, group: str) -> str:
    [url] = fleet.group(group)["urls"]
    return str(url)


def push(version: int, *urls: str) -> None:
    """As a trainer does that was given addresses, and nothing else."""
    for address in urls:
        assert attach.call("POST", address + "/update_weights", {"version": version}) == {"version": version}


@contextlib.contextmanager
def running(fleet: LocalFleet, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run attach.py beside the fleet."""
    full = [sys.executable, str(EXAMPLE / "attach.py"), f"--barrier={fleet.run.barrier}", *argv]
    with (fleet.folder / "attach.log").open("ab") as log:
        process = subprocess.Popen(full, stdout=log, stderr=log)
    try:
        yield process
    except BaseException:
        print((fleet.folder / "attach.log").read_text())
        raise
    finally:
        process.kill()
        process.wait()


def addresses(fleet: LocalFleet, style: str) -> str:
    argv = [sys.executable, str(EXAMPLE / "attach.py"), f"--barrier={fleet.run.barrier}", "addresses"]
    done = subprocess.run([*argv, f"--style={style}"], capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


# -------------------------------------------------------------------------------------------------------------- tests


def test_addresses_are_printed_in_each_framework_s_words(fleet: LocalFleet) -> None:
    urls = [url(fleet, "actor/0"), url(fleet, "actor/1")]
    a, b = (u.removeprefix("http://") for u in urls)
    assert addresses(fleet, "urls") == "\n".join(urls)
    assert addresses(fleet, "slime") == addresses(fleet, "vime") == f"--rollout-external-engine-addrs {a} {b}"
    assert addresses(fleet, "miles") == f"--rollout-external --rollout-external-engine-addrs {a} {b}"
    assert addresses(fleet, "areal") == f"AREAL_LLM_SERVER_ADDRS={a},{b}"
    table = tomllib.loads(addresses(fleet, "prime-rl"))["orchestrator"]["model"]["client"]
    assert table == {"admin_base_url": [f"{u}/v1" for u in urls]}


def test_addresses_wait_for_every_group_and_say_which_is_missing(fleet: LocalFleet) -> None:
    fleet.fault("actor/1", crash_at_start=True)
    fleet.kill("actor/1", 0)
    fleet.wait("actor/1 to go", lambda: not fleet.group("actor/1")["urls"])
    argv = [sys.executable, str(EXAMPLE / "attach.py"), f"--barrier={fleet.run.barrier}", "addresses", "--timeout=1.5"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "not every group is alive: actor/1;" in done.stderr


def test_a_router_has_exactly_the_engines_with_current_weights(fleet: LocalFleet, router: Any) -> None:
    first, second = url(fleet, "actor/0"), url(fleet, "actor/1")
    # As slime does at its start: it registers all that it was told, before it has pushed anything.
    kind = attach.KINDS[router.kind](router.url)
    kind.add(first)
    fleet.wait("its registration", lambda: router.listed() == {first})
    options = ["--versions=/weights:version", "--interval-s=0.2", "--settle-s=2"]
    with running(fleet, "router", f"--url={router.url}", f"--kind={router.kind}", *options):
        fleet.wait("an engine without weights to leave the router", lambda: router.listed() == set())

        push(1, first, second)
        fleet.wait("both in the router", lambda: router.listed() == {first, second})
        assert fleet.barrier()["pools"][0]["weights_version"] == 1

        # The trainer pushes again before the restarted one is back: one group is at 2, the other comes up without any.
        was_registered_as = kind.listed()[second]
        fleet.kill("actor/1", 0)
        fleet.wait("the dead one to leave the router", lambda: router.listed() == {first})
        push(2, first)
        fleet.wait("it to be back, stale", lambda: fleet.group("actor/1")["urls"] and not is_serving(fleet, "actor/1"))
        fleet.wait("version 2", lambda: fleet.barrier()["pools"][0]["weights_version"] == 2)
        assert router.listed() == {first}

        push(3, first, second)
        fleet.wait("both in the router again", lambda: router.listed() == {first, second})
        fleet.wait("version 3", lambda: fleet.barrier()["pools"][0]["weights_version"] == 3)
        if router.kind == "sglang":
            assert kind.listed()[second] != was_registered_as

        # The trainer resumes from an older checkpoint, and counts from there.
        push(1, first, second)
        fleet.wait("version 1", lambda: fleet.barrier()["pools"][0]["weights_version"] == 1)
        fleet.wait("both in the router", lambda: router.listed() == {first, second})
    assert not fleet.events("ack_refused")


def is_serving(fleet: LocalFleet, group: str) -> bool:
    return bool(fleet.group(group)["serving"])


def test_a_restarted_engine_is_taken_out_and_put_in_again_though_nobody_saw_it_gone(fleet: LocalFleet) -> None:
    """It was back before the next look: what the router holds against its predecessor would stay."""
    router = StubRouter("sglang")
    try:
        registrations = attach.Registrations(attach.sglang_router(router.url))
        group = Barrier(fleet.run.barrier, job="").current().groups[0]._replace(serving=True)
        [address] = group.urls
        assert registrations.follow([group]) == [f"+ {address}"]
        wait_for("its registration", router.listed)
        assert registrations.follow([group]) == []
        again = group._replace(incarnation=2)
        assert registrations.follow([again]) == [f"- {address}"]
        wait_for("its removal", lambda: not router.listed())
        assert registrations.follow([again]) == [f"+ {address}"]
        wait_for("its registration", router.listed)
        assert registrations.follow([again]) == []
        # A router that has forgotten everything is told again; what is not ours stays.
        router.workers.clear()
        router.add("http://other:1")
        assert registrations.follow([again]) == [f"+ {address}"]
        wait_for("its registration", lambda: router.listed() == {"http://other:1", address})
        assert registrations.follow([again._replace(urls=(), serving=False)]) == [f"- {address}"]
    finally:
        router.stop()


def believed(target: int | None, *groups: tuple[int | None, int | None], waited_s: float = 0) -> int | None:
    """Each group: what was acknowledged of it, what it says now."""
    versions = attach.Versions(None, "", "", "", 10.0)
    if waited_s:
        versions._newer_since = time.monotonic() - waited_s
    known = (Group("a/0", "ready", True, 1, "stale", acked, (), {}, "", "", "") for acked, _ in groups)
    said = [version for _, version in groups if version is not None]
    version = versions._believed(said, list(known), target)
    assert version is None or isinstance(version, int)
    return version


def test_which_version_a_fleet_is_said_to_have() -> None:
    assert believed(None, (None, 1), (None, 1)) == 1
    assert believed(None, (None, 1), (None, None)) is None  # a push is on its way
    assert believed(None, (None, 1), (None, None), waited_s=11) == 1
    assert believed(5, (5, 6), (5, 5)) == 5
    assert believed(5, (5, 6), (5, 5), waited_s=11) == 6
    assert believed(5, (5, 6), (5, 6)) == 6
    assert believed(5, (5, 5), (None, 5)) == 5
    assert believed(5, (5, 5), (None, None)) == 5
    assert believed(57, (57, 1), (None, 1)) == 1  # the trainer began anew
    assert believed(57, (57, 1), (57, 57)) == 57  # and has not reached all of them yet
    assert believed(5, (4, 4)) == 5  # this one missed the push of 5, and whoever got it has died


def test_slime_s_hook_waits_for_the_fleet_and_rests_its_probes_until_the_push_is_through(
    fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUT_BARRIER", str(fleet.run.barrier))
    monkeypatch.setenv("RANK", "1")
    slime_hook.before_reload(None, "/weights/1", [])  # at once: the ranks meet after it
    assert fleet.barrier()["clients"] == {}
    monkeypatch.setenv("RANK", "0")
    fleet.kill("actor/1", 0)
    fleet.wait("actor/1 to go", lambda: not fleet.group("actor/1")["urls"])
    slime_hook.before_reload(None, "/weights/1", [])
    assert fleet.group("actor/1")["incarnation"] == 2
    assert fleet.group("actor/1")["urls"]
    barrier = fleet.barrier()
    assert barrier["clients"]["external"]["phase"] == "syncing"
    assert barrier["pools"][0]["probes"] == "paused"
    push(1, url(fleet, "actor/0"), url(fleet, "actor/1"))
    router = StubRouter("vllm")
    try:
        with running(fleet, "router", f"--url={router.url}", "--kind=vllm", "--versions=/weights:version"):
            fleet.wait("its end", lambda: fleet.barrier()["clients"]["external"]["phase"] == "generating")
            assert fleet.barrier()["pools"][0]["probes"] == "on"
            fleet.wait_phase("ready")
    finally:
        router.stop()


def test_a_router_that_does_not_answer_is_said_once_and_ends_nothing(fleet: LocalFleet) -> None:
    push(1, url(fleet, "actor/0"), url(fleet, "actor/1"))
    options = ["--versions=/weights:version", "--interval-s=0.05"]
    with running(fleet, "router", "--url=http://127.0.0.1:9", *options) as process:
        fleet.wait_phase("ready")
        seq = fleet.barrier()["seq"]
        fleet.wait("some more looks", lambda: fleet.barrier()["seq"] > seq + 2)
        assert process.poll() is None
    assert (fleet.folder / "attach.log").read_text().count("does not answer as a router of kind sglang") == 1


def test_it_ends_with_the_fleet(fleet: LocalFleet) -> None:
    router = StubRouter("vllm")
    try:
        with running(fleet, "router", f"--url={router.url}", "--kind=vllm", "--interval-s=0.05") as process:
            fleet.terminate()
            assert process.wait(timeout=15) == 0
    finally:
        router.stop()
