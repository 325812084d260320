"""Merging into packed bases, in whole or in part: what loads is what PEFT merges, or nothing is written."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lorasync.errors import LoadError, MismatchError
from lorasync.export import merge_to_disk
from tests import packed_bases
from tests.packed_bases import foreign_folder, fp8_folder, mxfp4_folder, rewrite
from tests.source.test_source import quantized
from tests.tiny import adapt, fill, same_bits

ATTENTION = {"target_modules": ["q_proj", "o_proj"]}


def load(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options})


def bases() -> dict[str, tuple[Any, dict[str, Any]]]:
    return {
        "fp8": (lambda p: fp8_folder(p, "qwen3"), {}),
        "fp8 in part": (lambda p: fp8_folder(p, "qwen3", skip=("lm_head", "layers.0", "o_proj")), {}),
        "fp8 untouched": (lambda p: fp8_folder(p, "qwen3", skip=("q_proj", "o_proj", "lm_head")), ATTENTION),
        "fp8 experts": (lambda p: fp8_folder(p, "qwen3-moe"), ATTENTION),
        "fp8 trained experts": (
            lambda p: fp8_folder(p, "qwen3-moe"),
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        ),
        "fp8, named as DeepSeek V4": (
            lambda p: fp8_folder(p, "qwen3", suffix="scale", instead="weight"),
            ATTENTION,
        ),
        "fp8, scales in bf16": (lambda p: fp8_folder(p, "qwen3", scale_dtype=torch.bfloat16), ATTENTION),
        "mxfp8": (lambda p: fp8_folder(p, "qwen3", method="mxfp8"), ATTENTION),
        "mxfp4": (mxfp4_folder, ATTENTION),
        "mxfp4 trained experts": (
            mxfp4_folder,
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
        ),
    }


@pytest.mark.parametrize("kind", list(bases()))
def test_the_merged_folder_loads_as_what_peft_merges(kind: str, tmp_path: Path) -> None:
    make, config = bases()[kind]
    base = make(tmp_path / "base")
    model = adapt(load(base), **config)
    model.save_pretrained(tmp_path / "adapter")
    out = merge_to_disk(base, tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    merged = load(out)
    expected = model.merge_and_unload().state_dict()
    assert merged.state_dict().keys() == expected.keys()
    assert [n for n, t in merged.state_dict().items() if not same_bits(t, expected[n])] == []
    ids = torch.arange(6).view(1, 6)
    assert same_bits(merged(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_one_scale_a_weight(suffix: str, tmp_path: Path) -> None:
    """As vLLM reads it: weight times scale, in fp32, rounded once; the scales of activations are left out."""
    base = fp8_folder(tmp_path / "base", "qwen3", block=None, suffix=suffix)
    adapt(packed_bases.build("qwen3"), **ATTENTION).save_pretrained(tmp_path / "adapter")
    out = merge_to_disk(base, tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    stored, made = _tensors(base), _tensors(out)
    assert made.keys() == _tensors_of("qwen3", tmp_path).keys()
    name = "model.layers.1.mlp.down_proj.weight"
    assert same_bits(made[name], (stored[name].float() * stored[name + suffix]).bfloat16())


def test_the_dtype_that_is_asked_for_and_a_config_that_names_the_packing(tmp_path: Path) -> None:
    base = fp8_folder(tmp_path / "base", "qwen3")
    rewrite(base, lambda _: None, dtype="float8_e4m3fn")
    adapt(packed_bases.build("qwen3"), **ATTENTION).save_pretrained(tmp_path / "adapter")
    out = merge_to_disk(base, tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    assert load(out).dtype == torch.bfloat16
    assert {t.dtype for t in _tensors(out).values()} == {torch.bfloat16}
    out = merge_to_disk(
        base, tmp_path / "wide", adapter=tmp_path / "adapter", dtype=torch.float32, progress=False
    )
    assert load(out).dtype == torch.float32
    assert {t.dtype for t in _tensors(out).values()} == {torch.float32}


FOREIGN = ["gptq", "awq", "hqq", "compressed-tensors", "quanto", "torchao", "modelopt", "bitnet"]


@pytest.mark.parametrize("said", [True, False], ids=["config says so", "config is silent"])
@pytest.mark.parametrize("method", FOREIGN)
def test_other_packings_are_refused_before_anything_is_written(
    method: str, said: bool, tmp_path: Path
) -> None:
    base = foreign_folder(tmp_path / "base", method)
    if not said:
        rewrite(base, lambda _: None, quantization_config=None)
    adapt(packed_bases.build("llama"), **ATTENTION).save_pretrained(tmp_path / "adapter")
    before = sorted(tmp_path.iterdir())
    expected = method if said else r"layers\.0\.mlp"
    with pytest.raises((LoadError, MismatchError), match=f"(?i){expected}"):
        merge_to_disk(base, tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    assert sorted(tmp_path.iterdir()) == before


def test_a_packing_that_a_nested_config_names_is_refused(tmp_path: Path) -> None:
    packed_bases.build("llava").save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    text = {**config["text_config"], "quantization_config": {"quant_method": "gptq", "bits": 4}}
    rewrite(tmp_path / "base", lambda _: None, text_config=text)
    adapt(packed_bases.build("llava"), **ATTENTION).save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoadError, match=r"GPTQ"):
        merge_to_disk(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", progress=False)


def _drop(part: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def _reshape(part: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name] = torch.ones(3, 5, dtype=tensors[name].dtype)

    return change


@pytest.mark.parametrize(
    ("make", "change", "named"),
    [
        (
            lambda p: fp8_folder(p, "qwen3"),
            _drop("0.mlp.up_proj.weight_scale_inv"),
            r"0\.mlp\.up_proj\.weight: got float8",
        ),
        (lambda p: fp8_folder(p, "qwen3"), _reshape("0.mlp.up_proj.weight_scale_inv"), "3 x 5 scales"),
        (mxfp4_folder, _drop("1.mlp.experts.down_proj_scales"), r"1\.mlp\.experts\.down_proj"),
        (mxfp4_folder, _reshape("1.mlp.experts.down_proj_scales"), r"1\.mlp\.experts\.down_proj_scales"),
        (
            mxfp4_folder,
            _drop("0.mlp.experts.down_proj_bias"),
            r"0\.mlp\.experts\.down_proj_bias: got nothing",
        ),
        (mxfp4_folder, _drop("model.norm"), r"model\.norm\.weight: got nothing"),
    ],
)
def test_an_incomplete_base_is_refused_by_the_names(
    make: Any, change: Any, named: str, tmp_path: Path
) -> None:
    base = make(tmp_path / "base")
    adapt(load(base), **ATTENTION).save_pretrained(tmp_path / "adapter")
    rewrite(base, change)
    with pytest.raises(MismatchError, match=named):
        merge_to_disk(base, tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_base_of_bitsandbytes_that_lacks_a_part_is_refused_by_its_name(part: str, tmp_path: Path) -> None:
    packed_bases.build("llama").save_pretrained(tmp_path / "plain")
    base = _saved(quantized(tmp_path / "plain", "nf4 nested"), tmp_path / "base")
    adapt(packed_bases.build("llama"), **ATTENTION).save_pretrained(tmp_path / "adapter")
    lost = f"0.mlp.up_proj.weight.{part}"
    rewrite(base, _drop(lost))
    with pytest.raises(MismatchError, match=rf"{re.escape(lost)}: got nothing"):
        merge_to_disk(base, tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    assert not (tmp_path / "out").exists()


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from tests.export.test_export import stored

    return stored(folder)


def _tensors_of(architecture: str, path: Path) -> dict[str, torch.Tensor]:
    packed_bases.build(architecture).save_pretrained(path / "plain")
    return _tensors(path / "plain")


def test_a_tokenizer_with_tokens_that_the_base_has_no_rows_for(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    packed_bases.build("llama").save_pretrained(base)
    adapt(packed_bases.build("llama"), **ATTENTION).save_pretrained(adapter)
    (adapter / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 66}]}))
    with pytest.raises(MismatchError, match=r"resize_token_embeddings\(67\)"):
        merge_to_disk(base, tmp_path / "out", adapter=adapter, progress=False)
    (base / "added_tokens.json").write_text(json.dumps({"<pad>": 64}))  # the base itself was published so
    merge_to_disk(base, tmp_path / "out", adapter=adapter, progress=False)


@pytest.mark.parametrize("kind", list(bases()))
def test_a_model_in_memory_that_was_dequantized_as_it_was_loaded(kind: str, tmp_path: Path) -> None:
    make, config = bases()[kind]
    model = adapt(load(make(tmp_path / "base")), **config)
    out = merge_to_disk(model, tmp_path / "out", progress=False)
    assert "quantization_config" not in (out / "config.json").read_text()
    from_folders = merge_to_disk(
        tmp_path / "base", tmp_path / "other", adapter=_saved(model, tmp_path / "adapter"), progress=False
    )
    assert _tensors(out).keys() == _tensors(from_folders).keys()
    merged, expected = load(out).state_dict(), model.merge_and_unload().state_dict()
    assert [n for n, t in expected.items() if not same_bits(t, merged[n])] == []


@pytest.mark.parametrize("make", [lambda p: fp8_folder(p, "qwen3-moe"), mxfp4_folder], ids=["fp8", "mxfp4"])
def test_another_method_than_lora_over_a_packed_base(make: Any, tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    model = fill(get_peft_model(load(base), LoHaConfig(target_modules=["q_proj"], r=4)))
    model.save_pretrained(tmp_path / "adapter")
    out = merge_to_disk(base, tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    again = PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload().state_dict()
    merged = load(out).state_dict()
    assert [n for n, t in again.items() if not same_bits(t, merged[n])] == []


def test_a_base_of_bitsandbytes_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_bases.build("llama").save_pretrained(tmp_path / "plain")
    quantized(tmp_path / "plain", "nf4 nested").save_pretrained(tmp_path / "base")
    adapt(packed_bases.build("llama"), **ATTENTION).save_pretrained(tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(LoadError, match=r"lorasync\[qlora\]"):
        merge_to_disk(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
