"""What a rule of the guard is given, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasync.zero.report import Finding, Versions

if TYPE_CHECKING:
    import torch

    from lorasync.zero.facts import ModelFacts
    from lorasync.zero.settings import ZeroSettings


@dataclass(frozen=True)
class Case:
    """What a rule judges: the model, the training config, and the versions to judge for."""

    model: ModelFacts
    config: ZeroSettings
    versions: Versions


Rule = Callable[[Case], Iterator[Finding]]
"""Looks at one thing, and yields a finding where it is wrong."""


def spelt(dtype: torch.dtype | None) -> str:
    """Return a dtype's name as users write it: bfloat16."""
    return str(dtype).removeprefix("torch.")
