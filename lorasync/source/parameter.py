"""Reading one parameter of the training model (plain, 4-bit, 8-bit, offloaded) without writing to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasync import bnb
from lorasync.errors import AdapterError, UngatheredError
from lorasync.kernels import PlainBase
from lorasync.quantization import LIVE, companions, of_tensor
from lorasync.quantization.block_scales import dequantize_fp8
from lorasync.source.model import saved_buffers
from lorasync.zero import full_shape, is_sharded
from lorasync.zero.whole import AS_HELD, Whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasync.kernels import Base


def tensor_of(module: nn.Module, attr: str) -> Tensor:
    """Return the parameter or buffer registered under ``attr``, as it is (sharded, on meta, packed)."""
    parameter = module._parameters.get(attr)
    tensor = module._buffers[attr] if parameter is None else parameter
    assert tensor is not None
    return tensor


def tensors_of(module: nn.Module) -> Iterator[str]:
    """Name the weights and persistent buffers of ``module`` itself, in `state_dict`'s order; no packed weight's scales."""
    left_out = companions(module)
    yield from (
        name for name, param in module._parameters.items() if param is not None and name not in left_out
    )
    yield from (name for name, _ in saved_buffers(module))


def packing(module: nn.Module, attr: str) -> str:
    """Say how a tensor is held: "plain", "nf4", "fp4", "int8" or "fp8".

    Raises:
        AdapterError: Something else packed it, or it is a 4-bit weight that was never quantized.
    """
    found = of_tensor(module, attr)
    if found.kind not in LIVE:
        raise AdapterError(found.refusal(attr))
    return found.kind


def scales_of(module: nn.Module, attr: str) -> tuple[str, ...]:
    """Name the parameters that must be whole, too, to read a packed weight."""
    return ("weight_scale_inv",) if attr == "weight" and companions(module) else ()


def logical(
    module: nn.Module, attr: str, *, packed_dtype: torch.dtype
) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the dtype and shape that a parameter has once it is whole and dequantized; nothing is gathered.

    Args:
        module: The module that owns it.
        attr: Its name there.
        packed_dtype: What an 8-bit weight becomes: its own dtype does not say what it was.

    Raises:
        AdapterError: A packed parameter that can't be read.
    """
    tensor, how = tensor_of(module, attr), packing(module, attr)
    if how in ("nf4", "fp4"):
        return bnb.logical_4bit(module, attr)
    return packed_dtype if how in ("int8", "fp8") else tensor.dtype, tuple(full_shape(tensor))


def merge_base(module: nn.Module, attr: str) -> Base | None:
    """Refer to a weight as a merge kernel reads it, without a copy; None where it can't be read as it lies."""
    tensor, how = tensor_of(module, attr), packing(module, attr)
    if tensor.ndim != 2 or tensor.device.type == "meta":
        return None
    if how == "plain":
        return PlainBase(tensor.detach())
    state = bnb.quant_state(module, attr)
    return None if state is None or bnb.is_repacked(state) else bnb.packed_base(tensor, state)


@torch.no_grad()
def read(module: nn.Module, attr: str, *, name: str, whole: Whole = AS_HELD) -> Tensor:
    """Read a parameter or buffer, dequantized; the result may share memory with the model, so only read it.

    Args:
        module: The module that owns it.
        attr: Its name there.
        name: What to call it in an error.
        whole: Where to look up a gathered parameter.

    Raises:
        UngatheredError: This rank holds only a shard of it.
        AdapterError: A packed weight is in no state to be read.
    """
    tensor = whole(_onloaded(module, attr))
    if is_sharded(tensor):
        raise UngatheredError(
            f"{name}: got a shard of shape {tuple(tensor.shape)}, expected the whole "
            f"{tuple(full_shape(tensor))}. Read it inside lorasync.zero.gathered()."
        )
    how = packing(module, attr)
    if how == "plain":
        return tensor.detach()
    if how == "int8":
        return bnb.dequantize_8bit(tensor.data, _scales_of(module, tensor, name))
    if how == "fp8":
        return _dequantize_fp8(module, tensor, whole, name)
    return _dequantize_4bit(tensor, bnb.quant_state(module, attr), name)


def _onloaded(module: nn.Module, attr: str) -> Tensor:
    """Fetch what accelerate keeps on the CPU or on disk while the module's own parameter is on meta."""
    tensor = tensor_of(module, attr)
    if tensor.device.type != "meta":
        return tensor
    hook: Any = getattr(module, "_hf_hook", None)
    for candidate in getattr(hook, "hooks", (hook,)):
        weights = getattr(candidate, "weights_map", None)
        if weights is not None:
            stored: Tensor = weights[attr]
            return stored
    raise AdapterError(
        f"{attr}: got a meta tensor without an accelerate hook, expected weights. Load them first."
    )


def _dequantize_4bit(tensor: Tensor, state: Any, name: str) -> Tensor:
    if bnb.is_repacked(state):
        raise AdapterError(
            f"{name}: got a weight that bitsandbytes repacked for AVX512 in an eval-mode forward, expected "
            "the original: its values can't be read back exactly. Load with lorasync.load.load_quantized, or "
            "set module.support_avx512bf16_for_cpu = False on every Linear4bit before the first forward."
        )
    wrong = bnb.missing_values(tensor, state)
    if wrong is not None:
        raise UngatheredError(
            f"{name}: got {wrong[0]} packed values, expected {wrong[1]}: a shard, or a foreign quant_state. "
            "Read it inside lorasync.zero.gathered()."
        )
    return bnb.dequantize_4bit(tensor.data, state)


def _dequantize_fp8(module: Any, tensor: Tensor, whole: Whole, name: str) -> Tensor:
    """Return an FP8 weight in fp32, which is wide enough for a code times its scale: only the served dtype rounds it."""
    scales = whole(_onloaded(module, "weight_scale_inv"))
    if is_sharded(scales):
        raise UngatheredError(f"{name}: got a shard of its scales. Read it inside lorasync.zero.gathered().")
    block = module.block_size
    return dequantize_fp8(
        tensor.data, scales.detach(), None if block is None else tuple(block), torch.float32
    )


def _scales_of(module: nn.Module, tensor: Any, name: str) -> Tensor:
    scales = bnb.int8_scales(module, tensor)
    if scales is None:
        raise AdapterError(
            f"{name}: got an int8 weight without its scales (SCB). Move the model to its device first."
        )
    return scales


def scale_bound(module: nn.Module, attr: str) -> float | None:
    """Bound |W| of a packed weight by its scales: codes lie within -1 and 1. None for a plain one."""
    how = packing(module, attr)
    if how == "plain":
        return None
    if how == "fp8":
        limit = torch.finfo(tensor_of(module, attr).dtype).max
        return limit * bnb.largest(tensor_of(module, "weight_scale_inv").float())
    if how == "int8":
        _scales_of(module, tensor_of(module, attr), attr)
    return bnb.scale_bound(module, attr)


def packed(module: nn.Module, attr: str, name: str, whole: Whole) -> Iterator[tuple[str, Tensor]]:
    """Yield a quantized weight as bitsandbytes would save it, under the checkpoint name ``name``; copies."""
    tensor: Any = whole(tensor_of(module, attr))
    yield name, tensor.detach().clone()
    if packing(module, attr) == "fp8":
        yield f"{name}_scale_inv", whole(tensor_of(module, "weight_scale_inv")).detach().clone()
        return
    if packing(module, attr) == "int8":
        _scales_of(module, tensor, name)
    beside = bnb.as_stored(module, attr, tensor, name)
    yield from ((key, value.detach().clone()) for key, value in beside)
