"""Trainer and worker in one process: the tensors are handed over as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.bucket import Bucket, Item
from lorasync.errors import PayloadError
from lorasync.transport.base import KeepsNothing, Parcel

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "in_process"


class Sender(KeepsNothing):
    """Hands the bucket over."""

    name = NAME
    overlaps = False

    def put(self, bucket: Bucket[Item]) -> Parcel:
        """Return the bucket itself, with its key if it is reused."""
        return Parcel(NAME, payload=bucket)


class Receiver:
    """Takes what it is given."""

    def refuses(self, offer: Mapping[str, str]) -> str:  # noqa: ARG002
        """It is offered only where the trainer holds the worker's own object."""
        return ""

    def take(self, fields: Mapping[str, str], payload: Any, digest: str) -> Bucket[Item]:  # noqa: ARG002
        """Return the trainer's own object."""
        if not isinstance(payload, Bucket):
            raise PayloadError(
                f"bucket: got {type(payload).__name__}, expected the trainer's tensors, as both are said to be in one "
                "process. Nothing was touched."
            )
        return payload

    def close(self) -> None:
        """Nothing was opened."""
