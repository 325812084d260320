"""The engines of one connection in one trainer rank, asked side by side; what one refuses, none of them serves."""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from lorasync.errors import LorasyncError, Mismatch, MismatchError, SyncError
from lorasync.push.flight import Flight
from lorasync.push.session import EngineSession
from lorasync.targets.kinds import target_of
from lorasync.transport import cuda_ipc, in_process
from lorasync.transport.post import Post
from lorasync.wire import digest_of_text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from lorasync.targets.base import Pause
    from lorasync.wire.messages import Kind

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class Engines:
    """Any number of sessions, as one; none in a trainer rank that has no engine to push to."""

    def __init__(
        self,
        targets: Mapping[str, object],
        *,
        timeout: float,
        pause: Pause,
        changes_weights: bool,
        names_each: bool = False,
    ) -> None:
        checked = {}
        for name, engine in targets.items():
            with naming(name if names_each else ""):
                checked[name] = target_of(engine, timeout=timeout, pause=pause)
                checked[name].check_able(changes_weights=changes_weights)
        self._changes_weights = changes_weights
        self.post = Post()
        self.sessions = [EngineSession(target, name=n) for n, target in checked.items()]
        self._names_each = names_each
        self._before: dict[str, int] = {}  # what each served before the commit that is under way

    def begin(self) -> None:
        """Another verb of the user's: each engine is waited for anew."""
        for session in self.sessions:
            session.target.patience.anew()

    def catch_up(self) -> None:
        """Ask those that did not say what they serve."""
        if any(session.unheard for session in self.sessions):
            self.each(lambda session: session.catch_up())

    def settle(self) -> None:
        """Requests that are on their way into an engine are among those in flight when this returns."""
        if self.generates_meanwhile:
            self.each(lambda session: session.target.settle())

    @property
    def ranks(self) -> int:
        """How many workers answer every message."""
        return sum(session.ranks for session in self.sessions)

    @property
    def dtypes(self) -> list[dict[str, str]]:
        """What their weights, and their LoRA slots, are in."""
        return [session.dtypes for session in self.sessions]

    @property
    def notes(self) -> tuple[str, ...]:
        """What their workers had to say in the handshake."""
        return tuple(
            note if not self._names_each else f"{s.name}: {note}" for s in self.sessions for note in s.notes
        )

    def in_flight(self) -> set[int]:
        """The versions of our adapter that unfinished requests name, on any engine."""
        return {version for session in self.sessions for version in session.in_flight()}

    @property
    def closed(self) -> str:
        """Why one of them must not generate; empty if all may."""
        return next((session.closed for session in self.sessions if session.closed), "")

    @property
    def outdated(self) -> list[str]:
        """The names of those that serve another trainer's versions."""
        return [session.name for session in self.sessions if session.outdated]

    @property
    def version(self) -> int:
        """The newest that any of them serves."""
        return max((session.version for session in self.sessions), default=0)

    @property
    def in_process(self) -> bool:
        """Whether any of them is in this process."""
        return any(session.target.in_process for session in self.sessions)

    def read_in_place(self, gpu: str) -> bool:
        """Whether all of them read tensors where they lie: in this process, or on this GPU by CUDA IPC."""
        reads = {in_process.NAME} | ({cuda_ipc.NAME} if gpu else set())
        return bool(self.sessions) and all(
            s.ways[0] in reads and (s.ways[0] == in_process.NAME or s.gpu == gpu) for s in self.sessions
        )

    @property
    def generates_meanwhile(self) -> bool:
        """Whether requests may be running on any of them while a push goes on."""
        return any(session.target.generates_meanwhile for session in self.sessions)

    def hello(self, strategy: str, manifest: str) -> None:
        """All of them shake hands, or the connection is given up.

        Raises:
            LorasyncError: the first refusal, naming the engine.
        """
        try:
            self.each(lambda session: session.hello(strategy, manifest, self.post))
            self.each(self._check_able)
            self._check_once()
        except BaseException:
            self.goodbye()
            raise

    def _check_once(self) -> None:
        """Refuse an engine that is passed twice, as two objects: it would take the pushes of the second only.

        Raises:
            MismatchError: naming both.
        """
        mine = {digest_of_text(session.token): session.name for session in self.sessions}
        for session in self.sessions:
            for other in sorted(mine[token] for token in session.took_over & mine.keys()):
                wrong = Mismatch(
                    "target", f"one engine as {other} and as {session.name}", "each once", "Pass it once."
                )
                raise MismatchError("connect() needs each engine once; nothing was pushed.", [wrong])

    def shut(self, reason: str) -> None:
        """None of them may generate until a push completes."""
        for session in self.sessions:
            if not session.closed:
                session.shut(reason)

    def _check_able(self, session: EngineSession) -> None:
        session.target.check_able(changes_weights=self._changes_weights, multimodal=session.multimodal)

    def check_ours(self, version: int) -> None:
        """Before live weights change: one that another trainer has taken over would leave the others torn.

        Args:
            version: what would be pushed; an engine that does not answer is closed, as after any push that has failed.
        """
        if not self._names_each:  # its refusal of the first bucket leaves nothing torn
            return
        try:
            self.each(lambda session: session.check_ours())
        except BaseException as error:
            self.abort(version, error)
            raise

    def flight(self, version: int, *, beside: bool, kind: Kind = "bucket") -> Flight:
        """The buckets of one version, on their way.

        Args:
            version: the version that they are parts of.
            beside: stage them beside what is served; otherwise they go into live weights.
            kind: ``"base"`` for the packed base that is sent once.
        """
        return Flight(self, version, beside=beside, kind=kind)

    def commit(self, version: int, keep: Collection[int] = ()) -> float:
        """All of them serve the version, or none does; the slowest worker's seconds.

        Raises:
            LorasyncError: the first refusal. Engines that had taken the version went back, or are closed.
        """
        return max(
            self._all_or_none(version, lambda session: session.commit(version, keep), keep), default=0.0
        )

    def rollback(self, version: int, keep: Collection[int] = ()) -> None:
        """All of them go back to the version, or none does.

        Raises:
            LorasyncError: the first refusal. Engines that had gone back serve the version from before again, or are
                closed.
        """
        self._all_or_none(version, lambda session: session.rollback(version, keep), keep)

    def take_back(self, version: int, keep: Collection[int] = ()) -> None:
        """An engine of another trainer rank has refused the version that these have taken: they go back, or are closed."""
        for session in self.sessions:
            before = self._before.get(session.name, session.version)
            if session.version == version != before:
                _return_to(before, session, version, {*keep, before})
        self.post.release()

    def take_on(self, version: int) -> None:
        """After weights have changed: what was cached of others goes."""
        self.each(lambda session: session.take_on(version))

    def _all_or_none(
        self, version: int, call: Callable[[EngineSession], T], keep: Collection[int]
    ) -> list[T]:
        before = self._before = {session.name: session.version for session in self.sessions}
        outcomes = self._outcomes(call)
        failed = {n: e for n, e in outcomes.items() if isinstance(e, BaseException)}
        if not failed:
            return list(outcomes.values())
        for session in self.sessions:
            if session.name in failed:
                session.abort(version, failed[session.name])
            if session.version != before[session.name]:
                _return_to(before[session.name], session, version, {*keep, before[session.name]})
        name = next(iter(failed))
        raise self._named(name, failed[name])

    def abort(self, version: int, error: BaseException) -> None:
        """All of them give the update up."""
        self.each(lambda session: session.abort(version, error))
        self.post.release()

    def goodbye(self) -> None:
        """Best effort: an engine that can't be told finds out at its next handshake."""
        try:
            self.each(_say_goodbye)
        finally:
            self.post.close()

    def leave_out(self, name: str, keep: Collection[int] = ()) -> None:
        """Go on without an engine; it keeps these versions of an adapter. Those that stood still because of it go on.

        Raises:
            SyncError: if it is one of several parts of an engine that is spread over trainer ranks.
        """
        stood_still = bool(self.closed)
        for session in [session for session in self.sessions if session.name == name]:
            if session.target.spread:
                raise SyncError(
                    f"leave_out: got {name!r}, a part of an engine that is spread over trainer ranks, expected a whole "
                    "engine."
                )
            self.sessions.remove(session)
            _say_goodbye(session, keep)
        if stood_still and not self.closed:
            with contextlib.suppress(Exception):  # another one that is dead is noticed at the next push
                self.each(lambda session: session.target.resume())

    def each(self, call: Callable[[EngineSession], T]) -> list[T]:
        """Call for every engine, side by side where they are other processes.

        Raises:
            BaseException: the first failure, after all have ended; it names the engine if there are several.
        """
        outcomes = self._outcomes(call)
        for name, outcome in outcomes.items():
            if isinstance(outcome, BaseException):
                raise self._named(name, outcome)
        return list(outcomes.values())

    def _outcomes(self, call: Callable[[EngineSession], T]) -> dict[str, Any]:
        def outcome(session: EngineSession) -> Any:
            try:
                return call(session)
            except BaseException as error:
                return error

        if len(self.sessions) <= 1:
            return {session.name: outcome(session) for session in self.sessions}
        here = [s for s in self.sessions if s.target.in_process]
        there = [s for s in self.sessions if s not in here]
        with ThreadPoolExecutor(max(len(there), 1), thread_name_prefix="lorasync-engine") as pool:
            waiting = {s.name: pool.submit(outcome, s) for s in there}
            found = {s.name: outcome(s) for s in here}
            found |= {name: future.result() for name, future in waiting.items()}
        return {s.name: found[s.name] for s in self.sessions}

    def _named(self, name: str, error: Any) -> BaseException:
        assert isinstance(error, BaseException)
        return _naming_engine(name, error) if self._names_each else error


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Say which engine it was, if a name is given."""
    try:
        yield
    except LorasyncError as error:
        if not name:
            raise
        raise _naming_engine(name, error) from error


def _naming_engine(name: str, error: BaseException) -> BaseException:
    if not isinstance(error, LorasyncError):
        return error
    if isinstance(error, MismatchError):
        named: LorasyncError = type(error)(f"{name}: {error.summary}", error.mismatches)
    else:
        named = type(error)(f"{name}: {error}")
    return named.with_traceback(error.__traceback__)


def _return_to(before: int, session: EngineSession, version: int, keep: Collection[int]) -> None:
    """Another engine refused the version that this one has taken."""
    try:
        session.rollback(before, keep)
        session.take_on(before)
    except Exception as error:
        session.shut(
            f"{session.name} serves version {version}, which this trainer or another engine refused, and can't go back "
            f"({error}). Call send_weights() again, or leave the other engine out with leave_out()."
        )


def _say_goodbye(session: EngineSession, keep: Collection[int] = ()) -> None:
    try:
        session.goodbye(keep)
    except Exception as error:
        _LOG.info("%s was not told goodbye: %s", session.name, error)
