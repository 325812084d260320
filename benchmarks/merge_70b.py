"""What does a 70B-shaped merge need, in memory? Layers of Llama-3-70B's matrices, 2 against 5, in memory and disk to disk.

    python benchmarks/merge_70b.py [--layers 2 5] [--out FILE] [--folder SCRATCH]

Random bf16 weights, r=64 on all linear layers, fp32 factors, a small vocabulary. In memory the peak is that of the
process's resident memory over what it holds before the pass; disk to disk that of its anonymous memory, sampled. Every
case in a process of its own. The peak has to be the same for both numbers of layers, and in memory the weights of one
layer have to equal PEFT's arithmetic, bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # instead of this folder: its names could shadow others

import torch

SHAPE = {
    "vocab_size": 1024, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip
LARGEST = SHAPE["hidden_size"] * SHAPE["intermediate_size"]


def make(layers: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE)).to(torch.bfloat16)
    base = base.to_empty(device="cpu")
    torch.manual_seed(0)
    noise = torch.randn(1 << 20).mul_(0.02).bfloat16()
    for param in base.parameters():  # the same million values over and over: drawing 3e9 would take minutes
        flat = param.data.view(-1)
        for start in range(0, flat.numel(), noise.numel()):
            part = flat[start : start + noise.numel()]
            part.copy_(noise[: part.numel()])
    model = get_peft_model(base, LoraConfig(r=64, target_modules="all-linear"))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data.normal_(std=0.01)
    return model


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def reset() -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def check(model: Any, name: str, tensor: torch.Tensor) -> None:
    layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
    if not hasattr(layer, "lora_A"):
        return
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    delta = (b @ a) * layer.scaling["default"]
    assert torch.equal(tensor, (layer.base_layer.weight + delta).to(tensor.dtype)), name


@torch.no_grad()
def in_memory(layers: int, _: Path) -> dict[str, Any]:
    from lorasync import MergedSource

    model = make(layers)
    source = MergedSource(model)
    began, start = time.process_time(), reset()
    for _name, tensor in source:
        del tensor
    seconds, peak = time.process_time() - began, resident("VmHWM")
    for name, tensor in source:
        if ".layers.1." in name:
            check(model, name, tensor)
    return {"model_gb": start / 1e9, "extra_mb": (peak - start) / 1e6, "cpu_seconds": seconds}


def to_disk(_: int, folder: Path) -> dict[str, Any]:
    from lorasync.export import merge_to_disk

    anonymous: list[int] = [resident("RssAnon")]
    done = threading.Event()

    def sample() -> None:  # pages of mapped files are resident too, but the kernel drops them when it likes
        while not done.wait(0.01):
            anonymous.append(resident("RssAnon"))

    watcher = threading.Thread(target=sample)
    began, start = time.process_time(), reset()
    watcher.start()
    out = merge_to_disk(folder / "base", folder / "out", adapter=folder / "adapter", progress=False)
    seconds = time.process_time() - began
    done.set()
    watcher.join()
    return {
        "written_gb": sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e9,
        "extra_mb": (max(anonymous) - anonymous[0]) / 1e6,
        "with_pages_of_mapped_files_mb": (resident("VmHWM") - start) / 1e6,
        "cpu_seconds": seconds,
    }


def save(layers: int, folder: Path) -> dict[str, Any]:
    model = make(layers)
    model.save_pretrained(folder / "adapter")
    model.unload().save_pretrained(folder / "base", max_shard_size="2GB")
    return {}


CASES = {"in memory": in_memory, "save": save, "disk to disk": to_disk}


def run(case: str, layers: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", case, str(layers), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"case": case, "layers": layers, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs=2, type=int, default=[2, 5])
    parser.add_argument("--disk-layers", nargs=2, type=int, default=[2, 4])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        print(json.dumps(CASES[options.one[0]](int(options.one[1]), options.folder)))
        return
    rows = [run("in memory", layers, Path()) for layers in options.layers]
    print(json.dumps(rows, indent=1), flush=True)
    for layers in options.disk_layers:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            run("save", layers, folder)
            rows.append(run("disk to disk", layers, folder))
        finally:
            shutil.rmtree(folder)
        print(rows[-1], flush=True)
    few, many = (row["extra_mb"] for row in rows[:2])
    assert many < few * 1.05 + 20, "the peak grows with the number of layers"
    facts = {
        "command": "python benchmarks/merge_70b.py", "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(), "threads": 1, "largest_matrix_mb_bf16": LARGEST * 2 / 1e6,
        "versions": {name: version(name) for name in ("torch", "peft", "transformers", "safetensors")},
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
