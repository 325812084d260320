"""NaN and Inf are refused before the first tensor is yielded, all names at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch import distributed as dist

from lorasync.errors import NonFiniteError
from lorasync.source.base import scale_bound
from lorasync.source.whole import whole
from lorasync.zero import is_sharded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lorasync.source.plan import Slot

_SHOWN = 20


@dataclass
class FiniteCheck:
    """Looks at every value that a pass will use, but at a frozen base weight only once.

    Each rank looks at what it holds; under ZeRO-3 and FSDP2 the ranks then compare notes (one small
    collective), so that all refuse together. A pass whose factors are finite can still overflow the served
    dtype: where that is possible at all, the module is merged once to see.
    """

    _seen: dict[str, tuple[tuple[int, int, int], float]] = field(default_factory=dict)

    def __call__(self, slots: Iterable[Slot], dtype: torch.dtype | None) -> None:
        """Check what these slots are made of, and that their merge fits ``dtype``.

        Raises:
            NonFiniteError: With the name of every bad tensor.
        """
        slots = list(slots)
        packed = {slot.name: scale_bound(slot.module, slot.attr) for slot in slots}
        known = {name: bound for name, bound in packed.items() if bound is not None}
        peaks = self.inputs(
            [named for slot in slots for named in _inputs(slot) if named[0] not in known], known
        )
        _refuse([slot.name for slot in slots if _may_overflow(slot, dtype, peaks)])

    def inputs(
        self, named: list[tuple[str, Tensor]], known: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Check tensors as they are and return the largest absolute value of each.

        Args:
            named: What to look at.
            known: The largest values of what needs no look.

        Raises:
            NonFiniteError: With the name of every bad tensor.
        """
        peaks = [self._peak(name, tensor) for name, tensor in named]
        if any(is_sharded(tensor) for _, tensor in named):
            peaks = _everywhere(peaks)
        found = {**(known or {}), **dict(zip([name for name, _ in named], peaks, strict=True))}
        _refuse([name for name, peak in found.items() if not math.isfinite(peak)])
        return found

    def _peak(self, name: str, tensor: Tensor) -> float:
        if tensor.requires_grad:
            return _peak(tensor)
        local = _local(tensor)
        state = (id(tensor), local._version, local.data_ptr())
        if name not in self._seen or self._seen[name][0] != state:
            self._seen[name] = (state, _peak(tensor))
        return self._seen[name][1]


def _refuse(bad: list[str]) -> None:
    if bad:
        more = f"\n  … and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise NonFiniteError(
            f"{len(bad)} tensors: got NaN or Inf, expected finite values. Nothing was sent. Go back to the "
            "last good adapter (did the loss diverge?), or pass check_finite=False if you know better.\n  "
            + "\n  ".join(bad[:_SHOWN])
            + more
        )


def _inputs(slot: Slot) -> list[tuple[str, Tensor]]:
    inputs = [(slot.name, slot.held)]
    for step in slot.steps:
        inputs += [(f"{slot.name} ({step.adapter}, {_part(i)})", p) for i, p in enumerate(step.params)]
    if slot.general is not None:
        inputs += [(f"{slot.name} ({slot.general.adapters[-1]})", p) for p in slot.general.params()]
    return inputs


def _part(index: int) -> str:
    return ("A", "B", "magnitude")[index]


@torch.no_grad()
def _peak(tensor: Tensor) -> float:
    """The largest absolute value of what this rank holds, or NaN; without a copy of the tensor."""
    return _largest(_local(tensor))


def _largest(values: Tensor) -> float:
    if values.numel() == 0 or values.device.type == "meta" or not values.dtype.is_floating_point:
        return 0.0
    low, high = (float(x) for x in torch.aminmax(values))
    return math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)


def _local(tensor: Tensor) -> Tensor:
    if not is_sharded(tensor):
        return tensor.detach()
    shard = getattr(tensor, "ds_tensor", None)
    return cast("Any", tensor).to_local() if shard is None else shard  # type: ignore[no-any-return]


def _everywhere(peaks: list[float]) -> list[float]:
    """The largest peak of any rank, NaN and Inf included."""
    mine = [math.inf if math.isnan(p) else p for p in peaks]
    device = (
        torch.device("cpu")
        if dist.get_backend() == "gloo"
        else torch.device("cuda", torch.cuda.current_device())
    )
    values = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [float(v) for v in values]


def _may_overflow(slot: Slot, dtype: torch.dtype | None, peaks: dict[str, float]) -> bool:
    """Whether the merged values leave the served dtype; computed only where a bound doesn't exclude it."""
    target = slot.dtype if dtype is None else dtype
    if not slot.adapted or not target.is_floating_point or _bound(slot, peaks) < torch.finfo(target).max:
        return False
    with whole(slot.params) as gathered:
        return not bool(torch.isfinite(slot.make(target, whole=gathered)).all())


def _bound(slot: Slot, peaks: dict[str, float]) -> float:
    """An upper bound of |W + s·B·A| from the largest values of each; infinite where only a merge can tell."""
    total = math.inf if slot.general is not None else peaks[slot.name]
    for step in slot.steps:
        found = [peaks[f"{slot.name} ({step.adapter}, {_part(i)})"] for i in range(len(step.params))]
        layer: Any = step.layer
        scaling = abs(float(getattr(layer, "scaling", {}).get(step.adapter, 1.0)))
        if len(found) == 1:
            total += max(scaling, 1.0) * found[0]
        else:
            total += scaling * layer.r[step.adapter] * found[0] * found[1] if len(found) == 2 else math.inf
    return total
