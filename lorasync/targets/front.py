"""What vLLM's `LLM` and `AsyncLLM` have in common: their config, and the requests that their front end knows."""

from __future__ import annotations

from typing import Any

from lorasync.errors import EngineNotReadyError
from lorasync.plugin import BACKEND
from lorasync.vllm_seam.layout import check_layout
from lorasync.wire import ADAPTER_IDS

FLAG = f"""--weight-transfer-config '{{"backend": "{BACKEND}"}}'"""
ARGUMENT = f'LLM(..., weight_transfer_config={{"backend": "{BACKEND}"}})'


def adapters_of(engine: Any) -> frozenset[int]:
    """The ids of the adapters that unfinished requests name, as vLLM's front end knows them."""
    requests = list(engine.output_processor.request_states.values())
    return frozenset(_adapter_id(r) for r in requests if r.lora_request is not None)


def _adapter_id(state: Any) -> int:
    """The adapter that the engine was told of: a request of ours may lead to another version since."""
    if hasattr(state.lora_request, "_issued"):
        return ADAPTER_IDS + int(state.lora_name.rpartition("@")[2])
    return int(state.lora_request.lora_int_id)


def checked_config(vllm_config: Any, *, attaching: bool = False) -> Any:
    """VLLM's `ParallelConfig`, of an engine that has our backend, or is about to get it, and can be reached as a whole.

    Raises:
        MismatchError: if a push would reach a part of the engine only.
        EngineNotReadyError: if it was started without the backend.
    """
    check_layout(vllm_config.parallel_config)
    backend = backend_of(vllm_config)
    if backend != BACKEND and not attaching:
        raise EngineNotReadyError(
            f"weight transfer backend: got {backend!r}, expected {BACKEND!r}. Start the engine with {ARGUMENT}, or with "
            f"vllm serve {FLAG}; or take it as it is: connect(source, lorasync.push.attach(llm))."
        )
    return vllm_config.parallel_config


def backend_of(vllm_config: Any) -> str | None:
    """The weight-transfer backend that the engine has; None without one."""
    return getattr(getattr(vllm_config, "weight_transfer_config", None), "backend", None)
