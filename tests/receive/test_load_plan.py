"""The load plan, of loaders that do what vLLM's do: fuse, shard, narrow, compute, fill, replace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorasync.errors import MismatchError
from lorasync.receive.load_plan import check_complete
from lorasync.receive.planner import record_plan
from lorasync.receive.windows import Slice, covered, overlap

BF16 = torch.bfloat16


class Twin(nn.Module):
    """Parameters on meta, and a loader: a function of (its parameters and buffers, name, tensor)."""

    def __init__(self, load, *, buffers=(), **shapes):
        super().__init__()
        self.load = load
        for name, shape in shapes.items():
            value = torch.empty(shape, device="meta")
            if name in buffers:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def load_weights(self, weights):
        held = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, tensor in weights:
            self.load(held, name, tensor)


def manifest(**shapes):
    return [(name, torch.float32, shape) for name, shape in shapes.items()]


def by_name(held, name, tensor):
    held[name].data.copy_(tensor)


def fused(held, name, tensor):
    """Gate above, up below, in one parameter."""
    start = {"gate": 0, "up": 4}[name]
    held["gate_up"].data.narrow(0, start, 4).copy_(tensor)


def test_a_fused_parameter_gets_a_row_for_each_tensor_that_goes_into_it():
    plan = record_plan(Twin(fused, gate_up=(8, 3)), manifest(gate=(4, 3), up=(4, 3)))
    rows = {row.name: row.target for row in plan.rows}
    assert rows == {"gate": Slice((4, 3), (3, 1), 0), "up": Slice((4, 3), (3, 1), 12)}
    assert plan.feeds == {"gate_up": {"gate", "up"}}
    assert plan.written == {"gate_up": 24}
    assert not plan.uncovered
    check_complete(plan)


def test_rows_write_what_the_loader_would_have_written():
    loaded, written = (torch.zeros(8, 3) for _ in range(2))
    tensors = {"gate": torch.randn(4, 3), "up": torch.randn(4, 3)}
    for name, tensor in tensors.items():
        fused({"gate_up": loaded}, name, tensor)
    plan = record_plan(Twin(fused, gate_up=(8, 3)), manifest(gate=(4, 3), up=(4, 3)))
    for row in plan.rows:
        row.target.view(written).copy_(row.source.view(tensors[row.name]))
    assert torch.equal(written, loaded)


def test_a_part_that_nobody_sends_is_named_with_what_is_there():
    plan = record_plan(Twin(fused, gate_up=(8, 3), other=(2,)), manifest(gate=(4, 3)))
    assert plan.uncovered == {"gate_up": 12, "other": 0}
    with pytest.raises(MismatchError) as refused:
        check_complete(plan)
    assert {m.name: m.got for m in refused.value.mismatches} == {
        "gate_up": "12 of its 24 elements (from gate)",
        "other": "nothing for it",
    }
    check_complete(plan, only=())


def test_an_element_that_is_written_twice_does_not_stand_for_one_that_is_missing():
    def the_same_half_twice(held, name, tensor):
        held["gate_up"].data.narrow(0, 0, 4).copy_(tensor)
        held["gate_up"].data.narrow(0, 0, 4).copy_(tensor)

    plan = record_plan(Twin(the_same_half_twice, gate_up=(8, 3)), manifest(gate=(4, 3)))
    assert plan.uncovered == {"gate_up": 12}


def test_two_tensors_for_the_same_elements_are_refused():
    def into_one(held, name, tensor):
        held["weight"].data.copy_(tensor)

    with pytest.raises(MismatchError, match="both a and b for the same elements"):
        record_plan(Twin(into_one, weight=(4, 3)), manifest(a=(4, 3), b=(4, 3)))


def test_columns_of_different_tensors_share_rows_and_no_elements():
    def side_by_side(held, name, tensor):
        held["weight"].data.narrow(1, {"a": 0, "b": 3}[name], 3).copy_(tensor)

    plan = record_plan(Twin(side_by_side, weight=(4, 6)), manifest(a=(4, 3), b=(4, 3)))
    assert not plan.uncovered
    assert {row.source.shape for row in plan.rows} == {(4, 3)}


@pytest.mark.parametrize(
    "load",
    [
        lambda held, name, tensor: held["weight"].data.copy_(-torch.exp(tensor)),
        lambda held, name, tensor: held["weight"].data.copy_(tensor.to(BF16)),
        lambda held, name, tensor: held["weight"].data.copy_(tensor).mul_(2),
        lambda held, name, tensor: held["weight"].data.copy_(tensor.mul_(2)),
        lambda held, name, tensor: held["weight"].data.zero_().add_(tensor),
        lambda held, name, tensor: setattr(held["weight"], "data", tensor * 2),
        lambda held, name, tensor: held["weight"].data.__setitem__(slice(None), tensor * 2),
    ],
    ids=["-exp", "cast", "scaled after", "scaled before", "added", "replaced", "assigned"],
)
def test_what_a_loader_computes_is_no_plain_copy(load):
    plan = record_plan(Twin(load, weight=(4, 3)), manifest(A_log=(4, 3)))
    assert plan.computed == {"weight"}
    assert plan.feeds == {"weight": {"A_log"}}
    assert plan.written == {"weight": 12}
    assert not plan.uncovered


def test_padding_that_the_loader_fills_is_covered():
    def padded(held, name, tensor):
        held["weight"].data[:4].copy_(tensor)
        held["weight"].data[4:].fill_(0)

    plan = record_plan(Twin(padded, weight=(6, 3)), manifest(a=(4, 3)))
    assert not plan.uncovered
    assert not plan.computed


def test_padding_of_which_vllm_says_that_no_checkpoint_has_it_is_not_missed():
    twin = Twin(lambda held, name, tensor: held["weight"].data[:4].copy_(tensor), weight=(6, 3))
    twin.weight.weight_loader_numel = 12
    assert not record_plan(twin, manifest(a=(4, 3))).uncovered


def test_a_buffer_that_is_loaded_is_in_the_plan_and_others_are_not():
    twin = Twin(by_name, buffers=("scalar", "table"), weight=(4,), scalar=(1,), table=(9,))
    plan = record_plan(twin, manifest(weight=(4,), scalar=(1,)))
    assert plan.layouts.keys() == {"weight", "scalar"}
    assert plan.feeds["scalar"] == {"scalar"}


def test_views_that_a_constructor_made_of_a_parameter_are_known():
    twin = Twin(by_name, weight=(4, 1, 3))
    twin.add_module("conv", nn.Module())
    twin.conv.register_buffer("flat", twin.weight.data.view(4, 3), persistent=False)
    plan = record_plan(twin, manifest(weight=(4, 1, 3)))
    assert plan.aliases == {"weight": (("conv.flat", Slice((4, 3), (3, 1), 0)),)}


def ignoring(held, name, tensor):
    if name in held:
        held[name].data.copy_(tensor)


def test_what_the_engine_ignores_is_named_by_its_branch_with_the_way_to_leave_it_out():
    twin = Twin(ignoring, weight=(4,))
    towers = [(f"visual.blocks.{i}.weight", torch.float32, (4,)) for i in range(3)]
    with pytest.raises(MismatchError) as refused:
        record_plan(twin, [*manifest(weight=(4,)), *towers, ("v_head.weight", torch.float32, (4,))])
    assert [m.name for m in refused.value.mismatches] == ["v_head.*", "visual.*"]
    assert "exclude=['visual.*']" in str(refused.value)
    assert "3 tensors" in str(refused.value)


def test_a_branch_of_which_the_engine_takes_a_part_is_not_left_out_as_a_whole():
    twin = Twin(lambda held, name, tensor: name == "m.a" and held["weight"].data.copy_(tensor), weight=(4,))
    with pytest.raises(MismatchError) as refused:
        record_plan(twin, [("m.a", torch.float32, (4,)), ("m.b", torch.float32, (4,))])
    assert [m.name for m in refused.value.mismatches] == ["m.b"]


def test_what_may_be_ignored_is_listed_in_the_plan():
    plan = record_plan(Twin(ignoring, weight=(4,)), manifest(weight=(4,), other=(4,)), may_ignore=["other"])
    assert plan.ignored == {"other"}
    assert not plan.rows_of("other")


def test_a_tensor_of_which_the_loader_takes_a_part_is_refused():
    twin = Twin(lambda held, name, tensor: held["weight"].data.copy_(tensor[:4]), weight=(4, 3))
    with pytest.raises(MismatchError, match="of which the engine takes 12 elements"):
        record_plan(twin, manifest(a=(6, 3)))
    assert record_plan(twin, manifest(a=(8, 3)), ranks=2).rows  # the share of one of two ranks


def test_everything_that_does_not_fit_is_named_at_once():
    with pytest.raises(MismatchError) as refused:
        record_plan(Twin(by_name, a=(4,), b=(4,)), manifest(a=(5,), b=(4,), c=(4,)))
    assert {m.name for m in refused.value.mismatches} == {"a", "c"}


def test_a_name_that_is_sent_twice_is_refused():
    with pytest.raises(MismatchError, match="sent twice"):
        record_plan(Twin(by_name, a=(4,)), manifest(a=(4,)) * 2)


def test_windows_are_counted_once_whatever_their_shape():
    columns = [Slice((3, 2), (4, 1), start) for start in (0, 1, 2)]
    assert covered(columns[:1]) == 6
    assert covered(columns) == 12
    assert covered([columns[0], columns[2]]) == 12
    assert covered([columns[0], columns[0]]) == 6
    assert overlap(columns[0], columns[1])
    assert not overlap(columns[0], columns[2])
    assert covered([]) == covered([Slice((0, 3), (3, 1), 5)]) == 0
