"""How an engine is laid out over processes, and which layouts a push can't reach as a whole."""

from __future__ import annotations

from typing import Any

from lorasync.errors import Mismatch, MismatchError


def check_layout(parallel: Any) -> None:
    """Refuse an engine of which a push would reach a part only: the rest would go on with its old weights.

    Args:
        parallel: vLLM's `ParallelConfig`.

    Raises:
        MismatchError: naming each setting, and what works instead.
    """
    wrong = [*_too_many(parallel), *_experts(parallel), *_spread(parallel)]
    if wrong:
        raise MismatchError("A push would reach a part of this engine only; nothing was touched.", wrong)


def _too_many(parallel: Any) -> list[Mismatch]:
    fixes = {
        "data_parallel_size": "Start one engine a replica, and pass all of them: connect(source, [llm, llm]).",
        "pipeline_parallel_size": "Use tensor_parallel_size instead.",
        "nnodes": "Keep an engine on one host, and pass several: connect(source, [llm, llm]).",
    }
    found = {name: _number(parallel, name) for name in fixes}
    return [Mismatch(name, str(n), "1", fixes[name]) for name, n in found.items() if n > 1]


def _experts(parallel: Any) -> list[Mismatch]:
    """Each rank holds its own experts only, and every name is checked on every rank."""
    if getattr(parallel, "enable_expert_parallel", False) is not True or _number(parallel, "world_size") == 1:
        return []
    fix = "Start the engine without it: tensor parallelism cuts experts too."
    return [Mismatch("enable_expert_parallel", "True", "False", fix)]


def _spread(parallel: Any) -> list[Mismatch]:
    """VLLM's ``external_launcher`` makes each trainer process one worker: no process reaches the others."""
    backend, workers = (
        getattr(parallel, "distributed_executor_backend", None),
        _number(parallel, "world_size"),
    )
    if backend != "external_launcher" or workers == 1:
        return []
    return [
        Mismatch(
            "distributed_executor_backend",
            f"'external_launcher' with {workers} workers, each in a trainer rank of its own",
            "an engine that starts its own workers, or one worker",
            'Start it on rank 0 with distributed_executor_backend="mp", and connect(source, None) on the other ranks.',
        )
    ]


def _number(parallel: Any, name: str) -> int:
    value = getattr(parallel, name, 1)
    return value if isinstance(value, int) else 1
