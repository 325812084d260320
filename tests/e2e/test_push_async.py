"""Pushes to an AsyncLLM that is generating all the while."""

from __future__ import annotations

import asyncio

import pytest

import lorasync as ls
from lorasync.errors import EngineDeadError, SyncError, VersionGoneError
from lorasync.push import MergeInWorker, ServeAdapter, connect
from lorasync.verify import Canary
from tests import models
from tests.e2e.engines import ADAPTER_SLOTS, PROMPTS, async_llm, greedy, running_llm
from tests.e2e.faults import kill, worker_of
from tests.models import tiny

pytestmark = pytest.mark.timeout(400)
PUSHES = 6


@pytest.fixture(scope="module")
def expected(base) -> dict[int, list[tuple[int, ...]]]:
    """What each version answers, from an engine that is pushed to while nothing runs."""
    answers = {}
    with running_llm(base, dtype="float32") as llm:
        policy = tiny(base)
        with connect(ls.FactorSource(policy), llm, MergeInWorker(base="device")) as sync:
            for seed in range(2):
                models.move(policy, seed=seed)
                sync.send_weights()
                answers[seed] = [ids for ids, _ in greedy(llm)]
    assert answers[0] != answers[1]
    return answers


@pytest.mark.parametrize("strategy", ["merged", "factors", "adapter"])
def test_under_load_no_request_is_lost_and_the_last_push_is_served(base, expected, strategy):
    reports, finished = asyncio.run(_session(base, expected, strategy))
    assert [r.version for r in reports] == list(range(1, PUSHES + 1))
    assert all(r.canary is not None and r.canary.mean < 1e-3 for r in reports)
    if strategy != "adapter":
        assert all(r.stall_seconds is not None and 0 < r.stall_seconds < 60 for r in reports)
    assert finished > 0


async def _session(base: str, expected, strategy: str):
    from vllm import SamplingParams

    engine = async_llm(base, **(ADAPTER_SLOTS if strategy == "adapter" else {}))
    stop, finished, names = asyncio.Event(), 0, iter(range(10**6))

    async def ask(prompt: str, tokens: int, **request) -> tuple[int, ...]:
        wanted = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        async for output in engine.generate(prompt, wanted, f"r{next(names)}", **request):
            last = output
        assert last.finished
        assert len(last.outputs[0].token_ids) == tokens
        return tuple(last.outputs[0].token_ids)

    async def load() -> None:
        nonlocal finished
        while not stop.is_set():
            await ask("Once upon a time", 12, **sync.request())
            finished += 1

    policy = tiny(base)
    source = ls.MergedSource(policy) if strategy == "merged" else ls.FactorSource(policy)
    apply = {"merged": None, "factors": MergeInWorker(base="device"), "adapter": ServeAdapter("policy")}[
        strategy
    ]
    try:
        with pytest.raises(SyncError, match="event loop"):
            connect(source, engine, apply)
        canary = Canary(policy, engine, PROMPTS[:1])
        with pytest.raises(SyncError, match="event loop"):
            canary({})
        sync = await asyncio.to_thread(
            connect, source, engine, apply, pause="keep", timeout=120, canary=canary
        )
        reports = [await sync.send_weights_async()]
        other = Canary(tiny(base, seed=9, scale=0.05), engine, PROMPTS[:1])
        assert (await asyncio.to_thread(other, sync.request())).mean > 0.05
        users = [asyncio.create_task(load()) for _ in range(3)]
        for step in range(PUSHES - 1):
            models.move(policy, seed=step % 2)
            reports.append(await sync.send_weights_async())
            await asyncio.sleep(0.2)
        now = [await ask(prompt, 8, **sync.request()) for prompt in PROMPTS]
        assert now == expected[(PUSHES - 2) % 2]
        stop.set()
        await asyncio.wait_for(asyncio.gather(*users), 60)
        await asyncio.to_thread(sync.shutdown)
        return reports, finished
    finally:
        engine.shutdown()


def test_an_adapter_stays_until_the_requests_that_name_it_are_done(base):
    """VLLM ends the whole engine when a request names an adapter that is gone and can't be loaded from disk."""
    asyncio.run(_outlived(base))


async def _outlived(base: str) -> None:
    from vllm import SamplingParams

    engine = async_llm(base, **ADAPTER_SLOTS, max_cpu_loras=3)

    async def ask(name: str, tokens: int, **request) -> tuple[int, ...]:
        wanted = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        async for output in engine.generate("Once upon a time", wanted, name, **request):
            last = output
        return tuple(last.outputs[0].token_ids)

    try:
        policy = tiny(base)
        source = ls.FactorSource(policy)
        sync = await asyncio.to_thread(connect, source, engine, ServeAdapter("policy"), timeout=120)
        await sync.send_weights_async()
        first = sync.request()
        alone = await ask("alone", 100, **first)
        slow = asyncio.create_task(ask("slow", 100, **first))
        await asyncio.sleep(0.05)
        models.move(policy, seed=1)
        await sync.send_weights_async()
        beside = await ask("beside", 20, **sync.request())
        pushed = 1
        while not slow.done():
            models.move(policy, seed=1 + pushed)
            assert sync.request()
            await sync.send_weights_async()
            pushed += 1
            if pushed == 3:
                assert not slow.done(), "too fast to prove anything"
                assert 1_000_001 in await engine.list_loras()
        assert await slow == alone
        assert sync.request()
        models.move(policy, seed=0)
        await sync.send_weights_async()
        assert await ask("last", 100, **sync.request()) == alone
        models.move(policy, seed=1)
        await sync.send_weights_async()
        assert await ask("last beside", 20, **sync.request()) == beside != alone[:20]
        assert 1_000_001 not in await engine.list_loras()
        await asyncio.to_thread(sync.shutdown)
        assert not await engine.list_loras()
    finally:
        engine.shutdown()


@pytest.mark.parametrize("on_gone", ["refuse", "newest"])
def test_a_rollout_of_several_turns_that_keeps_its_request_ends_no_engine(base, on_gone):
    """Between two turns nothing is in flight, and the version that the request names goes."""
    asyncio.run(_turns(base, on_gone))


async def _turns(base: str, on_gone: str) -> None:
    from vllm import SamplingParams

    engine, names = async_llm(base, **ADAPTER_SLOTS, max_cpu_loras=3), iter(range(10**6))
    policy, pushes, pushed, gone = tiny(base), asyncio.Event(), 0, 0

    async def turn(tokens: int = 8, **request) -> tuple[int, ...]:
        wanted = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        async for output in engine.generate("Once upon a time", wanted, f"r{next(names)}", **request):
            last = output
        return tuple(last.outputs[0].token_ids)

    async def rollout(waits_for: int) -> None:
        """Turns with one request; between two of them a number of pushes, however fast these are."""
        nonlocal gone
        while not pushes.is_set():
            kept = sync.request()
            try:
                for _ in range(6):
                    await turn(tokens=2, **kept)
                    before = pushed
                    await asyncio.sleep(0.02)
                    while pushed < before + waits_for and not pushes.is_set():
                        await asyncio.sleep(0.02)
            except VersionGoneError:
                gone += 1

    try:
        sync = await asyncio.to_thread(
            connect, ls.FactorSource(policy), engine, ServeAdapter("p"), timeout=120, on_gone=on_gone
        )
        await sync.send_weights_async()
        first = sync.request()
        assert await turn(**first)
        for seed in (1, 2, 3):
            models.move(policy, seed=seed)
            await sync.send_weights_async()
            newest = await turn(**sync.request())
        if on_gone == "refuse":
            with pytest.raises(VersionGoneError, match="p@1"):
                await turn(**first)
        else:
            assert await turn(**first) == newest
        assert await turn(**sync.request()) == newest
        users = [asyncio.create_task(rollout(waits_for)) for waits_for in (0, 0, 4, 4)]
        for seed in range(12):
            models.move(policy, seed=seed)
            await sync.send_weights_async()
            pushed += 1
            await asyncio.sleep(0.02)
        pushes.set()
        await asyncio.wait_for(asyncio.gather(*users), 60)
        assert bool(gone) == (on_gone == "refuse")
        with pytest.raises(SyncError, match="event loop"):  # it would wait for itself
            sync.shutdown()
        assert await turn(**sync.request())
        await asyncio.to_thread(sync.shutdown)
        with pytest.raises(VersionGoneError, match="shut down"):
            await turn(**first)
        assert await turn()
    finally:
        engine.shutdown()


def test_connecting_again_under_load_ends_no_request_and_no_engine(base):
    asyncio.run(_connected_again(base))


async def _connected_again(base: str) -> None:
    from vllm import SamplingParams

    engine = async_llm(base, **ADAPTER_SLOTS, max_cpu_loras=4)
    policy, stop, names = tiny(base), asyncio.Event(), iter(range(10**6))

    async def load() -> None:
        wanted = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        while not stop.is_set():
            async for output in engine.generate("Once upon", wanted, f"r{next(names)}", **sync.request()):
                last = output
            assert last.finished

    try:
        sync = await asyncio.to_thread(
            connect, ls.FactorSource(policy), engine, ServeAdapter("p"), timeout=120
        )
        await sync.send_weights_async()
        users = [asyncio.create_task(load()) for _ in range(3)]
        for _ in range(3):
            old = sync
            sync = await asyncio.to_thread(
                connect, ls.FactorSource(policy), engine, ServeAdapter("p"), timeout=120
            )
            assert old.request()["lora_request"].lora_int_id == sync.request()["lora_request"].lora_int_id
            await sync.send_weights_async()
            await asyncio.sleep(0.2)
            with pytest.raises(SyncError, match="another trainer has taken the engine over"):
                old.request()
        stop.set()
        await asyncio.wait_for(asyncio.gather(*users), 60)
        await asyncio.to_thread(sync.shutdown)
        assert not await engine.list_loras()
    finally:
        engine.shutdown()


def test_a_worker_that_dies_while_it_stages_is_noticed_at_once(base, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # or the worker is in the engine core
    asyncio.run(_killed(base))


async def _killed(base: str) -> None:
    """No call of vLLM's is under way: nothing but `check_alive` can notice."""
    engine = async_llm(base, worker_extension_cls="tests.e2e.faults.SlowStaging")
    try:
        sync = await asyncio.to_thread(
            connect, ls.FactorSource(tiny(base)), engine, MergeInWorker(base="device"), timeout=60
        )
        await sync.send_weights_async()
        await engine.collective_rpc("stage_slowly", args=(60.0,))
        push = asyncio.create_task(sync.send_weights_async())
        await asyncio.sleep(2)
        assert not push.done()
        kill(worker_of(engine))
        with pytest.raises(EngineDeadError, match="Restart the engine"):
            await asyncio.wait_for(push, 20)
        await asyncio.to_thread(sync.shutdown)
    finally:
        engine.shutdown()
