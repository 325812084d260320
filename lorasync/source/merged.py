"""`MergedSource`: the merged model as a stream of tensors, out of a training model that is only read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasync.bucket import NOTHING, Bucket, Item, Latest, addresses
from lorasync.merge import NEAREST, DeltaSurvival, Nearest, Rounding, Scratch, delta_survival
from lorasync.names import CheckpointLayout, Group
from lorasync.source.exclude import patterns, refuse_trained_out, without
from lorasync.source.finite import FiniteCheck, inputs_of
from lorasync.source.fits import Fit, check_fits, may_leave
from lorasync.source.meta import ParamMeta
from lorasync.source.model import base_of, unwrap
from lorasync.source.plan import Slot, blocks, slots
from lorasync.source.structure import Structure
from lorasync.source.ties import check_updates, sharing, untied
from lorasync.source.trained import active_in, check_still_active, pick_adapters
from lorasync.zero import can_be_sharded, is_sharded
from lorasync.zero.fsdp import drop_gathered, fsdp_modules
from lorasync.zero.whole import AS_HELD, Whole, whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(frozen=True)
class _Block:
    """Groups whose parameters are gathered together: those of a decoder layer."""

    groups: list[Group]
    params: list[Tensor]


@dataclass(frozen=True, eq=False)
class _Plan:
    """Everything about a pass but the values; it is valid as long as the model is built the same way."""

    settings: tuple[Any, ...]
    built: Structure
    stored: dict[str, Slot]
    blocks: list[_Block]
    finite: FiniteCheck
    fits: list[Fit]
    inputs: list[Tensor]
    tied: list[list[Slot]]
    sharded: bool
    fsdp: list[Any]

    @property
    def groups(self) -> Iterator[Group]:
        """The groups of all blocks, in order."""
        return (group for block in self.blocks for group in block.groups)


class MergedSource:
    """Every weight of the merged model, one tensor at a time, in the names and shapes of its checkpoint.

    The training model is read, never written. Under ZeRO-3 and FSDP2 the parameters of one decoder layer
    are gathered at a time, adapters included, so every rank has to iterate. A yielded tensor is the
    consumer's own.

    Args:
        model: A PEFT model, or DeepSpeed's engine or DDP around one.
        adapter: The adapter to merge, or several in order; ``None`` means the ones that are active now, and a push is
            refused once others are.
        dtype: What floating-point weights are served as; ``None`` keeps each weight's own dtype (for a 4-bit
            base the dtype that it dequantizes to, for an 8-bit base the model's).
        check_finite: Refuse NaN and Inf before anything is yielded.
        rounding: How to round what was merged: `Nearest`, or `Stochastic` with a seed.
        untie: Yield tied weights under each of their names, for an engine that serves them untied.
        exclude: Patterns (`fnmatch`: ``"visual.*"``) of the checkpoint's names to leave out, for an engine that serves
            a part of the model. What is trained can't be left out; an engine refuses a push without what it serves.

    Raises:
        TypeError: ``dtype`` is no floating-point dtype.
        AdapterError: No adapter, not this one, or it is merged in place or disabled; or several have the same saved
            module.
        UnmergeableError: The adapter has no merged form; the message names what works.
        MismatchError: Tied weights would get different values, or ``exclude`` has a pattern that fits no name.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> source = MergedSource(get_peft_model(model, LoraConfig(target_modules=["0"])))
        >>> [meta.name for meta in source.metadata()]
        ['0.weight', '0.bias']
        >>> {name: tuple(tensor.shape) for name, tensor in source}
        {'0.weight': (4, 4), '0.bias': (4,)}
    """

    def __init__(
        self,
        model: Any,
        *,
        adapter: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        check_finite: bool = True,
        rounding: Rounding = NEAREST,
        untie: bool = False,
        exclude: Sequence[str] = (),
    ) -> None:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(
                f"dtype: got {dtype!r}, expected a floating-point torch.dtype, for example torch.bfloat16."
            )
        self.model: nn.Module = unwrap(model)
        self.adapter = adapter
        self.dtype = dtype
        self.check_finite = check_finite
        self.rounding = rounding
        self.untie = untie
        self.exclude = patterns(exclude)
        self._layout = CheckpointLayout(base_of(self.model))
        self._cut = Latest[list[Group]]()
        self._planned: _Plan | None = None
        self._lent = Latest[Bucket[Item]]()
        self._pinned = active_in(self.model) if adapter is None else None
        self.metadata()

    def metadata(self) -> list[ParamMeta]:
        """Say what iteration will yield, in its order; nothing is gathered or computed."""
        return [ParamMeta(*output) for group in self._plan().groups for output in group.outputs]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `(name, tensor)`; a fresh pass each time.

        Raises:
            NonFiniteError: Something is NaN or Inf; raised before the first tensor, with every name.
        """
        yield from self._copies(self._ready())

    def _copies(self, plan: _Plan) -> Iterator[tuple[str, Tensor]]:
        scratch = Scratch()
        for block in plan.blocks:
            with whole(block.params) as gathered:
                for group in block.groups:
                    yield from self._converted(group, plan.stored, gathered, scratch)

    def lend(self) -> tuple[Bucket[Item], Iterator[tuple[str, Tensor]]]:
        """Return what iteration yields, for a receiver that reads it before the model changes.

        First a bucket of what the receiver reads from the model: low-rank merges of linear weights as `PendingMerge`,
        and the weights that need no work. It has the same key for as long as all of that lies where it lies. Then a
        stream of what had to be made.

        Raises:
            NonFiniteError: As iteration does.
        """
        plan = self._plan()
        if plan.sharded and any(map(is_sharded, plan.inputs)):
            return NOTHING, iter(self)  # checks and gathers where the other ranks do
        plan = self._ready()
        key = (plan, addresses(plan.inputs))
        lent = self._lent.get(key, lambda: Bucket(self._lendable(plan), key=object()))
        return lent, self._not_lent(plan, lent)

    def _lendable(self, plan: _Plan) -> Iterator[tuple[str, Item]]:
        for group in plan.groups:
            item = self._lend(group, plan.stored)
            if item is not None:
                yield group.outputs[0][0], item

    def _not_lent(self, plan: _Plan, lent: Bucket[Item]) -> Iterator[tuple[str, Tensor]]:
        scratch = Scratch()
        for group in plan.groups:
            if group.outputs[0][0] not in lent:
                yield from self._converted(group, plan.stored, AS_HELD, scratch)

    def _lend(self, group: Group, found: dict[str, Slot]) -> Item | None:
        """Return what can be lent for a group: a pending merge, or the parameter itself; None where neither will do."""
        slot, dtype = found[group.members[0]], group.outputs[0][1]
        if not group.renamed or not isinstance(self.rounding, Nearest):
            return None
        if slot.adapted:
            return slot.pending(dtype)
        return slot.held.detach() if (slot.packing, slot.dtype) == ("plain", dtype) else None

    def delta_survival(self) -> Iterator[DeltaSurvival]:
        """Measure, module by module, how much of the update is left after rounding to the served dtype.

        A pass of its own, with twice the arithmetic of a sync; every rank has to iterate.
        """
        plan = self._ready()
        for block in plan.blocks:
            members = [plan.stored[name] for group in block.groups for name in group.members]
            with whole(block.params) as gathered:
                for slot in [slot for slot in members if slot.adapted]:
                    served = slot.make(self._dtype(slot), self.rounding, gathered)
                    yield delta_survival(slot.name, slot.base(gathered), slot.exact(gathered), served)

    def as_vllm_source(self) -> Any:
        """Return this source as the installed vLLM's `WeightSource`, for its own `nccl` and `ipc` backends.

        Raises:
            ImportError: vLLM is not installed.
        """
        from lorasync.vllm_seam.weight_source import weight_source

        return weight_source(self)

    def _ready(self) -> _Plan:
        """Plan a pass and check all that can be checked before its first tensor."""
        plan = self._plan()
        if not self.untie:
            check_updates(plan.tied)
        if self.check_finite:
            check_fits(plan.fits, plan.finite.peaks())
        else:
            _try_general(plan.stored.values())
        return plan

    def _plan(self) -> _Plan:
        """Return the plan of a pass; it is made anew if the model was rebuilt or a setting changed since the last pass."""
        settings, before = (self.adapter, self.dtype, self.untie, self.exclude), self._planned
        if before is not None:
            drop_gathered(before.fsdp)
            if before.settings == settings and before.built.holds():
                return before
        fsdp = fsdp_modules(self.model)
        drop_gathered(fsdp)
        built = Structure(self.model)
        if self.adapter is None:
            check_still_active(self.model, self._pinned)
        everything = slots(base_of(self.model), pick_adapters(self.model, self.adapter))
        stored, groups = self._served(everything)
        params = {id(param): param for slot in stored.values() for param in slot.params}
        inputs = [each for slot in stored.values() for each in inputs_of(slot)]
        served = [(slot, self._dtype(slot)) for slot in stored.values()]
        self._planned = _Plan(
            settings,
            built,
            stored,
            blocks=list(_blocks(groups, stored)),
            finite=FiniteCheck(inputs, before.finite if before else None),
            fits=[Fit(slot, dtype) for slot, dtype in served if may_leave(slot, dtype)],
            inputs=list(params.values()),
            tied=sharing(everything),
            sharded=any(map(can_be_sharded, params.values())),
            fsdp=fsdp,
        )
        return self._planned

    def _served(self, everything: list[Slot]) -> tuple[dict[str, Slot], list[Group]]:
        """Return the slots that are streamed, and their groups: what the checkpoint stores, without what is excluded."""
        stored = self._stored(everything)
        everything_stored = self._groups(stored)
        groups = without(everything_stored, self.exclude)
        refuse_trained_out(everything_stored, groups, stored)
        members = {name for group in groups for name in group.members}
        return {name: slot for name, slot in stored.items() if name in members}, groups

    def _stored(self, everything: list[Slot]) -> dict[str, Slot]:
        """Return the slots that a checkpoint stores: no tied aliases, and nothing that transformers never saves."""
        base = base_of(self.model)
        ignored = getattr(base, "_keys_to_ignore_on_save", None) or ()
        kept = untied(base, everything, untie=self.untie)
        return {slot.name: slot for slot in kept if slot.name not in ignored}

    def _groups(self, found: dict[str, Slot]) -> list[Group]:
        key = [(slot.name, self._dtype(slot), slot.shape) for slot in found.values()]
        return self._cut.get(key, lambda: self._layout.groups(_metas(key)))

    def _dtype(self, slot: Slot) -> torch.dtype:
        return self.dtype if self.dtype is not None and slot.dtype.is_floating_point else slot.dtype

    def _converted(
        self, group: Group, found: dict[str, Slot], gathered: Whole, scratch: Scratch
    ) -> Iterator[tuple[str, Tensor]]:
        members = [found[name] for name in group.members]
        made = {slot.name: slot.make(self._dtype(slot), self.rounding, gathered, scratch) for slot in members}
        if group.renamed:
            tensors = {group.outputs[0][0]: made.pop(group.members[0])}
        else:
            tensors = self._layout.convert(made)
            made.clear()
        held = {_storage(gathered(slot.held)) for slot in members}
        for name, dtype, shape in group.outputs:
            tensor = _own(tensors.pop(name), held)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), (
                f"{name} is not what metadata() said"
            )
            yield name, tensor


def _metas(key: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in key}


def _try_general(found: Iterable[Slot]) -> None:
    """Merge one module of each kind that PEFT merges itself, so that a refusal comes first."""
    kinds = {type(slot.general.layers[-1]): slot for slot in found if slot.general is not None}
    for slot in kinds.values():
        with whole(slot.params) as gathered:
            slot.exact(gathered)


def _blocks(groups: Iterable[Group], found: dict[str, Slot]) -> Iterator[_Block]:
    """Cut the stream into decoder layers: what is gathered at once, with the parameters of each."""
    by_first = {group.members[0]: group for group in groups}
    for names in blocks(list(by_first)):
        block = [by_first[name] for name in names]
        params = [param for group in block for name in group.members for param in found[name].params]
        yield _Block(block, list({id(param): param for param in params}.values()))


def _own(tensor: Tensor, held: set[int]) -> Tensor:
    """Return a contiguous tensor that shares no memory with the training model."""
    tensor = tensor.detach().contiguous()
    return tensor.clone() if _storage(tensor) in held else tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
