"""How far are the merge kernels from the memory floor, and do they round once?

    python benchmarks/merge_kernels.py                      # Qwen2-7B shape, r=64, every kind of base; needs a GPU
    python benchmarks/merge_kernels.py --layers 2 --sweep   # time many tile shapes as well

For each kind the same run times the usual ways (torch.addmm into the storage; out-of-place fp32 torch ops;
for 4-bit dequantize, then addmm), asserts that all give the same weights to one ulp of the terms, and counts
what differs from the fp64 result rounded once. The floor is bytes (base read once, result written once) over
the copy bandwidth measured here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from lorasync.kernels import GroupedMerge, Int8Base, MergeJob, NestedAbsmax, PackedBase, PlainBase
from lorasync.kernels.launch import Launch, tuning_key, variant_of
from lorasync.kernels.tune import Config, remember

if TYPE_CHECKING:
    from collections.abc import Callable

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
       1.0]  # fmt: skip
HIDDEN, KV, MLP = 3584, 512, 18944
MODULES = {
    "q": (HIDDEN, HIDDEN), "k": (KV, HIDDEN), "v": (KV, HIDDEN), "o": (HIDDEN, HIDDEN),
    "gate": (MLP, HIDDEN), "up": (MLP, HIDDEN), "down": (HIDDEN, MLP),
}  # fmt: skip
FUSED = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Kind:
    name: str
    base: str
    factors: torch.dtype
    dora: bool = False


KINDS = (
    Kind("bf16 base, bf16 factors", "bf16", BF16),
    Kind("bf16 base, fp32 factors", "bf16", FP32),
    Kind("NF4 base, bf16 factors", "nf4", BF16),
    Kind("NF4 base, fp32 factors", "nf4", FP32),
    Kind("NF4 nested base, bf16 factors", "nf4n", BF16),
    Kind("INT8 base, bf16 factors", "int8", BF16),
    Kind("INT8 base, fp32 factors", "int8", FP32),
    Kind("bf16 base, bf16 factors, DoRA", "bf16", BF16, dora=True),
)
SWEEP = [
    (64, 64, 4, 128, 8, 3), (64, 64, 4, 128, 4, 3), (64, 64, 4, 128, 14, 3), (64, 64, 4, 128, 28, 3),
    (64, 64, 4, 112, 8, 3), (64, 64, 4, 96, 8, 3), (64, 64, 4, 80, 8, 3), (64, 64, 4, 128, 8, 2),
    (64, 64, 4, 128, 8, 4), (64, 64, 4, 96, 8, 4), (128, 64, 8, 128, 8, 3), (128, 64, 8, 128, 14, 3),
    (128, 64, 8, 96, 8, 3), (128, 64, 8, 128, 8, 4), (64, 128, 4, 168, 8, 3), (64, 128, 4, 200, 8, 3),
    (64, 128, 8, 96, 7, 3), (64, 128, 8, 128, 7, 3), (128, 128, 8, 168, 7, 2), (128, 128, 8, 128, 7, 3),
    (64, 32, 4, 96, 14, 4), (128, 32, 4, 128, 14, 3), (64, 256, 8, 168, 7, 2),
]  # fmt: skip
SWEEP_WIDE = [  # for ranks above 64
    (128, 64, 8, 128, 14, 2), (128, 64, 8, 128, 14, 3), (128, 64, 8, 255, 14, 2), (128, 64, 8, 128, 28, 2),
    (128, 64, 4, 255, 14, 2), (128, 64, 8, 128, 14, 1), (64, 64, 4, 128, 14, 2), (64, 64, 4, 128, 14, 3),
    (64, 64, 4, 168, 14, 2), (64, 128, 4, 255, 8, 2), (64, 128, 8, 128, 8, 2), (64, 128, 4, 255, 8, 3),
    (128, 128, 8, 255, 8, 1), (128, 128, 8, 255, 8, 2), (128, 128, 16, 128, 8, 2), (256, 64, 8, 255, 14, 2),
    (256, 64, 16, 128, 14, 2), (128, 32, 8, 128, 28, 3), (128, 32, 4, 255, 28, 2), (256, 32, 8, 255, 28, 2),
]  # fmt: skip


def outputs(layers: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """vLLM's fused parameters of every layer, and the slice of each module in them."""
    live = []
    for _ in range(layers):
        slices: dict[str, Tensor] = {}
        for members in FUSED.values():
            fused = torch.empty(
                sum(MODULES[m][0] for m in members), MODULES[members[0]][1], dtype=dtype, device="cuda"
            )
            start = 0
            for m in members:
                slices[m] = fused[start : start + MODULES[m][0]]
                start += MODULES[m][0]
        live.append(slices)
    return live


def random_base(kind: str, rows: int, cols: int) -> PlainBase | PackedBase | Int8Base:
    if kind == "bf16":
        return PlainBase(torch.randn(rows, cols, dtype=BF16, device="cuda").mul_(0.02))
    if kind == "int8":
        q = torch.randint(-127, 128, (rows, cols), dtype=torch.int8, device="cuda")
        return Int8Base(q, torch.rand(rows, device="cuda") * 0.04 + 0.04)
    n = rows * cols
    packed = torch.randint(0, 256, (n // 2,), dtype=torch.uint8, device="cuda")
    code = torch.tensor(NF4, device="cuda")
    if kind == "nf4":
        return PackedBase(packed, torch.rand(n // 64, device="cuda") * 0.02 + 0.03, code, 64, (rows, cols))
    inner = torch.rand(-(-(n // 64) // 256), device="cuda") * 0.02
    nested = NestedAbsmax(inner, torch.linspace(-1, 1, 256, device="cuda"), 0.04)
    absmax = torch.randint(0, 256, (n // 64,), dtype=torch.uint8, device="cuda")
    return PackedBase(packed, absmax, code, 64, (rows, cols), nested=nested)


def build(kind: Kind, live: list[dict[str, Tensor]], r: int, b_std: float) -> list[MergeJob]:
    """A whole model's jobs; the delta's standard deviation is about 2·√r·0.01·b_std."""
    jobs = []
    for i, layer in enumerate(live):
        for name, (rows, cols) in MODULES.items():
            a = torch.randn(r, cols, device="cuda").mul_(0.01).to(kind.factors)
            b = torch.randn(rows, r, device="cuda").mul_(b_std).to(kind.factors)
            m = torch.rand(rows, device="cuda") + 1 if kind.dora else None
            base = random_base(kind.base, rows, cols)
            jobs.append(MergeJob(layer[name], base, a, b, 2.0, magnitude=m, name=f"{i}.{name}"))
    return jobs


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, read and written bytes both counted."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    ms = timed(lambda: target.copy_(source), 10)
    return 2 * source.numel() * 4 / (ms / 1e3)


def timed(run: Callable[[], object], repeats: int) -> float:
    """The median milliseconds by device events, after three warm-up runs."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def addmm(jobs: list[MergeJob], scratch: Callable[[PackedBase, Tensor], Tensor] | None) -> Callable[[], None]:
    """torch.addmm into the live storage, a packed base dequantized first."""

    def run() -> None:
        for job in jobs:
            base = job.base.weight if scratch is None else scratch(job.base, job.out)
            torch.addmm(
                base, job.lora_b.to(base.dtype), job.lora_a.to(base.dtype), alpha=job.scaling, out=job.out
            )

    return run


def out_of_place(jobs: list[MergeJob]) -> Callable[[], None]:
    def run() -> None:
        for job in jobs:
            job.out.copy_(
                job.base.weight.float() + (job.lora_b.float() @ job.lora_a.float()).mul_(job.scaling)
            )

    return run


def bnb_dequantize(base: PackedBase, out: Tensor) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(base.absmax, out.shape, base.code, 64, "nf4", base.dtype)
    return dequantize_4bit(base.packed.view(-1, 1), state)


@dataclass
class Error:
    elements: int = 0
    differ: int = 0
    beyond: int = 0
    worst: int = 0


def exact(job: MergeJob) -> Tensor:
    """W + s·B·A in fp64 by 64-bit matrix products."""
    value = job.base.dequantize().double()
    value += job.scaling * (job.lora_b.double() @ job.lora_a.double())
    if job.magnitude is not None:
        value *= (job.magnitude.double() / value.norm(dim=1))[:, None]
    return value


def places(x: Tensor) -> Tensor:
    """The bf16 values as integers in order, so that a difference counts ulps."""
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def compare(jobs: list[MergeJob], *, sample: int) -> Error:
    error = Error()
    for job in jobs[:sample]:
        want = exact(job)
        ulps = (places(job.out) - places(round_once(want))).abs()
        error.elements += ulps.numel()
        error.differ += int((ulps > 0).sum())
        error.beyond += int((ulps > 1).sum())
        error.worst = max(error.worst, int(ulps.max()))
    return error


def round_once(x: Tensor) -> Tensor:
    """fp64 to bf16 with one rounding: through fp32 rounded to odd."""
    high = x.float()
    bits, rest = high.view(torch.int32), (x - high.double())
    toward = torch.where((rest != 0) & ((rest < 0) != (high < 0)), bits - 1, bits)
    return torch.where(rest != 0, toward | 1, bits).view(torch.float32).to(BF16)


def poison(jobs: list[MergeJob]) -> None:
    for job in jobs:
        job.out.fill_(float("nan"))


def sweep(kind: Kind, jobs: list[MergeJob], floor: float, *, keep: bool) -> None:
    """Time many tile shapes; with ``keep`` the planner takes the fastest from now on."""
    variant = variant_of(jobs[0])
    shapes = SWEEP_WIDE if variant.r_pad > 64 else SWEEP
    configs = [Config(bm, bn, warps, variant.r_pad, *rest) for bm, bn, warps, *rest in shapes]

    def prepare(config: Config) -> Launch | None:
        try:
            launch = Launch(variant, jobs, config)
            launch.prime()
        except Exception as error:  # a tile that does not fit is a row of the table
            print(f"  {config}: {type(error).__name__} {str(error)[:80]}")
            return None
        return launch

    with ThreadPoolExecutor(12) as pool:
        launches = [x for x in pool.map(prepare, configs) if x is not None]
    rows = [
        (timed(lambda go=launch.run: [go() for _ in range(4)], 3) / 4, launch.config) for launch in launches
    ]
    rows.sort(key=lambda row: row[0])
    print(f"sweep {kind.name}: floor {floor:.2f} ms")
    for ms, config in rows:
        print(f"  {ms:7.2f} ms  {ms / floor:.2f}x  {config}")
    sys.stdout.flush()
    if keep:
        remember(tuning_key(variant), rows[0][1])


def graph_of(merge: GroupedMerge) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merge.run()
    return graph


def measure(
    kind: Kind, live: list[dict[str, Tensor]], args: argparse.Namespace, bandwidth: float
) -> list[str]:
    jobs = build(kind, live, args.rank, args.b_std)
    torch.cuda.synchronize()
    start = time.perf_counter()
    merge = GroupedMerge(jobs)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    floor = merge.traffic / bandwidth * 1e3
    if args.sweep:
        sweep(kind, jobs, floor, keep=args.tune)
    if args.tune:
        merge = GroupedMerge(jobs, tune=True)
    config = merge.launches[0].config
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    poison(jobs)
    merge.run()
    extra = torch.cuda.max_memory_allocated() - before
    error = compare(jobs, sample=args.check)
    merged = [job.out.clone() for job in jobs[:7]]
    noted = sum(int(launch._buffers["cancelled"][0]) for launch in merge.launches)
    cpu = time.perf_counter()
    merge.run()
    cpu = time.perf_counter() - cpu
    rows = [
        line(
            kind.name,
            "lorasync, eager",
            timed(merge.run, 20),
            floor,
            error,
            f"plan {first:.1f} s, host {cpu * 1e3:.2f} ms, extra {extra >> 20} MB, {noted} mended, {config}",
        )
    ]
    graph = graph_of(merge)
    rows.append(line(kind.name, "lorasync, CUDA graph", timed(graph.replay, 20), floor, error, ""))
    rows += baselines(kind, jobs, floor, merged, args)
    return rows


def plan_only(kind: Kind, live: list[dict[str, Tensor]], args: argparse.Namespace) -> None:
    jobs = build(kind, live, args.rank, args.b_std)
    torch.cuda.synchronize()
    start = time.perf_counter()
    GroupedMerge(jobs)
    torch.cuda.synchronize()
    print(f"{kind.name}: planned and loaded in {time.perf_counter() - start:.2f} s", flush=True)


def baselines(
    kind: Kind, jobs: list[MergeJob], floor: float, merged: list[Tensor], args: argparse.Namespace
) -> list[str]:
    ways: dict[str, Callable[[], None]] = {}
    if kind.dora or kind.base in ("int8", "nf4n"):
        return []
    if kind.base == "bf16":
        if kind.factors == BF16:
            ways["torch.addmm into the storage"] = addmm(jobs, None)
        ways["fp32 torch ops, out of place"] = out_of_place(jobs)
    elif args.bnb and kind.factors == BF16:
        ways["bitsandbytes dequantize, addmm"] = addmm(jobs, bnb_dequantize)
    rows = []
    for name, run in ways.items():
        poison(jobs)
        run()
        for job, ours in zip(jobs[:7], merged, strict=True):
            gap = (job.out.float() - ours.float()).abs()
            base = job.base.dequantize().float()
            ulp = (ours.float().abs() + base.abs()) * 2**-7 + (ours.float() - base).abs().amax(
                1, keepdim=True
            ) * 2**-8
            assert bool((gap <= ulp).all()), f"{name}: {job.name} differs by more than an ulp of the terms"
        rows.append(
            line(kind.name, name, timed(run, 10), floor, compare(jobs, sample=min(7, args.check)), "")
        )
    return rows


def line(kind: str, way: str, ms: float, floor: float, error: Error, note: str) -> str:
    share = error.differ / max(1, error.elements)
    beyond = f"{error.beyond} of {error.elements:.1e}"
    return f"| {kind} | {way} | {ms:.2f} | {ms / floor:.2f} | {share:.1e} | {beyond} | {note} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--b-std", type=float, default=0.005)
    parser.add_argument("--check", type=int, default=10**6, help="how many matrices are compared with fp64")
    parser.add_argument(
        "--kinds", default="", help="only kinds of these names, or that contain one of these, separated by ;"
    )
    parser.add_argument("--sweep", action="store_true", help="time many tile shapes")
    parser.add_argument(
        "--tune", action="store_true", help="keep the fastest of --sweep, else of the planner's candidates"
    )
    parser.add_argument("--plan-only", action="store_true", help="only say how long planning takes")
    parser.add_argument("--bnb", action="store_true", help="also time bitsandbytes' dequantize, then addmm")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth = copy_bandwidth()
    machine = (
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, triton {triton.__version__}; "
        f"copy {bandwidth / 1e12:.2f} TB/s; {args.layers} layers of Qwen2-7B's shape, r={args.rank}"
    )
    head = [
        machine,
        "",
        "| kind | way | median ms | × floor | differ from fp64 rounded once | by more than one ulp | note |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    live = outputs(args.layers, BF16)
    rows = []
    wanted = args.kinds.split(";")
    kinds = [k for k in KINDS if k.name in wanted] or [k for k in KINDS if any(w in k.name for w in wanted)]
    for kind in kinds:
        if args.plan_only:
            plan_only(kind, live, args)
            continue
        rows += measure(kind, live, args, bandwidth)
        torch.cuda.empty_cache()
        print(rows[-1], flush=True)
    if args.plan_only:
        return
    print("\n".join(head + rows))
    if args.results:
        args.results.write_text(
            "\n".join(
                [
                    f"# {__doc__.splitlines()[0]}",
                    "",
                    f"`{' '.join(['python', *sys.argv])}`",
                    "",
                    *head,
                    *rows,
                    "",
                ]
            )
        )


if __name__ == "__main__":
    main()
