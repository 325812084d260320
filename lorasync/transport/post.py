"""All transports, on the trainer's side: the handshake offers them, each bucket goes by the cheapest that fits."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from lorasync.transport import cuda_ipc, in_process, inline, shared_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lorasync.bucket import Bucket, Item
    from lorasync.transport.base import Parcel, Place, Sender

CHEAPEST_FIRST = (in_process.NAME, cuda_ipc.NAME, shared_memory.NAME, inline.NAME)


class Post:
    """The senders of one connection, shared by all its engines: a bucket is written once for each way."""

    def __init__(self, senders: Iterable[Sender] | None = None) -> None:
        given = senders or (in_process.Sender(), cuda_ipc.Sender(), shared_memory.Sender(), inline.Sender())
        self._senders = {sender.name: sender for sender in given}
        self._asking = threading.Lock()

    def offers(self, *, hands_over: bool) -> dict[str, dict[str, str]]:
        """What the handshake offers an engine.

        Args:
            hands_over: whether its workers are objects of this process; they need no other way then.
        """
        if hands_over:
            return {in_process.NAME: {}}
        with self._asking:  # engines shake hands side by side
            return self._offered()

    def _offered(self) -> dict[str, dict[str, str]]:
        found = {name: sender.offer() for name, sender in self._senders.items() if name != in_process.NAME}
        return {name: offer for name, offer in found.items() if offer is not None}

    def way_of(self, bucket: Bucket[Item], place: Place) -> str:
        """The cheapest transport for this bucket to that engine."""
        return next(way for way in place.ways if self._senders[way].takes(bucket, place))

    def parcels(self, bucket: Bucket[Item], places: Sequence[Place]) -> list[Parcel]:
        """The bucket, ready for each of these engines."""
        ways = [self.way_of(bucket, place) for place in places]
        made = {way: self._senders[way].put(bucket) for way in dict.fromkeys(ways)}
        return [made[way] for way in ways]

    def pages(self, places: Sequence[Place], size: int) -> shared_memory.Sender | None:
        """The sender that writes tensors as they come, if that is the cheapest way to all of these engines.

        Args:
            places: the engines.
            size: bytes of a bucket.
        """
        sender = self._senders.get(shared_memory.NAME)
        first = {next(way for way in place.ways if way != cuda_ipc.NAME or place.gpu) for place in places}
        all_so = isinstance(sender, shared_memory.Sender) and first == {shared_memory.NAME}
        return sender if all_so and size > inline.SMALL else None  # type: ignore[return-value]

    def overlap(self, bucket: Bucket[Item], places: Sequence[Place]) -> bool:
        """Whether a bucket may be made ready for these engines while they read the one before."""
        return all(self._senders[self.way_of(bucket, place)].overlaps for place in places)

    def release(self) -> None:
        """A push has failed: what it has taken is given back."""
        for sender in self._senders.values():
            sender.release()

    def close(self) -> None:
        """The connection ends."""
        for sender in self._senders.values():
            sender.close()


def ways_taken(refused: Sequence[dict[str, str]]) -> tuple[str, ...]:
    """The transports that none of these workers has refused, the cheapest first.

    Args:
        refused: for each worker, why not, by transport; empty for one that works.
    """
    return tuple(way for way in CHEAPEST_FIRST if all(told.get(way) == "" for told in refused))
