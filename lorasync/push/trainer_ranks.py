"""The trainer's ranks: all of them leave a push the same way."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import torch

from lorasync import errors as lorasync_errors
from lorasync.errors import Mismatch, MismatchError, SyncError
from lorasync.wire import error_as_dict, error_from_dict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasync.errors import LorasyncError

_LONGEST_TEXT = 4 << 20
"""Bytes that ranks tell each other at once."""

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
        LorasyncError: on the ranks that did not fail themselves: the same error, naming the rank that did.
    """
    if _alone():
        yield
        return
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    if largest_of_all_ranks(int(failure is not None)):
        told = texts_of_all_ranks("" if failure is None else _as_text(failure))
        if failure is None:
            raise _first_of({number: text for number, text in enumerate(told) if text})
    if failure is not None:
        raise failure


def _as_text(error: BaseException) -> str:
    """An error as JSON that is short enough to be told."""
    found = error_as_dict(error)
    while len(json.dumps(found).encode()) > _LONGEST:
        if found["mismatches"]:
            found["mismatches"] = found["mismatches"][: len(found["mismatches"]) // 2]
        else:
            found["message"] = found["message"][: len(found["message"]) // 2]
    return json.dumps(found)


def _first_of(failed: dict[int, str]) -> LorasyncError:
    """The error of the lowest rank that failed, as its own type; it names all of them."""
    errors = {number: json.loads(text) for number, text in failed.items()}
    first = min(errors)
    found = errors[first]
    others = "".join(
        f"\n  trainer rank {n}: {e['type']}: {e['message']}" for n, e in errors.items() if n != first
    )
    if not hasattr(lorasync_errors, found["type"]):
        found = {**found, "type": "SyncError", "message": f"{found['type']}: {found['message']}"}
    return error_from_dict({**found, "message": f"trainer rank {first}: {found['message']}{others}"})


def check_alike_on_all_ranks(name: str, mine: str) -> None:
    """Refuse what every trainer rank must say alike; a collective.

    Args:
        name: what errors call it.
        mine: what this rank says.

    Raises:
        MismatchError: on every rank, naming those that say something else than rank 0.
    """
    told = texts_of_all_ranks(mine)
    wrong = [
        Mismatch(
            f"{name} of trainer rank {number}",
            text,
            f"{told[0]}, as on rank 0",
            "Pass the same on every rank.",
        )
        for number, text in enumerate(told)
        if text != told[0]
    ]
    if wrong:
        raise MismatchError("The trainer ranks do not say the same; nothing was touched.", wrong)


def largest_of_all_ranks(number: int) -> int:
    """The largest of the numbers that the trainer's ranks call this with; a collective."""
    import torch.distributed as dist

    if _alone():
        return number
    shared = torch.tensor([number], device=_device())
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared.item())


def texts_of_all_ranks(text: str) -> list[str]:
    """What each of the trainer's ranks calls this with, by rank; a collective of plain bytes.

    Raises:
        SyncError: on every rank, if one has too much to tell.
    """
    import torch.distributed as dist

    if _alone():
        return [text]
    mine = text.encode()
    size = largest_of_all_ranks(len(mine))
    if size > _LONGEST_TEXT:
        raise SyncError(
            f"trainer ranks: got {size} bytes to tell each other, expected at most {_LONGEST_TEXT}."
        )
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
