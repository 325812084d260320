"""The worker's half of the base check: whether this engine holds the base that was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from lorasync.errors import Mismatch, MismatchError
from lorasync.receive.windows import Row

if TYPE_CHECKING:
    from lorasync.base_check import WeightSample
    from lorasync.receive.load_plan import LoadPlan

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
        samples: A few elements of every frozen weight, by checkpoint name.
        plan: Where each weight goes.
        read: Returns what the engine holds of a row of the plan.
        dtype: What the engine serves.
        fix: What the user should do if the base is another one.
        read_whole: Returns a whole weight of which the plan has no rows, because vLLM's loader computes with it.

    Raises:
        MismatchError: A weight differs; the message names each.
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
    """Yield every weight that differs, with the first element that does: the engine's value, and the trainer's."""
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
    """Return the first sampled element within ``part`` (what ``row`` names) that differs: engine's, trainer's."""
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
    """Return the flat index, within the row's part, of an element of the checkpoint tensor; None if it is outside."""
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
