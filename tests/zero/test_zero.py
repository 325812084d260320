"""The guard: every combination and trap, in a case that is wrong and in its neighbour that is right."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from lorasync.errors import ZeroIncompatibilityError
from lorasync.load import close_avx512_trap, load_quantized
from lorasync.presets import INT8, NF4
from lorasync.zero import (
    Fsdp2,
    Versions,
    ZeroPlan,
    check_zero,
    inspect_path,
    inspect_zero,
    read_settings,
)

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
PLAN = ZeroPlan(LlamaConfig(**TINY), NF4)
OLD = Versions("0.12.2", "4.44.2", "0.47.0", "0.7.0", "0.20.0", "2.1.0")


def config(stage: int = 2, dtype: str = "bf16", **zero: object) -> dict[str, object]:
    settings: dict[str, object] = {"zero_optimization": {"stage": stage, **zero}}
    return settings if dtype == "fp32" else {**settings, dtype: {"enabled": True}}


def codes(model: object, ds_config: object = None, severity: str | None = None, **extra: object) -> set[str]:
    report = inspect_zero(model, config() if ds_config is None else ds_config, **extra)
    return {f.code for f in report.findings if severity in (None, f.severity)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).to(torch.bfloat16).save_pretrained(path)
    return str(path)


def nf4(path: str, **load: object) -> nn.Module:
    return get_peft_model(load_quantized(path, NF4, progress=False, **load), lora())


def lora(**settings: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


# ── storage and engine dtype
# ─────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("engine", "storage", "wrong"),
    [
        ("bf16", torch.uint8, False),
        ("bf16", torch.bfloat16, False),
        ("bf16", torch.float16, True),
        ("bf16", torch.float32, True),
        ("fp16", torch.float16, False),
        ("fp16", torch.bfloat16, True),
        ("fp32", torch.bfloat16, False),
        ("fp32", torch.float32, False),
    ],
)
def test_float_storage_has_to_be_the_engines_dtype(
    stage: int, engine: str, storage: torch.dtype, wrong: bool
):
    found = codes(replace(PLAN, storage_dtype=storage), config(stage, engine), "error")
    assert ("storage-cast" in found) == wrong


def test_a_live_model_gives_the_same_verdict_as_its_plan(saved: str):
    model = nf4(saved, storage_dtype=torch.float16)
    with pytest.raises(ZeroIncompatibilityError, match="bnb_4bit_quant_storage = float16") as caught:
        check_zero(model, config())
    assert "storage_dtype=torch.uint8" in str(caught.value)
    assert caught.value.report.errors[0].code == "storage-cast"
    assert check_zero(nf4(saved), config()).ok


# ── traps of a live model
# ────────────────────────────────────────────────────────────────────────────────────────
def test_the_open_avx512_trap_is_an_error_in_eval_and_a_warning_in_train_mode(saved: str):
    model = nf4(saved)
    assert "avx512-trap" not in codes(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True  # what bitsandbytes sets on such a CPU
    assert "avx512-trap" in codes(model, severity="warning")
    model.eval()
    assert "avx512-trap" in codes(model, severity="error")
    assert close_avx512_trap(model) == 7
    assert "avx512-trap" not in codes(model)


def test_weights_that_were_repacked_already_are_an_error(saved: str):
    model = nf4(saved)
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    layer.weight.quant_state.packing_format_for_cpu = True
    assert "weights-repacked" in codes(model, severity="error")


def test_nothing_trainable_is_an_error(saved: str):
    bare = load_quantized(saved, NF4, progress=False)
    assert "no-adapter" in codes(bare, severity="error")
    assert "no-adapter" not in codes(nf4(saved))


def test_reentrant_checkpointing_without_input_gradients_is_an_error(saved: str):
    model = nf4(saved)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert "reentrant-checkpointing" not in codes(model)
    model.get_input_embeddings()._forward_hooks.clear()
    assert "reentrant-checkpointing" in codes(model, severity="error")


def test_the_kbit_upcast_is_seen(saved: str):
    from peft import prepare_model_for_kbit_training

    base = load_quantized(saved, NF4, progress=False, gradient_checkpointing=False)
    assert "kbit-upcast" not in codes(get_peft_model(base, lora()))
    upcast = prepare_model_for_kbit_training(load_quantized(saved, NF4, progress=False))
    assert "kbit-upcast" in codes(get_peft_model(upcast, lora()), severity="warning")


def test_tied_embeddings_with_one_adapted_side():
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "tie_word_embeddings": True}))
    assert "tied-adapter" in codes(
        get_peft_model(model, lora(target_modules=["embed_tokens"])), severity="warning"
    )
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    assert "tied-adapter" not in codes(get_peft_model(model, lora(target_modules=["embed_tokens"])))
    tied = ZeroPlan(
        LlamaConfig(**{**TINY, "tie_word_embeddings": True}), lora=lora(modules_to_save=["lm_head"])
    )
    assert "tied-adapter" in codes(tied)


def test_a_model_spread_over_devices_is_an_error(saved: str):
    model = nf4(saved)
    model.get_base_model().hf_device_map = {"model.layers.0": 0, "lm_head": 1}
    assert "device-map" in codes(model, severity="error")
    model.get_base_model().hf_device_map = {"": 0}
    assert "device-map" not in codes(model)
    assert "device-map" in codes(replace(PLAN, device_map="auto"), severity="error")
    assert "device-map" in codes(replace(PLAN, device_map={"": 0}), config(3), "error")
    assert "device-map" not in codes(replace(PLAN, device_map={"": 0}), config(2))


def test_another_compute_dtype_than_the_engines_is_a_warning():
    assert "compute-dtype" in codes(replace(PLAN, dtype=torch.float32), config(), "warning")
    assert "compute-dtype" not in codes(PLAN)


# ── ZeRO-3's own options
# ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("code", "zero"),
    [
        ("all-reduce-fetch", {"stage3_use_all_reduce_for_fetch_params": True}),
        ("zeropp-weights", {"zero_quantized_weights": True}),
        ("zeropp-weights", {"zero_quantized_nontrainable_weights": True}),
        ("nvme-params", {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}),
    ],
)
def test_options_that_treat_packed_bytes_as_numbers(code: str, zero: dict[str, object]):
    for preset in (NF4, INT8):
        assert code in codes(replace(PLAN, quantization=preset), config(3, **zero), "error")
    assert code not in codes(replace(PLAN, quantization=None), config(3, **zero))


@pytest.mark.parametrize(
    "zero",
    [
        {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        {"zero_hpz_partition_size": 2},
        {"offload_param": None},
    ],
)
def test_options_that_work_raise_no_alarm(zero: dict[str, object]):
    report = inspect_zero(PLAN, config(3, **zero))
    assert report.ok
    assert not report.warnings


def test_remarks_on_zero3():
    assert "int8-not-sharded" in codes(replace(PLAN, quantization=INT8), config(3), "warning")
    assert "int8-not-sharded" not in codes(replace(PLAN, quantization=INT8), config(2))
    assert {"whole-model-load", "adapter-dtype"} <= codes(PLAN, config(3), "note")
    assert "zeropp-lossy" in codes(
        replace(PLAN, quantization=None), config(3, zero_quantized_weights=True), "error"
    )
    assert "offload-stage" in codes(PLAN, config(2, offload_param={"device": "cpu"}), "warning")
    assert "offload-stage" in codes(PLAN, config(0, offload_optimizer={"device": "cpu"}), "warning")


def test_fused_experts_are_named():
    moe = Qwen3MoeConfig(
        **TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    )
    assert "experts-not-quantized" in codes(ZeroPlan(moe, NF4), severity="note")
    assert "experts-not-quantized" not in codes(PLAN)


def test_fsdp2_takes_packed_weights_in_bytes_and_casts_those_in_another_float():
    """Bytes: tests/source/test_ranks.py trains and merges them."""
    assert not inspect_zero(PLAN, Fsdp2()).findings
    assert not inspect_zero(replace(PLAN, storage_dtype=torch.bfloat16), Fsdp2()).findings
    assert "fsdp2-storage" in codes(replace(PLAN, storage_dtype=torch.float32), Fsdp2(), "error")
    older = replace(Versions.installed(), torch="2.12.0")
    assert "fsdp2-storage" in codes(PLAN, Fsdp2(), "warning", versions=older)


def test_fsdp1_flattens_one_float_dtype():
    plugin = SimpleNamespace(fsdp_version=1, mixed_precision_policy=None)
    assert codes(PLAN, plugin, "error") == {"fsdp1-storage"}
    assert "fsdp1-storage" not in codes(replace(PLAN, storage_dtype=torch.bfloat16), plugin)


def test_which_fsdp_is_read_from_arguments_and_plugin():
    arguments = SimpleNamespace(
        per_device_train_batch_size=1,
        bf16=True,
        fp16=False,
        deepspeed=None,
        hf_deepspeed_config=None,
        fsdp="full_shard",
    )
    for options, expected in (
        ({"version": 1}, "fsdp1"),
        ({"version": 2}, "fsdp2"),
        ({}, "fsdp2"),
        (None, "fsdp2"),
    ):
        assert read_settings(SimpleNamespace(**vars(arguments), fsdp_config=options)).framework == expected
    for version in (1, 2):
        plugin = SimpleNamespace(fsdp_version=version, mixed_precision_policy=None)
        assert read_settings(plugin).framework == f"fsdp{version}"


# ── versions
# ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_old_stacks_get_another_verdict(saved: str):
    bare = load_quantized(saved, NF4, progress=False)
    bare.lm_head.requires_grad_(True)
    assert "old-stack" in codes(bare, severity="error", versions=OLD)
    assert "old-stack" not in codes(bare)
    report = inspect_zero(bare, config(), versions=OLD)
    assert any("`.to` is not supported" in f.symptom for f in report.errors)
    assert "transformers 4.44.2" in str(report)


def test_old_deepspeed_gathers_one_dtype_only():
    assert "old-stack" in codes(PLAN, config(3), "error", versions=OLD)
    assert "old-stack" not in codes(PLAN, config(2), versions=OLD)
    assert "old-stack" not in codes(PLAN, config(3), versions=replace(OLD, deepspeed="0.12.3"))


# ── forms of the config
# ──────────────────────────────────────────────────────────────────────────────────────────
def test_every_form_of_a_config_is_read_alike(tmp_path, monkeypatch: pytest.MonkeyPatch):
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    wanted = config(3, offload_optimizer={"device": "cpu"})
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(wanted))
    hf = HfDeepSpeedConfig({**wanted, "train_micro_batch_size_per_gpu": 1})
    unset_hf_deepspeed_config()
    plugin = SimpleNamespace(hf_ds_config=hf)
    engine = SimpleNamespace(zero_optimization_stage=lambda: 3, config=wanted)
    for form in (wanted, str(file), file, hf, plugin, engine):
        settings = read_settings(form)
        assert (settings.stage, settings.engine_dtype, settings.optimizer_offload) == (
            3,
            torch.bfloat16,
            "cpu",
        )


def test_training_arguments_resolve_auto(tmp_path):
    raw = {**config(2, "fp32"), "bf16": {"enabled": "auto"}}
    assert "auto-precision" in codes(PLAN, raw, "warning")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(raw))
    arguments = SimpleNamespace(
        per_device_train_batch_size=1,
        bf16=True,
        fp16=False,
        deepspeed=str(file),
        hf_deepspeed_config=None,
        fsdp="",
    )
    assert read_settings(arguments).engine_dtype == torch.bfloat16
    assert (
        read_settings(
            SimpleNamespace(**{**vars(arguments), "deepspeed": None, "fsdp": "full_shard"})
        ).framework
        == "fsdp2"
    )


def test_real_training_arguments_and_plugin_are_accepted(tmp_path):
    from accelerate import DeepSpeedPlugin
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    file = tmp_path / "ds.json"
    raw = {**config(3, "fp32"), "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto"}
    file.write_text(json.dumps(raw))
    try:
        arguments = TrainingArguments(output_dir=str(tmp_path), deepspeed=str(file), bf16=True, use_cpu=True)
        settings = read_settings(arguments)
        assert (settings.stage, settings.engine_dtype) == (3, torch.bfloat16)
        assert read_settings(DeepSpeedPlugin(hf_ds_config=config(3))).stage == 3
    finally:
        unset_hf_deepspeed_config()


def test_unreadable_configs_give_one_clear_error(tmp_path):
    broken = tmp_path / "ds.json"
    broken.write_text("{")
    listed = tmp_path / "list.json"
    listed.write_text("[]")
    for form, words in [
        (tmp_path / "absent.json", "can't be read"),
        (broken, "no JSON"),
        (listed, "list"),
        (7, "expected a DeepSpeed config"),
        ({"zero_optimization": {"stage": 4}}, "expected 0, 1, 2 or 3"),
        (None, "only an engine or an FSDP2 model"),
    ]:
        with pytest.raises(ZeroIncompatibilityError, match=words):
            inspect_zero(PLAN, form)


def test_only_models_engines_and_plans_are_judged():
    with pytest.raises(TypeError, match="got str"):
        inspect_zero("model", config())


# ── the report
# ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_report_is_sorted_and_has_an_exit_code_for_scripts():
    report = inspect_zero(replace(PLAN, storage_dtype=torch.float16), config(3, zero_quantized_weights=True))
    kinds = [f.severity for f in report.findings]
    assert kinds == sorted(kinds, key=["error", "warning", "note"].index)
    assert len(report.rows()[0]) == len(report.COLUMNS)
    assert (report.ok, report.exit_code) == (False, 1)
    assert inspect_zero(PLAN, config()).exit_code == 0
    assert inspect_zero(replace(PLAN, dtype=torch.float32), config()).exit_code == 3


def test_inspect_path_judges_a_checkpoint_from_its_config(saved: str, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config(3, stage3_use_all_reduce_for_fetch_params=True)))
    assert inspect_path(saved, str(file)).ok
    assert [f.code for f in inspect_path(saved, str(file), preset=NF4).errors] == ["all-reduce-fetch"]
    load_quantized(saved, NF4, progress=False, storage_dtype=torch.float16).save_pretrained(
        tmp_path / "packed"
    )
    packed = inspect_path(str(tmp_path / "packed"), str(file))
    assert {f.code for f in packed.errors} == {"storage-cast", "all-reduce-fetch"}
    nf4(saved).save_pretrained(tmp_path / "adapter")
    assert inspect_path(str(tmp_path / "adapter"), str(file)).ok


def test_every_code_and_symptom_is_explained_on_the_page(request: pytest.FixtureRequest):
    from lorasync.zero import rules

    page = (request.config.rootpath / "docs" / "zero.md").read_text()
    files = (request.config.rootpath / "lorasync" / "zero" / "rules").glob("*.py")
    source = "\n".join(file.read_text() for file in sorted(files))
    named = {
        line.split('"')[1]
        for line in source.splitlines()
        if line.strip().startswith('"') and line.count('"') == 2
    }
    found = {name for name in named if f"### `{name}`" in page}
    assert len(found) >= len(rules.RULES)
    for message in MESSAGES:
        assert message in page, message


MESSAGES = [
    "`.to` is not supported for `4-bit` or `8-bit`",
    "DeepSpeed Zero-3 is not compatible with passing a `device_map`",
    "`.half()` is not supported for quantized model",
    "You cannot cast a bitsandbytes model in a new `dtype`",
    "You cannot perform fine-tuning on purely quantized models",
    "You can't train a model that has been loaded with `device_map='auto'` in any distributed mode",
    "Nested GatheredParameters contexts cannot overlap parameters",
    "Detected in-place modification of ZeRO-3 parameters",
    "expected there to be only one unique element",
    "shape '[64, 32]' is invalid for input of size 0",
    "ZeroDivisionError",
    "LoRA tensor(s) have invalid shape",
    "Cannot flatten integer dtype tensors",
    "assert param_data.shape == loaded_weight.shape",
    "There is no module or parameter named 'base_model'",
]
