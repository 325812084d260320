"""Tiny configs of any architecture: a config class's own defaults, with the sizes that we know made small."""

from __future__ import annotations

from typing import Any

_WIDTH, _HEADS, _HEAD, _INNER, _EXPERTS = 64, 2, 32, 128, 4
# fmt: off
# ruff: noqa: E501
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "max_position_embeddings", "n_positions", "n_ctx", "seq_length",
                     "max_seq_len", "original_max_position_embeddings"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size", "n_embed", "lm_head_hidden",
                     "embed_dim", "out_hidden_size"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "intermediate_size_mlp", "block_ff_dim",
                     "dense_intermediate_size", "prefix_dense_intermediate_size", "expert_ffn_hidden_size", "conv_ff_dim"), _INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size", "expert_dim",
                     "moe_shared_expert_intermediate_size", "moe_latent_size"), _WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "n_head_kv", "num_kv_heads",
                     "swa_num_attention_heads", "swa_num_key_value_heads", "num_global_key_value_heads"), _HEADS),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "attention_head_dim", "swa_head_dim", "swa_v_head_dim",
                     "global_head_dim"), _HEAD),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "rotary_dim"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("pad_token_id", "unk_token_id"), 0), "bos_token_id": 1, "eos_token_id": 2,
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_state_dim"), 16),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "n_mamba_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head", "mamba_headdim", "linear_key_head_dim", "linear_value_head_dim"), _HEAD),
    "linear_num_key_heads": 2, "mamba_d_ssm": 128, "mamba_dt_rank": 8, "first_k_dense_replace": 1, "moe_layer_start_index": 1,
    "hidden_size_per_layer_input": 32, "sliding_window": 32, "num_kv_shared_layers": 0, "max_window_layers": 1,
    "index_n_heads": 2, "index_head_dim": 32, "index_topk": 16, "moe_num_shared_experts": 1, "n_shared_experts": 1,
    "num_mem_blocks": 1, "zero_expert_num": 0, "num_nextn_predict_layers": 0, "laurel_rank": 8,
}
# fmt: on
_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "hybrid_layer_pattern")

# What a class needs beyond that: architecture → settings of its (text) config.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1},
    "DeepseekV3ForCausalLM": {"topk_method": "noaux_tc"},
    "FalconForCausalLM": {"num_kv_heads": 1, "multi_query": True, "new_decoder_architecture": False, "ffn_hidden_size": 256},
    "Glm4MoeForCausalLM": {"head_dim": 32},
    "Glm4MoeLiteForCausalLM": {"first_k_dense_replace": 1},
    "HYV3ForCausalLM": {"first_k_dense_replace": 1, "head_dim": 32, "expert_hidden_dim": 64, "route_norm": True, "qk_norm": True},
    "Lfm2ForCausalLM": {"block_dim": 64, "block_ff_dim": 128, "block_multiple_of": 16, "conv_dim": 64, "conv_dim_out": 64},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "conv_dim": 64},
    "LongcatFlashForCausalLM": {
        "num_layers": 2, "num_hidden_layers": 4, "mla_scale_q_lora": False, "mla_scale_kv_lora": False, "router_bias": False,
        "zero_expert_type": "identity",
    },
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 32, "hidden_size": 64, "expand": 2},
    "MiMoV2FlashForCausalLM": {
        "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "layernorm_epsilon": 1e-5,
        "num_attention_heads": 4, "swa_num_attention_heads": 4, "sliding_window_size": 32, "swa_num_key_value_heads": 4, "swa_head_dim": 32, "swa_v_head_dim": 32, "swa_rope_theta": 1e4,
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "attention_value_scale": 1.0,
        "partial_rotary_factor": 1.0, "num_key_value_heads": 2, "attention_bias": False, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "n_shared_experts": None,
    },
    "MiniMaxM2ForCausalLM": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    "NemotronForCausalLM": {"head_dim": 32, "num_key_value_heads": 2},
    "Zamba2ForCausalLM": {
        "num_attention_heads": 4, "num_key_value_heads": 4, "attention_head_dim": 32, "layers_block_type": ["mamba", "hybrid"],
        "num_hidden_layers": 2, "use_mem_eff_path": False,
    },
}  # fmt: skip


def shrunk(kind: Any, architecture: str) -> Any:
    """An instance of a config class, tiny."""
    settings = _settings(kind, architecture)
    return kind(**settings)


def _settings(kind: Any, architecture: str) -> dict[str, Any]:
    default = kind()
    found = {name: size for name, size in _SIZES.items() if _has(default, kind, name)}
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        if isinstance(part, type) and part.__name__ != "AutoConfig":
            found[name] = _settings(part, "").copy()
        elif getattr(default, name, None) is not None:
            found[name] = {
                **_settings(type(getattr(default, name)), ""),
                "model_type": getattr(default, name).model_type,
            }
    for name in _LISTS:
        types = vars(default).get(name)
        if isinstance(types, list) and types:
            found[name] = _one_of_each(types)
    longest = max((len(found[name]) for name in _LISTS if name in found), default=0)
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if name in found and longest:
            found[name] = longest
    for name in _LISTS:
        if name in found:
            found[name] = (found[name] * longest)[:longest]
    return {**found, **EXCEPTIONS.get(architecture, {})}


def _has(default: Any, kind: Any, name: str) -> bool:
    declared = getattr(kind, name, None)
    if name in (getattr(kind, "attribute_map", None) or {}) or (
        isinstance(declared, property) and declared.fset is None
    ):
        return False
    value = vars(default).get(name)
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of_each(types: list[Any]) -> list[Any]:
    """Each kind of layer once, in their order, and at least two layers."""
    once = list(dict.fromkeys(types))
    return once if len(once) > 1 else once * 2
