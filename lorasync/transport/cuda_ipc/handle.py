"""CUDA's own handles of memory, as text behind checked fields; nothing is pickled."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from lorasync.errors import PayloadError

NAME = "cuda_ipc"
NO_SHARED_GPU = "LORASYNC_NO_CUDA_IPC"
"""Set this variable where processes on one GPU can't read each other's memory (containers apart, for one)."""


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
    def of(cls, tensor: torch.Tensor) -> Handle:
        """Make a CUDA tensor's storage readable for other processes."""
        storage: Any = tensor.untyped_storage()
        _, memory, size, offset, counter, counter_offset, event, event_sync = storage._share_cuda_()
        return cls(memory.hex(), size, offset, counter.hex(), counter_offset, event.hex(), bool(event_sync))

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


def handles_as_text(handles: list[Handle]) -> str:
    """Write handles as JSON."""
    return json.dumps([asdict(handle) for handle in handles])


def handles_from_text(text: str) -> list[Handle]:
    """Read what `handles_as_text` wrote.

    Raises:
        PayloadError: It is something else.
    """
    try:
        return [_checked(Handle(**each)) for each in json.loads(text)]
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadError(f"GPU handle: malformed ({error}). Nothing was touched.") from error


def _checked(handle: Handle) -> Handle:
    for each in fields(handle):
        if type(getattr(handle, each.name)).__name__ != each.type:
            raise TypeError(each.name)
    if min(handle.size, handle.offset, handle.counter_offset) < 0 or len(handle.memory) > 512:
        raise ValueError("sizes")
    for part in (handle.memory, handle.counter, handle.event):
        bytes.fromhex(part)
    return handle


def gpu_of(device: torch.device) -> str:
    """Which GPU that is, the same in every process; empty for a CPU, or where nothing is to be shared."""
    shared = device.type == "cuda" and not os.environ.get(NO_SHARED_GPU)
    return str(torch.cuda.get_device_properties(device).uuid) if shared else ""
