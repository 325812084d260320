"""What the workers of a test's engine really compute with, also where vLLM has packed it for the CPU."""

from __future__ import annotations

from typing import Any

import torch
import xxhash

EXTENSION = {"worker_extension_cls": f"{__name__}.ReadBack"}
"""The setting of an engine that is to be read back."""


def served_weights(llm: Any) -> list[dict[str, str]]:
    """For every worker rank: the digest of each parameter and of each packed copy, by name."""
    found: list[dict[str, str]] = llm.collective_rpc("served_weights")
    return found


class ReadBack:
    """Mixed into vLLM's worker."""

    def served_weights(self) -> dict[str, str]:
        model = self.get_model()  # type: ignore[attr-defined]
        plain = {name: _digest(param) for name, param in model.named_parameters()}
        packed = {
            f"{name} as packed": _digest(_computed_with(module))
            for name, module in model.named_modules()
            if callable(getattr(module, "cpu_linear", None))
        }
        return plain | packed


def _computed_with(layer: Any) -> torch.Tensor:
    """W, from W·1."""
    width = layer.weight.shape[1] if layer.weight.numel() else layer.input_size_per_partition
    return layer.cpu_linear(torch.eye(width, dtype=layer.weight.dtype), layer.weight, None)


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().view(torch.uint8).numpy().data
    return f"{tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(data)}"
