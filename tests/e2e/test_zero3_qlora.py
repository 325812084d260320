"""A real model, 4-bit, on two ranks: ZeRO-3 learns what ZeRO-2 learns, and its base stays bit-exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasync.presets import QLORA_ZERO2
from tests.e2e.zero_cells import RANKS, read_results, run_pair

TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is Tokyo. "
STEPS = 4


def job(stage: int, model: str, tokens: list[list[int]]) -> dict[str, Any]:
    # Small enough that every packed weight is partitioned; norms and adapters stay whole, which saves time.
    # DeepSpeed looks ahead over max_reuse_distance elements, module by module: a minute for a model that is
    # smaller.
    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 50_000,
        "stage3_max_reuse_distance": 1_000_000,
    }
    return {
        "id": f"zero{stage}",
        "model": model,
        "quant": "nf4",
        "engine": "fp32",  # what a CPU computes fastest
        "storage": "uint8",
        "steps": STEPS,
        "tokens": tokens,
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
        "config": QLORA_ZERO2.deepspeed_config(
            bf16=None, optimizer={"params": {"lr": 1e-3}}, zero_optimization=zero, gradient_clipping=0.0
        ),
    }


@pytest.fixture(scope="module")
def runs(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    from transformers import AutoTokenizer

    work = tmp_path_factory.mktemp("zero3")
    ids = AutoTokenizer.from_pretrained(smollm2)(TEXT * 4)["input_ids"]
    tokens = [ids[start : start + 16] for start in range(4)]
    (work / "jobs.json").write_text(json.dumps([job(2, smollm2, tokens), job(3, smollm2, tokens)]))
    run_pair([str(work / "jobs.json"), str(work)], work, idle_timeout=200)
    return [read_results(Path(work, f"{rank}.jsonl")) for rank in range(RANKS)]


def test_both_stages_learn_alike(runs: list[dict[str, dict[str, Any]]]):
    for rank in runs:
        two, three = rank["zero2"], rank["zero3"]
        assert "error" not in two, two
        assert "error" not in three, three
        assert three["losses"] == pytest.approx(two["losses"], abs=5e-3)
        assert three["losses"][-1] < 0.8 * three["losses"][0]


def test_the_gathered_base_of_zero3_is_bit_exact(runs: list[dict[str, dict[str, Any]]]):
    for rank in runs:
        for run in rank.values():
            assert (run["weights"], run["seen_in_forward"]) == (273, 273)
            assert run["changed"] == run["changed_in_forward"] == []
