"""The room for bitsandbytes: what it says of real layers, and its checkpoint layout, read as bitsandbytes reads it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from lorasync import bnb

BF16 = torch.bfloat16


def four_bit(kind: str, *, nested: bool = False) -> nn.Module:
    layer = pytest.importorskip("bitsandbytes").nn.Linear4bit(
        128, 48, bias=False, quant_type=kind, compress_statistics=nested, compute_dtype=BF16
    )
    torch.manual_seed(0)
    layer.weight.data = torch.randn(48, 128).to(BF16)
    return layer


def eight_bit() -> nn.Module:
    layer = pytest.importorskip("bitsandbytes").nn.Linear8bitLt(128, 48, bias=False, has_fp16_weights=False)
    torch.manual_seed(0)
    layer.weight.data = torch.randn(48, 128).half()
    return layer


def stored(layer: nn.Module) -> dict[str, torch.Tensor]:
    """What bitsandbytes saves of a layer."""
    return {f"x.{name}": tensor for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_four_bit_layer_before_and_after_it_is_quantized(kind: str) -> None:
    layer = four_bit(kind)
    assert bnb.layer_bits(layer) == 4
    assert bnb.kind_of(layer, "weight") == "unquantized"
    assert bnb.is_packed(layer.weight)
    layer.to("cpu")
    assert bnb.kind_of(layer, "weight") == kind
    assert bnb.logical_4bit(layer, "weight") == (BF16, (48, 128))
    assert bnb.compute_dtype(layer) == BF16
    bnb.set_compute_dtype(layer, torch.float16)
    assert bnb.compute_dtype(layer) == torch.float16


def test_an_eight_bit_layer_before_and_after_it_is_quantized() -> None:
    layer = eight_bit()
    assert (bnb.layer_bits(layer), bnb.kind_of(layer, "weight")) == (8, "plain")
    layer.to("cpu")
    assert bnb.kind_of(layer, "weight") == "int8"
    scales = bnb.int8_scales(layer, layer.weight)
    assert scales is not None
    assert scales.shape == (48,)
    assert any(each is scales for each in bnb.tensors_beside(layer.weight))


def test_what_is_not_bitsandbytes() -> None:
    layer = nn.Linear(4, 4)
    assert bnb.layer_bits(layer) is None
    assert bnb.kind_of(layer, "weight") is None
    assert not bnb.is_packed(layer.weight)
    assert bnb.tensors_beside(layer.weight) == []
    assert bnb.close_traps(layer) == 0


def test_the_state_is_found_on_the_module_where_the_weight_has_lost_it() -> None:
    """FSDP2 makes a tensor of its own out of the weight."""
    layer = four_bit("nf4").to("cpu")
    state = layer.weight.quant_state
    layer.quant_state = state
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert bnb.quant_state(layer, "weight") is state
    assert bnb.kind_of(layer, "weight") == "nf4"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_stored_four_bit_weight_is_read_by_both_readers(kind: str, nested: bool) -> None:
    layer = four_bit(kind, nested=nested).to("cpu")
    tensors = stored(layer)
    found = bnb.find_stored("x.weight", tensors)
    assert found is not None
    assert found.kind == kind
    assert {"x.weight", *found.beside} == set(tensors)
    assert found.logical(tensors) == (BF16, (48, 128))
    expected = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(found.read(tensors), expected)
    base = found.base(tensors, dtype=BF16, device=torch.device("cpu"))
    assert torch.equal(base.dequantize(), expected)
    assert float(expected.abs().max()) <= bnb.scale_bound(layer, "weight") * 1.01


def test_a_stored_eight_bit_weight() -> None:
    layer = eight_bit().to("cpu")
    tensors = stored(layer)
    found = bnb.find_stored("x.weight", tensors)
    assert found is not None
    assert {"x.weight", *found.beside} == set(tensors)
    scales = bnb.int8_scales(layer, layer.weight)
    assert torch.equal(found.read(tensors), bnb.dequantize_8bit(layer.weight.data, scales))
    assert bnb.find_stored("x.SCB", tensors) is None


@pytest.mark.parametrize("make", [lambda: four_bit("nf4", nested=True), eight_bit])
def test_what_is_written_is_what_bitsandbytes_saves(make: object) -> None:
    layer = make().to("cpu")
    theirs = stored(layer)
    for name, tensor in bnb.as_stored(layer, "weight", layer.weight, "x.weight"):
        assert torch.equal(tensor, theirs[name]), name


def test_fewer_values_than_the_state_says_are_noticed() -> None:
    layer = four_bit("nf4").to("cpu")
    state = layer.weight.quant_state
    assert bnb.missing_values(layer.weight.data, state) is None
    assert bnb.missing_values(layer.weight.data[:-8], state) == (48 * 128 - 16, 48 * 128)


@pytest.mark.parametrize("kind", ["NF4", "FP4", "INT8"])
def test_settings_are_read_as_transformers_writes_them(kind: str) -> None:
    import lorasync as ls

    preset = getattr(ls, kind)
    found = bnb.read_settings(preset.bnb_config(compute_dtype=BF16))
    assert found is not None
    assert (found.kind, found.bits) == (preset.quant_type, preset.bits)
    if preset.bits == 4:
        assert (found.double_quant, found.storage, found.compute) == (preset.double_quant, torch.uint8, BF16)
    assert bnb.read_settings({"quant_method": "gptq", "bits": 4}) is None


def test_asking_imports_no_bitsandbytes() -> None:
    code = "import lorasync.bnb, sys; print('bitsandbytes' in sys.modules, 'peft' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
