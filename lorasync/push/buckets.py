"""A stream of tensors in buckets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasync.transport.base import comes_twice

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def buckets(stream: Iterator[tuple[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Consecutive tensors, together at most ``limit`` bytes (a larger one travels alone).

    Raises:
        MismatchError: if a name comes a second time within a bucket; the worker sees the others.
    """
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in stream:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = {}, 0
        if name in bucket:
            raise comes_twice(name)
        bucket[name] = tensor
        size += tensor.nbytes
    if bucket:
        yield bucket
