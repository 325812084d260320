"""What a push did."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorasync.wire import digest_of_parts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from lorasync.push.flight import Flight
    from lorasync.verify import LogprobGap


@dataclass(frozen=True)
class SyncReport:
    """The outcome of one `send_weights`.

    Attributes:
        version: the version that the engine serves now; the first push makes version 1, one that failed at the commit may
            leave a number out.
        strategy: ``"merged"``, ``"adapter"`` or ``"factors"``.
        tensors: how many tensors travelled.
        bytes: their size, in bytes.
        seconds: wall time by stage: ``source`` (gather and merge on the trainer), ``wire`` (write, send, read),
            ``apply`` (inside the slowest worker), ``total``. Stages may overlap.
        digest: xxh3-128 over what was sent, as each rank has found it in what it staged and in what it applied; empty
            where tensors were handed over inside one process.
        transport: how the bytes travelled: ``"in_process"`` (handed over), ``"cuda_ipc"``, ``"shared_memory"`` or
            ``"inline"`` (in the call itself); several, if buckets or engines differed. The cheapest that every worker of
            an engine takes, as the handshake has found.
        ranks: how many workers confirmed, of all engines that this trainer rank pushes to; 0 if it has none.
        delta_survival: how much of the update's norm is left after rounding to the served dtype, from 0 to 1;
            ``None`` where nothing is merged on this side.
        canary: how far the engine's answers lie from the trainer's after this push; ``None`` without a canary.
        stall_seconds: for how long the engine could not generate, from when it had paused until it went on; ``None`` where
            nothing was generating.
        warnings: what the trainer should look at.
    """

    version: int
    strategy: str
    tensors: int
    bytes: int
    seconds: dict[str, float]
    digest: str = ""
    transport: str = ""
    ranks: int = 0
    delta_survival: float | None = None
    canary: LogprobGap | None = None
    stall_seconds: float | None = None
    warnings: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        parts = [
            f"version {self.version}",
            self.strategy,
            f"{self.tensors} tensors",
            f"{self.bytes / 1e6:.1f} MB",
            f"{self.seconds['total']:.3f} s",
        ]
        if self.delta_survival is not None:
            parts.append(f"{self.delta_survival:.1%} of the update survives rounding")
        if self.canary is not None:
            parts.append(f"answers within {self.canary.mean:.2g} nats")
        return " · ".join([*parts, *self.warnings])


class Totals:
    """What adds up over the buckets of one push."""

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy
        self.tensors = self.bytes = 0
        self.source = self.sending = self.apply = 0.0
        self.digests: list[str] = []
        self.ways: tuple[str, ...] = ()

    def take(self, flight: Flight, sending: float) -> None:
        """Take over what is known when all buckets have arrived, and the seconds that it took beside the source's own."""
        self.tensors, self.bytes = flight.tensors, flight.bytes
        self.ways, self.digests = tuple(flight.ways), flight.digests
        self.apply += flight.applying
        self.sending += sending

    def report(self, version: int, ranks: int, total: float, stall: float | None = None) -> SyncReport:
        seconds = {
            "source": self.source,
            "wire": max(self.sending - self.apply, 0.0),
            "apply": self.apply,
            "total": total,
        }
        return SyncReport(
            version=version,
            strategy=self.strategy,
            tensors=self.tensors,
            bytes=self.bytes,
            seconds=seconds,
            digest=digest_of_parts(self.digests),
            transport=", ".join(self.ways),
            ranks=ranks,
            stall_seconds=stall,
        )


def timed(source: Iterable[tuple[str, torch.Tensor]], totals: Totals) -> Iterator[tuple[str, torch.Tensor]]:
    """The source's stream, with the time that it takes itself added to ``totals``."""
    stream = iter(source)
    while True:
        began = time.perf_counter()
        item = next(stream, None)
        totals.source += time.perf_counter() - began
        if item is None:
            return
        yield item
