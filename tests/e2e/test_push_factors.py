"""Factors into a live vLLM: merged in the worker, or served from LoRA slots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorasync as ls
from lorasync.errors import EngineNotReadyError, MismatchError, SyncError, UnmergeableError
from lorasync.push import MergeInWorker, ServeAdapter, connect
from lorasync.verify import model_digest
from tests import models
from tests.e2e.conftest import nf4_policy
from tests.e2e.engines import greedy, running_llm
from tests.e2e.oracle import merged_checkpoint

pytestmark = pytest.mark.timeout(420)


def tiny(path: str, dtype: torch.dtype = torch.float32, **adapter):
    from transformers import AutoModelForCausalLM

    return models.with_adapter(AutoModelForCausalLM.from_pretrained(path, dtype=dtype), **adapter)


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
    """An engine on the plain base, the dtype, and the answers for the adapter of seed 0."""
    place, ranks, dtype = request.param
    policy = tiny(base, getattr(torch, dtype))
    expected = oracle(policy, base, tmp_path_factory.mktemp("o"), dtype=dtype, tensor_parallel_size=ranks)
    settings = {"dtype": dtype, "tensor_parallel_size": ranks}
    with running_llm(base, in_process=place == "this process", **settings) as llm:
        yield llm, getattr(torch, dtype), expected


@pytest.mark.parametrize("kind", ["device", "cpu", "checkpoint"])
def test_merging_in_the_worker_serves_exactly_the_merged_checkpoint(engine, base, kind):
    llm, dtype, expected = engine
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


def test_worker_merge_and_merged_push_serve_the_same(engine, base):
    llm, dtype, _ = engine
    policy = tiny(base, dtype, seed=3, r=4, use_rslora=True, target_modules=["q_proj", "down_proj"])
    with connect(ls.FactorSource(policy), llm, MergeInWorker(base="checkpoint")) as sync:
        sync.send_weights()
        in_worker = greedy(llm)
    with connect(ls.MergedSource(policy), llm) as sync:
        sync.send_weights()
        assert greedy(llm) == in_worker


def test_a_checkpoint_of_merge_to_disk_loads_in_vllm_and_answers_alike(engine, base, tmp_path):
    llm, dtype, expected = engine
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
    llm, dtype, _ = engine
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


@pytest.fixture(scope="module", params=["another process", "this process"])
def slots(request, base):
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    with running_llm(base, in_process=request.param == "this process", dtype="float32", **lora) as llm:
        yield llm


def test_a_served_adapter_answers_like_the_one_that_vllm_loads_from_disk(slots, base, tmp_path):
    from vllm.lora.request import LoRARequest

    policy = tiny(base)
    policy.save_pretrained(tmp_path / "one")
    on_disk = greedy(slots, lora_request=LoRARequest("disk", 7, str(tmp_path / "one")))
    with connect(ls.FactorSource(policy), slots, ServeAdapter("policy")) as sync:
        with pytest.raises(SyncError, match=r"send_weights\(\) first"):
            sync.request()
        sync.send_weights()
        first = sync.request()
        assert greedy(slots, **first) == on_disk
        models.move(policy, seed=5)
        sync.send_weights()
        second = greedy(slots, **sync.request())
        assert second != on_disk
        assert greedy(slots, **first) == on_disk  # two versions keep apart
        sync.rollback()
        assert greedy(slots, **sync.request()) == on_disk
        for step in range(20):
            models.move(policy, seed=step)
            sync.send_weights()
        models.move(policy, seed=5)
        sync.send_weights()
        assert greedy(slots, **sync.request()) == second
        assert len({a for a in slots.llm_engine.list_loras() if a >= 1_000_000}) == 2
    assert not {a for a in slots.llm_engine.list_loras() if a >= 1_000_000}


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        ({"r": 16}, MismatchError, "max_lora_rank=16"),
        ({"use_dora": True}, UnmergeableError, "DoRA.*MergedSource"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, UnmergeableError, "trained whole"),
    ],
)
def test_what_slots_cannot_hold_is_refused_with_what_works(slots, base, adapter, error, message):
    with pytest.raises(error, match=message):
        connect(ls.FactorSource(tiny(base, **adapter)), slots, ServeAdapter("policy"))


def test_an_engine_without_slots_shows_how_to_start_one(engine, base):
    llm, dtype, _ = engine
    with pytest.raises(EngineNotReadyError, match=r"enable_lora=True, max_lora_rank=8"):
        connect(ls.FactorSource(tiny(base, dtype)), llm, ServeAdapter("policy"))


def test_source_and_apply_have_to_go_together(engine, base):
    llm, dtype, _ = engine
    policy = tiny(base, dtype)
    with pytest.raises(MismatchError, match="ServeAdapter"):
        connect(ls.FactorSource(policy), llm)
    with pytest.raises(MismatchError, match="FactorSource"):
        connect(ls.MergedSource(policy), llm, MergeInWorker(base="device"))
