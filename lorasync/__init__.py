"""Keep a live vLLM engine in step with a policy trained by LoRA or QLoRA under DeepSpeed ZeRO.

Names that need an optional dependency live in submodules of their own: `lorasync.load` (bitsandbytes),
`lorasync.push` and `lorasync.verify` (vLLM, when they are used).

Nothing is imported before it is asked for: vLLM imports this package in every one of its processes, also where nobody
uses it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorasync.version import __version__ as __version__

if TYPE_CHECKING:
    from lorasync.errors import LorasyncError
    from lorasync.merge import merge_lora
    from lorasync.names import checkpoint_name
    from lorasync.planning.plan import plan
    from lorasync.presets import FP4, INT8, LORA_ZERO3, NF4, QLORA_ZERO2
    from lorasync.source import FactorSource, MergedSource, ParamMeta
    from lorasync.zero import check_zero, gathered, inspect_zero

_HOMES = {
    "LorasyncError": "errors",
    "merge_lora": "merge",
    "checkpoint_name": "names",
    **dict.fromkeys(("FP4", "INT8", "LORA_ZERO3", "NF4", "QLORA_ZERO2"), "presets"),
    "plan": "planning.plan",
    **dict.fromkeys(("FactorSource", "MergedSource", "ParamMeta"), "source"),
    **dict.fromkeys(("check_zero", "gathered", "inspect_zero"), "zero"),
}
_SUBMODULES = frozenset(
    {"errors", "export", "kernels", "load", "merge", "names", "presets", "push", "source", "verify", "zero"}
)

__all__ = [
    "FP4",
    "INT8",
    "LORA_ZERO3",
    "NF4",
    "QLORA_ZERO2",
    "FactorSource",
    "LorasyncError",
    "MergedSource",
    "ParamMeta",
    "check_zero",
    "checkpoint_name",
    "gathered",
    "inspect_zero",
    "merge_lora",
    "plan",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for, once."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES, "__version__"})
