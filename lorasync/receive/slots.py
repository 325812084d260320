"""Whether an engine's LoRA slots can hold an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasync.errors import EngineNotReadyError, Mismatch, MismatchError, UnmergeableError
from lorasync.receive.mergeable import ways_to_merge
from lorasync.vllm_seam.lora import LoraSlots, permitted_rank

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lorasync.receive.served import ServedModel
    from lorasync.source.spec import FactorSpec


def slots_for(spec: FactorSpec, served: ServedModel) -> LoraSlots:
    """Return the engine's LoRA slots, if they can hold an adapter of this kind.

    Args:
        spec: What the adapter is.
        served: What the worker serves.

    Raises:
        EngineNotReadyError: The engine was started without LoRA slots.
        UnmergeableError: The adapter is more than LoRA slots can hold; the message names the strategies that work.
        MismatchError: The slots are too small.
    """
    if served.lora is None:
        rank = max((m.r for m in spec.modules), default=8)
        raise EngineNotReadyError(
            "enable_lora: got False, expected True: ServeAdapter needs LoRA slots. Start the engine with "
            f"LLM(..., enable_lora=True, max_lora_rank={permitted_rank(rank)}), or use MergeInWorker."
        )
    slots = LoraSlots(served.model, served.config)
    _refuse_what_slots_cannot_hold(spec)
    _check_rank(spec, slots.largest_rank)
    return slots


def _check_rank(spec: FactorSpec, largest: int) -> None:
    rank = max((m.r for m in spec.modules), default=0)
    if rank > largest:
        fix = f"Start the engine with max_lora_rank={permitted_rank(rank)}, or use MergeInWorker."
        raise MismatchError(
            "The adapter is too large for the engine's LoRA slots.",
            [Mismatch("max_lora_rank", str(largest), f"at least {rank}, the adapter's rank", fix)],
        )


def _refuse_what_slots_cannot_hold(spec: FactorSpec) -> None:
    """VLLM's LoRA layers compute W·x + s·B·A·x, and nothing else.

    Raises:
        UnmergeableError: naming what is more than that, and the strategies that work.
    """
    problems = [f"{m.weight}: DoRA" for m in spec.modules if m.dora]
    problems += [
        f"{m.weight}: {m.kind} factors" for m in spec.modules if m.kind not in ("linear", "embedding")
    ]
    problems += [f"{b.weight}: a trained bias" for b in spec.biases]
    problems += [f"{r.weight}: trained tokens" for r in spec.rows]
    problems += [f"{s.weight}: trained whole" for s in spec.saved]
    if spec.base_changed_by:
        problems.append(f"init_lora_weights={spec.base_changed_by!r}: it changed the base")
    if problems:
        raise UnmergeableError(
            "vLLM's LoRA slots can't hold this adapter: "
            + "; ".join(problems[:8])
            + f". Use {ways_to_merge(spec)}."
        )


def check_modules(tensors: Iterable[str], slots: LoraSlots) -> None:
    """Refuse factors that vLLM would ignore without a word: those of a module that it has no LoRA layer for.

    Args:
        tensors: The names of the factors.
        slots: The engine's LoRA slots.

    Raises:
        MismatchError: Naming the factors.
    """
    served = slots.modules()
    fix = "Train without this module, or use MergedSource or MergeInWorker."
    modules = {name: slots.module_of(name) for name in tensors}
    wrong = [
        Mismatch(name, f"factors for {module}", "a module with a LoRA layer in this engine", fix)
        for name, module in modules.items()
        if module not in served
    ]
    if wrong:
        raise MismatchError("The engine would ignore part of the adapter; nothing was touched.", wrong)
