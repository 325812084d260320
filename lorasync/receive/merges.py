"""Merges done straight into the live weights, by one grouped launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasync.kernels import PendingMerge, RepeatedMerge
from lorasync.receive.base import Rectangle, is_rectangle

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasync.kernels import MergeJob
    from lorasync.receive.live import LiveModel
    from lorasync.receive.plan import Row


class LiveMerges:
    """Runs pending merges into the live weights; they are planned once for as long as the same ones come."""

    def __init__(self, live: LiveModel) -> None:
        self._live = live
        self._merge = RepeatedMerge()

    def takes(self, name: str, pending: PendingMerge) -> bool:
        """Whether the merge can go straight into the weights: all of them plain slices on a GPU."""
        rows = self._live.plan.rows_of(name)
        plain = all(is_rectangle(row) and row.param in self._live.direct for row in rows)
        return pending.lora_a.is_cuda and bool(rows) and plain

    def run(self, pending: Mapping[str, PendingMerge]) -> None:
        """Do these merges; `takes` has said yes to each."""
        self._merge.run(
            pending,
            lambda: [
                job_of(self._live, row, merge)
                for name, merge in pending.items()
                for row in self._live.plan.rows_of(name)
            ],
        )


def job_of(live: LiveModel, row: Row, merge: PendingMerge) -> MergeJob:
    """The part of a merge that a row of the load plan puts into the live weights."""
    part = Rectangle.of(row, merge.shape[1])
    return merge.job(live.live_slice(row.param, row.target), rows=part.rows, cols=part.cols, name=row.name)
