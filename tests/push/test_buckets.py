"""A stream of tensors in buckets: their order, their sizes, and each name once."""

from __future__ import annotations

import pytest
import torch

from lorasync.errors import MismatchError
from lorasync.push.buckets import buckets


def test_buckets_keep_order_and_limit_and_let_a_larger_tensor_travel_alone():
    sizes = [4, 4, 4, 100, 4]
    stream = [(str(i), torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    found = [list(bucket) for bucket in buckets(iter(stream), 8)]
    assert found == [["0", "1"], ["2"], ["3"], ["4"]]
    assert list(buckets(iter([]), 8)) == []


def test_a_name_twice_in_a_bucket_is_refused():
    with pytest.raises(MismatchError, match="a second time"):
        list(buckets(iter([("a", torch.zeros(1)), ("a", torch.zeros(1))]), 100))
