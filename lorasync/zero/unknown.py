"""Keys of a DeepSpeed config that DeepSpeed doesn't know, with the name that was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorasync.spelling import nearest
from lorasync.zero.keys import VALIDATED, ZERO, Path

_ADAM = ("adam", "adamw")
_COMMENTS = ("_", "#", "//", "comment")


@dataclass(frozen=True)
class UnknownKey:
    """A key that DeepSpeed doesn't know.

    Attributes:
        key: Its dotted path.
        meant: What to write instead, dotted; None where no known key is spelt like it.
        refused: Whether DeepSpeed itself refuses it; otherwise it is ignored without a word.
    """

    key: str
    meant: str | None
    refused: bool

    @property
    def wrong(self) -> bool:
        """Whether it can't be anything but a mistake: refused by DeepSpeed, or a known key misspelt."""
        return self.refused or self.meant is not None

    def __str__(self) -> str:
        effect = "refuses it" if self.refused else "ignores it without a word"
        fix = f"Did you mean {self.meant}?" if self.meant else "Remove it."
        return f"{self.key}: got a key that DeepSpeed doesn't know ({effect}). {fix}"


def unknown_keys(config: Mapping[str, Any], known: Mapping[Path, frozenset[str]]) -> list[UnknownKey]:
    """Find the keys that DeepSpeed doesn't know, at every level.

    Args:
        config: A DeepSpeed config.
        known: The keys of each section, by its path; a section that is not there is not looked into.

    Example:
        >>> from lorasync.spelling import nearest
    from lorasync.zero.keys import SECTIONS
        >>> print(*unknown_keys({"zero_optimisation": {}}, SECTIONS))
        zero_optimisation: got a key that DeepSpeed doesn't know (ignores it without a word). Did you mean zero_optimization?
    """
    return list(_unknown(config, (), known))


def _unknown(
    section: Mapping[str, Any], path: Path, known: Mapping[Path, frozenset[str]]
) -> Iterator[UnknownKey]:
    for key, value in section.items():
        below = (*path, key)
        if key not in known[path]:
            yield from _judged(key, path, known)
        elif isinstance(value, Mapping) and below in known and _is_looked_into(below, section):
            yield from _unknown(value, below, known)


def _judged(key: Any, path: Path, known: Mapping[Path, frozenset[str]]) -> Iterator[UnknownKey]:
    parameters = path[-1:] == ("params",)  # go to a constructor, which refuses what it doesn't know
    text, refused = str(key), path in VALIDATED or parameters
    if not refused and text.lower().startswith(_COMMENTS):
        return
    meant = _elsewhere(text, path, known)
    near = nearest(text, known[path]) if meant is None else None
    if near is not None and (refused or not _extends(text, near)):
        meant = ".".join((*path, near))
    if meant is not None or path[-1:] != (
        "params",
    ):  # of an optimizer's own parameters only Adam's are known
        yield UnknownKey(".".join((*path, text)), meant, refused)


def _elsewhere(key: str, path: Path, known: Mapping[Path, frozenset[str]]) -> str | None:
    """Return the full name of a key that stands at the top and belongs into ``zero_optimization``, or the other way."""
    if path == () and key in known[(ZERO,)]:
        return f"{ZERO}.{key}"
    return f"{key} at the top" if path == (ZERO,) and key in known[()] else None


def _extends(key: str, near: str) -> bool:
    """Whether a key is a known one with a word more: rather the key of a newer release than a slip."""
    return key.startswith(f"{near}_")


def _is_looked_into(path: Path, section: Mapping[str, Any]) -> bool:
    """Whether the parameters in a section are those that the table knows."""
    if path == ("optimizer", "params"):
        return str(section.get("type", "")).lower() in _ADAM
    return path != ("scheduler", "params") or str(section.get("type", "")).startswith("Warmup")
