"""Noticing that a model is no longer built as it was when a plan of it was made."""

from __future__ import annotations

from functools import cache
from itertools import repeat
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lorasync.zero import can_be_sharded, full_shape

if TYPE_CHECKING:
    from torch import nn

ADAPTER_MODULES = (BaseTunerLayer, AuxiliaryTrainingWrapper)
_SHAPE = attrgetter("shape")


class Structure:
    """What a plan of a model depends on beside the values: modules, adapter layers, their shapes, state and scaling.

    Asking whether it still holds is cheap, as it is asked at each push: torch says what is registered with which module,
    and only adapter layers are looked at.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 1))
        >>> built = Structure(model)
        >>> _ = model[0].weight.data.zero_()
        >>> built.holds()
        True
        >>> model[0] = nn.Linear(1, 1)
        >>> built.holds()
        False
    """

    def __init__(self, model: nn.Module) -> None:
        self._changes = _Changes(model)
        layers: list[Any] = [m for m in model.modules() if isinstance(m, ADAPTER_MODULES)]
        self._layers = [layer.__dict__ for layer in layers]
        self._tokens = [layer.token_indices for layer in layers if hasattr(layer, "token_indices")]
        places: list[tuple[dict[str, Any], str]] = [
            (module._parameters, name)
            for layer in layers
            for module in layer.modules()
            for name, param in module._parameters.items()
            if param is not None
        ]
        self._holders = [held for held, _ in places]
        self._names = [name for _, name in places]
        self._params = self._held()
        self._sharded = any(map(can_be_sharded, self._params))
        now = self._now(self._params)  # with lists and dicts that change in place
        self._states = [value.copy() if isinstance(value, list | dict) else value for value in now]

    def holds(self) -> bool:
        """Whether nothing was added, removed, replaced, switched or scaled since."""
        if self._changes.count:
            return False
        params = self._held()
        return all(map(is_, params, self._params)) and self._states == self._now(params)

    def _held(self) -> list[Any]:
        return list(map(dict.get, self._holders, self._names))

    def _now(self, params: list[Any]) -> list[Any]:
        """Return what `holds` compares. There are hundreds of parameters and layers at each push, so the loops run in C."""
        found: list[Any] = [can_be_sharded(param) for param in params[:1]]
        # Without it bitsandbytes' packed parameters answer through Python.
        with torch._C.DisableTorchFunctionSubclass():
            found += map(full_shape if self._sharded else _SHAPE, params)
        for name in ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling"):
            found += map(dict.get, self._layers, repeat(name))
        found += [tuple(rows) for tokens in self._tokens for rows in tokens.values()]
        return found


class _Changes:
    """Counts the modules and parameters that were registered with one model's modules since this was made."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        _watch()
        for module in model.modules():
            _watched.setdefault(module, WeakSet()).add(self)


_watched: WeakKeyDictionary[nn.Module, WeakSet[_Changes]] = WeakKeyDictionary()


@cache
def _watch() -> None:
    register_module_module_registration_hook(_registered)
    register_module_parameter_registration_hook(_registered)


def _registered(module: nn.Module, *_: object) -> None:
    for changes in _watched.get(module, ()):
        changes.count += 1
