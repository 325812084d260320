"""Merged weights from the trainer, loaded into the live weights as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorasync.errors import Mismatch, MismatchError, PayloadError, SyncError
from lorasync.receive.described import Described
from lorasync.receive.direct import DirectWrites
from lorasync.receive.live import stands_for
from lorasync.receive.load_plan import LoadPlan, ManifestEntry, check_complete
from lorasync.receive.staging import BucketCheck
from lorasync.receive.writer import LiveWriter
from lorasync.wire import dtype_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lorasync.bucket import Bucket, Item
    from lorasync.receive.served import ServedModel


class LoadApplier:
    """Writes each bucket of merged weights into the live weights when the bucket comes.

    Args:
        manifest: What the trainer will send.
        served: What the worker serves.

    Raises:
        MismatchError: What will be sent does not fit the served model, leaves a part of it unset, or is wider than it.
    """

    changes_weights = takes_merges = True

    def __init__(self, manifest: Sequence[ManifestEntry], served: ServedModel) -> None:
        plan = served.plan_for(manifest, what="merged weights")
        check_complete(plan, plan.uncovered.keys() - stands_for(served.model, plan.uncovered).keys())
        _refuse_narrowing(plan, manifest, served.dtype)
        self._expected = {name: (dtype, shape) for name, dtype, shape in manifest}
        self._live = served.live(plan)
        self._live.check_writable()
        self._writes = DirectWrites(self._live)
        self._changed = served.changed
        self._pass: LiveWriter | None = None
        self._received: set[str] = set()
        self._check = BucketCheck()

    def describe(self) -> Described:
        return Described()

    def receive(self, bucket: Bucket[Item]) -> None:
        self._check(bucket, self._expected, self._received)
        if self._pass is None:
            self._pass = LiveWriter(self._live, self._writes)
            self._changed.update(self._live.plan.layouts)
        self._pass.write(bucket)
        self._received |= bucket.keys()

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
