"""What every transport has: a sender in the trainer, and a receiver in each worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lorasync.errors import Mismatch, MismatchError, PayloadError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasync.bucket import Bucket, Item


class Place(Protocol):
    """An engine, as far as a transport has to know it.

    Attributes:
        name: what errors call the engine.
        ways: the transports that every worker of it takes, the cheapest first.
        gpu: the GPU that all its workers are on; empty if there is no such one.
    """

    @property
    def name(self) -> str: ...

    @property
    def ways(self) -> tuple[str, ...]: ...

    @property
    def gpu(self) -> str: ...


@dataclass(frozen=True)
class Parcel:
    """One bucket, ready to travel.

    Attributes:
        way: the transport's name.
        fields: what a receiver needs to find the bytes; JSON-safe.
        payload: what rides beside the message: bytes, or the bucket itself inside one process.
        digest: of the bytes; empty inside one process.
    """

    way: str
    fields: dict[str, str] = field(default_factory=dict)
    payload: Any = b""
    digest: str = ""


class Sender(Protocol):
    """The trainer's side of a transport; one for all engines of a connection.

    Attributes:
        name: the transport's name.
        overlaps: whether the next bucket may be made ready while workers read the one before.
    """

    name: str
    overlaps: bool

    def offer(self) -> dict[str, str] | None:
        """What a worker needs to try the transport; None where this trainer can't use it."""
        ...

    def takes(self, bucket: Bucket[Item], place: Place) -> bool:
        """Whether this bucket can go this way to that engine."""
        ...

    def put(self, bucket: Bucket[Item]) -> Parcel:
        """Make the bucket ready; its bytes are all there when this returns."""
        ...

    def release(self) -> None:
        """Give back what a push that failed has taken."""
        ...

    def close(self) -> None:
        """Give everything back: the connection ends."""
        ...


class KeepsNothing:
    """The senders' half that is the same where any bucket can go, and nothing has to be found or given back."""

    def offer(self) -> dict[str, str] | None:
        """Nothing has to be found."""
        return {}

    def takes(self, bucket: Bucket[Item], place: Place) -> bool:  # noqa: ARG002
        """Any bucket."""
        return True

    def release(self) -> None:
        """Nothing was taken."""

    def close(self) -> None:
        """Nothing was taken."""


class Receiver(Protocol):
    """A worker's side of a transport."""

    def refuses(self, offer: Mapping[str, str]) -> str:
        """Why the worker can't take buckets this way; empty if it can."""
        ...

    def take(self, fields: Mapping[str, str], payload: Any, digest: str) -> Bucket[Item]:
        """The bucket, compared with its digest; to be read before the trainer gets its answer.

        Raises:
            PayloadError: if it is not what the trainer has sent.
        """
        ...

    def close(self) -> None:
        """Give back what was opened: the trainer says goodbye, or another one takes over."""
        ...


def comes_twice(name: str) -> MismatchError:
    """The error for a source that yields a name a second time within a bucket; the worker sees the others."""
    wrong = Mismatch(name, "it a second time", "each name once", "Yield it once.")
    return MismatchError("A source must yield each name once.", [wrong])


def check_digest(found: str, expected: str) -> None:
    """Refuse a bucket whose bytes are not those that were sent.

    Raises:
        PayloadError: with the digest that was expected.
    """
    if found != expected:
        raise PayloadError(
            f"bucket: the digest differs from {expected or 'none'}: bytes were altered. Not applied."
        )
