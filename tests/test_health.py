"""What a probe's answer means, and what a row of probes adds up to."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal

import pytest

from slurm_rollout.core.health import ProbeResult, counter_value, fold, judge, judge_models, one_line
from slurm_rollout.core.model import Endpoint
from slurm_rollout.core.plan import ProbeRequest

CHAT = ProbeRequest()
EMBEDDINGS = ProbeRequest(path="/v1/embeddings", body="{}", expect="data")
ANY_200 = ProbeRequest(path="/ready", expect="")

READY = Endpoint(rank=0, proved=True, answers=True)


def result(
    kind: Literal["readiness", "liveness"] = "liveness",
    *,
    ok: bool = False,
    at: float = 10.0,
    answered: bool = False,
    mismatch: str = "",
    error: str = "no answer within 30 s",
    baseline: float | None = None,
    counter: float | None = None,
    lagged: bool = False,
) -> ProbeResult:
    return ProbeResult(
        kind=kind,
        ok=ok,
        answered=answered,
        mismatch=mismatch,
        error="" if ok else error,
        baseline=baseline,
        counter=counter,
        lagged=lagged,
        started_at=at - 1,
        ended_at=at,
    )


def timed_out(*, baseline: float | None = None, counter: float | None = None, at: float = 10.0) -> ProbeResult:
    return result(baseline=baseline, counter=counter, at=at)


def said_no(*, counter: float | None = None) -> ProbeResult:
    return result(answered=True, error="HTTP 503: draining", counter=counter)


OK = result(ok=True, answered=True)


def folded(endpoint: Endpoint, *results: ProbeResult) -> Endpoint:
    for each in results:
        endpoint = fold(endpoint, each)
    return endpoint


# --------------------------------------------------------------------------------------------------------------- fold


def test_one_readiness_success_proves_and_no_failure_takes_it_back() -> None:
    proved = fold(Endpoint(rank=0), result("readiness", ok=True))

    assert proved == READY
    assert folded(proved, timed_out(), said_no(), timed_out()).proved


def test_a_liveness_success_proves_nothing() -> None:
    assert not fold(Endpoint(rank=0), OK).proved


def test_success_resets_the_counts() -> None:
    troubled = replace(READY, answers=False, failures=3, refusals=2, slow=True, last_error="x", first_failure_at=1.0)

    assert fold(troubled, OK) == READY


def test_an_endpoint_answers_when_its_newest_probe_succeeded() -> None:
    adopted = Endpoint(rank=0)

    assert not adopted.answers
    assert fold(adopted, OK).answers
    assert not folded(adopted, OK, timed_out()).answers
    assert not folded(adopted, OK, said_no()).answers
    assert folded(adopted, OK, result(lagged=True)).answers


def test_readiness_failures_are_no_liveness_failures() -> None:
    late = fold(Endpoint(rank=0), result("readiness"))
    refused = fold(late, result("readiness", answered=True, error="Connection refused"))

    assert (late.failures, late.refusals, late.last_error) == (0, 0, "no answer within 30 s")
    assert (refused.failures, refused.refusals, refused.last_error) == (0, 1, "Connection refused")


@pytest.mark.parametrize(
    ("results", "refusals"),
    [
        ([said_no(), said_no()], 2),
        ([said_no(), timed_out(), said_no()], 1),
        ([timed_out(), timed_out()], 0),
        ([said_no(), OK, said_no()], 1),
    ],
    ids=["in a row", "late answers between", "only late answers", "success between"],
)
def test_refusals_count_answers_that_say_no(results: list[ProbeResult], refusals: int) -> None:
    assert folded(READY, *results).refusals == refusals


@pytest.mark.parametrize(
    ("results", "failures", "slow"),
    [
        ([timed_out(), timed_out()], 2, False),
        ([timed_out(baseline=5), timed_out(baseline=5)], 2, False),
        ([timed_out(baseline=5, counter=5)] * 2, 2, False),
        ([timed_out(baseline=5, counter=6), timed_out(baseline=7, counter=8)], 0, True),
        ([timed_out(baseline=5, counter=5), timed_out(baseline=5, counter=6)], 0, True),
        ([timed_out(baseline=5, counter=6), timed_out(baseline=6, counter=6)], 1, False),
        ([timed_out(baseline=5, counter=5), timed_out(baseline=7, counter=7)], 1, False),
        ([timed_out(baseline=5, counter=5), timed_out(baseline=7)], 0, False),
        ([timed_out(baseline=5, counter=5), timed_out(counter=5)], 2, False),
        ([timed_out(baseline=5, counter=5), timed_out(), timed_out(counter=5)], 3, False),
        ([timed_out(baseline=5, counter=5), timed_out(counter=6)], 0, True),
        ([timed_out(baseline=5, counter=5), timed_out(baseline=1, counter=2)], 0, True),
        ([timed_out(counter=5)], 0, False),
        ([timed_out(counter=5), timed_out(counter=5)], 1, False),
        ([said_no(counter=5), said_no(counter=6)], 0, False),
        ([said_no(counter=5), said_no(counter=5)], 1, False),
    ],
    ids=[
        "no counter",
        "counter not readable in the end",
        "counter stands",
        "counter moves",
        "moves again",
        "stands again",
        "moved between the probes: counted anew",
        "moved between the probes, then not readable",
        "one look was missed, stands",
        "all looks of a probe were missed, stands",
        "one look was missed, moved",
        "restarted from nought: moved",
        "the first look ever tells nothing",
        "the second one does",
        "says no while it works for others: not slow",
        "says no and stands",
    ],
)
def test_a_liveness_failure_counts_unless_the_counter_moved(
    results: list[ProbeResult], failures: int, slow: bool
) -> None:
    endpoint = folded(READY, *results)

    assert (endpoint.failures, endpoint.slow) == (failures, slow)


def test_an_engine_that_progresses_now_and_then_never_reaches_a_threshold_of_three() -> None:
    """Each step of the engine takes longer than a probe; it never moves while the last part of a probe is watched."""
    endpoint, most = READY, 0
    for step in range(40):
        endpoint = fold(endpoint, timed_out(baseline=step // 2, counter=step // 2))
        most = max(most, endpoint.failures)

    assert most == 2


def test_the_first_failure_of_a_row_is_remembered() -> None:
    three = folded(READY, timed_out(at=10), timed_out(at=40), timed_out(at=70))
    anew = folded(three, timed_out(baseline=1, counter=1, at=100), timed_out(baseline=2, counter=2, at=130))

    assert three.first_failure_at == 9  # when its probe began
    assert anew.first_failure_at == 129
    assert fold(anew, timed_out(baseline=2, counter=3)).first_failure_at is None
    assert fold(anew, OK).first_failure_at is None


def test_when_an_engine_was_first_asked_is_remembered() -> None:
    refused = result("readiness", answered=True, error="Connection refused", at=10)
    asked = folded(Endpoint(rank=0), refused, result("readiness", ok=True, at=20))

    assert asked.asked_at == 9
    assert fold(asked, timed_out(at=40)).asked_at == 9
    assert fold(Endpoint(rank=0), timed_out(at=40)).asked_at is None


@pytest.mark.parametrize("kind", ["readiness", "liveness"])
def test_what_a_lagging_prober_saw_changes_nothing(kind: Literal["readiness", "liveness"]) -> None:
    troubled = replace(READY, failures=2, refusals=1, slow=True, last_counter=5.0, last_error="x", first_failure_at=1.0)

    for answered in (True, False):
        lagged = result(kind, answered=answered, lagged=True, counter=9, mismatch="y", error="")
        assert fold(troubled, lagged) == troubled


def test_the_words_for_own_trouble_are_kept() -> None:
    assert fold(READY, result(lagged=True, error="Too many open files")) == replace(
        READY, last_error="Too many open files"
    )


def test_a_mismatch_is_kept() -> None:
    wrong = fold(Endpoint(rank=0), result("readiness", answered=True, mismatch="serves 'a'", error="serves 'a'"))

    assert wrong.mismatch == "serves 'a'"
    assert folded(wrong, OK, timed_out()).mismatch == "serves 'a'"


# ------------------------------------------------------------------------------------------------------------- judges


def answer(**content: object) -> bytes:
    return json.dumps(content).encode()


CHOICE = {"index": 0, "message": {"role": "assistant", "content": ""}}


@pytest.mark.parametrize(
    ("status", "body", "request_", "error"),
    [
        (200, answer(choices=[CHOICE]), CHAT, ""),
        (200, answer(choices=[CHOICE], model="m"), CHAT, ""),
        (200, answer(data=[{"embedding": []}]), EMBEDDINGS, ""),
        (200, b"", ANY_200, ""),
        (200, b"", CHAT, "HTTP 200, but not a JSON object: (empty)"),
        (200, b"x", CHAT, "HTTP 200, but not a JSON object: x"),
        (200, b"\xff", CHAT, "HTTP 200, but not a JSON object: \N{REPLACEMENT CHARACTER}"),
        (200, b"[" * 200_000, CHAT, "HTTP 200, but not a JSON object: [["),
        (200, b'["choices"]', CHAT, "HTTP 200, but not a JSON object"),
        (200, answer(choices=[]), CHAT, "HTTP 200, but no 'choices' in the answer"),
        (200, answer(choices="yes"), CHAT, "HTTP 200, but no 'choices' in the answer"),
        (200, answer(choices={"0": CHOICE}), CHAT, "HTTP 200, but no 'choices' in the answer"),
        (200, answer(choices=[None]), CHAT, "HTTP 200, but no 'choices' in the answer"),
        (200, answer(error="x"), CHAT, "HTTP 200, but no 'choices' in the answer"),
        (200, answer(data=[]), EMBEDDINGS, "HTTP 200, but no 'data' in the answer"),
        (200, answer(data=1), EMBEDDINGS, "HTTP 200, but no 'data' in the answer"),
        (201, answer(choices=[CHOICE]), CHAT, "HTTP 201: "),
        (302, b"", CHAT, "HTTP 302: (empty)"),
        (404, answer(detail="Not Found"), CHAT, "HTTP 404: "),
        (404, b"model not found", CHAT, "HTTP 404: model not found"),
        (503, b"the engine\nis \x1b[31mdead\n", CHAT, "HTTP 503: the engine is [31mdead"),
        (503, answer(error="the model is not found in the cache yet"), CHAT, "HTTP 503: "),
        (503, b"", ANY_200, "HTTP 503: (empty)"),
    ],
)
def test_judge(status: int, body: bytes, request_: ProbeRequest, error: str) -> None:
    ok, mismatch, said = judge(status, body, request_, "m")

    assert (ok, mismatch) == (not error, "")
    assert said.startswith(error)
    assert ok == (not said)


@pytest.mark.parametrize(
    "body",
    [
        # vLLM 0.32, LMDeploy 0.18, OpenAI
        answer(
            error={"message": "The model `m` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}
        ),
        answer(message="The model 'm' does not exist.", type="invalid_request_error", code=404, object="error"),
        answer(error={"message": "unknown", "code": "model_not_found"}),
    ],
)
def test_an_engine_that_does_not_know_the_model_is_another_one(body: bytes) -> None:
    ok, mismatch, error = judge(404, body, CHAT, "m")

    assert not ok
    assert mismatch.startswith("does not know the model 'm': ")
    assert error == mismatch


def test_an_answer_of_another_model_is_a_mismatch() -> None:
    body = answer(choices=[CHOICE], model="other")

    assert judge(200, body, CHAT, "m") == (False, *["answers as the model 'other', planned is 'm'"] * 2)
    assert judge(200, body, CHAT, "") == (True, "", "")


@pytest.mark.parametrize(
    ("status", "body", "ok", "mismatch", "error"),
    [
        (200, answer(object="list", data=[{"id": "a"}, {"id": "m"}]), True, "", ""),
        (200, answer(data=[{"id": "a"}]), False, "serves 'a', planned is 'm'", "serves 'a', planned is 'm'"),
        (200, answer(data=[]), False, "", "/v1/models: HTTP 200, but no model is listed"),
        (200, answer(data=["m", {}]), False, "", "/v1/models: HTTP 200, but no model is listed"),
        (200, b"m", False, "", "/v1/models: HTTP 200, but no model is listed: m"),
        (503, b"loading", False, "", "/v1/models: HTTP 503: loading"),
    ],
)
def test_judge_models(status: int, body: bytes, ok: bool, mismatch: str, error: str) -> None:
    judged_ok, judged_mismatch, said = judge_models(status, body, "m")

    assert (judged_ok, judged_mismatch) == (ok, mismatch)
    assert said.startswith(error)


def test_the_words_of_others_fit_one_line() -> None:
    assert one_line("a\n\tb\r\nc\x00") == "a b c"
    assert len(one_line("x" * 5000)) == len(one_line(b"x" * 5000)) == 200


# ------------------------------------------------------------------------------------------------------------ counter

PAGE = r"""
# HELP vllm:iteration_tokens_total Histogram of tokens per engine_step.
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf"} 7.0
vllm:iteration_tokens_total_count{engine="0",model_name="a }\" b"} 7.0
vllm:iteration_tokens_total_count{engine="1",model_name="a"} 1e+1 1790000000000
vllm:iteration_tokens_total_sum{engine="0"} 99.0
tokens 3
tokens_total	4
tokens_created 5
  odd 1
broken{a="b} 1
words x
nothing NaN
some 1 # {trace="x"} 9
some{a="b"} NaN
"""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vllm:iteration_tokens_total_count", 17.0),
        ("vllm:iteration_tokens_total", None),
        ("tokens", 3.0),
        ("tokens_total", 4.0),
        ("token", None),
        ("t.kens", None),
        ("broken", None),
        ("words", None),
        ("nothing", None),
        ("some", 1.0),
        ("absent", None),
    ],
)
def test_counter_value_adds_up_the_samples_of_exactly_that_name(name: str, value: float | None) -> None:
    assert counter_value(PAGE, name) == value
