"""Through a file in shared memory: written once by the trainer, mapped by every worker on the host.

Two files take turns, so that the next bucket is written while workers read the one before. Both stay mapped on both
sides until the connection ends: fresh pages of shared memory cost more than everything else here.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lorasync.bucket import Bucket, Item, made
from lorasync.errors import PayloadError, SyncError
from lorasync.transport.base import Parcel, Place, check_digest, comes_twice
from lorasync.transport.folder import Folder, opened, room_in
from lorasync.transport.inline import SMALL
from lorasync.wire.tensors import digest as digest_of
from lorasync.wire.tensors import dtype_name, dtype_of

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "shared_memory"
_ALIGN = 64
_TURNS = 2
_LARGEST = 1 << 48
"""Of what a layout may say; torch can't unpack sizes of more than 63 bits."""


class Sender:
    """Writes buckets into two files by turns."""

    name = NAME
    overlaps = True

    def __init__(self) -> None:
        self._folder: Folder | None = None
        self._slots: list[_Slot | None] = [None] * _TURNS
        self._turn = 0

    def offer(self) -> dict[str, str] | None:
        """The folder in which the files will be."""
        if self._folder is None:
            self._folder = Folder()
        return {"folder": str(self._folder.path)}

    def takes(self, bucket: Bucket[Item], place: Place) -> bool:  # noqa: ARG002
        """Any bucket that is not cheaper in the call itself."""
        return bucket.nbytes > SMALL

    def put(self, bucket: Bucket[Item]) -> Parcel:
        """Write the bucket into the file whose turn it is, and hash what was written.

        Raises:
            SyncError: if the file system has no room for it.
        """
        page = self.page(sum(_padded(item.nbytes) for item in bucket.values()))
        for name, item in bucket.items():
            page.add(name, made(item))
        return page.parcel()

    def page(self, size: int) -> Page:
        """Begin a bucket in the file whose turn it is, with room for this many bytes at least; tensors go there one by one.

        Raises:
            SyncError: if the file system has no room for it.
        """
        return Page(self._slot_of(max(size, _ALIGN)))

    def release(self) -> None:
        """Free the files."""
        for slot in self._slots:
            if slot is not None:
                slot.remove()
        self._slots = [None] * _TURNS

    def close(self) -> None:
        """Remove the folder and all that is in it."""
        self.release()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def _slot_of(self, size: int) -> _Slot:
        """The file whose turn it is, made anew if it is too small."""
        assert self._folder is not None
        self._turn = (self._turn + 1) % _TURNS
        slot = self._slots[self._turn]
        # Writing to a file that was cut ends the process.
        if slot is None or slot.size < size or not slot.is_whole():
            if slot is not None:
                slot.remove()
            self._slots[self._turn] = None
            slot = self._slots[self._turn] = _Slot(self._folder.path, size)
        return slot


class Page:
    """A bucket that is being written: each tensor is copied to its place when it comes, and not kept."""

    def __init__(self, slot: _Slot) -> None:
        self._slot = slot
        self._layout: Layout = []
        self._names: set[str] = set()
        self._end = 0

    def has_room(self, tensor: Tensor) -> bool:
        """Whether the tensor fits behind those that are there."""
        return self._end + tensor.nbytes <= self._slot.size

    def add(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor of any device.

        Raises:
            MismatchError: if the name was there before.
        """
        if name in self._names:
            raise comes_twice(name)
        self._slot.write(tensor, self._end, name)
        self._layout.append((name, dtype_name(tensor.dtype), list(tensor.shape), self._end))
        self._names.add(name)
        self._end += _padded(tensor.nbytes)

    def parcel(self) -> Parcel:
        """The bucket, ready to travel, with a digest of what was written."""
        layout = json.dumps(self._layout, separators=(",", ":"))
        digest = digest_of(_views(self._slot.bytes, self._layout))
        return Parcel(NAME, {"file": self._slot.path.name, "layout": layout}, b"", digest)


class _Slot:
    """One file, and its mapping."""

    def __init__(self, folder: Path, size: int) -> None:
        self.path, self.size = folder / f"{secrets.token_hex(8)}.bucket", size
        with room_in(folder, size):
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileNotFoundError as error:
                raise SyncError(
                    f"{folder}: the connection's folder in shared memory is gone, expected it to stay: somebody has removed "
                    "it. connect() again."
                ) from error
            try:
                os.posix_fallocate(descriptor, 0, size)  # all of it, or nothing is written
                self._map = mmap.mmap(descriptor, size)
            except BaseException:
                self.path.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
        self.bytes = torch.from_numpy(np.frombuffer(self._map, dtype=np.uint8))

    def write(self, tensor: Tensor, at: int, name: str) -> None:
        """Copy a tensor of any device to its place.

        On a CPU by numpy: copies by torch wait for threads that a busy engine may hold up, at each of hundreds of tensors.
        """
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        place = self.bytes[at : at + flat.numel()]
        if place.numel() != flat.numel():
            raise PayloadError(f"{name}: got {flat.numel()} bytes, expected {place.numel()} of its layout.")
        if flat.device.type == "cpu":
            place.numpy()[:] = flat.numpy()
        else:
            place.copy_(flat)

    def is_whole(self) -> bool:
        """Whether the file is still there, as long as it was made."""
        try:
            return self.path.stat().st_size == self.size
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """Free the memory; the mapping goes with the last tensor that looks at it."""
        self.path.unlink(missing_ok=True)


class Receiver:
    """Maps the trainer's files, and keeps them mapped."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._mapped: dict[str, Tensor] = {}

    def refuses(self, offer: Mapping[str, str]) -> str:
        """Nothing can be read on another host, in a container of its own, or as another user."""
        self.close()
        found = opened(offer.get("folder", ""))
        if found is None:
            return f"no folder {offer.get('folder', '')} here: another host, container or user"
        if not os.access(found, os.R_OK | os.X_OK):
            return f"the folder {found} is not readable"
        self._folder = found
        return ""

    def take(self, fields: Mapping[str, str], payload: Any, digest: str) -> Bucket[Item]:  # noqa: ARG002
        """Views of the mapped file, of which a digest was made anew; the trainer writes there again after the answer."""
        layout = _parsed(fields.get("layout", ""))
        tensors = _views(self._bytes_of(fields.get("file", ""), _end(layout)), layout)
        check_digest(digest_of(tensors), digest)
        return Bucket(tensors)

    def close(self) -> None:
        """Let go of the files."""
        self._folder, self._mapped = None, {}

    def _bytes_of(self, name: str, needed: int) -> Tensor:
        """The file's bytes; a name from the wire leads to no other folder.

        Raises:
            PayloadError: if there is no such file, or it is shorter than its layout says.
            SyncError: if the worker has no memory left.
        """
        if self._folder is None:
            raise PayloadError(
                "bucket: no folder in shared memory was agreed on in the handshake. Not applied."
            )
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
            raise PayloadError(f"file: got {name!r}, expected a file name. Nothing was applied.")
        path = self._folder / name
        self._mapped = {n: m for n, m in self._mapped.items() if (self._folder / n).exists()}
        try:
            size = path.stat().st_size
            if size < needed:
                raise PayloadError(
                    f"{name}: got {size} bytes, expected {needed} of its layout. Nothing was applied."
                )
            if name not in self._mapped or self._mapped[name].numel() != size:
                self._mapped[name] = _mapped(path, size)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", 0) == errno.ENOMEM:  # the payload may be all right
                raise SyncError(f"{name}: can't be mapped ({error}). Nothing was applied.") from error
            raise PayloadError(f"{name}: can't be read ({error}). Nothing was applied.") from error
        return self._mapped[name]


Layout = list[tuple[str, str, list[int], int]]
"""Name, dtype, shape and offset of each tensor in a file."""


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _parsed(text: str) -> Layout:
    """Read a layout.

    Raises:
        PayloadError: if it is malformed, a dtype does not travel, or an offset is not aligned.
    """
    try:
        layout = [(str(n), str(d), [int(s) for s in shape], int(at)) for n, d, shape, at in json.loads(text)]
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise PayloadError(f"layout: malformed ({error}). Nothing was applied.") from error
    for name, kind, shape, at in layout:
        if min([*shape, at]) < 0 or max([*shape, at]) > _LARGEST or at % dtype_of(kind).itemsize:
            raise PayloadError(f"layout: {name} with shape {shape} at {at} can't be. Nothing was applied.")
    if len({name for name, _, _, _ in layout}) < len(layout):
        raise PayloadError("layout: a name is there twice. Nothing was applied.")
    return layout


def _end(layout: Layout) -> int:
    return max(
        (at + math.prod(shape) * dtype_of(dtype).itemsize for _, dtype, shape, at in layout), default=0
    )


def _views(everything: Tensor, layout: Layout) -> dict[str, Tensor]:
    found = {}
    for name, kind, shape, at in layout:
        dtype = dtype_of(kind)
        found[name] = everything[at : at + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    return found


def _mapped(path: Path, size: int) -> Tensor:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return torch.from_numpy(np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8))
    finally:
        os.close(descriptor)
