"""From jobs to launches: sort by kind, write pointer tables, compile, run.

Imports Triton; `lorasync.kernels.grouped` imports this module where there is a GPU.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton

from lorasync.kernels import tune as tuning
from lorasync.kernels.bases import Int8Base, PackedBase, PlainBase
from lorasync.kernels.triton_merge import dora_factor, mend_rows, merge_tiles
from lorasync.kernels.triton_tiles import FIELDS, TRITON_TYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lorasync.kernels.bases import Base
    from lorasync.kernels.jobs import MergeJob
    from lorasync.kernels.tune import Config

CANCELLED = {torch.bfloat16: 2.0**-16, torch.float16: 2.0**-13, torch.float32: 0.0}
"""Below this share of the row's largest delta, times the steps of 16 ranks after which tensor cores cut off,
fp32's error may come near an ulp: such an element is computed again in fp64."""

FACTOR_BLOCK, MEND_PROGRAMS = 128, 1024


@dataclass(frozen=True)
class Variant:
    """What one compiled kernel is for; jobs of the same variant share a launch."""

    device: torch.device
    kind: int
    base_dtype: torch.dtype
    out_dtype: torch.dtype
    factor_dtype: torch.dtype
    magnitude_dtype: torch.dtype | None
    fan_in_fan_out: bool
    aligned: bool
    r_aligned: bool
    r_pad: int
    blocksize: int
    nested: bool

    @property
    def split(self) -> bool:
        """Whether the factors are fp32 and are multiplied in halves."""
        return self.factor_dtype == torch.float32


class Launch:
    """The jobs of one variant, their tables on the device, and the kernels to launch."""

    def __init__(self, variant: Variant, jobs: Sequence[MergeJob], config: Config) -> None:
        self.variant, self.config = variant, config
        self._factors = [_factors(job, variant.factor_dtype) for job in jobs]
        self._constants = _constants(variant, jobs, config)
        self._buffers = _buffers(variant, jobs, config)
        rows, strips = _table(variant, jobs, [pair for pair, _ in self._factors], self._buffers, config)
        self.n_jobs, self.n_strips = len(rows), sum(strips)
        self._jobs = torch.tensor(rows, dtype=torch.int64).to(variant.device)
        counts = torch.tensor(strips)
        self._strip_jobs = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), counts).to(
            variant.device
        )
        self._max_features = max(job.lora_b.shape[0] for job in jobs)
        self._has_run = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def prime(self) -> None:
        """Compile and load every kernel by a launch on no job: it reads and writes nothing."""
        empty = self._jobs[:1].clone()
        for field in ("rows", "cols"):
            empty[:, FIELDS.index(field)] = 0
        self._run(empty, torch.full((1,), -1, dtype=torch.int32, device=self.variant.device), 1, 1)

    def run(self) -> None:
        """Launch on the current stream; many jobs from the second time on as a CUDA graph, for less of the host's time."""
        on_gpu = self.variant.device.type == "cuda"
        if not on_gpu or self.n_jobs == 1 or torch.cuda.is_current_stream_capturing():
            self._run_all()
            return
        if not self._has_run:  # it may be the only time
            self._has_run = True
            self._run_all()
            return
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Capture a CUDA graph without the garbage collection and the emptied cache that `torch.cuda.graph` adds."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.variant.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.variant.device))
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._run_all()
            finally:
                graph.capture_end()
        return graph

    def _run_all(self) -> None:
        for (lora_a, lora_b), (source_a, source_b) in self._factors:
            if lora_a is not source_a:
                lora_a.copy_(source_a)
            if lora_b is not source_b:
                lora_b.copy_(source_b)
        self._run(self._jobs, self._strip_jobs, self.n_jobs, self.n_strips)

    def _run(self, jobs: Tensor, strip_jobs: Tensor, n_jobs: int, n_strips: int) -> None:
        if n_strips == 0:
            return
        variant, config = self.variant, self.config
        trans = variant.fan_in_fan_out
        if variant.magnitude_dtype is not None:
            self._merge(jobs, strip_jobs, n_strips, norm=True)
            blocks = triton.cdiv(self._max_features, FACTOR_BLOCK)
            dora_factor[(n_jobs, blocks)](
                jobs,
                M_TYPE=TRITON_TYPES[variant.magnitude_dtype],
                TRANS=trans,
                TILE=config.bm if trans else config.bn,
                BF=FACTOR_BLOCK,
            )
        self._buffers["cancelled"][:1].zero_()
        self._merge(jobs, strip_jobs, n_strips, norm=False)
        if self._constants["LIMIT"] > 0:
            self._mend(jobs, strip_jobs)

    def _merge(self, jobs: Tensor, strip_jobs: Tensor, n_strips: int, *, norm: bool) -> None:
        cancelled = self._buffers["cancelled"]
        arguments = (jobs, strip_jobs, cancelled, cancelled.numel() - 1)
        options = {"num_warps": self.config.warps, "enable_fp_fusion": False}
        if self.config.registers:
            options["maxnreg"] = self.config.registers
        merge_tiles[(n_strips,)](*arguments, NORM=norm, **self._constants, **options)

    def _mend(self, jobs: Tensor, strip_jobs: Tensor) -> None:
        cancelled = self._buffers["cancelled"]
        skipped = ("SPLIT", "R_ALIGNED", "EXACT", "LIMIT", "RK", "STAGES", "EVEN")
        constants = {name: value for name, value in self._constants.items() if name not in skipped}
        mend_rows[(MEND_PROGRAMS,)](
            jobs,
            strip_jobs,
            cancelled,
            cancelled.numel() - 1,
            PROGRAMS=MEND_PROGRAMS,
            enable_fp_fusion=False,
            **constants,
        )


def plan(jobs: Sequence[MergeJob], *, tune: bool = False) -> tuple[Launch, ...]:
    """Sort jobs by variant, choose tile shapes, write the tables and compile; no ``out`` is touched."""
    groups: dict[Variant, list[MergeJob]] = defaultdict(list)
    for job in jobs:
        groups[variant_of(job)].append(job)
    launches = []
    for variant, members in groups.items():
        with _on(variant.device):
            launches.append(_primed(variant, members, choose(variant, members, tune=tune)))
    return tuple(launches)


def _primed(variant: Variant, jobs: Sequence[MergeJob], choice: Config) -> Launch:
    """Compile a launch; where the chosen tile needs more shared memory than the GPU has, with another tile."""
    for config in dict.fromkeys((choice, *_candidates(variant))):
        launch = Launch(variant, jobs, config)
        try:
            launch.prime()
        except triton.OutOfResources as error:
            too_large = error
        else:
            return launch
    raise too_large


def _candidates(variant: Variant) -> tuple[Config, ...]:
    return tuning.candidates(variant.r_pad, split=variant.split, aligned=variant.aligned)


def choose(variant: Variant, jobs: Sequence[MergeJob], *, tune: bool) -> Config:
    """Pick the tile shape: what was measured here before, else (``tune``) now, else what is shipped."""
    choices = _candidates(variant)
    key = tuning_key(variant)
    stored = tuning.known(key)
    if stored is not None or not tune:
        return stored or choices[0]
    sample = _scratch_jobs(jobs)
    return tuning.fastest(key, choices, lambda config: _time(Launch(variant, sample, config)))


def variant_of(job: MergeJob) -> Variant:
    """Say which kernel a job needs."""
    base = job.base
    packed = base if isinstance(base, PackedBase) else None
    a, b = job.lora_a, job.lora_b
    r = a.shape[0]
    mixed = a.dtype != b.dtype
    return Variant(
        device=job.out.device,
        kind=(PlainBase, PackedBase, Int8Base).index(type(base)),
        base_dtype=base.dtype,
        out_dtype=job.out.dtype,
        factor_dtype=torch.float32 if mixed else a.dtype,
        magnitude_dtype=None if job.magnitude is None else job.magnitude.dtype,
        fan_in_fan_out=job.fan_in_fan_out,
        aligned=not mixed and _aligned(job),
        r_aligned=not mixed and r % 8 == 0 and _vectors(b),
        r_pad=max(16, triton.next_power_of_2(r)),
        blocksize=packed.blocksize if packed else 0,
        nested=packed is not None and packed.nested is not None,
    )


def _aligned(job: MergeJob) -> bool:
    """Whether rows of everything start at 16 bytes, so that loads and stores go by whole vectors."""
    base = job.base
    if isinstance(base, PackedBase):
        whole_blocks = not any(n % base.blocksize for n in (base.shape[1], base.stride, base.offset))
        base_fits = whole_blocks and base.packed.data_ptr() % 16 == 0
    else:
        base_fits = _vectors(base.weight)
    across = job.out.shape if job.fan_in_fan_out else job.out.shape[1:]
    return base_fits and _vectors(job.out) and _vectors(job.lora_a) and not any(n % 16 for n in across)


def _vectors(tensor: Tensor) -> bool:
    row = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and row % 16 == 0 and tensor.data_ptr() % 16 == 0


def _factors(job: MergeJob, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the factors as the kernel wants them, and as they were given; mostly the same tensors."""
    given = (job.lora_a, job.lora_b)
    lora_a, lora_b = (t if t.dtype == dtype and t.stride(1) == 1 else t.to(dtype).contiguous() for t in given)
    return (lora_a, lora_b), given


def _constants(variant: Variant, jobs: Sequence[MergeJob], config: Config) -> dict[str, Any]:
    return {
        "KIND": variant.kind,
        "W_TYPE": TRITON_TYPES[variant.base_dtype],
        "OUT_TYPE": TRITON_TYPES[variant.out_dtype],
        "AB_TYPE": TRITON_TYPES[variant.factor_dtype],
        "SPLIT": variant.split and variant.device.type == "cuda",
        "TRANS": variant.fan_in_fan_out,
        "ALIGNED": variant.aligned,
        "R_ALIGNED": variant.r_aligned,
        "R_PAD": variant.r_pad,
        "BLOCK": variant.blocksize,
        "NESTED": variant.nested,
        "DORA": variant.magnitude_dtype is not None,
        "EXACT": variant.out_dtype != torch.float32,
        "LIMIT": CANCELLED[variant.out_dtype] * max(4, variant.r_pad // 16),
        "BM": config.bm,
        "BN": config.bn,
        "RK": config.rk,
        "STRIP": config.strip,
        "STAGES": config.stages,
        "EVEN": variant.aligned and _even(jobs, variant, config),
        "ASM": variant.device.type == "cuda",
    }


def _even(jobs: Sequence[MergeJob], variant: Variant, config: Config) -> bool:
    """Whether every tile of every job is whole, and every rank the padded one."""
    whole = all(not (job.out.shape[0] % config.bm or job.out.shape[1] % config.bn) for job in jobs)
    return whole and all(job.lora_a.shape[0] == variant.r_pad for job in jobs)


def _buffers(variant: Variant, jobs: Sequence[MergeJob], config: Config) -> dict[str, Tensor]:
    """Allocate what one kernel leaves for the next: the list of cancelled rows, DoRA's partial norms and factors."""
    elements = sum(job.out.numel() for job in jobs)
    sizes = {"partial": 0, "factor": 0, "cancelled": min(1 << 20, 1024 + elements // 1024)}
    if variant.magnitude_dtype is not None:
        sizes["partial"] = sum(_parts(job, config) * job.lora_b.shape[0] for job in jobs)
        sizes["factor"] = 2 * sum(job.lora_b.shape[0] for job in jobs)
    dtypes = {"partial": torch.float32, "factor": torch.float32, "cancelled": torch.int64}
    return {name: torch.empty(n, dtype=dtypes[name], device=variant.device) for name, n in sizes.items()}


def _parts(job: MergeJob, config: Config) -> int:
    size = config.bm if job.fan_in_fan_out else config.bn
    return -(-job.lora_a.shape[1] // size)


def _table(
    variant: Variant,
    jobs: Sequence[MergeJob],
    factors: Sequence[tuple[Tensor, Tensor]],
    buffers: dict[str, Tensor],
    config: Config,
) -> tuple[list[list[int]], list[int]]:
    """Return the job table, one row a job, and how many strips each job has."""
    table, strips, first, features, parts = [], [], 0, 0, 0
    for job, pair in zip(jobs, factors, strict=True):
        rows, cols = job.out.shape
        row = _job_fields(job, pair) | _base_fields(job.base) | {"first_strip": first}
        row["partial"] = buffers["partial"].data_ptr() + 4 * parts
        row["factor"] = buffers["factor"].data_ptr() + 8 * features
        table.append([row.get(field, 0) for field in FIELDS])
        strips.append(triton.cdiv(rows, config.bm) * triton.cdiv(cols, config.bn * config.strip))
        first += strips[-1]
        if variant.magnitude_dtype is not None:
            features += job.lora_b.shape[0]
            parts += _parts(job, config) * job.lora_b.shape[0]
    return table, strips


def _job_fields(job: MergeJob, factors: tuple[Tensor, Tensor]) -> dict[str, int]:
    lora_a, lora_b = factors
    return {
        "out": job.out.data_ptr(),
        "lora_a": lora_a.data_ptr(),
        "lora_b": lora_b.data_ptr(),
        "rows": job.out.shape[0],
        "cols": job.out.shape[1],
        "r": lora_a.shape[0],
        "out_stride0": job.out.stride(0),
        "out_stride1": job.out.stride(1),
        "lora_a_stride": lora_a.stride(0),
        "lora_b_stride": lora_b.stride(0),
        "scaling": _bits(job.scaling),
        "magnitude": 0 if job.magnitude is None else job.magnitude.data_ptr(),
    }


def _base_fields(base: Base) -> dict[str, int]:
    if isinstance(base, PackedBase):
        fields = {
            "base": base.packed.data_ptr(),
            "base_stride0": base.stride,
            "base_offset": base.offset,
            "scales": base.absmax.data_ptr(),
            "code": base.code.data_ptr(),
        }
        if base.nested is not None:
            fields["nested_absmax"] = base.nested.absmax.data_ptr()
            fields["nested_code"] = base.nested.code.data_ptr()
            fields["nested_offset"] = _bits(base.nested.offset)
        return fields
    weight = base.weight
    fields = {"base": weight.data_ptr(), "base_stride0": weight.stride(0), "base_stride1": weight.stride(1)}
    return fields | ({"scales": base.scales.data_ptr()} if isinstance(base, Int8Base) else {})


def _bits(value: float) -> int:
    """Return the int64 that has the bits of a float64."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def _scratch_jobs(jobs: Sequence[MergeJob], limit: int = 64 << 20) -> list[MergeJob]:
    """Repeat the largest job, up to ``limit`` bytes and with outputs of its own, so that it can be timed."""
    job = max(jobs, key=lambda j: j.out.numel())
    out = torch.empty_like(job.out, memory_format=torch.contiguous_format)
    return [replace(job, out=out)] * max(1, min(4, limit // max(1, out.numel() * out.element_size())))


def _time(launch: Launch) -> float:
    """Return the milliseconds of one run, the best of five after a first; infinite where it does not fit on the GPU."""
    try:
        launch.run()
    except triton.OutOfResources:
        return math.inf
    times: list[float] = []
    event = partial(torch.cuda.Event, enable_timing=True)
    for _ in range(5):
        start, end = event(), event()
        start.record()
        launch.run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def tuning_key(variant: Variant) -> str:
    """Return the key that a measured choice is kept under: the GPU, Triton's version and the kind of merge."""
    gpu = torch.cuda.get_device_name(variant.device) if variant.device.type == "cuda" else "interpreter"
    parts = [str(value) for name, value in vars(variant).items() if name != "device"]
    return "|".join((gpu, f"triton {triton.__version__}", *parts))


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device if device.type == "cuda" else -1)
