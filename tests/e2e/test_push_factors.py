"""Factors into a live vLLM, merged in the worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import lorasync as ls
from lorasync.errors import EngineClosedError, EngineNotReadyError, MismatchError, SyncError
from lorasync.push import MergeInWorker, ServeAdapter, connect
from lorasync.verify import model_digest
from tests import models
from tests.e2e.conftest import nf4_policy
from tests.e2e.engines import Answers, greedy, running_llm
from tests.e2e.faults import from_the_middle, raising
from tests.e2e.oracle import merged_checkpoint
from tests.e2e.read_back import EXTENSION, served_weights
from tests.models import tiny

pytestmark = pytest.mark.timeout(420)


class Served(NamedTuple):
    llm: Any
    dtype: torch.dtype
    expected: Answers
    untouched: list[dict[str, str]]


def oracle(policy, path: str, out: Path, *, dtype: str = "float32", **settings):
    """What a fresh engine answers that loads PEFT's merged checkpoint."""
    with running_llm(merged_checkpoint(policy, path, out), backend=None, dtype=dtype, **settings) as fresh:
        return greedy(fresh)


@pytest.fixture(
    scope="module",
    params=[
        ("another process", 1, "bfloat16"),
        ("this process", 1, "float32"),
        ("another process", 2, "float32"),
    ],
    ids=lambda p: f"{p[0]}, TP={p[1]}, {p[2]}",
)
def engine(request, base, tmp_path_factory):
    """An engine on the plain base, the answers for the adapter of seed 0, and the weights before the first push.

    In this process layers go through vLLM's loader one by one, in others all at once.
    """
    place, ranks, dtype = request.param
    policy = tiny(base, getattr(torch, dtype))
    expected = oracle(policy, base, tmp_path_factory.mktemp("o"), dtype=dtype, tensor_parallel_size=ranks)
    settings = {"dtype": dtype, "tensor_parallel_size": ranks, **EXTENSION}
    here = place == "this process"
    with pytest.MonkeyPatch.context() as patched, running_llm(base, in_process=here, **settings) as llm:
        if here:
            patched.setattr("lorasync.receive.restore.LOAD_BYTES", 1)
        untouched = served_weights(llm)
        assert len(untouched) == ranks
        yield Served(llm, getattr(torch, dtype), expected, untouched)


@pytest.mark.parametrize("kind", ["device", "cpu", "checkpoint"])
def test_merging_in_the_worker_serves_exactly_the_merged_checkpoint(engine, base, kind):
    llm, dtype, expected, _ = engine
    policy = tiny(base, dtype)
    digest = model_digest(policy)
    with connect(ls.MergedSource(tiny(base, dtype, scale=0.0)), llm) as reset:
        reset.send_weights()
    plain = greedy(llm)
    with connect(ls.FactorSource(policy), llm, MergeInWorker(base=kind)) as sync:
        report = sync.send_weights()
        assert greedy(llm, **sync.request()) == expected
        assert report.strategy == "factors"
        models.move(policy, seed=1)
        sync.send_weights()
        assert greedy(llm) != expected
        sync.rollback()
        assert greedy(llm) == expected
        models.move(policy, seed=0, scale=0.0)  # back to a zero adapter, by any number of pushes
        sync.send_weights()
        assert greedy(llm) == plain
    models.move(policy, seed=0)
    assert model_digest(policy) == digest


@pytest.mark.parametrize("kind", ["device", "cpu", "checkpoint"])
def test_merging_in_the_worker_gives_every_rank_the_weights_of_a_merged_push(engine, base, kind):
    llm, dtype, *_ = engine
    policy = tiny(base, dtype, seed=3, r=4, use_rslora=True, target_modules=["q_proj", "down_proj"])
    merged, digests = _pushed(llm, ls.MergedSource(policy))
    _pushed(llm, ls.MergedSource(tiny(base, dtype, scale=0.0)))
    assert served_weights(llm) != merged
    assert _pushed(llm, ls.FactorSource(policy), MergeInWorker(base=kind)) == (merged, digests)


def test_a_qlora_policys_packed_base_gives_every_rank_the_weights_of_a_merged_push(engine, base):
    llm, dtype, *_ = engine
    policy = nf4_policy(base, dtype)
    merged, digests = _pushed(llm, ls.MergedSource(policy))
    _pushed(llm, ls.MergedSource(tiny(base, dtype, scale=0.0)))
    assert served_weights(llm) != merged
    assert _pushed(llm, ls.FactorSource(policy), MergeInWorker(base="nf4")) == (merged, digests)


def test_a_hundred_pushes_and_back_to_a_zero_adapter_give_the_starting_weights(engine, base):
    llm, dtype, _, untouched = engine
    policy = tiny(base, dtype)
    with connect(ls.FactorSource(policy), llm, MergeInWorker(base="checkpoint")) as sync:
        for seed in range(100):
            models.move(policy, seed=seed)
            sync.send_weights()
        assert served_weights(llm) != untouched
        models.move(policy, seed=0, scale=0.0)
        sync.send_weights()
        assert served_weights(llm) == untouched


def test_a_source_that_dies_half_way_costs_no_more_than_one_push(engine, base):
    """Also on two ranks: where one has failed vLLM leaves the answers of the others unread."""
    llm, dtype, expected, _ = engine
    policy = tiny(base, dtype)
    for source, apply in ((ls.FactorSource, MergeInWorker(base="checkpoint")), (ls.MergedSource, None)):
        with connect(source(policy), llm, apply, bucket_bytes=1 << 20) as sync:
            sync.send_weights()
            for _ in range(3):
                sync.source = from_the_middle(source(policy), raising(ConnectionError("died here")))
                with pytest.raises(ConnectionError, match="died here"):
                    sync.send_weights()
                if apply is not None:
                    assert greedy(llm, **sync.request()) == expected
                else:
                    with pytest.raises(EngineClosedError, match="died half-way"):
                        sync.request()
                _digests(sync)
                sync.source = source(policy)
                sync.send_weights()
                assert greedy(llm, **sync.request()) == expected


def _pushed(llm, source, apply=None) -> tuple[list[dict[str, str]], dict[int, str] | None]:
    """Every rank's weights after a push, and its digests where the engine can give them."""
    with connect(source, llm, apply) as sync:
        ranks = sync.send_weights().ranks
        found, digests = served_weights(llm), _digests(sync)
    assert len(found) == ranks
    assert digests is None or len(digests) == ranks
    return found, digests


def _digests(sync) -> dict[int, str] | None:
    try:
        return sync.digests()["engine"]
    except SyncError as error:
        if "packed for this CPU" not in str(error):
            raise
        return None


def test_a_checkpoint_of_merge_to_disk_loads_in_vllm_and_answers_alike(engine, base, tmp_path):
    llm, dtype, expected, _ = engine
    if dtype != torch.float32 or llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size == 1:
        pytest.skip("once is enough; beside an engine in this process vLLM starts no other")
    from lorasync.export import merge_to_disk

    policy = tiny(base, dtype)
    policy.save_pretrained(tmp_path / "adapter")
    merge_to_disk(base, tmp_path / "merged", adapter=tmp_path / "adapter", progress=False)
    settings = {"backend": None, "dtype": "float32", "tensor_parallel_size": 2}
    with running_llm(str(tmp_path / "merged"), **settings) as fresh:
        assert greedy(fresh) == expected


def test_another_base_is_refused_with_the_ways_out(engine, base):
    llm, dtype, *_ = engine
    policy = tiny(base, dtype)
    policy.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.data.mul_(1.5)
    with pytest.raises(MismatchError, match=r"layers\.0\.mlp\.up_proj.*checkpoint that was trained on"):
        connect(ls.FactorSource(policy), llm, MergeInWorker(base="checkpoint"))
    ranks = llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
    with connect(ls.FactorSource(tiny(base, dtype)), llm, MergeInWorker(base="checkpoint")) as sync:
        for _ in range(20):  # a refusal leaves the ranks able to answer
            assert sync.send_weights().ranks == ranks


def test_a_qlora_policy_needs_its_own_base_and_is_exact_with_it(smollm2, tmp_path):
    policy = nf4_policy(smollm2, torch.float32)
    with running_llm(merged_checkpoint(policy, smollm2, tmp_path), backend=None, dtype="float32") as fresh:
        expected = greedy(fresh)
    with running_llm(smollm2, dtype="float32") as llm:
        with pytest.raises(MismatchError, match=r"base='nf4'"):
            connect(ls.FactorSource(policy), llm, MergeInWorker(base="checkpoint"))
        with connect(ls.FactorSource(policy), llm, MergeInWorker(base="nf4")) as sync:
            report = sync.send_weights()
            assert greedy(llm) == expected
            assert report.bytes < 30e6
            with connect(ls.MergedSource(policy), llm) as merged:
                merged.send_weights()
                assert greedy(llm) == expected


def test_an_engine_without_slots_shows_how_to_start_one(engine, base):
    llm, dtype, *_ = engine
    with pytest.raises(EngineNotReadyError, match=r"enable_lora=True, max_lora_rank=8"):
        connect(ls.FactorSource(tiny(base, dtype)), llm, ServeAdapter("policy"))


def test_source_and_apply_have_to_go_together(engine, base):
    llm, dtype, *_ = engine
    policy = tiny(base, dtype)
    with pytest.raises(MismatchError, match="ServeAdapter"):
        connect(ls.FactorSource(policy), llm)
    with pytest.raises(MismatchError, match="FactorSource"):
        connect(ls.MergedSource(policy), llm, MergeInWorker(base="device"))
