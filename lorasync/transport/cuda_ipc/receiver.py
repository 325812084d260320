"""The worker's side: the trainer's memory on the same GPU, opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasync.errors import PayloadError
from lorasync.kernels.checksum import Checksum
from lorasync.transport.cuda_ipc.handle import gpu_of, handles_from_text
from lorasync.transport.cuda_ipc.items import Parts, from_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lorasync.bucket import Bucket, Item


class Receiver:
    """Opened IPC buckets, by their handles and layout: what a trainer has shown is opened once and kept."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pages: dict[tuple[str, str], _Page] = {}

    def refuses(self, offer: Mapping[str, str]) -> str:  # noqa: ARG002
        """A worker without a GPU reads none; whether it is the trainer's GPU is compared for each bucket."""
        return "" if gpu_of(self._device) else "this worker shares no GPU"

    def take(self, fields: Mapping[str, str], payload: Any, digest: str) -> Bucket[Item]:  # noqa: ARG002
        """A bucket that lies in the trainer's memory: to be read before the trainer gets its answer.

        It is reused, with the same key, for as long as handles and layout are the same.

        Raises:
            PayloadError: Handles or layout are malformed, lead out of the memory, or a checksum is not the expected one.
        """
        handles, layout = fields.get("handles", ""), fields.get("layout", "")
        if (handles, layout) not in self._pages:
            storages = [handle.open(self._device) for handle in handles_from_text(handles)]
            self._keep((handles, layout), _Page(from_text(layout, storages)))
        page = self._pages[handles, layout]
        if not page.has(digest):
            raise PayloadError(
                f"bucket on the GPU: its checksum is not {digest or 'there'}: bytes were altered. Not applied."
            )
        return page.bucket

    def close(self) -> None:
        """Give the memory back to the trainer."""
        self._pages = {}

    def _keep(self, texts: tuple[str, str], page: _Page) -> None:
        """A bucket that lies elsewhere than before takes the place of the one that began with the same name."""
        self._pages = {t: p for t, p in self._pages.items() if p.first != page.first} | {texts: page}


class _Page:
    """A bucket whose memory is open, and the checksums over what the bucket is read from."""

    def __init__(self, bucket: Bucket[Item]) -> None:
        self.bucket, self.first = bucket, next(iter(bucket), "")
        parts = Parts.of(bucket)
        try:
            self._frozen, self._fresh = Checksum(parts.frozen), Checksum(parts.fresh)
        except ValueError as error:
            raise PayloadError(f"layout: malformed ({error}). Nothing was touched.") from error
        self._frozen_sum = ""

    def has(self, expected: str) -> bool:
        """Whether the memory holds what the trainer has summed up; what is frozen is summed up again only if it differs."""
        if self._frozen_sum != expected[:16]:
            self._frozen_sum = self._frozen.now()
        return self._frozen_sum + self._fresh.now() == expected
