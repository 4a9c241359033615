"""Columns and times as squeue prints them: one line a row, never wrapped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TextIO


def columns(
    rows: Iterable[Sequence[object]], *, titles: Sequence[str] = (), right: Iterable[int] = (), width: int | None = None
) -> list[str]:
    """Return one line per row. Columns are as wide as their widest cell; those in `right` are flushed right.

    A line longer than `width` characters is cut, and ends in `+`, as sacct does. None: nothing is cut.
    """
    cells = [[clean(str(cell)) for cell in row] for row in ([titles, *rows] if titles else rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    flush_right = frozenset(right)
    return [
        cut(
            " ".join(
                cell.rjust(w) if i in flush_right else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip(),
            width,
        )
        for row in cells
    ]


def cut(line: str, width: int | None) -> str:
    """Return at most `width` characters of `line`; a `+` at the end tells that some are missing."""
    return line if width is None or len(line) <= width else line[: max(width - 1, 0)] + "+"


def clean(text: str) -> str:
    """Return `text` without control characters: another user's file must not steer this terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def duration(seconds: float) -> str:
    """Return `[D-]HH:MM:SS`; a negative time counts as none."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{h:02}:{m:02}:{s:02}"


def terminal_width(stream: TextIO) -> int | None:
    """Return the width of the terminal that `stream` is; None when it is none, so that pipes get whole lines."""
    if not stream.isatty():
        return None
    try:
        return int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None
