"""Trainer ranks with an engine each push the same policy, or nothing: else engines would differ under one version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.bucket import Latest, addresses
from lorasync.errors import Mismatch, MismatchError
from lorasync.kernels.checksum import Checksum, can_be_summed
from lorasync.push.trainer_ranks import agreed_by_all_ranks, texts_of_all_ranks
from lorasync.wire import digest
from lorasync.zero import is_sharded

if TYPE_CHECKING:
    from torch import Tensor


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
        told = texts_of_all_ranks(mine)
        first = next((number for number, text in enumerate(told) if text), None)
        if first is None:
            return
        others = [number for number, text in enumerate(told) if text and text != told[first]]
        if others:
            wrong = Mismatch(
                "trained parameters",
                f"others on trainer ranks {others} than on rank {first}",
                "the same on every rank that has an engine",
                "Keep the ranks in step (DistributedDataParallel or ZeRO), or let one rank push to all engines.",
            )
            raise MismatchError("The trainer ranks hold different policies; nothing was sent.", [wrong])

    def _of(self, source: Any) -> str:
        model = getattr(source, "model", None)
        trained = (
            [p.detach() for p in model.parameters() if p.requires_grad and not is_sharded(p)] if model else []
        )
        summed = [tensor for tensor in trained if can_be_summed(tensor)]
        key = [(t.device, t.dtype, t.shape) for t in summed], addresses(summed)
        sums = self._sums.get(key, lambda: _planned(summed))
        rest = {str(n): t for n, t in enumerate(trained) if not can_be_summed(t)}
        return "".join([*(each.now() for each in sums), digest(rest) if rest else ""])


def _planned(tensors: list[Tensor]) -> list[Checksum]:
    """One checksum for each device, in the order in which devices come up."""
    devices = dict.fromkeys(tensor.device for tensor in tensors)
    return [Checksum([tensor for tensor in tensors if tensor.device == device]) for device in devices]
