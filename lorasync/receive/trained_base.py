"""The base that a policy was trained on: compared with what this worker has, and found there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorasync.errors import Mismatch, MismatchError, PayloadError
from lorasync.receive.base_check import check_base, differences
from lorasync.receive.restore import Restore

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from lorasync.base_check import WeightSample
    from lorasync.receive.bases import Bases, CopiedBases
    from lorasync.receive.live import LiveModel
    from lorasync.receive.served import ServedModel
    from lorasync.receive.windows import Row

FOUR_BIT = ("nf4", "fp4")


@dataclass(frozen=True)
class TrainedBase:
    """What a trainer says of its base, and from where it wants its factors merged.

    Attributes:
        kind: The ``base`` of `MergeInWorker`.
        samples: A few elements of every frozen weight, by checkpoint name.
    """

    kind: str
    samples: Mapping[str, WeightSample]

    @property
    def comes_packed(self) -> bool:
        """Whether the trainer sends its packed 4-bit weights."""
        return self.kind == "nf4"

    @property
    def is_copied(self) -> bool:
        """Whether the worker merges from copies that it takes of its live weights."""
        return self.kind not in ("nf4", "checkpoint")

    @property
    def plain(self) -> dict[str, WeightSample]:
        """The samples of what the trainer does not hold quantized."""
        return {name: sample for name, sample in self.samples.items() if sample.base == "plain"}

    @property
    def packed_dtypes(self) -> dict[str, torch.dtype]:
        """What each 4-bit weight dequantizes to."""
        return {n: _floating_point(s.dtype) for n, s in self.samples.items() if s.base in FOUR_BIT}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: sample.shape for name, sample in self.samples.items()}

    def changed_by_others(self, served: ServedModel, live: LiveModel) -> set[str]:
        """Return every parameter if a live weight differs from this base, and no push of ours has written that weight.

        So an engine that was started from something else (random weights, another update) than its checkpoint is given
        the checkpoint, where that is the base. Where copies of live weights are the base, `find` refuses it.
        """
        if self.is_copied:
            return set()
        clean = {row.param for row in live.plan.rows if row.param in live.direct} - served.changed
        samples = self.plain if self.comes_packed else self.samples
        readable = {n: s for n, s in samples.items() if _lies_in(n, clean, live)}

        def read(row: Row) -> torch.Tensor:
            return live.live_slice(row.param, row.target)

        found = differences(readable, live.plan, read, served.dtype, read_whole=served.checkpoint.whole)
        return set(live.plan.layouts) if next(found, None) is not None else set()

    def find(
        self, served: ServedModel, live: LiveModel, names: Collection[str], changed: Collection[str]
    ) -> Bases:
        """Compare every weight with the trainer's, and return where the base comes from.

        Args:
            served: What the worker serves.
            live: The served model, as a push writes to it.
            names: The checkpoint names that the push writes.
            changed: The parameters that do not hold the base.

        Raises:
            MismatchError: The engine's base is another one, or the trainer has no packed weights to send.
        """
        if self.comes_packed:
            self._check_packed()
        copies = served.copies(self.kind) if self.is_copied else None
        written = Restore(live, changed, names).names | set(names)
        read = _reader(served, live, copies, written=written, changed=changed)
        samples = self.plain if self.comes_packed else self.samples
        check_base(
            samples, live.plan, read, served.dtype, fix=self._fix(), read_whole=served.checkpoint.whole
        )
        if copies is None:
            return served.checkpoint  # with nf4 until the packed base has come
        copies.keep(live, live.direct_rows(names), changed)
        copies.keep_whole(sorted({name for unit in live.units_of(names) for name in unit.names}))
        return copies

    def _check_packed(self) -> None:
        others = [n for n, s in self.samples.items() if s.base not in ("plain", *FOUR_BIT)]
        if others or all(s.base == "plain" for s in self.samples.values()):
            held = "8-bit" if others else "no packed 4-bit"
            fix = "Use MergedSource." if others else "Use base='device', 'cpu' or 'checkpoint'."
            raise MismatchError(
                "MergeInWorker(base='nf4') sends the trainer's packed 4-bit weights.",
                [Mismatch("base", f"{held} weights in the trainer", "4-bit weights (NF4 or FP4)", fix)],
            )

    def _fix(self) -> str:
        if not self.comes_packed and any(s.base in FOUR_BIT for s in self.samples.values()):
            return "The policy was trained on 4-bit weights: use MergeInWorker(base='nf4'), or MergedSource."
        return "Start the engine from the checkpoint that was trained on; after a merged push, use base='checkpoint'."


def _lies_in(name: str, params: Collection[str], live: LiveModel) -> bool:
    """Whether all of a checkpoint tensor goes into these parameters, as slices."""
    rows = live.plan.rows_of(name)
    return bool(rows) and all(row.param in params for row in rows)


def _reader(
    served: ServedModel,
    live: LiveModel,
    copies: CopiedBases | None,
    *,
    written: Collection[str],
    changed: Collection[str],
) -> Callable[[Row], torch.Tensor]:
    """Read what a push will take for the base: an earlier copy, a live weight that is unchanged, or the checkpoint."""

    def read(row: Row) -> torch.Tensor:
        kept = copies.kept(row) if copies is not None else None
        if kept is not None:
            return kept
        from_live = row.param in live.direct and row.param not in changed
        if from_live and (copies is not None or row.name not in written):
            return live.live_slice(row.param, row.target)
        return served.checkpoint.part(row)

    return read


def _floating_point(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise PayloadError(f"dtype {name!r}: expected a floating-point one.")
    return dtype
