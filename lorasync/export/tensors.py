"""The tensors of one folder's safetensors files, read one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lorasync.errors import LoadError
from lorasync.export.folders import weight_files
from lorasync.export.writer import DTYPES

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor


class Tensors:
    """The tensors of one save, by name.

    Args:
        folder: Where the files are.
        stem: ``"model"`` or ``"adapter_model"``.

    Raises:
        LoadError: There are no safetensors files, one that the index names is missing, or one is damaged.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self._open: list[Any] = [_opened(file) for file in weight_files(folder, stem)]
        self._where = {name: handle for handle in self._open for name in handle.keys()}  # noqa: SIM118

    @property
    def names(self) -> list[str]:
        """Every tensor's name, file by file."""
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor into memory of its own."""
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return dtype and shape; nothing is read.

        Raises:
            LoadError: A dtype that this version doesn't know.
        """
        view = self._where[name].get_slice(name)
        stored = view.get_dtype()
        if stored not in DTYPES:
            raise LoadError(f"{name}: got {stored}, expected one of {', '.join(DTYPES)}.")
        return DTYPES[stored], tuple(view.get_shape())


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise LoadError(
            f"{file}: got {error}, expected a whole safetensors file. Fetch it again (a Git LFS pointer is a short text)."
        ) from error
