"""Whether a model is still built as it was when a plan of it was made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lorasync.zero import full_shape

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTER_MODULES = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class Structure:
    """What a plan of a model depends on beside the values: modules, adapter layers, their shapes, state and scaling.

    Asking whether it still holds is cheap, as it is asked at each push: torch counts what is registered anywhere,
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
        _Registrations.start()
        self._registered = _Registrations.count
        self._layers: list[Any] = [m for m in model.modules() if isinstance(m, ADAPTER_MODULES)]
        self._params: list[tuple[dict[str, Any], str, Tensor]] = [
            (module._parameters, name, param)
            for layer in self._layers
            for module in layer.modules()
            for name, param in module._parameters.items()
            if param is not None
        ]
        self._states = self._now()

    def holds(self) -> bool:
        """Whether nothing was added, removed, replaced, switched or scaled since."""
        return (
            self._registered == _Registrations.count
            and all(held.get(name) is param for held, name, param in self._params)
            and self._states == self._now()
        )

    def _now(self) -> list[Any]:
        found: list[Any] = [hasattr(param, "ds_id") for _, _, param in self._params[:1]]
        found += [full_shape(param) for _, _, param in self._params]
        for layer in self._layers:  # hundreds, at each push: no properties
            held = layer.__dict__
            active = held.get("_active_adapter")
            found += (
                tuple(active) if isinstance(active, list) else active,
                held.get("_disable_adapters"),
                tuple(held.get("merged_adapters") or ()),
                tuple((held.get("scaling") or {}).items()),
            )
        return found


class _Registrations:
    """How many modules and parameters were registered with any module of this process."""

    count = 0
    _counting = False

    @classmethod
    def start(cls) -> None:
        if not cls._counting:
            register_module_module_registration_hook(cls._add)
            register_module_parameter_registration_hook(cls._add)
            cls._counting = True

    @classmethod
    def _add(cls, *_: object) -> None:
        cls.count += 1
