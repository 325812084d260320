"""The reader of source trees, on a tree that is broken in every way that matters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts import usage
from tests.contracts.fact import Fact, can_be_made_by, is_there, offers, offers_only, says, starts_with, takes
from tests.contracts.facts import FACTS, Outcome, outcomes
from tests.contracts.support import broken, page
from tests.contracts.tree import Tree
from tests.contracts.wheels import newest

_BASE = """
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

Mode = Literal["a", "b"]

class Root(ABC):
    limit: int = 3
    def __init__(self, config, *, loud=False):
        self.config, self.other = config, 1
    @abstractmethod
    def run(self, info): ...
    @abstractmethod
    def stop(self): ...

class Middle(Root):
    def stop(self): ...

@dataclass
class Meta:
    name: str
    shape: tuple
    extra: int = 0

def call(a, b, c=1, *, d, e=2): ...
def free(*args, **kwargs): ...
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    package = tmp_path / "vllm"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text('MODULE_ATTRS = {"Lazy": ".base:Middle"}\n')
    (package / "base.py").write_text(_BASE)
    (package / "deep" / "__init__.py").write_text(
        "from ..base import Root as Renamed\nif True:\n    from . import leaf\n"
    )
    (package / "deep" / "leaf.py").write_text("from vllm.base import call\nCONSTANT: int = 4\n")
    return Tree(tmp_path)


@pytest.mark.parametrize(
    "target",
    [
        "vllm.base",
        "vllm.base:call",
        "vllm.base:Root.limit",
        "vllm.base:Middle.config",
        "vllm.base:Middle.other",
        "vllm.base:Middle.run",
        "vllm:Lazy.stop",
        "vllm.deep:Renamed.run",
        "vllm.deep:leaf",
        "vllm.deep.leaf:call",
        "vllm.deep.leaf:CONSTANT",
    ],
)
def test_found(tree: Tree, target: str) -> None:
    assert tree.find(target) is not None


@pytest.mark.parametrize(
    "target",
    ["vllm.gone", "vllm.base:gone", "vllm.base:Root.gone", "vllm:Gone", "vllm.deep:gone", "vllm.base:call.x"],
)
def test_not_found(tree: Tree, target: str) -> None:
    assert tree.find(target) is None


def _problem(tree: Tree, target: str, rule: object) -> str:
    found = tree.find(target)
    assert found is not None
    return rule(tree, found)  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(
    ("target", "rule"),
    [
        ("vllm.base:call", takes(2, "d")),
        ("vllm.base:call", takes(3, "d", "e")),
        ("vllm.base:call", takes(0, "a", "b", "d")),
        ("vllm.base:free", takes(7, "anything")),
        ("vllm.base:Middle", takes(1, "loud")),
        ("vllm.base:Meta", takes(2)),
        ("vllm.base:Meta", starts_with("name", "shape")),
        ("vllm.base:Mode", offers("a")),
        ("vllm.base:Mode", offers_only("a", "b")),
        ("vllm.base:Root.__init__", says("self.config")),
    ],
)
def test_rule_holds(tree: Tree, target: str, rule: object) -> None:
    assert _problem(tree, target, rule) == ""


@pytest.mark.parametrize(
    ("target", "rule", "words"),
    [
        ("vllm.base:call", takes(2), "needs d too"),
        ("vllm.base:call", takes(1, "d"), "needs b too"),
        ("vllm.base:call", takes(4, "d"), "takes 3 arguments by place, expected 4"),
        ("vllm.base:call", takes(2, "d", "x"), "takes no x"),
        ("vllm.base:Meta", takes(1), "needs shape too"),
        ("vllm.base:Meta", starts_with("shape"), "begins with name, expected shape"),
        ("vllm.base:Mode", offers("c"), "lacks ['c']"),
        ("vllm.base:Mode", offers_only("a"), "expected ['a']"),
        ("vllm.base:Root.__init__", says("self.gone"), "no longer has 'self.gone'"),
        ("vllm.base:Root", can_be_made_by("lorasync/receive/engine.py", "WorkerEngine"), "run is abstract"),
    ],
)
def test_rule_is_broken(tree: Tree, target: str, rule: object, words: str) -> None:
    assert words in _problem(tree, target, rule)


def test_an_empty_tree_breaks_every_fact_and_every_column(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    found = outcomes(Tree(tmp_path), "0.30.0")
    assert len(found) == len(FACTS)
    assert all(o.problem for o in found)
    text = page({"0.30.0": found}, date="2026-01-01", installed="0")
    assert "| yes |" not in text.partition("## What differs")[0]


def _outcome(problem: str, *, since: str = "", instead: str = "", version: str = "0.26.0") -> Outcome:
    fact = Fact("ours.py", "vllm.a:b", is_there, "", ("way",), since=since, instead=instead)
    return Outcome(fact, problem, fact.expected(version))


def test_a_range_says_what_is_surprising_and_what_breaks() -> None:
    assert _outcome("gone").surprising
    assert _outcome("gone").breaks
    assert not _outcome("gone", since="0.28").surprising
    assert _outcome("gone", since="0.28").breaks
    assert not _outcome("gone", since="0.28", instead="another").breaks
    assert _outcome("", since="0.28").surprising
    assert _outcome("gone", since="0.28", instead="another", version="0.30.1").breaks
    assert broken([_outcome("gone")], "way") == ["gone"]


def test_usage_follows_objects_through_a_function() -> None:
    import ast

    code = """
from vllm.x import Thing
from vllm import y
def f(llm, other):
    core = llm.engine_core
    part = core if core is not None else None
    for state in part.states:
        state.lora
    getattr(part, "maybe", None)
    other.ours
    Thing.made()
    [r.nearer for r in core.farther]
"""
    module = ast.parse(code)
    assert usage.imports(module) == {"vllm.x:Thing", "vllm:y"}
    found = usage.attributes(module, {"llm"})
    assert found.keys() == {"engine_core", "states", "lora", "maybe", "made", "nearer", "farther"}


def test_newest_patch_is_the_one_that_counts() -> None:
    versions = ("0.3.9", "0.30.2", "0.30.10", "0.31.0")
    assert newest("0.30", versions) == "0.30.10"
    with pytest.raises(LookupError, match=r"0\.29: not among the 4"):
        newest("0.29", versions)
