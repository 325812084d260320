"""Refusing what a preset, or a constructor that a preset calls, doesn't know."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lorasync.errors import Mismatch, MismatchError
from lorasync.spelling import nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_ALSO_CALLED = {"rank": "r", "lora_r": "r", "alpha": "lora_alpha"}
_VALUES: dict[str, tuple[Any, ...]] = {
    "quant_type": ("nf4", "fp4", "int8"),
    "stage": (0, 1, 2, 3),
    "precision": ("bf16", "fp16", "fp32"),
    "optimizer_offload": ("none", "cpu"),
}
_COUNTS = ("r", "alpha", "micro_batch", "global_batch")


def refuse_values(preset: Any) -> None:
    """Refuse values that no preset can have, all at once; `dataclasses.replace` calls this, too."""
    given = {field.name: getattr(preset, field.name) for field in fields(preset)}
    wrong = [
        Mismatch(name, repr(value), "one of " + ", ".join(map(repr, _VALUES[name])), "Choose one.")
        for name, value in given.items()
        if name in _VALUES and not any(value == each and type(value) is type(each) for each in _VALUES[name])
    ]
    wrong += [
        Mismatch(name, repr(value), "a whole number above 0", "Correct it.")
        for name, value in given.items()
        if name in _COUNTS and value is not None and (type(value) is not int or value < 1)
    ]
    if wrong:
        raise MismatchError(f"{type(preset).__name__} {preset.name!r}: got values that it can't have.", wrong)


def refuse_unknown(owner: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse arguments that a constructor doesn't have, all at once, with the names that were meant."""
    names = sorted(known)
    near = {key: _ALSO_CALLED.get(key) or nearest(key, names) for key in given if key not in names}
    if near:
        fixes = {key: f"Did you mean {name}?" if name else "Leave it out." for key, name in near.items()}
        raise MismatchError(
            f"{owner} doesn't have all that was given.",
            [Mismatch(key, repr(given[key]), f"an entry of {owner}", fix) for key, fix in fixes.items()],
        )


def parameters(kind: type) -> list[str]:
    """Name the parameters of a class's constructor."""
    found = inspect.signature(kind).parameters.values()
    return [each.name for each in found if each.kind is not inspect.Parameter.VAR_KEYWORD]
