"""Refusing NaN and Inf before the first tensor is yielded, with all names at once."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter, ne
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist

from lorasync.bucket import Latest, addresses
from lorasync.errors import NonFiniteError
from lorasync.kernels import Peaks, largest
from lorasync.source.parameter import scale_bound
from lorasync.zero import can_be_sharded, is_sharded
from lorasync.zero.gather import held_part

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorasync.source.plan import Slot

_SHOWN = 20
_TRAINED, _VERSION = attrgetter("requires_grad"), attrgetter("_version")
_UNSEEN = (0, 0, 0)


@dataclass(frozen=True, eq=False)
class Input:
    """One tensor that a pass reads; ``bound`` bounds the absolute values of a packed one."""

    name: str
    tensor: Tensor
    bound: Callable[[], float | None] | None = None


class FiniteCheck:
    """Looks at every value that a pass will use, but at a frozen base weight only once.

    Each rank looks at what it holds; under ZeRO-3 and FSDP2 the ranks then compare notes (one small
    collective), so that all refuse together.

    Args:
        inputs: What a pass reads.
        before: An earlier check, of whose frozen weights there is nothing to learn anew.
    """

    def __init__(self, inputs: Sequence[Input], before: FiniteCheck | None = None) -> None:
        self._inputs = tuple(inputs)
        self._names = [each.name for each in inputs]
        self._tensors = [each.tensor for each in inputs]
        self._sharded = any(can_be_sharded(each.tensor) for each in inputs)
        self._states = [_UNSEEN] * len(inputs)
        self._peaks = [math.nan] * len(inputs)
        if before is not None:
            seen = dict(zip(before._names, zip(before._states, before._peaks, strict=True), strict=True))
            for index, name in enumerate(self._names):
                self._states[index], self._peaks[index] = seen.get(name, (_UNSEEN, math.nan))
        self._scans = Latest[tuple[list[tuple[list[int], Peaks]], list[int]]]()

    def begin(self) -> Callable[[], object]:
        """Check the tensors as they are, frozen ones too; a GPU looks at them meanwhile.

        Returns:
            What ends the check, and raises `NonFiniteError` with the name of every bad tensor.
        """
        if self._sharded:
            return self.peaks
        look = self._look_at(self._tensors)
        return lambda: self._refuse_non_finite(look())

    def peaks(self) -> dict[str, float]:
        """Check the tensors as they are and return the largest absolute value of each.

        Raises:
            NonFiniteError: With the name of every bad tensor.
        """
        locals_ = [held_part(tensor) for tensor in self._tensors] if self._sharded else self._tensors
        with torch._C.DisableTorchFunctionSubclass():
            is_trained = list(map(_TRAINED, self._tensors))
        look = self._look_at(list(compress(locals_, is_trained)))
        self._look_at_changed(locals_, is_trained)
        for index, peak in zip(compress(range(len(locals_)), is_trained), look(), strict=True):
            self._peaks[index] = peak
        found = self._peaks
        if self._sharded and any(map(is_sharded, self._tensors)):
            found = _everywhere(found)
        self._refuse_non_finite(found)
        return dict(zip(self._names, found, strict=True))

    def _refuse_non_finite(self, peaks: list[float]) -> None:
        if not all(map(math.isfinite, peaks)):
            _refuse([name for name, peak in zip(self._names, peaks, strict=True) if not math.isfinite(peak)])

    def _look_at_changed(self, locals_: list[Tensor], is_trained: list[bool]) -> None:
        """Look at the frozen tensors that were replaced, written to or moved since the last look."""
        with torch._C.DisableTorchFunctionSubclass():
            states = list(
                zip(map(id, self._tensors), map(_VERSION, locals_), addresses(locals_), strict=True)
            )
        for index in compress(range(len(states)), map(ne, states, self._states)):
            if not is_trained[index]:
                bound = self._inputs[index].bound
                peak = bound() if bound else None
                self._peaks[index] = largest(locals_[index]) if peak is None else peak
                self._states[index] = states[index]

    def _look_at(self, tensors: list[Tensor]) -> Callable[[], list[float]]:
        """Look at tensors; those of one GPU in one launch with one wait, for a wait each takes longer than the merge."""
        scans, alone = self._scans.get(addresses(tensors), lambda: _scans(tensors))
        started = [(members, scan.start()) for members, scan in scans]

        def peaks() -> list[float]:
            found = [math.nan] * len(tensors)
            for members, look in started:
                for index, peak in zip(members, look(), strict=True):
                    found[index] = peak
            for index in alone:
                found[index] = largest(tensors[index])
            return found

        return peaks


def inputs_of(slot: Slot) -> list[Input]:
    """List what is read to make a tensor of the merged model."""
    packed = None if slot.packing == "plain" else lambda: scale_bound(slot.module, slot.attr)
    inputs = [Input(slot.name, slot.held, packed)]
    for step in slot.steps:
        inputs += [Input(part_name(slot, step.adapter, i), p) for i, p in enumerate(step.params)]
    if slot.general is not None:
        adapter = slot.general.adapters[-1]
        inputs += [Input(f"{slot.name} ({adapter}, {i})", p) for i, p in enumerate(slot.general.params())]
    return inputs


def _scans(tensors: list[Tensor]) -> tuple[list[tuple[list[int], Peaks]], list[int]]:
    """Sort tensors into groups that one launch scans, and those that are scanned one by one."""
    alone: list[int] = []
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if tensor.is_cuda and tensor.is_contiguous() and tensor.is_floating_point():
            groups[tensor.device, tensor.dtype].append(index)
        else:
            alone.append(index)
    return [(members, Peaks([tensors[i] for i in members])) for members in groups.values()], alone


def part_name(slot: Slot, adapter: str, index: int) -> str:
    """Name a factor in messages, by the weight that it belongs to."""
    return f"{slot.name} ({adapter}, {('A', 'B', 'magnitude')[index]})"


def _refuse(bad: list[str]) -> None:
    if bad:
        refuse(
            bad,
            "got NaN or Inf, expected finite values. Nothing was sent. Go back to the last good adapter (did the loss "
            "diverge?), or pass check_finite=False if you know better.",
        )


def refuse(bad: list[str], why: str) -> NoReturn:
    """Raise `NonFiniteError` for these tensors, all at once."""
    more = f"\n  … and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    raise NonFiniteError(f"{len(bad)} tensors: {why}\n  " + "\n  ".join(bad[:_SHOWN]) + more)


def _everywhere(peaks: list[float]) -> list[float]:
    """Return the largest peak over all ranks, NaN and Inf included."""
    mine = [math.inf if math.isnan(p) else p for p in peaks]
    device = (
        torch.device("cpu")
        if dist.get_backend() == "gloo"
        else torch.device("cuda", torch.cuda.current_device())
    )
    values = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [float(v) for v in values]
