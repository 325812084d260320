"""Targets: which object is what, how long it is waited for, and what is made of what it returns or raises."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from lorasync.errors import EngineDeadError, EngineNotReadyError, SyncError, SyncTimeoutError
from lorasync.targets.event_loop import check_elsewhere, run_on
from lorasync.targets.kinds import target_of
from lorasync.targets.llm import LLMTarget
from lorasync.targets.patience import Patience, call_with_limit, death_of
from lorasync.targets.rpc import RpcTarget
from tests.stub_engine import Client, StubLLM


def test_a_call_gives_back_what_it_returns_and_raises_what_it_raises():
    assert call_with_limit(lambda: 5, 5.0, "it") == 5
    with pytest.raises(ZeroDivisionError):
        call_with_limit(lambda: 1 // 0, 5.0, "it")


@pytest.mark.parametrize("limit", [0.2, 1.3])
def test_a_call_that_does_not_return_is_given_up_in_time(limit):
    go_on = threading.Event()
    began = time.monotonic()
    with pytest.raises(SyncTimeoutError, match=rf"the engine did not answer within {limit:g} s"):
        call_with_limit(lambda: go_on.wait(30), limit, "the engine")
    assert limit <= time.monotonic() - began < limit + 10
    go_on.set()


def test_a_death_ends_the_wait_and_names_who_died():
    go_on = threading.Event()
    with pytest.raises(EngineDeadError, match=r"it died: worker 3 is gone"):
        call_with_limit(lambda: go_on.wait(30), 30.0, "it", died=lambda: "worker 3")
    go_on.set()


def test_an_answer_that_comes_with_the_death_counts():
    def answered() -> str:
        time.sleep(1.2)
        return "yes"

    assert call_with_limit(answered, 30.0, "it", died=lambda: "worker 3") == "yes"


@pytest.mark.parametrize(
    "error", [type("EngineDeadError", (Exception,), {})(), RuntimeError("Executor failed.")]
)
def test_what_vllm_says_of_a_death_is_told_as_one(error):
    def fails() -> None:
        raise error

    with pytest.raises(EngineDeadError, match="core"):
        call_with_limit(fails, 5.0, "it", died=lambda: "core (exit code -9)")


def test_who_has_died_is_read_from_vllm_s_client():
    manager = SimpleNamespace(finished_procs=dict, failed_proc_name=None)
    core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager, engine_dead=False))
    assert death_of(SimpleNamespace()) == death_of(core) == ""
    manager.finished_procs = lambda: {"EngineCore_0": -9}
    assert death_of(core) == "EngineCore_0 (exit code -9)"
    manager.finished_procs = dict
    core.resources.engine_dead = True
    assert death_of(core)


def test_what_hangs_is_waited_for_once_and_asked_once_more_for_a_moment():
    patience, go_on, asked = Patience(1.0), threading.Event(), []

    def hang() -> None:
        asked.append(1)
        go_on.wait(30)

    began = time.monotonic()
    for _ in range(5):
        with pytest.raises(SyncTimeoutError):
            patience.call(hang, "it")
    assert time.monotonic() - began < 10
    assert len(asked) == 2
    patience.anew()
    assert patience.call(lambda: 5, "it") == 5
    go_on.set()


def test_an_answer_to_the_second_question_shows_that_it_does_not_hang():
    patience, go_on = Patience(0.3), threading.Event()
    for _ in range(3):
        with pytest.raises(SyncTimeoutError):
            patience.call(lambda: go_on.wait(30), "it")
        assert patience.call(lambda: 5, "it") == 5
    go_on.set()


# ------------------------------------------------------------------------------------------------ RpcTarget


def test_a_message_and_its_bytes_go_by_collective_rpc():
    seen: list[Any] = []
    rpc = SimpleNamespace(
        collective_rpc=lambda method, args: seen.append((method, args)) or ("answer",),
        reset_prefix_cache=lambda: seen.append("reset"),
    )
    target = target_of(rpc, timeout=5.0)
    assert isinstance(target, RpcTarget)
    target.check_able(changes_weights=True)
    assert target.call({"op": "status"}, b"x") == ["answer"]
    target.reset_caches()
    assert seen == [("weight_transfer_engine", ({"op": "status"}, b"x")), "reset"]
    assert target.adapters_in_flight() == frozenset()


@pytest.mark.parametrize("returned", [None, {}, "yes", {0: {}}])
def test_what_is_no_list_of_answers_is_refused(returned):
    rpc = SimpleNamespace(collective_rpc=lambda *_, **__: returned)
    with pytest.raises(EngineNotReadyError, match="expected a list with what each worker has returned"):
        target_of(rpc, timeout=5.0).call({"op": "status"}, b"")


async def _later() -> None:
    """Of a client that is not awaited."""


@pytest.mark.parametrize("name", ["collective_rpc", "reset_prefix_cache"])
@pytest.mark.parametrize("returned", [_later, asyncio.Future, concurrent.futures.Future])
def test_a_call_that_has_not_ended_when_it_returns_is_refused(name, returned):
    client = Client(StubLLM())
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    found, target = returned(), RpcTarget(client, timeout=5.0)
    setattr(client, name, lambda *_, **__: found)
    with pytest.raises(EngineNotReadyError, match=rf"{name}: returned .*awaited"):
        target.reset_caches() if name == "reset_prefix_cache" else target.call({"op": "status"}, b"")
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.parametrize("call", ["reset_prefix_cache", "reset_encoder_cache"])
@pytest.mark.parametrize(
    "answer", [False, 0, "", SimpleNamespace(status_code=500), SimpleNamespace(status_code=404)]
)
def test_a_reset_that_says_no_is_an_error(call, answer):
    client = Client(StubLLM())
    setattr(client, call, lambda: answer)
    with pytest.raises(SyncError, match=f"{call}: the engine said"):
        RpcTarget(client, timeout=5.0).reset_caches()


@pytest.mark.parametrize("answer", [None, True, SimpleNamespace(status_code=200), {"ok": True}])
def test_a_reset_that_does_not_is_none(answer):
    client = Client(StubLLM())
    client.reset_prefix_cache = lambda: answer
    RpcTarget(client, timeout=5.0).reset_caches()


# ------------------------------------------------------------------------------------------------- LLMTarget


@pytest.mark.parametrize("answer", [False, None, 0])
def test_a_reset_that_vllm_does_not_confirm_is_an_error(answer):
    llm = StubLLM()
    llm.reset_prefix_cache = lambda: answer
    with pytest.raises(SyncError, match="prefix cache"):
        LLMTarget(llm, timeout=5.0).reset_caches()


def test_an_engine_started_without_the_backend_is_refused_with_the_flag():
    llm = StubLLM()
    for config in (None, SimpleNamespace(backend="nccl")):
        llm.vllm_config.weight_transfer_config = config
        with pytest.raises(EngineNotReadyError, match="weight_transfer_config="):
            target_of(llm, timeout=5.0)


def test_leftover_requests_are_named_the_first_of_many():
    llm = StubLLM()
    target = LLMTarget(llm, timeout=5.0)
    target.pause()
    llm.in_flight = {f"request-{n}": None for n in range(10)}
    with pytest.raises(
        SyncError, match=r"request-0, .*request-7 and 2 more.*llm_engine\.step\(\).*abort_request"
    ):
        target.pause()


@pytest.mark.parametrize("closed", [True, False])
def test_an_event_loop_that_has_ended_is_not_waited_for(closed):
    loop = asyncio.new_event_loop()
    if closed:
        loop.close()
    with pytest.raises(SyncError, match="has ended"):
        run_on(loop, _later, lambda result: result(30), instead="this")
    loop.close()


def test_an_event_loop_s_own_thread_is_told_what_to_do_instead():
    async def asks(loop: asyncio.AbstractEventLoop) -> None:
        with pytest.raises(SyncError, match="Use this"):
            check_elsewhere(asyncio.get_running_loop(), instead="this")
        check_elsewhere(loop, instead="this")

    other = asyncio.new_event_loop()
    asyncio.run(asks(other))
    check_elsewhere(other, instead="this")
    other.close()
