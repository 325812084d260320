"""VLLM's model classes, built beside a live model without disturbing it."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


def build(vllm_config: Any, where: Any, *, quantized: bool) -> torch.nn.Module:
    """Build a model of an engine's config a second time, beside the live one.

    Args:
        vllm_config: The engine's config. Layers register themselves in it by name, so the model gets a copy.
        where: A context in which the model is built: a device, or a mode that says where tensors go.
        quantized: Whether the model is quantized as the engine's is.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.quant_config = vllm_config.quant_config if quantized else None
    for registry in ("static_all_moe_layers",):  # absent in old versions
        if hasattr(config.compilation_config, registry):
            setattr(config.compilation_config, registry, [])
    dtype = vllm_config.model_config.dtype
    with set_current_vllm_config(config), _default_dtype(dtype), _rotary_cache_kept(), where:
        twin: torch.nn.Module = initialize_model(vllm_config=config)
    return twin


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the meta device with all that vLLM has attached to this one (loaders, shards)."""
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

    made: torch.Tensor = to_meta_tensor(tensor)
    return made


@contextmanager
def _rotary_cache_kept() -> Iterator[None]:
    """VLLM hands rotary embeddings from one model to the next: none that is on meta may stay in its cache."""
    from vllm.model_executor.layers import rotary_embedding

    cache: dict[Any, Any] = getattr(rotary_embedding, "_ROPE_DICT", {})
    before = dict(cache)
    try:
        yield
    finally:
        cache.clear()
        cache.update(before)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
