"""What adapters do to one weight, as data, and the one interpreter of it: for the trainer, an export and a worker.

A weight gets its edits in order. A worker that holds a part of a weight computes the whole delta (`LowRankUpdate.delta`) and
adds the part of it that belongs there (`UpdatePart`); the other edits need the weight whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorasync.merge.arithmetic import add_delta, replace_rows
from lorasync.merge.low_rank import add_low_rank, low_rank_delta, merge_low_rank

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from lorasync.merge.arithmetic import Scaling
    from lorasync.merge.low_rank import LowRank


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """Adds s·B·A; with DoRA scales the rows to a trained magnitude, too.

    Args:
        how: What kind of layer it is.
        lora_a: A, as PEFT holds it.
        lora_b: B, as PEFT holds it.
        magnitude: DoRA's m.
    """

    how: LowRank
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None = None

    def delta(self, *, exact: bool = False) -> Tensor:
        """Compute s·B·A in the weight's layout."""
        return low_rank_delta(self.how, self.lora_a, self.lora_b, exact=exact)

    def made(self, weight: Tensor, base: Tensor, *, exact: bool) -> Tensor:
        """Return the weight with this edit; ``base`` is what DoRA's norm is of."""
        return merge_low_rank(
            self.how, weight, self.lora_a, self.lora_b, self.magnitude, norm_base=base, exact=exact
        )


@dataclass(frozen=True, eq=False)
class UpdatePart:
    """Adds a part of a low-rank update's delta to the same part of the weight; not for DoRA.

    Args:
        how: What kind of layer it is.
        delta: The part of `LowRankUpdate.delta`.
    """

    how: LowRank
    delta: Tensor

    def made(self, weight: Tensor, base: Tensor, *, exact: bool) -> Tensor:  # noqa: ARG002
        """Return the part of the weight with this edit."""
        return add_low_rank(self.how, weight, self.delta, exact=exact)


@dataclass(frozen=True, eq=False)
class Added:
    """Adds a tensor times its layer's scaling: a trained bias of B."""

    values: Tensor
    scaling: Scaling

    def made(self, weight: Tensor, base: Tensor, *, exact: bool) -> Tensor:  # noqa: ARG002
        """Return the weight with this edit."""
        with torch.no_grad():
            return add_delta(weight, self.values * self.scaling)


@dataclass(frozen=True, eq=False)
class Rows:
    """Replaces rows: trained tokens."""

    rows: Sequence[int]
    values: Tensor

    def made(self, weight: Tensor, base: Tensor, *, exact: bool) -> Tensor:  # noqa: ARG002
        """Return the weight with this edit."""
        return replace_rows(weight, self.rows, self.values)


@dataclass(frozen=True, eq=False)
class Replaced:
    """Replaces the weight: a module that was trained whole."""

    values: Tensor

    def made(self, weight: Tensor, base: Tensor, *, exact: bool) -> Tensor:  # noqa: ARG002
        """Return what stands for the weight."""
        return self.values


Edit = LowRankUpdate | UpdatePart | Added | Rows | Replaced


def edited(
    base: Tensor, edits: Iterable[Edit], *, exact: bool = False, round_between: bool = False
) -> Tensor:
    """Make the edits of a weight, out of place and without the last rounding.

    Args:
        base: W, dequantized, in its own layout, or a part of it; it is only read.
        edits: What is done to it, in order; taken one at a time.
        exact: Skip the roundings that PEFT does on the way.
        round_between: Round to ``base``'s dtype from one edit to the next, as PEFT does where it merges several adapters.

    Returns:
        The weight in the widest dtype that came up; round it with `Nearest` or `Stochastic`.

    Example:
        >>> edited(torch.zeros(2, 2), [Rows((1,), torch.ones(1, 2)), Added(torch.ones(2, 2), 0.5)]).tolist()
        [[0.5, 0.5], [1.5, 1.5]]
    """
    weight = base
    for index, edit in enumerate(edits):
        if index and round_between:
            weight = weight.to(base.dtype)
        weight = edit.made(weight, base, exact=exact)
    return weight
