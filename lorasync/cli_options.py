"""Values of the command line's options: what they may be, and the near name where they are something else."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, TypeVar

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from peft import PeftConfig

    from lorasync.presets import QuantPreset

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_DTYPES = ("bfloat16", "float16", "float32")
_PLOTS = (".png", ".pdf", ".svg", ".jpg", ".jpeg")
T = TypeVar("T")


def dtype_of(option: str, text: str | None) -> torch.dtype | None:
    """Read a dtype to serve or write in: torch's name, or the common short one.

    Raises:
        typer.BadParameter: It is none.
    """
    import torch

    if text is None:
        return None
    lower = text.lower().removeprefix("torch.")
    known: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPES}
    return _one_of(option, _SHORT.get(lower, lower), known)


def preset_of(option: str, text: str | None) -> QuantPreset | None:
    """Read the name of a quantization preset; ``none`` and nothing mean no quantization.

    Raises:
        typer.BadParameter: There is no such preset.
    """
    from lorasync.presets import FP4, INT8, NF4

    if text is None:
        return None
    known: dict[str, QuantPreset | None] = {"nf4": NF4, "fp4": FP4, "int8": INT8, "none": None}
    return _one_of(option, text.lower(), known)


def lora_of(folder: str | None) -> PeftConfig | None:
    """Read the config of an adapter that was saved.

    Raises:
        LoadError: There is none.
    """
    if folder is None:
        return None
    from lorasync.export.config import adapter_config
    from lorasync.export.folders import adapter_folder

    return adapter_config(adapter_folder(folder))


def check_plot(option: str, path: Path | None) -> None:
    """Refuse a picture that could not be drawn, before the work that it shows.

    Raises:
        typer.BadParameter: The folder is not there, the ending is none, or matplotlib isn't installed.
    """
    from importlib.util import find_spec

    if path is None:
        return
    if path.suffix.lower() not in _PLOTS:
        raise typer.BadParameter(
            f"--plot: got {path.name}, expected a name that ends in {', '.join(_PLOTS)}."
        )
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{option}: got no folder {path.parent}, expected one that is there.")
    if find_spec("matplotlib") is None:
        raise typer.BadParameter(f"{option}: got no matplotlib. pip install 'lorasync[plot]'.")


def _one_of(option: str, given: str, known: Mapping[str, T]) -> T:
    if given in known:
        return known[given]
    near = [name for name in known if given and name.startswith(given)]
    near = near or difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise typer.BadParameter(f"{option}: got {given!r}, expected one of {', '.join(known)}.{hint}")
