"""A connection that was taken over ends, however it ends, without a word to the one that serves."""

from __future__ import annotations

from typing import Any

import pytest

import lorasync as ls
from lorasync.errors import EngineClosedError, StaleVersionError, SyncError
from lorasync.push import ServeAdapter, connect
from tests import models
from tests.stub_engine import StubLLM, raising


@pytest.fixture(scope="module")
def policy() -> Any:
    return models.with_adapter(models.tiny_llama())


def connected(policy: Any, target: Any) -> Any:
    return connect(ls.FactorSource(policy), target, ServeAdapter("policy"), timeout=20)


def test_who_was_taken_over_shuts_down_and_the_other_one_s_requests_go_on(policy):
    llm = StubLLM()
    first = connected(policy, llm)
    first.send_weights()
    with connected(policy, llm) as second:
        second.send_weights()
        first.shutdown()
        assert llm.generate(**second.request()) == 2


def test_who_was_taken_over_leaves_an_engine_out_and_the_other_one_s_requests_go_on(policy):
    left, right = StubLLM(), StubLLM()
    with connected(policy, {"left": left, "right": right}) as first:
        first.send_weights()
        with connected(policy, right) as second:
            second.send_weights()
            with pytest.raises(SyncError, match=r"^right: session: .*another trainer"):
                first.send_weights()
            first.leave_out("right")
            assert right.generate(**second.request()) == 2
            assert left.generate(**first.request()) == 1


def test_an_engine_that_dies_before_live_weights_change_is_closed(policy):
    left, right = StubLLM(), StubLLM()
    with connect(ls.MergedSource(policy), {"left": left, "right": right}, timeout=20) as sync:
        sync.send_weights()
        right.on["status"] = raising(RuntimeError("dead"))
        with pytest.raises(SyncError, match=r"^right: .*dead"):
            sync.send_weights()
        with pytest.raises(EngineClosedError, match="does not say what it serves"):
            sync.request()
        right.on.clear()
        sync.send_weights()
        assert sync.request() == {}


def test_a_commit_that_is_refused_as_stale_takes_no_one_s_requests_away(policy):
    llm = StubLLM()
    first = connected(policy, llm)
    first.send_weights()
    with connected(policy, llm) as second:
        conversation = llm.workers[0].conversation
        conversation.version = 7
        with pytest.raises(StaleVersionError):
            second.send_weights()
        conversation.version = 1
        assert llm.generate(**first.request()) == 1
