"""A worker's side of the conversation: who may speak, what is refused, and what each message leaves behind."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch

from lorasync.bucket import Bucket
from lorasync.errors import (
    EngineNotReadyError,
    LorasyncError,
    PayloadError,
    StaleVersionError,
    SyncError,
    SyncTimeoutError,
)
from lorasync.kernels import PendingMerge, PlainBase
from lorasync.receive.conversation import Conversation
from lorasync.transport import in_process, inline
from lorasync.wire import (
    PROBE,
    Abort,
    BucketMessage,
    Collect,
    Commit,
    Digest,
    Goodbye,
    Hello,
    Rollback,
    Status,
    digest_of_parts,
)
from tests.stub_engine import StubConversation, StubLLM, raising

FIRST, SECOND = "a" * 32, "b" * 32
BUCKET = {"w": torch.arange(6.0).reshape(2, 3)}


class Worker:
    """One worker of a stub engine, told what a trainer would tell it."""

    def __init__(self) -> None:
        self.llm = StubLLM()
        self.conversation: StubConversation = self.llm.workers[0].conversation
        self.held = self.llm.workers[0].held

    def hello(self, session: str = FIRST, kind: str = "merge", *, payload: Any = PROBE, **more: Any) -> Any:
        strategy = json.dumps({"kind": kind})
        hello = Hello(session=session, strategy=strategy, manifest="", **{"offers": {"inline": {}}, **more})
        return self.conversation.answer(hello, payload)

    def bucket(self, version: int, session: str = FIRST, **more: Any) -> Any:
        parcel = inline.Sender().put(BUCKET)
        message = BucketMessage(
            session=session,
            version=version,
            kind="bucket",
            transport="inline",
            **{"digest": parcel.digest, **more},
        )
        return self.conversation.answer(message, parcel.payload)

    def commit(self, version: int, session: str = FIRST, *, digest: str | None = None, **more: Any) -> Any:
        digest = digest_of_parts([inline.Sender().put(BUCKET).digest]) if digest is None else digest
        expected = self.conversation.version
        commit = Commit(session=session, version=version, digest=digest, **{"expected": expected, **more})
        return self.conversation.answer(commit, b"")

    def push(self, version: int, session: str = FIRST) -> None:
        self.bucket(version, session)
        self.commit(version, session)

    def collect(self, session: str = FIRST) -> Any:
        return self.conversation.answer(Collect(session=session), b"")

    def abort(self, session: str = FIRST) -> None:
        self.conversation.answer(Abort(session=session), b"")


@pytest.fixture
def worker() -> Any:
    worker = Worker()
    yield worker
    worker.conversation.shutdown()


# ------------------------------------------------------------------------------------------- who may speak

CHANGES: list[Any] = [
    lambda worker, session: worker.bucket(1, session),
    lambda worker, session: worker.bucket(1, session, background=True),
    lambda worker, session: worker.commit(1, session),
    lambda worker, session: worker.collect(session),
    lambda worker, session: worker.conversation.answer(Rollback(session=session, version=0, expected=0), b""),
]


@pytest.mark.parametrize("change", CHANGES)
def test_before_a_handshake_nothing_is_taken(worker, change):
    with pytest.raises(SyncError, match=r"session: got aaaaaaaa, expected a handshake first"):
        change(worker, FIRST)
    with pytest.raises(SyncError, match=r"session: got none, expected a handshake first"):
        change(worker, "")
    assert worker.llm.calls == []


@pytest.mark.parametrize("change", CHANGES)
def test_another_session_than_the_one_that_shook_hands_last_changes_nothing(worker, change):
    worker.hello(FIRST)
    worker.hello(SECOND)
    worker.bucket(1, SECOND)
    for other in (FIRST, "", "c" * 32):
        with pytest.raises(SyncError, match=r"expected bbbbbbbb\. .*connect\(\) again") as caught:
            change(worker, other)
        assert SECOND not in str(caught.value), "who knows all of it may push"
    worker.commit(1, SECOND)  # what had been staged is still there
    assert torch.equal(worker.held[1]["w"], BUCKET["w"])


def test_another_session_s_abort_and_goodbye_are_answered_and_change_nothing(worker):
    worker.hello(FIRST)
    worker.hello(SECOND)
    worker.bucket(1, SECOND)
    worker.abort(FIRST)
    assert worker.conversation.answer(Goodbye(session=FIRST), b"") == ""
    worker.commit(1, SECOND)
    assert "w" in worker.held[1]


def test_after_its_goodbye_a_session_may_not_push_and_what_it_pushed_is_served(worker):
    worker.hello()
    worker.push(1)
    worker.conversation.answer(Goodbye(session=FIRST), b"")
    with pytest.raises(SyncError, match=r"session: got aaaaaaaa"):
        worker.bucket(2)
    assert worker.conversation.version == 1


# ------------------------------------------------------------------------------------------- the handshake


@pytest.mark.parametrize(
    ("payload", "got"),
    [("text", "got str"), (None, "got NoneType"), (PROBE + b"x", "got other bytes"), (b"", "got other")],
)
def test_a_handshake_whose_bytes_were_altered_leaves_the_session_before_in_place(worker, payload, got):
    worker.hello(FIRST)
    worker.bucket(1)
    with pytest.raises(EngineNotReadyError, match=got):
        worker.hello(SECOND, payload=payload)
    worker.commit(1)
    assert "w" in worker.held[1]


def test_a_handshake_that_is_refused_gives_up_no_push_of_the_session_before(worker, monkeypatch):
    worker.hello(FIRST)
    worker.bucket(1)
    with monkeypatch.context() as patched:
        patched.setattr(worker.conversation, "_applier_for", lambda hello: raising(PayloadError("no"))())
        with pytest.raises(PayloadError, match="no"):
            worker.hello(SECOND)
    worker.commit(1)
    assert "w" in worker.held[1]


@pytest.mark.parametrize("refused", ["its bytes", "its strategy"])
def test_after_a_handshake_that_is_refused_the_messages_of_the_session_before_are_late_still(
    worker, refused, monkeypatch
):
    worker.hello(call=1)
    for call, version in ((5, 1), (7, 2)):
        worker.bucket(version, call=call)
        worker.commit(version, call=call + 1)
    with monkeypatch.context() as patched:
        if refused == "its strategy":
            patched.setattr(worker.conversation, "_applier_for", lambda hello: raising(PayloadError("no"))())
        with pytest.raises((EngineNotReadyError, PayloadError)):
            worker.hello(SECOND, call=1, payload=b"x" if refused == "its bytes" else PROBE)
    for late in (lambda: worker.bucket(3, call=6), lambda: worker.commit(3, call=8)):
        with pytest.raises(SyncError, match="late, or sent twice"):
            late()
    worker.bucket(3, call=9)
    worker.commit(3, call=10)
    assert worker.conversation.version == 3


@pytest.mark.parametrize("carried", [PROBE, bytearray(PROBE), memoryview(PROBE)])
def test_bytes_come_as_whatever_holds_bytes(worker, carried):
    assert worker.hello(payload=carried).refused == {"inline": ""}


@pytest.mark.parametrize("strategy", ["", "{", "[]", "{}", '{"kind": 5}', '{"kind": "pigeon"}', "5"])
def test_a_strategy_that_can_t_be_read_is_refused_and_the_session_stays(strategy):
    conversation = Conversation(StubLLM().workers[0].served)
    hello = Hello(session=FIRST, strategy=strategy, manifest="[]", offers={"inline": {}})
    with pytest.raises(LorasyncError):
        conversation.answer(hello, PROBE)
    assert conversation.session == ""
    conversation.shutdown()


def test_a_handshake_gives_up_what_an_earlier_trainer_has_left(worker):
    worker.hello(FIRST)
    worker.bucket(1)
    worker.hello(SECOND)
    with pytest.raises(PayloadError, match=r"have digest none here"):
        worker.commit(1, SECOND)
    worker.push(1, SECOND)
    assert worker.conversation.version == 1


def test_a_handshake_waits_for_what_is_being_staged(worker):
    worker.hello(FIRST)
    go_on = threading.Event()
    worker.llm.on["receive"] = lambda: go_on.wait(20)
    assert worker.bucket(1, background=True) is None
    threading.Timer(0.2, go_on.set).start()
    worker.hello(SECOND)
    assert go_on.is_set()
    assert worker.conversation.session == SECOND


def test_a_handshake_during_staging_that_does_not_end_is_refused(worker):
    worker.hello(FIRST, limit=0.1)
    go_on = threading.Event()
    worker.llm.on["receive"] = lambda: go_on.wait(20)
    worker.bucket(1, background=True)
    try:
        with pytest.raises(SyncTimeoutError, match=r"staged for more than 0\.1 s\. Nothing was touched"):
            worker.hello(SECOND)
        assert worker.conversation.session == FIRST
        assert (
            worker.conversation.answer(Status(session=SECOND), b"") == ""
        )  # what is served is told meanwhile
    finally:
        go_on.set()


def test_the_last_64_sessions_whose_versions_went_are_remembered(worker):
    sessions = [f"{number:032d}" for number in range(70)]
    for version, session in enumerate(sessions, start=1):
        worker.hello(session, "adapter")
        assert session not in worker.conversation.replaced
        worker.push(version, session)
    assert list(worker.conversation.replaced) == sessions[5:69]


def test_who_only_shook_hands_replaces_nobody_who_serves_adapters(worker):
    worker.hello(FIRST, "adapter")
    worker.push(1)
    worker.hello(SECOND, "adapter")
    assert worker.conversation.replaced == {}
    assert 1 in worker.held
    worker.push(2, SECOND)
    assert list(worker.conversation.replaced) == [FIRST]
    worker.hello(FIRST, "merge")  # an adapter can't stay beside weights that change
    assert list(worker.conversation.replaced) == [FIRST, SECOND]
    assert worker.held == {}


def test_a_goodbye_takes_along_the_adapters_that_an_earlier_trainer_has_left(worker):
    worker.hello(FIRST, "adapter")
    worker.push(1)
    worker.hello(SECOND, "adapter")
    worker.conversation.answer(Goodbye(session=SECOND, in_flight=()), b"")
    assert worker.held == {}
    assert list(worker.conversation.replaced) == [FIRST], "its requests would end the engine"


# ---------------------------------------------------------------------------------------- buckets, commits


def test_a_bucket_that_is_refused_takes_the_others_of_its_version_with_it(worker):
    worker.hello()
    worker.bucket(1)
    with pytest.raises(PayloadError, match="bytes were altered"):
        worker.bucket(1, digest="x")
    with pytest.raises(PayloadError, match="have digest none here"):
        worker.commit(1)
    worker.push(1)
    assert worker.conversation.version == 1


@pytest.mark.parametrize("digest", ["", "x", digest_of_parts(["x"])])
def test_a_commit_of_other_buckets_than_have_come_serves_nothing_of_them(worker, digest):
    worker.hello()
    worker.push(1)
    worker.bucket(2)
    with pytest.raises(
        PayloadError, match=r"version 2: its buckets have digest .*one is missing, or came twice"
    ):
        worker.commit(2, digest=digest)
    assert worker.conversation.version == 1
    assert set(worker.held) == {1}
    with pytest.raises(PayloadError, match="have digest none here"):
        worker.commit(2)  # nothing is left of it
    worker.push(2)
    assert worker.conversation.version == 2


def test_a_bucket_that_came_twice_or_after_another_version_expected_is_no_version(worker):
    worker.hello()
    worker.bucket(1)
    worker.bucket(1)
    with pytest.raises(PayloadError, match="came twice"):
        worker.commit(1)
    worker.bucket(1)
    with pytest.raises(StaleVersionError, match=r"serves 0, expected 3.*Version 1 was not applied"):
        worker.commit(1, expected=3)
    assert worker.conversation.version == 0
    assert worker.held == {}


def test_a_commit_that_fails_can_be_made_again(worker):
    worker.hello()
    worker.bucket(1)
    worker.llm.on["commit in the worker"] = raising(MemoryError("full"))
    with pytest.raises(MemoryError):
        worker.commit(1)
    worker.llm.on.clear()
    with pytest.raises(PayloadError, match="have digest none here"):
        worker.commit(1)
    worker.push(1)
    assert worker.conversation.version == 1


@pytest.mark.parametrize(("version", "expected"), [(0, 2), (0, 1), (1, 1), (2, 1), (1, 3)])
def test_a_rollback_that_is_not_to_the_version_before_is_refused(worker, version, expected):
    worker.hello()
    worker.push(1)
    worker.push(2)
    with pytest.raises(SyncError, match=r"rollback: the engine serves 2 and can go to 1, expected"):
        worker.conversation.answer(Rollback(session=FIRST, version=version, expected=expected), b"")
    assert worker.conversation.version == 2
    worker.conversation.answer(Rollback(session=FIRST, version=1, expected=2), b"")
    assert worker.conversation.version == 1
    worker.conversation.answer(Rollback(session=FIRST, version=2, expected=1), b"")  # and forward again
    assert worker.conversation.version == 2


@pytest.mark.parametrize("kind", ["bucket", "base"])
def test_merges_that_are_still_to_be_made_are_for_merged_weights_only(worker, kind):
    base = PlainBase(torch.zeros(3, 2))
    merge = PendingMerge(
        base, torch.zeros(1, 2), torch.zeros(3, 1), 1.0, torch.float32, make=lambda: base.weight
    )
    message = BucketMessage(session=FIRST, version=1, kind=kind, transport=in_process.NAME)
    worker.hello(kind="merge", offers={in_process.NAME: {}})
    with pytest.raises(PayloadError, match="got merges, expected factors"):
        worker.conversation.answer(message, Bucket({"w": merge}))
    assert "receive" not in worker.llm.calls


# ------------------------------------------------------------------------------ staging in the background


def test_the_outcome_of_a_background_staging_is_asked_for(worker):
    worker.hello()
    go_on = threading.Event()
    worker.llm.on["receive"] = lambda: go_on.wait(20)
    assert worker.bucket(1, background=True) is None
    assert worker.collect() is None
    go_on.set()
    worker.conversation._staging.result(20)
    assert worker.collect() == worker.collect() == inline.Sender().put(BUCKET).digest
    worker.commit(1)
    assert torch.equal(worker.held[1]["w"], BUCKET["w"])


def test_who_asks_for_a_staging_that_there_is_not_is_told_so(worker):
    worker.hello()
    with pytest.raises(SyncError, match=r"collect: no bucket is being staged"):
        worker.collect()
    worker.bucket(1)
    with pytest.raises(SyncError, match=r"collect: no bucket is being staged"):
        worker.collect()
    worker.bucket(1, background=True)
    worker.abort()
    with pytest.raises(SyncError, match=r"given up"):
        worker.collect()


def test_a_background_staging_that_fails_says_so_when_asked_and_leaves_nothing(worker):
    worker.hello()
    worker.bucket(1)
    worker.llm.on["receive"] = raising(MemoryError("full"))
    worker.bucket(1, background=True)
    worker.conversation._staging.exception(20)
    for _ in range(2):
        with pytest.raises(MemoryError, match="full"):
            worker.collect()
    worker.llm.on.clear()
    with pytest.raises(PayloadError, match="have digest none here"):
        worker.commit(1)  # also of what had come before
    worker.push(1)
    assert worker.conversation.version == 1


def test_what_came_of_a_staging_that_nobody_asked_for_ends_with_the_next_message(worker):
    worker.hello()
    worker.llm.on["receive"] = raising(MemoryError("full"))
    worker.bucket(1, background=True)
    worker.conversation._staging.exception(20)
    worker.llm.on.clear()
    worker.push(1)
    with pytest.raises(SyncError, match="no bucket is being staged"):
        worker.collect()


# ------------------------------------------------------------------------------------------- what is served


def test_a_digest_of_weights_that_vllm_keeps_packed_names_one(worker):
    found = worker.conversation.answer(Digest(session=FIRST), b"")
    assert found == worker.conversation.answer(Digest(session=""), b"")
    live = worker.conversation.served.model
    with torch.no_grad():
        live.bias.add_(1)
    assert worker.conversation.answer(Digest(session=FIRST), b"") != found
    live.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(SyncError, match=r"digest: 1 weights can't be read back.*weight"):
        worker.conversation.answer(Digest(session=FIRST), b"")


def test_a_worker_that_shuts_down_forgets_the_trainer_and_serves_what_it_served():
    worker = Worker()
    worker.hello()
    worker.push(1)
    worker.conversation.shutdown()
    assert worker.conversation.version == 1
    with pytest.raises(SyncError, match="session"):
        worker.bucket(2)
