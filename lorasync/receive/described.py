"""What an applier answers to a handshake."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Described:
    """What a trainer has to know of the applier that a worker has made for it.

    Attributes:
        capacity: How many adapters the worker can hold; 0 where it holds none.
        held: Whether the version that the engine serves is one of the adapters.
        others: How many of the adapters are not from lorasync.
        notes: What the user should know although nothing is wrong.
    """

    capacity: int = 0
    held: bool = False
    others: int = 0
    notes: tuple[str, ...] = ()
