"""The engines of one connection, asked side by side; what one refuses, none of them serves."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from lorasync.errors import LorasyncError, Mismatch, MismatchError, SyncError
from lorasync.push.payload import Payload
from lorasync.push.session import EngineSession
from lorasync.push.target import target_of
from lorasync.same_gpu import Lender

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Literal

    from lorasync.lent import Bucket
    from lorasync.push.target import Pause

T = TypeVar("T")


def named_targets(target: object) -> dict[str, object]:
    """One engine, or several: a list (then called ``engine 0``, ``engine 1``, …) or a dict with names.

    Raises:
        MismatchError: if there are none, or one engine is there twice.
    """
    if isinstance(target, dict):
        found = {str(name): engine for name, engine in target.items()}
    elif isinstance(target, list | tuple):
        found = {f"engine {i}": engine for i, engine in enumerate(target)}
    else:
        found = {"engine": target}
    if not found or len({id(engine) for engine in found.values()}) < len(found):
        got = ", ".join(found) if found else "none"
        raise MismatchError(
            "connect() needs engines.",
            [
                Mismatch(
                    "target", got, "at least one engine, each once", "Pass the engines in a list or dict."
                )
            ],
        )
    return found


class Replicas:
    """Any number of sessions, as one."""

    def __init__(self, targets: Mapping[str, object], *, timeout: float, pause: Pause) -> None:
        checked = {n: target_of(engine, timeout=timeout, pause=pause) for n, engine in targets.items()}
        self._lender = Lender()
        self.sessions = [EngineSession(target, name=n, timeout=timeout) for n, target in checked.items()]

    @property
    def ranks(self) -> int:
        return sum(session.ranks for session in self.sessions)

    @property
    def closed(self) -> str:
        return next((session.closed for session in self.sessions if session.closed), "")

    @property
    def outdated(self) -> list[str]:
        """The names of those that serve another trainer's versions."""
        return [session.name for session in self.sessions if session.outdated]

    @property
    def hold_adapter(self) -> bool:
        return all(session.holds_adapter for session in self.sessions)

    @property
    def version(self) -> int:
        """The newest that any of them serves."""
        return max(session.version for session in self.sessions)

    @property
    def in_process(self) -> bool:
        """Whether all of them are in this process."""
        return all(session.target.in_process for session in self.sessions)

    def on_gpu(self, gpu: str) -> bool:
        """Whether all of them are in this process or on this GPU."""
        return all(s.target.in_process or (bool(gpu) and s.gpu == gpu) for s in self.sessions)

    @property
    def generates_meanwhile(self) -> bool:
        return any(session.target.generates_meanwhile for session in self.sessions)

    def hello(self, apply: str, manifest: str) -> None:
        """All of them shake hands, or the connection is given up.

        Raises:
            LorasyncError: the first refusal, naming the engine.
        """
        try:
            self.each(lambda session: session.hello(apply, manifest))
        except BaseException:
            self.goodbye()
            raise

    def send(
        self,
        bucket: Bucket,
        version: int,
        *,
        op: Literal["bucket", "base"] = "bucket",
        beside: bool,
    ) -> tuple[str, float]:
        """One bucket to all of them; its digest (empty inside one process), and the slowest worker's seconds."""
        if not beside and len(self.sessions) > 1:
            # Or one that another trainer has taken over would leave the others torn.
            self.each(lambda session: session.check_ours())
        with Payload(bucket, self.sessions, self._lender) as payload:
            seconds = self.each(lambda session: session.send(payload, version, op=op, beside=beside))
            return payload.digest, max(seconds)

    def commit(self, version: int) -> float:
        """All of them serve the version, or none does; the slowest worker's seconds.

        Raises:
            LorasyncError: the first refusal. Engines that had taken the version went back, or are closed.
        """
        before = {session.name: session.version for session in self.sessions}
        outcomes = self._outcomes(lambda session: session.commit(version))
        failed = [n for n, outcome in outcomes.items() if isinstance(outcome, BaseException)]
        if not failed:
            return max(float(seconds) for seconds in outcomes.values())
        for session in self.sessions:
            if session.name in failed:
                error = outcomes[session.name]
                assert isinstance(error, BaseException)
                session.find_out(version, error)
            else:
                _take_back(session, before[session.name], version)
        raise self._named(failed[0], outcomes[failed[0]])

    def abort(self, version: int, error: BaseException, *, beside: bool) -> None:
        self.each(lambda session: session.abort(version, error, beside=beside))

    def goodbye(self) -> None:
        for session in self.sessions:
            with contextlib.suppress(Exception):
                session.goodbye()

    def leave_out(self, name: str) -> None:
        """Go on without an engine.

        Raises:
            SyncError: if there is none of that name, or it is the last one.
        """
        names = [session.name for session in self.sessions]
        if name not in names or len(names) == 1:
            raise SyncError(
                f"leave_out: got {name!r}, expected one of {', '.join(names)}, and another one to stay."
            )
        gone = self.sessions.pop(names.index(name))
        with contextlib.suppress(Exception):
            gone.goodbye()

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

        if len(self.sessions) == 1:
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
        if len(self.sessions) == 1 or not isinstance(error, LorasyncError):
            return error
        if isinstance(error, MismatchError):
            named: LorasyncError = type(error)(f"{name}: {error.summary}", error.mismatches)
        else:
            named = type(error)(f"{name}: {error}")
        return named.with_traceback(error.__traceback__)


def _take_back(session: EngineSession, before: int, version: int) -> None:
    """Another engine refused the version that this one has taken."""
    try:
        session.rollback(before)
        session.target.reset_prefix_cache()
    except Exception as error:
        session.find_out(version, error)
        session.closed = session.closed or (
            f"{session.name} serves version {version}, which another engine refused, and can't go back ({error}). "
            "Call send_weights() again, or leave the other engine out with leave_out()."
        )
