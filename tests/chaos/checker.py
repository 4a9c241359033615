"""Was a chaos run right? Judged from its records alone: this file imports nothing of the product, nor do its records.

Each invariant is a function of the history and the bounds, and returns what it found wrong, one line each.
`python -m tests.chaos.checker DIR` judges the records of an earlier run again.
"""

from __future__ import annotations

import bisect
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

Key = tuple[str, int]
"""A group and its incarnation."""

MEMBER_FAULTS = frozenset({"kill", "stop", "lie"})
"""Faults of one member: they end the incarnation that they hit."""

CUTS = frozenset({"cut", "loss"})
"""A node is cut; after a loss Slurm has taken it from the job."""

SILENT_FAULTS = frozenset({"stop", "lie", *CUTS})
"""Faults that only a probe can see."""

ROUNDED_S = 0.002
"""Times of events are rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """In seconds, how long something may take on a busy machine."""

    crash_s: float = 5.0  # from the end of a member until its URLs have left the barrier
    hang_s: float = 11.0  # the same for what only probes see: period + threshold × time-out, and a margin
    lost_s: float = 50.0  # a cut node, where the coordinator has to suspect itself: until Slurm gives the node up
    takeover_s: float = 10.0  # from a coordinator's death until the next one has looked at everything
    return_s: float = 110.0  # a node that is back: until Slurm sees it and has killed what survived there
    blind_s: float = 60.0  # slurmctld is back: until it can start steps again, and all that was refused is forgotten
    write_s: float = 0.5  # the barrier file may be written so much later than was decided
    left_s: float = 1.0  # who asks, or kills, at a moment like this may see either side of it
    calls_per_minute: float = 2.0  # of the user, while nothing happens
    calls_per_launch: float = 12.0  # in addition, for each incarnation that was started


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What was done. `until` is when it was lifted; None: never."""

    at: float
    kind: str
    until: float | None = None
    harmless: bool = False
    group: str = ""
    incarnation: int = 0
    rank: int | None = None
    node: str = ""
    detail: str = ""
    returns_s: float | None = None  # of a cut node, once it is back: until Slurm sees it; None: when Slurm looks next

    def returned(self, bounds: Bounds) -> float:
        """Return when everything that had survived on a cut node is gone."""
        return self.ended + (bounds.return_s if self.returns_s is None else self.returns_s)

    @property
    def ended(self) -> float:
        return float("inf") if self.until is None else self.until

    def __str__(self) -> str:
        where = f"{self.group}.{self.incarnation}" if self.group else ""
        where += f" rank {self.rank}" if self.rank is not None else ""
        return " ".join(filter(None, (self.kind, self.detail, where, f"on {self.node}" if self.node else "")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version of the barrier file; `document` is empty where the file was torn."""

    began: float  # when its reading began and
    at: float  # ended: then it was there
    document: dict[str, Any]

    def groups(self) -> dict[str, dict[str, Any]]:
        return {group["id"]: group for group in self.document.get("groups", ())}


@dataclass(frozen=True, kw_only=True)
class History:
    """All records of a run."""

    faults: tuple[Fault, ...] = ()
    versions: tuple[Version, ...] = ()
    events: tuple[dict[str, Any], ...] = ()
    probes: tuple[dict[str, Any], ...] = ()
    samples: tuple[dict[str, Any], ...] = ()
    calls: tuple[dict[str, Any], ...] = ()
    end: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def nodes(self) -> dict[Key, tuple[str, ...]]:
        """Where each incarnation was started."""
        return {_key(e): tuple(e["data"]["nodes"]) for e in self.events if e["type"] == "launching"}

    @cached_property
    def ready(self) -> dict[Key, float]:
        """When each incarnation was first proved."""
        return {_key(e): e["at"] for e in reversed(self.events) if e["type"] == "ready"}

    @cached_property
    def launched(self) -> dict[Key, float]:
        return {_key(e): e["at"] for e in reversed(self.events) if e["type"] == "launching"}

    @cached_property
    def _times(self) -> list[float]:
        return [version.at for version in self.versions]

    def version_at(self, at: float) -> Version | None:
        """Return the newest version that had been seen by then."""
        index = bisect.bisect_right(self._times, at)
        return self.versions[index - 1] if index else None

    def offers(self, key: Key, at: float) -> bool:
        """Tell whether the barrier offered that incarnation then."""
        version = self.version_at(at)
        found = version.groups().get(key[0], {}) if version else {}
        return bool(found.get("urls")) and found["incarnation"] == key[1]

    def withdrawn(self, key: Key, since: float) -> float:
        """Return when the barrier, after `since`, did not offer that incarnation any more."""
        for version in self.versions[bisect.bisect_left(self._times, since) :]:
            group = version.groups().get(key[0], {})
            if not group.get("urls") or group["incarnation"] != key[1]:
                return version.at
        return float("inf")

    def of_kind(self, *kinds: str) -> Iterator[Fault]:
        return (fault for fault in self.faults if fault.kind in kinds)


def load(folder: Path) -> History:
    """Read the records of a run."""
    faults: dict[int, dict[str, Any]] = {}
    for line in _lines(folder / "faults.jsonl"):  # a second line about a fault says when it was lifted
        faults.setdefault(line["n"], {}).update(line)
    names = Fault.__dataclass_fields__.keys()
    terms = sorted(folder.glob("events.*.jsonl"), key=lambda path: int(path.name.split(".")[1]))
    return History(
        faults=tuple(Fault(**{k: v for k, v in f.items() if k in names}) for f in faults.values()),
        versions=tuple(
            Version(began=v["began"], at=v["at"], document=v.get("document", {}))
            for v in _lines(folder / "barrier.jsonl")
        ),
        events=tuple(event for path in terms for event in _lines(path)),
        probes=tuple(_lines(folder / "probes.jsonl")),
        samples=tuple(_lines(folder / "processes.jsonl")),
        calls=tuple(_lines(folder / "calls.jsonl")),
        end=next(iter(_lines(folder / "end.jsonl")), {}),
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # whoever wrote the last one may have been killed meanwhile
            yield json.loads(line)


def _key(event: dict[str, Any]) -> Key:
    return event.get("group", ""), event.get("incarnation", 0)


def _name(key: Key) -> str:
    return f"{key[0]}.{key[1]}"


# ----------------------------------------------------------------------------------------------- when, and whose fault


def due(history: History, bounds: Bounds, fault: Fault, key: Key) -> float:
    """Return by when the URLs of the incarnation have to have left the barrier because of that fault.

    Later where the coordinator was killed meanwhile, where the node is cut at the same time, and where so many groups
    are silent that the coordinator has to suspect itself.
    """
    bound_s = bounds.crash_s if fault.kind == "kill" else bounds.hang_s
    nodes = history.nodes.get(key, ())
    deadline = fault.at + bound_s
    applied: set[Fault] = set()
    while True:
        later = [f for f in history.faults if f not in applied and f.at <= deadline and f is not fault]
        delayed = [f for f in later if f.kind == "coordinator" and f.at >= fault.at - bounds.takeover_s]
        cuts = [f for f in later if f.kind in CUTS and f.node in nodes and f.ended >= fault.at]
        if not delayed and not cuts:
            break
        for f in delayed:
            deadline = max(deadline, f.at) + bounds.takeover_s
        for f in cuts:  # its agent cannot say what happened there
            deadline = max(deadline, f.at + bounds.hang_s, min(f.ended, f.at + bounds.lost_s) + bounds.hang_s)
        applied |= {*delayed, *cuts}
    if fault.kind in SILENT_FAULTS and _crowd(history, bounds, fault.at, deadline):
        deadline += bounds.hang_s  # the agents have to agree
        if fault.kind in CUTS:  # which the one there cannot: then Slurm has to give the node up
            away = sum(f.ended - f.at for f in history.of_kind("freeze", "halt") if f.at <= deadline + bounds.lost_s)
            deadline += bounds.lost_s + min(away, bounds.blind_s)
    return deadline


def _crowd(history: History, bounds: Bounds, start: float, end: float) -> bool:
    """Tell whether half of the groups that were offered, or more, were silent at some time between."""
    silent = set()
    for f in history.of_kind(*SILENT_FAULTS):
        if f.kind == "lie" and f.detail != "dead":  # a wrong answer is an answer
            continue
        if f.at <= end and f.ended >= start:
            keys = [(f.group, f.incarnation)] if f.kind not in CUTS else _on(history, f.node, f.at)
            silent |= {key[0] for key in keys if history.withdrawn(key, f.at) >= start}
    version = history.version_at(start)
    offered = [group for group in version.groups().values() if group["urls"]] if version else []
    return 2 * len(silent) >= len(offered)


def cause(history: History, bounds: Bounds, key: Key, at: float) -> Fault | None:
    """Return a fault because of which that incarnation may fail then; None: there is none."""
    for f in history.faults:
        if f.at > at + ROUNDED_S:
            continue
        if f.kind in MEMBER_FAULTS and (f.group, f.incarnation) == key:
            return f
        if f.kind in CUTS and f.node in history.nodes.get(key, ()) and at <= f.returned(bounds):
            return f
        if history.ready.get(key, at) < at:
            continue
        # It never served: a start may also fail because the coordinator died, or because Slurm was away.
        launched = history.launched.get(key, at)
        if f.kind == "coordinator" and f.at >= launched - bounds.left_s:
            return f
        if f.kind in ("freeze", "halt") and f.ended + bounds.blind_s >= launched:
            return f
    return None


# ---------------------------------------------------------------------------------------------------------- invariants


def nothing_falls(history: History, bounds: Bounds) -> Iterator[str]:
    """Epoch, term, a group's incarnation, and `seq` within a term never fall; the file is never torn."""
    documents = [version.document for version in history.versions]
    yield from (f"the barrier file was torn at {v.at:.3f}" for v in history.versions if not v.document)
    for before, after in itertools.pairwise(filter(None, documents)):
        for word in ("epoch", "term"):
            if after[word] < before[word]:
                yield f"{word} fell from {before[word]} to {after[word]}"
        if after["term"] == before["term"] and after["seq"] <= before["seq"]:
            yield f"seq of term {after['term']} went from {before['seq']} to {after['seq']}"
        old = {group["id"]: group["incarnation"] for group in before["groups"]}
        for group in after["groups"]:
            if group["incarnation"] < old.get(group["id"], 0):
                yield f"incarnation of {group['id']} fell from {old[group['id']]} to {group['incarnation']}"


def an_epoch_is_one_membership(history: History, bounds: Bounds) -> Iterator[str]:
    """The epoch grows when the set of incarnations that are offered, or serve, changes: one epoch, one set."""
    known: dict[int, tuple[set[Key], set[Key]]] = {}
    for version in history.versions:
        groups = version.groups().values()
        alive = {(g["id"], g["incarnation"]) for g in groups if g["urls"]}
        serving = {(g["id"], g["incarnation"]) for g in groups if g["serving"]}
        epoch = version.document.get("epoch", -1)
        before = known.setdefault(epoch, (alive, serving))
        if before != (alive, serving):
            changed = sorted(map(_name, (before[0] ^ alive) | (before[1] ^ serving)))
            yield f"epoch {epoch} stayed the same when {', '.join(changed)} came or went"
            known[epoch] = alive, serving


def offered_when_proved(history: History, bounds: Bounds) -> Iterator[str]:
    """No URL is published for an incarnation before its `ready` event."""
    judged: set[Key] = set()
    for version in history.versions:
        for group in version.groups().values():
            key = group["id"], group["incarnation"]
            if group["serving"] and not group["urls"]:
                yield f"{_name(key)} serves without a URL at {version.at:.3f}"
            if not group["urls"] or key in judged:
                continue
            judged.add(key)
            # Events are written after the barrier: a coordinator that is killed in between leaves that to the next one.
            killed = [f for f in history.of_kind("coordinator") if abs(f.at - version.at) < bounds.left_s]
            late_s = bounds.takeover_s + bounds.left_s if killed else ROUNDED_S
            if key not in history.ready:
                yield f"{_name(key)} is offered at {version.at:.3f}, and no event says that it was proved"
            elif version.at < history.ready[key] - late_s:
                yield f"{_name(key)} is offered {history.ready[key] - version.at:.3f} s before it was proved"


def offered_urls_answer(history: History, bounds: Bounds) -> Iterator[str]:
    """A URL in the barrier answers a real request, as the incarnation that it is published for.

    Unless a fault was injected there, and the time to see it is not over.
    """
    for probe in history.probes:
        key = probe["group"], probe["incarnation"]
        asked = f"{probe['url']}, asked at {probe['at']:.3f} as {_name(key)}"
        by = probe.get("answered_by")
        if by is None:
            if not _excused(history, bounds, key, probe["at"], probe["ended"]):
                yield f"{asked}, did not answer in {probe['ended'] - probe['at']:.1f} s: {probe['error']}"
        elif by[0] != key[0] or by[1] < key[1]:
            yield f"{asked}, was answered by {_name((by[0], by[1]))}"
        elif by[1] > key[1] and history.offers(key, probe["ended"]):
            yield f"{asked}, was answered by {_name((by[0], by[1]))}, and is still offered as the old one"


def _excused(history: History, bounds: Bounds, key: Key, start: float, end: float) -> bool:
    for f in history.faults:
        if f.at > end:
            continue
        if f.kind == "saturate":
            until = f.ended if f.group == key[0] else 0.0
        elif f.kind in MEMBER_FAULTS:
            # Who asks later asks what should not be offered any more: that is another invariant's business.
            until = due(history, bounds, f, key) if (f.group, f.incarnation) == key else 0.0
        elif f.kind in CUTS and f.node in history.nodes.get(key, ()):
            until = max(due(history, bounds, f, key), f.ended + bounds.hang_s)
        else:
            until = 0.0
        if start <= until + bounds.left_s:
            return True
    return False


def urls_leave_after_faults(history: History, bounds: Bounds) -> Iterator[str]:
    """After a kill, stop, lie or cut the group's URLs leave the barrier within the bound; when it is seen, at once."""
    last = history.versions[-1].at if history.versions else 0.0
    for f in history.of_kind(*MEMBER_FAULTS, *CUTS):
        keys = [(f.group, f.incarnation)] if f.kind not in CUTS else _on(history, f.node, f.at)
        for key in keys:
            deadline = due(history, bounds, f, key)
            if deadline <= min(last, f.ended) and history.offers(key, deadline):
                yield f"{_name(key)} is still offered {deadline - f.at:.1f} s after: {f}"
    for e in history.events:
        if e["type"] == "failure" and history.offers(_key(e), e["at"] + bounds.write_s):
            yield f"{_name(_key(e))} is still offered {bounds.write_s:g} s after its failure was seen, {e['at']:.3f}"


def _on(history: History, node: str, at: float) -> list[Key]:
    """Return the incarnations on a node that were offered then."""
    return [key for key, nodes in history.nodes.items() if node in nodes and history.offers(key, at)]


def failures_have_causes(history: History, bounds: Bounds) -> Iterator[str]:
    """A group that had no fault, and whose nodes had none, is never restarted, nor taken out of the barrier."""
    for e in history.events:
        if e["type"] in ("failure", "unready") and cause(history, bounds, _key(e), e["at"]) is None:
            said = f"{e.get('reason', '')}: {e.get('message', '')}"
            yield f"{e['type']} of {_name(_key(e))} at {e['at']:.3f} without a fault: {said}"
    # Also where no event says so.
    for before, after in itertools.pairwise(history.versions):
        old = before.groups()
        for group in after.groups().values():
            was = old.get(group["id"], {})
            if was.get("urls") and not (group["urls"] and group["incarnation"] == was["incarnation"]):
                key = group["id"], was["incarnation"]
                if after.at < history.end.get("at", float("inf")) and cause(history, bounds, key, after.at) is None:
                    yield f"{_name(key)} left the barrier at {after.at:.3f} without a fault: {group['reason']}"


def one_incarnation_lives(history: History, bounds: Bounds) -> Iterator[str]:
    """At most one incarnation of a group lives on nodes that are not cut, and each of its members only once."""
    told: set[tuple[object, ...]] = set()
    for sample in history.samples:
        away = {f.node for f in history.of_kind(*CUTS) if f.at <= sample["at"] <= f.returned(bounds)}
        here = [m for m in sample["living"] if m["node"] not in away]
        for group, members in itertools.groupby(sorted(here, key=_place), key=lambda m: m["group"]):
            found = list(members)
            incarnations = sorted({m["incarnation"] for m in found})
            if len(incarnations) > 1 and (group, *incarnations) not in told:
                told.add((group, *incarnations))
                yield f"incarnations {incarnations} of {group} live at the same time, {sample['at']:.3f}"
            for a, b in itertools.pairwise(found):
                if _place(a) == _place(b) and _place(a) not in told:
                    told.add(_place(a))
                    yield f"rank {a['rank']} of {_name(_key(a))} lives twice at {sample['at']:.3f}"


def _place(member: dict[str, Any]) -> tuple[str, int, int]:
    return member["group"], member["incarnation"], member["rank"]


def coordinators_come_back(history: History, bounds: Bounds) -> Iterator[str]:
    """The barrier is written at every heartbeat; after a coordinator was killed the next one goes on with it."""
    killed = [f.at for f in history.of_kind("coordinator")]
    heartbeat_s = max((v.document.get("heartbeat_s", 0.0) for v in history.versions), default=0.0)
    seen = [v.at for v in history.versions if v.at < history.end.get("at", float("inf"))]
    if history.end:
        seen.append(history.end["at"])  # when the run was told to end
    for before, after in itertools.pairwise(seen):
        kills = sum(before - bounds.left_s <= at <= after for at in killed)
        limit = heartbeat_s + (kills * bounds.takeover_s if kills else bounds.hang_s)
        if after - before > limit:
            yield f"the barrier was not written for {after - before:.1f} s from {before:.3f} on; {kills} takeovers"


def all_is_well_at_the_end(history: History, bounds: Bounds) -> Iterator[str]:
    """When the faults were lifted all groups became ready; after the end nothing of the user lives."""
    end = history.end
    if not end:
        yield "the run was not brought to its end"
        return
    if end["not_ready"]:
        yield f"{', '.join(end['not_ready'])} not ready {end['waited_s']:.0f} s after all faults were lifted"
    for process in end["left"]:
        yield f"still lives after the end: {process}"
    if end["state"] != "COMPLETED":
        yield f"the job's end is {end['state']}"


def calls_stay_within_budget(history: History, bounds: Bounds) -> Iterator[str]:
    """What the user asked of slurmctld: so much a minute, and so much for each launch."""
    counted = calls(history)
    allowed = bounds.calls_per_minute * counted["minutes"] + bounds.calls_per_launch * counted["launches"]
    if counted["calls"] > allowed:
        what = f"{counted['minutes']:.1f} minutes and {counted['launches']} launches"
        yield f"{counted['calls']} calls to slurmctld in {what}; allowed are {allowed:.0f}"


Invariant = Callable[[History, Bounds], Iterable[str]]

INVARIANTS: tuple[Invariant, ...] = (
    nothing_falls,
    an_epoch_is_one_membership,
    offered_when_proved,
    offered_urls_answer,
    urls_leave_after_faults,
    failures_have_causes,
    one_incarnation_lives,
    coordinators_come_back,
    all_is_well_at_the_end,
    calls_stay_within_budget,
)


def violations(history: History, bounds: Bounds) -> list[str]:
    """Return everything that was wrong."""
    return [f"{check.__name__}: {line}" for check in INVARIANTS for line in check(history, bounds)]


# ------------------------------------------------------------------------------------------------------------- figures


def calls(history: History) -> dict[str, float]:
    """Return how often slurmctld was asked by the user between the first count and the last."""
    if not history.calls:
        return {"calls": 0, "minutes": 0.0, "launches": 0}
    first, last = history.calls[0], history.calls[-1]
    return {
        "calls": last["calls"] - first["calls"],
        "minutes": (last["at"] - first["at"]) / 60,
        "launches": sum(first["at"] <= at <= last["at"] for at in history.launched.values()),
    }


def recovery_s(history: History, bounds: Bounds, fault: Fault) -> float | None:
    """Return the seconds from a fault until all is as before: the groups serve again, or the next coordinator writes.

    None where nothing had to recover: a fault that is harmless, or that was over before anybody saw it.
    """
    if fault.kind == "coordinator":
        before = history.version_at(fault.at)
        term = before.document["term"] if before else 0
        return next((v.at - fault.at for v in history.versions if v.document.get("term", 0) > term), None)
    keys = _on(history, fault.node, fault.at) if fault.kind in CUTS else [(fault.group, fault.incarnation)]
    if fault.harmless:
        return None
    failed = {_key(e): e["at"] for e in history.events if e["type"] == "failure"}
    if fault.kind in CUTS:  # what fails long after it is no business of the cut
        failed = {key: at for key, at in failed.items() if at <= fault.ended + bounds.hang_s}
    took = [_served_again(history, key, fault.at) for key in keys if key in failed]
    return max((at - fault.at for at in took if at is not None), default=None)


def _served_again(history: History, key: Key, since: float) -> float | None:
    for version in history.versions:
        group = version.groups().get(key[0], {})
        if version.at > since and group.get("serving") and group["incarnation"] > key[1]:
            return version.at
    return None


def summary(history: History, bounds: Bounds) -> dict[str, Any]:
    """Return the run's figures; `violations` is empty when all was well."""
    kinds: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for fault in history.faults:
        counts[fault.kind] = counts.get(fault.kind, 0) + 1
        took = recovery_s(history, bounds, fault)
        if took is not None:
            kinds.setdefault(fault.kind, []).append(took)
    found = calls(history)
    minutes, launches = found["minutes"], found["launches"]
    beyond = found["calls"] - bounds.calls_per_minute * minutes
    last = history.versions[-1] if history.versions else Version(began=0.0, at=0.0, document={})
    return {
        "faults": counts,
        "recoveries": {
            kind: {"n": len(took), "median_s": round(statistics.median(took), 2), "max_s": round(max(took), 2)}
            for kind, took in sorted(kinds.items())
        },
        "incarnations": {name: group["incarnation"] for name, group in last.groups().items()},
        "terms": last.document.get("term", 0),
        "versions": len(history.versions),
        "probes": len(history.probes),
        "probes_unanswered": sum("error" in probe for probe in history.probes),
        "samples": len(history.samples),
        "calls": found["calls"],
        "calls_per_minute": round(found["calls"] / minutes, 2) if minutes else None,
        "calls_per_launch": round(beyond / launches, 2) if launches else None,
        "ready_after_s": history.end.get("waited_s"),
        "violations": violations(history, bounds),
    }


def main() -> int:
    found = summary(load(Path(sys.argv[1])), Bounds())
    print(json.dumps(found, indent=2))
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
