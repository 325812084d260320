"""MXFP4 and FP8 weights with block scales as plain ones, bit for bit what transformers makes of them.

Both formats lose nothing on the way back: a code times the scale of its block, in fp32, is rounded once to the dtype that is
asked for. The work is done in strips, so the memory beside the result stays small whatever the weight's size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STRIP = 1 << 22  # elements that are computed at once
# Sign, two bits of exponent, one of mantissa (OCP Microscaling, E2M1).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS = 127


def mxfp4_shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the weight that packed blocks of this shape stand for.

    Example:
        >>> mxfp4_shape((8, 64, 3, 16))
        (8, 96, 64)
    """
    *experts, rows, groups, packed = blocks
    return (*experts, groups * packed * 2, rows)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Unpack a weight of experts as gpt-oss stores it.

    Args:
        blocks: ``(experts, rows, groups, 16)``, uint8: two E2M1 codes a byte, the low half first.
        scales: ``(experts, rows, groups)``, uint8: E8M0, so 2 ** (scale - 127).
        dtype: What the weight becomes.

    Returns:
        ``(experts, groups * 32, rows)``, contiguous: inputs before outputs, as the model holds it.

    Raises:
        ValueError: The shapes don't belong together.

    As ``transformers.integrations.mxfp4.convert_moe_packed_tensors``, which computes in bf16: exact, and then one rounding.

    Example:
        >>> dequantize_mxfp4(
        ...     torch.full((1, 1, 1, 16), 0x21, dtype=torch.uint8),
        ...     torch.full((1, 1, 1), 128, dtype=torch.uint8),
        ... )[0, :3, 0]
        tensor([1., 2., 1.], dtype=torch.bfloat16)
    """
    if blocks.shape[:-1] != scales.shape or blocks.ndim < 3:
        raise ValueError(f"got blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)}")
    made = torch.empty(mxfp4_shape(tuple(blocks.shape)), dtype=dtype, device=blocks.device)
    rows, groups, packed = blocks.shape[-3:]
    codes, exponents = blocks.reshape(-1, rows, groups, packed), scales.reshape(-1, rows, groups)
    step = max(1, _STRIP // max(1, groups * packed * 2))
    for expert, out in enumerate(made.view(-1, *made.shape[-2:])):
        for at in range(0, rows, step):
            strip = _scaled(codes[expert, at : at + step], exponents[expert, at : at + step])
            out[:, at : at + step] = strip.t()
    return made


def _scaled(codes: Tensor, exponents: Tensor) -> Tensor:
    """Return rows of ``(groups, 16)`` bytes, with an exponent a group, as bf16 rows."""
    values = _unpack(codes, torch.bfloat16)
    torch.ldexp(values, (exponents.to(torch.int32) - _E8M0_BIAS)[..., None], out=values)
    return values.flatten(-2)


def fp8_shape(weight: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """Return the shape of the weight that a stored tensor stands for: int8 holds two E2M1 codes a byte."""
    return (*weight[:-1], weight[-1] * 2) if dtype == torch.int8 else weight


def dequantize_fp8(
    weight: Tensor, scale: Tensor, block: tuple[int, int] | None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Multiply a weight by the scales of its blocks.

    Args:
        weight: ``(…, rows, columns)`` in float8, or int8 for two E2M1 codes a byte.
        scale: one number, or a grid ``(…, block rows, block columns)``; uint8 and float8_e8m0fnu are powers of two. It is
            multiplied by, although checkpoints call it ``weight_scale_inv``.
        block: the size of a block, as in ``weight_block_size``; the last ones may be smaller. A grid of another size cuts
            the weight evenly.
        dtype: What the weight becomes.

    Raises:
        ValueError: The grid fits neither the block nor the weight.

    As ``transformers.integrations.finegrained_fp8.Fp8Dequantize`` where blocks divide the weight evenly. It refuses other
    shapes, or spreads the scales; here an element's scale is found by the block's size, as in DeepSeek's ``weight_dequant``.

    Example:
        >>> dequantize_fp8(torch.ones(2, 4).to(torch.float8_e4m3fn), torch.tensor([[2.0, 3.0]]), (2, 2))[0]
        tensor([2., 2., 3., 3.], dtype=torch.bfloat16)
    """
    shape = fp8_shape(tuple(weight.shape), weight.dtype)
    rows, columns = _matrix(shape)
    stored = weight.reshape(-1, rows, weight.shape[-1])
    grid = _grid(shape, scale)
    high, wide = _block((rows, columns), (grid.shape[-2], grid.shape[-1]), block)
    made = torch.empty(shape, dtype=dtype, device=weight.device)
    step = max(1, _STRIP // max(1, columns))
    for matrix, scales, out in zip(stored, grid, made.view(-1, rows, columns), strict=True):
        for at in range(0, rows, step):
            lines = torch.arange(at, min(at + step, rows), device=weight.device) // high
            factors = scales[lines].repeat_interleave(wide, 1)[:, :columns]
            out[at : at + step] = (_codes(matrix[at : at + step]) * factors).to(dtype)
    return made


def check_scales(shape: tuple[int, ...], scale: Tensor, block: tuple[int, int] | None) -> None:
    """Check that scales (meta tensors do) fit a weight of this shape.

    Raises:
        ValueError: They don't, as in `dequantize_fp8`.
    """
    grid = _grid(shape, scale)
    _block(_matrix(shape), (grid.shape[-2], grid.shape[-1]), block)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[-2], shape[-1]) if len(shape) > 1 else (1, shape[-1])


def _grid(shape: tuple[int, ...], scale: Tensor) -> Tensor:
    """Return the scales in fp32, as one grid a matrix."""
    values = scale.to(torch.float32)
    if scale.dtype == torch.uint8:
        values = (values - _E8M0_BIAS).exp2()
    matrices = math.prod(shape[:-2])
    if values.numel() == 1:
        return values.reshape(1, 1, 1).expand(matrices, 1, 1)
    if values.ndim == 1 and len(shape) > 2 and len(values) == matrices:
        return values.reshape(matrices, 1, 1)
    if values.ndim < 2 or math.prod(values.shape[:-2]) != matrices:
        raise ValueError(f"got scales {tuple(scale.shape)} for a weight of {shape}")
    return values.reshape(matrices, *values.shape[-2:])


def _block(shape: tuple[int, int], grid: tuple[int, int], block: tuple[int, int] | None) -> tuple[int, int]:
    if block is not None and grid == tuple(-(-size // b) for size, b in zip(shape, block, strict=True)):
        return block
    if 0 in grid or shape[0] % grid[0] or shape[1] % grid[1]:
        raise ValueError(f"got {grid[0]} x {grid[1]} scales for a weight of {shape[0]} x {shape[1]}")
    return shape[0] // grid[0], shape[1] // grid[1]


def _codes(stored: Tensor) -> Tensor:
    return _unpack(stored, torch.float32) if stored.dtype == torch.int8 else stored.to(torch.float32)


def _unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Unpack two E2M1 values a byte, the low half first; the last dimension doubles."""
    table = torch.tensor(_E2M1, dtype=dtype, device=packed.device)
    bytes_ = packed.contiguous().view(torch.uint8)
    halves = torch.stack([table[(bytes_ & 0xF).int()], table[(bytes_ >> 4).int()]], dim=-1)
    return halves.flatten(-2)
