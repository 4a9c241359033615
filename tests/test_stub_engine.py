"""The stub engine, run as real processes on loopback ports."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from slurm_rollout.testing import stub_engine
from slurm_rollout.testing.stub_engine import clear_faults, faults_of, parse_member, set_fault

SCRIPT = Path(stub_engine.__file__)
LOOPBACK = "127.0.0.1"
DEADLINE_S = 10.0
HANG_S = 0.4  # how long an answer must stay away to be called hanging; the healthy one takes milliseconds
taken: set[int] = set()


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s} s: {what}"
        time.sleep(0.005)


def bindable(port: int, *, reuse: bool = True) -> bool:
    """Two sockets with SO_REUSEADDR may bind one port while neither listens; without it bind sees that."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def connects(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) == 0


def free_port() -> int:
    """A port below the ephemeral range, where no outgoing connection of another test can take it."""
    while True:
        port = random.randrange(31200, 32700)
        if port not in taken and bindable(port, reuse=False):
            taken.add(port)
            return port


def call(port: int, method: str, path: str, body: bytes | None = None, timeout_s: float = 5) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=timeout_s)
    with contextlib.closing(connection):
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()


def generate(port: int, timeout_s: float = 5, **wish: object) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, **wish}
    status, content = call(port, "POST", "/v1/chat/completions", json.dumps(body).encode(), timeout_s)
    assert status == 200, content
    answer: dict[str, Any] = json.loads(content)
    return answer


def assert_generation_hangs_and_health_lies(port: int) -> None:
    with pytest.raises(TimeoutError):
        generate(port, timeout_s=HANG_S)
    assert call(port, "GET", "/health")[0] == 200


def metrics(port: int) -> dict[str, int]:
    _, text = call(port, "GET", "/metrics")
    samples = (line.split() for line in text.decode().splitlines() if not line.startswith("#"))
    return {name: int(value) for name, value in samples}


class Engine:
    """One process of the stub engine, its log, its ports."""

    def __init__(self, log: Path, port: int, argv: list[str], environment: dict[str, str]) -> None:
        self.port = port
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, env=environment)

    def log(self) -> str:
        return self._log.read_text()

    def logged(self, text: str) -> bool:
        return text in self.log()

    def wait_listening(self) -> None:
        wait_until(lambda: self.logged("listening on") or self.process.poll() is not None, "listening")
        assert self.process.poll() is None, self.log()

    def wait_exit(self) -> int:
        return self.process.wait(DEADLINE_S)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def pid_in_log(self, word: str) -> int:
        wait_until(lambda: self.logged(f"{word}: pid "), f"the pid of the {word}")
        return int(self.log().partition(f"{word}: pid ")[2].split()[0])


class Lab:
    """Starts engines, and ends every one of them at the end of the test."""

    def __init__(self, folder: Path) -> None:
        self.control = folder / "control.json"
        self.left_behind: list[int] = []
        self._folder = folder
        self._engines: list[Engine] = []

    def start(
        self,
        *options: str,
        environment: dict[str, str] | None = None,
        argv: tuple[str, ...] = (sys.executable, "-I", str(SCRIPT)),
        port: int | None = None,
        load_s: float = 0.0,
    ) -> Engine:
        port = port or free_port()
        log = self._folder / f"{len(self._engines)}.log"
        given = ["--host", LOOPBACK, "--load-s", str(load_s), "--control", str(self.control), *options]
        if environment is None:
            given += ["--port", str(port)]
        engine = Engine(log, port, [*argv, *given], {"PATH": os.environ["PATH"], **(environment or {})})
        self._engines.append(engine)
        return engine

    def start_group(self, size: int, *options: str) -> list[Engine]:
        common = ["--size", str(size), "--master", f"{LOOPBACK}:{free_port()}", "--group", "actor/0"]
        return [self.start("--rank", str(rank), *common, *options) for rank in range(size)]

    def group(self, size: int, *options: str) -> list[Engine]:
        engines = self.start_group(size, *options)
        for engine in engines:
            engine.wait_listening()
        return engines

    def end(self) -> None:
        for pid in self.left_behind:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for engine in self._engines:
            engine.process.kill()
        for engine in self._engines:
            engine.process.wait(DEADLINE_S)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.end()


# ----------------------------------------------------------------------------------- options and faults


def test_options_come_from_the_environment_of_a_member() -> None:
    environment = {
        "ROLLOUT_RANK": "1",
        "ROLLOUT_SIZE": "4",
        "ROLLOUT_GROUP": "actor/2",
        "ROLLOUT_INCARNATION": "7",
        "ROLLOUT_MASTER_ADDR": "n1",
        "ROLLOUT_MASTER_PORT": "18001",
        "ROLLOUT_HTTP_PORT": "18000",
        "STUB_CONTROL": "/c.json",
    }
    member = parse_member([], environment)
    assert (member.rank, member.size, member.group, member.incarnation) == (1, 4, "actor/2", 7)
    assert (member.master, member.port, member.control) == ("n1:18001", 18000, "/c.json")
    assert not member.serves()
    assert parse_member(["--entrypoints", "all"], environment).serves()
    assert parse_member(["--rank", "0"], environment).serves()


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "--port"),
        (["--port", "1", "--rank", "2", "--size", "2"], "--rank 2 is not below --size 2"),
        (["--port", "1", "--size", "2"], "needs --master ADDR:PORT"),
        (["--port", "1", "--size", "2", "--master", "n1:99999"], "needs --master ADDR:PORT"),
    ],
)
def test_wrong_options_are_told_apart(argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_member(argv, {})
    assert complaint in capsys.readouterr().err


def test_the_narrower_fault_wins_and_incarnations_limit_it(tmp_path: Path) -> None:
    control = tmp_path / "control.json"
    set_fault(control, "*", generation="500", load_s=2)
    set_fault(control, "actor/0", generation="503")
    set_fault(control, "actor/0/1", generation="dead", incarnations=[1, 2])
    content = json.loads(control.read_text())
    assert faults_of(content, "reward/0", 0, 1) == {"generation": "500", "load_s": 2}
    assert faults_of(content, "actor/0", 0, 1)["generation"] == "503"
    assert faults_of(content, "actor/0", 1, 2)["generation"] == "dead"
    assert faults_of(content, "actor/0", 1, 3)["generation"] == "503"


def test_faults_add_up_and_can_be_taken_back(tmp_path: Path) -> None:
    control = tmp_path / "control.json"
    set_fault(control, "a/0/0", ignore_term=True)
    set_fault(control, "a/0/0", generation="slow:1.5", exit=None)
    assert json.loads(control.read_text()) == {"a/0/0": {"ignore_term": True, "generation": "slow:1.5"}}
    set_fault(control, "a/0/0", ignore_term=None)
    assert json.loads(control.read_text()) == {"a/0/0": {"generation": "slow:1.5"}}
    clear_faults(control)
    assert json.loads(control.read_text()) == {}
    assert list(tmp_path.iterdir()) == [control]


@pytest.mark.parametrize("fault", [{"generatoin": "dead"}, {"generation": "ded"}, {"health": "slow:x"}, {"exit": "3"}])
def test_a_fault_that_does_not_exist_is_refused(tmp_path: Path, fault: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no such fault|must be|could not convert"):
        set_fault(tmp_path / "control.json", "*", **fault)
    assert not (tmp_path / "control.json").exists()


# ------------------------------------------------------------------------------------------- one member


@pytest.mark.parametrize("argv", [(str(SCRIPT),), ("-m", "slurm_rollout.testing.stub_engine")])
def test_it_starts_from_the_environment_alone(lab: Lab, argv: tuple[str, ...]) -> None:
    port = free_port()
    environment = {"ROLLOUT_HTTP_PORT": str(port), "ROLLOUT_GROUP": "actor/3", "ROLLOUT_INCARNATION": "5"}
    engine = lab.start(argv=(sys.executable, *argv), environment=environment, port=port)
    engine.wait_listening()
    answer = generate(port)
    assert (answer["group"], answer["rank"], answer["incarnation"]) == ("actor/3", 0, 5)


def test_it_refuses_connections_while_it_loads_and_is_quick_otherwise(lab: Lab) -> None:
    loading = lab.start(load_s=60)
    wait_until(lambda: loading.logged("start, pid"), "start")
    assert not connects(loading.port)
    assert bindable(loading.port, reuse=False)
    load_s = 0.3
    begun = time.monotonic()
    engine = lab.start(load_s=load_s)
    engine.wait_listening()
    took_s = time.monotonic() - begun
    assert load_s <= took_s < load_s + 5  # about 30 ms on an idle machine
    assert call(engine.port, "GET", "/health") == (200, b"")


def test_bind_early_takes_the_port_long_before_it_listens(lab: Lab) -> None:
    set_fault(lab.control, "*", daemon_child=True)
    loading = lab.start("--bind-early", load_s=60)
    # This child comes after the bind; to look before that could take the port from the engine.
    lab.left_behind.append(loading.pid_in_log("daemon_child"))
    assert not bindable(loading.port, reuse=False)
    assert not connects(loading.port)
    clear_faults(lab.control)
    engine = lab.start("--bind-early")
    engine.wait_listening()
    assert call(engine.port, "GET", "/health")[0] == 200


def test_bind_early_does_not_notice_an_old_engine_on_its_port(lab: Lab) -> None:
    old = lab.start("--bind-early")
    old.wait_listening()
    new = lab.start("--bind-early", port=old.port)
    new.wait_listening()
    assert old.process.poll() is None


def test_a_taken_port_ends_it(lab: Lab) -> None:
    first = lab.start()
    first.wait_listening()
    second = lab.start(port=first.port)
    assert second.wait_exit() == 1
    assert second.logged(f"cannot bind {LOOPBACK}:{first.port}")


def test_answers_have_the_shape_of_openai(lab: Lab) -> None:
    engine = lab.start("--model", "qwen", "--incarnation", "4", "--group", "actor/0")
    engine.wait_listening()
    chat = generate(engine.port, model="qwen")
    assert chat["object"] == "chat.completion"
    assert chat["model"] == "qwen"
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": "token token token"}
    assert chat["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    assert (chat["group"], chat["rank"], chat["incarnation"]) == ("actor/0", 0, 4)
    assert chat["id"] != generate(engine.port)["id"]
    status, body = call(engine.port, "POST", "/v1/completions", b'{"prompt": [1], "max_tokens": 1}')
    assert status == 200
    assert json.loads(body)["choices"][0]["text"] == "token"
    models = json.loads(call(engine.port, "GET", "/v1/models")[1])
    assert [model["id"] for model in models["data"]] == ["qwen"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b'{"model": "other"}', 404),
        ("/v1/chat/completions", b"{not json", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", b'{"stream": true}', 400),
        ("/v1/nothing", b"{}", 404),
    ],
)
def test_wrong_requests_get_openai_errors(lab: Lab, path: str, body: bytes, status: int) -> None:
    engine = lab.start("--model", "qwen")
    engine.wait_listening()
    got, content = call(engine.port, "POST", path, body)
    error = json.loads(content)["error"]
    assert (got, error["code"], error["type"]) == (status, status, "invalid_request_error")
    assert error["message"]


def test_one_connection_serves_many_requests(lab: Lab) -> None:
    engine = lab.start()
    engine.wait_listening()
    connection = http.client.HTTPConnection(LOOPBACK, engine.port, timeout=5)
    with contextlib.closing(connection):
        connection.connect()
        first = connection.sock
        for path in ("/health", "/nothing", "/v1/models"):
            connection.request("GET", path)
            connection.getresponse().read()
            assert connection.sock is first


def test_tokens_rise_with_every_answer(lab: Lab) -> None:
    engine = lab.start()
    engine.wait_listening()
    assert metrics(engine.port)["stub_tokens_total"] == 0
    generate(engine.port)
    after = metrics(engine.port)
    assert (after["stub_tokens_total"], after["stub_generated_tokens_total"]) == (4, 3)
    assert after["stub_requests_running"] == after["stub_requests_waiting"] == 0


def test_session_port_answers_on_its_root(lab: Lab) -> None:
    session = free_port()
    lab.start("--session-port", str(session)).wait_listening()
    assert call(session, "GET", "/")[0] == 200
    assert call(session, "GET", "/health")[0] == 404


# ---------------------------------------------------------------------------------------------- a group


def test_followers_are_dummies_that_say_200(lab: Lab) -> None:
    leader, follower = lab.group(2)
    assert generate(leader.port)["rank"] == 0
    assert call(follower.port, "GET", "/health")[0] == 200
    for path in ("/v1/models", "/metrics", "/"):
        assert call(follower.port, "GET", path)[0] == 404
    assert call(follower.port, "POST", "/v1/chat/completions", b"{}")[0] == 404
    assert leader.logged("rendezvous complete")
    assert follower.logged("rendezvous complete")


def test_every_rank_answers_when_all_are_entrypoints(lab: Lab) -> None:
    engines = lab.group(3, "--entrypoints", "all")
    assert [generate(engine.port)["rank"] for engine in engines] == [0, 1, 2]


def test_a_stopped_follower_hangs_every_entrypoint_until_it_goes_on(lab: Lab) -> None:
    engines = lab.group(3, "--entrypoints", "all")
    engines[2].signal(signal.SIGSTOP)
    assert_generation_hangs_and_health_lies(engines[0].port)
    assert_generation_hangs_and_health_lies(engines[1].port)
    engines[2].signal(signal.SIGCONT)
    assert generate(engines[1].port)["rank"] == 1


@pytest.mark.parametrize("victim", [0, 2])
def test_the_survivors_of_a_dead_rank_hang_and_stay(lab: Lab, victim: int) -> None:
    engines = lab.group(3, "--entrypoints", "all")
    engines[victim].process.kill()
    engines[victim].wait_exit()
    survivor = engines[1]
    assert_generation_hangs_and_health_lies(survivor.port)
    assert_generation_hangs_and_health_lies(engines[2 - victim].port)
    assert [engine.process.poll() for engine in engines].count(None) == 2


def test_the_survivors_of_a_dead_rank_exit_when_told_so(lab: Lab) -> None:
    engines = lab.group(3, "--on-peer-death", "exit")
    engines[2].process.kill()
    assert engines[0].wait_exit() == 1
    assert engines[1].wait_exit() == 1
    assert engines[0].logged("rank 2 is gone")
    assert engines[1].logged("rank 0 is gone")


def test_nobody_serves_before_every_rank_has_loaded(lab: Lab) -> None:
    set_fault(lab.control, "actor/0/1", load_s=0.5)
    begun = time.monotonic()
    leader, _, other = lab.start_group(3, "--entrypoints", "all")
    for engine in (leader, other):
        engine.wait_listening()
        assert time.monotonic() - begun >= 0.5


def test_an_old_rank_is_refused_by_a_new_rendezvous(lab: Lab) -> None:
    common = ["--size", "2", "--master", f"{LOOPBACK}:{free_port()}", "--group", "actor/0"]
    leader = lab.start("--rank", "0", "--incarnation", "2", *common)
    old = lab.start("--rank", "1", "--incarnation", "1", *common)
    assert old.wait_exit() == 1
    assert old.logged("refused rank 1: its incarnation is 1, here it is 2")
    assert leader.logged("refused rank 1: its incarnation is 1, here it is 2")
    assert not leader.logged("rendezvous complete")
    lab.start("--rank", "1", "--incarnation", "2", *common).wait_listening()
    leader.wait_listening()


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--rank", "1", "--group", "actor/1"], "its group is actor/1"),
        (["--rank", "2", "--size", "3"], "its size is 3"),
        (["--rank", "1"], "it is here already"),
        (["--rank", "1", "--incarnation", "9"], "its incarnation is 9"),
    ],
)
def test_a_complete_group_refuses_late_strangers(lab: Lab, options: list[str], refusal: str) -> None:
    common = ["--size", "2", "--master", f"{LOOPBACK}:{free_port()}", "--group", "actor/0"]
    leader = lab.start("--rank", "0", *common)
    lab.start("--rank", "1", *common)
    leader.wait_listening()
    stranger = lab.start(*common, *options)
    assert stranger.wait_exit() == 1
    assert stranger.logged(refusal)
    assert leader.logged(refusal)
    assert generate(leader.port)["rank"] == 0


@pytest.mark.parametrize(
    ("rank", "complaint"), [(0, "still missing: ranks [1]"), (1, "rendezvous timed out: no group at")]
)
def test_a_rank_whose_peers_do_not_come_gives_up(lab: Lab, rank: int, complaint: str) -> None:
    master = f"{LOOPBACK}:{free_port()}"
    alone = lab.start("--rank", str(rank), "--size", "2", "--master", master, "--rendezvous-timeout-s", "0.3")
    assert alone.wait_exit() == 1
    assert alone.logged(complaint)


# ------------------------------------------------------------------------------------- weights and sleep


def post(port: int, path: str, timeout_s: float = 5, **body: object) -> tuple[int, dict[str, Any]]:
    status, content = call(port, "POST", path, json.dumps(body).encode(), timeout_s)
    return status, json.loads(content)


def weights(port: int) -> Any:
    return json.loads(call(port, "GET", "/weights")[1])["version"]


def in_background(action: Callable[[], object]) -> Future[object]:
    """Unlike a pool's, such a thread keeps no test from ending."""
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except Exception as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def test_answers_are_stamped_with_the_weights_that_made_them(lab: Lab) -> None:
    engine = lab.start("--group", "actor/1", "--incarnation", "3", "--update-s", "0")
    engine.wait_listening()
    who = {"group": "actor/1", "incarnation": 3, "rank": 0}
    assert generate(engine.port)["rollout"] == {**who, "weights_version": None}
    assert weights(engine.port) is None
    assert post(engine.port, "/update_weights", version=42) == (200, {"version": 42})
    assert weights(engine.port) == 42
    assert generate(engine.port)["rollout"] == {**who, "weights_version": 42}
    status, body = call(engine.port, "POST", "/v1/completions", b'{"prompt": [1], "max_tokens": 1}')
    assert (status, json.loads(body)["rollout"]["weights_version"]) == (200, 42)


@pytest.mark.parametrize("body", [b"{}", b"[]", b"{not json", b'{"version": "42"}', b'{"version": null}'])
def test_an_update_without_a_version_is_refused(lab: Lab, body: bytes) -> None:
    engine = lab.start()
    engine.wait_listening()
    assert call(engine.port, "POST", "/update_weights", body)[0] == 400
    assert weights(engine.port) is None


def test_generation_goes_on_with_the_old_weights_while_new_ones_arrive(lab: Lab) -> None:
    engine = lab.start("--update-s", "2", "--token-s", "0.03")
    engine.wait_listening()
    update = in_background(lambda: post(engine.port, "/update_weights", version=1))
    wait_until(lambda: json.loads(call(engine.port, "GET", "/weights")[1])["updating"], "the update has begun")
    during = generate(engine.port)["rollout"]
    assert during["weights_version"] is None
    assert "weights_version_end" not in during
    across = generate(engine.port, timeout_s=DEADLINE_S, max_tokens=100)["rollout"]
    assert (across["weights_version"], across["weights_version_end"]) == (None, 1)
    assert update.result(DEADLINE_S) == (200, {"version": 1})
    assert generate(engine.port)["rollout"]["weights_version"] == 1


def test_generation_takes_time_for_each_token(lab: Lab) -> None:
    engine = lab.start("--token-s", "0.03")
    engine.wait_listening()
    begun = time.monotonic()
    generate(engine.port, max_tokens=10)
    assert 0.3 <= time.monotonic() - begun < 5


def test_an_update_needs_every_rank_and_is_finished_without_its_client(lab: Lab) -> None:
    leader, follower = lab.group(2, "--update-s", "0")
    follower.signal(signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        post(leader.port, "/update_weights", timeout_s=2, version=1)  # by then it has begun
    # The next one waits behind it, and is forgotten when its client leaves before it has begun.
    with pytest.raises(TimeoutError):
        post(leader.port, "/update_weights", timeout_s=HANG_S, version=2)
    assert weights(leader.port) is None
    follower.signal(signal.SIGCONT)
    wait_until(lambda: weights(leader.port) == 1, "the first update is finished")
    assert not leader.logged("version 2")


def test_update_faults(lab: Lab) -> None:
    engine = lab.start("--update-s", "0")
    engine.wait_listening()
    set_fault(lab.control, "*", update="500")
    assert post(engine.port, "/update_weights", version=1)[0] == 500
    set_fault(lab.control, "*", update="dead")
    with pytest.raises(TimeoutError):
        post(engine.port, "/update_weights", timeout_s=HANG_S, version=1)
    assert generate(engine.port)["rollout"]["weights_version"] is None
    clear_faults(lab.control)
    assert post(engine.port, "/update_weights", version=1)[0] == 200


def test_asleep_a_generation_hangs_and_is_counted_and_nothing_else_notices(lab: Lab) -> None:
    engine = lab.start("--update-s", "0")
    engine.wait_listening()
    post(engine.port, "/update_weights", version=5)
    assert post(engine.port, "/sleep") == (200, {"asleep": True})
    assert call(engine.port, "GET", "/health")[0] == 200
    assert call(engine.port, "GET", "/v1/models")[0] == 200
    assert metrics(engine.port)["stub_asleep_requests_total"] == 0
    assert post(engine.port, "/update_weights", version=6)[0] == 409
    asked = in_background(lambda: generate(engine.port, timeout_s=DEADLINE_S))
    wait_until(lambda: metrics(engine.port)["stub_asleep_requests_total"] == 1, "the request is counted")
    assert_generation_hangs_and_health_lies(engine.port)
    assert not asked.done()
    post(engine.port, "/wake_up")
    answer = asked.result(DEADLINE_S)
    assert isinstance(answer, dict)
    assert answer["rollout"]["weights_version"] == 5
    assert metrics(engine.port)["stub_asleep_requests_total"] == 2


def test_a_generation_that_still_runs_when_the_engine_falls_asleep_is_counted_too(lab: Lab) -> None:
    engine = lab.start("--token-s", "0.1")
    engine.wait_listening()
    running = in_background(lambda: generate(engine.port, timeout_s=DEADLINE_S, max_tokens=20))
    wait_until(lambda: metrics(engine.port)["stub_requests_running"] == 1, "it runs")
    post(engine.port, "/sleep")
    assert metrics(engine.port)["stub_asleep_requests_total"] == 1
    with pytest.raises(TimeoutError):
        running.result(20 * 0.1 + HANG_S)
    post(engine.port, "/wake_up")
    assert running.result(DEADLINE_S)


def test_a_generation_crashes_a_sleeping_engine_when_told_so(lab: Lab) -> None:
    engine = lab.start("--asleep-request", "crash")
    engine.wait_listening()
    post(engine.port, "/sleep")
    assert call(engine.port, "GET", "/metrics")[0] == 200
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        generate(engine.port)
    assert engine.wait_exit() == 1
    assert engine.logged("1 generation(s) asked for while asleep")


def test_a_follower_has_no_weights_of_its_own(lab: Lab) -> None:
    _, follower = lab.group(2)
    for path in ("/update_weights", "/sleep", "/wake_up"):
        assert post(follower.port, path, version=1)[0] == 404


# --------------------------------------------------------------------------------------- faults at work


def test_generation_faults(lab: Lab) -> None:
    engine = lab.start()
    engine.wait_listening()

    def answer(generation: str) -> tuple[int, bytes]:
        set_fault(lab.control, "*", generation=generation)
        return call(engine.port, "POST", "/v1/chat/completions", b'{"max_tokens": 1}')

    for status in (500, 503):
        got, body = answer(str(status))
        assert got == status
        assert json.loads(body)["error"]["type"] == "server_error"
    got, body = answer("garbage")
    assert got == 200
    with pytest.raises(ValueError, match=r"utf-8|control character|Unterminated"):
        json.loads(body)
    got, body = answer("empty")
    assert (got, json.loads(body)["choices"]) == (200, [])
    begun = time.monotonic()
    assert answer("slow:0.3")[0] == 200
    assert time.monotonic() - begun >= 0.3
    assert metrics(engine.port)["stub_generated_tokens_total"] == 1  # only the slow one generated anything
    set_fault(lab.control, "*", generation="dead")
    assert_generation_hangs_and_health_lies(engine.port)
    clear_faults(lab.control)
    assert generate(engine.port)


def test_health_faults(lab: Lab) -> None:
    engine = lab.start()
    engine.wait_listening()
    set_fault(lab.control, "*", health="503")
    assert call(engine.port, "GET", "/health")[0] == 503
    assert generate(engine.port)
    set_fault(lab.control, "*", health="dead")
    with pytest.raises(TimeoutError):
        call(engine.port, "GET", "/health", timeout_s=HANG_S)
    assert generate(engine.port)


def test_a_dead_generation_on_a_dummy_follower_hangs_the_leader(lab: Lab) -> None:
    leader, follower = lab.group(2)
    set_fault(lab.control, "actor/0/1", generation="dead")
    assert_generation_hangs_and_health_lies(leader.port)
    assert call(follower.port, "GET", "/health")[0] == 200
    clear_faults(lab.control)
    assert generate(leader.port)


def test_a_saturated_engine_is_late_but_makes_progress(lab: Lab) -> None:
    leader, follower = lab.group(2)
    set_fault(lab.control, "*", saturated=True)
    assert_generation_hangs_and_health_lies(leader.port)
    before = metrics(leader.port)["stub_generated_tokens_total"]
    wait_until(lambda: metrics(leader.port)["stub_generated_tokens_total"] > before, "tokens rise")
    set_fault(lab.control, "*", slow_s=0.3)
    begun = time.monotonic()
    generate(leader.port)
    assert time.monotonic() - begun >= 0.3
    follower.signal(signal.SIGSTOP)
    # At most one iteration is under way when the follower stops; after that nothing can move.
    wait_until(lambda: not moves(leader.port), "progress ends with a hung rank")


def moves(port: int) -> bool:
    before = metrics(port)
    deadline = time.monotonic() + 3 * stub_engine.BUSY_TICK_S
    while time.monotonic() < deadline:
        if metrics(port)["stub_iterations_total"] > before["stub_iterations_total"]:
            return True
        time.sleep(0.02)
    return False


def test_a_prefill_stalls_generation_while_iterations_rise(lab: Lab) -> None:
    engine = lab.start()
    engine.wait_listening()
    begun = time.monotonic()
    set_fault(lab.control, "*", prefill_s=3)
    with pytest.raises(TimeoutError):
        generate(engine.port, timeout_s=HANG_S)
    wait_until(lambda: metrics(engine.port)["stub_iterations_total"] > 0, "iterations rise")
    during = metrics(engine.port)
    assert during["stub_tokens_total"] > 0
    assert during["stub_generated_tokens_total"] == 0
    generate(engine.port, timeout_s=DEADLINE_S)
    assert time.monotonic() - begun >= 3
    set_fault(lab.control, "*", slow_s=1)
    generate(engine.port, timeout_s=2.5)  # one stall, not one per request or per change of another fault


def test_an_engine_that_is_deaf_to_one_client_answers_every_other(lab: Lab) -> None:
    (engine,) = lab.group(1)
    set_fault(lab.control, "*", deaf_to="slurm-rollout")
    wait_until(lambda: asked_as(engine, "slurm-rollout/0.1", HANG_S) is None, "that client gets no answer")
    assert asked_as(engine, "", 5) == 200
    generate(engine.port)


def asked_as(engine: Engine, client: str, timeout_s: float) -> int | None:
    connection = http.client.HTTPConnection(LOOPBACK, engine.port, timeout=timeout_s)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/metrics", headers={"User-Agent": client})
            return connection.getresponse().status
        except TimeoutError:
            return None


def test_an_engine_that_never_listens_lives_on_without_its_port(lab: Lab) -> None:
    set_fault(lab.control, "*", never_listens=True)
    (engine,) = lab.start_group(1)
    wait_until(lambda: engine.logged("start, pid"), "it has started")
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        assert not connects(engine.port)
        assert engine.process.poll() is None


def test_a_client_that_leaves_is_forgotten(lab: Lab) -> None:
    leader, follower = lab.group(2)
    follower.signal(signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        generate(leader.port, timeout_s=HANG_S)
    wait_until(lambda: metrics(leader.port)["stub_requests_running"] == 0, "the request is dropped")


def test_exit_ends_it_with_that_code_in_that_incarnation_only(lab: Lab) -> None:
    engine = lab.start("--group", "a/0")
    engine.wait_listening()
    set_fault(lab.control, "a/0/0", exit=37, incarnations=[1])
    assert engine.wait_exit() == 37
    again = lab.start("--group", "a/0", "--incarnation", "2")
    again.wait_listening()
    assert generate(again.port)


def test_a_write_without_room_ends_it_with_the_error_in_its_last_line(lab: Lab) -> None:
    engine = lab.start("--group", "a/0")
    engine.wait_listening()
    set_fault(lab.control, "a/0/0", write="/dev/full")
    assert engine.wait_exit() == 1
    assert engine.log().splitlines()[-1].endswith("OSError: [Errno 28] No space left on device")


def test_crash_at_start_comes_before_the_port(lab: Lab) -> None:
    set_fault(lab.control, "*", crash_at_start=True)
    engine = lab.start()
    assert engine.wait_exit() == 1
    assert not engine.logged("listening")


def logged_times(engine: Engine, text: str, count: int) -> bool:
    return engine.log().count(text) == count


def test_a_broken_control_file_changes_nothing(lab: Lab) -> None:
    engine = lab.start()
    engine.wait_listening()
    set_fault(lab.control, "*", generation="503")
    assert call(engine.port, "POST", "/v1/completions", b"{}")[0] == 503
    for count, content in enumerate(("{half", "[]", '{"*": {"generatoin": "ok"}}'), start=1):
        staged = lab.control.with_suffix(".new")
        staged.write_text(content)
        staged.replace(lab.control)
        wait_until(partial(logged_times, engine, "is left unused", count), "the log says so")
        assert call(engine.port, "POST", "/v1/completions", b"{}")[0] == 503


# ------------------------------------------------------------------------------ signals and leftovers


@pytest.mark.parametrize("load_s", [0.0, 60.0])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_term_ends_it_at_once(lab: Lab, load_s: float, number: signal.Signals) -> None:
    engine = lab.start(load_s=load_s)
    wait_until(lambda: engine.logged("start, pid"), "start")
    if not load_s:
        engine.wait_listening()
    engine.signal(number)
    assert engine.wait_exit() == 0


def test_ignored_term_leaves_it_serving(lab: Lab) -> None:
    set_fault(lab.control, "*", ignore_term=True)
    engine = lab.start()
    engine.wait_listening()
    engine.signal(signal.SIGTERM)
    wait_until(lambda: engine.logged("signal 15 ignored"), "the log says so")
    assert generate(engine.port)


def test_sigusr1_is_not_handled(lab: Lab) -> None:
    engine = lab.start()
    engine.wait_listening()
    engine.signal(signal.SIGUSR1)
    assert engine.wait_exit() == -signal.SIGUSR1


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def arrived(pid: int) -> bool:
    """Whether the leftover runs its own program; until then it still shows the engine's environment."""
    return b"time.sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_orphan_holds_the_port_after_the_engine_and_bears_no_mark(lab: Lab) -> None:
    set_fault(lab.control, "*", orphan=True)
    port = free_port()
    environment = {"ROLLOUT_HTTP_PORT": str(port), "ROLLOUT_RUN": "some-run"}
    engine = lab.start(environment=environment, port=port)
    orphan = engine.pid_in_log("orphan")
    lab.left_behind.append(orphan)
    engine.wait_listening()
    wait_until(lambda: arrived(orphan), "the orphan has become its own program")
    assert generate(port)
    engine.process.kill()
    engine.wait_exit()
    assert not bindable(port)
    assert connects(port)
    assert environment_of(orphan) == b""
    assert os.getsid(orphan) not in (os.getsid(0), engine.process.pid)
    os.kill(orphan, signal.SIGKILL)
    wait_until(lambda: bindable(port), "the port is free once the orphan is gone")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_daemon_child_keeps_the_mark_and_no_port(lab: Lab) -> None:
    set_fault(lab.control, "*", daemon_child=True)
    port = free_port()
    environment = {"ROLLOUT_HTTP_PORT": str(port), "ROLLOUT_RUN": "some-run"}
    engine = lab.start(environment=environment, port=port)
    child = engine.pid_in_log("daemon_child")
    lab.left_behind.append(child)
    engine.wait_listening()
    wait_until(lambda: arrived(child), "the child has become its own program")
    engine.process.kill()
    engine.wait_exit()
    assert bindable(port)
    assert b"ROLLOUT_RUN=some-run" in environment_of(child)
    assert os.getsid(child) != os.getsid(0)
