"""A representative dozen of the survey, and that it tells a stale push; `make survey` takes every class."""

from __future__ import annotations

import pytest
import torch

from tests import served
from tests.survey import names, one
from tests.survey.classes import REPRESENTATIVE, architectures, with_names


@pytest.mark.parametrize("architecture", REPRESENTATIVE)
def test_two_pushes_leave_what_vllm_loads_of_the_merged_checkpoints(architecture: str) -> None:
    assert one.survey(architecture) == {"merged": one.Outcome("right"), "factors": one.Outcome("right")}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GptOssForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_push_that_never_came_is_told(architecture, tmp_path) -> None:

    policies = one._Policies(architecture, tmp_path, torch.bfloat16, experts=True)
    first, second = (one._everything(policies.merged(number), "bfloat16") for number in range(2))
    with served.loaded(policies.merged(0), dtype="bfloat16") as (model, _):
        assert served.differences(model, first) == []
        assert len(served.differences(model, second)) > 5


@pytest.mark.parametrize(
    "architecture",
    [
        "Qwen3VLMoeForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "Kimi_K25ForConditionalGeneration",
        "MixtralForCausalLM",
        "T5ForConditionalGeneration",
    ],
)
def test_names_and_bits_are_those_of_save_pretrained(architecture: str) -> None:
    assert names.check(architecture) == one.Outcome("right")


def test_the_survey_takes_every_class_of_both() -> None:
    assert set(REPRESENTATIVE) <= set(architectures())
    assert len(architectures()) > 60
    assert len(with_names()) > 200
