"""What is trained is what travels: active adapters, every trained parameter, each layer's own scaling."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.nn.utils import prune

import lorasync as ls
from lorasync.errors import AdapterError, MismatchError, UnmergeableError
from lorasync.push.strategies import MergeInWorker, ServeAdapter
from lorasync.source import FactorSpec
from tests.models import move, tiny_llama, with_adapter

SOURCES = [ls.MergedSource, ls.FactorSource]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_model_without_an_active_adapter_is_refused(kind: Any) -> None:
    policy = with_adapter(tiny_llama())
    source = kind(policy)
    policy.base_model.set_adapter([])
    with pytest.raises(AdapterError, match="no active adapter"):
        kind(policy)
    with pytest.raises(AdapterError, match="active"):
        dict(source)
    assert kind(policy, adapter="default").metadata()


@pytest.mark.parametrize("kind", SOURCES)
def test_a_model_whose_only_adapter_was_deleted_is_refused(kind: Any) -> None:
    policy = with_adapter(tiny_llama())
    source = kind(policy)
    policy.delete_adapter("default")
    for use in (lambda: kind(policy), lambda: dict(source)):
        with pytest.raises(AdapterError):
            use()


def test_an_adapter_that_sleeps_in_some_layers_is_no_set_of_factors() -> None:
    policy = with_adapter(tiny_llama())
    policy.base_model.model.model.layers[0].mlp.up_proj.set_adapter([])
    with pytest.raises(AdapterError, match=r"switched off in model\.layers\.0\.mlp\.up_proj"):
        ls.FactorSource(policy)
    merged = dict(ls.MergedSource(policy))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged[name], tiny_llama().get_parameter(name))


def train_norms(policy: Any) -> None:
    policy.base_model.model.model.norm.requires_grad_(True)


def train_embedding(policy: Any) -> None:
    policy.get_input_embeddings().requires_grad_(True)


def train_adapted_weight(policy: Any) -> None:
    policy.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)


def train_second_adapter(policy: Any) -> None:
    policy.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    for name, param in policy.named_parameters():
        if ".second." in name:
            param.requires_grad_(True)


@pytest.mark.parametrize("change", [train_norms, train_embedding, train_adapted_weight, train_second_adapter])
@pytest.mark.parametrize("afterwards", [False, True])
def test_what_is_trained_beside_the_adapter_is_refused_by_name(change: Any, afterwards: bool) -> None:
    policy = with_adapter(tiny_llama())
    source = ls.FactorSource(policy) if afterwards else None
    change(policy)
    with pytest.raises(
        AdapterError, match=r"trained beside adapter 'default'.*MergedSource.*modules_to_save"
    ):
        dict(source) if source else ls.FactorSource(policy)
    if source:
        with pytest.raises(AdapterError, match="trained beside"):
            source.lend()
    assert dict(ls.MergedSource(policy))


def test_a_named_adapter_leaves_the_others_out() -> None:
    policy = with_adapter(tiny_llama())
    train_second_adapter(policy)
    assert not any("second" in name for name, _ in ls.FactorSource(policy, adapter="default"))
    train_norms(policy)
    with pytest.raises(AdapterError, match=r"model\.norm\.weight"):
        ls.FactorSource(policy, adapter="default")


def test_nothing_that_requires_grad_is_a_policy_too() -> None:
    policy = with_adapter(tiny_llama()).requires_grad_(False)
    assert dict(ls.FactorSource(policy))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_travel_or_are_refused(bias: Any) -> None:
    config = LoraConfig(r=2, target_modules=["0"], bias=bias)
    policy = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config)
    trained = {n for n, p in policy.named_parameters() if p.requires_grad and "lora_" not in n}
    spec = ls.FactorSource(policy).spec()
    assert {saved.weight for saved in spec.saved} == ({"0.bias", "1.bias"} if bias == "all" else {"0.bias"})
    assert len(spec.saved) == len(trained)


WORDS = ["mlp", "model", "weight", "layers", "lora_A", "0", "default", "base_layer", "q_proj"]


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("other", ["mlp", "second"])
def test_an_adapters_name_may_be_any_word(name: str, other: str) -> None:
    if name == other:
        return
    settings: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "up_proj", "embed_tokens"],
    }
    expected = with_adapter(tiny_llama(), **settings)
    policy = get_peft_model(tiny_llama(), LoraConfig(**settings), adapter_name=name)
    policy.add_adapter(other, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    move(policy, seed=1)
    theirs = dict(expected.named_parameters())
    for key, param in policy.named_parameters():
        parts = key.split(".")
        for at in (-1, -2):  # an embedding's factors are no modules
            if parts[at] == name and parts[at - 1].startswith("lora_"):
                parts[at] = "default"
                theirs[".".join(parts)].data.copy_(param.data)
                break
    assert same(dict(ls.FactorSource(policy)), dict(ls.FactorSource(expected)))
    assert same(dict(ls.MergedSource(policy)), dict(ls.MergedSource(expected)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 5]},
        {"target_modules": ["embed_tokens", "q_proj"], "lora_bias": False},
        {"bias": "all"},
    ],
)
def test_what_is_picked_is_what_peft_saves(settings: dict[str, Any]) -> None:
    policy = with_adapter(tiny_llama(attention_bias=True), **settings)
    saved = get_peft_model_state_dict(policy, save_embedding_layers=False)
    assert same(dict(ls.FactorSource(policy)), {name: t.detach() for name, t in saved.items()})


def scaled(policy: Any) -> None:
    policy.base_model.model.model.layers[0].mlp.up_proj.scale_layer(0.25)


def set_scale(policy: Any) -> None:
    policy.base_model.model.model.layers[0].mlp.up_proj.set_scale("default", 3)


@pytest.mark.parametrize("change", [scaled, set_scale])
def test_lora_slots_refuse_a_layer_whose_scaling_is_not_its_configs(change: Any) -> None:
    policy = with_adapter(tiny_llama())
    change(policy)
    source = ls.FactorSource(policy)
    with pytest.raises(MismatchError, match=r"layers\.0\.mlp\.up_proj.*MergeInWorker") as raised:
        ServeAdapter("policy").handshake(source)
    assert len(raised.value.mismatches) == 1
    sent = json.loads(MergeInWorker("device").handshake(source))
    spec = FactorSpec.from_json(sent["spec"])
    own = policy.base_model.model.model.layers[0].mlp.up_proj.scaling["default"]
    assert [m.scaling for m in spec.modules if "layers.0.mlp.up_proj" in m.weight] == [own]


def test_a_scaling_that_was_undone_is_served() -> None:
    policy = with_adapter(tiny_llama())
    scaled(policy)
    policy.base_model.model.model.layers[0].mlp.up_proj.unscale_layer()
    assert ServeAdapter("policy").handshake(ls.FactorSource(policy))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"up_proj": 3, r"layers\.1\.self_attn\.q_proj": 5}},
        {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 7}},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
)
def test_scalings_that_a_config_gives_are_served(settings: dict[str, Any]) -> None:
    assert ServeAdapter("policy").handshake(ls.FactorSource(with_adapter(tiny_llama(), **settings)))


def saved_twice() -> Any:
    model = with_adapter(tiny_llama(), modules_to_save=["lm_head"])
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    return model


def test_several_adapters_with_the_same_saved_module_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"'default', 'second'.*lm_head.*one at a time"):
        ls.MergedSource(saved_twice(), adapter=["default", "second"])
    ls.MergedSource(saved_twice(), adapter="second")


def test_tokens_that_two_adapters_train_or_no_vocabulary_has_are_refused() -> None:
    model = with_adapter(tiny_llama(), target_modules=["q_proj"], trainable_token_indices=[1, 5])
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 9]))
    with pytest.raises(MismatchError, match=r"embed_tokens.*second.*token 5"):
        ls.MergedSource(model, adapter=["default", "second"])
    ls.MergedSource(model, adapter="second")
    for source in SOURCES:
        with pytest.raises(MismatchError, match=r"token -1, expected 0 to"):
            source(with_adapter(tiny_llama(), target_modules=["q_proj"], trainable_token_indices=[-1]))


@pytest.mark.parametrize("adapter", [["default"], ("default", "second"), 3])
def test_factors_are_of_one_adapter(adapter: Any) -> None:
    with pytest.raises(AdapterError, match="expected one name"):
        ls.FactorSource(with_adapter(tiny_llama()), adapter=adapter)


def test_an_adapter_that_is_no_name_is_refused() -> None:
    with pytest.raises(AdapterError, match="got 3, expected a name"):
        ls.MergedSource(with_adapter(tiny_llama()), adapter=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float])
def test_a_dtype_is_a_floating_point_one(dtype: Any) -> None:
    if dtype is torch.float:
        ls.MergedSource(with_adapter(tiny_llama()), dtype=dtype)
        return
    with pytest.raises(TypeError, match=r"dtype.*floating-point"):
        ls.MergedSource(with_adapter(tiny_llama()), dtype=dtype)


def old_norm(module: nn.Module) -> None:
    nn.utils.weight_norm(module)


def new_norm(module: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(module)


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", amount=0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("compute", [old_norm, new_norm, pruned])
def test_a_base_weight_that_is_computed_is_refused(compute: Any, source: Any) -> None:
    model = tiny_llama()
    compute(model.model.layers[0].mlp.up_proj)
    with pytest.raises(UnmergeableError, match=r"layers\.0\.mlp\.up_proj.*computes weight"):
        source(with_adapter(model))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("compute", [old_norm, new_norm])
def test_so_is_a_factor(compute: Any, source: Any) -> None:
    model = with_adapter(tiny_llama())
    compute(model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"])
    with pytest.raises(UnmergeableError, match=r"layers\.0\.mlp\.up_proj.*lora_B computes its weight"):
        source(model)


def test_an_adapter_is_named_once() -> None:
    with pytest.raises(AdapterError, match="default twice"):
        ls.MergedSource(with_adapter(tiny_llama()), adapter=["default", "default"])


@pytest.mark.parametrize("source", SOURCES)
def test_a_model_of_inference_tensors_is_refused(source: Any) -> None:
    with torch.inference_mode():
        model = with_adapter(tiny_llama())
    with pytest.raises(AdapterError, match=r"inference_mode\(\)"):
        source(model)


@pytest.mark.parametrize("source", SOURCES)
def test_tokens_that_are_edited_in_place_are_the_ones_that_are_streamed(source: Any) -> None:
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}
    model, other = with_adapter(tiny_llama(), **settings), with_adapter(tiny_llama(), **settings)
    made = source(model)
    dict(made)
    for each in (model, other):
        layer = each.base_model.model.model.embed_tokens.token_adapter
        layer.token_indices["default"][:] = [2, 7]
    assert same(dict(made), dict(source(other)))
    if source is ls.FactorSource:
        assert [rows.rows for rows in made.spec().rows] == [(2, 7)]
