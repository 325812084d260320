"""How fast, how lean and how exact is a merge on a CPU? Ours, PEFT's merge around a copy, PEFT's on a copy.

    python benchmarks/merge_cpu.py [--smollm2 PATH] [--out FILE]

Each way runs in a process of its own, so that its peak memory is its own; all have to give the same weights.
Ways: `ours` streams a MergedSource; `merge_adapter` clones the base, merges in place, streams, puts the clone
back (what in-place users need to avoid drift); `merge_adapter, drift` merges and unmerges without the clone;
`merge_and_unload` merges a deep copy of the model. Seconds are CPU seconds of the one thread, whatever else the machine
does.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # instead of this folder: its names could shadow others
_COMPARED = 30
WAYS = ("ours", "merge_adapter", "merge_adapter, drift", "merge_and_unload")
BILLION = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4,
}  # fmt: skip


def load(which: str, smollm2: str) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if which == "smollm2":
        base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    else:
        torch.set_default_dtype(torch.bfloat16)
        base = LlamaForCausalLM(LlamaConfig(**BILLION))
        torch.set_default_dtype(torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.copy_(torch.randn(param.shape) * 0.02)
    return model


def lora_layers(model: Any) -> dict[str, Any]:
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    return {f"{name}.weight": layer for name, layer in layers.items()}


def stream(model: Any, way: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the merged weights the way that is measured; afterwards the model is as the way leaves it."""
    layers = lora_layers(model)
    if way == "ours":
        from lorasync import MergedSource

        yield from ((n, t) for n, t in MergedSource(model) if n in layers)
    elif way == "merge_and_unload":
        merged = copy.deepcopy(model).merge_and_unload()
        yield from ((n, t) for n, t in merged.state_dict().items() if n in layers)
    else:
        keep = way == "merge_adapter"
        saved = {n: layer.base_layer.weight.detach().clone() for n, layer in layers.items()} if keep else {}
        model.merge_adapter()
        yield from ((n, layer.base_layer.weight.detach()) for n, layer in layers.items())
        model.unmerge_adapter()
        for name, weight in saved.items():
            layers[name].base_layer.weight.data.copy_(weight)


def memory() -> int:
    """Resident memory of this process at its highest since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def measure(which: str, way: str, smollm2: str, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = load(which, smollm2)
    layers = lora_layers(model)
    base = {n: hashlib.sha256(_bytes(layer.base_layer.weight)).hexdigest() for n, layer in layers.items()}
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark to what is held now
    start = memory()
    digest = hashlib.sha256()
    for _, tensor in stream(model, way):
        digest.update(_bytes(tensor))
    extra = memory() - start
    exact, seconds = errors(model, stream(model, way)), []
    for _ in range(repeats):
        began = time.process_time()
        for _pair in stream(model, way):
            pass
        seconds.append(time.process_time() - began)
    changed = sum(
        hashlib.sha256(_bytes(m.base_layer.weight)).hexdigest() != base[n] for n, m in layers.items()
    )
    return {
        "model": which, "way": way, "seconds": min(seconds), "extra_mb": extra / 1e6, **exact,
        "base_changed": changed, "modules": len(layers), "cycles": repeats + 2, "sha256": digest.hexdigest(),
    }  # fmt: skip


def errors(model: Any, merged: Iterator[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """Compare with fp64 rounded once, for up to about `_COMPARED` modules."""
    base = {n: m.base_layer.weight.detach().clone() for n, m in lora_layers(model).items()}
    layers, wrong, total, square, deltas = lora_layers(model), 0, 0, 0.0, 0.0
    for index, (name, tensor) in enumerate(merged):
        if index % max(1, len(layers) // _COMPARED):
            continue
        layer = layers[name]
        delta = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        delta *= layer.scaling["default"]
        exact = base[name].double() + delta
        wrong += int((tensor != exact.to(torch.bfloat16)).sum())
        total += tensor.numel()
        square += float((tensor.double() - exact).square().sum())
        deltas += float(delta.square().sum())
    return {"differ_from_fp64": wrong / total, "error_over_delta": (square / deltas) ** 0.5}


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().view(torch.uint8).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", default=str(ROOT / ".models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "merge_cpu.json"))
    parser.add_argument(
        "--one", nargs=3, metavar=("MODEL", "WAY", "REPEATS"), help="internal: measure one way"
    )
    options = parser.parse_args()
    if options.one:
        which, way, repeats = options.one
        print(json.dumps(measure(which, way, options.smollm2, int(repeats))))
        return
    rows = []
    for which, repeats in (("smollm2", 5), ("1b", 3)):
        for way in WAYS:
            command = [
                sys.executable,
                __file__,
                "--smollm2",
                options.smollm2,
                "--one",
                which,
                way,
                str(repeats),
            ]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(run.stdout.splitlines()[-1]))
            print({k: v for k, v in rows[-1].items() if k != "sha256"}, flush=True)
        assert len({row["sha256"] for row in rows if row["model"] == which}) == 1, "the ways differ"
    import peft
    import transformers

    facts = {
        "command": "python benchmarks/merge_cpu.py", "torch": torch.__version__, "peft": peft.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(), "cpu": _cpu(),
        "threads": 1,
        "adapter": "r=16 on all linear layers, fp32, on a bf16 base",
    }  # fmt: skip
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps({"facts": facts, "rows": rows}, indent=2) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
