"""`LoadReport`: what a load did, read off the loaded model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasync.bnb import layer_bits, tensors_beside
from lorasync.load.checks import dtype_name
from lorasync.model_size import human

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoadReport:
    """What a load did: which modules are quantized, which large tensors are not, bytes, seconds, remarks."""

    path: str
    preset: str
    prequantized: bool
    device: str
    dtype: str
    storage_dtype: str
    quantized: tuple[str, ...]
    kept: tuple[tuple[str, str, int], ...]
    bytes_before: int
    bytes_after: int
    seconds: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        head = (
            f"{self.path}: {self.preset} on {self.device}, {len(self.quantized)} modules quantized, "
            f"{human(self.bytes_before)} in {self.dtype} became {human(self.bytes_after)} in "
            f"{self.seconds:.1f} s"
        )
        return "\n  ".join([head, *self.notes])


def make_report(model: PreTrainedModel, **facts: Any) -> LoadReport:
    quantized = tuple(name for name, module in model.named_modules() if layer_bits(module) is not None)
    packed = {id(model.get_submodule(name).weight) for name in quantized}
    kept = tuple(
        (name, dtype_name(p.dtype), p.numel() * p.itemsize)
        for name, p in model.named_parameters()
        if id(p) not in packed and p.dim() > 1
    )
    size = sum(_stored_bytes(p) for p in model.parameters())
    return LoadReport(
        quantized=quantized, kept=kept, bytes_after=size, notes=_notes(model, kept, size), **facts
    )


def _notes(model: nn.Module, kept: tuple[tuple[str, str, int], ...], size: int) -> tuple[str, ...]:
    fused = [(name, kind, count) for name, kind, count in kept if model.get_parameter(name).dim() > 2]
    notes = []
    if fused:
        share = sum(count for _, _, count in fused) / size
        notes.append(
            f"{len(fused)} fused expert tensors stay {fused[0][1]} ({share:.0%} of the bytes; first: "
            f"{fused[0][0]}): bitsandbytes quantizes nn.Linear only"
        )
    flat = [(name, kind, count) for name, kind, count in kept if model.get_parameter(name).dim() == 2]
    if flat:
        names = ", ".join(name for name, _, _ in flat[:4]) + (", …" if len(flat) > 4 else "")
        notes.append(f"not quantized: {names} ({human(sum(c for _, _, c in flat))} in {flat[0][1]})")
    return tuple(notes)


def _stored_bytes(param: nn.Parameter) -> int:
    """Return the bytes of a parameter with the scales that belong to it."""
    return param.nbytes + sum(tensor.nbytes for tensor in tensors_beside(param))
