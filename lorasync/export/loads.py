"""Asking transformers, with tensors that have no storage, whether the folder that will be written loads."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import LoadError, Mismatch, MismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lorasync.source import ParamMeta

_NEVER_WEIGHTS = (torch.uint8, torch.int8, torch.int16, torch.int32)


def check_loads(kind: Any, config: Any, metadata: Sequence[ParamMeta]) -> None:
    """Load tensors of these names, dtypes and shapes into the model's class, on the meta device.

    Nothing is checked while transformers shards whatever it loads (ZeRO-3, accelerate's FSDP): a load is collective then.

    Args:
        kind: The class, a subclass of `transformers.PreTrainedModel`.
        config: Its config, as it will be written.
        metadata: What will be written.

    Raises:
        MismatchError: A parameter would be missing, of another shape, or packed in a way that nothing here unpacks.
        LoadError: transformers can't put the tensors into the model at all.
    """
    if _loads_are_sharded():
        return
    wrong = [*unloadable(kind, config, metadata)]
    if wrong:
        raise MismatchError("The merged model would not load. Nothing was written.", wrong)


def _loads_are_sharded() -> bool:
    from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

    return bool(is_deepspeed_zero3_enabled() or is_fsdp_enabled())


def unloadable(kind: Any, config: Any, metadata: Sequence[ParamMeta]) -> Iterator[Mismatch]:
    """List what would be missing, misshapen or still packed in the loaded model; as `check_loads`."""
    model, found = _load(kind, config, metadata)
    state = model.state_dict()
    for meta in metadata:
        if _still_packed(meta, state.get(meta.name)):
            got = str(meta.dtype).removeprefix("torch.")
            fix = (
                "The base is quantized in a way that lorasync doesn't read. Merge into the model in 16 bits."
            )
            yield Mismatch(meta.name, f"{got}, which nothing unpacks", "a plain weight", fix)
    for name in sorted(found["missing_keys"]):
        fix = "Is the base complete, and is its config (tie_word_embeddings, architectures) true of it?"
        yield Mismatch(name, "nothing", "a weight: the model would draw it at random", fix)
    for name, shape, expected in sorted(found["mismatched_keys"], key=str):
        yield Mismatch(name, str(tuple(shape)), str(tuple(expected)), "Is config.json the base's own?")


def _still_packed(meta: ParamMeta, held: torch.Tensor | None) -> bool:
    """Whether a tensor is no plain weight, nor one of the model's integer buffers."""
    if meta.dtype.is_floating_point:
        return meta.dtype.itemsize == 1
    return meta.dtype in _NEVER_WEIGHTS if held is None else held.dtype.is_floating_point


def _load(kind: Any, config: Any, metadata: Sequence[ParamMeta]) -> tuple[Any, dict[str, Any]]:
    state = {meta.name: torch.empty(meta.shape, dtype=meta.dtype, device="meta") for meta in metadata}
    try:
        with _quiet():
            loaded: tuple[Any, dict[str, Any]] = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype="auto",
            )
    except Exception as error:  # conversions of transformers fail in many ways
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise LoadError(
            f"The merged model would not load into {kind.__name__} ({text}). Nothing was written. Is the base complete, "
            "and its config its own?"
        ) from error
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' report and progress bar of a load that is none off the screen."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
