"""The scan behind `Peaks`."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from lorasync.kernels.triton_tiles import TRITON_TYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

BLOCK, CHUNK = 4096, 65536


class Scan:
    """A table of chunks on the device, each of one tensor."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        device = tensors[0].device
        rows = [
            (t.data_ptr() + at * t.element_size(), min(CHUNK, t.numel() - at), index)
            for index, t in enumerate(tensors)
            for at in range(0, t.numel(), CHUNK)
        ]
        self._table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).to(device)
        self._found = torch.zeros(len(tensors), dtype=torch.int32, device=device)
        self._type = TRITON_TYPES[tensors[0].dtype]

    def run(self) -> Tensor:
        """Launch on the current stream; one fp32 value for each tensor."""
        self._found.zero_()
        if len(self._table):
            with torch.cuda.device(self._found.device):
                largest_bits[(len(self._table),)](
                    self._table, self._found, TYPE=self._type, BLOCK=BLOCK, CHUNK=CHUNK
                )
        return self._found.view(torch.float32)


@triton.jit
def largest_bits(table, found, TYPE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Without its sign, a float's bits grow with its value, and those of NaN are above all others."""
    row = table + tl.program_id(0) * 3
    start = tl.load(row).to(tl.pointer_type(TYPE))
    size = tl.load(row + 1).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), dtype=tl.int32)
    for at in range(0, CHUNK, BLOCK):
        inside = at + lanes < size
        values = tl.load(start + at + lanes, mask=inside, other=0.0).to(tl.float32)
        most = tl.maximum(most, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.atomic_max(found + tl.load(row + 2), tl.max(most, axis=0))
