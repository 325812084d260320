"""Engines that generate meanwhile are stopped once, and go on whatever happens; one that is closed does not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from lorasync.errors import SyncError
from lorasync.push.engines import Engines
from lorasync.push.pause import pausable
from tests.stub_async import StubAsyncLLM, running_loop
from tests.stub_engine import StubLLM, raising


@pytest.fixture
def loop() -> Iterator[Any]:
    with running_loop() as loop:
        yield loop


def engines_of(**engines: Any) -> Engines:
    return Engines(engines, timeout=10.0, pause="keep", changes_weights=True, names_each=len(engines) > 1)


def test_engines_are_stopped_once_and_resumed_at_the_end(loop):
    left, right = StubAsyncLLM(loop), StubAsyncLLM(loop)
    with pausable(engines_of(left=left, right=right)) as pausing:
        assert left.first.calls == []  # they generate until they have to be stopped
        pausing.begin()
        pausing.begin()
        time.sleep(0.1)
        assert pausing.seconds is None
    assert left.first.calls == right.first.calls == ["pause keep", "resume"]
    assert 0.1 <= pausing.seconds < 5.0


def test_without_a_stop_there_are_no_seconds(loop):
    engine = StubAsyncLLM(loop)
    with pausable(engines_of(engine=engine)) as pausing:
        pass
    assert pausing.seconds is None
    assert "pause keep" not in engine.first.calls


def test_an_engine_that_never_generates_meanwhile_was_not_stopped():
    with pausable(engines_of(engine=StubLLM())) as pausing:
        pausing.begin()
    assert pausing.seconds is None


def test_requests_in_flight_that_a_change_of_weights_would_break_stop_the_push():
    llm = StubLLM()
    llm.in_flight = {"left over": None}
    with pytest.raises(SyncError, match="left over"), pausable(engines_of(engine=llm)) as pausing:
        pausing.begin()
    assert pausing.seconds is None


def fails_while_stopped(engine: StubAsyncLLM) -> None:
    with pausable(engines_of(engine=engine)) as pausing:
        pausing.begin()
        raise SyncError("cut")


def test_a_push_that_fails_lets_engines_go_on(loop):
    engine = StubAsyncLLM(loop)
    with pytest.raises(SyncError, match="cut"):
        fails_while_stopped(engine)
    assert engine.first.calls == ["pause keep", "resume"]


def test_an_engine_that_can_t_go_on_hides_no_earlier_error_and_is_one_of_its_own(loop):
    engine = StubAsyncLLM(loop)
    engine.first.on["resume"] = raising(RuntimeError("dead"))
    with pytest.raises(SyncError, match="cut"):
        fails_while_stopped(engine)
    with pytest.raises(RuntimeError, match="dead"), pausable(engines_of(engine=engine)) as pausing:
        pausing.begin()


def test_no_engine_goes_on_while_one_must_not_generate(loop):
    left, right = StubAsyncLLM(loop), StubAsyncLLM(loop)
    engines = engines_of(left=left, right=right)
    with pausable(engines) as pausing:
        pausing.begin()
        engines.sessions[1].shut("half of its weights are new")
    assert left.first.calls == right.first.calls == ["pause keep"]
    assert pausing.seconds is None
    engines.leave_out("right")
    assert left.first.calls == [
        "pause keep",
        "resume",
    ]  # nothing else would let it go on before the next push
