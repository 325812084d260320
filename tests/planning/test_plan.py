"""plan(): strategies, bytes, and the choice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import lorasync as ls
from lorasync.planning.cost import ETHERNET10, H100
from lorasync.planning.plan import plan
from tests import models


def strategies(model, target=None):
    found = plan(model, target)
    return found, {s.name.partition("(")[0]: s for s in found.strategies}


def engine(**lora):
    return SimpleNamespace(vllm_config=SimpleNamespace(lora_config=SimpleNamespace(**lora) if lora else None))


def test_bytes_are_those_of_the_sources():
    policy = models.with_adapter(models.tiny_llama())
    found, by_name = strategies(policy)
    assert by_name["MergedSource"].wire_bytes == sum(t.numel() * 4 for _, t in ls.MergedSource(policy))
    factors = sum(t.numel() * t.element_size() for _, t in ls.FactorSource(policy))
    assert by_name["MergeInWorker"].wire_bytes == by_name["ServeAdapter"].wire_bytes == factors
    assert found.choice == 'MergeInWorker(base="device")'
    assert "→ MergeInWorker" in str(found)


@pytest.mark.parametrize(
    ("adapter", "target", "said"),
    [
        ({}, engine(), "enable_lora=True"),
        ({}, engine(max_lora_rank=4), "max_lora_rank is 4"),
        ({"use_dora": True}, None, "plain factors only"),
    ],
)
def test_what_slots_cannot_hold_is_said(adapter, target, said):
    _, by_name = strategies(models.with_adapter(models.tiny_llama(), **adapter), target)
    assert said in by_name["ServeAdapter"].refusal
    assert not by_name["MergeInWorker"].refusal


def test_a_method_without_factors_is_left_to_the_merged_push():
    from peft import LoHaConfig, get_peft_model

    policy = get_peft_model(models.tiny_llama(), LoHaConfig(r=2, target_modules=["q_proj"]))
    found, by_name = strategies(policy)
    assert found.choice == "MergedSource"
    assert by_name["MergeInWorker"].refusal
    assert by_name["ServeAdapter"].refusal


def test_a_qlora_policy_sends_its_own_base_once(smollm2):
    from lorasync.load import load_quantized

    policy = models.with_adapter(load_quantized(smollm2, ls.NF4, progress=False))
    found, by_name = strategies(policy)
    assert found.choice == 'MergeInWorker(base="nf4")'
    assert by_name["MergeInWorker"].setup_bytes == pytest.approx(106e6 / 2, rel=0.02)
    assert "another policy" in by_name["ServeAdapter"].fidelity


def test_seconds_are_those_of_the_cost_model_where_a_device_is_named():
    policy = models.with_adapter(models.tiny_llama(), r=2)
    found = plan(policy, device=H100, link=ETHERNET10)
    merged, worker, slots = found.strategies
    assert merged.seconds == pytest.approx(
        merged.wire_bytes / ETHERNET10.bandwidth + ETHERNET10.overhead + H100.host["merged"], rel=0.2
    )
    assert merged.seconds > worker.seconds > 0
    assert slots.seconds > 0
    assert "; about " in str(found)
    assert plan(policy).strategies[0].seconds is None
