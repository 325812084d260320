"""One connection to two engines: both take a push, or none does, and errors name the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import lorasync as ls
from lorasync.errors import (
    EngineClosedError,
    EngineDeadError,
    MismatchError,
    StaleVersionError,
    SyncError,
    VersionGoneError,
)
from lorasync.push import MergeInWorker, ServeAdapter, Sync, connect
from lorasync.wire import ADAPTER_IDS
from tests import models
from tests.e2e.engines import Answers, greedy, running_llm
from tests.e2e.faults import Wire, engine_core_of, kill
from tests.e2e.oracle import merged_checkpoint
from tests.models import tiny

pytestmark = pytest.mark.timeout(420)
Pair = dict[str, Any]
SETTINGS = {"dtype": "float32", "enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
# An adapter is refused over weights that a push has changed: it comes first.
APPLIES = {"adapter": ServeAdapter("policy"), "factors": MergeInWorker(base="checkpoint"), "merged": None}


@pytest.fixture(scope="module")
def expected(base, tmp_path_factory) -> Answers:
    """What a fresh engine answers that loads PEFT's merged checkpoint of seed 0."""
    merged = merged_checkpoint(tiny(base), base, tmp_path_factory.mktemp("oracle"))
    with running_llm(merged, in_process=True, backend=None, dtype="float32") as fresh:
        return greedy(fresh)


@pytest.fixture(scope="module")
def pair(base) -> Iterator[Pair]:
    with running_llm(base, **SETTINGS) as left, running_llm(base, **SETTINGS) as right:
        yield {"left": left, "right": right}


@pytest.fixture(scope="module", params=APPLIES)
def strategy(request) -> str:
    return request.param


def connected(strategy: str, policy: Any, target: Any) -> Sync:
    source = ls.MergedSource(policy) if strategy == "merged" else ls.FactorSource(policy)
    return connect(source, target, APPLIES[strategy], timeout=60, bucket_bytes=1 << 20)


def push(sync: Sync, policy: Any, *, seed: int) -> None:
    models.move(policy, seed=seed)
    assert sync.send_weights().ranks == len(sync.engines)


def served_by(pair: Pair, sync: Sync) -> Answers:
    """What all engines of the connection answer."""
    found = [greedy(pair[name], **sync.request()) for name in sync.engines]
    assert found == found[:1] * len(found)
    return found[0]


def test_an_engine_that_does_not_fit_is_named_and_no_engine_is_touched(pair, base, smollm2, tmp_path):
    model = models.tiny_llama(vocab_size=49152, intermediate_size=128)
    other = models.save(model, tmp_path / "narrow", tokenizer=smollm2)
    before = greedy(pair["left"])
    with running_llm(other, in_process=True, **SETTINGS) as narrow:
        for strategy in APPLIES:
            with pytest.raises(MismatchError, match=r"(?s)^narrow: .*touched"):
                connected(strategy, tiny(base), {"left": pair["left"], "narrow": narrow})
    assert greedy(pair["left"]) == before


def test_a_push_reaches_both_and_a_rollback_too(pair, strategy, base, expected):
    policy = tiny(base)
    with connected(strategy, policy, pair) as sync:
        push(sync, policy, seed=0)
        first = served_by(pair, sync)
        assert [ids for ids, _ in first] == [ids for ids, _ in expected]
        assert strategy == "adapter" or first == expected  # LoRA slots round otherwise
        push(sync, policy, seed=1)
        assert served_by(pair, sync) != first
        if strategy == "merged":
            push(sync, policy, seed=0)
        else:
            sync.rollback()
        assert served_by(pair, sync) == first


def test_an_engine_that_another_trainer_took_over_is_named_and_can_be_left_out(pair, strategy, base):
    policy, theirs = tiny(base), tiny(base, seed=5)
    with connected(strategy, policy, pair) as sync:
        push(sync, policy, seed=0)
        before, ours = served_by(pair, sync), sync.request()
        with connected(strategy, theirs, pair["right"]) as taker:
            push(taker, theirs, seed=5)
            taken = greedy(pair["right"], **taker.request())
            models.move(policy, seed=1)
            for _ in range(2):
                with pytest.raises(SyncError, match=r"^right: session: .*another trainer.*connect\(\) again"):
                    sync.send_weights()
                with pytest.raises(
                    SyncError, match=r"^request: .*taken right over.*leave_out\('right'\); or connect"
                ):
                    sync.request()
                if strategy == "adapter":  # it might be sent to the other engine, which would end
                    with pytest.raises(VersionGoneError, match="taken right over"):
                        greedy(pair["left"], **ours)
                assert greedy(pair["left"], **_as_vllm_s_own(ours)) == before
                assert greedy(pair["right"], **taker.request()) == taken
            sync.leave_out("right")
            assert greedy(pair["left"], **ours) == greedy(pair["left"], **sync.request()) == before
            sync.send_weights()
            assert greedy(pair["left"], **sync.request()) not in (before, taken)
            push(taker, theirs, seed=5)
            assert greedy(pair["right"], **taker.request()) == taken


def _as_vllm_s_own(request: dict[str, Any]) -> dict[str, Any]:
    """The same, which knows nothing of versions that go."""
    from vllm.lora.request import LoRARequest

    ours = request.get("lora_request")
    if ours is None:
        return {}
    number = ours.lora_int_id - ADAPTER_IDS
    return {"lora_request": LoRARequest(f"policy@{number}", ours.lora_int_id, ours.lora_path)}


def test_what_one_engine_refuses_at_the_commit_the_other_one_gives_back(pair, strategy, base):
    policy = tiny(base)

    def refused(message: dict[str, Any]) -> None:
        if message["op"] == "commit":
            message["expected"] -= 1

    wire = Wire(pair["right"])
    with connected(strategy, policy, {"left": pair["left"], "right": wire}) as sync:
        push(sync, policy, seed=0)
        before, version = served_by(pair, sync), sync.version
        models.move(policy, seed=1)
        wire.on_control = refused
        with pytest.raises(StaleVersionError, match=r"^right: version: .*somebody else has pushed"):
            sync.send_weights()
        wire.on_control = None
        if strategy == "merged":  # its old weights are gone
            with pytest.raises(EngineClosedError, match=r"^left serves .*another engine refused"):
                sync.request()
        else:
            assert sync.version == version
            assert served_by(pair, sync) == before
        push(sync, policy, seed=2)  # nothing of what has failed may be left
        assert served_by(pair, sync) != before
        push(sync, policy, seed=0)
        assert served_by(pair, sync) == before


def test_a_trainer_learns_that_another_one_took_over(pair, strategy, base):
    policy, theirs = tiny(base), tiny(base, seed=5)
    with connected(strategy, policy, pair["left"]) as sync:
        push(sync, policy, seed=0)
        with connected(strategy, theirs, pair["left"]) as taker:
            push(taker, theirs, seed=5)
            before = greedy(pair["left"], **taker.request())
            with pytest.raises(SyncError, match=r"^session: .*another trainer.*connect\(\) again"):
                sync.send_weights()
            assert greedy(pair["left"], **taker.request()) == before


def test_a_killed_engine_is_named_and_the_last_one_can_not_be_left_out(pair, base):
    _outlive_right("merged", pair, base)


@pytest.mark.slow
@pytest.mark.timeout(900)  # it starts two engines itself
@pytest.mark.parametrize("way", ["adapter", "factors"])
def test_a_killed_engine_is_named_whatever_it_was_sent(way, base):
    with running_llm(base, **SETTINGS) as left, running_llm(base, **SETTINGS) as right:
        _outlive_right(way, {"left": left, "right": right}, base)


def _outlive_right(way: str, pair: Pair, base: str) -> None:
    policy = tiny(base)
    with connected(way, policy, pair) as sync:
        push(sync, policy, seed=0)
        first = served_by(pair, sync)
        kill(engine_core_of(pair["right"]))
        models.move(policy, seed=1)
        with pytest.raises(EngineDeadError, match=r"^right: .*died"):
            sync.send_weights()
        with pytest.raises(EngineClosedError):
            sync.request()
        sync.leave_out("right")
        assert served_by(pair, sync) == first
        push(sync, policy, seed=1)
        assert served_by(pair, sync) != first
        push(sync, policy, seed=0)
        assert served_by(pair, sync) == first
        with pytest.raises(SyncError, match="leave_out: got 'left'"):
            sync.leave_out("left")
