"""The buckets of one push on their way: the next one is made ready while the engines take the one before."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from lorasync.bucket import Bucket, Item
    from lorasync.push.session import EngineSession
    from lorasync.transport.base import Parcel
    from lorasync.transport.post import Post
    from lorasync.wire.messages import Kind


class Receiving(Protocol):
    """Engines, as far as buckets go to them."""

    post: Post
    sessions: list[EngineSession]

    @property
    def in_process(self) -> bool: ...

    def each(self, call: Callable[[EngineSession], float]) -> list[float]: ...


class Flight:
    """One bucket at a time is on its way; used as a context, which waits for it whatever happens.

    Attributes:
        ways: the transports that were used, in the order in which they came up.
        applying: the seconds of the slowest worker, added up.
        digests: of the buckets, as the first engine's workers have found them; empty inside one process.
    """

    def __init__(self, engines: Receiving) -> None:
        self._engines = engines
        self._pool: ThreadPoolExecutor | None = None
        self._on_its_way: Future[float] | None = None
        self.ways: dict[str, None] = {}
        self.applying = 0.0
        self.digests: list[str] = []

    def send(self, bucket: Bucket[Item], version: int, *, kind: Kind = "bucket", beside: bool) -> None:
        """Make a bucket ready and send it; return when it is on its way, and the one before has been taken.

        Raises:
            LorasyncError: what an engine says to this bucket, or to the one before.
        """
        places = self._engines.sessions
        if not places:
            return
        overlap = self._engines.post.overlap(places) and not self._engines.in_process
        if not overlap:
            self.wait()
        parcels = self._engines.post.parcels(bucket, places)
        self.wait()
        self.ways |= dict.fromkeys(parcel.way for parcel in parcels)
        self.digests.append(next((parcel.digest for parcel in parcels if parcel.digest), ""))
        call = self._sending(
            {s.name: p for s, p in zip(places, parcels, strict=True)}, version, kind, beside=beside
        )
        if overlap:
            self._on_its_way = self._thread().submit(call)
        else:
            self.applying += call()

    def wait(self) -> None:
        """Return when what is on its way has been taken.

        Raises:
            LorasyncError: what an engine says to it.
        """
        waited, self._on_its_way = self._on_its_way, None
        if waited is not None:
            self.applying += waited.result()

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

    def _sending(
        self, parcels: dict[str, Parcel], version: int, kind: Kind, *, beside: bool
    ) -> Callable[[], float]:
        def send() -> float:
            return max(
                self._engines.each(lambda s: s.send(parcels[s.name], version, kind=kind, beside=beside))
            )

        return send

    def _thread(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="lorasync-flight")
        return self._pool
