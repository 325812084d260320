"""Tied weights of a folder, found by what is stored and trained there: the config alone may be wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import Mismatch, MismatchError
from lorasync.names import CheckpointLayout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lorasync.export.packed import BaseWeights
    from lorasync.export.tensors import Tensors
    from lorasync.source.spec import FactorModule, FactorSpec

_FIX = (
    "Train both sides alike (PEFT's ensure_weight_tying=True; it ties only at the start, and not where the adapter is in "
    "another dtype than the base), or write them apart: untie=True, on the command line --untie."
)
_IN_MEMORY = (
    "Tokens were trained on one side that PEFT gives to the other too: load both with PEFT and pass the model to "
    "merge_to_disk(…, untie=True)."
)


@dataclass(frozen=True)
class Ties:
    """What is written for weights that are one in the model.

    Attributes:
        by: each name that takes its values from another, and that one.
        apart: names that get values of their own although the base has them as one.
    """

    by: dict[str, str]
    apart: tuple[str, ...]


def declared(model: Any) -> list[list[str]]:
    """List the groups of checkpoint names that are one weight, by the model's class and config; the kept name first."""
    base = model.base_model.model
    groups: dict[str, list[str]] = {}
    for target, source in (getattr(base, "all_tied_weights_keys", None) or {}).items():
        groups.setdefault(source, [source]).append(target)
    layout = CheckpointLayout(base)
    return [[_stored_name(layout, name) for name in group] for group in groups.values()]


def _stored_name(layout: CheckpointLayout, name: str) -> str:
    (made, *_) = layout.convert({name: torch.empty(2, 2, device="meta")})
    return made


def severed(groups: list[list[str]], base: BaseWeights) -> bool:
    """Whether a folder stores weights with different values that its config calls tied: transformers doesn't tie them."""
    stored = [[name for name in group if name in base] for group in groups]
    return any(not base.same(first, other) for first, *others in filter(None, stored) for other in others)


def settle(groups: list[list[str]], spec: FactorSpec, factors: Tensors, *, untie: bool) -> Ties:
    """Decide for each group whether one update serves all its names.

    Raises:
        MismatchError: It doesn't, and ``untie`` is false; every tie is named.
    """
    by: dict[str, str] = {}
    apart: list[str] = []
    wrong: list[Mismatch] = []
    for group in groups:
        edited = [name for name in group if _Edits.of(spec, name).any]
        kept = edited[0] if edited else group[0]
        if not edited or _agree(group, edited, spec, factors):
            by.update((name, kept) for name in group if name != kept)
        elif untie and not _shares_rows(edited, spec):
            apart += group
        else:
            others = [name for name in group if name != kept]
            fix = _IN_MEMORY if untie else _FIX
            wrong += [Mismatch(n, "another update", f"the same as its tied {kept}", fix) for n in others]
    if wrong:
        raise MismatchError("The adapter makes tied weights differ.", wrong)
    return Ties(by, tuple(apart))


@dataclass(frozen=True)
class _Edits:
    """What a spec does to one weight."""

    modules: tuple[FactorModule, ...]
    rows: tuple[tuple[str, tuple[int, ...]], ...]
    saved: tuple[str, ...]

    @classmethod
    def of(cls, spec: FactorSpec, name: str) -> _Edits:
        return cls(
            tuple(each for each in spec.modules if each.weight == name),
            tuple((each.tensor, each.rows) for each in spec.rows if each.weight == name),
            tuple(each.tensor for each in spec.saved if each.weight == name),
        )

    @property
    def any(self) -> bool:
        return bool(self.modules or self.rows or self.saved)


def _agree(group: list[str], edited: list[str], spec: FactorSpec, factors: Tensors) -> bool:
    """Whether all names of a group get the same values."""
    first, *others = (_Edits.of(spec, name) for name in edited)
    if not others:  # trained tokens that both sides share, which a spec has once; or a conflict
        return not spec.conflicts
    return len(edited) == len(group) and all(_same(first, other, factors) for other in others)


def _shares_rows(edited: list[str], spec: FactorSpec) -> bool:
    """Whether tokens were trained for one side, which PEFT gives to the others too, beside an update of another side."""
    rows = [bool(_Edits.of(spec, name).rows) for name in edited]
    return any(rows) and not all(rows)


def _same(one: _Edits, other: _Edits, factors: Tensors) -> bool:
    sizes = [(len(each.modules), len(each.rows), len(each.saved)) for each in (one, other)]
    return sizes[0] == sizes[1] and all(_comparisons(one, other, factors))


def _comparisons(one: _Edits, other: _Edits, factors: Tensors) -> Iterator[bool]:
    for mine, theirs in zip(one.saved, other.saved, strict=True):
        yield torch.equal(factors[mine], factors[theirs])
    for (mine, rows), (theirs, others) in zip(one.rows, other.rows, strict=True):
        yield rows == others and torch.equal(factors[mine], factors[theirs])
    for a, b in zip(one.modules, other.modules, strict=True):
        yield a.magnitude is None and b.magnitude is None and a.scaling == b.scaling and a.dora == b.dora
        yield all(map(torch.equal, _as_linear(a, factors), _as_linear(b, factors)))


def _as_linear(module: FactorModule, factors: Tensors) -> tuple[Tensor, Tensor]:
    """Return A and B such that the weight gets s·B·A; for an embedding both are swapped and transposed."""
    a, b = factors[module.a], factors[module.b]
    return (b.T, a.T) if module.kind == "embedding" else (a, b)
