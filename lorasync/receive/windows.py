"""Strided windows of tensors, and exactly how many elements several of them cover together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(frozen=True)
class Slice:
    """A strided window of a tensor's storage, in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Slice:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the window over ``tensor``, which must be laid out as the tensor that the slice was taken of."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def end(self) -> int:
        """The first element of the storage after the window."""
        if not self.numel:
            return self.offset
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


@dataclass(frozen=True)
class Row:
    """One copy of the loader: ``param[target] = checkpoint[source]``."""

    name: str
    source: Slice
    param: str
    target: Slice


def is_rectangle(row: Row) -> bool:
    """Whether a row of the plan reads rows and columns of a two-dimensional tensor."""
    return len(row.source.shape) == 2 and row.source.stride[1] == 1


@dataclass(frozen=True)
class Rectangle:
    """Rows and columns of a two-dimensional checkpoint tensor."""

    rows: tuple[int, int]
    cols: tuple[int, int]

    @classmethod
    def of(cls, row: Row, columns: int) -> Rectangle:
        """Return the rectangle that a row of the plan reads, of a contiguous tensor with so many columns."""
        top, left = divmod(row.source.offset, columns)
        height, width = row.source.shape
        assert row.source.stride in ((columns, 1), (width, 1)), row
        return cls((top, top + height), (left, left + width))


def covered(windows: Iterable[Slice]) -> int:
    """Count the elements of one storage that the windows cover, each once.

    Example:
        >>> covered([Slice((4,), (1,), 0), Slice((4,), (1,), 2), Slice((2,), (1,), 10)])
        8
    """
    return sum(_union(group) for group in _groups(windows))


def overlap(left: Slice, right: Slice) -> bool:
    """Whether two windows of one storage have an element in common.

    Example:
        >>> columns = [Slice((3, 2), (4, 1), start) for start in (0, 2)]  # of a 3 x 4 matrix
        >>> overlap(*columns), overlap(columns[0], columns[0])
        (False, True)
    """
    if left.end <= right.offset or right.end <= left.offset:
        return False
    return covered([left, right]) < covered([left]) + covered([right])


def _groups(windows: Iterable[Slice]) -> Iterator[list[Slice]]:
    """Yield windows in groups whose spans meet; windows of different groups have no element in common."""
    group: list[Slice] = []
    end = 0
    for window in sorted((w for w in set(windows) if w.numel), key=lambda w: w.offset):
        if group and window.offset >= end:
            yield group
            group = []
        group.append(window)
        end = max(end, window.end) if len(group) > 1 else window.end
    if group:
        yield group


def _union(group: Sequence[Slice]) -> int:
    start, end = min(w.offset for w in group), max(w.end for w in group)
    if any(w.numel == w.end - w.offset for w in group) and len(group) == 1:
        return group[0].numel
    if all(w.numel == w.end - w.offset for w in group):
        return end - start  # each is without holes, and their spans meet
    marked = torch.zeros(end - start, dtype=torch.bool)
    for window in group:
        marked.as_strided(window.shape, window.stride, window.offset - start).fill_(True)
    return int(marked.count_nonzero())
