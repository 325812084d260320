"""One push: what the source yields is sent in buckets, then committed by all engines."""

from __future__ import annotations

import time
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import torch

from lorasync.lent import NOTHING
from lorasync.push.pause import stoppable
from lorasync.push.payload import buckets
from lorasync.push.report import SyncReport, Totals, timed
from lorasync.push.strategies import (
    Apply,
    MergeInWorker,
    ServeAdapter,
    packed_base,
    strategy_of,
)
from lorasync.push.trainer_ranks import agreed_by_all_ranks
from lorasync.source import FactorSource, MergedSource
from lorasync.transport.cuda_ipc import gpu_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lorasync.lent import Bucket, Lent
    from lorasync.push.engines import Replicas
    from lorasync.push.handshake import Handshake
    from lorasync.push.pause import Stop
    from lorasync.push.versions import AdapterVersions

    Stream = Iterator[tuple[str, torch.Tensor]]


class Meta(Protocol):
    """One tensor that a source will yield: `ParamMeta` of lorasync, or vLLM's own."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Source(Protocol):
    """What travels: a `MergedSource`, or anything else whose metadata equals its iteration."""

    def metadata(self) -> Sequence[Meta]: ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class Sender:
    """The pushes of one connection; what it knows of the source is kept between them.

    Attributes:
        handshake: what was agreed on; set before the first push.
    """

    handshake: Handshake

    def __init__(self, apply: Apply | None, *, bucket_bytes: int) -> None:
        self._apply = apply
        self._bucket_bytes = bucket_bytes
        self._lent = NOTHING

    def push(
        self,
        source: Source,
        engines: Replicas,
        version: int,
        versions: AdapterVersions | None,
        *,
        check: Callable[[], None],
        committing: Callable[[], None],
    ) -> SyncReport:
        """Send what the source yields, and commit it as this version.

        Trainer ranks take each of the three steps together: none reads its source if another can't, and no engine
        commits unless all have read theirs to the end.

        Args:
            source: what travels.
            engines: who gets it.
            version: its number.
            versions: those of the adapter, if it is one.
            check: refuses the push; on every rank before anything else.
            committing: told on every rank that the number is used from now on, whatever comes.
        """
        began = time.perf_counter()
        totals = Totals(strategy_of(self._apply))
        engines.begin()
        with stoppable(engines) as stop:
            with agreed_by_all_ranks():
                check()
                engines.catch_up()
                lent, stream = self._read(source, engines, totals)
                if self._apply is None:
                    stop.begin()  # merged weights are live as they come
                    engines.each(lambda session: session.start())
            self._transfer(lent, stream, engines, version, totals, stop)
            with agreed_by_all_ranks():
                committing()
                blocked = self._commit(engines, version, versions, totals)
        if self._leaves_weights and engines.generates_meanwhile:
            stop.seconds = blocked  # the engine's loop waits while a worker installs the adapter
        return totals.report(version, engines.ranks, time.perf_counter() - began, stop.seconds)

    def _transfer(
        self, lent: Lent, stream: Stream, engines: Replicas, version: int, totals: Totals, stop: Stop
    ) -> None:
        beside = self._apply is not None
        try:
            with agreed_by_all_ranks():
                try:
                    self._send(lent, stream, engines, version, totals)
                    if self._leaves_weights:
                        engines.each(lambda session: session.wait_for_room())
                    if isinstance(self._apply, MergeInWorker):
                        stop.begin()  # factors were staged beside what is served until now
                    if not beside:
                        engines.each(lambda session: session.finish())
                except BaseException:
                    for _ in stream:  # the other trainer ranks are in its collectives
                        pass
                    raise
        except BaseException as error:
            engines.abort(version, error, beside=beside)
            raise

    def _send(self, lent: Lent, stream: Stream, engines: Replicas, version: int, totals: Totals) -> None:
        beside = self._apply is not None
        first: list[Bucket] = [lent] if lent.items else []
        for bucket in chain(first, buckets(stream, self._bucket_bytes)):
            sending = time.perf_counter()
            digest, applying = engines.send(bucket, version, beside=beside)
            totals.add(bucket, digest, applying, time.perf_counter() - sending)

    def _commit(
        self, engines: Replicas, version: int, versions: AdapterVersions | None, totals: Totals
    ) -> float:
        began = time.perf_counter()
        try:
            keep = versions.to_keep() if versions else set()
        except BaseException as error:
            engines.abort(version, error, beside=True)
            raise
        blocked = engines.commit(version, keep)
        totals.apply += time.perf_counter() - began
        if versions:
            versions.serve(version, keep)
        else:
            engines.take_on(version)
        if engines.in_process and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # a worker in this process has launched the merge and not waited
        return blocked

    def _read(self, source: Source, engines: Replicas, totals: Totals) -> tuple[Lent, Stream]:
        """What engines can read where it lies, and a stream of everything else."""
        began, lent, stream = time.perf_counter(), NOTHING, iter(source)
        if isinstance(source, FactorSource | MergedSource) and engines.on_gpu(_gpu_of(source)):
            # Factors were looked at by `check_fits`, just before.
            lent, stream = source.lend(checked=True) if isinstance(source, FactorSource) else source.lend()
        if lent is NOTHING or lent is not self._lent:  # the same again has the same scalings
            self.handshake.check_scalings(source)
        self._lent = lent
        totals.source += time.perf_counter() - began
        return lent, timed(stream, totals)

    def accompany(
        self, source: Source, version: int, *, check: Callable[[], None], committing: Callable[[], None]
    ) -> SyncReport:
        """A rank that does not push takes part in the source's collectives and drops what they yield."""
        began, totals = time.perf_counter(), Totals(strategy_of(self._apply))
        with agreed_by_all_ranks():
            check()
            self.handshake.check_scalings(source)
        with agreed_by_all_ranks():
            for _, tensor in timed(source, totals):
                totals.count(tensor)
        with agreed_by_all_ranks():
            committing()
        return totals.report(version, 0, time.perf_counter() - began)

    def send_base(self, source: Source, engines: Replicas | None, version: int) -> None:
        """Once: the packed 4-bit weights that the workers merge from. Every rank takes part in reading them."""
        for bucket in buckets(packed_base(self._apply, source), self._bucket_bytes):
            if engines:
                engines.send(bucket, version, op="base", beside=True)

    @property
    def _leaves_weights(self) -> bool:
        """An adapter leaves the weights alone: what is cached of them stays good, and nothing has to wait."""
        return isinstance(self._apply, ServeAdapter)


def _gpu_of(source: FactorSource | MergedSource) -> str:
    return gpu_of(next((param.device for param in source.model.parameters()), torch.device("cpu")))
