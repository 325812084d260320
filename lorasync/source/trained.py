"""What is trained: the active adapters and the parameters that require grad, pinned when a source is made."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from lorasync.errors import AdapterError, UnmergeableError
from lorasync.source.model import base_of, named, peft_of
from lorasync.source.structure import ADAPTER_MODULES
from lorasync.zero.fsdp import refuse_fsdp1

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

Adapters = tuple[str, ...] | None
"""The adapters that are asked for by name; ``None`` means each layer's active ones."""
Active = dict[str, tuple[str, ...]]
"""The adapters that act in each layer, by its path; layers where none does are left out."""

# PEFT's kinds, beside prompt learning, that no weights stand for.
_ON_ACTIVATIONS = {"ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA"}
_SHOWN = 8
_TRAINED = attrgetter("requires_grad")


def pick_adapters(model: nn.Module, adapter: str | Sequence[str] | None) -> Adapters:
    """Check the adapter that was asked for against the model.

    Raises:
        AdapterError: The model has no adapter, or not this one, or none acts, or it is switched off or merged in place.
        UnmergeableError: The adapter's kind has no merged form.
    """
    base = base_of(model)
    known = sorted(configs(model))
    layers = [(path, m) for path, m in named(base) if isinstance(m, ADAPTER_MODULES)]
    _refuse_kinds(model)
    refuse_fsdp1(param for _, layer in layers for param in layer.parameters())
    if any(param.is_inference() for param in model.parameters()):
        raise AdapterError(
            "model: got tensors that were made under torch.inference_mode(), expected ordinary ones: nothing tells whether "
            "they were written to. Make the model outside of it, or under torch.no_grad()."
        )
    if not layers:
        fix = "Wrap it with peft.get_peft_model first, or pass the PEFT model, not its base."
        raise AdapterError(f"model: got {type(base).__name__} without an adapter, expected one. {fix}")
    wanted = None if adapter is None else (adapter,) if isinstance(adapter, str) else _names(adapter)
    for name in wanted or ():
        if name not in known or not any(name in held(layer) for _, layer in layers):
            raise AdapterError(
                f"adapter: got {name!r}, expected one of {known}. Adapter names are as in add_adapter."
            )
    _refuse_states(layers)
    if not (active_in(model) if wanted is None else wanted):
        raise AdapterError(
            f"adapter: got no active adapter in any layer, expected one of {known or 'the adapters'}: the model computes "
            "what its frozen base does. Call model.set_adapter(…), or name the adapter: adapter=…."
        )
    return wanted


def _names(adapter: object) -> tuple[str, ...]:
    if not isinstance(adapter, list | tuple) or not all(isinstance(name, str) for name in adapter):
        raise AdapterError(f"adapter: got {adapter!r}, expected a name, or a list of names.")
    twice = sorted({name for name in adapter if adapter.count(name) > 1})
    if twice:
        raise AdapterError(
            f"adapter: got {', '.join(twice)} twice, expected each once: it would be merged twice."
        )
    return tuple(adapter)


def configs(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's config of each adapter."""
    return dict(getattr(peft_of(model), "peft_config", None) or {})


def held(layer: Any) -> set[str]:
    """Name the adapters that a layer has, active or not."""
    if isinstance(layer, ModulesToSaveWrapper):
        return set(layer.modules_to_save)
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return held(layer.token_adapter)
    return {str(name) for name in layer._get_available_adapters()}


def active_in(model: nn.Module) -> Active:
    """Say which adapters act in which layer."""
    found = {}
    for path, layer in named(base_of(model)):
        if isinstance(layer, ADAPTER_MODULES):
            own = held(layer)
            found[path] = tuple(name for name in layer.active_adapters if name in own)
    return {path: names for path, names in found.items() if names}


def only_active(model: nn.Module) -> str:
    """Name the one adapter that acts, in every layer that has it.

    Raises:
        AdapterError: Several act, or one that acts in some of its layers only.
    """
    active = active_in(model)
    names = sorted({name for each in active.values() for name in each})
    if len(names) != 1:
        raise AdapterError(
            f"adapter: got {names} active, expected one. Name it: FactorSource(model, adapter=…). "
            "To push several as one, combine them with add_weighted_adapter or use MergedSource."
        )
    layers = ((path, m) for path, m in named(base_of(model)) if isinstance(m, ADAPTER_MODULES))
    asleep = [path for path, layer in layers if names[0] in held(layer) and path not in active]
    if asleep:
        raise AdapterError(
            f"adapter {names[0]!r}: got it switched off in {_listed(asleep)}, expected it active in all its layers, or "
            "none of it is what was trained. Call model.set_adapter(…), or use MergedSource."
        )
    return names[0]


def check_still_active(model: nn.Module, pinned: Active | None) -> None:
    """Compare the active adapters with those that were active when the source was made.

    Raises:
        AdapterError: Others are.
    """
    now = active_in(model)
    if pinned is None or now == pinned:
        return
    before, after = (sorted({n for names in each.values() for n in names}) for each in (pinned, now))
    where = [path for path in {**pinned, **now} if pinned.get(path) != now.get(path)]
    raise AdapterError(
        f"adapter: got {after} active, expected {before} as when this source was made (changed: {_listed(where)}). A push "
        f"would serve another policy under the next version. Call model.set_adapter({before[0]!r}) first, name the "
        "adapter when you make the source (adapter=…: it is served whatever is active), or make a new source and "
        "connect() it."
    )


def beside(model: nn.Module, travelling: Iterable[Tensor]) -> dict[str, Tensor]:
    """Name the parameters of the policy that do not travel; none of them may be trained."""
    sent = {id(tensor) for tensor in travelling}
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in named(base_of(model)):
        for name, param in module._parameters.items():
            if param is not None and id(param) not in sent:
                found.setdefault(id(param), (f"{path}.{name}" if path else name, param))
    return dict(found.values())


def refuse_trained(others: dict[str, Tensor], adapter: str) -> None:
    """Raise for parameters that are trained and would never reach the engine.

    Raises:
        AdapterError: With their names.
    """
    with torch._C.DisableTorchFunctionSubclass():
        if not any(map(_TRAINED, others.values())):
            return
    trained = [name for name, param in others.items() if param.requires_grad]
    modules = sorted(
        {name.rpartition(".")[0].removesuffix(".base_layer").rpartition(".")[2] for name in trained}
    )
    raise AdapterError(
        f"{len(trained)} parameters are trained beside adapter {adapter!r} and are no part of it: {_listed(trained)}. "
        "Factors alone would leave them out. Use MergedSource, which serves every weight as it is; or train them as "
        f"part of the adapter: LoraConfig(modules_to_save={modules[:_SHOWN]}). If they are not "
        "trained: requires_grad_(False)."
    )


def _refuse_states(layers: list[tuple[str, Any]]) -> None:
    for name, layer in layers:
        if layer.merged_adapters:
            raise AdapterError(
                f"{name}: got adapters {layer.merged_adapters} merged into the weights, expected none. Call "
                "model.unmerge_adapter() first: lorasync reads the model unmerged. In 16 bits that does not give the base "
                "back exactly: if it was merged during training, load the base again instead."
            )
        if layer.disable_adapters:
            raise AdapterError(
                f"{name}: got disabled adapters, expected enabled ones. Leave `disable_adapter()` first."
            )


def _refuse_kinds(model: nn.Module) -> None:
    for name, config in configs(model).items():
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


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
