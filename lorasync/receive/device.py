"""Streams of a worker's GPU; on a CPU there is nothing to wait for."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def beside_the_engine(device: torch.device) -> Iterator[None]:
    """On another thread than the engine's: its device, and a stream of its own that is done at the end of the block."""
    if device.type != "cuda":
        yield
        return
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
        stream.synchronize()


def wait_for(device: torch.device) -> None:
    """Wait until everything that was launched on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wait_for_stream(device: torch.device) -> None:
    """Wait until what this thread has launched is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
