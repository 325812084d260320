"""Deriving anew, after a push, what an engine derives from its weights: packed copies, absorbed projections, sinks."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from lorasync.errors import Mismatch
from lorasync.vllm_seam.attention import derive, derives, hook_of_whole_model, is_attention, keeps_in_kv_cache
from lorasync.vllm_seam.layers import repack_for_cpu

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import torch


class Derived:
    """The layers of a served model that hold more than their weights."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._on_cpu = not any(param.is_cuda for param in model.parameters())
        self._attention = list(_attention_that_derives(model))
        self._owners = _owners_by_storage(model) if self._on_cpu or self._attention else {}

    def refresh(self, tensors: Iterable[torch.Tensor]) -> None:
        """Derive anew what is made of these parameters; call it after writing them."""
        if not self._owners:
            return
        owners = {id(o): o for tensor in tensors for o in self._owners.get(_storage(tensor), ())}
        if self._on_cpu:
            for layer in owners.values():
                repack_for_cpu(layer)
        self.derive_from(owners.values())

    def derive_from(self, layers: Iterable[torch.nn.Module]) -> None:
        """Derive anew what attention layers absorb of these layers; call it after writing their weights."""
        changed = {id(layer) for layer in layers}
        for attention, parent in self._attention:
            if id(parent) in changed or any(id(m) in changed for m in attention.modules()):
                derive(attention, parent, self._dtype)


def derived_elsewhere(model: torch.nn.Module) -> list[Mismatch]:
    """Return what this model makes of its weights when the engine starts, in code that can't be run again."""
    fix = "Use ServeAdapter, which leaves the weights alone, or another class of model."
    wrong = []
    if hook_of_whole_model(model):
        got = f"{type(model).__name__}.process_weights_after_loading, which runs when the engine starts"
        wrong.append(Mismatch("the model", got, "nothing that is derived from all weights at once", fix))
    for name, module in model.named_modules():
        if module is not model and keeps_in_kv_cache(module):
            got = f"{type(module).__name__}.post_weight_load: its sinks are in the KV cache already"
            wrong.append(Mismatch(name, got, "nothing that is kept in the KV cache", fix))
    return wrong


def _attention_that_derives(model: torch.nn.Module) -> Iterable[tuple[Any, torch.nn.Module]]:
    modules = dict(model.named_modules())
    for name, layer in modules.items():
        if is_attention(layer) and derives(layer):
            yield layer, modules[name.rpartition(".")[0]]


def _owners_by_storage(model: torch.nn.Module) -> dict[int, Collection[torch.nn.Module]]:
    found: dict[int, list[torch.nn.Module]] = defaultdict(list)
    for layer in model.modules():
        for param in layer.parameters(recurse=False):
            if param.numel():
                found[_storage(param)].append(layer)
    return dict(found)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
