"""`load_quantized`: a checkpoint becomes a frozen, quantized model that is ready for adapters."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from lorasync import bnb
from lorasync.errors import LoadError
from lorasync.load.checks import (
    agreed_preset,
    agreed_storage,
    check_arguments,
    check_bitsandbytes,
    check_dequantizes,
    check_fits,
    check_loaded,
    check_skips,
    dtype_name,
    error_line,
    existing_quantization,
    loading_class,
    read_config,
    refuse_device_map,
)
from lorasync.load.report import make_report
from lorasync.model_size import count_weights, skeleton, unquantized
from lorasync.presets import NF4, QuantPreset
from lorasync.zero import ZeroPlan, check_zero

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedModel


def load_quantized(
    path: str | os.PathLike[str],
    preset: QuantPreset = NF4,
    *,
    dtype: torch.dtype = torch.bfloat16,
    ds_config: Any = None,
    device: str | torch.device | None = None,
    storage_dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = True,
    progress: bool = True,
    check_memory: bool = True,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Load a causal language model with its linear layers quantized by bitsandbytes, ready for adapters.

    The base is frozen and in train mode, input gradients are on, checkpointing is non-reentrant, nothing is
    upcast to fp32, and bitsandbytes' in-place repacking on AVX512-BF16 CPUs is switched off. The model's
    ``lorasync_report`` is the `LoadReport`.

    Args:
        path: a local directory or a hub id; a checkpoint that bitsandbytes quantized before is taken as it
            is.
        preset: `NF4`, `FP4` or `INT8`.
        dtype: dtype of what is not quantized, and of the arithmetic: the dtype of the DeepSpeed engine.
        ds_config: the DeepSpeed config that the model will be trained with, in any form that `check_zero`
            takes. Combinations that don't work are refused before anything is loaded.
        device: where to load; by default, and with ``"cuda"``, this rank's GPU (``LOCAL_RANK``), or the CPU where there
            is none.
        storage_dtype: dtype that holds packed 4-bit weights; by default uint8, which every ZeRO stage keeps
            intact. FSDP1 needs ``dtype``.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        progress: show transformers' progress bar.
        check_memory: estimate first, and refuse what can't fit.
        **from_pretrained: passed on to `from_pretrained` of the class that the config names (``revision``,
            ``attn_implementation``, ``trust_remote_code``, …).

    Raises:
        LoadError: bitsandbytes is missing or too old, the path is wrong, the checkpoint is quantized in
            another way, an argument contradicts the preset (``device_map``, ``quantization_config``, ``config``), or the
            model does not fit. Nothing has been loaded then. Or the model was loaded, and its checkpoint lacks weights, or
            this CPU's bitsandbytes reads some of them wrong.
        ZeroIncompatibilityError: the model would not work with ``ds_config``.

    Example:
        >>> model = load_quantized("HuggingFaceTB/SmolLM2-135M-Instruct", NF4)  # doctest: +SKIP
        >>> print(model.lorasync_report)  # doctest: +SKIP
    """
    started = time.perf_counter()
    check_bitsandbytes()
    refuse_device_map(from_pretrained)
    check_arguments(dtype, from_pretrained)
    config = read_config(path, from_pretrained)
    kind, existing = loading_class(path, config), existing_quantization(path, config)
    preset = agreed_preset(path, preset, existing)
    storage = agreed_storage(preset, existing, storage_dtype)
    if ds_config is not None:
        check_zero(ZeroPlan(config, preset, dtype=dtype, storage_dtype=storage), ds_config)
    place = _device(device)
    shapes, skip = skeleton(unquantized(config), dtype=dtype), from_pretrained.get("skip_modules")
    check_skips(shapes, skip)
    weights = count_weights(shapes, quantize=True, skip=skip)
    if check_memory:
        check_fits(path, weights, preset, dtype, place)
    if existing is None:
        from_pretrained["quantization_config"] = preset.bnb_config(
            compute_dtype=dtype, storage_dtype=storage, **_skip_modules(from_pretrained)
        )
    model = _from_pretrained(kind, path, dtype, place, progress, from_pretrained)
    check_dequantizes(path, model)
    _make_trainable(model, dtype, gradient_checkpointing)
    model.lorasync_report = make_report(
        model,
        path=str(path),
        preset=preset.name,
        prequantized=existing is not None,
        device=str(place),
        dtype=dtype_name(dtype),
        storage_dtype=dtype_name(storage) if preset.bits == 4 else "int8",
        bytes_before=weights.total * dtype.itemsize,
        seconds=time.perf_counter() - started,
    )
    return model


def close_avx512_trap(model: nn.Module) -> int:
    """Stop bitsandbytes from repacking 4-bit weights in place on the CPU; return the modules changed.

    `Linear4bit.forward` in eval mode, on inputs without gradients, on a CPU with AVX512-BF16, rewrites the
    packed weight into another layout. Whatever dequantizes or gathers it later (a merge, ZeRO-3) then reads
    garbage. The forward without repacking gives the same result, only slower.

    Args:
        model: any model; `load_quantized` has done this already.
    """
    return bnb.close_traps(model)


def _device(asked: str | torch.device | None) -> torch.device:
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    place = torch.device(("cuda" if on_gpu else "cpu") if asked is None else asked)
    if place != torch.device("cuda"):
        return place
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _skip_modules(from_pretrained: dict[str, Any]) -> dict[str, Any]:
    skip = from_pretrained.pop("skip_modules", None)
    return {} if skip is None else {"llm_int8_skip_modules": list(skip)}


def _from_pretrained(
    kind: Any,
    path: str | os.PathLike[str],
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
    settings: dict[str, Any],
) -> PreTrainedModel:
    from transformers.integrations import is_deepspeed_zero3_enabled

    if device.type == "cuda":
        torch.cuda.set_device(device)
    if (
        not is_deepspeed_zero3_enabled()
    ):  # transformers refuses a device map then, and takes the current device
        settings["device_map"] = {"": device}
    try:
        with _progress_bar(progress):
            model, found = kind.from_pretrained(path, dtype=dtype, output_loading_info=True, **settings)
    except (OSError, SafetensorError) as error:
        raise LoadError(
            f"{path}: got no readable weights ({error_line(error)}), expected safetensors files beside "
            "config.json. Download the checkpoint again."
        ) from error
    check_loaded(path, found)
    return model


@contextmanager
def _progress_bar(shown: bool) -> Iterator[None]:
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    try:
        logging.enable_progress_bar() if shown else logging.disable_progress_bar()
        yield
    finally:
        logging.enable_progress_bar() if was_shown else logging.disable_progress_bar()


def _make_trainable(model: PreTrainedModel, dtype: torch.dtype, gradient_checkpointing: bool) -> None:
    """Do what `prepare_model_for_kbit_training` is for, without its upcast of everything else to fp32."""
    close_avx512_trap(model)
    model.requires_grad_(False)
    bnb.set_compute_dtype(model, dtype)
    model.enable_input_require_grads()
    if gradient_checkpointing:
        model.config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
