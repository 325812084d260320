"""Writing buckets into the live weights, layer by layer; vLLM's loader is checked element by element."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.bucket import made
from lorasync.errors import SyncError
from lorasync.kernels import PendingMerge
from lorasync.receive.direct import DirectWrites
from lorasync.receive.live import layer_name
from lorasync.receive.reload import FreshLayer, load_counted

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch

    from lorasync.bucket import Bucket, Item
    from lorasync.receive.live import LiveModel, Unit


class LiveWriter:
    """Takes any number of buckets by `write`, then `finish`, or else `undo`.

    A layer that is loaded anew keeps its old weights until all of its tensors have come.

    Args:
        live: The served model.
        writes: Sorts the buckets. Pass the same one for each push, and a bucket that is reused is sorted only once.
    """

    def __init__(self, live: LiveModel, writes: DirectWrites | None = None) -> None:
        self._live = live
        self._writes = writes if writes is not None else DirectWrites(live)
        self._waiting: dict[Unit, dict[str, torch.Tensor]] = {}
        self._written: set[str] = set()
        self.touched = False

    def write(self, bucket: Bucket[Item]) -> None:
        """Copy, merge or load these checkpoint tensors; layers become complete, and live, one by one.

        Raises:
            MismatchError: VLLM's loader did not write what the load plan says.
        """
        direct = self._writes.of(bucket)
        self.touched |= bool(bucket)
        direct.write()
        self._written |= direct.params
        come = set()
        for name, given in direct.others.items():
            tensor = made(given)
            self._copy(name, tensor)
            unit = self._live.unit_of(name)
            if unit is not None:
                self._waiting.setdefault(unit, {})[name] = tensor
                if not isinstance(given, PendingMerge):
                    come.add(name)
        self._load([unit for unit, held in self._waiting.items() if held.keys() == unit.names])
        self._own(come)

    def finish(self) -> None:
        """Derive anew what the engine derives from its weights.

        Raises:
            SyncError: A layer did not get all of its tensors; the message names each.
        """
        if self._waiting:
            layers = sorted(layer for unit in self._waiting for layer in unit.layers)
            raise SyncError(
                f"{', '.join(layers[:8])}: part of their tensors never came, expected all of them."
            )
        self._live.refresh(self._written)

    def undo(self) -> None:
        """Forget the tensors of incomplete layers, which keep their old weights; complete layers keep the new ones."""
        self._waiting.clear()
        self._live.refresh(self._written)

    def _copy(self, name: str, tensor: torch.Tensor) -> None:
        for row in self._live.plan.rows_of(name):
            if row.param in self._live.direct:
                target = self._live.live_slice(row.param, row.target)
                target.copy_(row.source.view(tensor.contiguous()), non_blocking=True)
                self._written.add(row.param)

    def _own(self, come: Collection[str]) -> None:
        """Copy the tensors whose layers wait for another bucket: the sender writes that one to the same memory."""
        for held in self._waiting.values():
            held.update({name: tensor.clone() for name, tensor in held.items() if name in come})

    def _load(self, units: Sequence[Unit]) -> None:
        """Load complete units, all by one call of vLLM's loader, as each call walks the whole model."""
        if not units:
            return
        names = [name for unit in units for name in unit.layers]
        tensors = {name: tensor for unit in units for name, tensor in self._waiting.pop(unit).items()}
        params = frozenset[str]().union(*(unit.params for unit in units))
        fresh: dict[str, FreshLayer] = {}
        kept = False
        try:
            fresh.update((name, FreshLayer(self._live.layer(name))) for name in names)
            self._fill(fresh, tensors, params)
            kept = True
        finally:
            for layer in fresh.values():
                layer.close(keep=kept)
        self._written |= params

    def _fill(
        self, fresh: Mapping[str, FreshLayer], tensors: Mapping[str, torch.Tensor], params: frozenset[str]
    ) -> None:
        load: Any = self._live.model.load_weights
        layers = {name: layer.layer for name, layer in fresh.items()}
        expected = {param: self._live.plan.written[param] for param in params}
        load_counted(load, tensors, layers, expected)
        for param in params & self._live.plan.aliases.keys():
            self._live.copy_to_views(
                param, layers[layer_name(param)].get_parameter(param.rpartition(".")[-1]).data
            )
        for layer in fresh.values():
            layer.process()
        self._live.derive_from(layers.values())
        for name, layer in fresh.items():
            layer.check(name)
