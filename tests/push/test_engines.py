"""Several engines as one: what one refuses none serves, and errors name the engine."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from lorasync.bucket import Bucket
from lorasync.errors import EngineNotReadyError, MismatchError, SyncError
from lorasync.push.engines import Engines
from lorasync.push.flight import Flight
from lorasync.wire import manifest_as_text
from tests.stub_engine import Client, StubLLM, raising

BUCKET = Bucket({"w": torch.arange(6.0).reshape(2, 3)})
MANIFEST = manifest_as_text([("w", torch.float32, (2, 3))])


def greeted(kind: str = "merge", **llms: StubLLM) -> Engines:
    engines = Engines(llms, timeout=10.0, pause="keep", changes_weights=True, names_each=True)
    engines.hello(f'{{"kind": "{kind}"}}', MANIFEST)
    return engines


def send(engines: Engines, version: int) -> None:
    with engines.flight(version, beside=True) as flight:
        flight.send(BUCKET)
        flight.wait()


def test_an_engine_that_is_none_is_named_before_anybody_is_talked_to():
    llm = StubLLM()
    with pytest.raises(EngineNotReadyError, match=r"^right: target: got int"):
        Engines({"left": llm, "right": 5}, timeout=1.0, pause="keep", changes_weights=True, names_each=True)
    assert not llm.calls


def test_a_handshake_that_one_refuses_is_said_goodbye_to_by_the_others():
    llms = {"left": StubLLM(), "right": StubLLM()}
    llms["right"].on["hello"] = raising(RuntimeError("no"))
    with pytest.raises(SyncError, match=r"^right: .*no"):
        greeted(**llms)
    assert llms["left"].calls == ["hello", "goodbye"]


def test_workers_that_agreed_are_told_when_another_worker_of_their_engine_refuses():
    llm = StubLLM(workers=2)
    llm.workers[1].conversation._applier_for = lambda hello: raising(SyncError("no memory"))()
    with pytest.raises(SyncError, match="no memory"):
        greeted(only=llm)
    assert llm.calls == ["hello", "goodbye"]
    assert llm.workers[0].conversation._applier is None


def test_engines_that_hang_are_said_goodbye_to_side_by_side():
    llms = {name: StubLLM() for name in ("a", "b", "c")}
    engines, together = greeted(**llms), threading.Barrier(3)
    for llm in llms.values():
        llm.on["goodbye"] = lambda: together.wait(10)
    engines.goodbye()
    assert not together.broken


@pytest.mark.parametrize("who", ["left", "right"])
@pytest.mark.parametrize("point", ["commit", "commit in the worker"])
@pytest.mark.parametrize("kind", ["merge", "adapter", "load"])
def test_a_commit_that_one_refuses_is_taken_back_by_the_others_or_closes_them(kind, who, point):
    llms = {"left": StubLLM(workers=2), "right": StubLLM()}
    engines = greeted(kind, **llms)
    for version in (1, 2):
        send(engines, version)
        engines.commit(version, {version - 1})
    send(engines, 3)
    llms[who].on[point] = raising(RuntimeError("no"))
    with pytest.raises(SyncError, match=rf"^{who}: .*no"):
        engines.commit(3, {2})
    found = {name: {worker.version for worker in llm.workers} for name, llm in llms.items()}
    if kind == "load":  # weights that are replaced don't come back
        assert engines.closed
    else:
        assert found == {"left": {2}, "right": {2}}
        assert not engines.closed
    llms[who].on.clear()
    send(engines, 3)
    engines.commit(3, {2})
    assert {worker.version for llm in llms.values() for worker in llm.workers} == {3}
    assert not engines.closed
    engines.goodbye()


def test_engines_elsewhere_are_asked_side_by_side_and_all_end_before_the_error_is_raised():
    llms = {name: StubLLM() for name in ("a", "b", "c")}
    engines, together = greeted(**llms), threading.Barrier(3)
    for llm in llms.values():
        llm.on["status"] = lambda: together.wait(10)
    engines.each(lambda session: session.check_ours())
    ended: list[str] = []

    def slow(session: Any) -> None:
        if session.name == "a":
            raise SyncError("at once")
        time.sleep(0.2)
        ended.append(session.name)

    with pytest.raises(SyncError, match=r"^a: at once"):
        engines.each(slow)
    assert sorted(ended) == ["b", "c"]
    engines.goodbye()


def test_an_error_keeps_its_kind_and_what_was_wrong():
    engines = greeted(left=StubLLM(), right=StubLLM())

    def wrong(session: Any) -> None:
        raise MismatchError("two differ", [])

    with pytest.raises(MismatchError, match=r"^left: two differ") as caught:
        engines.each(wrong)
    assert caught.value.mismatches == ()
    engines.leave_out("left")
    with pytest.raises(MismatchError, match=r"^right: two differ"):  # it keeps the name that errors have used
        engines.each(wrong)
    engines.goodbye()


def test_a_single_engine_is_not_named():
    engines = Engines({"engine": StubLLM()}, timeout=10.0, pause="keep", changes_weights=True)
    engines.hello('{"kind": "merge"}', MANIFEST)

    def wrong(session: Any) -> None:
        raise MismatchError("two differ", [])

    with pytest.raises(MismatchError, match=r"^two differ"):
        engines.each(wrong)
    engines.goodbye()


def test_a_dead_engine_can_be_left_out_and_the_last_one_not():
    llms = {"left": StubLLM(), "right": StubLLM()}
    engines = greeted(**llms)
    for point in ("goodbye", "status"):
        llms["right"].on[point] = raising(RuntimeError("dead"))
    engines.leave_out("right")
    assert [session.name for session in engines.sessions] == ["left"]
    engines.goodbye()


def test_one_engine_as_two_objects_is_refused():
    llm = StubLLM()
    with pytest.raises(MismatchError, match=r"one engine as (left|right) and as (right|left)"):
        greeted(left=llm, right=Client(llm))
    again = greeted(left=llm)  # another connection may take it over
    again.goodbye()


@pytest.mark.parametrize("kind", ["merge", "load"])
def test_ctrl_c_while_a_bucket_is_on_its_way_leaves_nothing_of_it_behind(kind):
    llm, go_on = StubLLM(), threading.Event()
    engines = greeted(kind, left=llm)
    llm.on["receive" if kind == "merge" else "load"] = lambda: go_on.wait(20)
    flight = engines.flight(1, beside=kind == "merge")
    with pytest.raises(KeyboardInterrupt):
        interrupted(flight, go_on)
    engines.abort(1, KeyboardInterrupt())
    llm.on.clear()
    send(engines, 2)
    engines.commit(2)
    assert llm.workers[0].version == 2
    engines.goodbye()


def interrupted(flight: Flight, go_on: threading.Event) -> None:
    """The user's Ctrl-C ends the wait for a bucket, once; its engine takes a moment more."""
    with flight:
        flight.send(BUCKET)
        under_way = flight._on_its_way
        assert under_way is not None
        result, waits = under_way.result, iter((True,))

        def wait(timeout: float | None = None) -> float:
            if next(waits, False):
                threading.Timer(0.2, go_on.set).start()
                raise KeyboardInterrupt
            return result(timeout)

        under_way.result = wait  # type: ignore[method-assign]
        flight.wait()
