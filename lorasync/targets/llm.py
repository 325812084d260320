"""An engine that is a `vllm.LLM` in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.errors import SyncError
from lorasync.targets.base import METHOD
from lorasync.targets.front import adapters_of, checked_config
from lorasync.targets.patience import Patience, dead, death_of
from lorasync.vllm_seam.layout import is_spread, replicas_of, workers_here

if TYPE_CHECKING:
    from collections.abc import Callable


class LLMTarget:
    """A `vllm.LLM`, in process or with its engine core in another process."""

    generates_meanwhile = False

    def __init__(self, llm: Any, *, timeout: float, attaching: bool = False) -> None:
        parallel = checked_config(llm.llm_engine.vllm_config, attaching=attaching)
        self._llm = llm
        self.patience = Patience(timeout)
        core = self.engine = llm.llm_engine.engine_core
        self._core_is_here = hasattr(core, "engine_core")
        executor = core.engine_core.model_executor if self._core_is_here else None
        self.in_process = hasattr(executor, "driver_worker")
        self.spread = is_spread(parallel) or replicas_of(parallel) > 1
        self.workers = workers_here(parallel)

    def check_able(self, *, changes_weights: bool, multimodal: bool = False) -> None:
        """All of it is vLLM's own."""

    def check_elsewhere(self) -> None:
        """No thread is the engine's."""

    def call(self, message: dict[str, Any], payload: Any) -> list[Any]:
        """Give a message to every worker."""
        return self.everywhere(METHOD, (message, payload), what=message["op"])

    def everywhere(self, method: str, arguments: tuple[Any, ...], *, what: str = "") -> list[Any]:
        """Call a method of every worker that this object drives; return what each returns."""
        return list(self._call(lambda: self._llm.collective_rpc(method, args=arguments), what or method))

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
        # It holds the old tower's embeddings.
        self._call(self._llm.llm_engine.reset_encoder_cache, "reset_encoder_cache")

    def pause(self) -> None:
        """Between `generate` calls nothing is in flight.

        Raises:
            SyncError: if something is: its keys and values would be the old version's. Nothing was touched.
        """
        # `has_unfinished_requests` may ask other processes.
        if self._llm.llm_engine.output_processor.request_states:
            raise SyncError(
                f"push: got requests in flight ({_unfinished(self._llm.llm_engine)}), expected none, as a vllm.LLM can't "
                f"keep them over a change of weights. Push between generate() calls, or use an AsyncLLM. {_WAY_OUT} "
                "Nothing was touched."
            )

    def resume(self) -> None:
        """Nothing was stopped."""

    def adapters_in_flight(self) -> frozenset[int]:
        return adapters_of(self._llm.llm_engine)

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


_WAY_OUT = (
    "If an interrupted generate() has left them: `while llm.llm_engine.has_unfinished_requests(): llm.llm_engine.step()` "
    "finishes them, `llm.llm_engine.abort_request(list(llm.llm_engine.output_processor.request_states), internal=True)` "
    "drops them."
)
_SHOWN = 8


def _unfinished(engine: Any) -> str:
    names = [str(name) for name in engine.output_processor.request_states]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
