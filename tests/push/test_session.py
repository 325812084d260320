"""The conversation with one engine: what is sent, what is waited for, and what is learned of its answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lorasync.bucket import Bucket
from lorasync.errors import EngineNotReadyError, PayloadError, StaleVersionError, SyncError, SyncTimeoutError
from lorasync.push.answers import check_digests, check_version, failure, read_answers, slowest
from lorasync.push.session import EngineSession
from lorasync.targets.kinds import target_of
from lorasync.transport import inline
from lorasync.transport.post import Post
from lorasync.wire import PROTOCOL, Abort, Answer, manifest_as_text
from tests.stub_engine import StubLLM, raising

BUCKET = Bucket({"w": torch.arange(6.0).reshape(2, 3)})
MANIFEST = manifest_as_text([("w", torch.float32, (2, 3))])
LOAD, MERGE, ADAPTER = '{"kind": "load"}', '{"kind": "merge"}', '{"kind": "adapter"}'


def greeted(llm: StubLLM, strategy: str = MERGE, *, timeout: float = 10.0) -> EngineSession:
    session = EngineSession(target_of(llm, timeout=timeout), name="engine")
    session.hello(strategy, MANIFEST, Post())
    return session


def send(session: EngineSession, version: int, *, beside: bool = True) -> None:
    (parcel,) = Post([inline.Sender()]).parcels(BUCKET, [Place(("inline",))])
    session.send(parcel, version, kind="bucket", beside=beside)


@dataclass
class Place:
    ways: tuple[str, ...]
    name: str = "engine"
    gpu: str = ""


def altered(llm: StubLLM, change: Callable[[dict[str, Any], list[Any]], list[Any]]) -> None:
    """Change what comes back of each call."""
    call = llm.collective_rpc
    llm.collective_rpc = lambda *a, args, **k: change(args[0], call(*a, args=args, **k))


@pytest.mark.parametrize("workers", [1, 3])
def test_every_worker_gets_the_bucket_and_the_version(workers):
    llm = StubLLM(workers=workers)
    session = greeted(llm)
    assert session.ranks == session.workers == workers
    assert session.worker_ranks == tuple(range(workers))
    send(session, 1)
    session.commit(1, ())
    assert session.version == 1
    for worker in llm.workers:
        assert worker.version == 1
        assert torch.equal(worker.held[1]["w"], BUCKET["w"])
    session.goodbye()


def test_merged_weights_that_a_worker_refuses_close_the_engine_until_a_push_completes():
    llm = StubLLM(workers=2)
    session = greeted(llm, LOAD)
    send(session, 1, beside=False)
    llm.on["load"] = raising(MemoryError("full"))
    with pytest.raises(SyncError, match="MemoryError in the engine: full"):
        send(session, 1, beside=False)
    session.abort(1, MemoryError("full"))
    assert "half-way" in session.closed
    llm.on.clear()
    send(session, 1, beside=False)
    session.commit(1, ())
    assert not session.closed
    session.goodbye()


def test_an_update_that_a_dead_trainer_left_open_is_given_up():
    llm = StubLLM()
    send(greeted(llm, LOAD), 1, beside=False)
    session = greeted(llm, LOAD)
    assert "half-way" in session.closed
    send(session, 1, beside=False)
    session.commit(1, ())
    assert not session.closed
    session.goodbye()


def test_a_worker_s_refusal_does_not_pass_through_vllm():
    """Raised there, it is printed as a failure of the engine; and vLLM leaves the answers of the other ranks unread."""
    llm = StubLLM(workers=2)
    session, seen = greeted(llm), []
    altered(llm, lambda _, answers: seen.append([a["ok"] for a in answers]) or answers)
    session.version = 7
    with pytest.raises(StaleVersionError):
        session.commit(8, ())
    llm.on["rollback in the worker"] = raising(ZeroDivisionError("a defect"))
    with pytest.raises(SyncError):
        session.rollback(3, ())
    for message in (None, {}, {"op": "no"}):
        assert not llm.workers[0](message)["ok"]
    for name in (5, None, [], {}, ["x"], b"x"):
        assert not llm.workers[0]({"op": "status", "session": name, "protocol": PROTOCOL})["ok"]
    assert seen == [[False, False]] * 2
    session.goodbye()


@pytest.mark.parametrize("left", [[], [0], [0, 0], [1, 2], [0, 1, 2, 2]])
def test_answers_of_other_workers_than_all_of_them_are_refused(left):
    llm = StubLLM(workers=3)
    session = greeted(llm)
    altered(llm, lambda _, answers: [answers[n] for n in left])
    with pytest.raises(EngineNotReadyError, match=r"expected 3, one of each rank"):
        session.check_ours()


@pytest.mark.parametrize("answer", [None, 5, {}, {"ok": True}, [1], {"ok": True, "rank": 0, "more": 1}])
def test_what_is_no_answer_of_a_worker_says_so(answer):
    llm = StubLLM()
    session = greeted(llm)
    altered(llm, lambda *_: [answer])
    with pytest.raises(EngineNotReadyError, match="expected one of lorasync's workers"):
        session.check_ours()


def test_a_client_that_alters_bytes_is_refused_in_the_handshake():
    llm = StubLLM()
    call = llm.collective_rpc
    llm.collective_rpc = lambda *a, args, **k: call(*a, args=(args[0], args[1].decode(errors="replace")), **k)
    with pytest.raises(EngineNotReadyError, match="got str beside the message, expected the bytes"):
        greeted(llm)


def test_a_bucket_that_is_staged_in_the_background_is_asked_for():
    llm, go_on = StubLLM(workers=2), threading.Event()
    session = greeted(llm)
    session.target.generates_meanwhile = True
    llm.on["receive"] = lambda: go_on.wait(20)
    threading.Timer(0.2, go_on.set).start()
    began = time.monotonic()
    send(session, 1)
    assert time.monotonic() - began > 0.15
    assert llm.calls.count("bucket") == 1
    assert llm.calls.count("collect") > 2
    session.commit(1, ())
    assert {worker.version for worker in llm.workers} == {1}
    session.goodbye()


def test_staging_that_does_not_end_is_given_up_and_holds_nothing_up():
    llm, go_on = StubLLM(), threading.Event()
    session = greeted(llm, timeout=0.4)
    session.target.generates_meanwhile = True
    llm.on["receive"] = lambda: go_on.wait(20)
    began = time.monotonic()
    with pytest.raises(
        SyncTimeoutError, match=r"worker ranks \[0\] of 1 did not stage a bucket within 0.4 s"
    ):
        send(session, 1)
    session.abort(1, SyncError("x"))
    assert time.monotonic() - began < 5.0
    go_on.set()


def test_what_went_wrong_in_the_background_is_told_when_it_is_asked_for():
    llm = StubLLM()
    session = greeted(llm)
    session.target.generates_meanwhile = True
    llm.on["receive"] = raising(MemoryError("full"))
    with pytest.raises(SyncError, match="MemoryError in the engine: full"):
        send(session, 1)
    session.goodbye()


def test_a_commit_whose_answer_is_lost_is_asked_for():
    llm = StubLLM()
    session = greeted(llm, timeout=0.4)
    send(session, 1)
    altered(llm, lambda message, answers: time.sleep(1.0 if message["op"] == "commit" else 0) or answers)
    session.commit(1, ())
    assert session.version == llm.workers[0].version == 1
    session.goodbye()


def test_workers_that_serve_different_versions_close_the_engine():
    llm = StubLLM(workers=2)
    session = greeted(llm)
    llm.workers[1].conversation.version = 5
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


def test_goodbye_is_said_once():
    llm = StubLLM()
    session = greeted(llm)
    llm.on["goodbye"] = raising(RuntimeError("no"))
    with pytest.raises(SyncError):
        session.goodbye()
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


def answer(rank: int, **more: Any) -> Answer:
    return Answer(**{"ok": True, "rank": rank, "workers": 2, "version": 1, "digest": "a", **more})


def test_answers_are_compared_rank_by_rank():
    good = {0: answer(0, seconds=0.5), 1: answer(1, seconds=2.0)}
    check_digests(good, "a", "staged")
    check_version(good, 1)
    assert slowest(good) == 2.0
    for bad in ("b", ""):
        with pytest.raises(PayloadError, match=r"ranks \[1\] have staged other bytes"):
            check_digests(good | {1: answer(1, digest=bad)}, "a", "staged")
    with pytest.raises(SyncError, match=r"ranks \[1\] serve versions \{1: 2\}, expected 1"):
        check_version(good | {1: answer(1, version=2)}, 1)


def test_the_error_of_the_lowest_rank_is_raised():
    bad = {"type": "PayloadError", "message": "cut", "mismatches": []}
    worse = {"type": "SyncError", "message": "later", "mismatches": []}
    good = answer(0).to_dict()
    assert read_answers([answer(1).to_dict(), good], expected=2) == {0: answer(0), 1: answer(1)}
    with pytest.raises(PayloadError, match="cut"):
        read_answers(
            [good, answer(2, ok=False, error=worse).to_dict(), answer(1, ok=False, error=bad).to_dict()],
            expected=3,
        )


def test_what_a_worker_refuses_is_told_also_where_others_are_missing():
    bad = {"type": "PayloadError", "message": "cut", "mismatches": []}
    with pytest.raises(PayloadError, match="cut"):
        read_answers([answer(0, ok=False, error=bad).to_dict()], expected=2)


def test_what_is_no_error_of_ours_says_so():
    assert "The engine failed: KeyError" in str(failure(KeyError("x")))
    assert "can't carry bytes" in str(failure(TypeError("Object of type bytes is not JSON serializable")))
    for other in ("'NCCLWeightTransferEngine' object is not callable", "'NoneType' object is not callable"):
        assert "expected the backend 'lorasync'" in str(failure(RuntimeError(other)))


# ------------------------------------------------------------------------------------------ late, and twice


@pytest.mark.parametrize("op", ["bucket", "commit", "rollback", "abort"])
def test_a_message_that_arrives_late_changes_nothing(op):
    """A client with a queue may deliver what the trainer has given up: it is refused, whatever it is."""
    llm, late = StubLLM(), []
    session = greeted(llm, LOAD if op == "bucket" else MERGE, timeout=0.5)
    for version in (1, 2):
        send(session, version, beside=op != "bucket")
        session.commit(version, ())
    call = llm.collective_rpc

    def held_up(method: str, timeout: Any = None, args: Any = (), kwargs: Any = None) -> list[Any]:
        if args[0]["op"] == op and not late:
            late.append(args)
            raise SyncTimeoutError("held up on its way")
        return call(method, timeout, args, kwargs)

    llm.collective_rpc = held_up
    with pytest.raises(SyncTimeoutError):
        push_or_roll_back(session, op)
    session.abort(3, SyncTimeoutError("held up"))
    before = [{n: t.clone() for n, t in worker.live.items()} for worker in llm.workers]
    (answer,) = call("weight_transfer_engine", None, late[0])
    assert not answer["ok"]
    assert "late, or sent twice" in answer["error"]["message"]
    assert llm.workers[0].version == session.version == 2
    assert not session.closed
    assert all(
        torch.equal(old["w"], worker.live["w"])
        for old, worker in zip(before, llm.workers, strict=True)
        if old
    )


def push_or_roll_back(session: EngineSession, op: str) -> None:
    if op == "rollback":
        session.rollback(1, ())
        return
    send(session, 3, beside=op != "bucket")
    if op == "abort":
        session._asked(Abort(**session._next()))
    session.commit(3, ())


def test_a_commit_that_is_delivered_twice_is_done_once():
    llm = StubLLM()
    session = greeted(llm)
    call, seen = llm.collective_rpc, []

    def twice(method: str, timeout: Any = None, args: Any = (), kwargs: Any = None) -> list[Any]:
        found = call(method, timeout, args, kwargs)
        if args[0]["op"] in ("bucket", "commit"):
            seen.append(call(method, timeout, args, kwargs)[0]["ok"])
        return found

    llm.collective_rpc = twice
    for version in (1, 2):
        send(session, version)
        session.commit(version, ())
    assert seen == [False] * 4
    assert llm.workers[0].version == 2
