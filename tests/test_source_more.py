"""Offloaded bases, vLLM's own interface, and the places where PEFT's merge and its forward differ."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorasync.load import close_avx512_trap
from lorasync.source import MergedSource
from tests.test_source import quantized
from tests.tiny import adapt, build, same_bits

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_that_accelerate_offloaded_are_read_where_they_are(where: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    plain, model = adapt(build("llama")), adapt(build("llama"))
    for name, module in list(model.named_modules()):
        if module._parameters and ".lora_" not in name:
            if where == "cpu":
                cpu_offload(module, execution_device=torch.device("cpu"))
            else:
                disk_offload(module, tmp_path / name, execution_device=torch.device("cpu"))
    expected = dict(MergedSource(plain))
    ours = dict(MergedSource(model))
    assert ours.keys() == expected.keys()
    assert [n for n in ours if not same_bits(ours[n], expected[n])] == []
    inner = model.base_model.model
    assert inner.lm_head.weight.device.type == "meta"
    assert inner.model.layers[0].mlp.up_proj.base_layer.weight.device.type == "meta"


def test_the_bias_of_a_quantized_layer_is_scaled_as_in_forward(tmp_path: Path) -> None:
    build("qwen2").save_pretrained(tmp_path)
    model = adapt(quantized(tmp_path, "nf4"), target_modules=["q_proj"], lora_bias=True, lora_alpha=12)
    close_avx512_trap(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    ours = dict(MergedSource(model))["model.layers.0.self_attn.q_proj.bias"]
    zero = torch.zeros(1, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        forward = layer(zero)[0]
    assert layer.scaling["default"] == 3.0
    assert torch.allclose(ours.float(), forward.float(), atol=2e-2)
    assert not torch.allclose(
        ours.float(), (layer.base_layer.bias + layer.lora_B["default"].bias).float(), atol=2e-2
    )


def test_as_vllm_source_on_the_installed_vllm() -> None:
    vllm = pytest.importorskip("vllm.distributed.weight_transfer.base")
    source = MergedSource(adapt(build("llama")))
    theirs = source.as_vllm_source()
    assert isinstance(theirs, vllm.WeightSource)
    metadata = theirs.metadata() if callable(theirs.metadata) else theirs.metadata
    described = [(m.name, m.dtype, m.shape) for m in metadata]
    for _ in range(2):
        assert described == [(n, t.dtype, tuple(t.shape)) for n, t in theirs]
    if hasattr(theirs, "iter_groups"):
        assert [n for names, _ in theirs.iter_groups() for n in names] == [m.name for m in metadata]


def test_as_vllm_source_where_metadata_is_a_property(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm.distributed.weight_transfer.base")
    from lorasync.source import weight_source

    class Newer:  # the shape that the class has had since 0.33
        @cached_property
        def metadata(self) -> list[Any]:
            raise NotImplementedError

        def iter_full(self) -> Any:
            raise NotImplementedError

    monkeypatch.setattr(weight_source, "WeightSource", Newer)
    source = MergedSource(adapt(build("llama")))
    theirs = source.as_vllm_source()
    assert [m.name for m in theirs.metadata] == [n for n, _ in theirs.iter_full()]
