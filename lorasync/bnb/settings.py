"""bitsandbytes' settings as a model's config has them, under ``quantization_config``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    """How bitsandbytes packed a checkpoint.

    Attributes:
        kind: "nf4", "fp4" or "int8".
        double_quant: Whether the scales of 4-bit weights are quantized, too.
        storage: The dtype that holds packed 4-bit weights.
        compute: The dtype that 4-bit layers compute in.
    """

    kind: str
    double_quant: bool
    storage: torch.dtype
    compute: torch.dtype

    @property
    def bits(self) -> int:
        """Bits of one packed weight: 4 or 8."""
        return 8 if self.kind == "int8" else 4


def read_settings(settings: Any) -> Settings | None:
    """Read a ``quantization_config``; None if it is of another method.

    Args:
        settings: What `config.json` holds, or transformers' object of it.

    Example:
        >>> read_settings({"quant_method": "bitsandbytes", "load_in_8bit": True}).kind
        'int8'
    """
    said = settings if isinstance(settings, dict) else settings.to_dict()
    method = said.get("quant_method") or ""
    name = str(getattr(method, "value", method)).rpartition(".")[2].lower()
    four, eight = bool(said.get("load_in_4bit")), bool(said.get("load_in_8bit"))
    if not (name.startswith("bitsandbytes") or (not name and (four or eight))):
        return None
    if four or (not eight and "4bit" in name):
        kind = "nf4" if str(said.get("bnb_4bit_quant_type", "fp4")) == "nf4" else "fp4"
    else:
        kind = "int8"
    return Settings(
        kind,
        bool(said.get("bnb_4bit_use_double_quant", False)),
        _dtype(said.get("bnb_4bit_quant_storage", "uint8")),
        _dtype(said.get("bnb_4bit_compute_dtype", "float32")),
    )


def _dtype(name: object) -> torch.dtype:
    found: torch.dtype = getattr(torch, str(name).removeprefix("torch."))
    return found
