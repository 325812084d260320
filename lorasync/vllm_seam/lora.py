"""VLLM's LoRA slots: the adapters that a worker holds, and how an adapter is made from tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import UnmergeableError

if TYPE_CHECKING:
    from collections.abc import Mapping


class LoraSlots:
    """The adapters that a worker holds, by their ids.

    Args:
        model: The served model, with LoRA layers.
        config: vLLM's `VllmConfig`, with a `LoRAConfig`.
    """

    def __init__(self, model: torch.nn.Module, config: Any) -> None:
        self._model = model
        self._config = config
        self._manager: Any = model.lora_manager

    @property
    def capacity(self) -> int:
        """How many adapters the worker can hold in host memory."""
        return int(self._manager.capacity)

    @property
    def largest_rank(self) -> int:
        return int(self._config.lora_config.max_lora_rank)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that adapters are served in."""
        dtype: torch.dtype = self._config.lora_config.lora_dtype
        return dtype

    def held(self) -> set[int]:
        """Return all adapters."""
        return set(self._manager.list_adapters())

    def pushed(self) -> set[int]:
        """Return the adapters that lorasync has added."""
        held = self._manager.list_adapters().items()
        return {number for number, adapter in held if getattr(adapter, "pushed_by_lorasync", False) is True}

    def add(self, number: int, tensors: Mapping[str, torch.Tensor], helper: Any) -> None:
        """Add an adapter.

        Args:
            number: Its id.
            tensors: Its factors, in PEFT's names.
            helper: Its config, from `peft_helper`.
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
            dtype=self.dtype,
            model_vocab_size=self._config.model_config.get_vocab_size(),
            weights_mapper=_rename_mapper(self._model),
        )
        built.is_3d_lora_weight = False  # vLLM stamps it when it loads from disk
        built.pushed_by_lorasync = True
        self._manager.add_adapter(built)

    def activate(self, number: int) -> None:
        """Put an adapter that is held into a slot of the device."""
        self._manager.activate_adapter(number)

    def remove(self, number: int) -> None:
        self._manager.remove_adapter(number)

    def keep_in_cache(self, number: int, *, pinned: bool) -> None:
        """Say whether other adapters may push this one out of the worker's cache in host memory."""
        cache = self._manager._registered_adapters
        if not hasattr(cache, "pin"):
            return
        if pinned:
            cache.pin(number)
        else:
            cache.pinned_items.discard(number)

    def module_of(self, tensor_name: str) -> str:
        """Return the module of vLLM's model that a factor of PEFT's checkpoint is for."""
        from vllm.lora.utils import parse_fine_tuned_lora_name

        return str(parse_fine_tuned_lora_name(tensor_name, _rename_mapper(self._model))[0])

    def modules(self) -> set[str]:
        """Return every module that factors can be for: LoRA layers, and the children of fused ones."""
        fused = {name for names in self._manager.packed_modules.values() for name in names}
        return set(self._manager.modules) | fused


def permitted_rank(rank: int) -> int:
    """Return the smallest ``max_lora_rank`` of vLLM's list that holds this rank."""
    return next((r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


def peft_helper(config: Mapping[str, Any], lora_config: Any) -> Any:
    """Read PEFT's adapter config as vLLM understands it.

    Raises:
        UnmergeableError: VLLM's rules forbid the adapter; the message is vLLM's.
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


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, pin_memory=tensor.is_pinned()).copy_(tensor)


def _rename_mapper(model: torch.nn.Module) -> Any:
    """The model's renaming without the fusion of q, k and v: LoRA modules keep their own names."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    for method in ("get_rename_mapper", "get_unstacked_mapper"):  # the second up to 0.28 at least
        if hasattr(mapper, method):
            return getattr(mapper, method)()
    return mapper
