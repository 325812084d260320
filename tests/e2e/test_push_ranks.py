"""Two real DeepSpeed ranks train, rank 0 pushes: ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import models
from tests.e2e.engines import greedy, running_llm

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_push_what_they_trained_and_agree_when_one_fails(stage, smollm2, tmp_path):
    base = models.save(models.tiny_llama(vocab_size=49152), tmp_path / "base", tokenizer=smollm2)
    _run(stage, base, tmp_path)
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


def _run(stage: int, base: str, out: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    logs = [(out / f"rank{rank}.log").open("w+") for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(stage), base, str(out)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank],
            stderr=logs[rank],
        )
        for rank in range(2)
    ]
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        for log in logs:
            log.close()
    tails = "\n".join((out / f"rank{rank}.log").read_text()[-2500:] for rank in range(2))
    assert codes == [0, 0], tails
