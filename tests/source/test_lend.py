"""Plans that are kept between pushes, and what a receiver in the same process is lent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

import lorasync as ls
from lorasync.bucket import made
from lorasync.errors import AdapterError, MismatchError, NonFiniteError
from lorasync.kernels import Peaks, PendingMerge
from lorasync.load import load_quantized
from lorasync.presets import NF4
from tests import models
from tests.e2e.engines import same_bits


def a_policy(**settings: Any) -> Any:
    return models.with_adapter(models.tiny_llama(), r=4, **settings)


def lent(source: ls.MergedSource) -> dict[str, torch.Tensor]:
    lent, rest = source.lend()
    return {name: made(item) for name, item in lent.items()} | dict(rest)


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"]
)
def test_what_is_lent_is_what_iteration_yields(settings: dict[str, Any]) -> None:
    source = ls.MergedSource(a_policy(**settings))
    pending = [item for item in source.lend()[0].values() if isinstance(item, PendingMerge)]
    assert len(pending) == 14
    copies = dict(source)
    assert list(lent(source)) == list(copies)
    assert all(same_bits(item, copies[name]) for name, item in lent(source).items())


def test_a_pending_merge_of_a_4_bit_weight_refers_to_the_packed_one(tmp_path: Any) -> None:
    base = load_quantized(models.save(models.tiny_llama(), tmp_path), NF4, progress=False)
    source = ls.MergedSource(models.with_adapter(base, r=4))
    merge = source.lend()[0]["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(merge, PendingMerge)
    packed = source.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").weight
    assert dict(merge.base.tensors())["packed"].data_ptr() == packed.data_ptr()
    out = torch.empty(merge.shape, dtype=merge.dtype)
    job = merge.job(out[:8], rows=(0, 8), cols=(0, merge.shape[1]))
    assert torch.equal(job.base.dequantize(), merge.base.dequantize()[:8])


def test_the_same_merges_come_again_until_something_moves() -> None:
    policy = a_policy()
    source = ls.MergedSource(policy)
    first, again = source.lend()[0], source.lend()[0]
    assert all(again[name] is item for name, item in first.items() if isinstance(item, PendingMerge))
    name = "model.layers.1.mlp.up_proj.weight"
    weight = policy.get_submodule("base_model.model.model.layers.1.mlp.up_proj.base_layer").weight
    weight.data = weight.data.clone() + 1
    moved = source.lend()[0][name]
    assert moved is not first[name]
    assert same_bits(moved.make(), dict(source)[name])


def scale(policy: Any) -> None:
    for layer in policy.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 3.0)


def another_adapter(policy: Any) -> None:
    policy.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    policy.set_adapter("other")
    for name, param in policy.named_parameters():
        param.data.fill_(0.5) if ".lora_B.other" in name else None


def a_new_head(policy: Any) -> None:
    head = torch.nn.Linear(128, 512, bias=False)
    policy.get_base_model().lm_head = head


@pytest.mark.parametrize("change", [scale, a_new_head])
def test_a_kept_plan_does_not_outlive_a_change(change: Callable[[Any], None]) -> None:
    policy = a_policy()
    kept = ls.MergedSource(policy)
    before = dict(kept)
    change(policy)
    fresh = dict(ls.MergedSource(policy))
    assert all(same_bits(item, fresh[name]) for name, item in dict(kept).items())
    assert all(same_bits(item, fresh[name]) for name, item in lent(kept).items())
    assert any(not same_bits(item, before[name]) for name, item in fresh.items())


@pytest.mark.parametrize("kind", [ls.MergedSource, ls.FactorSource])
def test_a_kept_plan_is_refused_once_another_adapter_is_active(kind: Any) -> None:
    policy = a_policy()
    kept, named = kind(policy), kind(policy, adapter="default")
    before = dict(kept)
    another_adapter(policy)
    for use in (lambda: dict(kept), kept.lend, kept.metadata):
        with pytest.raises(AdapterError, match=r"\['other'\] active, expected \['default'\]"):
            use()
    assert all(same_bits(tensor, before[name]) for name, tensor in named)
    assert dict(kind(policy)).keys()
    policy.set_adapter("default")
    assert all(same_bits(tensor, before[name]) for name, tensor in kept)


@pytest.mark.parametrize("kind", [ls.MergedSource, ls.FactorSource])
def test_a_kept_plan_still_refuses_what_is_wrong(kind: Any) -> None:
    policy = a_policy()
    source = kind(policy)
    source.lend()
    policy.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the weights"):
        source.lend()
    policy.unmerge_adapter()
    next(p for n, p in policy.named_parameters() if ".lora_B." in n).data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="1 tensors"):
        source.lend()


def test_a_kept_plan_sees_a_factor_that_is_not_whole():
    policy = a_policy()
    source = ls.MergedSource(policy)
    source.lend()
    next(p for n, p in policy.named_parameters() if "up_proj.lora_B" in n).data = torch.empty(0)
    with pytest.raises(MismatchError, match="up_proj"):
        next(iter(source))
    with pytest.raises(MismatchError, match="up_proj"):
        source.lend()


def test_a_borrowed_factor_is_the_parameter_itself() -> None:
    policy = a_policy()
    held = {param.data_ptr() for param in policy.parameters()}
    assert all(made(item).data_ptr() in held for item in ls.FactorSource(policy).lend()[0].values())
    assert not any(tensor.data_ptr() in held for _, tensor in ls.FactorSource(policy))


def test_peaks_are_the_largest_absolute_values() -> None:
    tensors = [
        torch.tensor([1.0, -3.0]),
        torch.empty(0),
        torch.tensor([float("inf")]),
        torch.tensor([float("nan")]),
    ]
    found = Peaks(tensors).now()
    assert found[:3] == [3.0, 0.0, float("inf")]
    assert found[3] != found[3]
