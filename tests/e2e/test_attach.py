"""Engines that somebody else has started without the backend."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

import pytest

import lorasync as ls
from lorasync.errors import EngineNotReadyError, MismatchError, SyncError
from lorasync.push import MergeInWorker, ServeAdapter, attach, connect
from tests import models
from tests.e2e.engines import ADAPTER_SLOTS, async_llm, check_alike, greedy, running_llm
from tests.models import tiny

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def expected(base):
    policy = tiny(base)
    models.move(policy, seed=3)
    with running_llm(base, dtype="float32") as llm, connect(ls.MergedSource(policy), llm) as sync:
        sync.send_weights()
        return greedy(llm)


@pytest.mark.parametrize(
    "engine",
    [{"in_process": True}, {"in_process": False}, {"tensor_parallel_size": 2}],
    ids=["in this process", "in another process", "TP=2"],
)
def test_an_attached_engine_takes_every_strategy(base, expected, engine):
    policy = tiny(base)
    models.move(policy, seed=3)
    with running_llm(base, backend=None, dtype="float32", **engine, **ADAPTER_SLOTS) as llm:
        before = greedy(llm)
        with pytest.raises(EngineNotReadyError, match=r"lorasync\.push\.attach"):
            connect(ls.MergedSource(policy), llm)
        assert attach(llm) is attach(llm) is llm
        assert greedy(llm) == before
        for source, apply in (
            (ls.FactorSource(policy), ServeAdapter("policy")),
            (ls.FactorSource(policy), MergeInWorker(base="device")),
            (ls.MergedSource(policy), None),
        ):
            # Linear layers are packed for the CPU: an adapter over them is served on somebody's word.
            unseen = isinstance(apply, ServeAdapter)
            with (
                pytest.warns(UserWarning, match="8 of its weights can't be read back")
                if unseen
                else nullcontext()
            ):
                sync = connect(source, llm, apply)
            with sync:
                sync.send_weights()
                check_alike(greedy(llm, **sync.request()), expected)


def test_an_engine_whose_weights_somebody_has_changed_before_is_not_taken_for_its_checkpoint(base, expected):
    """One element in one weight, which no sample of the handshake looks at."""
    policy = tiny(base)
    models.move(policy, seed=3)
    with running_llm(base, backend=None, in_process=True, dtype="float32", **ADAPTER_SLOTS) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        weight = worker.get_model().get_parameter("model.layers.1.input_layernorm.weight")
        weight.data[1] += 0.5
        attach(llm)
        with pytest.raises(SyncError, match=r"input_layernorm.*before it was attached"):
            connect(ls.FactorSource(policy), llm, ServeAdapter("policy"))
        with connect(ls.FactorSource(policy), llm, MergeInWorker(base="device")) as sync:
            sync.send_weights()
            check_alike(greedy(llm), expected)


def test_what_can_not_be_attached_is_refused_with_the_reason(base):
    for other in (object(), "http://localhost:8000", ls.MergedSource(tiny(base)), type):
        with pytest.raises(EngineNotReadyError, match=r"attach: got .*expected a vllm\.LLM"):
            attach(other)
    with running_llm(base, backend="ipc", in_process=True, dtype="float32") as llm:
        with pytest.raises(EngineNotReadyError, match="has the weight-transfer backend 'ipc', expected none"):
            attach(llm)
        llm.llm_engine.vllm_config.weight_transfer_config = None
        with pytest.raises(
            EngineNotReadyError, match=r"its workers keep .*IPC.*, expected lorasync's WorkerEngine"
        ):
            attach(llm)
        llm.llm_engine.vllm_config.parallel_config.pipeline_parallel_size = 2
        with pytest.raises(MismatchError, match="pipeline_parallel_size"):
            attach(llm)


def test_workers_without_lorasync_are_named(base, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "others")
    with (
        running_llm(base, backend=None, dtype="float32") as llm,
        pytest.raises(EngineNotReadyError, match="not left out by VLLM_PLUGINS"),
    ):
        attach(llm)


def test_an_async_engine_is_attached_from_another_thread(base, expected):
    asyncio.run(_attached(base, expected))


async def _attached(base, expected) -> None:
    from vllm import SamplingParams

    engine = async_llm(base, weight_transfer_config=None)
    policy = tiny(base)
    models.move(policy, seed=3)
    try:
        with pytest.raises(EngineNotReadyError, match="event loop"):
            attach(engine)
        await asyncio.to_thread(attach, engine)
        sync = await asyncio.to_thread(connect, ls.FactorSource(policy), engine, MergeInWorker(base="device"))
        await sync.send_weights_async()
        wanted = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        async for output in engine.generate("The capital of France is", wanted, "a"):
            last = output
        assert tuple(last.outputs[0].token_ids) == expected[0][0]
        await asyncio.to_thread(sync.shutdown)
    finally:
        engine.shutdown()
