"""The buckets of one push on their way: the next one is made ready while the engines take the one before."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from lorasync.push.buckets import buckets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from torch import Tensor

    from lorasync.bucket import Bucket, Item
    from lorasync.push.session import EngineSession
    from lorasync.transport.base import Parcel
    from lorasync.transport.post import Post
    from lorasync.wire.messages import Kind


class Receiving(Protocol):
    """Engines, as far as buckets go to them."""

    post: Post
    sessions: list[EngineSession]

    def each(self, call: Callable[[EngineSession], float]) -> list[float]: ...


class Flight:
    """One bucket at a time is on its way; used as a context, which waits for it whatever happens.

    Attributes:
        tensors: how many have been sent.
        bytes: their size.
        ways: the transports that were used, in the order in which they came up.
        applying: the seconds of the slowest worker, added up.
        digests: of the buckets, as the first engine's workers have found them; empty inside one process.
    """

    def __init__(self, engines: Receiving, version: int, *, beside: bool, kind: Kind = "bucket") -> None:
        self._engines = engines
        self._version, self._beside, self._kind = version, beside, kind
        self._pool: ThreadPoolExecutor | None = None
        self._on_its_way: Future[float] | None = None
        self.tensors = self.bytes = 0
        self.ways: dict[str, None] = {}
        self.applying = 0.0
        self.digests: list[str] = []

    def send(self, bucket: Bucket[Item]) -> None:
        """Make a bucket ready and send it; return when it is on its way, and the one before has been taken.

        Raises:
            LorasyncError: what an engine says to this bucket, or to the one before.
        """
        places, post = self._engines.sessions, self._engines.post
        if not places:
            return
        overlap = post.overlap(bucket, places)
        if not overlap:
            self.wait()
        self._go(post.parcels(bucket, places), overlap=overlap)
        self._count(len(bucket), bucket.nbytes)

    def send_stream(self, stream: Iterator[tuple[str, Tensor]], *, limit: int, expected: int) -> None:
        """Send tensors as they come, in buckets.

        Where a file in shared memory is the cheapest way to all engines, each tensor is copied there at once and let go.

        Args:
            stream: names and tensors.
            limit: bytes of a bucket, at most; a larger tensor travels alone.
            expected: bytes of all of them together, as the source says.

        Raises:
            MismatchError: if a name comes a second time within a bucket.
            LorasyncError: what an engine says to a bucket.
        """
        if not self._engines.sessions:
            for _, tensor in stream:
                self._count(1, tensor.nbytes)
            return
        size = min(limit, expected)
        sender = self._engines.post.pages(self._engines.sessions, size)
        if sender is None:
            for bucket in buckets(stream, limit):
                self.send(bucket)
            return
        page = None
        for name, tensor in stream:
            if page is not None and not page.has_room(tensor):
                self._go([page.parcel()] * len(self._engines.sessions), overlap=True)
                page = None
            if page is None:
                page = sender.page(max(size, tensor.nbytes))
            page.add(name, tensor)
            self._count(1, tensor.nbytes)
        if page is not None:
            self._go([page.parcel()] * len(self._engines.sessions), overlap=True)

    def _count(self, tensors: int, size: int) -> None:
        self.tensors += tensors
        self.bytes += size

    def _go(self, parcels: list[Parcel], *, overlap: bool) -> None:
        """Send parcels to the engines, one to each, once those before have been taken."""
        self.wait()
        self.ways |= dict.fromkeys(parcel.way for parcel in parcels)
        self.digests.append(next((parcel.digest for parcel in parcels if parcel.digest), ""))
        names = [session.name for session in self._engines.sessions]
        call = self._sending(dict(zip(names, parcels, strict=True)))
        if overlap:
            self._on_its_way = self._thread().submit(call)
        else:
            self.applying += call()

    def wait(self) -> None:
        """Return when what is on its way has been taken.

        Raises:
            LorasyncError: what an engine says to it.
        """
        waited = self._on_its_way
        if waited is None:
            return
        try:
            self.applying += waited.result()
        finally:
            if waited.done():  # not if the wait was interrupted
                self._on_its_way = None

    def __enter__(self) -> Flight:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with contextlib.suppress(Exception) if error is not None else contextlib.nullcontext():
                self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=False)

    def _sending(self, parcels: dict[str, Parcel]) -> Callable[[], float]:
        def to_one(session: EngineSession) -> float:
            return session.send(parcels[session.name], self._version, kind=self._kind, beside=self._beside)

        return lambda: max(self._engines.each(to_one))

    def _thread(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="lorasync-flight")
        return self._pool
