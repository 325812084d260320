"""A trainer that reaches its engine through another process, and is killed in the middle of a merged push."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

CALLS = (
    "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache",
)  # fmt: skip


@dataclass
class Calls:
    """VLLM's weight-sync calls on an engine that may be restarted behind them, as behind a URL."""

    llm: Any

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, info: dict[str, Any]) -> None:
        self.llm.update_weights({"update_info": info})

    def finish_weight_update(self) -> None:
        self.llm.finish_weight_update()

    def reset_prefix_cache(self) -> None:
        self.llm.reset_prefix_cache()


class Remote:
    """The same calls, made from another process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _call(self, name: str, *arguments: Any) -> None:
        self._connection.send((name, arguments))
        failure = self._connection.recv()
        if failure:
            raise RuntimeError(failure)

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, info: dict[str, Any]) -> None:
        self._call("update_weights", info)

    def finish_weight_update(self) -> None:
        self._call("finish_weight_update")

    def reset_prefix_cache(self) -> None:
        self._call("reset_prefix_cache")


def serve_until_gone(listener: Listener, calls: Calls) -> list[str]:
    """Make a remote trainer's calls on an engine until the trainer is gone; which calls it made."""
    made = []
    with listener.accept() as connection:
        while True:
            try:
                name, arguments = connection.recv()
            except (EOFError, ConnectionResetError):
                return made
            assert name in CALLS
            made.append(name)
            try:
                getattr(calls, name)(*arguments)
                connection.send("")
            except Exception as error:
                connection.send(str(error))


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
