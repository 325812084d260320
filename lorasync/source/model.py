"""Finding the policy inside whatever wraps it: which module has PEFT's state, and which one has the checkpoint's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from lorasync.errors import AdapterError
from lorasync.source.structure import ADAPTER_MODULES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

PEFT_MODELS = (PeftModel, PeftMixedModel, BaseTuner)
_TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(model: Any) -> nn.Module:
    """Take off what is around the policy, wherever it is: engines, DDP, FSDP1, `torch.compile`, actors, value heads.

    Parameters of a wrapper's own (a value head) are no part of the policy.

    Returns:
        The PEFT model; or the transformers model, where only a part of that is a PEFT model.

    Raises:
        TypeError: There is no module inside.
        AdapterError: There are several policies inside; their paths are named.

    Example:
        >>> inner = nn.Linear(1, 1)
        >>> unwrap(nn.DataParallel(inner)) is inner
        True
    """
    root = _peeled(model)
    if isinstance(root, (*PEFT_MODELS, PreTrainedModel)) or not _adapted(root):
        return root
    found = _outermost(root, (*PEFT_MODELS, PreTrainedModel))
    if len(found) > 1:
        paths = ", ".join(f"model.{path}" for path, _ in found)
        raise AdapterError(
            f"model: got {type(root).__name__} with {len(found)} policies inside, expected one. Pass the one to push: "
            f"{paths}."
        )
    return found[0][1] if found and _holds_all(found[0][1], root) else root


def base_of(model: nn.Module) -> nn.Module:
    """Return the base model with the adapter layers in it (a PreTrainedModel, usually)."""
    base = _peeled(_inside(model))
    if isinstance(base, PreTrainedModel) or not _adapted(base):
        return base
    found = _outermost(base, (PreTrainedModel,))  # PEFT around a value head, say
    return found[0][1] if len(found) == 1 and _holds_all(found[0][1], base) else base


def peft_of(model: nn.Module) -> Any:
    """Return the module that knows the adapters' configs: the PEFT model, wherever it is, or the model itself.

    Raises:
        AdapterError: There are several.
    """
    if hasattr(model, "peft_config"):
        return model
    found = _outermost(model, PEFT_MODELS)
    if len(found) > 1:
        raise AdapterError(
            f"model: got PEFT models at {', '.join(path for path, _ in found)}, expected one. Wrap the whole model "
            "with one adapter, or pass one of the parts."
        )
    return found[0][1] if found else model


def named(base: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name all modules below as if nothing were wrapped: compiled and checkpointed layers, FSDP, PEFT inside.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1))
        >>> model[0] = torch.compile(model[0])
        >>> [path for path, module in named(model)]
        ['', '0']
    """
    module = _peeled_inside(base)
    yield prefix, module
    for path, child in submodules(module, f"{prefix}." if prefix else ""):
        yield from named(child, path)


def transparent(module: nn.Module) -> nn.Module | None:
    """Return what a wrapper inside of a model runs, or None where the module is no wrapper."""
    if isinstance(module, PEFT_MODELS):
        return _inside(module)
    for name in _TRANSPARENT:
        inner = module._modules.get(name)
        if inner is not None:
            return inner
    return None


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name the module's own buffers that its checkpoint has."""
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def submodules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Name the children of ``module`` with their dotted paths."""
    for name, child in module._modules.items():
        if child is not None:
            yield prefix + name, child


def _peeled_inside(module: nn.Module) -> nn.Module:
    inner = transparent(module)
    return module if inner is None else _peeled_inside(inner)


def _inside(model: nn.Module) -> nn.Module:
    """Return the model that PEFT wraps."""
    held: Any = model
    if isinstance(model, PeftModel | PeftMixedModel):
        held = held.base_model
        if getattr(model, "_is_prompt_learning", False):
            return held  # type: ignore[no-any-return]
    return held.model if isinstance(held, BaseTuner) else held  # type: ignore[no-any-return]


def _peeled(model: Any) -> nn.Module:
    """Take off what holds one module and adds nothing to it."""
    inner = _inner(model)
    while inner is not None:
        model, inner = inner, _inner(inner)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a module or an engine with one in .module."
        )
    return model


def _inner(model: Any) -> Any:
    if isinstance(model, PEFT_MODELS):
        return None
    if not isinstance(model, nn.Module):
        return _of_object(model)
    held = model._modules
    for name in ("module", *_TRANSPARENT):
        if isinstance(held.get(name), nn.Module) and (len(held) == 1 or _is_engine(model)):
            return held[name]
    return None


def _of_object(model: Any) -> Any:
    """Return the one module that an object (an engine, an actor) holds; of several modules, the one with adapters."""
    held = getattr(model, "__dict__", {})
    if isinstance(held.get("module"), nn.Module):
        return held["module"]
    modules = {id(value): value for value in held.values() if isinstance(value, nn.Module)}
    if len(modules) > 1:
        modules = {key: value for key, value in modules.items() if _adapted(value)}
    if len(modules) > 1:
        names = ", ".join(f".{name}" for name, value in held.items() if id(value) in modules)
        raise AdapterError(
            f"model: got {type(model).__name__} with several policies, expected one. Pass one of {names}."
        )
    return next(iter(modules.values()), None)


def _is_engine(model: Any) -> bool:
    return hasattr(model, "backward") and hasattr(model, "step")


def _adapted(module: nn.Module) -> bool:
    return any(isinstance(each, (*ADAPTER_MODULES, *PEFT_MODELS)) for each in module.modules())


def _holds_all(part: nn.Module, root: nn.Module) -> bool:
    inside = {id(module) for module in part.modules()}
    return all(id(m) in inside for m in root.modules() if isinstance(m, ADAPTER_MODULES))


def _outermost(root: nn.Module, kinds: tuple[type, ...]) -> list[tuple[str, nn.Module]]:
    """Return the modules of these kinds that lie in no other module of these kinds, each once."""
    found: dict[int, tuple[str, nn.Module]] = {}
    stack = [("", root)]
    while stack:
        path, module = stack.pop()
        if isinstance(module, kinds) and _adapted(module):
            found.setdefault(id(module), (path, module))
        else:
            stack += reversed(list(submodules(module, f"{path}." if path else "")))
    return list(found.values())
