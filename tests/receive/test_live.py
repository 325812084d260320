"""Pushes into vLLM's own model classes: everything that they compute with, against a fresh load of what was pushed."""

from __future__ import annotations

import pytest
import torch

from lorasync.bucket import Bucket
from lorasync.errors import MismatchError, SyncError
from lorasync.receive.live import LiveModel
from lorasync.receive.load_plan import check_complete
from lorasync.receive.planner import record_plan
from lorasync.receive.twin import build_twin
from lorasync.receive.writer import LiveWriter
from tests import families, served


def live_model(model, config, tensors) -> LiveModel:
    plan = record_plan(build_twin(config), served.manifest_of(tensors))
    check_complete(plan)
    live = LiveModel(model, config.model_config, plan)
    live.check_writable()
    return live


def push(live: LiveModel, tensors: dict[str, torch.Tensor], *, at_once: int = 5) -> None:
    """In buckets that cut through layers; the memory of each is used again for the next."""
    writer = LiveWriter(live)
    names = list(tensors)
    for start in range(0, len(names), at_once):
        bucket = Bucket({name: tensors[name].clone() for name in names[start : start + at_once]})
        writer.write(bucket)
        for tensor in bucket.values():
            tensor.zero_()
    writer.finish()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_two_pushes_leave_what_a_fresh_load_gives(family, dtype, tmp_path):
    before, after = (families.save(family, tmp_path / str(seed), seed=seed, dtype=dtype) for seed in (0, 1))
    with served.loaded(after, dtype=dtype) as (fresh, _):
        expected = served.everything(fresh)
    with served.loaded(before, dtype=dtype) as (model, config):
        at_start = served.everything(model)
        storages = {n: p.data_ptr() for n, p in model.named_parameters()}
        tensors = served.checkpoint(after)
        live = live_model(model, config, tensors)
        assert served.differences(model, expected)
        for _ in range(2):
            push(live, tensors)
            assert served.differences(model, expected) == []
        push(live, served.checkpoint(before))
        assert served.differences(model, at_start) == []
        assert {n: p.data_ptr() for n, p in model.named_parameters()} == storages  # as CUDA graphs need


def test_building_a_twin_leaves_the_served_model_and_vllms_caches_alone(tmp_path):
    for family in ("Apertus", "Bloom", "Llama"):
        path = families.save(family, tmp_path / family)
        with served.loaded(path) as (model, config):
            before = served.everything(model)
            twin = build_twin(config)
            assert served.differences(model, before) == []
            assert all(param.is_meta for param in twin.parameters())
        with served.loaded(path, max_model_len=32) as (again, _):
            assert not any(tensor.is_meta for tensor in served.everything(again).values())


@pytest.fixture
def two_llamas(tmp_path):
    return [families.save("Llama", tmp_path / str(seed), seed=seed) for seed in (0, 1)]


def dropping(load, part: str):
    """A loader that leaves a tensor out without a word, as some of vLLM's do."""
    return lambda weights: load((name, tensor) for name, tensor in weights if part not in name)


def test_a_loader_that_leaves_a_tensor_out_is_noticed_and_the_layer_keeps_its_weights(two_llamas):
    before, after = two_llamas
    tensors = served.checkpoint(after)
    with served.loaded(before) as (model, config):
        live = live_model(model, config, tensors)
        start = served.everything(model)
        model.load_weights = dropping(model.load_weights, "layers.1.self_attn.q_proj")
        writer = LiveWriter(live)
        layer = Bucket((n, t) for n, t in tensors.items() if "layers.1.self_attn" in n and "o_proj" not in n)
        with pytest.raises(MismatchError, match=r"layers\.1\.self_attn\.qkv_proj\.weight: got 8192 elements"):
            writer.write(layer)
        assert writer.touched
        writer.undo()
        assert served.differences(model, start) == []
        del model.load_weights
        push(live, tensors)
        with served.loaded(after) as (fresh, _):
            assert served.differences(model, served.everything(fresh)) == []


def test_a_pass_that_is_given_up_leaves_incomplete_layers_as_they_were(two_llamas):
    before, after = two_llamas
    tensors = served.checkpoint(after)
    with served.loaded(before) as (model, config):
        live = live_model(model, config, tensors)
        start = served.everything(model)
        writer = LiveWriter(live)
        writer.write(Bucket((n, t) for n, t in tensors.items() if "layers.0.self_attn.q_proj" in n))
        with pytest.raises(SyncError, match=r"layers\.0\.self_attn\.qkv_proj: part of their tensors never"):
            writer.finish()
        writer.undo()
        assert served.differences(model, start) == []


def test_an_engine_that_ties_what_the_trainer_trains_apart_is_refused(tmp_path):
    """VLLM ties an lm_head again that the checkpoint holds, if it equals the embedding."""
    from safetensors.torch import save_file

    path = families.save("Llama, tied", tmp_path / "tied")
    tensors = served.checkpoint(path)
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(both, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    with served.loaded(path) as (model, config):
        plan = record_plan(build_twin(config), served.manifest_of(both))
        with pytest.raises(MismatchError, match="this engine ties them"):
            LiveModel(model, config.model_config, plan).check_writable()
