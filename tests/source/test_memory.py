"""What a pass costs in memory: one module, whatever the number of layers, and nothing that stays."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorasync.source import FactorSource, MergedSource
from tests.source.test_source import quantized
from tests.tiny import TEXT, adapt

if TYPE_CHECKING:
    from pathlib import Path

WIDTH, VOCAB = 64, 256


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            real = isinstance(tensor, torch.Tensor) and tensor.device.type != "meta"
            if real and tensor.untyped_storage()._cdata not in before:
                self.count(tensor)
        self.peak = max(self.peak, sum(self.live.values()))
        return out

    def count(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it dies."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))


def llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "vocab_size": VOCAB,
        "num_hidden_layers": layers,
    }
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, **shape})).to(torch.bfloat16)


def peak(source: Any) -> int:
    """The most bytes that one pass has alive at once, consumer's tensor included."""
    for _ in source:  # what is cached at the first pass is not of interest
        pass
    gc.collect()
    with Allocations() as allocations:
        for _name, tensor in source:
            del tensor
    gc.collect()
    assert sum(allocations.live.values()) < 1000, "a pass leaves tensors behind"
    return allocations.peak


def _model(kind: str, layers: int, path: Path) -> Any:
    if kind == "plain":
        return adapt(llama(layers))
    llama(layers).save_pretrained(path / str(layers))
    return adapt(quantized(path / str(layers), kind))


@pytest.mark.parametrize("kind", ["plain", "nf4 nested"])
def test_the_peak_is_one_module_and_flat_in_the_number_of_layers(kind: str, tmp_path: Path) -> None:
    peaks = {layers: peak(MergedSource(_model(kind, layers, tmp_path))) for layers in (6, 24)}
    largest = VOCAB * WIDTH
    # The fp32 delta, the dequantized weight, the rounded result; never a second module's.
    assert peaks[24] <= peaks[6] + 1000
    assert peaks[24] <= largest * (4 + 2 + 2) + 4096


def test_factors_cost_one_factor(tmp_path: Path) -> None:
    peaks = {layers: peak(FactorSource(_model("plain", layers, tmp_path))) for layers in (6, 24)}
    assert peaks[24] <= peaks[6] + 1000
    assert peaks[24] <= 4 * VOCAB * 4 + 4096


def test_many_passes_leave_memory_flat(tmp_path: Path) -> None:
    source = MergedSource(adapt(llama(2)))
    list(source)
    gc.collect()
    before = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    for _ in range(100):
        for _pair in source:
            pass
    del _pair
    gc.collect()
    assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= before
