"""Merging in the worker: W = base + s·B·A, made anew from the pristine base at each push."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import Mismatch, MismatchError, PayloadError, SyncError, UnmergeableError
from lorasync.fingerprint import WeightSample
from lorasync.fingerprint import from_json as samples_from_json
from lorasync.kernels import Base, GroupedMerge, MergeJob
from lorasync.merge import add_delta, low_rank_delta, merge_low_rank, replace_rows
from lorasync.receive.base import (
    Bases,
    CheckpointBases,
    CopiedBases,
    MixedBases,
    PackedBases,
    Rectangle,
    is_rectangle,
)
from lorasync.receive.edits import edits_by_weight, refuse_not_mergeable
from lorasync.receive.frozen import ignored_notes, may_be_ignored
from lorasync.receive.identity import check_base, differences
from lorasync.receive.live import LiveModel
from lorasync.receive.plan import ManifestEntry, Row, check_complete, record_plan
from lorasync.receive.restore import Restore, fed_by, loads
from lorasync.receive.served import refuse_quantized
from lorasync.receive.staging import Staging, parsed
from lorasync.receive.streamed import StreamedMerges, buffer_for
from lorasync.receive.twin import build_twin
from lorasync.receive.writer import LiveWriter
from lorasync.source.spec import FactorBias, FactorModule, FactorRows, FactorSpec
from lorasync.wire import Control, manifest_from_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasync.receive.engine import WorkerEngine

Factors = Mapping[str, torch.Tensor]
LOAD_BYTES = 32 << 20
"""Merged weights that wait for vLLM's loader at once, if a single layer has not more."""


class FactorApplier:
    """Stages factors, and merges them into the live weights at commit; atomic, and it can go one version back."""

    changes_weights = True

    def __init__(self, control: Control, engine: WorkerEngine, wanted: Mapping[str, Any]) -> None:
        self._spec = parsed(FactorSpec.from_json, wanted, "spec")
        found = parsed(samples_from_json, wanted, "samples")
        self._samples = {name: sample for name, sample in found.items() if name not in self._spec.ties}
        self._kind = parsed(str, wanted, "base")
        self._device = engine.device
        self._dtype: torch.dtype = engine.model_config.dtype
        self._edits = edits_by_weight(self._spec)
        refuse_not_mergeable(self._spec)
        self._staging = Staging(manifest_from_text(control.manifest), engine.device)
        ranks = int(engine.vllm_config.parallel_config.tensor_parallel_size)
        twin = build_twin(engine.vllm_config)
        refuse_quantized(engine.vllm_config, twin, what="factors")
        manifest = self._base_manifest()
        may_ignore = may_be_ignored([name for name, _, _ in manifest], self._edits)
        plan = record_plan(twin, manifest, ranks=ranks, may_ignore=may_ignore)
        self._live = LiveModel(engine.model, engine.model_config, plan)
        self._live.check_writable()
        self._checkpoint = CheckpointBases(engine.model_config, self._dtype)
        self._touched = sorted(self._edits)
        self._packed_parts: dict[str, torch.Tensor] = {}
        self._served: dict[str, torch.Tensor] | None = None
        self._previous: dict[str, torch.Tensor] | None = None
        self._torn = False
        self._active: Factors = {}  # those that are being merged
        # By the identity of the factors, which are kept with it: their memory is used again.
        self._merges: dict[int, tuple[Factors, GroupedMerge, StreamedMerges]] = {}
        self._check_dora(ranks)
        self._changed = engine.changed  # the engine's own set: it outlives this connection
        self._foreign = self._found_changed()
        self._bases: Bases = self._find_bases(engine)
        self._plan_rows()

    # ----------------------------------------------------------------------------------- the four verbs

    def describe(self) -> dict[str, Any]:
        notes = ignored_notes(self._live.plan)
        return {"touched": len(self._touched), "needs_base": self._kind == "nf4", "notes": notes}

    def receive(self, tensors: Factors) -> dict[str, Any]:
        self._staging.add(tensors)
        return {"received": len(self._staging.received)}

    def receive_base(self, tensors: Factors) -> dict[str, Any]:
        """Take a bucket of the trainer's packed base."""
        self._packed_parts.update(
            {name: tensor.to(self._device, copy=True) for name, tensor in tensors.items()}
        )
        return {"received": len(self._packed_parts)}

    def commit(self, version: int, in_flight: Collection[int]) -> dict[str, Any]:  # noqa: ARG002
        staged = self._staging.take(version)
        self._complete_base()
        try:
            self._restore_the_rest()
            self._apply(staged)
        except BaseException:
            self._torn = True
            self._staging.give_back(staged)
            if self._served is not None:
                self._apply(self._served)
                self._torn = False
            raise
        self._torn = False
        if self._previous is not None:
            self._staging.give_back(self._previous)
        self._previous, self._served = self._served, staged
        self._changed.intersection_update(self._own)
        return {}

    def rollback(self, in_flight: Collection[int]) -> dict[str, Any]:  # noqa: ARG002
        if self._previous is None:
            raise SyncError("rollback: there is no version before this one on this connection.")
        try:
            self._apply(self._previous)
        except BaseException:
            self._torn = True
            if self._served is not None:
                self._apply(self._served)
                self._torn = False
            raise
        self._served, self._previous = self._previous, self._served  # asked again, it goes forward
        return {}

    def undo(self) -> bool:
        self._staging.drop()
        return self._torn

    def close(self, in_flight: Collection[int]) -> None:  # noqa: ARG002
        self.undo()

    # ------------------------------------------------------------------------------------ the handshake

    def _base_manifest(self) -> list[ManifestEntry]:
        found = {n: (n, self._dtype, s.shape) for n, s in self._samples.items()}
        for saved in self._spec.saved:
            found[saved.weight] = (saved.weight, self._dtype, self._staging.expected[saved.tensor][1])
        unknown = sorted(self._edits.keys() - found.keys())
        if unknown:
            raise MismatchError(
                "Some weights can't be merged in the worker; nothing was touched.",
                [Mismatch(n, "no base weight of that name", "one", "Use MergedSource.") for n in unknown],
            )
        return list(found.values())

    def _found_changed(self) -> set[str]:
        """Everything, if a readable live weight is not what the trainer's base says and no push of ours explains it.

        So an engine that was started from something else (random weights, another update) than its checkpoint is given
        the checkpoint, where that is the base; with copies of live weights as the base it is refused.
        """
        if self._kind not in ("checkpoint", "nf4"):
            return set()
        plan, live = self._live.plan, self._live
        clean = {row.param for row in plan.rows if row.param in live.direct} - self._changed
        plain = {n: s for n, s in self._samples.items() if self._kind == "checkpoint" or s.base == "plain"}
        readable = {n: s for n, s in plain.items() if plan.rows_of(n) and self._fed_only(n, clean)}
        found = differences(readable, plan, self._live_part, self._dtype, read_whole=self._checkpoint.whole)
        return set(plan.layouts) if next(found, None) is not None else set()

    def _fed_only(self, name: str, params: Collection[str]) -> bool:
        return all(row.param in params for row in self._live.plan.rows_of(name))

    def _find_bases(self, engine: WorkerEngine) -> Bases:
        """Where the base comes from, once every weight of it was compared with the trainer's."""
        samples = self._samples
        if self._kind == "nf4":
            self._check_packed()
            samples = {n: s for n, s in samples.items() if s.base == "plain"}
        copies = None
        if self._kind not in ("nf4", "checkpoint"):
            copies = engine.copies_of_base(self._kind, self._checkpoint)
        restored = self._restore().names
        written = self._edits.keys() | restored

        def read(row: Row) -> torch.Tensor:
            kept = copies.kept(row) if copies is not None else None
            if kept is not None:
                return kept
            from_live = row.param in self._live.direct and row.param not in self._all_changed
            if from_live and (copies is not None or row.name not in written):
                return self._live_part(row)
            return self._checkpoint.part(row)

        self._check_base(samples, read)
        if copies is None:
            return self._checkpoint  # with nf4 until the packed base has come
        copies.keep(self._live, self._direct_rows(self._touched), self._all_changed)
        copies.keep_whole(self._names_through_loader())
        return copies

    @property
    def _all_changed(self) -> set[str]:
        return self._changed | self._foreign

    def _restore(self) -> Restore:
        return Restore(self._live, self._all_changed, self._touched)

    def _check_packed(self) -> None:
        others = [n for n, s in self._samples.items() if s.base not in ("plain", "nf4", "fp4")]
        if others or all(s.base == "plain" for s in self._samples.values()):
            held = "8-bit" if others else "no packed 4-bit"
            fix = "Use MergedSource." if others else "Use base='device', 'cpu' or 'checkpoint'."
            raise MismatchError(
                "MergeInWorker(base='nf4') sends the trainer's packed 4-bit weights.",
                [Mismatch("base", f"{held} weights in the trainer", "4-bit weights (NF4 or FP4)", fix)],
            )

    def _check_base(self, samples: Mapping[str, WeightSample], read: Callable[[Row], torch.Tensor]) -> None:
        four_bit = any(s.base in ("nf4", "fp4") for s in self._samples.values())
        fix = (
            "The policy was trained on 4-bit weights: use MergeInWorker(base='nf4'), or MergedSource."
            if four_bit and self._kind != "nf4"
            else "Start the engine from the checkpoint that was trained on; after a merged push, use base='checkpoint'."
        )
        check_base(samples, self._live.plan, read, self._dtype, fix=fix, read_whole=self._checkpoint.whole)

    def _live_part(self, row: Row) -> torch.Tensor:
        return self._live.live_slice(row.param, row.target)

    def _check_dora(self, ranks: int) -> None:
        if ranks == 1 or self._kind in ("checkpoint", "nf4"):
            return
        cut = [m.weight for m in self._spec.modules if m.how.dora]
        if cut:
            raise UnmergeableError(
                f"{', '.join(cut[:5])}: DoRA needs whole rows, and base={self._kind!r} keeps only this rank's part of them "
                "under tensor parallelism. Use MergeInWorker(base='checkpoint') or MergedSource."
            )

    # ------------------------------------------------------------------------------------------ merging

    def _complete_base(self) -> None:
        """Once, when the trainer's packed weights have come: from now on they are the base of every quantized weight."""
        if self._kind != "nf4" or isinstance(self._bases, MixedBases):
            return
        dtypes = {n: _float(s.dtype) for n, s in self._samples.items() if s.base in ("nf4", "fp4")}
        packed = PackedBases(self._packed_parts, dtypes, self._device)
        self._packed_parts = {}
        self._bases = MixedBases(packed, self._checkpoint)
        # What was quantized but has no adapter is part of the policy too: the engine still holds it unquantized.
        self._touched = sorted(self._edits.keys() | packed.names)
        self._plan_rows()

    def _plan_rows(self) -> None:
        rows = self._direct_rows(self._touched)
        by_kernel = [row for row in rows if self._is_for_a_kernel(row)]
        self._grouped_rows = [row for row in by_kernel if self._is_on_device(row)]
        self._streamed_rows = [row for row in by_kernel if not self._is_on_device(row)]
        self._stream_buffer = buffer_for(self._streamed_rows, self._dtype, self._device)
        seen = set(by_kernel)
        self._other_rows = _by_name(row for row in rows if row not in seen)
        self._merges = {}
        units = self._live.units_of(self._touched)
        check_complete(self._live.plan, frozenset[str]().union(*(unit.params for unit in units)))
        self._loads = list(loads(self._live, units, LOAD_BYTES))
        self._written = {row.param for row in rows}
        self._own = fed_by(self._live.plan, self._touched)

    def _restore_the_rest(self) -> None:
        """Give the base back to what only earlier pushes have changed, theirs or another connection's."""
        rest = self._restore()
        self._changed.update(self._foreign, self._own)
        self._foreign = set()
        if rest.names:
            self._torn = True
            rest.write(self._base_part, self._stored, LOAD_BYTES)

    def _base_part(self, row: Row) -> torch.Tensor:
        kept = self._bases.kept(row) if isinstance(self._bases, CopiedBases) else None
        return kept if kept is not None else self._checkpoint.part(row)

    def _apply(self, factors: Factors) -> None:
        self._active = factors
        self._merge_direct()
        writer = LiveWriter(self._live)
        try:
            for names in self._loads:
                writer.write({name: self._merged(name) for name in names})
        except BaseException:
            writer.undo()
            raise
        writer.finish()
        self._live.refresh(self._written)

    def _merge_direct(self) -> None:
        if self._grouped_rows or self._streamed_rows:
            if id(self._active) not in self._merges:
                grouped = GroupedMerge(
                    [self._job(row, self._bases.rectangle(row)) for row in self._grouped_rows]
                )
                streamed = StreamedMerges(
                    self._streamed_rows, self._bases.rectangle, self._job, self._stream_buffer
                )
                self._merges[id(self._active)] = (self._active, grouped, streamed)
            _, grouped, streamed = self._merges[id(self._active)]
            grouped.run()
            streamed.run()
        for name, rows in self._other_rows.items():
            for row, merged in self._merged_rows(name, rows):
                self._live.live_slice(row.param, row.target).copy_(merged)

    def _is_on_device(self, row: Row) -> bool:
        if isinstance(self._bases, MixedBases):
            return row.name in self._bases.packed_names
        return self._kind == "device"

    def _is_for_a_kernel(self, row: Row) -> bool:
        edits = self._edits.get(row.name, [])
        if self._device.type != "cuda" or len(edits) != 1:
            return False
        edit = edits[0]
        plain = isinstance(edit, FactorModule) and edit.kind == "linear" and not edit.dora
        return plain and is_rectangle(row)

    def _job(self, row: Row, base: Base) -> MergeJob:
        (edit,) = self._edits[row.name]
        assert isinstance(edit, FactorModule)
        part = Rectangle.of(row, edit.shape[1])
        outs, ins = (part.cols, part.rows) if edit.fan_in_fan_out else (part.rows, part.cols)
        return MergeJob(
            out=self._live.live_slice(row.param, row.target),
            base=base,
            lora_a=self._active[edit.a][:, ins[0] : ins[1]],
            lora_b=self._active[edit.b][outs[0] : outs[1]],
            scaling=edit.scaling,
            fan_in_fan_out=edit.fan_in_fan_out,
            name=row.name,
        )

    def _merged_rows(self, name: str, rows: list[Row]) -> Iterable[tuple[Row, torch.Tensor]]:
        """Each row's part of the merged weight; from this rank's part of the base wherever that suffices."""
        edits = self._edits.get(name, [])
        if len(edits) == 1 and isinstance(edits[0], FactorModule) and not edits[0].dora:
            how, on_cpu = edits[0].how, self._device.type == "cpu"
            delta = low_rank_delta(how, self._active[edits[0].a], self._active[edits[0].b])
            for row in rows:
                base = self._bases.rectangle(row).dequantize().to(self._device)
                part = row.source.view(delta)
                part = part.to(base.dtype) if how.cast_first and on_cpu else part
                yield row, add_delta(base, part)
        elif not edits:
            for row in rows:
                yield row, self._bases.rectangle(row).dequantize()
        else:
            whole = (
                self._bases.rectangle(rows[0]).dequantize()
                if self._is_whole(rows)
                else self._bases.whole(name)
            )
            merged = self._edited(name, whole)
            for row in rows:
                yield row, row.source.view(merged.contiguous())

    def _is_whole(self, rows: list[Row]) -> bool:
        sample = self._samples.get(rows[0].name)
        return len(rows) == 1 and sample is not None and rows[0].source.shape == sample.shape

    def _merged(self, name: str) -> torch.Tensor:
        """A whole checkpoint tensor, merged and rounded once, for a layer that is loaded through vLLM's loader."""
        if name not in self._edits and not self._is_packed(name):
            return self._stored(name)
        return self._edited(name, self._bases.whole(name)).to(self._dtype)

    def _stored(self, name: str) -> torch.Tensor:
        held = self._bases if isinstance(self._bases, CopiedBases) else self._checkpoint
        return held.stored(name)

    def _is_packed(self, name: str) -> bool:
        return isinstance(self._bases, MixedBases) and name in self._bases.packed_names

    def _edited(self, name: str, base: torch.Tensor) -> torch.Tensor:
        weight = base.to(self._device)
        for edit in self._edits.get(name, []):
            if isinstance(edit, FactorModule):
                magnitude = self._active[edit.magnitude] if edit.magnitude else None
                weight = merge_low_rank(
                    edit.how, weight, self._active[edit.a], self._active[edit.b], magnitude
                )
            elif isinstance(edit, FactorRows):
                weight = replace_rows(weight, edit.rows, self._active[edit.tensor])
            elif isinstance(edit, FactorBias):
                weight = add_delta(weight, self._active[edit.tensor] * edit.scaling)
            else:
                weight = self._active[edit.tensor]
        return weight

    # ------------------------------------------------------------------------------------------- lists

    def _direct_rows(self, names: Iterable[str]) -> list[Row]:
        return [
            row for name in names for row in self._live.plan.rows_of(name) if row.param in self._live.direct
        ]

    def _names_through_loader(self) -> list[str]:
        return sorted({n for unit in self._live.units_of(self._touched) for n in unit.names})


def _by_name(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.name].append(row)
    return found


def _float(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise PayloadError(f"dtype {name!r}: expected a floating-point one.")
    return dtype
