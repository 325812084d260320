"""What a merge reads from: a plain weight, or one that bitsandbytes packed into 4 or 8 bits.

The dataclasses hold tensors and know nothing of modules; `dequantize` is the reference for the kernels and,
bit for bit, what bitsandbytes computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

INV_127 = 7.874015718698502e-3


@dataclass(frozen=True, eq=False)
class PlainBase:
    """A weight as it is: bf16, fp16 or fp32, of any strides."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.weight.device

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by name."""
        yield "weight", self.weight

    @property
    def traffic(self) -> int:
        """The bytes of one pass over the weight."""
        return self.weight.numel() * self.weight.element_size()

    def rectangle(self, *, rows: tuple[int, int], cols: tuple[int, int]) -> PlainBase:
        """Take rows ``rows[0]`` to ``rows[1]``, and so for columns, as a view."""
        return PlainBase(self.weight[rows[0] : rows[1], cols[0] : cols[1]])

    def dequantize(self) -> Tensor:
        """Return the weight itself."""
        return self.weight


@dataclass(frozen=True, eq=False)
class NestedAbsmax:
    """The scales of a 4-bit base, themselves 8-bit (bitsandbytes' double quantization).

    Block i's scale is ``code[q[i]] * absmax[i // 256] + offset``.

    Args:
        absmax: fp32, one value for each 256 blocks.
        code: fp32, 256 values.
        offset: What is added back.
    """

    absmax: Tensor
    code: Tensor
    offset: float


@dataclass(frozen=True, eq=False)
class PackedBase:
    """A weight in bitsandbytes' 4-bit layout (NF4, FP4), or a rectangle of one.

    Args:
        packed: uint8, two elements a byte, row-major, the first in the high four bits (another dtype, as
            ``bnb_4bit_quant_storage`` has it, is viewed as uint8).
        absmax: fp32, one scale for each ``blocksize`` elements; uint8 where ``nested`` is given.
        code: fp32, the 16 values.
        blocksize: Elements of one scale, counted row-major over the whole packed weight.
        shape: Rows and columns of this weight (or rectangle).
        dtype: What the values are rounded to before anything is added: the dtype that training computed with.
        nested: The second level of scales, or None.
        offset: Where the first element lies, counted in elements of the whole packed weight.
        row_stride: Elements from one row to the next; the number of columns by default.

    Example:
        >>> import torch
        >>> code = torch.linspace(-1, 1, 16)
        >>> base = PackedBase(
        ...     torch.full((4,), 0x0F, dtype=torch.uint8), torch.tensor([2.0]), code, 64, (2, 4)
        ... )
        >>> base.dequantize().tolist()
        [[-2.0, 2.0, -2.0, 2.0], [-2.0, 2.0, -2.0, 2.0]]
        >>> base.rectangle(rows=(1, 2), cols=(1, 4)).dequantize().tolist()
        [[2.0, -2.0, 2.0]]
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    shape: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    nested: NestedAbsmax | None = None
    offset: int = 0
    row_stride: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the packed weight lies."""
        return self.packed.device

    @property
    def stride(self) -> int:
        """Elements from one row to the next."""
        return self.shape[1] if self.row_stride is None else self.row_stride

    def rectangle(self, *, rows: tuple[int, int], cols: tuple[int, int]) -> PackedBase:
        """Take rows ``rows[0]`` to ``rows[1]``, and so for columns, as a view (a tensor-parallel shard)."""
        offset = self.offset + rows[0] * self.stride + cols[0]
        shape = (rows[1] - rows[0], cols[1] - cols[0])
        return replace(self, shape=shape, offset=offset, row_stride=self.stride)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by name."""
        yield from (("packed", self.packed), ("absmax", self.absmax), ("code", self.code))
        if self.nested is not None:
            yield from (("nested.absmax", self.nested.absmax), ("nested.code", self.nested.code))

    @property
    def traffic(self) -> int:
        """The bytes of one pass over the weight: half a byte an element, and the scales of its blocks."""
        elements = self.shape[0] * self.shape[1]
        return elements // 2 + elements // self.blocksize * self.absmax.element_size()

    def scales(self) -> Tensor:
        """Compute one fp32 scale for each block."""
        if self.nested is None:
            return self.absmax.reshape(-1)
        inner = self.nested
        quantized = self.absmax.reshape(-1).long()
        blocks = torch.arange(quantized.numel(), device=self.device) // 256
        return inner.code[quantized] * inner.absmax[blocks] + inner.offset

    def dequantize(self) -> Tensor:
        """Compute the weight in ``dtype``: round(code · absmax)."""
        rows = torch.arange(self.shape[0], device=self.device)[:, None] * self.stride
        flat = self.offset + rows + torch.arange(self.shape[1], device=self.device)
        packed = self.packed.reshape(-1).view(torch.uint8)[flat // 2].long()
        values = self.code[torch.where(flat % 2 == 0, packed >> 4, packed & 15)]
        return (values * self.scales()[flat // self.blocksize]).to(self.dtype)


@dataclass(frozen=True, eq=False)
class Int8Base:
    """A weight in the layout of bitsandbytes' ``Linear8bitLt``: q · SCB / 127, one scale a row.

    Args:
        weight: CB, int8, of shape (out_features, in_features), of any strides.
        scales: SCB, fp32, of shape (out_features,).
        dtype: What the values are rounded to before anything is added; bitsandbytes and PEFT keep fp32.
    """

    weight: Tensor
    scales: Tensor
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.weight.shape)

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.weight.device

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by name."""
        yield from (("weight", self.weight), ("scales", self.scales))

    @property
    def traffic(self) -> int:
        """The bytes of one pass over the weight."""
        return self.weight.numel() * self.weight.element_size()

    def rectangle(self, *, rows: tuple[int, int], cols: tuple[int, int]) -> Int8Base:
        """Take rows ``rows[0]`` to ``rows[1]``, and so for columns, as a view."""
        part = self.weight[rows[0] : rows[1], cols[0] : cols[1]]
        return replace(self, weight=part, scales=self.scales[rows[0] : rows[1]])

    def dequantize(self) -> Tensor:
        """Compute the weight in ``dtype``; source: ``bitsandbytes.functional.int8_vectorwise_dequant``."""
        return (self.weight * self.scales.view(-1, 1) * INV_127).to(self.dtype)


Base = PlainBase | PackedBase | Int8Base
