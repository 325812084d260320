"""Merges on a GPU from bases in host memory or on disk: each base is copied into one buffer and merged from there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorasync.kernels import GroupedMerge, PlainBase

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorasync.kernels import Base, MergeJob
    from lorasync.receive.plan import Row


class StreamedMerges:
    """One merge after another, all planned once; the buffer is as large as the largest base.

    Args:
        rows: What is merged.
        base_of: The base of a row, anew at each run, wherever it lies.
        job_of: How a row is merged from a given base.
        dtype: What bases are in.
        device: The GPU.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        base_of: Callable[[Row], Base],
        job_of: Callable[[Row, Base], MergeJob],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._base_of = base_of
        sizes = {row: torch.Size(row.source.shape).numel() for row in rows}
        buffer = torch.empty(max(sizes.values(), default=0), dtype=dtype, device=device)
        self._merges = []
        for row, size in sizes.items():
            place = buffer[:size].view(row.source.shape)
            self._merges.append((row, place, GroupedMerge([job_of(row, PlainBase(place))])))

    @torch.no_grad()
    def run(self) -> None:
        """Merge all with what bases and factors hold now; the stream keeps copies and merges in order."""
        for row, place, merge in self._merges:
            place.copy_(self._base_of(row).dequantize(), non_blocking=True)
            merge.run()
