"""The time in which engines must not generate, because their weights change."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from lorasync.push.trainer_ranks import agreed_by_all_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasync.push.engines import Engines


class Pausing:
    """The time in which the engines do not generate. If one is closed, all stay stopped until a push completes.

    Attributes:
        seconds: how long it was; None before the end, and where nothing was stopped.
    """

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._began: float | None = None
        self.seconds: float | None = None

    def begin(self) -> None:
        """Stop the engines, unless they stand still already."""
        if self._began is None:
            self._engines.each(lambda session: session.target.pause())  # until then steps go on to their end
            self._began = time.perf_counter()

    def end(self) -> None:
        """Let the engines go on, unless one is closed."""
        if self._engines.closed:
            return
        self._engines.each(lambda session: session.target.resume())
        if self._began is not None and self._engines.generates_meanwhile:
            self.seconds = time.perf_counter() - self._began


@contextlib.contextmanager
def pausable(engines: Engines) -> Iterator[Pausing]:
    """Let the engines go on after the block, whatever happens in it; none of them goes on while one is closed."""
    pausing = Pausing(engines)
    try:
        yield pausing
    except BaseException:
        with contextlib.suppress(Exception):  # a dead engine: the first error is the one that counts
            pausing.end()
        raise
    with agreed_by_all_ranks():
        pausing.end()
