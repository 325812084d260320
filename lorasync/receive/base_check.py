"""The worker's half of the base fingerprint: whether this engine holds the base that was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from lorasync.errors import Mismatch, MismatchError
from lorasync.receive.load_plan import LoadPlan, Row

if TYPE_CHECKING:
    from lorasync.base_check import WeightSample

Read = Callable[[Row], torch.Tensor]
ReadWhole = Callable[[str], torch.Tensor]


def check_base(
    samples: Mapping[str, WeightSample],
    plan: LoadPlan,
    read: Read,
    dtype: torch.dtype,
    *,
    fix: str,
    read_whole: ReadWhole,
) -> None:
    """Compare the trainer's samples with the engine's base, in the served dtype.

    Args:
        samples: Of every frozen weight, by checkpoint name.
        plan: Where each goes.
        read: What the engine holds of a row of the plan.
        dtype: What the engine serves.
        fix: The way out.
        read_whole: A whole tensor, where the loader computes with it and no row says where it went.

    Raises:
        MismatchError: naming every weight that differs.
    """
    wrong = [
        Mismatch(
            name, f"{got:g} in the engine", f"{expected:g} ({samples[name].base} base in the trainer)", fix
        )
        for name, got, expected in differences(samples, plan, read, dtype, read_whole=read_whole)
    ]
    if wrong:
        raise MismatchError(
            f"The engine's base is not the one that was trained on ({len(wrong)} weights differ); nothing was touched.",
            wrong,
        )


def differences(
    samples: Mapping[str, WeightSample],
    plan: LoadPlan,
    read: Read,
    dtype: torch.dtype,
    *,
    read_whole: ReadWhole,
) -> Iterator[tuple[str, float, float]]:
    """Every weight that differs, with the first of its elements that does: the engine's, and the trainer's."""
    for name, sample in samples.items():
        rows = plan.rows_of(name)
        found = None
        for row in rows:
            found = found or _first_difference(sample, row, read(row), dtype)
        if not rows and name not in plan.ignored:
            found = _compared(sample.values, read_whole(name).reshape(-1), sample.positions, dtype)
        if found is not None:
            yield name, *found


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
    return _compared(inside, part.reshape(-1), at, dtype) if at else None


def _compared(
    values: list[float] | tuple[float, ...],
    elements: torch.Tensor,
    at: list[int] | tuple[int, ...],
    dtype: torch.dtype,
) -> tuple[float, float] | None:
    got = elements[torch.tensor(at, dtype=torch.long, device=elements.device)].to(dtype).double().cpu()
    expected = torch.tensor(values, dtype=torch.float64).to(dtype).double()
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
