"""The adapter served from vLLM's LoRA slots, out of memory."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasync as ls
from lorasync.errors import EngineClosedError, MismatchError, SyncError, UnmergeableError, VersionGoneError
from lorasync.push import ServeAdapter, connect
from lorasync.verify import adapter_effect
from tests import models
from tests.e2e import heap
from tests.e2e.engines import PROMPTS, greedy, running_llm
from tests.e2e.faults import from_the_middle, raising, shared_memory
from tests.e2e.growth import Sample, growing
from tests.models import tiny

pytestmark = pytest.mark.timeout(420)


@pytest.fixture(scope="module", params=["another process", "this process"])
def slots(request, base):
    lora = {"enable_lora": True, "max_lora_rank": 64, "max_loras": 2, "max_cpu_loras": 3}
    here = request.param == "this process"
    measured = {} if here else heap.MEASURED
    with running_llm(base, in_process=here, dtype="float32", **lora, **measured) as llm:
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
        assert adapter_effect(slots, PROMPTS, sync.request()).mean > 0.001
        models.move(policy, seed=5, scale=0.0)
        sync.send_weights()
        assert adapter_effect(slots, PROMPTS, sync.request()).max == 0
        for step in range(20):
            models.move(policy, seed=step)
            sync.send_weights()
            assert sync.request()
        models.move(policy, seed=5)
        sync.send_weights()
        assert greedy(slots, **sync.request()) == second
        assert len(_adapters(slots)) == 2
    assert not _adapters(slots)


def test_fp32_factors_in_bf16_slots_are_rounded_as_from_disk(base, tmp_path):
    from vllm.lora.request import LoRARequest

    policy = tiny(base, torch.bfloat16)
    assert {meta.dtype for meta in ls.FactorSource(policy).metadata()} == {torch.float32}
    policy.save_pretrained(tmp_path / "one")
    with running_llm(base, dtype="bfloat16", enable_lora=True, max_lora_rank=8, max_cpu_loras=2) as llm:
        on_disk = greedy(llm, lora_request=LoRARequest("disk", 7, str(tmp_path / "one")))
        with connect(ls.FactorSource(policy), llm, ServeAdapter("policy")) as sync:
            sync.send_weights()
            assert greedy(llm, **sync.request()) == on_disk
            models.move(policy, seed=5)
            sync.send_weights()
            assert greedy(llm, **sync.request()) != on_disk
            sync.rollback()
            assert greedy(llm, **sync.request()) == on_disk


def test_a_version_that_comes_back_into_the_only_place_is_what_it_was(base):
    """It is built anew from what the worker has kept, whose B vLLM must not have scaled already."""
    policy = tiny(base)
    alone = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1, "max_cpu_loras": 1}
    with (
        running_llm(base, in_process=True, dtype="float32", **alone) as llm,
        connect(ls.FactorSource(policy), llm, ServeAdapter("policy")) as sync,
    ):
        sync.send_weights()
        first = greedy(llm, **sync.request())
        models.move(policy, seed=5)
        sync.send_weights()
        assert greedy(llm, **sync.request()) != first
        sync.rollback()
        assert greedy(llm, **sync.request()) == first


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        ({"r": 65}, MismatchError, "max_lora_rank=128"),
        ({"use_dora": True}, UnmergeableError, "DoRA.*MergedSource"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, UnmergeableError, "trained whole"),
    ],
)
def test_what_slots_cannot_hold_is_refused_with_what_works(slots, base, adapter, error, message):
    with pytest.raises(error, match=message):
        connect(ls.FactorSource(tiny(base, **adapter)), slots, ServeAdapter("policy"))


def test_requests_of_a_trainer_that_another_has_taken_over_never_name_an_adapter_that_is_gone(slots, base):
    """VLLM ends the whole engine when a request names an adapter that it does not have."""
    policy = tiny(base)
    first = connect(ls.FactorSource(policy), slots, ServeAdapter("policy"))
    first.send_weights()
    answers = greedy(slots, **first.request())
    with connect(ls.FactorSource(policy), slots, ServeAdapter("other")) as second:
        assert greedy(slots, **first.request()) == greedy(slots, **second.request()) == answers
        models.move(policy, seed=5)
        second.send_weights()
        with pytest.raises(SyncError, match=r"another trainer has taken the engine over.*connect\(\) again"):
            first.request()
        assert greedy(slots, **second.request()) != answers
    first.shutdown()
    for gone in (first, second):
        with pytest.raises(SyncError, match=r"no adapter.*connect\(\) again"):
            gone.request()
    assert not _adapters(slots)


@pytest.mark.parametrize("takes_over", ["merged", "says goodbye"])
def test_requests_for_an_adapter_end_with_it(slots, base, takes_over):
    policy = tiny(base)
    first = connect(ls.FactorSource(policy), slots, ServeAdapter("policy"))
    first.send_weights()
    source = ls.MergedSource(policy) if takes_over == "merged" else ls.FactorSource(policy)
    apply = None if takes_over == "merged" else ServeAdapter("other")
    with connect(source, slots, apply):
        pass
    assert not _adapters(slots)
    with pytest.raises(SyncError, match=r"another trainer has taken the engine over"):
        first.request()
    with (
        connect(ls.FactorSource(policy), slots, ServeAdapter("policy")) as last,
        pytest.raises(SyncError, match=r"send_weights\(\) first"),
    ):
        last.request()
    first.shutdown()


def test_two_versions_in_one_batch_keep_apart(slots, base):
    policy, alone = tiny(base), {}
    with connect(ls.FactorSource(policy), slots, ServeAdapter("policy")) as sync:
        for seed in (0, 1):
            models.move(policy, seed=seed)
            sync.send_weights()
            ((alone[seed], _),) = greedy(slots, ["Once upon a time"], tokens=24, **sync.request())
        assert alone[0] != alone[1]
        models.move(policy, seed=0)
        sync.send_weights()
        _add(slots, "old", **sync.request())
        finished = [output for _ in range(6) for output in slots.llm_engine.step()]
        models.move(policy, seed=1)
        sync.send_weights()
        _add(slots, "new", **sync.request())
        assert not any(output.finished for output in finished)
        while slots.llm_engine.has_unfinished_requests():
            finished += slots.llm_engine.step()
    answers = {o.request_id.partition("-")[0]: tuple(o.outputs[0].token_ids) for o in finished if o.finished}
    assert answers == {"old": alone[0], "new": alone[1]}


def _add(llm: Any, name: str, **request: Any) -> None:
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    llm.llm_engine.add_request(name, "Once upon a time", wanted, **request)


@pytest.mark.parametrize("pushes", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_pushes_leave_no_adapter_file_or_memory_behind(slots, base, monkeypatch, pushes):
    policy, warm_up, samples = tiny(base, r=64), 10, []
    with connect(ls.FactorSource(policy), slots, ServeAdapter("policy")) as sync:
        for number in range(pushes):
            if number == warm_up:
                files = _files()
            for module in ("inline", "shared_memory"):  # through a file and in the call, by turns
                monkeypatch.setattr(f"lorasync.transport.{module}.SMALL", (0, 4 << 20)[number % 2])
            models.move(policy, seed=number)
            size = sync.send_weights().bytes
            greedy(slots, tokens=1, **sync.request())
            assert len(_adapters(slots)) <= 2
            if number >= warm_up and number % 4 == 0:
                samples.append(Sample(number, _allocated(slots)))
        assert _files() == files
        assert growing(samples, {"live heap in KB": size / 1024 / 16}) == {}
    assert not _adapters(slots)
    assert not shared_memory()


def _adapters(llm: Any) -> set[int]:
    return {number for number in llm.llm_engine.list_loras() if number > 1_000_000}


def _files() -> set[Path]:
    return shared_memory() | set(Path(tempfile.gettempdir()).glob("*lorasync*"))


def _allocated(llm: Any) -> dict[str, float]:
    """KB that are allocated in each process of the engine, the trainer's among them."""
    core_is_here = hasattr(llm.llm_engine.engine_core, "engine_core")
    found = heap.live() if core_is_here else heap.live_in(llm)
    return {name: held for name, held in found.items() if name.endswith("live heap in KB")}


def test_an_adapter_does_not_open_an_engine_that_a_merged_push_left_torn(slots, base):
    policy = tiny(base)
    broken = from_the_middle(ls.MergedSource(policy), raising(RuntimeError("half-way")))
    with connect(broken, slots, bucket_bytes=1000) as merged, pytest.raises(RuntimeError, match="half-way"):
        merged.send_weights()
    with connect(ls.FactorSource(policy), slots, ServeAdapter("policy", other_base=True)) as sync:
        with pytest.raises(EngineClosedError, match="died half-way"):
            sync.send_weights()
        with pytest.raises(EngineClosedError, match="died half-way"):
            sync.request()
    with connect(ls.MergedSource(tiny(base, scale=0.0)), slots) as whole:
        whole.send_weights()
        assert not whole.closed
    with connect(ls.FactorSource(policy), slots, ServeAdapter("policy", other_base=True)) as sync:
        sync.send_weights()
        assert greedy(slots, **sync.request()) != greedy(slots)


@pytest.fixture(scope="module", params=["another process", "this process"])
def two_places(request, base):
    """VLLM's default with two adapters in a batch: room for two in all."""
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    with running_llm(base, in_process=request.param == "this process", dtype="float32", **lora) as llm:
        yield llm


def test_a_kept_request_fails_alone_and_the_engine_goes_on(two_places, base):
    policy = tiny(base)
    with connect(ls.FactorSource(policy), two_places, ServeAdapter("policy")) as sync:
        sync.send_weights()
        kept = sync.request()
        first = greedy(two_places, **kept)
        for seed in (5, 6):
            models.move(policy, seed=seed)
            sync.send_weights()
            newest = greedy(two_places, **sync.request())
        for request in (kept, {"lora_request": [copy.deepcopy(kept["lora_request"])]}):
            with pytest.raises(VersionGoneError, match=r"policy@1: .*sync\.request\(\)"):
                greedy(two_places, PROMPTS[:1], **request)
        assert not two_places.llm_engine.has_unfinished_requests()
        with pytest.raises(VersionGoneError):  # one of a batch: nothing of it is left in the engine
            two_places.generate(
                list(PROMPTS[:2]), lora_request=[sync.request()["lora_request"], kept["lora_request"]]
            )
        assert not two_places.llm_engine.has_unfinished_requests()
        assert greedy(two_places, **sync.request()) == newest != first
    for request in (kept, {"lora_request": kept["lora_request"]}):
        with pytest.raises(VersionGoneError, match=r"shut down: connect\(\) again"):
            greedy(two_places, PROMPTS[:1], **request)
    assert greedy(two_places)


def test_a_kept_request_is_answered_by_the_newest_version_if_so_chosen(two_places, base):
    policy = tiny(base)
    with connect(ls.FactorSource(policy), two_places, ServeAdapter("policy"), on_gone="newest") as sync:
        sync.send_weights()
        kept = sync.request()
        first = greedy(two_places, **kept)
        for seed in (5, 6):
            models.move(policy, seed=seed)
            sync.send_weights()
            newest = greedy(two_places, **sync.request())
            assert greedy(two_places, **kept) == newest != first  # from no cache of the old one either
        sync.rollback()
        assert greedy(two_places, **kept) == greedy(two_places, **sync.request()) != newest


def test_a_user_s_own_adapters_are_served_beside_the_policy_wherever_there_is_a_place(
    two_places, base, tmp_path
):
    """One place stays unpinned: VLLM ends the engine when it has to load an adapter and all are pinned."""
    from vllm.lora.request import LoRARequest

    theirs = []
    for number in (7, 8):
        tiny(base, seed=number).save_pretrained(tmp_path / str(number))
        theirs.append({"lora_request": LoRARequest(f"mine {number}", number, str(tmp_path / str(number)))})
    expected = [greedy(two_places, **request) for request in theirs]
    policy = tiny(base)
    with connect(ls.FactorSource(policy), two_places, ServeAdapter("policy")) as sync:
        for seed in range(4):
            models.move(policy, seed=seed)
            sync.send_weights()
            ours = greedy(two_places, **sync.request())
            for _ in range(2):
                assert [greedy(two_places, **request) for request in theirs] == expected
                assert greedy(two_places, **sync.request()) == ours
        sync.rollback()
        assert [greedy(two_places, **request) for request in theirs] == expected
        assert greedy(two_places, **sync.request()) != ours


def test_an_engine_without_a_place_for_a_user_s_adapter_is_warned_of(base, tmp_path):
    from vllm.lora.request import LoRARequest

    tiny(base, seed=7).save_pretrained(tmp_path / "mine")
    with running_llm(base, in_process=True, dtype="float32", enable_lora=True, max_lora_rank=8) as llm:
        greedy(llm, lora_request=LoRARequest("mine", 7, str(tmp_path / "mine")))
        with pytest.warns(UserWarning, match=r"max_cpu_loras: got 1, expected at least 4"):
            connect(ls.FactorSource(tiny(base)), llm, ServeAdapter("policy")).shutdown()
