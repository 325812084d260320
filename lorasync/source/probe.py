"""Noticing, at each push of factors and so at little cost, that a frozen tensor was replaced or written to."""

from __future__ import annotations

from collections import defaultdict
from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from lorasync.base_check import positions
from lorasync.bucket import Latest, addresses
from lorasync.zero import can_be_sharded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_VERSION = attrgetter("_version")
_ELEMENTS = 4


class Probe:
    """Reads of each tensor a few elements, its address, and torch's count of the writes to it.

    What is written through ``.data`` (PEFT's `merge_adapter` does) bumps no version: it shows in the elements, if it changes
    most of a tensor. Of shards only versions are asked.

    Args:
        tensors: What must not change.

    Example:
        >>> weight = torch.ones(3)
        >>> probe = Probe([weight])
        >>> before = probe.state()
        >>> weight.data += 1
        >>> probe.state() == before
        False
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._views = Latest[list[list[torch.Tensor]]]()
        with torch._C.DisableTorchFunctionSubclass():
            self._whole = [t for t in self._tensors if _is_readable(t)]
            self._views.get(addresses(self._whole), self._elements)

    def state(self) -> object:
        """Return a value that equals the one of an earlier call unless a tensor was visibly changed in between."""
        with torch._C.DisableTorchFunctionSubclass():
            lie = addresses(self._whole)
            views_of_all = self._views.get(lie, self._elements)
            seen = [torch.cat(views).tolist() for views in views_of_all]
            return list(map(_VERSION, self._tensors)), lie, seen

    def _elements(self) -> list[list[Tensor]]:
        """Return views of single elements, grouped by dtype and device, so that few launches and one wait read them."""
        found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for index, tensor in enumerate(self._whole):
            flat = tensor.detach().view(-1)
            for at in positions(str(index), len(flat), count=_ELEMENTS):
                found[tensor.device, tensor.dtype].append(flat[at : at + 1])
        return list(found.values())


def _is_readable(tensor: Tensor) -> bool:
    """Whether its memory can be looked at as it is: no shard, and no class of another library's that answers for it."""
    plain = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return plain and not can_be_sharded(tensor) and tensor.numel() > 0 and tensor.is_contiguous()
