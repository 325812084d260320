"""estimate_memory() against what a real DeepSpeed run keeps alive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lorasync.planning.memory import estimate_memory
from lorasync.presets import QLORA_ZERO2

WORKER = Path(__file__).with_name("memory_worker.py")
LEVERS = {
    "the backward pass is the peak": ({"micro_batch": 2}, 128),
    "Adam's step is the peak": ({"r": 192}, 16),
    "activations are the peak": ({"micro_batch": 2, "gradient_checkpointing": False}, 128),
}


@pytest.mark.parametrize("case", [*list(LEVERS)[:2], pytest.param(list(LEVERS)[2], marks=pytest.mark.slow)])
def test_the_estimate_is_within_15_percent_of_a_real_run(smollm2: str, tmp_path: Path, case: str):
    changes, length = LEVERS[case]
    changes = {"precision": "fp32", **changes}
    job = {"preset": changes, "sequence_length": length, "model": smollm2, "out": str(tmp_path / "out.json")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    ranks = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    path = os.pathsep.join([str(WORKER.parent.parent.parent), str(WORKER.parent)])
    subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path / "job.json")],
        env={**os.environ, **ranks, "PYTHONPATH": path},
        check=True,
        timeout=250,
    )
    measured = json.loads((tmp_path / "out.json").read_text())["peak"]
    estimate = estimate_memory(smollm2, replace(QLORA_ZERO2, **changes), sequence_length=length)
    assert estimate.total == pytest.approx(measured, rel=0.15)
