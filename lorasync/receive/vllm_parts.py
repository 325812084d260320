"""What differs between vLLM's versions, one function each."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import UnmergeableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def build_twin(vllm_config: Any) -> torch.nn.Module:
    """The served model once more, on the meta device: same parameters, no memory, vLLM's own loaders.

    Of an engine that quantizes what it loads (fp8 from a 16-bit checkpoint) it is the model before that: those loaders
    would start kernels as soon as a layer is complete, which nothing on the meta device can.
    """
    twin = _initialized(vllm_config, quantized=True)
    quantizes = any(
        getattr(getattr(layer, "quant_method", None), "uses_meta_device", False) for layer in twin.modules()
    )
    return _initialized(vllm_config, quantized=False) if quantizes else twin


def _initialized(vllm_config: Any, *, quantized: bool) -> torch.nn.Module:
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
    with (
        set_current_vllm_config(config),
        _default_dtype(vllm_config.model_config.dtype),
        torch.device("meta"),
    ):
        twin: torch.nn.Module = initialize_model(vllm_config=config)
    return twin


def is_plain_layer(layer: torch.nn.Module) -> bool:
    """Whether the layer keeps its weights as its loader wrote them: no quantization, no repacking."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    method = getattr(layer, "quant_method", None)
    return method is None or type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


def repack_for_cpu(layer: torch.nn.Module) -> None:
    """Let a CPU layer that keeps a packed copy beside its weight pack it anew (a tied ``lm_head``, for one)."""
    held: Any = layer
    if hasattr(held, "cpu_linear") and held.weight.numel():
        held.quant_method.process_weights_after_loading(held)


def reload_begin(layer: torch.nn.Module) -> None:
    """Put one layer on meta and let its loaders wait until it is complete."""
    from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload

    initialize_layerwise_reload(layer)


def reload_end(layer: torch.nn.Module, model_config: Any) -> None:
    """Process what was loaded into the layer and copy it into the storage that it had before."""
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

    finalize_layerwise_reload(layer, model_config)
    _prepack_experts_for_cpu(layer)


def _prepack_experts_for_cpu(layer: torch.nn.Module) -> None:
    """On a CPU vLLM packs experts when their kernel is first set up, and not again after a reload (read in 0.32)."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    held: Any = layer
    method: Any = getattr(layer, "quant_method", None)
    if type(method) is UnquantizedFusedMoEMethod and held.w13_weight.device.type == "cpu":
        method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def reload_undo(layer: torch.nn.Module) -> None:
    """Give a layer that is not complete its old weights back."""
    from vllm.model_executor.model_loader.reload import layerwise

    info = layerwise.get_layerwise_info(layer)
    if info.can_load() and info.kernel_tensors is not None:
        layerwise._place_kernel_tensors(layer, info)
    info.reset()


@contextmanager
def beside_the_engine(device: torch.device) -> Iterator[None]:
    """On another thread than the engine's: its device, and a stream of its own that is done at the end of the block."""
    if device.type != "cuda":
        yield
        return
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
        stream.synchronize()


def wait_for(device: torch.device) -> None:
    """Wait until everything that was launched on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wait_for_stream(device: torch.device) -> None:
    """Wait until what this thread has launched is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -------------------------------------------------------------------------------------------- LoRA slots


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


def lora_model(number: int, tensors: Mapping[str, torch.Tensor], helper: Any, engine: Any) -> Any:
    """An adapter of the worker's LoRA manager, from tensors."""
    from vllm.lora.lora_model import LoRAModel

    lora_config = engine.vllm_config.lora_config
    given = dict(tensors)
    if helper.vllm_lora_scaling_factor != 1:  # vLLM scales B where it lies
        given |= {n: _copied(t) for n, t in given.items() if ".lora_B." in n or ".lora_embedding_B" in n}
    built = LoRAModel.from_lora_tensors(
        number,
        given,
        helper,
        device="cpu",
        dtype=lora_config.lora_dtype,
        model_vocab_size=engine.model_config.get_vocab_size(),
        weights_mapper=_rename_mapper(engine.model),
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
    for method in ("get_rename_mapper", "get_unstacked_mapper"):  # the second up to 0.27
        if hasattr(mapper, method):
            return getattr(mapper, method)()
    return mapper
