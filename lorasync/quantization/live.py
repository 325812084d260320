"""Finding out how a model in memory holds its weights: by tensors and modules, for a config may be outdated or absent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasync import bnb
from lorasync.quantization.methods import (
    FP4,
    INT8,
    LIVE,
    NF4,
    PLAIN,
    UNPACKED_4BIT,
    Quantization,
    method,
    unknown,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# Classes of these packages (a layer's, or a tensor's) hold packed weights.
_PACKAGES = {
    "aqlm": "aqlm",
    "auto_gptq": "gptq",
    "auto_round": "auto_round",
    "auto_round_extension": "auto_round",
    "awq": "awq",
    "eetq": "eetq",
    "flute": "higgs",
    "fouroversix": "fouroversix",
    "fp_quant": "fp_quant",
    "gptqmodel": "gptq",
    "hqq": "hqq",
    "optimum.quanto": "quanto",
    "quanto": "quanto",
    "quark": "quark",
    "sinq": "sinq",
    "spqr_quant": "spqr",
    "transformers.integrations.bitnet": "bitnet",
    "transformers.integrations.compressed_tensors": "compressed_tensors",
    "transformers.integrations.eetq": "eetq",
    "transformers.integrations.fbgemm_fp8": "fbgemm_fp8",
    "transformers.integrations.finegrained_fp8": "fp8",
    "transformers.integrations.gemma_quant": "gemma",
    "transformers.integrations.higgs": "higgs",
    "transformers.integrations.metal_quantization": "metal",
    "transformers.integrations.mxfp4": "mxfp4",
    "transformers.integrations.nvfp4": "nvfp4",
    "vptq": "vptq",
}
# Tensors that a layer has when one of these methods packed it; the first of them holds codes, so it is no float.
_ATTRIBUTES = (
    (("W_q",), "hqq"),
    (("qweight", "qzeros", "g_idx"), "gptq"),
    (("qweight", "qzeros"), "awq"),
    (("weight_packed",), "compressed_tensors"),
    (("codes", "codebooks"), "aqlm"),
    (("indices", "centroids"), "vptq"),
    (("dense_weights", "row_offsets"), "spqr"),
    (("weight", "weight_scales"), "eetq"),
    (("weight", "scales", "tables"), "higgs"),
)
_BITSANDBYTES = {"nf4": NF4, "fp4": FP4, "int8": INT8, "plain": PLAIN, "unquantized": UNPACKED_4BIT}
_CODES = frozenset({torch.uint8, torch.int8})
_MORE_CODES = frozenset({torch.int16, torch.int32, torch.uint16, torch.uint32})
# Tensor classes of torch that hold their values as they are, or parts of them.
_TRANSPARENT = frozenset({"Tensor", "Parameter", "Buffer", "DTensor", "FakeTensor", "FlatParameter"})


def of_tensor(module: nn.Module, attr: str) -> Quantization:
    """Say how one parameter or buffer of a module is held.

    Args:
        module: The module that owns it.
        attr: Its name there.

    Example:
        >>> of_tensor(nn.Linear(2, 2), "weight").kind
        'plain'
    """
    tensor = _tensor(module, attr)
    known = bnb.kind_of(module, attr)
    if known is not None:
        return _BITSANDBYTES[known]
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
        return _float8(module, attr, tensor)
    odd = _odd_class(tensor)
    if odd is not None:
        return odd
    return unknown(_seen(module, attr, tensor)) if _is_code(module, attr, tensor) else PLAIN


def of_module(module: nn.Module) -> Quantization:
    """Say how a module itself, without its children, holds its weights; what can't be read comes first."""
    signed = _signature(module)
    if signed is not None and signed.kind not in LIVE:
        return signed
    best = signed or PLAIN
    for attr in _own(module):
        found = of_tensor(module, attr)
        if found.kind not in LIVE:
            return found
        best = found if best.plain else best
    return best


def of_model(model: nn.Module) -> Quantization:
    """Say how a model's weights are held; a part that can't be read decides, and its modules are named.

    Example:
        >>> of_model(nn.Sequential(nn.Linear(2, 2))).plain
        True
    """
    found = [(path, of_module(module)) for path, module in model.named_modules()]
    packed = [(path, each) for path, each in found if not each.plain]
    unread = [(path, each) for path, each in packed if each.kind not in LIVE]
    if not packed:
        return PLAIN
    first = (unread or packed)[0][1]
    where = [path or "the model" for path, each in unread or packed if each.kind == first.kind]
    return _declared(model, first).at(where)


def companions(module: nn.Module) -> frozenset[str]:
    """Name the tensors of a module that are no weights but belong to a packed one."""
    if _float8_class(module) == "fp8":
        return frozenset({"weight_scale_inv", "activation_scale"})
    return frozenset()


def _declared(model: nn.Module, found: Quantization) -> Quantization:
    """Return what the model's quantizer calls itself, where the tensors alone don't tell."""
    if found.kind != "unknown" or found is UNPACKED_4BIT:
        return found
    for module in model.modules():
        config = getattr(getattr(module, "hf_quantizer", None), "quantization_config", None)
        name = getattr(config, "quant_method", None)
        if name is not None:
            said = method(str(getattr(name, "value", name)))
            return said if said.kind not in ("unknown", *LIVE) else found
    return found


def _float8(module: nn.Module, attr: str, tensor: Tensor) -> Quantization:
    if _float8_class(module) == "fp8" and (attr == "weight" or attr in companions(module)):
        return method("fp8")
    return unknown(_seen(module, attr, tensor))


def _float8_class(module: nn.Module) -> str | None:
    """Tell transformers' FP8Linear, which is read, from its experts, groups and embeddings, which are not."""
    linear = type(module).__name__ == "FP8Linear" and isinstance(
        module._parameters.get("weight_scale_inv"), Tensor
    )
    return "fp8" if linear else None


def _odd_class(tensor: Tensor) -> Quantization | None:
    """Name the method behind a tensor class that computes its values (torchao's, quanto's, sparse and quantized ones)."""
    kind = type(tensor)
    if tensor.is_quantized or tensor.layout != torch.strided:
        return unknown(
            f"torch ({'a quantized' if tensor.is_quantized else 'a ' + str(tensor.layout)[6:]} tensor)"
        )
    if kind.__name__ in _TRANSPARENT and kind.__module__.partition(".")[0] == "torch":
        local = getattr(tensor, "_local_tensor", None)
        return None if local is None else _odd_class(local)
    for cls in kind.__mro__:
        packed = _by_package(cls)
        if packed is not None:
            return packed
    if kind.__module__.partition(".")[0] == "torchao":
        return method("torchao")
    return unknown(f"{kind.__module__}.{kind.__qualname__}") if _computes(kind) else None


def _computes(kind: type) -> bool:
    """Whether a class of tensors answers torch itself instead of being plain memory with a label on it."""
    plain = (Tensor.__torch_dispatch__, nn.Parameter.__torch_dispatch__)
    return hasattr(kind, "__tensor_flatten__") or kind.__torch_dispatch__ not in plain  # type: ignore[attr-defined]


def _is_code(module: nn.Module, attr: str, tensor: Tensor) -> bool:
    """Whether integers stand for weights: small ones that are a parameter, or the weight of a layer that multiplies."""
    weight = attr in ("weight", "qweight") and _multiplies(module)
    if tensor.dtype in _CODES:
        return weight or attr in module._parameters
    return tensor.dtype in _MORE_CODES and weight


def _multiplies(module: nn.Module) -> bool:
    held = module.__dict__
    return "in_features" in held or "num_embeddings" in held or "Linear" in type(module).__name__


def _seen(module: nn.Module, attr: str, tensor: Tensor) -> str:
    return f"{type(module).__module__}.{type(module).__name__} ({str(tensor.dtype)[6:]} in .{attr})"


def _signature(module: nn.Module) -> Quantization | None:
    for cls in type(module).__mro__:
        found = _by_package(cls)
        if found is not None:
            return _exactly(module, found)
    for names, packed in _ATTRIBUTES:
        if all(_held(module, name) is not None for name in names) and _holds_codes(module, names[0]):
            return method(packed)
    if _mxfp4(module):
        return method("mxfp4")
    return method("compressed_tensors") if module.__dict__.get("quantization_scheme") is not None else None


def _exactly(module: nn.Module, found: Quantization) -> Quantization:
    name = type(module).__name__
    if found.kind == "fp8" and _float8_class(module) is None:
        return unknown(f"FP8 ({name})")
    if found.kind == "gptq" and "awq" in name.lower():
        return method("awq")
    return found


def _by_package(cls: type) -> Quantization | None:
    path = cls.__module__.split(".")
    for length in range(1, min(len(path), 3) + 1):
        packed = _PACKAGES.get(".".join(path[:length]))
        if packed is not None:
            return method(packed)
    return None


def _mxfp4(module: nn.Module) -> bool:
    blocks = [name for name in _own(module) if name.endswith("_blocks")]
    return any(
        _held(module, f"{name.removesuffix('_blocks')}_scales") is not None and _holds_codes(module, name)
        for name in blocks
    )


def _holds_codes(module: nn.Module, name: str) -> bool:
    held: Any = _held(module, name)
    dtype = getattr(held, "dtype", None)
    return isinstance(dtype, torch.dtype) and (not dtype.is_floating_point or dtype.itemsize == 1)


def _held(module: nn.Module, name: str) -> Any:
    for place in (module._parameters, module._buffers, module.__dict__):
        if place.get(name) is not None:
            return place[name]
    return None


def _own(module: nn.Module) -> Iterator[str]:
    for place in (module._parameters, module._buffers):
        yield from (name for name, tensor in place.items() if tensor is not None)


def _tensor(module: nn.Module, attr: str) -> Tensor:
    tensor = _held(module, attr)
    assert isinstance(tensor, Tensor)
    return tensor
