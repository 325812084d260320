"""VLLM's LoRA slots: adapters that are made from tensors, and the manager that holds them in a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import UnmergeableError

if TYPE_CHECKING:
    from collections.abc import Mapping


def permitted_rank(rank: int) -> int:
    """The smallest ``max_lora_rank`` of vLLM's list that holds this rank."""
    return next((r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


def peft_helper(config: Mapping[str, Any], lora_config: Any) -> Any:
    """PEFT's adapter config as vLLM understands it.

    Raises:
        UnmergeableError: in vLLM's words, if its rules forbid the adapter.
    """
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_dict(dict(config))
    try:
        helper.validate_legal(lora_config)
    except ValueError as error:
        raise UnmergeableError(
            f"vLLM refuses this adapter: {error} Use MergedSource or MergeInWorker."
        ) from error
    return helper


def lora_model(
    number: int, tensors: Mapping[str, torch.Tensor], helper: Any, *, model: torch.nn.Module, config: Any
) -> Any:
    """Make an adapter for the worker's LoRA manager from tensors.

    Args:
        number: The id of the adapter.
        tensors: The factors, in PEFT's names.
        helper: From `peft_helper`.
        model: The served model.
        config: vLLM's `VllmConfig`.
    """
    from vllm.lora.lora_model import LoRAModel

    given = dict(tensors)
    if helper.vllm_lora_scaling_factor != 1:  # vLLM scales B where it lies
        given |= {n: _copied(t) for n, t in given.items() if ".lora_B." in n or ".lora_embedding_B" in n}
    built = LoRAModel.from_lora_tensors(
        number,
        given,
        helper,
        device="cpu",
        dtype=config.lora_config.lora_dtype,
        model_vocab_size=config.model_config.get_vocab_size(),
        weights_mapper=_rename_mapper(model),
    )
    built.is_3d_lora_weight = False  # vLLM stamps it when it loads from disk
    built.pushed_by_lorasync = True
    return built


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, pin_memory=tensor.is_pinned()).copy_(tensor)


def is_pushed(adapter: Any) -> bool:
    """Whether an adapter in the worker's LoRA manager came from `lora_model`, whatever its id."""
    return getattr(adapter, "pushed_by_lorasync", False) is True


def keep_in_cache(manager: Any, number: int, *, pinned: bool) -> None:
    """Let no other adapter push this one out of the worker's cache in host memory, or let it."""
    cache = manager._registered_adapters
    if not hasattr(cache, "pin"):
        return
    if pinned:
        cache.pin(number)
    else:
        cache.pinned_items.discard(number)


def lora_module_of(tensor_name: str, model: torch.nn.Module) -> str:
    """The module of vLLM's model that a factor of PEFT's checkpoint is for."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    return str(parse_fine_tuned_lora_name(tensor_name, _rename_mapper(model))[0])


def lora_module_names(manager: Any) -> set[str]:
    """Every module that factors can be for: LoRA layers, and the children of fused ones."""
    fused = {name for names in manager.packed_modules.values() for name in names}
    return set(manager.modules) | fused


def _rename_mapper(model: torch.nn.Module) -> Any:
    """The model's renaming without the fusion of q, k and v: LoRA modules keep their own names."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    for method in ("get_rename_mapper", "get_unstacked_mapper"):  # the second up to 0.28 at least
        if hasattr(mapper, method):
            return getattr(mapper, method)()
    return mapper
