"""The last step of a merge: to the nearest value of the served dtype, or up and down at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Nearest:
    """Round to the nearest representable value, ties to even: what every framework does."""

    def __call__(self, exact: Tensor, dtype: torch.dtype, *, key: str = "") -> Tensor:  # noqa: ARG002
        """Round ``exact`` to ``dtype``; ``key`` is not used."""
        return exact.to(dtype)


@dataclass(frozen=True)
class Stochastic:
    """Round up or down at random, in proportion to the distance, so that small updates survive on average.

    Args:
        seed: Any integer; give each sync its own (its version number, for example). The noise is a pure
            function of seed, key and position: the same on every rank and on every device.

    Only bfloat16 has a stochastic rounding here; other dtypes are rounded to nearest.
    Source: the technique is as in Gupta et al., https://arxiv.org/abs/1502.02551; the hash is `murmur3`'s
    32-bit finalizer.

    Example:
        >>> import torch
        >>> halfway = torch.full((10000,), 1 + 2**-9)  # bfloat16 next to 1 is 1 + 2**-7
        >>> round(float((Stochastic(0)(halfway, torch.bfloat16) > 1).float().mean()), 1)
        0.3
    """

    seed: int

    def __call__(self, exact: Tensor, dtype: torch.dtype, *, key: str = "") -> Tensor:
        """Round ``exact`` (any float dtype) to ``dtype``; ``key`` (a tensor's name) picks the noise."""
        if dtype != torch.bfloat16 or exact.dtype == torch.bfloat16:
            return exact.to(dtype)
        rounded = torch.empty(exact.shape, dtype=dtype, device=exact.device)
        flat, target, seed = exact.reshape(-1), rounded.view(-1), _hash_key(self.seed, key)
        for start in range(0, flat.numel(), _BLOCK):
            target[start : start + _BLOCK] = _round_block(flat[start : start + _BLOCK].float(), start, seed)
        return rounded


Rounding = Nearest | Stochastic
NEAREST = Nearest()
_BLOCK = 1 << 20


def _hash_key(seed: int, key: str) -> int:
    """Hash seed and key by FNV-1a: the same on every machine, unlike `hash`."""
    state = 0x811C9DC5
    for byte in f"{seed}:{key}".encode():
        state = ((state ^ byte) * 0x01000193) & 0xFFFFFFFF
    return state


def _round_block(exact: Tensor, start: int, seed: int) -> Tensor:
    """Add noise below bfloat16's last bit and cut: away from zero with a probability equal to what is cut."""
    bits = exact.view(torch.int32)
    noisy = (bits + _noise(start, exact.numel(), seed, exact.device)) & ~0xFFFF
    return torch.where(torch.isfinite(exact), noisy, bits).view(torch.float32)


def _noise(start: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Make 16 bits of noise for each position from ``start`` on, by murmur3's finalizer of position and seed."""
    bits = torch.arange(start, start + count, device=device, dtype=torch.int64)
    bits = (bits * 0x9E3779B1 + seed) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return ((bits ^ (bits >> 16)) & 0xFFFF).to(torch.int32)
