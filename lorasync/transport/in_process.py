"""Trainer and worker in one process: the tensors are handed over as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lorasync.bucket import Bucket, Lent
from lorasync.errors import PayloadError
from lorasync.transport.base import Parcel, Place, Received

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "in_process"


class Sender:
    """Hands the bucket over."""

    name = NAME
    overlaps = False

    def offer(self) -> dict[str, str] | None:
        """Nothing has to be found."""
        return {}

    def takes(self, bucket: Bucket, place: Place) -> bool:  # noqa: ARG002
        """Any bucket."""
        return True

    def put(self, bucket: Bucket) -> Parcel:
        """The bucket itself: it may be one that comes again."""
        return Parcel(NAME, payload=bucket.unwrapped if isinstance(bucket, Lent) else bucket)

    def release(self) -> None:
        """Nothing was taken."""

    def close(self) -> None:
        """Nothing was taken."""


class Receiver:
    """Takes what it is given."""

    def refuses(self, offer: Mapping[str, str]) -> str:  # noqa: ARG002
        """It is offered only where the trainer holds the worker's own object."""
        return ""

    def take(self, fields: Mapping[str, str], payload: Any, digest: str) -> Received:  # noqa: ARG002
        """The trainer's own tensors."""
        if not isinstance(payload, dict):
            raise PayloadError(
                f"bucket: got {type(payload).__name__}, expected the trainer's tensors, as both are said to be in one "
                "process. Nothing was touched."
            )
        return cast("Received", payload)

    def close(self) -> None:
        """Nothing was opened."""
