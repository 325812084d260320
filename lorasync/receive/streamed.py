"""Merging on a GPU from bases in host memory or on disk: each base is copied into one buffer, and merged from there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorasync.kernels import GroupedMerge, PlainBase

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorasync.kernels import Base, MergeJob
    from lorasync.receive.windows import Row


class StreamedMerges:
    """Merges one row after another through one buffer; all merges are planned once, and run any number of times.

    Args:
        rows: What is merged.
        base_of: Returns the base of a row; asked at each run.
        job_of: Returns the merge of a row from a given base.
        buffer: Where each base is copied to; from `buffer_for`. Several objects may share it.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        base_of: Callable[[Row], Base],
        job_of: Callable[[Row, Base], MergeJob],
        buffer: torch.Tensor,
    ) -> None:
        self._base_of = base_of
        self._merges = []
        for row in rows:
            place = buffer[: _elements(row)].view(row.source.shape)
            self._merges.append((row, place, GroupedMerge([job_of(row, PlainBase(place))])))

    @torch.no_grad()
    def run(self) -> None:
        """Merge all rows, with the values that bases and factors have now; the stream keeps copies and merges in order."""
        for row, place, merge in self._merges:
            place.copy_(self._base_of(row).dequantize(), non_blocking=True)
            merge.run()


def buffer_for(rows: Sequence[Row], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate memory for the largest of these rows."""
    return torch.empty(max(map(_elements, rows), default=0), dtype=dtype, device=device)


def _elements(row: Row) -> int:
    return torch.Size(row.source.shape).numel()
