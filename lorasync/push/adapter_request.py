"""VLLM's `LoRARequest`, as `Sync.request` hands it out: it knows whether its version is still there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest

from lorasync.errors import VersionGoneError
from lorasync.push.issued import Issued, issued_by
from lorasync.wire import ADAPTER_IDS

if TYPE_CHECKING:
    from collections.abc import Callable

try:
    from vllm.exceptions import VLLMClientError as _ClientError
except ImportError:  # before 0.28 vLLM passes on ValueErrors as the client's
    _ClientError = ValueError


class _GoneForClientError(VersionGoneError, _ClientError):  # type: ignore[misc]
    """What vLLM's front ends pass on as it is, as a fault of one request."""


_GoneForClientError.__name__ = _GoneForClientError.__qualname__ = VersionGoneError.__name__


class AdapterRequest(LoRARequest, dict=True, weakref=True):  # type: ignore[misc, call-arg]
    """One for each version of a connection's adapter.

    vLLM's front ends read the name of every request's adapter before the engine hears of it, in `LLM` and in `AsyncLLM`
    alike (`RequestState`): that is where one whose version is gone fails, alone. Copies in the same process are the
    object itself; a `LoRARequest` that is made anew from the fields, or in another process, is vLLM's own and knows
    nothing.
    """

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "lora_name":
            _check(self)
        return value

    def __hash__(self) -> int:
        return hash(self.lora_path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRARequest) and self.lora_path == other.lora_path

    def __copy__(self) -> AdapterRequest:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterRequest:
        return self

    def __reduce__(self) -> tuple[Callable[..., LoRARequest], tuple[str, int]]:
        issued: Issued = self._issued
        version = version_of(self)
        return _again, (issued.token, version, issued.name_of(version), issued.path_of(version))  # type: ignore[return-value]


def request_for(issued: Issued, version: int) -> LoRARequest:
    """The request that names this version: always the same object."""
    version = issued.living(version)
    found = issued.known(version)
    if found is None:
        found = AdapterRequest(issued.name_of(version), ADAPTER_IDS + version, issued.path_of(version))
        found._issued = issued
        issued.add(version, found)
    return found


def version_of(request: AdapterRequest) -> int:
    """The version that a request names now."""
    return int(request.lora_int_id) - ADAPTER_IDS


def _check(request: AdapterRequest) -> None:
    issued = request.__dict__.get("_issued")
    if issued is None:
        return
    try:
        issued.check(version_of(request))
    except VersionGoneError as error:
        raise _GoneForClientError(str(error)) from None


def _again(token: str, version: int, name: str, path: str) -> LoRARequest:
    issued = issued_by(token)
    if issued is not None:
        return request_for(issued, version)
    return LoRARequest(name, ADAPTER_IDS + version, path)
