"""`Bucket`: weights that travel together; and `Latest`, which skips work while a bucket is the same as last time."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from lorasync.kernels import PendingMerge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

Item = Tensor | PendingMerge
"""One weight: a tensor, or a merge that the consumer makes."""

T = TypeVar("T")
ItemT = TypeVar("ItemT", bound=Item)


class Bucket(dict[str, ItemT]):
    """Weights by checkpoint name, in the order in which they travel; filled before it is passed on, and then only read.

    A bucket with a key is reused: same names, same storages, new values. The key stays the same object for as long as names,
    dtypes, shapes and places stay. A consumer prepares once for each key (`Latest`) and reads the values at each push. The
    storages of a reused bucket belong to its producer, who writes to them after the push.

    Args:
        items: The weights.
        key: What stays the same; None for a bucket that comes once, whose tensors were made for it.

    Example:
        >>> import torch
        >>> bucket = Bucket({"w": torch.zeros(2, 3)})
        >>> bucket.nbytes, bucket.key
        (24, None)
    """

    def __init__(
        self, items: Mapping[str, ItemT] | Iterable[tuple[str, ItemT]] = (), *, key: object = None
    ) -> None:
        super().__init__(items)
        self.key = key

    @cached_property
    def nbytes(self) -> int:
        """The bytes of all weights, once the merges are made."""
        return sum(item.nbytes for item in self.values())

    @cached_property
    def devices(self) -> frozenset[torch.device]:
        """The devices that the weights lie on."""
        return frozenset(item.device for item in self.values())

    @cached_property
    def has_merges(self) -> bool:
        """Whether the consumer has to make some of the weights."""
        return any(isinstance(item, PendingMerge) for item in self.values())


NOTHING: Bucket[Any] = Bucket()
"""An empty bucket."""


class Latest(Generic[T]):
    """Keeps what was made for the latest key, and makes it anew for another key.

    Example:
        >>> latest = Latest[int]()
        >>> latest.get("a", lambda: 1), latest.get("a", lambda: 2), latest.get("b", lambda: 3)
        (1, 1, 3)
    """

    def __init__(self) -> None:
        self._kept: tuple[object, T] | None = None

    def get(self, key: object, make: Callable[[], T]) -> T:
        """Return what was made for an equal key last time, or else what ``make`` returns.

        Args:
            key: A bucket's key, or anything else that tells when the work must be done again. None equals no key.
            make: Does the work. If it raises, what was kept stays.
        """
        if key is None:
            return make()
        if self._kept is None or self._kept[0] != key:
            self._kept = key, make()
        return self._kept[1]


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Return where the elements of each tensor begin.

    It is asked for hundreds of tensors at each push, so packed parameters are not asked through Python.

    Example:
        >>> x = torch.zeros(2)
        >>> addresses([x]) == [x.data_ptr()]
        True
    """
    with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' have a __torch_function__
        return list(map(Tensor.data_ptr, tensors))


def made(item: Item) -> Tensor:
    """Return a weight as a tensor; a merge is made now."""
    return item.make() if isinstance(item, PendingMerge) else item
