"""What an engine serves besides plain weights: refused by name, or said in the handshake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.errors import Mismatch, MismatchError
from lorasync.receive.base import has_checkpoint

if TYPE_CHECKING:
    import torch

_WITHOUT_WEIGHTS = ("ngram", "ngram_gpu", "suffix")


def quantization_of(vllm_config: Any) -> str:
    """What vLLM calls the quantization of the weights that it serves; empty if there is none."""
    config = getattr(vllm_config, "quant_config", None)
    if config is None:
        return ""
    name = getattr(config, "get_name", None)
    return str(name() if callable(name) else type(config).__name__)


def refuse_quantized(vllm_config: Any, twin: torch.nn.Module, *, what: str) -> None:
    """Refuse an engine whose checkpoint is quantized; one that quantizes 16-bit weights as it loads them takes them.

    Raises:
        MismatchError: naming the quantization and what works.
    """
    name = quantization_of(vllm_config)
    if not name or not any(map(_is_quantized, twin.modules())):
        return
    raise MismatchError(
        f"The engine serves quantized weights; {what} are 16-bit ones. Nothing was touched.",
        [
            Mismatch(
                "quantization",
                f"{name!r}: packed weights, which nothing is merged into",
                'none, or one that quantizes what it loads (quantization="fp8" over a 16-bit checkpoint)',
                "Use ServeAdapter(name, other_base=True), which adds the adapter beside the quantized base, or start the "
                "engine from the 16-bit checkpoint.",
            )
        ],
    )


def changed_at_start(vllm_config: Any, model: torch.nn.Module) -> set[str]:
    """The parameters that do not hold the checkpoint's weights from the start: all, if the engine loads random ones.

    Where there is no checkpoint either, what somebody has put into the engine is its base; the handshake compares it.
    """
    load_format = getattr(getattr(vllm_config, "load_config", None), "load_format", "auto")
    if str(getattr(load_format, "value", load_format)) != "dummy" or not has_checkpoint(
        vllm_config.model_config
    ):
        return set()
    return {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}


def notes_of(vllm_config: Any) -> list[str]:
    """What a trainer should know of this engine although nothing is wrong."""
    notes = []
    method = getattr(getattr(vllm_config, "speculative_config", None), "method", None)
    if method is not None and method not in _WITHOUT_WEIGHTS:
        notes.append(
            f"speculative decoding ({method}): the drafter keeps its own weights, a push does not reach them. What is "
            "generated is the policy's; drafts that fit it worse make it slower."
        )
    return notes


def _is_quantized(layer: torch.nn.Module) -> bool:
    """Whether a layer's loader expects packed weights."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    plain = (
        UnquantizedLinearMethod,
        UnquantizedEmbeddingMethod,
        UnquantizedFusedMoEMethod,
        BaseKVCacheMethod,
    )
    method = getattr(layer, "quant_method", None)
    return isinstance(method, QuantizeMethodBase) and not isinstance(method, plain)
