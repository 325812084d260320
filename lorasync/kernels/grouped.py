"""`GroupedMerge`: a whole model's merges, planned once and run as often as the policy changes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from lorasync.kernels.jobs import check_jobs
from lorasync.merge import lora_delta, merge_dora, merge_lora

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasync.kernels.jobs import MergeJob
    from lorasync.kernels.launch import Launch


class GroupedMerge:
    """A list of merges in as few launches as there are kinds of them.

    Planning checks every job, sorts the jobs by kind (dtypes, base, rank), writes one table of pointers for
    each kind and compiles its kernel; nothing is written into any ``out``. `run` then reads whatever the same
    storages hold at that moment: refill ``lora_a`` and ``lora_b`` in place and run again. On a CPU, or
    without Triton, the jobs run one by one, with `lorasync.merge`'s arithmetic, which is PEFT's.

    Args:
        jobs: The merges. The storages must stay where they are for as long as this object is used.
        tune: Time a few tile shapes on this GPU and remember the best on disk, where none is known yet.

    Raises:
        MismatchError: Shapes, dtypes or devices don't fit; all of them are named.

    Example:
        >>> import torch
        >>> from lorasync.kernels import GroupedMerge, MergeJob, PlainBase
        >>> out, a, b = torch.empty(2, 3), torch.ones(1, 3), torch.ones(2, 1)
        >>> merge = GroupedMerge([MergeJob(out, PlainBase(torch.zeros(2, 3)), a, b, scaling=0.5)])
        >>> merge.run()
        >>> out.tolist()
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
        >>> _ = a.fill_(2)
        >>> merge.run()
        >>> out.tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    def __init__(self, jobs: Sequence[MergeJob], *, tune: bool = False) -> None:
        check_jobs(jobs)
        self.jobs = tuple(jobs)
        self.launches: tuple[Launch, ...] = _launches(self.jobs, tune=tune) if _on_gpu(self.jobs) else ()

    def run(self) -> None:
        """Merge every job with what its factors hold now, on the current stream; may be graph-captured."""
        if self.launches:
            for launch in self.launches:
                launch.run()
            return
        for job in self.jobs:
            merge_in_torch(job)

    @property
    def traffic(self) -> int:
        """The bytes that one run must move at least: each base read once, each result written once."""
        return sum(_traffic(job) for job in self.jobs)


def merge_job(job: MergeJob) -> None:
    """Run one merge now; for many, or the same one again, use `GroupedMerge`.

    Example:
        >>> import torch
        >>> from lorasync.kernels import MergeJob, PlainBase, merge_job
        >>> out = torch.empty(1, 2)
        >>> merge_job(
        ...     MergeJob(out, PlainBase(torch.ones(1, 2)), torch.ones(4, 2), torch.ones(1, 4), scaling=0.25)
        ... )
        >>> out.tolist()
        [[2.0, 2.0]]
    """
    GroupedMerge([job]).run()


@torch.no_grad()
def merge_in_torch(job: MergeJob) -> None:
    """Run one merge with `lorasync.merge`'s arithmetic, on whatever device it lies."""
    base = job.base.dequantize()
    fan = job.fan_in_fan_out
    if job.magnitude is None:
        merge_lora(base, job.lora_a, job.lora_b, job.scaling, fan_in_fan_out=fan, out=job.out)
        return
    delta = lora_delta(job.lora_a, job.lora_b, job.scaling, fan_in_fan_out=fan)
    job.out.copy_(merge_dora(base, delta, job.magnitude, out_dim=int(fan)))


def _on_gpu(jobs: Sequence[MergeJob]) -> bool:
    return bool(jobs) and jobs[0].out.device.type == "cuda" and find_spec("triton") is not None


def _launches(jobs: Sequence[MergeJob], *, tune: bool) -> tuple[Launch, ...]:
    from lorasync.kernels.launch import plan

    return plan(jobs, tune=tune)


def _traffic(job: MergeJob) -> int:
    return job.base.traffic + job.out.numel() * job.out.element_size()
