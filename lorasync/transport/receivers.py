"""All transports, on a worker's side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.errors import LorasyncError, PayloadError
from lorasync.transport import cuda_ipc, in_process, inline, shared_memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lorasync.bucket import Bucket, Item
    from lorasync.transport.base import Receiver


class Receivers:
    """The receivers of one worker, for the trainer that shook hands last."""

    def __init__(self, device: torch.device) -> None:
        self._receivers: dict[str, Receiver] = {
            in_process.NAME: in_process.Receiver(),
            cuda_ipc.NAME: cuda_ipc.Receiver(device),
            shared_memory.NAME: shared_memory.Receiver(),
            inline.NAME: inline.Receiver(),
        }
        self._agreed: set[str] = set()

    def agree(self, offers: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Why each transport that is offered can't be used; empty for those that can."""
        self.close()
        refused = {name: self._refuses(name, offer) for name, offer in offers.items()}
        self._agreed = {name for name, why in refused.items() if not why}
        return refused

    def take(self, way: str, fields: Mapping[str, str], payload: Any, digest: str) -> Bucket[Item]:
        """A bucket, compared with its digest.

        Raises:
            PayloadError: if it is not what the trainer has sent, or the transport was not agreed on.
        """
        if way not in self._agreed:
            agreed = ", ".join(sorted(self._agreed)) or "none"
            raise PayloadError(
                f"transport: got {way!r}, expected one of the handshake's: {agreed}. Not applied."
            )
        return self._receivers[way].take(fields, payload, digest)

    def close(self) -> None:
        """Give back what was opened."""
        self._agreed = set()
        for receiver in self._receivers.values():
            receiver.close()

    def _refuses(self, name: str, offer: Mapping[str, str]) -> str:
        if name not in self._receivers:
            return "not known to this version of lorasync"
        try:
            return self._receivers[name].refuses(offer)
        except LorasyncError as error:
            return str(error)
