"""The policy inside of whatever wraps it: the same stream, names and conversions as of the PEFT model itself."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lorasync as ls
from lorasync.errors import AdapterError
from tests.models import move, tiny_llama, with_adapter

SOURCES = [ls.MergedSource, ls.FactorSource]


class Actor(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class ValueHead(nn.Module):
    """As TRL's `AutoModelForCausalLMWithValueHead`, whose head is trained and no part of the policy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Linear(4, 1)


class Trainer:
    """No module: an object that holds one, and numbers."""

    def __init__(self, model: nn.Module) -> None:
        self.actor, self.steps = model, 3


def layers_of(model):
    return model.base_model.model.model.layers


def checkpointed(model):
    layers = layers_of(model)
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    return model


def compiled_layers(model):
    layers = layers_of(model)
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer)
    return model


def compiled_in_checkpointed(model):
    first = layers_of(checkpointed(model))[0]._checkpoint_wrapped_module
    first.self_attn = torch.compile(checkpoint_wrapper(first.self_attn))
    return model


def compiled_adapter_layers(model):
    mlp = layers_of(model)[0].mlp
    mlp.up_proj = torch.compile(mlp.up_proj)
    mlp.down_proj.base_layer = torch.compile(mlp.down_proj.base_layer)
    return model


WRAPPED = {
    "an actor": Actor,
    "an actor in an actor": lambda model: Actor(Actor(model)),
    "a value head": ValueHead,
    "data parallel, over a value head": lambda model: nn.DataParallel(ValueHead(model)),
    "an object": Trainer,
    "the tuner alone": lambda model: model.base_model,
    "compiled": torch.compile,
    "compiled layers": compiled_layers,
    "checkpointed layers": checkpointed,
    "compiled parts of checkpointed layers": compiled_in_checkpointed,
    "compiled adapter layers": compiled_adapter_layers,
}


def policy():
    model = with_adapter(tiny_llama(), modules_to_save=["lm_head"])
    move(model, seed=1)
    return model


def same(got, expected):
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_policy_streams_what_the_bare_one_does(wrap, source):
    model = policy()
    same(dict(source(wrap(copy.deepcopy(model)))), dict(source(model)))


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_its_spec_is_the_same_too(wrap):
    model = policy()
    assert ls.FactorSource(wrap(copy.deepcopy(model))).spec() == ls.FactorSource(model).spec()


@pytest.mark.parametrize("source", SOURCES)
def test_several_policies_are_refused_with_their_paths(source):
    both = nn.Module()
    both.actor, both.reference = policy(), policy()
    with pytest.raises(AdapterError, match=r"2 policies inside.*model\.actor, model\.reference"):
        source(both)
    source(both.actor)


def test_peft_around_a_part_of_the_model_keeps_the_models_names():
    whole = with_adapter(tiny_llama(), target_modules=["q_proj"])
    model = tiny_llama()
    for param in model.parameters():
        param.requires_grad_(False)
    model.model = get_peft_model(model.model, LoraConfig(r=8, target_modules=["q_proj"]))
    merged, expected = ls.MergedSource(model).metadata(), ls.MergedSource(whole).metadata()
    assert merged == expected
    assert [m.name for m in ls.FactorSource(model).metadata()] == [
        m.name for m in ls.FactorSource(whole).metadata()
    ]


def test_a_head_that_is_trained_beside_such_a_part_is_named():
    model = tiny_llama()
    model.model = get_peft_model(model.model, LoraConfig(r=8, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"lm_head\.weight"):
        ls.FactorSource(model)
