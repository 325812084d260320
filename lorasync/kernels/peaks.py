"""The largest absolute value of each of many tensors on a GPU, in one launch and with one wait."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from lorasync.kernels.jobs import FLOATS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


@torch.no_grad()
def largest(values: Tensor) -> float:
    """Return the largest absolute value, or NaN; without a copy of the tensor.

    Example:
        >>> largest(torch.tensor([1.0, -3.0]))
        3.0
    """
    if values.numel() == 0 or values.device.type == "meta" or not values.dtype.is_floating_point:
        return 0.0
    low, high = (float(x) for x in torch.aminmax(values))
    return math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)


class Peaks:
    """The largest absolute values of tensors of one device and dtype; planned once, so the tensors must stay where they are.

    Raises:
        ValueError: The tensors differ in device or dtype, or are not contiguous.

    Example:
        >>> x = torch.tensor([1.0, -3.0])
        >>> Peaks([x]).now()
        [3.0]
        >>> _ = x.fill_(float("nan"))
        >>> Peaks([x]).now()
        [nan]
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        kinds = {(t.device, t.dtype) for t in tensors}
        if len(kinds) > 1 or not all(t.is_contiguous() for t in tensors):
            raise ValueError(f"tensors: got {kinds}, expected contiguous ones of one device and dtype.")
        self._tensors = tuple(tensors)
        self._scan: Any = None
        device, dtype = next(iter(kinds), (torch.device("cpu"), torch.float32))
        if device.type == "cuda" and dtype in FLOATS and find_spec("triton") is not None:
            from lorasync.kernels.triton_peaks import Scan

            self._scan = Scan(self._tensors)

    def now(self) -> list[float]:
        """Look at what the tensors hold at this moment; NaN where a tensor holds one."""
        return self.start()()

    def start(self) -> Callable[[], list[float]]:
        """Let the GPU look at what the tensors hold at this moment; what is returned waits for its answer."""
        if self._scan is not None:
            answer: Callable[[], list[float]] = self._scan.run().tolist
            return answer
        return lambda: [largest(tensor) for tensor in self._tensors]
