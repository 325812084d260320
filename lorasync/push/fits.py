"""Whether factors, and what they make of the weights, stay within the range of what the engines serve."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lorasync.push.trainer_ranks import texts_of_all_ranks
from lorasync.wire import dtype_of

if TYPE_CHECKING:
    from lorasync.push.engines import Engines
    from lorasync.push.strategies import Strategy


def dtypes_of_all_ranks(engines: Engines) -> list[dict[str, str]]:
    """What the engines serve, on every trainer rank, though not all have engines; a collective."""
    texts = texts_of_all_ranks(json.dumps(engines.dtypes))
    return [found for text in texts if text for found in json.loads(text)]


def check_fits(source: Any, strategy: Strategy, dtypes: list[dict[str, str]]) -> None:
    """Before anything is sent; every trainer rank calls it, as factors may have to be gathered.

    Raises:
        NonFiniteError: naming what would be served as Inf or NaN.
    """
    check = getattr(source, "check_fits", None)
    if not strategy.stages_beside or check is None:
        return
    slots = not strategy.changes_weights
    for name in sorted({found["slots" if slots else "weights"] for found in dtypes if found}):
        check(dtype_of(name), slots=slots)
