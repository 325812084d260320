"""Making a `FactorSpec`: what the tensors of one adapter do to which weights of the checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import Mismatch, MismatchError, UnmergeableError
from lorasync.names import CheckpointLayout
from lorasync.source.model import base_of
from lorasync.source.plan import Slot, slots
from lorasync.source.spec import FactorBias, FactorModule, FactorRows, FactorSaved, FactorSpec
from lorasync.source.ties import conflicts, tied_to
from lorasync.source.trained import configs
from lorasync.zero import full_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from lorasync.merge import LowRank
    from lorasync.source.layers import Step

# Inits that change the base weights when the adapter is made (PEFT's `init_lora_weights`).
_MUTATING = ("pissa", "olora", "corda", "lora_ga", "loftq", "kasa")


def describe(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> FactorSpec:
    """Describe an adapter for its receiver; nothing is gathered.

    Args:
        model: A PEFT model.
        adapter: The adapter's name.
        tensors: What is sent, by its name in the stream.

    Raises:
        UnmergeableError: A layer has no plain factors.
        MismatchError: Tensors don't have the rank that their layer says.
    """
    base = base_of(model)
    found = slots(base, (adapter,))
    ties, broken = tied_to(base, found), conflicts(base, found)
    builder = _Builder({id(tensor): name for name, tensor in tensors.items()}, checkpoint_names(base, found))
    for slot in found:
        builder.add(slot, shared=slot.name in ties)
    if builder.wrong:
        raise MismatchError("The adapter's tensors don't fit its layers.", builder.wrong)
    config = json.loads(json.dumps(configs(model)[adapter].to_dict(), default=_plain))
    return FactorSpec(
        adapter=adapter,
        config=config,
        modules=tuple(builder.modules),
        biases=tuple(builder.biases),
        rows=tuple(builder.rows),
        saved=tuple(builder.saved),
        ties=ties,
        conflicts=tuple(str(mismatch) for mismatch in broken),
        base_changed_by=_mutating_init(config),
    )


def checkpoint_names(base: nn.Module, found: list[Slot]) -> dict[str, tuple[str, ...]]:
    """Return each slot's name in the checkpoint; where values are converted, an empty name and then those of the pieces."""
    metas = {slot.name: torch.empty(slot.shape, dtype=slot.dtype, device="meta") for slot in found}
    names: dict[str, tuple[str, ...]] = {}
    for group in CheckpointLayout(base).groups(metas):
        outputs = tuple(name for name, _, _ in group.outputs)
        names.update(dict.fromkeys(group.members, outputs if group.renamed else ("", *outputs)))
    return names


class _Builder:
    """Collects the spec's entries slot by slot."""

    def __init__(self, wire: dict[int, str], names: dict[str, tuple[str, ...]]) -> None:
        self.wire = wire
        self.names = names
        self.modules: list[FactorModule] = []
        self.biases: list[FactorBias] = []
        self.rows: list[FactorRows] = []
        self.saved: list[FactorSaved] = []
        self.wrong: list[Mismatch] = []

    def add(self, slot: Slot, *, shared: bool) -> None:
        """Add a slot's entries; a shared tensor (a tied alias, with tied rows) has them elsewhere already."""
        if slot.general is not None or any(
            "MultiheadAttention" in type(s.layer).__name__ for s in slot.steps
        ):
            raise UnmergeableError(
                f"{slot.name}: got a variant of LoRA without plain factors, expected LoRA or DoRA. "
                "Use MergedSource."
            )
        name = self._name(slot)
        if id(slot.held) in self.wire and not shared:
            self.saved.append(FactorSaved(name, self.wire[id(slot.held)]))
        for step in slot.steps:
            wires = [self.wire[id(param)] for param in step.params]
            if step.how is not None:
                self._low_rank(slot, step, step.how, wires)
            elif step.rows:
                if not shared or wires[0] not in {rows.tensor for rows in self.rows}:
                    self.rows.append(FactorRows(name, wires[0], step.rows))
            else:
                layer: Any = step.layer
                self.biases.append(FactorBias(name, wires[0], float(layer.scaling[step.adapter])))

    def _name(self, slot: Slot) -> str:
        return self.names[slot.name][0] or slot.name

    def _low_rank(self, slot: Slot, step: Step, how: LowRank, wires: list[str]) -> None:
        layer: Any = step.layer
        r = int(layer.r[step.adapter])
        rank = full_shape(step.params[0])[0]
        if rank != r * how.experts:
            fix = "The adapter's config and its tensors disagree: reload or retrain it."
            self.wrong.append(Mismatch(wires[0], f"rank {rank}", f"rank {r * how.experts}", fix))
        pieces = self.names[slot.name][1:]
        self.modules.append(
            FactorModule(
                weight=self._name(slot),
                pieces=pieces,
                dtype=str(slot.dtype).removeprefix("torch."),
                shape=slot.shape,
                base=slot.packing,
                r=r,
                a=wires[0],
                b=wires[1],
                magnitude=wires[2] if how.dora else None,
                how=how,
            )
        )


def _mutating_init(config: dict[str, Any]) -> str | None:
    init = config.get("init_lora_weights")
    return init if isinstance(init, str) and init.lower().startswith(_MUTATING) else None


def _plain(value: object) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))
