"""What do the four levers of practice do to time and memory: batch, precision, checkpointing, Adam offload?

Every row is a QLoRA run of its own (ZeRO-2, one rank), beside the first row, the preset as it is. Memory is what
the device had allocated at the peak (`torch.cuda.max_memory_allocated`; on a CPU the most bytes of tensors alive at
once), next to `estimate_memory`'s answer. Seconds on a CPU are those of its one thread, whatever else the machine does.
docs/presets.md shows the result files.

    python benchmarks/levers.py MODEL                a model directory, on this machine's CPU or first GPU
    python benchmarks/levers.py MODEL --precision fp32 --tokens 128    where a CPU computes bf16 slowly
    python benchmarks/levers.py --random 16 2048     a random Llama of 16 layers, width 2048
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / "tests" / "e2e")]  # instead of this folder: its names shadow others

LEVERS: dict[str, dict[str, Any]] = {
    "the preset, fp32": {"precision": "fp32"},
    "the preset": {"precision": "bf16"},
    "micro-batch 4": {"micro_batch": 4},
    "global batch 4 of micro-batch 1": {"global_batch": 4},
    "no gradient checkpointing": {"gradient_checkpointing": False},
    "Adam offload": {"optimizer_offload": "cpu"},
}
LIBRARIES = ("torch", "deepspeed", "transformers", "bitsandbytes", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--random", nargs=2, type=int, metavar=("LAYERS", "WIDTH"))
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--precision", default="bf16", help="of the last four rows")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        lever = {"precision": arguments.precision, **LEVERS[arguments.one]}
        print("RESULT " + json.dumps(measure(arguments.model, lever, arguments.tokens)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model if arguments.random is None else make_random(Path(folder), *arguments.random)
        rows = {name: run(model, name, arguments) for name in LEVERS}
    name = (
        Path(arguments.model).name
        if arguments.random is None
        else "a random Llama of {} layers, width {}".format(*arguments.random)
    )
    report(name, rows, arguments)


def run(model: str, lever: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own, so that peaks don't mix."""
    ranks = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    options = ["--tokens", str(arguments.tokens), "--precision", arguments.precision]
    command = [sys.executable, __file__, model, "--one", lever, *options]
    done = subprocess.run(command, env={**os.environ, **ranks}, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            print(f"{lever:35} {found}", flush=True)
            return found
    raise SystemExit(f"{lever}: {done.stdout[-1000:]}{done.stderr[-3000:]}")


def measure(model: str, lever: dict[str, Any], tokens: int) -> dict[str, Any]:
    import deepspeed
    import torch
    from ds_worker import init_distributed
    from peft import get_peft_model

    from lorasync.load import load_quantized
    from lorasync.planning.memory import LiveBytes, estimate_memory
    from lorasync.presets import QLORA_ZERO2

    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if not cuda:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    init_distributed()
    preset = replace(QLORA_ZERO2, **lever)
    overrides = (
        {} if cuda else {"zero_force_ds_cpu_optimizer": False, "optimizer": {"params": {"torch_adam": True}}}
    )
    live = LiveBytes()
    with live:
        base = load_quantized(
            model,
            preset.quantization,
            dtype=preset.dtype,
            gradient_checkpointing=preset.gradient_checkpointing,
            progress=False,
        )
        policy = get_peft_model(base, preset.lora_config())
        engine, *_ = deepspeed.initialize(
            model=policy,
            config=preset.deepspeed_config(**overrides),
            model_parameters=[p for p in policy.parameters() if p.requires_grad],
        )
        live.peak = live.now
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        step(engine, preset.micro_batch, tokens)
        step(engine, preset.micro_batch, tokens)
    times = [step(engine, preset.micro_batch, tokens) for _ in range(5 if cuda else 3)]
    peak = torch.cuda.max_memory_allocated() if cuda else live.peak
    estimate = estimate_memory(model, preset, sequence_length=tokens)
    done = preset.micro_batch * engine.gradient_accumulation_steps() * tokens
    seconds = statistics.median(times)
    return {
        "seconds": round(seconds, 4),
        "tokens_per_second": round(done / seconds, 1),
        "peak_mib": round(peak / 2**20),
        "estimate_mib": round(estimate.total / 2**20),
        "host_mib": round(estimate.host / 2**20),
    }


def step(engine: Any, micro: int, tokens: int) -> float:
    """One optimizer step, accumulation included."""
    import torch

    clock = time.perf_counter if engine.device.type == "cuda" else time.process_time
    started = clock()
    for _ in range(engine.gradient_accumulation_steps()):
        ids = torch.randint(3, 1000, (micro, tokens), device=engine.device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def make_random(folder: Path, layers: int, width: int) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def report(model: str, rows: dict[str, Any], arguments: argparse.Namespace) -> None:
    import torch

    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    found = {
        "command": "python benchmarks/levers.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name()
        if cuda
        else f"{cpu}, {os.environ.get('OMP_NUM_THREADS', '1')} thread(s)",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "model": model,
        "tokens": arguments.tokens,
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
