"""Sources of weights: merged ones (`MergedSource`) or only what was trained (`FactorSource`).

Names are imported when they are asked for: a vLLM worker reads `lorasync.source.spec`, and needs no PEFT for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasync.source.factors import FactorSource
    from lorasync.source.merged import MergedSource
    from lorasync.source.meta import ParamMeta
    from lorasync.source.model import unwrap
    from lorasync.source.samples import base_samples
    from lorasync.source.spec import FactorBias, FactorModule, FactorRows, FactorSaved, FactorSpec

_HOMES = {
    "FactorSource": "factors",
    "MergedSource": "merged",
    "ParamMeta": "meta",
    "base_samples": "samples",
    "unwrap": "model",
    **dict.fromkeys(("FactorBias", "FactorModule", "FactorRows", "FactorSaved", "FactorSpec"), "spec"),
}

__all__ = [
    "FactorBias",
    "FactorModule",
    "FactorRows",
    "FactorSaved",
    "FactorSource",
    "FactorSpec",
    "MergedSource",
    "ParamMeta",
    "base_samples",
    "unwrap",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for, once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
