"""Every fact of vLLM that lorasync relies on, and which of them hold in a source tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.contracts.facts_push import PUSH
from tests.contracts.facts_receive import RECEIVE

if TYPE_CHECKING:
    from tests.contracts.fact import Fact
    from tests.contracts.tree import Tree

FACTS: tuple[Fact, ...] = (*PUSH, *RECEIVE)


@dataclass(frozen=True)
class Outcome:
    """One fact in one version: ``problem`` is empty if it holds."""

    fact: Fact
    problem: str
    expected: bool

    @property
    def surprising(self) -> bool:
        """Whether the list says something else of this version."""
        return bool(self.problem) == self.expected

    @property
    def breaks(self) -> bool:
        """Whether what needs it does not work."""
        return bool(self.problem) and not (self.fact.instead and not self.expected)

    def __str__(self) -> str:
        return f"{self.fact}: {self.problem or 'holds, and the list says that it does not'}"


def outcomes(tree: Tree, version: str) -> list[Outcome]:
    """All facts in a tree of this version."""
    return [Outcome(fact, fact.problem(tree), fact.expected(version)) for fact in FACTS]
