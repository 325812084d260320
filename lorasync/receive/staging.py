"""Tensors that have come and wait for the commit, checked against what the handshake announced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from lorasync.errors import Mismatch, MismatchError, PayloadError
from lorasync.wire import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from lorasync.receive.plan import ManifestEntry

T = TypeVar("T")


class Staging:
    """Collects the announced tensors on the device; nothing that is being served depends on it."""

    def __init__(self, manifest: Iterable[ManifestEntry], device: torch.device) -> None:
        self.expected = {name: (dtype, shape) for name, dtype, shape in manifest}
        self.received: dict[str, torch.Tensor] = {}
        self._device = device

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take a bucket.

        Raises:
            MismatchError: for names, dtypes and shapes that were not announced, all at once.
        """
        check_bucket(tensors, self.expected, self.received.keys())
        # A copy also on the CPU: the payload's file is gone after the call.
        self.received.update({n: t.to(self._device, copy=True) for n, t in tensors.items()})

    def take(self, version: int) -> dict[str, torch.Tensor]:
        """Everything that was announced, if it is all there.

        Raises:
            PayloadError: naming what never came.
        """
        missing = sorted(self.expected.keys() - self.received.keys())
        if missing:
            raise PayloadError(
                f"version {version}: {len(missing)} of {len(self.expected)} tensors never came: {', '.join(missing[:8])}"
            )
        taken, self.received = self.received, {}
        return taken

    def drop(self) -> None:
        self.received = {}


def parsed(read: Callable[[str], T], wanted: Mapping[str, Any], key: str) -> T:
    """A part of the handshake, read.

    Raises:
        PayloadError: if it is missing or malformed.
    """
    try:
        return read(wanted[key])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise PayloadError(
            f"handshake, {key}: malformed ({type(error).__name__}: {error}). Nothing was touched."
        ) from error


def check_bucket(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    received: Iterable[str],
) -> None:
    """Compare a bucket with the handshake.

    Raises:
        MismatchError: for what comes twice, was not announced, or has another dtype or shape.
    """
    seen, wrong = set(received), []
    for name, tensor in tensors.items():
        got = f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
        want = expected.get(name)
        if name in seen:
            wrong.append(Mismatch(name, "it a second time", "each name once", "Fix the source."))
        elif want is None:
            wrong.append(Mismatch(name, got, "only names of the handshake", "connect() again."))
        elif want != (tensor.dtype, tuple(tensor.shape)):
            wrong.append(Mismatch(name, got, f"{dtype_name(want[0])} {want[1]}", "connect() again."))
    if wrong:
        raise MismatchError("A bucket is not what the handshake announced; none of it was applied.", wrong)
