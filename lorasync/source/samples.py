"""The trainer's half of the base check: samples of the frozen weights that are trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorasync.base_check import PIECE_SAMPLES, SAMPLES, WeightSample, positions
from lorasync.names import CheckpointLayout, Group
from lorasync.source.model import base_of
from lorasync.source.plan import Slot, slots
from lorasync.zero.whole import Whole, whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lorasync.source.factors import FactorSource


@torch.no_grad()
def base_samples(source: FactorSource) -> dict[str, WeightSample]:
    """Read a few elements of every frozen base weight (and saved buffer), by checkpoint name.

    What the checkpoint stores in other pieces than memory (experts that are fused in memory) is converted, and sampled
    piece by piece. What is converted together is gathered together; every rank has to call it. Only weights that travel
    themselves are left out.
    """
    base = base_of(source.model)
    found = {slot.name: slot for slot in slots(base, (source._adapter(),))}
    layout = CheckpointLayout(base)
    metas = {n: torch.empty(slot.shape, dtype=slot.dtype, device="meta") for n, slot in found.items()}
    samples: dict[str, WeightSample] = {}
    travels = {id(tensor) for tensor in source._plan().tensors.values()}
    for group in layout.groups(metas):
        members = [found[name] for name in group.members]
        if not any(id(slot.held) in travels for slot in members):
            with whole([slot.held for slot in members]) as gathered:
                samples.update(_samples(group, members, layout, gathered))
    return samples


def _samples(
    group: Group, members: list[Slot], layout: CheckpointLayout, gathered: Whole
) -> Iterator[tuple[str, WeightSample]]:
    read = {slot.name: slot.base(gathered) for slot in members}
    tensors = {group.outputs[0][0]: read[members[0].name]} if group.renamed else layout.convert(read)
    count = SAMPLES if len(tensors) <= len(members) else PIECE_SAMPLES
    packing = members[0].packing
    for name, tensor in tensors.items():
        if tensor.numel():
            yield name, _sample(name, tensor, packing, count)


def _sample(name: str, tensor: Tensor, packing: str, count: int) -> WeightSample:
    weight = tensor.reshape(-1)
    at = positions(name, weight.numel(), count=count)
    values = weight[torch.tensor(at, device=weight.device)].double().cpu().tolist()
    return WeightSample(
        str(weight.dtype).removeprefix("torch."), tuple(tensor.shape), packing, at, tuple(values)
    )
