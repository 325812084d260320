"""What a sync costs before it is run: bytes over bandwidths, with constants from `benchmarks/results`.

A pure model, for `docs/scaling.md` and for choosing: no device is looked at. What was fitted and what was only checked is
said in `tests/planning/test_cost.py`; links other than shared memory are nominal and were not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

BYTES_OF_BASE = {
    "bf16": 2.0,
    "fp16": 2.0,
    "fp32": 4.0,
    "int8": 1.0,
    "nf4": 0.5 + 4 / 64,
    "nf4 nested": 0.5 + 1 / 64,
}
"""Bytes that a merge reads for one weight of the base, scales included."""

_PRODUCTS = {2: 1, 4: 6}
# fp32 factors are three bf16 thirds each, of whose nine products six are summed (docs/kernels.md).


@dataclass(frozen=True)
class Device:
    """How fast one device merges.

    Attributes:
        name: what it is.
        bandwidth: bytes a second, read and written together.
        products: floating-point operations a second in B·A with 16-bit factors; they add to the memory's time.
        decode: seconds to dequantize one weight, while memory is read and written beside it.
        overhead: seconds of one call.
        host: seconds of Python around a push for each adapted weight, by strategy: the checks, vLLM's own work.
        pcie: bytes a second to host memory and back again, which an adapter goes through; 0 where the device is the
            host.
    """

    name: str
    bandwidth: float
    products: float
    decode: float = 0.0
    overhead: float = 0.0
    host: Mapping[str, float] = field(default_factory=dict)
    pcie: float = 0.0


@dataclass(frozen=True)
class Link:
    """How bytes get from the trainer to an engine.

    Attributes:
        name: what it is.
        bandwidth: bytes a second.
        overhead: seconds that a sync takes whatever it carries.
        in_place: whether the engine's worker reads the trainer's own memory, so that nothing travels.
    """

    name: str
    bandwidth: float
    overhead: float = 0.0
    in_place: bool = False


H100 = Device(
    "H100",
    bandwidth=2.97e12,
    products=8.0e14,
    decode=1.06e-12,
    overhead=3e-4,
    host={"factors": 8e-6, "merged": 22e-6, "adapter": 117e-6},
    pcie=42e9,
)
H200 = replace(H100, name="H200", bandwidth=4.22e12)
CUDA_IPC = Link("another process on the same GPU", math.inf, 5e-3, in_place=True)
NVLINK = Link("NVLink, 450 GB/s", 450e9 * 0.8, 1e-3)
IB400 = Link("400 Gb/s", 50e9 * 0.9, 1e-3)
ETHERNET10 = Link("10 Gb/s", 1.25e9 * 0.9, 2e-3)


@dataclass(frozen=True)
class Job:
    """What has to be served.

    Attributes:
        merged: weights with an adapter.
        untouched: weights without one, which a merged push carries too.
        factors: elements of A and B.
        rank: r.
        base: how the base is held: a key of `BYTES_OF_BASE`.
        served_bytes: bytes of one served weight.
        factor_bytes: 2 or 4.
        passes: reads of the base beside the one for merging: 1 for DoRA's norm.
        modules: adapted weights; 7 a layer of most models.
    """

    merged: float
    untouched: float
    factors: float
    rank: int
    base: str = "bf16"
    served_bytes: int = 2
    factor_bytes: int = 2
    passes: int = 0
    modules: int = 196


@dataclass(frozen=True)
class Cost:
    """Seconds of one sync by stage, and what an engine has to hold beside the weights that it serves.

    ``host`` is the Python around the stages.
    """

    source: float
    wire: float
    apply: float
    host: float
    wire_bytes: float
    kept_bytes: float

    @property
    def total(self) -> float:
        """Seconds from the call to the first token of the new policy; nothing overlaps."""
        return self.source + self.wire + self.apply + self.host


def merge_seconds(job: Job, device: Device, *, devices: int = 1) -> float:
    """Seconds to compute every merged weight once: memory traffic or dequantization, whichever takes longer, then products.

    Example:
        >>> qwen2_7b = Job(merged=6.525e9, untouched=1.1e9, factors=161e6, rank=64)
        >>> round(merge_seconds(qwen2_7b, H100) * 1000, 1)
        10.1
    """
    reads = BYTES_OF_BASE[job.base] * (1 + job.passes)
    memory = job.merged * (reads + job.served_bytes) / device.bandwidth
    products = 2 * job.rank * job.merged * _PRODUCTS[job.factor_bytes] * (1 + job.passes) / device.products
    decode = job.merged * device.decode if BYTES_OF_BASE[job.base] <= 1 else 0.0
    return (max(memory, decode) + products) / devices + device.overhead


def sync_seconds(
    strategy: str,
    job: Job,
    *,
    trainer: Device,
    worker: Device,
    link: Link | None,
    replicas: int = 1,
    broadcast: bool = True,
    devices: int = 1,
) -> Cost:
    """Predict one sync.

    Args:
        strategy: ``"merged"``, ``"factors"`` (merged in the worker) or ``"adapter"`` (LoRA slots).
        job: what is served.
        trainer: the device that merges for a merged push.
        worker: the device that an engine runs on.
        link: the way out of the trainer; None where both share a process and nothing travels.
        replicas: engines that are served.
        broadcast: whether the fabric copies (NCCL: the bytes leave the trainer once) or the trainer sends to one engine
            after another (HTTP, files).
        devices: devices that one copy of the model is spread over, on either side.

    Returns:
        the seconds of each stage.
    """
    wide = job.merged + job.untouched
    size = wide * job.served_bytes if strategy == "merged" else job.factors * job.factor_bytes
    sends = 1 if broadcast else replicas
    wire = 0.0 if link is None else sends * size / link.bandwidth + link.overhead * (1 + math.log2(replicas))
    host = worker.host.get(strategy, 0.0) * job.modules
    if strategy == "merged":
        source = merge_seconds(job, trainer, devices=devices)
        in_place = link is None or link.in_place  # merged into the live weights: only the others are copied
        copied = (job.untouched if in_place else wide) * job.served_bytes
        return Cost(source, wire, 2 * copied / worker.bandwidth / devices, host, size, 0.0)
    if strategy == "factors":
        kept = job.merged * BYTES_OF_BASE[job.base]
        return Cost(0.0, wire, merge_seconds(job, worker, devices=devices), host, size, kept)
    assert strategy == "adapter", strategy
    copies = size * (2 / worker.bandwidth + (1 / worker.pcie if worker.pcie else 0.0))
    return Cost(0.0, wire, copies / devices, host, size, 2 * size)
