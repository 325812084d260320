"""Run the Triton kernels in Triton's interpreter; `tests/kernels/test_kernels.py` starts this file as a process.

The interpreter cuts where a GPU rounds to bf16, and multiplies no bf16: so weights are fp16 and fp32 here.
What only a GPU has (bf16 thirds, the shuffled look-up, tensor cores' sums) is in `tests/gpu/`.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import replace

import torch

from lorasync.kernels import Int8Base, MergeJob, NestedAbsmax, PackedBase, PlainBase, launch
from lorasync.kernels import tune as tuning
from lorasync.kernels.checksum import Checksum
from lorasync.kernels.triton_checksum import WordSum
from lorasync.kernels.tune import Config

FP16, FP32 = torch.float16, torch.float32


def small_tiles(r_pad: int, *, split: bool, aligned: bool) -> tuple[Config, ...]:
    return (Config(32, 64, 4, 16 if split else r_pad, 0, 2, 1 + aligned),)


def factors(n_out: int, n_in: int, r: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randn(r, n_in) * 0.02).to(dtype), (torch.randn(n_out, r) * 0.02).to(dtype)


def plain(rows: int, cols: int) -> PlainBase:
    return PlainBase((torch.randn(rows, cols) * 0.05).to(FP16))


def packed(rows: int, cols: int, *, nested: bool = False, blocksize: int = 64) -> PackedBase:
    blocks = -(-rows * cols // blocksize)
    data = torch.randint(0, 256, (-(-rows * cols // 2),), dtype=torch.uint8)
    code = torch.linspace(-1, 1, 16)
    if not nested:
        return PackedBase(data, torch.rand(blocks) * 0.1, code, blocksize, (rows, cols), FP16)
    inner = NestedAbsmax(torch.rand(-(-blocks // 256)), torch.randn(256) * 0.02, 0.05)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    return PackedBase(data, absmax, code, blocksize, (rows, cols), FP16, inner)


def int8(rows: int, cols: int) -> Int8Base:
    return Int8Base(torch.randint(-127, 128, (rows, cols), dtype=torch.int8), torch.rand(rows) * 0.1)


def exact(job: MergeJob) -> torch.Tensor:
    delta = job.scaling * (job.lora_b.double() @ job.lora_a.double())
    value = job.base.dequantize().double() + (delta.T if job.fan_in_fan_out else delta)
    if job.magnitude is None:
        return value
    factor = job.magnitude.double() / value.norm(dim=0 if job.fan_in_fan_out else 1)
    return value * (factor[None, :] if job.fan_in_fan_out else factor[:, None])


def check(jobs: list[MergeJob]) -> int:
    """Run poisoned; compare with fp64; return the number of launches."""
    for job in jobs:
        job.out.fill_(float("nan"))
    launches = launch.plan(jobs)
    assert all(bool(job.out.isnan().all()) for job in jobs), "planning wrote"
    for one in launches:
        one.run()
    for job in jobs:
        want = exact(job).to(FP16)
        ulp = torch.finfo(FP16).eps * want.float().abs().clamp_min(2**-14)
        gap = (job.out.float() - want.float()).abs()
        assert bool((gap <= ulp).all()), job.name
        assert int((gap > 0).sum()) <= 0.002 * gap.numel() + 1, job.name
    return len(launches)


def job(
    base: PlainBase | PackedBase | Int8Base,
    r: int,
    dtype: torch.dtype,
    *,
    fan: bool = False,
    dora: bool = False,
) -> MergeJob:
    n_out, n_in = reversed(base.shape) if fan else base.shape
    magnitude = torch.rand(n_out) + 1 if dora else None
    name = f"{type(base).__name__} {base.shape} r={r} {dtype} fan={fan} dora={dora}"
    out = torch.empty(base.shape, dtype=FP16)
    return MergeJob(out, base, *factors(n_out, n_in, r, dtype), 2.0, fan, magnitude, name)


def main() -> None:
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    tuning.candidates = small_tiles
    launch.MEND_PROGRAMS = 2
    shapes = [(64, 128, 16), (50, 70, 5), (32, 64, 16), (33, 47, 1), (64, 256, 20)]
    jobs = [job(plain(m, n), r, t) for m, n, r in shapes for t in (FP16, FP32)]
    jobs += [job(plain(m, n), r, FP16, fan=fan, dora=True) for m, n, r in shapes[:4] for fan in (False, True)]
    jobs += [job(packed(m, n, nested=nested), r, FP16) for m, n, r in shapes[:4] for nested in (False, True)]
    jobs += [job(packed(64, 128, blocksize=size), 16, FP32) for size in (32, 128)]
    jobs += [
        job(packed(64, 128).rectangle(rows=(8, 40), cols=cols), 16, FP16) for cols in ((64, 128), (5, 77))
    ]
    jobs += [job(int8(m, n), r, FP32) for m, n, r in shapes[:4]]
    assert check(jobs) < len(jobs), "jobs of one kind must share a launch"

    fused = torch.full((200, 256), 7.0, dtype=FP16)
    inner = replace(job(int8(64, 128), 16, FP32), out=fused[32:96, 64:192])
    check([inner, replace(job(plain(40, 64), 16, FP16), out=torch.empty(64, 40, dtype=FP16).T)])
    inner.out.fill_(7.0)
    assert bool((fused == 7).all()), "wrote beside its slice"

    lost = job(plain(64, 128), 16, FP32)
    lost.base.weight[7] *= 1000
    lost.lora_a[0], lost.lora_b[7] = -lost.base.weight[7].float(), 0
    lost.lora_b[7, 0], lost.lora_b[7, 1] = 0.5, 0.01
    check([replace(lost, name="a cancelled row")])

    sizes = (1, 7, 8, 9, 65536, 65537, 200_003)
    bytes_ = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    for _ in range(2):
        assert (WordSum(bytes_).run() - int(Checksum(bytes_).now(), 16)) % (1 << 64) == 0, "the checksum"
        bytes_[3][8] ^= 1


if __name__ == "__main__":
    main()
