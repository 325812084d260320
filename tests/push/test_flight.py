"""Buckets on their way: the next one is made ready while engines take the one before, and no error is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lorasync.bucket import Bucket
from lorasync.errors import MismatchError, PayloadError, SyncError
from lorasync.push.engines import Engines
from lorasync.transport.inline import SMALL
from lorasync.wire import digest, manifest_as_text
from tests.stub_engine import StubLLM, raising

SIZES = {"a": 6, "b": 7, "large": SMALL // 4 + 1}
BUCKETS = {name: Bucket({name: torch.arange(float(size))}) for name, size in SIZES.items()}
MANIFEST = manifest_as_text([(name, torch.float32, (size,)) for name, size in SIZES.items()])


@pytest.fixture
def greeted() -> Iterator[Any]:
    """Shake hands with engines, and say goodbye to them in the end."""
    made: list[Engines] = []

    def greet(*llms: StubLLM, kind: str = "merge", in_process: bool = False) -> Engines:
        targets = {f"engine {n}": llm for n, llm in enumerate(llms)}
        engines = Engines(targets, timeout=20.0, pause="keep", changes_weights=True)
        for session in engines.sessions:
            session.target.in_process = in_process
        engines.hello(f'{{"kind": "{kind}"}}', MANIFEST)
        made.append(engines)
        return engines

    yield greet
    for engines in made:
        engines.goodbye()


def held_back(llm: StubLLM) -> threading.Event:
    """The engine takes no bucket until this is set."""
    go_on = threading.Event()
    llm.on["receive"] = lambda: go_on.wait(20)
    return go_on


def test_a_bucket_is_on_its_way_when_send_returns_and_the_next_one_waits_for_it(greeted):
    llm = StubLLM()
    engines, go_on = greeted(llm), held_back(llm)
    with engines.flight(1, beside=True) as flight:
        flight.send(BUCKETS["a"])
        assert flight.applying == 0.0
        threading.Timer(0.3, go_on.set).start()
        began = time.monotonic()
        flight.send(BUCKETS["b"])
        assert time.monotonic() - began > 0.2
        assert flight.applying > 0.2
        flight.wait()
        flight.wait()  # nothing is on its way any more
        assert llm.calls.count("receive") == 2
    assert flight.digests == [digest(BUCKETS["a"]), digest(BUCKETS["b"])]
    assert list(flight.ways) == ["inline"]


def test_the_transports_that_were_used_are_told_in_their_order(greeted):
    engines = greeted(StubLLM(), StubLLM())
    with engines.flight(1, beside=True) as flight:
        for name in ("large", "a", "large"):
            flight.send(BUCKETS[name])
    assert list(flight.ways) == ["shared_memory", "inline"]
    assert len(flight.digests) == 3


def test_the_slowest_engine_is_waited_for(greeted):
    fast, slow = StubLLM(), StubLLM()
    engines = greeted(fast, slow)
    slow.on["receive"] = lambda: time.sleep(0.3)
    with engines.flight(1, beside=True) as flight:
        flight.send(BUCKETS["a"])
        flight.wait()
    assert flight.applying > 0.25
    assert fast.calls.count("receive") == slow.calls.count("receive") == 1


def test_inside_one_process_a_bucket_has_been_taken_when_send_returns(greeted):
    llm = StubLLM()
    engines = greeted(llm, in_process=True)
    with engines.flight(1, beside=True) as flight:
        flight.send(BUCKETS["a"])
        assert "receive" in llm.calls  # its tensors are the trainer's own
    assert list(flight.ways) == ["in_process"]
    assert flight.digests == [""]


def test_what_an_engine_says_to_a_bucket_is_raised_before_the_next_one_is_sent(greeted):
    llm = StubLLM()
    engines = greeted(llm)
    llm.on["receive"] = raising(PayloadError("cut"))
    with engines.flight(1, beside=True) as flight:
        flight.send(BUCKETS["a"])
        with pytest.raises(PayloadError, match="cut"):
            flight.send(BUCKETS["b"])
        assert llm.calls.count("bucket") == 1
        assert len(flight.digests) == 1


def test_what_an_engine_says_to_the_last_bucket_is_raised_when_the_block_ends(greeted):
    llm = StubLLM()
    engines = greeted(llm)
    llm.on["receive"] = raising(PayloadError("cut"))
    with pytest.raises(PayloadError, match="cut"), engines.flight(1, beside=True) as flight:
        flight.send(BUCKETS["a"])


def fails_after_sending(engines: Engines) -> None:
    with engines.flight(1, beside=True) as flight:
        flight.send(BUCKETS["a"])
        raise SyncError("the trainer's own")


def test_a_block_that_fails_waits_for_its_bucket_and_raises_its_own_error(greeted):
    llm = StubLLM()
    engines, taken = greeted(llm), []

    def slowly() -> None:
        time.sleep(0.3)
        taken.append(1)
        raise PayloadError("cut")

    llm.on["receive"] = slowly
    with pytest.raises(SyncError, match="the trainer's own"):
        fails_after_sending(engines)
    assert taken == [1]


def test_a_wait_that_is_interrupted_is_taken_up_when_the_block_ends(greeted, monkeypatch):
    """Ctrl-C comes while a bucket is waited for: what is said to the engine next must not overtake that bucket."""
    llm = StubLLM()
    engines, go_on = greeted(llm), held_back(llm)

    def interrupted(self: Any, timeout: float | None = None) -> float:
        monkeypatch.undo()
        threading.Timer(0.3, go_on.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sends_and_waits(engines, lambda: monkeypatch.setattr("concurrent.futures.Future.result", interrupted))
    assert go_on.is_set()
    engines.abort(1, KeyboardInterrupt())
    send_and_commit(engines)


def sends_and_waits(engines: Engines, between: Callable[[], None]) -> None:
    with engines.flight(1, beside=True) as flight:
        flight.send(BUCKETS["a"])
        between()
        flight.wait()


def send_and_commit(engines: Engines) -> None:
    with engines.flight(2, beside=True) as flight:
        for bucket in BUCKETS.values():
            flight.send(bucket)
    engines.commit(2)


def test_a_flight_leaves_no_thread(greeted):
    engines = greeted(StubLLM())
    with engines.flight(1, beside=True) as flight:
        flight.send(BUCKETS["a"])
    limit = time.monotonic() + 10
    while time.monotonic() < limit and any(
        t.name.startswith("lorasync-flight") for t in threading.enumerate()
    ):
        time.sleep(0.01)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("lorasync-flight")]


def test_a_rank_without_engines_sends_nothing_and_reads_a_stream_to_its_end(greeted):
    """The other ranks are in the collectives of its source."""
    stream = iter([("a", torch.zeros(6)), ("b", torch.zeros(7))])
    with greeted().flight(1, beside=True) as flight:
        flight.send(BUCKETS["a"])
        flight.send_stream(stream, limit=8, expected=52)
        flight.wait()
    assert next(stream, None) is None
    assert (flight.ways, flight.digests, flight.applying) == ({}, [], 0.0)
    assert (flight.tensors, flight.bytes) == (2, 52)


def test_what_was_sent_is_counted(greeted):
    with greeted(StubLLM()).flight(1, beside=True) as flight:
        flight.send(BUCKETS["a"])
        flight.send_stream(iter([("b", torch.zeros(7))]), limit=100, expected=28)
    assert (flight.tensors, flight.bytes) == (2, 52)


WIDTH = SMALL // 8


def one_storage(count: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that a source makes one after the other in the same place."""
    storage = torch.empty(WIDTH)
    for number in range(count):
        yield str(number), storage.fill_(number)


@pytest.mark.parametrize("limit", [1, 4 * WIDTH, 9 * WIDTH, 100 * WIDTH])
def test_a_stream_is_copied_tensor_by_tensor_into_shared_memory(greeted, limit, monkeypatch):
    monkeypatch.setattr("lorasync.transport.inline.SMALL", 0)  # or small buckets ride in the call
    llm = StubLLM()
    engines = greeted(llm)
    with engines.flight(1, beside=True) as flight:
        flight.send_stream(one_storage(5), limit=limit, expected=5 * 4 * WIDTH)
    engines.commit(1)
    assert list(flight.ways) == ["shared_memory"]
    assert len(flight.digests) == {1: 5, 4 * WIDTH: 5, 9 * WIDTH: 3, 100 * WIDTH: 1}[limit]
    found = llm.workers[0].held[1]
    assert {name: (len(t), *t.unique().tolist()) for name, t in found.items()} == {
        str(number): (WIDTH, number) for number in range(5)
    }


def test_a_name_that_comes_twice_in_a_stream_is_refused(greeted):
    engines = greeted(StubLLM())
    for expected in (8, 8 * WIDTH):
        stream = iter([("a", torch.zeros(1)), ("a", torch.zeros(1))])
        with pytest.raises(MismatchError, match="a second time"), engines.flight(1, beside=True) as flight:
            flight.send_stream(stream, limit=8 * WIDTH, expected=expected)
