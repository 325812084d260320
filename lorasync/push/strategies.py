"""The three strategies: load merged weights, merge factors in the workers, serve an adapter beside the base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

from lorasync.errors import Mismatch as _Mismatch
from lorasync.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

BaseKind = Literal["device", "cpu", "checkpoint", "nf4"]


class Strategy(Protocol):
    """What a push has to know of a strategy.

    Attributes:
        report_name: what a `SyncReport` calls it.
        changes_weights: whether live weights change; an adapter leaves them alone, and what is cached of them stays good.
        stages_beside: whether buckets are staged beside what is served; otherwise they are live as they come.
    """

    @property
    def report_name(self) -> str: ...

    @property
    def changes_weights(self) -> bool: ...

    @property
    def stages_beside(self) -> bool: ...

    def handshake(self, source: Any) -> str:
        """What the handshake says of it, as JSON; every trainer rank calls it, as base weights may have to be gathered.

        Raises:
            MismatchError: if source and strategy don't go together.
        """
        ...

    def packed_base(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The trainer's packed weights, where the workers merge from them; nothing otherwise."""
        ...


@dataclass(frozen=True)
class LoadMerged:
    """Merge on the trainer's side and load what comes: what `connect` does without an ``apply``.

    Example:
        >>> LoadMerged().stages_beside
        False
    """

    report_name: ClassVar[str] = "merged"
    changes_weights: ClassVar[bool] = True
    stages_beside: ClassVar[bool] = False

    def handshake(self, source: Any) -> str:
        """Any source but one of factors."""
        if is_factor_source(source):
            fix = "connect(source, llm, apply)"
            raise MismatchError(
                "A FactorSource needs to be told what the workers do with the factors.",
                [_Mismatch("apply", "nothing", "ServeAdapter(name) or MergeInWorker(base=…)", fix)],
            )
        return json.dumps({"kind": "load"})

    def packed_base(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:  # noqa: ARG002
        """None: every weight travels."""
        return iter(())


@dataclass(frozen=True)
class MergeInWorker:
    """Send A and B; each worker computes W = base + s·B·A from a base that it keeps, and serves at full speed.

    The live weights are always made anew from the pristine base: nothing is ever subtracted, so nothing drifts.

    Args:
        base: where the worker keeps the base of the weights that are merged:

            ============== ======================================= ==============================================
            ``device``     a copy on the engine's device           as many bytes again as the merged weights
            ``cpu``        a copy in host memory (pinned)          none on the device; read over the bus each sync
            ``checkpoint`` read again from disk at each sync       none
            ``nf4``        the trainer's packed 4-bit weights,     a quarter of ``device``; for a QLoRA policy
                           sent once                               this *is* the base, exactly
            ============== ======================================= ==============================================

    Example:
        >>> MergeInWorker(base="nf4").base
        'nf4'
    """

    base: BaseKind
    report_name: ClassVar[str] = "factors"
    changes_weights: ClassVar[bool] = True
    stages_beside: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.base not in get_args(BaseKind):
            raise MismatchError(
                "MergeInWorker does not know this base.",
                [_Mismatch("base", repr(self.base), ", ".join(map(repr, get_args(BaseKind))), "Choose one.")],
            )

    def handshake(self, source: Any) -> str:
        """The factors, their base, and where the workers keep it."""
        return json.dumps({"kind": "merge", "base": self.base, **_factors(self, source)})

    def packed_base(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The trainer's 4-bit weights, with ``base="nf4"``."""
        found: Iterator[tuple[str, torch.Tensor]] = source.packed_base() if self.base == "nf4" else iter(())
        return found


@dataclass(frozen=True)
class ServeAdapter:
    """Put the adapter into vLLM's LoRA slots, from memory; requests name it with `Sync.request`.

    Needs an engine started with ``enable_lora=True``. Each push gets a name and id of its own (``name@version``):
    two versions in flight keep apart, and no cached key or value of the old one is used for the new.

    Args:
        name: the adapter's name in the engine.
        other_base: serve it although the engine holds another base than the one trained on. A QLoRA policy was
            trained on dequantized 4-bit weights; on the hub's 16-bit ones it is a (slightly) different policy.

    Example:
        >>> ServeAdapter("policy").name
        'policy'
    """

    name: str
    other_base: bool = False
    report_name: ClassVar[str] = "adapter"
    changes_weights: ClassVar[bool] = False
    stages_beside: ClassVar[bool] = True

    def __post_init__(self) -> None:
        wrong = []
        name: object = self.name
        if not isinstance(name, str) or not name or "@" in name:
            expected = "a name without '@' (versions are told apart by it)"
            wrong.append(_Mismatch("name", repr(self.name), expected, "Choose one."))
        other_base: object = self.other_base
        if not isinstance(other_base, bool):
            wrong.append(_Mismatch("other_base", repr(self.other_base), "True or False", "Choose one."))
        if wrong:
            raise MismatchError("ServeAdapter needs a usable name.", wrong)

    def handshake(self, source: Any) -> str:
        """The factors and their base."""
        return json.dumps({"kind": "adapter", "other_base": self.other_base, **_factors(self, source)})

    def packed_base(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:  # noqa: ARG002
        """None: the adapter is served beside the engine's own base."""
        return iter(())


Apply = MergeInWorker | ServeAdapter


def _factors(strategy: Apply, source: Any) -> dict[str, str]:
    """What the workers are told of factors and of the base below them."""
    from lorasync.base_check import to_json
    from lorasync.source import base_samples
    from lorasync.source.scaling import refuse_rescaled

    if not is_factor_source(source):
        raise MismatchError(
            f"{type(strategy).__name__} works on factors.",
            [
                _Mismatch(
                    "source",
                    type(source).__name__,
                    "FactorSource",
                    "Use FactorSource(model), or leave apply out.",
                )
            ],
        )
    spec = source.spec()
    if isinstance(strategy, ServeAdapter):
        refuse_rescaled(spec)
    return {"spec": spec.to_json(), "samples": to_json(base_samples(source))}


def is_factor_source(source: object) -> bool:
    """Whether factors travel, not weights."""
    from lorasync.source import FactorSource

    return isinstance(source, FactorSource)
