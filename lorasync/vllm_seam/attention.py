"""What attention layers derive from weights when an engine starts: absorbed projections, fp32 sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.vllm_seam.in_place import in_place

if TYPE_CHECKING:
    import torch


def is_attention(layer: torch.nn.Module) -> bool:
    """Whether it is an attention layer that vLLM processes after all others."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return isinstance(layer, AttentionLayerBase) and hasattr(layer, "process_weights_after_loading")


def is_plain_attention(layer: torch.nn.Module) -> bool:
    """Whether the layer itself derives nothing from weights; its backend may."""
    from vllm.model_executor.layers.attention import Attention

    own = type(layer).process_weights_after_loading  # type: ignore[attr-defined]
    return own is Attention.process_weights_after_loading


def derives(layer: Any) -> bool:
    """Whether an attention layer holds something that is made of weights, and does not follow them by itself."""
    own = not (is_plain_attention(layer) or _only_shows(layer))
    hook = getattr(type(getattr(layer, "impl", None)), "process_weights_after_loading", None)
    return own or _sinks(layer) is not None or (hook is not None and not _does_nothing(hook))


def _only_shows(layer: Any) -> bool:
    """Whether all it absorbs are views of one weight, so that they follow it (MLA over a plain ``kv_b_proj``)."""
    weight = getattr(getattr(layer, "kv_b_proj", None), "weight", None)
    own = [param for param in layer._parameters.values() if param is not None]
    return weight is not None and bool(own) and all(_storage(p) == _storage(weight) for p in own)


def derive(layer: Any, parent: torch.nn.Module, dtype: torch.dtype) -> None:
    """Derive anew what an attention layer holds, by vLLM's own code; the tensors stay where captured graphs read them.

    Args:
        layer: The attention layer.
        parent: The module that the layer is a part of.
        dtype: What the engine serves.
    """
    impl: Any = getattr(layer, "impl", None)
    if is_plain_attention(layer):  # its own hook would set KV scales back that were measured since
        in_place(impl, lambda: impl.process_weights_after_loading(dtype))
    else:
        held = impl if impl is not None else layer
        in_place(held, lambda: in_place(layer, lambda: layer.process_weights_after_loading(dtype)))
    sinks, source = _sinks(layer), getattr(parent, "sinks", None)
    if sinks is not None and source is not None and _storage(sinks) != _storage(source):
        sinks.copy_(source)  # vLLM casts them at the first forward, and not again


def _sinks(layer: Any) -> Any:
    return getattr(getattr(layer, "impl", None), "sinks", None)


def _does_nothing(function: Any) -> bool:
    """Whether a function's body is a docstring or ``pass``."""
    code = getattr(function, "__code__", None)
    return code is not None and not code.co_names and len(code.co_consts) <= 2


def hook_of_whole_model(model: torch.nn.Module) -> bool:
    """Whether the model's class derives something from all weights at once, after they were loaded."""
    hook = getattr(type(model), "process_weights_after_loading", None)
    return hook is not None and not _does_nothing(hook)


def keeps_in_kv_cache(layer: torch.nn.Module) -> bool:
    """Whether a layer has put a part of its weights into the KV cache (sinks)."""
    return hasattr(layer, "post_weight_load")


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
