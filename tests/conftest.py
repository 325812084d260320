"""What every test relies on: offline, few threads, and the real trained model."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2() -> str:
    """SmolLM2-135M-Instruct, a real trained model (tied embeddings, grouped-query attention), as a path."""
    path = Path(os.environ.get("LORASYNC_SMOLLM2", ROOT / ".models" / "SmolLM2-135M-Instruct"))
    if not (path / "config.json").exists():
        pytest.fail(f"{path} is missing: run `make setup` (or scripts/make_smollm2.py {path})")
    return str(path)
