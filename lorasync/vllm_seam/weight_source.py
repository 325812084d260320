"""Our sources as vLLM's own `WeightSource`, in the one of its two shapes that the installed vLLM has.

The other shape must not be defined: since 0.33 vLLM refuses it where its class is made.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lorasync.source.meta import Source


if hasattr(WeightSource, "iter_full"):  # since 0.33: what is sent is read once and must not change

    class _Source(WeightSource):  # type: ignore[misc]
        def __init__(self, source: Source) -> None:
            self._source = source

        @cached_property
        def metadata(self) -> list[Any]:
            return _translated(self._source)

        def iter_full(self) -> Iterator[tuple[str, Tensor]]:
            return iter(self._source)

else:

    class _Source(WeightSource):  # type: ignore[misc, no-redef]
        def __init__(self, source: Source) -> None:
            self._source = source

        def metadata(self) -> list[Any]:
            return _translated(self._source)

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(self._source)


def weight_source(source: Source) -> Any:
    """Wrap ``source`` for this vLLM: `metadata()` and `__iter__` up to 0.32, `metadata` and `iter_full()` since 0.33."""
    return _Source(source)


def _translated(source: Source) -> list[Any]:
    return [ParamMeta(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
