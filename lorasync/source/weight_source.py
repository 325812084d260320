"""Our sources as vLLM's own `WeightSource`, whichever of its two shapes the installed vLLM has."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from lorasync.source.merged import MergedSource


def weight_source(source: MergedSource) -> Any:
    """Wrap ``source`` for this vLLM.

    Up to 0.32 `metadata()` is a method and iteration is `__iter__`; since 0.33 `metadata` is a
    `cached_property` and iteration is `iter_full()`.
    """
    kind = _PropertyMetadata if hasattr(WeightSource, "iter_full") else _MethodMetadata
    return kind(source)


class _MethodMetadata(WeightSource):  # type: ignore[misc]
    def __init__(self, source: MergedSource) -> None:
        self._source = source

    def metadata(self) -> list[Any]:
        return _translated(self._source)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._source)


class _PropertyMetadata(WeightSource):  # type: ignore[misc]
    def __init__(self, source: MergedSource) -> None:
        self._source = source

    @cached_property
    def metadata(self) -> list[Any]:
        return _translated(self._source)

    def iter_full(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._source)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._source)


def _translated(source: MergedSource) -> list[Any]:
    return [ParamMeta(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
