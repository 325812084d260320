"""Finding the PEFT model inside whatever wraps it, and the adapters that a pass is about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftMixedModel, PeftModel
from torch import nn

from lorasync.errors import AdapterError, UnmergeableError
from lorasync.source.structure import ADAPTER_MODULES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Adapters = tuple[str, ...] | None
"""The adapters that are asked for by name; ``None`` means each layer's active ones."""


# PEFT's kinds, beside prompt learning, that no weights stand for.
_ON_ACTIVATIONS = {"ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA"}


def unwrap(model: Any) -> nn.Module:
    """Take off DeepSpeed's engine, DDP, FSDP1 and `torch.compile`.

    Raises:
        TypeError: There is no module inside.

    Example:
        >>> inner = nn.Linear(1, 1)
        >>> unwrap(nn.DataParallel(inner)) is inner
        True
    """
    while True:
        inner = _inner(model)
        if inner is None:
            break
        model = inner
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a module or an engine with one in .module."
        )
    return model


def _inner(model: Any) -> Any:
    if isinstance(model, PeftModel | PeftMixedModel):
        return None
    held = (
        model.__dict__.get("_modules", {}) if isinstance(model, nn.Module) else getattr(model, "__dict__", {})
    )
    for name in ("module", "_orig_mod", "_fsdp_wrapped_module"):
        if isinstance(held.get(name), nn.Module) and (len(held) == 1 or _is_engine(model)):
            return held[name]
    return None


def _is_engine(model: Any) -> bool:
    return hasattr(model, "backward") and hasattr(model, "step")


def base_of(model: nn.Module) -> nn.Module:
    """Return the base model with the adapter layers in it (a PreTrainedModel, usually)."""
    if not isinstance(model, PeftModel | PeftMixedModel):
        return model
    inner = model.base_model
    base: nn.Module = inner if getattr(model, "_is_prompt_learning", False) else inner.model
    return base


def pick_adapters(model: nn.Module, adapter: str | Sequence[str] | None) -> Adapters:
    """Check the adapter that was asked for against the model.

    Raises:
        AdapterError: The model has no adapter, or not this one, or it is switched off or merged in place.
        UnmergeableError: The adapter's kind has no merged form.
    """
    base = base_of(model)
    known = sorted(getattr(model, "peft_config", None) or getattr(base, "peft_config", None) or {})
    layers = [(path, m) for path, m in base.named_modules() if isinstance(m, ADAPTER_MODULES)]
    _refuse_kinds(model)
    if not layers:
        fix = "Wrap it with peft.get_peft_model first, or pass the PEFT model, not its base."
        raise AdapterError(f"model: got {type(base).__name__} without an adapter, expected one. {fix}")
    wanted = None if adapter is None else (adapter,) if isinstance(adapter, str) else tuple(adapter)
    for name in wanted or ():
        if name not in known:
            raise AdapterError(
                f"adapter: got {name!r}, expected one of {known}. Adapter names are as in add_adapter."
            )
    _refuse_states(layers)
    return wanted


def _refuse_states(layers: list[tuple[str, Any]]) -> None:
    for name, layer in layers:
        if layer.merged_adapters:
            raise AdapterError(
                f"{name}: got adapters {layer.merged_adapters} merged into the weights, expected none. "
                "Call model.unmerge_adapter() first: lorasync reads the model unmerged."
            )
        if layer.disable_adapters:
            raise AdapterError(
                f"{name}: got disabled adapters, expected enabled ones. Leave `disable_adapter()` first."
            )


def _refuse_kinds(model: nn.Module) -> None:
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning or kind in _ON_ACTIVATIONS:
            raise UnmergeableError(
                f"adapter {name!r}: got {kind}, expected a method that changes weights. It acts on "
                "activations, so no weights stand for it: serve it with PEFT, or train LoRA instead."
            )
        if getattr(config, "layer_replication", None):
            raise UnmergeableError(
                f"adapter {name!r}: got layer_replication, expected none: replicated layers share one base "
                "weight and differ in their adapters, which PEFT can't merge. Copy layers before training."
            )


def submodules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Name the children of ``module`` with their dotted paths."""
    for name, child in module._modules.items():
        if child is not None:
            yield prefix + name, child
