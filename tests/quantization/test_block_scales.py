"""MXFP4 and FP8 with block scales, against the code of transformers and of DeepSeek."""

from __future__ import annotations

import pytest
import torch

from lorasync.quantization.block_scales import dequantize_fp8, dequantize_mxfp4, fp8_shape, mxfp4_shape
from tests.source.test_memory import Allocations
from tests.tiny import same_bits


def some_fp8(*shape: int, seed: int = 0) -> torch.Tensor:
    codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    return codes.view(torch.float8_e4m3fn)


def some_bytes(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def transformers_fp8(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=dtype)


@pytest.fixture(params=[1 << 22, 100], ids=["one strip", "many strips"])
def strips(request, monkeypatch):
    monkeypatch.setattr("lorasync.quantization.block_scales._STRIP", request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mxfp4_is_what_transformers_makes_of_it(dtype, strips):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = some_bytes(3, 10, 4, 16), some_bytes(3, 10, 4, low=100, high=140)
    expected = convert_moe_packed_tensors(blocks, scales).to(dtype)
    made = dequantize_mxfp4(blocks, scales, dtype)
    assert same_bits(made, expected)
    assert made.is_contiguous()
    assert mxfp4_shape(tuple(blocks.shape)) == tuple(expected.shape)


def test_mxfp4_at_the_ends_of_its_range(strips):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = some_bytes(1, 256, 1, 16)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1)
    assert same_bits(dequantize_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(8, 12), (3, 8, 12)], ids=str)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "e8m0", "uint8"])
def test_fp8_is_what_transformers_makes_of_it(shape, kind, dtype, strips):
    scale = torch.rand(*shape[:-2], 2, 3, generator=torch.Generator().manual_seed(2)) + 0.1
    made = {
        "fp32": scale,
        "bf16": scale.bfloat16(),
        "e8m0": scale.log2().round().exp2().to(torch.float8_e8m0fnu),
        "uint8": some_bytes(*scale.shape, low=120, high=130),
    }[kind]
    weight = some_fp8(*shape)
    assert same_bits(dequantize_fp8(weight, made, (4, 4), dtype), transformers_fp8(weight, made, dtype))


@pytest.mark.parametrize(
    "scale", [torch.tensor(0.3), torch.tensor([0.3]), torch.rand(8, 1), torch.rand(8, 2)]
)
def test_one_scale_a_row_of_scales_and_another_block_than_the_configs(scale, strips):
    weight = some_fp8(8, 12)
    expected = weight.float() * (
        scale if scale.ndim < 2 else scale.repeat_interleave(12 // scale.shape[1], 1)
    )
    assert same_bits(dequantize_fp8(weight, scale, (128, 128)), expected.bfloat16())


def test_one_scale_an_expert(strips):
    weight, scale = some_fp8(3, 4, 6), torch.tensor([0.5, 2.0, 3.0])
    assert same_bits(dequantize_fp8(weight, scale, None), (weight.float() * scale.view(3, 1, 1)).bfloat16())


def test_two_codes_a_byte(strips):
    weight, scale = some_bytes(8, 16).view(torch.int8), some_bytes(8, 1, low=120, high=130)
    assert same_bits(
        dequantize_fp8(weight, scale, (128, 128)), transformers_fp8(weight, scale, torch.bfloat16)
    )
    assert fp8_shape((8, 16), torch.int8) == (8, 32)


@pytest.mark.parametrize("shape", [(9, 12), (8, 10), (5, 3), (192, 128)], ids=str)
def test_blocks_that_stick_out_are_read_by_their_size(shape, strips):
    """As DeepSeek does. Transformers refuses them, or spreads the scales where their number happens to divide."""
    size = 128 if shape[0] > 100 else 4
    weight, (rows, columns) = some_fp8(*shape), shape
    scale = torch.rand(-(-rows // size), -(-columns // size))
    spread = scale.repeat_interleave(size, 0)[:rows].repeat_interleave(size, 1)[:, :columns]
    assert same_bits(dequantize_fp8(weight, scale, (size, size)), (weight.float() * spread).bfloat16())


def test_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match="3 x 3 scales for a weight of 8 x 12"):
        dequantize_fp8(some_fp8(8, 12), torch.rand(3, 3), (4, 4))
    with pytest.raises(ValueError, match=r"weight of \(2, 8, 12\)"):
        dequantize_fp8(some_fp8(2, 8, 12), torch.rand(3, 2, 3), (4, 4))
    with pytest.raises(ValueError, match="blocks"):
        dequantize_mxfp4(some_bytes(1, 4, 2, 16), some_bytes(1, 4, 3))


def test_little_is_held_beside_the_result(monkeypatch):
    strip = 1 << 12
    monkeypatch.setattr("lorasync.quantization.block_scales._STRIP", strip)
    weight, scale = some_fp8(512, 256), torch.rand(32, 16)
    blocks, scales = some_bytes(4, 128, 4, 16), some_bytes(4, 128, 4)
    for work, result in (
        (lambda: dequantize_fp8(weight, scale, (16, 16)), 2 * weight.numel()),
        (lambda: dequantize_mxfp4(blocks, scales), 4 * blocks.numel()),
    ):
        with Allocations() as allocations:
            work()
        assert result <= allocations.peak < result + 24 * strip
