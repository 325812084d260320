"""`FactorSource`: only what was trained, in the names of PEFT's checkpoint, and what a receiver must know."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from lorasync.bucket import NOTHING, Bucket, Item, Latest, addresses
from lorasync.errors import AdapterError, UnmergeableError
from lorasync.source.describe import checkpoint_names, describe
from lorasync.source.finite import FiniteCheck, Input
from lorasync.source.fits import Merges, refuse_range
from lorasync.source.meta import ParamMeta
from lorasync.source.model import base_of, named, saved_buffers, unwrap
from lorasync.source.parameter import packed
from lorasync.source.picked import picked
from lorasync.source.plan import Slot, blocks, slots
from lorasync.source.probe import Probe
from lorasync.source.structure import Structure
from lorasync.source.trained import (
    active_in,
    beside,
    check_still_active,
    configs,
    only_active,
    pick_adapters,
    refuse_trained,
)
from lorasync.zero import can_be_sharded, full_shape, is_sharded
from lorasync.zero.fsdp import drop_gathered, fsdp_modules
from lorasync.zero.whole import whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from lorasync.source.spec import FactorSpec


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a pass sends, in order; it is valid as long as the model is built the same way."""

    adapter: str
    built: Structure
    tensors: dict[str, Tensor]
    beside: dict[str, Tensor]
    scalings: dict[str, float]
    finite: FiniteCheck
    sharded: bool
    frozen: Probe
    fsdp: list[Any]
    merges: dict[torch.dtype, Merges] = field(default_factory=dict)

    @cached_property
    def in_slots(self) -> dict[str, float]:
        """How much larger each B gets in vLLM's LoRA slots, which keep B times its layer's scaling: at least 1."""
        found = {}
        for name in self.tensors:
            path, _, rest = name.partition(".lora_")
            if rest.startswith(("B", "embedding_B")):
                found[name] = max(1.0, abs(self.scalings.get(path, 1.0)))
        return found


class FactorSource:
    """The trained tensors of one adapter, one at a time, named as in PEFT's `adapter_model.safetensors`.

    Only adapter parameters are read; under ZeRO-3 and FSDP2 only they are gathered, one decoder layer at a
    time. A yielded tensor is the consumer's own. Unlike with `save_pretrained`, frozen embeddings of the
    base never travel along.

    Args:
        model: A PEFT model with a LoRA adapter, or DeepSpeed's engine or DDP around one.
        adapter: Which adapter; ``None`` means the one that is active now, and a push is refused once another is.
        check_finite: Refuse NaN and Inf before anything is yielded.

    Raises:
        AdapterError: No adapter, not this one, several active ones, or one merged in place or disabled; or parameters
            beside the adapter are trained, which factors alone would leave out.
        UnmergeableError: The adapter is no LoRA: there are no factors to send.
        MismatchError: Tensors don't have the rank that the layer says.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6))
        >>> source = FactorSource(get_peft_model(model, LoraConfig(r=2, target_modules=["0"])))
        >>> {name: tuple(tensor.shape) for name, tensor in source}
        {'base_model.model.0.lora_A.weight': (2, 4), 'base_model.model.0.lora_B.weight': (6, 2)}
        >>> source.spec().modules[0].weight
        '0.weight'
    """

    def __init__(self, model: Any, *, adapter: str | None = None, check_finite: bool = True) -> None:
        if adapter is not None and not isinstance(adapter, str):
            raise AdapterError(
                f"adapter: got {adapter!r}, expected one name: factors are of one adapter. Combine several with "
                "add_weighted_adapter, or use MergedSource(model, adapter=[…])."
            )
        self.model: nn.Module = unwrap(model)
        self.adapter = adapter
        self.check_finite = check_finite
        self._planned: _Plan | None = None
        self._looked_at: _Plan | None = None
        self._lent = Latest[Bucket[Item]]()
        self._pinned = active_in(self.model) if adapter is None else None
        self.spec()

    def metadata(self) -> list[ParamMeta]:
        """Say what iteration will yield, in its order; nothing is gathered."""
        return [ParamMeta(name, t.dtype, tuple(full_shape(t))) for name, t in self._plan().tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `(name, tensor)`; a fresh pass each time.

        Raises:
            NonFiniteError: Something is NaN or Inf; raised before the first tensor, with every name.
        """
        yield from self._copies(self._checked())

    def _copies(self, plan: _Plan) -> Iterator[tuple[str, Tensor]]:
        for names in blocks(list(plan.tensors)):
            with whole([plan.tensors[name] for name in names]) as gathered:
                for name in names:
                    yield name, _copy(gathered(plan.tensors[name]))

    def lend(self, *, checked: bool = False) -> tuple[Bucket[Item], Iterator[tuple[str, Tensor]]]:
        """Return what iteration yields, for a receiver that reads it before the model changes.

        First a bucket of the parameters themselves, with the same key for as long as they lie where they lie; then a
        stream of what had to be gathered.

        Args:
            checked: `check_fits` has looked at the values a moment ago: they are not looked at twice.

        Raises:
            NonFiniteError: As iteration does.
        """
        plan = self._plan()
        if plan.sharded and any(map(is_sharded, plan.tensors.values())):
            return NOTHING, iter(self)  # checks and gathers where the other ranks do
        if not checked or self._looked_at is not plan:
            plan = self._checked()
        self._looked_at = None
        key = (plan, addresses(list(plan.tensors.values())))
        return self._lent.get(key, lambda: _lent(plan.tensors)), iter(())

    def spec(self) -> FactorSpec:
        """Describe the adapter for its receiver; nothing is gathered."""
        return describe(self.model, self._adapter(), self._plan().tensors)

    def check_fits(self, dtype: torch.dtype, *, slots: bool) -> None:
        """Refuse factors that leave the range of what an engine serves, before they are sent; every rank calls it.

        Args:
            dtype: The served dtype: of the weights, or of the LoRA slots.
            slots: Whether the factors are served as they are (`ServeAdapter`), or merged into weights of this dtype
                (`MergeInWorker`).

        Raises:
            NonFiniteError: With the names of the factors, or of the weights that the merge would spoil.

        Nothing is checked with ``check_finite=False``.
        """
        plan = self._plan()
        refuse_trained(plan.beside, plan.adapter)
        if not self.check_finite:
            return
        peaks = plan.finite.peaks()
        limit = torch.finfo(dtype).max
        scales = plan.in_slots if slots else {}
        refuse_range([(n, dtype) for n, peak in peaks.items() if scales.get(n, 1.0) * peak > limit])
        self._looked_at = plan
        if slots:
            return
        merges = plan.merges.get(dtype)
        if merges is None:
            merges = plan.merges[dtype] = Merges(_all_slots(self.model, plan.adapter), plan.tensors, dtype)
        merges.check(peaks)

    def base_state(self) -> object:
        """Return a value that stays equal as long as no frozen tensor is replaced or written to; see `Probe`."""
        plan = self._plan()
        return plan.built, plan.adapter, plan.frozen.state()

    def scalings(self) -> dict[str, float]:
        """Return each adapted module's s, by the module's name in the PEFT model; nothing is gathered."""
        return dict(self._plan().scalings)

    def packed_base(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the quantized base weights that the adapter was trained on, still packed.

        Names are those of a bitsandbytes checkpoint (`….weight`, `….weight.absmax`, …), so that
        `bitsandbytes.functional.QuantState.from_dict` reads them; for int8 `….weight` and `….SCB`.
        """
        base = base_of(self.model)
        found = slots(base, (self._adapter(),))
        names = checkpoint_names(base, found)
        for slot in found:
            if slot.packing != "plain":
                with whole([slot.held]) as gathered:
                    yield from packed(slot.module, slot.attr, names[slot.name][0] or slot.name, gathered)

    def _adapter(self) -> str:
        chosen = pick_adapters(self.model, self.adapter)
        if chosen is None:
            check_still_active(self.model, self._pinned)
        name = only_active(self.model) if chosen is None else chosen[0]
        kind = configs(self.model)[name].peft_type
        if str(getattr(kind, "value", kind)) not in ("LORA", "TRAINABLE_TOKENS"):
            raise UnmergeableError(
                f"adapter {name!r}: got {kind}, expected LoRA: there are no factors to send. "
                "Use MergedSource, which merges every method that PEFT can merge."
            )
        return name

    def _checked(self) -> _Plan:
        """Return the plan of a pass, whose values are finite: a GPU checks that while the CPU compares the structure."""
        before = self._planned
        end = before.finite.begin() if before is not None and self.check_finite else None
        plan = self._plan()
        refuse_trained(plan.beside, plan.adapter)
        if self.check_finite:
            (end if end is not None and plan is before else plan.finite.begin())()
        return plan

    def _plan(self) -> _Plan:
        """Return the plan of a pass; it is made anew if the model was rebuilt since the last pass."""
        before = self._planned
        if before is not None:
            drop_gathered(before.fsdp)
            if before.built.holds():
                return before
        fsdp = fsdp_modules(self.model)
        drop_gathered(fsdp)
        adapter = self._adapter()
        tensors = picked(self.model, adapter, bias=str(getattr(configs(self.model)[adapter], "bias", "none")))
        others = beside(self.model, [*tensors.values(), *self._excluded(adapter)])
        refuse_trained(others, adapter)
        scaled = {
            f"base_model.model.{path}": float(layer.scaling[adapter])
            for path, layer in named(base_of(self.model))
            if isinstance(layer, BaseTunerLayer) and adapter in getattr(layer, "scaling", {})
        }
        finite = FiniteCheck([Input(name, tensor) for name, tensor in tensors.items()])
        sharded = any(map(can_be_sharded, tensors.values()))
        buffers = [b for _, module in named(base_of(self.model)) for _, b in saved_buffers(module)]
        self._planned = _Plan(
            adapter,
            Structure(self.model),
            tensors,
            others,
            scaled,
            finite,
            sharded,
            frozen=Probe([*others.values(), *buffers]),
            fsdp=fsdp,
        )
        return self._planned

    def _excluded(self, adapter: str) -> Iterator[Tensor]:
        """Yield the tensors of the other adapters, where the user has named one: leaving them out is on purpose."""
        for other in configs(self.model) if self.adapter is not None else ():
            if other != adapter:
                yield from picked(self.model, other).values()


def _all_slots(model: nn.Module, adapter: str) -> list[Slot]:
    return slots(base_of(model), (adapter,))


def _lent(tensors: dict[str, Tensor]) -> Bucket[Item]:
    return Bucket({name: tensor.detach() for name, tensor in tensors.items()}, key=object())


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
