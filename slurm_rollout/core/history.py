"""What became of each incarnation of a group: from the run's events, and from its agents' reports. Pure.

Events are dicts as in `events.<term>.jsonl`, of all terms, oldest first. Nothing is required of them: a file may lack
lines, and a coordinator may have died between any two. What they do not tell is None or empty. `…_at` and `at` are Unix
seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from slurm_rollout.core.failure_classes import FailureClass, of_wish
from slurm_rollout.core.phases import Reason
from slurm_rollout.core.srun_words import last_words

UNSEEN = "unseen"
"""The reason of an end that no coordinator was there to see."""

_NOTED = frozenset({"unready", "slow", "fence_waits", "failed"})
_NOTED_OF_THE_RUN = frozenset({"up", "takeover", "ended"})

_OBEYED = ("restarts", "drains")
"""Answers to requests that end an incarnation (`core.decide`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something else that happened while an incarnation was the group's newest: an event, or a request's answer."""

    at: float
    type: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How an incarnation ended, and how the group came back."""

    at: float  # when the failure was seen, or the request heeded
    reason: str
    kind: str = ""  # a `FailureClass`; empty where none was told
    message: str = ""
    rank: int | None = None
    node: str = ""
    by: str = ""  # who asked for it
    restarted_peers: tuple[int, ...] = ()
    stopped_at: float | None = None
    detect_s: float | None = None  # from the start of the first probe that failed; None for what ends by itself
    snapshot_s: float | None = None  # part of `stop_s`
    stop_s: float | None = None
    fence_s: float | None = None
    backoff_s: float | None = None
    recovered_as: int | None = None  # the next incarnation that became ready; the rest is about that one
    launch_s: float | None = None
    start_s: float | None = None
    verify_s: float | None = None
    recovery_s: float | None = None  # from `at` until it was ready


@dataclass(frozen=True, slots=True, kw_only=True)
class Incarnation:
    """One start of a group. Number 0, without a launch: what happened before the first one."""

    incarnation: int
    term: int = 0  # of the coordinator that launched it
    nodes: tuple[str, ...] = ()
    launched_at: float | None = None
    go_at: float | None = None
    ready_at: float | None = None
    launch_s: float | None = None  # launch to go
    start_s: float | None = None  # go to ready
    verify_s: float | None = None  # part of `start_s`: from when the last entrypoint listened
    end: End | None = None
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one node's agent said last. Without a `cause` it left no exit record; `srun` is what srun said instead."""

    node: str
    ranks: tuple[int, ...] = ()  # started there
    cause: str = ""
    message: str = ""
    rank: int | None = None
    code: int | None = None
    signal: int | None = None
    oom: bool = False
    last_lines: tuple[str, ...] = ()
    srun: str = ""


def incarnations(events: Iterable[Mapping[str, Any]], group: str) -> tuple[Incarnation, ...]:
    """Return the history of one group, its first incarnation first."""
    history = _History(group)
    for event in events:
        history.add(event)
    return tuple(replace(history.found[n], notes=tuple(history.notes.get(n, ()))) for n in sorted(history.found))


def step(node: str, reports: Iterable[Mapping[str, Any]], stderr: str = "") -> Step:
    """Return what is known of the end of one step, from its agent's reports and from srun's standard error."""
    result = Step(node=node)
    for report in reports:
        if report.get("report") == "started":
            result = replace(result, ranks=_integers(report.get("ranks")))
        elif report.get("report") == "exit":
            result = replace(
                result,
                cause=_text(report.get("cause")),
                message=_text(report.get("message")),
                rank=_integer(report.get("rank")),
                code=_integer(report.get("code")),
                signal=_integer(report.get("signal")),
                oom=report.get("oom") is True,
                last_lines=_texts(report.get("last_lines")),
            )
    if result.cause:
        return result
    return replace(result, srun=last_words(stderr))


class _History:
    """Takes in one event after the other. The same one twice is no harm."""

    def __init__(self, group: str) -> None:
        self.group = group
        self.found: dict[int, Incarnation] = {}
        self.notes: dict[int, list[Note]] = {}
        self._newest: int | None = None
        self._asked = ("", "")  # who asked last for an end of it, and for what
        self._ending = ""
        self._gap_at: float | None = None  # `up` was started again; what it found is not known yet
        self._waiting_at: float | None = None

    def add(self, event: Mapping[str, Any]) -> None:
        of = event.get("group") or ""
        if of == self.group:
            self._add_own(event)
        elif not of:
            self._add_runs(event)

    def _add_runs(self, event: Mapping[str, Any]) -> None:
        type_, message, at = _text(event.get("type")), _text(event.get("message")), _number(event.get("at")) or 0.0
        if type_ == "request":
            named, _, said = message.partition(": ")
            data = _mapping(event.get("data"))
            who, verb = _text(data.get("who")), _text(data.get("verb"))
            if verb == "stop" or (named == self.group and said in _OBEYED):
                self._asked = who, f"{verb}, asked by {who or 'somebody'}"
            if named == self.group:
                self._note(at, type_, f"{verb}, asked by {who or 'somebody'}: {said}")
        elif type_ == "ending":
            self._ending = message
        elif type_ in _NOTED_OF_THE_RUN:
            if type_ == "up":
                self._gap_at, self._ending = at, ""
            self._note(at, type_, message)

    def _add_own(self, event: Mapping[str, Any]) -> None:
        n, at = _integer(event.get("incarnation")) or 0, _number(event.get("at")) or 0.0
        data, message = _mapping(event.get("data")), _text(event.get("message"))
        old = self.found.setdefault(n, Incarnation(incarnation=n))
        self._newest = n
        match event.get("type"):
            case "launching":
                self._close(n - 1, at)
                self.found[n] = replace(
                    old, term=_integer(event.get("term")) or 0, nodes=_texts(data.get("nodes")), launched_at=at
                )
            case "go":
                self.found[n] = replace(old, go_at=at, launch_s=_number(data.get("launch_s")))
            case "ready" if old.ready_at is None:
                new = replace(
                    old, ready_at=at, start_s=_number(data.get("start_s")), verify_s=_number(data.get("verify_s"))
                )
                self.found[n] = new
                self._recovered(new, at, _number(data.get("recovery_s")))
            case "ready" if "start_s" not in data:  # after `unready`
                self._note(at, "ready", message)
            case "failure" if event.get("reason") == "port_busy" and (old.end is not None or old.launched_at is None):
                # Nothing of this incarnation lives: it is the fence before the next one that failed.
                self._note(at, "fence_failed", message)
            case "failure" if old.end is None:
                end = End(
                    at=at,
                    reason=_text(event.get("reason")),
                    kind=_text(data.get("class")),
                    message=message,
                    rank=_integer(event.get("rank")),
                    node=_text(event.get("node")),
                    restarted_peers=_integers(data.get("restarted_peers")),
                    detect_s=_number(data.get("detect_s")),
                )
                self.found[n] = replace(old, end=end)
            case "snapshot" if old.end is not None:
                self.found[n] = replace(old, end=replace(old.end, snapshot_s=_number(data.get("snapshot_s"))))
            case "stopped":
                stop_s = _number(data.get("stop_s"))
                lost = event.get("reason") == Reason.NODE_LOST
                end = old.end or self._wanted(round(at - (stop_s or 0.0), 3), _text(event.get("reason")))
                kind = FailureClass.NODE.value if lost else end.kind
                self.found[n] = replace(old, end=replace(end, kind=kind, stopped_at=at, stop_s=stop_s))
                self._asked = "", ""
            case "fenced" if old.end is not None:
                self.found[n] = replace(old, end=replace(old.end, fence_s=_number(data.get("fence_s"))))
            case "waiting" if self._waiting_at is None:
                self._waiting_at = at
            case type_ if type_ in _NOTED:
                self._note(at, _text(type_), message)

    def _note(self, at: float, type_: str, message: str) -> None:
        if self._newest is not None:
            self.notes.setdefault(self._newest, []).append(Note(at=at, type=type_, message=message))

    def _wanted(self, at: float, reason: str) -> End:
        """Return the end of an incarnation that did not fail: somebody wanted it."""
        who, what = self._asked
        return End(at=at, reason=reason, kind=of_wish(reason), message=self._ending or what, by=who)

    def _close(self, n: int, at: float) -> None:
        """End what the incarnation before a launch was busy with."""
        waiting_at, self._waiting_at = self._waiting_at, None
        gap_at, self._gap_at = self._gap_at, None
        old = self.found.get(n)
        if old is None or not n:
            return
        end = old.end or End(
            at=at if gap_at is None else gap_at, reason=UNSEEN, message="no coordinator was there to see it end"
        )
        if waiting_at is not None:
            end = replace(end, backoff_s=round(at - waiting_at, 3))
        self.found[n] = replace(old, end=end)

    def _recovered(self, new: Incarnation, at: float, recovery_s: float | None) -> None:
        """Note at every incarnation that ended since the group last served that now it serves again."""
        for old in reversed(self.found.values()):
            if old.end is not None and old.end.recovered_as is not None:
                return  # and so are all before it
            if old.incarnation < new.incarnation and old.end is not None:
                exact = recovery_s if old.incarnation == new.incarnation - 1 else None
                end = replace(
                    old.end,
                    recovered_as=new.incarnation,
                    launch_s=new.launch_s,
                    start_s=new.start_s,
                    verify_s=new.verify_s,
                    recovery_s=round(at - old.end.at, 3) if exact is None else exact,
                )
                self.found[old.incarnation] = replace(old, end=end)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list | tuple) else ()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _integers(value: Any) -> tuple[int, ...]:
    return tuple(v for v in value if isinstance(v, int)) if isinstance(value, list | tuple) else ()
