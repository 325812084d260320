"""The weights of a model folder, plain whatever they are stored as: bitsandbytes, FP8 with scales, MXFP4.

How a weight is packed is read from the tensors that are stored, not from the config alone: a checkpoint that is quantized in
part has both kinds, and some configs don't say.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lorasync import bnb
from lorasync.errors import LoadError, Mismatch, MismatchError
from lorasync.export.config import dtype_of, quantization_of
from lorasync.quantization import STORED, Quantization, of_config, of_tensors
from lorasync.quantization.block_scales import (
    check_scales,
    dequantize_fp8,
    dequantize_mxfp4,
    fp8_shape,
    mxfp4_shape,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from lorasync.export.tensors import Tensors

_READ = ("bitsandbytes", "fp8", "mxfp8", "mxfp4")
_CODES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
}
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "weight_activation_scale")


@dataclass(frozen=True)
class Weight:
    """One weight: how it is stored, what it is once plain, and how to read it so."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def by_bitsandbytes(self) -> bool:
        """Whether PEFT merges it in the arithmetic of a bitsandbytes layer."""
        return self.kind in ("nf4", "fp4", "int8")


def check_method(config: dict[str, Any]) -> None:
    """Refuse a base by the name of what packed it, before any of its tensors is looked at.

    Raises:
        LoadError: Its config names a method whose weights can't be read back here.
    """
    _refuse_unread(of_config(config))


def _refuse_unread(packed: Quantization) -> None:
    if packed.kind not in STORED:
        where = f" ({', '.join(packed.where[:3])} …)" if packed.where else ""
        raise LoadError(
            f"base: got weights packed by {packed.name}{where}, expected plain ones, or packed by "
            f"{', '.join(_READ)}. Merge into the model in 16 bits that they were made from."
        )


class BaseWeights:
    """The plain weights of a base, by checkpoint name and in the order of its files.

    Args:
        tensors: What is stored.
        config: The base's config.

    Raises:
        LoadError: A method packed it that isn't read, or bitsandbytes, which isn't installed.
        MismatchError: A packed tensor comes without its scales, or with others than it needs; all are named.
    """

    def __init__(self, tensors: Tensors, config: dict[str, Any]) -> None:
        check_method(config)
        _refuse_unread(of_tensors({name: _stored_as(tensors.describe(name)[0]) for name in tensors.names}))
        finder = _Finder(tensors, config)
        self._weights = dict(finder.find())
        if finder.wrong:
            raise MismatchError("The base's packed weights can't be read.", finder.wrong)
        self.packed_dtype = finder.dtype if any(w.kind != "plain" for w in self._weights.values()) else None

    @property
    def names(self) -> list[str]:
        """Every weight's name."""
        return list(self._weights)

    def __contains__(self, name: str) -> bool:
        """Whether there is a weight of this name."""
        return name in self._weights

    def __getitem__(self, name: str) -> Weight:
        """Look a weight up; nothing is read."""
        return self._weights[name]

    def get(self, name: str) -> Weight | None:
        """Look a weight up; None where there is none."""
        return self._weights.get(name)

    def same(self, one: str, other: str) -> bool:
        """Whether two weights have the same values."""
        a, b = self._weights[one], self._weights[other]
        return a.shape == b.shape and torch.equal(a.read(), b.read())


class _Finder:
    """Tells packed weights, what belongs to them, and plain ones apart."""

    def __init__(self, tensors: Tensors, config: dict[str, Any]) -> None:
        self.tensors = tensors
        self.names = frozenset(tensors.names)
        self.wrong: list[Mismatch] = []
        self.dtype = dtype_of(config, torch.bfloat16)
        self.int8_dtype = dtype_of(config, torch.float16)
        block = (quantization_of(config) or {}).get("weight_block_size")
        self.block: tuple[int, int] | None = (int(block[0]), int(block[1])) if block else None

    def find(self) -> Iterator[tuple[str, Weight]]:
        kinds = (self._bitsandbytes, self._mxfp4, self._fp8)
        held: dict[str, tuple[str, Weight]] = {}
        used: set[str] = set()
        for name in self.tensors.names:
            for kind in kinds:
                found = kind(name)
                if found is not None:
                    plain, weight, companions = found
                    held[name] = (plain, weight)
                    used.update(companions)
                    break
        for name in self.tensors.names:
            if name not in used:
                yield held[name] if name in held else (name, self._plain(name))

    def _plain(self, name: str) -> Weight:
        dtype, shape = self.tensors.describe(name)
        if dtype.is_floating_point and dtype.itemsize == 1:
            fix = "Is a file missing? Else get the model in 16 bits."
            self.wrong.append(Mismatch(name, f"{_short(dtype)} without scales", "its weight_scale_inv", fix))
        return Weight("plain", dtype, shape, partial(self.tensors.__getitem__, name))

    def _bitsandbytes(self, name: str) -> tuple[str, Weight, list[str]] | None:
        packed = bnb.find_stored(name, self.names)
        if packed is None:
            return None
        bnb.require_library("base")
        if packed.kind == "int8":
            dtype, shape = self.int8_dtype, self.tensors.describe(name)[1]
        else:
            dtype, shape = packed.logical(self.tensors)
            what, fix = f"a part of {name}, which its quant_state names", "Fetch or save the base again."
            self.wrong += [Mismatch(lost, "nothing", what, fix) for lost in packed.lacking(self.tensors)]
        return (
            name,
            Weight(packed.kind, dtype, shape, partial(packed.read, self.tensors)),
            list(packed.beside),
        )

    def _mxfp4(self, name: str) -> tuple[str, Weight, list[str]] | None:
        plain, scales = name.removesuffix("_blocks"), f"{name.removesuffix('_blocks')}_scales"
        if plain == name or scales not in self.tensors or self.tensors.describe(name)[0] != torch.uint8:
            return None
        blocks, grid = self.tensors.describe(name)[1], self.tensors.describe(scales)[1]
        if blocks[:-1] != grid or len(grid) < 2:
            self.wrong.append(Mismatch(scales, str(grid), str(blocks[:-1]), "Fetch or save the base again."))

        def read() -> Tensor:
            return dequantize_mxfp4(self.tensors[name], self.tensors[scales], self.dtype)

        return plain, Weight("mxfp4", self.dtype, mxfp4_shape(blocks), read), [scales]

    def _fp8(self, name: str) -> tuple[str, Weight, list[str]] | None:
        dtype, shape = self.tensors.describe(name)
        stem = name.removesuffix("weight")
        named = (f"{name}_scale_inv", f"{name}_scale", f"{stem}scale" if stem != name else "")
        scale = next((other for other in named if other in self.tensors), None)
        if scale is None or dtype not in (*_FLOAT8, torch.int8):
            return None
        beside = [f"{stem}{other}" for other in _ACTIVATIONS] if stem != name else []

        def read() -> Tensor:
            return dequantize_fp8(self.tensors[name], self.tensors[scale], self.block, self.dtype)

        weight = Weight("fp8", self.dtype, fp8_shape(shape, dtype), read)
        self._check_grid(name, scale, weight.shape)
        return name, weight, [scale, *(other for other in beside if other in self.tensors)]

    def _check_grid(self, name: str, scale: str, shape: tuple[int, ...]) -> None:
        """Find out now, without reading anything, whether the scales fit."""
        dtype, grid = self.tensors.describe(scale)
        try:
            check_scales(shape, torch.empty(grid, dtype=dtype, device="meta"), self.block)
        except ValueError as error:
            self.wrong.append(
                Mismatch(scale, str(error), f"scales for {name}", "Fetch or save the base again.")
            )


def _stored_as(dtype: torch.dtype) -> str:
    """Return the dtype as safetensors spells it if it can hold codes; else F32."""
    return _CODES.get(dtype, "F32")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
