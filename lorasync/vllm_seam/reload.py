"""VLLM's layerwise reload: what it keeps of a layer, and what it does with a layer that has been loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lorasync.vllm_seam.in_place import in_place
from lorasync.vllm_seam.layers import quant_method

if TYPE_CHECKING:
    from collections.abc import Iterator


def as_constructed(layer: torch.nn.Module) -> tuple[dict[str, torch.Tensor], torch.device]:
    """Return the parameters that a layer's constructor made, on meta, and the device that they were for."""
    from vllm.model_executor.model_loader.reload import layerwise

    info = layerwise.get_layerwise_info(layer)
    return info.restore_metadata[0], info.restore_device


def never_reloaded() -> frozenset[str]:
    """Return the names of parameters that vLLM leaves where they are; loaders write to them in place."""
    from vllm.model_executor.model_loader.reload import meta

    return frozenset(getattr(meta, "SKIP_TENSORS", ()))


def fresh_parameters(layer: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Make a layer's parameters once more, in the layout that its loaders expect."""
    from vllm.model_executor.model_loader.reload import layerwise, meta, sanitize

    recorded, device = as_constructed(layer)
    stay = never_reloaded()
    for name, param in recorded.items():
        if name in stay:
            continue
        with torch.device(device):
            made: Any = meta.materialize_meta_tensor(param)
        made.zero_()  # padding is not loaded
        sanitize.restore_layer_refs(made, layer)
        if hasattr(made, "weight_loader"):
            made.weight_loader = layerwise._get_original_loader(made)
        yield name, made


def process(layer: Any) -> None:
    """Quantize and repack a layer that has been loaded, as vLLM does when an engine starts."""
    if hasattr(layer, "_already_called_process_weights_after_loading"):
        del layer._already_called_process_weights_after_loading
    method = quant_method(layer)
    if method is None:
        return
    in_place(layer, lambda: method.process_weights_after_loading(layer))
    _prepack_experts_for_cpu(layer)
    if hasattr(layer, "update_param_tp_status"):
        layer.update_param_tp_status()


def _prepack_experts_for_cpu(layer: Any) -> None:
    """On a CPU vLLM packs experts when their kernel is first set up, and not again after a reload (read in 0.32)."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    method: Any = layer.quant_method
    if not isinstance(method, UnquantizedFusedMoEMethod) or layer.w13_weight.device.type != "cpu":
        return
    kernel: Any = method.moe_kernel
    if kernel is not None:  # up to 0.26 there is none, and packing is a part of the processing
        kernel.fused_experts.process_weights_after_loading(layer)
