"""Trainer ranks with engines in their own processes: one each, or the parts of one; a fresh engine is the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import models
from tests.e2e.engines import check_alike, greedy, running_llm
from tests.e2e.ranks import run_two

SCRIPT = Path(__file__).with_name("own_engines.py")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("trainer", "tp"),
    [
        pytest.param("ddp", 1, id="DDP, one each", marks=pytest.mark.slow),
        pytest.param("2", 1, id="ZeRO-2, one each"),
        pytest.param("3", 2, id="ZeRO-3, TP=2"),
    ],
)
def test_every_rank_s_engine_serves_what_was_trained_or_none_takes_the_push(trainer, tp, smollm2, tmp_path):
    base = models.save(models.tiny_llama(vocab_size=49152), tmp_path / "base", tokenizer=smollm2)
    run_two(SCRIPT, trainer, str(tp), base, str(tmp_path), logs=tmp_path, limit=500)
    outcomes = [json.loads((tmp_path / f"outcome{rank}.json").read_text()) for rank in range(2)]
    expected = fresh(base, tmp_path / "trained.pt", tmp_path / "merged")
    for strategy in ("adapter", "factors", "merged"):
        for rank, found in enumerate(outcomes):
            check_alike([(tuple(ids), tuple(logprobs)) for ids, logprobs in found[strategy]], expected)
            assert found[strategy] != found["base"]
            if trainer != "3":
                kind, message, _ = found[f"{strategy} apart"]
                assert kind == "MismatchError"
                assert "others on trainer ranks [1] than on rank 0" in message
            kind, message, _ = found[f"{strategy} refused"]
            assert kind == "SyncError"
            assert "rank 1's engine: MemoryError in the engine: no room in this worker" in message
            assert message.startswith("trainer rank 1: ") == (rank == 0)


def fresh(base: str, adapter: Path, merged: Path) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """What a fresh engine on the merged checkpoint answers."""
    policy = models.with_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    _, unexpected = policy.load_state_dict(torch.load(adapter, weights_only=True), strict=False)
    assert not unexpected
    policy.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(base).save_pretrained(merged)
    with running_llm(str(merged), backend=None, dtype="float32") as oracle:
        return greedy(oracle)
