"""`merge_to_disk`: a training model, or a base folder and an adapter folder, to one folder that loads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from lorasync.errors import ExportError, LoadError, MismatchError, UnmergeableError
from lorasync.export.beside import (
    copy_beside,
    live_class,
    live_config,
    save_generation_config,
    write_config,
)
from lorasync.export.checkpoint import CheckpointSource
from lorasync.export.config import adapter_config, merged_config, read_json
from lorasync.export.folders import adapter_folder, model_folder
from lorasync.export.loads import check_loads
from lorasync.export.skeleton import misplaced, model_class
from lorasync.export.tensors import Tensors
from lorasync.export.writer import complete_or_nothing, size, write_shards
from lorasync.merge import NEAREST, Rounding
from lorasync.source import MergedSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from lorasync.source import ParamMeta

_SHARD_BYTES = 5_000_000_000
_SLACK = 64 << 20


def merge_to_disk(
    base: Any,
    out: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    rounding: Rounding = NEAREST,
    untie: bool = False,
    shard_bytes: int = _SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the merged model as sharded safetensors, with config, generation config and tokenizer beside it.

    From two folders it needs the memory of one tensor, whatever the size of the model. Before anything is written
    transformers is asked whether the result would load whole. An interrupted run leaves nothing that loads, and nothing
    where ``out`` would be.

    Args:
        base: A folder of a model or a hub id in the local cache (plain, packed by bitsandbytes, in FP8 with scales or in
            MXFP4), or a PEFT model in memory.
        out: The folder to make.
        adapter: The folder of the adapter; for a model in memory its name there (``None``: the active one).
        dtype: What floating-point weights are written as; ``None`` keeps each one's own.
        rounding: How to round what was merged.
        untie: Write tied weights apart where the adapter makes them differ, and say so in the config.
        shard_bytes: The most bytes in one file, as far as a single tensor fits.
        overwrite: Replace what is at ``out``, once the new model is complete.
        progress: Show a bar.

    Returns:
        ``out``, as a path.

    Raises:
        LoadError: A folder is not what it should be, or the base is quantized in a way that isn't read.
        MismatchError: The adapter is not for this base, or the merged model would not load.
        UnmergeableError: The adapter has no merged form.
        NonFiniteError: NaN or Inf.
        ExportError: ``out`` is in use, or the disk is full.

    Example:
        >>> merge_to_disk("Qwen3-8B", "merged", adapter="my-adapter")  # doctest: +SKIP
    """
    made = Path(out)
    _check_dtype(dtype)
    options: dict[str, Any] = {"dtype": dtype, "rounding": rounding, "untie": untie}
    if isinstance(base, str | os.PathLike):
        job = _from_folders(model_folder(base), adapter, made, options)
    else:
        job = _from_model(MergedSource(base, adapter=_name(adapter), **options))
    needed = sum(map(size, job.metadata))
    with complete_or_nothing(made, needed + min(_SLACK, needed), overwrite=overwrite) as folder:
        title = f"Merging to {made.name}"
        with tqdm(total=needed, unit="B", unit_scale=True, desc=title, disable=not progress) as bar:
            write_shards(folder, job.metadata, job.counted(bar), shard_bytes=shard_bytes)
        job.beside(folder)
        if job.config is not None:
            write_config(job.config, folder)
    return made


@dataclass(frozen=True)
class _Job:
    """What to write: the weights, the config (if there is one), and what lies beside them."""

    source: Iterable[tuple[str, Tensor]]
    metadata: list[ParamMeta]
    config: dict[str, Any] | None
    beside: Callable[[Path], None]

    def counted(self, bar: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield the stream, and advance a progress bar with it."""
        for meta, (name, tensor) in zip(self.metadata, self.source, strict=True):
            yield name, tensor
            bar.update(size(meta))


def _from_folders(base: Path, adapter: Any, out: Path, options: dict[str, Any]) -> _Job:
    if adapter is None:
        raise LoadError("adapter: got None, expected the folder of a PEFT adapter, as the base is a folder.")
    folder = adapter_folder(adapter)
    _refuse_inside(out, base, folder)
    try:
        found = CheckpointSource(base, folder, **options)
    except UnmergeableError:
        # No LoRA: PEFT's own merge needs modules, so the model has to be in memory after all.
        source = MergedSource(loaded(base, folder), **options)
        return _from_model(source, partial(copy_beside, base, folder))
    metadata, config = found.metadata(), found.config()
    check_loads(*model_class(config), metadata)
    return _Job(found, metadata, config, partial(copy_beside, base, folder))


def _from_model(source: MergedSource, beside: Callable[[Path], None] | None = None) -> _Job:
    metadata, kind = source.metadata(), live_class(source.model)
    config = live_config(source, metadata)
    if kind is not None and config is not None:
        check_loads(kind, kind.config_class.from_dict(dict(config)), metadata)
    return _Job(source, metadata, config, beside or partial(save_generation_config, source.model))


def loaded(base: Path, adapter: Path, *, dtype: Any = "auto") -> Any:
    """Load a base with its adapter, in plain weights where transformers can.

    Args:
        base: The base's folder.
        adapter: The adapter's folder.
        dtype: As in transformers' `from_pretrained`.

    Raises:
        LoadError: The base doesn't load.
        MismatchError: The adapter is not for it.
    """
    from peft import PeftModel

    kind, _ = model_class(merged_config(read_json(base / "config.json")))
    adapter_config(adapter)
    Tensors(base, "model")  # opens every file
    factors = Tensors(adapter, "adapter_model")
    config = kind.config_class.from_pretrained(base)
    packing = getattr(config, "quantization_config", None)
    if isinstance(packing, dict) and packing.get("quant_method") in ("fp8", "mxfp4"):
        packing["dequantize"] = True
    try:
        model = PeftModel.from_pretrained(
            kind.from_pretrained(base, config=config, dtype=dtype), str(adapter)
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        text = " ".join(str(error).split())[:300]
        raise LoadError(f"{base}, {adapter}: got {text}, expected a model and an adapter for it.") from error
    wrong = list(misplaced(model, factors))
    if wrong:
        raise MismatchError("The adapter doesn't fit this base.", wrong)
    return model


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and not (
        isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
    ):
        raise LoadError(f"dtype: got {dtype!r}, expected a dtype of plain weights, such as torch.bfloat16.")


def _refuse_inside(out: Path, *sources: Path) -> None:
    """Refuse to replace a folder that holds what is read."""
    place = out.expanduser().resolve()
    for source in sources:
        if place == source.resolve() or place in source.resolve().parents:
            raise ExportError(f"{out}: got a folder that {source} is in, expected another place.")


def _name(adapter: Any) -> Any:
    return adapter if adapter is None or isinstance(adapter, str) else str(adapter)
