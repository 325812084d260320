"""Frozen weights of the trainer that an engine does not hold: a vision tower where only text is served, a value head."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from lorasync.receive.load_plan import LoadPlan

_BESIDE_THE_TEXT = (
    "vision",
    "visual",
    "image",
    "video",
    "audio",
    "speech",
    "tower",
    "projector",
    "v_head",
    "value_head",
    "mtp",
)
"""Parts of the names of weights that have no influence on the answer to a text. An engine may ignore those only."""


def may_be_ignored(names: Sequence[str], edited: Collection[str]) -> list[str]:
    """Return the names that an engine may ignore: of weights without an adapter, and without influence on text."""
    return [n for n in names if n not in edited and any(part in n.lower() for part in _BESIDE_THE_TEXT)]


def ignored_notes(plan: LoadPlan) -> list[str]:
    """Say in the handshake which weights were not compared because the engine does not hold them."""
    branches: dict[str, int] = defaultdict(int)
    for name in plan.ignored:
        branches[_top(name)] += 1
    return [
        f"{branch}: {count} weights of the trainer that this engine does not hold; they were not compared."
        for branch, count in sorted(branches.items())
    ]


def _top(name: str) -> str:
    """Return the pattern of the outermost module whose name says that it has no influence on text."""
    path = name.split(".")
    depth = next(i for i, part in enumerate(path) if any(word in part.lower() for word in _BESIDE_THE_TEXT))
    return ".".join([*path[: depth + 1], "*"])
