"""Merging any low-rank adapter, as a `LowRank` describes it: what both the trainer and the worker call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasync.merge.arithmetic import (
    Scratch,
    add_delta,
    conv_delta,
    embedding_delta,
    expert_delta,
    lora_delta,
    merge_dora,
    merge_plain,
)
from lorasync.merge.rounding import NEAREST, Nearest, Rounding

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """Everything but the tensors that one low-rank merge needs to know; plain data that travels in JSON.

    ``kind`` says what A and B look like: "linear", "embedding", "conv" or "experts". ``transposed`` is
    fan_in_fan_out of a linear layer, or (experts, in, out) of a stack of experts. ``cast_first`` marks the
    layers for which PEFT rounds the delta to the weight's dtype before adding, on a CPU; ``exact`` keeps half
    precision factors' product in fp32 there (quantized bases: PEFT has no out-of-place result to match).
    """

    kind: str
    scaling: float
    transposed: bool = False
    experts: int = 1
    dora: bool = False
    cast_first: bool = False
    exact: bool = False


def low_rank_shape(how: LowRank, a: Sequence[int], b: Sequence[int]) -> tuple[int, ...] | None:
    """Say which weight two factors are for, from their shapes alone; ``None`` where they don't multiply.

    Example:
        >>> low_rank_shape(LowRank("embedding", 1.0), (4, 100), (16, 4))
        (100, 16)
    """
    if len(a) < 2 or len(b) < 2 or a[0] != b[1] or 0 in a or a[0] % how.experts:
        return None
    if how.kind == "conv":
        return (b[0], *a[1:])
    plain = (b[0], a[1])
    if how.kind == "experts" and how.experts > 1:
        return (how.experts, *(plain[::-1] if how.transposed else plain))
    flipped = how.kind == "embedding" or (how.kind == "linear" and how.transposed)
    return plain[::-1] if flipped else plain


def low_rank_delta(how: LowRank, lora_a: Tensor, lora_b: Tensor, *, exact: bool = False) -> Tensor:
    """Compute s·B·A in the weight's layout, for any kind of layer.

    Args:
        how: What kind of layer it is.
        lora_a: A, as PEFT holds it.
        lora_b: B, as PEFT holds it.
        exact: Keep fp32 whatever PEFT would do.

    Example:
        >>> import torch
        >>> low_rank_delta(LowRank("linear", 2.0), torch.ones(1, 2), torch.ones(1, 1)).tolist()
        [[2.0, 2.0]]
    """
    exact = exact or how.exact
    if how.kind == "embedding":
        return embedding_delta(lora_a, lora_b, how.scaling, exact=exact)
    if how.kind == "conv":
        return conv_delta(lora_a, lora_b, how.scaling, exact=exact)
    if how.kind == "experts":
        return expert_delta(
            lora_a, lora_b, how.scaling, experts=how.experts, transposed=how.transposed, exact=exact
        )
    assert how.kind == "linear", how.kind
    return lora_delta(lora_a, lora_b, how.scaling, fan_in_fan_out=how.transposed, exact=exact)


def merge_low_rank(
    how: LowRank,
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None = None,
    *,
    norm_base: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """Merge any low-rank adapter into a weight, out of place and without the last rounding.

    Trainer and worker both call this, so that they agree bit for bit on one kind of device.

    Args:
        how: What kind of layer it is.
        base: W, dequantized, in its own layout; it is only read.
        lora_a: A, as PEFT holds it.
        lora_b: B, as PEFT holds it.
        magnitude: DoRA's m.
        norm_base: See `merge_dora`.
        exact: Skip the roundings that PEFT does on the way.

    Returns:
        W + s·B·A in the wider of the dtypes; round it with `Nearest` or `Stochastic`.
    """
    delta = low_rank_delta(how, lora_a, lora_b, exact=exact).to(base.device)
    if how.dora:
        assert magnitude is not None, "DoRA without its magnitude"
        flipped = how.kind == "embedding" or (how.kind == "linear" and how.transposed)
        return merge_dora(base, delta, magnitude, norm_base=norm_base, out_dim=int(flipped))
    return add_low_rank(how, base, delta, exact=exact, reuse=True)


def add_low_rank(
    how: LowRank, base: Tensor, delta: Tensor, *, exact: bool = False, reuse: bool = False
) -> Tensor:
    """Add s·B·A to a weight, or a part of it to the same part of the weight, unrounded; not for DoRA.

    Args:
        how: What kind of layer it is.
        base: W, or a part of it; it is only read.
        delta: s·B·A, or the same part of it, from `low_rank_delta`.
        exact: Skip the rounding that PEFT does on the way.
        reuse: Write the sum into ``delta``'s memory where its dtype is wide enough.
    """
    if how.cast_first and not exact and base.device.type == "cpu":
        delta = delta.to(base.dtype)
    return add_delta(base, delta, reuse=reuse)


def merge_and_round(
    how: LowRank,
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None = None,
    *,
    dtype: torch.dtype,
    rounding: Rounding = NEAREST,
    key: str = "",
    scratch: Scratch | None = None,
) -> Tensor:
    """Merge any low-rank adapter into a weight and round once: `merge_low_rank` and a rounding, without the wide sum.

    Args:
        how: What kind of layer it is.
        base: W, dequantized, in its own layout; it is only read.
        lora_a: A, as PEFT holds it.
        lora_b: B, as PEFT holds it.
        magnitude: DoRA's m.
        dtype: The result's dtype.
        rounding: How to round; anything but `Nearest` starts from the exact sum.
        key: The tensor's name; it picks the noise of a stochastic rounding.
        scratch: Memory for the product, used by one merge after another.
    """
    exact = not isinstance(rounding, Nearest)
    if how.kind == "linear" and not (how.dora or how.cast_first or how.transposed or exact):
        return merge_plain(base, lora_a, lora_b, how.scaling, dtype=dtype, exact=how.exact, scratch=scratch)
    return rounding(merge_low_rank(how, base, lora_a, lora_b, magnitude, exact=exact), dtype, key=key)
