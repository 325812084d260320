"""What `lorasync.verify` says without an engine; with one it is tested in tests/e2e."""

from __future__ import annotations

import pytest
import torch

from lorasync.errors import AdapterError, EngineNotReadyError
from lorasync.load import load_quantized
from lorasync.presets import NF4
from lorasync.verify import Canary, base_fingerprint
from tests import models


def test_a_fingerprint_is_of_the_base_alone(tmp_path):
    path = models.save(models.tiny_llama().to(torch.bfloat16), tmp_path)
    one = models.with_adapter(models.tiny_llama().to(torch.bfloat16))
    before = base_fingerprint(one)
    models.move(one, seed=3)
    assert base_fingerprint(one) == before
    assert base_fingerprint(models.with_adapter(models.tiny_llama().to(torch.bfloat16), seed=9)) == before
    packed = models.with_adapter(load_quantized(path, NF4, progress=False))
    assert base_fingerprint(packed) != before
    one.get_base_model().model.norm.weight.data += 1
    assert base_fingerprint(one) != before
    with pytest.raises(AdapterError):
        base_fingerprint(models.tiny_llama())


def test_a_canary_needs_an_engine_that_answers_when_called():
    with pytest.raises(EngineNotReadyError, match=r"expected a vllm\.LLM"):
        Canary(models.tiny_llama(), object(), ["The"])
