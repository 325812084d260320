"""Checking, before anything is sent, that what finite tensors are merged to stays within the range of the served dtype."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lorasync.source.finite import FiniteCheck, inputs_of, part_name, refuse
from lorasync.zero.whole import whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lorasync.source.plan import Slot


class Fit:
    """One tensor that may leave the range of the served dtype although all that it is made of is finite.

    Where a bound of |W + s·B·A| does not exclude it, the tensor is made once to see.
    """

    def __init__(self, slot: Slot, dtype: torch.dtype) -> None:
        self._slot, self._dtype = slot, dtype
        self._limit = torch.finfo(dtype).max
        self._half_step = self._limit * torch.finfo(dtype).eps / 4
        self._terms = [_term(slot, step) for step in slot.steps]
        self._base_fits = slot.packing == "plain" and _range(slot.dtype) <= self._limit
        only = slot.steps[0] if len(slot.steps) == 1 else None
        is_dora = only is not None and only.how is not None and only.how.dora
        self._magnitude = part_name(slot, only.adapter, 2) if only is not None and is_dora else ""

    def holds(self, peaks: dict[str, float]) -> bool:
        """Say so from the largest values of everything that goes into it."""
        if self._added(peaks) + peaks[self._slot.name] < self._limit:
            return True
        with whole(self._slot.params) as gathered:
            return bool(torch.isfinite(self._slot.make(self._dtype, whole=gathered)).all())

    def holds_over_any_base(self, peaks: dict[str, float]) -> bool:
        """Say so from the largest values of the factors alone, where the base can't leave the dtype itself.

        What is less than half a step at the largest number is rounded away there: the sum stays finite.
        """
        if not self._base_fits:
            return False
        if self._magnitude:  # rows are as long as the magnitudes are large
            return peaks[self._magnitude] < self._limit
        return self._added(peaks) < self._half_step

    def _added(self, peaks: dict[str, float]) -> float:
        if self._slot.general is not None:
            return math.inf
        return sum(factor * math.prod([peaks[name] for name in names]) for names, factor in self._terms)


def may_leave(slot: Slot, dtype: torch.dtype) -> bool:
    """Whether a tensor that is finite could be served as Inf: it is merged, unpacked, or narrowed."""
    if not dtype.is_floating_point:
        return False
    return slot.adapted or slot.packing != "plain" or _range(slot.dtype) > torch.finfo(dtype).max


def check_fits(fits: Sequence[Fit], peaks: dict[str, float]) -> None:
    """Raise for tensors that leave the served dtype.

    Raises:
        NonFiniteError: With the name of every such weight.
    """
    refuse_range([(fit._slot.name, fit._dtype) for fit in fits if not fit.holds(peaks)])


def refuse_range(bad: Sequence[tuple[str, torch.dtype]]) -> None:
    """Raise for what would be served as Inf or NaN.

    Raises:
        NonFiniteError: With each name.
    """
    if bad:
        dtypes = sorted({f"{dtype} (±{torch.finfo(dtype).max:g})".removeprefix("torch.") for _, dtype in bad})
        refuse(
            [name for name, _ in bad],
            f"got values out of the range of {' and '.join(dtypes)}, expected ones that don't become NaN or Inf. Nothing "
            "was sent. Serve a dtype of a wider range (bfloat16), go back to the last good adapter (did the loss "
            "diverge?), or pass check_finite=False if you know better.",
        )


class Merges:
    """Checks the weights that a receiver merges from factors: they must stay within their dtype's range.

    Args:
        slots: The weights of the model.
        tensors: What travels, by its name.
        dtype: The dtype of the receiver's weights.
    """

    def __init__(self, slots: Sequence[Slot], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._fits = {slot.name: Fit(slot, dtype) for slot in slots if slot.adapted}
        self._inputs = {slot.name: inputs_of(slot) for slot in slots if slot.adapted}
        sent = {id(tensor): name for name, tensor in tensors.items()}
        self._sent = {
            each.name: sent[id(each.tensor)]
            for inputs in self._inputs.values()
            for each in inputs
            if id(each.tensor) in sent
        }
        self._base: FiniteCheck | None = None

    def check(self, peaks: Mapping[str, float]) -> None:
        """Compare bounds; the base is looked at only where the factors' own bound says nothing. A collective.

        Args:
            peaks: The largest absolute value of what travels, by its name.

        Raises:
            NonFiniteError: With the name of every weight that would leave the range.
        """
        own = {name: peaks[sent] for name, sent in self._sent.items()}
        near = [name for name, fit in self._fits.items() if not fit.holds_over_any_base(own)]
        if not near:
            return
        self._base = FiniteCheck([each for name in near for each in self._inputs[name]], self._base)
        check_fits([self._fits[name] for name in near], self._base.peaks())


def _term(slot: Slot, step: Any) -> tuple[list[str], float]:
    """Return what bounds a step's update: a factor, and the inputs whose largest values it is multiplied by."""
    names = [part_name(slot, step.adapter, i) for i in range(len(step.params))]
    scaling = abs(float(getattr(step.layer, "scaling", {}).get(step.adapter, 1.0)))
    if len(names) == 1:
        return names, max(scaling, 1.0)
    return (names, scaling * step.layer.r[step.adapter]) if len(names) == 2 else ([], math.inf)


def _range(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max if dtype.is_floating_point else 0.0
