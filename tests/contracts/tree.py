"""A vLLM source tree, read by AST alone: nothing of it is imported, so any version can be read on any machine."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
_DEPTH = 12  # of re-exports; more than vLLM has


@dataclass(frozen=True)
class Found:
    """A definition, and the module that it stands in. A module stands for itself."""

    module: str
    node: ast.AST

    @property
    def text(self) -> str:
        return ast.unparse(self.node)


class Tree:
    """The folder that holds the package ``vllm``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._modules: dict[str, ast.Module | None] = {}

    def module(self, name: str) -> ast.Module | None:
        if name not in self._modules:
            path = self._path(name)
            self._modules[name] = None if path is None else ast.parse(path.read_text(encoding="utf-8"))
        return self._modules[name]

    def find(self, target: str) -> Found | None:
        """What ``package.module:Name.attribute`` names; re-exports and base classes are followed."""
        module, _, path = target.partition(":")
        found = self._name(module, path.split(".")[0]) if path else self._whole(module)
        for attribute in path.split(".")[1:]:
            found = self.member(found, attribute) if found is not None else None
        return found

    def member(self, owner: Found, name: str) -> Found | None:
        """An attribute of a class: in its body, set on ``self`` in a method, or inherited."""
        for cls in self.lineage(owner):
            assert isinstance(cls.node, ast.ClassDef)
            for found, node in _members(cls.node):
                if found == name:
                    return Found(cls.module, node)
        return None

    def lineage(self, owner: Found) -> Iterator[Found]:
        """A class and those of its bases that are vLLM's, nearest first."""
        if not isinstance(owner.node, ast.ClassDef):
            return
        yield owner
        for base in owner.node.bases:
            named = base.value if isinstance(base, ast.Subscript) else base  # Base[T]
            found = self._name(owner.module, named.id) if isinstance(named, ast.Name) else None
            if found is not None:
                yield from self.lineage(found)

    def abstract(self, owner: Found) -> dict[str, Function]:
        """The methods that a subclass has to define."""
        wanted: dict[str, Function] = {}
        for cls in reversed(list(self.lineage(owner))):
            for name, node in _members(cls.node):  # type: ignore[arg-type]
                if isinstance(node, Function):
                    wanted.pop(name, None)
                    if "abstractmethod" in _decorators(node):
                        wanted[name] = node
        return wanted

    def fields(self, owner: Found) -> list[tuple[str, bool]]:
        """The fields of a dataclass or struct, those of its bases first, and whether each has a default."""
        found: dict[str, bool] = {}
        for cls in reversed(list(self.lineage(owner))):
            for node in cls.node.body:  # type: ignore[attr-defined]
                named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
                if named and "ClassVar" not in ast.unparse(node.annotation):
                    found[node.target.id] = node.value is not None
        return list(found.items())

    def _path(self, name: str) -> Path | None:
        base = self._root.joinpath(*name.split("."))
        return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)

    def _whole(self, module: str) -> Found | None:
        node = self.module(module)
        return None if node is None else Found(module, node)

    def _name(self, module: str, name: str, depth: int = _DEPTH) -> Found | None:
        tree = self.module(module)
        if tree is None or not depth:
            return None
        for node in _statements(tree.body):
            if isinstance(node, ast.ClassDef | Function) and node.name == name:
                return Found(module, node)
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _assigned(node):
                return Found(module, node)
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        origin = self._origin(module, node)
                        return self._name(origin, alias.name, depth - 1) or self._whole(
                            f"{origin}.{alias.name}"
                        )
        return self._lazy(module, tree, name, depth) or self._whole(f"{module}.{name}")

    def _lazy(self, module: str, tree: ast.Module, name: str, depth: int) -> Found | None:
        """Names that `vllm/__init__.py` imports when asked for: ``MODULE_ATTRS = {"LLM": ".entrypoints.llm:LLM"}``."""
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and "MODULE_ATTRS" in _assigned(node):
                places: dict[str, str] = ast.literal_eval(node.value) if node.value else {}
                if name in places:
                    origin, _, attribute = places[name].partition(":")
                    return self._name(module + origin, attribute, depth - 1)
        return None

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self._path(module)
        parts = module.split(".")
        up = node.level - (path is not None and path.name == "__init__.py")
        return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at the top of a module, also within its ``if`` and ``try``."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from _statements(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            handled = [s for handler in node.handlers for s in handler.body]
            yield from _statements(node.body + handled + node.orelse)


def _members(cls: ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    for node in cls.body:
        if isinstance(node, Function | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield from ((name, node) for name in _assigned(node))
    for method in cls.body:
        if isinstance(method, Function):
            for node in ast.walk(method):
                if isinstance(node, ast.Assign | ast.AnnAssign):
                    yield from ((name, node) for name in _set_on_self(node))


def _assigned(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {t.id for t in targets if isinstance(t, ast.Name)}


def _set_on_self(node: ast.Assign | ast.AnnAssign) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    for target in targets:
        for one in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id == "self":
                yield one.attr


def _decorators(node: Function) -> set[str]:
    return {ast.unparse(d).split("(")[0].rpartition(".")[2] for d in node.decorator_list}
