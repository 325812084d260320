"""The served model once more, on the meta device: same parameters, no memory, vLLM's own loaders."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from lorasync.errors import SyncError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LARGE = 1 << 14
"""Elements from which a tensor counts as a weight, where a constructor has to read small ones."""


def build_twin(vllm_config: Any) -> torch.nn.Module:
    """Build the twin of the model that an engine with this config serves.

    Of an engine that quantizes what it loads (fp8 from a 16-bit checkpoint) it is the model before that: those loaders
    would start kernels as soon as a layer is complete, which nothing on the meta device can.

    Raises:
        SyncError: if the model's constructor can't do without memory.
    """
    twin = _built(vllm_config, quantized=True)
    quantizes = any(
        getattr(getattr(layer, "quant_method", None), "uses_meta_device", False) for layer in twin.modules()
    )
    return _built(vllm_config, quantized=False) if quantizes else twin


def _built(vllm_config: Any, *, quantized: bool) -> torch.nn.Module:
    """On meta altogether; where the constructor reads what it has made (slopes, constants), small tensors are real."""
    try:
        with _registering() as made_now:
            twin = _initialized(vllm_config, torch.device("meta"), quantized=quantized)
    except (NotImplementedError, RuntimeError):
        try:
            with _registering() as made_now:
                twin = _initialized(vllm_config, _WeightsOnMeta(), quantized=quantized)
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


def _initialized(vllm_config: Any, where: Any, *, quantized: bool) -> torch.nn.Module:
    """Attention layers register themselves by name in the compilation config, so the twin gets a config of its own."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.quant_config = vllm_config.quant_config if quantized else None
    for registry in ("static_all_moe_layers",):  # absent in old versions
        if hasattr(config.compilation_config, registry):
            setattr(config.compilation_config, registry, [])
    dtype = vllm_config.model_config.dtype
    with set_current_vllm_config(config), _default_dtype(dtype), _rotary_cache_kept(), where:
        twin: torch.nn.Module = initialize_model(vllm_config=config)
    return twin


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
    """The parameters and buffers of these modules that are real; one that several share stays shared."""
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

    moved: dict[int, Any] = {}
    for module in modules:
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and not tensor.is_meta:
                    if id(tensor) not in moved:
                        moved[id(tensor)] = to_meta_tensor(tensor)
                    held[name] = moved[id(tensor)]


@contextmanager
def _registering() -> Iterator[list[torch.nn.Module]]:
    """Collect the modules that get a parameter or buffer: those are the twin's own, others it shares with live models."""
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


@contextmanager
def _rotary_cache_kept() -> Iterator[None]:
    """VLLM hands rotary embeddings from one model to the next: none that is on meta may stay in its cache."""
    from vllm.model_executor.layers import rotary_embedding

    cache: dict[Any, Any] = getattr(rotary_embedding, "_ROPE_DICT", {})
    before = dict(cache)
    try:
        yield
    finally:
        cache.clear()
        cache.update(before)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
