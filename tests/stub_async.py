"""An `AsyncLLM` around the workers of stub engines: an event loop in a thread of its own, and one replica or several."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from tests.stub_engine import StubLLM


class Core:
    """VLLM's client of engine cores, which is asked for one after the other."""

    def __init__(self, replicas: list[StubLLM]) -> None:
        self.core_engines = [bytes([n]) for n in range(len(replicas))]
        self._replicas = dict(zip(self.core_engines, replicas, strict=True))

    async def _call_utility_async(self, utility: str, *args: Any, engine: bytes) -> Any:
        assert utility == "collective_rpc"
        method, timeout, arguments, kwargs = args
        return self._replicas[engine].collective_rpc(method, timeout, arguments, kwargs)


class AllAtOnce(Core):
    """The same, of a vLLM that asks all of them in one call."""

    async def call_utility_all_async(self, utility: str, *args: Any) -> list[Any]:
        return [await self._call_utility_async(utility, *args, engine=engine) for engine in self.core_engines]


class SchedulerPauses(Core):
    """The same, of a vLLM whose core can pause its scheduler."""

    async def pause_scheduler_async(self, *, mode: str, clear_cache: bool) -> None:
        assert clear_cache
        self._replicas[self.core_engines[0]].happens(f"pause_scheduler {mode}")


class StubAsyncLLM:
    """Looks like a vLLM `AsyncLLM`; what it was asked for is in the ``calls`` of its first replica.

    Args:
        loop: runs in another thread.
        replicas: how many data-parallel replicas it has.
        workers: how many workers each of them has.
        core: how its engine cores are asked.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        replicas: int = 1,
        workers: int = 1,
        core: type[Core] = Core,
        **parallel: Any,
    ) -> None:
        layout = {"data_parallel_size": replicas, **parallel}
        self.replicas = [StubLLM(workers=workers, data_parallel_index=n, **layout) for n in range(replicas)]
        self.first = self.replicas[0]
        self.vllm_config = self.first.vllm_config
        self.engine_core = core(self.replicas)
        self.output_handler: Any = SimpleNamespace(get_loop=lambda: loop)
        self.output_processor = self.first
        self.renderer = SimpleNamespace(clear_mm_cache_async=self._clear_mm_cache)
        self.errored = False

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        return self.first.collective_rpc(method, timeout, args, kwargs)

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert clear_cache
        self.first.happens(f"pause {mode}")

    async def resume_generation(self) -> None:
        self.first.happens("resume")

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        assert reset_running_requests
        return self.first.reset_prefix_cache()

    async def reset_encoder_cache(self) -> None:
        self.first.reset_encoder_cache()

    async def update_weight_version(self, version: str) -> None:
        self.first.set_weight_version(version)

    async def _clear_mm_cache(self) -> None:
        self.first.happens("clear_mm_cache")


@contextlib.contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in another thread until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_others_ended(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


async def _others_ended() -> None:
    """Let the tasks that were given up end, as they would while an engine goes on."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
