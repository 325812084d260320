"""PEFT's own merge, run on a copy of one module: for every method that `layers` does not spell out."""

from __future__ import annotations

import copy
import importlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasync import bnb
from lorasync.errors import UnmergeableError

if TYPE_CHECKING:
    from lorasync.zero.whole import Whole

_CONTAINERS = (dict, list, set)


@dataclass(frozen=True)
class Merge:
    """The merge of one module by PEFT's own code; the module that the trainer uses is only read.

    ``layers`` and ``adapters`` are pairs: which layer merges which adapter, in order.
    """

    layers: tuple[Any, ...]
    adapters: tuple[str, ...]
    name: str

    def params(self) -> list[Tensor]:
        """List every parameter of the module, adapters and base."""
        return list({id(p): p for layer in self.layers for p in layer.parameters()}.values())

    def run(self, base: Tensor, attr: str, whole: Whole) -> Tensor:
        """Merge and return the base layer's ``attr``.

        Args:
            base: What ``attr`` holds now, whole and dequantized.
            attr: The parameter's name in the base layer.
            whole: Where to look up gathered parameters.

        Raises:
            UnmergeableError: PEFT can't merge it either; its reason is quoted.
        """
        outermost = self.layers[-1]
        memo: dict[int, Any] = {}
        copied = _replicate(outermost, memo, whole)
        inner = copied.get_base_layer()
        if _is_packed(inner):
            _make_plain(copied, inner, base, attr)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for layer, adapter in zip(self.layers, self.adapters, strict=True):
                    memo[id(layer)].merge(adapter_names=[adapter])
        except (NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
            raise UnmergeableError(
                f"{self.name}: got {type(outermost).__module__}.{type(outermost).__name__} on "
                f"{type(self.layers[0].get_base_layer()).__name__}, which PEFT can't merge ({error}). "
                "Serve the adapter through PEFT, or train a method that merges."
            ) from error
        merged: Tensor = getattr(copied.get_base_layer(), attr)
        return merged.detach()


def _replicate(module: nn.Module, memo: dict[int, Any], whole: Whole) -> Any:
    """Copy a module with its tensors, but without its hooks: what they hold (an engine, say) stays behind."""
    if id(module) in memo:
        return memo[id(module)]
    twin = memo[id(module)] = module.__class__.__new__(module.__class__)
    for name, value in module.__dict__.items():
        twin.__dict__[name] = copy.copy(value) if isinstance(value, _CONTAINERS) else value
    for hooks in [name for name in twin.__dict__ if name.endswith(("_hooks", "_hooks_with_kwargs"))]:
        twin.__dict__[hooks] = type(twin.__dict__[hooks])()
    twin.__dict__["_parameters"] = {k: _copied(p, memo, whole) for k, p in module._parameters.items()}
    twin.__dict__["_buffers"] = {k: _copied(b, memo, whole) for k, b in module._buffers.items()}
    twin.__dict__["_modules"] = {
        k: None if child is None else _replicate(child, memo, whole) for k, child in module._modules.items()
    }
    return twin


def _copied(tensor: Tensor | None, memo: dict[int, Any], whole: Whole) -> Any:
    if tensor is None or id(tensor) in memo:
        return None if tensor is None else memo[id(tensor)]
    if bnb.is_packed(tensor) or tensor.dtype.itemsize == 1:
        twin: Any = tensor  # replaced by a plain one before anything runs
    else:
        twin = whole(tensor).detach().clone()
        twin = nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin
    memo[id(tensor)] = twin
    return twin


def _is_packed(base: nn.Module) -> bool:
    return bnb.layer_bits(base) is not None or type(base).__name__ == "FP8Linear"


def _make_plain(layer: Any, base: Any, weight: Tensor, attr: str) -> None:
    """Let a copy that adapts a quantized layer adapt a plain one with the same values instead."""
    linear = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone() if attr == "weight" else base.weight, requires_grad=False)
    linear.bias = base.bias
    layer._modules["base_layer"] = linear
    layer.quantization_backend = None
    package, _, file = type(layer).__module__.rpartition(".")
    if file == "bnb":
        name = type(layer).__name__.removesuffix("4bit").removesuffix("8bitLt")
        layer.__class__ = getattr(importlib.import_module(f"{package}.layer"), name)
        layer.__dict__.setdefault("fan_in_fan_out", False)
