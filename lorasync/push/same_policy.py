"""Trainer ranks with an engine each push the same policy, or nothing: else engines would differ under one version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.bucket import Latest, addresses
from lorasync.errors import Mismatch, MismatchError
from lorasync.kernels.checksum import Checksum, can_be_summed
from lorasync.push.trainer_ranks import agreed_by_all_ranks, texts_of_all_ranks
from lorasync.wire import digest, digest_of_text
from lorasync.zero import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


_ADAPTERS = ("lora_", "modules_to_save", "trainable_tokens")
"""Parts of the names of what PEFT trains, also where a policy is only evaluated."""


class SamePolicy:
    """Compares what the trainer ranks have trained, at each push; the checksums are planned once."""

    def __init__(self) -> None:
        self._sums: Latest[list[Checksum]] = Latest()

    def check(self, source: Any, *, has_engines: bool) -> None:
        """Refuse a push of ranks that have trained apart; a collective.

        What is sharded over the ranks is put together for all of them alike, so only whole parameters are compared.

        Args:
            source: what this rank pushes; one of the user's own, without a model, is not compared.
            has_engines: whether this rank pushes to an engine; what others hold does not matter.

        Raises:
            MismatchError: naming the ranks whose trained parameters are others than the first one's.
        """
        with agreed_by_all_ranks():
            mine = self._of(source) if has_engines else ""
        _compare(mine, "trained parameters")

    def check_base(self, source: Any, handshake: str, *, has_engines: bool) -> None:
        """The same for all that a model holds, and for what the workers were told; once, as a base is large.

        Raises:
            MismatchError: naming the ranks that hold something else than the first one.
        """
        with agreed_by_all_ranks():
            mine = ""
            if has_engines:
                mine = _sum(_whole(source, trained_only=False), _planned) + digest_of_text(handshake)
        _compare(mine, "the model")

    def _of(self, source: Any) -> str:
        return _sum(_whole(source, trained_only=True), self._kept) + digest_of_text(_settings(source))

    def _kept(self, tensors: list[Tensor]) -> list[Checksum]:
        """The checksums of last time, if the same tensors lie where they lay."""
        key = [(t.device, t.dtype, t.shape) for t in tensors], addresses(tensors)
        return self._sums.get(key, lambda: _planned(tensors))


def _compare(mine: str, what: str) -> None:
    """Compare what ranks with engines hold; a collective.

    Raises:
        MismatchError: on every rank.
    """
    told = texts_of_all_ranks(mine)
    first = next((number for number, text in enumerate(told) if text), None)
    others = [
        number for number, text in enumerate(told) if text and first is not None and text != told[first]
    ]
    if others:
        wrong = Mismatch(
            what,
            f"others on trainer ranks {others} than on rank {first}",
            "the same on every rank that has an engine",
            "Keep the ranks in step (DistributedDataParallel or ZeRO), or let one rank push to all engines.",
        )
        raise MismatchError("The trainer ranks hold different policies; nothing was sent.", [wrong])


def _whole(source: Any, *, trained_only: bool) -> list[Tensor]:
    """The model's parameters that lie whole on this rank; with buffers, unless only what is trained is asked for."""
    model = getattr(source, "model", None)
    if model is None:
        return []
    named = list(model.named_parameters())
    if trained_only:
        named = [(n, p) for n, p in named if p.requires_grad or any(part in n for part in _ADAPTERS)]
    else:
        named += list(model.named_buffers())
    return [tensor.detach() for _, tensor in named if not is_sharded(tensor)]


def _sum(tensors: list[Tensor], plan: Callable[[list[Tensor]], list[Checksum]]) -> str:
    """Sum tensors up where they lie; a few that don't start at a word, or have gaps, are hashed."""
    summed = [tensor for tensor in tensors if can_be_summed(tensor)]
    rest = {str(n): tensor for n, tensor in enumerate(tensors) if not can_be_summed(tensor)}
    return "".join([*(each.now() for each in plan(summed)), digest(rest) if rest else ""])


def _settings(source: Any) -> str:
    """Each layer's scalings and active adapters, as PEFT keeps them: they make another policy of the same tensors."""
    model = getattr(source, "model", None)
    found = [
        (
            name,
            sorted(map(str, getattr(module, "active_adapters", ()) or ())),
            sorted(map(str, scaling.items())),
        )
        for name, module in (model.named_modules() if model is not None else ())
        if isinstance(scaling := getattr(module, "scaling", None), dict)
    ]
    return str(found)


def _planned(tensors: list[Tensor]) -> list[Checksum]:
    """One checksum for each device, in the order in which devices come up."""
    devices = dict.fromkeys(tensor.device for tensor in tensors)
    return [Checksum([tensor for tensor in tensors if tensor.device == device]) for device in devices]
