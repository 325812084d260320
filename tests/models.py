"""Tiny random models and adapters that tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """Two layers, grouped-query attention, head size 32: small, and still served by vLLM on two ranks."""
    settings = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = LlamaConfig(**{**settings, **overrides})
    model = LlamaForCausalLM(config).to(torch.float32)
    for param in model.parameters():  # large enough that different weights give different tokens
        param.data.mul_(3) if param.ndim > 1 else None
    return model


def save(model: PreTrainedModel, folder: Path, *, tokenizer: str | None = None) -> str:
    """Save a model (and a tokenizer) as a checkpoint that vLLM loads."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def with_adapter(model: PreTrainedModel, *, seed: int = 0, scale: float = 0.02, **settings: Any) -> PeftModel:
    """A LoRA adapter on all linear layers, with a B that is not zero, as after training."""
    name = settings.pop("adapter_name", "default")
    config = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **settings})
    torch.manual_seed(seed)  # A is drawn at random
    policy = get_peft_model(model, config, adapter_name=name)
    move(policy, seed=seed, scale=scale)
    return policy


def tiny(path: str, dtype: torch.dtype = torch.float32, **adapter: Any) -> PeftModel:
    """The checkpoint with a LoRA adapter: a policy in training."""
    return with_adapter(AutoModelForCausalLM.from_pretrained(path, dtype=dtype), **adapter)


def move(policy: PeftModel, *, seed: int, scale: float = 0.02) -> None:
    """Give the adapter other values, as an optimizer step does."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in sorted(policy.named_parameters()):
        if ".lora_B." in name or ".lora_embedding_B." in name:
            param.data.copy_(torch.randn(param.shape, generator=generator) * scale)
