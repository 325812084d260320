"""Whether factors, and what they make of the weights, stay within the range of what the engines serve."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lorasync.push.strategies import ServeAdapter
from lorasync.push.trainer_ranks import texts_of_all_ranks
from lorasync.wire import dtype_of

if TYPE_CHECKING:
    from lorasync.push.engines import Replicas
    from lorasync.push.strategies import Apply


def dtypes_of_all_ranks(engines: Replicas | None) -> list[dict[str, str]]:
    """What the engines serve, on every trainer rank, though only one has asked; a collective."""
    texts = texts_of_all_ranks(json.dumps(engines.dtypes) if engines else "")
    return [found for text in texts if text for found in json.loads(text)]


def check_fits(source: Any, apply: Apply | None, dtypes: list[dict[str, str]]) -> None:
    """Before anything is sent; every trainer rank calls it, as factors may have to be gathered.

    Raises:
        NonFiniteError: naming what would be served as Inf or NaN.
    """
    check = getattr(source, "check_fits", None)
    if apply is None or check is None:
        return
    slots = isinstance(apply, ServeAdapter)
    for name in sorted({found["slots" if slots else "weights"] for found in dtypes if found}):
        check(dtype_of(name), slots=slots)
