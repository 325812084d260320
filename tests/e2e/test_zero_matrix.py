"""A representative part of the compatibility matrix, run for real; the whole of it is `make matrix`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lorasync.zero import inspect_zero
from tests.e2e.ds_worker import plan
from tests.e2e.zero_cells import Cell, Outcome, all_cells, make_tiny_model, run_cells

WORKS = [
    Cell("none", 0, "fp32"),
    Cell("nf4", 0, "fp32"),
    Cell("int8", 0, "fp32"),
    Cell("none", 3, "bf16"),
    Cell("nf4", 2, "bf16"),
    Cell("nf4", 3, "bf16"),
    Cell("nf4", 3, "bf16", "bf16"),
    Cell("int8", 3, "bf16"),
]
FAILS = {
    Cell("nf4", 2, "bf16", "fp16"): "storage-cast",
    Cell("nf4", 2, "bf16", "fp32"): "storage-cast",
    Cell("nf4", 3, "bf16", "bf16", "fetch by all-reduce"): "all-reduce-fetch",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Outcome]:
    work = tmp_path_factory.mktemp("matrix")
    return run_cells([*WORKS, *FAILS], make_tiny_model(work / "tiny"), work / "runs")


@pytest.mark.parametrize("cell", WORKS, ids=lambda cell: cell.id)
def test_what_the_guard_lets_through_trains_on_the_right_weights(outcomes: dict[Cell, Outcome], cell: Cell):
    outcome = outcomes[cell]
    assert outcome.guard == "works"
    assert outcome.broken == []
    for rank in outcome.ranks:
        assert (rank["weights"], rank["seen_in_forward"], rank["changed"]) == (21, 21, [])
        assert rank["losses"][-1] < rank["losses"][0]


@pytest.mark.parametrize("cell", FAILS, ids=lambda cell: cell.id)
def test_what_the_guard_refuses_fails_or_trains_on_wrong_weights(outcomes: dict[Cell, Outcome], cell: Cell):
    outcome = outcomes[cell]
    assert outcome.codes == [FAILS[cell]]
    assert outcome.broken


def test_silent_corruption_raises_nothing_but_in_the_guard(outcomes: dict[Cell, Outcome]):
    silent = outcomes[Cell("nf4", 2, "bf16", "fp16")].ranks[0]
    assert "error" not in silent
    assert len(silent["changed"]) == 14


def test_the_page_is_what_the_result_files_say(request: pytest.FixtureRequest):
    script = load_script(request.config.rootpath / "benchmarks" / "zero_matrix.py")
    assert script.PAGE.read_text() == script.page()


def test_guard_and_run_agree_in_every_cell_of_the_results(request: pytest.FixtureRequest):
    rows: list[dict[str, Any]] = []
    for file in sorted((request.config.rootpath / "benchmarks" / "results").glob("zero_matrix_*.json")):
        rows += json.loads(file.read_text())["cells"]
    assert {cell.id for cell in all_cells() if not cell.needs_gpu} <= {row["id"] for row in rows}
    assert [row["id"] for row in rows if row["guard"] != row["run"]] == []


def test_the_rules_still_say_what_the_runs_showed(request: pytest.FixtureRequest, tmp_path: Path):
    """The guard of today, on plans: a rule that is changed has to be shown by a run again."""
    model = make_tiny_model(tmp_path / "tiny")
    runs = {}
    for file in (request.config.rootpath / "benchmarks" / "results").glob("zero_matrix_*.json"):
        runs |= {row["id"]: row["run"] for row in json.loads(file.read_text())["cells"]}
    live_only = ("no adapter", "re-entrant checkpointing, no input gradients")
    for cell in all_cells():
        if cell.id in runs and cell.option not in live_only:
            report = inspect_zero(plan(cell.job(model)), cell.config())
            assert ("works" if report.ok else "error") == runs[cell.id], cell.id


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("zero_matrix", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
