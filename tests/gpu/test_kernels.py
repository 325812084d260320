"""The merge kernels on a GPU: fresh random inputs, poisoned outputs, fp64 rounded once as the truth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorasync.bnb import packed_base
from lorasync.kernels import GroupedMerge, Int8Base, MergeJob, NestedAbsmax, PackedBase, PlainBase, merge_job
from lorasync.kernels import tune as tuning
from lorasync.kernels.grouped import merge_in_torch
from lorasync.kernels.tune import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
     1.0]
)  # fmt: skip
SHAPES = [
    (1024, 2048, 64),
    (1000, 1234, 7),
    (513, 96, 1),
    (768, 1536, 8),
    (640, 640, 256),
    (1000, 1232, 200),
    (33, 4096, 100),
]


def factors(rows: int, cols: int, r: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.randn(r, cols, device="cuda").mul_(0.02).to(dtype)
    return a, torch.randn(rows, r, device="cuda").mul_(0.01 / r**0.5).to(dtype)


def plain(rows: int, cols: int, dtype: torch.dtype = BF16) -> PlainBase:
    return PlainBase(torch.randn(rows, cols, device="cuda").mul_(0.02).to(dtype))


def packed(rows: int, cols: int, *, nested: bool = False, blocksize: int = 64) -> PackedBase:
    n = rows * cols
    blocks = -(-n // blocksize)
    data = torch.randint(0, 256, (-(-n // 2), 1), dtype=torch.uint8, device="cuda")
    code = NF4.cuda()
    if not nested:
        return PackedBase(data, torch.rand(blocks, device="cuda") * 0.05, code, blocksize, (rows, cols))
    outer = NestedAbsmax(
        torch.rand(-(-blocks // 256), device="cuda") * 0.02, torch.randn(256, device="cuda"), 0.04
    )
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda")
    return PackedBase(data, absmax, code, blocksize, (rows, cols), nested=outer)


def int8(rows: int, cols: int) -> Int8Base:
    q = torch.randint(-127, 128, (rows, cols), dtype=torch.int8, device="cuda")
    return Int8Base(q, torch.rand(rows, device="cuda") * 0.05)


def exact(job: MergeJob) -> torch.Tensor:
    delta = job.scaling * (job.lora_b.double() @ job.lora_a.double())
    value = job.base.dequantize().double() + (delta.T if job.fan_in_fan_out else delta)
    if job.magnitude is None:
        return value
    factor = job.magnitude.double() / value.norm(dim=0 if job.fan_in_fan_out else 1)
    return value * (factor[None, :] if job.fan_in_fan_out else factor[:, None])


def places(x: torch.Tensor) -> torch.Tensor:
    """Values as integers in order: a difference counts ulps."""
    bits = x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32).long()
    return torch.where(bits < 0, -(bits & (2 ** (8 * x.element_size() - 1) - 1)), bits)


def round_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Through fp32 rounded to odd: a direct cast from fp64 may round twice."""
    if dtype == FP32:
        return x.float()
    high = x.float()
    bits, rest = high.view(torch.int32), x - high.double()
    toward_zero = torch.where((rest < 0) != (high < 0), bits - 1, bits)
    return torch.where(rest != 0, toward_zero | 1, bits).view(FP32).to(dtype)


def check(job: MergeJob, *, share: float = 4e-5, allowed: int = 1) -> None:
    """At most this share differs, by one ulp; it grows with Δ/W, the rank and the share of small |W|."""
    job.out.fill_(float("nan"))
    merge_job(job)
    ulps = (places(job.out) - places(round_once(exact(job), job.out.dtype))).abs()
    assert int(ulps.max()) <= allowed
    assert int((ulps > 0).sum()) <= max(8 * allowed, share * ulps.numel())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_plain_bf16(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, cols, r = shape
    out = torch.empty(rows, cols, dtype=BF16, device="cuda")
    check(MergeJob(out, plain(rows, cols), *factors(rows, cols, r, dtype), scaling=2.0))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_trained_adapter_changes_one_element_in_100000_at_most(dtype: torch.dtype) -> None:
    out = torch.empty(4096, 2048, dtype=BF16, device="cuda")
    check(MergeJob(out, plain(4096, 2048), *factors(4096, 2048, 64, dtype), scaling=2.0), share=1e-5)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_plain_fp16(dtype: torch.dtype) -> None:
    out = torch.empty(1024, 2048, dtype=FP16, device="cuda")
    check(MergeJob(out, plain(1024, 2048, FP16), *factors(1024, 2048, 16, dtype), scaling=1.5), share=1e-4)


def test_plain_fp32_is_as_near_as_fp32_sums_are() -> None:
    out = torch.full((512, 2048), float("nan"), device="cuda")
    job = MergeJob(out, plain(512, 2048, FP32), *factors(512, 2048, 64, FP32), scaling=2.0)
    merge_job(job)
    want = exact(job)
    assert float((out.double() - want).norm() / want.norm()) < 6e-8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nested", [False, True])
def test_packed(shape: tuple[int, int, int], nested: bool) -> None:
    rows, cols, r = shape
    out = torch.empty(rows, cols, dtype=BF16, device="cuda")
    check(MergeJob(out, packed(rows, cols, nested=nested), *factors(rows, cols, r, BF16), scaling=2.0))


@pytest.mark.parametrize("blocksize", [32, 128, 256, 512])
def test_packed_blocksizes(blocksize: int) -> None:
    out = torch.empty(512, 1024, dtype=BF16, device="cuda")
    base = packed(512, 1024, blocksize=blocksize)
    check(MergeJob(out, base, *factors(512, 1024, 16, FP32), scaling=2.0))


@pytest.mark.parametrize("cols", [(256, 768), (100, 700)])
def test_a_rectangle_of_a_packed_base(cols: tuple[int, int]) -> None:
    base = packed(512, 1024).rectangle(rows=(128, 384), cols=cols)
    out = torch.empty(base.shape, dtype=BF16, device="cuda")
    check(MergeJob(out, base, *factors(*base.shape, 16, BF16), scaling=2.0))


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_int8(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, cols, r = shape
    out = torch.empty(rows, cols, dtype=BF16, device="cuda")
    check(MergeJob(out, int8(rows, cols), *factors(rows, cols, r, dtype), scaling=2.0))


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_dora_and_fan_in_fan_out(shape: tuple[int, int, int], fan: bool, dtype: torch.dtype) -> None:
    rows, cols, r = shape
    a, b = factors(rows, cols, r, dtype)
    stored = (cols, rows) if fan else (rows, cols)
    out, base = torch.empty(stored, dtype=BF16, device="cuda"), plain(*stored)
    check(MergeJob(out, base, a, b, 2.0, fan))
    check(MergeJob(out, base, a, b, 2.0, fan, torch.rand(rows, device="cuda") + 1))


def test_writes_only_its_slice() -> None:
    fused = torch.full((1536, 2048), 7.0, dtype=BF16, device="cuda")
    for rows, cols in (
        (slice(256, 768), slice(0, 2048)),
        (slice(0, 512), slice(512, 1024)),
        (slice(3, 99), slice(5, 77)),
    ):
        out = fused[rows, cols]
        check(MergeJob(out, plain(*out.shape), *factors(*out.shape, 16, BF16), scaling=2.0))
        out.fill_(7.0)
        assert bool((fused == 7).all())


def test_a_transposed_output() -> None:
    out = torch.empty(512, 256, dtype=BF16, device="cuda").T
    check(MergeJob(out, plain(256, 512), *factors(256, 512, 16, BF16), scaling=2.0))


def test_extreme_factors() -> None:
    a, b = factors(512, 1024, 16, FP32)
    out = torch.empty(512, 1024, dtype=BF16, device="cuda")
    for scale in (1e-18, 1e12):
        check(MergeJob(out, plain(512, 1024), a * scale, b / scale, scaling=2.0))
    check(MergeJob(out, plain(512, 1024), a, torch.zeros_like(b), scaling=2.0), share=0, allowed=0)


def test_cancelled_elements_are_right() -> None:
    base = plain(512, 1024)
    a, b = factors(512, 1024, 16, FP32)
    a[0], b[:, 0] = -base.weight[7].float(), 0
    b[7] = torch.eye(16, device="cuda")[0] / 2
    b[7, 1] = 1e-7
    out = torch.empty(512, 1024, dtype=BF16, device="cuda")
    check(MergeJob(out, base, a, b, scaling=2.0))


def all_kinds() -> list[MergeJob]:
    jobs = []
    for rows, cols, r in SHAPES:
        for base in (
            plain(rows, cols),
            packed(rows, cols),
            packed(rows, cols, nested=True),
            int8(rows, cols),
        ):
            for dtype in (BF16, FP32):
                out = torch.empty(rows, cols, dtype=BF16, device="cuda")
                jobs.append(MergeJob(out, base, *factors(rows, cols, r, dtype), scaling=2.0))
    return jobs


def move(jobs: list[MergeJob]) -> None:
    """New values where the factors lie, and poison where the results go."""
    for job in jobs:
        job.lora_b.normal_(std=0.01 / job.lora_a.shape[0] ** 0.5)
        job.out.fill_(float("nan"))


def check_all(jobs: list[MergeJob]) -> None:
    for job in jobs:
        ulps = (places(job.out) - places(round_once(exact(job), BF16))).abs()
        assert int(ulps.max()) <= 1
        assert int((ulps > 0).sum()) <= max(8, 4e-5 * ulps.numel())


def test_later_runs_which_are_graphs_merge_what_the_factors_hold_then() -> None:
    jobs = all_kinds()
    merge = GroupedMerge(jobs)
    for _ in range(4):
        move(jobs)
        merge.run()
        check_all(jobs)


@pytest.mark.parametrize("runs", [1, 3])
def test_a_group_of_all_kinds_under_a_graph(runs: int) -> None:
    jobs = all_kinds()
    merge = GroupedMerge(jobs)
    for _ in range(runs):
        merge.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merge.run()
    move(jobs)
    graph.replay()
    check_all(jobs)


def test_agrees_with_the_torch_fallback() -> None:
    for base in (plain(512, 1024), packed(512, 1024), int8(512, 1024)):
        job = MergeJob(
            torch.empty(512, 1024, dtype=BF16, device="cuda"),
            base,
            *factors(512, 1024, 16, FP32),
            scaling=2.0,
        )
        other = replace(job, out=torch.empty_like(job.out))
        merge_job(job)
        merge_in_torch(other)
        ulp = torch.maximum(job.out.float().abs(), base.dequantize().float().abs()) * 2**-7
        assert bool(((job.out.float() - other.out.float()).abs() <= ulp).all())


def test_a_tile_that_is_too_large_for_the_gpu_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    large, fitting = Config(256, 256, 8, 256, 0, 8, 3), Config(64, 64, 4, 64, 168, 8, 1)
    monkeypatch.setattr(tuning, "candidates", lambda *_, **__: (large, fitting))
    monkeypatch.setattr(tuning, "known", lambda _: None)
    out = torch.empty(256, 512, dtype=BF16, device="cuda")
    job = MergeJob(out, plain(256, 512), *factors(256, 512, 256, BF16), scaling=2.0)
    assert GroupedMerge([job]).launches[0].config == fitting
    check(job)


def test_planning_writes_nothing() -> None:
    out = torch.full((256, 512), 7.0, dtype=BF16, device="cuda")
    GroupedMerge([MergeJob(out, plain(256, 512), *factors(256, 512, 16, FP32), scaling=2.0)])
    torch.cuda.synchronize()
    assert bool((out == 7).all())


def test_bitsandbytes_dequantizes_to_the_same_bits() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for quant_type in ("nf4", "fp4"):
        for nested in (False, True):
            weight = torch.randn(512, 1024, device="cuda").mul_(0.02).to(BF16)
            data, state = functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
            base = packed_base(data, state)
            want = functional.dequantize_4bit(data, state)
            assert torch.equal(base.dequantize(), want)
            out = torch.empty_like(weight)
            a, b = factors(512, 1024, 16, BF16)
            merge_job(MergeJob(out, base, a, torch.zeros_like(b), scaling=1.0))
            assert torch.equal(out, want)


def test_a_checksum_on_the_gpu_is_the_one_of_torch() -> None:
    from lorasync.kernels.checksum import Checksum, _in_torch

    sizes = (1, 7, 8, 9, 65536, 65537, 200_003, 5_000_000)
    tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda") for size in sizes]
    sums = Checksum(tensors)
    assert sums.now() == f"{_in_torch(tensors) & (1 << 64) - 1:016x}"
    tensors[3][8] ^= 1
    assert sums.now() == f"{_in_torch(tensors) & (1 << 64) - 1:016x}"
