"""An engine that is a vLLM `AsyncLLM` in this process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from lorasync.errors import EngineNotReadyError, SyncError
from lorasync.targets.base import METHOD
from lorasync.targets.event_loop import check_elsewhere, run_on
from lorasync.targets.front import adapters_of, checked_config
from lorasync.targets.patience import Patience, dead, death_of
from lorasync.vllm_seam.layout import replicas_of, workers_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasync.targets.base import Pause


class AsyncLLMTarget:
    """A vLLM `AsyncLLM`, driven from another thread than the one of its event loop."""

    in_process = spread = False
    generates_meanwhile = True

    def __init__(self, engine: Any, *, timeout: float, pause: Pause, attaching: bool = False) -> None:
        parallel = checked_config(engine.vllm_config, attaching=attaching)
        if engine.output_handler is None:
            raise EngineNotReadyError(
                "AsyncLLM: got one that no event loop runs, expected one made inside of a running loop. Make it in a "
                "coroutine, and connect from there with: await asyncio.to_thread(connect, source, engine)"
            )
        self.workers = workers_of(parallel)
        self._replicas = replicas_of(parallel)
        self._engine = engine
        self.engine = engine.engine_core
        self._loop: asyncio.AbstractEventLoop = engine.output_handler.get_loop()
        self.patience = Patience(timeout)
        self._mode = pause
        self._paused = False

    def check_able(self, *, changes_weights: bool, multimodal: bool = False) -> None:
        """All of it is vLLM's own."""

    def check_elsewhere(self) -> None:
        check_elsewhere(self._loop, instead="await asyncio.to_thread(sync.shutdown)")

    def call(self, message: dict[str, Any], payload: Any) -> list[Any]:
        """Give a message to every worker of every replica."""
        return self.everywhere(METHOD, (message, payload))

    def everywhere(self, method: str, arguments: tuple[Any, ...]) -> list[Any]:
        """Call a method of every worker of every replica; return what each returns."""
        if self._replicas == 1:
            return list(self._run(lambda: self._engine.collective_rpc(method, args=arguments)))
        answers = self._run(lambda: _of_all_replicas(self._engine.engine_core, method, arguments))
        return [answer for replica in answers for answer in replica]

    def name_version(self, version: str) -> None:
        name = getattr(self._engine, "update_weight_version", None)  # up to 0.27 there is none
        if name is not None:
            self._run(lambda: name(version))

    def reset_caches(self) -> None:
        if self._paused:  # cleared, and nothing was computed since
            return
        if self._run(lambda: self._engine.reset_prefix_cache(reset_running_requests=True)) is not True:
            raise SyncError("prefix cache: vLLM did not reset it, expected an empty cache. Push again.")
        self._run(self._engine.reset_encoder_cache)

    def pause(self) -> None:
        """With all caches cleared: the keys and values of requests that are kept are computed anew by the new version."""
        core = self._engine.engine_core
        if self._mode == "keep" and hasattr(core, "pause_scheduler_async"):
            # `pause_generation` calls this and then sleeps for 20 ms, so that its caller sees outputs first.
            self._run(self._keep)
        else:
            self._run(lambda: self._engine.pause_generation(mode=self._mode, clear_cache=True))
        self._paused = True

    async def _keep(self) -> None:
        """The core forgets the inputs that it got by their hashes: the front end has to as well."""
        await self._engine.renderer.clear_mm_cache_async()
        await self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)

    def resume(self) -> None:
        self._run(self._engine.resume_generation)
        self._paused = False

    def adapters_in_flight(self) -> frozenset[int]:
        return adapters_of(self._engine)

    def settle(self) -> None:
        """VLLM's front end takes a request in one step of the loop: after the next one it is there."""
        self._run(_nothing)

    def check_alive(self) -> None:
        if self._engine.errored:
            raise dead("The vLLM engine", death_of(self._engine.engine_core))

    def _run(self, make: Callable[[], Any]) -> Any:
        """Run a coroutine on the engine's loop and wait for it here.

        Raises:
            SyncError: on the loop's own thread, where waiting would stop the engine that is waited for.
            SyncTimeoutError: if it does not end in time.
        """
        core = self._engine.engine_core
        return run_on(
            self._loop,
            make,
            lambda result: self.patience.call(result, "The AsyncLLM", died=lambda: death_of(core)),
            instead="await sync.send_weights_async(), or await asyncio.to_thread(connect, source, engine)",
        )


async def _nothing() -> None:
    """One step of an event loop."""


async def _of_all_replicas(core: Any, method: str, arguments: tuple[Any, ...]) -> list[list[Any]]:
    """What the workers of every data-parallel replica answer; vLLM's own call returns only the first replica's."""
    call = ("collective_rpc", method, None, arguments, None)
    if hasattr(core, "call_utility_all_async"):
        return list(await core.call_utility_all_async(*call))
    waiting = [core._call_utility_async(*call, engine=engine) for engine in core.core_engines]
    return list(await asyncio.gather(*waiting))
