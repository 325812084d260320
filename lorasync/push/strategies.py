"""What the engine's workers are to do with factors: serve them as an adapter, or merge them into the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from lorasync.errors import Mismatch as _Mismatch
from lorasync.errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lorasync.source import FactorSource

BaseKind = Literal["device", "cpu", "checkpoint", "nf4"]


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

    def __post_init__(self) -> None:
        if self.base not in get_args(BaseKind):
            raise MismatchError(
                "MergeInWorker does not know this base.",
                [_Mismatch("base", repr(self.base), ", ".join(map(repr, get_args(BaseKind))), "Choose one.")],
            )


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


Apply = MergeInWorker | ServeAdapter


def apply_message(apply: Apply | None, source: Any) -> str:
    """What the handshake says of the strategy; for factors every trainer rank takes part, as base weights are read.

    Raises:
        MismatchError: if source and apply don't go together.
    """
    from lorasync.base_check import to_json
    from lorasync.source import FactorSource, base_samples
    from lorasync.source.scaling import refuse_rescaled

    if apply is None:
        if isinstance(source, FactorSource):
            raise MismatchError(
                "A FactorSource needs to be told what the workers do with the factors.",
                [
                    _Mismatch(
                        "apply",
                        "nothing",
                        "ServeAdapter(name) or MergeInWorker(base=…)",
                        "connect(source, llm, apply)",
                    )
                ],
            )
        return json.dumps({"kind": "load"})
    if not isinstance(source, FactorSource):
        raise MismatchError(
            f"{type(apply).__name__} works on factors.",
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
    if isinstance(apply, ServeAdapter):
        refuse_rescaled(spec)
    factors = {"spec": spec.to_json(), "samples": to_json(base_samples(source))}
    if isinstance(apply, MergeInWorker):
        return json.dumps({"kind": "merge", "base": apply.base, **factors})
    return json.dumps({"kind": "adapter", "other_base": apply.other_base, **factors})


def strategy_of(apply: Apply | None) -> str:
    """What a report calls the strategy."""
    return "merged" if apply is None else "factors" if isinstance(apply, MergeInWorker) else "adapter"


def packed_base(apply: Apply | None, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The trainer's packed weights, where the workers are to merge from them; nothing otherwise."""
    if isinstance(apply, MergeInWorker) and apply.base == "nf4":
        factors: FactorSource = source
        yield from factors.packed_base()
