"""What a source says of a tensor before it yields it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ParamMeta:
    """What iteration will yield: the checkpoint's name, the dtype on the wire, the full shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
