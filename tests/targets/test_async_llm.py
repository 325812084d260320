"""An `AsyncLLM` in this process: every worker of every replica is asked, on the loop of another thread."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lorasync.errors import EngineDeadError, EngineNotReadyError, SyncError, SyncTimeoutError
from lorasync.push.session import EngineSession
from lorasync.targets.async_llm import AsyncLLMTarget
from lorasync.targets.kinds import target_of
from lorasync.transport.post import Post
from lorasync.wire import PROTOCOL, manifest_as_text
from tests.stub_async import AllAtOnce, Core, SchedulerPauses, StubAsyncLLM, running_loop
from tests.stub_engine import raising

STATUS = {"op": "status", "session": "", "protocol": PROTOCOL}
CACHES = ["reset_prefix_cache", "reset_encoder_cache"]


@pytest.fixture
def loop() -> Any:
    with running_loop() as loop:
        yield loop


def target(engine: StubAsyncLLM, *, pause: Any = "keep", timeout: float = 10.0) -> AsyncLLMTarget:
    found = target_of(engine, timeout=timeout, pause=pause)
    assert isinstance(found, AsyncLLMTarget)
    return found


@pytest.mark.parametrize("core", [Core, AllAtOnce])
@pytest.mark.parametrize(("replicas", "workers"), [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_every_worker_of_every_replica_answers(loop, core, replicas, workers):
    engine = StubAsyncLLM(loop, replicas=replicas, workers=workers, core=core)
    found = target(engine)
    assert found.workers == replicas * workers
    answers = found.call(STATUS, b"")
    assert [answer["rank"] for answer in answers] == list(range(replicas * workers))
    assert {answer["workers"] for answer in answers} == {replicas * workers}
    session = EngineSession(found, name="engine")
    session.hello('{"kind": "merge"}', manifest_as_text([]), Post())
    assert session.ranks == replicas * workers
    session.goodbye()
    assert {llm.calls.count("hello") for llm in engine.replicas} == {1}


@pytest.mark.parametrize("core", [Core, AllAtOnce])
def test_a_replica_that_fails_is_an_error_and_one_that_is_not_heard_is_too(loop, core):
    engine = StubAsyncLLM(loop, replicas=2, core=core)
    engine.replicas[1].on["status"] = raising(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        target(engine).call(STATUS, b"")
    engine.engine_core.core_engines = engine.engine_core.core_engines[:1]
    with pytest.raises(EngineNotReadyError, match=r"got 1 of worker ranks \[0\], expected 2"):
        EngineSession(target(engine), name="engine").hello('{"kind": "merge"}', manifest_as_text([]), Post())


def test_one_that_no_event_loop_runs_is_refused(loop):
    engine = StubAsyncLLM(loop)
    engine.output_handler = None
    with pytest.raises(EngineNotReadyError, match=r"no event loop runs.*asyncio\.to_thread"):
        target(engine)


def test_one_without_the_backend_is_refused_unless_it_is_about_to_get_it(loop):
    engine = StubAsyncLLM(loop)
    engine.vllm_config.weight_transfer_config = None
    with pytest.raises(EngineNotReadyError, match="weight transfer backend: got None"):
        target(engine)
    AsyncLLMTarget(engine, timeout=1.0, pause="keep", attaching=True)


def test_a_call_on_the_loop_s_own_thread_is_refused(loop):
    found = target(StubAsyncLLM(loop))

    async def asks() -> None:
        found.check_elsewhere()

    async def calls() -> None:
        found.call(STATUS, b"")

    for ask, instead in ((asks, r"to_thread\(sync\.shutdown\)"), (calls, "send_weights_async")):
        with pytest.raises(SyncError, match=instead):
            asyncio.run_coroutine_threadsafe(ask(), loop).result(10)
    found.check_elsewhere()


def test_a_loop_that_does_not_get_to_it_is_given_up(loop):
    engine = StubAsyncLLM(loop)

    async def never(**_: Any) -> None:
        await asyncio.sleep(30)

    engine.resume_generation = never
    with pytest.raises(SyncTimeoutError, match=r"The AsyncLLM did not answer within 0\.2 s"):
        target(engine, timeout=0.2).resume()


@pytest.mark.parametrize(
    ("core", "pause", "calls"),
    [
        (Core, "keep", ["pause keep"]),
        (SchedulerPauses, "keep", ["clear_mm_cache", "pause_scheduler keep"]),
        (Core, "wait", ["pause wait"]),
        (SchedulerPauses, "abort", ["pause abort"]),
    ],
)
def test_a_pause_clears_the_caches_so_that_they_are_not_reset_again(loop, core, pause, calls):
    engine = StubAsyncLLM(loop, core=core)
    found = target(engine, pause=pause)
    found.pause()
    found.reset_caches()
    assert engine.first.calls == calls
    found.resume()
    found.reset_caches()
    assert engine.first.calls == [*calls, "resume", *CACHES]


@pytest.mark.parametrize("answer", [False, None])
def test_a_reset_that_vllm_does_not_confirm_is_an_error(loop, answer):
    engine = StubAsyncLLM(loop)

    async def reset(**_: Any) -> Any:
        return answer

    engine.reset_prefix_cache = reset
    with pytest.raises(SyncError, match="prefix cache"):
        target(engine).reset_caches()
    assert engine.first.calls == []


def test_a_version_is_named_where_this_vllm_can_say_it(loop):
    engine = StubAsyncLLM(loop)
    target(engine).name_version("7")
    assert engine.first.versions == ["7"]
    engine.update_weight_version = None  # up to 0.27
    target(engine).name_version("8")
    assert engine.first.versions == ["7"]


def test_requests_that_the_front_end_is_about_to_take_are_waited_for(loop):
    engine = StubAsyncLLM(loop)
    taken: list[int] = []
    loop.call_soon_threadsafe(taken.append, 1)
    target(engine).settle()
    assert taken == [1]


def test_one_that_has_failed_is_dead(loop):
    engine = StubAsyncLLM(loop)
    found = target(engine)
    found.check_alive()
    engine.errored = True
    with pytest.raises(EngineDeadError):
        found.check_alive()
