"""What a push did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SyncReport:
    """The outcome of one `send_weights`.

    Attributes:
        version: the version that the engine serves now; the first push makes version 1.
        strategy: ``"merged"``, ``"adapter"`` or ``"factors"``.
        tensors: how many tensors travelled.
        bytes: their size, in bytes.
        seconds: wall time by stage: ``source`` (gather and merge on the trainer), ``wire`` (write, send, read),
            ``apply`` (inside the slowest worker), ``total``.
        digest: xxh3-128 over what was sent, as each rank found it too; empty where tensors were handed over inside
            one process.
        ranks: how many workers confirmed; 0 where they can't answer (another host).
        delta_survival: how much of the update's norm is left after rounding to the served dtype, from 0 to 1;
            ``None`` where nothing is merged on this side.
        stall_seconds: for how long the engine could not generate; ``None`` where nothing was generating.
        warnings: what the trainer should look at.
    """

    version: int
    strategy: str
    tensors: int
    bytes: int
    seconds: dict[str, float]
    digest: str = ""
    ranks: int = 0
    delta_survival: float | None = None
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
        return " · ".join([*parts, *self.warnings])
