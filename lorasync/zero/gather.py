"""One context for parameters that are whole, sharded by ZeRO-3 or sharded by FSDP2.

A ZeRO-3 parameter is recognised by the attributes that DeepSpeed gives it (``ds_id``, ``ds_status``,
``ds_shape``), so nothing here imports DeepSpeed before it has something to gather. Gathering is collective:
every rank enters with the same parameters in the same order. That is agreed through torch's key-value store
before the collective starts, so a rank that stays away or asks for something else ends in an error on every
rank, not in a hang.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch import distributed as dist

from lorasync.errors import SyncTimeoutError, UngatheredError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_TIMEOUT_S = 300.0
_rounds: defaultdict[tuple[int, ...], itertools.count[int]] = defaultdict(itertools.count)
_held: set[int] = set()


def is_sharded(param: Tensor) -> bool:
    """Whether this rank holds less than the whole parameter right now (a ZeRO-3 partition, an FSDP2 shard).

    Args:
        param: any tensor; plain ones are never sharded.

    Example:
        >>> is_sharded(torch.zeros(2))
        False
    """
    if _is_zero3(param):
        return _status(param) != "AVAILABLE"
    return is_dtensor(param) and any(not p.is_replicate() for p in cast("Any", param).placements)


def can_be_sharded(param: Tensor) -> bool:
    """Whether it is a ZeRO-3 or FSDP2 parameter, whole or not at this moment.

    Example:
        >>> can_be_sharded(torch.zeros(2))
        False
    """
    return _is_zero3(param) or is_dtensor(param)


def full_shape(param: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, whatever this rank holds of it.

    A packed 4-bit parameter gives its packed shape: the logical one is in its ``quant_state``.

    Example:
        >>> full_shape(torch.zeros(2, 3))
        torch.Size([2, 3])
    """
    return torch.Size(cast("Any", param).ds_shape) if _is_zero3(param) else param.shape


def held_part(param: Tensor) -> Tensor:
    """Return what this rank holds of a parameter: all of it, or its shard."""
    if not is_sharded(param):
        return param.detach()
    shard = getattr(param, "ds_tensor", None)
    return cast("Any", param).to_local() if shard is None else shard  # type: ignore[no-any-return]


@contextmanager
def gathered(params: Tensor | Iterable[Tensor], *, timeout: float = _TIMEOUT_S) -> Iterator[list[Tensor]]:
    """Hold parameters whole, for reading, while the context lasts; afterwards they are sharded as before.

    Yields the tensors to read, in the order given. A ZeRO-3 parameter is filled in place, so its module
    sees it whole too; an FSDP2 parameter stays the DTensor that it is, and a full copy is yielded in its
    stead. Only what is partitioned is gathered; whole parameters cost nothing. All ranks enter with the
    same parameters in the same order. Contexts must not overlap in their parameters. Writes would be lost,
    so they are an error.

    Args:
        params: one tensor or an iterable of them: ZeRO-3, FSDP2 (DTensor) and plain ones may be mixed. For
            merging, hand in the adapter's parameters too: they are partitioned like the base.
        timeout: seconds to wait for the other ranks.

    Raises:
        TypeError: something in ``params`` is no tensor (DeepSpeed would ignore it silently).
        UngatheredError: overlapping contexts, a parameter in the middle of a forward or backward pass,
            ranks that ask for different parameters, or a write inside the context.
        SyncTimeoutError: a rank did not arrive in time; the message names it.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> with gathered(layer.parameters()) as (weight, bias):
        ...     weight.shape
        torch.Size([2, 2])
    """
    wanted = _as_list(params)
    unique = list({id(p): p for p in wanted}.values())
    zero3 = [p for p in unique if _is_zero3(p)]
    dtensors = [p for p in unique if is_dtensor(p)]
    _check_free(zero3 + dtensors)
    _agree(zero3, dtensors, timeout)
    partitioned = [p for p in zero3 if _status(p) == "NOT_AVAILABLE"]
    with ExitStack() as stack:
        stack.enter_context(_hold(partitioned + dtensors))
        if partitioned:
            stack.enter_context(_zero3_gathered(partitioned))
        full = {id(p): full_tensor(p) for p in dtensors}
        whole = [full.get(id(p), p) for p in wanted]
        stack.enter_context(_read_only([*partitioned, *full.values()]))
        yield whole


def _is_zero3(param: Tensor) -> bool:
    return hasattr(param, "ds_id")


def _status(param: Tensor) -> str:
    return str(cast("Any", param).ds_status.name)


def is_dtensor(param: Tensor) -> bool:
    """Say whether a tensor is a DTensor, which FSDP2 makes of parameters."""
    # Where the module was never imported, nobody has made a DTensor; importing it here would cost everybody.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(param, module.DTensor)


def _as_list(params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    wanted = [params] if isinstance(params, Tensor) else list(params)
    for index, param in enumerate(wanted):
        if not isinstance(param, Tensor):
            raise TypeError(
                f"gathered(): got {type(param).__name__} at position {index}, expected tensors. Pass "
                "parameters, not names: gathered(module.parameters())."
            )
    return wanted


def _check_free(sharded: list[Tensor]) -> None:
    if any(id(p) in _held for p in sharded):
        raise UngatheredError(
            "gathered(): some of these parameters are already held by an enclosing gathered(), expected "
            "none. Gather once, outside, or close the outer context first."
        )
    if any(_is_zero3(p) and _status(p) == "INFLIGHT" for p in sharded):
        raise UngatheredError(
            "gathered(): a parameter is being fetched (ds_status INFLIGHT), expected a moment between two "
            "steps. Call it after engine.step(), outside of forward and backward."
        )


@contextmanager
def _hold(params: list[Tensor]) -> Iterator[None]:
    ids = {id(p) for p in params}
    _held.update(ids)
    try:
        yield
    finally:
        _held.difference_update(ids)


@contextmanager
def _zero3_gathered(params: list[Tensor]) -> Iterator[None]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(params, modifier_rank=None):
        yield


def full_tensor(param: Tensor) -> Tensor:
    """Return an FSDP2 parameter whole, as a copy; collective."""
    with torch.no_grad():
        return cast("Tensor", cast("Any", param).full_tensor().detach())


@contextmanager
def _read_only(params: list[Tensor]) -> Iterator[None]:
    before = [(p.data_ptr(), p._version) for p in params]
    yield
    changed = [
        i for i, (p, was) in enumerate(zip(params, before, strict=True)) if (p.data_ptr(), p._version) != was
    ]
    if changed:
        raise UngatheredError(
            f"gathered(): {len(changed)} of {len(params)} sharded parameters were written inside the "
            "context, expected reads only: each rank keeps its old shard and the write is lost. To change "
            "weights use deepspeed.zero.GatheredParameters(params, modifier_rank=0)."
        )


def _agree(zero3: list[Tensor], dtensors: list[Tensor], timeout: float) -> None:
    """Make sure that every rank of the group is about to gather the same parameters in the same order."""
    if not (zero3 or dtensors) or not dist.is_initialized():
        return
    ranks = _group_ranks(zero3, dtensors)
    if len(ranks) > 1:
        _rendezvous(ranks, _fingerprint(zero3, dtensors), timeout)


def _group_ranks(zero3: list[Tensor], dtensors: list[Tensor]) -> tuple[int, ...]:
    if zero3:
        return tuple(dist.get_process_group_ranks(cast("Any", zero3[0]).ds_process_group))
    return tuple(int(r) for r in cast("Any", dtensors[0]).device_mesh.mesh.flatten())


def _fingerprint(zero3: list[Tensor], dtensors: list[Tensor]) -> str:
    facts = [(cast("Any", p).ds_id, _status(p), tuple(full_shape(p))) for p in zero3]
    facts += [(str(cast("Any", p).placements), str(p.dtype), tuple(p.shape)) for p in dtensors]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return f"{len(facts)} parameters, {digest}"


def _rendezvous(ranks: tuple[int, ...], mine: str, timeout: float) -> None:
    """Exchange fingerprints through the store; a rank that gives up leaves a note for latecomers."""
    store = dist.distributed_c10d._get_default_store()
    me = dist.get_rank()
    number = next(_rounds[ranks])
    keys = {rank: f"lorasync/gathered/{ranks}/{number}/{rank}" for rank in ranks}
    store.set(keys[me], mine)
    try:
        store.wait(list(keys.values()), timedelta(seconds=timeout))
    except (dist.DistStoreError, RuntimeError) as error:
        missing = [rank for rank, key in keys.items() if not store.check([key])]
        store.set(keys[me], f"gave up after {timeout:g} s")
        raise SyncTimeoutError(
            f"gathered(): rank {me} waited {timeout:g} s, ranks {missing} did not arrive. Gathering is "
            "collective: call it on every rank, not under `if rank == 0`."
        ) from error
    answers = {rank: store.get(key).decode() for rank, key in keys.items()}
    _forget(store, ranks, number - 2, me)
    if len(set(answers.values())) > 1:
        listing = "".join(f"\n  rank {rank}: {answer}" for rank, answer in answers.items())
        raise UngatheredError(
            f"gathered(): ranks ask for different parameters, expected the same in the same order:{listing}"
        )


def _forget(store: Any, ranks: tuple[int, ...], number: int, me: int) -> None:
    # Everybody in round n has left round n-1, so nobody still reads round n-2.
    if number >= 0:
        store.delete_key(f"lorasync/gathered/{ranks}/{number}/{me}")
