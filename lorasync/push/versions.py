"""The versions of an adapter beside each other in the engines: which stay, which go, and what requests may name."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

from lorasync.errors import EngineNotReadyError, SyncError
from lorasync.push.issued import Issued

if TYPE_CHECKING:
    from lorasync.push.engines import Engines
    from lorasync.push.issued import OnGone

_LOG = logging.getLogger(__name__)


class AdapterVersions:
    """One connection's adapter: what was pushed, and the requests that name it.

    A trainer rank without engines knows the versions, too: it may be asked for a request.
    """

    def __init__(self, name: str, engines: Engines, *, on_gone: OnGone) -> None:
        self._engines = engines
        self._served = 0
        self._issued = Issued(name, on_gone=on_gone, in_flight=engines.in_flight, taken=self._taken)

    def check_room(self) -> None:
        """Say so if the engine can't hold what is needed: two versions under load, and a place for the user's own.

        Raises:
            EngineNotReadyError: if there is no room even for the versions.
        """
        for session in self._engines.sessions:
            needed = 2 if session.target.generates_meanwhile else 1
            if session.capacity < needed:
                raise EngineNotReadyError(
                    f"{session.name}: max_cpu_loras: got {session.capacity}, expected at least {needed}: while a version is "
                    "replaced, requests in flight still need the one before. Start the engine with max_cpu_loras=4 (host "
                    "memory only)."
                )
            if session.capacity <= needed:
                self._warn_of_room(session.name, session.capacity, session.others)

    def _warn_of_room(self, name: str, capacity: int, others: int) -> None:
        text = (
            f"{name}: max_cpu_loras: got {capacity}, expected at least {others + 3} to serve adapters of your own "
            f"beside this policy ({others or 'none'} there now): its versions take every place, and a request for another "
            "adapter would end the engine. Start it with a larger max_cpu_loras (host memory only)."
        )
        if others:
            warnings.warn(text, stacklevel=6)
        else:
            _LOG.warning("%s", text)

    def request(self) -> dict[str, Any]:
        """What `generate` needs to be answered by the version that is served.

        Raises:
            SyncError: before the first push.
        """
        self._issued.asked = True
        return self.quietly()

    def quietly(self) -> dict[str, Any]:
        """The same, for a question of our own."""
        if not self._served:
            raise SyncError(
                "request: got no adapter of this connection in the engine, expected one. Call send_weights() first."
            )
        from lorasync.push.adapter_request import request_for

        return {"lora_request": request_for(self._issued, self._served)}

    def serve(self, version: int, keep: set[int]) -> None:
        """Serve the version from now on, and those to keep."""
        self._served = version
        self._issued.serve(version, keep=keep)

    def to_keep(self) -> set[int]:
        """The versions that stay beside the next one; requests for all others are closed, or led elsewhere, here.

        That comes first: a request that vLLM's front end has taken is among those in flight when it is asked again.
        """
        if not self._engines.sessions:
            return set()  # what other ranks keep for requests in flight, nobody can ask for here
        beside = {self._served} if self._served and self._is_room_for(self._served) else set()
        self._issued.retire(self._engines.in_flight() | beside)
        self._engines.settle()
        keep = self._engines.in_flight() | beside
        self._issued.retain(keep)
        return keep

    def _is_room_for(self, version: int) -> bool:
        """Whether a version may stay although none needs it: one place is left for an adapter of the user's own."""
        held = {*self._engines.in_flight(), version}
        return all(
            version in session.needed_beside() or len(held) + 1 < session.capacity
            for session in self._engines.sessions
        )

    def held(self) -> set[int]:
        """All that requests may name now."""
        return set(self._issued.alive)

    def is_asked_for(self) -> bool:
        """Whether requests have been asked for since this was asked last."""
        asked, self._issued.asked = self._issued.asked, False
        return asked

    def end(self, reason: str) -> None:
        """No version can be asked for any more."""
        self._issued.end(reason)
        if not self._engines.in_flight():
            self._issued.let_go()  # or a request that is kept would keep the engines
        self._served = 0

    def _taken(self) -> str:
        taken = self._engines.outdated
        if not taken:
            return self._engines.closed
        return f"another trainer has taken {', '.join(taken)} over, whose versions are served now. connect() again."
