"""Families beside Llama, each compared with a fresh engine on the merged checkpoint: one engine after the other."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lorasync as ls
from lorasync.push import MergeInWorker, connect
from tests import models
from tests.e2e.engines import greedy, running_llm
from tests.e2e.oracle import merged_checkpoint

pytestmark = pytest.mark.timeout(420)

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def qwen3_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts))


@pytest.mark.parametrize(
    ("family", "adapter"),
    [(qwen3, {}), (qwen3_moe, {"target_modules": ATTENTION})],
    ids=["qwen3", "qwen3-moe, attention"],
)
def test_every_way_serves_the_merged_checkpoint(family, adapter, smollm2, tmp_path):
    torch.manual_seed(0)
    model = family()
    for param in model.parameters():
        param.data.mul_(3) if param.ndim > 1 else None
    base = models.save(model, tmp_path / "base", tokenizer=smollm2)
    policy = models.with_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), **adapter)
    merged = merged_checkpoint(policy, base, tmp_path / "merged")
    with running_llm(merged, backend=None, in_process=True, dtype="float32") as fresh:
        expected = greedy(fresh)
    with running_llm(base, in_process=True, dtype="float32") as llm:
        assert greedy(llm) != expected
        with connect(ls.FactorSource(policy), llm, MergeInWorker(base="device")) as sync:
            sync.send_weights()
            assert greedy(llm) == expected
            models.move(policy, seed=1)
            sync.send_weights()
            assert greedy(llm) != expected
        models.move(policy, seed=0)
        with connect(ls.MergedSource(policy), llm) as sync:
            for _ in range(2):  # experts are packed anew each time
                sync.send_weights()
                assert greedy(llm) == expected
