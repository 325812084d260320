"""Reads the tables that benchmarks/sync_gpu.py writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Way:
    """A row: one way to push."""

    name: str
    megabytes: float
    ms: float
    extra_mb: float
    note: str

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(("factors", "merged", "adapter"))


@dataclass(frozen=True)
class Report:
    title: str
    bandwidth: float
    floor: float
    ways: list[Way]


def read(path: Path) -> Report:
    """Bandwidth in bytes a second, floor in ms."""
    title, _, head, *_ = text = path.read_text().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text if line.startswith("| ")]
    ways = [Way(name, *map(float, (mb, ms, extra)), note) for name, mb, ms, _, extra, _, note in cells[2:]]
    return Report(
        title.removeprefix("# A whole sync, "),
        float(found(r"bandwidth ([\d.]+) TB/s", head)) * 1e12,
        float(found(r"floor ([\d.]+) ms", head)),
        ways,
    )


def found(pattern: str, text: str) -> str:
    (value,) = re.findall(pattern, text)
    return value
