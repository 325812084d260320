"""The twin of the served model: built on the meta device, with the same parameters and loaders, and without memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from lorasync.errors import SyncError
from lorasync.vllm_seam.build import build, on_meta
from lorasync.vllm_seam.layers import quantizes_as_it_loads

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LARGE = 1 << 14
"""Elements from which a tensor counts as a weight, where a constructor has to read small ones."""


def build_twin(vllm_config: Any) -> torch.nn.Module:
    """Build the twin of the model that an engine with this config serves.

    Of an engine that quantizes what it loads (fp8 from a 16-bit checkpoint) it is the model before that: those loaders
    would start kernels as soon as a layer is complete, which nothing on the meta device can.

    Raises:
        SyncError: The model's constructor can't do without memory.
    """
    twin = _built(vllm_config, quantized=True)
    quantizes = any(map(quantizes_as_it_loads, twin.modules()))
    return _built(vllm_config, quantized=False) if quantizes else twin


def _built(vllm_config: Any, *, quantized: bool) -> torch.nn.Module:
    """Build it on meta; if the constructor reads what it has made (slopes, constants), with small tensors in memory."""
    try:
        with _registering() as made_now:
            twin = build(vllm_config, torch.device("meta"), quantized=quantized)
    except (NotImplementedError, RuntimeError):
        try:
            with _registering() as made_now:
                twin = build(vllm_config, _WeightsOnMeta(), quantized=quantized)
        except Exception as error:
            raise _fails_without_memory(vllm_config, error) from error
    _move_to_meta(made_now)  # some constructors name a device of their own
    return twin


def _fails_without_memory(vllm_config: Any, error: Exception) -> SyncError:
    name = ", ".join(vllm_config.model_config.architectures or ["the served model"])
    return SyncError(
        f"{name}: its constructor in vLLM fails without memory ({type(error).__name__}: {error}), expected one "
        "that builds on the meta device: lorasync can't tell where its weights go. Serve another class of "
        'model (model_impl="transformers" is one), or report this. Nothing was touched.'
    )


class _WeightsOnMeta(TorchFunctionMode):
    """Makes large tensors on the meta device and small ones in memory, where nothing else is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._device import _device_constructors

        given = kwargs or {}
        if func not in _device_constructors() or given.get("device") is not None:
            return func(*args, **given)
        if func is torch.tensor:
            return func(*args, **{**given, "device": "cpu"})
        made = func(*args, **{**given, "device": "meta"})
        return made if made.numel() > LARGE else func(*args, **{**given, "device": "cpu"})


def _move_to_meta(modules: Iterable[torch.nn.Module]) -> None:
    """Move the parameters and buffers of these modules to meta; one that several modules share stays shared."""
    moved: dict[int, Any] = {}
    for module in modules:
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and not tensor.is_meta:
                    if id(tensor) not in moved:
                        moved[id(tensor)] = on_meta(tensor)
                    held[name] = moved[id(tensor)]


@contextmanager
def _registering() -> Iterator[list[torch.nn.Module]]:
    """Collect the modules that get a parameter or buffer: those belong to the twin, others to live models too."""
    from torch.nn.modules import module as hooks

    found: dict[int, torch.nn.Module] = {}
    modules: list[torch.nn.Module] = []

    def note(module: torch.nn.Module, name: str, tensor: Any) -> None:  # noqa: ARG001
        if id(module) not in found:
            found[id(module)] = module
            modules.append(module)

    handles = [
        hooks.register_module_parameter_registration_hook(note),
        hooks.register_module_buffer_registration_hook(note),
    ]
    try:
        yield modules
    finally:
        for handle in handles:
            handle.remove()
