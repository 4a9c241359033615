"""Frozen dataclasses to JSON values and back, by their annotations. Pure.

Only what `plan.json` and `state.json` hold: dataclasses, StrEnum, numbers, text, None, tuples, string-keyed mappings.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Return `value` as JSON-ready dicts, lists and scalars."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Mapping):
        return {k: encode(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [encode(v) for v in value]
    return value


def decode(kind: type[T], data: Any) -> T:
    """Return the value of type `kind` that `encode` made `data` from.

    Keys that are missing take the field's default, so that a newer version reads an older file.

    Raises:
        ValueError: `data` does not fit `kind`.
    """
    try:
        return cast(T, _decode(kind, data))
    except (TypeError, KeyError, AttributeError, OverflowError) as e:
        raise ValueError(f"not a {kind.__name__}: {e}") from None


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _decode(kind: Any, data: Any) -> Any:
    if is_dataclass(kind) and isinstance(kind, type):
        hints = _hints(kind)
        return kind(**{k: _decode(hints[k], v) for k, v in data.items() if k in hints})
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        inner = [a for a in get_args(kind) if a is not type(None)]
        return None if data is None else _decode(inner[0], data)
    if origin is tuple:
        if not isinstance(data, list | tuple):  # text would fall apart into letters
            raise TypeError(f"{data!r} is not a list")
        args = get_args(kind)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_decode(args[0], v) for v in data)
        return tuple(_decode(a, v) for a, v in zip(args, data, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        key, value = get_args(kind)
        return {(int(k) if key is int else k): _decode(value, v) for k, v in data.items()}
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(data)
    if not isinstance(data, int | float if kind is float else kind) or (isinstance(data, bool) and kind is not bool):
        raise TypeError(f"{data!r} is not {kind.__name__}")
    return kind(data)
