"""Configs of folders: read with lorasync's own errors, and written so that they are true of the merged model."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PACKED = ("quantization_config", "compression_config")
_SERVED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        LoadError: The file can't be read, or holds something else.
    """
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise LoadError(f"{file}: can't be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise LoadError(
            f"{file}: got no JSON ({error}), expected it. Fetch or save the file again."
        ) from error
    if not isinstance(found, dict):
        raise LoadError(f"{file}: got {type(found).__name__}, expected a JSON object.")
    return found


def adapter_config(folder: Path) -> Any:
    """Read PEFT's config of an adapter.

    Raises:
        LoadError: It can't be read, or is of a method that this PEFT doesn't know.
    """
    from peft import PeftConfig

    read_json(folder / "adapter_config.json")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # a missing key, an unknown method, a value that a config refuses
        text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise LoadError(
            f"{folder / 'adapter_config.json'}: got {text}, expected what this PEFT's save_pretrained writes."
        ) from error


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings of what packed the weights, wherever the config has them; None for a plain model."""
    for level in _levels(config):
        for key in _PACKED:
            if isinstance(level.get(key), dict):
                return dict(level[key])
    return None


def dtype_of(config: dict[str, Any], default: torch.dtype) -> torch.dtype:
    """Return the dtype that the model computes in: what a weight becomes whose own dtype is that of its packing."""
    for level in _levels(config):
        name = str(level.get("dtype") or level.get("torch_dtype")).removeprefix("torch.")
        found = getattr(torch, name, None)
        if found in _SERVED:
            return found  # type: ignore[no-any-return]
    return default


def merged_config(
    config: dict[str, Any], *, dtype: torch.dtype | None = None, packed: torch.dtype | None = None
) -> dict[str, Any]:
    """Say what is true of the merged model.

    Args:
        config: The base's.
        dtype: What all floating-point weights are written as; None keeps each one's own.
        packed: What weights became that were packed; None if nothing was.
    """
    made = copy.deepcopy(config)
    made.pop("transformers_weights", None)  # names a file of the base
    for level in _levels(made):
        for key in _PACKED:
            level.pop(key, None)
        said = "dtype" in level or "torch_dtype" in level
        if dtype is not None and (said or level is made):
            _say_dtype(level, dtype)
        elif packed is not None and said and dtype_of({"dtype": _said(level)}, torch.int8) == torch.int8:
            _say_dtype(level, packed)
    return made


def say_tied(config: dict[str, Any], tied: bool) -> None:
    """Write whether the output layer is the embedding; a nested text config says it too."""
    config["tie_word_embeddings"] = tied
    for level in _levels(config):
        if "tie_word_embeddings" in level:
            level["tie_word_embeddings"] = tied


def _said(level: dict[str, Any]) -> Any:
    return level.get("dtype") or level.get("torch_dtype")


def _say_dtype(level: dict[str, Any], dtype: torch.dtype) -> None:
    level.pop("torch_dtype", None)
    level["dtype"] = str(dtype).removeprefix("torch.")


def _levels(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the config and those nested in it (`text_config`, `vision_config`, …), outermost first."""
    yield config
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config") and key not in _PACKED:
            yield from _levels(value)
