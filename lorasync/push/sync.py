"""`connect` a source to an engine, then `send_weights` as often as the policy changes."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lorasync.errors import EngineClosedError, EngineNotReadyError, PushInProgressError, SyncError
from lorasync.lent import NOTHING
from lorasync.push.afterwards import with_canary, with_survival
from lorasync.push.apply import (
    Apply,
    MergeInWorker,
    ServeAdapter,
    apply_message,
    check_scalings,
    packed_base,
    scalings,
    strategy_of,
)
from lorasync.push.payload import buckets
from lorasync.push.ranks import agreed_by_all_ranks, largest_of_all_ranks, rank
from lorasync.push.replicas import Replicas, named_targets
from lorasync.push.report import SyncReport, Totals, timed
from lorasync.push.stop import stoppable
from lorasync.same_gpu import gpu_of
from lorasync.source import FactorSource, MergedSource
from lorasync.wire import ADAPTER_IDS, manifest_as_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lorasync.lent import Bucket, Lent
    from lorasync.push.stop import Stop
    from lorasync.push.target import Pause
    from lorasync.verify import Canary

_LOG = logging.getLogger(__name__)


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


def connect(
    source: Source,
    target: object,
    apply: Apply | None = None,
    *,
    pause: Pause = "keep",
    timeout: float = 600.0,
    bucket_bytes: int = 256 << 20,
    measure_survival: bool = False,
    canary: Canary | None = None,
) -> Sync:
    """Shake hands with one or more live engines and check that everything fits, before the first weight is sent.

    Every trainer rank calls it; rank 0 talks to the engine.

    Args:
        source: what travels; a `MergedSource`, or a `FactorSource` with an ``apply``.
        target: a `vllm.LLM` or an `AsyncLLM` started with ``weight_transfer_config={"backend": "lorasync"}``, or any
            object with vLLM's four weight-sync calls. With an `AsyncLLM` call from another thread than its loop's.
            Several engines (replicas) in a list, or in a dict with names for errors to use: all take a push, or none.
        apply: what the workers do with factors: `ServeAdapter` or `MergeInWorker`.
        pause: what happens to requests in flight on an `AsyncLLM` while weights change: ``"keep"`` them and go on
            after it with the new version, ``"wait"`` for them first, or ``"abort"`` them. Adapters need no pause.
        timeout: the longest wait for any answer, in seconds.
        bucket_bytes: how many bytes of merged weights exist at a time, at most (or one tensor, if larger).
        measure_survival: after each push, measure how much of the update is left after rounding to the served dtype, and
            warn if next to nothing is. Takes about as long as the merge; `MergedSource` only.
        canary: tries each push on a few tokens; see `lorasync.verify.Canary`.

    Raises:
        EngineNotReadyError: if the engine was started without the backend; the message shows the flag.
        MismatchError: with every name, shape and dtype that does not fit the served model.
        SyncTimeoutError: if the engine does not answer.

    Example:
        >>> sync = connect(MergedSource(model), llm)  # doctest: +SKIP
        >>> report = sync.send_weights()  # doctest: +SKIP
        >>> llm.generate(prompts, **sync.request())  # doctest: +SKIP
    """
    return Sync(
        source,
        target,
        apply,
        pause=pause,
        timeout=timeout,
        bucket_bytes=bucket_bytes,
        measure_survival=measure_survival,
        canary=canary,
    )


class Sync:
    """A connection between one source and one or more engines; made by `connect`.

    Attributes:
        source: what travels; may be replaced by another one with the same metadata.
        apply: what the workers do with factors.
        version: what the engines serve; 0 before the first push.
    """

    def __init__(
        self,
        source: Source,
        target: object,
        apply: Apply | None,
        *,
        pause: Pause,
        timeout: float,
        bucket_bytes: int,
        measure_survival: bool,
        canary: Canary | None,
    ) -> None:
        self.source = source
        self.apply = apply
        self.version = 0
        self._newest = 0  # counts up, also after a rollback
        self._bucket_bytes = bucket_bytes
        self._measure_survival = measure_survival and isinstance(source, MergedSource)
        self._canary = canary
        self._busy = threading.Lock()
        self._scalings = scalings(source)
        self._lent = NOTHING
        self._engines: Replicas | None = None  # on the rank that sends
        with agreed_by_all_ranks():
            manifest, message = source.metadata(), apply_message(apply, source)
            if rank() == 0:
                self._engines = Replicas(named_targets(target), timeout=timeout, pause=pause)
                self._engines.hello(message, manifest_as_text((m.name, m.dtype, m.shape) for m in manifest))
                self._check_room()
        self._names_adapter = self._engines is not None and self._engines.hold_adapter
        found = self._engines.version if self._engines else 0
        self.version = self._newest = largest_of_all_ranks(found)  # only the sender has asked the engines
        with agreed_by_all_ranks():
            self._send_base()

    @property
    def closed(self) -> str:
        """Why the engines must not generate; empty if they may."""
        return self._engines.closed if self._engines else ""

    @property
    def engines(self) -> tuple[str, ...]:
        """The names of the engines that are pushed to; empty on a trainer rank that does not send."""
        return tuple(session.name for session in self._engines.sessions) if self._engines else ()

    def send_weights(self) -> SyncReport:
        """Push the policy as it is now; when it returns, every engine serves exactly that.

        Every trainer rank calls it, at the same point. On error the training model is as it was; what the engines
        serve then is said in the error, and calling again is always safe.

        Raises:
            PushInProgressError: if another push on this connection is under way; that one is unaffected.
            NonFiniteError: if the adapter holds NaN or Inf; nothing was sent.
            StaleVersionError: if another trainer has pushed to the engine meanwhile.
            SyncError: if an engine refused, died or did not answer; with several engines the error names it.
        """
        if not self._busy.acquire(blocking=False):
            raise PushInProgressError(
                "A push on this connection is under way; it is unaffected. Wait for it."
            )
        try:
            with agreed_by_all_ranks():
                report = self._push(self._engines) if self._engines else self._accompany()
                if self._measure_survival:
                    report = with_survival(report, self.source)
            self.version = self._newest = report.version  # not before all ranks have agreed that it went well
            self._names_adapter = True
            if self._canary is not None and self._engines is not None:
                report = with_canary(report, self._canary, self.request())
            _LOG.log(logging.WARNING if report.warnings else logging.INFO, "%s", report)
            return report
        finally:
            self._busy.release()

    async def send_weights_async(self) -> SyncReport:
        """`send_weights` for async code: the event loop, and with it an `AsyncLLM`, goes on meanwhile."""
        return await asyncio.to_thread(self.send_weights)

    def rollback(self) -> None:
        """Serve the version before this one again; one step back, for factors and adapters.

        Every trainer rank calls it. The next push counts on from the newest version.

        Raises:
            SyncError: if there is no version before, or merged weights were pushed: they replace the old ones.
        """
        with agreed_by_all_ranks():
            if self._engines:
                with stoppable(self._engines) as stop:
                    if not self._leaves_weights:
                        stop.begin()
                    before = self.version - 1
                    self._engines.each(lambda session: session.rollback(before))
                    self._engines.each(lambda session: session.target.reset_prefix_cache())
                    if not self._leaves_weights:
                        self._engines.each(lambda session: session.target.name_version(str(before)))
        self.version -= 1

    def request(self) -> dict[str, Any]:
        """What `generate` needs beyond the prompts to be answered by the version pushed last.

        Take it anew for every request: a version stays as long as requests in flight name it, not longer.

        Raises:
            EngineClosedError: if a push died half-way and none has completed since.
            SyncError: if another trainer has pushed to an engine meanwhile; or if an adapter is asked for before the
                first push or after `shutdown`. A request that names an adapter which is gone would end the whole engine.
        """
        if self.closed:
            raise EngineClosedError(self.closed)
        self._check_not_taken_over()
        if not isinstance(self.apply, ServeAdapter):
            return {}
        if not self._names_adapter:
            raise SyncError(
                "request: got no adapter of this connection in the engine, expected one. Call send_weights() first "
                "(after shutdown(): connect() again)."
            )
        from vllm.lora.request import LoRARequest

        name = f"{self.apply.name}@{self.version}"
        path = f"lorasync://{self.apply.name}/{self.version}"  # part of the prefix cache's key; never opened
        return {"lora_request": LoRARequest(name, ADAPTER_IDS + self.version, path)}

    def digests(self) -> dict[str, dict[int, str]]:
        """What every worker serves, as xxh3-128 over its live parameters: engine name → worker rank → digest.

        Two engines with equal digests hold the same weights bit for bit, whichever way these came. Rank 0 asks; other
        trainer ranks get an empty dict.

        Raises:
            SyncError: if weights can't be read (packed for the CPU in a layout of its own), naming one.
        """
        if not self._engines:
            return {}
        return {
            session.name: {worker: str(reply["digest"]) for worker, reply in session.digests().items()}
            for session in self._engines.sessions
        }

    def leave_out(self, engine: str) -> None:
        """Go on without this engine, a dead one for instance. Every trainer rank calls it.

        Args:
            engine: one of `engines`, as errors name it.

        Raises:
            SyncError: if there is none of that name, or it is the last one.
        """
        with agreed_by_all_ranks():
            if self._engines:
                self._engines.leave_out(engine)

    def shutdown(self) -> None:
        """Say goodbye to the engines, which keep serving, and remove the shared-memory folders."""
        if self._engines is not None:
            self._engines.goodbye()
            self._engines = None
        self._names_adapter = False

    def __enter__(self) -> Sync:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # ------------------------------------------------------------------------------------- a push

    def _push(self, engines: Replicas) -> SyncReport:
        began = time.perf_counter()
        version = self._newest + 1
        totals = Totals(strategy_of(self.apply))
        with stoppable(engines) as stop:
            if self.apply is None:
                stop.begin()  # merged weights are live as they come
                engines.each(lambda session: session.start())
            self._transfer(engines, version, totals, stop)
            committing = time.perf_counter()
            blocked = engines.commit(version)
            totals.apply += time.perf_counter() - committing
            if not self._leaves_weights:
                engines.each(lambda session: session.target.reset_prefix_cache())
                engines.each(lambda session: session.target.name_version(str(version)))
            if engines.in_process and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.synchronize()  # a worker in this process has launched the merge and not waited
        if self._leaves_weights and engines.generates_meanwhile:
            stop.seconds = blocked  # the engine's loop waits while a worker installs the adapter
        return totals.report(version, engines.ranks, time.perf_counter() - began, stop.seconds)

    def _transfer(self, engines: Replicas, version: int, totals: Totals, stop: Stop) -> None:
        lent, stream = self._read(engines, totals)
        beside = self.apply is not None
        try:
            first: list[Bucket] = [lent] if lent.items else []
            for bucket in chain(first, buckets(stream, self._bucket_bytes)):
                sending = time.perf_counter()
                digest, applying = engines.send(bucket, version, beside=beside)
                totals.add(bucket, digest, applying, time.perf_counter() - sending)
            if self._leaves_weights:
                engines.each(lambda session: session.wait_for_room())
            if isinstance(self.apply, MergeInWorker):
                stop.begin()  # factors were staged beside what is served until now
            if not beside:
                engines.each(lambda session: session.finish())
        except BaseException as error:
            engines.abort(version, error, beside=beside)
            for _ in stream:  # the other trainer ranks are in its collectives
                pass
            raise

    def _read(self, engines: Replicas, totals: Totals) -> tuple[Lent, Iterator[tuple[str, torch.Tensor]]]:
        """What engines can read where it lies, and a stream of everything else."""
        began, lent, stream = time.perf_counter(), NOTHING, iter(self.source)
        if isinstance(self.source, FactorSource | MergedSource) and engines.on_gpu(_gpu_of(self.source)):
            lent, stream = self.source.lend()
        if lent is NOTHING or lent is not self._lent:  # the same again has the same scalings
            check_scalings(self._scalings, scalings(self.source))
        self._lent = lent
        totals.source += time.perf_counter() - began
        return lent, timed(stream, totals)

    @property
    def _leaves_weights(self) -> bool:
        """An adapter leaves the weights alone: what is cached of them stays good, and nothing has to wait."""
        return isinstance(self.apply, ServeAdapter)

    def _send_base(self) -> None:
        """Once: the packed 4-bit weights that the workers merge from. Every rank takes part in reading them."""
        for bucket in buckets(packed_base(self.apply, self.source), self._bucket_bytes):
            if self._engines:
                self._engines.send(bucket, self.version, op="base", beside=True)

    def _check_room(self) -> None:
        assert self._engines is not None
        tight = [s for s in self._engines.sessions if s.target.generates_meanwhile and s.capacity == 1]
        if tight:
            self._engines.goodbye()
            raise EngineNotReadyError(
                f"{tight[0].name}: max_cpu_loras: got 1, expected at least 2: while a version is replaced, requests in "
                "flight still need the one before. Start the engine with max_cpu_loras=4 (host memory only)."
            )

    def _check_not_taken_over(self) -> None:
        taken = self._engines.outdated if self._engines else []
        if taken:
            one, all_of_them = len(self.engines) == 1, len(self.engines) == len(taken)
            who = "the engine" if one else ", ".join(taken)
            without = " and ".join(f"leave_out({name!r})" for name in taken)
            raise SyncError(
                f"request: another trainer has taken {who} over, expected version {self.version} of this one to be "
                f"served. {'' if all_of_them else f'Go on with the others: {without}; or '}connect() again."
            )

    def _accompany(self) -> SyncReport:
        """A rank that is not the sender takes part in the source's collectives and drops what they yield."""
        began, totals = time.perf_counter(), Totals(strategy_of(self.apply))
        check_scalings(self._scalings, scalings(self.source))
        for _, tensor in timed(self.source, totals):
            totals.count(tensor)
        return totals.report(self._newest + 1, 0, time.perf_counter() - began)


def _gpu_of(source: FactorSource | MergedSource) -> str:
    return gpu_of(next((param.device for param in source.model.parameters()), torch.device("cpu")))
