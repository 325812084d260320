"""What both ways to compute a `Checksum` have to agree on: how a tensor is cut into words, and what a word weighs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ODD = -7046029254386353131
"""0x9E3779B97F4A7C15 as a signed 64-bit number: an odd factor, so that no word's bits are lost."""


def words_of(tensor: Tensor) -> int:
    """Return how many 8-byte words a tensor has; the last one is filled up with zeros."""
    return -(-tensor.nbytes // 8)
