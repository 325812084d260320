"""The worker's half of the base fingerprint: whether this engine holds the base that was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from lorasync.errors import Mismatch, MismatchError
from lorasync.receive.plan import LoadPlan, Row

if TYPE_CHECKING:
    from lorasync.fingerprint import WeightSample

Read = Callable[[Row], torch.Tensor]


def check_base(
    samples: Mapping[str, WeightSample], plan: LoadPlan, read: Read, dtype: torch.dtype, *, fix: str
) -> None:
    """Compare the trainer's samples with what ``read`` gives for each row of the load plan, in the served dtype.

    Raises:
        MismatchError: naming every weight that differs; ``fix`` is the way out.
    """
    wrong = []
    for name, sample in samples.items():
        for row in plan.rows_of(name):
            found = _first_difference(sample, row, read(row), dtype)
            if found is not None:
                got, expected = found
                held = f"{expected:g} ({sample.base} base in the trainer)"
                wrong.append(Mismatch(name, f"{got:g} in the engine", held, fix))
                break
    if wrong:
        raise MismatchError(
            f"The engine's base is not the one that was trained on ({len(wrong)} weights differ); nothing was touched.",
            wrong,
        )


def _first_difference(
    sample: WeightSample, row: Row, part: torch.Tensor, dtype: torch.dtype
) -> tuple[float, float] | None:
    """The first of the sampled elements within ``part`` (what ``row`` names) that differs: (engine's, trainer's)."""
    inside, at = [], []
    for position, value in zip(sample.positions, sample.values, strict=True):
        index = _index_in(row, position)
        if index is not None:
            inside.append(value)
            at.append(index)
    if not at:
        return None
    got = part.reshape(-1)[torch.tensor(at, device=part.device)].to(dtype).double().cpu()
    expected = torch.tensor(inside, dtype=torch.float64).to(dtype).double()
    wrong = (got != expected).nonzero()
    return None if not len(wrong) else (float(got[wrong[0, 0]]), float(expected[wrong[0, 0]]))


def _index_in(row: Row, position: int) -> int | None:
    """Where an element of the checkpoint tensor lies within the row's part, flat; None if it is not in it."""
    rest = position - row.source.offset
    if rest < 0:
        return None
    shape, stride = row.source.shape, row.source.stride
    coordinates = [0] * len(shape)
    for axis in sorted(range(len(shape)), key=lambda axis: -stride[axis]):
        coordinates[axis], rest = divmod(rest, stride[axis])
        if coordinates[axis] >= shape[axis]:
            return None
    index = 0
    for size, at in zip(shape, coordinates, strict=True):
        index = index * size + at
    return index if rest == 0 else None
