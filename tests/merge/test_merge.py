"""The arithmetic against PEFT's own layers (bit for bit), against fp64, and against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import lorasync.merge as M
from lorasync.errors import MismatchError
from lorasync.merge import LowRank, merge_low_rank
from lorasync.merge.edits import Added, LowRankUpdate, Replaced, Rows, UpdatePart, edited
from tests.tiny import fill, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _pair(
    out: int, inner: int, r: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(out * 31 + inner * 7 + r)
    return torch.randn(out, inner), torch.randn(r, inner).to(dtype), torch.randn(out, r).to(dtype)


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", DTYPES)
def test_merge_lora_is_peft_bit_for_bit(base_dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(24, 40)).to(base_dtype)
    model = fill(get_peft_model(net, LoraConfig(r=4, lora_alpha=7, target_modules=["0"])))
    layer: Any = model.base_model.model[0]
    for part in (layer.lora_A, layer.lora_B):
        part["default"].weight.data = part["default"].weight.data.to(factor_dtype)
    base = layer.base_layer.weight.detach().clone()
    ours = M.merge_lora(
        base, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    )
    layer.merge()
    assert same_bits(ours, layer.base_layer.weight)
    assert not same_bits(ours, base)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_merge_lora_equals_fp64_rounded_once(fan_in_fan_out: bool) -> None:
    weight, a, b = _pair(64, 48, 8, torch.float32)
    base = (weight.T if fan_in_fan_out else weight).to(torch.bfloat16)
    ours = M.merge_lora(base, a, b, 0.25, fan_in_fan_out=fan_in_fan_out)
    delta = b.double() @ a.double() * 0.25
    exact = base.double() + (delta.T if fan_in_fan_out else delta)
    differing = ours != exact.float().to(torch.bfloat16)
    assert differing.float().mean() < 1e-3
    assert (ours.double() - exact).abs().max() < exact.abs().max() * 2**-8


def test_merge_lora_leaves_its_inputs_alone_and_writes_into_out() -> None:
    base, a, b = _pair(8, 6, 2, torch.float32)
    before = [t.clone() for t in (base, a, b)]
    out = torch.empty(8, 6, dtype=torch.bfloat16)
    returned = M.merge_lora(base, a, b, 2.0, out=out)
    assert returned is out
    assert same_bits(out, M.merge_lora(base, a, b, 2.0, dtype=torch.bfloat16))
    assert all(same_bits(x, y) for x, y in zip(before, (base, a, b), strict=True))


def test_merge_lora_into_its_own_base_is_allowed() -> None:
    base, a, b = _pair(8, 6, 2, torch.float32)
    expected = M.merge_lora(base, a, b, 2.0)
    assert same_bits(M.merge_lora(base, a, b, 2.0, out=base), expected)


def test_scaling_may_be_a_tensor() -> None:
    base, a, b = _pair(8, 6, 2, torch.float32)
    assert same_bits(
        M.merge_lora(base, a, b, torch.tensor(0.3)), M.merge_lora(base, a, b, float(torch.tensor(0.3)))
    )


def test_half_precision_factors_round_as_peft_does_unless_exact() -> None:
    _, a, b = _pair(64, 64, 8, torch.bfloat16)
    assert M.lora_delta(a, b, 0.3).dtype == torch.bfloat16
    exact = M.lora_delta(a, b, 0.3, exact=True)
    assert exact.dtype == torch.float32
    assert torch.allclose(exact.double(), b.double() @ a.double() * 0.3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "base"),
    [((2, 6), (8, 3), (8, 6)), ((0,), (0,), (8, 6)), ((2, 6), (8, 2), (6, 8)), ((2, 6), (8, 2), (8, 7))],
)
def test_shapes_that_dont_fit_are_named(
    a: tuple[int, ...], b: tuple[int, ...], base: tuple[int, ...]
) -> None:
    with pytest.raises(MismatchError, match="B·A") as caught:
        M.merge_lora(torch.zeros(base), torch.zeros(a), torch.zeros(b), 1.0)
    assert caught.value.mismatches[0].got


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 40),
    inner=st.integers(1, 40),
    r=st.integers(1, 9),
    scaling=st.floats(-4, 4, allow_nan=False),
    base=st.sampled_from(DTYPES),
    factors=st.sampled_from(DTYPES),
    flipped=st.booleans(),
)
def test_merge_lora_is_within_rounding_of_fp64(
    out: int, inner: int, r: int, scaling: float, base: torch.dtype, factors: torch.dtype, flipped: bool
) -> None:
    weight, a, b = _pair(out, inner, r, factors)
    weight = (weight.T if flipped else weight).to(base)
    ours = M.merge_lora(weight, a, b, scaling, fan_in_fan_out=flipped)
    delta = b.double() @ a.double() * scaling
    exact = weight.double() + (delta.T if flipped else delta)
    # One rounding of the sum, one of the delta for half-precision factors, and fp32 accumulation.
    delta = delta.T if flipped else delta
    slack = exact.abs() * torch.finfo(base).eps + delta.abs() * torch.finfo(factors).eps
    accumulated = (b.double().abs() @ a.double().abs()).max() * abs(scaling) * 1e-6 * r + 1e-6
    assert ours.shape == weight.shape
    assert ours.dtype == base
    assert bool(((ours.double() - exact).abs() <= slack + accumulated).all())


def test_dora_norms_and_magnitudes() -> None:
    base, a, b = _pair(8, 6, 2, torch.float32)
    magnitude = torch.rand(8) + 0.5
    merged = M.merge_dora(base, M.lora_delta(a, b, 0.5), magnitude)
    assert torch.allclose(merged.norm(dim=1), magnitude)
    assert torch.allclose(
        merged / magnitude[:, None], nn.functional.normalize(base + 0.5 * b @ a, dim=1), atol=1e-6
    )


def test_replace_rows_replaces_and_does_not_add() -> None:
    base = torch.ones(5, 2)
    merged = M.replace_rows(base, [3, 1], torch.tensor([[7.0, 7.0], [9.0, 9.0]]))
    assert merged[:, 0].tolist() == [1.0, 9.0, 1.0, 7.0, 1.0]
    assert base.sum() == 10


def test_low_rank_refuses_nothing_and_knows_every_kind() -> None:
    base, a, b = _pair(8, 6, 2, torch.float32)
    assert same_bits(M.merge_low_rank(M.LowRank("linear", 0.5), base, a, b), M.merge_lora(base, a, b, 0.5))
    embedding = M.low_rank_delta(M.LowRank("embedding", 0.5), a, b)
    assert same_bits(embedding.contiguous(), M.lora_delta(a, b, 0.5).T.contiguous())
    experts = M.LowRank("experts", 0.5, experts=2)
    stacked = M.low_rank_delta(experts, torch.randn(4, 6), torch.randn(8, 4))
    assert stacked.shape == (2, 8, 6)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("factor_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_merging_in_blocks_of_rows_is_merging_at_once(
    base_dtype: torch.dtype, factor_dtype: torch.dtype, exact: bool
) -> None:
    scratch, how = M.Scratch(), M.LowRank("linear", 0.37, exact=exact)
    for out, inner in (
        (1000, 700),
        (3, 300_000),
        (900, 700),
    ):  # several ragged blocks; rows wider than a block
        weight, a, b = _pair(out, inner, 5, factor_dtype)
        base = weight.to(base_dtype)
        at_once = M.merge_low_rank(how, base, a, b).to(base_dtype)
        blocks = M.merge_and_round(how, base, a, b, dtype=base_dtype, scratch=scratch)
        assert same_bits(blocks, at_once)
        # The result has memory of its own, and what is left in the scratch does not matter to the next.
        scratch.take(out, inner, a.float()).fill_(float("nan"))
        assert same_bits(blocks, at_once)


# --- the second rounding ------------------------------------------------------------------------------------


def test_stochastic_rounding_is_unbiased_and_lands_on_neighbours() -> None:
    exact = torch.linspace(-3, 3, 1001)
    passes = torch.stack([M.Stochastic(seed)(exact, torch.bfloat16, key="w").float() for seed in range(400)])
    spacing = torch.maximum(exact.abs() * 2**-7, torch.tensor(2.0**-20))
    assert bool(((passes - exact).abs() <= spacing).all())
    assert float((passes.mean(0) - exact).abs().max() / spacing.max()) < 0.15
    assert bool((passes.mean(0) - exact).mean().abs() < 1e-4)


def test_stochastic_rounding_is_a_function_of_seed_and_key_only() -> None:
    exact = torch.randn(3000)
    first = M.Stochastic(7)(exact, torch.bfloat16, key="a")
    assert same_bits(first, M.Stochastic(7)(exact, torch.bfloat16, key="a"))
    assert not same_bits(first, M.Stochastic(8)(exact, torch.bfloat16, key="a"))
    assert not same_bits(first, M.Stochastic(7)(exact, torch.bfloat16, key="b"))
    reshaped = M.Stochastic(7)(exact.view(30, 100), torch.bfloat16, key="a")
    assert same_bits(first, reshaped.reshape(-1))


def test_stochastic_rounding_leaves_exact_values_and_specials_alone() -> None:
    exact = torch.tensor([0.0, -0.0, 1.5, -2.0, float("inf"), -float("inf"), float("nan")])
    rounded = M.Stochastic(3)(exact, torch.bfloat16)
    assert same_bits(rounded[:6].float(), exact[:6])
    assert bool(rounded[6].isnan())


def test_stochastic_rounding_is_the_same_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.randn(1000)
    whole = M.Stochastic(1)(exact, torch.bfloat16)
    monkeypatch.setattr("lorasync.merge.rounding._BLOCK", 64)
    assert same_bits(whole, M.Stochastic(1)(exact, torch.bfloat16))


def test_stochastic_rounding_keeps_a_small_update_on_average() -> None:
    base, a, b = _pair(64, 64, 4, torch.float32)
    base = (base.sign() + base.sign() * 0.25).to(torch.bfloat16)
    scaling = 1e-4
    nearest = M.merge_lora(base, a, b, scaling)
    exact = base.float() + M.lora_delta(a, b, scaling)
    mean = torch.stack(
        [M.merge_lora(base, a, b, scaling, rounding=M.Stochastic(s)).float() for s in range(300)]
    ).mean(0)
    lost = (nearest.float() - exact).norm()
    assert (mean - exact).norm() < 0.4 * lost


# --- delta survival -----------------------------------------------------------------------------------------


def test_delta_survival_of_whole_vanished_and_absent_updates() -> None:
    base = torch.ones(10, dtype=torch.bfloat16)
    large = base.float() + 0.25
    whole = M.delta_survival("w", base, large, large.bfloat16())
    assert (whole.kept, whole.unmoved) == (1.0, 0.0)
    tiny = base.float() + 1e-5
    gone = M.delta_survival("w", base, tiny, tiny.bfloat16())
    assert (gone.kept, gone.unmoved) == (0.0, 1.0)
    assert gone.norm == pytest.approx(1e-5 * 10**0.5, rel=0.1)
    nothing = M.delta_survival("w", base, base.float(), base)
    assert (nothing.kept, nothing.unmoved, nothing.norm) == (1.0, 0.0, 0.0)


def test_delta_survival_counts_only_updated_elements() -> None:
    base = torch.ones(4, dtype=torch.bfloat16)
    exact = torch.tensor([1.5, 1.00001, 1.0, 1.0])
    assert M.delta_survival("w", base, exact, exact.bfloat16()).unmoved == pytest.approx(0.5)


# --- edits of a weight --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast_first", [False, True])
def test_a_part_of_an_update_is_that_part_of_the_whole_one(dtype: torch.dtype, cast_first: bool) -> None:
    torch.manual_seed(0)
    how = LowRank("linear", 0.7, cast_first=cast_first)
    base = torch.randn(8, 6).to(dtype)
    update = LowRankUpdate(how, torch.randn(3, 6).to(dtype), torch.randn(8, 3).to(dtype))
    whole = edited(base, [update])
    assert torch.equal(
        whole, merge_low_rank(how, base, update.lora_a, update.lora_b, norm_base=base, exact=False)
    )
    for rows, cols in ((slice(2, 5), slice(None)), (slice(None), slice(1, 4))):
        part = edited(base[rows, cols], [UpdatePart(how, update.delta()[rows, cols])])
        assert torch.equal(part, whole[rows, cols])


def test_edits_are_made_in_order_and_the_base_is_only_read() -> None:
    base = torch.zeros(3, 2, dtype=torch.bfloat16)
    row = torch.full((1, 2), 1.0)
    edits = [Rows((1,), row), Added(torch.full((3, 2), 2.0**-10), 1.0), Added(torch.ones(3, 2), 0.5)]
    assert edited(base, edits)[1].tolist() == [1.5 + 2.0**-10] * 2
    assert edited(base, edits, round_between=True)[1].tolist() == [1.5] * 2
    assert not base.any()
    assert edited(base, [*edits, Replaced(row)]) is row


def test_entries_of_a_spec_become_edits() -> None:
    from lorasync.source.edits import with_factors
    from lorasync.source.spec import FactorBias, FactorModule, FactorRows, FactorSaved

    factors = {name: torch.randn(2, 2) for name in ("a", "b", "m", "t")}
    how = LowRank("linear", 2.0, dora=True)
    module = FactorModule("w", (), "float32", (2, 2), "plain", 2, "a", "b", "m", how)
    update = with_factors(module, factors)
    assert isinstance(update, LowRankUpdate)
    assert (update.how, update.lora_a, update.magnitude) == (how, factors["a"], factors["m"])
    assert with_factors(FactorRows("w", "t", (0,)), factors).values is factors["t"]
    assert with_factors(FactorBias("w", "t", 3.0), factors).scaling == 3.0
    assert isinstance(with_factors(FactorSaved("w", "t"), factors), Replaced)
