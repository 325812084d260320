"""What a worker does with the tensors it gets: one applier a strategy, all with the same four verbs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lorasync.errors import Mismatch, MismatchError, PayloadError, SyncError
from lorasync.receive.adapter import AdapterApplier
from lorasync.receive.described import Described
from lorasync.receive.factors import FactorApplier
from lorasync.receive.live import stands_for
from lorasync.receive.plan import LoadPlan, check_complete
from lorasync.receive.staging import BucketCheck, parsed
from lorasync.receive.writer import LiveWriter
from lorasync.wire import dtype_name, manifest_from_text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from lorasync.kernels import PendingMerge
    from lorasync.receive.plan import ManifestEntry
    from lorasync.receive.served import ServedModel


class Applier(Protocol):
    """Receives buckets, then commits. Until `commit` returns, a failure must leave `undo` able to clean up.

    ``in_flight`` are the versions that unfinished requests name: those must stay answerable.

    Attributes:
        changes_weights: whether a commit changes live weights.
        takes_merges: whether `receive` takes merges that are still to be made, besides tensors.
    """

    changes_weights: bool
    takes_merges: bool

    def describe(self) -> Described: ...

    def receive(self, tensors: Any) -> None: ...

    def receive_base(self, tensors: Mapping[str, torch.Tensor]) -> None: ...

    def commit(self, version: int, in_flight: Collection[int]) -> None: ...

    def rollback(self, in_flight: Collection[int]) -> None: ...

    def undo(self) -> bool:
        """Drop what the unfinished update brought; True if live weights had been touched already."""
        ...

    def close(self, in_flight: Collection[int]) -> None: ...


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
        raise SyncError(f"apply: got {kind!r}, expected one of {', '.join(kinds)}. Versions differ.")
    return kinds[kind]()


class LoadApplier:
    """Merged weights: each bucket goes into the live weights as it comes."""

    changes_weights = True
    takes_merges = True

    def __init__(self, manifest: Sequence[ManifestEntry], served: ServedModel) -> None:
        plan = served.plan_for(manifest, what="merged weights")
        check_complete(plan, plan.uncovered.keys() - stands_for(served.model, plan.uncovered).keys())
        _refuse_narrowing(plan, manifest, served.dtype)
        self._expected = {name: (dtype, shape) for name, dtype, shape in manifest}
        self._live = served.live(plan)
        self._live.check_writable()
        self._changed = served.changed
        self._pass: LiveWriter | None = None
        self._received: set[str] = set()
        self._check = BucketCheck()

    def describe(self) -> Described:
        return Described()

    def receive(self, tensors: Mapping[str, torch.Tensor | PendingMerge]) -> None:
        self._check(tensors, self._expected, self._received)
        if self._pass is None:
            self._pass = LiveWriter(self._live)
            self._changed.update(self._live.plan.layouts)
        self._pass.write(tensors)
        self._received |= tensors.keys()

    def commit(self, version: int, in_flight: Collection[int]) -> None:  # noqa: ARG002
        missing = sorted(self._expected.keys() - self._received)
        if missing:
            raise PayloadError(
                f"version {version}: {len(missing)} of {len(self._expected)} tensors never came: {', '.join(missing[:8])}"
            )
        assert self._pass is not None
        self._pass.finish()
        self._pass, self._received = None, set()

    def receive_base(self, tensors: Mapping[str, torch.Tensor]) -> None:  # noqa: ARG002
        raise PayloadError("A merged push has no base of its own.")

    def rollback(self, in_flight: Collection[int]) -> None:  # noqa: ARG002
        raise SyncError(
            "rollback: merged weights replace the old ones in place. Push the older policy instead."
        )

    def undo(self) -> bool:
        touched = self._pass is not None and self._pass.touched
        if self._pass is not None:
            self._pass.undo()
        self._pass, self._received = None, set()
        return touched

    def close(self, in_flight: Collection[int]) -> None:  # noqa: ARG002
        self.undo()


def _refuse_narrowing(plan: LoadPlan, manifest: Sequence[ManifestEntry], dtype: torch.dtype) -> None:
    """A tensor in a wider dtype than the engine's would be rounded a second time, without a word.

    What vLLM keeps narrower than the engine's ``dtype`` it rounds itself, of a checkpoint too.
    """
    params: dict[str, str] = {name: param for param, names in plan.feeds.items() for name in names}
    wrong = []
    for name, sent, _ in manifest:
        serving = plan.layouts[params[name]][1] if name in params else sent
        serving = torch.promote_types(serving, dtype) if serving.is_floating_point else serving
        if (
            torch.promote_types(sent, serving) != serving
            and sent.is_floating_point
            and serving.is_floating_point
        ):
            fix = f"Send what it serves: MergedSource(model, dtype=torch.{dtype_name(serving)})."
            wrong.append(Mismatch(name, dtype_name(sent), dtype_name(serving), fix))
    if wrong:
        raise MismatchError("Some tensors are wider than what the engine serves; nothing was touched.", wrong)
