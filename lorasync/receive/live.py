"""Writing checkpoint tensors into the weights that the engine serves.

A parameter whose live layout is the one its loader wrote gets its slices copied straight in: no allocation, and
captured CUDA graphs stay valid. Where the layout differs (quantized, repacked, prepacked for the CPU) the owning
layer goes through vLLM's layerwise reload, and is never seen half-loaded: until it is complete it keeps its old
weights.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from lorasync.lent import made
from lorasync.receive import vllm_parts
from lorasync.receive.direct import DirectWrites

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lorasync.kernels import PendingMerge
    from lorasync.receive.plan import LoadPlan, Slice


class LiveModel:
    """The served model, seen through a load plan."""

    def __init__(self, model: torch.nn.Module, model_config: Any, plan: LoadPlan) -> None:
        self.model = model
        self.model_config = model_config
        self.plan = plan
        self._layers = _owners(model)
        self._params = {_without_wrappers(n): p for n, p in model.named_parameters()}
        self.direct = frozenset(n for n in plan.layouts if self._is_direct(n))
        self._sharers = _layers_by_storage(model)
        indirect, needs = defaultdict(list), defaultdict(set)
        for param in plan.layouts.keys() - self.direct:
            for name in plan.feeds[param]:
                indirect[name].append(param)
                needs[_layer_name(param)].add(name)
        self._indirect = {name: tuple(params) for name, params in indirect.items()}
        self._needs = {layer: frozenset(names) for layer, names in needs.items()}
        self.writes = DirectWrites(self)
        self._on_gpu = any(param.is_cuda for param in self._params.values())

    def live_slice(self, param: str, target: Slice) -> torch.Tensor:
        """The window of a direct parameter that a row of the plan writes to."""
        return target.view(self._params[param].data)

    def layer_of(self, param: str) -> torch.nn.Module:
        return self._layers[_layer_name(param)]

    def indirect_params_fed_by(self, name: str) -> tuple[str, ...]:
        """The parameters that this checkpoint tensor can reach only through vLLM's loader."""
        return self._indirect.get(name, ())

    def names_through_loader(self, layer_name: str) -> frozenset[str]:
        """Every checkpoint name that the layer needs before it is complete."""
        return self._needs.get(layer_name, frozenset())

    def _is_direct(self, param: str) -> bool:
        live, (layout, dtype) = self._params.get(param), self.plan.layouts[param]
        if live is None or param in self.plan.computed or live.dtype != dtype:
            return False
        same = tuple(live.shape) == layout.shape and tuple(live.stride()) == layout.stride
        return same and vllm_parts.is_plain_layer(self.layer_of(param))

    def refresh(self, params: set[str]) -> None:
        """After direct writes: layers that keep a packed copy of one of these parameters pack it anew, on a CPU."""
        if self._on_gpu:
            return
        seen: set[int] = set()
        for param in params:
            for layer in self._sharers.get(_storage(self._params[param]), ()):
                if id(layer) not in seen:
                    seen.add(id(layer))
                    vllm_parts.repack_for_cpu(layer)


class LiveWriter:
    """One pass over the live weights: `write` any number of buckets, then `finish`; or `undo`."""

    def __init__(self, live: LiveModel) -> None:
        self._live = live
        self._begun: dict[str, torch.nn.Module] = {}
        self._missing: dict[str, set[str]] = {}
        self._written: set[str] = set()
        self.touched = False

    def write(self, tensors: Mapping[str, torch.Tensor | PendingMerge]) -> None:
        """Copy, merge or load these checkpoint tensors; layers become complete, and live, one by one."""
        direct = self._live.writes.of(tensors)
        self.touched |= bool(tensors)
        direct.write()
        self._written |= direct.params
        through_loader = {}
        for name, given in direct.others.items():
            tensor = made(given)
            for row in self._live.plan.rows_of(name):
                if row.param in self._live.direct:
                    target = self._live.live_slice(row.param, row.target)
                    target.copy_(row.source.view(tensor.contiguous()), non_blocking=True)
                    self._written.add(row.param)
            if self._live.indirect_params_fed_by(name):
                through_loader[name] = tensor
        if through_loader:
            self._load(through_loader)

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name in tensors:
            for param in self._live.indirect_params_fed_by(name):
                self._begin(param)
        load: Any = self._live.model.load_weights
        load(iter(tensors.items()))
        for name in tensors:
            for layer_name in {_layer_name(p) for p in self._live.indirect_params_fed_by(name)}:
                self._missing[layer_name].discard(name)
                if not self._missing[layer_name] and layer_name in self._begun:
                    vllm_parts.reload_end(self._begun.pop(layer_name), self._live.model_config)

    def _begin(self, param: str) -> None:
        layer_name = _layer_name(param)
        if layer_name not in self._missing:
            layer = self._live.layer_of(param)
            self._missing[layer_name] = set(self._live.names_through_loader(layer_name))
            self._begun[layer_name] = layer
            vllm_parts.reload_begin(layer)

    def finish(self) -> None:
        """Repack what is kept packed; every layer must be complete."""
        assert not self._begun, f"incomplete layers: {sorted(self._begun)}"
        self._live.refresh(self._written)

    def undo(self) -> None:
        """Give incomplete layers their old weights back; complete ones keep the new."""
        for layer in self._begun.values():
            vllm_parts.reload_undo(layer)
        self._begun.clear()
        self._live.refresh(self._written)


def _owners(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Layers by the name that they have without LoRA; of a wrapped layer, the layer inside."""
    return {_without_wrappers(name): layer for name, layer in model.named_modules()}


def _layer_name(param: str) -> str:
    return param.rpartition(".")[0]


def _without_wrappers(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment != "base_layer")


def _layers_by_storage(model: torch.nn.Module) -> dict[int, list[torch.nn.Module]]:
    found: dict[int, list[torch.nn.Module]] = defaultdict(list)
    for layer in model.modules():
        for param in layer.parameters(recurse=False):
            if param.numel():
                found[_storage(param)].append(layer)
    return found


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
