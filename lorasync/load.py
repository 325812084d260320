"""`load_quantized`: a checkpoint becomes a frozen, quantized model that is ready to train adapters on."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import nn

from lorasync.errors import LoadError
from lorasync.memory import Weights, available_bytes, count_weights, human, skeleton
from lorasync.presets import NF4, QuantPreset

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PretrainedConfig, PreTrainedModel

_OLDEST_BITSANDBYTES = "0.46.1"


@dataclass(frozen=True)
class LoadReport:
    """What a load did: which modules are quantized, which large tensors are not, bytes, seconds, remarks."""

    path: str
    preset: str
    prequantized: bool
    device: str
    dtype: str
    storage_dtype: str
    quantized: tuple[str, ...]
    kept: tuple[tuple[str, str, int], ...]
    bytes_before: int
    bytes_after: int
    seconds: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        head = (
            f"{self.path}: {self.preset} on {self.device}, {len(self.quantized)} modules quantized, "
            f"{human(self.bytes_before)} in {self.dtype} became {human(self.bytes_after)} in "
            f"{self.seconds:.1f} s"
        )
        return "\n  ".join([head, *self.notes])


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
        device: where to load; by default this rank's GPU (``LOCAL_RANK``), or the CPU where there is none.
        storage_dtype: dtype that holds packed 4-bit weights; by default uint8, which every ZeRO stage keeps
            intact. FSDP2 needs ``dtype``.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        progress: show transformers' progress bar.
        check_memory: estimate first, and refuse what can't fit.
        **from_pretrained: passed on to `AutoModelForCausalLM.from_pretrained` (``revision``,
            ``attn_implementation``, ``trust_remote_code``, …).

    Raises:
        LoadError: bitsandbytes is missing or too old, the path is wrong, the checkpoint is quantized in
            another way, a ``device_map`` was given, or the model does not fit. Nothing has been loaded
            then.
        ZeroIncompatibilityError: the model would not work with ``ds_config``.

    Example:
        >>> model = load_quantized("HuggingFaceTB/SmolLM2-135M-Instruct", NF4)  # doctest: +SKIP
        >>> print(model.lorasync_report)  # doctest: +SKIP
    """
    started = time.perf_counter()
    _check_bitsandbytes()
    _refuse_device_map(from_pretrained)
    config = _read_config(path, from_pretrained)
    existing = _existing_quantization(path, config)
    preset = _agreed_preset(path, preset, existing)
    storage = _storage_dtype(preset, existing, storage_dtype)
    place = _device(device)
    weights = _weigh(config, dtype, from_pretrained)
    if check_memory:
        _check_fits(path, weights, preset, dtype, place)
    if existing is None:
        from_pretrained["quantization_config"] = preset.bnb_config(
            compute_dtype=dtype, storage_dtype=storage, **_skip_modules(from_pretrained)
        )
    model = _from_pretrained(path, dtype, place, progress, from_pretrained)
    _make_trainable(model, dtype, gradient_checkpointing)
    model.lorasync_report = _report(
        model,
        path=str(path),
        preset=preset.name,
        prequantized=existing is not None,
        device=str(place),
        dtype=_name(dtype),
        storage_dtype=_name(storage) if preset.bits == 4 else "int8",
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
    changed = 0
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            changed += 1
    return changed


def _check_bitsandbytes() -> None:
    try:
        installed = version("bitsandbytes")
    except PackageNotFoundError:
        raise LoadError(
            "load_quantized(): bitsandbytes is not installed, expected "
            f">= {_OLDEST_BITSANDBYTES}. pip install 'lorasync[qlora]'"
        ) from None
    if Version(installed) < Version(_OLDEST_BITSANDBYTES):
        raise LoadError(
            f"load_quantized(): bitsandbytes is {installed}, expected >= {_OLDEST_BITSANDBYTES}. "
            "pip install -U 'lorasync[qlora]'"
        )


def _refuse_device_map(from_pretrained: Mapping[str, Any]) -> None:
    if from_pretrained.get("device_map") is not None:
        raise LoadError(
            f"load_quantized(): got device_map={from_pretrained['device_map']!r}, expected none. A device "
            "map spreads "
            'one copy of the model over devices, which no distributed training can use (transformers: "DeepSpeed '
            'Zero-3 is not compatible with passing a device_map"). Leave it out: every rank loads onto its own '
            "device; device= picks another one."
        )


def _read_config(path: str | os.PathLike[str], from_pretrained: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    _check_directory(Path(path), from_pretrained)
    passed = {k: from_pretrained[k] for k in _CONFIG_KEYS if k in from_pretrained}
    try:
        return AutoConfig.from_pretrained(path, **passed)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{path}: got no readable config.json ({_first_line(error)}), expected a model directory or a hub id. "
            "Check the spelling; offline (HF_HUB_OFFLINE=1) only local paths and cached models can be loaded."
        ) from error


_CONFIG_KEYS = (
    "revision",
    "token",
    "trust_remote_code",
    "subfolder",
    "cache_dir",
    "local_files_only",
    "code_revision",
)


def _check_directory(path: Path, from_pretrained: Mapping[str, Any]) -> None:
    """Recognise the usual wrong paths by what lies there, before transformers gives a longer answer."""
    if path.suffix == ".gguf" or from_pretrained.get("gguf_file") is not None:
        raise LoadError(_already_quantized(path, "GGUF"))
    if not path.is_dir():
        if path.is_absolute() or str(path).startswith("."):
            raise LoadError(f"{path}: got no such directory, expected a model directory. Check the path.")
        return
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise LoadError(
            f"{path}: got a PEFT adapter, expected a whole model. Load the base model that adapter_config.json names "
            "(base_model_name_or_path), then PeftModel.from_pretrained(model, path, is_trainable=True)."
        )
    if any(path.glob("*.gguf")):
        raise LoadError(_already_quantized(path, "GGUF"))
    found = ", ".join(sorted(p.name for p in path.iterdir())[:5])
    raise LoadError(
        f"{path}: got a directory without config.json (it holds: {found or 'nothing'}), expected a model "
        "directory. Save one with model.save_pretrained(path)."
    )


def _already_quantized(path: object, method: str) -> str:
    return (
        f"{path}: got a checkpoint quantized by {method}, expected an unquantized or a bitsandbytes one. Its weights "
        "can't be quantized again: load the original 16-bit checkpoint of this model."
    )


def _existing_quantization(path: object, config: PretrainedConfig) -> dict[str, Any] | None:
    """Return the bitsandbytes settings of a pre-quantized checkpoint; refuse other methods."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = str(settings.get("quant_method", "an unknown method")).rpartition(".")[2].lower()
    if method not in {"bitsandbytes", "bits_and_bytes"}:
        raise LoadError(_already_quantized(path, method.upper()))
    return settings


def _agreed_preset(path: object, preset: QuantPreset, existing: dict[str, Any] | None) -> QuantPreset:
    """Return what the weights will be in; a pre-quantized checkpoint decides about double quantization."""
    if not isinstance(preset, QuantPreset):
        raise LoadError(
            f"load_quantized(): got preset={preset!r}, expected NF4, FP4 or INT8. Of a training preset pass "
            "its .quantization."
        )
    if existing is None:
        return preset
    kind = "int8" if existing.get("load_in_8bit") else str(existing.get("bnb_4bit_quant_type", "fp4"))
    if kind != preset.quant_type:
        raise LoadError(
            f"{path}: got preset {preset.name}, expected {kind.upper()}: the checkpoint was quantized to {kind} "
            f"already. Pass {kind.upper()}, or load the original 16-bit checkpoint."
        )
    return QuantPreset(preset.name, preset.quant_type, bool(existing.get("bnb_4bit_use_double_quant", False)))


def _storage_dtype(
    preset: QuantPreset, existing: dict[str, Any] | None, asked: torch.dtype | None
) -> torch.dtype:
    if existing is not None and preset.bits == 4:
        stored = getattr(torch, str(existing.get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch."))
        if asked not in (None, stored):
            raise LoadError(
                f"load_quantized(): got storage_dtype={_name(asked)}, expected {_name(stored)}: the checkpoint is "
                "packed in it already. Leave storage_dtype out, or load the original 16-bit checkpoint."
            )
        return stored  # type: ignore[no-any-return]
    return torch.uint8 if asked is None else asked


def _device(asked: str | torch.device | None) -> torch.device:
    if asked is not None:
        return torch.device(asked)
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _skip_modules(from_pretrained: dict[str, Any]) -> dict[str, Any]:
    skip = from_pretrained.pop("skip_modules", None)
    return {} if skip is None else {"llm_int8_skip_modules": list(skip)}


def _weigh(config: PretrainedConfig, dtype: torch.dtype, from_pretrained: Mapping[str, Any]) -> Weights:
    plain = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    return count_weights(
        skeleton(plain, dtype=dtype), quantize=True, skip=from_pretrained.get("skip_modules")
    )


def _check_fits(
    path: object, weights: Weights, preset: QuantPreset, dtype: torch.dtype, device: torch.device
) -> None:
    """Compare the quantized model, plus the one tensor that is being quantized, with what the device has."""
    copies = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = copies * (weights.bytes(preset, dtype) + weights.largest * dtype.itemsize)
    free = available_bytes(device)
    if needed > free:
        ranks = f" for {copies} ranks on this host" if copies > 1 else ""
        raise LoadError(
            f"{path}: got {human(free)} free on {device}, expected {human(needed)}{ranks} ({preset.name}, rest in "
            f"{_name(dtype)}). Free memory, take a smaller model, or pass check_memory=False to try anyway."
        )


def _from_pretrained(
    path: str | os.PathLike[str],
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
    settings: dict[str, Any],
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    if device.type == "cuda":
        torch.cuda.set_device(device)
    if (
        not is_deepspeed_zero3_enabled()
    ):  # transformers refuses a device map then, and takes the current device
        settings["device_map"] = {"": device}
    try:
        with _progress_bar(progress):
            return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **settings)
    except OSError as error:
        raise LoadError(
            f"{path}: got no readable weights ({_first_line(error)}), expected safetensors files beside "
            "config.json. Download the checkpoint again."
        ) from error


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
    for module in model.modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            module.compute_dtype = dtype
    model.enable_input_require_grads()
    if gradient_checkpointing:
        model.config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def _report(model: PreTrainedModel, **facts: Any) -> LoadReport:
    quantized = tuple(name for name, module in model.named_modules() if _is_bnb(module))
    packed = {id(model.get_submodule(name).weight) for name in quantized}
    kept = tuple(
        (name, _name(p.dtype), p.numel() * p.itemsize)
        for name, p in model.named_parameters()
        if id(p) not in packed and p.dim() > 1
    )
    size = sum(_stored_bytes(p) for p in model.parameters())
    return LoadReport(
        quantized=quantized, kept=kept, bytes_after=size, notes=_notes(model, kept, size), **facts
    )


def _notes(model: nn.Module, kept: tuple[tuple[str, str, int], ...], size: int) -> tuple[str, ...]:
    fused = [(name, kind, count) for name, kind, count in kept if model.get_parameter(name).dim() > 2]
    notes = []
    if fused:
        share = sum(count for _, _, count in fused) / size
        notes.append(
            f"{len(fused)} fused expert tensors stay {fused[0][1]} ({share:.0%} of the bytes; first: {fused[0][0]}): "
            "bitsandbytes quantizes nn.Linear only"
        )
    flat = [(name, kind, count) for name, kind, count in kept if model.get_parameter(name).dim() == 2]
    if flat:
        names = ", ".join(name for name, _, _ in flat[:4]) + (", …" if len(flat) > 4 else "")
        notes.append(f"not quantized: {names} ({human(sum(c for _, _, c in flat))} in {flat[0][1]})")
    return tuple(notes)


def _is_bnb(module: nn.Module) -> bool:
    return any(cls.__name__ in {"Linear4bit", "Linear8bitLt"} for cls in type(module).__mro__)


def _stored_bytes(param: nn.Parameter) -> int:
    """Return the bytes of a parameter with the scales that belong to it."""
    state = getattr(param, "quant_state", None)
    scales = [t for t in state.as_dict(packed=True).values() if isinstance(t, torch.Tensor)] if state else []
    row_scales = getattr(param, "SCB", None)
    extra = [*scales, *([row_scales] if isinstance(row_scales, torch.Tensor) else [])]
    return param.numel() * param.itemsize + sum(t.numel() * t.itemsize for t in extra)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
