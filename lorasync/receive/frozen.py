"""Frozen weights of the trainer that an engine has no use for: the towers of one that serves text only, a value head."""

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
"""Parts of names of what does not take part in the answer to a text; everything else that is ignored is a mistake."""


def may_be_ignored(names: Sequence[str], edited: Collection[str]) -> list[str]:
    """The names that an engine may ignore: beside the text, and without an adapter."""
    return [n for n in names if n not in edited and any(part in n.lower() for part in _BESIDE_THE_TEXT)]


def ignored_notes(plan: LoadPlan) -> list[str]:
    """What the handshake says of weights that were not compared, as the engine does not hold them."""
    branches: dict[str, int] = defaultdict(int)
    for name in plan.ignored:
        branches[_top(name)] += 1
    return [
        f"{branch}: {count} weights of the trainer that this engine does not hold; they were not compared."
        for branch, count in sorted(branches.items())
    ]


def _top(name: str) -> str:
    """The path down to the part that is beside the text."""
    path = name.split(".")
    depth = next(i for i, part in enumerate(path) if any(word in part.lower() for word in _BESIDE_THE_TEXT))
    return ".".join([*path[: depth + 1], "*"])
