"""What a merged push leaves out on purpose: names of the checkpoint, by patterns."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from lorasync.errors import Mismatch, MismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasync.names import Group
    from lorasync.source.plan import Slot

_SHOWN = 3


def patterns(exclude: Sequence[str]) -> tuple[str, ...]:
    """Check the argument's type: a lone string would be taken for patterns of one letter.

    Raises:
        TypeError: It is no sequence of strings.

    Example:
        >>> patterns(["visual.*", "v_head.*"])
        ('visual.*', 'v_head.*')
    """
    if isinstance(exclude, str) or not all(isinstance(pattern, str) for pattern in exclude):
        fix = f"exclude=[{exclude!r}]" if isinstance(exclude, str) else "patterns of names"
        raise TypeError(f"exclude: got {exclude!r}, expected a list of patterns: {fix}.")
    return tuple(exclude)


def without(groups: list[Group], exclude: tuple[str, ...]) -> list[Group]:
    """Leave out the groups whose names fit a pattern.

    Raises:
        MismatchError: A pattern fits no name, or a part of what is converted together.
    """
    if not exclude:
        return groups
    fits = dict.fromkeys(exclude, False)
    kept, wrong = [], []
    for group in groups:
        names = [name for name, _, _ in group.outputs]
        out = [name for name in names if _matches(name, fits)]
        if not out:
            kept.append(group)
        elif len(out) < len(names):
            wrong.append(_in_part(out, names))
    wrong += [_unused(pattern, groups) for pattern, used in fits.items() if not used]
    if wrong:
        raise MismatchError("exclude: got patterns that don't fit the checkpoint's names.", wrong)
    return kept


def refuse_trained_out(groups: list[Group], kept: list[Group], stored: Mapping[str, Slot]) -> None:
    """Refuse to leave out what an adapter changes or what is trained: the engine would not serve the policy.

    Raises:
        MismatchError: With each such name.
    """
    left = {name for group in kept for name in group.members}
    wrong = [
        Mismatch(
            group.outputs[0][0],
            "left out, though it is trained",
            "only what is frozen",
            "An engine without it does not serve the policy. If the engine ties it (lm_head), start it with "
            "hf_overrides={'tie_word_embeddings': False}.",
        )
        for group in groups
        for name in group.members
        if name not in left and (stored[name].adapted or stored[name].held.requires_grad)
    ]
    if wrong:
        raise MismatchError("exclude: got patterns of what is trained.", wrong)


def _matches(name: str, fits: dict[str, bool]) -> bool:
    hit = [pattern for pattern in fits if fnmatchcase(name, pattern)]
    fits.update(dict.fromkeys(hit, True))
    return bool(hit)


def _in_part(out: list[str], names: list[str]) -> Mismatch:
    got = f"{len(out)} of {len(names)} tensors that are one in memory ({', '.join(out[:_SHOWN])}, …)"
    return Mismatch(names[0], got, "all of them, or none", "Widen the pattern.")


def _unused(pattern: str, groups: list[Group]) -> Mismatch:
    roots = sorted({name.partition(".")[0] for group in groups for name, _, _ in group.outputs})
    branch = pattern.removesuffix("*").removesuffix(".")
    fix = f"The names start with {', '.join(roots)}."
    nearest = [n for g in groups for n, _, _ in g.outputs if branch and f".{branch}." in f".{n}."]
    if nearest:
        fix = f"Did you mean a pattern of {nearest[0]}?"
    return Mismatch(pattern, "no name that it fits", "a pattern of some name", fix)
