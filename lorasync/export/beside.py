"""What lies beside the weights of a merged model: config, generation config, tokenizer, code."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from lorasync.export.config import merged_config, say_tied
from lorasync.names import CheckpointLayout, checkpoint_name
from lorasync.source.model import base_of
from lorasync.zero.fsdp import is_fsdp_class

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorasync.source import MergedSource, ParamMeta

_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.jinja",
    "spiece.model",
    "sentencepiece*",
    "*.tiktoken",
)
_BESIDE = (*_TOKENIZER, "generation_config.json", "*processor_config.json", "*.py")


def copy_beside(base: Path, adapter: Path, out: Path) -> None:
    """Copy what belongs beside the weights from both folders; the adapter's tokenizer wins."""
    for source, patterns in ((base, _BESIDE), (adapter, _TOKENIZER)):
        for pattern in patterns:
            for file in sorted(source.glob(pattern)):
                if file.is_file():
                    shutil.copyfile(file, out / file.name)


def write_config(config: dict[str, Any], out: Path) -> None:
    """Write the config, last of all: without it the folder doesn't load."""
    (out / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")


def live_class(model: Any) -> Any:
    """Return the class that loads the base of a PEFT model; None if it isn't one of transformers' models."""
    from transformers import PreTrainedModel

    for kind in type(base_of(model)).__mro__:
        if issubclass(kind, PreTrainedModel) and not is_fsdp_class(kind):
            return None if kind is PreTrainedModel else kind
    return None


def live_config(source: MergedSource, metadata: Sequence[ParamMeta]) -> dict[str, Any] | None:
    """Return what is true of a merged model that was in memory: its dtype, its class, its ties; None without a config."""
    model: Any = base_of(source.model)
    kind = live_class(source.model)
    if getattr(model, "config", None) is None or not hasattr(model.config, "to_json_string"):
        return None
    written = json.loads(model.config.to_json_string(use_diff=False))
    made = merged_config(written, dtype=source.dtype)
    made["architectures"] = [type(model).__name__ if kind is None else kind.__name__]
    if source.dtype is None:
        made.pop("torch_dtype", None)
        made["dtype"] = str(_usual(metadata)).removeprefix("torch.")
    names = {meta.name for meta in metadata}
    head, embedding = (
        _stored_name(model, "get_output_embeddings"),
        _stored_name(model, "get_input_embeddings"),
    )
    if head in names and made.get("tie_word_embeddings"):
        say_tied(made, False)
    elif head is not None and head not in names and embedding in names:
        say_tied(made, True)
    return made


def save_generation_config(model: Any, out: Path) -> None:
    """Write it as it is; transformers' own save refuses settings that contradict each other."""
    config = getattr(base_of(model), "generation_config", None)
    if config is not None:
        (out / "generation_config.json").write_text(config.to_json_string())


def _usual(metadata: Sequence[ParamMeta]) -> torch.dtype | None:
    """Return the dtype of most elements."""
    found: Counter[torch.dtype] = Counter()
    for meta in metadata:
        if meta.dtype.is_floating_point:
            found[meta.dtype] += math.prod(meta.shape)
    return max(found, key=lambda dtype: found[dtype]) if found else None


def _stored_name(model: Any, which: str) -> str | None:
    """Return the checkpoint name of the input or output embedding's weight; None where the model has none."""
    layer = getattr(model, which)() if hasattr(model, which) else None
    path = next((name for name, module in model.named_modules() if module is layer), None)
    name = None if layer is None or path is None else checkpoint_name(f"{path}.weight")
    if name is None:
        return None
    (made, *_) = CheckpointLayout(model).convert({name: torch.empty(2, 2, device="meta")})
    return made
