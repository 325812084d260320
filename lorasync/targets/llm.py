"""VLLM's own objects in this process: an `LLM` and an `AsyncLLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.errors import EngineNotReadyError, SyncError
from lorasync.plugin import BACKEND
from lorasync.targets.event_loop import check_elsewhere, run_on
from lorasync.targets.patience import Patience, dead, death_of
from lorasync.vllm_seam.layout import check_layout
from lorasync.wire import ADAPTER_IDS

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from lorasync.targets.base import Pause

FLAG = f"""--weight-transfer-config '{{"backend": "{BACKEND}"}}'"""
ARGUMENT = f'LLM(..., weight_transfer_config={{"backend": "{BACKEND}"}})'


class LLMTarget:
    """A `vllm.LLM`, in process or with its engine core in another process."""

    generates_meanwhile = False

    def __init__(self, llm: Any, *, timeout: float) -> None:
        _check_config(llm.llm_engine.vllm_config)
        self._llm = llm
        self.patience = Patience(timeout)
        core = llm.llm_engine.engine_core
        self._core_is_here = hasattr(core, "engine_core")
        executor = core.engine_core.model_executor if self._core_is_here else None
        self.in_process = hasattr(executor, "driver_worker")

    def check_able(self, *, changes_weights: bool, multimodal: bool = False) -> None:
        """All of it is vLLM's own."""

    def check_elsewhere(self) -> None:
        """No thread is the engine's."""

    def init(self, info: dict[str, Any]) -> None:
        self._call(lambda: self._llm.init_weight_transfer_engine({"init_info": info}), "the handshake")

    def start(self) -> None:
        self._call(self._llm.start_weight_update, "start_weight_update")

    def update(self, info: dict[str, Any]) -> None:
        self._call(lambda: self._llm.update_weights({"update_info": info}), "update_weights")

    def finish(self) -> None:
        self._call(self._llm.finish_weight_update, "finish_weight_update")

    def name_version(self, version: str) -> None:
        name = getattr(self._llm.llm_engine, "set_weight_version", None)  # up to 0.27 there is none
        if name is not None:
            self._call(lambda: name(version), "set_weight_version")

    def reset_caches(self) -> None:
        if self._call(self._llm.reset_prefix_cache, "reset_prefix_cache") is not True:
            raise SyncError(
                "prefix cache: vLLM did not reset it (requests are still running), expected an empty cache. "
                "Push between generate() calls: cached keys and values of the old version would be served."
            )
        self._call(
            self._llm.llm_engine.reset_encoder_cache, "reset_encoder_cache"
        )  # the old tower's embeddings

    def pause(self) -> None:
        """Between `generate` calls nothing is in flight.

        Raises:
            SyncError: if something is: its keys and values would be the old version's. Nothing was touched.
        """
        if self._llm.llm_engine.has_unfinished_requests():
            raise SyncError(
                f"push: got requests in flight ({_unfinished(self._llm.llm_engine)}), expected none, as a vllm.LLM can't "
                f"keep them over a change of weights. Push between generate() calls, or use an AsyncLLM. {_WAY_OUT} "
                "Nothing was touched."
            )

    def resume(self) -> None:
        """Nothing was stopped."""

    def adapters_in_flight(self) -> frozenset[int]:
        return _adapters_of(self._llm.llm_engine)

    def settle(self) -> None:
        """Requests come from the thread that pushes."""

    def check_alive(self) -> None:
        death = death_of(self._llm.llm_engine.engine_core)
        if death:
            raise dead("The vLLM engine", death)

    def _call(self, call: Callable[[], Any], what: str) -> Any:
        if self._core_is_here:
            return call()
        core = self._llm.llm_engine.engine_core
        who = f"{what}: the vLLM engine core"
        return self.patience.call(call, who, died=lambda: death_of(core))


class AsyncLLMTarget:
    """A vLLM `AsyncLLM`, driven from another thread than the one of its event loop."""

    in_process = False
    generates_meanwhile = True

    def __init__(self, engine: Any, *, timeout: float, pause: Pause) -> None:
        _check_config(engine.vllm_config)
        if engine.output_handler is None:
            raise EngineNotReadyError(
                "AsyncLLM: got one that no event loop runs, expected one made inside of a running loop. Make it in a "
                "coroutine, and connect from there with: await asyncio.to_thread(connect, source, engine)"
            )
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop = engine.output_handler.get_loop()
        self.patience = Patience(timeout)
        self._mode = pause
        self._paused = False

    def check_able(self, *, changes_weights: bool, multimodal: bool = False) -> None:
        """All of it is vLLM's own."""

    def check_elsewhere(self) -> None:
        check_elsewhere(self._loop, instead="await asyncio.to_thread(sync.shutdown)")

    def init(self, info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._run(lambda: self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info)))

    def start(self) -> None:
        self._run(self._engine.start_weight_update)

    def update(self, info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._run(lambda: self._engine.update_weights(WeightTransferUpdateRequest(update_info=info)))

    def finish(self) -> None:
        self._run(self._engine.finish_weight_update)

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
        return _adapters_of(self._engine)

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


_WAY_OUT = (
    "If an interrupted generate() has left them: `while llm.llm_engine.has_unfinished_requests(): llm.llm_engine.step()` "
    "finishes them, `llm.llm_engine.abort_request(list(llm.llm_engine.output_processor.request_states), internal=True)` "
    "drops them."
)
_SHOWN = 8


def _unfinished(engine: Any) -> str:
    names = [str(name) for name in engine.output_processor.request_states]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _adapters_of(engine: Any) -> frozenset[int]:
    requests = list(engine.output_processor.request_states.values())
    return frozenset(_adapter_id(r) for r in requests if r.lora_request is not None)


def _adapter_id(state: Any) -> int:
    """The adapter that the engine was told of: a request of ours may lead to another version since."""
    if hasattr(state.lora_request, "_issued"):
        return ADAPTER_IDS + int(state.lora_name.rpartition("@")[2])
    return int(state.lora_request.lora_int_id)


def _check_config(vllm_config: Any) -> None:
    check_layout(vllm_config.parallel_config)
    _check_backend(vllm_config)


def _check_backend(vllm_config: Any) -> None:
    config = getattr(vllm_config, "weight_transfer_config", None)
    backend = getattr(config, "backend", None)
    if backend != BACKEND:
        raise EngineNotReadyError(
            f"weight transfer backend: got {backend!r}, expected {BACKEND!r}. Start the engine with {ARGUMENT}, or with "
            f"vllm serve {FLAG}; it can't be added to a running engine."
        )
