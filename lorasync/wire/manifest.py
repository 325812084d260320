"""Names, dtypes and shapes of what will be sent, as text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from lorasync.errors import PayloadError
from lorasync.wire.tensors import dtype_name, dtype_of

if TYPE_CHECKING:
    from collections.abc import Iterable

Entry = tuple[str, torch.dtype, tuple[int, ...]]


def manifest_as_text(entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> str:
    """What `manifest_from_text` reads: names, dtypes and shapes, in order."""
    return json.dumps([[name, dtype_name(dtype), list(shape)] for name, dtype, shape in entries])


def manifest_from_text(text: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of what will be sent, in order.

    Raises:
        PayloadError: if the text is no manifest.
    """
    try:
        return [
            (str(name), dtype_of(dtype), tuple(int(n) for n in shape))
            for name, dtype, shape in json.loads(text)
        ]
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise PayloadError(f"manifest: malformed ({error}). Nothing was touched.") from error
