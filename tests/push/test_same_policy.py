"""What trainer ranks with engines are compared by; two real ranks do it in test_trainer_ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorasync as ls
from lorasync.push.same_policy import SamePolicy
from tests import models


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this rank says, as all others would be told."""
    said: list[str] = []
    monkeypatch.setattr(
        "lorasync.push.same_policy.texts_of_all_ranks", lambda text: said.append(text) or [text]
    )
    return said


def test_whatever_makes_another_policy_is_told_otherwise(told):
    policy = models.with_adapter(models.tiny_llama())
    source, same = ls.FactorSource(policy), SamePolicy()
    trained = next(p for n, p in policy.named_parameters() if "lora_B" in n)
    norm = next(p for n, p in policy.named_parameters() if n.endswith("norm.weight"))
    layer = next(m for m in policy.modules() if isinstance(getattr(m, "scaling", None), dict))

    def says(**handshake: Any) -> str:
        if handshake:
            same.check_base(source, **handshake, has_engines=True)
        else:
            same.check(source, has_engines=True)
        return told[-1]

    assert says() == says() != ""
    before, base = says(), says(handshake="h")
    with torch.no_grad():
        trained[0, 0] += 1
    assert says() != before
    assert says(handshake="h") != base
    with torch.no_grad():
        trained[0, 0] -= 1
    layer.scaling["default"] *= 2
    assert says() != before
    layer.scaling["default"] /= 2
    norm.data[0] += 1
    assert says(handshake="h") != base
    norm.data[0] -= 1
    assert says(handshake="other") != base
    for param in policy.parameters():
        param.requires_grad_(False)
    after = says()
    trained[0, 0] += 1
    assert says() != after, "a policy that is only evaluated"
    policy.add_adapter("other", policy.peft_config["default"])
    policy.set_adapter("other")
    assert len({before, after, says()}) > 1


def test_a_rank_without_engines_says_nothing(told):
    source = ls.MergedSource(models.with_adapter(models.tiny_llama()))
    SamePolicy().check(source, has_engines=False)
    SamePolicy().check_base(source, "h", has_engines=False)
    assert told == ["", ""]
