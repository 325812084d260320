"""The public names and signatures; a change here is a change of the contract and needs a line in CHANGELOG.md."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

FROZEN = Path(__file__).with_name("public_api.txt")
MODULES = (
    "lorasync",
    "lorasync.load",
    "lorasync.push",
    "lorasync.verify",
    "lorasync.export",
    "lorasync.errors",
)


def surface() -> str:
    """One line a public name, methods below their class."""
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
    if not inspect.isclass(value):
        return [f"{path}{inspect.signature(value)}" if callable(value) else f"{path}: {type(value).__name__}"]
    bases = ", ".join(base.__name__ for base in value.__bases__)
    methods = [
        f"{path}.{name}{inspect.signature(method)}"
        for name, method in sorted(vars(value).items())
        if inspect.isfunction(method) and (name == "__init__" or not name.startswith("_"))
    ]
    return [f"{path}({bases})", *methods]


def test_public_names_and_signatures_are_as_frozen():
    assert surface() == FROZEN.read_text(), "regenerate with: python -m tests.test_public_api"


if __name__ == "__main__":
    FROZEN.write_text(surface())
