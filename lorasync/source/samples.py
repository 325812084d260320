"""The trainer's half of the base fingerprint."""

from __future__ import annotations

from typing import Any

import torch

from lorasync.fingerprint import WeightSample, positions
from lorasync.source.factors import FactorSource, _checkpoint_names
from lorasync.source.model import base_of
from lorasync.source.plan import slots
from lorasync.source.whole import whole


@torch.no_grad()
def base_samples(source: FactorSource) -> dict[str, WeightSample]:
    """Read a few elements of every frozen base weight, by checkpoint name.

    One weight is gathered at a time; every rank has to call it.

    Weights that the checkpoint stores in pieces (experts that are fused in memory) and weights that are trained
    themselves are left out.
    """
    base = base_of(source.model)
    found = slots(base, (source._adapter(),))
    names = _checkpoint_names(base, found)
    samples = {}
    for slot in found:
        name = names[slot.name][0]
        held: Any = slot.held
        if not name or held.requires_grad or slot.general is not None:
            continue
        with whole([held]) as gathered:
            weight = slot.base(gathered).reshape(-1)
            at = positions(name, weight.numel())
            values = weight[torch.tensor(at, device=weight.device)].double().cpu().tolist()
        dtype = str(weight.dtype).removeprefix("torch.")
        samples[name] = WeightSample(dtype, tuple(slot.shape), slot.packing, at, tuple(values))
    return samples
