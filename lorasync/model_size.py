"""What a model weighs before it is loaded: counted on a skeleton without storage, never by loading."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorasync.model_class import class_named_by

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasync.presets.quantization import QuantPreset

_BLOCK = 64
_NESTED_BLOCK = 256


@dataclass(frozen=True)
class Weights:
    """Elements of a model by what becomes of them: in bitsandbytes' format, or kept in the model's dtype."""

    quantized: int
    kept: int
    largest: int

    @property
    def total(self) -> int:
        """All elements, tied tensors counted once."""
        return self.quantized + self.kept

    def bytes(self, preset: QuantPreset | None, dtype: torch.dtype) -> int:
        """Return the bytes of the loaded model.

        Args:
            preset: how ``quantized`` is stored; None if nothing is.
            dtype: dtype of all that is not quantized.
        """
        per_weight = dtype.itemsize if preset is None else _bytes_per_weight(preset)
        return int(self.quantized * per_weight + self.kept * dtype.itemsize)


def skeleton(config: Any, *, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Build a model from its config on the meta device: shapes and names, no storage.

    Args:
        config: a `transformers.PretrainedConfig`.
        dtype: dtype of the floating-point parameters.
    """
    from transformers import AutoModelForCausalLM

    kind = class_named_by(config)
    make = AutoModelForCausalLM.from_config if kind is None else kind._from_config
    with torch.device("meta"):
        model = make(config, dtype=dtype)
    model.tie_weights()
    return model  # type: ignore[no-any-return]


def unquantized(config: Any) -> Any:
    """Return a copy of a config that says nothing of quantization: of the model that was quantized."""
    return type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})


def quantizable(model: nn.Module, *, skip: list[str] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that bitsandbytes would replace when transformers loads this model.

    Args:
        model: an unquantized transformers model, also on the meta device.
        skip: module names to leave out; by default output embeddings and tied weights (transformers' own
            rule).
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    keep_fp32 = getattr(model, "_keep_in_fp32_modules", None)
    left_out = HfQuantizer.get_modules_to_not_convert(model, skip, keep_fp32)
    for name, module in model.named_modules():
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(
            name, left_out
        ):
            yield name, module


def count_weights(model: nn.Module, *, quantize: bool, skip: list[str] | None = None) -> Weights:
    """Count a model's elements, split by whether bitsandbytes would quantize them.

    Args:
        model: an unquantized transformers model, usually a `skeleton`.
        quantize: False if the base stays in its dtype.
        skip: see `quantizable`.
    """
    packed = {id(m.weight): m.weight for _, m in quantizable(model, skip=skip)} if quantize else {}
    sizes = {id(p): p.numel() for p in model.parameters()}
    quantized = sum(sizes[i] for i in packed)
    return Weights(quantized, sum(sizes.values()) - quantized, max(sizes.values(), default=0))


def available_bytes(device: torch.device) -> int:
    """Return the bytes that a new allocation on this device can have, container limits included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _meminfo_available()
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return free if limit is None or used is None else min(free, limit - used + (_cgroup_cache() or 0))


def human(count: float) -> str:
    """Format bytes for a message: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.3g} GiB"


def _bytes_per_weight(preset: QuantPreset) -> float:
    if preset.bits == 8:
        return 1.0  # and one fp32 scale a row, which is noise
    scale = 1 / _BLOCK + 4 / (_BLOCK * _NESTED_BLOCK) if preset.double_quant else 4 / _BLOCK
    return 0.5 + scale


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_cache() -> int | None:
    # Page cache counts as used in a control group, but gives way to allocations.
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), None)
