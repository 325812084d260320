"""`MergedSource`: the merged model as a stream of tensors, out of a training model that is only read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasync.merge import NEAREST, DeltaSurvival, Rounding, Scratch, delta_survival
from lorasync.names import CheckpointLayout, Group
from lorasync.source.finite import FiniteCheck
from lorasync.source.model import base_of, pick_adapters, unwrap
from lorasync.source.plan import Slot, blocks, slots
from lorasync.source.ties import check_updates, untied
from lorasync.source.whole import Whole, whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(frozen=True)
class ParamMeta:
    """What iteration will yield: the checkpoint's name, the dtype on the wire, the full shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class MergedSource:
    """Every weight of the merged model, one tensor at a time, in the names and shapes of its checkpoint.

    The training model is read, never written. Under ZeRO-3 and FSDP2 the parameters of one decoder layer
    are gathered at a time, adapters included, so every rank has to iterate. A yielded tensor is the
    consumer's own.

    Args:
        model: A PEFT model, or DeepSpeed's engine or DDP around one.
        adapter: The adapter to merge, or several in order; ``None`` means the active ones.
        dtype: What floating-point weights are served as; ``None`` keeps each weight's own dtype (for a 4-bit
            base the dtype that it dequantizes to, for an 8-bit base the model's).
        check_finite: Refuse NaN and Inf before anything is yielded.
        rounding: How to round what was merged: `Nearest`, or `Stochastic` with a seed.
        untie: Yield tied weights under each of their names, for an engine that serves them untied.

    Raises:
        AdapterError: No adapter, not this one, or it is merged in place or disabled.
        UnmergeableError: The adapter has no merged form; the message names what works.
        MismatchError: Tied weights would get different values.

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
    ) -> None:
        self.model: nn.Module = unwrap(model)
        self.adapter = adapter
        self.dtype = dtype
        self.check_finite = check_finite
        self.rounding = rounding
        self.untie = untie
        self._finite = FiniteCheck()
        self._layout = CheckpointLayout(base_of(self.model))
        self._cut: tuple[Any, list[Group]] = (None, [])
        self.metadata()

    def metadata(self) -> list[ParamMeta]:
        """Say what iteration will yield, in its order; nothing is gathered or computed."""
        return [ParamMeta(*output) for group in self._groups(self._slots()) for output in group.outputs]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `(name, tensor)`; a fresh pass each time.

        Raises:
            NonFiniteError: Something is NaN or Inf; raised before the first tensor, with every name.
        """
        ready, scratch = self._ready(), Scratch()
        for block, params in _blocks(self._groups(ready), ready):
            with whole(params) as gathered:
                for group in block:
                    yield from self._converted(group, ready, gathered, scratch)

    def delta_survival(self) -> Iterator[DeltaSurvival]:
        """Measure, module by module, how much of the update is left after rounding to the served dtype.

        A pass of its own, with twice the arithmetic of a sync; every rank has to iterate.
        """
        ready = self._ready()
        for block, params in _blocks(self._groups(ready), ready):
            with whole(params) as gathered:
                for slot in [ready[name] for group in block for name in group.members if ready[name].adapted]:
                    served = slot.make(self._dtype(slot), self.rounding, gathered)
                    yield delta_survival(slot.name, slot.base(gathered), slot.exact(gathered), served)

    def as_vllm_source(self) -> Any:
        """Return this source as the installed vLLM's `WeightSource`, for its own `nccl` and `ipc` backends.

        Raises:
            ImportError: vLLM is not installed.
        """
        from lorasync.source.weight_source import weight_source

        return weight_source(self)

    def _ready(self) -> dict[str, Slot]:
        """Plan a pass and check all that can be checked before its first tensor."""
        everything = self._everything()
        found = self._stored(everything)
        if not self.untie:
            check_updates(everything)
        if self.check_finite:
            self._finite(found.values(), self.dtype)
        else:
            _try_general(found.values())
        return found

    def _slots(self) -> dict[str, Slot]:
        return self._stored(self._everything())

    def _everything(self) -> list[Slot]:
        return slots(base_of(self.model), pick_adapters(self.model, self.adapter))

    def _stored(self, everything: list[Slot]) -> dict[str, Slot]:
        """What the checkpoint stores: without tied aliases and what transformers never saves."""
        base = base_of(self.model)
        ignored = getattr(base, "_keys_to_ignore_on_save", None) or ()
        kept = untied(base, everything, untie=self.untie)
        return {slot.name: slot for slot in kept if slot.name not in ignored}

    def _groups(self, found: dict[str, Slot]) -> list[Group]:
        key = [(slot.name, self._dtype(slot), slot.shape) for slot in found.values()]
        if key != self._cut[0]:
            metas = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in key}
            self._cut = (key, self._layout.groups(metas))
        return self._cut[1]

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


def _try_general(found: Iterable[Slot]) -> None:
    """Merge one module of each kind that PEFT merges itself, so that a refusal comes first."""
    kinds = {type(slot.general.layers[-1]): slot for slot in found if slot.general is not None}
    for slot in kinds.values():
        with whole(slot.params) as gathered:
            slot.exact(gathered)


def _blocks(groups: Iterable[Group], found: dict[str, Slot]) -> Iterator[tuple[list[Group], list[Tensor]]]:
    """Cut the stream into decoder layers: what is gathered at once, with the parameters of each."""
    by_first = {group.members[0]: group for group in groups}
    for names in blocks(list(by_first)):
        block = [by_first[name] for name in names]
        params = [param for group in block for name in group.members for param in found[name].params]
        yield block, list({id(param): param for param in params}.values())


def _own(tensor: Tensor, held: set[int]) -> Tensor:
    """A contiguous tensor that shares no memory with the training model."""
    tensor = tensor.detach().contiguous()
    return tensor.clone() if _storage(tensor) in held else tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
