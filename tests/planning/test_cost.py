"""The cost model against every run that was measured; which of them it was fitted to is said beside each."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest

from lorasync.planning.cost import CUDA_IPC, H100, H200, IB400, Device, Job, Link, merge_seconds, sync_seconds

# benchmarks/results/kernels_qwen2-7b_h100_202611.md, replayed from a CUDA graph: no overhead of the call.
QWEN2_7B = Job(merged=6.525e9, untouched=1.09e9, factors=161e6, rank=64)
ON_GRAPH = replace(H100, overhead=0.0)
KERNELS = {
    "bf16 base, bf16 factors": ({}, 9.80, "fitted: products"),
    "NF4 base, bf16 factors": ({"base": "nf4"}, 7.60, "fitted: decode"),
    "bf16 base, fp32 factors": ({"factor_bytes": 4}, 15.30, "checked"),
    "NF4 base, fp32 factors": ({"base": "nf4", "factor_bytes": 4}, 16.19, "checked"),
    "NF4 nested base, bf16 factors": ({"base": "nf4 nested"}, 8.49, "checked"),
    "INT8 base, bf16 factors": ({"base": "int8"}, 9.11, "checked"),
    "INT8 base, fp32 factors": ({"base": "int8", "factor_bytes": 4}, 16.34, "checked"),
    "bf16 base, bf16 factors, DoRA": ({"passes": 1}, 15.35, "checked"),
}


@pytest.mark.parametrize("kind", list(KERNELS))
def test_kernels_on_an_h100_within_20_percent(kind: str):
    changes, milliseconds, _ = KERNELS[kind]
    assert merge_seconds(replace(QWEN2_7B, **changes), ON_GRAPH) * 1e3 == pytest.approx(milliseconds, rel=0.2)


# Whole calls of send_weights(): benchmarks/results/sync_qwen2-7b-r64_h100_202611.md, two machines on two days.
ON_H100 = {
    "factors, one process": ("factors", "bf16", None, (11.62, 13.40), "fitted: host"),
    "merged, one process": ("merged", "bf16", None, (16.04, 16.06), "fitted: host"),
    "adapter, one process": ("adapter", "bf16", None, (32.41, 35.30), "checked"),
    "factors, two processes": ("factors", "bf16", CUDA_IPC, (17.63, 16.12), "fitted: overhead of the link"),
    "factors, one process, NF4": ("factors", "nf4", None, (9.83, 9.24), "checked"),
    "merged, one process, NF4": ("merged", "nf4", None, (17.12, 16.48), "checked"),
    "adapter, one process, NF4": ("adapter", "nf4", None, (38.80, 26.91), "checked"),
    "merged, two processes": ("merged", "bf16", CUDA_IPC, (23.39, 21.01), "checked"),
    "adapter, two processes": ("adapter", "bf16", CUDA_IPC, (33.65, 27.97), "checked"),
}


@pytest.mark.parametrize("way", list(ON_H100))
def test_syncs_on_an_h100_within_20_percent(way: str):
    strategy, base, link, found, _ = ON_H100[way]
    cost = sync_seconds(strategy, replace(QWEN2_7B, base=base), trainer=H100, worker=H100, link=link)
    assert cost.total * 1e3 == pytest.approx(mean(found), rel=0.2)


# benchmarks/results/sweep_qwen2_h200_202611.md and sweep-more_qwen2_h200_202611.md: one process, H200.
QWEN2_14B = Job(merged=13.21e9, untouched=1.56e9, factors=275e6, rank=64, modules=336)
QWEN2_32B = Job(merged=31.21e9, untouched=1.56e9, factors=537e6, rank=64, modules=448)
RANK_8, RANK_256 = (replace(QWEN2_7B, rank=r, factors=161e6 * r / 64) for r in (8, 256))
ON_H200 = {
    "7B, r=8, factors": ("factors", RANK_8, 9.5, "checked"),
    "7B, r=8, merged": ("merged", RANK_8, 12.8, "checked"),
    "7B, r=8, adapter": ("adapter", RANK_8, 28.9, "fitted: host"),
    "7B, r=64, factors": ("factors", QWEN2_7B, 9.7, "checked"),
    "7B, r=64, merged": ("merged", QWEN2_7B, 12.9, "checked"),
    "7B, r=64, adapter": ("adapter", QWEN2_7B, 30.8, "checked"),
    "7B, r=256, factors": ("factors", RANK_256, 13.9, "checked"),
    "7B, r=256, merged": ("merged", RANK_256, 16.1, "checked"),
    "7B, r=256, adapter": ("adapter", RANK_256, 58.6, "fitted: pcie"),
    "7B, fp32 factors, factors": ("factors", replace(QWEN2_7B, factor_bytes=4), 16.9, "checked"),
    "7B, fp32 factors, merged": ("merged", replace(QWEN2_7B, factor_bytes=4), 20.0, "checked"),
    "14B, factors": ("factors", QWEN2_14B, 17.4, "checked"),
    "14B, merged": ("merged", QWEN2_14B, 22.3, "checked"),
    "14B, adapter": ("adapter", QWEN2_14B, mean((53.9, 41.9)), "checked; both of its runs"),
    "14B, NF4, factors": ("factors", replace(QWEN2_14B, base="nf4"), 19.0, "checked"),
    "14B, NF4, merged": ("merged", replace(QWEN2_14B, base="nf4"), 29.9, "checked"),
    "32B, NF4, factors": ("factors", replace(QWEN2_32B, base="nf4"), 40.1, "checked"),
    "32B, NF4, merged": ("merged", replace(QWEN2_32B, base="nf4"), 45.2, "checked"),
    "32B, NF4, adapter": ("adapter", replace(QWEN2_32B, base="nf4"), 75.2, "checked"),
}


@pytest.mark.parametrize("way", list(ON_H200))
def test_syncs_on_an_h200_within_20_percent(way: str):
    strategy, job, milliseconds, _ = ON_H200[way]
    cost = sync_seconds(strategy, job, trainer=H200, worker=H200, link=None)
    assert cost.total * 1e3 == pytest.approx(milliseconds, rel=0.2)


# benchmarks/results/sync_smollm2_cpu_202611.md: 2 cores, engine in another process, fp32, r=16. Three constants fitted to
# three runs (and the trainer's merge to benchmarks/results/merge_cpu.json): this shows that the form fits, no more.
SMOLLM2 = Job(106.2e6, 28.4e6, 4.88e6, rank=16, base="fp32", served_bytes=4, factor_bytes=4)
CPU_TRAINER = Device("CPU, trainer", bandwidth=2.3e9, products=1e12)
CPU_WORKER = Device("CPU, worker", bandwidth=1.13e9, products=1e12)
SHARED_MEMORY = Link("shared memory, one machine", 680e6, 0.14)


@pytest.mark.parametrize(("strategy", "seconds"), [("adapter", 0.202), ("factors", 0.981), ("merged", 2.172)])
def test_syncs_on_a_cpu_within_20_percent(strategy: str, seconds: float):
    cost = sync_seconds(strategy, SMOLLM2, trainer=CPU_TRAINER, worker=CPU_WORKER, link=SHARED_MEMORY)
    assert cost.total == pytest.approx(seconds, rel=0.2)


def test_what_travels():
    settings = {"trainer": H100, "worker": H100, "link": IB400}
    merged, factors = (sync_seconds(s, QWEN2_7B, **settings) for s in ("merged", "factors"))
    assert merged.wire_bytes == pytest.approx(15.23e9, rel=1e-3)
    assert factors.wire_bytes == 322e6
    assert factors.total < merged.total
    alone = sync_seconds("factors", QWEN2_7B, **{**settings, "link": None})
    assert (alone.wire, alone.apply) == (0.0, merge_seconds(QWEN2_7B, H100))


def test_an_engine_after_another_costs_the_wire_each_time_and_a_broadcast_once():
    settings = {"trainer": H100, "worker": H100, "link": IB400, "replicas": 100}
    once, each = (sync_seconds("factors", QWEN2_7B, broadcast=b, **settings) for b in (True, False))
    assert each.wire - once.wire == pytest.approx(99 * 322e6 / IB400.bandwidth)
    assert each.apply == once.apply
