"""Serving the adapter from vLLM's LoRA slots; the worker makes it from tensors, so no file and no stale cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lorasync.base_check import from_json as samples_from_json
from lorasync.errors import (
    PayloadError,
    SyncError,
)
from lorasync.receive.base_check import check_base
from lorasync.receive.described import Described
from lorasync.receive.device import wait_for_stream
from lorasync.receive.frozen import ignored_notes, may_be_ignored
from lorasync.receive.restore import fed_by
from lorasync.receive.slots import check_modules, slots_for
from lorasync.receive.staging import Staging, parsed
from lorasync.source.spec import FactorSpec
from lorasync.vllm_seam.lora import peft_helper
from lorasync.wire import ADAPTER_IDS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lorasync.base_check import WeightSample
    from lorasync.bucket import Bucket
    from lorasync.receive.load_plan import ManifestEntry
    from lorasync.receive.served import ServedModel
    from lorasync.receive.windows import Row


class AdapterApplier:
    """Stages factors. A commit adds them as an adapter with an id of its own, and removes versions that nobody needs.

    Args:
        manifest: What the trainer will send.
        served: What the worker serves.
        wanted: The settings of `ServeAdapter`, and what the adapter and its base are.
        version: The version that the worker serves now.

    Raises:
        EngineNotReadyError: The engine was started without LoRA slots.
        UnmergeableError: LoRA slots can't hold this adapter.
        MismatchError: The served model is another one, or has another base.
    """

    changes_weights = False
    takes_merges = False

    def __init__(
        self, manifest: Sequence[ManifestEntry], served: ServedModel, wanted: Mapping[str, Any], version: int
    ) -> None:
        self._served = served
        self._spec = parsed(FactorSpec.from_json, wanted, "spec")
        self._slots = slots_for(self._spec, served)
        self._helper = peft_helper(self._spec.config, served.lora)
        check_modules([name for name, _, _ in manifest], self._slots)
        self._notes: list[str] = []
        if not parsed(bool, wanted, "other_base"):
            self._check_base(parsed(samples_from_json, wanted, "samples"))
        self._staging = Staging(
            manifest,
            torch.device("cpu"),
            pinned=served.device.type == "cuda",
            dtype=self._slots.dtype,
        )
        self._kept: dict[int, Bucket[torch.Tensor]] = {}
        self._previous = -1
        self._current = version if version in self._ours() else -1

    def describe(self) -> Described:
        return Described(
            capacity=self._slots.capacity,
            held=self._current > 0,
            others=len(self._slots.held()) - len(self._ours()),
            notes=tuple(self._notes),
        )

    def receive(self, bucket: Bucket[torch.Tensor]) -> None:
        self._staging.add(bucket)
        wait_for_stream(self._served.device)  # the host reads it, to scale it

    def receive_base(self, tensors: Mapping[str, torch.Tensor]) -> None:  # noqa: ARG002
        raise PayloadError("Serving an adapter needs no base from the trainer.")

    def commit(self, version: int, in_flight: Collection[int]) -> None:
        tensors = self._staging.take(version)
        keep = set(in_flight) - {version}
        self._check_room(version, keep)
        self._retire_all_but(keep)
        try:
            self._install(version, tensors)
        except BaseException:
            self._retire_all_but(keep)
            if self._current in self._kept:  # it may have had to make room
                self._install(self._current, self._kept[self._current])
            raise
        self._previous, self._current = self._current, version
        self._kept = {v: t for v, t in self._kept.items() if v == self._previous} | {version: tensors}

    def rollback(self, in_flight: Collection[int]) -> None:
        if self._previous not in self._kept:
            raise SyncError("rollback: there is no version before this one on this connection.")
        back = self._previous
        self._check_room(back, set(in_flight) - {back})
        self._retire_all_but({*in_flight, back})
        self._install(back, self._kept[back])
        self._previous, self._current = self._current, back  # asked again, it goes forward

    def undo(self) -> bool:
        self._staging.drop()
        return False

    def hand_over(self) -> None:
        """Leave the adapters to another trainer's applier, whose next push decides which ones are removed."""
        self.undo()
        self._kept = {}

    def close(self, in_flight: Collection[int]) -> None:
        """Remove the adapters: no trainer is left that names them. Those in use are removed at the next handshake."""
        self.undo()
        self._retire_all_but(in_flight)
        self._kept = {}

    def _ours(self) -> set[int]:
        """Return the versions that the worker holds, also those that an earlier connection has left in use."""
        return {number - ADAPTER_IDS for number in self._slots.pushed()}

    def _install(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        number = ADAPTER_IDS + version
        if version not in self._ours():
            self._refuse_taken(number)
            self._slots.add(number, tensors, self._helper)
        self._pin(version)
        self._slots.activate(number)

    def _pin(self, newest: int) -> None:
        """Keep vLLM from dropping versions to make room: it can't load them again, as there is no file, and would end.

        One place stays unpinned for an adapter of the user's. Without a place for it vLLM would end, too.
        """
        older = sorted(self._ours() - {newest}, reverse=True)
        places = max(self._slots.capacity - 1, 1)
        for rank, version in enumerate([newest, *older]):
            self._slots.keep_in_cache(ADAPTER_IDS + version, pinned=rank < places)

    def _check_room(self, version: int, keep: set[int]) -> None:
        capacity = self._slots.capacity
        if len(keep) >= capacity:
            raise SyncError(
                f"max_cpu_loras: got {capacity}, expected room for version {version} beside {sorted(keep)}, which "
                "requests in flight still name. Nothing was changed."
            )

    def _refuse_taken(self, number: int) -> None:
        """Refuse an id under which somebody else has an adapter: vLLM would keep that one, and serve it."""
        if number in self._slots.held():
            raise SyncError(
                f"lora_int_id: got an adapter of somebody else's under {number}, expected none from {ADAPTER_IDS + 1} on: "
                "these ids are lorasync's. Remove it (remove_lora), or count your own from 1 on."
            )

    def _retire_all_but(self, versions: Collection[int]) -> None:
        for version in self._ours() - set(versions):
            self._slots.remove(ADAPTER_IDS + version)

    def _check_base(self, found: Mapping[str, WeightSample]) -> None:
        samples = {n: s for n, s in found.items() if n not in self._spec.ties}
        dtype = self._served.dtype
        manifest = [(name, dtype, sample.shape) for name, sample in samples.items()]
        may_ignore = may_be_ignored(list(samples), {m.weight for m in self._spec.modules})
        plan = self._served.plan_for(manifest, what="the weights that were trained on", may_ignore=may_ignore)
        self._notes = ignored_notes(plan)
        live, checkpoint = self._served.live(plan), self._served.checkpoint
        unseen = {
            row.param
            for row in plan.rows
            if row.param in self._served.unseen and row.param not in live.direct
        }
        changed = self._served.changed - unseen
        self._notes += _unseen_notes(unseen)

        def read(row: Row) -> torch.Tensor:
            if row.param in live.direct:
                part = live.live_slice(row.param, row.target)
                if row.param not in changed or torch.equal(part.cpu(), checkpoint.part(row)):
                    return part
            _refuse_changed({row.param} & changed)
            return checkpoint.part(row)

        def read_whole(name: str) -> torch.Tensor:
            _refuse_changed(fed_by(plan, [name]) & changed)
            return checkpoint.whole(name)

        fix = (
            "On another base the adapter is another policy: use MergedSource, or MergeInWorker(base='nf4') for a QLoRA "
            "policy, or accept it with ServeAdapter(..., other_base=True)."
        )
        check_base(samples, plan, read, dtype, fix=fix, read_whole=read_whole)


def _unseen_notes(params: Collection[str]) -> list[str]:
    if not params:
        return []
    note = (
        f"the engine ran before it was attached, and {len(params)} of its weights can't be read back (one: {min(params)}): "
        "whether they are still its checkpoint's was not checked. If somebody has changed them, start a fresh engine."
    )
    return [note]


def _refuse_changed(params: Collection[str]) -> None:
    """Refuse parameters that earlier pushes have written: nothing tells whether they hold the base."""
    for param in sorted(params):
        raise SyncError(
            f"{param}: the engine serves weights of an earlier push (or that somebody has changed before it was attached), "
            "expected the base that was trained on. Restart the "
            "engine, or use MergeInWorker or MergedSource."
        )
