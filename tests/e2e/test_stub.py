"""The stub engine of the unit tests answers as a real one does."""

from __future__ import annotations

from typing import Any

import pytest

import lorasync as ls
from lorasync.bucket import Bucket
from lorasync.push import MergeInWorker, ServeAdapter
from lorasync.push.strategies import LoadMerged
from lorasync.transport.post import Post, ways_taken
from lorasync.wire import (
    PROBE,
    Abort,
    BucketMessage,
    Commit,
    Digest,
    Goodbye,
    Hello,
    Message,
    Rollback,
    Status,
    answer_from_dict,
    digest_of_parts,
    manifest_as_text,
)
from tests.e2e.engines import running_llm
from tests.models import tiny
from tests.stub_engine import StubLLM

pytestmark = pytest.mark.timeout(300)
STRATEGIES: dict[str, Any] = {
    "merged": LoadMerged(),
    "factors": MergeInWorker(base="checkpoint"),
    "adapter": ServeAdapter("policy"),
}
CERTAIN = ("ok", "rank", "workers", "version", "ours", "replaced", "pending", "digest")


@pytest.fixture(scope="module")
def real(base):
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 4}
    with running_llm(base, dtype="float32", **lora) as llm:
        yield llm


class Place:
    """Where the buckets of a conversation go."""

    name, gpu = "engine", ""

    def __init__(self, ways: tuple[str, ...]) -> None:
        self.ways = ways


class Told:
    """A conversation: each answer as what is certain of it, each refusal as its type."""

    def __init__(self, engine: Any, way: str, policy: Any) -> None:
        self.engine, self.post, self.session = engine, Post(), f"session of {way}"
        source = ls.MergedSource(policy) if way == "merged" else ls.FactorSource(policy)
        self.bucket = Bucket(source)
        self.strategy = STRATEGIES[way].handshake(source)
        self.manifest = manifest_as_text((m.name, m.dtype, m.shape) for m in source.metadata())
        self.lines: list[Any] = []
        self.sent: list[str] = []
        self.version = 0

    def ask(self, message: Message, payload: bytes = b"") -> Any:
        (found,) = self.engine.collective_rpc("weight_transfer_engine", args=(message.to_dict(), payload))
        answer = answer_from_dict(found)
        self.version = answer.version
        certain = {name: getattr(answer, name) for name in CERTAIN if name != "version"}
        if isinstance(message, Digest):
            certain["digest"] = bool(certain["digest"])  # a stub has no parameters of a real model
        told = None if answer.introduction is None else self._certain(answer.introduction)
        error = (answer.error or {}).get("type")
        self.lines.append((message.op, certain, answer.version, bool(answer.closed), error, told))
        return answer

    @staticmethod
    def _certain(introduction: Any) -> Any:
        ways = ways_taken([introduction.refused])
        return ways, introduction.gpu, sorted(introduction.dtypes), bool(introduction.capacity)

    def hello(self, **change: Any) -> Any:
        settings = {"strategy": self.strategy, "manifest": self.manifest, "session": self.session}
        offers = self.post.offers(hands_over=False)
        answer = self.ask(Hello(**{**settings, "offers": offers, **change}), PROBE)
        if answer.introduction is not None:
            self.place = Place(ways_taken([answer.introduction.refused]))
        return answer

    def push(self, version: int) -> None:
        (parcel,) = self.post.parcels(self.bucket, [self.place])
        message = BucketMessage(
            session=self.session,
            version=version,
            kind="bucket",
            transport=parcel.way,
            fields=parcel.fields,
            digest=parcel.digest,
        )
        self.ask(message, parcel.payload)
        self.sent.append(parcel.digest)

    def commit(self, version: int, expected: int) -> None:
        digest, self.sent = digest_of_parts(self.sent), []
        keep = (version - 1,) if version > 1 else ()
        self.ask(
            Commit(session=self.session, version=version, expected=expected, digest=digest, in_flight=keep)
        )

    def rollback(self, version: int, expected: int) -> None:
        self.ask(Rollback(session=self.session, version=version, expected=expected))


def conversation(engine: Any, way: str, policy: Any) -> list[Any]:
    told = Told(engine, way, policy)
    session = told.session
    told.ask(Status(session=session))
    told.commit(1, 0)  # nobody has shaken hands
    first = told.hello().version
    told.ask(Status(session=session))
    told.commit(first + 1, first + 5)  # another version is served
    told.rollback(first - 1, first)
    for version in (first + 1, first + 2):
        told.push(version)
        told.commit(version, version - 1)
    told.push(first + 3)
    told.ask(Abort(session=session))
    told.ask(Status(session=session))
    told.commit(first + 3, first + 2)  # its buckets were given up
    told.push(first + 3)
    told.commit(first + 3, first + 2)
    told.rollback(first + 2, first + 1)
    told.rollback(first + 2, first + 3)
    told.rollback(first + 3, first + 2)
    told.hello(protocol=1)
    told.ask(Status(session=session))
    told.ask(Status(session="another"))
    told.ask(Goodbye(session=session))
    told.ask(Status(session=session))
    told.commit(first + 9, first + 3)
    told.post.close()
    return [(op, certain, version - first, *rest) for op, certain, version, *rest in told.lines]


@pytest.mark.parametrize("way", ["adapter", "factors", "merged"])
def test_a_real_engine_and_the_stub_answer_alike(real, way, base):
    policy = tiny(base)
    found = conversation(real, way, policy)
    assert conversation(StubLLM(), way, policy) == found
    assert [line for line in found if line[1]["ok"]]
    assert {line[4] for line in found} >= {None, "SyncError", "StaleVersionError", "MismatchError"}
