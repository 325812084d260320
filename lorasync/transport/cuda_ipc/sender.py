"""The trainer's side of CUDA IPC: what workers on the same GPU may read, and how they find it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from lorasync.bucket import Lent, items_of, made
from lorasync.kernels import PendingMerge, RepeatedMerge
from lorasync.kernels.checksum import Checksum
from lorasync.transport.base import Parcel, Place
from lorasync.transport.cuda_ipc.handle import NAME, NO_SHARED_GPU, Handle, gpu_of, handles_as_text
from lorasync.transport.cuda_ipc.items import Parts, Storages, as_text, is_lendable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lorasync.bucket import Bucket, Item

_ALIGN = 256


class Sender:
    """Shows one bucket after another to the workers on the trainer's GPU.

    What a source lends is read where it lies in the trainer's model. What it had to make is put into a buffer, which
    the next bucket uses again. Handles and layouts are kept for as long as the same things lie in the same places.
    """

    name = NAME
    overlaps = False  # what was made lies in one buffer

    def __init__(self, export: Callable[[torch.Tensor], Handle] = Handle.of) -> None:
        self._export = export
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._pages: dict[str, _Page] = {}  # by the bucket's first name

    def offer(self) -> dict[str, str] | None:
        """Workers on a GPU of this host may try; None without a GPU, or where processes can't read each other's memory."""
        return {} if torch.cuda.is_available() and not os.environ.get(NO_SHARED_GPU) else None

    def takes(self, bucket: Bucket, place: Place) -> bool:
        """Whether all of it lies on the GPU that all the engine's workers are on."""
        devices = (
            bucket.devices if isinstance(bucket, Lent) else {tensor.device for tensor in bucket.values()}
        )
        return bool(place.gpu) and len(devices) == 1 and gpu_of(next(iter(devices))) == place.gpu

    def release(self) -> None:
        """Keep the buffer: the next push needs it again."""

    def close(self) -> None:
        """Let go of the buffer and of what was shown."""
        self._buffer, self._pages = torch.empty(0, dtype=torch.uint8), {}

    def put(self, bucket: Bucket) -> Parcel:
        """Make a bucket readable, and say how to read it; it is all there when this returns."""
        items = items_of(bucket)
        first = next(iter(items))
        page = self._pages.get(first)
        if page is None or not page.is_of(bucket):
            copied = [name for name, item in items.items() if not is_lendable(item)]
            self._make_room([items[name] for name in copied])
            places = _places(self._buffer, {name: items[name] for name in copied})
            page = self._pages[first] = _Page(bucket, items, places, self._export)
        return page.written(items)

    def _make_room(self, copied: list[Item]) -> None:
        size = sum(_padded(item.nbytes) for item in copied)
        if size and (self._buffer.device != copied[0].device or self._buffer.numel() < size):
            self._buffer = torch.zeros(size, dtype=torch.uint8, device=copied[0].device)
            self._pages = {}


class _Page:
    """How one bucket is read; kept, as the same bucket comes with each push."""

    def __init__(
        self,
        bucket: Bucket,
        items: Mapping[str, Item],
        places: dict[str, torch.Tensor],
        export: Callable[[torch.Tensor], Handle],
    ) -> None:
        self._of = bucket if isinstance(bucket, Lent) else _layout(bucket)
        self._places = places
        shown: dict[str, Item] = {**items, **places}
        storages, parts = Storages(), Parts.of(shown)
        self._layout = as_text(shown, storages)
        self._handles = handles_as_text([export(tensor) for tensor in storages.tensors])
        self._fresh, self._frozen = Checksum(parts.fresh), Checksum(parts.frozen)
        self._frozen_parts = parts.frozen
        self._frozen_sum: tuple[list[int], str] = ([], "")
        self._merge = RepeatedMerge()

    def is_of(self, bucket: Bucket) -> bool:
        """Whether this bucket is read in the same way: what is lent is the same object, or the layout is the same."""
        return self._of is bucket if isinstance(bucket, Lent) else self._of == _layout(bucket)

    @torch.no_grad()
    def written(self, items: Mapping[str, Item]) -> Parcel:
        """Copy and merge what is not lent into its place, and sum up all that will be read."""
        copied = {name: items[name] for name in self._places}
        merges = {name: item for name, item in copied.items() if isinstance(item, PendingMerge)}
        copies = {name: made(item) for name, item in copied.items() if name not in merges}
        if copies:
            torch._foreach_copy_([self._places[name] for name in copies], list(copies.values()))
        if merges:
            self._merge.run(merges, lambda: [m.whole_job(self._places[n], name=n) for n, m in merges.items()])
        fields = {"handles": self._handles, "layout": self._layout}
        return Parcel(NAME, fields, digest=self._sum_of_frozen() + self._fresh.now())

    def _sum_of_frozen(self) -> str:
        """Computed again only if torch counts a write to one of them."""
        versions = [tensor._version for tensor in self._frozen_parts]
        if not self._frozen_sum[1] or self._frozen_sum[0] != versions:
            self._frozen_sum = versions, self._frozen.now()
        return self._frozen_sum[1]


def _layout(bucket: dict[str, torch.Tensor]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in bucket.items()]


def _places(buffer: torch.Tensor, copied: Mapping[str, Item]) -> dict[str, torch.Tensor]:
    places, at = {}, 0
    for name, item in copied.items():
        places[name] = buffer[at : at + item.nbytes].view(item.dtype).view(item.shape)
        at += _padded(item.nbytes)
    return places


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
