"""GPU memory that another process on the same GPU reads: a bucket reaches the worker without a way over the host.

CUDA's own handles travel, as text behind checked fields; nothing is pickled. The trainer's buffer stays where it is, so
a worker opens it once.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import PayloadError
from lorasync.kernels import PendingMerge, RepeatedMerge
from lorasync.wire import dtype_name, dtype_of

if TYPE_CHECKING:
    from collections.abc import Mapping

NO_SHARED_GPU = "LORASYNC_NO_CUDA_IPC"
"""Set this variable where processes on one GPU can't read each other's memory (containers apart, for one)."""

_ALIGN = 256
_CHUNK = 1 << 22
_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number


@dataclass(frozen=True)
class Handle:
    """What CUDA and torch need to open a storage of another process; bytes as hexadecimal text."""

    memory: str
    size: int
    offset: int
    counter: str
    counter_offset: int
    event: str
    event_sync: bool

    @classmethod
    def of(cls, buffer: torch.Tensor) -> Handle:
        """Make a CUDA buffer readable for other processes."""
        storage: Any = buffer.untyped_storage()
        _, memory, size, offset, counter, counter_offset, event, event_sync = storage._share_cuda_()
        return cls(memory.hex(), size, offset, counter.hex(), counter_offset, event.hex(), bool(event_sync))

    def to_text(self) -> str:
        """Write it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Handle:
        """Read what `to_text` wrote.

        Raises:
            PayloadError: It is something else.
        """
        try:
            found = cls(**json.loads(text))
            for each in fields(cls):
                if type(getattr(found, each.name)).__name__ != each.type:
                    raise TypeError(each.name)
            if min(found.size, found.offset, found.counter_offset) < 0 or len(found.memory) > 512:
                raise ValueError("sizes")
            bytes.fromhex(found.memory), bytes.fromhex(found.counter), bytes.fromhex(found.event)
        except (TypeError, ValueError, RecursionError) as error:
            raise PayloadError(f"GPU handle: malformed ({error}). Nothing was touched.") from error
        return found

    def open(self, device: torch.device) -> torch.Tensor:
        """Map the memory into this process; uint8.

        Raises:
            PayloadError: CUDA does not let it: another GPU or host, or containers apart.
        """
        if device.type != "cuda":
            raise PayloadError(f"GPU handle: got one on a worker on {device}. Nothing was touched.")
        make: Any = torch.UntypedStorage._new_shared_cuda
        try:
            return self._opened_by(make, device)
        except RuntimeError as error:
            raise PayloadError(
                f"GPU handle: can't be opened here ({str(error).splitlines()[0]}). In containers apart, start the trainer "
                f"with {NO_SHARED_GPU}=1: buckets then go over the host. Nothing was touched."
            ) from error

    def _opened_by(self, make: Any, device: torch.device) -> torch.Tensor:
        storage = make(
            device.index or 0,
            bytes.fromhex(self.memory),
            self.size,
            self.offset,
            bytes.fromhex(self.counter),
            self.counter_offset,
            bytes.fromhex(self.event),
            self.event_sync,
        )
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


class SharedBuffer:
    """A trainer's buffer: filled with one bucket after another, open to the workers on the same GPU."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._fillings: dict[str, _Filling] = {}  # by the bucket's first name
        self.handle = ""

    def put(self, bucket: Mapping[str, torch.Tensor | PendingMerge]) -> tuple[str, str]:
        """Copy or merge a bucket into the buffer; its layout, and its checksum when all is there."""
        layout, device = layout_of(bucket), next(iter(bucket.values())).device
        if self._buffer.device != device or self._buffer.numel() < bytes_of(layout):
            self._buffer = torch.zeros(bytes_of(layout), dtype=torch.uint8, device=device)
            self.handle, self._fillings = Handle.of(self._buffer).to_text(), {}
        first = next(iter(bucket))
        if first not in self._fillings or self._fillings[first].layout != layout:
            self._fillings[first] = _Filling(layout, views(self._buffer, layout), layout_as_text(layout))
        filling = self._fillings[first]
        filling.fill(bucket)
        return filling.text, checksum(self._buffer, bytes_of(layout))


@dataclass(frozen=True)
class _Filling:
    """How one bucket lies in the buffer; kept, as the same bucket comes with each push."""

    layout: Layout
    places: dict[str, torch.Tensor]
    text: str
    merge: RepeatedMerge = field(default_factory=RepeatedMerge)

    @torch.no_grad()
    def fill(self, bucket: Mapping[str, torch.Tensor | PendingMerge]) -> None:
        copies = {name: item for name, item in bucket.items() if isinstance(item, torch.Tensor)}
        merges = {name: item for name, item in bucket.items() if isinstance(item, PendingMerge)}
        if copies:
            torch._foreach_copy_([self.places[name] for name in copies], list(copies.values()))
        if merges:
            self.merge.run(merges, lambda: [m.whole_job(self.places[n], name=n) for n, m in merges.items()])


class Openings:
    """The buffers of trainers that a worker has opened, the last one kept."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._opened: tuple[str, torch.Tensor] | None = None
        self._views: dict[str, tuple[int, dict[str, torch.Tensor]]] = {}  # by the layout's text

    def read(self, handle: str, layout: str, expected: str) -> dict[str, torch.Tensor]:
        """The tensors that lie in a trainer's buffer: views, to be read before the trainer gets its answer.

        Raises:
            PayloadError: Handle or layout are malformed, the layout leads out of the buffer, or the buffer's
                checksum is not the expected one.
        """
        if self._opened is None or self._opened[0] != handle:
            self.close()
            self._opened = (handle, Handle.from_text(handle).open(self._device))
        buffer = self._opened[1]
        if layout not in self._views:
            wanted = _layout_from_text(layout)
            self._views[layout] = bytes_of(wanted), views(buffer, wanted)
        size, found = self._views[layout]
        if checksum(buffer, size) != expected:
            raise PayloadError(
                f"bucket on the GPU: its checksum is not {expected or 'there'}: bytes were altered. Not applied."
            )
        return dict(found)

    def close(self) -> None:
        """Give the memory back to the trainer."""
        self._opened, self._views = None, {}


Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]


def layout_of(tensors: Mapping[str, Any]) -> Layout:
    """Names, dtypes and shapes, in order."""
    return [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def layout_as_text(layout: Layout) -> str:
    """Write a layout as JSON."""
    return json.dumps([[name, dtype_name(dtype), list(shape)] for name, dtype, shape in layout])


def bytes_of(layout: Layout) -> int:
    """How much room a layout takes, gaps included."""
    return _ends(layout)[-1] if layout else 0


def views(buffer: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """The parts of a buffer that a layout names.

    Raises:
        PayloadError: It does not fit into the buffer.

    Example:
        >>> layout = [("a", torch.float32, (2,)), ("b", torch.int8, (3,))]
        >>> {
        ...     n: tuple(v.shape)
        ...     for n, v in views(torch.zeros(bytes_of(layout), dtype=torch.uint8), layout).items()
        ... }
        {'a': (2,), 'b': (3,)}
    """
    if bytes_of(layout) > buffer.numel():
        raise PayloadError(
            f"layout: got {bytes_of(layout)} bytes, expected at most the buffer's {buffer.numel()}. Nothing was touched."
        )
    found = {}
    for (name, dtype, shape), end in zip(layout, _ends(layout), strict=True):
        size = _nbytes(dtype, shape)
        start = end - _padded(size)
        found[name] = buffer[start : start + size].view(dtype).view(shape)
    return found


def checksum(buffer: torch.Tensor, size: int) -> str:
    """A 64-bit hash over the first ``size`` bytes of a buffer, computed where they lie: Σ x·w, each place its own odd w.

    It tells a stale, shifted or partly written buffer from the right one; it is no defence against an attacker.

    Example:
        >>> a, b = torch.zeros(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)
        >>> b[15] = 1
        >>> checksum(a, 16) == checksum(b, 16)
        False
    """
    words = buffer[: size - size % 8].view(torch.int64)
    total = torch.full((), size, dtype=torch.int64, device=buffer.device)
    weights = _weights(buffer.device)
    for at in range(0, len(words), _CHUNK):
        part = words[at : at + _CHUNK]
        mixed = (part ^ (part >> 29)).mul_(weights[: len(part)])
        total = total * _ODD + (mixed ^ (mixed >> 32)).sum()
    for byte in buffer[size - size % 8 : size].tolist():
        total = total * _ODD + byte
    return f"{int(total) & (1 << 64) - 1:016x}"


@lru_cache(maxsize=4)
def _weights(device: torch.device) -> torch.Tensor:
    return torch.arange(_CHUNK, dtype=torch.int64, device=device).mul_(2).add_(1).mul_(_ODD)


def _layout_from_text(text: str) -> Layout:
    try:
        found = [(str(n), dtype_of(d), tuple(int(x) for x in shape)) for n, d, shape in json.loads(text)]
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise PayloadError(f"layout: malformed ({error}). Nothing was touched.") from error
    if any(x < 0 for _, _, shape in found for x in shape) or len({n for n, _, _ in found}) < len(found):
        raise PayloadError("layout: got negative sizes or a name twice. Nothing was touched.")
    return found


def _ends(layout: Layout) -> list[int]:
    ends, at = [], 0
    for _, dtype, shape in layout:
        at += _padded(_nbytes(dtype, shape))
        ends.append(at)
    return ends


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel()) * dtype.itemsize


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def gpu_of(device: torch.device) -> str:
    """Which GPU that is, the same in every process; empty for a CPU, or where nothing is to be shared."""
    shared = device.type == "cuda" and not os.environ.get(NO_SHARED_GPU)
    return str(torch.cuda.get_device_properties(device).uuid) if shared else ""
