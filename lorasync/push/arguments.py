"""What `connect` is given, looked at before anybody is talked to; all that is wrong is said at once."""

from __future__ import annotations

import difflib
import math
import numbers
from typing import TYPE_CHECKING, Any, get_args

from lorasync.errors import Mismatch, MismatchError
from lorasync.push.issued import OnGone
from lorasync.push.strategies import LoadMerged, MergeInWorker, ServeAdapter
from lorasync.source import MergedSource
from lorasync.targets.base import Pause
from lorasync.targets.kinds import is_engine

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def check_arguments(
    source: Any,
    target: Any,
    apply: Any,
    *,
    pause: Any,
    timeout: Any,
    bucket_bytes: Any,
    measure_survival: Any,
    canary: Any,
    on_gone: Any,
) -> None:
    """Refuse what can't be meant.

    Raises:
        MismatchError: naming every argument that is wrong, with what to write instead.
    """
    wrong = [
        *_wrong_source(source, target),
        *_wrong_apply(apply),
        *_not_one_of("pause", pause, get_args(Pause)),
        *_not_one_of("on_gone", on_gone, get_args(OnGone)),
        *_no_positive("timeout", timeout, numbers.Real, "a number of seconds above 0"),
        *_no_positive("bucket_bytes", bucket_bytes, numbers.Integral, "a whole number of bytes above 0"),
        *_wrong_measures(source, measure_survival, canary),
    ]
    if wrong:
        raise MismatchError("connect() can't work with these arguments; nothing was touched.", wrong)


def _each(target: Any) -> Iterable[Any]:
    if isinstance(target, dict):
        return list(target.values())
    return target if isinstance(target, list | tuple | set | frozenset) else (target,)


def _wrong_source(source: Any, target: Any) -> Iterator[Mismatch]:
    if _is_source(source) and not isinstance(source, type):
        return
    expected, name = "a MergedSource or a FactorSource", type(source).__name__
    if isinstance(source, type):
        fix, name = f"Make one: {source.__name__}(model).", f"the class {source.__name__}"
    elif any(_is_source(one) for one in _each(target)):
        fix = "Swap the two: connect(source, engine)."
    elif callable(getattr(source, "named_parameters", None)):
        fix = f"Wrap it: connect(MergedSource(model), …), or FactorSource(model) with an apply. Got a model, {name}."
    else:
        fix = "connect(MergedSource(model), engine)."
    yield Mismatch("source", name, expected, fix)


def _is_source(found: Any) -> bool:
    return callable(getattr(found, "metadata", None)) and hasattr(found, "__iter__") and not is_engine(found)


def _wrong_apply(apply: Any) -> Iterator[Mismatch]:
    if apply is None or isinstance(apply, LoadMerged | MergeInWorker | ServeAdapter):
        return
    expected = "MergeInWorker(base=…), ServeAdapter(name), or nothing for merged weights"
    if isinstance(apply, type):
        example = {MergeInWorker: "MergeInWorker(base='device')", ServeAdapter: "ServeAdapter('policy')"}
        fix, got = f"Make one: {example.get(apply, apply.__name__)}.", f"the class {apply.__name__}"
    else:
        fix, got = "Import them from lorasync.push.", repr(apply)[:80]
    yield Mismatch("apply", got, expected, fix)


def _not_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> Iterator[Mismatch]:
    if isinstance(value, str) and value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
    fix = f"Did you mean {near[0]!r}?" if near else "Choose one."
    yield Mismatch(name, repr(value), ", ".join(map(repr, allowed)), fix)


def _no_positive(name: str, value: Any, kind: type, expected: str) -> Iterator[Mismatch]:
    number: Any = value
    good = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(number) and number > 0
    if not good:
        yield Mismatch(name, repr(value), expected, "Leave it out for the default.")


def _wrong_measures(source: Any, measure_survival: Any, canary: Any) -> Iterator[Mismatch]:
    if not isinstance(measure_survival, bool):
        yield Mismatch("measure_survival", repr(measure_survival), "True or False", "Leave it out for False.")
    elif measure_survival and not isinstance(source, MergedSource):
        got = f"True with {type(source).__name__}"
        yield Mismatch(
            "measure_survival", got, "a MergedSource: only there is something rounded", "Leave it out."
        )
    if canary is not None and not (
        callable(canary) and hasattr(canary, "limit") and not isinstance(canary, type)
    ):
        yield Mismatch(
            "canary", repr(canary)[:80], "a lorasync.verify.Canary", "Canary(model, llm, prompts)."
        )
