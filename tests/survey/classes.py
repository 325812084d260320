"""The classes that transformers and vLLM both know, by their architecture's name."""

from __future__ import annotations


def architectures() -> list[str]:
    """Every causal language model of both."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm.model_executor.models import registry

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) & set(registry._TEXT_GENERATION_MODELS))


def with_names() -> list[str]:
    """Every class of transformers that generates text: language, vision-language and encoder-decoder models."""
    from transformers.models.auto import modeling_auto as auto

    kinds = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    found: set[str] = set()
    for mapping in kinds:
        for names in mapping.values():
            found |= {names} if isinstance(names, str) else set(names)
    return sorted(found)


REPRESENTATIVE = (
    "ApertusForCausalLM",
    "BloomForCausalLM",
    "DeepseekV3ForCausalLM",
    "FalconH1ForCausalLM",
    "GPT2LMHeadModel",
    "Gemma3ForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
)
"""Mamba hybrids, gpt-oss, fused experts, MLA, computed and learned positions, tied embeddings, fused projections."""
