"""Which slice of which checkpoint tensor lands where in the parameters of a vLLM model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lorasync.errors import Mismatch, MismatchError

if TYPE_CHECKING:
    from collections.abc import Collection

    from lorasync.receive.windows import Row, Slice

ManifestEntry = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class LoadPlan:
    """Every copy that vLLM's loader makes of a checkpoint, and what it computes instead of copying."""

    rows: tuple[Row, ...]
    layouts: dict[str, tuple[Slice, torch.dtype]]
    """Shape, strides and dtype of every parameter of the engine, and of the buffers that are loaded."""
    feeds: dict[str, frozenset[str]]
    """For each parameter, the checkpoint names that go into it."""
    computed: frozenset[str]
    """Parameters that get something else than plain slices of checkpoint tensors."""
    uncovered: dict[str, int] = field(default_factory=dict)
    """Parameters that the checkpoint leaves unset, wholly or in part, with the number of elements that it sets."""
    written: dict[str, int] = field(default_factory=dict)
    """How many elements of each parameter the loader writes, each counted once."""
    ignored: frozenset[str] = frozenset()
    """Checkpoint names that the engine takes nothing of."""
    aliases: dict[str, tuple[tuple[str, Slice], ...]] = field(default_factory=dict)
    """For each parameter what the constructor made as a view of it, with the window that it shows."""

    def rows_of(self, name: str) -> tuple[Row, ...]:
        return self._rows_by_name().get(name, ())

    def _rows_by_name(self) -> dict[str, tuple[Row, ...]]:
        cached: dict[str, tuple[Row, ...]] | None = self.__dict__.get("_by_name")
        if cached is None:
            collected: dict[str, list[Row]] = defaultdict(list)
            for row in self.rows:
                collected[row.name].append(row)
            cached = {name: tuple(rows) for name, rows in collected.items()}
            object.__setattr__(self, "_by_name", cached)
        return cached


def check_complete(plan: LoadPlan, only: Collection[str] | None = None) -> None:
    """Refuse a manifest that would leave part of the engine unset, or (with ``only``) part of these parameters.

    vLLM fills such a part from uninitialized memory (a fused layer sent in part) or keeps the old
    weights without a word.

    Raises:
        MismatchError: naming every parameter of the engine that is not (wholly) covered.
    """
    gaps = []
    for param, got in sorted(plan.uncovered.items()):
        if only is not None and param not in only:
            continue
        total = plan.layouts[param][0].numel
        got_text = f"{got} of its {total} elements" if got else "nothing for it"
        from_ = f" (from {', '.join(sorted(plan.feeds[param]))})" if plan.feeds.get(param) else ""
        gaps.append(
            Mismatch(
                param, got_text + from_, "every element", "Send every tensor that goes into it, or none."
            )
        )
    if gaps:
        raise MismatchError("The push leaves part of the engine's model unset; nothing was touched.", gaps)
