"""Dataclasses of what travels: each field is checked to be of its type."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def made(kind: type[T], given: object) -> T:
    """Make a dataclass of fields that have travelled.

    Raises:
        TypeError: if fields are missing, unknown or of another type; it names them.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"got {type(given).__name__}, expected dict")
    hints: dict[str, Any] = _hints(kind)  # type: ignore[arg-type]
    unknown = sorted(map(repr, given.keys() - hints.keys()))
    if unknown:
        raise TypeError(f"got the unknown fields {', '.join(unknown)}")
    return kind(**{name: _checked(name, value, hints[name]) for name, value in given.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, without those of its class variables."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value, if it is of its type; lists come as lists or tuples, whatever the route made of them."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is UnionType:
        return None if value is None else _checked(name, value, next(i for i in inner if i is not NoneType))
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_checked(f"{name}[{n}]", each, inner[0]) for n, each in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {
            _checked(name, k, inner[0]): _checked(f"{name}[{k!r}]", v, inner[1]) for k, v in value.items()
        }
    if hint is float and type(value) in (int, float) and math.isfinite(value):  # neither NaN nor Inf
        return float(value)
    if origin is Literal and isinstance(value, str) and value in inner:
        return value
    if type(value) is hint and hint is not float:
        return value
    raise TypeError(f"{name}: got {_shown(value, origin)}, expected {_named(hint)}")


def _shown(value: Any, origin: Any) -> str:
    return repr(value)[:80] if origin is Literal else type(value).__name__


def _named(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return str(getattr(hint, "__name__", hint))
