"""What lorasync's own files touch of vLLM, as far as their AST tells: imports, and attributes of vLLM's objects."""

from __future__ import annotations

import ast
import asyncio
from typing import TYPE_CHECKING

import torch

from tests.contracts.fact import REPOSITORY
from tests.contracts.tree import Function

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CARRIERS = frozenset(
    {
        "engine_core", "llm_engine", "lora_config", "lora_manager", "model_config", "output_processor", "parallel_config",
        "quant_config", "quant_method", "vllm_config", "weight_transfer_config",
    }
)  # fmt: skip
"""An attribute or parameter of one of these names is vLLM's, wherever it stands."""

ROOTS = {
    "lorasync/targets/llm.py": {"llm", "engine", "core", "executor", "self._llm"},
    "lorasync/targets/async_llm.py": {"engine", "core", "self._engine"},
    "lorasync/targets/front.py": {"engine", "state"},
    "lorasync/targets/patience.py": {"core"},
    "lorasync/push/adapter_request.py": {"request"},
    "lorasync/planning/plan.py": {"lora"},
    "lorasync/verify.py": {"llm", "o"},
    "lorasync/vllm_seam/layout.py": {"parallel"},
    "lorasync/vllm_seam/lora.py": {"self._manager", "cache", "helper", "mapper", "built"},
    "lorasync/vllm_seam/reload.py": {"method", "info", "layerwise", "meta", "sanitize", "kernel"},
    "lorasync/vllm_seam/build.py": {"config"},
    "lorasync/vllm_seam/config.py": {"config", "quantization"},
    "lorasync/vllm_seam/layers.py": {"method"},
    "lorasync/receive/served.py": {"self.config"},
}
"""Names that stand for vLLM's objects in one file."""

NOT_VLLMS = frozenset(
    name for cls in (torch.Tensor, torch.nn.Module, dict, list, set, str, asyncio.Task) for name in dir(cls)
) | {
    "_issued", "check", "pushed_by_lorasync", "ran_before", "served",  # ours, put there by us
    "value",  # of an enum
}  # fmt: skip


def files() -> Iterator[Path]:
    yield from sorted((REPOSITORY / "lorasync").rglob("*.py"))


def imports(tree: ast.AST) -> set[str]:
    """``module:Name`` of each import from vLLM; of a submodule its full name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            found |= {f"{node.module}:{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "vllm"}
    return found


def attributes(tree: ast.Module, roots: set[str]) -> dict[str, int]:
    """Attributes of vLLM's objects, each with the first line that touches it."""
    found: dict[str, int] = {}
    imported = {a.asname or a.name for n in ast.walk(tree) if _from_vllm(n) for a in n.names}  # type: ignore[attr-defined]
    for function in _outermost(tree):
        reader = _Reader(roots | imported)
        while reader.learns(function):
            pass
        for name, line in reader.touched(function):
            if name not in NOT_VLLMS:
                found.setdefault(name, line)
    return found


def _from_vllm(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"


def _outermost(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node
        else:
            yield from _outermost(node)


class _Reader:
    """Follows vLLM's objects through the assignments and loops of one function."""

    def __init__(self, roots: set[str]) -> None:
        self._known = set(roots)

    def learns(self, function: ast.AST) -> bool:
        before = len(self._known)
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self._learn(targets, node.value)
            elif isinstance(node, ast.For | ast.comprehension):
                self._learn([node.target], node.iter)
        return len(self._known) > before

    def _learn(self, targets: list[ast.expr], value: ast.expr) -> None:
        if self.is_vllms(value):
            self._known |= {t.id for t in targets if isinstance(t, ast.Name)}

    def touched(self, function: ast.AST) -> Iterator[tuple[str, int]]:
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and self.is_vllms(node.value):
                yield node.attr, node.lineno
            elif isinstance(node, ast.Call) and (name := _asked_for(node)) and self.is_vllms(node.args[0]):
                yield name, node.lineno

    def is_vllms(self, node: ast.expr) -> bool:
        if ast.unparse(node) in self._known:
            return True
        if isinstance(node, ast.Name):
            return node.id in CARRIERS
        if isinstance(node, ast.Attribute):
            return node.attr in CARRIERS or self.is_vllms(node.value)
        if isinstance(node, ast.Call):
            name = _asked_for(node)
            return self.is_vllms(node.args[0]) if name else self.is_vllms(node.func)
        if isinstance(node, ast.Subscript):
            return self.is_vllms(node.value)
        if isinstance(node, ast.IfExp):
            return self.is_vllms(node.body) or self.is_vllms(node.orelse)
        return isinstance(node, ast.BoolOp) and any(map(self.is_vllms, node.values))


def _asked_for(node: ast.Call) -> str:
    """The name in ``getattr(x, "name")`` and ``hasattr(x, "name")``; empty for other calls."""
    asks = isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr")
    if asks and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
        return str(node.args[1].value)
    return ""
