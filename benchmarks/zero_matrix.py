"""Do model formats, ZeRO stages, dtypes and offload work together, and does the guard say so? (`make matrix`)

Every cell is a real DeepSpeed run on two ranks: it counts as working if it raises nothing, if after ten
steps the dequantized base is bit-identical at rest and in the forward pass, and if its losses are ZeRO-0's.
The guard's verdict, given before the run, must be the same. Results go to benchmarks/results/, and
docs/compatibility.md is generated from what lies there.

    python benchmarks/zero_matrix.py            # the cells that a CPU can show
    python benchmarks/zero_matrix.py --gpu      # on a machine with two GPUs: the others
    python benchmarks/zero_matrix.py --docs     # only rewrite the page
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [
    str(ROOT),
    str(ROOT / "tests" / "e2e"),
]  # in place of this folder, whose names could shadow others

from zero_cells import TOLERANCE, Cell, Outcome, all_cells, make_tiny_model, run_cells

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "compatibility.md"
LIBRARIES = ("torch", "deepspeed", "transformers", "bitsandbytes", "peft", "accelerate")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="run the cells that need GPUs")
    parser.add_argument("--docs", action="store_true", help="only rewrite docs/compatibility.md")
    parser.add_argument("--only", default="", help="run the cells whose id contains this; write nothing")
    arguments = parser.parse_args()
    if arguments.docs:
        PAGE.write_text(page())
        return 0
    os.environ["DS_ACCELERATOR"] = "cuda" if arguments.gpu else "cpu"
    cells = wanted(arguments.gpu, arguments.only)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_cells(
            cells, make_tiny_model(Path(folder, "tiny")), Path(folder, "work"), cell_timeout=240
        )
    for outcome in outcomes.values():
        why = "; ".join(outcome.broken)[:150]
        print(f"{outcome.cell.id:60} guard {outcome.guard:5} run {outcome.run:5} {why}")
    disagreeing = [o.cell.id for o in outcomes.values() if not o.agrees]
    if not arguments.only:
        save(outcomes, arguments.gpu, time.perf_counter() - started)
        PAGE.write_text(page())
    print(f"{len(outcomes)} cells, {len(disagreeing)} where guard and run disagree: {disagreeing}")
    return 1 if disagreeing else 0


def wanted(gpu: bool, only: str) -> list[Cell]:
    cells = [cell for cell in all_cells() if cell.needs_gpu == gpu and only in cell.id]
    if gpu and not has_async_io():  # every run with NVMe would fail for that reason alone, and prove nothing
        cells = [cell for cell in cells if not cell.option.startswith("NVMe")]
    return list(dict.fromkeys([cell.reference for cell in cells] + cells))


def has_async_io() -> bool:
    import deepspeed

    return bool(deepspeed.ops.__compatible_ops__.get("async_io", False))


def save(outcomes: dict[Cell, Outcome], gpu: bool, seconds: float) -> None:
    rows = [
        {
            "id": o.cell.id,
            "guard": o.guard,
            "codes": o.codes,
            "run": o.run,
            "broken": o.broken,
            "weights": o.ranks[0].get("weights"),
            "seen_in_forward": o.ranks[0].get("seen_in_forward"),
            "loss_gap": o.loss_gap,
            "losses": o.ranks[0].get("losses"),
        }
        for o in outcomes.values()
    ]
    found = {
        "command": "python benchmarks/zero_matrix.py" + (" --gpu" if gpu else ""),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(gpu),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "seconds": round(seconds),
        "cells": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"zero_matrix_{'gpu' if gpu else 'cpu'}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


def hardware(gpu: bool) -> str:
    if gpu:
        import torch

        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{len(names)} cores of {names[0]}, two ranks over gloo"


def page() -> str:
    """Write docs/compatibility.md from the result files; cells that no file has are unproven."""
    files = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("zero_matrix_*.json"))]
    rows = {row["id"]: row for found in files for row in found["cells"]}
    cells = list(dict.fromkeys(all_cells()))
    counts = Counter("unproven" if c.id not in rows else rows[c.id]["run"] for c in cells)
    agree = sum(rows[c.id]["run"] == rows[c.id]["guard"] for c in cells if c.id in rows)
    proven = len(cells) - counts["unproven"]
    lines = [
        "# Compatibility: what works under ZeRO, shown by runs",
        "",
        (
            "This page is generated by `make matrix`; nothing on it is written by hand. Each row is a "
            "DeepSpeed run of ten"
        ),
        (
            "steps on two ranks with a tiny Llama. **works**: no error, every dequantized base weight "
            "bit-identical after"
        ),
        "training, at rest and as the last forward pass saw it, and no loss further than",
        (
            f"{TOLERANCE} from ZeRO-0's. **error**: the run fails, or its weights or losses are shown to be "
            "wrong. *Guard* is"
        ),
        "what `check_zero` had said, of the plan and of the live model, before the run.",
        "",
        (
            f"{len(cells)} cells: {counts['works']} work, {counts['error']} don't, {counts['unproven']} are "
            "unproven. "
            f"Guard and run agree in {agree} of {proven}."
        ),
        "",
    ]
    for found in files:
        versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        run = f"`{found['command']}`, {found['date']}, {found['hardware']}, {found['seconds']} s"
        lines.append(f"- {run}: {versions}. {found.get('note', '')}".rstrip())
    for quant, title in TITLES.items():
        lines += ["", f"## {title}", "", HEADER, SEPARATOR]
        lines += [line(c, rows.get(c.id)) for c in cells if c.quant == quant]
    return "\n".join(lines) + "\n"


TITLES = {"none": "Not quantized (bf16 or fp32 LoRA)", "nf4": "NF4", "fp4": "FP4", "int8": "INT8"}
HEADER = "| stage | engine | storage | option | guard | run | loss gap | what happens |"
SEPARATOR = "| --- | --- | --- | --- | --- | --- | --- | --- |"


def line(cell: Cell, row: dict[str, Any] | None) -> str:
    storage = cell.storage if cell.quant in ("nf4", "fp4") else ""
    head = [str(cell.stage), cell.engine, storage, cell.option]
    if row is None:
        return "| " + " | ".join([*head, "", "unproven", "", ""]) + " |"
    guard = row["guard"] + (f" ({', '.join(row['codes'])})" if row["codes"] else "")
    gap = "" if row["loss_gap"] is None else f"{row['loss_gap']:.4f}"
    what = "; ".join(row["broken"]).replace("\n", " ").replace("|", "\\|")[:180]
    return "| " + " | ".join([*head, guard, row["run"], gap, what]) + " |"


if __name__ == "__main__":
    sys.exit(main())
