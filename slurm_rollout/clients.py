"""Reads what trainers' clients write into `clients/` (docs/barrier.md). What it means is in `core.clients`.

A file that is not understood, or is of another job, says nothing. What cannot be read just now says nothing new.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm_rollout.core.clients import PHASES
from slurm_rollout.core.model import Ack, ClientWords
from slurm_rollout.rundir import RunDir

log = logging.getLogger("slurm_rollout")

MAX_WORDS_BYTES = 64 * 1024
MAX_ACKS_BYTES = 16 * 1024 * 1024
"""Read at a time; more is read the next time."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(slots=True)
class _Acks:
    """How far an acknowledgement file was read."""

    offset: int = 0
    waiting: tuple[Ack, ...] = ()  # read, but not known to be taken in


class Clients:
    """The clients of one run, as this coordinator has read them."""

    def __init__(self, run: RunDir, *, job: str, restart_count: int) -> None:
        self._folder = run.clients
        self._job = job
        self._restart_count = restart_count
        self._acks: dict[str, _Acks] = {}
        self._complained: set[str] = set()

    def read(self, taken: Mapping[str, int]) -> tuple[ClientWords, ...]:
        """Return what every client says now. `taken`: how many acknowledgements of each were taken in."""
        try:
            names = sorted(os.listdir(self._folder))
        except OSError:
            return ()
        ids = {n.removesuffix(".acks.jsonl").removesuffix(".json") for n in names if n.endswith((".json", ".jsonl"))}
        found = []
        for id_ in sorted(i for i in ids if _ID.fullmatch(i)):
            acks = self._read_acks(id_, taken.get(id_, 0)) if f"{id_}.acks.jsonl" in names else ()
            words = self._read_words(id_) if f"{id_}.json" in names else None
            if words is not None:
                found.append(words_of(id_, words, acks))
            elif acks:
                found.append(ClientWords(id=id_, acks=acks))
        return tuple(found)

    def _read_words(self, id_: str) -> dict[str, Any] | None:
        """Return a client's words; None where there are none for this run now."""
        path = self._folder / f"{id_}.json"
        try:
            data = json.loads(_read(path, 0, MAX_WORDS_BYTES))
            if not self._is_ours(data):
                return None
            words_of(id_, data, ())
        except OSError:
            return None  # replaced or withdrawn at this moment: the next look will tell
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            self._complain(path, e)
            return None
        return dict(data)

    def _read_acks(self, id_: str, taken: int) -> tuple[Ack, ...]:
        path, known = self._folder / f"{id_}.acks.jsonl", self._acks.setdefault(id_, _Acks())
        data = b""
        with contextlib.suppress(OSError):
            if path.stat().st_size < known.offset:  # made anew
                known.offset = 0
            data = _read(path, known.offset, MAX_ACKS_BYTES)
        complete = data[: data.rfind(b"\n") + 1]
        known.offset += len(complete)
        fresh = []
        for line in complete.splitlines():
            try:
                ack = json.loads(line) if line.strip() else None
                if ack is not None and self._is_ours(ack):
                    fresh.append(_ack(ack))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                self._complain(path, e)  # half a line of a client that was killed, say
        known.waiting = tuple(a for a in (*known.waiting, *fresh) if a.n > taken)
        return known.waiting

    def _is_ours(self, data: dict[str, Any]) -> bool:
        """Tell whether it was said in this run's job: a trainer that was requeued begins anew."""
        job, restart_count = str(data.get("job") or ""), data.get("restart_count")
        if not job or not self._job:
            return True
        return job == self._job and restart_count in (None, self._restart_count)

    def _complain(self, path: Path, error: Exception) -> None:
        if path.name not in self._complained:
            self._complained.add(path.name)
            log.warning("%s is not understood, and not heeded: %s", path, error)


def words_of(id_: str, data: Mapping[str, Any], acks: tuple[Ack, ...]) -> ClientWords:
    """Return a client's words; KeyError, TypeError or ValueError when they are none."""
    phase = str(data["phase"])
    if phase not in ("", *PHASES):
        raise ValueError(f"no phase {phase!r}: there are {', '.join(PHASES)}")
    return ClientWords(
        id=id_,
        seq=int(data["seq"]),
        phase=phase,
        hold_s=max(0.0, float(data.get("hold_s") or 0.0)),
        waiting_s=max(0.0, float(data.get("waiting_s") or 0.0)),
        acks=acks,
    )


def _ack(data: Mapping[str, Any]) -> Ack:
    return Ack(
        n=int(data["n"]),
        version=int(data["version"]),
        groups=tuple((str(group), int(incarnation)) for group, incarnation in data["groups"]),
        rollback=data.get("rollback") is True,
    )


def _read(path: Path, offset: int, most: int) -> bytes:
    """Return at most so many bytes from an offset; OSError for what is no regular file."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{path} is no regular file")
        file.seek(offset)
        return file.read(most)
