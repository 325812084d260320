"""`merge_to_disk`: a training model, or a base folder and an adapter folder, to one folder that loads."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from lorasync.errors import LoadError, UnmergeableError
from lorasync.export.checkpoint import CheckpointSource
from lorasync.export.writer import complete_or_nothing, size, write_shards
from lorasync.merge import NEAREST, Rounding
from lorasync.source import MergedSource
from lorasync.source.model import base_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator

    import torch
    from torch import Tensor

    from lorasync.source import ParamMeta

_SHARD_BYTES = 5_000_000_000
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)
_BESIDE = (*_TOKENIZER, "generation_config.json", "*processor_config.json", "*.py")
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

    From two folders it needs the memory of one tensor, whatever the size of the model. An interrupted run
    leaves nothing that loads, and nothing where ``out`` would be.

    Args:
        base: A folder of a model (plain, or packed by bitsandbytes), or a PEFT model in memory.
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
        LoadError: A folder is not what it should be.
        MismatchError: The adapter is not for this base.
        UnmergeableError: The adapter has no merged form.
        NonFiniteError: NaN or Inf.
        ExportError: ``out`` is in use, or the disk is full.

    Example:
        >>> merge_to_disk("Qwen3-8B", "merged", adapter="my-adapter")  # doctest: +SKIP
    """
    made = Path(out)
    options: dict[str, Any] = {"dtype": dtype, "rounding": rounding, "untie": untie}
    if isinstance(base, str | Path):
        source, configs = _from_folders(Path(base), adapter, options)
    else:
        source = MergedSource(base, adapter=_name(adapter), **options)
        configs = partial(_save_configs, source)
    metadata = source.metadata()
    needed = sum(map(size, metadata))
    with complete_or_nothing(made, needed + min(_SLACK, needed), overwrite=overwrite) as folder:
        title = f"Merging to {made.name}"
        with tqdm(total=needed, unit="B", unit_scale=True, desc=title, disable=not progress) as bar:
            write_shards(folder, metadata, _counted(source, metadata, bar), shard_bytes=shard_bytes)
        configs(folder)
    return made


def _from_folders(base: Path, adapter: Any, options: dict[str, Any]) -> tuple[Any, Callable[[Path], None]]:
    if adapter is None:
        raise LoadError("adapter: got None, expected the folder of a PEFT adapter, as the base is a folder.")
    folder = Path(adapter)
    try:
        source: Any = CheckpointSource(base, folder, **options)
    except UnmergeableError:
        # No LoRA: PEFT's own merge needs modules, so the model has to be in memory after all.
        source = MergedSource(_loaded(base, folder), **options)
    apart = options["untie"] and bool(getattr(getattr(source, "spec", None), "conflicts", True))
    return source, partial(_copy_configs, base, folder, dtype=options["dtype"], tied=not apart)


def _counted(
    source: Iterable[tuple[str, Tensor]], metadata: list[ParamMeta], bar: Any
) -> Iterator[tuple[str, Tensor]]:
    for meta, (name, tensor) in zip(metadata, source, strict=True):
        yield name, tensor
        bar.update(size(meta))


def _copy_configs(base: Path, adapter: Path, out: Path, *, dtype: Any, tied: bool) -> None:
    """Copy what belongs beside the weights; the adapter's tokenizer wins. The config goes last."""
    for source, patterns in ((base, _BESIDE), (adapter, _TOKENIZER)):
        for pattern in patterns:
            for file in sorted(source.glob(pattern)):
                if file.is_file():
                    shutil.copyfile(file, out / file.name)
    config = json.loads((base / "config.json").read_text())
    config.pop("quantization_config", None)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if not tied:
        config["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _save_configs(source: MergedSource, out: Path) -> None:
    model: Any = base_of(source.model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(out)
    if getattr(model, "config", None) is None:
        return
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    if source.dtype is not None:
        config["dtype"] = str(source.dtype).removeprefix("torch.")
    elif config.get("dtype") is not None:
        config["dtype"] = str(config["dtype"]).removeprefix("torch.")
    if source.untie:
        config["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")


def _name(adapter: Any) -> Any:
    return adapter if adapter is None or isinstance(adapter, str) else str(adapter)


def _loaded(base: Path, adapter: Path) -> Any:
    import transformers
    from peft import PeftModel

    config = transformers.AutoConfig.from_pretrained(base)
    name = (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0]
    kind: Any = getattr(transformers, name, transformers.AutoModelForCausalLM)
    return PeftModel.from_pretrained(kind.from_pretrained(base, dtype="auto"), str(adapter))
