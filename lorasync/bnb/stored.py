"""bitsandbytes' checkpoint layout: the tensors beside a packed weight, read and written.

A 4-bit weight ``W`` comes with ``W.absmax``, ``W.quant_map``, ``W.nested_absmax`` and ``W.nested_quant_map`` (both with
double quantization only) and ``W.quant_state.bitsandbytes__nf4`` (or ``…__fp4``), which holds JSON. An 8-bit ``….weight``
comes with ``….SCB`` and sometimes ``….weight_format``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lorasync.bnb.live import int8_scales, quant_state
from lorasync.bnb.values import dequantize_4bit, dequantize_8bit
from lorasync.errors import LoadError
from lorasync.kernels import NestedAbsmax, PackedBase

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

_STATES = {"nf4": ".quant_state.bitsandbytes__nf4", "fp4": ".quant_state.bitsandbytes__fp4"}
_BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


class Tensors(Protocol):
    """Tensors by name: a dict, or files that are read when they are asked for."""

    def __getitem__(self, name: str, /) -> Tensor: ...


@dataclass(frozen=True)
class Stored:
    """Where one packed weight lies in a checkpoint.

    Attributes:
        name: The weight's own name.
        kind: "nf4", "fp4" or "int8".
        state: The name of the tensor that describes the packing: its ``quant_state``, or its SCB.
        beside: The names of everything that belongs to it, ``state`` included.
    """

    name: str
    kind: str
    state: str
    beside: tuple[str, ...]

    def logical(self, tensors: Tensors) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return the dtype and shape of a 4-bit weight once it is dequantized; only its ``quant_state`` is read."""
        said = _said(tensors[self.state])
        return getattr(torch, said["dtype"]), tuple(said["shape"])

    def lacking(self, tensors: Tensors) -> list[str]:
        """Name what a 4-bit weight needs beside it, as its ``quant_state`` says, and is not there."""
        nested = (
            (".nested_absmax", ".nested_quant_map") if "nested_offset" in _said(tensors[self.state]) else ()
        )
        needed = [self.name + suffix for suffix in (".absmax", ".quant_map", *nested)]
        return [name for name in needed if name not in self.beside]

    def read(self, tensors: Tensors) -> Tensor:
        """Read the weight, dequantized on the CPU."""
        if self.kind == "int8":
            return dequantize_8bit(tensors[self.name], tensors[self.state])
        from bitsandbytes.functional import QuantState

        parts = {name.removeprefix(f"{self.name}."): tensors[name] for name in self.beside}
        return dequantize_4bit(tensors[self.name], QuantState.from_dict(parts, torch.device("cpu")))

    def base(self, tensors: Tensors, *, dtype: torch.dtype, device: torch.device) -> PackedBase:
        """Describe a 4-bit weight to the merge kernels; needs no bitsandbytes.

        Args:
            tensors: Where the weight and what belongs to it are.
            dtype: What dequantized values are rounded to.
            device: Where the weight is to lie.
        """
        said = _said(tensors[self.state])
        rows, cols = said["shape"]
        return PackedBase(
            packed=tensors[self.name].to(device).reshape(-1),
            absmax=tensors[f"{self.name}.absmax"].to(device),
            code=tensors[f"{self.name}.quant_map"].to(device),
            blocksize=int(said["blocksize"]),
            shape=(int(rows), int(cols)),
            dtype=dtype,
            nested=self._nested(tensors, said, device),
        )

    def _nested(self, tensors: Tensors, said: dict[str, Any], device: torch.device) -> NestedAbsmax | None:
        absmax = f"{self.name}.nested_absmax"
        if absmax not in self.beside:
            return None
        code = tensors[f"{self.name}.nested_quant_map"].to(device)
        return NestedAbsmax(tensors[absmax].to(device), code, float(said["nested_offset"]))


def find_stored(name: str, names: Container[str]) -> Stored | None:
    """Say how a checkpoint's tensor is packed, by the names beside it; None if bitsandbytes did not pack it.

    Example:
        >>> find_stored("x.weight", {"x.weight", "x.SCB"}).kind
        'int8'
    """
    for kind, suffix in _STATES.items():
        if name + suffix in names:
            beside = [name + other for other in _BESIDE if name + other in names]
            return Stored(name, kind, name + suffix, (*beside, name + suffix))
    path, _, last = name.rpartition(".")
    stem = f"{path}." if path else ""
    if last != "weight" or f"{stem}SCB" not in names:
        return None
    format_ = f"{stem}weight_format"
    return Stored(name, "int8", f"{stem}SCB", (f"{stem}SCB", *([format_] if format_ in names else [])))


def as_stored(module: nn.Module, attr: str, tensor: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what bitsandbytes would save beside a packed weight, under the checkpoint name ``name``.

    Args:
        module: The module that owns the weight.
        attr: The weight's name there.
        tensor: The weight, whole.
        name: The weight's name in a checkpoint.
    """
    state = quant_state(module, attr)
    if state is not None:
        yield from ((f"{name}.{key}", value) for key, value in state.as_dict(packed=True).items())
        return
    scales = int8_scales(module, tensor)
    assert scales is not None, name
    yield f"{name.removesuffix('weight')}SCB", scales


def require_library(subject: str) -> None:
    """Refuse to go on where bitsandbytes is not installed.

    Raises:
        LoadError: It is not; ``subject`` is what needs it.
    """
    try:
        import_module("bitsandbytes.functional")
    except ImportError as error:
        raise LoadError(
            f"{subject}: got weights that bitsandbytes packed, and no bitsandbytes here. pip install 'lorasync[qlora]'."
        ) from error


def _said(state: Tensor) -> dict[str, Any]:
    """Read a stored ``quant_state``, which is JSON with one byte an element."""
    return dict(json.loads(bytes(state.cpu().tolist()).decode()))
