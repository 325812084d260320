"""What processes hold, and whether it grows with the number of pushes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from statistics import median

from lorasync.transport.folder import shared_memory_root

Held = Mapping[str, float]
ALLOCATED = ("live heap in KB", "small Python objects")
"""What allocators have given out: see `heap`."""


@dataclass(frozen=True)
class Sample:
    """What was held after so many pushes."""

    pushes: int
    held: Held


def held_by(processes: Mapping[str, int]) -> dict[str, float]:
    """Memory, file handles, threads and mapped payloads of each process, and our files in shared memory."""
    found: dict[str, float] = {}
    for name, pid in processes.items():
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        found |= {
            f"{name}: RSS in KB": _rss_in_kb(pid),
            f"{name}: file handles": _entries(f"/proc/{pid}/fd"),
            f"{name}: threads": _entries(f"/proc/{pid}/task"),
            f"{name}: mapped payloads": sum(f"{shared_memory_root()}/lorasync-" in line for line in maps),
        }
    files = _files_in_shared_memory()
    found["shared memory: files"] = len(files)
    found["shared memory: bytes"] = sum(path.stat().st_size for path in files)
    return found


def _files_in_shared_memory() -> list[Path]:
    """Those in this process's folders."""
    owners = shared_memory_root().glob("lorasync-*/owner")
    mine = [owner.parent for owner in owners if _text(owner) == str(os.getpid())]
    return [path for folder in mine for path in folder.iterdir() if path.is_file()]


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # another process's, gone meanwhile
        return ""


def per_push(samples: Sequence[Sample]) -> dict[str, float]:
    """By how much each number grows with a push: the median slope over all pairs of samples (Theil and Sen).

    For what allocators have given out over neighbours: a large dict that is resized once is no growth.
    """
    pairs, neighbours = list(combinations(samples, 2)), list(pairwise(samples))
    return {
        name: _median_slope(name, neighbours if name.endswith(ALLOCATED) else pairs)
        for name in samples[0].held
    }


def _median_slope(name: str, pairs: Sequence[tuple[Sample, Sample]]) -> float:
    return median((b.held[name] - a.held[name]) / (b.pushes - a.pushes) for a, b in pairs)


def growing(samples: Sequence[Sample], limits: Mapping[str, float]) -> dict[str, float]:
    """What grows, and by how much a push; only what has a limit may, by that much."""
    return {
        name: slope
        for name, slope in per_push(samples).items()
        if slope > limits.get(name.rpartition(": ")[2], 0.0)
    }


def _entries(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


def _rss_in_kb(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
