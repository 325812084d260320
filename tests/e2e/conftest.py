"""Policies, and the engines that serve them; an engine is started once a module."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from lorasync import NF4
from lorasync.load import load_quantized
from tests import models


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    torch.set_num_threads(1)


def nf4_policy(path: str, dtype: torch.dtype) -> PeftModel:
    """A real 4-bit policy: SmolLM2 in NF4 with a LoRA adapter that is not zero."""
    base = load_quantized(path, NF4, dtype=dtype, gradient_checkpointing=False, progress=False)
    return models.with_adapter(base, scale=0.01)


@pytest.fixture(scope="module")
def base(smollm2, tmp_path_factory) -> str:
    """A tiny Llama on disk, with SmolLM2's tokenizer."""
    return models.save(
        models.tiny_llama(vocab_size=49152), tmp_path_factory.mktemp("base"), tokenizer=smollm2
    )
