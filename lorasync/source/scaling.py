"""Comparing each layer's scaling with what its adapter's config says, which is what LoRA slots scale by."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from lorasync.errors import Mismatch, MismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasync.source.spec import FactorModule, FactorSpec

_FIX = (
    "The layer was scaled by hand (scale_layer, set_scale, rescale_adapter_scale …). Use MergeInWorker or MergedSource, "
    "which take each layer's own scaling, or undo it: unscale_layer(), set_scale(adapter, 1)."
)


def refuse_rescaled(spec: FactorSpec) -> None:
    """Refuse what serves an adapter by its config, where layers are scaled otherwise.

    Raises:
        MismatchError: With each such layer.
    """
    wrong = [
        Mismatch(module.weight, f"a scaling of {module.scaling:g}", f"{expected:g}, as its config says", _FIX)
        for module in spec.modules
        if (expected := from_config(spec.config, module)) is not None
        and not math.isclose(module.scaling, expected, rel_tol=1e-6, abs_tol=1e-12)
    ]
    if wrong:
        raise MismatchError("LoRA slots scale by the adapter's config, not as these layers do.", wrong)


def from_config(config: Mapping[str, Any], module: FactorModule) -> float | None:
    """Compute alpha / r (or alpha / √r) of a module as PEFT does when it makes the layer; None for fused experts.

    As ``peft.tuners.lora.model.LoraModel._create_and_replace``.
    """
    if module.kind == "experts" or "lora_alpha" not in config:
        return None
    path = re.split(r"\.lora_(?:embedding_)?A\b", module.a.removeprefix("base_model.model."))[0]
    alpha = float(_matching(config.get("alpha_pattern"), path, config["lora_alpha"]))
    rank = float(_matching(config.get("rank_pattern"), path, config["r"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
