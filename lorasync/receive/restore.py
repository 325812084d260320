"""Giving the base back to live weights that earlier pushes have changed, and that this push does not write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasync.bucket import Bucket
from lorasync.errors import Mismatch, MismatchError
from lorasync.receive.writer import LiveWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    import torch

    from lorasync.receive.live import LiveModel, Unit
    from lorasync.receive.load_plan import LoadPlan
    from lorasync.receive.windows import Row

LOAD_BYTES = 32 << 20
"""How much is given to vLLM's loader at once; a single layer may have more."""


class Restore:
    """Finds what differs from the base and is not written by the push itself; `write` gives it the base.

    Args:
        live: The served model.
        changed: Parameters that differ from the base, by name.
        written: Checkpoint names that the push writes.

    Raises:
        MismatchError: The trainer's base has nothing for a changed parameter.
    """

    def __init__(self, live: LiveModel, changed: Collection[str], written: Collection[str]) -> None:
        self._live = live
        wanted = set(changed) & live.plan.layouts.keys()
        done = {unit.layers for unit in live.units_of(written)}
        self.rows = [
            row
            for row in live.plan.rows
            if row.param in wanted and row.param in live.direct and row.name not in written
        ]
        self.units = [unit for unit in live.units if unit.params & wanted and unit.layers not in done]
        _refuse_lost(live.plan, wanted)

    @property
    def names(self) -> frozenset[str]:
        """The checkpoint names whose base `write` asks for."""
        return frozenset(row.name for row in self.rows).union(*(unit.names for unit in self.units))

    def write(self, part: Callable[[Row], torch.Tensor], stored: Callable[[str], torch.Tensor]) -> None:
        """Write the base.

        Args:
            part: Returns the base of a row of the plan.
            stored: Returns a whole checkpoint tensor, for layers that are loaded anew.
        """
        for row in self.rows:
            self._live.live_slice(row.param, row.target).copy_(part(row))
        writer = LiveWriter(self._live)
        for names in loads(self._live, self.units):
            writer.write(Bucket({name: stored(name) for name in names}))
        writer.finish()
        self._live.refresh({row.param for row in self.rows})


def loads(live: LiveModel, units: Collection[Unit]) -> Iterator[list[str]]:
    """Yield the names that go through vLLM's loader at once: of whole layers, as each call walks the whole model."""
    names: list[str] = []
    size = 0
    for unit in units:
        of_unit = sum(live.plan.written[p] * live.plan.layouts[p][1].itemsize for p in unit.params)
        if names and size + of_unit > LOAD_BYTES:
            yield names
            names, size = [], 0
        names = names + sorted(unit.names)
        size += of_unit
    if names:
        yield names


def fed_by(plan: LoadPlan, names: Collection[str]) -> set[str]:
    """Return the parameters that something of these checkpoint tensors goes into."""
    wanted = frozenset(names)
    return {param for param, feeds in plan.feeds.items() if feeds & wanted}


def _refuse_lost(plan: LoadPlan, changed: Collection[str]) -> None:
    lost = sorted(param for param in changed if param in plan.uncovered)
    if lost:
        fix = "Restart the engine, or use MergedSource, which sends every weight."
        raise MismatchError(
            "An earlier push has changed weights that this trainer has no base for; nothing was touched.",
            [
                Mismatch(n, "what the earlier push has left", "the base that was trained on", fix)
                for n in lost
            ],
        )
