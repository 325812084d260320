"""A bucket as text: where its tensors lie in which storage, and which merges are to be made from them."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorasync.bucket import Bucket, Item
from lorasync.errors import PayloadError
from lorasync.kernels import Int8Base, NestedAbsmax, PackedBase, PendingMerge, PlainBase, merge_job
from lorasync.kernels.checksum import can_be_summed
from lorasync.wire import dtype_name, dtype_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_KINDS = {kind.__name__: kind for kind in (PlainBase, PackedBase, NestedAbsmax, Int8Base, PendingMerge)}
_MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Parts:
    """The tensors that a bucket is read from.

    Attributes:
        frozen: bases of merges; who has seen them once knows them, as it is the trainer's own memory that is read.
        fresh: factors and whole tensors, which change with each push.
    """

    frozen: list[Tensor]
    fresh: list[Tensor]

    @classmethod
    def of(cls, bucket: Mapping[str, Item]) -> Parts:
        parts = cls([], [])
        for item in bucket.values():
            if isinstance(item, PendingMerge):
                parts.frozen.extend(tensor for _, tensor in item.base.tensors())
                parts.fresh.extend(item.factors)
            else:
                parts.fresh.append(item)
        return parts


def is_lendable(item: Item) -> bool:
    """Say whether another process can read the item where it lies in the trainer's model."""
    if isinstance(item, PendingMerge):
        parts = item.tensors()
        return all(map(can_be_summed, parts)) and len({part.device for part in parts}) == 1
    return can_be_summed(item)


class Storages:
    """The storages that tensors lie in, numbered as they come up."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def place_of(self, tensor: Tensor) -> dict[str, Any]:
        """Where a contiguous tensor lies, as JSON data."""
        start = tensor.untyped_storage().data_ptr()
        if start not in self._numbers:
            self._numbers[start] = len(self.tensors)
            self.tensors.append(tensor)
        return {
            "storage": self._numbers[start],
            "offset": tensor.data_ptr() - start,
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
        }


def as_text(bucket: Mapping[str, Item], storages: Storages) -> str:
    """Write a bucket as JSON; every tensor in it must be contiguous."""
    return json.dumps({name: _written(item, storages) for name, item in bucket.items()})


def _written(value: Any, storages: Storages) -> Any:
    if isinstance(value, Tensor):
        return {"kind": "tensor", **storages.place_of(value)}
    if isinstance(value, torch.dtype):
        return {"kind": "dtype", "name": dtype_name(value)}
    if is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "make"}
        written = {name: _written(part, storages) for name, part in parts.items()}
        return {"kind": type(value).__name__, **written}
    return list(value) if isinstance(value, tuple) else value


def from_text(text: str, storages: Sequence[Tensor]) -> Bucket[Item]:
    """Read what `as_text` wrote: views of the storages (uint8), and merges from them.

    Raises:
        PayloadError: It is something else, or leads out of a storage.
    """
    try:
        read = ((str(name), _read(value, storages)) for name, value in _unique(text).items())
        found: Bucket[Item] = Bucket(read, key=object())
        wrong = [name for name, item in found.items() if not isinstance(item, Tensor | PendingMerge)]
        if wrong:
            raise ValueError(f"{wrong[0]} is no weight")
    except _MALFORMED as error:
        raise PayloadError(f"layout: malformed ({error}). Nothing was touched.") from error
    return found


def _unique(text: str) -> dict[str, Any]:
    def no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name twice")
        return dict(pairs)

    found: dict[str, Any] = json.loads(text, object_pairs_hook=no_name_twice)
    if not isinstance(found, dict):
        raise TypeError("expected names")
    return found


def _read(value: Any, storages: Sequence[Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    given = dict(value)
    kind = given.pop("kind")
    if kind == "tensor":
        return _view(storages, **given)
    if kind == "dtype":
        return dtype_of(given["name"])
    parts = {name: _read(part, storages) for name, part in given.items()}
    made = _pending(parts) if kind == "PendingMerge" else _KINDS[kind](**parts)
    if isinstance(made, PackedBase):
        _check_packed(made)
    return made


def _view(storages: Sequence[Tensor], storage: int, offset: int, dtype: str, shape: list[int]) -> Tensor:
    kind = dtype_of(dtype)
    size = torch.Size(shape).numel() * kind.itemsize
    whole = storages[storage] if storage >= 0 else storages[len(storages)]
    if min([0, offset, *shape]) < 0 or offset + size > whole.numel():
        raise ValueError(
            f"{size} bytes at {offset}, expected to stay in the storage's {whole.numel()}, and nothing negative"
        )
    return whole[offset : offset + size].view(kind).view(shape)


def _pending(parts: dict[str, Any]) -> PendingMerge:
    def make() -> Tensor:
        out = torch.empty(merge.shape, dtype=merge.dtype, device=merge.device)
        merge_job(merge.whole_job(out))
        return out

    merge = PendingMerge(**parts, make=make)
    if not isinstance(merge.base, PlainBase | PackedBase | Int8Base):
        raise TypeError("a merge without a base")
    if not all(isinstance(t, Tensor) for t in merge.tensors()) or not isinstance(merge.dtype, torch.dtype):
        raise TypeError("a merge without its tensors or dtype")
    if not isinstance(merge.scaling, float) or not isinstance(merge.fan_in_fan_out, bool):
        raise TypeError("a merge without its scaling")
    return merge


def _check_packed(base: PackedBase) -> None:
    """A kernel follows these without asking."""
    rows, cols = base.shape
    blocks = -(-(base.offset + (rows - 1) * base.stride + cols) // base.blocksize)
    nested = base.nested
    enough = (
        min(rows, cols, base.blocksize) > 0
        and base.offset >= 0
        and base.stride >= cols
        and 2 * base.packed.nbytes >= base.offset + (rows - 1) * base.stride + cols
        and base.absmax.numel() >= blocks
        and base.code.numel() == 16
        and (nested is None or (nested.absmax.numel() >= -(-blocks // 256) and nested.code.numel() == 256))
    )
    if not enough:
        raise ValueError("a packed weight without all of its scales")
