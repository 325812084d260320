"""Which kind of target an object is."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from lorasync.errors import EngineNotReadyError
from lorasync.targets.base import WEIGHT_SYNC_CALLS, WeightSyncCalls
from lorasync.targets.llm import AsyncLLMTarget, LLMTarget
from lorasync.targets.rpc import CallsTarget

if TYPE_CHECKING:
    from lorasync.targets.base import Pause, Target


def is_engine_here(engine: object) -> bool:
    """Whether it is vLLM's own object in this process, an `LLM` or an `AsyncLLM`."""
    return hasattr(engine, "llm_engine") or _is_async_llm(engine)


def target_of(engine: object, *, timeout: float, pause: Pause = "keep") -> Target:
    """The target for an engine object.

    Raises:
        EngineNotReadyError: if it is no engine, or was started without the backend; the message shows the flag.
        MismatchError: if a push would reach a part of the engine only.
    """
    if isinstance(engine, type):
        raise EngineNotReadyError(
            f"target: got the class {engine.__name__}, expected an engine. Pass the object that you have made of it."
        )
    if hasattr(engine, "llm_engine"):
        return LLMTarget(engine, timeout=timeout)
    if _is_async_llm(engine):
        return AsyncLLMTarget(engine, timeout=timeout, pause=pause)
    if isinstance(engine, WeightSyncCalls):
        return CallsTarget(engine, timeout=timeout)
    raise EngineNotReadyError(
        f"target: got {_described(engine)}, expected a vllm.LLM, an AsyncLLM, or an object with vLLM's "
        f"four weight-sync calls ({', '.join(WEIGHT_SYNC_CALLS)}).{_hint(engine)}"
    )


def _is_async_llm(engine: object) -> bool:
    return hasattr(engine, "pause_generation") and hasattr(engine, "output_handler")


def _described(engine: object) -> str:
    return repr(engine) if engine is None or isinstance(engine, str) else type(engine).__name__


def _hint(engine: object) -> str:
    if engine is None:
        return " Rank 0 is the one that talks to the engine: pass it there."
    if isinstance(engine, str):
        return " Servers are not reached by their URL: pass an object with these calls."
    if inspect.isawaitable(engine):
        return " Await it first."
    if hasattr(engine, "metadata"):
        return " This is a source: connect(source, engine), in this order."
    if hasattr(engine, "engine_core"):
        return " Pass the vllm.LLM itself, not its llm_engine."
    return ""
