"""An `AsyncLLM` is waited for from another thread than the one of its event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from lorasync.errors import SyncError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


def run_on(
    loop: asyncio.AbstractEventLoop,
    make: Callable[[], Coroutine[Any, Any, T]],
    wait: Callable[[Callable[..., T]], T],
    *,
    instead: str,
) -> T:
    """Run a coroutine on the loop of another thread.

    Args:
        loop: where it runs.
        make: makes it.
        wait: gets the function that waits for its result, and says for how long; what it raises gives the coroutine up.
        instead: what to do on the loop's own thread, where waiting would stop the engine that is waited for.

    Raises:
        SyncError: on that thread, or if the loop does not run.
    """
    check_elsewhere(loop, instead=instead)
    if not loop.is_running():
        raise SyncError(
            "The event loop that ran the engine has ended, expected one that runs: nobody would answer. Make the AsyncLLM, "
            "connect and push while one loop runs."
        )
    running = asyncio.run_coroutine_threadsafe(make(), loop)
    try:
        return wait(running.result)
    except Exception:
        running.cancel()  # without effect on one that has ended
        raise


def check_elsewhere(loop: asyncio.AbstractEventLoop, *, instead: str) -> None:
    """Refuse to wait for a loop on its own thread.

    Raises:
        SyncError: if this is that thread; it says what to do instead.
    """
    if _running_loop() is loop:
        raise SyncError(
            f"Called on the event loop that runs the engine, which would wait for itself. Use {instead}."
        )


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
