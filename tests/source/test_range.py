"""What is finite in training but not in the served dtype: refused before anything is sent; and what a push leaves out."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorasync as ls
from lorasync.errors import MismatchError, NonFiniteError
from tests.models import move, tiny_llama, with_adapter

HUGE = 1e5  # in bfloat16's range, out of float16's


def policy(**lora):
    return with_adapter(tiny_llama(), **lora)


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("bound", torch.tensor([HUGE]))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_weight_that_no_adapter_touches_is_served_in_range_or_not_at_all(name):
    model = policy().to(torch.bfloat16)
    model.base_model.model.get_parameter(name).data.view(-1)[3] = HUGE
    with pytest.raises(NonFiniteError, match=rf"(?s)1 tensors: .*float16 \(±65504\).*{name}"):
        dict(ls.MergedSource(model, dtype=torch.float16))
    served = dict(ls.MergedSource(model, dtype=torch.bfloat16))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in served.values())
    served = dict(ls.MergedSource(model, dtype=torch.float16, check_finite=False))
    assert not torch.isfinite(served[name]).all()


def test_so_is_a_buffer():
    model = get_peft_model(WithBuffer(), LoraConfig(target_modules=["proj"]))
    with pytest.raises(NonFiniteError, match=r"(?s)float16.*bound"):
        dict(ls.MergedSource(model, dtype=torch.float16))


def test_a_weight_just_inside_is_served():
    model = policy().to(torch.bfloat16)
    model.base_model.model.model.norm.weight.data[0] = 65280.0
    assert dict(ls.MergedSource(model, dtype=torch.float16))["model.norm.weight"][0] == 65280.0


def factors(model, part):
    return [param for name, param in model.named_parameters() if part in name]


def blow_up(model, size):
    """One product of factors becomes this large; each factor alone stays small."""
    a, b = factors(model, "lora_A")[0], factors(model, "lora_B")[0]
    a.data.zero_()
    b.data.zero_()
    a.data[0, 0] = b.data[0, 0] = size**0.5


@pytest.mark.parametrize("use_dora", [False, True])
def test_factors_that_would_leave_the_engines_range_when_merged_are_refused(use_dora):
    model = policy(use_dora=use_dora, lora_alpha=8, r=8)
    source = ls.FactorSource(model)
    source.check_fits(torch.float16, slots=False)
    if use_dora:
        factors(model, "lora_magnitude_vector")[0].data[0] = HUGE
    blow_up(model, HUGE)
    with pytest.raises(NonFiniteError, match=r"(?s)1 tensors?: .*float16.*layers\.0"):
        source.check_fits(torch.float16, slots=False)
    source.check_fits(torch.bfloat16, slots=False)
    ls.FactorSource(model, check_finite=False).check_fits(torch.float16, slots=False)


def test_factors_that_would_leave_it_together_with_the_base_alone():
    model = policy(lora_alpha=8, r=8)
    name = "model.layers.0.self_attn.q_proj.base_layer.weight"
    model.base_model.model.get_parameter(name).data[0, 0] = 65000.0
    source = ls.FactorSource(model)
    blow_up(model, 400.0)
    source.check_fits(torch.float16, slots=False)
    blow_up(model, 900.0)
    with pytest.raises(NonFiniteError, match="float16"):
        source.check_fits(torch.float16, slots=False)
    model.base_model.model.get_parameter(name).data[0, 0] = (
        0.0  # a frozen weight that changed is looked at again
    )
    source.check_fits(torch.float16, slots=False)


def test_slots_hold_b_times_its_scaling():
    model = policy(lora_alpha=64, r=8)
    source = ls.FactorSource(model)
    factors(model, "lora_B")[0].data[0, 0] = 9000.0  # x 8
    with pytest.raises(NonFiniteError, match=r"(?s)float16.*lora_B"):
        source.check_fits(torch.float16, slots=True)
    factors(model, "lora_B")[0].data[0, 0] = 8000.0
    source.check_fits(torch.float16, slots=True)
    factors(model, "lora_A")[0].data[0, 0] = 60000.0  # A is kept as it is
    source.check_fits(torch.float16, slots=True)


def test_whole_modules_have_to_fit_too():
    model = policy(modules_to_save=["lm_head"])
    source = ls.FactorSource(model)
    model.base_model.model.lm_head.modules_to_save.default.weight.data[0, 0] = HUGE
    for slots in (False, True):
        with pytest.raises(NonFiniteError, match=r"(?s)float16.*lm_head"):
            source.check_fits(torch.float16, slots=slots)


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        (["lm_head.*"], {"lm_head.weight"}),
        (["model.norm.weight"], {"model.norm.weight"}),
        (["*_layernorm.weight", "lm_head.*"], None),
    ],
)
def test_names_that_are_excluded_are_not_streamed_and_the_others_are_what_they_were(exclude, left_out):
    model = policy()
    move(model, seed=1)
    everything = dict(ls.MergedSource(model))
    rest = dict(source := ls.MergedSource(model, exclude=exclude))
    gone = everything.keys() - rest.keys()
    assert gone == (left_out or {n for n in everything if "_layernorm." in n or n == "lm_head.weight"})
    assert list(rest) == [meta.name for meta in source.metadata()]
    assert all(torch.equal(tensor, everything[name]) for name, tensor in rest.items())
    lent, others = source.lend()
    assert {*lent, *dict(others)} == rest.keys()


def test_a_pattern_that_fits_nothing_is_refused_with_what_there_is():
    with pytest.raises(MismatchError, match=r"(?s)visual\.\*.*lm_head, model"):
        ls.MergedSource(policy(), exclude=["visual.*", "lm_head.*"])
    with pytest.raises(MismatchError, match=r"Did you mean a pattern of model\.norm\.weight"):
        ls.MergedSource(policy(), exclude=["norm.*"])
    with pytest.raises(TypeError, match=r"exclude=\['lm_head\.\*'\]"):
        ls.MergedSource(policy(), exclude="lm_head.*")


def test_what_is_excluded_is_not_checked():
    model = policy()
    model.base_model.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        dict(ls.MergedSource(model))
    dict(ls.MergedSource(model, exclude=["lm_head.*"]))


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({}, "*.layers.1.*"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.*"),
        ({"target_modules": ["lm_head"]}, "lm_head.*"),
    ],
)
def test_what_is_trained_is_not_left_out(settings, pattern):
    """An engine that ties its head ignores the trained one: leaving it out would serve another policy."""
    with pytest.raises(MismatchError, match=r"(?s)what is trained.*left out, though it is trained"):
        ls.MergedSource(policy(**settings), exclude=[pattern])
