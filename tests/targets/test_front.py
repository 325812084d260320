"""What is read from vLLM's front end: its config, and the adapters that unfinished requests name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lorasync.errors import EngineNotReadyError, MismatchError
from lorasync.targets.front import adapters_of, backend_of, checked_config


def engine(**requests: object) -> SimpleNamespace:
    return SimpleNamespace(output_processor=SimpleNamespace(request_states=requests))


def state(lora_request: object, lora_name: str = "") -> SimpleNamespace:
    """VLLM's `RequestState`, which keeps the name from when the request came."""
    return SimpleNamespace(lora_request=lora_request, lora_name=lora_name)


def test_the_adapters_in_flight_are_those_that_the_engine_was_told_of():
    own, base = SimpleNamespace(lora_int_id=7), None
    led = SimpleNamespace(lora_int_id=1_000_009, _issued=object())  # came for version 3, leads to 9 since
    assert adapters_of(engine()) == frozenset()
    found = adapters_of(engine(a=state(own, "mine"), b=state(base), c=state(led, "team@x@3"), d=state(own)))
    assert found == {7, 1_000_003}


@pytest.mark.parametrize(
    ("config", "backend"),
    [
        (SimpleNamespace(), None),  # a vLLM without weight transfer
        (SimpleNamespace(weight_transfer_config=None), None),
        (SimpleNamespace(weight_transfer_config=SimpleNamespace(backend="nccl")), "nccl"),
        (SimpleNamespace(weight_transfer_config=SimpleNamespace(backend="lorasync")), "lorasync"),
    ],
)
def test_an_engine_with_another_backend_is_refused_with_all_ways_to_give_it_ours(config, backend):
    config.parallel_config = SimpleNamespace(world_size=1)
    assert backend_of(config) == backend
    assert checked_config(config, attaching=True) is config.parallel_config
    if backend == "lorasync":
        assert checked_config(config) is config.parallel_config
        return
    ways = r"LLM\(.*weight_transfer_config=.*vllm serve --weight-transfer-config.*push\.attach\(llm\)"
    with pytest.raises(EngineNotReadyError, match=rf"got {backend!r}, expected 'lorasync'.*{ways}"):
        checked_config(config)


@pytest.mark.parametrize("attaching", [True, False])
def test_a_layout_that_a_push_does_not_reach_is_said_before_the_backend(attaching):
    config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=2, pipeline_parallel_size=2))
    with pytest.raises(MismatchError, match="pipeline_parallel_size"):
        checked_config(config, attaching=attaching)
