"""The trainer's ranks: all of them leave a push the same way."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from lorasync.errors import SyncError

if TYPE_CHECKING:
    from collections.abc import Iterator


def rank() -> int:
    """Which of the trainer's ranks it is that asks; 0 if there is only one."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextlib.contextmanager
def agreed_by_all_ranks() -> Iterator[None]:
    """All trainer ranks leave the block the same way: if one fails, the others raise too instead of going on.

    Raises:
        SyncError: on the ranks that did not fail themselves.
    """
    if _alone():
        yield
        return
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = largest_of_all_ranks(int(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise SyncError(
            f"The push failed on another trainer rank than this one (rank {rank()}): see its error."
        )


def largest_of_all_ranks(number: int) -> int:
    """The largest of the numbers that the trainer's ranks call this with; a collective."""
    import torch.distributed as dist

    if _alone():
        return number
    shared = torch.tensor([number], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared.item())


def _alone() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
