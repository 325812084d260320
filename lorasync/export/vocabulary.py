"""Recognising an adapter that was trained on a larger vocabulary than its base has, by the files in its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.errors import LoadError, Mismatch, MismatchError
from lorasync.export.config import read_json
from lorasync.export.skeleton import embeddings, saved_beside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lorasync.export.tensors import Tensors


def other_vocabulary(model: Any, factors: Tensors) -> str | None:
    """Say so if the adapter's file holds embeddings of another size than the base: PEFT saves them whole after a resize.

    Args:
        model: The PEFT model of both, on the meta device.
        factors: The adapter's file.
    """
    saved = saved_beside(model, factors)
    for path, weight in embeddings(model):
        shapes = {factors.describe(name)[1] for name in saved if name.startswith(f"{path}.")}
        other = {shape[0] for shape in shapes} - {weight.shape[0]}
        if other:
            return _resize(weight.shape[0], max(other))
    return None


def check_tokenizer(model: Any, base: Path, adapter: Path) -> None:
    """Refuse an adapter whose tokenizer, which is copied beside the weights, names tokens that the base has no rows for.

    Raises:
        MismatchError: It does, and the base's own tokenizer doesn't.
    """
    rows = min((weight.shape[0] for _, weight in embeddings(model)), default=0)
    last, known = max(_added_tokens(adapter), default=-1), max(_added_tokens(base), default=-1)
    if rows and last >= rows > known:
        got = f"the token {last}"
        wrong = Mismatch(f"{adapter.name}'s tokenizer", got, f"tokens below {rows}", _resize(rows, last + 1))
        raise MismatchError("The adapter's tokenizer is not for this base.", [wrong])


def _added_tokens(folder: Path) -> Iterator[int]:
    """Read the ids of tokens that were added to a vocabulary, from each of the files that list them."""
    yield from map(int, _entries(folder / "tokenizer_config.json", "added_tokens_decoder") or ())
    yield from _entries(folder / "added_tokens.json").values()
    yield from (token["id"] for token in _entries(folder / "tokenizer.json", "added_tokens") or ())


def _entries(file: Path, key: str | None = None) -> Any:
    """Read a tokenizer's file; empty where it isn't JSON, which transformers will say itself."""
    try:
        found = read_json(file) if file.is_file() else {}
    except LoadError:
        return {}
    return found if key is None else found.get(key)


def _resize(rows: int, trained: int) -> str:
    return (
        f"The adapter was trained on a vocabulary of {trained} rows, and this base has {rows}. Load the base, call "
        f"model.resize_token_embeddings({trained}), load the adapter with PeftModel.from_pretrained(model, adapter), which "
        "fills the new rows if it was saved with them, and pass that model to merge_to_disk."
    )
