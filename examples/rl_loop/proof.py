"""Did the loop keep a sample that it should not have? Judged by what others wrote down, not by the loop's own opinion.

    python examples/rl_loop/proof.py RUN_DIR

Held against each other:

- the trainer's journal: each sample, what it knew of the engine when it sent the request, and whether it was kept;
- the stamp that the engine put on the answer: group, incarnation, version of the weights;
- the run's events: when an incarnation was proved, when it failed, when all of it had ended, when a version of the
  weights was acknowledged;
- the harm that was done, and when: no answer can come from an engine that had been killed before it was asked.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WRITE_S = 1.0
"""An event bears the time of its decision: so much later, on a busy machine, the barrier may be written."""

HARM_S = 0.1
"""A stopped process may finish what one of its threads is doing just now."""

Line = dict[str, Any]
Incarnation = tuple[str, int]


def prove(run_dir: Path) -> Line:
    """Return the figures of a run; `stale` counts the samples that were kept wrongly, `why` says what was wrong."""
    loop = run_dir / "rl_loop"
    journal = list(read(loop / "journal.jsonl"))
    events = [e for path in sorted(run_dir.glob("events.*.jsonl"), key=term) for e in read(path)]
    acks = [a for path in sorted((run_dir / "clients").glob("*.acks.jsonl")) for a in read(path)]
    harm = [h for path in sorted(loop.glob("harm*.jsonl")) for h in read(path)]
    judge = Judge(events, acks, harm)

    kept = [line for line in journal if line["what"] == "kept"]
    dropped = [line for line in journal if line["what"] == "dropped"]
    wrong = [(line, reasons) for line in kept if (reasons := judge.reasons(line))]
    pushes = [line for line in journal if line["what"] == "push"]
    steps = [line for line in journal if line["what"] == "step"]
    ready = {(e["group"], e["incarnation"]) for e in events if e["type"] == "ready"}
    return {
        "steps": len(steps),
        "kept": len(kept),
        "stale": len(wrong),
        "why": dict(Counter(reason for _, reasons in wrong for reason in reasons)),
        "examples": [{**line, "reasons": reasons} for line, reasons in wrong[:3]],
        "dropped": dict(Counter(line["why"] for line in dropped)),
        # Answers of the wrong incarnation or with the wrong weights, which the loop was offered and did not keep.
        "caught": sum(bool(stamp_reasons(line)) for line in dropped if line.get("stamp")),
        "pushes": len(pushes),
        "pushes_failed": sum(not line["ok"] for line in pushes),
        "harm": dict(Counter(h["kind"] for h in harm)),
        "failures": dict(Counter(e["reason"] for e in events if e["type"] == "failure")),
        "recoveries": len(ready) - len({group for group, _ in ready}),
        "epoch": max((line["epoch"] for line in steps), default=0),
        "coordinators": max((line["term"] for line in steps), default=0),
    }


class Judge:
    """What others wrote down, in the form in which samples are held against it."""

    def __init__(self, events: list[Line], acks: list[Line], harm: list[Line]) -> None:
        self._ready = first_times(events, "ready")
        self._failed = first_times(events, "failure")
        self._stopped = first_times(events, "stopped")
        self._acknowledged = {(group, n, ack["version"]) for ack in acks for group, n in ack["groups"]}
        # When the fleet's version became which: the coordinator's word. A group that comes back gets the same again.
        versions = [(e["at"], e["data"]["version"]) for e in events if e["type"] == "weights"]
        begun = [v for i, v in enumerate(versions) if i == 0 or v[1] != versions[i - 1][1]]
        ends = [at for at, _ in begun[1:]] + [float("inf")]
        self._spans = [(version, at, end) for (at, version), end in zip(begun, ends, strict=True)]
        self._harmed: dict[Incarnation, float] = {}
        for h in harm:
            if h["kind"] in ("kill", "hang"):
                self._harmed.setdefault((h["group"], h["incarnation"]), h["at"])

    def reasons(self, sample: Line) -> list[str]:
        """Return why the sample should not have been kept; nothing when it is good."""
        key = (sample["group"], sample["incarnation"])
        sent_at, checked_at, never = sample["sent_at"], sample["checked_at"], float("inf")
        found = stamp_reasons(sample)
        if self._ready.get(key, never) > sent_at:
            found.append("not_proved_yet")
        if checked_at > min(self._failed.get(key, never) + WRITE_S, self._stopped.get(key, never)):
            found.append("dead_incarnation")
        if (*key, sample["version"]) not in self._acknowledged:
            found.append("not_acknowledged")
        if not self._was_version(sample["version"], sent_at, checked_at):
            found.append("not_the_version_then")
        if sent_at > self._harmed.get(key, never) + HARM_S:
            found.append("asked_after_its_death")
        return found

    def _was_version(self, version: int, sent_at: float, checked_at: float) -> bool:
        return any(
            v == version and began <= sent_at and checked_at <= ended + WRITE_S for v, began, ended in self._spans
        )


def stamp_reasons(sample: Line) -> list[str]:
    """Return what the engine's own stamp says against the sample."""
    stamp = sample["stamp"] or {}
    found = []
    if (stamp.get("group"), stamp.get("incarnation")) != (sample["group"], sample["incarnation"]):
        found.append("another_incarnation")
    made_with = stamp.get("weights_version")
    if {made_with, stamp.get("weights_version_end", made_with)} != {sample["version"]}:
        found.append("other_weights")
    return found


def first_times(events: list[Line], kind: str) -> dict[Incarnation, float]:
    times: dict[Incarnation, float] = {}
    for e in events:
        if e["type"] == kind:
            times.setdefault((e["group"], e["incarnation"]), e["at"])
    return times


def read(path: Path) -> Iterator[Line]:
    """Yield the JSON objects of a file, one a line; not what somebody is just writing at its end."""
    if path.exists():
        text = path.read_text(encoding="utf-8")
        yield from map(json.loads, text[: text.rfind("\n") + 1].splitlines())


def term(path: Path) -> int:
    return int(path.name.split(".")[1])


if __name__ == "__main__":
    found = prove(Path(sys.argv[1]))
    print(json.dumps(found, indent=2))
    sys.exit(1 if found["stale"] or not found["kept"] else 0)
