"""VLLM's own model classes on a CPU, loaded as a worker loads them, in this process and without an engine."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import nn


@contextlib.contextmanager
def loaded(path: str, *, dtype: str = "float32", **settings: Any) -> Iterator[tuple[nn.Module, Any]]:
    """The served model of a checkpoint, and its vLLM config."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    arguments = {"max_model_len": 64, "enforce_eager": True, "skip_tokenizer_init": True, **settings}
    config = EngineArgs(model=path, dtype=dtype, **arguments).create_engine_config()
    # As vLLM's CPU worker does: there is no accelerator whose cache could be emptied.
    with set_current_vllm_config(config), mock.patch("torch.accelerator.empty_cache"):
        _one_rank()
        yield get_model(vllm_config=config), config


def checkpoint(path: str) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    return {n: t for file in sorted(Path(path).glob("*.safetensors")) for n, t in load_file(file).items()}


def manifest_of(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all that a served model computes with: parameters, buffers, packed and derived tensors."""
    found = dict(_tensors(model))
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def differences(model: nn.Module, expected: dict[str, torch.Tensor]) -> list[str]:
    """The names of what is not as expected, bit by bit."""
    found = everything(model)
    wrong = [n for n in found.keys() & expected.keys() if not _same(found[n], expected[n])]
    return sorted([*wrong, *(found.keys() ^ expected.keys())])


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, module in model.named_modules():
        for holder in (module, getattr(module, "impl", None)):
            held = vars(holder) if holder is not None else {}
            yield from ((f"{name}: {key}", v) for key, v in held.items() if isinstance(v, torch.Tensor))
        if callable(getattr(module, "cpu_linear", None)):
            yield f"{name}: as packed", _computed_with(module)


def _computed_with(layer: Any) -> torch.Tensor:
    """W, from W·1."""
    width = (
        layer.weight.shape[1]
        if layer.weight.numel()
        else getattr(layer, "input_size_per_partition", layer.input_size)
    )
    return layer.cpu_linear(torch.eye(width, dtype=layer.weight.dtype), layer.weight, None)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    alike = left.dtype == right.dtype and left.shape == right.shape
    return alike and torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _one_rank() -> None:
    """Distributed state of one rank; which groups there are depends on the model."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    store = f"file://{tempfile.mkdtemp()}/store"
    parallel_state.init_distributed_environment(
        1, 0, distributed_init_method=store, local_rank=0, backend="gloo"
    )
    parallel_state.initialize_model_parallel(1, 1)


class Worker:
    """The worker engine of a loaded model behind vLLM's `collective_rpc`: what `connect` takes for an engine."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        from vllm.config.weight_transfer import WeightTransferConfig

        from lorasync.receive.engine import WorkerEngine

        transfer = WeightTransferConfig(backend="lorasync")
        self.engine = WorkerEngine(transfer, config, torch.device("cpu"), model)
        self.model = model

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        assert method == "weight_transfer_engine"
        return [self.engine(*args)]

    def reset_prefix_cache(self) -> bool:
        return True

    def reset_encoder_cache(self) -> None:
        """Nothing is cached."""
