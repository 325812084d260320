"""Tensors that have come and wait for the commit, checked against what the handshake announced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lorasync.errors import Mismatch, MismatchError, PayloadError
from lorasync.lent import Recurring
from lorasync.wire import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from lorasync.kernels import PendingMerge
    from lorasync.receive.load_plan import ManifestEntry

T = TypeVar("T")


class Staging:
    """Collects the announced tensors on the device; nothing that is being served depends on it.

    With ``pinned`` in host memory that a GPU reads and writes by itself: what was copied there is there once its stream
    has come so far. With ``dtype`` rounded to it on the way, where the tensors come from.
    """

    def __init__(
        self,
        manifest: Iterable[ManifestEntry],
        device: torch.device,
        *,
        pinned: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.expected = {name: (dtype, shape) for name, dtype, shape in manifest}
        self.received: dict[str, torch.Tensor] = {}
        self._device = device
        self._pinned = pinned
        self._dtype = dtype
        self._check = BucketCheck()
        self._room: dict[str, torch.Tensor] = {}
        self._spare: list[dict[str, torch.Tensor]] = []

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take a bucket.

        Raises:
            MismatchError: for names, dtypes and shapes that were not announced, all at once.
        """
        self._check(tensors, self.expected, self.received.keys())
        if not self._room and self._spare:
            self._room = self._spare.pop()
        # Copies also on the CPU: the payload's file is gone after the call.
        room = [self._room_for(name, tensor) for name, tensor in tensors.items()]
        with torch.no_grad():
            torch._foreach_copy_(room, list(tensors.values()), non_blocking=True)
        self.received.update(zip(tensors, room, strict=True))

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
        taken, self.received, self._room = self._room, {}, {}
        return taken

    def drop(self) -> None:
        """Forget what has come of an update that is given up; the next one uses its memory."""
        self.received = {}

    def give_back(self, tensors: dict[str, torch.Tensor]) -> None:
        """Let a later update use the memory of what was taken once."""
        self._spare.append(tensors)

    def _room_for(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in self._room:
            dtype = self._dtype or tensor.dtype
            self._room[name] = torch.empty(
                tensor.shape, dtype=dtype, device=self._device, pin_memory=self._pinned
            )
        return self._room[name]


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


class BucketCheck:
    """`check_bucket`, which needs no second look at a bucket that comes again and has passed it."""

    def __init__(self) -> None:
        self._passed: object = None

    def __call__(
        self,
        tensors: Mapping[str, torch.Tensor | PendingMerge],
        expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        received: Collection[str],
    ) -> None:
        """Compare a bucket with the handshake, which is always the same one.

        Raises:
            MismatchError: as `check_bucket` does.
        """
        if self._passed is None or tensors is not self._passed or received:
            check_bucket(tensors, expected, received)
            self._passed = tensors if isinstance(tensors, Recurring) else None


def check_bucket(
    tensors: Mapping[str, torch.Tensor | PendingMerge],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    received: Iterable[str],
) -> None:
    """Compare a bucket with the handshake.

    Raises:
        MismatchError: for what comes twice, was not announced, or has another dtype or shape.
    """
    seen, wrong = set(received), []
    for name, tensor in tensors.items():
        want = expected.get(name)
        if name not in seen and want == (tensor.dtype, tuple(tensor.shape)):
            continue
        got = f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
        if name in seen:
            wrong.append(Mismatch(name, "it a second time", "each name once", "Fix the source."))
        elif want is None:
            wrong.append(Mismatch(name, got, "only names of the handshake", "connect() again."))
        else:
            wrong.append(Mismatch(name, got, f"{dtype_name(want[0])} {want[1]}", "connect() again."))
    if wrong:
        raise MismatchError("A bucket is not what the handshake announced; none of it was applied.", wrong)
