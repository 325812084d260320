"""Tile shapes: what to use for a kind of merge, and what was measured best on this GPU, kept on disk."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Config:
    """A tile of ``bm`` rows and ``bn`` columns by ``warps`` warps, ``rk`` ranks at a time.

    ``registers`` caps a thread's registers (0: no cap), so that more tiles fit on a multiprocessor. A program
    merges ``strip`` tiles side by side and loads ``stages`` - 1 of them ahead.
    """

    bm: int
    bn: int
    warps: int
    rk: int
    registers: int = 0
    strip: int = 8
    stages: int = 3


_SHAPES = ((64, 64, 4, 128, 14, 3), (64, 64, 4, 128, 8, 4), (64, 128, 4, 168, 8, 3), (128, 64, 8, 128, 14, 3))
_WIDE_SHAPES = ((128, 64, 8, 128, 14, 3), (64, 64, 4, 168, 14, 2), (128, 32, 4, 255, 28, 2))
_SPLIT_SHAPES = ((128, 64, 8, 128, 14, 2), (128, 64, 8, 128, 14, 3), (128, 64, 4, 255, 14, 2))
_IN_PARTS = Config(64, 64, 4, 64, 168, 8, 1)


def candidates(r_pad: int, *, split: bool, aligned: bool) -> tuple[Config, ...]:
    """List the tile shapes worth timing for a kind of merge and its padded rank, the shipped choice first.

    Factors of up to rank 256 (fp32: 64) are taken whole; longer ones in parts, and then nothing is loaded
    ahead, nor where elements are loaded one by one. A strip has at most 31 tiles: each has a bit of an int32.
    The last one needs little shared memory: it fits where others don't.
    """
    if not aligned:
        return (Config(64, 64, 4, min(r_pad, 64), 0, 8, 1),)
    if r_pad > (64 if split else 256):
        return (_IN_PARTS,)
    shapes = _SPLIT_SHAPES if split else _SHAPES if r_pad <= 128 else _WIDE_SHAPES
    whole = tuple(
        Config(bm, bn, warps, r_pad, regs, strip, stages) for bm, bn, warps, regs, strip, stages in shapes
    )
    return (*whole, _IN_PARTS) if r_pad >= _IN_PARTS.rk else whole


def cache_path() -> Path:
    """Say where measured choices are kept: ``LORASYNC_CACHE_DIR``, else ``lorasync`` in the user's cache."""
    own = os.environ.get("LORASYNC_CACHE_DIR")
    if own:
        return Path(own) / "kernels.json"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lorasync" / "kernels.json"


def known(key: str) -> Config | None:
    """Read the measured choice for this key, or None; an unreadable file counts as empty."""
    entry = _read().get(key)
    try:
        return None if entry is None else Config(**entry)
    except TypeError:
        return None


def remember(key: str, config: Config) -> None:
    """Write a measured choice; a directory that can't be written is no error, the choice is lost."""
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(_read() | {key: asdict(config)}, indent=1, sort_keys=True))
        new.replace(path)
    except OSError:
        return


def fastest(key: str, choices: tuple[Config, ...], time: Callable[[Config], float]) -> Config:
    """Time every choice, remember the fastest under ``key`` and return it."""
    best = min(choices, key=time)
    remember(key, best)
    return best


def _read() -> dict[str, dict[str, int]]:
    try:
        content = json.loads(cache_path().read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
