"""Which rounding to bfloat16 leaves the smaller logprob gap, for updates of RL size?

    python benchmarks/rounding_cpu.py [--smollm2 PATH] [--out FILE]

The policy is W + Δ in fp32; served are its weights rounded to bf16, to nearest or stochastically. Both
compute in fp32, so that the gap is the rounding's alone. Δ is scaled to a share of ‖W‖ in each module.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # instead of this folder: its names could shadow others

from lorasync import MergedSource
from lorasync.merge import NEAREST, Rounding, Stochastic

SIZES = (1e-5, 1e-4, 1e-3, 1e-2)
SEEDS = (1, 2, 3)
TEXT = (
    "The capital of France is Paris. Water boils at one hundred degrees Celsius at sea level. A list in "
    "Python is a mutable sequence of objects. In 1969 two people walked on the Moon, while a third "
    "one stayed in orbit. To make bread you need flour, water, salt and yeast; let it rest first."
)


def logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return logits.gather(-1, ids[:, 1:, None]).squeeze()


def scale_updates(model: Any, share: float) -> None:
    """Give every adapted module a random update of norm ``share``·‖W‖."""
    torch.manual_seed(0)
    for layer in model.base_model.model.modules():
        if hasattr(layer, "get_delta_weight"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.data, b.data = torch.randn(a.shape) * 0.02, torch.randn(b.shape) * 0.02
            b.data *= (
                share * layer.base_layer.weight.float().norm() / layer.get_delta_weight("default").norm()
            )


def serve(model: Any, shell: Any, dtype: torch.dtype, rounding: Rounding = NEAREST) -> Any:
    shell.load_state_dict(dict(MergedSource(model, dtype=dtype, rounding=rounding)), strict=False)
    shell.tie_weights()
    return shell


def main() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", default=str(ROOT / ".models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "rounding_cpu.json"))
    options = parser.parse_args()
    ids = AutoTokenizer.from_pretrained(options.smollm2)(TEXT, return_tensors="pt").input_ids
    shell = AutoModelForCausalLM.from_pretrained(options.smollm2, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(options.smollm2, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    rows = []
    for share in SIZES:
        with torch.no_grad():
            scale_updates(model, share)
        policy = logprobs(serve(model, shell, torch.float32), ids)
        reports = list(MergedSource(model).delta_survival())
        kept, unmoved = [r.kept for r in reports], [r.unmoved for r in reports]
        nearest = logprobs(serve(model, shell, torch.bfloat16), ids) - policy
        noisy = [logprobs(serve(model, shell, torch.bfloat16, Stochastic(s)), ids) - policy for s in SEEDS]
        before = logprobs(_untouched(options.smollm2), ids) - policy
        rows.append({
            "update_over_weight": share,
            "kept": sum(kept) / len(kept), "unmoved": sum(unmoved) / len(unmoved),
            "gap_without_push": float(before.abs().mean()),
            "gap_nearest": float(nearest.abs().mean()),
            "gap_stochastic": sum(float(n.abs().mean()) for n in noisy) / len(noisy),
        })  # fmt: skip
        print(rows[-1], flush=True)
    facts = {
        "command": "python benchmarks/rounding_cpu.py", "torch": torch.__version__,
        "tokens": ids.numel() - 1, "seeds": len(SEEDS),
        "model": "SmolLM2-135M-Instruct, r=16 on all linear layers",
    }  # fmt: skip
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps({"facts": facts, "rows": rows}, indent=2) + "\n")


def _untouched(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


if __name__ == "__main__":
    main()
