"""Factors from the trainer, merged in the worker: W = base + s·B·A, from the pristine base at each push."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.base_check import from_json as samples_from_json
from lorasync.errors import Mismatch, MismatchError, SyncError, UnmergeableError
from lorasync.receive.bases import MixedBases, PackedBases
from lorasync.receive.described import Described
from lorasync.receive.frozen import ignored_notes, may_be_ignored
from lorasync.receive.mergeable import entries_by_weight, refuse_not_mergeable
from lorasync.receive.remerge import Remerge
from lorasync.receive.restore import Restore
from lorasync.receive.staging import Staging, parsed
from lorasync.receive.trained_base import TrainedBase
from lorasync.source.spec import FactorSpec

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch

    from lorasync.bucket import Bucket
    from lorasync.receive.bases import Bases
    from lorasync.receive.load_plan import ManifestEntry
    from lorasync.receive.served import ServedModel


class FactorApplier:
    """Stages factors, and merges them into the live weights at commit; atomic, and it can go one version back.

    Args:
        manifest: What the trainer will send.
        served: What the worker serves.
        wanted: The settings of `MergeInWorker`, and what the adapter and its base are.

    Raises:
        UnmergeableError: This adapter can't be merged from factors in the worker.
        MismatchError: The served model is another one, or has another base.
    """

    changes_weights = True
    takes_merges = False

    def __init__(
        self, manifest: Sequence[ManifestEntry], served: ServedModel, wanted: Mapping[str, Any]
    ) -> None:
        self._served = served
        self._spec = parsed(FactorSpec.from_json, wanted, "spec")
        samples = parsed(samples_from_json, wanted, "samples")
        untied = {name: sample for name, sample in samples.items() if name not in self._spec.ties}
        self._trained = TrainedBase(parsed(str, wanted, "base"), untied)
        self._entries = entries_by_weight(self._spec)
        refuse_not_mergeable(self._spec)
        self._staging = Staging(manifest, served.device)
        base = self._base_manifest()
        may_ignore = may_be_ignored([name for name, _, _ in base], self._entries)
        self._live = served.live(served.plan_for(base, what="factors", may_ignore=may_ignore))
        self._live.check_writable()
        self._refuse_cut_dora()
        self._packed_parts: dict[str, torch.Tensor] = {}
        self._serving: Bucket[torch.Tensor] | None = None
        self._previous: Bucket[torch.Tensor] | None = None
        self._torn = False
        self._foreign = self._trained.changed_by_others(served, self._live)
        self._names = sorted(self._entries)
        self._bases = self._trained.find(served, self._live, self._names, self._changed)
        self._remerge = self._remerge_from(self._bases)

    # ---------------------------------------------------------------------------------------- the verbs

    def describe(self) -> Described:
        return Described(notes=tuple(ignored_notes(self._live.plan)))

    def receive(self, bucket: Bucket[torch.Tensor]) -> None:
        self._staging.add(bucket)

    def receive_base(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._packed_parts.update(
            {name: tensor.to(self._served.device, copy=True) for name, tensor in tensors.items()}
        )

    def commit(self, version: int, in_flight: Collection[int]) -> None:  # noqa: ARG002
        staged = self._staging.take(version)
        self._complete_base()
        try:
            self._restore_the_rest()
            self._remerge.apply(staged)
        except BaseException:
            self._staging.give_back(staged)
            self._serve_again()
            raise
        self._torn = False
        if self._previous is not None:
            self._staging.give_back(self._previous)
        self._previous, self._serving = self._serving, staged
        self._served.changed.intersection_update(self._remerge.params)

    def rollback(self, in_flight: Collection[int]) -> None:  # noqa: ARG002
        if self._previous is None:
            raise SyncError("rollback: there is no version before this one on this connection.")
        try:
            self._remerge.apply(self._previous)
        except BaseException:
            self._serve_again()
            raise
        self._serving, self._previous = self._previous, self._serving  # asked again, it goes forward

    def undo(self) -> bool:
        self._staging.drop()
        return self._torn

    def close(self, in_flight: Collection[int]) -> None:  # noqa: ARG002
        self.undo()

    def _serve_again(self) -> None:
        """Merge once more what was served before a merge that failed; until that is done the weights are torn."""
        self._torn = True
        if self._serving is not None:
            self._remerge.apply(self._serving)
            self._torn = False

    # ------------------------------------------------------------------------------------ the handshake

    def _base_manifest(self) -> list[ManifestEntry]:
        dtype = self._served.dtype
        found = {name: (name, dtype, shape) for name, shape in self._trained.shapes.items()}
        for saved in self._spec.saved:
            found[saved.weight] = (saved.weight, dtype, self._staging.expected[saved.tensor][1])
        unknown = sorted(self._entries.keys() - found.keys())
        if unknown:
            raise MismatchError(
                "Some weights can't be merged in the worker; nothing was touched.",
                [Mismatch(n, "no base weight of that name", "one", "Use MergedSource.") for n in unknown],
            )
        return list(found.values())

    def _refuse_cut_dora(self) -> None:
        if self._served.ranks == 1 or not self._trained.is_copied:
            return
        cut = [m.weight for m in self._spec.modules if m.how.dora]
        if cut:
            raise UnmergeableError(
                f"{', '.join(cut[:5])}: DoRA needs whole rows, and base={self._trained.kind!r} keeps only this rank's part "
                "of them under tensor parallelism. Use MergeInWorker(base='checkpoint') or MergedSource."
            )

    # ----------------------------------------------------------------------------------------- the base

    @property
    def _changed(self) -> set[str]:
        """The parameters that do not hold the base: earlier pushes have written them, or somebody else has."""
        return self._served.changed | self._foreign

    def _remerge_from(self, bases: Bases) -> Remerge:
        return Remerge(
            self._served,
            self._live,
            bases,
            entries=self._entries,
            names=self._names,
            shapes=self._trained.shapes,
        )

    def _complete_base(self) -> None:
        """Once the trainer's packed weights have come, use them as the base of every quantized weight."""
        if not self._trained.comes_packed or isinstance(self._bases, MixedBases):
            return
        packed = PackedBases(self._packed_parts, self._trained.packed_dtypes, self._served.device)
        self._packed_parts = {}
        # What was quantized but has no adapter is part of the policy too: the engine still holds it unquantized.
        self._names = sorted(self._entries.keys() | packed.names)
        self._bases = MixedBases(packed, self._served.checkpoint)
        self._remerge = self._remerge_from(self._bases)

    def _restore_the_rest(self) -> None:
        """Give the base back to what only earlier pushes have changed, of this connection or of another one."""
        rest = Restore(self._live, self._changed, self._names)
        self._served.changed.update(self._foreign, self._remerge.params)
        self._foreign = set()
        if rest.names:
            self._torn = True
            rest.write(self._bases.part, self._bases.stored)
