"""Merging an adapter's factors into the live weights, each time anew from the base."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from lorasync.bucket import Bucket
from lorasync.kernels import Base, GroupedMerge, MergeJob
from lorasync.merge.edits import LowRankUpdate, UpdatePart, edited
from lorasync.receive.load_plan import check_complete
from lorasync.receive.restore import fed_by, loads
from lorasync.receive.streamed import StreamedMerges, buffer_for
from lorasync.receive.windows import Rectangle, Row, is_rectangle
from lorasync.receive.writer import LiveWriter
from lorasync.source.edits import with_factors
from lorasync.source.spec import FactorModule

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from lorasync.receive.bases import Bases
    from lorasync.receive.live import LiveModel
    from lorasync.receive.served import ServedModel
    from lorasync.source.edits import Entry

Factors = Bucket[torch.Tensor]


class Remerge:
    """Merges factors into the live weights; `apply` may be called with any number of buckets of factors that are reused.

    Args:
        served: What the worker serves.
        live: The served model, as a push writes to it.
        bases: Where the base weights come from.
        entries: What the adapter does to each weight, by checkpoint name.
        names: The checkpoint names that are written: those with entries, and those whose base is in ``bases`` alone.
        shapes: The shapes of the trainer's frozen weights, by checkpoint name.

    Raises:
        MismatchError: A layer that has to be loaded anew would not get all of its tensors.
    """

    def __init__(
        self,
        served: ServedModel,
        live: LiveModel,
        bases: Bases,
        *,
        entries: Mapping[str, Sequence[Entry]],
        names: Collection[str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._device, self._dtype = served.device, served.dtype
        self._live, self._bases, self._entries, self._shapes = live, bases, entries, shapes
        rows = live.direct_rows(names)
        by_kernel = [row for row in rows if self._is_for_a_kernel(row)]
        self._grouped = [row for row in by_kernel if bases.is_on_device(row.name)]
        self._streamed = [row for row in by_kernel if not bases.is_on_device(row.name)]
        self._buffer = buffer_for(self._streamed, self._dtype, self._device)
        seen = set(by_kernel)
        self._others = _by_name(row for row in rows if row not in seen)
        units = live.units_of(names)
        check_complete(live.plan, frozenset[str]().union(*(unit.params for unit in units)))
        self._loads = list(loads(live, units))
        self._written = {row.param for row in rows}
        self.params = fed_by(live.plan, names)
        """The parameters that a merge writes to."""
        self._merges: dict[object, tuple[GroupedMerge, StreamedMerges]] = {}  # by the key of the factors

    def apply(self, factors: Factors) -> None:
        """Merge into the live weights, and derive anew what the engine derives from them.

        Raises:
            MismatchError: vLLM's loader did not write what the load plan says; a part of the weights may be new.
        """
        self._run_kernels(factors)
        for name, rows in self._others.items():
            for row, merged in self._merged_rows(name, rows, factors):
                self._live.live_slice(row.param, row.target).copy_(merged)
        self._load(factors)
        self._live.refresh(self._written)

    def _run_kernels(self, factors: Factors) -> None:
        if not (self._grouped or self._streamed):
            return
        if factors.key not in self._merges:
            job = self._jobs_of(factors)
            grouped = GroupedMerge([job(row, self._bases.rectangle(row)) for row in self._grouped])
            streamed = StreamedMerges(self._streamed, self._bases.rectangle, job, self._buffer)
            self._merges[factors.key] = (grouped, streamed)
        grouped, streamed = self._merges[factors.key]
        grouped.run()
        streamed.run()

    def _load(self, factors: Factors) -> None:
        writer = LiveWriter(self._live)
        try:
            for names in self._loads:
                writer.write(Bucket({name: self._merged(name, factors) for name in names}))
        except BaseException:
            writer.undo()
            raise
        writer.finish()

    def _is_for_a_kernel(self, row: Row) -> bool:
        module = self._only_module(row.name)
        plain = module is not None and module.kind == "linear"
        return plain and self._device.type == "cuda" and is_rectangle(row)

    def _only_module(self, name: str) -> FactorModule | None:
        """Return the low-rank update of a weight that gets nothing else, and no DoRA; None for any other weight."""
        entries = self._entries.get(name, ())
        entry = entries[0] if len(entries) == 1 else None
        return entry if isinstance(entry, FactorModule) and not entry.dora else None

    def _jobs_of(self, factors: Factors) -> Callable[[Row, Base], MergeJob]:
        def job(row: Row, base: Base) -> MergeJob:
            module = self._only_module(row.name)
            assert module is not None
            part = Rectangle.of(row, module.shape[1])
            outs, ins = (part.cols, part.rows) if module.fan_in_fan_out else (part.rows, part.cols)
            return MergeJob(
                out=self._live.live_slice(row.param, row.target),
                base=base,
                lora_a=factors[module.a][:, ins[0] : ins[1]],
                lora_b=factors[module.b][outs[0] : outs[1]],
                scaling=module.scaling,
                fan_in_fan_out=module.fan_in_fan_out,
                name=row.name,
            )

        return job

    def _merged_rows(
        self, name: str, rows: list[Row], factors: Factors
    ) -> Iterable[tuple[Row, torch.Tensor]]:
        """Yield each row's part of the merged weight; from this rank's part of the base wherever that suffices."""
        module = self._only_module(name)
        if module is not None:
            yield from self._updated_rows(rows, module, factors)
        elif not self._entries.get(name):
            for row in rows:
                yield row, self._bases.rectangle(row).dequantize()
        else:
            here = self._is_whole(rows)
            base = self._bases.rectangle(rows[0]).dequantize() if here else self._bases.whole(name)
            merged = self._edited(name, base, factors)
            for row in rows:
                yield row, row.source.view(merged.contiguous())

    def _updated_rows(
        self, rows: list[Row], module: FactorModule, factors: Factors
    ) -> Iterable[tuple[Row, torch.Tensor]]:
        update = with_factors(module, factors)
        assert isinstance(update, LowRankUpdate)
        delta = update.delta()
        for row in rows:
            base = self._bases.rectangle(row).dequantize().to(self._device)
            yield row, edited(base, [UpdatePart(update.how, row.source.view(delta))])

    def _is_whole(self, rows: list[Row]) -> bool:
        return len(rows) == 1 and rows[0].source.shape == self._shapes.get(rows[0].name)

    def _merged(self, name: str, factors: Factors) -> torch.Tensor:
        """Return a whole checkpoint tensor, merged and rounded once, for a layer that is loaded by vLLM's loader."""
        if name not in self._entries and name not in self._bases.packed_names:
            return self._bases.stored(name)
        return self._edited(name, self._bases.whole(name), factors).to(self._dtype)

    def _edited(self, name: str, base: torch.Tensor, factors: Factors) -> torch.Tensor:
        edits = (with_factors(entry, factors) for entry in self._entries.get(name, ()))
        return edited(base.to(self._device), edits)


def _by_name(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.name].append(row)
    return found
