"""`FactorSource`: PEFT's names and bits, and a spec from which a receiver gets the merged weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lorasync.bnb import dequantize_4bit
from lorasync.errors import AdapterError, MismatchError, NonFiniteError, UnmergeableError
from lorasync.merge import NEAREST, merge_low_rank, replace_rows
from lorasync.source import FactorSource, FactorSpec, MergedSource
from lorasync.source.parameter import read
from tests.source.test_source import quantized, zoo
from tests.tiny import adapt, build, fill, same_bits, snapshot, unchanged

if TYPE_CHECKING:
    from pathlib import Path

KINDS: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [1, 5, 7]},
    "pissa": {"target_modules": ["v_proj"], "init_lora_weights": "pissa"},
    "ranks": {"target_modules": ["v_proj"], "rank_pattern": {"layers.0.self_attn.v_proj": 2}},
}


def merge_by_spec(
    spec: FactorSpec, tensors: dict[str, torch.Tensor], base: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a receiver does that has only the base, the stream and the spec."""
    merged = dict(base)
    for module in spec.modules:
        magnitude = None if module.magnitude is None else tensors[module.magnitude]
        weight = merged[module.weight]
        exact = merge_low_rank(module.how, weight, tensors[module.a], tensors[module.b], magnitude)
        merged[module.weight] = NEAREST(exact, weight.dtype)
    for bias in spec.biases:
        merged[bias.weight] = (merged[bias.weight] + tensors[bias.tensor] * bias.scaling).to(
            merged[bias.weight]
        )
    for rows in spec.rows:
        merged[rows.weight] = replace_rows(merged[rows.weight], rows.rows, tensors[rows.tensor])
    for saved in spec.saved:
        merged[saved.weight] = tensors[saved.tensor]
    return merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_names_and_bits_are_those_of_the_saved_adapter(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapt(build("llama", dtype), "policy", **KINDS[kind])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
    before = snapshot(model)
    source = FactorSource(model, adapter="policy")
    ours = dict(source)
    assert unchanged(model, before)
    model.save_pretrained(tmp_path, selected_adapters=["policy"], save_embedding_layers=False)
    theirs = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not same_bits(ours[name], theirs[name])] == []
    for _ in range(2):
        described = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
        assert described == [(name, t.dtype, tuple(t.shape)) for name, t in source]


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_receiver_with_spec_and_stream_gets_the_merged_weights_bit_for_bit(kind: str, cast: bool) -> None:
    model = adapt(build("llama"), cast=cast, **KINDS[kind])
    source = FactorSource(model)
    spec = FactorSpec.from_json(source.spec().to_json())
    inner = model.base_model.model
    base = {
        name.replace(".base_layer", ""): t for name, t in inner.state_dict().items() if "lora_" not in name
    }
    base = {name.replace(".original_module", "").replace(".token_adapter", ""): t for name, t in base.items()}
    merged = merge_by_spec(spec, dict(source), base)
    for name, tensor in MergedSource(model):
        assert same_bits(merged[name], tensor), name


def test_lora_bias_and_convolutions_by_spec() -> None:
    model = adapt(zoo(torch.float32), target_modules=["lin", "conv2", "pointwise"], lora_bias=True)
    source = FactorSource(model)
    base = {n.replace(".base_layer", ""): t for n, t in model.base_model.model.state_dict().items()}
    merged = merge_by_spec(source.spec(), dict(source), base)
    for name, tensor in MergedSource(model):
        assert same_bits(merged[name], tensor), name
    assert len(source.spec().biases) == 3


def test_spec_says_what_a_receiver_must_know() -> None:
    spec = FactorSource(adapt(build("llama"), "policy", target_modules=["q_proj"], use_rslora=True)).spec()
    module = spec.modules[0]
    assert module.weight == "model.layers.0.self_attn.q_proj.weight"
    assert module.a == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert (module.kind, module.r, module.scaling, module.dora) == ("linear", 4, 4.0, False)
    assert (module.base, module.dtype, module.shape, module.pieces) == ("plain", "bfloat16", (32, 32), ())
    assert spec.adapter == "policy"
    assert spec.config["peft_type"] == "LORA"
    assert spec.config["target_modules"] == ["q_proj"]
    assert spec.base_changed_by is None
    assert json.loads(spec.to_json())["config"]["use_rslora"] is True


def test_spec_of_fused_experts_names_the_pieces() -> None:
    model = adapt(build("mixtral"), target_modules=[], target_parameters=["mlp.experts.down_proj"])
    module = FactorSource(model).spec().modules[0]
    assert module.weight == "model.layers.0.mlp.experts.down_proj"
    assert module.pieces == tuple(f"model.layers.0.block_sparse_moe.experts.{i}.w2.weight" for i in range(4))
    assert (module.kind, module.how.experts, module.shape) == ("experts", 4, (4, 32, 48))


def test_spec_of_ties_and_changed_bases() -> None:
    tied = FactorSource(adapt(build("llama-tied"))).spec()
    assert tied.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied.conflicts == ()
    one_side = FactorSource(adapt(build("llama-tied"), target_modules=["lm_head"])).spec()
    assert "lm_head.weight" in one_side.conflicts[0]
    changed = FactorSource(adapt(build("llama"), target_modules=["q_proj"], init_lora_weights="olora")).spec()
    assert changed.base_changed_by == "olora"


def test_a_spec_of_another_version_is_refused() -> None:
    text = FactorSource(adapt(build("llama"))).spec().to_json()
    with pytest.raises(ValueError, match="same lorasync"):
        FactorSpec.from_json(text.replace('"ties"', '"bonds"'))
    with pytest.raises(ValueError, match="FactorSpec"):
        FactorSpec.from_json("[]")


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "fp4", "int8"])
def test_the_packed_base_arrives_exactly(kind: str, tmp_path: Path) -> None:
    from bitsandbytes.functional import QuantState, int8_vectorwise_dequant

    build("llama").save_pretrained(tmp_path)
    model = adapt(quantized(tmp_path, kind), target_modules=["q_proj"])
    source = FactorSource(model)
    assert {module.base for module in source.spec().modules} == {kind.split()[0]}
    tensors = dict(source.packed_base())
    layer = model.base_model.model.model.layers[1].self_attn.q_proj.base_layer
    name = "model.layers.1.self_attn.q_proj.weight"
    if kind == "int8":
        scales = tensors[name.replace("weight", "SCB")]
        rebuilt = int8_vectorwise_dequant(tensors[name], scales)
    else:
        state = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        rebuilt = dequantize_4bit(tensors[name], QuantState.from_dict(state, device=torch.device("cpu")))
    assert same_bits(rebuilt, read(layer, "weight", name=name))


def test_what_is_no_single_lora_is_refused() -> None:
    model = adapt(zoo(torch.float32), "a", target_modules=["lin"])
    model.add_adapter("b", LoraConfig(r=2, target_modules=["lin"]))
    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(AdapterError, match=r"\['a', 'b'\].*MergedSource"):
        FactorSource(model)
    assert FactorSource(model, adapter="b").spec().adapter == "b"
    other = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoHaConfig(target_modules=["0"]))
    with pytest.raises(UnmergeableError, match=r"LOHA.*MergedSource"):
        FactorSource(other)
    with pytest.raises(UnmergeableError, match=r"mha.*MergedSource"):
        FactorSource(adapt(zoo(torch.float32), target_modules=["mha"]))
    with pytest.raises(AdapterError, match="without an adapter"):
        FactorSource(build("llama"))


@pytest.mark.parametrize(
    "change", [{"ties": "x"}, {"modules": {}}, {"adapter": None}, {"config": []}, {"more": 1}]
)
def test_a_spec_of_other_types_is_refused(change):
    spec = FactorSource(
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    ).spec()
    with pytest.raises(ValueError, match="FactorSpec: got"):
        FactorSpec.from_json(json.dumps({**json.loads(spec.to_json()), **change}))


def test_bad_tensors_are_refused_before_anything() -> None:
    model = adapt(build("llama"), target_modules=["q_proj"])
    source = FactorSource(model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.self_attn\.q_proj\.lora_A"):
        next(iter(source))
    layer.lora_A["default"].weight = nn.Parameter(torch.zeros(3, 32))
    with pytest.raises(MismatchError, match=r"layers\.1\.self_attn\.q_proj"):
        source.spec()


def test_yielded_factors_belong_to_the_consumer_and_injected_models_work() -> None:
    model = build("llama")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "policy")
    fill(model)
    before = snapshot(model)
    for name, tensor in FactorSource(model, adapter="policy"):
        assert name.startswith("base_model.model.model.layers.")
        tensor.zero_()
    assert unchanged(model, before)
