"""The entries of a `FactorSpec` with their tensors put in: edits that `lorasync.merge.edits` makes. Needs no PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lorasync.merge.edits import Added, LowRankUpdate, Replaced, Rows
from lorasync.source.spec import FactorBias, FactorModule, FactorRows, FactorSaved

if TYPE_CHECKING:
    from torch import Tensor

    from lorasync.merge.edits import Edit

Entry = FactorModule | FactorBias | FactorRows | FactorSaved


class Factors(Protocol):
    """An adapter's tensors by their names in the stream: a dict, or files that are read when they are asked for."""

    def __getitem__(self, name: str, /) -> Tensor: ...


def with_factors(entry: Entry, factors: Factors) -> Edit:
    """Return what an entry does to its weight, with these factors.

    Args:
        entry: One of a spec's modules, biases, rows or saved tensors.
        factors: The adapter's tensors.
    """
    if isinstance(entry, FactorModule):
        magnitude = None if entry.magnitude is None else factors[entry.magnitude]
        return LowRankUpdate(entry.how, factors[entry.a], factors[entry.b], magnitude)
    if isinstance(entry, FactorRows):
        return Rows(entry.rows, factors[entry.tensor])
    if isinstance(entry, FactorBias):
        return Added(factors[entry.tensor], entry.scaling)
    return Replaced(factors[entry.tensor])
