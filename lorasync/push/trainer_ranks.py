"""The trainer's ranks: all of them leave a push the same way."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from lorasync.errors import SyncError

if TYPE_CHECKING:
    from collections.abc import Iterator

_LONGEST = 20_000
"""Bytes of an error that other ranks are shown."""


def rank() -> int:
    """Which of the trainer's ranks it is that asks; 0 if there is only one."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextlib.contextmanager
def agreed_by_all_ranks() -> Iterator[None]:
    """All trainer ranks leave the block the same way: if one fails, the others raise too instead of going on.

    Raises:
        SyncError: on the ranks that did not fail themselves; it names those that did, and their errors.
    """
    if _alone():
        yield
        return
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    failed = largest_of_all_ranks(int(failure is not None))
    if failed:
        told = texts_of_all_ranks("" if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is None:
            raise SyncError(_said_by_others(told))
    if failure is not None:
        raise failure


def _said_by_others(told: list[str]) -> str:
    failed = {number: text for number, text in enumerate(told) if text}
    who = ", ".join(map(str, failed))
    said = "".join(f"\n  rank {number}: {text}" for number, text in failed.items())
    return f"Another trainer rank than this one (rank {rank()}) failed: rank {who}. This one gave up with it.{said}"


def largest_of_all_ranks(number: int) -> int:
    """The largest of the numbers that the trainer's ranks call this with; a collective."""
    import torch.distributed as dist

    if _alone():
        return number
    shared = torch.tensor([number], device=_device())
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared.item())


def texts_of_all_ranks(text: str) -> list[str]:
    """What each of the trainer's ranks calls this with, by rank; a collective of plain bytes."""
    import torch.distributed as dist

    if _alone():
        return [text]
    mine = text.encode()[:_LONGEST]
    size = largest_of_all_ranks(len(mine))
    padded = torch.zeros(size + 1, dtype=torch.uint8)
    padded[: len(mine)] = torch.frombuffer(bytearray(mine or b"\0"), dtype=torch.uint8)[: len(mine)]
    padded = padded.to(_device())
    found = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(found, padded)
    return [bytes(part.cpu().tolist()).rstrip(b"\0").decode(errors="ignore") for part in found]


def _device() -> str:
    import torch.distributed as dist

    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _alone() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
