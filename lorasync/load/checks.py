"""The checks of `load_quantized`, most of them before a byte of the checkpoint is read; each gives one clear error."""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

from lorasync import bnb
from lorasync.errors import LoadError
from lorasync.model_class import class_named_by
from lorasync.model_size import Weights, available_bytes, human
from lorasync.presets import QuantPreset
from lorasync.quantization import LOADED, of_config
from lorasync.zero import is_sharded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from transformers import PretrainedConfig

_OLDEST_BITSANDBYTES = "0.46.1"
_SHOWN = 5


def check_bitsandbytes() -> None:
    try:
        installed = version("bitsandbytes")
    except PackageNotFoundError:
        raise LoadError(
            f"load_quantized(): bitsandbytes is not installed, expected >= {_OLDEST_BITSANDBYTES}. pip "
            "install 'lorasync[qlora]'"
        ) from None
    if Version(installed) < Version(_OLDEST_BITSANDBYTES):
        raise LoadError(
            f"load_quantized(): bitsandbytes is {installed}, expected >= {_OLDEST_BITSANDBYTES}. pip "
            "install -U 'lorasync[qlora]'"
        )


def refuse_device_map(from_pretrained: Mapping[str, Any]) -> None:
    if from_pretrained.get("device_map") is not None:
        raise LoadError(
            f"load_quantized(): got device_map={from_pretrained['device_map']!r}, expected none. A device "
            "map spreads one copy of the model over devices, which no distributed training can use "
            "(transformers: "
            '"DeepSpeed '
            'Zero-3 is not compatible with passing a device_map"). Leave it out: every rank loads onto '
            "its own device; device= picks another one."
        )


def check_arguments(dtype: object, from_pretrained: Mapping[str, Any]) -> None:
    """Refuse what transformers would take instead of what was asked for here, or would ignore.

    Raises:
        LoadError: naming the argument.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LoadError(
            f"dtype: got {dtype!r}, expected a floating-point torch.dtype, for example torch.bfloat16."
        )
    instead = {
        "quantization_config": "Pass a preset (NF4, FP4, INT8), or lorasync.presets.QuantPreset.",
        "load_in_4bit": "Pass the preset NF4.",
        "load_in_8bit": "Pass the preset INT8.",
        "torch_dtype": "Pass dtype=.",
        "config": "Save it beside the weights: memory and the ZeRO guard are judged by config.json.",
        "state_dict": "Save it with model.save_pretrained, and pass the folder.",
    }
    for name, fix in instead.items():
        if from_pretrained.get(name) is not None:
            raise LoadError(f"load_quantized(): got {name}, expected none. {fix}")


def check_skips(model: nn.Module, skip: object) -> None:
    """Refuse names of modules that the model doesn't have: they would be quantized.

    Args:
        model: the model that will be loaded; its skeleton will do.
        skip: what was given as ``skip_modules``.

    Raises:
        LoadError: naming them, and what there is.
    """
    if skip is None:
        return
    if not isinstance(skip, list | tuple) or not all(isinstance(name, str) for name in skip):
        raise LoadError(f"skip_modules: got {skip!r}, expected a list of names, for example ['lm_head'].")
    paths = [name for name, _ in model.named_modules()]
    unknown = [
        name for name in skip if not any(re.search(rf"(^|\.){re.escape(name)}($|\.)", path) for path in paths)
    ]
    if unknown:
        ends = sorted(
            {path.rpartition(".")[2] for path in paths if path and not path.rpartition(".")[2].isdigit()}
        )
        raise LoadError(f"skip_modules: got {unknown}, expected names of modules: {', '.join(ends)}.")


def check_loaded(path: object, found: Mapping[str, Any]) -> None:
    """Refuse a model that transformers completed with random weights.

    Raises:
        LoadError: naming what the checkpoint lacks.
    """
    missing = sorted(found.get("missing_keys", ()))
    other = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found.get("mismatched_keys", ()))
    if not missing and not other:
        return
    said = [
        f"{what} {', '.join(names[:_SHOWN])}{' …' if len(names) > _SHOWN else ''}"
        for what, names in (("no", missing), ("another shape of", other))
        if names
    ]
    stray = sorted(found.get("unexpected_keys", ()))
    hint = f" It has {', '.join(stray[:_SHOWN])}, which the model doesn't." if stray else ""
    raise LoadError(
        f"{path}: got {' and '.join(said)}, expected every weight of the model: the rest is random.{hint} Is the checkpoint "
        "complete, and its config.json its own?"
    )


def read_config(path: str | os.PathLike[str], from_pretrained: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    _check_directory(Path(path), from_pretrained)
    passed = {k: from_pretrained[k] for k in _CONFIG_KEYS if k in from_pretrained}
    try:
        return AutoConfig.from_pretrained(path, **passed)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{path}: got no readable config.json ({error_line(error)}), expected a model directory or a "
            "hub id. Check the spelling; offline (HF_HUB_OFFLINE=1) only local paths and cached models can "
            "be loaded."
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


def loading_class(path: object, config: PretrainedConfig) -> Any:
    """Return the class to load with: the one that wrote the checkpoint, or the one of its kind with a language-model head.

    Raises:
        LoadError: the config names no class that this transformers has, and its kind has no such head.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    kind = class_named_by(config)
    if kind is not None:
        return kind
    if getattr(config, "auto_map", None) or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    named = getattr(config, "architectures", None) or "no architectures"
    raise LoadError(
        f"{path}: got {named} ({type(config).__name__}), expected architectures in config.json with a class of this "
        "transformers. Add the class that the weights were saved from, or upgrade transformers."
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
            f"{path}: got a PEFT adapter, expected a whole model. Load the base model that "
            "adapter_config.json names (base_model_name_or_path), then PeftModel.from_pretrained(model, "
            "path, is_trainable=True)."
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
        f"{path}: got a checkpoint quantized by {method}, expected an unquantized or a bitsandbytes one. "
        "Its weights can't be quantized again: load the original 16-bit checkpoint of this model."
    )


def existing_quantization(path: object, config: PretrainedConfig) -> bnb.Settings | None:
    """Return the bitsandbytes settings of a pre-quantized checkpoint; refuse other methods."""
    packed = of_config(config)
    if packed.kind not in LOADED:
        raise LoadError(_already_quantized(path, packed.name))
    found = getattr(config, "quantization_config", None)
    return None if found is None else bnb.read_settings(found)


def agreed_preset(path: object, preset: QuantPreset, existing: bnb.Settings | None) -> QuantPreset:
    """Return what the weights will be in; a pre-quantized checkpoint decides about double quantization."""
    if not isinstance(preset, QuantPreset):
        raise LoadError(
            f"load_quantized(): got preset={preset!r}, expected NF4, FP4 or INT8. Of a training preset pass "
            "its .quantization."
        )
    if existing is None:
        return preset
    kind = existing.kind
    if kind != preset.quant_type:
        raise LoadError(
            f"{path}: got preset {preset.name}, expected {kind.upper()}: the checkpoint was quantized to "
            f"{kind} already. Pass {kind.upper()}, or load the original 16-bit checkpoint."
        )
    return QuantPreset(preset.name, preset.quant_type, existing.double_quant)


def agreed_storage(
    preset: QuantPreset, existing: bnb.Settings | None, asked: torch.dtype | None
) -> torch.dtype:
    if existing is not None and preset.bits == 4:
        if asked not in (None, existing.storage):
            raise LoadError(
                f"load_quantized(): got storage_dtype={dtype_name(asked)}, expected {dtype_name(existing.storage)}: "
                "the checkpoint is packed in it already. Leave storage_dtype out, or load the original "
                "16-bit checkpoint."
            )
        return existing.storage
    return torch.uint8 if asked is None else asked


def check_fits(
    path: object, weights: Weights, preset: QuantPreset, dtype: torch.dtype, device: torch.device
) -> None:
    """Compare the quantized model, plus the one tensor that is being quantized, with what the device has."""
    copies = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = copies * (weights.bytes(preset, dtype) + weights.largest * dtype.itemsize)
    free = available_bytes(device)
    if needed > free:
        ranks = f" for {copies} ranks on this host" if copies > 1 else ""
        raise LoadError(
            f"{path}: got {human(free)} free on {device}, expected {human(needed)}{ranks} ({preset.name}, "
            f"rest in {dtype_name(dtype)}). Free memory, take a smaller model, or pass check_memory=False "
            "to try anyway."
        )


def check_dequantizes(path: object, model: nn.Module) -> None:
    """Refuse weights that this CPU's forward would compute with wrong scales.

    With AVX512, bitsandbytes 0.50.2 takes another block's scale in rows that are no whole number of blocks.
    """
    wrong = [name for name, module in model.named_modules() if _is_dequantized_wrong(module)]
    if wrong:
        raise LoadError(
            f"{path}: bitsandbytes reads {len(wrong)} 4-bit weights wrong on this CPU, {', '.join(wrong[:3])} for instance: "
            "got rows that are no multiple of 64 elements, expected them to be. Load onto a GPU, where they are read "
            "right, or leave these out: skip_modules=[…]."
        )


def _is_dequantized_wrong(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and not is_sharded(weight) and bnb.reads_wrong(weight)


def dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def error_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
