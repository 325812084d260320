"""Settings of an engine, read from its `VllmConfig`."""

from __future__ import annotations

from typing import Any


def in_context_of(config: Any) -> Any:
    """Return the context in which vLLM's loaders and layers find the engine's config, as in vLLM's own updates."""
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(config)


def quantization_of(config: Any) -> str:
    """Return what vLLM calls the quantization of the weights that it serves; empty if there is none."""
    quantization = getattr(config, "quant_config", None)
    if quantization is None:
        return ""
    name = getattr(quantization, "get_name", None)
    return str(name() if callable(name) else type(quantization).__name__)


def loads_random_weights(config: Any) -> bool:
    """Whether the engine was started with ``load_format="dummy"``."""
    load_format = getattr(getattr(config, "load_config", None), "load_format", "auto")
    return str(getattr(load_format, "value", load_format)) == "dummy"


def speculation_of(config: Any) -> str | None:
    """Return the method of speculative decoding; None if the engine does not speculate."""
    method: str | None = getattr(getattr(config, "speculative_config", None), "method", None)
    return method
