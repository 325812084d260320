"""The example that newcomers run first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.timeout(400)
def test_the_quickstart_learns_syncs_and_leaves_the_training_model_alone(smollm2, tmp_path):
    plot = tmp_path / "curve.png"
    command = [sys.executable, "examples/quickstart.py", smollm2, "--steps", "2", "--plot", str(plot)]
    free = {n: v for n, v in os.environ.items() if n not in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**free, "MASTER_PORT": "29617"},
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "training model unchanged by sync: yes" in done.stdout
    first, last = (float(word) for word in done.stdout.split("reward: ")[1].split() if word[0].isdigit())
    assert last > first + 0.2
    assert plot.read_bytes().startswith(b"\x89PNG")
