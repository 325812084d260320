"""A whole sync for other shapes, ranks and trainers than the one that is tuned for, beside the cost model's prediction.

    python benchmarks/sweep_gpu.py --results benchmarks/results
    python benchmarks/sweep_gpu.py --results benchmarks/results --runs "--shape 32b --base nf4 --rank 8"

Each run is a process with benchmarks/sync_gpu.py, whose assertions on the weights hold here too; one that fails is a row
that says so, and the exit status. Runs that the GPU can't hold are rows as well.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT)]  # instead of this folder: its names shadow others
sys.path.append(str(ROOT / "benchmarks"))

import gpu_parts as parts
import sync_reports
from gpu_parts import say

from lorasync.planning.cost import CUDA_IPC, H100, Job, sync_seconds

ALL = "--ways factors,merged,adapter,merge_adapter,PEFT --drift --no-decode --repeats 10"
RUNS = (
    *(f"--shape {shape} --base {base}" for shape in ("0.5b", "1.5b", "14b") for base in ("bf16", "nf4")),
    "--shape 32b --base nf4",
    *(f"--shape 7b --rank {rank}" for rank in (8, 256)),
    "--shape 7b --factors fp32",
    "--shape 7b --base nf4 --factors fp32",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="a folder")
    parser.add_argument("--runs", nargs="+", default=RUNS, help="options of sync_gpu.py, a run each")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script")
    parser.add_argument("--name", default="sweep_qwen2", help="the results file's name begins with it")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that a run may take")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds after which no run is begun")
    options = parser.parse_args()
    until = time.monotonic() + options.budget
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for number, run in enumerate(options.runs):
            say(f"[{number + 1} of {len(options.runs)}] {run}")
            into = Path(folder, str(number))
            into.mkdir()
            in_time = time.monotonic() < until
            status, said = run_once(run, into, options.limit) if in_time else (0, "not begun")
            for path in into.glob("*.md"):
                rows += lines(run, sync_reports.read(path))
            if status or said:
                rows.append(f"| {run} | {said or f'exit status {status}'} | | | | | | | |")
            failed += status != 0 and not said
            parts.save_report(options, options.name, "\n".join([*head(options), *rows, ""]))
    say("\n".join(rows))
    sys.exit(failed > 0)


def run_once(run: str, into: Path, limit: float) -> tuple[int, str]:
    """The exit status, and what the script answered where the GPU can't hold it."""
    settings = [] if "--backend" in run else ALL.split()
    command = [sys.executable, str(ROOT / "benchmarks" / "sync_gpu.py"), *settings, *run.split()]
    log = into / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--results", str(into)], stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
    said = log.read_text().splitlines()
    say("\n".join(line for line in said if not line.startswith("|"))[-3000:])
    refused = next((line for line in said if "needs about" in line), "") if status else ""
    return status, refused.partition(": ")[2]


def head(options: argparse.Namespace) -> list[str]:
    return [
        "# Whole syncs of other shapes, ranks and trainers",
        "",
        (
            f"{parts.circumstances(options)} Each run: `python benchmarks/sync_gpu.py {ALL}` and what its rows say. "
            "bf16 trainer and factors, r=64 and one process unless it says otherwise; medians, each sync with a new "
            "adapter. Model: what `lorasync.planning.cost` predicts with the H100's constants and the copy bandwidth "
            "measured in the run. Drift: the largest difference of a weight from the base after 100 syncs and one of an "
            "adapter that is zero."
        ),
        "",
        "| run | way | MB a sync | floor, ms | ms | × floor | model, ms | extra MB | drift |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]


def lines(run: str, report: sync_reports.Report) -> list[str]:
    made = []
    for way in report.ways:
        model = f"{predicted(run, way.name, report.bandwidth):.1f}" if way.is_ours else ""
        drift = way.note.partition("100 syncs ")[2]
        figures = (
            f"{way.megabytes:.0f}",
            f"{report.floor:.2f}",
            f"{way.ms:.1f}",
            f"{way.ms / report.floor:.2f}",
        )
        made.append(
            f"| {run} | {way.name} | {' | '.join(figures)} | {model} | {way.extra_mb:.0f} | {drift} |"
        )
    return made


def predicted(run: str, way: str, bandwidth: float) -> float:
    """Milliseconds."""
    parser = argparse.ArgumentParser()
    parts.add_options(parser)
    parser.add_argument("--processes", type=int, default=1)
    given, _ = parser.parse_known_args(run.split())
    linear, rest = parts.parameters(given.shape)
    job = Job(
        linear,
        rest,
        parts.adapter_parameters(given.shape, given.rank),
        given.rank,
        base=given.base,
        factor_bytes=parts.FACTORS[given.factors].itemsize,
        modules=parts.QWEN2[given.shape][2] * len(parts.LINEAR),
    )
    device = replace(H100, bandwidth=bandwidth)
    link = CUDA_IPC if given.processes == 2 else None
    return sync_seconds(way.split()[0], job, trainer=device, worker=device, link=link).total * 1e3


if __name__ == "__main__":
    main()
