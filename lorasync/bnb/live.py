"""Questions to layers and tensors of bitsandbytes in memory: is a weight packed, by what, and what belongs to it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def quant_state(module: nn.Module, attr: str) -> Any:
    """Return the ``QuantState`` of a 4-bit weight, or None; under FSDP2 only the module still has it.

    Args:
        module: The module that owns the weight.
        attr: The weight's name there.
    """
    state = getattr(_tensor(module, attr), "quant_state", None)
    if state is None and attr == "weight" and layer_bits(module) == 4:
        state = getattr(module, "quant_state", None)
    return state


def kind_of(module: nn.Module, attr: str) -> str | None:
    """Say how bitsandbytes holds a weight; None where it does not hold this tensor.

    Args:
        module: The module that owns the tensor.
        attr: The tensor's name there.

    Returns:
        "nf4", "fp4", "int8", "plain" (an 8-bit layer that is not quantized yet) or "unquantized" (a 4-bit layer that
        was never moved to its device, so that nothing quantized it).

    Example:
        >>> print(kind_of(nn.Linear(2, 2), "weight"))
        None
    """
    tensor, state = _tensor(module, attr), quant_state(module, attr)
    if state is not None:
        return "nf4" if str(state.quant_type) == "nf4" else "fp4"
    if type(tensor).__name__ == "Params4bit":
        return "unquantized"
    if type(tensor).__name__ == "Int8Params" or (attr == "weight" and layer_bits(module) == 8):
        return "int8" if tensor.dtype == torch.int8 else "plain"
    return None


def is_packed(tensor: Tensor) -> bool:
    """Say whether a tensor is one of bitsandbytes' parameters, quantized or not."""
    return hasattr(tensor, "quant_state") or type(tensor).__name__ == "Int8Params"


def layer_bits(module: nn.Module) -> int | None:
    """Return 4 or 8 for bitsandbytes' own quantized linear layers; None for PEFT's wrappers of the same names.

    Example:
        >>> print(layer_bits(nn.Linear(2, 2)))
        None
    """
    for cls in type(module).__mro__:
        if cls.__module__.startswith("bitsandbytes"):
            if cls.__name__ == "Linear4bit":
                return 4
            if cls.__name__ == "Linear8bitLt":
                return 8
    return None


def logical_4bit(module: nn.Module, attr: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the dtype and shape that a 4-bit weight has once it is dequantized."""
    state = quant_state(module, attr)
    return state.dtype, tuple(state.shape)


def missing_values(tensor: Tensor, state: Any) -> tuple[int, int] | None:
    """Return how many 4-bit values a tensor holds and how many its state says, if they differ; else None."""
    expected = state.shape.numel()
    held = tensor.numel() * tensor.element_size() * 2
    return None if held == expected + expected % 2 else (held, expected)


def int8_scales(module: nn.Module, tensor: Tensor) -> Tensor | None:
    """Return an 8-bit weight's row scales (SCB); the first forward pass moves them from the weight to the module.

    Args:
        module: The module that owns the weight.
        tensor: The weight.
    """
    scales: Tensor | None = getattr(tensor, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    return scales


def tensors_beside(tensor: Tensor) -> list[Tensor]:
    """List the tensors that bitsandbytes keeps as plain attributes of a packed weight: its scales and code books."""
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        return [value for value in state.as_dict(packed=True).values() if isinstance(value, Tensor)]
    held = (getattr(tensor, name, None) for name in ("CB", "SCB"))
    # CB usually is the weight's own memory.
    return [value for value in held if isinstance(value, Tensor) and value.data_ptr() != tensor.data_ptr()]


def scale_bound(module: nn.Module, attr: str) -> float | None:
    """Bound |W| of a packed weight by its scales: codes lie within -1 and 1. None for an 8-bit weight without them."""
    state = quant_state(module, attr)
    if state is None:
        scales = int8_scales(module, _tensor(module, attr))
        return None if scales is None else largest(scales)
    if not state.nested:
        return largest(state.absmax)
    return largest(state.state2.absmax) + abs(float(state.offset))


def largest(scales: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one."""
    low, high = (float(x) for x in torch.aminmax(scales.detach()))
    return math.nan if math.isnan(low) else max(-low, high)


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype that a 4-bit layer computes in; None if it takes its input's."""
    dtype: torch.dtype | None = getattr(module, "compute_dtype", None)
    return dtype


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every 4-bit layer of a model compute in ``dtype``."""
    for module in model.modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            module.compute_dtype = dtype  # type: ignore[assignment]


def has_open_trap(module: nn.Module) -> bool:
    """Say whether a forward pass in eval mode, on a CPU with AVX512-BF16, would repack this layer's weight in place."""
    return bool(getattr(module, "support_avx512bf16_for_cpu", False))


def close_traps(model: nn.Module) -> int:
    """Stop every layer of a model from repacking its weight in place; return how many were changed."""
    trapped: list[Any] = [module for module in model.modules() if has_open_trap(module)]
    for module in trapped:
        module.support_avx512bf16_for_cpu = False
    return len(trapped)


def is_repacked(state: Any) -> bool:
    """Say whether a forward pass has repacked a weight, by its ``QuantState``: then its values can't be read back."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def _tensor(module: nn.Module, attr: str) -> Tensor:
    for place in (module._parameters, module._buffers, module.__dict__):
        held: Any = place.get(attr)
        if held is not None:
            assert isinstance(held, Tensor)
            return held
    raise AssertionError(f"{type(module).__name__} has no tensor {attr}")
