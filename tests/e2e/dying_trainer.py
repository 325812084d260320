"""A trainer that reaches its engine through another process, and is killed in the middle of a merged push."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

CALLS = ("collective_rpc", "reset_prefix_cache")


@dataclass
class Calls:
    """What a push needs of an engine that may be restarted behind these calls, as behind a URL."""

    llm: Any

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        found: list[Any] = self.llm.collective_rpc(method, timeout, args, kwargs)
        return found

    def reset_prefix_cache(self) -> None:
        self.llm.reset_prefix_cache()


class Remote:
    """The same calls, made from another process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _call(self, name: str, *arguments: Any) -> Any:
        self._connection.send((name, arguments))
        failure, found = self._connection.recv()
        if failure:
            raise RuntimeError(failure)
        return found

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        found: list[Any] = self._call("collective_rpc", method, timeout, args, kwargs)
        return found

    def reset_prefix_cache(self) -> None:
        self._call("reset_prefix_cache")


def serve_until_gone(listener: Listener, calls: Calls) -> list[str]:
    """Make a remote trainer's calls on an engine until the trainer is gone; return the messages that it sent, by ``op``."""
    made = []
    with listener.accept() as connection:
        while True:
            try:
                name, arguments = connection.recv()
            except (EOFError, OSError):  # also in the middle of a message
                return made
            assert name in CALLS
            made.append(arguments[2][0]["op"] if name == "collective_rpc" else name)
            try:
                answer = ("", getattr(calls, name)(*arguments))
            except Exception as error:
                answer = (str(error), None)
            with contextlib.suppress(OSError):
                connection.send(answer)


def main(address: str, base: str) -> None:
    from lorasync import MergedSource
    from lorasync.push import connect
    from tests import models
    from tests.e2e.faults import from_the_middle
    from tests.models import tiny

    def die(name: str, tensor: Any) -> list[Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    policy = tiny(base)
    models.move(policy, seed=1)
    source = MergedSource(policy)
    sync = connect(source, Remote(Client(address)), timeout=60, bucket_bytes=1 << 20)
    sync.source = from_the_middle(source, die)
    sync.send_weights()


if __name__ == "__main__":
    main(*sys.argv[1:])
