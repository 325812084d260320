"""The reported stall, held against the gap in the tokens that an AsyncLLM under load streams."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

import lorasync as ls
from lorasync.push import MergeInWorker, ServeAdapter, connect
from lorasync.receive.adapter import AdapterApplier
from lorasync.receive.factors import FactorApplier
from lorasync.receive.load import LoadApplier
from tests.e2e.engines import async_llm
from tests.e2e.faults import from_the_middle
from tests.models import tiny

SOURCE, COMMIT = 2.0, 1.0
"""Seconds that a push takes at its two ends, far above what a busy machine adds to them."""
APPLIES = {"adapter": ServeAdapter("policy"), "factors": MergeInWorker(base="device"), "merged": None}


class SlowCommits:
    """Mixed into vLLM's worker."""

    def slow_commits(self) -> None:
        for applier in (AdapterApplier, FactorApplier, LoadApplier):
            applier.commit = _slowed(applier.commit)  # type: ignore[method-assign]


def _slowed(commit: Any) -> Any:
    def slow(*arguments: Any) -> Any:
        time.sleep(COMMIT)
        return commit(*arguments)

    return slow


def _slow_source(source: Any) -> Any:
    def wait(name: str, tensor: Any) -> list[tuple[str, Any]]:
        time.sleep(SOURCE)
        return [(name, tensor)]

    return from_the_middle(source, wait)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()


@pytest.fixture(scope="module")
def engine(base, loop) -> Iterator[Any]:
    async def start() -> Any:
        lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
        return async_llm(base, worker_extension_cls=f"{__name__}.SlowCommits", **lora)

    made = asyncio.run_coroutine_threadsafe(start(), loop).result()
    asyncio.run_coroutine_threadsafe(made.collective_rpc("slow_commits"), loop).result()
    yield made
    made.shutdown()


@pytest.mark.parametrize("strategy", APPLIES)  # an adapter is refused over weights that a push has changed
def test_the_stall_of_a_push_is_the_gap_in_the_stream_of_tokens(engine, loop, base, strategy):
    source = (ls.MergedSource if strategy == "merged" else ls.FactorSource)(tiny(base))
    with connect(source, engine, APPLIES[strategy], timeout=60) as sync:
        sync.send_weights()
        with _Load(engine, loop, sync.request()) as load:
            load.wait_for_tokens()
            sync.source = _slow_source(source)
            began = time.monotonic()
            report = sync.send_weights()
            load.wait_for_tokens()
    gap = max(b - a for a, b in pairwise(load.stamps) if b > began)
    stall = report.stall_seconds
    expected = SOURCE + COMMIT if strategy == "merged" else COMMIT  # all else is staged beside what is served
    assert expected <= stall < expected + 1.5
    assert 0.9 * stall < gap < 1.5 * stall + 0.5


class _Load:
    """Three users, and the time of every token that they get."""

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop, request: dict[str, Any]) -> None:
        self.stamps: list[float] = []
        self._engine, self._loop, self._request = engine, loop, request
        self._stop = False

    def __enter__(self) -> _Load:
        self._users = [asyncio.run_coroutine_threadsafe(self._user(n), self._loop) for n in range(3)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        for user in self._users:
            user.result(60)

    def wait_for_tokens(self) -> None:
        enough, deadline = len(self.stamps) + 30, time.monotonic() + 60
        while len(self.stamps) < enough:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    async def _user(self, number: int) -> None:
        from vllm import SamplingParams

        wanted = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
        for turn in range(10**6):
            name = f"{id(self)}-{number}-{turn}"
            async for _ in self._engine.generate("Once upon a time", wanted, name, **self._request):
                self.stamps.append(time.monotonic())
            if self._stop:
                return
