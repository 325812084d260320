"""load_quantized: what it makes trainable, what it reports, one clear error for all that can be wrong."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, T5Config

from lorasync.errors import LoadError, ZeroIncompatibilityError
from lorasync.load import checks, close_avx512_trap, load_quantized, loader
from lorasync.model_size import count_weights, skeleton
from lorasync.presets import FP4, INT8, NF4, QLORA_ZERO2, QuantPreset
from lorasync.zero import inspect_zero

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).to(torch.bfloat16).save_pretrained(path)
    return str(path)


def load(path: object, preset: QuantPreset = NF4, **settings: object) -> nn.Module:
    return load_quantized(path, preset, progress=False, **settings)


def up_proj(model: nn.Module) -> nn.Module:
    return model.model.layers[0].mlp.up_proj


def dequantized(layer: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


# ── what comes back
# ──────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("preset", [NF4, FP4, INT8], ids=lambda preset: preset.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_ready_to_train(tiny: str, preset: QuantPreset, dtype: torch.dtype):
    model = load(tiny, preset, dtype=dtype)
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
    layer = model.model.layers[0]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is False
    loss = model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    assert loss.requires_grad  # through the embedding's output, which is what checkpointed adapters need
    assert torch.isfinite(loss)


def test_an_adapter_on_it_learns(tiny: str):
    from peft import get_peft_model

    model = get_peft_model(load(tiny, dtype=torch.float32), QLORA_ZERO2.lora_config(r=4))
    batch = torch.tensor([[1, 2, 3, 4, 5]])
    before = dequantized(up_proj(model.get_base_model()).base_layer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(before, dequantized(up_proj(model.get_base_model()).base_layer))


def test_the_report_says_what_was_quantized_and_what_was_not(tiny: str):
    report = load(tiny).lorasync_report
    assert len(report.quantized) == 14
    assert {name for name, _, _ in report.kept} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert report.bytes_after < report.bytes_before
    assert (report.preset, report.dtype, report.storage_dtype) == ("NF4", "bfloat16", "uint8")
    assert report.seconds > 0
    assert "lm_head.weight" in str(report)


def test_fused_experts_stay_16_bit_and_the_report_says_so(tmp_path: Path):
    config = Qwen3MoeConfig(
        **TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    report = load(tmp_path).lorasync_report
    assert "fused expert tensors stay bfloat16" in str(report)
    assert all("experts" not in name for name in report.quantized)


@pytest.mark.parametrize("preset", [NF4, QuantPreset("NF4 single", "nf4"), FP4, INT8], ids=lambda p: p.name)
def test_the_estimate_agrees_with_what_was_loaded(tmp_path: Path, preset: QuantPreset):
    config = LlamaConfig(**{**TINY, "vocab_size": 500, "hidden_size": 256, "intermediate_size": 512})
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    weights = count_weights(skeleton(config), quantize=True)
    report = load(tmp_path, preset).lorasync_report
    assert weights.bytes(preset, torch.bfloat16) == pytest.approx(report.bytes_after, rel=0.02)


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
}
OTHER_KINDS = {
    "T5ForConditionalGeneration": {
        "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 256
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {**SMALL, "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        "vision_config": {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64},
    },
    "LlavaForConditionalGeneration": {
        "text_config": LlamaConfig(**SMALL),
        "vision_config": {k: v for k, v in SMALL.items() if k != "vocab_size"} | {
            "model_type": "clip_vision_model", "image_size": 32, "patch_size": 16
        },
    },
    "LlamaForSequenceClassification": SMALL,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_checkpoint_is_loaded_by_the_class_that_wrote_it(name: str, tmp_path: Path):
    kind = getattr(transformers, name)
    kind(kind.config_class(**OTHER_KINDS[name])).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert type(model) is kind
    assert model.lorasync_report.quantized
    report = inspect_zero(model, {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}})
    assert [finding.code for finding in report.errors] == ["no-adapter"]


def test_a_checkpoint_of_no_known_class_is_refused_with_what_it_names(tiny: str, tmp_path: Path):
    config = json.loads(Path(tiny, "config.json").read_text()) | {"architectures": ["LlamaForFortuneTelling"]}
    T5Config(architectures=["T5ForFortuneTelling"]).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"T5ForFortuneTelling.*expected architectures"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(Path(tiny, "model.safetensors"), tmp_path)
    assert type(load(tmp_path)).__name__ == "LlamaForCausalLM"  # the one of its kind


def test_skip_modules_and_storage_dtype_are_passed_on(tiny: str):
    model = load(tiny, skip_modules=["lm_head", "up_proj"], storage_dtype=torch.bfloat16)
    assert type(up_proj(model)) is nn.Linear
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("preset", [NF4, FP4, INT8], ids=lambda preset: preset.name)
def test_a_checkpoint_that_bitsandbytes_quantized_is_taken_as_it_is(
    tiny: str, tmp_path: Path, preset: QuantPreset
):
    first = load(tiny, preset)
    first.save_pretrained(tmp_path)
    again = load(tmp_path, preset, dtype=torch.bfloat16)
    assert again.lorasync_report.prequantized
    assert torch.equal(up_proj(first).weight.data, up_proj(again).weight.data)
    other = FP4 if preset is NF4 else NF4
    with pytest.raises(LoadError, match=f"got preset {other.name}, expected {preset.name}"):
        load(tmp_path, other)
    if preset.bits == 4:
        with pytest.raises(LoadError, match="packed in it already"):
            load(tmp_path, preset, storage_dtype=torch.bfloat16)


def test_the_progress_bar_is_off_when_asked_and_left_as_it_was(tiny: str, capfd: pytest.CaptureFixture[str]):
    from transformers.utils import logging

    logging.enable_progress_bar()
    load(tiny)
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
    load_quantized(tiny, NF4)
    assert "Loading weights" in capfd.readouterr().err


# ── the AVX512 trap
# ──────────────────────────────────────────────────────────────────────────────────────────────
def eval_forward(model: nn.Module) -> None:
    # Without the instruction set the product with a repacked weight can't be computed; the repacking itself
    # can.
    with torch.no_grad(), suppress(Exception):
        model.eval()(input_ids=torch.tensor([[1, 2, 3]]))


def test_the_avx512_trap_is_closed(tiny: str, monkeypatch: pytest.MonkeyPatch):
    import bitsandbytes.nn.modules as modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    model = load(tiny)
    before = dequantized(up_proj(model))
    eval_forward(model)
    assert torch.equal(before, dequantized(up_proj(model)))
    assert close_avx512_trap(model) == 0


def test_the_avx512_trap_is_real(tiny: str):
    model = load(tiny)
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    packed = up_proj(model).weight.data.clone()
    eval_forward(model)
    changed = [m for m in layers if getattr(m.weight.quant_state, "packing_format_for_cpu", False)]
    assert changed or not torch.equal(packed, up_proj(model).weight.data)


# ── errors
# ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_rows_that_this_cpu_reads_wrong_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whether bitsandbytes reads rows of 96 wrong is the CPU's doing; a kernel that does not is made to."""
    path = str(tmp_path)
    LlamaForCausalLM(LlamaConfig(**{**TINY, "intermediate_size": 96})).save_pretrained(path)
    monkeypatch.setattr(
        functional, "dequantize_4bit", lambda packed, state: torch.zeros(state.shape).to(state.dtype)
    )
    with pytest.raises(
        LoadError, match=r"reads 2 4-bit weights wrong on this CPU, .*down_proj.*skip_modules"
    ):
        load_quantized(path, NF4, device="cpu")
    assert load_quantized(path, NF4, device="cpu", skip_modules=["down_proj", "lm_head"])


def test_a_gpu_without_a_number_is_this_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert loader._device("cuda") == torch.device("cuda", 3)
    assert loader._device("cuda:1") == torch.device("cuda", 1)
    assert loader._device("cpu") == torch.device("cpu")


def test_bitsandbytes_missing_or_too_old(tiny: str, monkeypatch: pytest.MonkeyPatch):
    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(checks, "version", missing)
    with pytest.raises(LoadError, match=r"not installed.*pip install 'lorasync\[qlora\]'"):
        load(tiny)
    monkeypatch.setattr(checks, "version", lambda _: "0.41.0")
    with pytest.raises(LoadError, match=r"bitsandbytes is 0\.41\.0, expected >= 0\.46\.1"):
        load(tiny)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_checkpoints_quantized_otherwise_are_refused(tiny: str, tmp_path: Path, method: str):
    config = json.loads(Path(tiny, "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method}})
    )
    with pytest.raises(LoadError, match=rf"quantized by {method.upper()}.*original 16-bit"):
        load(tmp_path)


def test_wrong_paths_say_what_lies_there(tiny: str, tmp_path: Path):
    with pytest.raises(LoadError, match="no such directory"):
        load(tmp_path / "absent")
    with pytest.raises(LoadError, match="it holds: nothing"):
        load(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(LoadError, match="quantized by GGUF"):
        load(tmp_path)
    with pytest.raises(LoadError, match="quantized by GGUF"):
        load(tmp_path / "model.gguf")
    with pytest.raises(LoadError, match="quantized by GGUF"):
        load(tiny, gguf_file="model.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadError, match="got a PEFT adapter"):
        load(tmp_path)
    with pytest.raises(LoadError, match="HF_HUB_OFFLINE"):
        load("nobody/no-such-model")
    (tmp_path / "config.json").write_text(Path(tiny, "config.json").read_text())
    with pytest.raises(LoadError, match="no readable weights"):
        load(tmp_path)


def test_a_device_map_is_refused(tiny: str):
    with pytest.raises(LoadError, match="DeepSpeed Zero-3 is not compatible with passing a device_map"):
        load(tiny, device_map="auto")


def test_what_cannot_fit_is_refused_before_it_is_loaded(tiny: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "available_bytes", lambda _: 1000)
    monkeypatch.setattr(loader, "_from_pretrained", lambda *_: pytest.fail("loaded all the same"))
    with pytest.raises(LoadError, match=r"got 1000 B free on cpu, expected .* KiB"):
        load(tiny)


def test_ranks_on_one_host_are_counted(tiny: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")
    with pytest.raises(LoadError, match="for 1000000 ranks on this host"):
        load(tiny)


def test_a_training_preset_or_a_bad_ds_config_is_refused(tiny: str):
    with pytest.raises(LoadError, match=r"pass its \.quantization"):
        load(tiny, QLORA_ZERO2)
    ds_config = QLORA_ZERO2.deepspeed_config(
        zero_optimization={"stage": 3, "stage3_use_all_reduce_for_fetch_params": True}
    )
    with pytest.raises(ZeroIncompatibilityError, match="all-reduce-fetch"):
        load(tiny, ds_config=ds_config)
    assert load(tiny, ds_config=QLORA_ZERO2.deepspeed_config())


def rewritten(tiny: str, folder: Path, change: Any) -> Path:
    """The checkpoint with other tensors."""
    shutil.copytree(tiny, folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


DAMAGED = {
    "no norm": (lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"}, "no model.norm.weight"),
    "no q_proj": (
        lambda t: {n: v for n, v in t.items() if "q_proj" not in n},
        r"no model\.layers\.0\.self_attn\.q_proj",
    ),
    "other names": (lambda t: {f"foo.{n}": v for n, v in t.items()}, r"It has foo\."),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_checkpoint_that_lacks_weights_is_refused(tiny: str, tmp_path: Path, change: Any, message: str):
    with pytest.raises(LoadError, match=f"{message}.*is random|the rest is random.*{message}"):
        load(rewritten(tiny, tmp_path / "damaged", change))


def test_a_checkpoint_that_is_cut_off_is_refused(tiny: str, tmp_path: Path):
    shutil.copytree(tiny, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoadError, match="no readable weights"):
        load(tmp_path / "cut")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip_modules": "lm_head"}, r"got 'lm_head', expected a list"),
        ({"skip_modules": ["lm_haed"]}, r"lm_haed.*lm_head"),
        ({"quantization_config": object()}, "quantization_config"),
        ({"torch_dtype": torch.float16}, "torch_dtype.*dtype="),
        ({"config": LlamaConfig()}, "got config"),
        ({"dtype": "bfloat16"}, "dtype: got 'bfloat16'"),
    ],
)
def test_arguments_that_would_be_ignored_or_win_are_refused(
    tiny: str, settings: dict[str, Any], message: str
):
    with pytest.raises(LoadError, match=message):
        load(tiny, **settings)
