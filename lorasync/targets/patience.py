"""How long a push waits for an engine: for one time limit, whatever hangs."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from lorasync.errors import EngineDeadError, SyncTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable

_WORKER_GONE = ("method failed: cancelled", "Executor failed")
"""What vLLM answers to a call that was under way when a worker died."""


class Patience:
    """The waits for one engine: each answer may take the limit, but what hangs is waited for once.

    After a wait that was in vain one more question is asked, for a moment only (the answer may be all that was lost);
    if that is not answered either, nothing more is asked until `anew`.

    Attributes:
        limit: the longest wait for an answer, in seconds.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._in_vain = 0

    def anew(self) -> None:
        """Another verb of the user's begins."""
        self._in_vain = 0

    def seconds(self, who: str) -> float:
        """How long the next answer is waited for.

        Raises:
            SyncTimeoutError: if the engine has been waited for long enough.
        """
        if self._in_vain > 1:
            raise SyncTimeoutError(
                f"{who} was not asked: the engine had not answered within {self.limit:g} s before."
            )
        return min(self.limit / 4, 2.0) if self._in_vain else self.limit

    def answered(self) -> None:
        """The engine is not hung."""
        self._in_vain = 0

    def give_up(self) -> None:
        """A wait was in vain."""
        self._in_vain += 1

    def call(self, call: Callable[[], Any], who: str, *, died: Callable[[], str] = str) -> Any:
        """`call_with_limit`, for as long as there is patience."""
        seconds = self.seconds(who)
        try:
            found = call_with_limit(call, seconds, who, died=died)
        except SyncTimeoutError:
            self.give_up()
            raise
        self.answered()
        return found


def call_with_limit(
    call: Callable[[], Any], seconds: float, who: str, *, died: Callable[[], str] = str
) -> Any:
    """Run a call that waits for another process, in a thread of its own, for so long at most.

    Args:
        call: what to run.
        seconds: the limit.
        who: whom it waits for.
        died: says which process is dead; asked once a second, as vLLM's calls wait for a dead engine for ever.

    Raises:
        SyncTimeoutError: naming who did not answer. The call goes on in its thread; its outcome is dropped.
        EngineDeadError: naming who died.
    """
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, name="lorasync-call", daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while not outcome and time.monotonic() < deadline:
        thread.join(max(min(1.0, deadline - time.monotonic()), 0.0))
        if not outcome and died():
            thread.join(1.0)  # an answer may be on its way
            if not outcome:
                raise dead(who, died())
    if not outcome:
        raise SyncTimeoutError(
            f"{who} did not answer within {seconds:g} s. Is it busy, hung or dead? connect(..., timeout=…) sets the limit."
        )
    return _value_of(*outcome[0], who, died)


def _value_of(succeeded: bool, value: Any, who: str, died: Callable[[], str]) -> Any:
    """What the call returned; what it raised is raised, and the death of its engine is told as such."""
    if succeeded:
        return value
    if type(value).__name__ == "EngineDeadError":  # vLLM's
        raise dead(who, died()) from value
    if any(words in str(value) for words in _WORKER_GONE):
        deadline = time.monotonic() + 5.0  # vLLM gives the call up a moment before it ends the engine
        while time.monotonic() < deadline:
            if died():
                raise dead(who, died()) from value
            time.sleep(0.05)
    raise value


def death_of(core: Any) -> str:
    """Which process of an engine has died, as its client knows; empty while all live."""
    resources = getattr(core, "resources", None)
    manager = getattr(resources, "engine_manager", None)
    try:
        finished: dict[str, Any] = manager.finished_procs() if manager is not None else {}
    except ValueError:  # closed already, by the client's own clean-up
        finished = {}
    named = [f"{name} (exit code {code})" for name, code in finished.items()]
    if not named and not getattr(resources, "engine_dead", False):
        return ""
    return ", ".join(named) or getattr(manager, "failed_proc_name", None) or "its engine core or a worker"


def dead(who: str, death: str) -> EngineDeadError:
    """The error that says so, and what to do."""
    return EngineDeadError(
        f"{who} died: {death or 'its engine core or a worker'} is gone (its own log says why). Nothing is served any "
        "more. Restart the engine, connect() again and push: the training model is as it was."
    )
