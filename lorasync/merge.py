"""The arithmetic of merging: W + s·B·A, and nothing else.

Pure functions of tensors: they write into nothing that they are given (except ``out``), know no module and
no name, and run the same on the trainer and in a vLLM worker. On a CPU each result is, bit for bit, what
PEFT computes out of place. On an accelerator half-precision factors are multiplied in fp32, so that a merged
element is rounded once. `docs/numerics.md` has the measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lorasync.errors import Mismatch, MismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

Scaling = float | Tensor
"""What B·A is multiplied by: PEFT's `layer.scaling[adapter]`, a number or a tensor of one element."""


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


@torch.no_grad()
def lora_delta(
    lora_a: Tensor, lora_b: Tensor, scaling: Scaling, *, fan_in_fan_out: bool = False, exact: bool = False
) -> Tensor:
    """Compute s·B·A, what LoRA adds to a weight.

    Args:
        lora_a: A, of shape (r, in_features), any float dtype.
        lora_b: B, of shape (out_features, r), A's dtype.
        scaling: s. Read it from the layer (rsLoRA, patterns, `set_scale`), never recompute it.
        fan_in_fan_out: Whether the weight is stored as (in_features, out_features), as GPT-2's Conv1D does.
        exact: Keep fp32 where PEFT would round the product to the factors' half precision (on a CPU).

    Returns:
        The delta in the weight's layout; fp32, or A's dtype where that is wider, or where PEFT rounds.

    Raises:
        MismatchError: The shapes don't multiply.

    Source: ``peft.tuners.lora.layer.Linear.get_delta_weight``.

    Example:
        >>> import torch
        >>> lora_delta(torch.ones(1, 3), torch.ones(2, 1), 0.5).tolist()
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    _check_factors(lora_a, lora_b)
    product = _wide(lora_b) @ _wide(lora_a)
    if fan_in_fan_out:
        product = product.T
    return _as_peft_keeps(
        product.mul_(scaling) if isinstance(scaling, float | int) else product * scaling, lora_b, exact=exact
    )


@torch.no_grad()
def merge_lora(
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Scaling,
    *,
    fan_in_fan_out: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    rounding: Rounding = NEAREST,
    key: str = "",
) -> Tensor:
    """Merge one LoRA into a weight, out of place: round(W + s·B·A), one rounding.

    Args:
        base: W, of shape (out_features, in_features), or its transpose with ``fan_in_fan_out``; only read.
        lora_a: A, of shape (r, in_features).
        lora_b: B, of shape (out_features, r).
        scaling: s; see `lora_delta`.
        fan_in_fan_out: Whether W is stored as (in_features, out_features).
        dtype: The result's dtype; W's by default.
        out: Write the result here (any dtype, W's shape; may be the live weight of an engine) and return it.
        rounding: How to round: `Nearest` or `Stochastic`.
        key: The tensor's name; it picks the noise of a stochastic rounding.

    Returns:
        The merged weight, a tensor of its own.

    Raises:
        MismatchError: The shapes of W, A and B don't fit together; all of them are named.

    Source: ``peft.tuners.lora.layer.Linear.merge`` (the default, not ``safe_merge``).

    Example:
        >>> import torch
        >>> merge_lora(torch.zeros(2, 3), torch.ones(1, 3), torch.ones(2, 1), 0.5).tolist()
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    exact = not isinstance(rounding, Nearest)
    delta = lora_delta(lora_a, lora_b, scaling, fan_in_fan_out=fan_in_fan_out, exact=exact)
    merged = rounding(add_delta(base, delta, reuse=True), dtype or _target(base, out), key=key)
    return merged if out is None else out.copy_(merged)


@torch.no_grad()
def add_delta(base: Tensor, delta: Tensor, *, reuse: bool = False) -> Tensor:
    """Add Δ to W in the wider of both dtypes, unrounded.

    Args:
        base: W; it is only read.
        delta: Δ, of W's shape.
        reuse: Write the sum into ``delta``'s memory where its dtype is wide enough.

    Raises:
        MismatchError: The shapes differ.
    """
    if base.shape != delta.shape:
        fix = "Is the adapter for this base, and is fan_in_fan_out right?"
        raise MismatchError(
            "The low-rank product doesn't fit the weight.",
            [Mismatch("B·A", str(tuple(delta.shape)), str(tuple(base.shape)), fix)],
        )
    delta = delta.to(base.device)
    if reuse and delta.dtype == torch.promote_types(base.dtype, delta.dtype):
        return delta.add_(base)
    return base + delta


def embedding_delta(lora_a: Tensor, lora_b: Tensor, scaling: Scaling, *, exact: bool = False) -> Tensor:
    """Compute what LoRA adds to an embedding: (B·A)ᵀ·s, with A (r, vocabulary) and B (width, r).

    Source: ``peft.tuners.lora.layer.Embedding.get_delta_weight``.
    """
    return lora_delta(lora_a, lora_b, scaling, fan_in_fan_out=True, exact=exact)


@torch.no_grad()
def conv_delta(lora_a: Tensor, lora_b: Tensor, scaling: Scaling, *, exact: bool = False) -> Tensor:
    """Compute what LoRA adds to a 1-, 2- or 3-D convolution (groups=1).

    Args:
        lora_a: A, of shape (r, in_channels, *kernel).
        lora_b: B, of shape (out_channels, r, 1, …).
        scaling: s.
        exact: As in `lora_delta`.

    Source: ``peft.tuners.lora.layer._ConvNd.get_delta_weight``.
    """
    a, b = _wide(lora_a), _wide(lora_b)
    if a.ndim == 4 and a.shape[2:] == (1, 1):
        product = (b.flatten(1) @ a.flatten(1))[..., None, None]
    else:
        conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[a.ndim]
        product = conv(a.transpose(0, 1), b).transpose(0, 1)
    return _as_peft_keeps(product * scaling, lora_a, exact=exact)


@torch.no_grad()
def expert_delta(
    lora_a: Tensor, lora_b: Tensor, scaling: Scaling, *, experts: int, transposed: bool, exact: bool = False
) -> Tensor:
    """Compute what LoRA adds to a stack of experts (a 3-D parameter).

    Args:
        lora_a: A of all experts, of shape (experts·r, in_features).
        lora_b: B of all experts, of shape (out_features, r·experts).
        scaling: s.
        experts: How many experts there are; with one the delta is a plain LoRA's.
        transposed: Whether the parameter is (experts, in, out) instead of (experts, out, in).
        exact: As in `lora_delta`.

    Source: ``peft.tuners.lora.layer.ParamWrapper.get_delta_weight``.
    """
    if experts == 1:
        return lora_delta(lora_a, lora_b, scaling, exact=exact)
    a = lora_a.reshape(experts, -1, lora_a.shape[-1])
    b = lora_b.reshape(lora_b.shape[0], -1, experts)
    if exact or a.device.type != "cpu":
        a, b = _wide(a), _wide(b)
    return torch.einsum("o r e, e r i -> e i o" if transposed else "o r e, e r i -> e o i", b, a) * scaling


@torch.no_grad()
def merge_dora(
    base: Tensor,
    delta: Tensor,
    magnitude: Tensor,
    *,
    norm_base: Tensor | None = None,
    out_dim: int = 0,
) -> Tensor:
    """Merge one DoRA: m / ‖W + Δ‖ · (W + Δ), with one norm for each output, unrounded.

    Args:
        base: W, in its own layout; it is only read.
        delta: s·B·A in W's layout, from `lora_delta`, `embedding_delta` or `conv_delta`.
        magnitude: m, one value for each output (a convolution's extra dimensions of 1 are allowed).
        norm_base: The weight in the norm, where W holds other adapters already; W by default.
        out_dim: Which dimension of W counts the outputs: 0, or 1 for an embedding and a Conv1D.

    Source: Liu et al., https://arxiv.org/abs/2402.09353, eq. 5; ``peft.tuners.lora.dora``.

    Example:
        >>> import torch
        >>> merge_dora(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.tensor([10.0])).tolist()
        [[6.0, 8.0]]
    """
    norm = _norm(base if norm_base is None else norm_base, delta, out_dim)
    factor = magnitude.flatten().to(base.device) / norm
    shape = [1] * base.ndim
    shape[out_dim] = -1
    return factor.view(shape) * (base + delta)


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
    if how.cast_first and not exact and base.device.type == "cpu":
        delta = delta.to(base.dtype)
    return add_delta(base, delta, reuse=True)


@torch.no_grad()
def replace_rows(base: Tensor, rows: Sequence[int], values: Tensor) -> Tensor:
    """Put trained rows into an embedding: PEFT's trainable tokens replace, they do not add.

    Source: ``peft.tuners.trainable_tokens.layer.TrainableTokensLayer.merge``.
    """
    index = torch.tensor(rows, device=base.device)
    return base.index_copy(0, index, values.to(base))


@dataclass(frozen=True)
class DeltaSurvival:
    """How much of one module's update is left after rounding to the served dtype.

    ``kept`` is ⟨served − W, Δ⟩ / ‖Δ‖²: 1 when the update arrives whole, 0 when it vanishes. ``unmoved`` is
    the share of the updated elements that still have W's rounded value. ``norm`` is ‖Δ‖.
    """

    name: str
    kept: float
    unmoved: float
    norm: float


@torch.no_grad()
def delta_survival(name: str, base: Tensor, exact: Tensor, served: Tensor) -> DeltaSurvival:
    """Compare the exact merge with what is served.

    Args:
        name: What to call the module in the report.
        base: W before the merge.
        exact: W + Δ, unrounded (fp32).
        served: W + Δ, as served.

    Example:
        >>> import torch
        >>> w = torch.ones(4, dtype=torch.bfloat16)
        >>> report = delta_survival("w", w, w.float() + 1e-4, (w.float() + 1e-4).bfloat16())
        >>> report.kept, report.unmoved
        (0.0, 1.0)
    """
    wide = base.to(torch.float32)
    delta = exact.to(torch.float32) - wide
    touched = delta != 0
    square = float(delta.double().square().sum())
    if square == 0.0:
        return DeltaSurvival(name, 1.0, 0.0, 0.0)
    moved = served.to(torch.float32) - wide
    still = (served == base.to(served.dtype)) & touched
    kept = float((moved.double() * delta.double()).sum()) / square
    return DeltaSurvival(name, kept, float(still.sum()) / float(touched.sum()), math.sqrt(square))


def _wide(factor: Tensor) -> Tensor:
    return factor.float() if factor.dtype in (torch.float16, torch.bfloat16) else factor


def _as_peft_keeps(delta: Tensor, factor: Tensor, *, exact: bool) -> Tensor:
    """PEFT hands a half-precision delta back where the factors are on a CPU; so do we, unless asked."""
    return delta if exact or factor.device.type != "cpu" else delta.to(factor.dtype)


def _target(base: Tensor, out: Tensor | None) -> torch.dtype:
    return base.dtype if out is None else out.dtype


def _norm(base: Tensor, delta: Tensor, out_dim: int) -> Tensor:
    """‖W + Δ‖ of each output, computed the way PEFT's DoRA layers compute it."""
    if base.ndim > 2:
        norm: Tensor = (base + delta).norm(p=2, dim=tuple(range(1, base.ndim)))
        return norm
    outputs_first, delta = (base.T, delta.T) if out_dim else (base, delta)
    total = outputs_first + delta
    norms: Tensor = torch.linalg.norm(total, dim=1).to(total.dtype)
    return norms


def _hash_key(seed: int, key: str) -> int:
    """FNV-1a of seed and key: the same on every machine, unlike `hash`."""
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
    """16 bits of noise for each position from ``start`` on, by murmur3's finalizer of position and seed."""
    bits = torch.arange(start, start + count, device=device, dtype=torch.int64)
    bits = (bits * 0x9E3779B1 + seed) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return ((bits ^ (bits >> 16)) & 0xFFFF).to(torch.int32)


def _check_factors(lora_a: Tensor, lora_b: Tensor) -> None:
    if lora_a.ndim == lora_b.ndim == 2 and lora_a.shape[0] == lora_b.shape[1] and lora_a.numel():
        return
    fix = "Under ZeRO-3 or FSDP2 gather both first; otherwise the adapter's tensors are damaged."
    shapes = f"A {tuple(lora_a.shape)}, B {tuple(lora_b.shape)}"
    raise MismatchError(
        "The factors don't multiply.", [Mismatch("B·A", shapes, "A (r, in), B (out, r)", fix)]
    )
