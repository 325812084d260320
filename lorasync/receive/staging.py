"""Staging: tensors that have come and wait for the commit, each checked against the handshake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lorasync.bucket import Bucket, Latest
from lorasync.errors import Mismatch, MismatchError, PayloadError
from lorasync.wire import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from lorasync.bucket import Item
    from lorasync.receive.load_plan import ManifestEntry

T = TypeVar("T")


class Staging:
    """Copies the announced tensors to memory of its own; nothing that is served depends on that memory.

    Args:
        manifest: Names, dtypes and shapes of the tensors.
        device: Where the copies lie.
        pinned: Whether they lie in page-locked host memory, which a GPU writes by itself: wait for its stream before the
            host reads them.
        dtype: What the copies are rounded to; ``None`` keeps each tensor's own dtype.
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
        self._room = _new_room()
        self._spare: list[Bucket[torch.Tensor]] = []

    def add(self, bucket: Bucket[torch.Tensor]) -> None:
        """Copy a bucket.

        Raises:
            MismatchError: Names, dtypes or shapes that were not announced; the message has them all.
        """
        self._check(bucket, self.expected, self.received.keys())
        if not self._room and self._spare:
            self._room = self._spare.pop()
        # Copies also on the CPU: after the answer the trainer writes its next bucket to the same file.
        room = [self._room_for(name, tensor) for name, tensor in bucket.items()]
        with torch.no_grad():
            torch._foreach_copy_(room, list(bucket.values()), non_blocking=True)
        self.received.update(zip(bucket, room, strict=True))

    def take(self, version: int) -> Bucket[torch.Tensor]:
        """Return everything that was announced, as a bucket that is reused once it is given back.

        Raises:
            PayloadError: A tensor never came; the message names each.
        """
        missing = sorted(self.expected.keys() - self.received.keys())
        if missing:
            raise PayloadError(
                f"version {version}: {len(missing)} of {len(self.expected)} tensors never came: {', '.join(missing[:8])}"
            )
        taken, self.received, self._room = self._room, {}, _new_room()
        return taken

    def drop(self) -> None:
        """Forget what has come of an update that is given up; the next update uses its memory."""
        self.received = {}

    def give_back(self, taken: Bucket[torch.Tensor]) -> None:
        """Let a later update use the memory of a bucket that `take` has returned."""
        self._spare.append(taken)

    def _room_for(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in self._room:
            dtype = self._dtype or tensor.dtype
            self._room[name] = torch.empty(
                tensor.shape, dtype=dtype, device=self._device, pin_memory=self._pinned
            )
        return self._room[name]


def _new_room() -> Bucket[torch.Tensor]:
    return Bucket(key=object())


def parsed(read: Callable[[str], T], wanted: Mapping[str, Any], key: str) -> T:
    """Read a part of the handshake.

    Raises:
        PayloadError: The part is missing or malformed.
    """
    try:
        return read(wanted[key])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise PayloadError(
            f"handshake, {key}: malformed ({type(error).__name__}: {error}). Nothing was touched."
        ) from error


class BucketCheck:
    """Calls `check_bucket`, but not again for a bucket that is reused and has passed."""

    def __init__(self) -> None:
        self._passed = Latest[None]()

    def __call__(
        self,
        bucket: Bucket[Any],
        expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        received: Collection[str],
    ) -> None:
        """Compare a bucket with the handshake; ``expected`` must be the same in all calls.

        Raises:
            MismatchError: As `check_bucket` raises it.
        """
        key = None if received else bucket.key  # what has come before may have the same names
        self._passed.get(key, lambda: check_bucket(bucket, expected, received))


def check_bucket(
    bucket: Mapping[str, Item],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    received: Iterable[str],
) -> None:
    """Compare a bucket with the handshake.

    Raises:
        MismatchError: A tensor came twice, was not announced, or has another dtype or shape; the message has them all.
    """
    seen, wrong = set(received), []
    for name, tensor in bucket.items():
        want = expected.get(name)
        if name not in seen and want == (tensor.dtype, tuple(tensor.shape)):
            continue
        got = f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
        if name in seen:
            wrong.append(
                Mismatch(name, "it a second time", "each name once", "The source must yield each name once.")
            )
        elif want is None:
            wrong.append(Mismatch(name, got, "only names of the handshake", "connect() again."))
        else:
            wrong.append(Mismatch(name, got, f"{dtype_name(want[0])} {want[1]}", "connect() again."))
    if wrong:
        raise MismatchError("A bucket is not what the handshake announced; none of it was applied.", wrong)
