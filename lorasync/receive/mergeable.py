"""The entries of a `FactorSpec` by base weight, and which adapters can't be merged from factors."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from lorasync.errors import UnmergeableError

if TYPE_CHECKING:
    from lorasync.source.edits import Entry
    from lorasync.source.spec import FactorSpec


def entries_by_weight(spec: FactorSpec) -> dict[str, list[Entry]]:
    """Return what the adapter does to each weight, in the order in which it is done."""
    found: dict[str, list[Entry]] = defaultdict(list)
    every: tuple[Entry, ...] = (*spec.saved, *spec.modules, *spec.rows, *spec.biases)
    for entry in every:
        found[entry.weight].append(entry)
    return dict(found)


def not_mergeable(spec: FactorSpec) -> list[str]:
    """Return why a worker can't merge this adapter from its factors; empty if it can."""
    pieces = [m.weight for m in spec.modules if m.pieces]
    tied = [weight for weight in entries_by_weight(spec) if weight in spec.ties]
    problems = [f"{n}: its checkpoint stores it in pieces" for n in pieces]
    problems += [f"{n}: it is tied to {spec.ties[n]}" for n in tied]
    return problems + list(spec.conflicts)


def refuse_not_mergeable(spec: FactorSpec) -> None:
    """Refuse an adapter that can't be merged from factors in the worker.

    Raises:
        UnmergeableError: The message names the weights, and the strategy that works.
    """
    problems = not_mergeable(spec)
    if problems:
        raise UnmergeableError(
            f"MergeInWorker can't take this adapter: {'; '.join(problems[:8])}. Use MergedSource instead."
        )


def ways_to_merge(spec: FactorSpec) -> str:
    """Name the strategies that can take an adapter which LoRA slots can't hold."""
    if not_mergeable(spec) or spec.base_changed_by:
        return "MergedSource"
    return "MergedSource or MergeInWorker"
