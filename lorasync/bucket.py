"""What a source lends to a receiver that reads at once: the model's own memory instead of copies of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorasync.kernels import PendingMerge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor of the model's own that needs no work; it is only read, and before the model changes.

    Example:
        >>> import torch
        >>> weight = torch.zeros(2, 3)
        >>> Held(weight).shape, Held(weight).tensor.data_ptr() == weight.data_ptr()
        ((2, 3), True)
    """

    param: Tensor

    @property
    def tensor(self) -> Tensor:
        """The values, without a gradient."""
        return self.param.detach()

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.param.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.param.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.param.device

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.param.nbytes


Item = Tensor | Held | PendingMerge
"""One weight on its way: a tensor that is the consumer's own, or something lent."""


class Recurring(dict[str, Tensor | PendingMerge]):
    """A bucket that comes again as the same object, with other values where its tensors lie."""


@dataclass(frozen=True, eq=False)
class Lent:
    """All that a source lends, by name: the same object again for as long as everything lies where it lay.

    So whoever takes it prepares once, and from then on looks at one object instead of hundreds.

    Example:
        >>> import torch
        >>> lent = Lent({"w": Held(torch.zeros(2, 3))})
        >>> lent.nbytes, lent.unwrapped["w"].shape
        (24, torch.Size([2, 3]))
    """

    items: dict[str, Held | PendingMerge]

    @cached_property
    def nbytes(self) -> int:
        """The bytes of all weights; nothing of that is allocated."""
        return sum(item.nbytes for item in self.items.values())

    @cached_property
    def devices(self) -> frozenset[torch.device]:
        """Where it lies."""
        return frozenset(item.device for item in self.items.values())

    @cached_property
    def unwrapped(self) -> Recurring:
        """Tensors and merges, as a receiver in this process takes them."""
        return Recurring((name, unwrapped(item)) for name, item in self.items.items())


NOTHING = Lent({})
Bucket = Lent | dict[str, Tensor]
"""What goes to the engines in one call."""


class LastLent:
    """What was lent last, for as long as it holds."""

    def __init__(self) -> None:
        self._plan: object = None
        self._lies: list[int] = []
        self._lent = NOTHING

    def get(self, plan: object, tensors: Sequence[Tensor], make: Callable[[], Lent]) -> Lent:
        """The same as before, if the plan is that object and the tensors lie where they lay; otherwise a new one."""
        lies = addresses(tensors)
        if self._plan is not plan or self._lies != lies:
            self._plan, self._lies, self._lent = plan, lies, make()
        return self._lent


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where their elements begin; of hundreds, at each push, so packed parameters are not asked through Python.

    Example:
        >>> x = torch.zeros(2)
        >>> addresses([x]) == [x.data_ptr()]
        True
    """
    with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' have a __torch_function__
        return list(map(Tensor.data_ptr, tensors))


def items_of(bucket: Bucket) -> Mapping[str, Item]:
    """The weights of a bucket by name."""
    return bucket.items if isinstance(bucket, Lent) else bucket


def nbytes_of(bucket: Bucket) -> int:
    """The bytes of all weights of a bucket."""
    return bucket.nbytes if isinstance(bucket, Lent) else sum(tensor.nbytes for tensor in bucket.values())


def unwrapped(item: Item) -> Tensor | PendingMerge:
    """A tensor that is held as the tensor itself."""
    return item.tensor if isinstance(item, Held) else item


def made(item: Item) -> Tensor:
    """The weight as a tensor; a merge is made now."""
    found = unwrapped(item)
    return found.make() if isinstance(found, PendingMerge) else found
