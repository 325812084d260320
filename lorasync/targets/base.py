"""How an engine is reached: the calls that a push needs, whatever kind of engine takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from lorasync.targets.patience import Patience

Pause = Literal["keep", "wait", "abort"]

METHOD = "weight_transfer_engine"
"""What `collective_rpc` is asked to call: vLLM's workers keep our engine under this name, and it can be called."""


class Target(Protocol):
    """The calls that a push needs.

    Attributes:
        in_process: its workers are objects of this process: tensors can be handed over as they are.
        generates_meanwhile: requests may be running while a push goes on.
        patience: how long its answers are waited for.
        workers: how many workers answer each message; 0 if only their answers tell.
        engine: what all connections of this process to the same engine have in common; None if it is not known here.
        spread: whether other workers of the same engine belong to other trainer ranks, which drive them in step.
    """

    in_process: bool
    generates_meanwhile: bool
    patience: Patience
    workers: int
    engine: object | None
    spread: bool

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

    def call(self, message: dict[str, Any], payload: Any) -> list[Any]:
        """Give a message, and what rides beside it, to every worker; return what each of them answers."""
        ...

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
class CollectiveRpc(Protocol):
    """Anything with vLLM's `collective_rpc`: a client, a handle of an actor, an object of the user's own."""

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]: ...
