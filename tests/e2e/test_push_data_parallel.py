"""Data-parallel replicas behind one `AsyncLLM`: each is heard, each takes every push."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import lorasync as ls
from lorasync.errors import SyncError
from lorasync.push import MergeInWorker, ServeAdapter, connect
from tests import models
from tests.e2e.engines import ADAPTER_SLOTS, PROMPTS, async_llm, greedy, running_llm
from tests.models import tiny

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def expected(base) -> dict[int, list[tuple[int, ...]]]:
    """What fresh engines on merged checkpoints answer."""
    answers = {}
    for seed in (1, 2):
        policy = tiny(base)
        models.move(policy, seed=seed)
        with running_llm(base, dtype="float32") as llm, connect(ls.MergedSource(policy), llm) as sync:
            sync.send_weights()
            answers[seed] = [ids for ids, _ in greedy(llm)]
    return answers


def test_every_replica_takes_every_push_or_none_does(base, expected):
    asyncio.run(_pushed(base, expected))


async def _pushed(base: str, expected: dict[int, list[tuple[int, ...]]]) -> None:
    engine = async_llm(base, data_parallel_size=2, **ADAPTER_SLOTS)
    policy = tiny(base)
    try:
        for source, apply in (
            (ls.FactorSource(policy), ServeAdapter("policy")),
            (ls.FactorSource(policy), MergeInWorker(base="device")),
            (ls.MergedSource(policy), None),
        ):
            sync = await asyncio.to_thread(connect, source, engine, apply, timeout=120)
            for seed in (1, 2):
                models.move(policy, seed=seed)
                report = await sync.send_weights_async()
                assert report.ranks == 2
                assert await _asked_of_each(engine, sync) == [expected[seed]] * 2
            if apply is not None:
                await asyncio.to_thread(sync.rollback)
                assert await _asked_of_each(engine, sync) == [expected[1]] * 2
            await _refused_by_the_second(engine, sync, policy)
            await asyncio.to_thread(sync.shutdown)
    finally:
        engine.shutdown()


async def _asked_of_each(engine: Any, sync: Any) -> list[list[tuple[int, ...]]]:
    """The same prompts of both replicas, by their numbers."""
    return [[await _ask(engine, p, rank, sync.request()) for p in PROMPTS] for rank in range(2)]


async def _ask(engine: Any, prompt: str, rank: int, request: dict[str, Any]) -> tuple[int, ...]:
    from vllm import SamplingParams

    _ask.count = getattr(_ask, "count", 0) + 1  # type: ignore[attr-defined]
    wanted = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    async for output in engine.generate(
        prompt,
        wanted,
        f"dp{_ask.count}",
        data_parallel_rank=rank,
        **request,  # type: ignore[attr-defined]
    ):
        last = output
    return tuple(last.outputs[0].token_ids)


async def _refused_by_the_second(engine: Any, sync: Any, policy: Any) -> None:
    """A replica that does not get what was sent is told apart from the other, and neither is left on another version."""
    target, before = sync._engines.sessions[0].target, sync.version
    everywhere = target.everywhere

    def half(method: str, arguments: tuple[Any, ...]) -> list[Any]:
        answers = everywhere(method, arguments)
        return answers[:1] if arguments[0]["op"] == "commit" else answers

    target.everywhere = half
    with pytest.raises(SyncError, match=r"got 1 of worker ranks \[0\], expected 2"):
        await sync.send_weights_async()
    target.everywhere = everywhere
    report = await sync.send_weights_async()
    assert report.ranks == 2
    assert sync.version == report.version > before
