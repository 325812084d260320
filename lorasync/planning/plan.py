"""`plan`: which ways this adapter can reach this engine, what each costs, and which one to take."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import LorasyncError
from lorasync.planning.cost import Job, sync_seconds
from lorasync.source import FactorSource, MergedSource, unwrap
from lorasync.source.model import base_of
from lorasync.source.parameter import packing

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasync.planning.cost import Device, Link


_SLOTS_DECODE = "1.24 to 1.34 times as long (7B, r=64, H100): every layer computes the factors too"


@dataclass(frozen=True)
class Strategy:
    """One way to the engine.

    Attributes:
        name: ``"MergedSource"``, ``"MergeInWorker(base=…)"`` or ``"ServeAdapter"``.
        refusal: why it can't be taken; empty if it can.
        wire_bytes: what travels at each sync.
        setup_bytes: what travels once, in the handshake.
        worker_bytes: what the workers keep besides the weights that they serve, all ranks together.
        seconds: what a sync is expected to take by `lorasync.planning.cost`'s model; None where no device was named.
        fidelity: how exactly the engine then serves the trained policy.
        decode: what generating costs compared with merged weights.
    """

    name: str
    refusal: str
    wire_bytes: int
    setup_bytes: int
    worker_bytes: int
    fidelity: str
    decode: str
    seconds: float | None = None


@dataclass(frozen=True)
class SyncPlan:
    """The strategies, and the one to take: the first possible one with the fewest bytes at full decode speed."""

    strategies: tuple[Strategy, ...]
    choice: str

    def __str__(self) -> str:
        lines = [
            f"{'→' if s.name == self.choice else ' '} {s.name}: "
            + (s.refusal or f"{_size(s.wire_bytes)} a sync, {_size(s.setup_bytes)} once, {_size(s.worker_bytes)} kept; "
               f"{s.fidelity}; decodes {s.decode}" + (f"; about {s.seconds:.3g} s" if s.seconds is not None else ""))
            for s in self.strategies
        ]  # fmt: skip
        return "\n".join(lines)


def plan(
    model: Any,
    target: Any = None,
    *,
    adapter: str | None = None,
    device: Device | None = None,
    link: Link | None = None,
) -> SyncPlan:
    """Say how this adapter can reach this engine; nothing is gathered, sent or changed.

    Args:
        model: the training model, or the engine around it.
        target: a `vllm.LLM` or `AsyncLLM`; None judges the adapter alone.
        adapter: which adapter; the active one by default.
        device: what trainer and engine run on (`lorasync.planning.cost.H100`, for one), for the expected seconds.
        link: how bytes get to the engine (`lorasync.planning.cost.ETHERNET10`); None where both share a process.

    Returns:
        the strategies with bytes and fidelity, and a choice. Whether the engine holds the same base is compared
        only by `connect`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> found = plan(get_peft_model(model, LoraConfig(r=2, target_modules=["0"])))
        >>> found.choice
        'MergeInWorker(base="device")'
        >>> [s.wire_bytes for s in found.strategies]
        [16640, 1024, 1024]
    """
    config = _vllm_config(target)
    packed = _packed_kind(unwrap(model))
    strategies: tuple[Strategy, ...] = (
        _merged(model, adapter),
        _in_worker(model, adapter, packed),
        _served(model, adapter, packed, config),
    )
    if device is not None and (job := _job(model, adapter, packed)) is not None:
        strategies = tuple(_with_seconds(s, job, device, link) for s in strategies)
    possible = [s for s in strategies if not s.refusal]
    full_speed = [s for s in possible if s.name != "ServeAdapter"]
    best = min(full_speed or possible, key=lambda s: s.wire_bytes, default=None)
    return SyncPlan(strategies, best.name if best is not None else "")


def _merged(model: Any, adapter: str | None) -> Strategy:
    refusal, size = _measure(lambda: MergedSource(model, adapter=adapter))
    return Strategy(
        "MergedSource", refusal, size, 0, 0, "exact, rounded once to the served dtype", "at full speed"
    )


def _in_worker(model: Any, adapter: str | None, packed: str) -> Strategy:
    refusal, size = _measure(lambda: FactorSource(model, adapter=adapter))
    if packed == "int8":
        refusal = refusal or "the base is 8-bit: use MergedSource"
    if not refusal:
        spec = FactorSource(model, adapter=adapter).spec()
        pieces = [m.weight for m in spec.modules if m.pieces]
        tied = [m.weight for m in spec.modules if m.weight in spec.ties]
        if pieces or tied or spec.conflicts:
            refusal = f"{(pieces or tied or list(spec.conflicts))[0]} can't be merged there: use MergedSource"
    kind = "nf4" if packed in ("nf4", "fp4") else "device"
    name = f'MergeInWorker(base="{kind}")'
    setup = _packed_bytes(model) if kind == "nf4" else 0
    kept = setup if kind == "nf4" else _base_bytes(model, adapter, refusal)
    return Strategy(
        name, refusal, size, setup, kept, "exact, rounded once to the served dtype", "at full speed"
    )


def _served(model: Any, adapter: str | None, packed: str, config: Any) -> Strategy:
    refusal, size = _measure(lambda: FactorSource(model, adapter=adapter))
    if not refusal:
        spec = FactorSource(model, adapter=adapter).spec()
        rank = max((m.r for m in spec.modules), default=0)
        lora = getattr(config, "lora_config", None)
        if (
            any(m.dora for m in spec.modules)
            or spec.biases
            or spec.rows
            or spec.saved
            or spec.base_changed_by
        ):
            refusal = "vLLM's LoRA slots hold plain factors only"
        elif config is not None and lora is None:
            refusal = "the engine was started without enable_lora=True"
        elif lora is not None and lora.max_lora_rank < rank:
            refusal = f"the engine's max_lora_rank is {lora.max_lora_rank}, the adapter's rank {rank}"
    fidelity = "exact, nothing is rounded"
    if packed != "plain":
        fidelity = f"another policy: trained on {packed} weights, served on the engine's (other_base=True accepts it)"
    return Strategy("ServeAdapter", refusal, size, 0, 2 * size, fidelity, _SLOTS_DECODE)


def _job(model: Any, adapter: str | None, packed: str) -> Job | None:
    """What the cost model needs to know; None for an adapter without factors or without a merged form."""
    try:
        source, served = FactorSource(model, adapter=adapter), MergedSource(model, adapter=adapter).metadata()
    except LorasyncError:
        return None
    modules, factors = source.spec().modules, source.metadata()
    merged = sum(math.prod(m.shape) for m in modules)
    return Job(
        merged=merged,
        untouched=sum(math.prod(m.shape) for m in served) - merged,
        factors=sum(math.prod(m.shape) for m in factors),
        rank=max((m.r for m in modules), default=0),
        base={"fp4": "nf4", "plain": _BASES.get(served[0].dtype.itemsize, "bf16")}.get(packed, packed),
        served_bytes=served[0].dtype.itemsize,
        factor_bytes=max(factors[0].dtype.itemsize, 2),
        passes=int(any(m.dora for m in modules)),
        modules=len(modules),
    )


def _with_seconds(strategy: Strategy, job: Job, device: Device, link: Link | None) -> Strategy:
    if strategy.refusal:
        return strategy
    kind = {"MergedSource": "merged", "ServeAdapter": "adapter"}.get(strategy.name, "factors")
    return replace(strategy, seconds=sync_seconds(kind, job, trainer=device, worker=device, link=link).total)


_BASES = {2: "bf16", 4: "fp32"}


def _measure(make: Callable[[], Any]) -> tuple[str, int]:
    """Why the source can't be made (empty if it can), and the bytes that it yields."""
    try:
        source = make()
        return "", sum(m.dtype.itemsize * torch.Size(m.shape).numel() for m in source.metadata())
    except LorasyncError as error:
        return str(error).splitlines()[0], 0


def _base_bytes(model: Any, adapter: str | None, refusal: str) -> int:
    if refusal:
        return 0
    modules = FactorSource(model, adapter=adapter).spec().modules
    return sum(torch.Size(m.shape).numel() * getattr(torch, m.dtype).itemsize for m in modules)


def _packed_kind(model: torch.nn.Module) -> str:
    kinds = {
        packing(module, name)
        for module in base_of(model).modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    return next((kind for kind in ("int8", "nf4", "fp4") if kind in kinds), "plain")


def _packed_bytes(model: Any) -> int:
    """About half a byte a weight, and one scale in 64."""
    modules = list(base_of(unwrap(model)).modules())
    return sum(
        param.numel() * param.element_size()
        for module in modules
        for name, param in module.named_parameters(recurse=False)
        if packing(module, name) in ("nf4", "fp4")
    )


def _vllm_config(target: Any) -> Any:
    inner = getattr(target, "llm_engine", target)
    return getattr(inner, "vllm_config", None)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
