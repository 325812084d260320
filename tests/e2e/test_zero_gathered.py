"""gathered() under ZeRO-3 and FSDP2, in two real processes: right uses, and wrong ones that must not hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.zero_cells import run_pair

WORKER = Path(__file__).with_name("zero_gather_worker.py")


@pytest.fixture(scope="module", params=["zero3", "fsdp2"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Both ranks' findings."""
    work = tmp_path_factory.mktemp(request.param)
    codes = run_pair([request.param, str(work)], work, idle_timeout=100, worker=WORKER)
    assert codes == [0, 0], "\n".join((work / f"rank{rank}.log").read_text()[-3000:] for rank in range(2))
    return [json.loads((work / f"{rank}.json").read_text()) for rank in range(2)]


def test_sharded_parameters_are_whole_inside_and_sharded_again_outside(ranks: list[dict[str, Any]]):
    for found in ranks:
        assert found["sharded"] == [True] * 3
        read = found["read"]
        assert all([*read["same"], *read["generator"], read["one"]])
        assert read["others_stay_sharded"]
        assert read["sharded_before_and_after"]
        assert read["full_shapes"] == [[8, 4], [6, 2], [4, 4]]


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("order", "ask for different parameters"),
        ("subset", "ask for different parameters"),
        ("nested", "already held by an enclosing gathered()"),
        ("written", "were written inside"),
        ("canary", "token_logprobs"),
    ],
)
def test_wrong_uses_raise_at_once_on_both_ranks(ranks: list[dict[str, Any]], use: str, words: str):
    for found in ranks:
        assert found["misuse"][use]["error"] == "UngatheredError"
        assert words in found["misuse"][use]["message"]
        assert found["misuse"][use]["seconds"] < 10


def test_a_rank_that_stays_away_is_named_and_meets_an_error_when_it_comes_late(ranks: list[dict[str, Any]]):
    waited, late = ranks[0]["misuse"]["absent"], ranks[1]["misuse"]["late"]
    assert waited["error"] == "SyncTimeoutError"
    assert "ranks [1] did not arrive" in waited["message"]
    assert late["error"] == "UngatheredError"
    assert "gave up after 2 s" in late["message"]
    assert late["seconds"] < 10


def test_after_every_error_the_right_use_works(ranks: list[dict[str, Any]]):
    for found in ranks:
        assert found["misuse"]["afterwards"]["same"] == [True] * 3
