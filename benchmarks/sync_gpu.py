"""How long does a whole sync take on a GPU, against the memory floor and against the usual ways?

    python benchmarks/sync_gpu.py --shape 7b --rank 64 --base bf16 --results benchmarks/results

A Qwen2 model of that shape with random weights is trained (in name) by PEFT and served by vLLM (CUDA graphs, LoRA
slots); every sync brings another adapter. In the same run, with a bf16 trainer unless it says otherwise:

- one process: `merge_adapter` → `load_weights` → `unmerge_adapter` (TRL's sequence); fp32 torch operations out of place
  → `load_weights` (NeMo-RL's; NF4 too); PEFT's merge out of place → `copy_` into the slices of vLLM's fused weights
  (Unsloth's arithmetic; NF4 too)
- --processes 2, the engine another process on the same GPU: `merge_adapter` → CUDA IPC handles of every parameter, half
  a gigabyte a call → `load_weights` → `unmerge_adapter` (as verl and OpenRLHF do it)
- --backend ipc, a run of its own in two processes and without LoRA slots: vLLM's stock "ipc" backend, fed by a
  `MergedSource`. It pickles handles, so the script sets VLLM_ALLOW_INSECURE_SERIALIZATION=1 for this run.

All merged ways have to leave the same weights in the engine to one rounding. The floor: the base read once and the
result written once, over the copy bandwidth measured here. With --drift each merged way then makes 100 syncs more and
one of an adapter that is zero: what is served must be the base again (lorasync: bit for bit).
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import os
import pstats
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT)]  # instead of this folder: its names shadow others
sys.path.append(str(ROOT / "benchmarks"))  # behind all others; a worker finds its extension here

import gpu_parts as parts
import torch
from gpu_parts import say, synchronize
from gpu_peers import (
    EXTENSION,
    adapted_layers,
    checkpoint_params,
    dense,
    fused_slices,
    handles,
    stock_ipc,
    with_slots,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

COMMON = "merge_adapter, load_weights, unmerge_adapter"
HANDLES = "merge_adapter, CUDA IPC handles, unmerge_adapter"
STOCK = "vLLM's ipc backend, MergedSource"
OURS = ("factors", "merged")
DRIFT_SYNCS = 100


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
    parts.add_options(parser)
    parser.add_argument("--ways", default="all", help="comma-separated beginnings of names")
    parser.add_argument(
        "--worker-base", help="where workers keep the base; device, or nf4 with an NF4 trainer"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--backend", choices=("lorasync", "ipc"), default="lorasync")
    parser.add_argument("--drift", action="store_true", help="100 syncs more, then back to zero; one process")
    parser.add_argument("--profile", action="store_true", help="print where the host's time goes")
    parser.add_argument("--no-decode", action="store_true")
    options = parser.parse_args()
    if options.backend == "ipc":
        if options.device == "cpu":
            parser.error("--backend ipc: needs a GPU")
        options.processes = 2
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    options.worker_base = options.worker_base or parts.WORKER_BASE[options.base]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(options.processes - 1)
    parts.prepare(options)
    folder = Path(tempfile.mkdtemp(prefix="sync-gpu-", dir="/dev/shm"))
    try:
        Bench(options, folder).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.dtype = parts.served_dtype(options)
        self.rows: list[Row] = []
        self.seen: dict[str, dict[str, Tensor]] = {}
        self.digests: dict[str, Any] = {}
        self.drifts: dict[str, float] = {}
        self.first = 0.0
        began = time.perf_counter()
        self.policy = parts.make_policy(options, folder)
        say(f"policy ready after {time.perf_counter() - began:.0f} s")
        self.llm = make_engine(options, folder)
        say(f"engine ready after {time.perf_counter() - began:.0f} s")

    def run(self) -> None:
        self.bandwidth = parts.copy_bandwidth(self.options.device)
        self.floor = parts.floor_bytes(self.policy, self.options.base) / self.bandwidth * 1e3
        say(f"copy bandwidth {self.bandwidth / 1e12:.2f} TB/s, floor {self.floor:.2f} ms")
        if self.options.backend == "lorasync" and self.options.device == "cuda":
            self.start()
        if self.options.processes == 1:
            self.original = self.served()
        for name, run in self.ways().items():
            try:
                run()
            except Exception:
                say(f"{name} FAILED\n{traceback.format_exc()}")
        parts.write_report(self.options, self.file_name(), self.report())
        self.compare()
        served = list(self.digests.values())
        assert all(digest == served[0] for digest in served), f"other weights: {self.digests}"
        drifted = {n: d for n, d in self.drifts.items() if n.startswith(OURS) and d != 0}
        assert not drifted, f"lorasync drifts: {drifted}"

    # ------------------------------------------------------------------------------------------ the ways

    def ways(self) -> dict[str, Callable[[], None]]:
        """By name, those that this run can go; what changes the trainer's base comes last."""
        o, factors = self.options, f"factors ({self.options.worker_base})"
        if o.backend == "ipc":
            found: dict[str, Callable[[], None]] = {STOCK: self.stock}
        else:
            found = {
                "adapter from memory": lambda: self.synced("adapter from memory"),
                factors: lambda: self.synced(factors, o.worker_base),
                "merged": lambda: self.synced("merged"),
            }
            found |= self.peers()
        if o.worker_base == "device" and not parts.has_room_for_base(o) and found.pop(factors, None):
            say(
                f"{factors} left out: a copy of the base does not fit beside the rest. Take --worker-base cpu."
            )
        wanted = tuple(o.ways.split(","))
        return {name: run for name, run in found.items() if o.ways == "all" or name.startswith(wanted)}

    def peers(self) -> dict[str, Callable[[], None]]:
        packed = self.options.base == "nf4"  # merge_adapter would round the packed weights again
        if self.options.device == "cpu":
            return {}  # no IPC handles, and vLLM's weights lie in a layout of their own
        if self.options.processes == 2:
            return {} if packed else {HANDLES: self.by_handles}
        apart = {
            "fp32 torch operations, load_weights": self.out_of_place,
            "PEFT's merge out of place, copied in": self.copied,
        }
        return apart | ({} if packed else {COMMON: self.common})

    def start(self) -> None:
        """Give the engine the trainer's base, by vLLM's loader where that is possible.

        A push says that live weights are no base any more, and there are no files to read it from.
        """
        began = time.perf_counter()
        if self.options.device == "cuda" and self.options.processes == 1:
            layers = dict(adapted_layers(self.policy))
            for name, param in checkpoint_params(self.policy):
                layer = layers.get(name.removesuffix(".weight"))
                self.load(name, param if layer is None else dense(layer).to(self.dtype))
        elif self.options.device == "cuda" and self.options.base == "bf16":
            for bucket in handles(self.policy):
                self.llm.collective_rpc("load_handles", args=(bucket,))
            torch.cuda.ipc_collect()
        else:
            self.first_push()
        synchronize()
        self.first = time.perf_counter() - began

    def first_push(self) -> None:
        """With an adapter that is zero."""
        import lorasync as ls
        from lorasync.push import connect

        with connect(ls.MergedSource(self.policy, dtype=self.dtype), self.llm) as sync:
            sync.send_weights()

    def synced(self, name: str, base: str | None = None) -> None:
        began = time.perf_counter()
        sync = self.connected(name, base)
        synchronize()
        connected = time.perf_counter() - began
        with sync:
            reports: list[Any] = []
            first = self.timed_once(lambda: reports.append(sync.send_weights()))
            ms, extra = self.timed(lambda: reports.append(sync.send_weights()))
            if self.options.profile:
                profile(sync.send_weights)
            stages = ", ".join(f"{k} {v * 1e3:.1f}" for k, v in reports[-1].seconds.items())
            note = f"connect {connected:.1f} s, first {first:.0f} ms; host ms: {stages}"
            row = Row(name, reports[-1].bytes / 1e6, ms, extra, note=note)
            self.finish(row, sync.send_weights, request=sync.request(), merged=name.startswith(OURS))
            if self.options.processes == 2 and self.options.device == "cuda" and name.startswith(OURS):
                self.digests[name] = sync.digests()  # of one process its own weights are compared

    def connected(self, name: str, base: str | None) -> Any:
        import lorasync as ls
        from lorasync.push import MergeInWorker, ServeAdapter, connect

        if base is not None:
            return connect(ls.FactorSource(self.policy), self.llm, MergeInWorker(base=base))
        if name == "merged":
            return connect(ls.MergedSource(self.policy, dtype=self.dtype), self.llm)
        return connect(ls.FactorSource(self.policy), self.llm, ServeAdapter("policy"))

    def common(self) -> None:
        """TRL's colocated sequence: merge in place, every parameter through vLLM's loader, unmerge."""

        def push() -> None:
            self.policy.merge_adapter()
            for name, tensor in checkpoint_params(self.policy):
                self.load(name, tensor)
            self.policy.unmerge_adapter()
            self.llm.reset_prefix_cache()

        self.in_place(COMMON, push)

    def by_handles(self) -> None:
        """verl's and OpenRLHF's: merge in place, handles of every parameter to the other process, unmerge."""

        def push() -> None:
            self.policy.merge_adapter()
            for bucket in handles(self.policy):
                self.llm.collective_rpc("load_handles", args=(bucket,))
            self.llm.reset_prefix_cache()
            self.policy.unmerge_adapter()
            torch.cuda.ipc_collect()

        self.in_place(HANDLES, push)

    def in_place(self, name: str, push: Callable[[], None]) -> None:
        before = {n: p.clone() for n, p in self.watched()}
        ms, extra = self.timed(push)
        moved = max(parts.largest_gap(p, before[n]) for n, p in self.watched())
        self.finish(Row(name, self.whole_mb(), ms, extra, note=f"base moved by {moved:.1e}"), push)

    def out_of_place(self) -> None:
        """W.float() + s·B·A in torch, one module at a time, rounded once, through vLLM's loader."""
        adapted = dict(adapted_layers(self.policy))
        plain = [
            (n, p) for n, p in checkpoint_params(self.policy) if n.removesuffix(".weight") not in adapted
        ]

        @torch.no_grad()
        def push() -> None:
            for name, layer in adapted.items():
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                base = dense(layer).to(torch.float32, copy=True)
                merged = base.addmm_(b.float(), a.float(), alpha=layer.scaling["default"])
                self.load(f"{name}.weight", merged.to(self.dtype))
            for name, param in plain:
                self.load(name, param)
            self.llm.reset_prefix_cache()

        ms, extra = self.timed(push)
        self.finish(Row("fp32 torch operations, load_weights", self.whole_mb(), ms, extra), push)

    def copied(self) -> None:
        """Unsloth's arithmetic: W + PEFT's delta in the base's dtype, into the slices of vLLM's fused weights."""
        slices = fused_slices(engine_model(self.llm), parts.config_of(self.options.shape))
        adapted = list(adapted_layers(self.policy))

        @torch.no_grad()
        def push() -> None:
            for name, layer in adapted:
                slices[name].copy_(dense(layer) + layer.get_delta_weight("default").to(self.dtype))
            self.llm.reset_prefix_cache()

        ms, extra = self.timed(push)
        size = sum(slices[name].nbytes for name, _ in adapted) / 1e6
        self.finish(Row("PEFT's merge out of place, copied in", size, ms, extra), push)

    def stock(self) -> None:
        """vLLM's own backend; the engine has no LoRA slots, which its reload does not know."""
        send = stock_ipc(self.policy, self.llm)

        def push() -> None:
            send()
            self.llm.reset_prefix_cache()
            torch.cuda.ipc_collect()

        ms, extra = self.timed(push)
        self.finish(Row(STOCK, self.whole_mb(), ms, extra, note="engine without LoRA slots"), push)

    def load(self, name: str, tensor: Tensor) -> None:
        engine_model(self.llm).load_weights([(with_slots(name), tensor)])

    # ----------------------------------------------------------------------------------------- measuring

    def timed_once(self, push: Callable[[], Any]) -> float:
        parts.move(self.policy)
        synchronize()
        began = time.perf_counter()
        push()
        synchronize()
        return (time.perf_counter() - began) * 1e3

    def timed(self, push: Callable[[], Any]) -> tuple[float, float]:
        """Median milliseconds of a sync, and the most memory (MB) that one takes beyond what it starts with."""
        for _ in range(3):
            self.timed_once(push)
        gc.collect()
        before = start_of_peak()
        found = [self.timed_once(push) for _ in range(self.options.repeats)]
        extra = peak() - before
        parts.move(self.policy, seed=0)  # every way ends with the same adapter
        push()
        return statistics.median(found), extra / 1e6

    def finish(
        self, row: Row, push: Callable[[], Any], *, request: dict | None = None, merged: bool = True
    ) -> None:
        if not self.options.no_decode:
            row.tokens_per_second = decode_speed(self.llm, request or {})
        self.rows.append(row)
        if merged and self.options.processes == 1:
            self.seen[row.way] = self.served()
            if self.options.drift:
                row.note = "; ".join(filter(None, [row.note, self.drift(row.way, push)]))
        say(
            f"{row.way}: {row.ms:.2f} ms ({row.ms / self.floor:.2f} x floor), extra {row.extra_mb:.0f} MB, "
            f"{row.tokens_per_second:.0f} tokens/s; {row.note}"
        )

    def drift(self, way: str, push: Callable[[], Any]) -> str:
        """What 100 syncs leave behind: an adapter that is zero has to give the base again."""
        for _ in range(DRIFT_SYNCS):
            parts.move(self.policy)
            push()
        parts.move(self.policy, std=0.0)
        push()
        synchronize()
        self.drifts[way] = max(parts.largest_gap(t, self.original[n]) for n, t in self.served().items())
        return f"drift after {DRIFT_SYNCS} syncs {self.drifts[way]:.1e}"

    def served(self) -> dict[str, Tensor]:
        """The engine's live weights of two layers, copied."""
        named = engine_model(self.llm).named_parameters()
        layers = (".layers.0.", ".layers.1.")
        return {n: p.detach().clone() for n, p in named if p.numel() and any(layer in n for layer in layers)}

    def watched(self) -> Iterator[tuple[str, Tensor]]:
        """The trainer's base, one layer."""
        return ((n, p) for n, p in checkpoint_params(self.policy) if ".layers.0." in n)

    def whole_mb(self) -> float:
        return sum(parts.parameters(self.options.shape)) * self.dtype.itemsize / 1e6

    def compare(self) -> None:
        """Every merged way has left the same weights, to one rounding of the sum."""
        if len(self.seen) < 2:
            return
        reference, *others = self.seen
        for other in others:
            exact = other not in (
                COMMON,
                "PEFT's merge out of place, copied in",
            )  # these round more than once
            differ, total = differing(self.seen[reference], self.seen[other], other if exact else "")
            say(f"{other} against {reference}: {differ / total:.2e} of the elements differ")

    # -------------------------------------------------------------------------------------------- report

    def file_name(self) -> str:
        o = self.options
        where = {"ipc": "-ipc"}.get(o.backend, "" if o.processes == 1 else "-2processes")
        return f"sync{where}_qwen2-{o.shape}-r{o.rank}-{o.base}-{o.factors}"

    def report(self) -> str:
        o = self.options
        where = "one process" if o.processes == 1 else "two processes on one GPU"
        lines = [
            f"# A whole sync, {where}: Qwen2 {o.shape}, {o.base} trainer, {o.factors} factors",
            "",
            (
                f"{parts.circumstances(o)} LoRA r={o.rank} on all linear layers; medians of {o.repeats} syncs after four, "
                f"each with a new adapter. Copy bandwidth {self.bandwidth / 1e12:.2f} TB/s, floor {self.floor:.2f} ms. "
                f"Until the engine had the trainer's base: {self.first:.1f} s."
            ),
            "",
            "| way | MB a sync | ms | × floor | extra MB | decode tokens/s | |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for r in self.rows:
            figures = (f"{r.megabytes:.0f}", f"{r.ms:.2f}", f"{r.ms / self.floor:.2f}", f"{r.extra_mb:.0f}")
            lines.append(f"| {r.way} | {' | '.join(figures)} | {r.tokens_per_second:.0f} | {r.note} |")
        return "\n".join([*lines, ""])


# -------------------------------------------------------------------------------------------- the engine


def make_engine(options: argparse.Namespace, folder: Path) -> Any:
    from vllm import LLM

    more: dict[str, Any] = {}
    if options.backend == "ipc":
        more = {"enable_lora": False, "weight_transfer_config": {"backend": "ipc"}}
    elif options.processes == 2:
        more = {"worker_extension_cls": EXTENSION}
    return LLM(**parts.engine_settings(options, folder, **more))


def engine_model(llm: Any) -> nn.Module:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


# --------------------------------------------------------------------------------------------- measuring


def start_of_peak() -> int:
    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def differing(left: dict[str, Tensor], right: dict[str, Tensor], exact: str) -> tuple[int, int]:
    """How many elements differ, and of how many; of an exact way each by one rounding at most."""
    differ = total = 0
    for name, want in left.items():
        got = right[name]
        gap = (got.float() - want.float()).abs()
        step = torch.maximum(got.float().abs(), want.float().abs()) * 2**-7
        assert not exact or bool((gap <= step + 1e-9).all()), (
            f"{exact}: {name} is off by more than one rounding"
        )
        differ, total = differ + int((gap > 0).sum()), total + gap.numel()
    return differ, total


def decode_speed(llm: Any, request: dict) -> float:
    found = []
    for _ in range(2):
        began = time.perf_counter()
        generated(llm, 64, 128, request)
        found.append(64 * 128 / (time.perf_counter() - began))
    return max(found)


def generated(llm: Any, count: int, tokens: int, request: dict) -> list[tuple[int, ...]]:
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate(parts.prompts(count), wanted, use_tqdm=False, **request)
    return [tuple(o.outputs[0].token_ids) for o in outputs]


def profile(run: Callable[[], Any]) -> None:
    found = cProfile.Profile()
    found.runcall(run)
    text = io.StringIO()
    pstats.Stats(found, stream=text).sort_stats("tottime").print_stats(22)
    say("\n".join(line for line in text.getvalue().splitlines()[4:] if line.strip())[:3500])


if __name__ == "__main__":
    main()
