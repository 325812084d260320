"""Buckets of a stream, each in the form in which it travels."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

from lorasync.errors import Mismatch, MismatchError
from lorasync.lent import Bucket, Lent, items_of, made
from lorasync.transport.cuda_ipc import gpu_of
from lorasync.wire import INLINE_LIMIT, digest, nbytes, pack, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import torch

    from lorasync.transport.cuda_ipc import Lender, Letter
    from lorasync.wire import Mailbox


class Place(Protocol):
    """Where a bucket goes: an engine in this process (no folder), on this GPU, or on this host."""

    @property
    def folder(self) -> Mailbox | None: ...

    @property
    def gpu(self) -> str: ...


class Payload:
    """One bucket on its way to any number of engines: packed, hashed and written once.

    Inside one process the tensors are handed over as they are, a worker on the same GPU is told where they lie. For
    others, small buckets ride in the call itself, larger ones go through a file in each engine's shared-memory folder
    (the same file, linked).
    """

    def __init__(self, bucket: Bucket, places: Iterable[Place], lender: Lender) -> None:
        self._bucket = bucket
        self._files: dict[Mailbox, Path] = {}
        self._inline = b""
        self._letter: Letter | None = None
        places = list(places)
        self._gpu = _gpu_of_all(bucket) if any(place.folder is not None for place in places) else ""
        if any(self._is_beside(place) for place in places):
            self._letter = lender.put(bucket)
        outside = [p.folder for p in places if p.folder is not None and not self._is_beside(p)]
        tensors = {name: made(item) for name, item in items_of(bucket).items()} if outside else {}
        self.digest = digest(tensors) if outside else self._letter.digest if self._letter else ""
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
            return {"tensors": self._bucket.unwrapped if isinstance(self._bucket, Lent) else self._bucket}
        if self._letter is not None and self._is_beside(place):
            return {"gpu": self._letter.handles, "layout": self._letter.layout, "digest": self._letter.digest}
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


def _gpu_of_all(bucket: Bucket) -> str:
    """The one GPU that everything in the bucket lies on, if so."""
    devices = bucket.devices if isinstance(bucket, Lent) else {tensor.device for tensor in bucket.values()}
    return gpu_of(next(iter(devices))) if len(devices) == 1 else ""


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
            wrong = Mismatch(name, "it a second time", "each name once", "Fix the source.")
            raise MismatchError("A source must yield each name once.", [wrong])
        bucket[name] = tensor
        size += tensor.nbytes
    if bucket:
        yield bucket
