"""The plan of a pass: every tensor of the merged model, in `state_dict`'s order, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from lorasync.errors import AdapterError, Mismatch, MismatchError
from lorasync.kernels import PendingMerge
from lorasync.merge import NEAREST, Nearest, Rounding, Scratch, low_rank_shape, merge_and_round
from lorasync.merge.edits import edited
from lorasync.quantization import LIVE, of_model
from lorasync.source import layers, replica
from lorasync.source.model import submodules, transparent
from lorasync.source.parameter import logical, merge_base, packing, read, scales_of, tensor_of, tensors_of
from lorasync.zero import full_shape
from lorasync.zero.whole import AS_HELD, Whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasync.source.trained import Adapters


@dataclass(frozen=True)
class Slot:
    """One tensor of the merged model before transformers' reverse conversion.

    ``name`` is what `merge_and_unload`'s model would call it in memory. ``steps`` is what the adapters do to
    it, in order; empty for a tensor that no adapter touches. ``general`` is set where PEFT does the merge.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    module: nn.Module
    attr: str
    steps: tuple[layers.Step, ...] = ()
    general: replica.Merge | None = None

    @property
    def adapted(self) -> bool:
        """Whether an adapter changes this tensor."""
        return bool(self.steps) or self.general is not None

    @property
    def packing(self) -> str:
        """How the base parameter is held: "plain", "nf4", "fp4", "int8" or "fp8"."""
        return packing(self.module, self.attr)

    @property
    def held(self) -> Tensor:
        """The base parameter as the training model holds it."""
        return tensor_of(self.module, self.attr)

    @property
    def params(self) -> list[Tensor]:
        """Every parameter that has to be whole while `make` runs."""
        beside = [tensor_of(self.module, name) for name in scales_of(self.module, self.attr)]
        own = [self.held, *beside, *(param for step in self.steps for param in step.params)]
        return own + (self.general.params() if self.general is not None else [])

    def make(
        self,
        dtype: torch.dtype,
        rounding: Rounding = NEAREST,
        whole: Whole = AS_HELD,
        scratch: Scratch | None = None,
    ) -> Tensor:
        """Compute the tensor, rounded once to ``dtype``; it may share memory with the model if untouched."""
        if not dtype.is_floating_point or not self.adapted:
            rounding = rounding if self.held.requires_grad else NEAREST
            base = self.base(whole)
            return rounding(base, dtype, key=self.name) if dtype.is_floating_point else base
        only = self.steps[0] if len(self.steps) == 1 else None
        if only is not None and only.how is not None:
            return merge_and_round(
                only.how,
                self.base(whole),
                *map(whole, only.params),
                dtype=dtype,
                rounding=rounding,
                key=self.name,
                scratch=scratch,
            )
        exact = self.exact(whole, as_peft=isinstance(rounding, Nearest))
        return rounding(exact, dtype, key=self.name)

    def pending(self, dtype: torch.dtype) -> PendingMerge | None:
        """Describe the merge instead of doing it; None where it is not one low-rank update of a linear weight.

        Everything must be whole, and is only referred to: read before the model changes.
        """
        only = self.steps[0] if len(self.steps) == 1 else None
        if only is None or only.how is None or only.how.kind != "linear" or only.how.cast_first:
            return None
        base = merge_base(self.module, self.attr)
        if base is None:
            return None
        lora_a, lora_b, *magnitude = (param.detach() for param in only.params)
        return PendingMerge(
            base=base,
            lora_a=lora_a,
            lora_b=lora_b,
            scaling=only.how.scaling,
            dtype=dtype,
            make=lambda: self.make(dtype),
            fan_in_fan_out=only.how.transposed,
            magnitude=magnitude[0].flatten() if magnitude else None,
        )

    def base(self, whole: Whole = AS_HELD) -> Tensor:
        """Read the base weight, whole and dequantized; it may share memory with the model."""
        return read(self.module, self.attr, name=self.name, whole=whole)

    def exact(self, whole: Whole = AS_HELD, *, as_peft: bool = False) -> Tensor:
        """Merge without the last rounding; ``as_peft`` keeps the roundings that PEFT does on the way."""
        base = self.base(whole)
        if self.general is not None:
            return self.general.run(base, self.attr, whole)
        between = as_peft and self.packing == "plain"
        if not as_peft:
            base = base.to(torch.promote_types(base.dtype, torch.float32))
        edits = (step.edit(whole) for step in self.steps)
        return edited(base, edits, exact=not as_peft, round_between=between)


def blocks(names: list[str]) -> Iterator[list[str]]:
    """Cut a stream of names into decoder layers: what is gathered at once."""
    for _, members in groupby(names, key=_layer):
        yield list(members)


def _layer(name: str) -> tuple[str, ...]:
    """Return a name's path up to its first number (`model.layers.3`), or the whole name where it has no number."""
    path = name.split(".")
    numbers = [index for index, segment in enumerate(path) if segment.isdigit()]
    return tuple(path[: numbers[0] + 1] if numbers else path)


def slots(base: nn.Module, adapters: Adapters) -> list[Slot]:
    """List every tensor of the merged model.

    Args:
        base: The base model with the adapter layers in it.
        adapters: The adapters to merge; ``None`` means each layer's active ones.

    Raises:
        AdapterError: The base is packed by something that isn't read; it is named.
        UnmergeableError: An adapter has no merged form.
        MismatchError: Factors have shapes that don't fit their weights; all of them are named.
    """
    packed = of_model(base)
    if packed.kind not in LIVE:
        raise AdapterError(packed.refusal(f"model ({type(base).__name__})"))
    found = list(_Walk(adapters, _packed_dtype(base)).module(base, ""))
    wrong = [mismatch for slot in found for step in slot.steps for mismatch in _misfits(slot, step)]
    if wrong:
        raise MismatchError("The adapter's tensors don't fit the base.", wrong)
    return found


def _misfits(slot: Slot, step: layers.Step) -> Iterator[Mismatch]:
    """Yield what is wrong with the shapes of one step; nothing is gathered."""
    if step.how is None:
        return
    a, b = (tuple(full_shape(param)) for param in step.params[:2])
    made = low_rank_shape(step.how, a, b)
    if made != slot.shape:
        got = f"A {a} and B {b} for a weight of {made}" if made else f"A {a} and B {b}, which don't multiply"
        fix = "Is this adapter for another base, or damaged?"
        yield Mismatch(f"{slot.name} ({step.adapter})", got, f"factors of {slot.shape}", fix)


@dataclass(frozen=True)
class _Walk:
    adapters: Adapters
    packed_dtype: torch.dtype

    def module(self, module: nn.Module, prefix: str) -> Iterator[Slot]:
        if isinstance(module, BaseTunerLayer):
            yield from self._tuner(module, prefix)
            return
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield from self.module(self._live(module, prefix), prefix)
            return
        inner = transparent(module)
        if inner is not None:
            yield from self.module(inner, prefix)
            return
        yield from self._own(module, prefix, [])
        yield from self._children(module, prefix)

    def _tuner(self, layer: BaseTunerLayer, prefix: str, *, twice: bool = False) -> Iterator[Slot]:
        chain, inner = layers.chain_of(layer)
        merged = [(each, name) for each in chain for name in layers.active(each, self.adapters)]
        bare = next(tensors_of(inner), None) is None
        for each, name in merged:
            reason = "it acts on a whole block, which has no weight of its own" if bare else None
            layers.refuse(each, name, prefix.removesuffix("."), reason)
        layers.refuse_rows_of_several(merged, prefix.removesuffix("."))
        yield from self._own(inner, prefix, merged, twice=twice)
        if isinstance(inner, nn.MultiheadAttention):
            yield from self._tuner(cast("Any", inner.out_proj), f"{prefix}out_proj.", twice=True)
        else:
            yield from self._children(inner, prefix)

    def _children(self, module: nn.Module, prefix: str) -> Iterator[Slot]:
        for path, child in submodules(module, prefix):
            yield from self.module(child, f"{path}.")

    def _own(
        self, module: nn.Module, prefix: str, merged: list[tuple[Any, str]], *, twice: bool = False
    ) -> Iterator[Slot]:
        general = [(layer, name) for layer, name in merged if not layers.spelled_out(layer, name)]
        for attr in tensors_of(module):
            dtype, shape = logical(module, attr, packed_dtype=self.packed_dtype)
            slot = Slot(prefix + attr, dtype, shape, module, attr)
            if general:
                yield _general(slot, merged)
            else:
                steps = tuple(
                    step for layer, name in merged for step in layers.steps(layer, name, attr, twice=twice)
                )
                yield Slot(slot.name, dtype, shape, module, attr, steps)

    def _live(self, wrapper: Any, prefix: str) -> nn.Module:
        """Return the module that a wrapper runs: the saved copy of the wanted adapter, or the original."""
        if not isinstance(wrapper, ModulesToSaveWrapper):
            adapter: nn.Module = wrapper.token_adapter
            return adapter
        wanted = wrapper.active_adapters if self.adapters is None else self.adapters
        having = [name for name in wanted if name in wrapper.modules_to_save]
        if len(having) > 1:
            raise AdapterError(
                f"adapters {having}: each got a saved module of its own for {prefix.removesuffix('.')}, expected one "
                "adapter that has it: one of them would be dropped. Push them one at a time."
            )
        if having:
            saved: nn.Module = wrapper.modules_to_save[having[0]]
            return saved
        original: nn.Module = wrapper.original_module
        return original


def _general(slot: Slot, merged: list[tuple[Any, str]]) -> Slot:
    merge = replica.Merge(tuple(layer for layer, _ in merged), tuple(name for _, name in merged), slot.name)
    return Slot(slot.name, slot.dtype, slot.shape, slot.module, slot.attr, (), merge)


def _packed_dtype(base: nn.Module) -> torch.dtype:
    """Return the dtype that 8-bit weights (INT8, FP8) are served as: the one that the model was loaded in."""
    dtype = getattr(getattr(base, "config", None), "dtype", None)
    if isinstance(dtype, str):  # as save_pretrained leaves it behind
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float16
