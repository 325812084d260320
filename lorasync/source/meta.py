"""What every source offers, and what it says of a tensor before it yields it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import Tensor


@dataclass(frozen=True)
class ParamMeta:
    """What iteration will yield: the checkpoint's name, the dtype on the wire, the full shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Meta(Protocol):
    """What a source says of one tensor: a `ParamMeta`, or vLLM's own."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Source(Protocol):
    """A stream of named tensors that says beforehand what it yields, in the same order; a pass can be repeated."""

    def metadata(self) -> Sequence[Meta]:
        """Return what iteration will yield, in its order."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor with its name."""
        ...
