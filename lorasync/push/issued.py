"""The requests that a connection has handed out: what becomes of those whose version goes away.

vLLM ends the whole engine when a request names an adapter that it doesn't hold. So a version's request is one object,
which the connection remembers: before the version goes, the object is closed or leads to a version that lives.
"""

from __future__ import annotations

import secrets
import weakref
from typing import TYPE_CHECKING, Literal, Protocol

from lorasync.errors import VersionGoneError
from lorasync.wire import ADAPTER_IDS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

OnGone = Literal["refuse", "newest"]


class Named(Protocol):
    """VLLM's `LoRARequest`, as far as it is led elsewhere."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class Issued:
    """One connection's requests, by version.

    Attributes:
        asked: whether a version was asked for, or used, since this was last set to False.
        token: finds this again where a copy of a request is unpickled in the same process.
    """

    def __init__(
        self,
        name: str,
        *,
        on_gone: OnGone,
        in_flight: Callable[[], Collection[int]] = frozenset,
        taken: Callable[[], str] = str,
    ) -> None:
        self._name = name
        self._follow = on_gone == "newest"
        self._in_flight = in_flight
        self._taken = taken
        self._current = 0
        self._alive: set[int] = set()
        self._ended = ""
        self._objects: dict[int, weakref.ref[Named]] = {}
        self._followers: list[weakref.ref[Named]] = []
        self.asked = False
        self.token = secrets.token_hex(8)
        _by_token[self.token] = self

    def name_of(self, version: int) -> str:
        """What vLLM calls a version."""
        return f"{self._name}@{version}"

    def path_of(self, version: int) -> str:
        """Where vLLM believes that it lies: a part of the prefix cache's key, never opened."""
        return f"lorasync://{self._name}/{version}"

    def living(self, version: int) -> int:
        """The version itself, or the one that requests for it are led to."""
        return version if not self._follow or version in self._alive else self._current

    def add(self, version: int, request: Named) -> None:
        """Remember the request that names this version."""
        self._objects[version] = weakref.ref(request)

    def known(self, version: int) -> Named | None:
        """The request that names this version, if it is still about."""
        ref = self._objects.get(version)
        return None if ref is None else ref()

    def check(self, version: int) -> None:
        """Say whether a request for this version may go to an engine; asked when vLLM's front end takes it.

        Raises:
            VersionGoneError: if the version is gone. One that other requests in flight still name is held for them.
        """
        self.asked = True
        reason = self._ended or self._taken() or ("" if version in self._alive else self._gone())
        if reason and version not in self._in_flight():
            raise VersionGoneError(f"{self.name_of(version)}: {reason}")

    def _gone(self) -> str:
        return (
            f"got a request for a version that is no longer in the engine, expected version {self._current}. Take a "
            "request anew with sync.request(), or connect(..., on_gone='newest'): kept ones are then answered by the "
            "newest version. Nothing else is affected."
        )

    # ------------------------------------------------------------------- what the connection says of versions

    def serve(self, version: int, *, keep: Collection[int] = ()) -> None:
        """Serve the version from now on; beside it only those to be kept."""
        self._current = version
        self.retire(keep)
        for request in _still(self._followers):
            self._lead(request)

    def retire(self, keep: Collection[int]) -> None:
        """All others than these are about to go; the one that is served stays."""
        self._alive = {self._current, *keep}
        gone = [self._objects.pop(v) for v in list(self._objects) if v not in self._alive]
        if self._follow:
            self._followers += gone
            for request in _still(gone):
                self._lead(request)

    def retain(self, versions: Iterable[int]) -> None:
        """They don't go after all: requests in flight name them."""
        self._alive |= set(versions)

    @property
    def alive(self) -> frozenset[int]:
        """The versions that requests may name."""
        return frozenset(self._alive)

    def end(self, reason: str) -> None:
        """No version of this connection can be asked for any more."""
        self._ended = reason

    def let_go(self) -> None:
        """Nobody is asked any more what is in flight."""
        self._in_flight, self._taken = frozenset, str

    def _lead(self, request: Named) -> None:
        request.lora_name = self.name_of(self._current)
        request.lora_int_id = ADAPTER_IDS + self._current
        request.lora_path = self.path_of(self._current)


def _still(refs: list[weakref.ref[Named]]) -> list[Named]:
    """Those that somebody holds; the others are forgotten."""
    found = [(ref, one) for ref in refs if (one := ref()) is not None]
    refs[:] = [ref for ref, _ in found]
    return [one for _, one in found]


def issued_by(token: str) -> Issued | None:
    """The connection's requests, in this process."""
    return _by_token.get(token)


_by_token: weakref.WeakValueDictionary[str, Issued] = weakref.WeakValueDictionary()
