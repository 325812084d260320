"""What each worker has staged and applied is compared with what was sent, before and after the commit."""

from __future__ import annotations

from dataclasses import replace

import pytest

import lorasync as ls
from lorasync.errors import PayloadError
from lorasync.push import MergeInWorker, connect, session
from tests import models
from tests.e2e.engines import greedy, running_llm
from tests.models import tiny

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def llm(base):
    with running_llm(base, dtype="float32") as llm:
        yield llm


@pytest.fixture(params=["merged", "factors"])
def pushed(request, llm, base):
    """A policy, its connection after one push, and the answers of that version."""
    policy = tiny(base)
    merged = request.param == "merged"
    source = ls.MergedSource(policy) if merged else ls.FactorSource(policy)
    apply = None if merged else MergeInWorker(base="checkpoint")
    with connect(source, llm, apply, bucket_bytes=200_000, timeout=60) as sync:
        models.move(policy, seed=1, scale=0.05)
        sync.send_weights()
        yield policy, sync, greedy(llm)


def _refused(sync, llm, answers, message):
    version = sync.version
    with pytest.raises(PayloadError, match=message):
        sync.send_weights()
    assert sync.version == version
    if sync.apply is None:  # merged weights had come: nothing is served until a push completes
        assert "died half-way" in sync.closed
    else:
        assert not sync.closed
        assert greedy(llm, **sync.request()) == answers


def _goes_on(sync, policy, llm, answers):
    sync.send_weights()
    assert greedy(llm, **sync.request()) != answers
    models.move(policy, seed=1, scale=0.05)
    assert len(sync.send_weights().digest) == 32
    assert greedy(llm, **sync.request()) == answers


def test_a_rank_that_has_staged_other_bytes_is_noticed_before_the_commit(pushed, llm, monkeypatch):
    policy, sync, answers = pushed
    models.move(policy, seed=2, scale=0.05)
    read, commits = session.read_answers, []

    def other_bytes(found, *, expected):
        answers = read(found, expected=expected)
        return {rank: replace(a, digest="0" * 32) if a.digest else a for rank, a in answers.items()}

    with monkeypatch.context() as patch:
        patch.setattr(session, "read_answers", other_bytes)
        patch.setattr(session.EngineSession, "commit", lambda *args: commits.append(args))
        _refused(sync, llm, answers, r"ranks \[0\] have staged other bytes than were sent")
    assert not commits
    _goes_on(sync, policy, llm, answers)


def test_a_commit_of_other_buckets_than_have_come_is_refused(pushed, llm, monkeypatch):
    policy, sync, answers = pushed
    models.move(policy, seed=2, scale=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(session, "digest_of_parts", lambda _: "0" * 32)
        _refused(sync, llm, answers, "one is missing, or came twice. It is not served")
    _goes_on(sync, policy, llm, answers)
