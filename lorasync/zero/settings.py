"""A training config in any of its forms, read into the few settings that the guard judges."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lorasync.errors import ZeroIncompatibilityError
from lorasync.zero.keys import ZERO
from lorasync.zero.section import flag, known_keys, read_section, twice
from lorasync.zero.unknown import UnknownKey, unknown_keys

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Fsdp2:
    """Stands for a DeepSpeed config where the model is trained with FSDP2 (`fully_shard`)."""

    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class ZeroSettings:
    """The settings of a training config that the guard judges by.

    ``engine_dtype`` is None where the config says "auto" and nobody has resolved it yet. ``raw`` is the
    DeepSpeed config as it was given, which is not compared: configs that say the same under other names are equal.
    ``zero`` has the fields of ``zero_optimization`` by DeepSpeed's own names, ``ignored`` the keys that DeepSpeed ignores.
    """

    source: str
    framework: Literal["deepspeed", "fsdp1", "fsdp2"] = "deepspeed"
    stage: int = 0
    engine_dtype: torch.dtype | None = torch.float32
    optimizer_offload: str = "none"
    param_offload: str = "none"
    hpz: int = 1
    quantized_weights: bool = False
    quantized_nontrainable_weights: bool = False
    all_reduce_fetch: bool = False
    auto: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)
    zero: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[UnknownKey, ...] = ()

    @property
    def sharded(self) -> bool:
        """Whether parameters are partitioned over the ranks."""
        return self.framework != "deepspeed" or self.stage == 3


def read_settings(config: Any) -> ZeroSettings:
    """Read the settings out of a training config.

    DeepSpeed's own config model reads ``zero_optimization`` where DeepSpeed is installed, and a table elsewhere: a field's
    name counts as well as its alias (``use_all_reduce_for_fetch_params``, ``stage3_use_all_reduce_for_fetch_params``).

    Args:
        config: a DeepSpeed config as a dict or the path of a JSON file; an `HfDeepSpeedConfig`; transformers'
            `TrainingArguments`; accelerate's `DeepSpeedPlugin` or `FullyShardedDataParallelPlugin`; a DeepSpeed
            engine; or `Fsdp2`.

    Raises:
        ZeroIncompatibilityError: the file is missing or no JSON, the object is none of these, a key is misspelt or
            there under two names, or DeepSpeed refuses a value.

    Example:
        >>> read_settings({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}).stage
        3
    """
    if isinstance(config, ZeroSettings):
        return config
    if isinstance(config, Fsdp2):
        return ZeroSettings("FSDP2", framework="fsdp2", engine_dtype=config.dtype)
    if isinstance(config, Mapping):
        return _from_dict(config, "a dict")
    if isinstance(config, (str, os.PathLike)):
        return _from_dict(_read_json(Path(config)), str(config))
    if hasattr(config, "per_device_train_batch_size"):
        return _from_arguments(config)
    if hasattr(config, "fsdp_version"):
        return _from_fsdp_plugin(config)
    if hasattr(config, "hf_ds_config"):
        return _from_dict(config.hf_ds_config.config, "DeepSpeedPlugin", fallback=_environment_dtype())
    if hasattr(config, "zero_optimization_stage"):
        return _from_dict(config.config, "the engine's own config")
    if hasattr(config, "is_zero3") and hasattr(config, "config"):
        return _from_dict(config.config, type(config).__name__)
    raise ZeroIncompatibilityError(
        f"ds_config: got {type(config).__name__}, expected a DeepSpeed config (dict or path of a JSON "
        "file), HfDeepSpeedConfig, TrainingArguments, DeepSpeedPlugin, FullyShardedDataParallelPlugin or "
        "lorasync.zero.Fsdp2()."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(), object_pairs_hook=_each_once)
    except OSError as error:
        raise ZeroIncompatibilityError(
            f"ds_config: got {path}, which can't be read ({error.strerror}), expected a JSON file. Check "
            "the path."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ZeroIncompatibilityError(
            f"ds_config: got {path}, which is no JSON ({error}), expected a DeepSpeed config. Correct the "
            "file."
        ) from error
    if not isinstance(found, dict):
        raise ZeroIncompatibilityError(
            f"ds_config: got {path} with a {type(found).__name__} in it, expected an object. Correct the "
            "file."
        )
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice in one section, as DeepSpeed does; Python takes the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        again = sorted({key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1})
        raise ZeroIncompatibilityError(
            f"ds_config: got {', '.join(again)} more than once in one section, expected each key once. Correct the file."
        )
    return found


def _from_arguments(arguments: Any) -> ZeroSettings:
    dtype = _flag_dtype(arguments.bf16, arguments.fp16)
    resolved = getattr(arguments, "hf_deepspeed_config", None)
    given = resolved.config if resolved is not None else getattr(arguments, "deepspeed", None)
    if given:
        config = _read_json(Path(given)) if isinstance(given, (str, os.PathLike)) else given
        return _from_dict(config, "TrainingArguments", fallback=dtype)
    if getattr(arguments, "fsdp", None):
        options = getattr(arguments, "fsdp_config", None)
        version = options.get("version", 2) if isinstance(options, Mapping) else 2
        return ZeroSettings("TrainingArguments (FSDP)", framework=_fsdp(version), engine_dtype=dtype)
    return ZeroSettings("TrainingArguments (no DeepSpeed)", engine_dtype=torch.float32)


def _from_fsdp_plugin(plugin: Any) -> ZeroSettings:
    policy = getattr(plugin, "mixed_precision_policy", None)
    return ZeroSettings(
        "FullyShardedDataParallelPlugin",
        framework=_fsdp(plugin.fsdp_version),
        engine_dtype=getattr(policy, "param_dtype", None) or _environment_dtype(),
    )


def _fsdp(version: Any) -> Literal["fsdp1", "fsdp2"]:
    return "fsdp1" if int(version) == 1 else "fsdp2"


def _from_dict(config: Mapping[str, Any], source: str, fallback: torch.dtype | None = None) -> ZeroSettings:
    unknown = unknown_keys(config, known_keys())
    given = _zero_of(config, source)
    _refuse_all([str(each) for each in unknown if each.wrong] + twice(given), source)
    stage = _stage(given.get("stage", 0), source)
    zero = read_section(given, source)
    return ZeroSettings(
        source=source,
        stage=stage,
        engine_dtype=_engine_dtype(config, fallback),
        optimizer_offload=_device(zero, "offload_optimizer"),
        param_offload=_device(zero, "offload_param"),
        hpz=_number(zero.get("zero_hpz_partition_size"), 1),
        quantized_weights=bool(zero.get("zero_quantized_weights")),
        quantized_nontrainable_weights=bool(zero.get("zero_quantized_nontrainable_weights")),
        all_reduce_fetch=bool(zero.get("use_all_reduce_for_fetch_params")),
        auto=tuple(_auto_keys(config)),
        zero=zero,
        ignored=tuple(each for each in unknown if not each.wrong),
        raw=config,
    )


def _refuse_all(wrong: list[str], source: str) -> None:
    if wrong:
        raise ZeroIncompatibilityError("\n  ".join([f"ds_config: got {source} with wrong keys:", *wrong]))


def _zero_of(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Return the section; true and false are its deprecated forms, for stage 1 and none."""
    zero = config.get(ZERO)
    if zero is None or isinstance(zero, bool):
        return {"stage": int(bool(zero))}
    return _section(config, ZERO, source)


def _section(config: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    found = config.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise ZeroIncompatibilityError(
            f"{key}: got {found!r} in {source}, expected a section ({{…}}). Correct the config."
        )
    return found or {}


def _stage(value: Any, source: str) -> int:
    for stage in range(4):
        if value == stage or value == str(stage):
            return stage
    raise ZeroIncompatibilityError(
        f"{ZERO}.stage: got {value!r} in {source}, expected 0, 1, 2 or 3. Correct the config."
    )


def _engine_dtype(config: Mapping[str, Any], fallback: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that DeepSpeed casts parameters to; fp32 means that it casts nothing."""
    fp16, bf16 = (
        _enabled(config, "fp16"),
        _enabled(config, "bf16" if config.get("bf16") is not None else "bfloat16"),
    )
    if fp16 is True and bf16 is True:
        raise ZeroIncompatibilityError(
            "fp16.enabled, bf16.enabled: got both true, expected one. Remove one of them."
        )
    if "auto" in (fp16, bf16) and True not in (fp16, bf16):
        return fallback
    if "fp16" not in config and "bf16" not in config and "bfloat16" not in config and fallback is not None:
        return fallback
    return _flag_dtype(bf16 is True, fp16 is True)


def _enabled(config: Mapping[str, Any], key: str) -> bool | Literal["auto"]:
    value = _section(config, key, "the config").get("enabled", False)
    return "auto" if value == "auto" else flag(f"{key}.enabled", value)


def _flag_dtype(bf16: bool, fp16: bool) -> torch.dtype:
    return _DTYPES["bf16" if bf16 else "fp16" if fp16 else "fp32"]


def _environment_dtype() -> torch.dtype | None:
    """Return what accelerate's launcher was told: it fills in the plugin's precision later."""
    return {**_DTYPES, "no": torch.float32}.get(os.environ.get("ACCELERATE_MIXED_PRECISION", ""))


def _device(zero: Mapping[str, Any], key: str) -> str:
    section = zero.get(key)
    return str(section.get("device") or "none") if isinstance(section, Mapping) else "none"


def _number(value: Any, default: int) -> int:
    return value if isinstance(value, int) else default


def _auto_keys(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            keys += _auto_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            keys.append(prefix + key)
    return keys
