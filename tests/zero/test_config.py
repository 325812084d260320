"""DeepSpeed configs are read as DeepSpeed reads them: either name of a setting counts, and no misspelt key does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from lorasync.errors import ZeroIncompatibilityError
from lorasync.presets import NF4
from lorasync.spelling import nearest
from lorasync.zero import ZeroPlan, check_zero, inspect_zero, keys, read_settings, section

zero_config = pytest.importorskip("deepspeed.runtime.zero.config")
MODEL = zero_config.DeepSpeedZeroConfig
PLAN = ZeroPlan(
    LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    ),
    NF4,
)
ALIASED = sorted((name, field.alias) for name, field in MODEL.model_fields.items() if field.alias)


@pytest.fixture(params=["DeepSpeed's model", "the table"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "the table":
        monkeypatch.setattr(section, "deepspeed_model", lambda: None)
    return str(request.param)


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **settings}, "bf16": {"enabled": True}}


def other(name: str) -> Any:
    """Return a value of a field that is not its default."""
    default = MODEL.model_fields[name].default
    return (not default) if isinstance(default, bool) else int(default) // 2 + 1


# ── both names of a setting
# ──────────────────────────────────────────────────────────────────────────────────────
def test_there_are_fields_with_two_names_and_the_table_has_them_all():
    assert len(ALIASED) >= 9
    assert dict(ALIASED) == {name: keys.ALIASES[name] for name, _ in ALIASED}
    assert set(MODEL.model_fields) <= keys.SECTIONS[("zero_optimization",)]


@pytest.mark.parametrize(("name", "alias"), ALIASED)
def test_both_names_of_a_setting_give_the_same_settings(reader: str, name: str, alias: str):
    by_name, by_alias = (read_settings(zero(**{key: other(name)})) for key in (name, alias))
    assert by_name == by_alias
    assert by_name != read_settings(zero())
    assert by_name.zero[name] == other(name)


@pytest.mark.parametrize(
    "name", ["use_all_reduce_for_fetch_params", "stage3_use_all_reduce_for_fetch_params"]
)
@pytest.mark.parametrize("value", [True, 1, "true", "True", "yes"])
def test_the_verdict_depends_on_neither_the_name_nor_the_way_to_write_true(
    reader: str, name: str, value: Any
):
    assert [f.code for f in inspect_zero(PLAN, zero(**{name: value})).errors] == ["all-reduce-fetch"]


@pytest.mark.parametrize(("name", "alias"), ALIASED)
@pytest.mark.parametrize("same", [True, False])
def test_a_setting_under_both_names_is_refused_as_deepspeed_does(
    reader: str, name: str, alias: str, same: bool
):
    given = {name: other(name), alias: other(name) if same else MODEL.model_fields[name].default}
    with pytest.raises(ValueError, match="Extra inputs"):
        MODEL(**given)
    with pytest.raises(ZeroIncompatibilityError, match=f"both {name}=.* and {alias}="):
        check_zero(PLAN, zero(**given))


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"stage": "3"}, "stage", 3),
        ({"stage": 3.0}, "stage", 3),
        ({"cpu_offload": True}, "optimizer_offload", "cpu"),
        ({"cpu_offload_param": True}, "param_offload", "cpu"),
        ({"cpu_offload_param": False}, "param_offload", "none"),
        ({"offload_param": {"device": "nvme"}}, "param_offload", "nvme"),
        ({"offload_param": {"device": "auto"}}, "param_offload", "none"),
        ({"offload_param": None}, "param_offload", "none"),
        ({"zero_quantized_weights": "on"}, "quantized_weights", True),
        ({"zero_quantized_weights": "auto"}, "quantized_weights", False),
        ({"zero_quantized_nontrainable_weights": 1}, "quantized_nontrainable_weights", True),
        ({"zero_hpz_partition_size": 2}, "hpz", 2),
    ],
)
def test_values_are_read_as_deepspeed_reads_them(reader: str, given: dict[str, Any], field: str, value: Any):
    assert getattr(read_settings(zero(**given)), field) == value


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        ({"zero_optimization": True}, 1),
        ({"zero_optimization": False}, 0),
        ({"zero_optimization": None}, 0),
        ({}, 0),
    ],
)
def test_the_deprecated_forms_of_the_section(reader: str, config: dict[str, Any], stage: int):
    assert read_settings(config).stage == stage


@pytest.mark.parametrize("value", [1, "true", True])
def test_a_precision_is_on_in_any_way_to_write_true(value: Any):
    assert read_settings({"bf16": {"enabled": value}}).engine_dtype == torch.bfloat16
    assert read_settings({"bf16": None, "bfloat16": {"enabled": value}}).engine_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (zero(offload_param={"device": "ssd"}), "offload_param"),
        (zero(cpu_offload_param=True, offload_param={"device": "nvme"}), "cpu_offload_param"),
        (zero(zero_quantized_weights="maybe"), "zero_quantized_weights"),
        ({"zero_optimization": 3}, "expected a section"),
        ({"zero_optimization": {"stage": "three"}}, "expected 0, 1, 2 or 3"),
        ({"bf16": True}, "bf16: got True"),
        ({"bf16": {"enabled": "maybe"}}, r"bf16\.enabled: got 'maybe'"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "got both true"),
    ],
)
def test_values_that_deepspeed_refuses_are_refused(reader: str, config: dict[str, Any], words: str):
    with pytest.raises(ZeroIncompatibilityError, match=words):
        read_settings(config)


def test_a_key_that_stands_twice_in_a_file_is_refused(tmp_path: Path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3, "stage": 2}}')
    with pytest.raises(ZeroIncompatibilityError, match="got stage more than once"):
        read_settings(file)


# ── keys that DeepSpeed doesn't know
# ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("config", "wrong", "meant"),
    [
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation", "zero_optimization"),
        ({"zero-optimization": {"stage": 3}}, "zero-optimization", "zero_optimization"),
        ({"zero": {"stage": 3}}, "zero", "zero_optimization"),
        ({"microbatch": 4}, "microbatch", "train_micro_batch_size_per_gpu"),
        ({"stage": 3}, "stage", "zero_optimization.stage"),
        (zero(stge=3), "zero_optimization.stge", "zero_optimization.stage"),
        (zero(bf16={"enabled": True}), "zero_optimization.bf16", "bf16 at the top"),
        (zero(offload_params={}), "zero_optimization.offload_params", "zero_optimization.offload_param"),
        (
            zero(offload_param={"devise": "cpu"}),
            "zero_optimization.offload_param.devise",
            "zero_optimization.offload_param.device",
        ),
        (
            zero(offload_optimizer={"pinned_memory": True}),
            "zero_optimization.offload_optimizer.pinned_memory",
            "zero_optimization.offload_optimizer.pin_memory",
        ),
        ({"bf16": {"enable": True}}, "bf16.enable", "bf16.enabled"),
        ({"fp16": {"loss_scales": 0}}, "fp16.loss_scales", "fp16.loss_scale"),
        ({"optimizer": {"type": "AdamW", "param": {}}}, "optimizer.param", "optimizer.params"),
        (
            {"optimizer": {"type": "AdamW", "params": {"beta": 1}}},
            "optimizer.params.beta",
            "optimizer.params.betas",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 1}}},
            "scheduler.params.warmup_steps",
            "scheduler.params.warmup_num_steps",
        ),
        (
            {"data_types": {"grad_acum_dtype": "fp32"}},
            "data_types.grad_acum_dtype",
            "data_types.grad_accum_dtype",
        ),
        (
            {"activation_checkpointing": {"cpu_checkpoint": True}},
            "activation_checkpointing.cpu_checkpoint",
            "activation_checkpointing.cpu_checkpointing",
        ),
    ],
)
def test_a_misspelt_key_is_named_with_the_one_that_was_meant(
    reader: str, config: dict[str, Any], wrong: str, meant: str
):
    with pytest.raises(ZeroIncompatibilityError, match=rf"\n  {wrong}: got a key .* Did you mean {meant}\?"):
        check_zero(PLAN, config)


def _paths(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _paths(value, (*path, key))


KINDS = {"optimizer": "AdamW", "scheduler": "WarmupLR"}


def _slipped(path: tuple[str, ...]) -> dict[str, Any]:
    *sections, key = path
    config: dict[str, Any] = {key[:2] + key[3:]: {} if path in keys.SECTIONS else 1}
    for name in reversed(sections):
        config = {name: config, **({"type": KINDS[path[0]]} if name == "params" else {})}
    return config


@pytest.mark.parametrize("path", sorted(keys.SECTIONS), ids=lambda path: ".".join(path) or "top")
def test_any_key_of_any_section_less_its_third_letter_is_found(reader: str, path: tuple[str, ...]):
    missed = []
    for key in sorted(section.known_keys()[path]):
        if len(key) < 5:
            continue
        with pytest.raises(ZeroIncompatibilityError) as caught:
            read_settings(_slipped((*path, key)))
        if f"Did you mean {'.'.join((*path, key))}?" not in str(caught.value):
            missed.append((key, str(caught.value)))
    assert missed == []


def test_all_wrong_keys_are_in_one_message():
    wrong = {"zero_optimization": {"stge": 3}, "optimiser": {}, "fp16": {"enable": True}}
    with pytest.raises(ZeroIncompatibilityError) as caught:
        read_settings(wrong)
    assert str(caught.value).count("Did you mean") == 3


def test_a_key_that_resembles_none_is_a_warning_where_deepspeed_ignores_it_and_an_error_where_it_refuses():
    report = inspect_zero(PLAN, {**zero(), "my_experiment": 7})
    assert report.ok
    assert [(f.code, f.key) for f in report.warnings] == [("ignored-key", "my_experiment")]
    with pytest.raises(ZeroIncompatibilityError, match="refuses it"):
        read_settings(zero(my_experiment=7))


@pytest.mark.parametrize(
    "config",
    [
        {
            "_comment": "",
            "#": "",
            "gradient_clipping_mode": 1,
            "optimizer": {"type": "Lion", "params": {"beta": 1}},
        },
        {"sequence_parallel_size": 2, "train_batch_size": "auto", "wandb": {"enabled": False}},
        {"compression_training": {"weight_quantization": {}}, "tensor_parallel": {"autotp_size": 2}},
    ],
)
def test_remarks_newer_keys_and_sections_that_are_not_known_are_no_errors(config: dict[str, Any]):
    read_settings(config)


def test_nothing_is_near_to_everything():
    assert nearest("comment", ["zero_optimization", "optimizer"]) is None
    assert nearest("lr", keys.SECTIONS[()]) is None


def test_a_config_is_read_where_deepspeed_is_not_installed():
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from lorasync.zero import read_settings\n"
        f"print(read_settings({zero(use_all_reduce_for_fetch_params=True)!r}).all_reduce_fetch)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "True", done.stderr


def test_the_configs_that_deepspeed_itself_takes_are_taken(reader: str):
    config = {
        **zero(**{alias: other(name) for name, alias in ALIASED}, leaf_module={"classes": ["A"]}),
        "fp16": {"enabled": False, "loss_scale": 0, "auto_cast": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "train_micro_batch_size_per_gpu": 1,
    }
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(json.loads(json.dumps(config)))
    assert read_settings(config).ignored == ()
