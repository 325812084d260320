"""One verb at a time talks to the engines of a connection."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from lorasync.errors import PushInProgressError

if TYPE_CHECKING:
    from collections.abc import Iterator


class OneAtATime:
    """Lets one verb of a connection in, and refuses another one meanwhile.

    Args:
        timeout: how long a question that only this trainer rank asks is waited for, in seconds.
    """

    def __init__(self, timeout: float) -> None:
        self._lock = threading.Lock()
        self._thread = 0
        self._verb = ""
        self._timeout = timeout

    @contextlib.contextmanager
    def alone(self, verb: str) -> Iterator[None]:
        """Let a verb in.

        Raises:
            PushInProgressError: if another one is under way. Only `digests` is waited for: all trainer ranks do the other
                verbs together, and would wait for one that refuses.
        """
        if not self._lock.acquire(blocking=False) and not self._digests_have_ended():
            raise PushInProgressError(
                f"{verb}: a push on this connection is under way; it is unaffected. Wait for it."
            )
        self._thread, self._verb = threading.get_ident(), verb
        try:
            yield
        finally:
            self._thread, self._verb = 0, ""
            self._lock.release()

    @contextlib.contextmanager
    def after_it(self) -> Iterator[None]:
        """Wait for what is under way in another thread, however long it takes."""
        with self._lock:
            yield

    @property
    def is_mine(self) -> bool:
        """Whether this thread is in a verb."""
        return self._thread == threading.get_ident()

    def _digests_have_ended(self) -> bool:
        return self._verb == "digests" and not self.is_mine and self._lock.acquire(timeout=self._timeout)
