"""How the house is built, read from its source: imports form no circle, files and functions stay short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 60
LINES_WITHOUT_A_TEST = 60

# What is still being cut. A test fails when an entry is no longer needed, so that these lists only get shorter.
CIRCLES: set[frozenset[str]] = set()
LONG_FILES: set[str] = set()
# A Triton kernel is one function: what it calls is inlined by its compiler.
LONG_FUNCTIONS = {"lorasync.kernels.triton_merge.merge_tiles"}

# Modules whose tests have another name than theirs: the test file that covers each.
COVERED_BY = {
    "lorasync.model_size": "tests/load/test_load.py",
    "lorasync.push.arguments": "tests/push/test_sync.py",
    "lorasync.push.issued": "tests/push/test_requests.py",
    "lorasync.push.report": "tests/push/test_sync.py",
    "lorasync.push.strategies": "tests/push/test_sync.py",
    "lorasync.push.versions": "tests/push/test_requests.py",
    "lorasync.receive.adapter": "tests/e2e/test_push_adapter.py",
    "lorasync.receive.base_check": "tests/receive/test_merge_in_worker.py",
    "lorasync.receive.engine": "tests/push/test_session.py",
    "lorasync.receive.factors": "tests/receive/test_merge_in_worker.py",
    "lorasync.receive.load": "tests/receive/test_merge_in_worker.py",
    "lorasync.receive.planner": "tests/receive/test_load_plan.py",
    "lorasync.receive.recorder": "tests/receive/test_load_plan.py",
    "lorasync.receive.reload": "tests/receive/test_live.py",
    "lorasync.receive.remerge": "tests/receive/test_merge_in_worker.py",
    "lorasync.receive.restore": "tests/receive/test_merge_in_worker.py",
    "lorasync.receive.served": "tests/push/test_session.py",
    "lorasync.receive.trained_base": "tests/receive/test_merge_in_worker.py",
    "lorasync.receive.twin": "tests/receive/test_live.py",
    "lorasync.receive.windows": "tests/receive/test_load_plan.py",
    "lorasync.receive.writer": "tests/receive/test_live.py",
    "lorasync.vllm_seam.lora": "tests/e2e/test_push_adapter.py",
}


def sources() -> dict[str, Path]:
    """Return the file of every module, by the module's name."""
    found = {}
    for path in sorted((ROOT / "lorasync").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """Name the modules of ours that a file imports, wherever in it: in functions and under TYPE_CHECKING, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in modules or node.module in modules:
                    yield submodule if submodule in modules else str(node.module)


def import_graph() -> dict[str, set[str]]:
    files = sources()
    return {
        module: set(imports(ast.parse(path.read_text()), set(files))) - {module}
        for module, path in files.items()
    }


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Return the groups of modules each of which imports itself through the others."""
    reached = {module: _reachable(graph, module) for module in graph}
    return {
        frozenset({module, *(other for other in reached[module] if module in reached[other])})
        for module in graph
        if module in reached[module]
    }


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(graph[module])
    return seen


def functions(tree: ast.AST, path: str) -> Iterator[tuple[str, int]]:
    """Yield the dotted name and the lines of every function; its docstring and its signature's lines don't count."""
    for node in ast.iter_child_nodes(tree):
        name = f"{path}.{node.name}" if hasattr(node, "name") else path
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield name, (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
        yield from functions(node, name)


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == {frozenset({"b", "c"})}
    tree = ast.parse(
        "def f():\n    from lorasync import bnb\n    from lorasync.names import x\n    import torch"
    )
    assert set(imports(tree, {"lorasync", "lorasync.bnb", "lorasync.names"})) == {
        "lorasync.bnb",
        "lorasync.names",
    }


def test_no_module_imports_itself_through_others() -> None:
    found = circles(import_graph())
    assert [sorted(circle) for circle in found - CIRCLES] == []
    assert [sorted(circle) for circle in CIRCLES - found] == [], "cut: take it off the list"


def test_nothing_imports_from_the_face_of_the_package() -> None:
    assert [module for module, used in import_graph().items() if "lorasync" in used] == []


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT))
        for path in sources().values()
        if len(path.read_text().splitlines()) > LINES_OF_A_FILE
    }
    assert sorted(long - LONG_FILES) == []
    assert sorted(LONG_FILES - long) == [], "short now, or gone: take it off the list"


def test_functions_are_short() -> None:
    found = {
        name: lines
        for module, path in sources().items()
        for name, lines in functions(ast.parse(path.read_text()), module)
    }
    long = {name for name, lines in found.items() if lines > LINES_OF_A_FUNCTION}
    assert sorted(long - LONG_FUNCTIONS) == []
    assert sorted(LONG_FUNCTIONS - long) == [], "short now, or gone: take it off the list"


@pytest.mark.parametrize("library", ["bitsandbytes", "deepspeed"])
def test_a_library_is_imported_in_its_own_room_only(library: str) -> None:
    rooms = {"bitsandbytes": ("lorasync.bnb",), "deepspeed": ("lorasync.zero",)}[library]
    users = {
        module
        for module, path in sources().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and _imports(node, library)
    }
    assert [module for module in sorted(users) if not module.startswith(rooms)] == []


def _imports(node: ast.Import | ast.ImportFrom, library: str) -> bool:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return any(name.partition(".")[0] == library for name in names)


def code_lines(source: str) -> int:
    """Count the lines that are neither empty, nor a comment, nor a part of a docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(
        number not in docstrings and bool(line.strip()) and not line.strip().startswith("#")
        for number, line in lines
    )


def may_cover(module: str) -> list[str]:
    """Return where the tests of a module may be: in a file of its name, or of the name of a package that it is in."""
    _, *parts = module.split(".")
    found = []
    for depth in range(len(parts), 0, -1):
        *folders, name = parts[:depth]
        found.append("/".join(["tests", *folders, f"test_{name}.py"]))
        if depth < len(parts):  # a package: its tests may also be inside its folder
            found.append("/".join(["tests", *folders, name, f"test_{name}.py"]))
    return found


def without_tests(modules: dict[str, str], tests: set[str], covered_by: dict[str, str]) -> list[str]:
    """Return the modules, given with their sources, that no test file is said to cover."""
    return sorted(
        module
        for module, source in modules.items()
        if code_lines(source) > LINES_WITHOUT_A_TEST
        and not tests & {*may_cover(module), covered_by.get(module, "")}
    )


def _test_files() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}


def test_a_module_without_a_test_file_is_found() -> None:
    long = '"""What\nit is."""\n' + "# why\n\nx = 1\n" * 61
    assert code_lines(long) == 61
    own, package, inside = "tests/push/test_new.py", "tests/test_push.py", "tests/push/test_push.py"
    assert may_cover("lorasync.push.new") == [own, package, inside]
    assert may_cover("lorasync.names") == ["tests/test_names.py"]
    module = {"lorasync.push.new": long}
    assert without_tests(module, {"tests/test_new.py", "tests/push/test_old.py"}, {}) == ["lorasync.push.new"]
    for tests in (own, package, inside):
        assert without_tests(module, {tests}, {}) == []
    assert (
        without_tests(module, {"tests/e2e/test_it.py"}, {"lorasync.push.new": "tests/e2e/test_it.py"}) == []
    )
    assert without_tests(module, set(), {"lorasync.push.new": "tests/e2e/test_it.py"}) == [
        "lorasync.push.new"
    ]
    assert without_tests({"lorasync.push.new": "x = 1\n" * 60}, set(), {}) == []


def test_every_module_has_a_test_file() -> None:
    modules = {module: path.read_text() for module, path in sources().items() if path.stem != "__init__"}
    assert without_tests(modules, _test_files(), COVERED_BY) == [], "write tests/…/test_<its name>.py"


def test_the_list_of_covered_modules_names_what_is_there() -> None:
    modules = {module: path.read_text() for module, path in sources().items()}
    needed = without_tests(modules, _test_files(), {})
    assert sorted(COVERED_BY.keys() - set(needed)) == [], "it has a test file, or is short, or gone"
    assert sorted(set(COVERED_BY.values()) - _test_files()) == [], "no such test file"


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_file_that_a_map_of_the_house_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`((?:[\w.]+/)*[\w.]+(?:/|\.py|\.md))`", text))
    inside = {name for name in named if not (ROOT / name).exists()}
    gone = {
        name for name in inside if not any(ROOT.joinpath("lorasync").rglob(name.rstrip("/"))) and "/" in name
    }
    assert len(named) > 20
    assert sorted(gone) == []
