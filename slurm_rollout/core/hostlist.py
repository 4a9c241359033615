"""Slurm's hostlists: `gpu[05-20,30],n1` to names and back. Pure."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable

MAX_HOSTS = 65536
"""Slurm's own limit of one range (MAX_RANGE); more is a typing error that would eat the machine's memory."""

_TOKEN = re.compile(r"(?P<text>[^\[\],\s]+)|\[(?P<ranges>[^\[\]\s]*)\]|(?P<comma>,)")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_LAST_NUMBER = re.compile(r"(.*?)([0-9]{1,18})([^0-9]*)")


def expand(hostlist: str) -> tuple[str, ...]:
    """Return the names, in the order of the list; a name that is listed twice comes twice.

    Several brackets in one name multiply, the first one slowest: `r[1-2]n[1-2]` is r1n1, r1n2, r2n1, r2n2.

    Raises:
        ValueError: it is not a hostlist; the message says at which character and why.
    """
    hosts: list[str] = []
    parts: list[list[str]] = []
    at = 0
    while at <= len(hostlist):
        token = _TOKEN.match(hostlist, at)
        if token is None and at < len(hostlist):
            found = hostlist[at]
            why = f"{found!r} without its partner" if found in "[]" else "a space does not belong here"
            raise _wrong(hostlist, at, why)
        if token is None or token["comma"]:
            if not parts:
                raise _wrong(hostlist, at, "a node name is missing")
            if len(hosts) + math.prod(len(p) for p in parts) > MAX_HOSTS:
                raise _wrong(hostlist, at, f"more than {MAX_HOSTS} names until here")
            hosts += ("".join(p) for p in itertools.product(*parts))
            parts = []
        elif token["text"]:
            parts.append([token["text"]])
        else:
            parts.append(_numbers(hostlist, at + 1, token["ranges"]))
        at = token.end() if token else at + 1
    return tuple(hosts)


def _numbers(hostlist: str, at: int, ranges: str) -> list[str]:
    """Return what one bracket stands for; a leading zero in the first number sets the width of all."""
    numbers: list[str] = []
    for item in ranges.split(","):
        found = _RANGE.fullmatch(item)
        if found is None:
            raise _wrong(hostlist, at, f"{item!r} is not a number or a range such as 05-20")
        low, high = found[1], found[2] or found[1]
        if int(high) < int(low):
            raise _wrong(hostlist, at, f"the range {item} runs backwards")
        if int(high) - int(low) >= MAX_HOSTS:
            raise _wrong(hostlist, at, f"the range {item} has more than {MAX_HOSTS} numbers")
        numbers += (str(n).zfill(len(low)) for n in range(int(low), int(high) + 1))
        at += len(item) + 1
    return numbers


def _wrong(hostlist: str, at: int, why: str) -> ValueError:
    return ValueError(f"{hostlist!r} is not a hostlist: at character {at + 1}: {why}")


def fold(names: Iterable[str]) -> str:
    """Return the hostlist of the names, in their order: neighbours that differ in their last number share a bracket.

    `expand` gives back the same names.
    """
    split = [found.groups() if (found := _LAST_NUMBER.fullmatch(n)) else (n, "", "") for n in names]
    folded: list[str] = []
    for (prefix, suffix, numbered), run in itertools.groupby(split, key=lambda s: (s[0], s[2], bool(s[1]))):
        numbers = [number for _, number, _ in run]
        if not numbered or len(numbers) == 1:
            folded += (f"{prefix}{number}{suffix}" for number in numbers)
            continue
        ranges: list[tuple[str, str]] = []
        for number in numbers:
            if ranges and number == str(int(ranges[-1][1]) + 1).zfill(len(ranges[-1][0])):
                ranges[-1] = (ranges[-1][0], number)
            else:
                ranges.append((number, number))
        inside = ",".join(low if low == high else f"{low}-{high}" for low, high in ranges)
        folded.append(f"{prefix}[{inside}]{suffix}")
    return ",".join(folded)
