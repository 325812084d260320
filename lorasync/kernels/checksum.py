"""One checksum over many tensors, computed where they lie: in one launch and with one wait on a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from lorasync.kernels.words import ODD, words_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_CHUNK = 1 << 22
_MASK = (1 << 64) - 1


class Checksum:
    """A checksum of contiguous tensors of one device; it is planned once, so the tensors must stay where they are.

    64 bits, Σ m ⊕ (m >> 32) with m = (x ⊕ (x >> 29)) · w over all 8-byte words x, each place with an odd w of its own.
    It tells stale, shifted or partly written memory from the right one; it is no defence against an attacker.

    Raises:
        ValueError: The tensors differ in device, are not contiguous, or don't start at a word.

    Example:
        >>> x = torch.zeros(3)
        >>> sums = Checksum([x])
        >>> before = sums.now()
        >>> x[2] = 1
        >>> sums.now() == before
        False
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        if len({t.device for t in tensors}) > 1 or not all(map(can_be_summed, tensors)):
            raise ValueError("tensors: expected contiguous ones of one device that start at a word.")
        self._tensors = tuple(t.detach() for t in tensors if t.numel())
        self._launch: Any = None
        if self._tensors and self._tensors[0].is_cuda and find_spec("triton") is not None:
            from lorasync.kernels.triton_checksum import WordSum

            self._launch = WordSum(self._tensors)

    def now(self) -> str:
        """Sum what the tensors hold at this moment, as 16 hexadecimal digits."""
        total = self._launch.run() if self._launch is not None else _in_torch(self._tensors)
        return f"{int(total) & _MASK:016x}"


def can_be_summed(tensor: Tensor) -> bool:
    """Say whether `Checksum` takes this tensor."""
    return tensor.is_contiguous() and tensor.data_ptr() % 8 == 0


def _in_torch(tensors: Sequence[Tensor]) -> int:
    total, first = 0, 0
    for tensor in tensors:
        data = tensor.reshape(-1).view(torch.uint8)
        whole = data.numel() // 8 * 8
        words, rest = data[:whole].view(torch.int64), data[whole:]
        for at in range(0, len(words), _CHUNK):
            total += int(_mixed(words[at : at + _CHUNK], first + at).sum())
        if len(rest):
            last = torch.zeros(8, dtype=torch.uint8, device=data.device)
            last[: len(rest)] = rest
            total += int(_mixed(last.view(torch.int64), first + len(words)).sum())
        first += words_of(tensor)
    return total


def _mixed(words: Tensor, first: int) -> Tensor:
    places = torch.arange(first, first + len(words), dtype=torch.int64, device=words.device)
    mixed = (words ^ (words >> 29)).mul_(places.mul_(2).add_(1).mul_(ODD))
    return mixed ^ (mixed >> 32)
