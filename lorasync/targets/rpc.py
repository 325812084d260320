"""An engine that is reached from outside: any object with vLLM's `collective_rpc`."""

from __future__ import annotations

import concurrent.futures
import inspect
from typing import TYPE_CHECKING, Any

from lorasync.errors import EngineNotReadyError, SyncError
from lorasync.targets.base import METHOD
from lorasync.targets.patience import Patience

if TYPE_CHECKING:
    from lorasync.targets.base import CollectiveRpc

_RESETS = ("reset_prefix_cache", "reset_encoder_cache")


class RpcTarget:
    """Any object with vLLM's `collective_rpc`, which carries strings, numbers, lists, dicts and bytes."""

    in_process = spread = False
    generates_meanwhile = True
    workers = 0
    engine: object | None = None

    def __init__(self, rpc: CollectiveRpc, *, timeout: float) -> None:
        self._rpc = rpc
        self.patience = Patience(timeout)

    def check_able(self, *, changes_weights: bool, multimodal: bool = False) -> None:
        """A client of the user's may lack anything: without a reset, what old weights have computed is served."""
        resets = _RESETS if multimodal else _RESETS[:1]
        needed = ("collective_rpc", *resets) if changes_weights else ("collective_rpc",)
        lacking = [name for name in needed if not callable(getattr(self._rpc, name, None))]
        if lacking:
            raise EngineNotReadyError(
                f"{type(self._rpc).__name__}: has no {', '.join(f'{name}()' for name in lacking)}, expected all of "
                f"{', '.join(needed)}: each is called in every push. Add it to the object. Nothing was touched."
            )

    def check_elsewhere(self) -> None:
        """These calls have no thread of their own."""

    def call(self, message: dict[str, Any], payload: Any) -> list[Any]:
        """Give a message to every worker.

        Raises:
            EngineNotReadyError: if what comes back is no list of answers.
        """
        found = self._call("collective_rpc", METHOD, what=message["op"], args=(message, payload))
        if not isinstance(found, list | tuple):
            raise EngineNotReadyError(
                f"{type(self._rpc).__name__}.collective_rpc: returned {type(found).__name__}, expected a list with what "
                "each worker has returned. What can't be known to have arrived is not pushed."
            )
        return list(found)

    def name_version(self, version: str) -> None:
        """Such an object is not asked to name it."""

    def reset_caches(self) -> None:
        for name in _RESETS:
            if callable(getattr(self._rpc, name, None)):
                self._reset(name)

    def _reset(self, name: str) -> None:
        """Any answer will do that doesn't say no: None, True, a response of HTTP that is no error."""
        found = self._call(name)
        if (found is not None and not found) or int(getattr(found, "status_code", 200)) >= 400:
            raise SyncError(
                f"{name}: the engine said {found!r}, expected that it empties the cache. Push again."
            )

    def pause(self) -> None:
        """Pausing is the caller's."""

    def resume(self) -> None:
        """Nothing was stopped."""

    def adapters_in_flight(self) -> frozenset[int]:
        """Such an object does not tell: the caller keeps requests of retired versions away."""
        return frozenset()

    def settle(self) -> None:
        """Such an object does not tell."""

    def check_alive(self) -> None:
        """Such an object does not tell."""

    def _call(self, name: str, *arguments: Any, what: str = "", **named: Any) -> Any:
        found = self.patience.call(lambda: getattr(self._rpc, name)(*arguments, **named), what or name)
        if inspect.isawaitable(found) or isinstance(found, concurrent.futures.Future):
            if inspect.iscoroutine(found):
                found.close()
            raise EngineNotReadyError(
                f"{type(self._rpc).__name__}.{name}: returned {type(found).__name__}, still to be awaited, expected "
                "to return when the engine has answered. Wrap it: asyncio.run_coroutine_threadsafe(…).result(), ray.get(…)."
            )
        return found
