"""Factors merged in the worker, over vLLM's own model classes: base + this adapter in every weight, whatever came before."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorasync as ls
from lorasync.errors import MismatchError, UnmergeableError
from lorasync.push import MergeInWorker, connect
from lorasync.receive.served import changed_at_start
from lorasync.source import base_samples
from tests import families, models, served

EXPERTS = {
    "gpt-oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "Qwen3-MoE": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
ADAPTERS = {
    "gpt-oss": {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS["gpt-oss"]},
    "Mamba-2": {"target_modules": ["in_proj"]},
    "Granite-4 hybrid": {"target_modules": ["in_proj", "q_proj", "input_linear"]},
    "DeepSeek-V2": {"target_modules": ["q_b_proj", "kv_b_proj", "o_proj"]},
    "Bloom": {"target_modules": "all-linear"},
    "Apertus": {"target_modules": "all-linear"},
    "GPT-2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
}


def policy_of(path, *, seed=0, dtype="float32", **adapter):
    base = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    return models.with_adapter(base, seed=seed, **adapter)


def merged_on_disk(policy, folder) -> str:
    """PEFT's own merge."""
    policy.merge_and_unload().save_pretrained(folder)
    return str(folder)


def served_after(path, pushes, **settings) -> dict[str, torch.Tensor]:
    """All that an engine computes with after some pushes, one connection each."""
    with served.loaded(path, **settings) as (model, config):
        worker = served.Worker(model, config)
        for source, apply in pushes:
            with connect(source, worker, apply) as sync:
                sync.send_weights()
        return served.everything(model)


def different(found, expected) -> list[str]:
    return sorted(n for n in expected if not torch.equal(found[n], expected[n]))


@pytest.fixture
def llama(tmp_path) -> str:
    return families.save("Llama", tmp_path / "base")


def fresh(path, **settings) -> dict[str, torch.Tensor]:
    with served.loaded(path, **settings) as (model, _):
        return served.everything(model)


BEFORE = {
    "nothing": lambda path: [],
    "another policy": lambda path: [(ls.FactorSource(policy_of(path, seed=5)), "KIND")],
    "another policy, another base kind": lambda path: [
        (ls.FactorSource(policy_of(path, seed=5)), MergeInWorker(base="checkpoint"))
    ],
    "a merged push": lambda path: [(ls.MergedSource(policy_of(path, seed=5)), None)],
}


@pytest.mark.parametrize("kind", ["device", "cpu", "checkpoint"])
@pytest.mark.parametrize("before", BEFORE)
def test_a_narrow_policy_is_served_on_its_base_whatever_was_pushed_before(before, kind, llama, tmp_path):
    narrow = policy_of(llama, target_modules=["q_proj"])
    pushes = [(s, MergeInWorker(base=kind) if a == "KIND" else a) for s, a in BEFORE[before](llama)]
    found = served_after(llama, [*pushes, (ls.FactorSource(narrow), MergeInWorker(base=kind))])
    expected = fresh(merged_on_disk(narrow, tmp_path / "merged"))
    assert different(found, expected) == []


def test_an_engine_of_random_weights_gets_the_checkpoints(llama, tmp_path):
    narrow = policy_of(llama, target_modules=["q_proj"])
    push = [(ls.FactorSource(narrow), MergeInWorker(base="checkpoint"))]
    found = served_after(llama, push, load_format="dummy")
    assert different(found, fresh(merged_on_disk(narrow, tmp_path / "merged"))) == []


def test_an_engine_of_random_weights_without_a_checkpoint_has_what_was_put_into_it_for_its_base(
    llama, tmp_path
):
    """Read back only on a GPU: benchmarks/sync_gpu.py makes its engine so. On a CPU vLLM keeps weights packed."""
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    for folder, changed in ((llama, True), (str(bare), False)):
        with served.loaded(folder, load_format="dummy") as (model, config):
            assert bool(changed_at_start(config, model)) == changed
    with served.loaded(llama) as (model, config):
        assert not changed_at_start(config, model)


def test_weights_that_somebody_else_has_changed_are_given_their_base_back(llama, tmp_path):
    narrow = policy_of(llama, target_modules=["q_proj"])
    with served.loaded(llama) as (model, config):
        model.model.norm.weight.data.mul_(1.5)
        with pytest.raises(MismatchError, match=r"model\.norm\.weight.*the engine"):
            connect(ls.FactorSource(narrow), served.Worker(model, config), MergeInWorker(base="device"))
        with connect(
            ls.FactorSource(narrow), served.Worker(model, config), MergeInWorker(base="checkpoint")
        ) as sync:
            sync.send_weights()
        found = served.everything(model)
    assert different(found, fresh(merged_on_disk(narrow, tmp_path / "merged"))) == []


def test_going_back_and_a_push_that_fails_leave_base_and_one_adapter(llama, tmp_path):
    wide, narrow = policy_of(llama, seed=5), policy_of(llama, target_modules=["q_proj"])
    with served.loaded(llama) as (model, config):
        worker = served.Worker(model, config)
        with connect(ls.FactorSource(wide), worker, MergeInWorker(base="checkpoint")) as sync:
            sync.send_weights()
        with connect(ls.FactorSource(narrow), worker, MergeInWorker(base="checkpoint")) as sync:
            sync.send_weights()
            first = served.everything(model)
            models.move(narrow, seed=7)
            sync.send_weights()
            assert different(served.everything(model), first)
            sync.rollback()
            assert different(served.everything(model), first) == []
            working = model.load_weights
            model.load_weights = lambda weights: working(list(weights)[1:])
            with pytest.raises(MismatchError, match="not loaded as the load plan says"):
                sync.send_weights()
            assert worker.engine.conversation.closed  # the served version could not be loaded again either
            model.load_weights = working
            sync.send_weights()
        assert not worker.engine.conversation.closed
        found = served.everything(model)
    assert different(found, fresh(merged_on_disk(narrow, tmp_path / "merged"))) == []


def test_a_policy_without_a_base_for_what_was_changed_is_refused(tmp_path, monkeypatch):
    """A trainer of the text alone, over an engine whose other weights a merged push has changed."""
    path = families.save("Llama", tmp_path / "base")
    narrow = policy_of(path, target_modules=["q_proj"])
    with served.loaded(path) as (model, config):
        worker = served.Worker(model, config)
        worker.engine.served.changed = {"model.norm.weight"}
        source = ls.FactorSource(narrow)
        samples = {n: s for n, s in base_samples(source).items() if n != "model.norm.weight"}
        monkeypatch.setattr("lorasync.source.base_samples", lambda _: samples)
        with pytest.raises(MismatchError, match="trainer has no base for"):
            connect(source, worker, MergeInWorker(base="checkpoint"))


@pytest.mark.parametrize(
    "family", ["gpt-oss", "Mamba-2", "Granite-4 hybrid", "DeepSeek-V2", "Bloom", "GPT-2"]
)
@pytest.mark.parametrize("kind", ["device", "checkpoint"])
def test_families_that_load_in_ways_of_their_own_are_merged_in_the_worker(family, kind, tmp_path):
    path = families.save(family, tmp_path / "base")
    policy = policy_of(path, **ADAPTERS[family])
    push = (ls.FactorSource(policy), MergeInWorker(base=kind))
    found = served_after(path, [push, push])
    expected = fresh(merged_on_disk(policy, tmp_path / "merged"))
    assert different(found, expected) == []


def test_experts_that_the_checkpoint_stores_in_pieces_are_sampled_piece_by_piece(tmp_path):
    path = families.save("Qwen3-MoE", tmp_path / "base")
    policy = policy_of(path, target_modules=["q_proj"])
    samples = base_samples(ls.FactorSource(policy))
    stored = served.checkpoint(path)
    assert samples.keys() == stored.keys()
    for name, sample in samples.items():
        assert sample.shape == tuple(stored[name].shape)
        assert list(sample.values) == stored[name].reshape(-1)[list(sample.positions)].double().tolist()


@pytest.mark.parametrize("family", ["Qwen3-MoE", "gpt-oss"])
@pytest.mark.parametrize("apply", [MergeInWorker(base="checkpoint"), MergeInWorker(base="device")], ids=str)
def test_an_engine_with_other_experts_is_refused(family, apply, tmp_path):
    path = families.save(family, tmp_path / "base")
    other = AutoModelForCausalLM.from_pretrained(path)
    other.model.layers[1].mlp.experts.down_proj.data[2] += 0.5
    other.save_pretrained(tmp_path / "other")
    source = ls.FactorSource(policy_of(path, target_modules=["q_proj"]))
    with (
        served.loaded(str(tmp_path / "other")) as (model, config),
        pytest.raises(MismatchError, match=r"layers\.1\.mlp\.experts.*down_proj"),
    ):
        connect(source, served.Worker(model, config), apply)


def test_an_engine_with_another_buffer_or_computed_weight_is_refused(tmp_path):
    for family, part in {"MiniMax-M2": "e_score_correction_bias", "Mamba-2": "A_log"}.items():
        path = families.save(family, tmp_path / family)
        policy = policy_of(path, target_modules=["q_proj" if family == "MiniMax-M2" else "in_proj"])
        held = dict(policy.named_parameters()) | dict(policy.named_buffers())
        name = next(n for n in held if part in n and ".0." in n)
        held[name].data.add_(0.5)
        with served.loaded(path) as (model, config), pytest.raises(MismatchError, match=part):
            connect(ls.FactorSource(policy), served.Worker(model, config), MergeInWorker(base="checkpoint"))


def test_factors_of_experts_in_pieces_are_refused_with_the_way_that_works(tmp_path):
    path = families.save("Qwen3-MoE", tmp_path / "base")
    policy = policy_of(path, target_modules=["q_proj"], target_parameters=EXPERTS["Qwen3-MoE"])
    with served.loaded(path) as (model, config):
        worker = served.Worker(model, config)
        with pytest.raises(UnmergeableError, match=r"Use MergedSource instead"):
            connect(ls.FactorSource(policy), worker, MergeInWorker(base="checkpoint"))
        with connect(ls.MergedSource(policy), worker) as sync:
            sync.send_weights()
        found = served.everything(model)
    assert different(found, fresh(merged_on_disk(policy, tmp_path / "merged"))) == []
