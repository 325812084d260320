"""Buckets of a stream, each in the form in which it travels."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lorasync.errors import Mismatch, MismatchError
from lorasync.wire import INLINE_LIMIT, digest, nbytes, pack, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import torch

    from lorasync.wire import Mailbox


class Payload:
    """One bucket on its way to any number of engines: packed, hashed and written once.

    Inside one process the tensors are handed over as they are, small buckets ride in the call itself, others go
    through a file in each engine's shared-memory folder (the same file, linked).
    """

    def __init__(self, tensors: dict[str, torch.Tensor], folders: Iterable[Mailbox | None]) -> None:
        """For engines with these folders; None stands for an engine in this process."""
        self._tensors = tensors
        self._files: dict[Mailbox, Path] = {}
        self._inline = b""
        outside = [folder for folder in folders if folder is not None]
        self.digest = digest(tensors) if outside else ""
        if outside and nbytes(tensors) <= INLINE_LIMIT:
            self._inline = pack(tensors)
            return
        try:
            self._write(outside)
        except BaseException:
            self._remove()
            raise

    def __enter__(self) -> Payload:
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def fields(self, folder: Mailbox | None) -> dict[str, Any]:
        """The fields of an `Update` that carry the bucket to the engine with this folder."""
        if folder is None:
            return {"tensors": self._tensors}
        if self._inline:
            return {"payload": self._inline, "digest": self.digest}
        return {"path": self._files[folder].name, "digest": self.digest}

    def _write(self, folders: list[Mailbox]) -> None:
        written: Path | None = None
        for folder in folders:
            path = self._files[folder] = folder.new_file()
            if written is None:
                write_safetensors(self._tensors, path)
                written = path
            else:
                os.link(written, path)

    def _remove(self) -> None:
        for path in self._files.values():
            path.unlink(missing_ok=True)


def buckets(stream: Iterator[tuple[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Consecutive tensors, together at most ``limit`` bytes (a larger one travels alone).

    Raises:
        MismatchError: if a name comes a second time within a bucket; the worker sees the others.
    """
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in stream:
        if bucket and size + tensor.numel() * tensor.element_size() > limit:
            yield bucket
            bucket, size = {}, 0
        if name in bucket:
            wrong = Mismatch(name, "it a second time", "each name once", "Fix the source.")
            raise MismatchError("A source must yield each name once.", [wrong])
        bucket[name] = tensor
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket
