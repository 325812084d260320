"""What an adapter's factors do to each base weight, and which adapters can't be merged from factors."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from lorasync.errors import UnmergeableError
from lorasync.merge import add_delta, merge_low_rank, replace_rows
from lorasync.source.spec import FactorBias, FactorModule, FactorRows, FactorSaved, FactorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

Edit = FactorModule | FactorBias | FactorRows | FactorSaved


def edits_by_weight(spec: FactorSpec) -> dict[str, list[Edit]]:
    """The edits of each weight, in the order in which they are made."""
    edits: dict[str, list[Edit]] = defaultdict(list)
    every: tuple[Edit, ...] = (*spec.saved, *spec.modules, *spec.rows, *spec.biases)
    for edit in every:
        edits[edit.weight].append(edit)
    return dict(edits)


def edited(weight: torch.Tensor, edits: Iterable[Edit], factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Make these edits of a whole weight, with these factors."""
    for edit in edits:
        if isinstance(edit, FactorModule):
            magnitude = factors[edit.magnitude] if edit.magnitude else None
            weight = merge_low_rank(edit.how, weight, factors[edit.a], factors[edit.b], magnitude)
        elif isinstance(edit, FactorRows):
            weight = replace_rows(weight, edit.rows, factors[edit.tensor])
        elif isinstance(edit, FactorBias):
            weight = add_delta(weight, factors[edit.tensor] * edit.scaling)
        else:
            weight = factors[edit.tensor]
    return weight


def not_mergeable(spec: FactorSpec) -> list[str]:
    """Why a worker can't merge this adapter from its factors; empty if it can."""
    pieces = [m.weight for m in spec.modules if m.pieces]
    tied = [weight for weight in edits_by_weight(spec) if weight in spec.ties]
    problems = [f"{n}: its checkpoint stores it in pieces" for n in pieces]
    problems += [f"{n}: it is tied to {spec.ties[n]}" for n in tied]
    return problems + list(spec.conflicts)


def refuse_not_mergeable(spec: FactorSpec) -> None:
    """Raise for adapters that can't be merged from factors in the worker.

    Raises:
        UnmergeableError: naming the weights, and the strategy that works.
    """
    problems = not_mergeable(spec)
    if problems:
        raise UnmergeableError(
            "MergeInWorker can't take this adapter: "
            + "; ".join(problems[:8])
            + ". Use MergedSource instead."
        )


def ways_to_merge(spec: FactorSpec) -> str:
    """The strategies that can take an adapter which LoRA slots can't hold."""
    if not_mergeable(spec) or spec.base_changed_by:
        return "MergedSource"
    return "MergedSource or MergeInWorker"
