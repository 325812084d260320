"""How an engine is reached: one class a kind of target, all with the same few calls."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from lorasync.errors import EngineDeadError, EngineNotReadyError, SyncError, SyncTimeoutError
from lorasync.event_loop import run_on
from lorasync.plugin import BACKEND

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

FLAG = f"""--weight-transfer-config '{{"backend": "{BACKEND}"}}'"""
ARGUMENT = f'LLM(..., weight_transfer_config={{"backend": "{BACKEND}"}})'


Pause = Literal["keep", "wait", "abort"]


class Target(Protocol):
    """The calls that a push needs.

    Attributes:
        in_process: tensors can be handed over as they are.
        generates_meanwhile: requests may be running while a push goes on.
    """

    in_process: bool
    generates_meanwhile: bool

    def init(self, info: dict[str, Any]) -> None: ...

    def start(self) -> None: ...

    def update(self, info: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...

    def name_version(self, version: str) -> None:
        """Let outputs say which version they are of, where this vLLM has them say it."""
        ...

    def reset_prefix_cache(self) -> None: ...

    def pause(self) -> None:
        """Stop generating; what happens to requests in flight was said in `connect`."""

    def resume(self) -> None: ...

    def adapters_in_flight(self) -> frozenset[int]:
        """The ids of the adapters that unfinished requests name."""
        ...

    def check_alive(self) -> None:
        """Raise `EngineDeadError` if the engine is known to be dead."""
        ...


@runtime_checkable
class WeightSyncCalls(Protocol):
    """vLLM's own `VLLMWeightSyncClient`: any object with these four calls (an HTTP client, Ray handles) will do."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self) -> None: ...


def target_of(engine: object, *, timeout: float, pause: Pause = "keep") -> Target:
    """The target for an engine object.

    Raises:
        EngineNotReadyError: if it is no engine, or was started without the backend; the message shows the flag.
    """
    if hasattr(engine, "llm_engine"):
        return LLMTarget(engine, timeout=timeout)
    if hasattr(engine, "pause_generation") and hasattr(engine, "output_handler"):
        return AsyncLLMTarget(engine, timeout=timeout, pause=pause)
    if isinstance(engine, WeightSyncCalls):
        return CallsTarget(engine, timeout=timeout)
    raise EngineNotReadyError(
        f"target: got {type(engine).__name__}, expected a vllm.LLM, an AsyncLLM, or an object with vLLM's "
        "four weight-sync calls "
        "(init_weight_transfer_engine, start_weight_update, update_weights, finish_weight_update)."
    )


class LLMTarget:
    """A `vllm.LLM`, in process or with its engine core in another process."""

    generates_meanwhile = False

    def __init__(self, llm: Any, *, timeout: float) -> None:
        _check_backend(llm.llm_engine.vllm_config)
        self._llm = llm
        self._timeout = timeout
        core = llm.llm_engine.engine_core
        self._core_is_here = hasattr(core, "engine_core")
        executor = core.engine_core.model_executor if self._core_is_here else None
        self.in_process = hasattr(executor, "driver_worker")

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

    def reset_prefix_cache(self) -> None:
        if self._call(self._llm.reset_prefix_cache, "reset_prefix_cache") is False:
            raise SyncError(
                "prefix cache: vLLM did not reset it (requests are still running), expected an empty cache. "
                "Push between generate() calls: cached keys and values of the old version would be served."
            )

    def pause(self) -> None:
        """Between `generate` calls nothing is in flight.

        Raises:
            SyncError: if something is: its keys and values would be the old version's. Nothing was touched.
        """
        if self._llm.llm_engine.has_unfinished_requests():
            raise SyncError(
                "push: got requests in flight, expected none, as a vllm.LLM can't keep them over a change of weights. "
                "Push between generate() calls, or use an AsyncLLM. Nothing was touched."
            )

    def resume(self) -> None:
        """Nothing was stopped."""

    def adapters_in_flight(self) -> frozenset[int]:
        return _adapters_of(self._llm.llm_engine)

    def check_alive(self) -> None:
        death = _death_of(self._llm.llm_engine.engine_core)
        if death:
            raise _dead("The vLLM engine", death)

    def _call(self, call: Callable[[], Any], what: str) -> Any:
        if self._core_is_here:
            return call()
        core = self._llm.llm_engine.engine_core
        who = f"{what}: the vLLM engine core"
        return call_with_limit(call, self._timeout, who, died=lambda: _death_of(core))


class CallsTarget:
    """Any object with vLLM's four weight-sync calls, each taking plain dicts."""

    in_process = False
    generates_meanwhile = True

    def __init__(self, calls: WeightSyncCalls, *, timeout: float) -> None:
        self._calls = calls
        self._timeout = timeout

    def init(self, info: dict[str, Any]) -> None:
        call_with_limit(lambda: self._calls.init_weight_transfer_engine(info), self._timeout, "the handshake")

    def start(self) -> None:
        call_with_limit(self._calls.start_weight_update, self._timeout, "start_weight_update")

    def update(self, info: dict[str, Any]) -> None:
        call_with_limit(lambda: self._calls.update_weights(info), self._timeout, "update_weights")

    def finish(self) -> None:
        call_with_limit(self._calls.finish_weight_update, self._timeout, "finish_weight_update")

    def name_version(self, version: str) -> None:
        """These calls don't name it."""

    def reset_prefix_cache(self) -> None:
        reset = getattr(self._calls, "reset_prefix_cache", None)
        if not callable(reset):
            raise SyncError(
                f"{type(self._calls).__name__}: has no reset_prefix_cache(), expected one: without it the engine "
                "serves cached keys and values of the old version."
            )
        call_with_limit(reset, self._timeout, "reset_prefix_cache")

    def pause(self) -> None:
        """Pausing is the caller's: these calls have none."""

    def resume(self) -> None:
        """Nothing was stopped."""

    def adapters_in_flight(self) -> frozenset[int]:
        """These calls don't tell: the caller keeps requests of retired versions away."""
        return frozenset()

    def check_alive(self) -> None:
        """These calls don't tell."""


class AsyncLLMTarget:
    """A vLLM `AsyncLLM`, driven from another thread than the one of its event loop."""

    in_process = False
    generates_meanwhile = True

    def __init__(self, engine: Any, *, timeout: float, pause: Pause) -> None:
        _check_backend(engine.vllm_config)
        if engine.output_handler is None:
            raise EngineNotReadyError(
                "AsyncLLM: got one that no event loop runs, expected one made inside of a running loop. Make it in a "
                "coroutine, and connect from there with: await asyncio.to_thread(connect, source, engine)"
            )
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop = engine.output_handler.get_loop()
        self._timeout = timeout
        self._mode = pause
        self._paused = False

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

    def reset_prefix_cache(self) -> None:
        if self._paused:  # cleared, and nothing was computed since
            return
        if self._run(lambda: self._engine.reset_prefix_cache(reset_running_requests=True)) is False:
            raise SyncError("prefix cache: vLLM did not reset it, expected an empty cache. Push again.")

    def pause(self) -> None:
        """With all caches cleared: the keys and values of requests that are kept are computed anew by the new version."""
        core = self._engine.engine_core
        if self._mode == "keep" and hasattr(core, "pause_scheduler_async"):
            # `pause_generation` calls this and then sleeps for 20 ms, so that its caller sees outputs first.
            self._run(lambda: core.pause_scheduler_async(mode="keep", clear_cache=True))
        else:
            self._run(lambda: self._engine.pause_generation(mode=self._mode, clear_cache=True))
        self._paused = True

    def resume(self) -> None:
        self._run(self._engine.resume_generation)
        self._paused = False

    def adapters_in_flight(self) -> frozenset[int]:
        return _adapters_of(self._engine)

    def check_alive(self) -> None:
        if self._engine.errored:
            raise _dead("The vLLM engine", _death_of(self._engine.engine_core))

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
            lambda result: call_with_limit(
                result, self._timeout, "The AsyncLLM", died=lambda: _death_of(core)
            ),
            instead="await sync.send_weights_async(), or await asyncio.to_thread(connect, source, engine)",
        )


def _adapters_of(engine: Any) -> frozenset[int]:
    requests = list(engine.output_processor.request_states.values())
    return frozenset(r.lora_request.lora_int_id for r in requests if r.lora_request is not None)


_WORKER_GONE = ("method failed: cancelled", "Executor failed")
"""What vLLM answers to a call that was under way when a worker died."""


def _death_of(core: Any) -> str:
    """Which process of an engine has died, as its client knows; empty while all live."""
    resources = getattr(core, "resources", None)
    manager = getattr(resources, "engine_manager", None)
    try:
        finished: dict[str, Any] = manager.finished_procs() if manager is not None else {}
    except ValueError:  # closed already, by the client's own clean-up
        finished = {}
    named = [f"{name} (exit code {code})" for name, code in finished.items()]
    if not named and not getattr(resources, "engine_dead", False):
        return ""
    return ", ".join(named) or getattr(manager, "failed_proc_name", None) or "its engine core or a worker"


def _dead(who: str, death: str) -> EngineDeadError:
    return EngineDeadError(
        f"{who} died: {death or 'its engine core or a worker'} is gone (its own log says why). Nothing is served any "
        "more. Restart the engine, connect() again and push: the training model is as it was."
    )


def call_with_limit(
    call: Callable[[], Any], seconds: float, who: str, *, died: Callable[[], str] = str
) -> Any:
    """Run a call that waits for another process, in a thread of its own, for so long at most.

    Args:
        call: what to run.
        seconds: the limit.
        who: whom it waits for.
        died: says which process is dead; asked once a second, as vLLM's calls wait for a dead engine for ever.

    Raises:
        SyncTimeoutError: naming who did not answer. The call goes on in its thread; its outcome is dropped.
        EngineDeadError: naming who died.
    """
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, name="lorasync-call", daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while not outcome and time.monotonic() < deadline:
        thread.join(min(1.0, seconds))
        if not outcome and died():
            thread.join(1.0)  # an answer may be on its way
            if not outcome:
                raise _dead(who, died())
    if not outcome:
        raise SyncTimeoutError(
            f"{who} did not answer within {seconds:g} s. Is it busy, hung or dead? connect(..., timeout=…) sets the limit."
        )
    succeeded, value = outcome[0]
    if not succeeded and type(value).__name__ == "EngineDeadError":  # vLLM's
        raise _dead(who, died()) from value
    if not succeeded and any(words in str(value) for words in _WORKER_GONE):
        deadline = time.monotonic() + 5.0  # vLLM gives the call up a moment before it ends the engine
        while time.monotonic() < deadline:
            if died():
                raise _dead(who, died()) from value
            time.sleep(0.05)
    if not succeeded:
        raise value
    return value


def _check_backend(vllm_config: Any) -> None:
    config = getattr(vllm_config, "weight_transfer_config", None)
    backend = getattr(config, "backend", None)
    if backend != BACKEND:
        raise EngineNotReadyError(
            f"weight transfer backend: got {backend!r}, expected {BACKEND!r}. Start the engine with {ARGUMENT}, or with "
            f"vllm serve {FLAG}; it can't be added to a running engine."
        )
