"""An `AsyncLLM` is waited for from another thread than the one of its event loop."""

from __future__ import annotations

import asyncio

from lorasync.errors import SyncError


def refuse_own_loop(loop: asyncio.AbstractEventLoop, instead: str) -> None:
    """Refuse to wait on the loop's own thread, where that would stop the engine that is waited for.

    Raises:
        SyncError: on that thread, with what to do instead.
    """
    try:
        here = asyncio.get_running_loop()
    except RuntimeError:
        return
    if here is loop:
        raise SyncError(
            f"Called on the event loop that runs the engine, which would wait for itself. Use {instead}."
        )
