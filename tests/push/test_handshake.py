"""What was agreed on in the handshake still holds at each push of factors, or the push is refused and nothing is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorasync as ls
from lorasync.errors import MismatchError
from lorasync.push import MergeInWorker, ServeAdapter, connect
from tests import models
from tests.stub_engine import StubLLM

APPLIES = {"factors": MergeInWorker(base="device"), "adapter": ServeAdapter("policy")}


def policy(**settings: Any) -> Any:
    return models.with_adapter(models.tiny_llama(), **settings)


@pytest.fixture(params=APPLIES)
def apply(request) -> Any:
    return APPLIES[request.param]


def layer_of(model: Any) -> Any:
    return model.base_model.model.model.layers[0].mlp.up_proj


def in_place(model: Any) -> None:
    layer_of(model).base_layer.weight.data.mul_(1)  # through .data: not seen, and changes nothing
    with torch.no_grad():
        layer_of(model).base_layer.weight.add_(0.5)


def relora(model: Any) -> None:
    """The adapter is merged into the base and begun anew."""
    layer = layer_of(model)
    with torch.no_grad():
        layer.base_layer.weight.copy_(layer.base_layer.weight + layer.get_delta_weight("default"))
    layer.reset_lora_parameters("default", init_lora_weights=True)


def other_state(model: Any) -> None:
    other = models.tiny_llama()
    with torch.no_grad():
        for param in other.parameters():
            param.add_(0.01)
    state = {n: p.clone() for n, p in other.state_dict().items()}
    names = {
        n.replace(".base_layer.", "."): n
        for n, _ in model.base_model.model.named_parameters()
        if "lora_" not in n
    }
    model.base_model.model.load_state_dict(
        {names[n]: t for n, t in state.items() if n in names}, strict=False
    )


def other_norm(model: Any) -> None:
    norm = model.base_model.model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 2, requires_grad=False)


CHANGES = {
    "in place": in_place,
    "ReLoRA": relora,
    "load_state_dict": other_state,
    "a norm is replaced": other_norm,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_base_that_changed_since_the_handshake_is_refused_and_nothing_is_sent(change, apply):
    model, llm = policy(), StubLLM()
    models.move(model, seed=1)
    with connect(ls.FactorSource(model), llm, apply, timeout=20) as sync:
        sync.send_weights()
        sync.request()
        change(model)
        before = list(llm.calls)
        with pytest.raises(
            MismatchError, match=r"(?s)not what it was at connect.*another base weight.*connect\(\) again"
        ):
            sync.send_weights()
        assert llm.calls == before
        assert sync.version == 1


def test_the_same_base_written_again_is_taken(apply):
    model, llm = policy(), StubLLM()
    with connect(ls.FactorSource(model), llm, apply, timeout=20) as sync:
        sync.send_weights()
        sync.request()
        weight = layer_of(model).base_layer.weight
        with torch.no_grad():
            weight.copy_(weight.clone())
        models.move(model, seed=1)
        assert sync.send_weights().version == 2


def test_a_base_that_is_not_compared_may_change():
    model, llm = policy(), StubLLM()
    with connect(ls.FactorSource(model), llm, ServeAdapter("policy", other_base=True), timeout=20) as sync:
        sync.send_weights()
        sync.request()
        in_place(model)
        assert sync.send_weights().version == 2


def test_another_source_of_another_kind_under_the_same_names_is_refused():
    llm = StubLLM()
    settings = {"target_modules": ["q_proj"]}
    first, second = (policy(**settings, trainable_token_indices=rows) for rows in ([1, 5], [2, 7]))
    with connect(ls.FactorSource(first), llm, APPLIES["factors"], timeout=20) as sync:
        sync.send_weights()
        sync.source = ls.FactorSource(second)
        with pytest.raises(MismatchError, match=r"(?s)embed_tokens.*rows \[2, 7\].*rows \[1, 5\]"):
            sync.send_weights()
        sync.source = ls.FactorSource(first)
        assert sync.send_weights().version == 2


def test_another_source_over_the_same_base_is_taken(apply):
    llm, first, second = StubLLM(), policy(), policy()
    models.move(second, seed=7)
    with connect(ls.FactorSource(first), llm, apply, timeout=20) as sync:
        sync.send_weights()
        sync.request()
        sync.source = ls.FactorSource(second)
        assert sync.send_weights().version == 2


def test_a_push_of_an_unchanged_model_describes_nothing_anew(monkeypatch, apply):
    model, llm = policy(), StubLLM()
    with connect(ls.FactorSource(model), llm, apply, timeout=20) as sync:
        sync.send_weights()
        sync.request()
        monkeypatch.setattr(type(apply), "handshake", None)
        models.move(model, seed=1)
        assert sync.send_weights().version == 2
