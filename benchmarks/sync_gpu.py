"""How long does a whole sync take on a GPU, against the memory floor and against the usual ways?

    python benchmarks/sync_gpu.py --shape 7b --rank 64 --base bf16 --results benchmarks/results

A Qwen2 model of that shape with random weights is trained (in name) by PEFT and served by vLLM (CUDA graphs, LoRA
slots); every sync brings another adapter. With --processes 2 the engine is another process on the same GPU. In the
same run, where they work: `merge_adapter` → `load_weights` → `unmerge_adapter` (TRL's sequence), and fp32 torch
operations out of place → `load_weights` (NeMo-RL's). All merged ways have to leave the same weights in the engine to
one rounding. The floor: the base read once and the result written once, over the copy bandwidth measured here.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import os
import pstats
import re
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT)]  # instead of this folder: its names shadow others
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_USE_FLASHINFER_SAMPLER="0",
)

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from peft import PeftModel

QWEN2 = {  # hidden, MLP, layers, heads, key-value heads, tied embeddings
    "tiny": (256, 512, 2, 8, 2, False),
    "0.5b": (896, 4864, 24, 14, 2, True),
    "1.5b": (1536, 8960, 28, 12, 2, True),
    "7b": (3584, 18944, 28, 28, 4, False),
    "14b": (5120, 13824, 48, 40, 8, False),
}
DEVICE = "cuda"
FACTORS = {"bf16": "bfloat16", "fp32": "float32"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Row:
    way: str
    megabytes: float
    ms: float
    extra_mb: float
    tokens_per_second: float = 0.0
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=QWEN2, default="7b")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--base", choices=("bf16", "nf4"), default="bf16", help="what the trainer holds")
    parser.add_argument("--factors", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--ways", default="all", help="comma-separated beginnings of names")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--profile", action="store_true", help="print where the host's time goes")
    parser.add_argument("--no-decode", action="store_true")
    parser.add_argument("--results", type=Path, help="a folder")
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(options.processes - 1)
    folder = Path(tempfile.mkdtemp(prefix="sync-gpu-", dir="/dev/shm"))
    try:
        Bench(options, folder).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.rows: list[Row] = []
        self.seen: dict[str, dict[str, Tensor]] = {}
        self.answers: dict[str, Any] = {}
        began = time.perf_counter()
        self.policy = make_policy(options, folder)
        say(f"policy ready after {time.perf_counter() - began:.0f} s")
        self.llm = make_engine(options, folder)
        say(f"engine ready after {time.perf_counter() - began:.0f} s")

    def run(self) -> None:
        self.bandwidth = copy_bandwidth()
        self.floor = floor_bytes(self.policy, self.options.base) / self.bandwidth * 1e3
        say(f"copy bandwidth {self.bandwidth / 1e12:.2f} TB/s, floor {self.floor:.2f} ms")
        bases = ["nf4"] if self.options.base == "nf4" else ["device"]
        self.start()
        ways: dict[str, Callable[[], None]] = {
            "adapter from memory": lambda: self.synced("adapter from memory"),
            **{f"factors ({b})": lambda b=b: self.synced(f"factors ({b})", b) for b in bases},
            "merged": lambda: self.synced("merged"),
            "fp32 torch operations, load_weights": self.out_of_place,
            "merge_adapter, load_weights, unmerge_adapter": self.common,
        }
        wanted = tuple(self.options.ways.split(","))
        for name, run in ways.items():
            if self.options.ways != "all" and not name.startswith(wanted):
                continue
            if self.options.processes == 2 and "load_weights" in name:
                continue  # these need the engine in their own process
            try:
                run()
            except Exception:
                say(f"{name} FAILED\n{traceback.format_exc()}")
        if self.options.processes == 1:
            self.compare()
        ours = [a for name, a in self.answers.items() if name.startswith(("factors", "merged"))]
        assert all(answers == ours[0] for answers in ours), "both merges answer alike"
        text = self.report()
        say(text)
        if self.options.results:
            gpu = torch.cuda.get_device_name().split()[1].lower()
            o = self.options
            where = "" if o.processes == 1 else "-2processes"
            name = (
                f"sync{where}_qwen2-{o.shape}-r{o.rank}-{o.base}-{o.factors}_{gpu}_{time.strftime('%Y%m')}.md"
            )
            (o.results / name).write_text(text)

    # ------------------------------------------------------------------------------------------ the ways

    def start(self) -> None:
        """With an adapter that is zero: the engine gets the trainer's base."""
        import lorasync as ls
        from lorasync.push import connect

        with connect(ls.MergedSource(self.policy, dtype=torch.bfloat16), self.llm) as sync:
            sync.send_weights()

    def synced(self, name: str, base: str | None = None) -> None:
        import lorasync as ls
        from lorasync.push import MergeInWorker, ServeAdapter, connect

        began = time.perf_counter()
        if base is not None:
            sync = connect(ls.FactorSource(self.policy), self.llm, MergeInWorker(base=base))
        elif name == "merged":
            sync = connect(ls.MergedSource(self.policy, dtype=torch.bfloat16), self.llm)
        else:
            sync = connect(ls.FactorSource(self.policy), self.llm, ServeAdapter("policy"))
        torch.cuda.synchronize()
        connected = time.perf_counter() - began
        with sync:
            reports: list[Any] = []
            first = self.timed_once(lambda: reports.append(sync.send_weights()))
            ms, extra = self.timed(lambda: reports.append(sync.send_weights()))
            if self.options.profile:
                profile(sync.send_weights)
            parts = ", ".join(f"{k} {v * 1e3:.1f}" for k, v in reports[-1].seconds.items())
            note = f"connect {connected:.1f} s, first {first:.0f} ms; host ms: {parts}"
            self.finish(
                name, reports[-1].bytes / 1e6, ms, extra, note, sync.request(), merged=name[:7] != "adapter"
            )

    def common(self) -> None:
        """TRL's colocated sequence: merge in place, every parameter through vLLM's loader, unmerge."""
        before = {n: p.detach().clone() for n, p in self.watched()}

        def push() -> None:
            self.policy.merge_adapter()
            for name, param in self.policy.named_parameters():
                name = name.removeprefix("base_model.model.").replace(".base_layer", "")
                if "lora_" not in name:
                    self.load([(name, param.data)])
            self.policy.unmerge_adapter()
            self.llm.reset_prefix_cache()

        if self.options.base == "nf4":
            self.options.repeats = 1
        ms, extra = self.timed(push)
        drift = (
            max(float((p.detach().float() - before[n].float()).abs().max()) for n, p in self.watched())
            if self.options.base == "bf16"
            else float("nan")
        )
        size = sum(p.numel() * 2 for p in self.policy.get_base_model().parameters()) / 1e6
        self.finish(
            "merge_adapter, load_weights, unmerge_adapter",
            size,
            ms,
            extra,
            f"base drifted by {drift:.1e}",
            {},
            merged=True,
        )

    def out_of_place(self) -> None:
        """W.float() + s·B·A in torch, one module at a time, rounded once, through vLLM's loader."""
        from bitsandbytes.functional import dequantize_4bit
        from peft.tuners.lora import LoraLayer

        base = self.policy.get_base_model()
        adapted = {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer)}
        plain = [
            (n, p) for n, p in base.named_parameters() if ".lora_" not in n and ".base_layer.weight" not in n
        ]

        @torch.no_grad()
        def push() -> None:
            for name, layer in adapted.items():
                weight = layer.get_base_layer().weight
                if self.options.base == "nf4":
                    weight = dequantize_4bit(weight.data, weight.quant_state)
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                merged = weight.float().addmm_(b.float(), a.float(), alpha=layer.scaling["default"])
                self.load([(f"{name}.weight", merged.to(torch.bfloat16))])
            for name, param in plain:
                self.load([(name.replace(".base_layer", ""), param.data)])
            self.llm.reset_prefix_cache()

        ms, extra = self.timed(push)
        size = sum(p.numel() * 2 for p in base.parameters()) / 1e6
        self.finish("fp32 torch operations, load_weights", size, ms, extra, "", {}, merged=True)

    def load(self, named: list[tuple[str, Tensor]]) -> None:
        """Through vLLM's loader; with LoRA slots its layers have another name."""
        renamed = [(re.sub(r"(_proj)(\.(?:weight|bias))$", r"\1.base_layer\2", name), t) for name, t in named]
        engine_model(self.llm).load_weights(renamed)

    # ----------------------------------------------------------------------------------------- measuring

    def timed_once(self, push: Callable[[], Any]) -> float:
        move(self.policy)
        torch.cuda.synchronize()
        began = time.perf_counter()
        push()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) * 1e3

    def timed(self, push: Callable[[], Any]) -> tuple[float, float]:
        """Median milliseconds of a sync, and the most memory that one takes beyond what it starts with."""
        for _ in range(3):
            self.timed_once(push)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = [self.timed_once(push) for _ in range(self.options.repeats)]
        extra = torch.cuda.max_memory_allocated() - before
        move(self.policy, seed=0)  # every way ends with the same adapter
        push()
        return statistics.median(found), extra / 1e6

    def watched(self) -> Iterator[tuple[str, Tensor]]:
        for name, param in self.policy.named_parameters():
            if ".layers.0." in name and name.endswith("base_layer.weight"):
                yield name, param

    def finish(
        self, name: str, size: float, ms: float, extra: float, note: str, request: dict, *, merged: bool
    ) -> None:
        speed = 0.0 if self.options.no_decode else decode_speed(self.llm, request)
        self.rows.append(Row(name, size, ms, extra, speed, note))
        say(
            f"{name}: {ms:.2f} ms ({ms / self.floor:.2f} x floor), extra {extra:.0f} MB, {speed:.0f} tokens/s; {note}"
        )
        self.answers[name] = greedy(self.llm, request)
        if merged and self.options.processes == 1:
            served = engine_model(self.llm).named_parameters()
            self.seen[name] = {
                n: p.detach().clone() for n, p in served if ".layers.0." in n or ".layers.1." in n
            }

    def compare(self) -> None:
        """Every merged way has left the same weights, to one rounding of the sum."""
        if len(self.seen) < 2:
            return
        reference, *others = self.seen
        for other in others:
            differ = total = 0
            for name, want in self.seen[reference].items():
                got = self.seen[other][name]
                gap = (got.float() - want.float()).abs()
                step = torch.maximum(got.float().abs(), want.float().abs()) * 2**-7
                assert bool((gap <= step + 1e-9).all()) or "merge_adapter" in other, (
                    f"{other}: {name} is off by more than one rounding"
                )
                differ, total = differ + int((gap > 0).sum()), total + gap.numel()
            say(f"{other} against {reference}: {differ / total:.2e} of the elements differ, by one rounding")

    def report(self) -> str:
        o = self.options
        libraries = ", ".join(
            f"{n} {version(n)}" for n in ("torch", "triton", "vllm", "peft", "transformers")
        )
        settings = ("shape", "rank", "base", "factors", "processes")
        command = " ".join(f"--{name} {getattr(o, name)}" for name in settings)
        where = "one process" if o.processes == 1 else "two processes on one GPU"
        lines = [
            f"# A whole sync, {where}: Qwen2 {o.shape}, {o.base} trainer, {o.factors} factors",
            "",
            (
                f"`python benchmarks/sync_gpu.py {command}`, {time.strftime('%Y-%m-%d')}, {torch.cuda.get_device_name()}; "
                f"{libraries}. LoRA r={o.rank} on all linear layers; medians of {o.repeats} syncs after four, each with a "
                f"new adapter. Copy bandwidth {self.bandwidth / 1e12:.2f} TB/s, floor {self.floor:.2f} ms."
            ),
            "",
            "| way | MB a sync | ms | × floor | extra MB | decode tokens/s | |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for r in self.rows:
            figures = (f"{r.megabytes:.0f}", f"{r.ms:.2f}", f"{r.ms / self.floor:.2f}", f"{r.extra_mb:.0f}")
            lines.append(f"| {r.way} | {' | '.join(figures)} | {r.tokens_per_second:.0f} | {r.note} |")
        return "\n".join([*lines, ""])


# ------------------------------------------------------------------------------------------------- parts


def say(text: str) -> None:
    print(text, flush=True)


def make_policy(options: argparse.Namespace, folder: Path) -> PeftModel:
    """Random weights on the GPU, quantized if asked, with an adapter that is zero; the folder gets the config."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, mlp, layers, heads, kv, tied = QWEN2[options.shape]
    config = Qwen2Config(
        vocab_size=152064 if options.shape != "tiny" else 1024,
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
    config.save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(DEVICE), no_init_weights():
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    for param in model.parameters():
        param.data.normal_(std=0.02) if param.ndim > 1 else param.data.fill_(1.0)
    if options.base == "nf4":
        quantize(model)
    lora = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=LINEAR)
    policy = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, param in policy.named_parameters():
        if ".lora_" in name:
            param.data = param.data.to(getattr(torch, FACTORS[options.factors]))
    return policy


def quantize(model: torch.nn.Module) -> None:
    """Every linear layer but the head becomes bitsandbytes' NF4, where it stands."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in LINEAR:
                bias = layer.bias is not None
                packed = Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias,
                    torch.bfloat16,
                    quant_type="nf4",
                    device="meta",
                )
                packed.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to(
                    DEVICE
                )
                if bias:
                    packed.bias = layer.bias
                setattr(parent, name, packed)
    model.is_loaded_in_4bit = True


STEPS = 0


def move(policy: PeftModel, *, seed: int | None = None) -> None:
    """A step of the optimizer, in size: every factor changes."""
    global STEPS
    STEPS += 1
    torch.manual_seed(STEPS if seed is None else seed)
    with torch.no_grad():
        for name, param in policy.named_parameters():
            if ".lora_B." in name:
                param.normal_(std=1e-3)


def make_engine(options: argparse.Namespace, folder: Path) -> Any:
    """It starts with weights of its own; the first push brings the trainer's."""
    from vllm import LLM

    return LLM(
        str(folder),
        dtype="bfloat16",
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=64,
        gpu_memory_utilization=0.2,  # what must be free; the key-value cache's size is given
        kv_cache_memory_bytes=4 << 30,
        enable_lora=True,
        max_lora_rank=max(8, options.rank),
        max_loras=1,
        max_cpu_loras=4,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [8, 64],
        },
        weight_transfer_config={"backend": "lorasync"},
    )


def engine_model(llm: Any) -> torch.nn.Module:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


def floor_bytes(policy: PeftModel, base: str) -> float:
    from peft.tuners.lora import LoraLayer

    elements = sum(m.in_features * m.out_features for m in policy.modules() if isinstance(m, LoraLayer))
    return elements * (2 + (2 if base == "bf16" else 0.5625))


def copy_bandwidth() -> float:
    """Bytes read and written a second."""
    left = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    right = torch.empty_like(left)
    found = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        right.copy_(left)
        end.record()
        end.synchronize()
        found.append(2 * left.numel() / (start.elapsed_time(end) / 1e3))
    return statistics.median(found[2:])


def prompts(count: int) -> list[dict]:
    return [{"prompt_token_ids": [(7 * i + 13 * j) % 1000 + 1 for j in range(16)]} for i in range(count)]


def greedy(llm: Any, request: dict) -> list[tuple[int, ...]]:
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts(8), wanted, use_tqdm=False, **request)
    return [tuple(o.outputs[0].token_ids) for o in outputs]


def decode_speed(llm: Any, request: dict) -> float:
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True, detokenize=False)
    found = []
    for _ in range(2):
        began = time.perf_counter()
        llm.generate(prompts(64), wanted, use_tqdm=False, **request)
        found.append(64 * 128 / (time.perf_counter() - began))
    return max(found)


def profile(run: Callable[[], Any]) -> None:
    found = cProfile.Profile()
    found.runcall(run)
    text = io.StringIO()
    pstats.Stats(found, stream=text).sort_stats("tottime").print_stats(22)
    say("\n".join(line for line in text.getvalue().splitlines()[4:] if line.strip())[:3500])


if __name__ == "__main__":
    main()
