"""estimate_memory(): the levers move it the right way; e2e/test_memory.py has it against a real run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from lorasync.planning.memory import LiveBytes, MemoryEstimate, estimate_memory
from lorasync.presets import INT8, LORA_ZERO3, NF4, QLORA_ZERO2, TrainPreset

MODEL = LlamaConfig(
    vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4
)


def estimate(preset: TrainPreset = QLORA_ZERO2, world_size: int = 1, **changes: object) -> MemoryEstimate:
    return estimate_memory(MODEL, replace(preset, **changes), world_size, sequence_length=64)


@pytest.fixture(scope="module")
def usual() -> MemoryEstimate:
    return estimate()


@pytest.mark.parametrize(
    "more", [{"micro_batch": 4}, {"gradient_checkpointing": False}, {"precision": "fp32"}, {"r": 128}]
)
def test_what_costs_more(usual: MemoryEstimate, more: dict[str, object]):
    narrow = {"stage": 0, "r": 4}  # so that activations are the peak, not Adam's step
    assert estimate(**{**narrow, **more}).total > estimate(**narrow).total


def test_accumulating_keeps_the_gradients_of_earlier_micro_batches():
    one, two = estimate(r=4), estimate(r=4, global_batch=2)
    assert two.step - one.step == one.optimizer // 12 * 2
    assert estimate(r=4, global_batch=2, world_size=2).step == estimate(r=4, world_size=2).step


def test_offload_moves_the_optimizer_to_the_host(usual: MemoryEstimate):
    offloaded = estimate(optimizer_offload="cpu")
    assert (offloaded.optimizer, offloaded.host) == (0, usual.optimizer)
    assert (usual.host, offloaded.weights) == (0, usual.weights)


def test_ranks_share_states_and_under_zero3_weights(usual: MemoryEstimate):
    shared = estimate(world_size=8)
    assert shared.optimizer == usual.optimizer // 8
    assert shared.weights == usual.weights
    zero3 = estimate(LORA_ZERO3, world_size=8)
    assert zero3.weights < estimate(LORA_ZERO3).weights
    assert zero3.adapter == estimate(LORA_ZERO3).adapter // 8


def test_formats_are_counted(usual: MemoryEstimate):
    plain, eight = estimate(quantization=None), estimate(quantization=INT8)
    assert usual.weights < eight.weights < plain.weights
    assert estimate(quantization=INT8, stage=3, world_size=8).weights == eight.weights  # state.CB stays whole
    assert estimate(quantization=NF4, stage=3, world_size=8).weights < usual.weights


def test_a_wide_adapter_is_bound_by_adams_step_and_offload_ends_that():
    wide = estimate(r=2048)
    trained = wide.optimizer // 12
    assert wide.step == trained * (
        2 + 2 + 4 + 4
    )  # bf16 gradients, their flat copy, that in fp32, a temporary
    assert estimate(r=2048, optimizer_offload="cpu").step < wide.step
    assert estimate(r=2048, world_size=4).step < wide.step


def test_live_bytes_are_those_of_storages_that_exist():
    with LiveBytes() as live:
        kept = torch.empty(1000, dtype=torch.uint8)
        assert live.now == 1000
        shape = torch.empty(5000, dtype=torch.uint8, device="meta")
        view = kept[10:]
        assert live.now == 1000
        gone = kept.clone()
        del gone
    assert (live.now, live.peak) == (1000, 2000)
    del kept, view, shape
    assert live.now == 0


def test_it_reads_as_a_sentence(usual: MemoryEstimate):
    assert "a rank (weights" in str(usual)
