"""The merged checkpoint as PEFT itself would write it, without a line of lorasync."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer


def merged_checkpoint(policy: PeftModel, model_path: str, out: Path) -> str:
    """Dequantize the policy's base, put its adapter on the plain model, `merge_and_unload`, save."""
    plain = AutoModelForCausalLM.from_pretrained(model_path, dtype=next(_norms(policy)).dtype)
    _copy_base(policy, plain)
    twin = get_peft_model(plain, policy.peft_config["default"])
    set_peft_model_state_dict(twin, get_peft_model_state_dict(policy))
    twin.merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(out)
    return str(out)


def _copy_base(policy: PeftModel, plain: torch.nn.Module) -> None:
    for name, module in policy.get_base_model().named_modules():
        if isinstance(module, bnb.nn.Linear4bit) and not hasattr(module, "base_layer"):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name.removesuffix(".base_layer")).weight.data.copy_(weight)


def _norms(policy: PeftModel):
    return (p for n, p in policy.named_parameters() if "layernorm" in n)
