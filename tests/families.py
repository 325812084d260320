"""Tiny checkpoints of the kinds of model that vLLM loads in ways of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", TEXT),
    "Llama, tied": ("Llama", {**TEXT, "tie_word_embeddings": True}),
    "Qwen3-MoE": (
        "Qwen3Moe",
        {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "gpt-oss": (
        "GptOss",
        {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    ),
    "MiniMax-M2": (
        "MiniMaxM2",
        {
            **TEXT,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rotary_dim": 16,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
        },
    ),
    "DeepSeek-V2": (
        "DeepseekV2",
        {
            **{k: v for k, v in TEXT.items() if k != "head_dim"},
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "n_shared_experts": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "Mamba": ("Mamba", _MAMBA),
    "Mamba-2": ("Mamba2", {**_MAMBA, "num_heads": 4, "head_dim": 32, "n_groups": 1}),
    "Granite-4 hybrid": (
        "GraniteMoeHybrid",
        {
            **{k: v for k, v in TEXT.items() if k != "head_dim"},
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "position_embedding_type": "rope",
        },
    ),
    "Qwen3-Next": (
        "Qwen3Next",
        {
            **TEXT,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "Bloom": ("Bloom", {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 2}),
    "Apertus": ("Apertus", TEXT),
    "Gemma-3": ("Gemma3", TEXT),
    "GPT-2": ("GPT2", {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}),
}


def save(family: str, folder: Path, *, seed: int = 0, dtype: str = "float32") -> str:
    """A checkpoint of random weights."""
    kind, settings = FAMILIES[family]
    name = "Gemma3Text" if kind == "Gemma3" else kind
    torch.manual_seed(seed)
    head = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, head)(getattr(transformers, f"{name}Config")(**settings))
    for param in model.parameters():  # everything differs from one seed to the next, norms and biases too
        param.data.add_(torch.randn_like(param) * 0.05)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return str(folder)
