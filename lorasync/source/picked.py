"""Picking one adapter's tensors, under the names of PEFT's checkpoint; by module, for an adapter's name may be any word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor

from lorasync.source.model import base_of, named, saved_buffers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_PREFIX = "base_model.model."


def picked(model: nn.Module, adapter: str, *, bias: str = "none") -> dict[str, Tensor]:
    """Return what PEFT's `save_pretrained` writes for this adapter, without embeddings of the base.

    Args:
        model: The PEFT model.
        adapter: The adapter's name.
        bias: `LoraConfig.bias`: whether biases of the base belong to the adapter ("all", "lora_only").
    """
    base = base_of(model)
    found: dict[str, Tensor] = {}
    for path, module in named(base):
        start = f"{_PREFIX}{path}." if path else _PREFIX
        if isinstance(module, BaseTunerLayer):
            found.update(_of_layer(module, adapter, start))
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            found.update((start + name, tensor) for name, tensor in _state(module.modules_to_save[adapter]))
    if bias != "none":
        found.update(_biases(base, adapter, everywhere=bias == "all"))
    return found


def _of_layer(layer: BaseTunerLayer, adapter: str, start: str) -> Iterator[tuple[str, Tensor]]:
    if getattr(layer, "tied_adapter", None):  # trained tokens that another layer has
        return
    known = layer.adapter_layer_names
    for holder, container in layer._modules.items():
        mine: Any = container if holder in known or holder.startswith("lora_") else ()
        if adapter not in mine:
            continue
        item = mine[adapter]
        if isinstance(item, Tensor):
            yield start + holder, item
        elif holder == "lora_magnitude_vector":
            yield start + holder, item.weight
        else:
            yield from ((f"{start}{holder}.{name}", tensor) for name, tensor in _state(item))


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return a module's parameters and persistent buffers by their names, without the segments that wrappers add."""
    for path, each in named(module):
        start = f"{path}." if path else ""
        yield from ((start + name, p) for name, p in each._parameters.items() if p is not None)
        yield from ((start + name, buffer) for name, buffer in saved_buffers(each))


def _biases(base: nn.Module, adapter: str, *, everywhere: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the biases of the base that are trained along with the adapter."""
    modules = list(named(base))
    wrappers = [m for _, m in modules if isinstance(m, AuxiliaryTrainingWrapper)]
    copies = {id(param) for wrapper in wrappers for param in wrapper.parameters()}
    for path, module in modules:
        if everywhere or _adapted_by(module, adapter):
            own = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            inner = ".base_layer" if own is not module else ""
            start = f"{_PREFIX}{path}{inner}." if path or inner else _PREFIX
            for name, param in own._parameters.items():
                if param is None or "bias" not in name or id(param) in copies:
                    continue
                if not any(part.startswith("lora_") for part in path.split(".")):
                    yield start + name, param


def _adapted_by(module: nn.Module, adapter: str) -> bool:
    if isinstance(module, AuxiliaryTrainingWrapper) or not isinstance(module, BaseTunerLayer):
        return False
    return adapter in module._get_available_adapters()
