"""How an engine is reached: the calls that a push needs, whatever kind of engine takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from lorasync.targets.patience import Patience

Pause = Literal["keep", "wait", "abort"]

WEIGHT_SYNC_CALLS = (
    "init_weight_transfer_engine",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
)


class Target(Protocol):
    """The calls that a push needs.

    Attributes:
        in_process: tensors can be handed over as they are.
        generates_meanwhile: requests may be running while a push goes on.
        patience: how long its answers are waited for.
    """

    in_process: bool
    generates_meanwhile: bool
    patience: Patience

    def check_able(self, *, changes_weights: bool, multimodal: bool = False) -> None:
        """Refuse, before anything changes, an engine that lacks what a commit will need.

        Args:
            changes_weights: whether pushes change live weights.
            multimodal: whether the engine keeps outputs of encoders (images, audio), as the handshake says.

        Raises:
            EngineNotReadyError: naming what it lacks.
        """
        ...

    def check_elsewhere(self) -> None:
        """Raise `SyncError` on a thread that the engine needs for its answers."""
        ...

    def init(self, info: dict[str, Any]) -> None: ...

    def start(self) -> None: ...

    def update(self, info: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...

    def name_version(self, version: str) -> None:
        """Let outputs say which version they are of, where this vLLM has them say it."""
        ...

    def reset_caches(self) -> None:
        """Have the engine forget what it has computed with other weights: keys and values, and encoders' outputs."""
        ...

    def pause(self) -> None:
        """Stop generating; what happens to requests in flight was said in `connect`."""

    def resume(self) -> None: ...

    def adapters_in_flight(self) -> frozenset[int]:
        """The ids of the adapters that unfinished requests name."""
        ...

    def settle(self) -> None:
        """Return when requests that were on their way into the engine are among those in flight."""
        ...

    def check_alive(self) -> None:
        """Raise `EngineDeadError` if the engine is known to be dead."""
        ...


@runtime_checkable
class WeightSyncCalls(Protocol):
    """vLLM's own `VLLMWeightSyncClient`: any object with these four calls (an HTTP client, Ray handles) will do."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self) -> None: ...
