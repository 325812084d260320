"""The stub engine of the unit tests answers as a real one does."""

from __future__ import annotations

from typing import Any

import pytest
from lorasync.push.payload import Payload

import lorasync as ls
from lorasync.push import MergeInWorker, ServeAdapter
from lorasync.push.session import EngineSession
from lorasync.push.strategies import apply_message
from lorasync.targets.kinds import target_of
from lorasync.transport.cuda_ipc import Lender
from lorasync.wire import digest_of_parts, manifest_as_text
from tests.e2e.engines import running_llm
from tests.models import tiny
from tests.stub_engine import StubLLM

pytestmark = pytest.mark.timeout(300)
APPLIES = {"merged": None, "factors": MergeInWorker(base="checkpoint"), "adapter": ServeAdapter("policy")}
COMMON = {"ok", "version", "closed", "world_size", "seconds"}


@pytest.fixture(scope="module")
def real(base):
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 4}
    with running_llm(base, dtype="float32", **lora) as llm:
        yield llm


class Told:
    """A conversation: each answer as its fields and what is certain of them, each refusal as its type."""

    def __init__(self, engine: Any, way: str, policy: Any) -> None:
        self.session = EngineSession(target_of(engine, timeout=60.0), name="engine")
        source = ls.MergedSource(policy) if way == "merged" else ls.FactorSource(policy)
        self.bucket = dict(source)
        self.texts = {
            "apply": apply_message(APPLIES[way], source),
            "manifest": manifest_as_text((m.name, m.dtype, m.shape) for m in source.metadata()),
        }
        self.lines: list[Any] = []

    def ask(self, op: str, **fields: Any) -> None:
        try:
            replies = self.session.control(op, **fields)
        except Exception as error:
            self.lines.append((op, type(error).__name__))
            return
        for rank, reply in replies.items():
            certain = {
                name: reply[name]
                for name in ("ok", "version", "closed", "world_size", "ours", "held")
                if name in reply
            }
            self.lines.append((op, rank, sorted(reply), certain))

    def push(self, version: int, *, beside: bool, digest: str = "") -> None:
        if not beside:
            self.session.start()
        with Payload(self.bucket, [self.session], Lender()) as payload:
            self.session.send(payload, version, op="bucket", beside=beside)
        if not beside:
            self.session.finish()
        self.lines.append(("sent", bool(self.session._sent)))

    def commit(self, version: int, expected: int) -> None:

        digest, self.session._sent = digest_of_parts(self.session._sent), []
        self.ask("commit", version=version, expected=expected, digest=digest, in_flight=(version - 1,))


def conversation(engine: Any, way: str, policy: Any) -> list[Any]:
    told, beside = Told(engine, way, policy), way != "merged"
    told.ask("status")
    told.ask("commit", version=1)
    told.ask("hello", **{**told.texts, "bucket": told.session._bytes_to_try()})
    first = told.lines[-1][3]["version"]
    told.ask("status")
    told.ask("commit", version=first + 1, expected=first + 5)
    told.ask("rollback", version=first - 1, expected=first)
    for version in (first + 1, first + 2):
        told.push(version, beside=beside)
        told.commit(version, version - 1)
    told.push(first + 3, beside=beside)
    told.ask("stage", bucket={"op": "abort", "session": told.session._token, "version": first + 3, "call": 0})
    told.ask("status")
    told.session._sent = []
    told.push(first + 3, beside=beside)
    told.commit(first + 3, first + 2)
    told.ask("rollback", version=first + 2, expected=first + 1)
    told.ask("rollback", version=first + 2, expected=first + 3)
    told.ask("rollback", version=first + 3, expected=first + 2)
    told.ask("hello", bucket={"op": "nonsense"}, **told.texts)
    told.ask("status")
    told.ask("goodbye")
    told.ask("status")
    told.ask("commit", version=first + 9, expected=first + 3)
    told.session._remove()
    return [_relative(line, first) for line in told.lines]


def _relative(line: Any, first: int) -> Any:
    """Versions count from what the engine served at first; a real one has been pushed to before."""
    if not isinstance(line[-1], dict):
        return line
    found = {**line[-1], "version": line[-1]["version"] - first}
    found["closed"] = bool(found["closed"])
    return (*line[:-1], found)


@pytest.mark.parametrize("way", ["adapter", "factors", "merged"])
def test_a_real_engine_and_the_stub_answer_alike(real, way, base):
    policy = tiny(base)
    found = conversation(real, way, policy)
    assert conversation(StubLLM(), way, policy) == found
    assert {name for line in found if len(line) > 3 for name in line[2]} >= COMMON
