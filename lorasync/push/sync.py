"""One connection: `send_weights` as often as the policy changes, and what may be asked of it between pushes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorasync.errors import EngineClosedError, PushInProgressError, SyncError
from lorasync.push.arguments import check_arguments
from lorasync.push.belonging import check_passed_on, check_whole, engines_of_this_rank
from lorasync.push.engines import Engines
from lorasync.push.fits import check_fits, dtypes_of_all_ranks
from lorasync.push.handshake import Handshake
from lorasync.push.measured import warned, with_canary, with_survival
from lorasync.push.one_at_a_time import OneAtATime
from lorasync.push.pause import pausable
from lorasync.push.same_policy import SamePolicy
from lorasync.push.sender import Sender
from lorasync.push.strategies import LoadMerged, ServeAdapter
from lorasync.push.trainer_ranks import (
    agreed_by_all_ranks,
    check_alike_on_all_ranks,
    largest_of_all_ranks,
)
from lorasync.push.versions import AdapterVersions
from lorasync.wire import manifest_as_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasync.push.issued import OnGone
    from lorasync.push.report import SyncReport
    from lorasync.push.strategies import Strategy
    from lorasync.source.meta import Source
    from lorasync.targets.base import Pause
    from lorasync.verify import Canary

_LOG = logging.getLogger(__name__)


class Sync:
    """A connection between one source and one or more engines; made by `connect`.

    Attributes:
        source: what travels; may be replaced by another one with the same metadata.
        apply: what the workers do with what comes, as it was given to `connect`.
        version: what the engines serve; 0 before the first push.
    """

    def __init__(
        self,
        source: Source,
        target: object,
        apply: Strategy | None,
        *,
        pause: Pause,
        timeout: float,
        bucket_bytes: int,
        measure_survival: bool,
        canary: Canary | None,
        on_gone: OnGone,
    ) -> None:
        with agreed_by_all_ranks():
            check_arguments(
                source,
                target,
                apply,
                pause=pause,
                timeout=timeout,
                bucket_bytes=bucket_bytes,
                measure_survival=measure_survival,
                canary=canary,
                on_gone=on_gone,
            )
        check_alike_on_all_ranks("apply", repr(apply))
        check_alike_on_all_ranks("on_gone", repr(on_gone))
        belonging = engines_of_this_rank(target)
        self._names = belonging.names
        self._same = SamePolicy() if belonging.ranks > 1 else None
        self.source = source
        self.apply = apply
        self.version = 0
        self._newest = 0  # counts up, also after a rollback
        self._has_pushed = False
        self._before: int | None = None  # the version to go back to
        self._measure_survival = measure_survival
        self._canary = canary
        self._one = OneAtATime(timeout)
        self._down = False
        self._strategy = strategy = LoadMerged() if apply is None else apply
        self._sender = Sender(strategy, bucket_bytes=bucket_bytes)
        with agreed_by_all_ranks():
            self._engines = Engines(
                belonging.mine,
                timeout=timeout,
                pause=pause,
                changes_weights=strategy.changes_weights,
                names_each=len(self._names) > 1,
            )
        with self._or_goodbye():
            with agreed_by_all_ranks():
                manifest, message = source.metadata(), strategy.handshake(source)
                self._sender.handshake = Handshake(source, strategy, message)
                self._sender.bytes = sum(m.dtype.itemsize * math.prod(m.shape) for m in manifest)
                self._engines.hello(message, manifest_as_text((m.name, m.dtype, m.shape) for m in manifest))
            check_whole(self._engines)
            check_passed_on(belonging, self._engines, timeout=timeout)
            if self._same is not None:
                self._same.check_base(source, message, has_engines=bool(self._engines.sessions))
            self.version = self._newest = largest_of_all_ranks(self._engines.version)
            self._versions = self._adapter_versions(on_gone)
            self._dtypes = dtypes_of_all_ranks(self._engines)
            with agreed_by_all_ranks():
                self._sender.send_base(source, self._engines, self.version)
        self._notes = self._engines.notes
        for note in self._notes:
            warnings.warn(note, stacklevel=3)

    def _adapter_versions(self, on_gone: OnGone) -> AdapterVersions | None:
        """Know what requests may name: also a version that all engines hold of an earlier connection."""
        if not isinstance(self.apply, ServeAdapter):
            return None
        versions = AdapterVersions(self.apply.name, self._engines, on_gone=on_gone)
        with agreed_by_all_ranks():
            versions.check_room()
        lacking = any(not s.holds_adapter or s.version != self.version for s in self._engines.sessions)
        if not largest_of_all_ranks(int(lacking)):
            versions.serve(self.version, keep=set())
        return versions

    @contextlib.contextmanager
    def _or_goodbye(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._engines.goodbye()
            raise

    @property
    def closed(self) -> str:
        """Why the engines must not generate; empty if they may."""
        self._check_up("closed")
        return self._engines.closed

    @property
    def engines(self) -> tuple[str, ...]:
        """The names of the engines that this trainer rank pushes to; empty on one that has none."""
        self._check_up("engines")
        return tuple(session.name for session in self._engines.sessions)

    def send_weights(self) -> SyncReport:
        """Push the policy as it is now; when it returns, every engine of every trainer rank serves exactly that.

        Every trainer rank calls it, at the same point. On error the training model is as it was; what the engines
        serve then is said in the error, and calling again is always safe.

        Raises:
            PushInProgressError: if another push on this connection is under way; that one is unaffected.
            NonFiniteError: if the adapter holds NaN or Inf; nothing was sent.
            StaleVersionError: if another trainer has pushed to the engine meanwhile.
            SyncError: if an engine refused, died or did not answer (with several engines the error names it), or after
                `shutdown`.
        """
        with self._one.alone("send_weights"):
            report = self._push(self._newest + 1)
            served, self._before = self.version, self.version if self._has_pushed else None
            self.version = report.version  # not before all ranks have agreed that it went well
            if self._measure_survival:
                report = with_survival(report, self.source)
            return self._finished(report, served)

    def _push(self, version: int) -> SyncReport:
        with agreed_by_all_ranks():
            self._check_up("send_weights")
        if self._same is not None:
            self._same.check(self.source, has_engines=bool(self._engines.sessions))

        def check() -> None:
            self._sender.handshake.check(self.source)
            check_fits(self.source, self._strategy, self._dtypes)

        def committing() -> None:
            self._newest = version  # never used again: what an engine has cached of it would be answered

        return self._sender.push(
            self.source, self._engines, version, self._versions, check=check, committing=committing
        )

    def _finished(self, report: SyncReport, served: int) -> SyncReport:
        """What is to be said of a push that went well."""
        report = replace(report, warnings=(*self._notes, *report.warnings))
        self._notes = ()
        report = self._with_unasked(report, served)
        self._has_pushed = True
        with agreed_by_all_ranks():
            if self._canary is not None and self._engines.sessions:
                report = with_canary(report, self._canary, self._versions.quietly() if self._versions else {})
        _LOG.log(logging.WARNING if report.warnings else logging.INFO, "%s", report)
        return report

    def _with_unasked(self, report: SyncReport, served: int) -> SyncReport:
        """An adapter answers only requests that name it: all others are answered by the base, without a word."""
        if self._versions is None:
            return report
        asked = largest_of_all_ranks(int(self._versions.is_asked_for()))
        if asked or not self._has_pushed:
            return report
        return warned(
            report,
            f"nobody has called sync.request() since version {served} was pushed: generate() without it is answered by "
            "the base model, not by the policy. Use llm.generate(prompts, **sync.request()).",
        )

    async def send_weights_async(self) -> SyncReport:
        """`send_weights` for async code: the event loop, and with it an `AsyncLLM`, goes on meanwhile."""
        return await asyncio.to_thread(self.send_weights)

    def rollback(self) -> None:
        """Serve the version before this one again; one step back, for factors and adapters.

        Every trainer rank calls it. The next push counts on from the newest version. All engines go back, or none does.

        Raises:
            SyncError: if there is no version before, or merged weights were pushed: they replace the old ones; or if an
                engine refused.
        """
        with self._one.alone("rollback"):
            with agreed_by_all_ranks():
                self._check_up("rollback")
                before = self._version_before()
                self._engines.begin()
                self._engines.catch_up()
            self._roll_back(before)
            self.version, self._before = before, None

    def _version_before(self) -> int:
        if not self._strategy.stages_beside:
            raise SyncError(
                "rollback: merged weights replace the old ones in place. Push the older policy instead."
            )
        if self._before is None:
            raise SyncError("rollback: there is no version before this one on this connection.")
        return self._before

    def _roll_back(self, before: int) -> None:
        engines, versions = self._engines, self._versions
        with pausable(engines) as pausing:
            keep: set[int] = set()
            try:
                with agreed_by_all_ranks():
                    if versions is None:
                        pausing.begin()
                    else:
                        versions.serve(before, keep=engines.in_flight())
                        keep = {*versions.to_keep(), before}
                with agreed_by_all_ranks():
                    engines.rollback(before, keep)
            except BaseException:
                engines.take_back(before, keep)
                if versions is not None:
                    versions.serve(self.version, keep=keep)
                raise
            if versions is None:
                with agreed_by_all_ranks():
                    engines.take_on(before)

    def request(self) -> dict[str, Any]:
        """What `generate` needs beyond the prompts to be answered by the version pushed last.

        Take it anew for every request: a version stays as long as requests in flight name it, not longer. A request that
        was kept beyond that fails alone, with `VersionGoneError`, or is answered by the newest version, as
        ``connect(..., on_gone=…)`` says.

        Raises:
            EngineClosedError: if a push died half-way and none has completed since.
            SyncError: if another trainer has pushed to an engine meanwhile; or if an adapter is asked for before the
                first push or after `shutdown`.
        """
        self._check_up("request")
        if self.closed:
            raise EngineClosedError(self.closed)
        self._check_not_taken_over()
        return self._versions.request() if self._versions else {}

    def digests(self) -> dict[str, dict[int, str]]:
        """What every worker serves, as xxh3-128 over its live parameters: engine name → worker rank → digest.

        Two engines with equal digests hold the same weights bit for bit, whichever way these came. Each trainer rank asks
        those that it pushes to.

        Raises:
            PushInProgressError: if a push is under way.
            SyncError: if weights can't be read (packed for the CPU in a layout of its own), naming one.
        """
        with self._one.alone("digests"):
            self._check_up("digests")
            self._engines.begin()
            return {session.name: session.digests() for session in self._engines.sessions}

    def leave_out(self, engine: str) -> None:
        """Go on without this engine, a dead one for instance. Every trainer rank calls it.

        Args:
            engine: one of the `engines` of any rank, as errors name it. It keeps what it serves; don't send it requests for
                later versions.

        Raises:
            SyncError: if there is none of that name, or it is the last one.
        """
        with self._one.alone("leave_out"), agreed_by_all_ranks():
            self._check_up("leave_out")
            if engine not in self._names or len(self._names) == 1:
                names = ", ".join(self._names)
                raise SyncError(
                    f"leave_out: got {engine!r}, expected one of {names}, and another one to stay."
                )
            self._engines.begin()
            self._engines.leave_out(engine, self._versions.held() if self._versions else ())
        self._names = tuple(name for name in self._names if name != engine)

    def shutdown(self) -> None:
        """Say goodbye to the engines, which keep serving, and remove the folder in shared memory.

        It waits for a push that is under way; a second call does nothing. Every other call raises from then on.

        Raises:
            PushInProgressError: if the source of a push calls it, which would wait for itself.
            SyncError: on the event loop of an `AsyncLLM`, which would wait for itself.
        """
        if self._down:
            return
        if self._one.is_mine:
            raise PushInProgressError(
                "shutdown: got a call from inside of a push. Call it when that has returned."
            )
        for session in self._engines.sessions:
            session.target.check_elsewhere()
        with self._one.after_it():
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        if self._down:
            return
        self._down = True
        if self._versions:
            self._versions.end("this connection was shut down: connect() again.")
        self._engines.begin()
        self._engines.goodbye()
        self._engines.sessions = []

    def __enter__(self) -> Sync:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _check_up(self, verb: str) -> None:
        if self._down:
            raise SyncError(
                f"{verb}: the engines hold no adapter and take no push of this connection any more: it was shut down: "
                "connect() again."
            )

    def _check_not_taken_over(self) -> None:
        taken = self._engines.outdated
        if taken:
            one, all_of_them = len(self._names) == 1, len(self._names) == len(taken)
            who = "the engine" if one else ", ".join(taken)
            without = " and ".join(f"leave_out({name!r})" for name in taken)
            raise SyncError(
                f"request: another trainer has taken {who} over, expected version {self.version} of this one to be "
                f"served. {'' if all_of_them else f'Go on with the others: {without}; or '}connect() again."
            )
