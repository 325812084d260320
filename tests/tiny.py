"""Tiny random models of many architectures, and adapters with something in them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_OLD = {key: TEXT[key] for key in TEXT if key not in ("num_key_value_heads", "intermediate_size")}

# architecture → (model class, config class, config)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", TEXT),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**TEXT, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "head_dim": 8}),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_OLD, "intermediate_size": 48}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_OLD, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", _OLD),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**TEXT, **_MOE, "head_dim": 8}),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **TEXT,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
            },
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {
                "model_type": "clip_vision_model",
                **_VISION,
                "image_size": 28,
                "patch_size": 14,
                "projection_dim": 32,
            },
        },
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **TEXT,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **TEXT,
            "num_key_value_heads": 4,
            "num_hidden_layers": 2,
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_d_state": 4,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "num_mem_blocks": 1,
            "use_mem_eff_path": False,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 32,
        },
    ),
}


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A seeded random model of one architecture."""
    import transformers

    model_class, config_class, config = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    return model.to(dtype).eval()


def adapt(model: nn.Module, name: str = "default", *, cast: bool = True, seed: int = 1, **config: Any) -> Any:
    """Wrap a model with LoRA (on all linear layers, r=4, unless said) as if it had been trained."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "target_modules": "all-linear", **config}
    with warnings.catch_warnings():  # PEFT talks about patterns of its own making
        warnings.simplefilter("ignore")
        made = get_peft_model(model, LoraConfig(**settings), adapter_name=name, autocast_adapter_dtype=cast)
    return fill(made, seed)


def fill(model: nn.Module, seed: int = 1, scale: float = 0.1) -> Any:
    """Give every adapter parameter a random value, as after some training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.is_floating_point() and (param.requires_grad or "lora_" in name):
                param += (torch.randn(param.shape) * scale).to(param)
    return model


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the model, copied."""
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """Whether every tensor still has its bits (NaN included)."""
    now = dict([*model.named_parameters(), *model.named_buffers()])
    return now.keys() == before.keys() and all(same_bits(before[name], now[name]) for name in before)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal dtype, shape and bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(
        one.detach().contiguous().view(-1).view(torch.uint8),
        other.detach().contiguous().view(-1).view(torch.uint8),
    )
