"""The command line, as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import models


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorasync.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return models.save(models.tiny_llama(), tmp_path_factory.mktemp("base"))


def test_doctor_lists_the_libraries_and_never_raises():
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout
    assert "vLLM plugin: found" in done.stdout


@pytest.mark.parametrize(
    ("zero", "code", "said"),
    [({"stage": 2}, 0, ""), ({"stage": 3, "zero_quantized_weights": True}, 1, "zero_quantized_weights")],
)
def test_check_zero_speaks_through_its_exit_code(base, tmp_path, zero, code, said):
    config = tmp_path / "ds.json"
    config.write_text(
        json.dumps(
            {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero}
        )
    )
    done = run("check-zero", base, str(config))
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout


def test_merge_writes_what_peft_merges(base, tmp_path):
    policy = models.with_adapter(models.tiny_llama())
    policy.save_pretrained(tmp_path / "adapter")
    done = run("merge", base, str(tmp_path / "adapter"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    merged = {n: t for f in Path(tmp_path / "out").glob("*.safetensors") for n, t in load_file(f).items()}
    expected = policy.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[n], t) for n, t in expected.items())


def test_plan_says_what_travels_and_what_survives(base, tmp_path):
    models.with_adapter(models.tiny_llama()).save_pretrained(tmp_path / "adapter")
    plot = tmp_path / "survival.png"
    done = run("plan", base, str(tmp_path / "adapter"), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    assert "→ MergeInWorker" in done.stdout
    assert "layers.1.self_attn.k_proj.weight" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_message_and_exit_code_2(base, tmp_path):
    done = run("merge", base, str(tmp_path / "nothing"), str(tmp_path / "out"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "nothing" in done.stderr
    assert not (tmp_path / "out").exists()
