"""Running vLLM's code that replaces tensors, without moving what captured graphs read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def in_place(held: Any, run: Callable[[], object]) -> None:
    """Run what may give ``held`` other tensors, and copy those of the same layout to where the old ones are.

    Captured CUDA graphs read there.
    """
    before = {n: t for n, t in vars(held).items() if isinstance(t, torch.Tensor)}
    run()
    with torch.no_grad():
        for name, old in before.items():
            new = vars(held).get(name)
            if isinstance(new, torch.Tensor) and new is not old and _layout(new) == _layout(old):
                old.copy_(new)
                vars(held)[name] = old


def _layout(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape
