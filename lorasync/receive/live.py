"""The served model, seen through a load plan: what can be written in place, and what has to be loaded anew.

A parameter whose live layout is the one its loader wrote gets its slices copied straight in: no allocation, and
captured CUDA graphs stay valid. Where the layout differs (quantized, repacked, prepacked for the CPU) or where a
loader computes, the whole layer is loaded anew (`reload`), together with every layer that shares a checkpoint tensor
with it, and none of its parameters is written any other way.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasync.errors import Mismatch, MismatchError
from lorasync.receive.derived import Derived, derived_elsewhere
from lorasync.receive.recorder import storage_key
from lorasync.receive.reload import can_be_fresh
from lorasync.vllm_seam.layers import is_plain_layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from lorasync.receive.load_plan import LoadPlan
    from lorasync.receive.windows import Row, Slice


@dataclass(frozen=True)
class Unit:
    """Layers that are loaded anew together, and the checkpoint names that this takes."""

    layers: tuple[str, ...]
    names: frozenset[str]
    params: frozenset[str]


class LiveModel:
    """The served model, seen through a load plan.

    Args:
        model: The served model.
        model_config: vLLM's `ModelConfig`.
        plan: Where vLLM's loader puts each checkpoint tensor.

    Attributes:
        direct: Parameters that a push may write slices of.
        units: Layers that have to be loaded anew.
    """

    def __init__(self, model: torch.nn.Module, model_config: Any, plan: LoadPlan) -> None:
        self.model = model
        self.model_config = model_config
        self.plan = plan
        self._layers = _owners(model)
        self._tensors = _by_name(model)
        self._unit_of, self.units = self._sorted()
        loaded_anew = frozenset[str]().union(*(unit.params for unit in self.units))
        self.direct = frozenset(n for n in plan.layouts if n not in loaded_anew and self._is_direct(n))
        self._derived = Derived(model, model_config.dtype)

    def live_slice(self, param: str, target: Slice) -> torch.Tensor:
        """Return the window of a direct parameter that a row of the plan writes to."""
        return target.view(self._tensors[param].data)

    def direct_rows(self, names: Iterable[str]) -> list[Row]:
        """Return the rows of the plan by which these checkpoint tensors go into direct parameters."""
        return [row for name in names for row in self.plan.rows_of(name) if row.param in self.direct]

    def layer(self, name: str) -> torch.nn.Module:
        return self._layers[name]

    def unit_of(self, name: str) -> Unit | None:
        """Return the layers that have to be loaded anew to take this checkpoint tensor; None if there are none."""
        return self._unit_of.get(name)

    def units_of(self, names: Iterable[str]) -> list[Unit]:
        """Return the units that take one of these checkpoint tensors, each once, in order."""
        return sorted({unit for name in names if (unit := self.unit_of(name))}, key=lambda unit: unit.layers)

    def copy_to_views(self, param: str, value: torch.Tensor) -> None:
        """Write new values to tensors that were views of this parameter until vLLM packed it."""
        for name, window in self.plan.aliases.get(param, ()):
            view = getattr(self._layers.get(layer_name(name)), name.rpartition(".")[-1], None)
            live = self._tensors.get(param)
            if view is not None and (live is None or storage_key(view) != storage_key(live)):
                view.copy_(window.view(value))

    def refresh(self, params: Iterable[str]) -> None:
        """Derive again what the engine has derived from these parameters; call it after writing them."""
        for param in self.plan.aliases.keys() & self.direct & set(params):
            self.copy_to_views(param, self._tensors[param].data)
        self._derived.refresh([self._tensors[param] for param in params if param in self._tensors])

    def derive_from(self, layers: Iterable[torch.nn.Module]) -> None:
        """Derive again what attention layers absorb of these layers; their weights must be as the loader left them."""
        self._derived.derive_from(layers)

    def _is_direct(self, param: str) -> bool:
        live, (layout, dtype) = self._tensors.get(param), self.plan.layouts[param]
        if live is None or param in self.plan.computed or live.dtype != dtype:
            return False
        same = tuple(live.shape) == layout.shape and tuple(live.stride()) == layout.stride
        return same and is_plain_layer(self.layer(layer_name(param)))

    def _sorted(self) -> tuple[dict[str, Unit], tuple[Unit, ...]]:
        """Find the layers that can't be written slice by slice, joined where they share a checkpoint tensor."""
        fed: dict[str, set[str]] = defaultdict(set)
        for param, names in self.plan.feeds.items():
            if names:
                fed[layer_name(param)].add(param)
        needs = {
            layer: frozenset[str]().union(*(self.plan.feeds[p] for p in params))
            for layer, params in fed.items()
            if not all(map(self._is_direct, params))
        }
        units = [
            Unit(tuple(layers), names, frozenset(p for layer in layers for p in fed[layer]))
            for layers, names in _joined(needs)
        ]
        return {name: unit for unit in units for name in unit.names}, tuple(units)

    def check_writable(self) -> None:
        """Refuse, before anything is touched, a model that a push would leave wrong.

        Raises:
            MismatchError: A layer can't be loaded anew, or two parameters that the plan tells apart are one tensor here, or
                the model derives something that can't be derived again.
        """
        wrong = derived_elsewhere(self.model)
        wrong += [
            Mismatch(
                layer,
                "weights of which vLLM keeps no checkpoint layout",
                "a layer that can be loaded anew",
                "Use ServeAdapter, or another version of vLLM (0.26 to 0.33).",
            )
            for unit in self.units
            for layer in unit.layers
            if layer not in self._layers or not can_be_fresh(self._layers[layer], _own(unit.params, layer))
        ]
        wrong += [
            Mismatch(
                f"{first} and {second}",
                "different tensors in the trainer",
                "one tensor: this engine ties them, as its checkpoint has them alike",
                "Train them tied, or start the engine from a checkpoint in which they differ.",
            )
            for first, second in self.tied_apart()
        ]
        if wrong:
            raise MismatchError("The engine can't take this push; nothing was touched.", wrong)

    def tied_apart(self) -> list[tuple[str, str]]:
        """Return pairs of parameters that share storage, although the plan feeds them from different checkpoint tensors."""
        seen: dict[int, str] = {}
        found = []
        for param, names in self.plan.feeds.items():
            live = self._tensors.get(param)
            if not names or live is None or not live.numel():
                continue
            first = seen.setdefault(live.data_ptr(), param)
            if first != param and self.plan.feeds[first] != names:
                found.append((first, param))
        return found


def layer_name(param: str) -> str:
    return param.rpartition(".")[0]


def stands_for(model: torch.nn.Module, params: Mapping[str, int]) -> dict[str, str]:
    """Return those of these parameters that share storage with another parameter of the model, and which."""
    tensors = _by_name(model)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and name not in params:
            first.setdefault(tensor.data_ptr(), name)
    held = {n: tensors[n] for n in params if n in tensors and tensors[n].numel()}
    return {n: first[t.data_ptr()] for n, t in held.items() if t.data_ptr() in first}


def _joined(needs: Mapping[str, frozenset[str]]) -> list[tuple[list[str], frozenset[str]]]:
    """Join layers that need the same checkpoint names."""
    groups: list[tuple[list[str], frozenset[str]]] = []
    at: dict[str, int] = {}
    for layer, names in needs.items():
        met = sorted({at[name] for name in names if name in at})
        layers, every = [layer], names
        for index in met:
            layers, every = groups[index][0] + layers, groups[index][1] | every
            groups[index] = ([], frozenset())
        at.update(dict.fromkeys(every, len(groups)))
        groups.append((layers, every))
    return [group for group in groups if group[0]]


def _own(params: Iterable[str], layer: str) -> list[str]:
    return [param.rpartition(".")[-1] for param in params if layer_name(param) == layer]


def _owners(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return layers by the name that they have without LoRA; of a layer with LoRA, the one inside."""
    return {_without_wrappers(name): layer for name, layer in model.named_modules(remove_duplicate=False)}


def _by_name(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    params = {_without_wrappers(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    return {_without_wrappers(n): b for n, b in model.named_buffers()} | params


def _without_wrappers(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment != "base_layer")
