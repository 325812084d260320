"""Engines that a push can't reach as a whole: refused by name in the handshake, or said there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorasync as ls
from lorasync.errors import MismatchError
from lorasync.push import MergeInWorker, connect
from lorasync.receive.frozen import ignored_notes, may_be_ignored
from lorasync.receive.mergeable import ways_to_merge
from lorasync.receive.planner import record_plan
from lorasync.receive.served import notes_of
from tests import families, models, served
from tests.receive.test_load_plan import Twin, ignoring, manifest

STRATEGIES = {
    "merged": lambda policy: (ls.MergedSource(policy), None),
    "factors": lambda policy: (ls.FactorSource(policy), MergeInWorker(base="checkpoint")),
}


def a_policy(path, **settings):
    return models.with_adapter(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), **settings)


@pytest.fixture
def llama(tmp_path) -> str:
    return families.save("Llama", tmp_path / "base")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: got 2, expected 1"),
        ({"enable_expert_parallel": True, "world_size": 2}, "enable_expert_parallel: got True"),
    ],
)
def test_an_engine_whose_ranks_hold_different_layers_is_refused_by_its_setting(
    strategy, setting, says, llama
):
    source, apply = STRATEGIES[strategy](a_policy(llama))
    with served.loaded(llama) as (model, config):
        worker = served.Worker(model, config)
        for name, value in setting.items():
            setattr(config.parallel_config, name, value)
        config.parallel_config.world_size = 1 if "pipeline_parallel_size" in setting else 2
        with pytest.raises(MismatchError, match=says):
            connect(source, worker, apply, timeout=5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_quantized_engine_is_refused_as_what_it_is_with_what_works(strategy, llama):
    source, apply = STRATEGIES[strategy](a_policy(llama))
    file = Path(llama) / "config.json"
    config = json.loads(file.read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {**weights, "strategy": "token", "dynamic": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
    }
    file.write_text(json.dumps(config))
    with (
        served.loaded(llama, load_format="dummy") as (model, vllm_config),
        pytest.raises(MismatchError) as refused,
    ):
        connect(source, served.Worker(model, vllm_config), apply)
    assert "'compressed-tensors'" in str(refused.value)
    assert "other_base=True" in str(refused.value)
    assert "Is this engine serving the model" not in str(refused.value)


@pytest.mark.parametrize(
    ("method", "says"),
    [("eagle3", True), ("deepseek_mtp", True), ("draft_model", True), ("ngram", False), (None, False)],
)
def test_a_drafter_with_weights_of_its_own_is_said_in_the_handshake(method, says):
    speculative = None if method is None else SimpleNamespace(method=method)
    notes = notes_of(SimpleNamespace(speculative_config=speculative))
    assert [method in note for note in notes] == ([True] if says else [])


def test_towers_that_a_text_engine_does_not_hold_are_listed_and_everything_else_is_refused():
    names = ["model.visual.blocks.0.weight", "model.visual.blocks.1.weight", "model.layers.0.q_norm.weight"]
    assert may_be_ignored(names, edited=()) == names[:2]
    assert may_be_ignored(names, edited=names[:1]) == names[1:2]
    entries = [(name, torch.float32, (4,)) for name in names[:2]]
    plan = record_plan(Twin(ignoring, weight=(4,)), [*manifest(weight=(4,)), *entries], may_ignore=names[:2])
    assert ignored_notes(plan) == [
        "model.visual.*: 2 weights of the trainer that this engine does not hold; they were not compared."
    ]


def test_names_without_a_place_are_refused_by_branch_and_may_be_ignored_where_they_are_towers():
    def strict(held, name, tensor):
        if name not in held:
            raise ValueError(f"There is no module or parameter named {name!r} in Twin.")
        held[name].data.copy_(tensor)

    towers = [(f"visual.{i}.weight", torch.float32, (4,)) for i in range(3)]
    twin = Twin(strict, weight=(4,))
    with pytest.raises(MismatchError) as refused:
        record_plan(twin, [*manifest(weight=(4,)), *towers])
    assert [m.name for m in refused.value.mismatches] == ["visual.*"]
    assert "exclude=['visual.*']" in str(refused.value)
    plan = record_plan(twin, [*manifest(weight=(4,)), *towers], may_ignore=[n for n, _, _ in towers])
    assert len(plan.ignored) == 3
    assert plan.feeds["weight"] == {"weight"}


def test_slots_name_only_strategies_that_take_the_adapter(tmp_path):
    path = families.save("Qwen3-MoE", tmp_path / "moe")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    spec = ls.FactorSource(a_policy(path, target_modules=["q_proj"], target_parameters=experts)).spec()
    assert ways_to_merge(spec) == "MergedSource"
    plain = ls.FactorSource(a_policy(path, target_modules=["q_proj"])).spec()
    assert ways_to_merge(plain) == "MergedSource or MergeInWorker"


def test_what_vllm_keeps_in_a_narrower_dtype_than_the_engines_is_taken_in_the_engines(tmp_path):
    """Apertus keeps the constants of its activation in bf16, whatever the engine serves."""
    path = families.save("Apertus", tmp_path / "base")
    policy = a_policy(path)
    with served.loaded(path) as (model, config):
        with connect(ls.MergedSource(policy), served.Worker(model, config)) as sync:
            sync.send_weights()
        found = served.everything(model)
    policy.merge_and_unload().save_pretrained(tmp_path / "merged")
    with served.loaded(str(tmp_path / "merged")) as (fresh, _):
        assert not [n for n, t in served.everything(fresh).items() if not torch.equal(found[n], t)]
