"""Two real DeepSpeed ranks train, rank 0 pushes: ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import models
from tests.e2e.engines import greedy, running_llm
from tests.e2e.ranks import run_two

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_push_what_they_trained_and_agree_when_one_fails(stage, smollm2, tmp_path):
    base = models.save(models.tiny_llama(vocab_size=49152), tmp_path / "base", tokenizer=smollm2)
    run_two(SCRIPT, str(stage), base, str(tmp_path), logs=tmp_path)
    policy = models.with_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    before = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    trained = torch.load(tmp_path / "adapter.pt", weights_only=True)
    _, unexpected = policy.load_state_dict(trained, strict=False)
    assert not unexpected
    assert any(not torch.equal(before[n], trained[n]) for n in before)
    merged = tmp_path / "merged"
    policy.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(base).save_pretrained(merged)
    with running_llm(str(merged), backend=None, dtype="float32") as oracle:
        expected = greedy(oracle)
    got = json.loads((tmp_path / "answers.json").read_text())
    assert [(tuple(ids), tuple(logprobs)) for ids, logprobs in got] == expected
