"""One merge as data, and the check of a list of them before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorasync.errors import Mismatch, MismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorasync.kernels.bases import Base

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class MergeJob:
    """Write round(W + s·B·A) into ``out``; with ``magnitude`` DoRA's m / ‖W + s·B·A‖ · (W + s·B·A).

    Args:
        out: Where the result goes: bf16, fp16 or fp32, W's shape, any strides (a slice of a fused weight).
        base: W, which is only read; it must not overlap ``out`` where the job is to run more than once.
        lora_a: A, of shape (r, in_features).
        lora_b: B, of shape (out_features, r).
        scaling: s.
        fan_in_fan_out: Whether W is stored as (in_features, out_features).
        magnitude: DoRA's m, of shape (out_features,), or None.
        name: What errors call the job.
    """

    out: Tensor
    base: Base
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    fan_in_fan_out: bool = False
    magnitude: Tensor | None = None
    name: str = ""


@dataclass(frozen=True, eq=False)
class PendingMerge:
    """A merge that is not done yet: who holds the live weights does it straight into them, others call `make` for a tensor.

    Args:
        base: W, which is only read.
        lora_a: A, of shape (r, in_features).
        lora_b: B, of shape (out_features, r).
        scaling: s.
        dtype: What the result is rounded to.
        make: Computes the merged weight.
        fan_in_fan_out: Whether W is stored as (in_features, out_features).
        magnitude: DoRA's m, of shape (out_features,), or None.
    """

    base: Base
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dtype: torch.dtype
    make: Callable[[], Tensor]
    fan_in_fan_out: bool = False
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the merged weight."""
        return tuple(self.base.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the merged weight."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        """Where W and the factors lie."""
        return self.lora_a.device

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """A, B and, for DoRA, m."""
        return (self.lora_a, self.lora_b, *(() if self.magnitude is None else (self.magnitude,)))

    def tensors(self) -> list[Tensor]:
        """List all that the merge reads."""
        return [*(tensor for _, tensor in self.base.tensors()), *self.factors]

    def whole_job(self, out: Tensor, *, name: str = "") -> MergeJob:
        """Say how to merge all of W into ``out``."""
        height, width = self.shape
        return self.job(out, rows=(0, height), cols=(0, width), name=name)

    def job(self, out: Tensor, *, rows: tuple[int, int], cols: tuple[int, int], name: str = "") -> MergeJob:
        """Say how to merge these rows and columns of W into ``out``."""
        outs, ins = (cols, rows) if self.fan_in_fan_out else (rows, cols)
        return MergeJob(
            out=out,
            base=self.base.rectangle(rows=rows, cols=cols),
            lora_a=self.lora_a[:, slice(*ins)],
            lora_b=self.lora_b[slice(*outs)],
            scaling=self.scaling,
            fan_in_fan_out=self.fan_in_fan_out,
            magnitude=None if self.magnitude is None else self.magnitude[slice(*outs)],
            name=name,
        )


def check_jobs(jobs: Sequence[MergeJob]) -> None:
    """Raise one `MismatchError` for everything that is wrong with any job."""
    found = [m for i, job in enumerate(jobs) for m in _mismatches(job, job.name or f"job {i}")]
    if found:
        raise MismatchError("These merges can't run; nothing was written.", found)


def _mismatches(job: MergeJob, name: str) -> list[Mismatch]:
    return [*_shape_mismatches(job, name), *_dtype_mismatches(job, name), *_device_mismatches(job, name)]


def _shape_mismatches(job: MergeJob, name: str) -> list[Mismatch]:
    if job.lora_a.ndim != 2 or job.lora_b.ndim != 2 or job.lora_a.shape[0] != job.lora_b.shape[1]:
        got = f"A {tuple(job.lora_a.shape)}, B {tuple(job.lora_b.shape)}"
        return [Mismatch(name, got, "A (r, in), B (out, r)", "Gather both factors whole.")]
    n_out, n_in = job.lora_b.shape[0], job.lora_a.shape[1]
    expected = (n_in, n_out) if job.fan_in_fan_out else (n_out, n_in)
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [
        ("out", tuple(job.out.shape), expected),
        ("base", tuple(job.base.shape), expected),
    ]
    if job.magnitude is not None:
        shapes.append(("magnitude", tuple(job.magnitude.flatten().shape), (n_out,)))
    fix = "Is the adapter for this weight, and is fan_in_fan_out right?"
    return [Mismatch(f"{name}.{part}", str(got), str(want), fix) for part, got, want in shapes if got != want]


def _dtype_mismatches(job: MergeJob, name: str) -> list[Mismatch]:
    parts = {
        "out": job.out.dtype,
        "base": job.base.dtype,
        "lora_a": job.lora_a.dtype,
        "lora_b": job.lora_b.dtype,
    }
    expected = "bfloat16, float16 or float32"
    return [
        Mismatch(f"{name}.{part}", str(dtype), expected, "Cast it.")
        for part, dtype in parts.items()
        if dtype not in FLOATS
    ]


def _device_mismatches(job: MergeJob, name: str) -> list[Mismatch]:
    parts = [("lora_a", job.lora_a), ("lora_b", job.lora_b), *job.base.tensors()]
    if job.magnitude is not None:
        parts.append(("magnitude", job.magnitude))
    return [
        Mismatch(f"{name}.{part}", str(tensor.device), str(job.out.device), "Move it there.")
        for part, tensor in parts
        if tensor.device != job.out.device
    ]
