"""What a base is: asked alike of live models, configs and folders, and refused by its name where it isn't read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig
from transformers.integrations.finegrained_fp8 import FP8Linear

import lorasync as ls
from lorasync.errors import AdapterError, LoadError
from lorasync.export.disk import merge_to_disk
from lorasync.load.checks import existing_quantization
from lorasync.quantization import (
    LIVE,
    STORED,
    method,
    of_config,
    of_folder,
    of_model,
    of_module,
    of_tensors,
)
from lorasync.quantization.block_scales import dequantize_fp8
from lorasync.zero import inspect_zero
from tests.models import tiny_llama, with_adapter

FLOAT8 = torch.float8_e4m3fn
CODES = torch.zeros(4, 4, dtype=torch.int32)
BYTES = torch.zeros(4, 4, dtype=torch.uint8)
HALF = torch.ones(4, 4, dtype=torch.float16)


def layer(name: str, package: str = "some", **tensors: torch.Tensor) -> nn.Module:
    """The structure of a library's quantized layer."""
    made: nn.Module = type(name, (nn.Module,), {"__module__": package})()
    made.in_features = made.out_features = 4
    for attr, tensor in tensors.items():
        if tensor.dtype.is_floating_point or attr in ("qweight", "qzeros", "g_idx"):
            made.register_buffer(attr, tensor)
        else:
            setattr(made, attr, nn.Parameter(tensor, requires_grad=False))
    return made


LAYERS: dict[str, tuple[nn.Module, str]] = {
    "hqq": (layer("HQQLinear", "hqq.core.quantize", W_q=BYTES), "HQQ"),
    "hqq, another package": (layer("Q", W_q=BYTES), "HQQ"),
    "gptq": (layer("TorchQuantLinear", qweight=CODES, qzeros=CODES, g_idx=CODES[0], scales=HALF), "GPTQ"),
    "awq": (layer("WQLinear_GEMM", qweight=CODES, qzeros=CODES, scales=HALF), "AWQ"),
    "awq by gptqmodel": (layer("AwqGEMMQuantLinear", "gptqmodel.nn_modules.qlinear", qweight=CODES), "AWQ"),
    "compressed": (layer("Linear", weight_packed=CODES, weight_scale=HALF), "compressed-tensors"),
    "aqlm": (layer("QuantizedLinear", codes=BYTES, codebooks=HALF), "AQLM"),
    "vptq": (layer("VQuantLinear", indices=CODES, centroids=HALF), "VPTQ"),
    "eetq": (layer("EetqLinear", weight=BYTES.to(torch.int8), weight_scales=HALF), "EETQ"),
    "higgs": (layer("Higgs", weight=CODES.to(torch.int16), scales=HALF, tables=HALF), "HIGGS"),
    "mxfp4": (layer("Experts", gate_up_proj_blocks=BYTES, gate_up_proj_scales=BYTES), "MXFP4"),
    "bitnet": (layer("BitLinear", "transformers.integrations.bitnet", weight=BYTES), "BitNet"),
    "fbgemm": (
        layer("FbgemmFp8Linear", "transformers.integrations.fbgemm_fp8", weight=HALF.to(FLOAT8)),
        "FBGEMM FP8",
    ),
    "quark": (layer("QParamsLinear", "quark.torch.quantization", weight=HALF), "Quark"),
    "quanto": (layer("QLinear", "optimum.quanto.nn.qlinear", weight=HALF), "quanto"),
    "spqr": (layer("QuantizedLinear", "spqr_quant.inference", dense_weights=BYTES), "SpQR"),
    "auto-round": (layer("QuantLinear", "auto_round_extension.torch", qweight=CODES), "AutoRound"),
    "fp8 experts": (layer("FP8Experts", "transformers.integrations.finegrained_fp8", x=HALF), "FP8Experts"),
    "unknown bytes": (layer("NewLinear", "brandnew", weight=BYTES), "brandnew.NewLinear"),
    "unknown float8": (layer("NewLinear", "brandnew", weight=HALF.to(FLOAT8)), "brandnew.NewLinear"),
}


class Computed(torch.Tensor):
    """As torchao's and quanto's classes: the values are computed when they are asked for."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0].inner)
        raise NotImplementedError(func)


def with_weight(tensor: torch.Tensor) -> nn.Linear:
    made = nn.Linear(4, 4)
    made.weight = nn.Parameter(tensor, requires_grad=False)
    return made


def torchao_like() -> torch.Tensor:
    kind: Any = type("AffineQuantizedTensor", (Computed,), {"__module__": "torchao.dtypes"})
    made: torch.Tensor = kind(HALF)
    return made


LAYERS["torchao"] = (with_weight(torchao_like()), "torchao")
LAYERS["unknown class"] = (with_weight(Computed(HALF)), f"{__name__}.Computed")


@pytest.mark.parametrize("case", LAYERS)
def test_a_packed_layer_is_refused_by_name_also_where_only_one_is(case: str) -> None:
    packed, name = LAYERS[case]
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "rest": nn.ModuleList([packed])})
    found = of_model(model)
    assert found.kind not in LIVE
    assert name in found.name
    assert found.where == ("rest.0",)
    policy = get_peft_model(model, LoraConfig(target_modules=["first"]))
    for source in (ls.MergedSource, ls.FactorSource):
        with pytest.raises(AdapterError, match=r"packed by .*\(rest\.0\)") as raised:
            source(policy)
        assert name in str(raised.value)


def test_a_base_that_is_written_to_disk_from_memory_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_llama()
    policy = with_adapter(model, target_modules=["q_proj"])
    model.model.layers[0].mlp.up_proj = LAYERS["hqq"][0]
    with pytest.raises(AdapterError, match="HQQ"):
        merge_to_disk(policy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_packed_weight_is_plain() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Embedding(4, 4))
    model.register_buffer("positions", torch.arange(4))
    model.register_buffer("mask", torch.ones(4, dtype=torch.bool))
    model.register_buffer("small", torch.ones(4, dtype=torch.uint8))
    model.register_parameter("table", nn.Parameter(torch.arange(4), requires_grad=False))
    labelled = type("Labelled", (nn.Parameter,), {"__module__": "megatron"})
    model[0].weight = labelled(torch.ones(4, 4))
    assert of_model(model).plain
    assert of_model(with_adapter(tiny_llama(), use_dora=True)).plain


def test_bitsandbytes_layers_are_known_by_their_type() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for kind in ("nf4", "fp4"):
        layer = bnb.nn.Linear4bit(64, 4, quant_type=kind)
        assert "never quantized" in of_module(layer).name
        assert of_module(layer.to("cpu")).kind == kind


@pytest.mark.parametrize("block", [(4, 4), (3, 5), None])
def test_fp8linear_is_read_exactly(block: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    packed = FP8Linear(10, 6, block_size=block, has_bias=False)
    packed.weight = nn.Parameter(torch.randn(6, 10).to(FLOAT8), requires_grad=False)
    packed.weight_scale_inv = nn.Parameter(torch.rand(packed.weight_scale_inv.shape) + 0.5)
    policy = get_peft_model(nn.Sequential(packed, nn.Linear(6, 2)), LoraConfig(r=2, target_modules=["0"]))
    adapter = policy.base_model.model[0]
    nn.init.normal_(adapter.lora_B["default"].weight)
    served = dict(ls.MergedSource(policy, dtype=torch.float32))
    base = dequantize_fp8(packed.weight, packed.weight_scale_inv, block, torch.float32)
    delta = adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight
    assert list(served) == ["0.weight", "1.weight", "1.bias"]
    assert torch.equal(served["0.weight"], base + delta * adapter.scaling["default"])
    assert of_model(policy).kind == "fp8"
    assert ls.FactorSource(policy).spec().modules[0].base == "fp8"


CONFIGS: dict[str, dict[str, Any]] = {
    "GPTQ": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "AWQ": {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors"}},
    "AutoRound": {"quantization_config": {"quant_method": "intel/auto-round"}},
    "torchao": {"quantization_config": {"quant_method": "torchao"}},
    "brand-new": {"quantization_config": {"quant_method": "brand-new"}},
    "doesn't name": {"quantization_config": {"bits": 3}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_refused_by_the_loader_the_guard_and_the_merge(name: str, tmp_path: Path) -> None:
    assert name in of_config(CONFIGS[name]).name
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **CONFIGS[name]}))
    config = LlamaConfig()
    for key, value in CONFIGS[name].items():
        nested = isinstance(value, dict) and "quantization_config" in value
        setattr(config, key, LlamaConfig(**value) if nested else value)
    with pytest.raises(LoadError, match=name):
        existing_quantization("base", config)
    if "text_config" not in CONFIGS[name]:  # a Llama has none to build
        findings = inspect_zero(ls.zero.ZeroPlan(config), {"zero_optimization": {"stage": 2}}).errors
        assert any(name in str(finding) for finding in findings)
    with_adapter(tiny_llama(), target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoadError, match=name):
        merge_to_disk(folder, tmp_path / "out", adapter=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"qweight": CODES, "qzeros": CODES, "g_idx": CODES, "scales": HALF}, "GPTQ"),
        ({"qweight": CODES, "qzeros": CODES, "scales": HALF}, "AWQ"),
        ({"W_q": BYTES, "scale": HALF}, "HQQ"),
        ({"weight_packed": CODES, "weight_scale": HALF}, "compressed-tensors"),
        ({"weight": BYTES, "weight_scale_2": HALF}, "ModelOpt"),
        ({"weight": BYTES}, "U8 codes"),
        ({"weight": HALF.to(FLOAT8)}, "float8 without scales"),
    ],
)
def test_a_folder_whose_config_says_nothing_is_known_by_its_tensors(
    tensors: dict[str, torch.Tensor], name: str, tmp_path: Path
) -> None:
    stored = {f"model.layers.0.mlp.up_proj.{key}": value.clone() for key, value in tensors.items()}
    save_file({**stored, "model.norm.weight": HALF}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = of_folder(tmp_path)
    assert name in found.name
    assert found.kind not in STORED
    assert all(where.startswith("model.layers.0") for where in found.where)


def test_a_merge_refuses_packed_tensors_that_the_config_does_not_mention(tmp_path: Path) -> None:
    from tests.packed_bases import rewrite

    tiny_llama().save_pretrained(tmp_path / "base")

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        path = "model.layers.0.mlp.up_proj"
        del tensors[f"{path}.weight"]
        tensors.update({f"{path}.qweight": CODES, f"{path}.qzeros": CODES.clone(), f"{path}.scales": HALF})

    rewrite(tmp_path / "base", pack)
    with_adapter(tiny_llama(), target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoadError, match="AWQ"):
        merge_to_disk(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")


def test_stored_kinds_that_are_read() -> None:
    assert of_tensors({"w": "BF16", "ids": "I64"}).plain
    assert of_tensors({"w.weight": "U8", "w.weight.quant_state.bitsandbytes__nf4": "U8"}).kind == "nf4"
    assert of_tensors({"w.weight": "I8", "w.SCB": "F32"}).kind == "int8"
    assert of_tensors({"w.weight": "F8_E4M3", "w.weight_scale_inv": "F32"}).kind == "fp8"
    assert of_tensors({"x_blocks": "U8", "x_scales": "U8"}).kind == "mxfp4"
    assert (
        of_config({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}).kind == "nf4"
    )
    assert (
        of_config({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}).kind
        == "int8"
    )


def test_every_method_of_transformers_has_a_name() -> None:
    from transformers.utils.quantization_config import QuantizationMethod

    unnamed = [each.value for each in QuantizationMethod if method(each.value).kind == "unknown"]
    assert unnamed == ["bitsandbytes"]


def test_the_question_is_light() -> None:
    heavy = "{'transformers', 'peft', 'bitsandbytes', 'torchao', 'vllm'}"
    code = f"import lorasync.quantization, sys; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
