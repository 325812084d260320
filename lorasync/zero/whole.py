"""Holding parameters whole for reading: ZeRO-3 fills the parameter itself, FSDP2 gives another tensor."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorasync.zero.gather import full_tensor, gathered, is_dtensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Whole:
    """Looks up the whole tensor that stands for a parameter; the parameter itself where none does."""

    full: Mapping[int, Tensor] = field(default_factory=dict)

    def __call__(self, param: Tensor) -> Tensor:
        """Return the tensor to read instead of ``param``."""
        return self.full.get(id(param), param)


AS_HELD = Whole()


@contextmanager
def whole(params: Sequence[Tensor]) -> Iterator[Whole]:
    """Gather parameters for reading; collective where they are sharded, in the order given.

    Args:
        params: ZeRO-3, FSDP2 and plain parameters, mixed as they come.
    """
    dtensors = [param for param in params if is_dtensor(param)]
    with gathered([param for param in params if not is_dtensor(param)]):
        yield Whole({id(param): full_tensor(param) for param in dtensors})
