"""Where a worker gets the pristine base weights that it merges from; of each, the part that this rank holds."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open

from lorasync.bnb import find_stored
from lorasync.errors import Mismatch, MismatchError, SyncError
from lorasync.kernels import Base, PackedBase, PlainBase
from lorasync.receive.windows import Rectangle

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from lorasync.receive.live import LiveModel
    from lorasync.receive.windows import Row


class Bases(Protocol):
    """Where base weights come from, by checkpoint name, or by a row of the load plan, which names a part of one."""

    packed_names: frozenset[str]
    """The weights whose base is the trainer's packed one."""

    def rectangle(self, row: Row) -> Base:
        """Return the part of a weight that a row names, as the merge kernels take it."""
        ...

    def whole(self, name: str) -> torch.Tensor:
        """Return a whole weight in the dtype that the engine serves."""
        ...

    def part(self, row: Row) -> torch.Tensor:
        """Return the part that a row names of a weight that is not packed."""
        ...

    def stored(self, name: str) -> torch.Tensor:
        """Return a whole weight that is not packed, as the checkpoint has it."""
        ...

    def is_on_device(self, name: str) -> bool:
        """Whether the base of a weight lies on the GPU already."""
        ...


class CopiedBases:
    """Copies of the live weights, taken while these hold the base; of layers that are loaded anew, checkpoint tensors.

    The copies outlive a connection: a trainer that comes back merges from the same base.

    Args:
        device: Where the copies lie.
        checkpoint: Stands in for live weights that no longer hold the base.
    """

    packed_names = frozenset[str]()

    def __init__(self, device: torch.device | str, checkpoint: CheckpointBases) -> None:
        self.device = torch.device(device)
        self._checkpoint = checkpoint
        self._rectangles: dict[Row, torch.Tensor] = {}
        self._whole: dict[str, torch.Tensor] = {}

    def keep(self, live: LiveModel, rows: Iterable[Row], changed: Collection[str]) -> None:
        """Copy what the rows name, unless that was copied before.

        Args:
            live: The served model.
            rows: Rows of the load plan.
            changed: Parameters that do not hold the base; their rows are read from the checkpoint.
        """
        for row in rows:
            if row not in self._rectangles:
                pristine = row.param not in changed
                base = live.live_slice(row.param, row.target) if pristine else self._checkpoint.part(row)
                self._rectangles[row] = self._own(base)

    def keep_whole(self, names: Iterable[str]) -> None:
        """Copy whole tensors of the checkpoint, unless they were copied before."""
        for name in names:
            if name not in self._whole:
                self._whole[name] = self._own(self._checkpoint.stored(name))

    def kept(self, row: Row) -> torch.Tensor | None:
        """Return the copy of what a row names, if there is one."""
        return self._rectangles.get(row)

    def rectangle(self, row: Row) -> Base:
        return PlainBase(self._rectangles[row])

    def part(self, row: Row) -> torch.Tensor:
        kept = self.kept(row)
        return kept if kept is not None else self._checkpoint.part(row)

    def whole(self, name: str) -> torch.Tensor:
        return self._checkpoint.as_served(self.stored(name))

    def stored(self, name: str) -> torch.Tensor:
        """Return a whole tensor as the checkpoint has it: the copy, or else from the files."""
        return self._whole[name] if name in self._whole else self._checkpoint.stored(name)

    def is_on_device(self, name: str) -> bool:  # noqa: ARG002
        return self.device.type != "cpu"

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = self.device.type == "cpu" and tensor.is_cuda
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device, pin_memory=pinned)
        return copy.copy_(tensor)


class CheckpointBases:
    """The engine's own checkpoint, read from its safetensors files each time."""

    packed_names = frozenset[str]()

    def __init__(self, model_config: Any, dtype: torch.dtype) -> None:
        self._model = str(model_config.model)
        self._revision = model_config.revision
        self._dtype = dtype
        self._found: dict[str, Path] | None = None

    def rectangle(self, row: Row) -> Base:
        return PlainBase(self.part(row))

    def part(self, row: Row) -> torch.Tensor:
        """Return what a row of the load plan reads."""
        return row.source.view(self.whole(row.name))

    def whole(self, name: str) -> torch.Tensor:
        """Return a tensor of the checkpoint in the dtype that the engine serves.

        Raises:
            SyncError: The checkpoint has no safetensors files on this machine, or no tensor of this name.
        """
        return self.as_served(self.stored(name))

    def as_served(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def stored(self, name: str) -> torch.Tensor:
        """Return a tensor of the checkpoint as vLLM's loader gets it.

        Raises:
            SyncError: The checkpoint has no safetensors files on this machine, or no tensor of this name.
        """
        files = self._files()
        if name not in files:
            raise SyncError(
                f"{name}: not in the engine's checkpoint {self._model}. Use base='device' or MergedSource."
            )
        with safe_open(files[name], "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor

    def is_on_device(self, name: str) -> bool:  # noqa: ARG002
        return False

    def _files(self) -> dict[str, Path]:
        if self._found is None:
            with ExitStack() as stack:
                opened = [
                    (p, stack.enter_context(safe_open(p, "pt")))
                    for p in _safetensors_of(self._model, self._revision)
                ]
                self._found = {name: path for path, file in opened for name in file.keys()}  # noqa: SIM118
        return self._found


class PackedBases:
    """The trainer's packed 4-bit weights: the very base that a QLoRA policy was trained on."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype], device: torch.device
    ) -> None:
        self._packed = dict(_packed_bases(tensors, dtypes, device))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._packed)

    def rectangle(self, row: Row) -> Base:
        packed = self._packed[row.name]
        part = Rectangle.of(row, packed.shape[1])
        return packed.rectangle(rows=part.rows, cols=part.cols)

    def whole(self, name: str) -> torch.Tensor:
        return self._packed[name].dequantize()


def _packed_bases(
    tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype], device: torch.device
) -> Iterator[tuple[str, PackedBase]]:
    """Read the trainer's packed weights, which come as bitsandbytes would save them.

    Raises:
        MismatchError: one of them, or what says how it is packed, is not there.
    """
    for name, dtype in dtypes.items():
        stored = find_stored(name, tensors)
        if stored is None or stored.kind == "int8" or name not in tensors or stored.lacking(tensors):
            parts = sorted(k.removeprefix(f"{name}.") for k in tensors if k.startswith(f"{name}."))
            raise MismatchError(
                "The packed base is not whole; nothing was touched.",
                [
                    Mismatch(
                        name,
                        f"the parts {parts}",
                        "a packed weight and all that its quant_state names",
                        "connect() again.",
                    )
                ],
            )
        yield name, stored.base(tensors, dtype=dtype, device=device)


class MixedBases:
    """The trainer's packed weights where there are some, the engine's checkpoint for everything else."""

    def __init__(self, packed: PackedBases, checkpoint: CheckpointBases) -> None:
        self._packed = packed
        self._checkpoint = checkpoint
        self.packed_names = packed.names

    def rectangle(self, row: Row) -> Base:
        return (self._packed if row.name in self.packed_names else self._checkpoint).rectangle(row)

    def whole(self, name: str) -> torch.Tensor:
        return (self._packed if name in self.packed_names else self._checkpoint).whole(name)

    def part(self, row: Row) -> torch.Tensor:
        return self._checkpoint.part(row)

    def stored(self, name: str) -> torch.Tensor:
        return self._checkpoint.stored(name)

    def is_on_device(self, name: str) -> bool:
        return name in self.packed_names


def has_checkpoint(model_config: Any) -> bool:
    """Whether the engine's checkpoint is on this machine, as safetensors files."""
    try:
        return bool(_safetensors_of(str(model_config.model), model_config.revision))
    except (SyncError, OSError, ValueError):  # a hub id that isn't cached, among others
        return False


def _safetensors_of(model: str, revision: str | None) -> list[Path]:
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(model, revision=revision, allow_patterns="*.safetensors", local_files_only=True)
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SyncError(
            f"{folder}: no safetensors files, expected the engine's checkpoint. It holds the base for base='checkpoint', "
            "and for other kinds that of weights which an earlier push has changed. Use MergedSource, or base='device' on "
            "an engine that has taken no push yet."
        )
    return files
