"""What the command line prints, and what becomes of an error: one message, never a traceback."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.text import Text

from lorasync.errors import LorasyncError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REFUSED, INTERRUPTED = 2, 130
_out, _err = Console(), Console(stderr=True)


def say(*parts: str | tuple[str, str]) -> None:
    """Print a line as it is: `[…]` in it is text, not rich's markup. A part may be (text, style)."""
    _out.print(Text.assemble(*parts), soft_wrap=True)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on a terminal that something takes its time."""
    with _err.status(Text(what)):
        yield


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Say what becomes of the work when Ctrl-C or a SIGTERM ends it."""
    try:
        yield
    except KeyboardInterrupt:
        _refuse("Interrupted", "what was begun is removed.", INTERRUPTED)


def run(app: Callable[..., object]) -> None:
    """Run a command line app.

    Exit codes are the app's own, 2 for anything that is refused or fails, 130 for Ctrl-C. With ``LORASYNC_DEBUG=1`` in
    the environment the traceback of what lorasync didn't foresee is shown.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no "→" is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # What is begun is cleaned up behind an exception, and a plain SIGTERM raises none.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(prog_name="lorasync")
    except LorasyncError as error:
        _refuse(type(error).__name__, str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(REFUSED) from None
    except Exception as error:
        if os.environ.get("LORASYNC_DEBUG"):
            raise
        text = " ".join(str(error).split()) or "no message"
        _refuse(type(error).__name__, f"{text} (LORASYNC_DEBUG=1 shows where)")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _refuse(kind: str, message: str, code: int = REFUSED) -> NoReturn:
    _err.print(Text.assemble((kind, "bold red"), f": {message}"), soft_wrap=True)
    raise SystemExit(code) from None
