"""Which kind of target an object is."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from lorasync.errors import EngineNotReadyError
from lorasync.targets.async_llm import AsyncLLMTarget
from lorasync.targets.base import CollectiveRpc
from lorasync.targets.llm import LLMTarget
from lorasync.targets.rpc import RpcTarget

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
    if isinstance(engine, CollectiveRpc):
        return RpcTarget(engine, timeout=timeout)
    raise EngineNotReadyError(
        f"target: got {_described(engine)}, expected a vllm.LLM, an AsyncLLM, or an object with vLLM's "
        f"collective_rpc(method, timeout, args, kwargs).{_hint(engine)}"
    )


def is_engine(found: object) -> bool:
    """Whether it is an engine of some kind, or a class of one."""
    return is_engine_here(found) or hasattr(found, "collective_rpc") or hasattr(found, "update_weights")


def _is_async_llm(engine: object) -> bool:
    return hasattr(engine, "pause_generation") and hasattr(engine, "output_handler")


def _described(engine: object) -> str:
    return repr(engine) if engine is None or isinstance(engine, str) else type(engine).__name__


def _hint(engine: object) -> str:
    if engine is None:
        return " Rank 0 is the one that talks to the engine: pass it there."
    if isinstance(engine, str):
        return " Servers are not reached by their URL: pass an object with this call."
    if hasattr(engine, "update_weights"):
        return " Its weight-sync calls return nothing, so that a push could not be known to have arrived."
    if inspect.isawaitable(engine):
        return " Await it first."
    if hasattr(engine, "metadata"):
        return " This is a source: connect(source, engine), in this order."
    if hasattr(engine, "engine_core"):
        return " Pass the vllm.LLM itself, not its llm_engine."
    return ""
