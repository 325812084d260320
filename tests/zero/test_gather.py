"""gathered() on plain parameters; tests/e2e has it on sharded ones, in real processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorasync.zero import full_shape, gathered, is_sharded


def test_plain_parameters_are_handed_through():
    layer = nn.Linear(3, 2)
    with gathered(layer.parameters()) as (weight, bias):
        assert weight is layer.weight
        assert bias is layer.bias
    with gathered(layer.weight) as (only,), gathered(layer.weight):
        assert only is layer.weight
    with gathered([]) as none:
        assert none == []
    assert not is_sharded(layer.weight)
    assert full_shape(layer.weight) == (2, 3)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="got str at position 1"), gathered([torch.ones(1), "weight"]):
        pass
