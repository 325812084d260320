"""Buckets of a stream, each in the form in which it travels."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lorasync.errors import Mismatch, MismatchError
from lorasync.kernels import PendingMerge
from lorasync.shared_gpu import gpu_of
from lorasync.wire import INLINE_LIMIT, digest, nbytes, pack, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from lorasync.shared_gpu import SharedBuffer
    from lorasync.wire import Mailbox

Item = torch.Tensor | PendingMerge
"""What a source yields; merges that are still to be made only inside one process."""


class Place(Protocol):
    """Where a bucket goes: an engine in this process (no folder), on this GPU, or on this host."""

    @property
    def folder(self) -> Mailbox | None: ...

    @property
    def gpu(self) -> str: ...


class Payload:
    """One bucket on its way to any number of engines: packed, hashed and written once.

    Inside one process the tensors are handed over as they are, to a worker on the same GPU they go through memory that
    it reads there. For others, small buckets ride in the call itself, larger ones go through a file in each engine's
    shared-memory folder (the same file, linked).
    """

    def __init__(self, bucket: dict[str, Item], places: Iterable[Place], shared: SharedBuffer) -> None:
        self._bucket, self._shared = bucket, shared
        self._files: dict[Mailbox, Path] = {}
        self._inline, self._layout, self._checksum = b"", "", ""
        self._gpu = _gpu_of_all(bucket)
        places = list(places)
        if any(self._is_beside(place) for place in places):
            self._layout, self._checksum = shared.put(bucket)
        outside = [p.folder for p in places if p.folder is not None and not self._is_beside(p)]
        tensors = _made(bucket) if outside else {}
        self.digest = digest(tensors) if outside else self._checksum
        if outside and nbytes(tensors) <= INLINE_LIMIT:
            self._inline = pack(tensors)
            return
        try:
            self._write(tensors, outside)
        except BaseException:
            self._remove()
            raise

    def __enter__(self) -> Payload:
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def fields(self, place: Place) -> dict[str, Any]:
        """The fields of an `Update` that carry the bucket to this engine."""
        if place.folder is None:
            return {"tensors": self._bucket}
        if self._is_beside(place):
            return {"gpu": self._shared.handle, "layout": self._layout, "digest": self._checksum}
        if self._inline:
            return {"payload": self._inline, "digest": self.digest}
        return {"path": self._files[place.folder].name, "digest": self.digest}

    def _is_beside(self, place: Place) -> bool:
        return place.folder is not None and bool(self._gpu) and place.gpu == self._gpu

    def _write(self, tensors: dict[str, torch.Tensor], folders: list[Mailbox]) -> None:
        written: Path | None = None
        for folder in folders:
            path = self._files[folder] = folder.new_file()
            if written is None:
                write_safetensors(tensors, path)
                written = path
            else:
                os.link(written, path)

    def _remove(self) -> None:
        for path in self._files.values():
            path.unlink(missing_ok=True)


def _made(bucket: dict[str, Item]) -> dict[str, torch.Tensor]:
    return {name: item.make() if isinstance(item, PendingMerge) else item for name, item in bucket.items()}


def _gpu_of_all(bucket: dict[str, Item]) -> str:
    """The one GPU that everything in the bucket lies on, if so."""
    devices = {item.device for item in bucket.values()}
    return gpu_of(devices.pop()) if len(devices) == 1 else ""


def buckets(
    stream: Iterator[tuple[str, Item]], limit: int, *, lazily: bool = False
) -> Iterator[dict[str, Item]]:
    """Consecutive tensors, together at most ``limit`` bytes (a larger one travels alone).

    Args:
        stream: names and tensors.
        limit: in bytes.
        lazily: pending merges take none, because nobody makes them on the way.

    Raises:
        MismatchError: if a name comes a second time within a bucket; the worker sees the others.
    """
    bucket: dict[str, Item] = {}
    size = 0
    for name, tensor in stream:
        takes = 0 if lazily and isinstance(tensor, PendingMerge) else tensor.nbytes
        if bucket and size + takes > limit:
            yield bucket
            bucket, size = {}, 0
        if name in bucket:
            wrong = Mismatch(name, "it a second time", "each name once", "Fix the source.")
            raise MismatchError("A source must yield each name once.", [wrong])
        bucket[name] = tensor
        size += takes
    if bucket:
        yield bucket
