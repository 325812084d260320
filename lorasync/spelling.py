"""The name that was meant where another was written."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is spelt most like ``name``, or has it as a part; None if nothing comes near.

    Args:
        name: What was written; case, hyphens and underscores don't count.
        known: What could have been meant.

    Example:
        >>> nearest("microbatch", ["train_micro_batch_size_per_gpu", "optimizer"])
        'train_micro_batch_size_per_gpu'
    """
    plain = {_plain(each): each for each in sorted(known, reverse=True)}
    wanted = _plain(name)
    close = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.7)
    if close:
        return plain[close[0]]
    parts = [each for each in plain if len(wanted) > 3 and wanted in each]
    return plain[min(parts, key=len)] if parts else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")
