"""A stream of tensors in buckets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasync.bucket import Bucket, Item
from lorasync.transport.base import comes_twice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def buckets(stream: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[Bucket[Item]]:
    """Yield consecutive tensors, together at most ``limit`` bytes (a larger one travels alone).

    Raises:
        MismatchError: if a name comes a second time within a bucket; the worker sees the others.
    """
    bucket: Bucket[Item] = Bucket()
    size = 0
    for name, tensor in stream:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = Bucket(), 0
        if name in bucket:
            raise comes_twice(name)
        bucket[name] = tensor
        size += tensor.nbytes
    if bucket:
        yield bucket
