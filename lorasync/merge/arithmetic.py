"""The arithmetic of merging: W + s·B·A, and nothing else.

Pure functions of tensors: they write into nothing that they are given (except ``out``), know no module and
no name, and run the same on the trainer and in a vLLM worker. On a CPU each result is, bit for bit, what
PEFT computes out of place. On an accelerator half-precision factors are multiplied in fp32, so that a merged
element is rounded once. `docs/numerics.md` has the measurements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lorasync.errors import Mismatch, MismatchError
from lorasync.merge.rounding import NEAREST, Nearest, Rounding

if TYPE_CHECKING:
    from collections.abc import Sequence

Scaling = float | Tensor
"""What B·A is multiplied by: PEFT's `layer.scaling[adapter]`, a number or a tensor of one element."""
_ROWS_OF = 1 << 18  # elements of one block: fp32 product, base and result together fit a core's cache


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
    return _as_peft_keeps(_scaled(product.T if fan_in_fan_out else product, scaling), lora_b, exact=exact)


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
    target = dtype or (base if out is None else out).dtype
    if not exact and not fan_in_fan_out and out is None:
        return merge_plain(base, lora_a, lora_b, scaling, dtype=target)
    delta = lora_delta(lora_a, lora_b, scaling, fan_in_fan_out=fan_in_fan_out, exact=exact)
    merged = rounding(add_delta(base, delta, reuse=True), target, key=key)
    return merged if out is None else out.copy_(merged)


class Scratch:
    """Memory that merges use one after another: fresh pages for every product would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def take(self, rows: int, cols: int, like: Tensor) -> Tensor:
        """Return a (rows, cols) tensor of ``like``'s dtype and device, with anything in it; the last one is void."""
        held = self._held
        if (
            held is None
            or held.numel() < rows * cols
            or held.dtype != like.dtype
            or held.device != like.device
        ):
            self._held = held = None  # let go first
            self._held = held = torch.empty(rows * cols, dtype=like.dtype, device=like.device)
        return held[: rows * cols].view(rows, cols)


@torch.no_grad()
def merge_plain(
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Scaling,
    *,
    dtype: torch.dtype,
    exact: bool = False,
    scratch: Scratch | None = None,
) -> Tensor:
    """Merge a plain LoRA and round to nearest; on a CPU in blocks of rows, so that all but B·A stays in the cache.

    Args:
        base: W, of shape (out_features, in_features); it is only read.
        lora_a: A, of shape (r, in_features).
        lora_b: B, of shape (out_features, r).
        scaling: s; see `lora_delta`.
        dtype: The result's dtype.
        exact: As in `lora_delta`.
        scratch: Memory for the product.

    The product itself is one call: cut into blocks, a BLAS may sum in another order than PEFT's call does.
    """
    _check_factors(lora_a, lora_b)
    a, b = _wide(lora_a), _wide(lora_b)
    if scratch is not None and a.dtype == b.dtype:
        product = torch.mm(b, a, out=scratch.take(b.shape[0], a.shape[1], b))
    else:
        product = b @ a
    _check_fits(base, product)
    merged = torch.empty(base.shape, dtype=dtype, device=base.device)
    step = max(1, _ROWS_OF // product.shape[1]) if product.device.type == "cpu" else product.shape[0]
    for start in range(0, product.shape[0], step):
        rows = slice(start, start + step)
        delta = _as_peft_keeps(_scaled(product[rows], scaling), lora_b, exact=exact)
        merged[rows] = add_delta(base[rows], delta, reuse=True)
    return merged


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
    _check_fits(base, delta)
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


@torch.no_grad()
def replace_rows(base: Tensor, rows: Sequence[int], values: Tensor) -> Tensor:
    """Put trained rows into an embedding: PEFT's trainable tokens replace, they do not add.

    Source: ``peft.tuners.trainable_tokens.layer.TrainableTokensLayer.merge``.
    """
    index = torch.tensor(rows, device=base.device)
    return base.index_copy(0, index, values.to(base))


def _wide(factor: Tensor) -> Tensor:
    return factor.float() if factor.dtype in (torch.float16, torch.bfloat16) else factor


def _as_peft_keeps(delta: Tensor, factor: Tensor, *, exact: bool) -> Tensor:
    """Round a delta to the factors' half precision where PEFT does, which is on a CPU; not if ``exact``."""
    return delta if exact or factor.device.type != "cpu" else delta.to(factor.dtype)


def _scaled(product: Tensor, scaling: Scaling) -> Tensor:
    return product.mul_(scaling) if isinstance(scaling, float | int) else product * scaling


def _check_fits(base: Tensor, delta: Tensor) -> None:
    if base.shape == delta.shape:
        return
    fix = "Is the adapter for this base, and is fan_in_fan_out right?"
    raise MismatchError(
        "The low-rank product doesn't fit the weight.",
        [Mismatch("B·A", str(tuple(delta.shape)), str(tuple(base.shape)), fix)],
    )


def _norm(base: Tensor, delta: Tensor, out_dim: int) -> Tensor:
    """Compute ‖W + Δ‖ of each output, the way PEFT's DoRA layers do."""
    if base.ndim > 2:
        norm: Tensor = (base + delta).norm(p=2, dim=tuple(range(1, base.ndim)))
        return norm
    outputs_first, delta = (base.T, delta.T) if out_dim else (base, delta)
    total = outputs_first + delta
    norms: Tensor = torch.linalg.norm(total, dim=1).to(total.dtype)
    return norms


def _check_factors(lora_a: Tensor, lora_b: Tensor) -> None:
    if lora_a.ndim == lora_b.ndim == 2 and lora_a.shape[0] == lora_b.shape[1] and lora_a.numel():
        return
    fix = "Under ZeRO-3 or FSDP2 gather both first; otherwise the adapter's tensors are damaged."
    shapes = f"A {tuple(lora_a.shape)}, B {tuple(lora_b.shape)}"
    raise MismatchError(
        "The factors don't multiply.", [Mismatch("B·A", shapes, "A (r, in), B (out, r)", fix)]
    )
