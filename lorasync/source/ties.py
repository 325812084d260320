"""Tied weights: one tensor that the checkpoint stores once, and what an adapter does to that."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import Mismatch, MismatchError
from lorasync.source.model import named
from lorasync.zero.whole import Whole, whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lorasync.source import layers
    from lorasync.source.plan import Slot


def untied(base: nn.Module, slots: list[Slot], *, untie: bool) -> list[Slot]:
    """Drop the names that the checkpoint doesn't store because they are tied to another.

    Args:
        base: The base model; transformers' declarations of tied keys are read from it.
        slots: Every tensor, tied ones under each of their names.
        untie: Keep all names, for an engine that serves untied weights.

    Raises:
        MismatchError: Only one side of a tie is adapted, or not alike, and ``untie`` is false.
    """
    if untie:
        return slots
    _raise(conflicts(base, slots))
    dropped = tied_to(base, slots)
    return [slot for slot in slots if slot.name not in dropped]


def tied_to(base: nn.Module, slots: list[Slot]) -> dict[str, str]:
    """Map each name that the checkpoint does not store to the one that stands for it."""
    patterns = _declared(base)
    tied = {}
    for group in sharing(slots):
        dropped = _duplicates(group, patterns)
        kept = next(slot.name for slot in group if slot.name not in dropped)
        tied.update(dict.fromkeys(dropped, kept))
    return tied


def conflicts(base: nn.Module, slots: list[Slot]) -> list[Mismatch]:
    """List the ties that a merge would break, by their structure alone; nothing is gathered."""
    broken = [m for group in sharing(slots) for m in _disagreements(group, _alike)]
    return broken + _severed(base, {slot.name: slot for slot in slots})


def check_updates(groups: list[list[Slot]]) -> None:
    """Compare the values of the updates on both sides of every tie; collective where parameters are sharded.

    Args:
        groups: As `sharing` finds them.

    Raises:
        MismatchError: Both sides are adapted, with different factors.
    """
    _raise([m for group in groups for m in _disagreements(group, _same_values)])


def _raise(broken: list[Mismatch]) -> None:
    if broken:
        raise MismatchError("Tied weights would be served with different values.", broken)


def sharing(slots: list[Slot]) -> list[list[Slot]]:
    """List the slots that share a base parameter, where there are several."""
    by_base: defaultdict[int, list[Slot]] = defaultdict(list)
    for slot in slots:
        by_base[id(slot.held)].append(slot)
    return [group for group in by_base.values() if len(group) > 1]


def _declared(base: nn.Module) -> list[str]:
    """Name patterns of tied keys (``transformers.modeling_utils._get_tied_weight_keys``)."""
    patterns: list[str] = []
    for path, module in named(base):
        keys = getattr(module, "_tied_weights_keys", None) or {}
        patterns += [f"{path}.{key}" if path else key for key in keys]
    return patterns


def _duplicates(group: list[Slot], patterns: list[str]) -> list[str]:
    """Choose what `remove_tied_weights_from_state_dict` drops: the declared ones, all but one."""
    declared = [slot.name for slot in group if any(re.search(pattern, slot.name) for pattern in patterns)]
    return sorted(declared)[: len(group) - 1]


_FIX = (
    "Adapt both sides alike (ensure_weight_tying=True), or neither; or pass untie=True and start the engine "
    "from a config with tie_word_embeddings=false."
)


def _disagreements(group: list[Slot], same: Callable[[Slot, Slot], bool]) -> list[Mismatch]:
    if not any(slot.adapted for slot in group):
        return []
    first, *others = group
    return [
        Mismatch(other.name, "another update", f"the same as its tied {first.name}", _FIX)
        for other in others
        if not same(first, other)
    ]


def _alike(one: Slot, other: Slot) -> bool:
    if one.general is not None or other.general is not None or len(one.steps) != len(other.steps):
        return False
    return all(
        len(a.params) == len(b.params) and a.rows == b.rows
        for a, b in zip(one.steps, other.steps, strict=True)
    )


def _same_values(one: Slot, other: Slot) -> bool:
    return all(_same_step(a, b) for a, b in zip(one.steps, other.steps, strict=True))


def _same_step(one: layers.Step, other: layers.Step) -> bool:
    if all(a is b for a, b in zip(one.params, other.params, strict=True)):
        return True
    mine: Any = one.layer
    theirs: Any = other.layer
    if len(one.params) != 2 or mine.scaling[one.adapter] != theirs.scaling[other.adapter]:
        return False
    with whole([*one.params, *other.params]) as gathered:
        pairs = zip(_as_linear(one, gathered), _as_linear(other, gathered), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def _as_linear(step: layers.Step, gathered: Whole) -> tuple[Tensor, Tensor]:
    """Return A and B such that the weight gets s·B·A; for an embedding both are swapped and transposed."""
    a, b = map(gathered, step.params)
    embedding: Any = getattr(step.layer, "lora_embedding_A", {})
    return (b.T, a.T) if step.adapter in embedding else (a, b)


def _severed(base: nn.Module, slots: dict[str, Slot]) -> list[Mismatch]:
    """Find ties of the config that no longer hold: both sides have a tensor of their own."""
    ties: dict[str, str] = getattr(base, "all_tied_weights_keys", None) or {}
    if not getattr(getattr(base, "config", None), "tie_word_embeddings", False):
        return []
    return [
        Mismatch(target, "a tensor of its own (a saved module?)", f"the same as its tied {source}", _FIX)
        for target, source in ties.items()
        if target in slots and source in slots and slots[target].held is not slots[source].held
    ]
