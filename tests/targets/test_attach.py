"""Engines that are given the backend after their start, and why some can't be; real ones: tests/e2e/test_attach.py."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lorasync.errors import EngineNotReadyError, MismatchError
from lorasync.plugin import ATTACH
from lorasync.targets.attach import attach
from lorasync.targets.front import backend_of
from lorasync.targets.kinds import target_of
from tests.stub_async import StubAsyncLLM, running_loop
from tests.stub_engine import Client, StubLLM, raising

OURS = {"backend": "WorkerEngine", "attached": True}


class Plain(StubLLM):
    """A `vllm.LLM` that was started without the backend; its workers answer what they keep after having been asked."""

    def __init__(self, answer: Callable[[], list[Any]], **more: Any) -> None:
        super().__init__(**more)
        self.vllm_config.weight_transfer_config = None
        self.answer = answer

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        assert (method, args) == (ATTACH, ())
        self.calls.append(method)
        return self.answer()


def test_an_engine_whose_workers_have_taken_the_backend_takes_pushes():
    llm = Plain(lambda: [OURS, OURS], workers=2)
    assert attach(llm) is llm
    assert backend_of(llm.vllm_config) == "lorasync"
    assert target_of(llm, timeout=5.0).workers == 2
    assert attach(llm) is llm
    assert llm.calls == [ATTACH], "its workers are asked once"


def test_an_async_engine_is_asked_on_its_own_loop():
    with running_loop() as loop:
        engine = StubAsyncLLM(loop)
        engine.first = Plain(lambda: [OURS])
        engine.vllm_config.weight_transfer_config = None
        assert attach(engine) is engine
        assert engine.first.calls == [ATTACH]
        assert backend_of(engine.vllm_config) == "lorasync"


@pytest.mark.parametrize("other", [None, 5, "http://host:8000", Client(StubLLM()), StubLLM, StubAsyncLLM])
def test_what_is_no_engine_of_this_process_is_refused_with_the_flag(other):
    got = f"the class {other.__name__}" if isinstance(other, type) else type(other).__name__
    with pytest.raises(EngineNotReadyError, match=rf"attach: got {got}, expected .*--weight-transfer-config"):
        attach(other)


def test_an_engine_that_has_another_backend_keeps_it():
    llm = Plain(lambda: [OURS])
    llm.vllm_config.weight_transfer_config = SimpleNamespace(backend="nccl")
    with pytest.raises(EngineNotReadyError, match=r"has the weight-transfer backend 'nccl', expected none"):
        attach(llm)
    assert llm.calls == []
    assert backend_of(llm.vllm_config) == "nccl"


def test_an_engine_that_a_push_would_reach_in_part_only_is_refused_before_it_is_asked():
    llm = Plain(lambda: [OURS], workers=2, pipeline_parallel_size=2)
    with pytest.raises(MismatchError, match="pipeline_parallel_size"):
        attach(llm)
    assert llm.calls == []


class LazyLLM:
    """A class that looks like an engine, as its attributes are properties."""

    llm_engine = property(lambda self: self)


def test_a_class_that_looks_like_an_engine_is_refused_as_a_class():
    with pytest.raises(EngineNotReadyError, match="got the class LazyLLM"):
        attach(LazyLLM)


NCCL = {"backend": "NCCLWeightTransferEngine", "attached": False}


@pytest.mark.parametrize(
    ("answers", "kept"), [([NCCL], "NCCLWeightTransferEngine"), ([OURS, NCCL], "NCCL"), ([], "nothing")]
)
def test_workers_that_keep_something_else_are_told_and_the_config_stays(answers, kept):
    llm = Plain(lambda: answers)
    with pytest.raises(
        EngineNotReadyError, match=rf"its workers keep {kept}.*expected lorasync's WorkerEngine"
    ):
        attach(llm)
    assert backend_of(llm.vllm_config) is None


def test_workers_that_do_not_know_lorasync_are_told_as_such():
    llm = Plain(raising(AttributeError(f"no attribute {ATTACH}")))
    with pytest.raises(EngineNotReadyError, match=r"\(AttributeError: no attribute.*VLLM_PLUGINS") as caught:
        attach(llm)
    assert isinstance(caught.value.__cause__, AttributeError)
    assert backend_of(llm.vllm_config) is None
