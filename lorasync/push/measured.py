"""What is measured of a push once it is served, where `connect` was asked to."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasync.push.report import SyncReport
    from lorasync.verify import Canary

_VANISHING = 0.2  # about a tenth of NF4's weights are exactly zero, and keep any update


def with_canary(report: SyncReport, canary: Canary, request: dict[str, Any]) -> SyncReport:
    """Try the push on a few tokens."""
    gap = canary(request)
    if gap.mean <= canary.limit:
        return replace(report, canary=gap)
    warning = (
        f"the engine's answers lie {gap.mean:.3g} nats from the trainer's, expected at most {canary.limit:g} (canary): does "
        "it serve the model that was trained, in a dtype near the trainer's?"
    )
    return warned(replace(report, canary=gap), warning)


def with_survival(report: SyncReport, source: Any) -> SyncReport:
    """Add how much of the whole update survives rounding: the modules' shares, weighted by ‖Δ‖²."""
    found = list(source.delta_survival())
    whole = sum(module.norm**2 for module in found)
    kept = sum(module.kept * module.norm**2 for module in found) / whole if whole else 1.0
    if kept >= _VANISHING:
        return replace(report, delta_survival=kept)
    warning = (
        f"only {kept:.1%} of the update survives rounding to the served dtype: the engine all but serves the base. "
        "ServeAdapter rounds nothing; MergedSource(rounding=Stochastic(seed)) keeps it on average."
    )
    return warned(replace(report, delta_survival=kept), warning)


def warned(report: SyncReport, warning: str) -> SyncReport:
    """Say it now, and in the report."""
    warnings.warn(warning, stacklevel=4)  # where `send_weights` was called
    return replace(report, warnings=(*report.warnings, warning))
