"""The bytes ride in the call itself, as safetensors: slower, and works wherever a call gets through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.bucket import Bucket, Item, made
from lorasync.errors import PayloadError
from lorasync.transport.base import KeepsNothing, Parcel, check_digest
from lorasync.wire.tensors import digest as digest_of
from lorasync.wire.tensors import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "inline"
SMALL = 4 << 20
"""Buckets up to this many bytes are cheapest in the call, also where there is shared memory."""


class Sender(KeepsNothing):
    """Packs a bucket."""

    name = NAME
    overlaps = True

    def put(self, bucket: Bucket[Item]) -> Parcel:
        """The bucket as bytes."""
        tensors = {name: made(item) for name, item in bucket.items()}
        return Parcel(NAME, payload=pack(tensors), digest=digest_of(tensors))


class Receiver:
    """Unpacks bytes."""

    def refuses(self, offer: Mapping[str, str]) -> str:  # noqa: ARG002
        """The handshake has shown that bytes come through."""
        return ""

    def take(self, fields: Mapping[str, str], payload: Any, digest: str) -> Bucket[Item]:  # noqa: ARG002
        """The tensors, of which a digest was made anew."""
        if not isinstance(payload, bytes | bytearray | memoryview):
            raise PayloadError(
                f"bucket: got {type(payload).__name__} beside the message, expected bytes. Nothing was touched."
            )
        tensors = unpack(bytes(payload))
        check_digest(digest_of(tensors), digest)
        return Bucket(tensors)

    def close(self) -> None:
        """Nothing was opened."""
