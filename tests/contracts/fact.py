"""One fact of vLLM that a file of lorasync relies on, and how it is looked up in a source tree."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.contracts.tree import Found, Function, Tree

Rule = Callable[[Tree, Found], str]
"""Says what is wrong with what was found; empty if nothing is."""

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fact:
    """One line of the list.

    Attributes:
        ours: The file of lorasync that needs it.
        of: ``package.module:Name.attribute``.
        rule: What else must hold of it.
        what: The rule in words.
        ways: What of lorasync needs it; empty where a fact is worth watching and nothing breaks without it.
        since: The first version that has it, as ``0.28``.
        until: The last one.
        instead: What lorasync does in versions outside of this range; empty if the ways don't work there.
        why: Why not, in words for a user.
    """

    ours: str
    of: str
    rule: Rule
    what: str
    ways: tuple[str, ...]
    since: str = ""
    until: str = ""
    instead: str = ""
    why: str = ""

    def problem(self, tree: Tree) -> str:
        """What a tree lacks of it; empty if it holds."""
        found = tree.find(self.of)
        return f"{self.of} is not there" if found is None else self.rule(tree, found)

    def expected(self, version: str) -> bool:
        """Whether the list says that this version has it."""
        here = number(version)
        return not (self.since and here < number(self.since)) and not (
            self.until and here > number(self.until)
        )

    @property
    def name(self) -> str:
        return self.of.rpartition(":")[2].rpartition(".")[2] or self.of.rpartition(".")[2]

    def __str__(self) -> str:
        return f"{self.ours}: {self.of}{self.what and ' ' + self.what}"


def number(version: str) -> tuple[int, int]:
    """Major and minor: the list tells no patches apart."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


# -------------------------------------------------------------------------------------------- rules


def is_there(tree: Tree, found: Found) -> str:
    return ""


def takes(positional: int, *names: str) -> Rule:
    """It can be called with so many arguments by place, and these by name."""

    def rule(tree: Tree, found: Found) -> str:
        places, keywords, required, free = signature(tree, found)
        problems = []
        if positional > len(places) and "*" not in free:
            problems.append(f"takes {len(places)} arguments by place, expected {positional}")
        unknown = [n for n in names if n not in keywords]
        if unknown and "**" not in free:
            problems.append(f"takes no {', '.join(unknown)}")
        missing = [n for n in required if n not in names and n not in places[:positional]]
        if missing:
            problems.append(f"needs {', '.join(missing)} too")
        return "; ".join(problems)

    return rule


def signature(tree: Tree, found: Found) -> tuple[list[str], set[str], list[str], set[str]]:
    """Names by place, names by keyword, those without default, and which of ``*`` and ``**`` it has."""
    if isinstance(found.node, ast.ClassDef):
        made = tree.member(found, "__init__")
        if made is None:
            fields = tree.fields(found)
            names = [name for name, _ in fields]
            return names, set(names), [name for name, default in fields if not default], set()
        found = made
    node = found.node
    assert isinstance(node, Function), ast.dump(node)[:80]
    a = node.args
    places = [p.arg for p in (*a.posonlyargs, *a.args)]
    required = places[: len(places) - len(a.defaults)]
    required += [k.arg for k, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d is None]
    bound = {"self", "cls"} & set(places[:1])
    by_place = [p for p in places if p not in bound]
    keywords = {p.arg for p in (*a.args, *a.kwonlyargs)} - bound
    free = ({"*"} if a.vararg else set()) | ({"**"} if a.kwarg else set())
    return by_place, keywords, [r for r in required if r not in bound], free


def starts_with(*names: str) -> Rule:
    """Its parameters, or fields, begin with these, in this order."""

    def rule(tree: Tree, found: Found) -> str:
        got = signature(tree, found)[0][: len(names)]
        return "" if got == list(names) else f"begins with {', '.join(got)}, expected {', '.join(names)}"

    return rule


def offers(*values: object) -> Rule:
    """A ``Literal`` with at least these values."""

    def rule(tree: Tree, found: Found) -> str:
        got = {n.value for n in ast.walk(found.node) if isinstance(n, ast.Constant)}
        return "" if set(values) <= got else f"lacks {sorted(set(values) - got, key=str)}"

    return rule


def offers_only(*values: object) -> Rule:
    """A ``Literal`` with exactly these values."""

    def rule(tree: Tree, found: Found) -> str:
        got = {n.value for n in ast.walk(found.node) if isinstance(n, ast.Constant)}
        return "" if set(values) == got else f"is {sorted(got, key=str)}, expected {sorted(values, key=str)}"

    return rule


def says(*texts: str) -> Rule:
    """Its code contains each of these."""

    def rule(tree: Tree, found: Found) -> str:
        missing = [t for t in texts if t not in found.text]
        return "" if not missing else f"no longer has {' and '.join(map(repr, missing))}"

    return rule


def can_be_made_by(ours: str, cls: str) -> Rule:
    """Our subclass defines every abstract method, each with the parameters that vLLM gives it."""

    def rule(tree: Tree, found: Found) -> str:
        mine = our_methods(ours, cls)
        wrong = []
        for name, theirs in tree.abstract(found).items():
            if name not in mine:
                wrong.append(f"{name} is abstract, and {cls} has none")
            elif len(mine[name].args.args) != len(theirs.args.args):
                wrong.append(f"{name} has other parameters than {cls}'s")
        return "; ".join(wrong)

    return rule


def our_methods(ours: str, cls: str) -> dict[str, Function]:
    """The methods of the first class of this name in a file of ours."""
    tree = ast.parse((REPOSITORY / ours).read_text(encoding="utf-8"))
    owner = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == cls)
    return {n.name: n for n in owner.body if isinstance(n, Function)}
