"""The trainer's side of CUDA IPC: what workers on the same GPU may read, and how they find it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from lorasync.bucket import Latest, made
from lorasync.kernels import GroupedMerge, PendingMerge
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

    def takes(self, bucket: Bucket[Item], place: Place) -> bool:
        """Whether all of it lies on the GPU that all the engine's workers are on."""
        devices = bucket.devices
        return bool(place.gpu) and len(devices) == 1 and gpu_of(next(iter(devices))) == place.gpu

    def release(self) -> None:
        """Keep the buffer: the next push needs it again."""

    def close(self) -> None:
        """Let go of the buffer and of what was shown."""
        self._buffer, self._pages = torch.empty(0, dtype=torch.uint8), {}

    def put(self, bucket: Bucket[Item]) -> Parcel:
        """Make a bucket readable, and say how to read it; it is all there when this returns."""
        first, key = next(iter(bucket)), _layout(bucket) if bucket.key is None else bucket.key
        page = self._pages.get(first)
        if page is None or page.key != key:
            page = self._shown(bucket, key)
            self._pages[first] = page
        return page.written(bucket)

    def _shown(self, bucket: Bucket[Item], key: object) -> _Page:
        lent = (
            bucket.key is not None
        )  # a reused bucket's tensors are the model's own, others would not be there again
        copied = {name: item for name, item in bucket.items() if not (lent and is_lendable(item))}
        self._make_room(list(copied.values()))
        return _Page(key, bucket, _places(self._buffer, copied), self._export)

    def _make_room(self, copied: list[Item]) -> None:
        size = sum(_padded(item.nbytes) for item in copied)
        if size and (self._buffer.device != copied[0].device or self._buffer.numel() < size):
            self._buffer = torch.zeros(size, dtype=torch.uint8, device=copied[0].device)
            self._pages = {}


class _Page:
    """How workers read one bucket; kept, as the same bucket comes with each push.

    Args:
        key: The bucket's key, or else its layout: the page is good for every bucket with an equal one.
        bucket: What is shown first.
        places: Where copies are put of what can't be read where it lies.
        export: Makes a handle of a storage.
    """

    def __init__(
        self,
        key: object,
        bucket: Bucket[Item],
        places: dict[str, torch.Tensor],
        export: Callable[[torch.Tensor], Handle],
    ) -> None:
        self.key = key
        self._places = places
        shown: dict[str, Item] = {**bucket, **places}
        storages, parts = Storages(), Parts.of(shown)
        self._layout = as_text(shown, storages)
        self._handles = handles_as_text([export(tensor) for tensor in storages.tensors])
        self._fresh, self._frozen = Checksum(parts.fresh), Checksum(parts.frozen)
        self._frozen_parts = parts.frozen
        self._frozen_sum: tuple[list[int], str] = ([], "")
        self._merge = Latest[GroupedMerge]()

    @torch.no_grad()
    def written(self, bucket: Bucket[Item]) -> Parcel:
        """Copy and merge what is not read where it lies into its place, and sum up all that will be read."""
        copied = {name: bucket[name] for name in self._places}
        merges = {name: item for name, item in copied.items() if isinstance(item, PendingMerge)}
        copies = {name: made(item) for name, item in copied.items() if name not in merges}
        if copies:
            torch._foreach_copy_([self._places[name] for name in copies], list(copies.values()))
        if merges:
            self._merge.get(bucket.key, lambda: self._planned(merges)).run()
        fields = {"handles": self._handles, "layout": self._layout}
        return Parcel(NAME, fields, digest=self._sum_of_frozen() + self._fresh.now())

    def _planned(self, merges: Mapping[str, PendingMerge]) -> GroupedMerge:
        return GroupedMerge(
            [merge.whole_job(self._places[name], name=name) for name, merge in merges.items()]
        )

    def _sum_of_frozen(self) -> str:
        """Computed again only if torch counts a write to one of them."""
        versions = [tensor._version for tensor in self._frozen_parts]
        if not self._frozen_sum[1] or self._frozen_sum[0] != versions:
            self._frozen_sum = versions, self._frozen.now()
        return self._frozen_sum[1]


def _layout(bucket: Mapping[str, Item]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(name, item.dtype, tuple(item.shape)) for name, item in bucket.items()]


def _places(buffer: torch.Tensor, copied: Mapping[str, Item]) -> dict[str, torch.Tensor]:
    places, at = {}, 0
    for name, item in copied.items():
        places[name] = buffer[at : at + item.nbytes].view(item.dtype).view(item.shape)
        at += _padded(item.nbytes)
    return places


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
