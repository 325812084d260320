"""One push: what the source yields is sent in buckets, then committed by all engines."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import torch

from lorasync.bucket import NOTHING, Latest
from lorasync.push.pause import pausable
from lorasync.push.report import SyncReport, Totals, timed
from lorasync.push.trainer_ranks import agreed_by_all_ranks
from lorasync.source import FactorSource, MergedSource
from lorasync.transport.cuda_ipc import gpu_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lorasync.bucket import Bucket, Item
    from lorasync.push.engines import Engines
    from lorasync.push.handshake import Handshake
    from lorasync.push.pause import Pausing
    from lorasync.push.strategies import Strategy
    from lorasync.push.versions import AdapterVersions
    from lorasync.source.meta import Source

    Stream = Iterator[tuple[str, torch.Tensor]]


class Sender:
    """The pushes of one connection; what it knows of the source is kept between them.

    Attributes:
        handshake: what was agreed on; set before the first push.
        bytes: of all tensors that a push sends, as the source has said in the handshake.
    """

    handshake: Handshake
    bytes = 0

    def __init__(self, strategy: Strategy, *, bucket_bytes: int) -> None:
        self._strategy = strategy
        self._bucket_bytes = bucket_bytes
        self._scalings = Latest[None]()

    def push(
        self,
        source: Source,
        engines: Engines,
        version: int,
        versions: AdapterVersions | None,
        *,
        check: Callable[[], None],
        committing: Callable[[], None],
    ) -> SyncReport:
        """Send what the source yields, and commit it as this version; every trainer rank calls it, also one without engines.

        Trainer ranks take each of the steps together: none reads its source if another can't, no engine commits unless
        all have read theirs to the end, and none keeps the version that another has refused.

        Args:
            source: what travels.
            engines: who gets it of this trainer rank; a rank that has none takes part in the source's collectives.
            version: its number.
            versions: those of the adapter, if it is one.
            check: refuses the push; on every rank before anything else.
            committing: told on every rank that the number is used from now on, whatever comes.
        """
        began = time.perf_counter()
        totals = Totals(self._strategy.report_name)
        engines.begin()
        with pausable(engines) as pause:
            with agreed_by_all_ranks():
                check()
                engines.catch_up()
                lent, stream = self._read(source, engines, totals)
                if not self._strategy.stages_beside:
                    engines.check_ours(version)
                    pause.begin()  # merged weights are live as they come
            self._transfer(lent, stream, engines, version, totals, pause)
            blocked = self._commit(engines, version, versions, totals, committing)
        if not self._strategy.changes_weights and engines.generates_meanwhile:
            pause.seconds = blocked  # the engine's loop waits while a worker installs the adapter
        return totals.report(version, engines.ranks, time.perf_counter() - began, pause.seconds)

    def _transfer(
        self,
        lent: Bucket[Item],
        stream: Stream,
        engines: Engines,
        version: int,
        totals: Totals,
        pause: Pausing,
    ) -> None:
        try:
            with agreed_by_all_ranks(), read_to_its_end(stream):
                self._send(lent, stream, engines, version, totals)
                if not self._strategy.changes_weights:
                    engines.each(lambda session: session.wait_for_room())
                elif self._strategy.stages_beside:
                    pause.begin()  # factors were staged beside what is served until now
        except BaseException as error:
            engines.abort(version, error)
            raise

    def _send(
        self,
        lent: Bucket[Item],
        stream: Stream,
        engines: Engines,
        version: int,
        totals: Totals,
    ) -> None:
        began, reading = time.perf_counter(), totals.source
        with engines.flight(version, beside=self._strategy.stages_beside) as flight:
            if lent:
                flight.send(lent)
            flight.send_stream(stream, limit=self._limit, expected=self.bytes)
            flight.wait()
        totals.take(flight, time.perf_counter() - began - (totals.source - reading))

    @property
    def _limit(self) -> int:
        """Bytes of a bucket: two exist at a time, one that engines take and one that is made ready."""
        return max(self._bucket_bytes // 2, 1)

    def _commit(
        self,
        engines: Engines,
        version: int,
        versions: AdapterVersions | None,
        totals: Totals,
        committing: Callable[[], None],
    ) -> float:
        """Commit on all engines of all ranks, or on none; return the slowest worker's seconds."""
        began = time.perf_counter()
        keep: set[int] = set()
        try:
            with agreed_by_all_ranks():
                committing()
                keep = versions.to_keep() if versions else keep
        except BaseException as error:
            engines.abort(version, error)
            raise
        try:
            with agreed_by_all_ranks():
                blocked = engines.commit(version, keep)
        except BaseException:
            engines.take_back(version, keep)
            raise
        totals.apply += time.perf_counter() - began
        try:
            with agreed_by_all_ranks():
                if versions:
                    versions.serve(version, keep)
                else:
                    engines.take_on(version)
                if engines.in_process and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                    torch.cuda.synchronize()  # a worker in this process has launched the merge and not waited
        except BaseException as error:
            engines.shut(
                f"Version {version} is in all engines, but not all of them have forgotten what they had computed with the "
                f"version before ({error}). Call send_weights() again; a push that completes opens them."
            )
            raise
        return blocked

    def _read(self, source: Source, engines: Engines, totals: Totals) -> tuple[Bucket[Item], Stream]:
        """Return what engines can read where it lies, and a stream of everything else."""
        began = time.perf_counter()
        lent: Bucket[Item] = NOTHING
        stream = iter(source)
        if isinstance(source, FactorSource | MergedSource) and engines.read_in_place(_gpu_of(source)):
            # Factors were looked at by `check_fits`, just before.
            lent, stream = source.lend(checked=True) if isinstance(source, FactorSource) else source.lend()
        # A key stays with the scalings, too.
        self._scalings.get(lent.key, lambda: self.handshake.check_scalings(source))
        totals.source += time.perf_counter() - began
        return lent, timed(stream, totals)

    def send_base(self, source: Source, engines: Engines, version: int) -> None:
        """Once: the packed 4-bit weights that the workers merge from. Every rank takes part in reading them."""
        stream = self._strategy.packed_base(source)
        with read_to_its_end(stream), engines.flight(version, beside=True, kind="base") as flight:
            flight.send_stream(stream, limit=self._limit, expected=self._limit)
            flight.wait()


@contextlib.contextmanager
def read_to_its_end(stream: Stream) -> Iterator[None]:
    """Read the rest of a source's stream if the block fails: the other trainer ranks are in the stream's collectives."""
    try:
        yield
    except BaseException:
        for _ in stream:
            pass
        raise


def _gpu_of(source: FactorSource | MergedSource) -> str:
    return gpu_of(next((param.device for param in source.model.parameters()), torch.device("cpu")))
