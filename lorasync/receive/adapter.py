"""Serving the adapter from vLLM's LoRA slots, built inside the worker from tensors: no file, no stale cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import (
    EngineNotReadyError,
    Mismatch,
    MismatchError,
    PayloadError,
    SyncError,
    UnmergeableError,
)
from lorasync.fingerprint import from_json as samples_from_json
from lorasync.receive import vllm_parts
from lorasync.receive.base import CheckpointBases
from lorasync.receive.edits import ways_to_merge
from lorasync.receive.frozen import ignored_notes, may_be_ignored
from lorasync.receive.identity import check_base
from lorasync.receive.live import LiveModel
from lorasync.receive.plan import Row, record_plan
from lorasync.receive.restore import fed_by
from lorasync.receive.served import refuse_quantized
from lorasync.receive.staging import Staging, parsed
from lorasync.receive.twin import build_twin
from lorasync.source.spec import FactorSpec
from lorasync.wire import ADAPTER_IDS, Control, manifest_from_text

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lorasync.fingerprint import WeightSample
    from lorasync.receive.engine import WorkerEngine


class AdapterApplier:
    """Stages factors; a commit adds them under an id of their own, beside the version before, and retires older ones."""

    changes_weights = False

    def __init__(self, control: Control, engine: WorkerEngine, wanted: Mapping[str, Any]) -> None:
        self._engine = engine
        self._spec = parsed(FactorSpec.from_json, wanted, "spec")
        self._manager = _manager_of(engine, self._spec)
        manifest = manifest_from_text(control.manifest)
        _refuse_what_slots_cannot_hold(self._spec)
        _check_rank(self._spec, engine.vllm_config.lora_config.max_lora_rank)
        self._helper = vllm_parts.peft_helper(self._spec.config, engine.vllm_config.lora_config)
        self._check_modules([name for name, _, _ in manifest])
        self._notes: list[str] = []
        if not parsed(bool, wanted, "other_base"):
            self._check_base(parsed(samples_from_json, wanted, "samples"))
        self._staging = Staging(
            manifest,
            torch.device("cpu"),
            pinned=engine.device.type == "cuda",
            dtype=engine.vllm_config.lora_config.lora_dtype,
        )
        self._kept: dict[int, dict[str, torch.Tensor]] = {}
        self._previous = -1
        self._current = engine.version if engine.version in self._ours() else -1

    def describe(self) -> dict[str, Any]:
        held = self._current > 0
        return {
            "modules": len(self._spec.modules),
            "capacity": int(self._manager.capacity),
            "held": held,
            "others": len(self._manager.list_adapters()) - len(self._ours()),
            "notes": self._notes,
        }

    def receive(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        self._staging.add(tensors)
        vllm_parts.wait_for_stream(self._engine.device)  # the host reads it, to scale it
        return {"received": len(self._staging.received)}

    def receive_base(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:  # noqa: ARG002
        raise PayloadError("Serving an adapter needs no base from the trainer.")

    def commit(self, version: int, in_flight: Collection[int]) -> dict[str, Any]:
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
        return {"adapter_id": ADAPTER_IDS + version}

    def rollback(self, in_flight: Collection[int]) -> dict[str, Any]:
        if self._previous not in self._kept:
            raise SyncError("rollback: there is no version before this one on this connection.")
        back = self._previous
        self._check_room(back, set(in_flight) - {back})
        self._retire_all_but({*in_flight, back})
        self._install(back, self._kept[back])
        self._previous, self._current = self._current, back  # asked again, it goes forward
        return {"adapter_id": ADAPTER_IDS + back}

    def undo(self) -> bool:
        self._staging.drop()
        return False

    def hand_over(self) -> None:
        """Another trainer's applier serves the adapter from now on, whose next push decides what goes."""
        self.undo()
        self._kept = {}

    def close(self, in_flight: Collection[int]) -> None:
        """Remove our adapters: nobody is left to name their versions. Those still in use go at the next handshake."""
        self.undo()
        self._retire_all_but(in_flight)
        self._kept = {}

    def _ours(self) -> set[int]:
        """The versions that the workers hold, also those of an earlier connection that were in use when it ended."""
        held = self._manager.list_adapters().items()
        return {number - ADAPTER_IDS for number, adapter in held if vllm_parts.is_pushed(adapter)}

    def _install(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        number = ADAPTER_IDS + version
        if version not in self._ours():
            self._refuse_taken(number)
            self._manager.add_adapter(vllm_parts.lora_model(number, tensors, self._helper, self._engine))
        self._pin(version)
        self._manager.activate_adapter(number)

    def _pin(self, newest: int) -> None:
        """Our paths lead nowhere: dropped to make room, a version could not be loaded again, which ends the engine.

        One place stays unpinned for a user's own adapter, which can't be loaded otherwise, and that ends it as well.
        """
        older = sorted(self._ours() - {newest}, reverse=True)
        places = max(int(self._manager.capacity) - 1, 1)
        for rank, version in enumerate([newest, *older]):
            vllm_parts.keep_in_cache(self._manager, ADAPTER_IDS + version, pinned=rank < places)

    def _check_room(self, version: int, keep: set[int]) -> None:
        capacity = int(self._manager.capacity)
        if len(keep) >= capacity:
            raise SyncError(
                f"max_cpu_loras: got {capacity}, expected room for version {version} beside {sorted(keep)}, which "
                "requests in flight still name. Nothing was changed."
            )

    def _refuse_taken(self, number: int) -> None:
        """VLLM would keep what it has under this id, and serve that."""
        if number in self._manager.list_adapters():
            raise SyncError(
                f"lora_int_id: got an adapter of somebody else's under {number}, expected none from {ADAPTER_IDS + 1} on: "
                "these ids are lorasync's. Remove it (remove_lora), or count your own from 1 on."
            )

    def _retire_all_but(self, versions: Collection[int]) -> None:
        for version in self._ours() - set(versions):
            self._manager.remove_adapter(ADAPTER_IDS + version)

    def _check_modules(self, names: list[str]) -> None:
        """VLLM ignores the factors of a module that it has no LoRA layer for, without a word."""
        served = vllm_parts.lora_module_names(self._manager)
        wrong = []
        for name in names:
            module = vllm_parts.lora_module_of(name, self._engine.model)
            if module not in served:
                fix = "Train without this module, or use MergedSource or MergeInWorker."
                wrong.append(
                    Mismatch(name, f"factors for {module}", "a module with a LoRA layer in this engine", fix)
                )
        if wrong:
            raise MismatchError("The engine would ignore part of the adapter; nothing was touched.", wrong)

    def _check_base(self, found: Mapping[str, WeightSample]) -> None:
        samples = {n: s for n, s in found.items() if n not in self._spec.ties}
        dtype: torch.dtype = self._engine.model_config.dtype
        manifest = [(name, dtype, sample.shape) for name, sample in samples.items()]
        ranks = int(self._engine.vllm_config.parallel_config.tensor_parallel_size)
        twin = build_twin(self._engine.vllm_config)
        refuse_quantized(self._engine.vllm_config, twin, what="the weights that were trained on")
        may_ignore = may_be_ignored(list(samples), {m.weight for m in self._spec.modules})
        plan = record_plan(twin, manifest, ranks=ranks, may_ignore=may_ignore)
        self._notes = ignored_notes(plan)
        live = LiveModel(self._engine.model, self._engine.model_config, plan)
        checkpoint = CheckpointBases(self._engine.model_config, dtype)
        changed = self._engine.changed

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


def _refuse_changed(params: Collection[str]) -> None:
    """Whether these hold the base is not known, whatever the checkpoint says: earlier pushes have written them."""
    for param in sorted(params):
        raise SyncError(
            f"{param}: the engine serves weights of an earlier push, expected the base that was trained on. Restart the "
            "engine, or use MergeInWorker or MergedSource."
        )


def _manager_of(engine: WorkerEngine, spec: FactorSpec) -> Any:
    if engine.vllm_config.lora_config is None:
        rank = max((m.r for m in spec.modules), default=8)
        raise EngineNotReadyError(
            "enable_lora: got False, expected True: ServeAdapter needs LoRA slots. Start the engine with "
            f"LLM(..., enable_lora=True, max_lora_rank={vllm_parts.permitted_rank(rank)}), or use MergeInWorker."
        )
    return engine.model.lora_manager


def _check_rank(spec: FactorSpec, largest: int) -> None:
    rank = max((m.r for m in spec.modules), default=0)
    if rank > largest:
        fix = f"Start the engine with max_lora_rank={vllm_parts.permitted_rank(rank)}, or use MergeInWorker."
        raise MismatchError(
            "The adapter is too large for the engine's LoRA slots.",
            [Mismatch("max_lora_rank", str(largest), f"at least {rank}, the adapter's rank", fix)],
        )


def _refuse_what_slots_cannot_hold(spec: FactorSpec) -> None:
    """VLLM's LoRA layers compute W·x + s·B·A·x, and nothing else.

    Raises:
        UnmergeableError: naming what is more than that, and the strategies that work.
    """
    problems = [f"{m.weight}: DoRA" for m in spec.modules if m.dora]
    problems += [
        f"{m.weight}: {m.kind} factors" for m in spec.modules if m.kind not in ("linear", "embedding")
    ]
    problems += [f"{b.weight}: a trained bias" for b in spec.biases]
    problems += [f"{r.weight}: trained tokens" for r in spec.rows]
    problems += [f"{s.weight}: trained whole" for s in spec.saved]
    if spec.base_changed_by:
        problems.append(f"init_lora_weights={spec.base_changed_by!r}: it changed the base")
    if problems:
        raise UnmergeableError(
            "vLLM's LoRA slots can't hold this adapter: "
            + "; ".join(problems[:8])
            + f". Use {ways_to_merge(spec)}."
        )
