"""Presets are frozen data, and what they build is what transformers, PEFT and DeepSpeed take."""

from __future__ import annotations

import dataclasses
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from lorasync.errors import MismatchError, ZeroIncompatibilityError
from lorasync.presets import FP4, INT8, LORA_ZERO3, NF4, QLORA_ZERO2
from lorasync.zero import read_settings


def test_presets_are_frozen():
    with pytest.raises(FrozenInstanceError):
        NF4.name = "other"
    with pytest.raises(FrozenInstanceError):
        QLORA_ZERO2.r = 1


def test_bnb_config_says_what_the_preset_says():
    nf4 = NF4.bnb_config()
    assert (nf4.load_in_4bit, nf4.bnb_4bit_quant_type, nf4.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert (nf4.bnb_4bit_compute_dtype, nf4.bnb_4bit_quant_storage) == (torch.bfloat16, torch.uint8)
    assert FP4.bnb_config(compute_dtype=torch.float32).bnb_4bit_compute_dtype == torch.float32
    assert INT8.bnb_config().load_in_8bit
    assert NF4.bnb_config(llm_int8_skip_modules=["lm_head"]).llm_int8_skip_modules == ["lm_head"]
    assert (NF4.bits, FP4.bits, INT8.bits) == (4, 4, 8)


def test_the_two_training_presets_are_the_documented_ones():
    assert (QLORA_ZERO2.stage, QLORA_ZERO2.r, QLORA_ZERO2.alpha) == (2, 64, 64)
    assert (QLORA_ZERO2.quantization, QLORA_ZERO2.dtype) == (NF4, torch.bfloat16)
    assert (LORA_ZERO3.stage, LORA_ZERO3.quantization, LORA_ZERO3.gradient_checkpointing) == (3, None, True)
    assert read_settings(LORA_ZERO3.deepspeed_config()).optimizer_offload == "cpu"


def test_lora_config_takes_overrides():
    config = QLORA_ZERO2.lora_config(r=8, target_modules=["q_proj"])
    assert (config.r, config.lora_alpha, config.target_modules, config.lora_dropout) == (
        8,
        64,
        {"q_proj"},
        0.0,
    )


def test_deepspeed_config_merges_dicts_replaces_values_and_drops_none():
    config = QLORA_ZERO2.deepspeed_config(
        bf16=None, optimizer={"params": {"lr": 1.0}}, gradient_clipping=0.1, zero_optimization={"stage": 3}
    )
    assert "bf16" not in config
    assert config["optimizer"]["params"]["lr"] == 1.0
    assert config["optimizer"]["params"]["torch_adam"] is True
    assert (config["gradient_clipping"], config["zero_optimization"]["stage"]) == (0.1, 3)
    assert QLORA_ZERO2.deepspeed_config()["optimizer"]["params"]["lr"] == 1e-4


def test_overriding_accumulation_drops_the_global_batch():
    preset = replace(QLORA_ZERO2, micro_batch=2, global_batch=16)
    assert preset.deepspeed_config()["train_batch_size"] == 16
    assert "train_batch_size" not in preset.deepspeed_config(gradient_accumulation_steps=4)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", None)]
)
def test_precision_is_the_engines_dtype(precision: str, dtype: torch.dtype | None):
    preset = replace(QLORA_ZERO2, precision=precision)
    expected = torch.float32 if dtype is None else dtype
    assert preset.dtype == expected
    assert read_settings(preset.deepspeed_config()).engine_dtype == expected


# ── what isn't known
# ───────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("key", ["micro_batch", "microbatch", "MicroBatch"])
def test_a_field_of_the_preset_is_no_key_of_deepspeed(key: str):
    with pytest.raises(ZeroIncompatibilityError, match=r"replace\(QLORA_ZERO2, micro_batch=4\)"):
        QLORA_ZERO2.deepspeed_config(**{key: 4})


@pytest.mark.parametrize(
    ("overrides", "meant"),
    [
        ({"train_microbatch_size": 4}, "train_micro_batch_size_per_gpu"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimization"),
        ({"zero_optimization": {"stge": 3}}, r"zero_optimization\.stage"),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            r"zero_optimization\.offload_param\.device",
        ),
        ({"optimizer": {"params": {"leanring_rate": 1, "beta": 0}}}, r"optimizer\.params\.betas"),
        ({"bf16": {"enable": True}}, r"bf16\.enabled"),
    ],
)
def test_unknown_keys_are_refused_with_the_near_name(overrides: dict[str, object], meant: str):
    with pytest.raises(ZeroIncompatibilityError, match=rf"Did you mean {meant}\?"):
        QLORA_ZERO2.deepspeed_config(**overrides)


def test_a_key_that_deepspeed_would_ignore_is_refused_even_if_it_resembles_none():
    with pytest.raises(ZeroIncompatibilityError, match="colour"):
        QLORA_ZERO2.deepspeed_config(colour=4)


def test_overrides_that_contradict_the_preset_are_refused():
    with pytest.raises(ZeroIncompatibilityError, match="both true"):
        QLORA_ZERO2.deepspeed_config(fp16={"enabled": True})
    assert QLORA_ZERO2.deepspeed_config(fp16={"enabled": True}, bf16=None)["fp16"] == {"enabled": True}


@pytest.mark.parametrize(
    "name", ["gather_16bit_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"]
)
@pytest.mark.parametrize("value", [False, None])
def test_a_setting_is_overridden_under_either_name(name: str, value: object):
    config = LORA_ZERO3.deepspeed_config(zero_optimization={name: value})
    assert read_settings(config).zero["gather_16bit_weights_on_model_save"] is False
    assert read_settings(LORA_ZERO3.deepspeed_config()).zero["gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("rank", "r"),
        ("alpha", "lora_alpha"),
        ("target_module", "target_modules"),
        ("dropout", "lora_dropout"),
        ("use_rs_lora", "use_rslora"),
    ],
)
def test_unknown_entries_of_a_lora_config_are_refused_with_the_near_name(given: str, meant: str):
    with pytest.raises(MismatchError, match=rf"{given}: got 4, .*Did you mean {meant}\?"):
        QLORA_ZERO2.lora_config(**{given: 4})


def test_unknown_entries_of_a_bitsandbytes_config_are_refused_and_not_ignored():
    with pytest.raises(MismatchError, match=r"Did you mean bnb_4bit_quant_type\?"):
        NF4.bnb_config(bnb_4bit_quant_typ="fp4")
    with pytest.raises(MismatchError, match=r"Did you mean llm_int8_skip_modules\?"):
        INT8.bnb_config(skip_modules=["lm_head"])
    with pytest.raises(MismatchError, match=r"(?s)colour.*Leave it out.*weight"):
        NF4.bnb_config(colour=1, weight=2)


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        (QLORA_ZERO2, {"stage": 5}, "stage: got 5"),
        (QLORA_ZERO2, {"stage": "2"}, "stage: got '2'"),
        (QLORA_ZERO2, {"precision": "bf-16"}, "precision: got 'bf-16'"),
        (QLORA_ZERO2, {"optimizer_offload": "CPU"}, "optimizer_offload: got 'CPU'"),
        (QLORA_ZERO2, {"micro_batch": "4"}, "micro_batch: got '4'"),
        (QLORA_ZERO2, {"r": 0}, "r: got 0"),
        (NF4, {"quant_type": "nf5"}, "quant_type: got 'nf5'"),
        (NF4, {"quant_type": "INT8"}, "quant_type: got 'INT8'"),
    ],
)
def test_a_changed_preset_has_values_that_mean_something(preset, change, message):
    with pytest.raises(MismatchError, match=message):
        dataclasses.replace(preset, **change)


def test_settings_of_the_other_width_are_refused():
    with pytest.raises(MismatchError, match="bnb_4bit_quant_type"):
        INT8.bnb_config(bnb_4bit_quant_type="nf4")
    with pytest.raises(MismatchError, match="load_in_8bit"):
        NF4.bnb_config(load_in_8bit=True)
