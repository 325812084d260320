"""The values of weights that bitsandbytes packed: as plain tensors, and as the merge kernels read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorasync.kernels import NestedAbsmax, PackedBase

_NESTED_BLOCK = 256


def packed_base(packed: Tensor, state: Any) -> PackedBase:
    """Describe a 4-bit weight to the merge kernels; nothing is copied.

    Args:
        packed: The packed values: a ``Params4bit``, or what it holds.
        state: Their ``QuantState``.

    Raises:
        ValueError: The scales are quantized in blocks of another size than 256.
    """
    data = packed.data if isinstance(packed, torch.nn.Parameter) else packed
    nested = None
    if state.nested:
        inner = state.state2
        if inner.blocksize != _NESTED_BLOCK:
            raise ValueError(
                f"nested blocksize: got {inner.blocksize}, expected {_NESTED_BLOCK}. Quantize again."
            )
        nested = NestedAbsmax(inner.absmax, inner.code, float(state.offset))
    rows, cols = state.shape
    return PackedBase(data, state.absmax, state.code, state.blocksize, (rows, cols), state.dtype, nested)


def dequantize_4bit(packed: Tensor, state: Any) -> Tensor:
    """Dequantize with bitsandbytes, but where its kernel takes wrong scales.

    That is on CPUs with AVX512, for rows that are no whole number of blocks (seen in 0.50.2).

    Args:
        packed: The packed values, in the storage dtype.
        state: Their ``QuantState``.

    Returns:
        The weight, in the dtype and shape that ``state`` says.
    """
    if packed.device.type == "cpu" and _splits_blocks(state) and len(state.shape) == 2:
        return packed_base(packed, state).dequantize()
    return _by_bitsandbytes(packed, state)


def dequantize_8bit(packed: Tensor, scales: Tensor) -> Tensor:
    """Dequantize an 8-bit weight with bitsandbytes, in fp32.

    Args:
        packed: The int8 values, of shape (out_features, in_features).
        scales: SCB, one scale a row.
    """
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight: Tensor = int8_vectorwise_dequant(packed, scales.to(packed.device))
    return weight


def reads_wrong(weight: Tensor) -> bool:
    """Say whether bitsandbytes' own kernel, which a forward pass runs, takes wrong scales for this weight on this CPU."""
    state: Any = getattr(weight, "quant_state", None)
    if state is None or weight.device.type != "cpu" or not _splits_blocks(state):
        return False
    return not torch.equal(_by_bitsandbytes(weight.data, state), dequantize_4bit(weight.data, state))


def _splits_blocks(state: Any) -> bool:
    """Whether rows are no whole number of blocks, so that a block goes on in the next row."""
    return bool(state.shape[-1] % state.blocksize)


def _by_bitsandbytes(packed: Tensor, state: Any) -> Tensor:
    import bitsandbytes.functional

    weight: Tensor = bitsandbytes.functional.dequantize_4bit(packed, state)
    return weight
