"""A thousand pushes with each strategy leave everything as it was; ``make soak`` writes what was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorasync as ls
from lorasync.push import MergeInWorker, ServeAdapter, connect
from lorasync.verify import model_digest
from tests import models
from tests.e2e import heap, soak_results
from tests.e2e.engines import Answers, check_alike, greedy, running_llm
from tests.e2e.faults import engine_core_of, worker_of
from tests.e2e.growth import ALLOCATED, Sample, growing, held_by
from tests.e2e.oracle import merged_checkpoint
from tests.models import tiny

PUSHES, WARM_UP, EVERY = 1_000, 200, 50
STRATEGIES: dict[str, Any] = {
    "merged": None,
    "factors": MergeInWorker(base="device"),
    "adapter": ServeAdapter("policy"),
}
LIMITS = dict(zip(ALLOCATED, (1.0, 2.0), strict=True))
"""What a push may seem to add; the samples that are taken and vLLM's own bookkeeping are half of it."""
RESIDENT = {"merged": 64.0, "factors": 16.0, "adapter": 16.0}
"""The same for RSS in KB, which alone sees memory that is not malloc's; it moves in steps of a whole tensor."""


def limits_of(strategy: str) -> dict[str, float]:
    return {**LIMITS, "RSS in KB": RESIDENT[strategy]}


@pytest.fixture(scope="module")
def expected(base, tmp_path_factory) -> Answers:
    """What a fresh engine answers that loads PEFT's own merged checkpoint of the adapter of seed 0."""
    checkpoint = merged_checkpoint(tiny(base), base, tmp_path_factory.mktemp("oracle"))
    with running_llm(checkpoint, backend=None, dtype="float32") as oracle:
        return greedy(oracle)


@pytest.fixture(scope="module")
def results() -> Iterator[soak_results.Results]:
    found = soak_results.Results({"pushes": PUSHES, "warm_up": WARM_UP, "sampled_every": EVERY})
    yield found
    if os.environ.get("LORASYNC_WRITE_SOAK"):
        found.write()


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_thousand_pushes_leave_nothing_behind(strategy, base, expected, results):
    policy = tiny(base)
    source = ls.MergedSource(policy) if strategy == "merged" else ls.FactorSource(policy)
    kept, samples = model_digest(policy), []
    slots = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2} if strategy == "adapter" else {}
    with (
        running_llm(base, dtype="float32", **slots, **heap.MEASURED) as llm,
        connect(source, llm, STRATEGIES[strategy], timeout=60) as sync,
    ):
        processes = {"trainer": os.getpid(), "core": engine_core_of(llm), "worker": worker_of(llm)}
        began = time.perf_counter()
        for push in range(1, PUSHES + 1):
            models.move(policy, seed=0 if push % EVERY == 0 else push)
            with pytest.MonkeyPatch.context() as patched:
                for module in ("inline", "shared_memory"):  # through a file, and in the call
                    patched.setattr(f"lorasync.transport.{module}.SMALL", (0, 4 << 20)[push % 2])
                sync.send_weights()
            request = sync.request()
            if push % EVERY == 0:
                found = greedy(llm, **request)
                if strategy == "adapter":  # slots add s·B·A·x to W·x, which rounds otherwise
                    check_alike(found, expected)
                else:
                    assert found == expected
                adapters = {"engine: adapters": len(llm.llm_engine.list_loras()) if slots else 0}
                samples.append(Sample(push, held_by(processes) | heap.live_in(llm) | adapters))
        seconds = time.perf_counter() - began
    assert model_digest(policy) == kept
    steady = [sample for sample in samples if sample.pushes >= WARM_UP]
    results.add(strategy, samples, steady, seconds, limits_of(strategy))
    assert growing(steady, limits_of(strategy)) == {}


@pytest.mark.soak
def test_a_leak_of_8_kb_a_push_is_found_in_every_process_and_without_it_there_is_none(base):
    policy = tiny(base)
    with (
        running_llm(base, dtype="float32", **heap.MEASURED) as llm,
        connect(ls.FactorSource(policy), llm, MergeInWorker(base="device"), timeout=60) as sync,
    ):

        def pushed(number: int, *, leak: int) -> list[Sample]:
            samples = []
            for push in range(1, number + 1):
                models.move(policy, seed=push)
                sync.send_weights()
                if leak:
                    heap.leak_in(llm, leak)
                if push % 20 == 0:
                    greedy(llm)
                    samples.append(Sample(push, heap.live_in(llm)))
            return samples

        pushed(300, leak=0)
        assert growing(pushed(200, leak=0), LIMITS) == {}
        leaking = pushed(200, leak=8 << 10)
    found = growing(leaking, LIMITS)
    assert found.keys() == leaking[0].held.keys()
    assert all(7 < slope < 10 for name, slope in found.items() if name.endswith("in KB"))


def _samples(**held: list[float]) -> list[Sample]:
    return [
        Sample(50 * i, dict(zip(held, now, strict=True)))
        for i, now in enumerate(zip(*held.values(), strict=True))
    ]


def test_growth_is_found_in_noise_and_noise_is_no_growth():
    limits = {"RSS in KB": 4.0, "live heap in KB": 4.0}
    noise = [0, 900, 100, 700, 0, 800, 200, 900, 100, 0, 600, 300]
    flat = {"worker: RSS in KB": noise, "worker: threads": [9, 9, 10, 9, 9, 9, 9, 10, 9, 9, 9, 9]}
    assert growing(_samples(**flat), limits) == {}
    step = {"worker: live heap in KB": [*[100.0, 103.0] * 3, *[2400.0, 2403.0] * 3]}
    assert growing(_samples(**step), {"live heap in KB": 0.1}) == {}
    leaking = {
        "worker: live heap in KB": [n + 50 * 8 * i for i, n in enumerate(step["worker: live heap in KB"])],
        "worker: RSS in KB": [n + 50 * 8 * i for i, n in enumerate(noise)],
        "worker: threads": [9 + i // 4 for i in range(12)],
        "worker: file handles": [*range(12)],
    }
    assert growing(_samples(**leaking), limits).keys() == leaking.keys()


def test_what_a_process_holds_is_seen(tmp_path):
    before = held_by({"me": os.getpid()})
    with Path(os.devnull).open():
        after = held_by({"me": os.getpid()})
    assert after["me: file handles"] == before["me: file handles"] + 1
