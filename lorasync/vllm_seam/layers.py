"""Layers of a served model, and what packs their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def is_plain_layer(layer: torch.nn.Module) -> bool:
    """Whether the layer keeps its weights as its loader wrote them: no quantization, no repacking."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    if hasattr(layer, "_cpu_unpacked_conv_weight"):  # a convolution's weight is packed where it lies
        return False
    method = getattr(layer, "quant_method", None)
    return method is None or type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


def repack_for_cpu(layer: torch.nn.Module) -> None:
    """Let a CPU layer that keeps a packed copy beside its weight pack it anew (a tied ``lm_head``, for one)."""
    held: Any = layer
    if hasattr(held, "cpu_linear") and held.weight.numel():
        held.quant_method.process_weights_after_loading(held)


def is_quantized(layer: torch.nn.Module) -> bool:
    """Whether a layer's loader expects packed weights."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    plain = (
        UnquantizedLinearMethod,
        UnquantizedEmbeddingMethod,
        UnquantizedFusedMoEMethod,
        BaseKVCacheMethod,
    )
    method = quant_method(layer)
    return method is not None and not isinstance(method, plain)


def quantizes_as_it_loads(layer: torch.nn.Module) -> bool:
    """Whether a layer takes 16-bit weights and packs them as soon as they are complete."""
    return bool(getattr(getattr(layer, "quant_method", None), "uses_meta_device", False))


def quant_method(layer: torch.nn.Module) -> Any:
    """Return what processes a layer's weights after they were loaded; None if nothing does."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    method = getattr(layer, "quant_method", None)
    return method if isinstance(method, QuantizeMethodBase) else None
