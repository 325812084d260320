"""The trainer's packed base, as a worker takes it."""

from __future__ import annotations

import pytest
import torch

from lorasync.errors import MismatchError
from lorasync.receive.bases import PackedBases
from tests.bnb.test_bnb import BF16, four_bit, stored

CPU = torch.device("cpu")


@pytest.mark.parametrize("nested", [False, True])
def test_a_packed_base_that_lacks_a_part_is_refused_by_name_whichever_it_is(nested):
    """Without the scales of its scales a weight would be merged with the numbers that stand for them."""
    tensors = stored(four_bit("nf4", nested=nested).to("cpu"))
    whole = PackedBases(tensors, {"x.weight": BF16}, CPU).whole("x.weight")
    assert whole.shape == (48, 128)
    assert len(tensors) == (6 if nested else 4)
    for lost in tensors:
        rest = {name: tensor for name, tensor in tensors.items() if name != lost}
        with pytest.raises(
            MismatchError, match=r"(?s)not whole; nothing was touched.*x\.weight.*connect\(\) again"
        ):
            PackedBases(rest, {"x.weight": BF16}, CPU)
