"""Taking an engine that somebody else has started without the backend."""

from __future__ import annotations

from typing import Any, TypeVar

from lorasync.errors import EngineNotReadyError
from lorasync.plugin import ATTACH, BACKEND, register
from lorasync.targets.async_llm import AsyncLLMTarget
from lorasync.targets.front import FLAG, backend_of
from lorasync.targets.kinds import is_engine_here
from lorasync.targets.llm import LLMTarget
from lorasync.vllm_seam.attach import know_the_config

Engine = TypeVar("Engine")
TIMEOUT = 120.0


def attach(engine: Engine, *, timeout: float = TIMEOUT) -> Engine:
    """Let an engine take pushes that was started without ``weight_transfer_config={"backend": "lorasync"}``.

    A `vllm.LLM` or an `AsyncLLM`, with its workers in this process or in others (these need lorasync installed: vLLM
    loads it as a plugin). An engine that takes pushes already is returned as it is. Nothing that the engine serves changes.

    The engine should still serve the checkpoint that it was started from: `connect` compares what it can read of its
    weights with the base that was trained on, and says what it could not read.

    Args:
        engine: a `vllm.LLM` or an `AsyncLLM`.
        timeout: how long its workers are waited for, in seconds.

    Returns:
        The same engine.

    Raises:
        EngineNotReadyError: with the reason, if it is something else, has another weight-transfer backend, or its workers
            have no lorasync.

    Example:
        >>> sync = connect(source, attach(trainer.llm))  # doctest: +SKIP
    """
    if isinstance(engine, type) or not is_engine_here(engine):
        got = f"the class {engine.__name__}" if isinstance(engine, type) else type(engine).__name__
        raise EngineNotReadyError(
            f"attach: got {got}, expected a vllm.LLM or an AsyncLLM of this process. Start any other engine with {FLAG}."
        )
    found: Any = engine
    config = getattr(found, "llm_engine", found).vllm_config
    backend = backend_of(config)
    if backend == BACKEND:
        return engine
    if backend is not None:
        raise EngineNotReadyError(
            f"attach: the engine has the weight-transfer backend {backend!r}, expected none: its workers keep one only. "
            f"Start it with {FLAG}."
        )
    register()  # workers of this process: vLLM may have loaded its plugins before lorasync was installed
    _check_answers(_asked(found, timeout))
    know_the_config(config)
    return engine


def _asked(engine: Any, timeout: float) -> list[Any]:
    target = (
        LLMTarget(engine, timeout=timeout, attaching=True)
        if hasattr(engine, "llm_engine")
        else AsyncLLMTarget(engine, timeout=timeout, pause="keep", attaching=True)
    )
    try:
        return target.everywhere(ATTACH, ())
    except EngineNotReadyError:
        raise
    except Exception as error:
        raise EngineNotReadyError(
            f"attach: the workers can't be given the backend ({type(error).__name__}: {error}). Is lorasync installed where "
            f"they run, and not left out by VLLM_PLUGINS? Otherwise start the engine with {FLAG}."
        ) from error


def _check_answers(answers: list[Any]) -> None:
    others = {str(answer.get("backend")) for answer in answers if not answer.get("attached")}
    if others or not answers:
        raise EngineNotReadyError(
            f"attach: its workers keep {', '.join(sorted(others)) or 'nothing'}, expected lorasync's WorkerEngine. Start "
            f"the engine with {FLAG}."
        )
