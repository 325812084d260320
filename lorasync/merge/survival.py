"""What is left of an update after rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeltaSurvival:
    """How much of one module's update is left after rounding to the served dtype.

    ``kept`` is ⟨served − W, Δ⟩ / ‖Δ‖²: 1 when the update arrives whole, 0 when it vanishes. ``unmoved`` is
    the share of the updated elements that still have W's rounded value. ``norm`` is ‖Δ‖.
    """

    name: str
    kept: float
    unmoved: float
    norm: float


@torch.no_grad()
def delta_survival(name: str, base: Tensor, exact: Tensor, served: Tensor) -> DeltaSurvival:
    """Compare the exact merge with what is served.

    Args:
        name: What to call the module in the report.
        base: W before the merge.
        exact: W + Δ, unrounded (fp32).
        served: W + Δ, as served.

    Example:
        >>> import torch
        >>> w = torch.ones(4, dtype=torch.bfloat16)
        >>> report = delta_survival("w", w, w.float() + 1e-4, (w.float() + 1e-4).bfloat16())
        >>> report.kept, report.unmoved
        (0.0, 1.0)
    """
    wide = base.to(torch.float32)
    delta = exact.to(torch.float32) - wide
    touched = delta != 0
    square = float(delta.double().square().sum())
    if square == 0.0:
        return DeltaSurvival(name, 1.0, 0.0, 0.0)
    moved = served.to(torch.float32) - wide
    still = (served == base.to(served.dtype)) & touched
    kept = float((moved.double() * delta.double()).sum()) / square
    return DeltaSurvival(name, kept, float(still.sum()) / float(touched.sum()), math.sqrt(square))
