"""Let a trainer that knows only fixed addresses and a router use a fleet whose engines come and go.

    python attach.py addresses --style slime
    python attach.py router --url http://127.0.0.1:3001 --kind sglang --versions /model_info:weight_version

`addresses` waits until every group is alive and prints where its engines are, in the words of a framework. They stay
where they are for the whole run, whatever is restarted.

`router` runs beside the trainer and keeps a router's list equal to the barrier: an engine that died, or that has other
weights than the rest, is taken out; one that serves is put in; one that was restarted is taken out and put in again, so
that the router forgets what it held against its predecessor. With `--versions` it also asks the engines which weights
they have and acknowledges them, for a trainer that pushes but knows nothing of the barrier.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import quote

from slurm_rollout.barrier import Barrier, BarrierError, BarrierTimeout, Group, Snapshot, State

TIMEOUT_S = 5.0
CLIENT = "external"
"""What the barrier calls this trainer: here, and in `slime_hook.py`."""


# ----------------------------------------------------------------------------------------------------------- addresses


def slime(urls: list[str]) -> str:
    return f"--rollout-external-engine-addrs {hosts(urls, ' ')}"


def miles(urls: list[str]) -> str:
    return f"--rollout-external {slime(urls)}"


def areal(urls: list[str]) -> str:
    return f"AREAL_LLM_SERVER_ADDRS={hosts(urls, ',')}"


def prime_rl(urls: list[str]) -> str:
    return f"[orchestrator.model.client]\nadmin_base_url = {json.dumps([url + '/v1' for url in urls])}"


def hosts(urls: list[str], separator: str) -> str:
    return separator.join(url.removeprefix("http://") for url in urls)


STYLES: dict[str, Callable[[list[str]], str]] = {
    "slime": slime,
    "vime": slime,
    "miles": miles,
    "areal": areal,
    "prime-rl": prime_rl,
    "urls": "\n".join,
}


def wait_alive(barrier: Barrier, pool: str = "", timeout_s: float = 7200.0) -> list[Group]:
    """Return the groups of a pool (or of all) once every one of them is alive, stale ones too.

    `Barrier.wait_ready` waits for groups that serve; before the first push none does. Raises BarrierError when the
    fleet will not come, or not in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        state = barrier.current()
        groups = of_pool(state, pool)
        if state.confirmed and groups and all(group.urls for group in groups):
            return groups
        if state.phase in ("failed", "stopped") or time.monotonic() > deadline:
            missing = ", ".join(group.id for group in groups if not group.urls) or "no group is known"
            raise BarrierError(f"not every group is alive: {missing}; {state.phase}: {state.message}")
        time.sleep(0.2)


def of_pool(state: State, pool: str) -> list[Group]:
    return [group for group in state.groups if pool in ("", group.pool)]


# -------------------------------------------------------------------------------------------------------------- router


class Router(NamedTuple):
    """How a router is spoken to. `listed` maps the URL of each engine that it has to the name that `remove` wants."""

    listed: Callable[[], dict[str, str]]
    add: Callable[[str], object]
    remove: Callable[[str], object]


def sglang_router(base: str) -> Router:
    """sglang-router from 0.3 on. It accepts an addition or a removal and does it a moment later."""
    return Router(
        listed=lambda: {worker["url"]: worker["id"] for worker in call("GET", f"{base}/workers")["workers"]},
        add=lambda url: call("POST", f"{base}/workers", {"url": url}),
        remove=lambda name: call("DELETE", f"{base}/workers/{name}"),
    )


def vllm_router(base: str) -> Router:
    """vllm-router; the routers of miles, and sglang-router before 0.3, know these paths, too."""
    return Router(
        listed=lambda: {url: url for url in call("GET", f"{base}/list_workers")["urls"]},
        add=lambda url: call("POST", f"{base}/add_worker?url={quote(url, safe='')}"),
        remove=lambda url: call("POST", f"{base}/remove_worker?url={quote(url, safe='')}"),
    )


def lmdeploy_proxy(base: str) -> Router:
    """`lmdeploy serve proxy`, to which the engines were not told to register themselves."""
    return Router(
        listed=lambda: {url: url for url in call("GET", f"{base}/nodes/status")},
        add=lambda url: call("POST", f"{base}/nodes/add", {"url": url}),
        remove=lambda url: call("POST", f"{base}/nodes/remove", {"url": url}),
    )


KINDS: dict[str, Callable[[str], Router]] = {
    "sglang": sglang_router,
    "vllm": vllm_router,
    "lmdeploy": lmdeploy_proxy,
}


class Registrations:
    """Which engine of ours a router has, and of which incarnation: known only of those that were put in from here."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._ours: set[str] = set()
        self._put_in: dict[str, int] = {}

    def follow(self, groups: Iterable[Group]) -> list[str]:
        """Make one step towards a list of those that serve, and of no other of ours; return what was done.

        Raises OSError or ValueError when the router does not answer: nothing is lost, the next step finds out anew.
        """
        groups = list(groups)
        self._ours |= {url for group in groups for url in group.urls}
        serving = {url: group.incarnation for group in groups if group.serving for url in group.urls}
        listed = self._router.listed()
        done = []
        for url in sorted(self._ours & listed.keys()):
            if url not in serving or serving[url] != self._put_in.get(url):
                self._router.remove(listed[url])
                done.append(f"- {url}")
        # One that was just removed is added at the next step: the router may not be through with it yet.
        for url in sorted(serving.keys() - listed.keys()):
            self._router.add(url)
            self._put_in[url] = serving[url]
            done.append(f"+ {url}")
        return done


# ------------------------------------------------------------------------------------------------------------- weights


class Versions:
    """Acknowledges what the engines themselves say that they have."""

    def __init__(self, barrier: Barrier, pool: str, path: str, key: str, settle_s: float) -> None:
        self._barrier = barrier
        self._pool = pool
        self._path = path
        self._key = key
        self._settle_s = settle_s
        self._newer_since: float | None = None

    def acknowledge(self) -> str:
        """Make one look, and return what was acknowledged; empty: nothing new."""
        state = self._barrier.current()  # before the question: an engine that restarts in between is not meant
        alive = [group for group in of_pool(state, self._pool) if group.urls and group.weights != "none"]
        with ThreadPoolExecutor(max(1, len(alive))) as pool:
            answers = list(zip(alive, pool.map(self._version, alive), strict=True))
        said = {group.id: version for group, version in answers if version is not None}
        if not said:
            return ""
        # One pool: the trainer pushes the same weights into all of it.
        target = next(pool.weights_version for pool in state.pools if pool.name == alive[0].pool)
        version = self._believed(list(said.values()), alive, target)
        news = tuple(group for group in alive if said.get(group.id) == version != group.weights_version)
        if version is None or not news:
            return ""
        back = target is not None and version < target
        self._barrier.ack_weights(version, Snapshot(news, state.epoch, state.term), rollback=back)
        if self._barrier.current().clients.get(CLIENT, {}).get("phase") == "syncing":
            self._barrier.announce("generating")  # the hook said that a push begins; this is its end
        return f"version {version} in {', '.join(group.id for group in news)}"

    def _believed(self, said: list[int], alive: list[Group], target: int | None) -> int | None:
        """Return the version that the pool is at; None: that cannot be said yet.

        A push reaches engines one after another: a newer version counts when all have it, or have had time to. An
        older one only when it is news of all of them: then the trainer started again from an older checkpoint. One
        that only missed the last push, and is alone now, had its version before.
        """
        newest = max(said)
        agreed = len(said) == len(alive) and len(set(said)) == 1
        back = agreed and all(group.weights_version != newest for group in alive)
        if target is not None and newest <= target and not back:
            self._newer_since = None
            return target
        if agreed:
            self._newer_since = None
            return newest
        self._newer_since = self._newer_since or time.monotonic()
        return newest if time.monotonic() - self._newer_since >= self._settle_s else target

    def _version(self, group: Group) -> int | None:
        """Return the version that all entrypoints of the group have; None: they differ, do not answer, have none."""
        found = set()
        for url in group.urls:
            try:
                found.add(int(call("GET", url + self._path)[self._key]))
            except (OSError, ValueError, TypeError, KeyError):  # SGLang and vLLM say "default" before the first push
                return None
        return found.pop() if len(found) == 1 else None


def call(method: str, url: str, body: Any = None) -> Any:
    """Send a request and return the JSON of its answer; None where that is none."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        text = answer.read()
    with suppress(ValueError):
        return json.loads(text)
    return None


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description="Attach a trainer with fixed engine addresses to a fleet.")
    parser.add_argument("--barrier", default=None, help="path of barrier.json (default: ROLLOUT_BARRIER)")
    parser.add_argument("--pool", default="", help="only this pool's engines")
    commands = parser.add_subparsers(required=True)
    addresses = commands.add_parser("addresses", help="print where the engines are, once all are alive")
    addresses.add_argument("--style", choices=STYLES, default="urls")
    addresses.add_argument("--timeout", type=float, default=7200.0)
    addresses.set_defaults(run=run_addresses)
    router = commands.add_parser("router", help="keep a router's list equal to the barrier, until the fleet's end")
    router.add_argument("--url", required=True)
    router.add_argument("--kind", choices=KINDS, default="sglang")
    router.add_argument("--versions", metavar="PATH:KEY", help="acknowledge the version that engines say there")
    router.add_argument("--settle-s", type=float, default=30.0, help="how long a push takes to reach all engines")
    router.add_argument("--interval-s", type=float, default=1.0)
    router.set_defaults(run=run_router)
    args = parser.parse_args()
    try:
        return int(args.run(args, Barrier(args.barrier, client=CLIENT)))
    except BarrierError as error:
        print(f"attach.py: {error}", file=sys.stderr)
        return 1


def run_addresses(args: argparse.Namespace, barrier: Barrier) -> int:
    groups = wait_alive(barrier, args.pool, args.timeout)
    print(STYLES[args.style]([url for group in groups for url in group.urls]))
    return 0


def run_router(args: argparse.Namespace, barrier: Barrier) -> int:
    registrations = Registrations(KINDS[args.kind](args.url.rstrip("/")))
    path, _, key = (args.versions or "").partition(":")
    versions = Versions(barrier, args.pool, path, key, args.settle_s) if args.versions else None
    trouble = ""
    while (state := barrier.current()).phase not in ("failed", "stopped"):
        said = ""
        try:
            for line in registrations.follow(of_pool(state, args.pool)):
                print(f"epoch {state.epoch}: {line}", flush=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            said = f"{args.url} does not answer as a router of kind {args.kind}: {error}"
        try:
            if versions and (news := versions.acknowledge()):
                print(f"epoch {state.epoch}: {news}", flush=True)
        except BarrierTimeout as error:  # the coordinator is being replaced
            said = str(error)
        if said != trouble:
            print(said or "all is well again", file=sys.stderr, flush=True)
        trouble = said
        time.sleep(args.interval_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
