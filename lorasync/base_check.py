"""What trainer and worker share to tell whether an engine holds the base that was trained on.

The trainer sends a few elements of every weight, and each tensor-parallel rank compares those that it holds. So no
weight travels whole. Two checkpoints that differ (another model, another revision, 4-bit instead of bf16) differ almost
everywhere, so 32 elements a weight show it. A change of single elements is not found here.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

SAMPLES = 32
PIECE_SAMPLES = 8
"""How many elements of each piece, where a checkpoint stores one weight in many pieces (an expert each)."""


@dataclass(frozen=True)
class WeightSample:
    """Elements of one base weight: flat row-major positions, and the values there as the trainer reads them."""

    dtype: str
    shape: tuple[int, ...]
    base: str
    positions: tuple[int, ...]
    values: tuple[float, ...]


def positions(name: str, numel: int, *, count: int = SAMPLES) -> tuple[int, ...]:
    """Choose the elements of a weight that are compared, by its name: so every run compares the same ones."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return tuple(sorted(random.Random(seed).sample(range(numel), min(count, numel))))


def to_json(samples: Mapping[str, WeightSample]) -> str:
    """Write samples by checkpoint name as JSON; Python writes floats so that they are read back exactly."""
    return json.dumps({name: asdict(sample) for name, sample in samples.items()})


def from_json(text: str) -> dict[str, WeightSample]:
    """Read what `to_json` wrote.

    Raises:
        ValueError: The text is something else.
    """
    return {name: _sample(name, fields) for name, fields in json.loads(text).items()}


def _sample(name: str, fields: Mapping[str, Any]) -> WeightSample:
    found = WeightSample(
        fields["dtype"],
        tuple(fields["shape"]),
        fields["base"],
        tuple(fields["positions"]),
        tuple(fields["values"]),
    )
    texts = all(type(text) is str for text in (found.dtype, found.base))
    whole = all(type(number) is int for number in (*found.shape, *found.positions))
    numbers = all(type(value) in (int, float) for value in found.values)
    if not (texts and whole and numbers and len(found.positions) == len(found.values)):
        raise ValueError(f"{name}: got {fields}, expected a WeightSample")
    return found
