"""Merging two folders, a base checkpoint and an adapter, without ever holding a model: tensor by tensor."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import LoadError, Mismatch, MismatchError, NonFiniteError
from lorasync.export.config import adapter_config, merged_config, read_json, say_tied
from lorasync.export.packed import BaseWeights
from lorasync.export.skeleton import misplaced, saved_beside, skeleton
from lorasync.export.tensors import Tensors
from lorasync.export.ties import declared, settle, severed
from lorasync.export.vocabulary import check_tokenizer, other_vocabulary
from lorasync.merge import NEAREST, Nearest, Rounding, Scratch, merge_and_round
from lorasync.merge.edits import LowRankUpdate, UpdatePart, edited
from lorasync.names import CheckpointLayout, checkpoint_name
from lorasync.source import FactorModule, FactorSource, FactorSpec, ParamMeta
from lorasync.source.edits import with_factors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from lorasync.export.packed import Weight
    from lorasync.merge.edits import Edit
    from lorasync.source.spec import FactorBias, FactorRows

_FIX = "Is the adapter for this base? Else load both with PEFT and pass the model to merge_to_disk."


class CheckpointSource:
    """The merged checkpoint of a base and an adapter folder, as a stream in the base's names and order.

    Args:
        base: A model folder with safetensors, plain, or packed by bitsandbytes, in FP8 with scales or in MXFP4.
        adapter: A PEFT folder (adapter_config.json, adapter_model.safetensors) of a LoRA or DoRA.
        dtype: What floating-point weights become; ``None`` keeps each one's own.
        rounding: How to round what was merged.
        untie: Write tied weights apart where the adapter makes them differ.

    Raises:
        LoadError: A folder is not what it should be.
        MismatchError: The adapter is not for this base; every mismatch is named.
        UnmergeableError: The adapter is no LoRA.
    """

    def __init__(
        self,
        base: Path,
        adapter: Path,
        *,
        dtype: torch.dtype | None = None,
        rounding: Rounding = NEAREST,
        untie: bool = False,
    ) -> None:
        self._config = read_json(base / "config.json")
        adapter_config(adapter)
        self.base = BaseWeights(Tensors(base, "model"), self._config)
        self.factors = Tensors(adapter, "adapter_model")
        self.dtype, self.rounding = dtype, rounding
        self._model = skeleton(base, adapter)
        self._severed = severed(declared(self._model), self.base)
        if self._severed:
            self._model = skeleton(base, adapter, tied=False)
        self.spec: FactorSpec = FactorSource(self._model).spec()
        self._modules = _by_weight(self.spec.modules)
        self._saved = {entry.weight: entry.tensor for entry in self.spec.saved}
        self._check_adapter()
        check_tokenizer(self._model, base, adapter)
        groups = declared(self._model)
        self._ties = settle(groups, self.spec, self.factors, untie=untie)
        self._stand_ins = _stand_ins(groups, self.base)
        self._check_base()
        self._names = [*self.base.names, *self._added()]

    def metadata(self) -> list[ParamMeta]:
        """Say what iteration will yield; nothing is read."""
        return [ParamMeta(name, self._dtype_of(name), self._shape_of(name)) for name in self._names]

    def config(self) -> dict[str, Any]:
        """Return the config that is true of the merged model."""
        made = merged_config(self._config, dtype=self.dtype, packed=self.base.packed_dtype)
        if self._ties.apart or self._severed:
            say_tied(made, False)
        return made

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `(name, tensor)`; NaN and Inf are looked for in all factors first, then in each result."""
        bad = [name for name in self.factors.names if not _finite(self.factors[name])]
        if bad:
            raise NonFiniteError(f"adapter: got NaN or Inf in {', '.join(bad)}, expected finite values.")
        scratch = Scratch()
        for name in self._names:
            # Tied names get the same values, down to a stochastic rounding's.
            tensor = self._make(self._ties.by.get(name, name), scratch)
            if not _finite(tensor):
                raise NonFiniteError(f"{name}: got NaN or Inf after merging, expected finite values.")
            yield name, tensor

    def _make(self, name: str, scratch: Scratch) -> Tensor:
        if name in self._saved:
            return self._cast(self.factors[self._saved[name]], name)
        stored = self._stored(name)
        assert stored is not None
        base, modules = stored.read(), self._modules.get(name, [])
        rows = {rows.weight for rows in self.spec.rows}
        if len(modules) == 1 and not modules[0].pieces and name not in rows:
            return self._one_module(modules[0], name, base, scratch)
        exact = not isinstance(self.rounding, Nearest)
        return self._cast(edited(base, self._edits(name, exact=exact), exact=exact), name)

    def _one_module(self, module: FactorModule, name: str, base: Tensor, scratch: Scratch) -> Tensor:
        """Merge the usual case: one adapter, rounded as it is merged."""
        update = self._update(module, name)
        return merge_and_round(
            update.how,
            base,
            update.lora_a,
            update.lora_b,
            update.magnitude,
            dtype=self._dtype_of(name),
            rounding=self.rounding,
            key=name,
            scratch=scratch,
        )

    def _edits(self, name: str, *, exact: bool) -> Iterator[Edit]:
        """Yield what the adapter does to one tensor of the checkpoint."""
        for module in self._modules.get(name, ()):
            update = self._update(module, name)
            if module.pieces:
                delta = self._delta_of_piece(module, name, update.delta(exact=exact))
                yield UpdatePart(update.how, delta)
            else:
                yield update
        entries: tuple[FactorBias | FactorRows, ...] = (*self.spec.biases, *self.spec.rows)
        yield from (with_factors(entry, self.factors) for entry in entries if entry.weight == name)

    def _update(self, module: FactorModule, name: str) -> LowRankUpdate:
        how = replace(module.how, exact=module.how.exact or self._by_bitsandbytes(name))
        update = with_factors(replace(module, how=how), self.factors)
        assert isinstance(update, LowRankUpdate)
        return update

    def _delta_of_piece(self, module: FactorModule, name: str, delta: Tensor) -> Tensor:
        """Return the part of a fused weight's delta that belongs to one piece; conversions only move elements."""
        layout = CheckpointLayout(self._model.base_model.model)
        return layout.convert({module.weight: delta})[name]

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        dtype = self._dtype_of(name)
        return self.rounding(tensor, dtype, key=name) if dtype.is_floating_point else tensor

    def _stored(self, name: str) -> Weight | None:
        """Return the base's weight of this name, or of the name that it is tied to; None where the base has neither."""
        name = name if name in self.base else self._stand_ins.get(name, name)
        return self.base.get(name)

    def _by_bitsandbytes(self, name: str) -> bool:
        stored = self._stored(name)
        return stored is not None and stored.by_bitsandbytes

    def _dtype_of(self, name: str) -> torch.dtype:
        stored = self._stored(name)
        dtype = self.factors.describe(self._saved[name])[0] if stored is None else stored.dtype
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def _shape_of(self, name: str) -> tuple[int, ...]:
        stored = self._stored(name)
        return self.factors.describe(self._saved[name])[1] if stored is None else stored.shape

    def _added(self) -> list[str]:
        """List names that the base doesn't store but the merged model does: trained heads, untied weights."""
        ties = self._ties
        told = {*ties.by, *(kept for name, kept in ties.by.items() if name in self.base)}
        return [n for n in dict.fromkeys([*self._saved, *ties.apart]) if n not in self.base and n not in told]

    def _check_adapter(self) -> None:
        if self.spec.base_changed_by is not None:
            raise LoadError(
                f"adapter: got init_lora_weights={self.spec.base_changed_by!r}, which changed its base, "
                "expected one for the base as published. Load both with PEFT and pass the model instead."
            )
        wrong = [*misplaced(self._model, self.factors), *self._unused()]
        hint = other_vocabulary(self._model, self.factors)
        if wrong or hint:
            raise MismatchError(hint or "The adapter doesn't fit this base.", wrong)

    def _unused(self) -> Iterator[Mismatch]:
        """Yield the adapter's tensors that no weight of the merged model is made of."""
        modules = self.spec.modules
        entries: list[Any] = [*self.spec.biases, *self.spec.rows, *self.spec.saved]
        used = {t for m in modules for t in (m.a, m.b, m.magnitude)} | {entry.tensor for entry in entries}
        used |= set(saved_beside(self._model, self.factors))
        for name in self.factors.names:
            if name not in used:
                fix = "Load both with PEFT and pass the model to merge_to_disk."
                yield Mismatch(name, "a tensor that no weight is made of", "a LoRA's", fix)

    def _check_base(self) -> None:
        """Compare names and shapes of what the spec needs with what the base holds."""
        entries: list[Any] = [*self.spec.biases, *self.spec.rows]
        wanted = dict.fromkeys([*self._modules, *(entry.weight for entry in entries)])
        wrong = [
            Mismatch(name, "no such tensor in the base", "the weight that the adapter is for", _FIX)
            for name in wanted
            if self._stored(name) is None
        ]
        wrong += self._changed()
        shapes = {module.weight: module.shape for module in self.spec.modules if not module.pieces}
        shapes |= {name: self.factors.describe(tensor)[1] for name, tensor in self._saved.items()}
        for name, shape in shapes.items():
            stored = self._stored(name)
            if stored is not None and stored.shape != shape:
                wrong.append(Mismatch(name, str(stored.shape), str(shape), _FIX))
        if wrong:
            raise MismatchError("The adapter doesn't fit this base.", wrong)

    def _changed(self) -> Iterator[Mismatch]:
        """Yield embeddings that PEFT saved with the adapter and that differ from the base's: trained, or set before."""
        for name in saved_beside(self._model, self.factors):
            weight = checkpoint_name(name)
            stored = self._stored(weight or name)
            if stored is None or not torch.equal(stored.read(), self.factors[name].to(stored.dtype)):
                fix = "Load both with PEFT, which takes the adapter's, and pass the model to merge_to_disk."
                yield Mismatch(name, "an embedding that is not the base's", f"{weight} of the base", fix)


def _by_weight(modules: tuple[FactorModule, ...]) -> dict[str, list[FactorModule]]:
    found: defaultdict[str, list[FactorModule]] = defaultdict(list)
    for module in modules:
        for name in module.pieces or (module.weight,):
            found[name].append(module)
    return dict(found)


def _stand_ins(groups: list[list[str]], base: BaseWeights) -> dict[str, str]:
    """Map each tied name that isn't stored to one that is."""
    stored = {id(group): next((name for name in group if name in base), None) for group in groups}
    return {
        name: stand_in
        for group in groups
        if (stand_in := stored[id(group)]) is not None
        for name in group
        if name not in base
    }


def _finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no Inf in it, without a copy (`isfinite` makes several)."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    return all(math.isfinite(float(edge)) for edge in torch.aminmax(tensor))
