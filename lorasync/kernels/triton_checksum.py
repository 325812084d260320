"""The launch behind `Checksum`."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from lorasync.kernels.words import ODD, words_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

BLOCK, CHUNK = 1024, 8192  # 8-byte words
WEIGHT = tl.constexpr(ODD)


class WordSum:
    """A table of chunks on the device: where one starts, its bytes, and the place of its first word."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        rows, first = [], 0
        for tensor in tensors:
            at = torch.arange(0, tensor.nbytes, 8 * CHUNK)
            sizes = (tensor.nbytes - at).clamp(max=8 * CHUNK)
            rows.append(torch.stack([tensor.data_ptr() + at, sizes, first + at // 8], dim=1))
            first += words_of(tensor)
        self._table = torch.cat(rows).to(tensors[0].device)
        self._found = torch.empty(len(self._table), dtype=torch.int64, device=tensors[0].device)

    def run(self) -> int:
        """Launch on the current stream, and wait for the sum."""
        with torch.cuda.device(self._found.device if self._found.is_cuda else -1):
            sum_words[(len(self._table),)](self._table, self._found, BLOCK=BLOCK, CHUNK=CHUNK)
        return int(self._found.sum())


@triton.jit
def sum_words(table, found, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    row = table + tl.program_id(0) * 3
    start = tl.load(row)
    size = tl.load(row + 1).to(tl.int32)
    first = tl.load(row + 2)
    words = size // 8
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for at in range(0, CHUNK, BLOCK):
        inside = at + lanes < words
        values = tl.load(start.to(tl.pointer_type(tl.int64)) + at + lanes, mask=inside, other=0)
        total += mixed(values, first + at + lanes)
    few = tl.arange(0, 8)
    rest = tl.load(
        start.to(tl.pointer_type(tl.uint8)) + words * 8 + few, mask=few < size - words * 8, other=0
    )
    last = tl.sum(rest.to(tl.int64) << (few * 8).to(tl.int64), axis=0)
    tl.store(found + tl.program_id(0), tl.sum(total, axis=0) + mixed(last, first + words))


@triton.jit
def mixed(values, places):
    """Multiply a word by the weight of its place; zero stays zero."""
    product = (values ^ (values >> 29)) * ((places * 2 + 1) * WEIGHT)
    return product ^ (product >> 32)
