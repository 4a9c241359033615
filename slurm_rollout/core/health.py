"""What a probe's answer means, and what a row of probes adds up to. Pure.

`probes.py` asks; the judges below say whether an answer is the planned one; `fold` adds each result to an `Endpoint`.
Thresholds are not applied here: `decide` compares the counts with the pool's `ProbePolicy`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from slurm_rollout.core.model import Endpoint
from slurm_rollout.core.plan import ProbeRequest

ERROR_LENGTH = 200
_MODEL_UNKNOWN = re.compile(rb"model_not_found|\bmodel\b.{0,300}(does not exist|not found)", re.IGNORECASE | re.DOTALL)

Verdict = tuple[bool, str, str]
"""(ok, mismatch, error): `mismatch` and `error` are one line of text each, empty when there is nothing to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """One probe of one entrypoint. Times in seconds; `…_at` are of the batch host's monotonic clock."""

    kind: Literal["readiness", "liveness"]
    ok: bool
    started_at: float
    ended_at: float
    latency_s: float = 0.0  # until the answer, not until the probe's own end
    answered: bool = True  # a status, a wrong body or a refused connection came; False: nothing came
    mismatch: str = ""  # it answers, but as something other than planned
    error: str = ""
    baseline: float | None = None  # progress counter in the middle of a late probe
    counter: float | None = None  # progress counter after a failure, or shortly before the time-out
    lagged: bool = False  # the prober itself was the trouble (stopped, late, no socket left): nothing was observed


def fold(endpoint: Endpoint, result: ProbeResult) -> Endpoint:
    """Add one probe result to what is known of an endpoint."""
    if result.kind == "readiness" and endpoint.asked_at is None:
        endpoint = replace(endpoint, asked_at=result.started_at)
    if result.lagged:
        return replace(endpoint, last_error=result.error or endpoint.last_error)
    if result.ok:
        return replace(
            endpoint,
            proved=endpoint.proved or result.kind == "readiness",
            answers=True,
            failures=0,
            refusals=0,
            slow=False,
            last_error="",
            first_failure_at=None,
        )
    after = replace(
        endpoint,
        mismatch=result.mismatch or endpoint.mismatch,
        answers=False,
        # a late answer says neither yes nor no, but it is no "no" either: the row ends
        refusals=endpoint.refusals + 1 if result.answered else 0,
        last_error=result.error,
    )
    return _fold_liveness_failure(after, result) if result.kind == "liveness" else after


def _fold_liveness_failure(endpoint: Endpoint, result: ProbeResult) -> Endpoint:
    """A failed probe counts unless the progress counter moved; progress between two failures starts the count anew."""
    failures, slow = endpoint.failures, False
    since, moved = endpoint.last_counter, False
    if result.baseline is not None:
        moved = since is not None and result.baseline != since
        if moved:
            failures = 0
        since = result.baseline
    if result.counter is None:
        # Nothing but the failure was observed; of an engine that worked within this very probe the next one tells.
        failures += not moved
    elif since is None:
        slow = endpoint.slow  # one look cannot tell whether it moves; the next failure can
    elif result.counter != since:
        failures, slow = 0, not result.answered
    else:
        failures += 1
    seen = result.counter if result.counter is not None else since
    first = endpoint.first_failure_at if failures > 1 else result.started_at
    return replace(
        endpoint, failures=failures, slow=slow, last_counter=seen, first_failure_at=first if failures else None
    )


def rested(endpoint: Endpoint) -> Endpoint:
    """Return an endpoint of which nothing is asked for a while.

    What failed in a row goes on after it: an engine that hangs is seen also where a trainer pauses its probes more
    often than the threshold takes.
    """
    return replace(endpoint, answers=False, slow=False, last_counter=None)


# ------------------------------------------------------------------------------------------------------------- judges


def judge(status: int, body: bytes, request: ProbeRequest, model: str) -> Verdict:
    """Is this the answer that `request` must get from an engine that serves `model` (empty: any)?

    A status alone proves nothing: half-dead engines were seen to answer 200 with an empty or one-byte body.
    """
    if status == 404 and _says_model_unknown(body):
        return _mismatch(f"does not know the model {model!r}: {one_line(body)}")
    if status != 200:
        return _no(f"HTTP {status}", body)
    if not request.expect:
        return True, "", ""
    answer = _json_object(body)
    if answer is None:
        return _no("HTTP 200, but not a JSON object", body)
    value = answer.get(request.expect)
    if request.expect == "choices":
        found = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    else:
        found = isinstance(value, (list, dict, str)) and bool(value)
    if not found:
        return _no(f"HTTP 200, but no {request.expect!r} in the answer", body)
    served = answer.get("model")
    if model and isinstance(served, str) and served != model:
        return _mismatch(f"answers as the model {served!r}, planned is {model!r}")
    return True, "", ""


def judge_models(status: int, body: bytes, model: str) -> Verdict:
    """Does this answer to GET /v1/models list `model`?"""
    if status != 200:
        return _no(f"/v1/models: HTTP {status}", body)
    answer = _json_object(body) or {}
    data = answer.get("data")
    names = [m["id"] for m in data if isinstance(m, dict) and "id" in m] if isinstance(data, list) else []
    if not names:
        return _no("/v1/models: HTTP 200, but no model is listed", body)
    if model not in names:
        return _mismatch(f"serves {', '.join(map(repr, names))}, planned is {model!r}")
    return True, "", ""


def counter_value(text: str, name: str) -> float | None:
    """Add up all samples of exactly this name in a Prometheus text page; None when it has none."""
    values = [_number(found) for found in _samples(name).findall(text)]
    finite = [v for v in values if math.isfinite(v)]
    return math.fsum(finite) if finite else None


def one_line(text: bytes | str) -> str:
    """Someone else's words, fit for one line of a terminal."""
    if isinstance(text, bytes):
        text = text[: 4 * ERROR_LENGTH].decode(errors="replace")
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= ERROR_LENGTH else line[: ERROR_LENGTH - 1] + "…"


def _no(what: str, body: bytes) -> Verdict:
    return False, "", f"{what}: {one_line(body) or '(empty)'}"


def _mismatch(what: str) -> Verdict:
    line = one_line(what)
    return False, line, line


def _json_object(body: bytes) -> dict[str, object] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _says_model_unknown(body: bytes) -> bool:
    """vLLM and LMDeploy answer "The model `x` does not exist", others the OpenAI code model_not_found.

    A bare 404 is something else: a path that this server does not have, or not yet.
    """
    return _json_object(body) is not None and _MODEL_UNKNOWN.search(body) is not None


@lru_cache
def _samples(name: str) -> re.Pattern[str]:
    labels = r'(?:\{(?:[^"}]|"(?:\\.|[^"\\])*")*\})?'
    return re.compile(rf"^{re.escape(name)}{labels}[ \t]+(\S+)", re.MULTILINE)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
