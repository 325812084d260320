"""Messages speak of what the reader has: no variable of the code and no unfilled placeholder is left in one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorasync

_ROOT = Path(lorasync.__file__).parent
_FILES = ("json", "safetensors", "bin", "py", "md")
_PLACEHOLDER = re.compile(r"\{[A-Za-z_][\w.]*(?:\([^{}]*\))?(?:![rsa])?\}")


def _strings(function: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the plain parts of strings, with their lines; docstrings and arguments of `format` left out."""
    skipped = {id(n.value) for n in ast.walk(function) if isinstance(n, ast.Expr)}
    skipped |= {id(n.func.value) for n in ast.walk(function) if _is_format(n)}
    for node in ast.walk(function):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def _is_format(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format"


def _left_over(source: str) -> Iterator[str]:
    """Yield each string in which a function names an attribute of its own arguments, or a placeholder."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        arguments = "|".join(a.arg for a in [*function.args.args, *function.args.kwonlyargs])
        attribute = re.compile(rf"(?<![\w.])(?:{arguments or '(?!)'})\.(?!(?:{'|'.join(_FILES)})\b)[a-z_]+")
        for line, text in _strings(function):
            if _PLACEHOLDER.search(text) or (attribute.search(text) and "(" not in text):
                yield f"{line}: {text}"


@pytest.mark.parametrize("path", sorted(_ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(_ROOT)))
def test_no_variable_is_left_in_a_message(path: Path):
    assert list(_left_over(path.read_text())) == []


def test_the_search_finds_what_it_is_for():
    wrong = 'def rule(case):\n    return "the whole quantized case.model.", "got {case.name}", f"{case.x} {{y}}"\n'
    assert len(list(_left_over(wrong))) == 3
    right = 'def rule(case):\n    """Look at case.model."""\n    return f"{case.model} in case.json", "a case. Mend it"\n'
    assert not list(_left_over(right))
