"""Asks every URL of a barrier file, again and again, from inside of the cluster's network: python prober.py BARRIER OUT

One file of the standard library: it is run where nothing else is. It writes a line for each question, with what the
barrier offered when it was asked, and with the stamp of who answered.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from urllib.parse import urlsplit

PERIOD_S = 0.5
POLL_S = 0.05
TIMEOUT_S = 5.0
BODY = json.dumps({"model": "stub", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]})


def offered(path: str) -> dict[str, tuple[str, int]]:
    """Return what the barrier file offers now: URL to group and incarnation."""
    try:
        with open(path, encoding="utf-8") as file:
            groups = json.load(file)["groups"]
    except (OSError, ValueError):
        return {}
    return {url: (group["id"], group["incarnation"]) for group in groups for url in group["urls"]}


def ask(url: str) -> dict[str, object]:
    """Ask for one token; return the answer's stamp, or the error."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", "/v1/chat/completions", BODY, {"Content-Type": "application/json"})
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            return {"error": f"HTTP {response.status}"}
        answer = json.loads(body)
        if not answer["choices"]:
            return {"error": "no choices"}
        return {"answered_by": [answer["rollout"]["group"], answer["rollout"]["incarnation"]]}
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        connection.close()


def watch(url: str, path: str, out: Writer) -> None:
    """Ask at every period, and at once when the URL is offered again, or for another incarnation."""
    before, asked_at = None, 0.0
    while True:
        at, who = time.time(), offered(path).get(url)
        if who and (who != before or at >= asked_at + PERIOD_S):
            asked_at = at
            found = ask(url)
            out.write({"at": at, "ended": time.time(), "url": url, "group": who[0], "incarnation": who[1], **found})
        before = who
        time.sleep(POLL_S)


class Writer:
    def __init__(self, path: str) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # for life
        self._lock = threading.Lock()

    def write(self, line: dict[str, object]) -> None:
        with self._lock:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def main() -> None:
    path, out = sys.argv[1], Writer(sys.argv[2])
    known: set[str] = set()
    while True:
        for url in offered(path).keys() - known:
            known.add(url)
            threading.Thread(target=watch, args=(url, path, out), daemon=True).start()
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
