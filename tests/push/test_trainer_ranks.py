"""Two trainer ranks: whose engines are pushed to, and how one rank's error reaches the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasync.push.trainer_ranks import agreed_by_all_ranks, largest_of_all_ranks, texts_of_all_ranks
from tests.e2e.ranks import run_two


def test_one_rank_alone_asks_nobody():
    assert largest_of_all_ranks(5) == 5
    assert texts_of_all_ranks("a") == ["a"]
    with pytest.raises(ValueError, match="mine"), agreed_by_all_ranks():
        raise ValueError("mine")


@pytest.mark.timeout(300)
def test_two_ranks_leave_each_call_the_same_way_and_know_why(tmp_path):
    run_two(Path(__file__).with_name("stub_ranks.py"), logs=tmp_path, limit=200)
