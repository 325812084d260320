"""In one process what is lent comes again as the same object: the worker looks at it once, and not too rarely."""

from __future__ import annotations

from typing import Any

import pytest

import lorasync as ls
from lorasync.push import MergeInWorker, connect
from lorasync.receive import staging
from lorasync.receive.direct import DirectWrites
from tests import models
from tests.e2e.engines import greedy, running_llm
from tests.models import tiny


class Looks:
    """Counts how often the worker goes through a bucket name by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checks = self.sorts = 0
        check, sort = staging.check_bucket, DirectWrites._sorted

        def checking(*args: Any) -> None:
            self.checks += 1
            check(*args)

        def sorting(*args: Any) -> Any:
            self.sorts += 1
            return sort(*args)

        monkeypatch.setattr(staging, "check_bucket", checking)
        monkeypatch.setattr(DirectWrites, "_sorted", sorting)


@pytest.fixture(scope="module")
def llm(base):
    with running_llm(base, in_process=True, dtype="float32") as llm:
        yield llm


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["merged", "factors"])
def test_what_is_lent_is_looked_at_once_until_it_lies_elsewhere(llm, base, monkeypatch, strategy):
    policy = tiny(base)
    apply = None if strategy == "merged" else MergeInWorker(base="checkpoint")
    source = ls.MergedSource(policy) if strategy == "merged" else ls.FactorSource(policy)
    answers = {}
    with connect(source, llm, apply) as sync:
        looks = Looks(monkeypatch)
        for seed in (1, 2, 1):
            models.move(policy, seed=seed, scale=0.05)
            sync.send_weights()
            assert answers.setdefault(seed, greedy(llm)) == greedy(llm)
        assert answers[1] != answers[2]
        assert looks.checks == 1
        assert looks.sorts == 1 or strategy == "factors"  # these take their layers one by one on a CPU
        for name, param in policy.named_parameters():
            if ".lora_B." in name:
                param.data = param.data.clone()  # as an optimizer that swaps its memory does
        models.move(policy, seed=2, scale=0.05)
        sync.send_weights()
        assert greedy(llm) == answers[2]
        assert looks.checks == 2
        assert looks.sorts == 2 or strategy == "factors"
