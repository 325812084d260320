"""Which applier does what the trainer asked for: one a strategy, all with the same verbs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

from lorasync.errors import SyncError
from lorasync.receive.adapter import AdapterApplier
from lorasync.receive.factors import FactorApplier
from lorasync.receive.load import LoadApplier
from lorasync.receive.staging import parsed
from lorasync.wire import manifest_from_text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import torch

    from lorasync.bucket import Bucket
    from lorasync.receive.described import Described
    from lorasync.receive.served import ServedModel


class Applier(Protocol):
    """Receives buckets, then commits. Whatever fails until `commit` returns, `undo` cleans up after it.

    ``in_flight`` are the versions that unfinished requests name: the worker must be able to answer those.
    """

    takes_merges: bool
    """Whether `receive` takes merges that are still to be made, besides tensors."""

    changes_weights: bool
    """Whether a push changes the engine's weights; an adapter in LoRA slots leaves them alone."""

    def describe(self) -> Described:
        """Return what the trainer has to know, for the answer to its handshake."""
        ...

    def receive(self, bucket: Bucket[Any]) -> None:
        """Check a bucket, and stage or load it."""
        ...

    def receive_base(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take a bucket of the trainer's packed base."""
        ...

    def commit(self, version: int, in_flight: Collection[int]) -> None:
        """Serve what has come, as this version."""
        ...

    def rollback(self, in_flight: Collection[int]) -> None:
        """Serve the version before; a second rollback goes forward again."""
        ...

    def undo(self) -> bool:
        """Drop what the unfinished update brought; return whether the update had changed live weights already."""
        ...

    def close(self, in_flight: Collection[int]) -> None:
        """Forget the trainer, and remove what only its requests need."""
        ...


def applier_for(strategy: str, manifest: str, served: ServedModel, version: int) -> Applier:
    """Make the applier that the trainer asked for in its handshake.

    Args:
        strategy: The trainer's strategy and its settings, as JSON.
        manifest: What the trainer will send, as `manifest_as_text` writes it.
        served: What the worker serves.
        version: The version that the worker serves now.

    Raises:
        MismatchError: What will be pushed does not fit the served model; everything wrong is listed.
    """
    wanted = parsed(json.loads, {"apply": strategy}, "apply")
    kinds: dict[str, Callable[[], Applier]] = {
        "load": lambda: LoadApplier(manifest_from_text(manifest), served),
        "merge": lambda: FactorApplier(manifest_from_text(manifest), served, wanted),
        "adapter": lambda: AdapterApplier(manifest_from_text(manifest), served, wanted, version),
    }
    kind = str(wanted.get("kind")) if isinstance(wanted, dict) else type(wanted).__name__
    if kind not in kinds:
        raise SyncError(
            f"apply: got {kind!r}, expected one of {', '.join(kinds)}. Trainer and engine run different versions of "
            "lorasync: install the same one on both sides."
        )
    return kinds[kind]()
