"""The public names, and all that a caller sees of them: a change here needs a line in CHANGELOG.md."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest

FROZEN = Path(__file__).with_name("public_api.txt")
MODULES = (
    "lorasync",
    "lorasync.load",
    "lorasync.push",
    "lorasync.planning.plan",
    "lorasync.verify",
    "lorasync.export",
    "lorasync.errors",
    "lorasync.merge",
    "lorasync.presets",
    "lorasync.source",
    "lorasync.zero",
)
# What Python calls by itself, where a user writes `for`, `with`, `str(…)` or `f(…)`.
_CALLED = {
    "__init__",
    "__call__",
    "__iter__",
    "__len__",
    "__str__",
    "__enter__",
    "__exit__",
    "__aenter__",
    "__aexit__",
}


def surface() -> str:
    """One line a public name, what a class offers below it."""
    lines = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        names = getattr(module, "__all__", None) or [
            n
            for n, v in vars(module).items()
            if not n.startswith("_") and getattr(v, "__module__", "") == module_name
        ]
        for name in sorted(names):
            lines += _lines(f"{module_name}.{name}", getattr(module, name))
    return "\n".join(lines) + "\n"


def _lines(path: str, value: object) -> list[str]:
    if inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__)
        return [f"{path}({bases})", *_members(path, value)]
    if callable(value):
        return [f"{path}{inspect.signature(value)}"]
    # A preset is its values; of other objects only the kind is promised.
    shown = repr(value) if dataclasses.is_dataclass(value) else f": {type(value).__name__}"
    return [f"{path} = {shown}" if dataclasses.is_dataclass(value) else f"{path}{shown}"]


def _members(path: str, kind: type) -> list[str]:
    """Fields, then methods and properties, also those that come from a base of lorasync's that isn't public itself."""
    fields = _fields(path, kind)
    found = {name: member for base in reversed(_own(kind)) for name, member in vars(base).items()}
    known = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    members = [
        line
        for name, member in sorted(found.items())
        if name not in known and (name in _CALLED or not name.startswith("_"))
        for line in _member(f"{path}.{name}", member)
    ]
    return fields + _attributes(path, kind, known | found.keys()) + members


def _own(kind: type) -> list[type]:
    """The class, and what it inherits from private classes of lorasync: public ones have lines of their own."""
    private = [
        base
        for base in kind.__mro__[1:]
        if base.__module__.startswith("lorasync") and base.__name__.startswith("_")
    ]
    return [kind, *private]


def _fields(path: str, kind: type) -> list[str]:
    if not dataclasses.is_dataclass(kind):
        return []
    frozen = "frozen" if kind.__dataclass_params__.frozen else "mutable"  # type: ignore[attr-defined]
    lines = [f"{path}: {frozen} dataclass"]
    for field in dataclasses.fields(kind):
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        if field.default_factory is not dataclasses.MISSING:
            default = f" = {getattr(field.default_factory, '__qualname__', field.default_factory)}()"
        lines.append(f"{path}.{field.name}: {field.type}{default}")
    return lines


def _attributes(path: str, kind: type, known: set[str]) -> list[str]:
    """The public attributes that `__init__` sets: as much a promise as a property."""
    if "__init__" not in vars(kind) or dataclasses.is_dataclass(kind):
        return []
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(vars(kind)["__init__"]))).body
    stored = {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return [f"{path}.{name}: attribute" for name in sorted(stored - known) if not name.startswith("_")]


def _member(path: str, member: Any) -> list[str]:
    if isinstance(member, property):
        returned = inspect.signature(member.fget).return_annotation if member.fget else "?"
        settable = ", settable" if member.fset else ""
        return [f"{path}: property -> {returned}{settable}"]
    if isinstance(member, classmethod | staticmethod):
        return [f"{path}{inspect.signature(member.__func__)} [{type(member).__name__}]"]
    if inspect.isfunction(member):
        if member.__qualname__.endswith("__str__") and not member.__module__.startswith("lorasync"):
            return []
        kind = "async " if inspect.iscoroutinefunction(member) else ""
        return [f"{path}{inspect.signature(member)}" + (f" [{kind.strip()}]" if kind else "")]
    if callable(member) or inspect.isdatadescriptor(member):
        return [f"{path}: {type(member).__name__}"]
    return [f"{path} = {member!r}"]


def test_public_names_and_signatures_are_as_frozen():
    assert surface() == FROZEN.read_text(), "regenerate with: python -m tests.test_public_api"


def _example(**changes: Any) -> type:
    """A class of which one thing is changed."""

    def method(self, a: int, *, b: str = "x") -> None: ...
    def other_default(self, a: int, *, b: str = "y") -> None: ...
    def other_name(self, c: int, *, b: str = "x") -> None: ...
    def to_text(self) -> str: ...
    def to_number(self) -> int: ...
    async def later(self, a: int, *, b: str = "x") -> None: ...

    members: dict[str, Any] = {
        "__annotations__": {"field": "int", "made": "list[int]"},
        "field": 1,
        "made": dataclasses.field(default_factory=list),
        "method": method,
        "prop": property(to_text),
        "make": classmethod(method),
        "LIMIT": 3,
    }
    known = {
        "other default": {"method": other_default},
        "other argument": {"method": other_name},
        "no method": {"method": None},
        "a method that is a coroutine": {"method": later},
        "no property": {"prop": None},
        "a property of another type": {"prop": property(to_number)},
        "a property that can be set": {"prop": property(to_text, lambda self, value: None)},
        "a field's default": {"field": 2},
        "a field's type": {"__annotations__": {"field": "str", "made": "list[int]"}},
        "a new field": {"__annotations__": {"field": "int", "made": "list[int]", "new": "int"}, "new": 3},
        "another factory": {"made": dataclasses.field(default_factory=dict)},
        "a class method that is a method": {"make": method},
        "a constant": {"LIMIT": 4},
        "a call": {"__call__": method},
    }
    members |= known[changes["change"]] if changes.get("change") else {}
    kept = {name: member for name, member in members.items() if member is not None}
    return dataclasses.dataclass(frozen=changes.get("frozen", True))(type("Example", (), kept))


CHANGES = [
    "other default", "other argument", "no method", "a method that is a coroutine", "no property",
    "a property of another type", "a property that can be set", "a field's default", "a field's type",
    "a new field", "another factory", "a class method that is a method", "a constant", "a call",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_every_kind_of_change_is_seen(change):
    assert _lines("Example", _example()) == _lines("Example", _example())
    assert _lines("Example", _example(change=change)) != _lines("Example", _example())


def test_a_dataclass_that_thaws_and_a_preset_that_changes_are_seen():
    assert _lines("Example", _example(frozen=False)) != _lines("Example", _example())
    assert _lines("preset", _example()(field=2)) != _lines("preset", _example()())


class _Attributes:
    def __init__(self) -> None:
        self.seen, self._hidden = 1, 2
        self.typed: int = 3


def test_attributes_are_seen():
    lines = [line for line in _lines("Example", _Attributes) if "attribute" in line]
    assert lines == ["Example.seen: attribute", "Example.typed: attribute"]


def test_what_a_private_base_gives_is_listed():
    class _Base:
        @property
        def shared(self) -> int: ...

    _Base.__module__ = "lorasync.somewhere"
    kind = type("Public", (_Base,), {})
    assert any("shared: property" in line for line in _lines("Public", kind))


if __name__ == "__main__":
    FROZEN.write_text(surface())
