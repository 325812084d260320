"""What does not fit an engine, told by the branches of the model instead of tensor by tensor."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from lorasync.errors import Mismatch

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def unknown_branches(names: Sequence[str], all_names: Collection[str]) -> list[Mismatch]:
    """Return one mismatch for each branch of the trainer's model that the engine's model has no place for."""
    wrong = []
    for branch, members in _by_branch(names, all_names).items():
        more = f"{len(members)} tensors, {members[0]} for one" if len(members) > 1 else "a tensor"
        fix = (
            "Is this engine serving the model that was trained? If it serves a part of it, leave the rest out: "
            f"MergedSource(model, exclude=[{branch!r}])."
        )
        wrong.append(Mismatch(branch, more, "only names that the engine's model has a place for", fix))
    return wrong


def ignored_branches(names: Sequence[str], all_names: Collection[str]) -> list[Mismatch]:
    """Return one mismatch for each branch that the engine's loader ignores (the tower of a text-only engine)."""
    wrong = []
    for branch, members in _by_branch(names, all_names).items():
        more = f" ({len(members)} tensors, {members[0]} for one)" if len(members) > 1 else ""
        fix = f"Leave it out: MergedSource(model, exclude=[{branch!r}])."
        wrong.append(Mismatch(branch, f"what this engine ignores{more}", "only what it loads", fix))
    return wrong


def _by_branch(names: Sequence[str], all_names: Collection[str]) -> dict[str, list[str]]:
    branches: dict[str, list[str]] = defaultdict(list)
    for name in names:
        branches[_branch(name, set(names), all_names)].append(name)
    return branches


def _branch(name: str, ignored: Collection[str], all_names: Collection[str]) -> str:
    """Return the shortest pattern that fits this name, and of all names only ignored ones."""
    path = name.split(".")
    for depth in range(1, len(path)):
        prefix = ".".join(path[:depth]) + "."
        if all(other in ignored for other in all_names if other.startswith(prefix)):
            return f"{prefix}*"
    return name
