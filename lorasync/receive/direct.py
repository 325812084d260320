"""Writing straight into slices of the live weights: copies, and merges by one grouped launch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lorasync.bucket import Latest
from lorasync.kernels import GroupedMerge, PendingMerge
from lorasync.receive.windows import Rectangle, is_rectangle

if TYPE_CHECKING:
    from lorasync.bucket import Bucket, Item
    from lorasync.kernels import MergeJob
    from lorasync.receive.live import LiveModel
    from lorasync.receive.windows import Row


@dataclass
class Direct:
    """A sorted bucket.

    Attributes:
        targets: Slices of live weights that are copied to.
        sources: What is copied to each target.
        jobs: Merges into slices of live weights.
        params: The parameters that these copies and merges write to.
        others: What the writer has to look at tensor by tensor.
    """

    targets: list[torch.Tensor] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)
    jobs: list[MergeJob] = field(default_factory=list)
    params: set[str] = field(default_factory=set)
    others: dict[str, Item] = field(default_factory=dict)
    _merge: GroupedMerge | None = None

    @torch.no_grad()
    def write(self) -> None:
        """Copy and merge with what the sources hold now."""
        if self.targets:
            torch._foreach_copy_(self.targets, self.sources, non_blocking=True)
        if self.jobs:
            self._merge = self._merge or GroupedMerge(self.jobs)
            self._merge.run()


class DirectWrites:
    """Sorts buckets. A bucket that is reused (same key, same storages) is sorted, and its merges planned, only once."""

    def __init__(self, live: LiveModel) -> None:
        self._live = live
        self._latest = Latest[Direct]()

    def of(self, bucket: Bucket[Item]) -> Direct:
        """Return the bucket, sorted."""
        return self._latest.get(bucket.key, lambda: self._sorted(bucket))

    def _sorted(self, bucket: Bucket[Item]) -> Direct:
        found = Direct()
        for name, item in bucket.items():
            rows = self._live.plan.rows_of(name)
            if self._live.unit_of(name) is not None or not self._is_plain(rows, item):
                found.others[name] = item
                continue
            found.params |= {row.param for row in rows}
            for row in rows:
                if isinstance(item, PendingMerge):
                    found.jobs.append(_job(self._live, row, item))
                else:
                    found.targets.append(self._live.live_slice(row.param, row.target))
                    found.sources.append(row.source.view(item))
        return found

    def _is_plain(self, rows: tuple[Row, ...], item: Item) -> bool:
        if not rows or any(row.param not in self._live.direct for row in rows):
            return False
        if isinstance(item, PendingMerge):
            return item.lora_a.is_cuda and all(map(is_rectangle, rows))
        return item.is_contiguous()


def _job(live: LiveModel, row: Row, merge: PendingMerge) -> MergeJob:
    """Return the part of a merge that a row of the load plan puts into the live weights."""
    part = Rectangle.of(row, merge.shape[1])
    return merge.job(live.live_slice(row.param, row.target), rows=part.rows, cols=part.cols, name=row.name)
