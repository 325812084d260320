"""The conversation with one engine: what is sent, what is waited for, and what is learned of its answers."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from lorasync.errors import PayloadError, StaleVersionError, SyncError, SyncTimeoutError
from lorasync.push.answers import check_digests, check_version, failure, raise_failed, slowest
from lorasync.push.payload import Payload
from lorasync.push.session import EngineSession
from lorasync.targets.kinds import target_of
from lorasync.transport.cuda_ipc import Lender
from lorasync.wire import manifest_as_text
from tests.stub_engine import StubLLM, raising

BUCKET = {"w": torch.arange(6.0).reshape(2, 3)}
MANIFEST = manifest_as_text([("w", torch.float32, (2, 3))])
LOAD, MERGE, ADAPTER = '{"kind": "load"}', '{"kind": "merge"}', '{"kind": "adapter"}'


def greeted(llm: StubLLM, apply: str = MERGE, *, timeout: float = 10.0) -> EngineSession:
    session = EngineSession(target_of(llm, timeout=timeout), name="engine")
    session.hello(apply, MANIFEST)
    return session


def send(session: EngineSession, version: int, *, beside: bool = True) -> None:
    with Payload(BUCKET, [session], Lender()) as payload:
        session.send(payload, version, op="bucket", beside=beside)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("inline", [0, 4 << 20], ids=["through a file", "in the call"])
def test_every_worker_gets_the_bucket_and_the_version(workers, inline, monkeypatch):
    monkeypatch.setattr("lorasync.push.payload.INLINE_LIMIT", inline)
    llm = StubLLM(workers=workers)
    session = greeted(llm)
    assert session.ranks == workers
    send(session, 1)
    session.commit(1, ())
    assert session.version == 1
    for worker in llm.workers:
        assert worker.version == 1
        assert torch.equal(worker.held[1]["w"], BUCKET["w"])
    session.goodbye()


def test_merged_weights_go_through_vllm_s_update_which_ends_also_when_a_worker_refuses():
    llm = StubLLM(workers=2)
    session = greeted(llm, LOAD)
    session.start()
    llm.on["load"] = raising(MemoryError("full"))
    with pytest.raises(SyncError, match="MemoryError in the engine: full"):
        send(session, 1, beside=False)
    session.abort(1, MemoryError("full"), beside=False)
    assert not llm.updating
    llm.on.clear()
    session.start()
    send(session, 1, beside=False)
    session.finish()
    session.commit(1, ())
    assert llm.calls[-4:-1] == ["finish", "commit", "commit in the worker"]
    session.goodbye()


def test_an_update_that_a_dead_trainer_left_open_is_ended():
    llm = StubLLM()
    greeted(llm, LOAD).start()
    assert llm.updating
    session = greeted(llm, LOAD)
    session.start()
    assert llm.calls[-5:] == ["start", "stage", "finish", "status", "start"]
    session.goodbye()


def test_a_worker_s_refusal_does_not_pass_through_vllm():
    """Raised there, it is printed as a failure of the engine, once a rank."""
    llm, seen = StubLLM(), []
    session, init = greeted(llm), llm.init_weight_transfer_engine

    def watched(request: dict[str, Any]) -> None:
        try:
            init(request)
        except BaseException as error:
            seen.append(error)
            raise

    llm.init_weight_transfer_engine = watched
    session.version = 7
    with pytest.raises(StaleVersionError):
        session.commit(8, ())
    llm.on["rollback in the worker"] = raising(ZeroDivisionError("a defect"))
    with pytest.raises(SyncError):
        session.rollback(3, ())
    assert not seen
    session.goodbye()


def test_a_rank_that_is_silent_is_named_after_the_time_limit():
    llm = StubLLM(workers=3)
    session = greeted(llm, timeout=0.4)
    llm.workers[1]._reply = lambda *_: True
    began = time.monotonic()
    with pytest.raises(SyncTimeoutError, match=r"worker ranks \[1\] of 3 did not answer within 0.4 s"):
        session.control("status")
    assert time.monotonic() - began < 1.0


def test_the_call_and_the_answers_have_one_time_limit_together():
    llm = StubLLM(workers=2)
    session = greeted(llm, timeout=1.0)
    llm.workers[1]._reply = lambda *_: True
    llm.on["status"] = lambda: time.sleep(0.8)
    began = time.monotonic()
    with pytest.raises(SyncTimeoutError):
        session.control("status")
    assert time.monotonic() - began < 1.4


def test_an_answer_that_is_late_is_waited_for():
    llm = StubLLM()
    session, worker = greeted(llm), llm.workers[0]
    reply = worker._reply

    def late(*arguments: Any) -> bool:
        threading.Timer(0.2, reply, arguments).start()
        return True

    worker._reply = late
    assert session.control("status")[0]["version"] == 0
    worker._reply = reply
    session.goodbye()


def test_a_commit_whose_answer_is_lost_is_asked_for():
    llm = StubLLM()
    session = greeted(llm, timeout=0.4)
    send(session, 1)
    worker = llm.workers[0]
    reply = worker._reply

    def lost(*arguments: Any) -> bool:
        worker._reply = reply
        return True

    worker._reply = lost
    session.commit(1, ())
    assert session.version == worker.version == 1
    session.goodbye()


def test_workers_that_serve_different_versions_close_the_engine():
    llm = StubLLM(workers=2)
    session = greeted(llm)
    llm.workers[1].version = 5
    session.find_out(1, SyncError("x"))
    assert "different versions: [0, 5]" in session.closed
    session.goodbye()


def test_what_an_engine_does_after_it_was_waited_for_is_learned_and_closes_it():
    llm, go_on = StubLLM(), threading.Event()
    session = greeted(llm, timeout=0.3)
    send(session, 1)
    llm.on["commit"] = lambda: go_on.wait(20)
    with pytest.raises(SyncTimeoutError) as caught:
        session.commit(1, ())
    session.find_out(1, caught.value)
    assert "does not say what it serves" in session.closed
    llm.on.clear()
    go_on.set()
    time.sleep(0.1)
    session.target.patience.anew()
    session.catch_up()
    assert session.version == 1
    assert "has taken version 1" in session.closed
    send(session, 2)
    session.commit(2, ())
    assert not session.closed
    session.goodbye()


def test_the_folder_goes_with_the_goodbye_also_of_an_engine_that_does_not_take_it():
    llm = StubLLM()
    session = greeted(llm)
    folder = session._mailbox.folder
    llm.on["goodbye"] = raising(RuntimeError("no"))
    with pytest.raises(SyncError):
        session.goodbye()
    assert not folder.exists()
    session.goodbye()  # nobody is left to be told
    assert llm.calls.count("goodbye") == 1


def test_room_is_waited_for_until_requests_have_finished():
    llm = StubLLM(capacity=1)
    session = greeted(llm, ADAPTER)
    session.wait_for_room()

    class Named:
        lora_int_id = 1_000_001

    llm.in_flight["slow"] = Named()
    assert session.in_flight() == (1,)
    with pytest.raises(SyncTimeoutError, match=r"max_cpu_loras: got 1.*versions \[1\].*max_cpu_loras=3"):
        session.wait_for_room()
    llm.in_flight.clear()
    session.goodbye()


# ------------------------------------------------------------------------------------------------- the answers


def test_answers_are_compared_rank_by_rank():
    good = {
        0: {"digest": "a", "version": 1, "seconds": 0.5},
        1: {"digest": "a", "version": 1, "seconds": 2.0},
    }
    check_digests(good, "a", "staged")
    check_version(good, 1)
    assert slowest(good) == 2.0
    for bad in ({1: {"digest": "b"}}, {1: {}}):
        with pytest.raises(PayloadError, match=r"ranks \[1\] have staged other bytes"):
            check_digests(good | bad, "a", "staged")
    with pytest.raises(SyncError, match=r"ranks \[1\] serve versions \{1: 2\}, expected 1"):
        check_version(good | {1: {"version": 2}}, 1)


def test_the_error_of_the_lowest_rank_is_raised():
    bad = {"ok": False, "error": {"type": "PayloadError", "message": "cut", "mismatches": []}}
    raise_failed({0: {"ok": True}})
    with pytest.raises(PayloadError, match="cut"):
        raise_failed({0: {"ok": True}, 1: bad})


def test_what_is_no_error_of_ours_says_so():
    assert "The engine failed: KeyError" in str(failure(KeyError("x")))
    assert "can't carry bytes" in str(failure(TypeError("Object of type bytes is not JSON serializable")))
