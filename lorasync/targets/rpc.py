"""An engine that is reached through a client: any object with vLLM's weight-sync calls."""

from __future__ import annotations

import concurrent.futures
import inspect
from typing import TYPE_CHECKING, Any

from lorasync.errors import EngineNotReadyError, SyncError
from lorasync.targets.base import WEIGHT_SYNC_CALLS
from lorasync.targets.patience import Patience

if TYPE_CHECKING:
    from lorasync.targets.base import WeightSyncCalls


_RESETS = ("reset_prefix_cache", "reset_encoder_cache")


class CallsTarget:
    """Any object with vLLM's four weight-sync calls, each taking plain dicts."""

    in_process = False
    generates_meanwhile = True

    def __init__(self, calls: WeightSyncCalls, *, timeout: float) -> None:
        self._calls = calls
        self.patience = Patience(timeout)

    def check_able(self, *, changes_weights: bool, multimodal: bool = False) -> None:
        """A client of the user's may lack anything: without a reset, what old weights have computed is served."""
        resets = _RESETS if multimodal else _RESETS[:1]
        needed = (*WEIGHT_SYNC_CALLS, *resets) if changes_weights else WEIGHT_SYNC_CALLS
        lacking = [name for name in needed if not callable(getattr(self._calls, name, None))]
        if lacking:
            raise EngineNotReadyError(
                f"{type(self._calls).__name__}: has no {', '.join(f'{name}()' for name in lacking)}, expected all of "
                f"{', '.join(needed)}: each is called in every push. Add it to the object. Nothing was touched."
            )

    def check_elsewhere(self) -> None:
        """These calls have no thread of their own."""

    def init(self, info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", info)

    def start(self) -> None:
        self._call("start_weight_update")

    def update(self, info: dict[str, Any]) -> None:
        self._call("update_weights", info)

    def finish(self) -> None:
        self._call("finish_weight_update")

    def name_version(self, version: str) -> None:
        """These calls don't name it."""

    def reset_caches(self) -> None:
        for name in _RESETS:
            if callable(getattr(self._calls, name, None)):
                self._reset(name)

    def _reset(self, name: str) -> None:
        """Any answer will do that doesn't say no: None, True, a response of HTTP that is no error."""
        found = self._call(name)
        if (found is not None and not found) or int(getattr(found, "status_code", 200)) >= 400:
            raise SyncError(
                f"{name}: the engine said {found!r}, expected that it empties the cache. Push again."
            )

    def pause(self) -> None:
        """Pausing is the caller's: these calls have none."""

    def resume(self) -> None:
        """Nothing was stopped."""

    def adapters_in_flight(self) -> frozenset[int]:
        """These calls don't tell: the caller keeps requests of retired versions away."""
        return frozenset()

    def settle(self) -> None:
        """These calls don't tell."""

    def check_alive(self) -> None:
        """These calls don't tell."""

    def _call(self, name: str, *arguments: Any) -> Any:
        what = "the handshake" if name == WEIGHT_SYNC_CALLS[0] else name
        found = self.patience.call(lambda: getattr(self._calls, name)(*arguments), what)
        if inspect.isawaitable(found) or isinstance(found, concurrent.futures.Future):
            if inspect.iscoroutine(found):
                found.close()
            raise EngineNotReadyError(
                f"{type(self._calls).__name__}.{name}: returned {type(found).__name__}, still to be awaited, expected "
                "to return when the engine has answered. Wrap it: asyncio.run_coroutine_threadsafe(…).result(), ray.get(…)."
            )
        return found
