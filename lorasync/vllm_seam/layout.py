"""Layouts of an engine over processes that a push can't reach as a whole."""

from __future__ import annotations

from typing import Any

from lorasync.errors import Mismatch, MismatchError


def check_layout(parallel: Any) -> None:
    """Refuse an engine of which a push would reach only a part: the rest would keep its old weights.

    Args:
        parallel: vLLM's `ParallelConfig`.

    Raises:
        MismatchError: Such a setting; the message names each, and what works instead.
    """
    wrong = [*_too_many(parallel), *_experts(parallel), *_partly_elsewhere(parallel)]
    if wrong:
        raise MismatchError("A push would reach a part of this engine only; nothing was touched.", wrong)


def is_spread(parallel: Any) -> bool:
    """Whether vLLM's ``external_launcher`` has made each of several trainer processes one worker of the engine."""
    backend = getattr(parallel, "distributed_executor_backend", None)
    return backend == "external_launcher" and _number(parallel, "world_size") > 1


def replicas_of(parallel: Any) -> int:
    """How many data-parallel replicas the engine has."""
    return _number(parallel, "data_parallel_size")


def workers_of(parallel: Any) -> int:
    """How many workers the engine has, of all replicas."""
    return _number(parallel, "world_size") * (1 if is_spread(parallel) else replicas_of(parallel))


def workers_here(parallel: Any) -> int:
    """How many workers a `vllm.LLM` drives itself; it is one replica, and under ``external_launcher`` one worker."""
    return 1 if is_spread(parallel) else _number(parallel, "world_size")


def rank_in_engine(parallel: Any) -> int:
    """Which of the engine's workers this one is, of all replicas; asked in a worker."""
    size = _number(parallel, "world_size")
    rank = _number(parallel, "rank", 0) % size
    return rank if is_spread(parallel) else _number(parallel, "data_parallel_index", 0) * size + rank


def _too_many(parallel: Any) -> list[Mismatch]:
    fixes = {
        "pipeline_parallel_size": "Use tensor_parallel_size instead.",
        "nnodes": "Keep an engine on one host, and pass several: connect(source, [llm, llm]).",
    }
    found = {name: _number(parallel, name) for name in fixes}
    return [Mismatch(name, str(n), "1", fixes[name]) for name, n in found.items() if n > 1]


def _experts(parallel: Any) -> list[Mismatch]:
    """Each rank holds its own experts only, and every name is checked on every rank."""
    alone = _number(parallel, "world_size") == 1 and replicas_of(parallel) == 1
    if getattr(parallel, "enable_expert_parallel", False) is not True or alone:
        return []
    fix = "Start the engine without it: tensor parallelism cuts experts too."
    return [Mismatch("enable_expert_parallel", "True", "False", fix)]


def _partly_elsewhere(parallel: Any) -> list[Mismatch]:
    """Replicas that another front end drives hear nothing of what this one is told."""
    total = replicas_of(parallel)
    found = []
    for name in ("data_parallel_external_lb", "data_parallel_hybrid_lb"):
        if total > 1 and getattr(parallel, name, False) is True:
            fix = "Let one front end drive all replicas (vLLM's default), or start them as engines of their own."
            found.append(Mismatch(name, f"True, with {total} replicas", "False", fix))
    return found


def _number(parallel: Any, name: str, otherwise: int = 1) -> int:
    value = getattr(parallel, name, otherwise)
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise
